//! Where layers go: `solve(problem) -> plan`, pure and exact.

// Pure: see clippy.toml.
#![deny(clippy::disallowed_methods, clippy::print_stdout, clippy::print_stderr)]

mod cost;
mod device_map;
mod error;
mod forecast;
mod offload;
mod replace;
mod split;
#[cfg(test)]
pub(crate) mod tests;

use std::{collections::BTreeMap, fmt, str::FromStr};

use strata_proto::{
    BLOCK_TOKENS, DType, Device, DeviceKind, Format, FormatBytes, LayerRange, MapDevice, ModelProfile, Plan,
    Quantization, Replica, StagePlan, StateKind, StateRoom, error::quoted,
};

use cost::Costs;
pub use error::{PlanError, Remedy};
pub(crate) use replace::replace;
use split::{Measure, Objective, Worth, assign};

/// The default cache holds this many full contexts, if they fit.
const TARGET_CONTEXTS: u64 = 16;

/// Most copies of a model in one deployment.
const MAX_REPLICAS: usize = 64;

/// Worker of devices that are only imagined, for a preview.
pub const IMAGINED: &str = "imagined";

/// A device that a worker offers.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// Worker that has it.
    pub worker: String,
    /// Machine of the worker, whose cores its CPU stages share.
    pub host: String,
    /// What it offers.
    pub device: Device,
}

impl Offer {
    /// Whether a copy of the model beyond the first may be here. Not on a CPU without a cap: what fits nowhere else is for
    /// it, and copies on those of one host would only take each other's time.
    pub(crate) fn may_hold_further(&self) -> bool {
        self.device.kind != DeviceKind::Cpu || self.device.capped
    }
}

/// How layers are split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Split {
    /// The fewest stages that fit, and copies of the model on the devices that are left over.
    Auto,
    /// Every device, the slowest stage as fast as possible.
    Balanced,
    /// As `Balanced` over all devices but the first, which takes only what fits nowhere else.
    BalancedLow0,
    /// Each device in turn takes as many layers as fit.
    Sequential,
    /// As many layers for each device in turn.
    Counts(Vec<u32>),
    /// Module name, or a prefix of it, to device, as accelerate's users write it.
    DeviceMap(BTreeMap<String, MapDevice>),
}

impl FromStr for Split {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Split::Auto),
            "balanced" => Ok(Split::Balanced),
            "balanced_low_0" => Ok(Split::BalancedLow0),
            "sequential" => Ok(Split::Sequential),
            map if map.trim_start().starts_with('{') => serde_json::from_str(map)
                .map(Split::DeviceMap)
                .map_err(|e| format!("device map: {e}; expected {{\"module\": device, …}} with devices such as 0 or \"cpu\"")),
            counts => counts
                .split(',')
                .map(|n| n.trim().parse().ok().filter(|n| *n > 0))
                .collect::<Option<Vec<u32>>>()
                .map(Split::Counts)
                .ok_or_else(|| {
                    format!(
                        "unknown split {}: expected auto, balanced, balanced_low_0, sequential, layer counts such as \
                         10,12,10, or a device map in JSON",
                        quoted(s)
                    )
                }),
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Split::Auto => f.write_str("auto"),
            Split::Balanced => f.write_str("balanced"),
            Split::BalancedLow0 => f.write_str("balanced_low_0"),
            Split::Sequential => f.write_str("sequential"),
            Split::DeviceMap(map) => {
                let entries: Vec<_> =
                    map.iter().map(|(module, device)| format!("{module}: {device}")).collect();
                write!(f, "{{{}}}", entries.join(", "))
            }
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
    /// Format of the cache, and of weights that are not quantized.
    pub dtype: DType,
    /// What weights are turned into.
    pub quantization: Option<Quantization>,
    /// Tokens the cache must hold. `None`: 16 contexts, or as many as fit but at least one.
    pub kv_tokens: Option<u64>,
    /// Sequences whose states of fixed size are to be held at once, if layers have any.
    pub state_slots: u32,
    /// Most tokens in one step.
    pub max_step_tokens: u32,
    /// Most rows in one step, each counted by its outputs: one, or as many as it has masks, and one more for each
    /// draft.
    pub max_step_rows: u32,
}

impl Problem<'_> {
    /// Format of the weights.
    pub fn format(&self) -> Format {
        Format::of(self.dtype, self.quantization)
    }

    /// For how much state there is room with a cache of so many blocks.
    fn room(&self, blocks: u64) -> StateRoom {
        let kinds = self.profile.state_kinds();
        let fixed = kinds.iter().any(|kind| *kind != StateKind::PagedKv);
        let positions = blocks.saturating_mul(u64::from(BLOCK_TOKENS));
        StateRoom { positions, slots: if fixed { self.state_slots } else { 0 } }
    }
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
    let (shares, replicas) = plan_replicas(problem)?;
    Ok(written(problem, &shares, replicas))
}

/// The plan of these replicas, at least one; `shares` are those of the first.
fn written(problem: &Problem<'_>, shares: &[Share], replicas: Vec<Replica>) -> Plan {
    Plan {
        model: problem.profile.model.clone(),
        dtype: problem.dtype,
        quantization: problem.quantization,
        hf_device_map: device_map::export(problem, shares),
        offload: offload::offload(problem, &replicas[0]),
        warnings: warnings(problem, &replicas[0]),
        replicas,
    }
}

/// The replicas of a plan, at least one, and the shares of the first one.
fn plan_replicas(problem: &Problem<'_>) -> Result<(Vec<Share>, Vec<Replica>), PlanError> {
    let decide = |costs: &Costs| match problem.split {
        Split::Counts(counts) => by_counts(problem, costs, counts),
        Split::DeviceMap(map) => chosen(problem, costs, device_map::shares(problem, map)?),
        _ => by_policy(problem, costs).ok_or_else(|| error::does_not_fit(problem, costs)),
    };
    let mut costs = Costs::new(problem);
    let (blocks, shares) = match decide(&costs) {
        Ok(decided) => decided,
        // What fits into no memory may stay on a disk.
        Err(error) => match costs.mapped(problem) {
            Some(mapped) => {
                costs = mapped;
                decide(&costs).map_err(|_| error)?
            }
            None => return Err(error),
        },
    };
    let mut replicas = vec![describe(problem, &costs, blocks, &shares)];
    if *problem.split == Split::Auto {
        replicas.extend(further_replicas(problem, &shares));
    }
    Ok((shares, replicas))
}

/// What about a replica may surprise.
fn warnings(problem: &Problem<'_>, replica: &Replica) -> Vec<String> {
    let of = |stage: &StagePlan| {
        let is_there = |o: &&Offer| o.worker == stage.worker && o.device.id == stage.device;
        let offer = problem.offers.iter().find(is_there).filter(|_| stage.mapped)?;
        let [weights, free] = [stage.weight_bytes, stage.budget_bytes].map(error::Bytes);
        Some(format!(
            "the weights of {} on {} ({weights}) do not fit into the memory that is free ({free}): they stay \
             memory-mapped in {} and are read from disk in every step; expect seconds per token",
            stage.device, stage.worker, offer.device.spill_directory
        ))
    };
    replica.stages.iter().filter_map(of).collect()
}

/// Copies of the model on the devices that `taken` leaves over.
///
/// Each is made of the next devices that hold the model together, and split over them as if there were no others: exact
/// within a copy, though not over all of them.
fn further_replicas(problem: &Problem<'_>, taken: &[Share]) -> Vec<Replica> {
    let free = problem
        .offers
        .iter()
        .enumerate()
        .filter(|(i, offer)| offer.may_hold_further() && !taken.iter().any(|share| share.offer == *i));
    let mut left: Vec<Offer> = free.map(|(_, offer)| offer.clone()).collect();
    let mut replicas = Vec::new();
    while replicas.len() + 1 < MAX_REPLICAS && !left.is_empty() {
        let rest = Problem { offers: &left, ..*problem };
        let costs = Costs::new(&rest);
        let Some(shares) = fill(&costs, costs.blocks.0) else { break };
        let group: Vec<Offer> = shares.iter().map(|share| left[share.offer].clone()).collect();
        let within = Problem { offers: &group, ..*problem };
        let costs = Costs::new(&within);
        let Some((blocks, shares)) = by_policy(&within, &costs) else { break };
        replicas.push(describe(&within, &costs, blocks, &shares));
        let used = |offer: &Offer| shares.iter().any(|share| group[share.offer] == *offer);
        left.retain(|offer| !used(offer));
    }
    replicas
}

/// Smallest and wanted number of KV blocks.
fn block_bounds(problem: &Problem<'_>) -> (u64, u64) {
    let block = u64::from(BLOCK_TOKENS);
    let context = u64::from(problem.profile.context_length);
    if !problem.profile.state_kinds().contains(&StateKind::PagedKv) {
        // Nothing lies in blocks.
        return (0, 0);
    }
    match problem.kv_tokens {
        Some(tokens) => (tokens.div_ceil(block).max(1), tokens.div_ceil(block).max(1)),
        None => (context.div_ceil(block), (TARGET_CONTEXTS * context).div_ceil(block)),
    }
}

/// The largest number in `low..=high` for which `fits` holds, given that it holds for `low` and is monotone.
fn largest(mut low: u64, mut high: u64, mut fits: impl FnMut(u64) -> bool) -> u64 {
    // Mostly everything that is wanted fits.
    if fits(high) {
        return high;
    }
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

/// The splits that are named; `None` if even the smallest cache does not fit.
fn by_policy(problem: &Problem<'_>, costs: &Costs) -> Option<(u64, Vec<Share>)> {
    let objective = match problem.split {
        // Where memory is short, all of it counts.
        Split::Auto if !costs.maps => Objective::FewestStages,
        Split::Sequential => {
            // Filled with the smallest cache: a larger one would move layers on. What room is left makes it grow.
            let (least, wanted) = costs.blocks;
            let shares = fill(costs, least)?;
            let fits = |blocks| shares.iter().all(|s| costs.fits(s.offer, s.layers, blocks));
            return Some((largest(least, wanted, fits), shares));
        }
        _ => Objective::EveryDevice,
    };
    let listed: Vec<usize> = (0..costs.offers()).collect();
    let best = in_order(costs, &listed, objective);
    let (cpus, others): (Vec<_>, Vec<_>) = listed.into_iter().partition(|offer| costs.penalty(*offer) > 0);
    let spills = best.as_ref().is_none_or(|(worth, ..)| worth.spills());
    // A CPU at the end computes the head, one at the beginning only looks tokens up.
    let other = if *problem.split == Split::Auto && spills && !cpus.is_empty() {
        in_order(costs, &[cpus, others].concat(), objective)
    } else {
        None
    };
    let ways = best.into_iter().chain(other);
    ways.reduce(|a, b| if b.0.better(&a.0) { b } else { a }).map(|(_, blocks, shares)| (blocks, shares))
}

/// The best split over devices in this order, with what it is worth by its slowest decode and the blocks of its cache.
fn in_order(costs: &Costs, order: &[usize], objective: Objective) -> Option<(Worth, u64, Vec<Share>)> {
    let (least, wanted) = costs.blocks;
    // The shape (how much spills to CPUs, how many stages) is decided with the smallest cache; then the cache grows
    // for as long as the shape holds.
    let shape_with = |blocks| assign(costs, order, objective, blocks, Measure::Shape).map(|(worth, _)| worth);
    let shape = shape_with(least)?;
    let blocks = largest(least, wanted, |blocks| shape_with(blocks).is_some_and(|s| s.same(&shape)));
    let (best, _) = assign(costs, order, objective, blocks, Measure::Decode)?;
    // Among the splits with the fastest slowest decode, the one with the fastest slowest prefill.
    let (_, shares) = assign(costs, order, objective, blocks, Measure::PrefillWithin(best.slowest))?;
    Some((best, blocks, shares))
}

/// Each device in turn takes as many layers as fit; `None` if some are left over.
fn fill(costs: &Costs, blocks: u64) -> Option<Vec<Share>> {
    let mut shares = Vec::new();
    let mut first = 0;
    for offer in 0..costs.offers() {
        let fits = |end: &u32| costs.fits(offer, LayerRange::new(first, *end), blocks);
        let ends = (first + 1..=costs.layers()).take_while(fits);
        if let Some(end) = ends.filter(|end| costs.may_cut(*end)).last() {
            shares.push(Share { offer, layers: LayerRange::new(first, end) });
            first = end;
        }
    }
    (first == costs.layers()).then_some(shares)
}

fn by_counts(problem: &Problem<'_>, costs: &Costs, counts: &[u32]) -> Result<(u64, Vec<Share>), PlanError> {
    let layers = problem.profile.layer_count();
    let sum: u64 = counts.iter().map(|c| u64::from(*c)).sum();
    if sum != u64::from(layers) || counts.contains(&0) {
        return Err(PlanError::Counts { counts: quoted(&problem.split.to_string()), sum, layers });
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
    chosen(problem, costs, shares)
}

/// The cache for shares that the user chose, if they may be and fit.
fn chosen(problem: &Problem<'_>, costs: &Costs, shares: Vec<Share>) -> Result<(u64, Vec<Share>), PlanError> {
    if let Some(share) = shares.iter().find(|share| !costs.may_cut(share.layers.end)) {
        return Err(error::cuts_shared(problem.profile, share.layers.end));
    }
    let (least, wanted) = costs.blocks;
    let tight = |blocks| shares.iter().find(|s| !costs.fits(s.offer, s.layers, blocks));
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

/// The numerics class of a device's kernels with a plan's formats.
fn numerics(problem: &Problem<'_>, device: &Device) -> String {
    let quantization = problem.quantization.map_or(String::new(), |q| format!("/{q}"));
    format!("{}/{}{quantization}", device.numerics, problem.dtype)
}

/// Writes a decision out.
fn describe(problem: &Problem<'_>, costs: &Costs, blocks: u64, shares: &[Share]) -> Replica {
    let profile = problem.profile;
    let room = problem.room(blocks);
    let stage = |share: &Share| {
        let Offer { worker, device, .. } = &problem.offers[share.offer];
        StagePlan {
            worker: worker.clone(),
            device: device.id.clone(),
            layers: share.layers,
            weight_bytes: profile.weight_bytes(share.layers, problem.format()),
            states: profile.state_bytes(share.layers, problem.dtype, room),
            workspace_bytes: costs.workspace_bytes(share.layers),
            predicted_ms: costs.decode_seconds(share.offer, share.layers) * 1e3,
            budget_bytes: device.budget_bytes,
            numerics: numerics(problem, device),
            link: None,
            mapped: costs.bytes(share.layers, blocks) > device.budget_bytes,
            footprint: FormatBytes::of(|format| profile.weight_bytes(share.layers, format)),
        }
    };
    Replica {
        stages: shares.iter().map(stage).collect(),
        kv_capacity_tokens: room.positions,
        state_slots: room.slots,
        forecast: forecast::forecast(problem, costs, blocks, shares),
    }
}
