//! Weight matrices packed into tiles of 32 outputs, so that one contiguous stream feeds 32 independent chains.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use half::{bf16, f16};
use strata_proto::{DType, Format, Quantization};

use super::{
    Cpu,
    isa::LANES,
    quant::{self, Group, SHARE},
};
use crate::kernels::{
    buffer::{Arena, Buffer, Element, OutOfMemory, Plain, Values, with_values},
    ops::{GROUP, held_format},
};

/// Outputs per tile: two registers.
pub(crate) const TILE: usize = 2 * LANES;

/// Largest magnitudes that round to something finite.
const LARGEST_F16: f32 = 65519.996;
const LARGEST_BF16: f32 = 3.396_177_5e38;

/// A value of the checkpoint that the target format cannot hold, or NaN.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("the value {0} does not fit the format")]
pub(crate) struct Unrepresentable(pub f32);

/// A [`GROUP`] of inputs of 16 outputs, as bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Int8Group {
    /// One factor per output.
    pub factors: [f16; LANES],
    /// Four inputs at a time: for each output, a byte each, plus 128.
    pub quads: [[u32; LANES]; GROUP / 4],
}

/// A [`GROUP`] of inputs of 16 outputs, as half bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Int4Group {
    /// One factor per output.
    pub factors: [f16; LANES],
    /// What is added to each weight of an output.
    pub least: [f16; LANES],
    /// Eight inputs at a time: for each output, the first four in the low halves of the bytes, the others in the high
    /// halves.
    pub octets: [[u32; LANES]; GROUP / 8],
}

impl Plain for Int8Group {}
impl Plain for Int4Group {}

/// The tiles of a matrix, one after the other.
pub(crate) enum Tiles {
    /// `[k][32]`.
    F32(Buffer<[f32; TILE]>),
    /// `[k/2][32]` pairs, the even input in the low half; zero past an odd `k`.
    BF16(Buffer<[u32; TILE]>),
    /// `[k][32]`.
    F16(Buffer<[f16; TILE]>),
    /// `[2][k/32]`: the tile's halves, since sums and their factors take all registers.
    Int8(Buffer<Int8Group>),
    /// `[2][k/32]`.
    Int4(Buffer<Int4Group>),
}

/// A weight matrix `(n, k)`; outputs past `n` are zero.
pub struct PackedMatrix {
    n: usize,
    k: usize,
    tiles: Tiles,
    /// Elements of a transposed tensor that wait for the others.
    staged: Vec<f32>,
}

/// What is written: elements of a tensor that is a matrix or a part of one.
pub(crate) struct Elements<'a> {
    /// Index of the first one in the tensor: a multiple of [`GROUP`].
    pub first: usize,
    /// Elements of the whole tensor.
    pub total: usize,
    /// Their values.
    pub values: &'a [f32],
    /// The same as the checkpoint's groups, where it has some; empty if it has none.
    pub groups: &'a [Option<Group>],
    /// What quantizes them.
    pub cpu: &'a Cpu,
}

impl PackedMatrix {
    /// Bytes that an `(n, k)` matrix occupies.
    pub fn bytes_for(n: usize, k: usize, format: Format) -> u64 {
        let tiles = n.div_ceil(TILE);
        match held_format(k, format) {
            Format::Float(DType::F32) => Buffer::<[f32; TILE]>::bytes_for(tiles * k),
            Format::Float(DType::BF16) => Buffer::<[u32; TILE]>::bytes_for(tiles * k.div_ceil(2)),
            Format::Float(DType::F16) => Buffer::<[f16; TILE]>::bytes_for(tiles * k),
            Format::Quantized(Quantization::Int8) => Buffer::<Int8Group>::bytes_for(2 * tiles * (k / GROUP)),
            Format::Quantized(Quantization::Int4) => Buffer::<Int4Group>::bytes_for(2 * tiles * (k / GROUP)),
        }
    }

    /// An `(n, k)` matrix of zeros.
    pub fn zeros(n: usize, k: usize, format: Format, arena: &mut Arena) -> Result<Self, OutOfMemory> {
        let tiles = n.div_ceil(TILE);
        let tiles = match held_format(k, format) {
            Format::Float(DType::F32) => Tiles::F32(arena.take(tiles * k)?),
            Format::Float(DType::BF16) => Tiles::BF16(arena.take(tiles * k.div_ceil(2))?),
            Format::Float(DType::F16) => Tiles::F16(arena.take(tiles * k)?),
            Format::Quantized(Quantization::Int8) => Tiles::Int8(arena.take(2 * tiles * (k / GROUP))?),
            Format::Quantized(Quantization::Int4) => Tiles::Int4(arena.take(2 * tiles * (k / GROUP))?),
        };
        Ok(PackedMatrix { n, k, tiles, staged: Vec::new() })
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> u64 {
        match &self.tiles {
            Tiles::F32(v) => v.bytes(),
            Tiles::BF16(v) => v.bytes(),
            Tiles::F16(v) => v.bytes(),
            Tiles::Int8(v) => v.bytes(),
            Tiles::Int4(v) => v.bytes(),
        }
    }

    /// The tiles.
    pub(crate) fn tiles(&self) -> &Tiles {
        &self.tiles
    }

    /// Writes elements of a tensor, which must come in order; `place` gives the row and column of each.
    pub(crate) fn write(
        &mut self,
        elements: &Elements<'_>,
        place: impl Fn(usize) -> (usize, usize),
    ) -> Result<(), Unrepresentable> {
        let (k, pairs) = (self.k, self.k.div_ceil(2));
        match &mut self.tiles {
            Tiles::F32(v) => runs(elements, k, place, |row, column, range| {
                for (w, x) in v[row / TILE * k + column..].iter_mut().zip(&elements.values[range]) {
                    w[row % TILE] = *x;
                }
            }),
            Tiles::F16(v) => {
                check(elements.cpu, elements.values, LARGEST_F16)?;
                runs(elements, k, place, |row, column, range| {
                    for (w, x) in v[row / TILE * k + column..].iter_mut().zip(&elements.values[range]) {
                        w[row % TILE] = f16::from_f32(*x);
                    }
                });
            }
            Tiles::BF16(v) => {
                check(elements.cpu, elements.values, LARGEST_BF16)?;
                runs(elements, k, place, |row, column, range| {
                    let tile = &mut v[row / TILE * pairs..];
                    for (i, x) in (column..).zip(&elements.values[range]) {
                        let (pair, shift) = (&mut tile[i / 2][row % TILE], i % 2 * 16);
                        let bits = u32::from(<bf16 as Element>::from_f32(*x).to_bits());
                        *pair = *pair & !(0xffff << shift) | bits << shift;
                    }
                });
            }
            Tiles::Int8(v) => {
                let put = |group: &mut Int8Group, lane: usize, Group { factor, values, .. }: &Group| {
                    group.factors[lane] = *factor;
                    for (quad, bytes) in group.quads.iter_mut().zip(values.as_chunks().0) {
                        quad[lane] = u32::from_le_bytes(bytes.map(|b: i8| (b as u8) ^ 0x80));
                    }
                };
                quantize(&mut self.staged, elements, Quantization::Int8, (v, k), place, put)?;
            }
            Tiles::Int4(v) => {
                let put = |group: &mut Int4Group, lane: usize, Group { factor, least, values }: &Group| {
                    (group.factors[lane], group.least[lane]) = (*factor, *least);
                    for (octet, halves) in group.octets.iter_mut().zip(values.as_chunks::<8>().0) {
                        let byte = |i: usize| halves[i] as u8 | (halves[i + 4] as u8) << 4;
                        octet[lane] = u32::from_le_bytes(std::array::from_fn(byte));
                    }
                };
                quantize(&mut self.staged, elements, Quantization::Int4, (v, k), place, put)?;
            }
        }
        Ok(())
    }

    /// Row `row` widened into `out`, of `k` elements.
    pub fn gather(&self, row: usize, out: &mut [f32]) {
        let (tile, lane) = (row / TILE, row % TILE);
        match &self.tiles {
            Tiles::F32(v) => {
                out.iter_mut().zip(&v[tile * self.k..]).for_each(|(o, x)| *o = x[lane]);
            }
            Tiles::F16(v) => {
                out.iter_mut().zip(&v[tile * self.k..]).for_each(|(o, x)| *o = Element::to_f32(x[lane]));
            }
            Tiles::BF16(v) => {
                let pairs = &v[tile * self.k.div_ceil(2)..];
                for (o, x) in out.chunks_mut(2).zip(pairs) {
                    let halves = [f32::from_bits(x[lane] << 16), f32::from_bits(x[lane] & 0xffff_0000)];
                    o.copy_from_slice(&halves[..o.len()]);
                }
            }
            Tiles::Int8(v) => {
                let (half, lane) = (row / LANES, row % LANES);
                for (o, g) in out.chunks_exact_mut(GROUP).zip(&v[half * (self.k / GROUP)..]) {
                    let bytes = g.quads.iter().flat_map(|quad| quad[lane].to_le_bytes());
                    let factor = Element::to_f32(g.factors[lane]);
                    o.iter_mut().zip(bytes).for_each(|(o, b)| *o = f32::from((b ^ 0x80) as i8) * factor);
                }
            }
            Tiles::Int4(v) => {
                let (half, lane) = (row / LANES, row % LANES);
                for (o, g) in out.chunks_exact_mut(GROUP).zip(&v[half * (self.k / GROUP)..]) {
                    let octets = g.octets.iter().map(|octet| octet[lane].to_le_bytes());
                    let halves = octets.flat_map(|o| o.map(|b| b & 15).into_iter().chain(o.map(|b| b >> 4)));
                    let (factor, least) = (Element::to_f32(g.factors[lane]), Element::to_f32(g.least[lane]));
                    o.iter_mut().zip(halves).for_each(|(o, h)| *o = f32::from(h) * factor + least);
                }
            }
        }
    }
}

/// Refuses values that `format` cannot hold.
pub(crate) fn check_fits(cpu: &Cpu, values: &[f32], format: Format) -> Result<(), Unrepresentable> {
    match format {
        Format::Float(DType::F32) => check(cpu, values, f32::INFINITY),
        Format::Float(DType::BF16) => check(cpu, values, LARGEST_BF16),
        Format::Float(DType::F16) => check(cpu, values, LARGEST_F16),
        // Factors and what is added to them are f16.
        Format::Quantized(_) if any(cpu, values, |x| (x.abs() > LARGEST_F16) | x.is_nan()) => {
            check(cpu, values, LARGEST_F16)?;
            values.iter().find(|x| x.is_infinite()).map_or(Ok(()), |x| Err(Unrepresentable(*x)))
        }
        Format::Quantized(_) => Ok(()),
    }
}

/// Refuses NaN.
pub(crate) fn check_not_nan(cpu: &Cpu, values: &[f32]) -> Result<(), Unrepresentable> {
    check(cpu, values, f32::INFINITY)
}

/// Refuses NaN, and finite values that are larger than `most`.
fn check(cpu: &Cpu, values: &[f32], most: f32) -> Result<(), Unrepresentable> {
    let bad = |x: f32| x.is_nan() | ((x.abs() > most) & x.is_finite());
    match any(cpu, values, bad) {
        true => values.iter().find(|x| bad(**x)).map_or(Ok(()), |x| Err(Unrepresentable(*x))),
        false => Ok(()),
    }
}

/// Values that are worth a task.
const VALUES: usize = 1 << 14;

/// Whether any value is `bad`. All are asked, so that many can be at a time.
fn any(cpu: &Cpu, values: &[f32], bad: impl Fn(f32) -> bool + Sync) -> bool {
    let found = AtomicBool::new(false);
    cpu.pool.run(values.len().div_ceil(VALUES), &|task| {
        let values = &values[task * VALUES..values.len().min((task + 1) * VALUES)];
        if values.iter().fold(false, |any, x| any | bad(*x)) {
            found.store(true, Ordering::Relaxed);
        }
    });
    found.into_inner()
}

/// Calls `put(row, column, range of them)` for elements that lie side by side in one row.
fn runs(
    elements: &Elements<'_>,
    k: usize,
    place: impl Fn(usize) -> (usize, usize),
    mut put: impl FnMut(usize, usize, Range<usize>),
) {
    let &Elements { first, total, values, .. } = elements;
    let mut at = 0;
    while at < values.len() {
        let (row, column) = place(first + at);
        let beside = first + at + 1 < total && place(first + at + 1) == (row, column + 1);
        let count = if beside { (k - column).min(values.len() - at) } else { 1 };
        put(row, column, at..at + count);
        at += count;
    }
}

/// Groups of one row, side by side; their values may lie apart.
struct Run<'a> {
    row: usize,
    /// Its first group and how many there are.
    first: usize,
    count: usize,
    values: &'a [f32],
    /// The checkpoint's own, or none.
    groups: &'a [Option<Group>],
}

/// Quantizes elements by groups on all threads, and calls `put(group of tiles, lane, group)` for each.
///
/// Where a tensor is stored transposed, its elements wait in `staged` until all are there.
fn quantize<T: Send>(
    staged: &mut Vec<f32>,
    elements: &Elements<'_>,
    quantization: Quantization,
    (tiles, k): (&mut [T], usize),
    place: impl Fn(usize) -> (usize, usize),
    put: impl Fn(&mut T, usize, &Group) + Sync,
) -> Result<(), Unrepresentable> {
    let &Elements { total, values, groups, cpu, .. } = elements;
    check_fits(cpu, values, Format::Quantized(quantization))?;
    let per_row = k / GROUP;
    let all;
    let (mut by_row, mut step) = (Vec::new(), 1);
    let (row, column) = place(0);
    if place(1) == (row, column + 1) {
        runs(elements, k, &place, |row, column, range| {
            let groups =
                if groups.is_empty() { groups } else { &groups[range.start / GROUP..range.end / GROUP] };
            let (count, values) = (range.len() / GROUP, &values[range]);
            by_row.push(Run { row, first: column / GROUP, count, values, groups });
        });
    } else {
        staged.extend(values);
        if staged.len() < total {
            return Ok(());
        }
        all = std::mem::take(staged);
        // A column after the other, of as many elements as there are rows.
        step = total / k;
        by_row.extend((0..step).map(|i| Run {
            row: place(i).0,
            first: 0,
            count: per_row,
            values: &all[i..],
            groups: &[],
        }));
    }
    by_row.sort_by_key(|run| run.row);
    // What 16 rows have at a column lies together, so no other task may write there.
    let (mut tasks, mut rest, mut passed) = (Vec::new(), tiles, 0);
    for runs in by_row.chunk_by(|a, b| a.row / LANES == b.row / LANES) {
        let (_, from) = rest.split_at_mut((runs[0].row / LANES - passed) * per_row);
        let (tile, after) = from.split_at_mut(per_row);
        (rest, passed) = (after, runs[0].row / LANES + 1);
        tasks.extend(tile.chunks_mut(SHARE).enumerate().map(|(i, tile)| (i * SHARE, tile, runs)));
    }
    cpu.each(&mut tasks, |(first, tile, runs)| {
        let (mut quantized, mut gathered) = ([Group::default(); SHARE], [[0.0; GROUP]; SHARE]);
        for run in *runs {
            let begin = run.first.max(*first);
            let end = (run.first + run.count).min(*first + tile.len());
            if begin >= end {
                continue;
            }
            let (skipped, count) = (begin - run.first, end - begin);
            let groups = if step == 1 {
                &run.values.as_chunks().0[skipped..skipped + count]
            } else {
                let values = run.values[skipped * GROUP * step..].iter().step_by(step);
                gathered[..count].as_flattened_mut().iter_mut().zip(values).for_each(|(to, x)| *to = *x);
                &gathered[..count]
            };
            let own = run.groups.get(skipped..skipped + count).unwrap_or_default();
            quant::quantize_or_keep(cpu, quantization, (groups, own), &mut quantized[..count]);
            for (group, quantized) in tile[begin - *first..].iter_mut().zip(&quantized[..count]) {
                put(group, run.row % LANES, quantized);
            }
        }
    });
    Ok(())
}

/// A table `(rows, width)` to be looked up: an embedding without a head beside it.
pub enum Table {
    /// As the checkpoint has it.
    Rows {
        /// Elements of a row.
        width: usize,
        /// All rows.
        values: Values,
    },
    /// As a matrix, with which it shares the rounding.
    Packed(PackedMatrix),
}

impl Table {
    /// Bytes that a `(rows, width)` table occupies.
    pub fn bytes_for(rows: usize, width: usize, format: Format) -> u64 {
        match held_format(width, format) {
            Format::Float(dtype) => Values::bytes_for(rows * width, dtype),
            format => PackedMatrix::bytes_for(rows, width, format),
        }
    }

    /// A `(rows, width)` table of zeros.
    pub fn zeros(rows: usize, width: usize, format: Format, arena: &mut Arena) -> Result<Self, OutOfMemory> {
        Ok(match held_format(width, format) {
            Format::Float(dtype) => Table::Rows { width, values: Values::take(rows * width, dtype, arena)? },
            format => Table::Packed(PackedMatrix::zeros(rows, width, format, arena)?),
        })
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> u64 {
        match self {
            Table::Rows { values, .. } => values.bytes(),
            Table::Packed(matrix) => matrix.bytes(),
        }
    }

    /// Writes elements of its tensor, in order.
    pub(crate) fn write(&mut self, elements: &Elements<'_>) -> Result<(), Unrepresentable> {
        match self {
            Table::Rows { values, .. } => {
                let most = match values {
                    Values::F32(_) => f32::MAX,
                    Values::BF16(_) => LARGEST_BF16,
                    Values::F16(_) => LARGEST_F16,
                };
                check(elements.cpu, elements.values, most)?;
                with_values!(values, v => {
                    for (o, x) in v[elements.first..].iter_mut().zip(elements.values) {
                        *o = Element::from_f32(*x);
                    }
                });
                Ok(())
            }
            Table::Packed(matrix) => {
                let k = matrix.k();
                matrix.write(elements, |i| (i / k, i % k))
            }
        }
    }

    /// Row `row` widened into `out`, of `width` elements.
    pub fn gather(&self, row: usize, out: &mut [f32]) {
        match self {
            Table::Rows { width, values } => with_values!(values, v => {
                for (o, x) in out.iter_mut().zip(&v[row * width..]) {
                    *o = Element::to_f32(*x);
                }
            }),
            Table::Packed(matrix) => matrix.gather(row, out),
        }
    }
}

/// Widens checkpoint elements (little endian, of format `from`) to f32 into `out`, on all threads.
///
/// # Errors
/// If one is NaN.
pub(crate) fn widen(cpu: &Cpu, data: &[u8], from: DType, out: &mut Vec<f32>) -> Result<(), Unrepresentable> {
    let size = from.size() as usize;
    out.resize(data.len() / size, 0.0);
    cpu.pool.pieces(out, VALUES, 1, |i, out| {
        let data = &data[i * VALUES * size..][..out.len() * size];
        match from {
            DType::F32 => put(out, data, f32::from_le_bytes),
            DType::BF16 => put(out, data, |b| Element::to_f32(bf16::from_le_bytes(b))),
            DType::F16 => put(out, data, |b| Element::to_f32(f16::from_le_bytes(b))),
        }
    });
    check(cpu, out, f32::INFINITY)
}

fn put<const N: usize>(out: &mut [f32], data: &[u8], value: impl Fn([u8; N]) -> f32) {
    out.iter_mut().zip(data.as_chunks().0).for_each(|(out, bytes)| *out = value(*bytes));
}

/// Refuses NaN among checkpoint elements that stay as they are.
#[cfg(feature = "cuda")]
pub(crate) fn check_numbers(data: &[u8], from: DType) -> Result<(), Unrepresentable> {
    // All of the exponent, and some of the fraction.
    let halves = |infinity: u16| {
        let bits = data.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b) & 0x7fff);
        bits.fold(0, u16::max) > infinity
    };
    let broken = match from {
        DType::F32 => {
            let bits = data.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b) & 0x7fff_ffff);
            bits.fold(0, u32::max) > f32::INFINITY.to_bits()
        }
        DType::BF16 => halves(bf16::INFINITY.to_bits()),
        DType::F16 => halves(f16::INFINITY.to_bits()),
    };
    if broken { Err(Unrepresentable(f32::NAN)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{
        buffer::round_to,
        cpu::{isa::Isa, pool::Pool},
    };

    #[cfg(feature = "cuda")]
    #[test]
    fn nan_is_found_in_every_format_and_infinity_is_none() {
        for (bytes, dtype, infinite) in [
            (f32::NAN.to_le_bytes().to_vec(), DType::F32, f32::INFINITY.to_le_bytes().to_vec()),
            (bf16::NAN.to_le_bytes().to_vec(), DType::BF16, bf16::NEG_INFINITY.to_le_bytes().to_vec()),
            (f16::NAN.to_le_bytes().to_vec(), DType::F16, f16::INFINITY.to_le_bytes().to_vec()),
        ] {
            let zeros = vec![0; bytes.len()];
            assert!(check_numbers(&[zeros.clone(), bytes].concat(), dtype).unwrap_err().0.is_nan());
            check_numbers(&[zeros, infinite].concat(), dtype).unwrap();
        }
    }

    fn source(n: usize, k: usize) -> Vec<f32> {
        (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    #[test]
    fn packing_in_pieces_and_gathering_gives_the_rows_back() {
        for (n, k, format) in
            [(37, 19), (70, 64)].into_iter().flat_map(|(n, k)| Format::ALL.map(|format| (n, k, format)))
        {
            let source = source(n, k);
            let cpu = Cpu::on(Isa::detect());
            let mut arena = Arena::new(1 << 20).unwrap();
            let mut packed = PackedMatrix::zeros(n, k, format, &mut arena).unwrap();
            let mut transposed = PackedMatrix::zeros(n, k, format, &mut arena).unwrap();
            let mut table = Table::zeros(n, k, format, &mut arena).unwrap();
            for (piece, values) in source.chunks(3 * GROUP).enumerate() {
                let elements =
                    Elements { first: piece * 3 * GROUP, total: n * k, values, groups: &[], cpu: &cpu };
                packed.write(&elements, |i| (i / k, i % k)).unwrap();
                table.write(&elements).unwrap();
            }
            let turned: Vec<f32> = (0..n * k).map(|i| source[i % n * k + i / n]).collect();
            for (piece, values) in turned.chunks(GROUP).enumerate() {
                let elements =
                    Elements { first: piece * GROUP, total: n * k, values, groups: &[], cpu: &cpu };
                transposed.write(&elements, |i| (i % n, i / n)).unwrap();
            }
            assert_eq!(packed.bytes(), PackedMatrix::bytes_for(n, k, format));
            assert_eq!(table.bytes(), Table::bytes_for(n, k, format));
            let [mut a, mut b, mut c] = [const { Vec::new() }; 3].map(|mut v: Vec<f32>| {
                v.resize(k, 0.0);
                v
            });
            for row in 0..n {
                packed.gather(row, &mut a);
                table.gather(row, &mut b);
                transposed.gather(row, &mut c);
                assert!(a == b && a == c);
                for (x, y) in a.iter().zip(&source[row * k..]) {
                    match held_format(k, format) {
                        Format::Float(dtype) => assert_eq!(*x, round_to(dtype, *y)),
                        Format::Quantized(Quantization::Int8) => assert!((x - y).abs() < 0.005),
                        Format::Quantized(Quantization::Int4) => assert!((x - y).abs() < 0.12),
                    }
                }
            }
        }
    }

    /// Bits of a tile's group in the order of memory.
    fn words(matrix: &PackedMatrix) -> Vec<u32> {
        match &matrix.tiles {
            Tiles::Int8(v) => v
                .iter()
                .flat_map(|g| {
                    g.factors.map(|f| f.to_bits().into()).into_iter().chain(g.quads.into_iter().flatten())
                })
                .collect(),
            Tiles::Int4(v) => v
                .iter()
                .flat_map(|g| {
                    let halves = [g.factors, g.least].into_iter().flatten();
                    halves.map(|f| f.to_bits().into()).chain(g.octets.into_iter().flatten())
                })
                .collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn many_threads_pack_the_bits_that_one_packs_group_by_group() {
        // Rows longer than a task, pieces that end within them, and rows in another order.
        let (n, k) = (70, (SHARE + 3) * GROUP);
        let source = source(n, k);
        let turned: Vec<f32> = (0..n * k).map(|i| source[i % n * k + i / n]).collect();
        let (one, many) = (Cpu::on(Isa::detect()), Cpu::new(Isa::detect(), Pool::new(5).into()));
        let write = |cpu: &Cpu, q, values: &[f32], piece: usize, place: &dyn Fn(usize) -> (usize, usize)| {
            let format = Format::Quantized(q);
            let mut arena = Arena::new(PackedMatrix::bytes_for(n, k, format)).unwrap();
            let mut packed = PackedMatrix::zeros(n, k, format, &mut arena).unwrap();
            for (i, values) in values.chunks(piece).enumerate() {
                let elements = Elements { first: i * piece, total: n * k, values, groups: &[], cpu };
                packed.write(&elements, place).unwrap();
            }
            words(&packed)
        };
        for q in Quantization::ALL {
            let rows = |i| (i / k, i % k);
            let plain = write(&one, q, &source, GROUP, &rows);
            assert!(plain.iter().any(|word| *word != 0));
            assert_eq!(write(&many, q, &source, 13 * k + GROUP, &rows), plain);
            assert_eq!(write(&many, q, &turned, 13 * k + GROUP, &|i| (i % n, i / n)), plain);
            let backwards = |i| (n - 1 - i / k, i % k);
            let plain = write(&one, q, &source, GROUP, &backwards);
            assert_eq!(write(&many, q, &source, 13 * k + GROUP, &backwards), plain);
        }
    }

    #[test]
    fn a_value_too_large_for_f16_and_nan_are_refused() {
        let write = |x: f32, format| {
            let mut packed = PackedMatrix::zeros(1, 32, format, &mut Arena::new(1 << 16).unwrap()).unwrap();
            let cpu = Cpu::on(Isa::detect());
            packed.write(&Elements { first: 0, total: 32, values: &[x; 32], groups: &[], cpu: &cpu }, |i| {
                (0, i)
            })
        };
        assert!(write(1e6, Format::Float(DType::F16)).unwrap_err().0 > 9e5);
        let nan = [bf16::ONE, bf16::NAN].map(bf16::to_le_bytes);
        assert!(
            widen(&Cpu::on(Isa::detect()), nan.as_flattened(), DType::BF16, &mut Vec::new())
                .unwrap_err()
                .0
                .is_nan()
        );
        assert_eq!(write(3.4e38, Format::Float(DType::BF16)).unwrap_err().0, 3.4e38);
        write(f32::INFINITY, Format::Float(DType::F16)).unwrap();
        for quantization in Quantization::ALL {
            assert_eq!(write(f32::INFINITY, Format::Quantized(quantization)).unwrap_err().0, f32::INFINITY);
            assert_eq!(write(1e9, Format::Quantized(quantization)).unwrap_err().0, 1e9);
        }
    }
}
