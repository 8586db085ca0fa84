//! Exact assignment of contiguous layer ranges to devices in a given order, by dynamic programming.
//!
//! After each device the best way to have placed layers `0..l` is kept. A way is worth
//! `(penalty, stages, slowest stage)`, compared in this order. The first two add up and the third is a maximum,
//! so replacing a prefix by a better one never makes the whole worse, and the result is optimal.

use strata_proto::LayerRange;

use super::{
    Share,
    cost::{Costs, SPILLED},
};

/// What comes before the time of the slowest stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Objective {
    /// As few stages as possible.
    FewestStages,
    /// As many stages as there are devices, or layers.
    EveryDevice,
}

/// What time counts, among ways with the same penalty and number of stages.
#[derive(Debug, Clone, Copy)]
pub(super) enum Measure {
    /// None: any way is as good as another.
    Shape,
    /// Decode of the slowest stage.
    Decode,
    /// Prefill of the slowest stage, where every stage decodes within so many seconds.
    PrefillWithin(f64),
}

/// What a way of placing layers is worth; less is better.
#[derive(Debug, Clone, Copy)]
pub(super) struct Worth {
    penalty: u64,
    /// Negative if many stages are wanted.
    stages: i32,
    /// Seconds of the slowest stage, by the [`Measure`].
    pub slowest: f64,
}

impl Worth {
    /// Whether it is worth less than `other`, and so is the better one.
    pub fn better(&self, other: &Worth) -> bool {
        (self.penalty, self.stages)
            .cmp(&(other.penalty, other.stages))
            .then(self.slowest.total_cmp(&other.slowest))
            .is_lt()
    }

    /// The best that a way can come to if `more` further stages are possible.
    fn at_best(&self, objective: Objective, more: usize) -> Worth {
        match objective {
            Objective::FewestStages => *self,
            Objective::EveryDevice => Worth { stages: self.stages - more as i32, ..*self },
        }
    }

    /// Whether something spilled to a CPU.
    pub fn spills(&self) -> bool {
        self.penalty >= SPILLED
    }

    /// Whether both have the same penalty and as many stages.
    pub fn same(&self, other: &Worth) -> bool {
        (self.penalty, self.stages) == (other.penalty, other.stages)
    }
}

/// The end of the longest range from `first` on that fits `offer`, or of the shortest one if none does. Where the range
/// may not be cut, the end before.
fn longest(costs: &Costs, offer: usize, first: usize, blocks: u64) -> usize {
    let (mut low, mut high) = (first + 1, costs.layers() as usize);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if costs.fits(offer, LayerRange::new(first as u32, middle as u32), blocks) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    (first + 1..=low).rev().find(|end| costs.may_cut(*end as u32)).unwrap_or(low)
}

/// The best assignment to devices in this `order` with a cache of `blocks` blocks, or `None` if there is none.
pub(super) fn assign(
    costs: &Costs,
    order: &[usize],
    objective: Objective,
    blocks: u64,
    measure: Measure,
) -> Option<(Worth, Vec<Share>)> {
    let layers = costs.layers() as usize;
    let one = if objective == Objective::FewestStages { 1 } else { -1 };
    let mut best: Vec<Option<Worth>> = vec![None; layers + 1];
    best[0] = Some(Worth { penalty: 0, stages: 0, slowest: 0.0 });
    // For each device and each number of layers placed after it: where its range begins, if it has one.
    let mut begins = vec![vec![None::<u32>; layers + 1]; order.len()];
    for (at, begins) in begins.iter_mut().enumerate() {
        let (offer, before) = (order[at], best.clone());
        let offers_left = order.len() - at - 1;
        // What cannot end up better than the whole in hand is not followed up. That never changes the result.
        let hopeless = |way: &Worth, more: usize, whole: &Option<Worth>| {
            whole.as_ref().is_some_and(|whole| !way.at_best(objective, more).better(whole))
        };
        // Where only the number of stages counts, whoever has placed more layers at no higher price is never worse off.
        let greedy = objective == Objective::FewestStages && matches!(measure, Measure::Shape);
        let mut ahead: Option<Worth> = None;
        for (first, worth) in before.iter().enumerate().rev() {
            let Some(worth) = worth else { continue };
            if greedy && ahead.as_ref().is_some_and(|ahead| !worth.better(ahead)) {
                continue;
            }
            ahead = Some(*worth);
            if first == layers {
                continue;
            }
            let staged = Worth { stages: worth.stages + one, ..*worth };
            if hopeless(&staged, offers_left.min(layers - first - 1), &best[layers]) {
                continue;
            }
            // If a stage after this one is too many, this one must hold the rest.
            let one_more = Worth { stages: staged.stages + 1, ..staged };
            let must_end = objective == Objective::FewestStages && hopeless(&one_more, 0, &best[layers]);
            let shortest = match must_end {
                true => layers,
                // For the same reason, a device that costs nothing takes all it can.
                false if greedy && costs.penalty(offer) == 0 => longest(costs, offer, first, blocks),
                false => first + 1,
            };
            for end in shortest..=layers {
                if !costs.may_cut(end as u32) {
                    continue;
                }
                let range = LayerRange::new(first as u32, end as u32);
                if !costs.fits(offer, range, blocks) {
                    // More layers only need more.
                    break;
                }
                let decode = || costs.decode_seconds(offer, range);
                let time = match measure {
                    Measure::Shape => 0.0,
                    Measure::Decode => decode(),
                    // Sums in another order may differ in the last bits.
                    Measure::PrefillWithin(limit) if decode() > limit * (1.0 + 1e-12) => break,
                    Measure::PrefillWithin(_) => costs.prefill_seconds(offer, range),
                };
                let with = Worth {
                    penalty: worth.penalty + costs.penalty(offer) * u64::from(range.len()),
                    stages: staged.stages,
                    slowest: worth.slowest.max(time),
                };
                if hopeless(&with, offers_left.min(layers - end), &best[layers]) {
                    // More layers in this stage only make it slower, and leave fewer for others.
                    break;
                }
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
    for (at, offer) in order.iter().enumerate().rev() {
        if let Some(first) = begins[at][end] {
            shares.push(Share { offer: *offer, layers: LayerRange::new(first, end as u32) });
            end = first as usize;
        }
    }
    shares.reverse();
    Some((worth, shares))
}
