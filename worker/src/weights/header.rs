//! The header of one safetensors file, validated against the file's length before anything is read or allocated.

use std::{collections::BTreeMap, sync::Arc};

use serde::Deserialize;
use strata_proto::DType;

use super::{MAX_TENSORS, WeightsError, decode::Decode, shorter};

/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// Formats that weights cannot have themselves, by name, with their bits per element.
const OTHERS: [(&str, u64); 19] = [
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("BOOL", 8),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("I16", 16),
    ("U16", 16),
    ("I32", 32),
    ("U32", 32),
    ("I64", 64),
    ("U64", 64),
    ("F64", 64),
    ("C64", 64),
];

/// An element format as safetensors names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorDType {
    /// One that can be loaded.
    Float(DType),
    /// One that is ignored (masks, position ids), or that floats are made of.
    Other {
        /// Its name.
        name: &'static str,
        /// Bits of one element.
        bits: u64,
    },
}

impl TensorDType {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "F32" => return Some(TensorDType::Float(DType::F32)),
            "BF16" => return Some(TensorDType::Float(DType::BF16)),
            "F16" => return Some(TensorDType::Float(DType::F16)),
            _ => {}
        }
        let (name, bits) = OTHERS.into_iter().find(|(other, _)| *other == name)?;
        Some(TensorDType::Other { name, bits })
    }

    fn bits(self) -> u64 {
        match self {
            TensorDType::Float(d) => d.size() * 8,
            TensorDType::Other { bits, .. } => bits,
        }
    }
}

/// Where a tensor lies, and what it is.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Which file of the checkpoint.
    pub(super) shard: usize,
    /// Offset in that file.
    pub(super) offset: u64,
    /// Stored bytes, all of them.
    pub bytes: u64,
    /// Format of its elements; f32 where they are made of others.
    pub dtype: TensorDType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// What makes its elements, where they are not those of the file.
    pub(crate) made: Option<Made>,
}

/// How a tensor comes to be that no file has as it is.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    /// Stored tensors whose bytes, one after the other, it is made of: file, offset and length of each.
    pub(super) parts: Vec<(usize, u64, u64)>,
    /// What makes elements of these bytes.
    pub decode: Arc<dyn Decode>,
}

impl TensorInfo {
    /// Orders tensors as they lie in the files.
    pub fn place(&self) -> (usize, u64) {
        (self.shard, self.offset)
    }

    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Parses `header` of `file`, whose data begin at `data` and end at the file's `length`.
///
/// As the format asks, tensors must cover the data without a hole or an overlap.
pub(crate) fn parse(
    file: &str,
    shard: usize,
    header: &[u8],
    data: u64,
    length: u64,
) -> Result<Vec<(String, TensorInfo)>, WeightsError> {
    let mut raw: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header)
        .map_err(|e| WeightsError::file(file, format!("the header is not a JSON object: {e}")))?;
    raw.remove("__metadata__");
    if raw.len() > MAX_TENSORS {
        return Err(WeightsError::file(
            file,
            format!("{} tensors: expected at most {MAX_TENSORS}", raw.len()),
        ));
    }
    // Said once of the file: it is no fault of the tensor that happens to come first.
    let end = raw.values().filter_map(|entry| entry.get("data_offsets")?.get(1)?.as_u64()).max().unwrap_or(0);
    if end > length - data {
        return Err(shorter(file, length, data.saturating_add(end)));
    }
    let mut tensors = Vec::with_capacity(raw.len());
    for (name, value) in raw {
        let fail = |reason: String| WeightsError::tensor(file, &name, reason);
        let entry: Entry = serde_json::from_value(value)
            .map_err(|e| fail(format!("expected dtype, shape and data_offsets: {e}")))?;
        let dtype = TensorDType::parse(&entry.dtype)
            .ok_or_else(|| fail(format!("dtype {:?} is not known", entry.dtype)))?;
        if entry.shape.len() > MAX_RANK {
            return Err(fail(format!("{} dimensions: expected at most {MAX_RANK}", entry.shape.len())));
        }
        let overflow = || fail(format!("shape {:?} overflows", entry.shape));
        let mut bits = dtype.bits();
        let mut shape = Vec::with_capacity(entry.shape.len());
        for &d in &entry.shape {
            bits = bits.checked_mul(d).ok_or_else(overflow)?;
            shape.push(usize::try_from(d).map_err(|_| overflow())?);
        }
        let (begin, end) = entry.data_offsets;
        if begin > end {
            return Err(fail(format!("data_offsets {begin}..{end} end before they begin")));
        }
        let bytes = end - begin;
        if bits % 8 != 0 || bits / 8 != bytes {
            let expected = bits.div_ceil(8);
            return Err(fail(format!(
                "{bytes} bytes of data: shape {:?} of {} needs {expected}",
                entry.shape, entry.dtype
            )));
        }
        tensors.push((name, TensorInfo { shard, offset: data + begin, bytes, dtype, shape, made: None }));
    }
    tensors.sort_by_key(|(_, t)| (t.offset, t.bytes));
    let mut expected = data;
    for (name, t) in &tensors {
        if t.offset != expected {
            let what =
                if t.offset < expected { "overlaps its predecessor" } else { "leaves a hole before it" };
            let (begin, wanted) = (t.offset - data, expected - data);
            let reason = format!("begins at {begin} and {what}: expected {wanted}");
            return Err(WeightsError::tensor(file, name, reason));
        }
        expected += t.bytes;
    }
    if expected != length {
        let reason = format!("{} bytes follow the last tensor", length - expected);
        return Err(WeightsError::file(file, reason));
    }
    Ok(tensors)
}
