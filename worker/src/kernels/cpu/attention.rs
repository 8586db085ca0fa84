//! Attention over the paged cache, with an online softmax.
//!
//! Each query row goes over the tiles of its own sequence (one block of 16 positions each, at fixed absolute
//! positions) from left to right, and reads nothing but the rounded cache. Chunking, batching and the placement of
//! blocks therefore cannot change a bit. Slots past the row's position are masked by selection, never by a product.

use std::ops::Range;

use half::{bf16, f16};

use super::{
    Cpu,
    isa::{Kernel, LANES, Lanes, Simd},
    kv_cache::KvLayer,
    math::{exp, tanh},
};
use crate::kernels::{
    buffer::Values,
    ops::{AttentionMask, BLOCK_TOKENS, BatchRow, Slopes},
};

const _: () = assert!(BLOCK_TOKENS == LANES, "a block of keys is one tile of the product kernel");

/// Attention of the tokens of a step over their sequences' cached positions.
pub(crate) struct Attention<'a> {
    /// Rows of `stride`, each beginning with rotated queries `(heads, head_dim)`.
    pub q: &'a [f32],
    /// Distance from query row to query row.
    pub stride: usize,
    /// `(tokens, heads * head_dim)`.
    pub out: &'a mut [f32],
    /// Keys and values, those of this step included.
    pub cache: &'a KvLayer,
    /// Where the sequences' tokens lie.
    pub rows: &'a [BatchRow<'a>],
    /// Query heads.
    pub heads: usize,
    /// Factor on the scores: `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// The positions that a query sees.
    pub mask: AttentionMask,
    /// Added to scores.
    pub addends: Option<Addends<'a>>,
    /// What stands for distances.
    pub distant: Option<Distant<'a>>,
    /// By which scores fall with the distance.
    pub slopes: Option<Slopes>,
}

/// Keys and queries that stand for how far a key lies behind a query, of each for distances from `-reach` on.
#[derive(Clone, Copy)]
pub(crate) struct Distant<'a> {
    /// `(heads * head_dim, 2 * reach)`: what queries meet.
    pub keys: &'a [f32],
    /// The same, what keys meet.
    pub queries: &'a [f32],
    /// At least the length of every sequence, in whole blocks.
    pub reach: usize,
}

impl<'a> Distant<'a> {
    /// Lays out keys and queries of distances in `to`, whose halves are theirs, from `rows` of queries, keys and values side by
    /// side, `stride` long: that of `row_of(query, key)` for a query at `reach` and keys from 0 on. `width` is that of all heads.
    pub fn spread(
        cpu: &Cpu,
        (rows, stride): (&[f32], usize),
        row_of: impl Fn(usize, usize) -> usize,
        (width, reach): (usize, usize),
        to: &'a mut [f32],
    ) -> Self {
        let all = 2 * reach * width;
        let row_of: Vec<usize> = (0..2 * reach).map(|key| row_of(reach, key)).collect();
        cpu.pool.pieces(&mut to[..2 * all], 2 * reach, 8, |column, to| {
            // Keys, then queries; in the rows it is the other way.
            let column = (column + width) % (2 * width);
            to.iter_mut().zip(&row_of).for_each(|(to, row)| *to = rows[row * stride + column]);
        });
        let (keys, queries) = to[..2 * all].split_at(all);
        Distant { keys, queries, reach }
    }
}

/// What is added to scores by how far the key lies behind the query.
#[derive(Clone, Copy)]
pub(crate) struct Addends<'a> {
    /// `(heads, 2 * reach)`: of each head, for distances from `-reach` on.
    pub table: &'a [f32],
    /// At least the length of every sequence, in whole blocks.
    pub reach: usize,
}

impl Attention<'_> {
    pub(super) fn run(self, cpu: &Cpu) {
        let (kv_heads, d) = (self.cache.kv_heads(), self.cache.head_dim());
        let group = self.heads / kv_heads;
        let tokens: usize = self.rows.iter().map(|r| r.count as usize).sum();
        let slopes =
            self.slopes.map_or_else(Vec::new, |of| (0..self.heads).map(|h| of.of(self.heads, h)).collect());
        // One task for the heads of a token that share keys and values.
        cpu.pool.pieces(&mut self.out[..tokens * self.heads * d], group * d, 1, |task, out| {
            let (token, kv_head) = (task / kv_heads, task % kv_heads);
            let mut first = 0;
            for row in self.rows {
                let at = token - first;
                if at < row.count as usize {
                    let position = row.start as usize + at;
                    let seen = self.mask.seen(position, (row.start + row.count) as usize);
                    let q = &self.q[token * self.stride + kv_head * group * d..][..group * d];
                    let addends = self.addends.map_or(&[][..], |addends| {
                        &addends.table[kv_head * group * 2 * addends.reach + addends.reach - position..]
                    });
                    let stride = self.addends.map_or(0, |addends| 2 * addends.reach);
                    let distant = self.distant.map(|distant| {
                        let Distant { keys, queries, reach } = distant;
                        let (width, first) = (2 * reach, kv_head * group * d * 2 * reach);
                        let (keys, queries) = (&keys[first..], &queries[first..]);
                        AtDistance { keys, queries, width, head: d * width, from: reach - position }
                    });
                    let slopes = self.slopes.map(|of| {
                        let slopes = &slopes[kv_head * group..];
                        Falling { of, slopes, query: position }
                    });
                    let scores =
                        Scores { scale: self.scale, softcap: self.softcap, addends, stride, distant, slopes };
                    cpu.isa.run(Heads {
                        q,
                        out,
                        cache: self.cache,
                        kv_head,
                        blocks: row.blocks,
                        seen,
                        scores,
                    });
                    return;
                }
                first += row.count as usize;
            }
        });
    }
}

/// The query heads of one token that share one key-value head.
struct Heads<'a> {
    /// `(heads, head_dim)`.
    q: &'a [f32],
    /// `(heads, head_dim)`.
    out: &'a mut [f32],
    cache: &'a KvLayer,
    kv_head: usize,
    blocks: &'a [u32],
    /// Positions.
    seen: Range<usize>,
    scores: Scores<'a>,
}

impl Kernel for Heads<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        match self.cache.parts() {
            (Values::F32(k), Values::F32(v)) => self.attend::<S, f32>(k, v),
            (Values::BF16(k), Values::BF16(v)) => self.attend::<S, bf16>(k, v),
            (Values::F16(k), Values::F16(v)) => self.attend::<S, f16>(k, v),
            _ => unreachable!("keys and values of a layer are made with one format"),
        }
    }
}

impl Heads<'_> {
    #[inline(always)]
    fn attend<S: Simd, T: Lanes>(self, k: &[T], v: &[T]) {
        let Heads { q, out, cache, kv_head, blocks, seen, scores } = self;
        let (kv_heads, d) = (cache.kv_heads(), cache.head_dim());
        let sequence = Sequence { k, v, blocks, begin: seen.start, len: seen.end, kv_heads, kv_head, d };
        let (mut head, heads) = (0, q.len() / d);
        while head < heads {
            let (q, out) = (&q[head * d..], &mut out[head * d..]);
            let scores = scores.of_heads_from(head);
            head += match heads - head {
                8.. if S::ROWS >= 8 => sequence.heads::<S, 8>(q, out, scores),
                4.. => sequence.heads::<S, 4>(q, out, scores),
                2.. => sequence.heads::<S, 2>(q, out, scores),
                _ => sequence.heads::<S, 1>(q, out, scores),
            };
        }
    }
}

/// What becomes of the products of queries and keys.
#[derive(Clone, Copy)]
struct Scores<'a> {
    scale: f32,
    softcap: Option<f32>,
    /// Added for the first head and key of the query; nothing if it is empty.
    addends: &'a [f32],
    /// From head to head.
    stride: usize,
    /// Added to the products.
    distant: Option<AtDistance<'a>>,
    /// Added too.
    slopes: Option<Falling<'a>>,
}

/// What is added to the scores of one query by distance.
#[derive(Clone, Copy)]
struct Falling<'a> {
    of: Slopes,
    /// Of the first head, and of those behind it.
    slopes: &'a [f32],
    /// Its position.
    query: usize,
}

/// What stands for the distances of one query.
#[derive(Clone, Copy)]
struct AtDistance<'a> {
    /// Keys and queries of the first head, and of those behind it.
    keys: &'a [f32],
    queries: &'a [f32],
    /// From element to element.
    width: usize,
    /// From head to head.
    head: usize,
    /// Where the distance of the first key of the sequence is.
    from: usize,
}

impl Scores<'_> {
    /// Those of the heads from `head` on.
    #[inline(always)]
    fn of_heads_from(self, head: usize) -> Self {
        let addends = self.addends.get(head * self.stride..).unwrap_or_default();
        let distant = self.distant.map(|distant| AtDistance {
            keys: distant.keys.get(head * distant.head..).unwrap_or_default(),
            queries: distant.queries.get(head * distant.head..).unwrap_or_default(),
            ..distant
        });
        let slopes = self
            .slopes
            .map(|falling| Falling { slopes: falling.slopes.get(head..).unwrap_or_default(), ..falling });
        Scores { addends, distant, slopes, ..self }
    }

    /// The products of the `r`th head's query `q` and the keys of a tile, which begins at key `first`, with those of what stands
    /// for their distances: one chain over the elements.
    #[inline(always)]
    fn meet<S: Simd, T: Lanes>(
        &self,
        products: S::F,
        (r, first): (usize, usize),
        q: &[f32],
        tile: &[[T; LANES]],
    ) -> S::F {
        let Some(distant) = self.distant else { return products };
        let mut sum = products;
        let at = r * distant.head + distant.from + first;
        for (i, (key, q)) in tile.iter().zip(q).enumerate() {
            let at = at + i * distant.width;
            if let (Some(keys), Some(queries)) =
                (distant.keys[at..].first_chunk(), distant.queries[at..].first_chunk())
            {
                sum = S::mul_add(S::load(keys), S::splat(*q), sum);
                sum = S::mul_add(S::load(queries), T::widen::<S>(key), sum);
            }
        }
        sum
    }

    /// The scores of the `r`th head for the keys from `first` on, with what is added to them.
    #[inline(always)]
    fn add<S: Simd>(&self, scores: S::F, r: usize, first: usize) -> S::F {
        if let Some(Falling { of, slopes, query }) = self.slopes {
            let mut addends = [0.0; LANES];
            for (l, addend) in addends.iter_mut().enumerate() {
                *addend = of.addend(slopes[r], query, first + l);
            }
            return S::add(scores, S::load(&addends));
        }
        match self.addends.get(r * self.stride + first..).and_then(|addends| addends.first_chunk()) {
            None => scores,
            Some(addends) => S::add(scores, S::load(addends)),
        }
    }

    #[inline(always)]
    fn apply<S: Simd>(self, products: S::F) -> S::F {
        let scores = S::mul(products, S::splat(self.scale));
        match self.softcap {
            None => scores,
            Some(cap) => {
                let cap = S::splat(cap);
                S::mul(cap, tanh::<S>(S::div(scores, cap)))
            }
        }
    }
}

/// What one query row sees of one key-value head: positions `begin..len` of its blocks.
struct Sequence<'a, T> {
    /// `[block][kv_head][d][16]`.
    k: &'a [T],
    /// `[block][kv_head][16][d]`.
    v: &'a [T],
    blocks: &'a [u32],
    begin: usize,
    len: usize,
    kv_heads: usize,
    kv_head: usize,
    d: usize,
}

impl<T: Lanes> Sequence<'_, T> {
    /// Attention of `R` query heads that share this key-value head; gives back `R`.
    #[inline(always)]
    fn heads<S: Simd, const R: usize>(&self, q: &[f32], out: &mut [f32], scores: Scores<'_>) -> usize {
        let d = self.d;
        let q: [&[f32]; R] = std::array::from_fn(|r| &q[r * d..(r + 1) * d]);
        let mut largest = [f32::NEG_INFINITY; R];
        let mut total = [0.0f32; R];
        out[..R * d].fill(0.0);
        // Tiles before the window are skipped; those left lie where they always lie.
        for tile in self.begin / BLOCK_TOKENS..self.len.div_ceil(BLOCK_TOKENS) {
            let valid = self.begin.saturating_sub(tile * BLOCK_TOKENS)
                ..(self.len - tile * BLOCK_TOKENS).min(BLOCK_TOKENS);
            let block = self.blocks[tile] as usize;
            let first = (block * self.kv_heads + self.kv_head) * d * BLOCK_TOKENS;
            let keys = self.k[first..first + d * BLOCK_TOKENS].as_chunks().0;
            let products = dot::<S, T, R>(q, keys);
            let (mut weights, mut keep) = ([[0.0; LANES]; R], [0.0; R]);
            for r in 0..R {
                let products = scores.meet::<S, T>(products[r], (r, tile * BLOCK_TOKENS), q[r], keys);
                let scores = scores.add::<S>(scores.apply::<S>(products), r, tile * BLOCK_TOKENS);
                (weights[r], keep[r]) = soften::<S>(scores, &valid, &mut largest[r], &mut total[r]);
            }
            let values = &self.v[first..first + d * BLOCK_TOKENS];
            accumulate::<S, T, R>(out, d, keep, &weights, valid, values);
        }
        for r in 0..R {
            for o in &mut out[r * d..(r + 1) * d] {
                *o /= total[r];
            }
        }
        R
    }
}

/// `R` rows of activations against one tile `[d][16]`, each product one chain over `d`.
#[inline(always)]
fn dot<S: Simd, T: Lanes, const R: usize>(x: [&[f32]; R], tile: &[[T; LANES]]) -> [S::F; R] {
    let x = x.map(|x| &x[..tile.len()]);
    let mut acc = [S::splat(0.0); R];
    for (i, w) in tile.iter().enumerate() {
        let w = T::widen::<S>(w);
        for r in 0..R {
            acc[r] = S::mul_add(w, S::splat(x[r][i]), acc[r]);
        }
    }
    acc
}

/// Turns the scores of one tile into weights relative to the largest score so far, adds them to `total`, and gives
/// them and the factor by which what came before must shrink.
#[inline(always)]
fn soften<S: Simd>(
    scores: S::F,
    valid: &Range<usize>,
    largest: &mut f32,
    total: &mut f32,
) -> ([f32; LANES], f32) {
    let mut scores = scores;
    if *valid != (0..LANES) {
        let mut masked = S::store(scores);
        for (l, s) in masked.iter_mut().enumerate() {
            *s = if valid.contains(&l) { *s } else { f32::NEG_INFINITY };
        }
        scores = S::load(&masked);
    }
    let here = S::max(scores);
    let max = if here > *largest { here } else { *largest };
    // No finite score yet: subtracting would make NaN of inf - inf.
    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let weights = exp::<S>(S::sub(scores, S::splat(base)));
    let keep = S::store(exp::<S>(S::splat(*largest - base)))[0];
    *largest = max;
    *total = *total * keep + S::sum(weights);
    (S::store(weights), keep)
}

/// `out = out * keep + sum over positions of weight * value` for `R` rows of `d`, `valid` positions ascending; `values`
/// is `(16, d)`.
#[inline(always)]
fn accumulate<S: Simd, T: Lanes, const R: usize>(
    out: &mut [f32],
    d: usize,
    keep: [f32; R],
    weights: &[[f32; LANES]; R],
    valid: Range<usize>,
    values: &[T],
) {
    let done = d / LANES * LANES;
    for c in (0..done).step_by(LANES) {
        let mut acc = [S::splat(0.0); R];
        for r in 0..R {
            if let Some(out) = out[r * d + c..].first_chunk() {
                acc[r] = S::mul(S::load(out), S::splat(keep[r]));
            }
        }
        for p in valid.clone() {
            if let Some(v) = values[p * d + c..].first_chunk() {
                let v = T::widen::<S>(v);
                for r in 0..R {
                    acc[r] = S::mul_add(v, S::splat(weights[r][p]), acc[r]);
                }
            }
        }
        for r in 0..R {
            out[r * d + c..][..LANES].copy_from_slice(&S::store(acc[r]));
        }
    }
    for r in 0..R {
        for i in done..d {
            let o = &mut out[r * d + i];
            *o *= keep[r];
            for p in valid.clone() {
                *o += weights[r][p] * values[p * d + i].to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use strata_proto::DType;

    use super::*;
    use crate::kernels::{
        buffer::round_to,
        cpu::{
            isa::Isa,
            pool::Pool,
            rope::{Angles, RopeAndStore},
        },
    };

    const HEADS: usize = 7 * 2;
    const KV_HEADS: usize = 2;
    /// Not a multiple of the lanes.
    const D: usize = 22;
    const WIDTH: usize = (HEADS + 2 * KV_HEADS) * D;
    const LEN: usize = 53;
    const BLOCKS: u32 = 16;

    fn value(sequence: usize, position: usize, column: usize) -> f32 {
        ((sequence * 7919 + position * 104_729 + column * 1299) as f32 * 0.618).sin() * 2.0
    }

    /// A cache full of NaN: a slot that no token was written to must not matter.
    fn poisoned(dtype: DType) -> KvLayer {
        let mut cache = KvLayer::new(KV_HEADS, D, BLOCKS, dtype).unwrap();
        cache.poison();
        cache
    }

    /// What a query sees, the bound on its scores, and how they fall.
    type Look = (AttentionMask, Option<f32>, Option<Slopes>);

    /// A sequence, its first position in the step, how many, and its blocks.
    type Part<'a> = (usize, usize, usize, &'a [u32]);

    /// Writes and attends one step; adds each token's output to its sequence.
    fn step(cpu: &Cpu, look: Look, cache: &mut KvLayer, parts: &[Part<'_>], seen: &mut [Vec<u32>]) {
        let rows: Vec<_> = parts
            .iter()
            .map(|(_, start, count, blocks)| BatchRow {
                start: *start as u32,
                count: *count as u32,
                blocks,
                rope_set: 0,
            })
            .collect();
        let tokens = parts.iter().flat_map(|(s, start, count, _)| (*start..start + count).map(|p| (*s, p)));
        let mut qkv: Vec<f32> =
            tokens.clone().flat_map(|(s, p)| (0..WIDTH).map(move |c| value(s, p, c))).collect();
        let count = tokens.clone().count();
        let mut out = vec![f32::NAN; count * HEADS * D];
        // No pair turns: positions enter by the values alone.
        let angles = vec![0.0; count];
        let angles = Angles { table: &angles, stride: 1, pairs: 0 };
        let store = RopeAndStore { qkv: &mut qkv, angles: Some(angles), heads: HEADS, rows: &rows };
        cpu.rope_and_store(store, cache);
        let (q, out_rows) = (&qkv[..], &mut out[..]);
        cpu.attention(Attention {
            q,
            stride: WIDTH,
            out: out_rows,
            cache,
            rows: &rows,
            heads: HEADS,
            scale: 0.2,
            softcap: look.1,
            mask: look.0,
            addends: None,
            distant: None,
            slopes: look.2,
        });
        for ((s, _), row) in tokens.zip(out.chunks(HEADS * D)) {
            seen[s].extend(row.iter().map(|x| x.to_bits()));
        }
    }

    /// Softmax over all positions at once, in f64, over the rounded keys and values.
    fn plain(dtype: DType, (mask, cap, slopes): Look, position: usize, head: usize, column: usize) -> f64 {
        let kv = |p, c| f64::from(round_to(dtype, value(0, p, c)));
        let kv_head = head / (HEADS / KV_HEADS);
        let score = |p| -> f64 {
            let q = |i| f64::from(value(0, position, head * D + i));
            let s = (0..D).map(|i| q(i) * kv(p, (HEADS + kv_head) * D + i)).sum::<f64>() * 0.2;
            let capped = cap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh());
            capped + slopes.map_or(0.0, |of| f64::from(of.addend(of.of(HEADS, head), position, p)))
        };
        let Range { start: first, end } = mask.seen(position, LEN);
        let weights: Vec<f64> = (first..end).map(|p| score(p).exp()).collect();
        let at = |p| kv(p, (HEADS + KV_HEADS + kv_head) * D + column);
        weights.iter().enumerate().map(|(i, w)| w * at(first + i)).sum::<f64>() / weights.iter().sum::<f64>()
    }

    #[test]
    fn chunks_blocks_neighbours_and_instruction_sets_change_no_bit() {
        let looks = [
            (AttentionMask::Causal, None, None),
            (AttentionMask::Causal, Some(1.5), None),
            (AttentionMask::Causal, None, Some(Slopes { rounded: None })),
            (AttentionMask::Causal, None, Some(Slopes { rounded: Some(0.3) })),
            (AttentionMask::Window(19), None, None),
            (AttentionMask::Window(1), None, None),
            (AttentionMask::Full, Some(3.0), None),
        ];
        let cases = DType::ALL.into_iter().flat_map(|d| looks.map(|l| (d, l)));
        for ((dtype, look), isa) in cases.flat_map(|c| Isa::available().into_iter().map(move |i| (c, i))) {
            let mut alone = vec![Vec::new(); 2];
            for sequence in 0..2 {
                let part: &[_] = &[(sequence, 0, LEN, &[0, 1, 2, 3][..])];
                step(&Cpu::on(isa), look, &mut poisoned(dtype), part, &mut alone);
            }
            for position in [0, 15, 16, LEN - 1] {
                for (head, column) in [(0, 0), (6, 21), (7, 3), (13, 17)] {
                    let got = f32::from_bits(alone[0][(position * HEADS + head) * D + column]);
                    let expected = plain(dtype, look, position, head, column);
                    assert!((f64::from(got) - expected).abs() < 1e-5, "{dtype} {position} {head} {column}");
                }
            }
            for (threads, chunk, blocks) in [
                (1, 1, [[3, 2, 1, 0], [4, 9, 8, 15]]),
                (3, 7, [[0, 5, 10, 15], [1, 2, 3, 4]]),
                (2, 16, [[8, 7, 9, 6], [0, 1, 2, 3]]),
                (1, LEN, [[12, 0, 4, 8], [15, 11, 7, 3]]),
            ] {
                if look.0 == AttentionMask::Full && chunk < LEN {
                    continue;
                }
                let cpu = Cpu::new(isa, Pool::new(threads).into());
                let (mut cache, mut seen) = (poisoned(dtype), vec![Vec::new(); 2]);
                for start in (0..LEN).step_by(chunk) {
                    let count = chunk.min(LEN - start);
                    let parts = [(1, start, count, &blocks[1][..]), (0, start, count, &blocks[0][..])];
                    step(&cpu, look, &mut cache, &parts, &mut seen);
                }
                assert!(seen == alone, "{dtype} {} chunks of {chunk}", isa.name());
            }
        }
    }
}
