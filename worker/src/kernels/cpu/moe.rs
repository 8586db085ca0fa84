//! Which experts a token goes through, and how their answers are added up.

use super::math::exp_one;
use crate::kernels::ops::{MAX_GROUPS, Router};

/// What is added to the sum of the shares of sigmoids before they are divided by it, as in transformers.
const LEAST_SUM: f32 = 1e-20;

/// Chooses the experts of every token.
///
/// As transformers' routers: scores in f32, the highest taken (ties to the lowest number), their shares perhaps made to add
/// up to 1.
pub(crate) struct Route<'a> {
    /// `(tokens, experts)`; becomes the scores.
    pub logits: &'a mut [f32],
    /// All experts.
    pub experts: usize,
    /// How logits become scores, and scores a choice.
    pub router: Router,
    /// `(experts)`, added to scores for the choice alone.
    pub correction: Option<&'a [f32]>,
    /// Whether the chosen shares are made to add up to 1.
    pub normalize: bool,
    /// Factor on the shares.
    pub scale: f32,
    /// `(tokens, active)`: chosen experts, ascending.
    pub chosen: &'a mut [u32],
    /// `(tokens, active)`: their shares.
    pub shares: &'a mut [f32],
    /// Experts per token.
    pub active: usize,
}

impl Route<'_> {
    /// Does so.
    pub fn run(self) {
        let tokens = self.logits.chunks_exact_mut(self.experts);
        let choices =
            self.chosen.chunks_exact_mut(self.active).zip(self.shares.chunks_exact_mut(self.active));
        for (logits, (chosen, shares)) in tokens.zip(choices) {
            let (mut kept, mut least) = (u32::MAX, 0.0);
            let mut size = self.experts;
            match self.router {
                Router::Softmax => softmax(logits),
                Router::Sigmoid { groups, kept: count } => {
                    logits.iter_mut().for_each(|x| *x = 1.0 / (1.0 + exp_one(-*x)));
                    size = self.experts / groups;
                    kept = best_groups(logits, self.correction, size, count);
                    least = LEAST_SUM;
                }
            }
            let worth = |expert: usize| worth(logits, self.correction, expert);
            for slot in 0..self.active {
                let taken = &chosen[..slot];
                // What compares with nothing (NaN) is taken last, but something is always taken.
                let mut best: Option<usize> = None;
                for expert in (0..self.experts).filter(|expert| kept >> (expert / size) & 1 == 1) {
                    if !taken.contains(&(expert as u32)) && best.is_none_or(|b| worth(expert) > worth(b)) {
                        best = Some(expert);
                    }
                }
                chosen[slot] = best.unwrap_or(0) as u32;
            }
            chosen.sort_unstable();
            for (share, expert) in shares.iter_mut().zip(&*chosen) {
                *share = logits[*expert as usize];
            }
            let total = if self.normalize { shares.iter().sum::<f32>() + least } else { 1.0 };
            shares.iter_mut().for_each(|s| *s = *s / total * self.scale);
        }
    }
}

/// What an expert is chosen by.
fn worth(scores: &[f32], correction: Option<&[f32]>, expert: usize) -> f32 {
    scores[expert] + correction.map_or(0.0, |c| c[expert])
}

/// The groups of `size` experts whose best two are worth most, a bit each.
fn best_groups(scores: &[f32], correction: Option<&[f32]>, size: usize, count: usize) -> u32 {
    let mut sums = [f32::NEG_INFINITY; MAX_GROUPS];
    let groups = scores.len() / size;
    for (group, sum) in sums.iter_mut().enumerate().take(groups) {
        let [mut first, mut second] = [f32::NEG_INFINITY; 2];
        for expert in group * size..(group + 1) * size {
            let x = worth(scores, correction, expert);
            if x > first {
                (first, second) = (x, first);
            } else if x > second {
                second = x;
            }
        }
        *sum = first + second;
    }
    let mut kept = 0u32;
    for _ in 0..count {
        let mut best: Option<usize> = None;
        for group in (0..groups).filter(|group| kept >> group & 1 == 0) {
            if best.is_none_or(|b| sums[group] > sums[b]) {
                best = Some(group);
            }
        }
        kept |= best.map_or(0, |group| 1 << group);
    }
    kept
}

/// `e^x / sum(e^x)`, in place.
pub(crate) fn softmax(x: &mut [f32]) {
    let largest = x.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    for v in x.iter_mut() {
        *v = exp_one(*v - largest);
    }
    let total: f32 = x.iter().sum();
    x.iter_mut().for_each(|v| *v /= total);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_experts_are_taken_lowest_first_among_equals() {
        let mut logits = [1.0, 3.0, 3.0, 0.0, 3.0, f32::NEG_INFINITY, 2.0, 1.0, 0.5, 0.0];
        let (mut chosen, mut shares) = ([9; 4], [0.0; 4]);
        Route {
            logits: &mut logits,
            experts: 5,
            router: Router::Softmax,
            correction: None,
            normalize: true,
            scale: 1.0,
            chosen: &mut chosen,
            shares: &mut shares,
            active: 2,
        }
        .run();
        assert_eq!(chosen, [1, 2, 1, 2]);
        let e = 1.0f32.exp();
        for (share, expected) in shares.iter().zip([0.5, 0.5, e / (1.0 + e), 1.0 / (1.0 + e)]) {
            assert!((share - expected).abs() < 1e-6);
        }
        let sum: f32 = logits[..5].iter().sum();
        assert!((sum - 1.0).abs() < 1e-6);
        let (mut chosen, mut shares) = ([9; 2], [0.0; 2]);
        let mut logits = [f32::NAN; 3];
        Route {
            logits: &mut logits,
            experts: 3,
            router: Router::Softmax,
            correction: None,
            normalize: false,
            scale: 1.0,
            chosen: &mut chosen,
            shares: &mut shares,
            active: 2,
        }
        .run();
        assert_eq!(chosen, [0, 1]);
    }

    #[test]
    fn corrections_choose_among_the_best_groups_and_leave_the_shares_alone() {
        // Four groups of two. Alone, expert 0 would be best; its group is not among the best two.
        let mut logits = [3.0, -9.0, 1.0, 1.0, -1.0, 2.0, 0.0, 0.5];
        let correction = [0.0, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0];
        let (mut chosen, mut shares) = ([9; 2], [0.0; 2]);
        Route {
            logits: &mut logits,
            experts: 8,
            router: Router::Sigmoid { groups: 4, kept: 2 },
            correction: Some(&correction),
            normalize: true,
            scale: 2.5,
            chosen: &mut chosen,
            shares: &mut shares,
            active: 2,
        }
        .run();
        assert_eq!(chosen, [4, 5]);
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let total = sigmoid(-1.0) + sigmoid(2.0);
        for (share, x) in shares.iter().zip([-1.0, 2.0]) {
            assert!((share - 2.5 * sigmoid(x) / total).abs() < 1e-6, "{shares:?}");
        }
    }
}
