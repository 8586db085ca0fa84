//! Matrix product over packed weights: `out = x W^T + bias`, optionally added to the residual.
//!
//! Activations are packed first, into panels of a few rows, in the form that the weights' format multiplies with: f32,
//! bf16 pairs, or bytes in groups of 32 with a factor each. Each output is one chain over ascending inputs, whatever
//! the number of rows; bias, then the residual, are added after it.

use std::{marker::PhantomData, ops::Range};

use half::{bf16, f16};
use strata_proto::DType;

use super::{
    Cpu,
    isa::{Kernel, LANES, Lanes, Simd},
    packed::{Int4Group, Int8Group, PackedMatrix, TILE, Tiles},
    pool::Parts,
};
use crate::kernels::{
    buffer::{Element, Plain, round_to},
    ops::GROUP,
};

/// Activations `(count, width)` whose rows lie `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The first row starts here.
    pub data: &'a [f32],
    /// Distance from row to row.
    pub stride: usize,
    /// Rows.
    pub count: usize,
}

/// What becomes of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// It replaces what was there.
    Store,
    /// It replaces what was there, rounded to this format.
    StoreRounded(DType),
    /// It is added to the residual stream, rounded to this format.
    AddRounded(DType),
}

impl Output {
    /// What `old` becomes, given the product `y`.
    #[inline(always)]
    pub(super) fn apply(self, old: f32, y: f32) -> f32 {
        match self {
            Output::Store => y,
            Output::StoreRounded(dtype) => round_to(dtype, y),
            Output::AddRounded(dtype) => round_to(dtype, old + y),
        }
    }

    /// The same for some columns at a time.
    #[inline(always)]
    pub(super) fn apply_lanes<S: Simd>(self, old: &mut [f32; LANES], y: S::F) {
        let (dtype, y) = match self {
            Output::Store => (DType::F32, y),
            Output::StoreRounded(dtype) => (dtype, y),
            Output::AddRounded(dtype) => (dtype, S::add(S::load(old), y)),
        };
        // A format that is known makes vectors of each loop.
        *old = match dtype {
            DType::F32 => S::store(y),
            DType::BF16 => S::store(y).map(|y| round_to(DType::BF16, y)),
            DType::F16 => S::store(S::round_f16(y)),
        };
    }
}

/// One product: `x (rows, k)`, weight `(n, k)`, out `(rows, n)`.
pub struct Linear<'a> {
    /// The weights.
    pub weight: &'a PackedMatrix,
    /// One value per output.
    pub bias: Option<&'a [f32]>,
    /// The activations.
    pub x: Rows<'a>,
    /// Scratch for packed activations: [`packed_words`] for each row.
    pub packed: &'a mut [u32],
    /// Rows of `n`, without gaps.
    pub out: &'a mut [f32],
    /// What becomes of the product.
    pub output: Output,
}

/// Words of scratch that a row of `k` activations needs at most.
pub fn packed_words(k: usize) -> usize {
    k
}

/// Tasks per thread and product: enough to even out, few enough to stream.
const TASKS: usize = 8;
/// Multiply-adds that are worth a task of their own.
const LEAST: usize = 1 << 18;
/// How far ahead weights are asked for where they come from memory, in bytes.
const AHEAD: usize = 4096;
/// Up to so many rows, weights come from memory as fast as they are used.
const FEW_ROWS: usize = 8;
/// Packed activations that stay in a cache while all weights pass, in bytes; a few rows in tests.
const BLOCK: usize = if cfg!(test) { 1 << 13 } else { 2 << 20 };

impl Linear<'_> {
    pub(super) fn run(self, cpu: &Cpu) {
        match self.weight.tiles() {
            Tiles::F32(tiles) => self.product::<Wide<f32>, _>(cpu, tiles),
            Tiles::F16(tiles) => self.product::<Wide<f16>, _>(cpu, tiles),
            Tiles::BF16(tiles) => self.product::<BF16, _>(cpu, tiles),
            Tiles::Int8(tiles) => self.product::<Int8, _>(cpu, tiles),
            Tiles::Int4(tiles) => self.product::<Int4, _>(cpu, tiles),
        }
    }

    fn product<M: Multiply<Weights = W>, W: Plain>(self, cpu: &Cpu, weights: &[W]) {
        let (n, k, rows) = (self.weight.n(), self.weight.k(), self.x.count);
        if rows == 0 {
            return;
        }
        let words = M::words(k);
        // Packing is little work beside a product of many outputs.
        let packed = &mut self.packed[..rows * words];
        cpu.pool.pieces(packed, PACK_ROWS * words, 1, |i, out| {
            let x = Rows {
                data: &self.x.data[i * PACK_ROWS * self.x.stride..],
                count: PACK_ROWS.min(rows - i * PACK_ROWS),
                ..self.x
            };
            cpu.isa.run(Pack::<M> { x, k, out, kind: PhantomData });
        });
        let packed = &*packed;
        let tiles = n.div_ceil(TILE);
        let per_tile = weights.len() / tiles.max(1);
        // Blocks of whole packs, all alike.
        let packs = rows.div_ceil(PACK_ROWS);
        let blocks = (packs * PACK_ROWS * words * size_of::<u32>()).div_ceil(BLOCK).clamp(1, packs);
        let block = packs.div_ceil(blocks) * PACK_ROWS;
        let least = LEAST.div_ceil(TILE * k * block.min(rows));
        let share = tiles.div_ceil(cpu.pool.threads() * TASKS).max(least).max(1);
        let shares = tiles.div_ceil(share);
        let out = Parts(self.out[..rows * n].as_mut_ptr());
        cpu.pool.run(rows.div_ceil(block) * shares, &|task| {
            let (first, tile) = (task / shares * block, task % shares * share);
            cpu.isa.run(Product::<M> {
                weights,
                per_tile,
                tiles: tile..tiles.min(tile + share),
                packed,
                words,
                rows: first..rows.min(first + block),
                n,
                bias: self.bias,
                out: &out,
                output: self.output,
            });
        });
    }
}

/// Rows that are packed by one task: a multiple of every panel's rows.
const PACK_ROWS: usize = 24;

/// Work on rows, some of them at a time.
trait ByPanel: Sized {
    /// Does `R` rows from row `first` on.
    fn panel<S: Simd, const R: usize>(&mut self, first: usize);

    /// Does all of `rows`, which begin with a pack, in panels that depend on no more than the pack that a row is in.
    #[inline(always)]
    fn by_panel<S: Simd>(mut self, rows: Range<usize>) {
        let mut first = rows.start;
        while first < rows.end {
            let left = (rows.end - first).min(PACK_ROWS - first % PACK_ROWS);
            macro_rules! panel {
                ($rows:literal) => {{
                    self.panel::<S, $rows>(first);
                    $rows
                }};
            }
            first += match left {
                12.. if S::ROWS >= 12 && left != 16 => panel!(12),
                8.. if S::ROWS >= 8 => panel!(8),
                4.. if S::ROWS >= 4 => panel!(4),
                2.. => panel!(2),
                _ => panel!(1),
            };
        }
    }
}

/// How weights of one format multiply.
trait Multiply: Sync {
    /// One step over the inputs of a tile.
    type Weights: Plain;

    /// Words of a packed row of `k` activations.
    fn words(k: usize) -> usize;

    /// Packs `R` rows of `k` activations.
    fn pack<S: Simd, const R: usize>(x: [&[f32]; R], out: &mut [u32]);

    /// `R` packed rows times a tile.
    fn dot<S: Simd, const R: usize>(tile: &[Self::Weights], x: &[u32]) -> [[S::F; 2]; R];
}

/// Some rows to pack.
struct Pack<'a, M> {
    x: Rows<'a>,
    k: usize,
    out: &'a mut [u32],
    kind: PhantomData<M>,
}

impl<M: Multiply> Kernel for Pack<'_, M> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let rows = self.x.count;
        self.by_panel::<S>(0..rows);
    }
}

impl<M: Multiply> ByPanel for Pack<'_, M> {
    #[inline(always)]
    fn panel<S: Simd, const R: usize>(&mut self, first: usize) {
        let (x, words) = (self.x, M::words(self.k));
        let rows = std::array::from_fn(|r| &x.data[(first + r) * x.stride..][..self.k]);
        M::pack::<S, R>(rows, &mut self.out[first * words..(first + R) * words]);
    }
}

/// Some tiles of a product, over some rows.
struct Product<'a, M: Multiply> {
    weights: &'a [M::Weights],
    per_tile: usize,
    tiles: Range<usize>,
    packed: &'a [u32],
    /// Words of a packed row.
    words: usize,
    rows: Range<usize>,
    n: usize,
    bias: Option<&'a [f32]>,
    out: &'a Parts<f32>,
    output: Output,
}

impl<M: Multiply> Kernel for Product<'_, M> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for number in self.tiles.clone() {
            Tile { product: &self, number }.by_panel::<S>(self.rows.clone());
        }
    }
}

/// One tile of a product.
struct Tile<'a, M: Multiply> {
    product: &'a Product<'a, M>,
    number: usize,
}

impl<M: Multiply> ByPanel for Tile<'_, M> {
    #[inline(always)]
    fn panel<S: Simd, const R: usize>(&mut self, first: usize) {
        let Tile { product, number } = *self;
        let Product { per_tile, words, n, bias, output, .. } = *product;
        let tile = &product.weights[number * per_tile..(number + 1) * per_tile];
        let acc = M::dot::<S, R>(tile, &product.packed[first * words..(first + R) * words]);
        for (h, column) in [number * TILE, number * TILE + LANES].into_iter().enumerate() {
            let width = n.saturating_sub(column).min(LANES);
            let bias = bias.map(|b| &b[column.min(n)..][..width]);
            for (r, acc) in acc.iter().enumerate() {
                let at = product.out.at((first + r) * n + column);
                // SAFETY: within `(rows, n)`, and these columns belong to this tile alone, which is one task's.
                let out = unsafe { std::slice::from_raw_parts_mut(at, width) };
                match (out.first_chunk_mut::<LANES>(), bias.map(<[f32]>::first_chunk)) {
                    (Some(out), None) => output.apply_lanes::<S>(out, acc[h]),
                    (Some(out), Some(Some(bias))) => {
                        output.apply_lanes::<S>(out, S::add(acc[h], S::load(bias)));
                    }
                    _ => {
                        for (i, (o, a)) in out.iter_mut().zip(S::store(acc[h])).enumerate() {
                            *o = output.apply(*o, bias.map_or(a, |b| a + b[i]));
                        }
                    }
                }
            }
        }
    }
}

/// The halves of a row of a tile.
#[inline(always)]
fn halves<T>(row: &[T; TILE]) -> [&[T; LANES]; 2] {
    let (chunks, _) = row.as_chunks::<LANES>();
    [&chunks[0], &chunks[1]]
}

/// Asks for the weights that a panel of `R` rows needs soon.
#[inline(always)]
fn prefetch<S: Simd, W, const R: usize>(weights: &W) {
    if R <= FEW_ROWS {
        let from = std::ptr::from_ref(weights).cast::<u8>();
        for line in (0..size_of::<W>()).step_by(64) {
            S::prefetch(from.wrapping_add(AHEAD + line));
        }
    }
}

/// Weights in a format that is widened as it is read, activations in f32.
struct Wide<T>(PhantomData<T>);

impl<T: Lanes> Multiply for Wide<T> {
    type Weights = [T; TILE];

    fn words(k: usize) -> usize {
        k
    }

    #[inline(always)]
    fn pack<S: Simd, const R: usize>(x: [&[f32]; R], out: &mut [u32]) {
        for (i, out) in out.as_chunks_mut::<R>().0.iter_mut().enumerate() {
            *out = std::array::from_fn(|r| x[r][i].to_bits());
        }
    }

    #[inline(always)]
    fn dot<S: Simd, const R: usize>(tile: &[[T; TILE]], x: &[u32]) -> [[S::F; 2]; R] {
        let mut acc = [[S::splat(0.0); 2]; R];
        for (w, x) in tile.iter().zip(x.as_chunks::<R>().0) {
            prefetch::<S, _, R>(w);
            let [low, high] = halves(w);
            let w = [T::widen::<S>(low), T::widen::<S>(high)];
            for r in 0..R {
                let x = S::splat(f32::from_bits(x[r]));
                acc[r] = [S::mul_add(w[0], x, acc[r][0]), S::mul_add(w[1], x, acc[r][1])];
            }
        }
        acc
    }
}

/// Weights and activations in bf16, by pairs.
struct BF16;

impl Multiply for BF16 {
    type Weights = [u32; TILE];

    fn words(k: usize) -> usize {
        k.div_ceil(2)
    }

    #[inline(always)]
    fn pack<S: Simd, const R: usize>(x: [&[f32]; R], out: &mut [u32]) {
        let round = |x: f32| u32::from(<bf16 as Element>::from_f32(x).to_bits());
        for (r, x) in x.iter().enumerate() {
            let (whole, rest) = x.as_chunks::<TILE>();
            let (packed, tail) = out.split_at_mut(whole.len() * LANES * R);
            for (x, out) in whole.iter().zip(packed.chunks_exact_mut(LANES * R)) {
                let mut rounded = [0; TILE];
                for l in 0..TILE {
                    rounded[l] = round(x[l]);
                }
                for (pair, out) in rounded.as_chunks::<2>().0.iter().zip(out.chunks_exact_mut(R)) {
                    out[r] = pair[0] | pair[1] << 16;
                }
            }
            for (pair, out) in rest.chunks(2).zip(tail.chunks_exact_mut(R)) {
                out[r] = round(pair[0]) | pair.get(1).map_or(0, |x| round(*x)) << 16;
            }
        }
    }

    #[inline(always)]
    fn dot<S: Simd, const R: usize>(tile: &[[u32; TILE]], x: &[u32]) -> [[S::F; 2]; R] {
        let mut acc = [[S::splat(0.0); 2]; R];
        for (w, x) in tile.iter().zip(x.as_chunks::<R>().0) {
            prefetch::<S, _, R>(w);
            let w = halves(w);
            for r in 0..R {
                acc[r] = [S::dot_bf16(acc[r][0], w[0], x[r]), S::dot_bf16(acc[r][1], w[1], x[r])];
            }
        }
        acc
    }
}

/// Words of a group of packed bytes of one row: the bytes, their factor, and their sum.
const GROUP_WORDS: usize = GROUP / 4 + 2;

/// Packs rows as bytes within +-127, rounded to nearest even. By group: `(8, R)` quads of bytes, `R` factors (NaN if a
/// value is not finite), and what `word` makes of the sum of each row's bytes and their factor.
#[inline(always)]
fn pack_bytes<S: Simd, const R: usize>(x: [&[f32]; R], out: &mut [u32], word: impl Fn(i32, f32) -> u32) {
    for (r, x) in x.iter().enumerate() {
        for (values, out) in x.as_chunks().0.iter().zip(out.chunks_exact_mut(GROUP_WORDS * R)) {
            let values: &[f32; GROUP] = values;
            let [low, high] = halves(values);
            let values = [S::load(low), S::load(high)];
            let (a, b) = (S::largest(values[0]), S::largest(values[1]));
            let largest = if a > b { a } else { b };
            // Of zeros, and of what is too small to be divided by.
            let inverse = 127.0 / largest;
            let inverse = S::splat(if inverse.is_finite() { inverse } else { 0.0 });
            let finite = S::is_finite(values[0]) && S::is_finite(values[1]);
            // What is not finite becomes any integer.
            let mut sum = 0i32;
            for h in 0..2 {
                let (bytes, half) = S::to_bytes(S::mul(values[h], inverse));
                for (q, quad) in bytes.as_chunks().0.iter().enumerate() {
                    out[(h * LANES / 4 + q) * R + r] = u32::from_le_bytes(*quad);
                }
                sum = sum.wrapping_add(half);
            }
            let factor = if finite { largest / 127.0 } else { f32::NAN };
            out[GROUP / 4 * R + r] = factor.to_bits();
            out[(GROUP / 4 + 1) * R + r] = word(sum, factor);
        }
    }
}

/// A packed group of `R` rows: quads, factors, sums.
#[inline(always)]
fn group<const R: usize>(x: &[u32]) -> (&[[u32; R]], &[u32], &[u32]) {
    let (quads, rest) = x.split_at(GROUP / 4 * R);
    let (factors, sums) = rest.split_at(R);
    (quads.as_chunks().0, factors, sums)
}

/// Adds the products of a group, which are integers, to `acc`.
#[inline(always)]
fn add_group<S: Simd, const R: usize>(
    acc: &mut [S::F; R],
    products: [S::I; R],
    weights: &[f16; LANES],
    factors: &[u32],
) {
    let weights = S::load_f16(weights);
    for r in 0..R {
        let factor = S::mul(weights, S::splat(f32::from_bits(factors[r])));
        acc[r] = S::mul_add(S::to_f32(products[r]), factor, acc[r]);
    }
}

/// What two halves of a tile yield, row by row.
#[inline(always)]
fn beside<F: Copy, const R: usize>(low: [F; R], high: [F; R]) -> [[F; 2]; R] {
    std::array::from_fn(|r| [low[r], high[r]])
}

/// Weights and activations as bytes in groups.
struct Int8;

impl Int8 {
    #[inline(always)]
    fn half<S: Simd, const R: usize>(weights: &[Int8Group], x: &[u32]) -> [S::F; R] {
        let mut acc = [S::splat(0.0); R];
        for (w, x) in weights.iter().zip(x.chunks_exact(GROUP_WORDS * R)) {
            prefetch::<S, _, R>(w);
            let (quads, factors, sums) = group::<R>(x);
            let mut products = [S::splat_i32(0); R];
            for r in 0..R {
                products[r] = S::splat_i32(sums[r] as i32);
            }
            for (w, x) in w.quads.iter().zip(quads) {
                for r in 0..R {
                    products[r] = S::dot_bytes(products[r], w, x[r]);
                }
            }
            add_group::<S, R>(&mut acc, products, &w.factors, factors);
        }
        acc
    }
}

impl Multiply for Int8 {
    type Weights = Int8Group;

    fn words(k: usize) -> usize {
        k / GROUP * GROUP_WORDS
    }

    #[inline(always)]
    fn pack<S: Simd, const R: usize>(x: [&[f32]; R], out: &mut [u32]) {
        // What makes up for the 128 by which weights were raised.
        pack_bytes::<S, R>(x, out, |sum, _| sum.wrapping_mul(-128) as u32);
    }

    #[inline(always)]
    fn dot<S: Simd, const R: usize>(tile: &[Int8Group], x: &[u32]) -> [[S::F; 2]; R] {
        let (low, high) = tile.split_at(tile.len() / 2);
        beside(Self::half::<S, R>(low, x), Self::half::<S, R>(high, x))
    }
}

/// Weights as half bytes above the least of their group, activations as bytes, in groups.
struct Int4;

impl Int4 {
    #[inline(always)]
    fn half<S: Simd, const R: usize>(weights: &[Int4Group], x: &[u32]) -> [S::F; R] {
        let mut acc = [S::splat(0.0); R];
        for (w, x) in weights.iter().zip(x.chunks_exact(GROUP_WORDS * R)) {
            prefetch::<S, _, R>(w);
            let (quads, factors, sums) = group::<R>(x);
            let mut products = [S::splat_i32(0); R];
            for (w, x) in w.octets.iter().zip(quads.as_chunks::<2>().0) {
                for r in 0..R {
                    products[r] = S::dot_nibbles(products[r], w, x[0][r], x[1][r]);
                }
            }
            add_group::<S, R>(&mut acc, products, &w.factors, factors);
            let least = S::load_f16(&w.least);
            for r in 0..R {
                acc[r] = S::mul_add(least, S::splat(f32::from_bits(sums[r])), acc[r]);
            }
        }
        acc
    }
}

impl Multiply for Int4 {
    type Weights = Int4Group;

    fn words(k: usize) -> usize {
        Int8::words(k)
    }

    #[inline(always)]
    fn pack<S: Simd, const R: usize>(x: [&[f32]; R], out: &mut [u32]) {
        // What the least of the weights is multiplied by.
        pack_bytes::<S, R>(x, out, |sum, factor| (sum as f32 * factor).to_bits());
    }

    #[inline(always)]
    fn dot<S: Simd, const R: usize>(tile: &[Int4Group], x: &[u32]) -> [[S::F; 2]; R] {
        let (low, high) = tile.split_at(tile.len() / 2);
        beside(Self::half::<S, R>(low, x), Self::half::<S, R>(high, x))
    }
}

#[cfg(test)]
mod tests {
    use strata_proto::{Format, Quantization};

    use super::*;
    use crate::kernels::{
        buffer::Arena,
        cpu::{isa::Isa, packed::Elements, pool::Pool},
    };

    fn values(seed: u32, len: usize) -> Vec<f32> {
        let mut s = seed;
        (0..len)
            .map(|_| {
                s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (s >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn matrix(n: usize, k: usize, format: Format) -> PackedMatrix {
        let mut w = PackedMatrix::zeros(n, k, format, &mut Arena::new(1 << 20).unwrap()).unwrap();
        let cpu = Cpu::on(Isa::detect());
        let elements = Elements { first: 0, total: n * k, values: &values(7, n * k), groups: &[], cpu: &cpu };
        w.write(&elements, |i| (i / k, i % k)).unwrap();
        w
    }

    /// A product of `count` rows from row `first` on; what was in the output is the same for a row in every call.
    fn product(cpu: &Cpu, w: &PackedMatrix, x: Rows<'_>, output: Output, biased: bool) -> Vec<f32> {
        let (n, k) = (w.n(), w.k());
        let bias = values(3, n);
        let mut out: Vec<f32> = (0..x.count).flat_map(|_| values(9, n)).collect();
        let mut packed = vec![0; x.count * packed_words(k)];
        cpu.linear(Linear {
            weight: w,
            bias: biased.then_some(&bias),
            x,
            packed: &mut packed,
            out: &mut out,
            output,
        });
        out
    }

    #[test]
    fn any_number_of_rows_and_threads_equal_single_rows_on_every_instruction_set() {
        let sizes = [(16, 32), (33, 37), (50, 96), (7, 1), (100, 64)];
        for (format, (n, k)) in Format::ALL.into_iter().flat_map(|f| sizes.map(|s| (f, s))) {
            let w = matrix(n, k, format);
            // A stride longer than the row, with NaN between the rows.
            let stride = k + 3;
            let mut x = vec![f32::NAN; 61 * stride];
            for (r, row) in values(5, 61 * k).chunks(k).enumerate() {
                x[r * stride..][..k].copy_from_slice(row);
            }
            for (output, biased) in [(Output::Store, true), (Output::AddRounded(DType::BF16), false)] {
                for isa in Isa::available() {
                    let bits = |threads, first: usize, count| {
                        let cpu = Cpu::new(isa, Pool::new(threads).into());
                        let x = Rows { data: &x[first * stride..], stride, count };
                        let out = product(&cpu, &w, x, output, biased);
                        out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                    };
                    let singles: Vec<u32> = (0..61).flat_map(|r| bits(1, r, 1)).collect();
                    for m in (1..=33).chain([61]) {
                        assert_eq!(bits(1, 0, m), singles[..m * n], "{} {format} m={m} n={n}", isa.name());
                    }
                    assert_eq!(bits(3, 0, 61), singles);
                }
            }
        }
    }

    #[test]
    fn products_match_a_plain_double_precision_sum_on_every_instruction_set() {
        let (m, n, k) = (13, 69, 320);
        let (x, plain) = (values(5, m * k), values(7, n * k));
        for (format, isa) in
            Format::ALL.into_iter().flat_map(|f| Isa::available().into_iter().map(move |i| (f, i)))
        {
            let w = matrix(n, k, format);
            let rows = Rows { data: &x, stride: k, count: m };
            let out = product(&Cpu::new(isa, Pool::new(1).into()), &w, rows, Output::Store, false);
            // Of the sum's expected magnitude, sqrt(k) / 3.
            let within = match format {
                Format::Float(DType::F32) => 1e-6,
                Format::Float(DType::F16) => 1e-3,
                Format::Float(DType::BF16) => 1e-2,
                Format::Quantized(Quantization::Int8) => 2e-2,
                Format::Quantized(Quantization::Int4) => 0.3,
            };
            let mut held = vec![0.0; k];
            for c in 0..n {
                w.gather(c, &mut held);
                for r in 0..m {
                    let sum = |w: &[f32]| -> f64 {
                        (0..k).map(|i| f64::from(x[r * k + i]) * f64::from(w[i])).sum()
                    };
                    let got = f64::from(out[r * n + c]);
                    let scale = (k as f64).sqrt() / 3.0;
                    assert!(
                        (got - sum(&plain[c * k..])).abs() < within * scale * 4.0,
                        "{format} {}",
                        isa.name()
                    );
                    // Against the weights as they are held, only the activations' rounding is left.
                    let within =
                        if matches!(format, Format::Float(DType::F32 | DType::F16)) { 1e-6 } else { 1e-2 };
                    assert!((got - sum(&held)).abs() < within * scale * 4.0, "{format} {}", isa.name());
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for (format, bad) in Format::ALL.into_iter().flat_map(|f| [f32::NAN, f32::INFINITY].map(|b| (f, b))) {
            let w = matrix(40, 64, format);
            for isa in Isa::available() {
                let mut x = values(5, 2 * 64);
                x[70] = bad;
                let cpu = Cpu::new(isa, Pool::new(1).into());
                let rows = Rows { data: &x, stride: 64, count: 2 };
                let out = product(&cpu, &w, rows, Output::Store, false);
                assert!(out[..40].iter().all(|x| x.is_finite()), "{format} {}", isa.name());
                assert!(out[40..].iter().all(|x| !x.is_finite()), "{format} {}", isa.name());
            }
        }
    }
}
