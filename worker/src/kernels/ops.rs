//! The words that operations of every processor have in common: what a norm, an activation and a mask are, where rows
//! lie, and how groups of quantized weights and blocks of a cache are cut.

use std::ops::Range;

use strata_proto::{DType, Format};

/// Positions per block of a cache.
pub const BLOCK_TOKENS: usize = strata_proto::BLOCK_TOKENS as usize;

/// Quantized weights per group, along the input.
pub(crate) const GROUP: usize = 32;

/// A norm, with its epsilon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Norm {
    /// `x / sqrt(mean(x^2) + eps) * weight` (transformers' `LlamaRMSNorm`, all in f32).
    Rms(f32),
    /// `(x - mean) / sqrt(variance + eps) * weight + bias`.
    Layer(f32),
}

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x` times the normal distribution function.
    Gelu,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`.
    GeluTanh,
    /// `x / (1 + e^(-1.702 x))`.
    GeluQuick,
    /// `max(x, 0)`.
    Relu,
    /// The hyperbolic tangent.
    Tanh,
    /// `max(x, 0)^2`.
    ReluSquared,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `x`, or `x / 100` below 0.
    LeakyRelu,
    /// `x tanh(ln(1 + e^x))`.
    Mish,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// [`Act::Gelu`], at most 10.
    GeluClipped,
    /// `x`.
    Identity,
}

/// How the logits of a router become scores, and by what experts are chosen. Their shares are their scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Router {
    /// The softmax over all experts; the highest are chosen.
    Softmax,
    /// The sigmoid of each. The highest with a correction added are chosen, among the experts of the best groups: those
    /// whose best two add up to most (DeepSeek-V3's `noaux_tc`).
    Sigmoid {
        /// Groups of equal size that the experts form, at most [`MAX_GROUPS`].
        groups: usize,
        /// Groups that count.
        kept: usize,
    },
}

/// Groups of experts that there may be: a lane of a GPU's warp each.
pub(crate) const MAX_GROUPS: usize = 32;

/// The positions that a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AttentionMask {
    /// All of its sequence, which must be computed whole, in one step.
    Full,
    /// Its own and all before.
    Causal,
    /// Its own and those before, so many in all.
    Window(usize),
    /// Those at most so far from its own, on both sides, of a sequence that is computed whole.
    Near(usize),
}

impl AttentionMask {
    /// What the query at `position` sees of a sequence that ends at `end`.
    #[inline(always)]
    pub(crate) fn seen(self, position: usize, end: usize) -> Range<usize> {
        match self {
            AttentionMask::Full => 0..end,
            AttentionMask::Causal => 0..position + 1,
            AttentionMask::Window(window) => (position + 1).saturating_sub(window)..position + 1,
            AttentionMask::Near(most) => position.saturating_sub(most)..(position + most + 1).min(end),
        }
    }
}

/// Buckets that the distances of queries and keys fall into (MPNet, and T5's encoder).
pub(crate) const BUCKETS: usize = 32;

/// The bucket of two positions: keys behind the query in the second half; in each half short distances one by one, then
/// ever wider ones up to 128 (transformers' `relative_position_bucket` of 32 buckets, whose logarithms are these bounds).
#[inline(always)]
pub(crate) fn bucket(query: usize, key: usize) -> usize {
    const NEAR: usize = 8;
    const BOUNDS: [usize; 7] = [12, 16, 23, 32, 46, 64, 91];
    let distance = query.abs_diff(key);
    let mut bucket = distance.min(NEAR);
    for bound in BOUNDS {
        bucket += usize::from(distance >= bound);
    }
    if key > query { bucket + BUCKETS / 2 } else { bucket }
}

/// Vectors that stand for how far a query lies behind a key, or before it (DeBERTa's disentangled attention).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Distances {
    /// So many for keys behind the query, and as many for the others.
    pub span: usize,
    /// Distances from half of the span up to this one share vectors, the wider the farther; none: each has its own.
    pub farthest: Option<usize>,
    /// Which they go through.
    pub norm: Option<Norm>,
}

impl Distances {
    /// Which of the `2 * span` vectors stands for the distance of two positions (transformers' `make_log_bucket_position`, in f32
    /// as there, and the bounds of `disentangled_attention_bias`).
    pub fn row(self, query: usize, key: usize) -> usize {
        let (distance, middle) = (query.abs_diff(key), self.span / 2);
        let bucket = match self.farthest {
            Some(farthest) if distance > middle => {
                let of = |distance: usize| (distance as f64 / middle as f64) as f32;
                let share = of(distance).ln() / of(farthest - 1).ln();
                middle + (share * (middle - 1) as f32).ceil() as usize
            }
            _ => distance,
        };
        if query >= key {
            (self.span + bucket).min(2 * self.span - 1)
        } else {
            self.span.saturating_sub(bucket)
        }
    }
}

/// ALiBi: the farther a key lies behind a query, the lower its score, by a slope for each head (Press, Smith and Lewis 2022;
/// transformers' `build_alibi_tensor` of Bloom and Falcon, and `build_mpt_alibi_tensor`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Slopes {
    /// Falcon's: slope, position and their product are rounded to bf16, and the last is multiplied by this.
    pub rounded: Option<f32>,
}

impl Slopes {
    /// The slope of one of `heads` heads. Those of the largest power of two that is not more than `heads` are powers of one
    /// number, the last of them `2^-8`; the others are every second of twice as many.
    pub fn of(self, heads: usize, head: usize) -> f32 {
        let power = 1 << heads.ilog2();
        let share = match head.checked_sub(power) {
            None => (head + 1) as f64 / power as f64,
            Some(behind) => (2 * behind + 1) as f64 / (2 * power) as f64,
        };
        let slope = (-8.0 * share).exp2() as f32;
        if self.rounded.is_some() { to_bf16(slope) } else { slope }
    }

    /// What is added to the score of a key. Falcon's goes by the key's position alone, which differs by as much for all keys of a
    /// query.
    #[inline(always)]
    pub fn addend(self, slope: f32, query: usize, key: usize) -> f32 {
        match self.rounded {
            None => slope * (key as f32 - query as f32),
            Some(factor) => factor * to_bf16(slope * to_bf16(key as f32)),
        }
    }
}

/// The nearest bf16 of a number that is finite.
#[inline(always)]
fn to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

/// The tokens of one sequence within a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchRow<'a> {
    /// Position of the first token.
    pub start: u32,
    /// Tokens, at least 1.
    pub count: u32,
    /// The sequence's whole block table: position `p` lies in block `blocks[p / 16]`.
    pub blocks: &'a [u32],
    /// Which set of rotary frequencies the sequence uses.
    pub rope_set: u32,
}

/// Format and dimensions of one tensor of an activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorSpec {
    /// Format of the elements.
    pub dtype: DType,
    /// Rows, as a rule tokens of a step.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
}

impl TensorSpec {
    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.rows * self.columns * self.dtype.size() as usize
    }
}

/// Elements, keys and values together, that one position takes in the cache of a layer.
pub(crate) fn kv_elements(kv_heads: usize, head_dim: usize) -> usize {
    2 * kv_heads * head_dim
}

/// The format that an `(n, k)` matrix is held in where `format` is asked for: what does not consist of whole groups
/// stays bf16.
pub(crate) fn held_format(k: usize, format: Format) -> Format {
    match format {
        Format::Quantized(_) if !k.is_multiple_of(GROUP) => Format::Float(DType::BF16),
        format => format,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where transformers' `make_log_bucket_position` changes, of published models and of a narrow one.
    #[test]
    fn vectors_of_distances_are_shared_the_wider_the_farther() {
        let distances = |span, farthest| Distances { span, farthest: Some(farthest), norm: None };
        for (of, buckets) in [
            (
                distances(256, 512),
                vec![(128, 128), (129, 129), (132, 131), (133, 132), (134, 133), (135, 133), (136, 134)],
            ),
            (
                distances(8, 24),
                vec![(4, 4), (5, 5), (7, 5), (8, 6), (12, 6), (13, 7), (23, 7), (24, 8), (237, 8)],
            ),
        ] {
            for (distance, bucket) in buckets {
                let last = 2 * of.span - 1;
                assert_eq!(of.row(distance, 0), (of.span + bucket).min(last), "{distance}");
                assert_eq!(of.row(0, distance), of.span - bucket, "{distance}");
            }
        }
        let one_by_one = Distances { span: 5, farthest: None, norm: None };
        assert_eq!([4, 5, 9].map(|distance| one_by_one.row(distance, 0)), [9, 9, 9]);
        assert_eq!([4, 5, 9].map(|distance| one_by_one.row(0, distance)), [1, 0, 0]);
    }

    /// What transformers has for six heads, and for Falcon with as many at positions that bf16 has and has not.
    #[test]
    fn slopes_fall_by_head_and_are_rounded_as_falcons_are() {
        let plain = Slopes { rounded: None };
        let of: Vec<f32> = (0..6).map(|head| plain.of(6, head)).collect();
        assert_eq!(of, [0.25, 0.0625, 0.015_625, 0.003_906_25, 0.5, 0.125]);
        assert_eq!(plain.addend(0.25, 7, 3), -1.0);
        let rounded = Slopes { rounded: Some(0.5) };
        assert_eq!(rounded.of(16, 0), 0.707_031_25);
        for (key, expected) in [(1, 0.707_031_25), (90, 63.75), (257, 181.0), (259, 184.0)] {
            assert_eq!(rounded.addend(rounded.of(16, 0), 300, key), 0.5 * expected, "{key}");
        }
    }

    /// Where transformers' `relative_position_bucket` of 32 buckets changes, ahead of the query.
    #[test]
    fn buckets_widen_with_the_distance() {
        let first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91];
        for (number, from) in first.into_iter().enumerate() {
            let to = first.get(number + 1).map_or(600, |next| next - 1);
            for distance in [from, to] {
                assert_eq!(bucket(1000, 1000 - distance), number, "{distance}");
                let behind = if distance == 0 { 0 } else { number + 16 };
                assert_eq!(bucket(0, distance), behind, "{distance}");
            }
        }
    }
}
