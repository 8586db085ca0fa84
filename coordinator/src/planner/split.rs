//! Exact assignment of contiguous layer ranges to devices in order, by dynamic programming.
//!
//! After each device the best way to have placed layers `0..l` is kept. A way is worth
//! `(penalty, stages, slowest stage)`, compared in this order. The first two add up and the third is a maximum,
//! so replacing a prefix by a better one never makes the whole worse, and the result is optimal.

use strata_proto::LayerRange;

use super::{Share, cost::Costs};

/// What comes before the time of the slowest stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Objective {
    /// As few stages as possible.
    FewestStages,
    /// As many stages as there are devices, or layers.
    EveryDevice,
}

/// What a way of placing layers is worth; less is better.
#[derive(Debug, Clone, Copy)]
pub(super) struct Worth {
    penalty: u64,
    /// Negative if many stages are wanted.
    stages: i32,
    /// Seconds of the slowest stage.
    pub slowest: f64,
}

impl Worth {
    fn better(&self, other: &Worth) -> bool {
        (self.penalty, self.stages)
            .cmp(&(other.penalty, other.stages))
            .then(self.slowest.total_cmp(&other.slowest))
            .is_lt()
    }

    /// Whether both have the same penalty and as many stages.
    pub fn same(&self, other: &Worth) -> bool {
        (self.penalty, self.stages) == (other.penalty, other.stages)
    }
}

/// The best assignment with a cache of `blocks` blocks, or `None` if there is none.
///
/// The slowest stage is measured in decode time; or, with `decode_limit` in seconds, in prefill time among the
/// assignments whose every stage decodes within the limit.
pub(super) fn assign(
    costs: &Costs,
    objective: Objective,
    blocks: u64,
    decode_limit: Option<f64>,
) -> Option<(Worth, Vec<Share>)> {
    let layers = costs.layers() as usize;
    let one = if objective == Objective::FewestStages { 1 } else { -1 };
    let mut best: Vec<Option<Worth>> = vec![None; layers + 1];
    best[0] = Some(Worth { penalty: 0, stages: 0, slowest: 0.0 });
    // For each device and each number of layers placed after it: where its range begins, if it has one.
    let mut begins = vec![vec![None::<u32>; layers + 1]; costs.offers()];
    for (offer, begins) in begins.iter_mut().enumerate() {
        let before = best.clone();
        for (first, worth) in before.iter().enumerate().take(layers) {
            let Some(worth) = worth else { continue };
            for end in first + 1..=layers {
                let range = LayerRange::new(first as u32, end as u32);
                if costs.bytes(range, blocks) > costs.budget(offer) {
                    // More layers only need more.
                    break;
                }
                let decode = costs.decode_seconds(offer, range);
                let time = match decode_limit {
                    // Sums in another order may differ in the last bits.
                    Some(limit) if decode > limit * (1.0 + 1e-12) => continue,
                    Some(_) => costs.prefill_seconds(offer, range),
                    None => decode,
                };
                let with = Worth {
                    penalty: worth.penalty + costs.penalty(offer) * u64::from(range.len()),
                    stages: worth.stages + one,
                    slowest: worth.slowest.max(time),
                };
                if best[end].as_ref().is_none_or(|old| with.better(old)) {
                    best[end] = Some(with);
                    begins[end] = Some(first as u32);
                }
            }
        }
    }
    let worth = best[layers]?;
    let mut shares = Vec::new();
    let mut end = layers;
    for offer in (0..costs.offers()).rev() {
        if let Some(first) = begins[offer][end] {
            shares.push(Share { offer, layers: LayerRange::new(first, end as u32) });
            end = first as usize;
        }
    }
    shares.reverse();
    Some((worth, shares))
}
