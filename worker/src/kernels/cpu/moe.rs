//! Which experts a token goes through, and how their answers are added up.

use super::math::exp_one;

/// Chooses the experts of every token.
///
/// As transformers' routers: softmax over all experts in f32, the likeliest taken (ties to the lowest number), their
/// shares perhaps made to add up to 1.
pub(crate) struct Route<'a> {
    /// `(tokens, experts)`; becomes the softmax.
    pub logits: &'a mut [f32],
    /// All experts.
    pub experts: usize,
    /// Whether the chosen shares are made to add up to 1.
    pub normalize: bool,
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
            softmax(logits);
            for slot in 0..self.active {
                let taken = &chosen[..slot];
                // What compares with nothing (NaN) is taken last, but something is always taken.
                let mut best: Option<usize> = None;
                for (expert, p) in logits.iter().enumerate() {
                    if !taken.contains(&(expert as u32)) && best.is_none_or(|b| *p > logits[b]) {
                        best = Some(expert);
                    }
                }
                chosen[slot] = best.unwrap_or(0) as u32;
            }
            chosen.sort_unstable();
            for (share, expert) in shares.iter_mut().zip(&*chosen) {
                *share = logits[*expert as usize];
            }
            if self.normalize {
                let total: f32 = shares.iter().sum();
                shares.iter_mut().for_each(|s| *s /= total);
            }
        }
    }
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
            normalize: true,
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
            normalize: false,
            chosen: &mut chosen,
            shares: &mut shares,
            active: 2,
        }
        .run();
        assert_eq!(chosen, [0, 1]);
    }
}
