//! Weight matrices packed into tiles of 32 outputs, so that one contiguous stream feeds 32 independent chains.

use half::{bf16, f16};
use strata_proto::{DType, Format, Quantization};

use super::{
    isa::LANES,
    quant::{self, GROUP},
};
use crate::kernels::buffer::{Arena, Buffer, Element, OutOfMemory, Plain, Values, with_values};

/// Outputs per tile: two registers.
pub const TILE: usize = 2 * LANES;

/// Largest magnitude that groups of either quantization hold.
const LARGEST: f32 = 65504.0 * 7.0;

/// A value of the checkpoint that the target format cannot hold, or NaN.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("the value {0} does not fit the format")]
pub struct Unrepresentable(pub f32);

/// A [`GROUP`] of inputs of a tile, as bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Int8Group {
    /// One factor per output.
    pub factors: [f16; TILE],
    /// Four inputs at a time: for each output, a byte each, plus 128.
    pub quads: [[u32; TILE]; GROUP / 4],
}

/// A [`GROUP`] of inputs of a tile, as half bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Int4Group {
    /// One factor per output.
    pub factors: [f16; TILE],
    /// Eight inputs at a time: for each output, the first four in the low halves of the bytes, the others in the high
    /// halves, plus 8.
    pub octets: [[u32; TILE]; GROUP / 8],
}

impl Plain for Int8Group {}
impl Plain for Int4Group {}

/// The tiles of a matrix, one after the other.
pub enum Tiles {
    /// `[k][32]`.
    F32(Buffer<[f32; TILE]>),
    /// `[k/2][32]` pairs, the even input in the low half; zero past an odd `k`.
    BF16(Buffer<[u32; TILE]>),
    /// `[k][32]`.
    F16(Buffer<[f16; TILE]>),
    /// `[k/32]`.
    Int8(Buffer<Int8Group>),
    /// `[k/32]`.
    Int4(Buffer<Int4Group>),
}

/// A weight matrix `(n, k)`; outputs past `n` are zero.
pub struct PackedMatrix {
    n: usize,
    k: usize,
    tiles: Tiles,
    /// Elements that wait for the rest of their group.
    staged: Vec<f32>,
}

/// What is written: elements of a tensor that is a matrix or a part of one.
pub struct Elements<'a> {
    /// Index of the first one in the tensor.
    pub first: usize,
    /// Elements of the whole tensor.
    pub total: usize,
    /// Little endian.
    pub data: &'a [u8],
    /// Their format.
    pub from: DType,
}

impl PackedMatrix {
    /// The format that an `(n, k)` matrix is held in where `format` is asked for: what does not consist of whole
    /// groups stays bf16.
    fn held(k: usize, format: Format) -> Format {
        match format {
            Format::Quantized(_) if !k.is_multiple_of(GROUP) => Format::Float(DType::BF16),
            format => format,
        }
    }

    /// Bytes that an `(n, k)` matrix occupies.
    pub fn bytes_for(n: usize, k: usize, format: Format) -> u64 {
        let tiles = n.div_ceil(TILE);
        match Self::held(k, format) {
            Format::Float(DType::F32) => Buffer::<[f32; TILE]>::bytes_for(tiles * k),
            Format::Float(DType::BF16) => Buffer::<[u32; TILE]>::bytes_for(tiles * k.div_ceil(2)),
            Format::Float(DType::F16) => Buffer::<[f16; TILE]>::bytes_for(tiles * k),
            Format::Quantized(Quantization::Int8) => Buffer::<Int8Group>::bytes_for(tiles * (k / GROUP)),
            Format::Quantized(Quantization::Int4) => Buffer::<Int4Group>::bytes_for(tiles * (k / GROUP)),
        }
    }

    /// An `(n, k)` matrix of zeros.
    pub fn zeros(n: usize, k: usize, format: Format, arena: &mut Arena) -> Result<Self, OutOfMemory> {
        let tiles = n.div_ceil(TILE);
        let tiles = match Self::held(k, format) {
            Format::Float(DType::F32) => Tiles::F32(arena.take(tiles * k)?),
            Format::Float(DType::BF16) => Tiles::BF16(arena.take(tiles * k.div_ceil(2))?),
            Format::Float(DType::F16) => Tiles::F16(arena.take(tiles * k)?),
            Format::Quantized(Quantization::Int8) => Tiles::Int8(arena.take(tiles * (k / GROUP))?),
            Format::Quantized(Quantization::Int4) => Tiles::Int4(arena.take(tiles * (k / GROUP))?),
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
    pub fn tiles(&self) -> &Tiles {
        &self.tiles
    }

    /// Writes elements of a tensor; `place` gives the row and column of each. Those of a tensor must come in order.
    pub fn write(
        &mut self,
        elements: &Elements<'_>,
        place: impl Fn(usize) -> (usize, usize),
    ) -> Result<(), Unrepresentable> {
        let (k, pairs, groups) = (self.k, self.k.div_ceil(2), self.k / GROUP);
        let &Elements { first, data, from, .. } = elements;
        match &mut self.tiles {
            Tiles::F32(v) => convert(first, data, from, |i, x: f32| {
                let (row, column) = place(i);
                v[row / TILE * k + column][row % TILE] = x;
            }),
            Tiles::F16(v) => convert(first, data, from, |i, x: f16| {
                let (row, column) = place(i);
                v[row / TILE * k + column][row % TILE] = x;
            }),
            Tiles::BF16(v) => convert(first, data, from, |i, x: bf16| {
                let (row, column) = place(i);
                let pair = &mut v[row / TILE * pairs + column / 2][row % TILE];
                let shift = column % 2 * 16;
                *pair = *pair & !(0xffff << shift) | u32::from(x.to_bits()) << shift;
            }),
            Tiles::Int8(v) => stage(&mut self.staged, elements, place, |values, row, column| {
                let (factor, bytes) = quant::int8(values);
                let group = &mut v[row / TILE * groups + column / GROUP];
                group.factors[row % TILE] = factor;
                for (quad, bytes) in group.quads.iter_mut().zip(bytes.as_chunks().0) {
                    quad[row % TILE] = u32::from_le_bytes(bytes.map(|b: i8| (b as u8) ^ 0x80));
                }
            }),
            Tiles::Int4(v) => stage(&mut self.staged, elements, place, |values, row, column| {
                let (factor, halves) = quant::int4(values);
                let group = &mut v[row / TILE * groups + column / GROUP];
                group.factors[row % TILE] = factor;
                for (octet, halves) in group.octets.iter_mut().zip(halves.as_chunks::<8>().0) {
                    let byte = |i: usize| (halves[i] + 8) as u8 | ((halves[i + 4] + 8) as u8) << 4;
                    octet[row % TILE] = u32::from_le_bytes(std::array::from_fn(byte));
                }
            }),
        }
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
                for (o, g) in out.chunks_exact_mut(GROUP).zip(&v[tile * (self.k / GROUP)..]) {
                    let bytes = g.quads.iter().flat_map(|quad| quad[lane].to_le_bytes());
                    let factor = Element::to_f32(g.factors[lane]);
                    o.iter_mut().zip(bytes).for_each(|(o, b)| *o = f32::from((b ^ 0x80) as i8) * factor);
                }
            }
            Tiles::Int4(v) => {
                for (o, g) in out.chunks_exact_mut(GROUP).zip(&v[tile * (self.k / GROUP)..]) {
                    let octets = g.octets.iter().map(|octet| octet[lane].to_le_bytes());
                    let halves = octets.flat_map(|o| o.map(|b| b & 15).into_iter().chain(o.map(|b| b >> 4)));
                    let factor = Element::to_f32(g.factors[lane]);
                    o.iter_mut().zip(halves).for_each(|(o, h)| *o = (f32::from(h) - 8.0) * factor);
                }
            }
        }
    }
}

/// Collects elements into groups, and calls `put(group, row, column of its first element)` for each.
///
/// Where a tensor has the elements of a group side by side, less than a group waits; of one that is stored transposed,
/// all of it does.
fn stage(
    staged: &mut Vec<f32>,
    elements: &Elements<'_>,
    place: impl Fn(usize) -> (usize, usize),
    mut put: impl FnMut(&[f32; GROUP], usize, usize),
) -> Result<(), Unrepresentable> {
    let &Elements { first, total, data, from } = elements;
    let begin = first - staged.len();
    convert(first, data, from, |_, x: f32| staged.push(x))?;
    // The factor of a group is an f16.
    let too_large = |x: &&f32| x.abs() > LARGEST;
    if let Some(x) = staged.iter().find(too_large) {
        return Err(Unrepresentable(*x));
    }
    let (row, column) = place(0);
    if place(total.min(GROUP) - 1) == (row, column + GROUP - 1) {
        let (groups, rest) = staged.as_chunks();
        for (i, group) in groups.iter().enumerate() {
            let (row, column) = place(begin + i * GROUP);
            put(group, row, column);
        }
        let kept = rest.len();
        staged.drain(..staged.len() - kept);
        return Ok(());
    }
    if staged.len() == total {
        // Elements of one row lie as far apart as there are rows.
        let rows = (0..total).take_while(|i| place(*i).1 == column).count();
        for group in 0..total / GROUP {
            let first = group / rows * GROUP * rows + group % rows;
            let values = std::array::from_fn(|i| staged[first + i * rows]);
            let (row, column) = place(first);
            put(&values, row, column);
        }
        *staged = Vec::new();
    }
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
        match PackedMatrix::held(width, format) {
            Format::Float(dtype) => Values::bytes_for(rows * width, dtype),
            format => PackedMatrix::bytes_for(rows, width, format),
        }
    }

    /// A `(rows, width)` table of zeros.
    pub fn zeros(rows: usize, width: usize, format: Format, arena: &mut Arena) -> Result<Self, OutOfMemory> {
        Ok(match PackedMatrix::held(width, format) {
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
    pub fn write(&mut self, elements: &Elements<'_>) -> Result<(), Unrepresentable> {
        let &Elements { first, data, from, .. } = elements;
        match self {
            Table::Rows { values, .. } => {
                with_values!(values, v => convert(first, data, from, |i, x| v[i] = x))
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

/// Widens checkpoint elements to f32 (norms and biases, which every format keeps in f32); `put` gets each with its index.
pub fn read_f32(
    first: usize,
    data: &[u8],
    from: DType,
    put: impl FnMut(usize, f32),
) -> Result<(), Unrepresentable> {
    convert(first, data, from, put)
}

/// Calls `put(first + i, element i of data)` for each element, rounded to `T`.
fn convert<T: Element>(
    first: usize,
    data: &[u8],
    from: DType,
    mut put: impl FnMut(usize, T),
) -> Result<(), Unrepresentable> {
    let mut worst = None;
    let mut one = |i: usize, x: f32| {
        let y = T::from_f32(x);
        if !y.to_f32().is_finite() && !x.is_infinite() {
            worst = Some(x);
        }
        put(first + i, y);
    };
    match from {
        DType::F32 => {
            data.as_chunks().0.iter().enumerate().for_each(|(i, b)| one(i, f32::from_le_bytes(*b)));
        }
        DType::BF16 => {
            let values = data.as_chunks().0.iter().map(|b| Element::to_f32(bf16::from_le_bytes(*b)));
            values.enumerate().for_each(|(i, x)| one(i, x));
        }
        DType::F16 => {
            let values = data.as_chunks().0.iter().map(|b| Element::to_f32(f16::from_le_bytes(*b)));
            values.enumerate().for_each(|(i, x)| one(i, x));
        }
    }
    worst.map_or(Ok(()), |x| Err(Unrepresentable(x)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::buffer::round_to;

    fn source(n: usize, k: usize) -> Vec<f32> {
        (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    #[test]
    fn packing_in_pieces_and_gathering_gives_the_rows_back() {
        for (n, k, format) in
            [(37, 19), (70, 64)].into_iter().flat_map(|(n, k)| Format::ALL.map(|format| (n, k, format)))
        {
            let source = source(n, k);
            let bytes: Vec<u8> = source.iter().flat_map(|x| x.to_le_bytes()).collect();
            let mut arena = Arena::new(1 << 20).unwrap();
            let mut packed = PackedMatrix::zeros(n, k, format, &mut arena).unwrap();
            let mut transposed = PackedMatrix::zeros(n, k, format, &mut arena).unwrap();
            let mut table = Table::zeros(n, k, format, &mut arena).unwrap();
            for (piece, data) in bytes.chunks(4 * 23).enumerate() {
                let elements = Elements { first: piece * 23, total: n * k, data, from: DType::F32 };
                packed.write(&elements, |i| (i / k, i % k)).unwrap();
                table.write(&elements).unwrap();
            }
            let turned: Vec<u8> = (0..n * k).flat_map(|i| source[i % n * k + i / n].to_le_bytes()).collect();
            for (piece, data) in turned.chunks(4 * 31).enumerate() {
                let elements = Elements { first: piece * 31, total: n * k, data, from: DType::F32 };
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
                    match PackedMatrix::held(k, format) {
                        Format::Float(dtype) => assert_eq!(*x, round_to(dtype, *y)),
                        Format::Quantized(Quantization::Int8) => assert!((x - y).abs() < 0.005),
                        Format::Quantized(Quantization::Int4) => assert!((x - y).abs() < 0.12),
                    }
                }
            }
        }
    }

    #[test]
    fn a_value_too_large_for_f16_and_nan_are_refused() {
        let write = |x: f32, format| {
            let mut packed = PackedMatrix::zeros(1, 32, format, &mut Arena::new(1 << 16).unwrap()).unwrap();
            let data: Vec<u8> = [x; 32].iter().flat_map(|x| x.to_le_bytes()).collect();
            packed.write(&Elements { first: 0, total: 32, data: &data, from: DType::F32 }, |i| (0, i))
        };
        assert!(write(1e6, Format::Float(DType::F16)).unwrap_err().0 > 9e5);
        for format in Format::ALL {
            assert!(write(f32::NAN, format).unwrap_err().0.is_nan());
        }
        write(f32::INFINITY, Format::Float(DType::F16)).unwrap();
        for quantization in Quantization::ALL {
            assert_eq!(write(f32::INFINITY, Format::Quantized(quantization)).unwrap_err().0, f32::INFINITY);
            assert_eq!(write(1e9, Format::Quantized(quantization)).unwrap_err().0, 1e9);
        }
    }
}
