//! Where layers go: `solve(problem) -> plan`, pure and exact.

mod cost;
mod error;
mod split;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, str::FromStr};

use strata_proto::{
    BLOCK_TOKENS, DType, Device, DeviceKind, LayerRange, MapDevice, ModelProfile, Plan, Replica, StagePlan,
};

use cost::Costs;
pub use error::{PlanError, Remedy};
use split::{Objective, assign};

/// The default cache holds this many full contexts, if they fit.
const TARGET_CONTEXTS: u64 = 16;

/// A device that a worker offers.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// Worker that has it.
    pub worker: String,
    /// What it offers.
    pub device: Device,
}

/// How layers are split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Split {
    /// The fewest stages that fit.
    Auto,
    /// Every device, the slowest stage as fast as possible.
    Balanced,
    /// As many layers for each device in turn.
    Counts(Vec<u32>),
}

impl FromStr for Split {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Split::Auto),
            "balanced" => Ok(Split::Balanced),
            counts => counts
                .split(',')
                .map(|n| n.trim().parse().ok().filter(|n| *n > 0))
                .collect::<Option<Vec<u32>>>()
                .map(Split::Counts)
                .ok_or_else(|| {
                    format!("unknown split {s:?}: expected auto, balanced, or layer counts such as 10,12,10")
                }),
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Split::Auto => f.write_str("auto"),
            Split::Balanced => f.write_str("balanced"),
            Split::Counts(counts) => {
                let counts: Vec<_> = counts.iter().map(u32::to_string).collect();
                f.write_str(&counts.join(","))
            }
        }
    }
}

/// What is to be planned.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// The model.
    pub profile: &'a ModelProfile,
    /// Devices, in the order in which they are to be used.
    pub offers: &'a [Offer],
    /// Policy.
    pub split: &'a Split,
    /// Format of weights and cache.
    pub dtype: DType,
    /// Tokens the cache must hold. `None`: 16 contexts, or as many as fit but at least one.
    pub kv_tokens: Option<u64>,
    /// Most tokens in one step.
    pub max_step_tokens: u32,
    /// Most rows with an output in one step.
    pub max_step_outputs: u32,
}

/// Layers of a stage and the offer that takes them, by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Share {
    offer: usize,
    layers: LayerRange,
}

/// Finds the plan.
///
/// # Errors
/// If there is no device, the counts do not match the model, or it does not fit; then with what would.
pub fn solve(problem: &Problem<'_>) -> Result<Plan, PlanError> {
    if problem.offers.is_empty() {
        return Err(PlanError::NoDevices);
    }
    let costs = Costs::new(problem);
    let (blocks, shares) = match problem.split {
        Split::Counts(counts) => by_counts(problem, &costs, counts)?,
        _ => by_policy(problem, &costs).ok_or_else(|| error::does_not_fit(problem, &costs))?,
    };
    Ok(describe(problem, &costs, blocks, &shares))
}

/// Smallest and wanted number of KV blocks.
fn block_bounds(problem: &Problem<'_>) -> (u64, u64) {
    let block = u64::from(BLOCK_TOKENS);
    let context = u64::from(problem.profile.context_length);
    match problem.kv_tokens {
        Some(tokens) => (tokens.div_ceil(block).max(1), tokens.div_ceil(block).max(1)),
        None => (context.div_ceil(block), (TARGET_CONTEXTS * context).div_ceil(block)),
    }
}

/// The largest number in `low..=high` for which `fits` holds, given that it holds for `low` and is monotone.
fn largest(mut low: u64, mut high: u64, mut fits: impl FnMut(u64) -> bool) -> u64 {
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

/// `auto` and `balanced`; `None` if even the smallest cache does not fit.
fn by_policy(problem: &Problem<'_>, costs: &Costs) -> Option<(u64, Vec<Share>)> {
    let objective =
        if *problem.split == Split::Auto { Objective::FewestStages } else { Objective::EveryDevice };
    let (least, wanted) = block_bounds(problem);
    // The shape (how much spills to CPUs, how many stages) is decided with the smallest cache; then the cache grows
    // for as long as the shape holds.
    let (shape, _) = assign(costs, objective, least, None)?;
    let keeps_shape =
        |blocks| assign(costs, objective, blocks, None).is_some_and(|(other, _)| other.same(&shape));
    let blocks = largest(least, wanted, keeps_shape);
    let (best, _) = assign(costs, objective, blocks, None)?;
    // Among the splits with the fastest slowest decode, the one with the fastest slowest prefill.
    let (_, shares) = assign(costs, objective, blocks, Some(best.slowest))?;
    Some((blocks, shares))
}

fn by_counts(problem: &Problem<'_>, costs: &Costs, counts: &[u32]) -> Result<(u64, Vec<Share>), PlanError> {
    let layers = problem.profile.layer_count();
    let sum: u64 = counts.iter().map(|c| u64::from(*c)).sum();
    if sum != u64::from(layers) || counts.contains(&0) {
        return Err(PlanError::Counts { counts: problem.split.to_string(), sum, layers });
    }
    if counts.len() > problem.offers.len() {
        return Err(PlanError::TooManyStages { stages: counts.len(), devices: problem.offers.len() });
    }
    let mut first = 0;
    let shares: Vec<Share> = counts
        .iter()
        .enumerate()
        .map(|(offer, count)| {
            let layers = LayerRange::new(first, first + count);
            first += count;
            Share { offer, layers }
        })
        .collect();
    let (least, wanted) = block_bounds(problem);
    let tight = |blocks| shares.iter().find(|s| costs.bytes(s.layers, blocks) > costs.budget(s.offer));
    if let Some(share) = tight(least) {
        return Err(PlanError::StageTooLarge {
            stage: shares.iter().position(|s| s == share).unwrap_or(0),
            device: error::name(&problem.offers[share.offer]),
            layers: share.layers,
            needed: costs.bytes(share.layers, least),
            budget: costs.budget(share.offer),
        });
    }
    Ok((largest(least, wanted, |blocks| tight(blocks).is_none()), shares))
}

/// Writes a decision out as a plan.
fn describe(problem: &Problem<'_>, costs: &Costs, blocks: u64, shares: &[Share]) -> Plan {
    let profile = problem.profile;
    let stage = |share: &Share| {
        let Offer { worker, device } = &problem.offers[share.offer];
        StagePlan {
            worker: worker.clone(),
            device: device.id.clone(),
            layers: share.layers,
            weight_bytes: profile.weight_bytes(share.layers, problem.dtype),
            kv_bytes: costs.kv_bytes(share.layers, blocks),
            workspace_bytes: profile.workspace_bytes(
                share.layers,
                problem.max_step_tokens,
                problem.max_step_outputs,
            ),
            predicted_ms: costs.decode_seconds(share.offer, share.layers) * 1e3,
            budget_bytes: device.budget_bytes,
            numerics: format!("{}/{}", device.numerics, problem.dtype),
            link: None,
        }
    };
    let replica = Replica {
        stages: shares.iter().map(stage).collect(),
        kv_capacity_tokens: blocks * u64::from(BLOCK_TOKENS),
    };
    Plan {
        model: profile.model.clone(),
        dtype: problem.dtype,
        hf_device_map: device_map(problem, shares),
        replicas: vec![replica],
    }
}

/// The plan as accelerate's users know it: module to device.
fn device_map(problem: &Problem<'_>, shares: &[Share]) -> BTreeMap<String, MapDevice> {
    let profile = problem.profile;
    let cpus: Vec<usize> = shares
        .iter()
        .map(|s| s.offer)
        .filter(|o| problem.offers[*o].device.kind == DeviceKind::Cpu)
        .collect();
    let name = |offer: usize| {
        let device = &problem.offers[offer].device;
        match (device.kind, cpus.iter().position(|c| *c == offer)) {
            (DeviceKind::Cuda, _) => {
                let number = device.id.rsplit(':').next().and_then(|n| n.parse().ok());
                MapDevice::Cuda(number.unwrap_or(0))
            }
            (DeviceKind::Cpu, Some(n)) if cpus.len() > 1 => MapDevice::Named(format!("cpu:{n}")),
            (DeviceKind::Cpu, _) => MapDevice::Named("cpu".into()),
        }
    };
    let mut map = BTreeMap::new();
    for share in shares {
        let range = share.layers.first as usize..share.layers.end as usize;
        let mut modules: Vec<_> = profile.layers[range].iter().collect();
        if share.layers.first == 0 {
            modules.push(&profile.embedding);
        }
        if share.layers.end == profile.layer_count() {
            modules.push(&profile.head);
        }
        let names = modules.into_iter().flat_map(|m| m.names.iter().cloned());
        map.extend(names.map(|module| (module, name(share.offer))));
    }
    map
}
