//! Matrices of small codes with scales: what all kinds of packed checkpoints have in common.

use std::ops::Range;

use half::{bf16, f16};
use strata_proto::DType;

use crate::{
    kernels::{buffer::Element, cpu::quant::Group, ops::GROUP},
    weights::decode::{Decode, Decoded},
};

/// An `(n, k)` matrix whose elements are `scale * (code - zero)`, all in f32.
#[derive(Debug)]
pub(super) struct Grid {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Stored bytes.
    pub bytes: u64,
    /// What a code stands for.
    pub meaning: Meaning,
    /// Where codes are.
    pub codes: Codes,
    /// Where scales are.
    pub scales: Scales,
    /// What is taken from codes.
    pub zero: Zero,
    /// Which scale a column has.
    pub columns: Columns,
}

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Itself.
    Integer,
    /// Eight bits: a sign, four of an exponent, three of a fraction; no infinity (OCP FP8 E4M3).
    Float8,
    /// Four bits: a sign, two of an exponent, one of a fraction (OCP MXFP4's E2M1).
    Float4,
}

/// Integers of a few bits each, packed into words along one dimension of a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Codes {
    /// Offset of the first one in what is stored.
    pub at: usize,
    /// Bits of each: 2, 4 or 8.
    pub bits: u32,
    /// Bytes of a word: 1 or 4.
    pub word: usize,
    /// Whether words hold neighbours of a row, or else of a column.
    pub along_rows: bool,
    /// From a word to the next one along that dimension, and along the other, in words.
    pub strides: (usize, usize),
    /// Where in a word the codes of neighbours are, if not in order.
    pub order: Option<[u8; 8]>,
    /// Whether they are signed; then 2^(bits - 1) is added.
    pub signed: bool,
}

impl Codes {
    /// A byte each, at the beginning of what is stored, of rows of `k`.
    pub fn bytes(k: usize, signed: bool) -> Self {
        Codes { at: 0, bits: 8, word: 1, along_rows: true, strides: (1, k), order: None, signed }
    }

    /// Two to a byte, the first in its low half, from an offset on, of rows of `k`, an even number.
    pub fn halves(at: usize, k: usize) -> Self {
        Codes { at, bits: 4, word: 1, along_rows: true, strides: (1, k / 2), order: None, signed: false }
    }

    /// The code at a row and a column.
    fn get(&self, stored: &[u8], row: usize, column: usize) -> i32 {
        let (packed, other) = if self.along_rows { (column, row) } else { (row, column) };
        // All are powers of two: a division for each code would take most of the time of a load.
        let per = 3 + self.word.trailing_zeros() - self.bits.trailing_zeros();
        let word = (packed >> per) * self.strides.0 + other * self.strides.1;
        let place = packed & ((1 << per) - 1);
        let place = self.order.map_or(place, |order| usize::from(order[place & 7]));
        let at = self.at + word * self.word;
        let word = match (self.word, stored[at..].first_chunk()) {
            (4, Some(word)) => u32::from_le_bytes(*word),
            _ => u32::from(stored[at]),
        };
        let code = word >> (place as u32 * self.bits) & (u32::MAX >> (32 - self.bits));
        (if self.signed { code ^ 1 << (self.bits - 1) } else { code }) as i32
    }
}

/// Scales of blocks of a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scales {
    /// Offset of the first one in what is stored.
    pub at: usize,
    /// Their format.
    pub format: ScaleFormat,
    /// From one to the next, down and across.
    pub strides: (usize, usize),
    /// Rows that have the same one.
    pub rows: usize,
    /// Rows of each of the matrices that lie one after the other, where they are several.
    pub each: usize,
}

/// A format of scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScaleFormat {
    Float(DType),
    /// A power of two: the exponent plus 127 (OCP's E8M0).
    Exponent,
}

impl ScaleFormat {
    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            ScaleFormat::Float(dtype) => dtype.size() as usize,
            ScaleFormat::Exponent => 1,
        }
    }
}

impl Scales {
    /// The scale of a row at a place across.
    fn get(&self, stored: &[u8], row: usize, across: usize) -> f32 {
        let down = row / self.each * self.each.div_ceil(self.rows) + row % self.each / self.rows;
        let at = self.at + (down * self.strides.0 + across * self.strides.1) * self.format.size();
        match self.format {
            ScaleFormat::Float(DType::F32) => f32::from_le_bytes(std::array::from_fn(|i| stored[at + i])),
            ScaleFormat::Float(DType::F16) => f16::from_le_bytes([stored[at], stored[at + 1]]).to_f32(),
            ScaleFormat::Float(DType::BF16) => bf16::from_le_bytes([stored[at], stored[at + 1]]).to_f32(),
            ScaleFormat::Exponent => match stored[at] {
                0 => f32::from_bits(1 << 22),
                255 => f32::NAN,
                exponent => f32::from_bits(u32::from(exponent) << 23),
            },
        }
    }
}

/// What is taken from codes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Zero {
    /// The same of all.
    Same(i32),
    /// Of each row and place across: what is stored, plus a number, of which the lowest bits count.
    Each { codes: Codes, plus: i32, mask: i32 },
}

/// Which place across the scale of a column has.
#[derive(Debug, Clone, Copy)]
pub(super) enum Columns {
    /// So many columns beside each other have the same.
    Blocks(usize),
    /// As a list of 32-bit integers at an offset says, each below a number.
    Listed { at: usize, groups: usize },
}

impl Columns {
    fn across(self, stored: &[u8], column: usize) -> usize {
        match self {
            Columns::Blocks(columns) => column / columns,
            Columns::Listed { at, .. } => {
                u32::from_le_bytes(std::array::from_fn(|i| stored[at + 4 * column + i])) as usize
            }
        }
    }

    /// The place that all of some columns have, if they have the same.
    fn same(self, stored: &[u8], columns: Range<usize>) -> Option<usize> {
        let first = self.across(stored, columns.start);
        let same = match self {
            Columns::Blocks(_) => self.across(stored, columns.end - 1) == first,
            Columns::Listed { .. } => columns.into_iter().all(|column| self.across(stored, column) == first),
        };
        same.then_some(first)
    }

    fn check(self, stored: &[u8], k: usize) -> Result<(), String> {
        let Columns::Listed { groups, .. } = self else { return Ok(()) };
        match (0..k).find(|column| self.across(stored, *column) >= groups) {
            None => Ok(()),
            Some(column) => {
                let group = self.across(stored, column) as u32 as i32;
                Err(format!("g_idx says group {group} of column {column}: expected 0..{groups}"))
            }
        }
    }
}

impl Grid {
    fn zero(&self, stored: &[u8], row: usize, across: usize) -> i32 {
        match self.zero {
            Zero::Same(zero) => zero,
            Zero::Each { codes, plus, mask } => (codes.get(stored, row, across) + plus) & mask,
        }
    }

    /// Elements of a row, whose columns have one scale; as a group, if it is one.
    fn same(&self, stored: &[u8], row: usize, columns: Range<usize>, across: usize, out: &mut Decoded) {
        let scale = self.scales.get(stored, row, across);
        let zero = self.zero(stored, row, across);
        // Halves of a code's worth are whole numbers where it has four bits.
        let (steps, step): (fn(i32) -> i32, f32) = match self.meaning {
            Meaning::Integer => (|code| code, scale),
            Meaning::Float4 => (float4_halves, scale / 2.0),
            Meaning::Float8 => {
                let value = |column| float8(self.codes.get(stored, row, column) as u8) * scale;
                out.values.extend(columns.map(value));
                return out.groups.push(None);
            }
        };
        let factor = f16::from_f32(step);
        let mut is_group = columns.len() == GROUP && Element::to_f32(factor) == step;
        let mut values = [0; GROUP];
        for (value, column) in values.iter_mut().zip(columns) {
            let integer = steps(self.codes.get(stored, row, column)) - zero;
            out.values.push(integer as f32 * step);
            match i8::try_from(integer) {
                Ok(integer) => *value = integer,
                Err(_) => is_group = false,
            }
        }
        out.groups.push(is_group.then_some(Group { factor, least: f16::ZERO, values }));
    }
}

impl Decode for Grid {
    fn unit(&self) -> (u64, usize) {
        (self.bytes, self.n * self.k)
    }

    fn decode(&self, stored: &[u8], elements: Range<usize>, out: &mut Decoded) -> Result<(), String> {
        self.columns.check(stored, self.k)?;
        let mut at = elements.start;
        while at < elements.end {
            let (row, column) = (at / self.k, at % self.k);
            let columns = column..self.k.min(column + elements.end - at).min(column + GROUP - column % GROUP);
            at += columns.len();
            match self.columns.same(stored, columns.clone()) {
                Some(across) => self.same(stored, row, columns, across, out),
                None => {
                    for column in columns {
                        let across = self.columns.across(stored, column);
                        self.same(stored, row, column..column + 1, across, out);
                        out.groups.pop();
                    }
                    out.groups.push(None);
                }
            }
        }
        // Where a row is no whole number of groups, these are none.
        if !self.k.is_multiple_of(GROUP) {
            out.groups.clear();
        }
        Ok(())
    }
}

/// Twice the value of an E2M1 code.
fn float4_halves(code: i32) -> i32 {
    const HALVES: [i32; 8] = [0, 1, 2, 3, 4, 6, 8, 12];
    let halves = HALVES[code as usize & 7];
    if code & 8 == 0 { halves } else { -halves }
}

/// The value of an E4M3 code: NaN if all bits but the sign are set.
fn float8(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction / 512.0,
        _ => (1.0 + fraction / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}
