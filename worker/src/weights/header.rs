//! The header of one safetensors file, validated against the file's length before anything is read or allocated.

use std::collections::BTreeMap;

use serde::Deserialize;
use strata_proto::DType;

use super::{MAX_TENSORS, WeightsError, shorter};

/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// An element format as safetensors names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorDType {
    /// One that can be loaded.
    Float(DType),
    /// One that is only ever ignored (masks, position ids), with its bits per element.
    Other {
        /// Bits of one element.
        bits: u64,
    },
}

impl TensorDType {
    fn parse(name: &str) -> Option<Self> {
        let bits = match name {
            "F32" => return Some(TensorDType::Float(DType::F32)),
            "BF16" => return Some(TensorDType::Float(DType::BF16)),
            "F16" => return Some(TensorDType::Float(DType::F16)),
            "F4" => 4,
            "F6_E2M3" | "F6_E3M2" => 6,
            "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
            "I16" | "U16" => 16,
            "I32" | "U32" => 32,
            "I64" | "U64" | "F64" | "C64" => 64,
            _ => return None,
        };
        Some(TensorDType::Other { bits })
    }

    fn bits(self) -> u64 {
        match self {
            TensorDType::Float(d) => d.size() * 8,
            TensorDType::Other { bits } => bits,
        }
    }
}

/// Where a tensor lies, and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Which file of the checkpoint.
    pub(super) shard: usize,
    /// Offset in that file.
    pub(super) offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Element format.
    pub dtype: TensorDType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Orders tensors as they lie in the files.
    pub fn place(&self) -> (usize, u64) {
        (self.shard, self.offset)
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
        tensors.push((name, TensorInfo { shard, offset: data + begin, bytes, dtype, shape }));
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
