//! Blocks of quantized weights as GGUF files have them: widened by candle, and as our groups where they are such.
//!
//! Q8_0, Q5_0 and Q4_0 are int8 groups, Q4_0 and Q4_1 int4 groups, bit for bit. A group of Q4_K keeps its integers; its factor and
//! its least value, each a product in the file, are rounded to f16. The others have ranges for fewer than 32 values, or offsets
//! beside more than four bits: they are quantized anew from what they stand for.

use std::{borrow::Cow, ops::Range};

use candle_core::{CpuStorage, quantized::GgmlDType};
use half::f16;

use super::super::decode::{Decode, Decoded};
use crate::kernels::{cpu::quant::Group, ops::GROUP};

/// What every block may lie on.
const ALIGNMENT: usize = 8;

/// The formats in blocks that are read, with their numbers and their names in ggml.
pub(super) const FORMATS: [(u32, GgmlDType, &str); 12] = [
    (2, GgmlDType::Q4_0, "Q4_0"),
    (3, GgmlDType::Q4_1, "Q4_1"),
    (6, GgmlDType::Q5_0, "Q5_0"),
    (7, GgmlDType::Q5_1, "Q5_1"),
    (8, GgmlDType::Q8_0, "Q8_0"),
    (9, GgmlDType::Q8_1, "Q8_1"),
    (10, GgmlDType::Q2K, "Q2_K"),
    (11, GgmlDType::Q3K, "Q3_K"),
    (12, GgmlDType::Q4K, "Q4_K"),
    (13, GgmlDType::Q5K, "Q5_K"),
    (14, GgmlDType::Q6K, "Q6_K"),
    (15, GgmlDType::Q8K, "Q8_K"),
];

/// Formats of ggml that are refused, by name.
pub(super) const REFUSED: [(u32, &str); 22] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

/// Blocks of a format.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Blocks(pub GgmlDType);

impl Blocks {
    /// Whether it has four bits or fewer for a weight, factors aside, so that int4 holds it.
    pub fn are_of_four_bits(self) -> bool {
        use GgmlDType::{Q2K, Q3K, Q4_0, Q4_1, Q4K};
        matches!(self.0, Q4_0 | Q4_1 | Q2K | Q3K | Q4K)
    }
}

impl Decode for Blocks {
    fn unit(&self) -> (u64, usize) {
        (self.0.type_size() as u64, self.0.block_size())
    }

    fn decode(&self, stored: &[u8], elements: Range<usize>, out: &mut Decoded) -> Result<(), String> {
        let (size, block) = (self.0.type_size(), self.0.block_size());
        let stored = &stored[elements.start / block * size..elements.end / block * size];
        // Wherever the bytes lie, candle wants blocks on their boundaries.
        let mut aligned = vec![0; stored.len() + ALIGNMENT];
        let from = aligned.as_ptr().align_offset(ALIGNMENT);
        let aligned = &mut aligned[from..][..stored.len()];
        aligned.copy_from_slice(stored);
        let widened = self.0.from_data(Cow::Borrowed(aligned)).dequantize(elements.len());
        match widened.map_err(|e| e.to_string())? {
            CpuStorage::F32(values) => out.values.extend(values),
            _ => return Err("its blocks were not widened to f32".into()),
        }
        let group: fn(&[u8], usize) -> Group = match self.0 {
            GgmlDType::Q8_0 => q8_0,
            GgmlDType::Q5_0 => q5_0,
            GgmlDType::Q4_0 => q4_0,
            GgmlDType::Q4_1 => q4_1,
            GgmlDType::Q4K => q4_k,
            _ => return Ok(()),
        };
        for data in stored.chunks_exact(size) {
            for number in 0..block / GROUP {
                let group = group(data, number);
                let is_finite = group.factor.is_finite() && group.least.is_finite();
                out.groups.push(is_finite.then_some(group));
            }
        }
        Ok(())
    }
}

fn half_at(data: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([data[at], data[at + 1]])
}

/// The low half of byte `i` is value `i`, the high one value `i + 16`.
fn halves(bytes: &[u8]) -> [i8; GROUP] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 } as i8)
}

fn q8_0(data: &[u8], _: usize) -> Group {
    let values = std::array::from_fn(|i| data[2 + i] as i8);
    Group { factor: half_at(data, 0), least: f16::ZERO, values }
}

/// Values have a fifth bit apart, and are less by 16.
fn q5_0(data: &[u8], _: usize) -> Group {
    let fifth = u32::from_le_bytes([data[2], data[3], data[4], data[5]]);
    let low = halves(&data[6..]);
    let values = std::array::from_fn(|i| (low[i] | ((fifth >> i & 1) as i8) << 4) - 16);
    Group { factor: half_at(data, 0), least: f16::ZERO, values }
}

/// Values are less by 8. As int4, which counts from the least, eight factors are taken off: exactly, as 8 is a power of two.
fn q4_0(data: &[u8], _: usize) -> Group {
    let values = halves(&data[2..]).map(|value| value - 8);
    Group { factor: half_at(data, 0), least: f16::ZERO, values }
}

fn q4_1(data: &[u8], _: usize) -> Group {
    Group { factor: half_at(data, 0), least: half_at(data, 2), values: halves(&data[4..]) }
}

/// Of each two groups, the low halves of 32 bytes are one, the high halves the other. Their eight factors and least values are
/// products of one of each for all and six bits, which lie in twelve bytes.
fn q4_k(data: &[u8], number: usize) -> Group {
    let (factor, least) = (half_at(data, 0).to_f32(), half_at(data, 2).to_f32());
    let (sixes, values) = (&data[4..16], &data[16..]);
    let (scale, minimum) = match number {
        0..4 => (sixes[number] & 63, sixes[number + 4] & 63),
        i => ((sixes[i + 4] & 15) | (sixes[i - 4] >> 6) << 4, (sixes[i + 4] >> 4) | (sixes[i] >> 6) << 4),
    };
    let bytes = &values[number / 2 * GROUP..][..GROUP];
    let value = |byte: u8| if number.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
    Group {
        factor: f16::from_f32(factor * f32::from(scale)),
        least: f16::from_f32(-least * f32::from(minimum)),
        values: std::array::from_fn(|i| value(bytes[i]) as i8),
    }
}
