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
    pool::Parts,
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

/// Tasks per thread: enough to even out.
const TASKS: usize = 8;
/// Queries that meet a tile at a time.
const QUERIES: usize = 8;

impl Attention<'_> {
    pub(super) fn run(self, cpu: &Cpu) {
        let (kv_heads, d) = (self.cache.kv_heads(), self.cache.head_dim());
        let tokens: usize = self.rows.iter().map(|r| r.count as usize).sum();
        let slopes =
            self.slopes.map_or_else(Vec::new, |of| (0..self.heads).map(|h| of.of(self.heads, h)).collect());
        // One task for some tokens' heads that share keys and values; where tokens are few, each has its own.
        let run = (tokens * kv_heads / (cpu.pool.threads() * TASKS)).clamp(1, QUERIES);
        let out = Parts(self.out[..tokens * self.heads * d].as_mut_ptr());
        cpu.pool.run(tokens.div_ceil(run) * kv_heads, &|task| {
            let (kv_head, begin) = (task % kv_heads, task / kv_heads * run);
            let mut first = 0;
            for row in self.rows {
                let next = first + row.count as usize;
                let tokens = begin.max(first)..(begin + run).min(next);
                if !tokens.is_empty() {
                    let slopes = &slopes;
                    cpu.isa.run(Run { attention: &self, out: &out, row, first, kv_head, tokens, slopes });
                }
                first = next;
            }
        });
    }
}

/// Some tokens of a sequence, and their query heads that share one key-value head.
struct Run<'a> {
    attention: &'a Attention<'a>,
    out: &'a Parts<f32>,
    row: &'a BatchRow<'a>,
    /// Where the sequence's tokens begin in the step.
    first: usize,
    kv_head: usize,
    /// In the step.
    tokens: Range<usize>,
    /// Of each head, if scores fall with the distance.
    slopes: &'a [f32],
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        match self.attention.cache.parts() {
            (Values::F32(k), Values::F32(v)) => self.attend::<S, f32>(k, v),
            (Values::BF16(k), Values::BF16(v)) => self.attend::<S, bf16>(k, v),
            (Values::F16(k), Values::F16(v)) => self.attend::<S, f16>(k, v),
            _ => unreachable!("keys and values of a layer are made with one format"),
        }
    }
}

impl Run<'_> {
    #[inline(always)]
    fn attend<S: Simd, T: Lanes>(self, k: &[T], v: &[T]) {
        let Run { attention, row, kv_head, .. } = self;
        let (kv_heads, d) = (attention.cache.kv_heads(), attention.cache.head_dim());
        let group = attention.heads / kv_heads;
        let sequence = Sequence { k, v, blocks: row.blocks, kv_heads, kv_head, d };
        let all = self.tokens.len() * group;
        for from in (0..all).step_by(QUERIES) {
            let mut queries: [Query<'_>; QUERIES] = Default::default();
            let count = QUERIES.min(all - from);
            for (query, i) in queries.iter_mut().zip(from..from + count) {
                *query = self.query(self.tokens.start + i / group, kv_head * group + i % group);
            }
            sequence.attend::<S>(&mut queries[..count]);
        }
    }

    /// A query head of a token of the step.
    #[inline(always)]
    fn query(&self, token: usize, head: usize) -> Query<'_> {
        let Attention { q, stride, heads, cache, scale, softcap, mask, addends, distant, slopes, .. } =
            *self.attention;
        let d = cache.head_dim();
        let position = self.row.start as usize + token - self.first;
        // SAFETY: within `(tokens, heads, d)`, and this head of this token belongs to this task alone.
        let out = unsafe { std::slice::from_raw_parts_mut(self.out.at((token * heads + head) * d), d) };
        out.fill(0.0);
        let addends = addends.map(|a| &a.table[head * 2 * a.reach + a.reach - position..]);
        let distant = distant.map(|Distant { keys, queries, reach }| {
            let (width, from) = (2 * reach, head * d * 2 * reach + reach - position);
            AtDistance { keys: &keys[from..], queries: &queries[from..], width }
        });
        let falling = slopes.map(|of| Falling { of, slope: self.slopes[head], query: position });
        Query {
            q: &q[token * stride + head * d..][..d],
            out,
            seen: mask.seen(position, (self.row.start + self.row.count) as usize),
            scores: Scores { scale, softcap, addends, distant, falling },
            largest: f32::NEG_INFINITY,
            total: 0.0,
        }
    }
}

/// One head's query, and what it has met so far.
#[derive(Default)]
struct Query<'a> {
    /// Of `head_dim`.
    q: &'a [f32],
    /// The values so far, each times its weight.
    out: &'a mut [f32],
    /// Positions.
    seen: Range<usize>,
    scores: Scores<'a>,
    /// The largest score so far.
    largest: f32,
    /// The sum of the weights so far.
    total: f32,
}

impl Query<'_> {
    /// What it sees of a tile.
    #[inline(always)]
    fn seen_of(&self, tile: usize) -> Range<usize> {
        let within = |position: usize| position.saturating_sub(tile * BLOCK_TOKENS).min(BLOCK_TOKENS);
        within(self.seen.start)..within(self.seen.end)
    }
}

/// What becomes of the products of a query and keys.
#[derive(Clone, Copy, Default)]
struct Scores<'a> {
    scale: f32,
    softcap: Option<f32>,
    /// Added to scores, from the sequence's first key on.
    addends: Option<&'a [f32]>,
    /// Added to the products.
    distant: Option<AtDistance<'a>>,
    /// Added to scores.
    falling: Option<Falling>,
}

/// What is added to the scores of one query by distance.
#[derive(Clone, Copy)]
struct Falling {
    of: Slopes,
    /// Its head's.
    slope: f32,
    /// Its position.
    query: usize,
}

/// What stands for the distances of one query, from the sequence's first key on.
#[derive(Clone, Copy)]
struct AtDistance<'a> {
    keys: &'a [f32],
    queries: &'a [f32],
    /// From element to element.
    width: usize,
}

impl Scores<'_> {
    /// The products of the query `q` and the keys of a tile, which begins at key `first`, with those of what stands for their
    /// distances: one chain over the elements.
    #[inline(always)]
    fn meet<S: Simd, T: Lanes>(&self, products: S::F, first: usize, q: &[f32], tile: &[[T; LANES]]) -> S::F {
        let Some(distant) = self.distant else { return products };
        let mut sum = products;
        for (i, (key, q)) in tile.iter().zip(q).enumerate() {
            let at = first + i * distant.width;
            if let (Some(keys), Some(queries)) =
                (distant.keys[at..].first_chunk(), distant.queries[at..].first_chunk())
            {
                sum = S::mul_add(S::load(keys), S::splat(*q), sum);
                sum = S::mul_add(S::load(queries), T::widen::<S>(key), sum);
            }
        }
        sum
    }

    /// The scores for the keys from `first` on, with what is added to them.
    #[inline(always)]
    fn add<S: Simd>(&self, scores: S::F, first: usize) -> S::F {
        if let Some(Falling { of, slope, query }) = self.falling {
            let mut addends = [0.0; LANES];
            for (l, addend) in addends.iter_mut().enumerate() {
                *addend = of.addend(slope, query, first + l);
            }
            return S::add(scores, S::load(&addends));
        }
        match self.addends.and_then(|addends| addends[first..].first_chunk()) {
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

/// The keys and values of one head of a sequence.
struct Sequence<'a, T> {
    /// `[block][kv_head][d][16]`.
    k: &'a [T],
    /// `[block][kv_head][16][d]`.
    v: &'a [T],
    blocks: &'a [u32],
    kv_heads: usize,
    kv_head: usize,
    d: usize,
}

impl<T: Lanes> Sequence<'_, T> {
    /// Attention of at most [`QUERIES`] queries.
    #[inline(always)]
    fn attend<S: Simd>(&self, queries: &mut [Query<'_>]) {
        // Tiles before all windows are skipped; those left lie where they always lie.
        let begin = queries.iter().map(|q| q.seen.start / BLOCK_TOKENS).min().unwrap_or(0);
        let end = queries.iter().map(|q| q.seen.end.div_ceil(BLOCK_TOKENS)).max().unwrap_or(0);
        for tile in begin..end {
            let mut left = &mut *queries;
            while let Some(query) = left.first() {
                let seen = query.seen_of(tile);
                let alike = left.iter().take_while(|q| q.seen_of(tile) == seen).count();
                macro_rules! meet {
                    ($count:literal) => {{
                        if let (Some(queries), false) = (left.first_chunk_mut(), seen.is_empty()) {
                            self.meet::<S, $count>(queries, tile, seen);
                        }
                        $count
                    }};
                }
                let met = match alike {
                    8.. if S::ROWS >= 8 => meet!(8),
                    4.. => meet!(4),
                    2.. => meet!(2),
                    _ => meet!(1),
                };
                left = &mut left[met..];
            }
        }
        for query in queries {
            query.out.iter_mut().for_each(|o| *o /= query.total);
        }
    }

    /// `R` queries that see the same of a tile.
    #[inline(always)]
    fn meet<S: Simd, const R: usize>(&self, queries: &mut [Query<'_>; R], tile: usize, seen: Range<usize>) {
        let (d, position) = (self.d, tile * BLOCK_TOKENS);
        let block = self.blocks[tile] as usize;
        let first = (block * self.kv_heads + self.kv_head) * d * BLOCK_TOKENS;
        let keys = self.k[first..first + d * BLOCK_TOKENS].as_chunks().0;
        let products = dot::<S, T, R>(std::array::from_fn(|r| queries[r].q), keys);
        let (mut weights, mut keep) = ([[0.0; LANES]; R], [0.0; R]);
        for (r, Query { q, scores, largest, total, .. }) in queries.iter_mut().enumerate() {
            let products = scores.meet::<S, T>(products[r], position, q, keys);
            let scores = scores.add::<S>(scores.apply::<S>(products), position);
            (weights[r], keep[r]) = soften::<S>(scores, &seen, largest, total);
        }
        let values = &self.v[first..first + d * BLOCK_TOKENS];
        accumulate::<S, T, R>(queries.each_mut().map(|q| &mut *q.out), keep, &weights, seen, values);
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
    seen: &Range<usize>,
    largest: &mut f32,
    total: &mut f32,
) -> ([f32; LANES], f32) {
    let mut scores = scores;
    if *seen != (0..LANES) {
        let mut masked = S::store(scores);
        for (l, s) in masked.iter_mut().enumerate() {
            *s = if seen.contains(&l) { *s } else { f32::NEG_INFINITY };
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

/// `out = out * keep + sum over positions of weight * value` for `R` rows of `d`, `seen` positions ascending; `values`
/// is `(16, d)`.
#[inline(always)]
fn accumulate<S: Simd, T: Lanes, const R: usize>(
    out: [&mut [f32]; R],
    keep: [f32; R],
    weights: &[[f32; LANES]; R],
    seen: Range<usize>,
    values: &[T],
) {
    let d = values.len() / BLOCK_TOKENS;
    let done = d / LANES * LANES;
    for c in (0..done).step_by(LANES) {
        let mut acc = [S::splat(0.0); R];
        for r in 0..R {
            if let Some(out) = out[r][c..].first_chunk() {
                acc[r] = S::mul(S::load(out), S::splat(keep[r]));
            }
        }
        for p in seen.clone() {
            if let Some(v) = values[p * d + c..].first_chunk() {
                let v = T::widen::<S>(v);
                for r in 0..R {
                    acc[r] = S::mul_add(v, S::splat(weights[r][p]), acc[r]);
                }
            }
        }
        for r in 0..R {
            out[r][c..][..LANES].copy_from_slice(&S::store(acc[r]));
        }
    }
    for r in 0..R {
        for i in done..d {
            let o = &mut out[r][i];
            *o *= keep[r];
            for p in seen.clone() {
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
