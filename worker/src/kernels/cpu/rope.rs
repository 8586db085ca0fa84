//! Rotary positions and the write of rounded keys and values into the cache.

use super::{
    Cpu,
    isa::{Kernel, Simd},
    kv_cache::KvLayer,
    math::sin_cos,
    pool::Pool,
};
use crate::kernels::{
    buffer::{Element, with_values},
    ops::{BLOCK_TOKENS, BatchRow},
};

/// Fills `angles` `(tokens, stride)`: per token `pairs` cosines, then `pairs` sines, of `position * inv_freq`.
///
/// `set` gives a row's frequencies and the factor on sine and cosine. As transformers: the product is f32; its sine and
/// cosine are computed in f64 and rounded once, times the factor.
pub(crate) fn angles<'a>(
    rows: &[BatchRow<'_>],
    set: impl Fn(&BatchRow<'_>) -> (&'a [f32], f32),
    angles: &mut [f32],
    stride: usize,
) {
    let mut out = angles.chunks_exact_mut(stride);
    for row in rows {
        let (inv_freq, factor) = set(row);
        for (position, out) in (row.start..row.start + row.count).zip(&mut out) {
            let (cos, sin) = out.split_at_mut(inv_freq.len());
            for ((c, s), f) in cos.iter_mut().zip(sin).zip(inv_freq) {
                let (sin, cos) = sin_cos(f64::from(position as f32 * f));
                *c = cos as f32 * factor;
                *s = sin as f32 * factor;
            }
        }
    }
}

/// The angles of a step's tokens, as [`angles()`] fills them.
#[derive(Clone, Copy)]
pub(crate) struct Angles<'a> {
    /// `(tokens, stride)`.
    pub table: &'a [f32],
    /// Distance from token to token.
    pub stride: usize,
    /// Pairs of dimensions that turn: `head_dim / 2` unless the rotation is partial.
    pub pairs: usize,
}

/// Rotates queries and keys in place and stores keys and values of a step in the cache.
pub(crate) struct RopeAndStore<'a> {
    /// `(tokens, (heads + 2 kv_heads) * head_dim)`: queries, keys, values.
    pub qkv: &'a mut [f32],
    /// How far each token turns; `None` where positions enter otherwise.
    pub angles: Option<Angles<'a>>,
    /// Query heads.
    pub heads: usize,
    /// Where the sequences' tokens lie.
    pub rows: &'a [BatchRow<'a>],
}

impl RopeAndStore<'_> {
    pub(super) fn run(self, cpu: &Cpu, cache: &mut KvLayer) {
        let (kv_heads, d) = (cache.kv_heads(), cache.head_dim());
        let (stride, rotated) = ((self.heads + 2 * kv_heads) * d, (self.heads + kv_heads) * d);
        if let Some(angles) = self.angles {
            cpu.pool.pieces(self.qkv, stride, Pool::grain(stride), |token, qkv| {
                cpu.isa.run(Rotate { heads: &mut qkv[..rotated], d, token, angles });
            });
        }
        let mut tokens = self.qkv.chunks_exact(stride);
        for row in self.rows {
            for (position, qkv) in (row.start..row.start + row.count).zip(&mut tokens) {
                let (keys, values) = qkv[self.heads * d..].split_at(kv_heads * d);
                let block = row.blocks[position as usize / BLOCK_TOKENS] as usize;
                cache.store(block, position as usize % BLOCK_TOKENS, keys, values);
            }
        }
    }
}

/// Rotates heads in place, and stores nothing.
pub(crate) struct Rope<'a> {
    /// Rows of `stride`, each beginning with `(heads, head_dim)`.
    pub qkv: &'a mut [f32],
    /// Distance from row to row.
    pub stride: usize,
    /// How far each token turns.
    pub angles: Angles<'a>,
    /// Heads that turn.
    pub heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

impl Rope<'_> {
    pub(super) fn run(self, cpu: &Cpu) {
        let Rope { qkv, stride, angles, heads, head_dim: d } = self;
        cpu.pool.pieces(qkv, stride, Pool::grain(stride), |token, row| {
            cpu.isa.run(Rotate { heads: &mut row[..heads * d], d, token, angles });
        });
    }
}

/// Multiplies the queries of every token by the factor of its position: `factors[position / period]`.
pub(crate) struct Sharpen<'a> {
    /// Rows of `stride`, each beginning with `width` queries.
    pub qkv: &'a mut [f32],
    /// Distance from row to row.
    pub stride: usize,
    /// Width of the queries.
    pub width: usize,
    /// Positions with equal factors, and the factor of each period.
    pub factors: (usize, &'a [f32]),
    /// Where the sequences' tokens lie.
    pub rows: &'a [BatchRow<'a>],
}

impl Sharpen<'_> {
    /// Does so.
    pub fn run(self) {
        let (period, factors) = self.factors;
        let positions = self.rows.iter().flat_map(|row| row.start..row.start + row.count);
        for (row, position) in self.qkv.chunks_exact_mut(self.stride).zip(positions) {
            let factor = factors.get(position as usize / period).copied().unwrap_or(1.0);
            row[..self.width].iter_mut().for_each(|x| *x *= factor);
        }
    }
}

struct Rotate<'a> {
    heads: &'a mut [f32],
    d: usize,
    token: usize,
    angles: Angles<'a>,
}

impl Kernel for Rotate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Angles { table, stride, pairs } = self.angles;
        let (cos, sin) = table[self.token * stride..][..2 * pairs].split_at(pairs);
        for head in self.heads.chunks_exact_mut(self.d) {
            rotate(head, cos, sin);
        }
    }
}

/// `rotate_half`: dimension `i` turns with `i + pairs`; those past the pairs stay.
#[inline(always)]
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

impl KvLayer {
    /// Rounds keys and values `(kv_heads, head_dim)` of one position into slot `slot` of `block`.
    fn store(&mut self, block: usize, slot: usize, keys: &[f32], values: &[f32]) {
        let d = self.head_dim();
        let first = block * self.kv_heads() * d * BLOCK_TOKENS;
        let (k_store, v_store) = self.parts_mut();
        with_values!(k_store, k => {
            for (i, x) in keys.iter().enumerate() {
                k[first + i * BLOCK_TOKENS + slot] = Element::from_f32(*x);
            }
        });
        with_values!(v_store, v => {
            for (h, head) in values.chunks_exact(d).enumerate() {
                let out = &mut v[first + (h * BLOCK_TOKENS + slot) * d..][..d];
                for (o, x) in out.iter_mut().zip(head) {
                    *o = Element::from_f32(*x);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_turn_by_position_times_frequency() {
        let inv_freq = [1.0, 0.01];
        let row = BatchRow { start: 5, count: 2, blocks: &[0], rope_set: 0 };
        let mut table = [0.0; 8];
        angles(&[row], |_| (&inv_freq, 1.0), &mut table, 4);
        let mut head = [1.0, 2.0, 3.0, 4.0, 5.0];
        rotate(&mut head, &table[4..6], &table[6..]);
        for i in 0..2 {
            let (s, c) = (6.0 * f64::from(inv_freq[i])).sin_cos();
            let (a, b) = ([1.0, 2.0][i], [3.0, 4.0][i]);
            assert!((f64::from(head[i]) - (a * c - b * s)).abs() < 1e-6);
            assert!((f64::from(head[i + 2]) - (b * c + a * s)).abs() < 1e-6);
        }
        assert_eq!(head[4], 5.0);
    }
}
