//! Why there is no plan, and what would give one.

use std::fmt;

use strata_proto::{
    BLOCK_TOKENS, DType, Format, LayerRange, ModelProfile, Quantization,
    error::{Classify, Kind},
};

use super::{Offer, Problem, by_policy, cost::Costs, largest};

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Nothing to plan over.
    #[error("no worker offers a device")]
    NoDevices,
    /// Layer counts that are not the model's.
    #[error(
        "split {counts} places {sum} layers: expected positive counts that add up to the model's {layers}"
    )]
    Counts {
        /// As given.
        counts: String,
        /// What they add up to.
        sum: u64,
        /// What the model has.
        layers: u32,
    },
    /// More stages than devices.
    #[error("a split into {stages} stages needs as many devices, but there are {devices}")]
    TooManyStages {
        /// Stages asked for.
        stages: usize,
        /// Devices there are.
        devices: usize,
    },
    /// A device map that describes no pipeline.
    #[error("device map: {why}")]
    DeviceMap {
        /// What is wrong with it.
        why: String,
    },
    /// Layers that share a state are on two devices.
    #[error(
        "layers {owner} and {layer} cannot be on two devices: layer {layer} uses the keys and values of layer {owner}; end \
         the stage before layer {owner} or behind layer {layer}"
    )]
    CutsShared {
        /// The layer that has the state.
        owner: u32,
        /// The later one that uses it.
        layer: u32,
    },
    /// A range chosen by the user does not fit its device.
    #[error(
        "stage {stage} (layers {layers}) needs {} but {device} offers {}: {} are missing; give it fewer layers, more \
         memory, or lower --kv-tokens", Bytes(*needed), Bytes(*budget), Bytes(needed - budget)
    )]
    StageTooLarge {
        /// Index of the stage.
        stage: usize,
        /// Its device.
        device: String,
        /// Its layers.
        layers: LayerRange,
        /// Bytes it needs with the smallest cache.
        needed: u64,
        /// Bytes it may have.
        budget: u64,
    },
    /// The model does not fit.
    #[error(
        "the model in {format} needs {} (weights {}, a cache of {kv_tokens} tokens {}, workspace {}) in one piece and \
         more when split, but the devices offer {} together{}; {remedy}",
        Bytes(*needed), Bytes(*weights), Bytes(*kv), Bytes(*workspace), Bytes(*offered), missing(*needed, *offered)
    )]
    DoesNotFit {
        /// Format of weights that was planned.
        format: Format,
        /// Bytes of an unsplit model.
        needed: u64,
        /// Of these, weights.
        weights: u64,
        /// Smallest cache, in tokens.
        kv_tokens: u64,
        /// Smallest cache, in bytes.
        kv: u64,
        /// Workspace of one stage.
        workspace: u64,
        /// Sum of budgets.
        offered: u64,
        /// What would fit.
        remedy: Remedy,
    },
}

impl Classify for PlanError {
    fn kind(&self) -> Kind {
        match self {
            PlanError::Counts { .. }
            | PlanError::TooManyStages { .. }
            | PlanError::DeviceMap { .. }
            | PlanError::CutsShared { .. } => Kind::BadInput,
            PlanError::NoDevices | PlanError::StageTooLarge { .. } | PlanError::DoesNotFit { .. } => {
                Kind::WrongState
            }
        }
    }
}

/// A change that would make the model fit; found by trying.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remedy {
    /// A smaller cache.
    KvTokens(u64),
    /// Another format.
    DType(DType),
    /// Weights in fewer bits.
    Quantize(Quantization),
    /// Nothing but more memory.
    MoreMemory,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remedy::KvTokens(tokens) => write!(f, "it would fit with --kv-tokens {tokens}"),
            Remedy::DType(dtype) => write!(f, "it would fit with --dtype {dtype}"),
            Remedy::Quantize(quantization) => write!(f, "it would fit with --quantize {quantization}"),
            Remedy::MoreMemory => f.write_str(
                "no dtype, quantization or context would make it fit: give it more devices or memory",
            ),
        }
    }
}

/// The error for a stage that ends behind `end` layers, between two that share a state.
pub(super) fn cuts_shared(profile: &ModelProfile, end: u32) -> PlanError {
    let pair = (end..profile.layer_count()).find_map(|layer| {
        let mut owners = profile.layers[layer as usize].states.iter().filter_map(|s| s.shares);
        owners.find(|owner| *owner < end).map(|owner| (owner, layer))
    });
    let (owner, layer) = pair.unwrap_or((end.saturating_sub(1), end));
    PlanError::CutsShared { owner, layer }
}

fn missing(needed: u64, offered: u64) -> String {
    match needed.checked_sub(offered) {
        Some(missing) if missing > 0 => format!(": {} are missing", Bytes(missing)),
        _ => ", in pieces that no split of the layers fits".into(),
    }
}

/// The error for a model that fits no split, with a remedy.
pub(super) fn does_not_fit(problem: &Problem<'_>, costs: &Costs) -> PlanError {
    let (blocks, _) = costs.blocks;
    let whole = LayerRange::new(0, costs.layers());
    let (weights, kv) =
        (problem.profile.weight_bytes(whole, problem.format()), costs.state_bytes(whole, blocks));
    let needed = costs.bytes(whole, blocks);
    let block = u64::from(BLOCK_TOKENS);
    let fits = |changed: Problem<'_>| by_policy(&changed, &Costs::new(&changed)).is_some();
    let with_cache = |kv_tokens| fits(Problem { kv_tokens: Some(kv_tokens), ..*problem });
    let mut narrower = DType::ALL.into_iter().filter(|d| d.size() < problem.dtype.size());
    let mut fewer =
        Quantization::ALL.into_iter().filter(|q| problem.quantization.is_none_or(|have| have < *q));
    let remedy = if let Some(dtype) = narrower.find(|d| fits(Problem { dtype: *d, ..*problem })) {
        Remedy::DType(dtype)
    } else if with_cache(block) {
        Remedy::KvTokens(largest(1, blocks, |b| with_cache(b.saturating_mul(block))) * block)
    } else if let Some(quantization) = fewer.find(|q| fits(Problem { quantization: Some(*q), ..*problem })) {
        Remedy::Quantize(quantization)
    } else {
        Remedy::MoreMemory
    };
    PlanError::DoesNotFit {
        format: problem.format(),
        needed,
        weights,
        kv_tokens: blocks.saturating_mul(block),
        kv,
        workspace: costs.workspace_bytes(whole),
        offered: problem.offers.iter().fold(0, |sum, o| sum.saturating_add(o.device.budget_bytes)),
        remedy,
    }
}

/// A device as messages name it.
pub(super) fn name(offer: &Offer) -> String {
    format!("{}/{}", offer.worker, offer.device.id)
}

/// Bytes with a unit.
pub(super) struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        match units.iter().find(|(_, size)| self.0 >= *size) {
            Some((unit, size)) => write!(f, "{:.1} {unit}", self.0 as f64 / *size as f64),
            None => write!(f, "{} B", self.0),
        }
    }
}
