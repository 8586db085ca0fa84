//! The header of one GGUF file: metadata and where tensors are, all of it bounded by what the file has.
//!
//! Read here and not by candle's `gguf_file::Content`, which divides by an alignment of 0, takes the last of two tensors of one
//! name, and makes 32 bytes of each element of an array.

use std::{collections::BTreeMap, sync::Arc};

use strata_proto::{DType, error::quoted};

use super::{
    super::{MAX_TENSORS, TensorDType, TensorInfo, WeightsError, decode::Decode, header::Made, shorter},
    blocks::{self, Blocks},
};

/// Most entries of metadata.
const MAX_ENTRIES: u64 = 1 << 16;
/// Most dimensions of a tensor.
const MAX_RANK: u32 = 4;
/// Longest name of a tensor or of an entry.
const MAX_NAME: usize = 1 << 16;
/// Where tensors lie if nothing is said: at multiples of it.
const ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// An integer of any width.
    Integer(i128),
    /// A number of either width.
    Number(f64),
    /// True or false.
    Flag(bool),
    /// A text.
    Text(String),
    /// Integers or flags.
    Integers(Vec<i64>),
    /// Numbers.
    Numbers(Vec<f32>),
    /// Texts.
    Texts(Vec<String>),
}

/// A tensor, as the file describes it.
#[derive(Debug, Clone)]
pub(super) struct Tensor {
    pub name: String,
    pub format: Format,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// From the beginning of the file.
    offset: u64,
    bytes: u64,
}

/// A format of elements.
#[derive(Debug, Clone, Copy)]
pub(super) enum Format {
    Float(DType),
    Blocks(Blocks),
}

impl Format {
    /// Elements that are stored together, and the bytes of them.
    fn unit(self) -> (u64, u64) {
        match self {
            Format::Float(dtype) => (1, dtype.size()),
            Format::Blocks(blocks) => {
                let (bytes, elements) = blocks.unit();
                (elements as u64, bytes)
            }
        }
    }
}

impl Tensor {
    /// The tensor as one of a checkpoint, of its file number `shard`.
    pub fn info(&self, shard: usize) -> TensorInfo {
        let &Tensor { format, ref shape, offset, bytes, .. } = self;
        let (dtype, made) = match format {
            Format::Float(dtype) => (dtype, None),
            Format::Blocks(blocks) => {
                (DType::F32, Some(Made { parts: vec![(shard, offset, bytes)], decode: Arc::new(blocks) }))
            }
        };
        TensorInfo { shard, offset, bytes, dtype: TensorDType::Float(dtype), shape: shape.clone(), made }
    }
}

/// What stands before the tensors of a file.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: Vec<Tensor>,
    /// Bytes of it.
    pub length: u64,
}

/// Reads the header of `file`, of which `bytes` are the beginning, and `length` bytes are all.
///
/// # Errors
/// If it is no GGUF file of a known version, something in it is impossible, or a tensor has a format that is not read.
pub(super) fn parse(file: &str, bytes: &[u8], length: u64) -> Result<Header, WeightsError> {
    let mut reader = Reader { file, bytes, at: 0, length };
    let magic = reader.take(4)?;
    if magic != b"GGUF" {
        return Err(WeightsError::file(file, "it is no GGUF file, or damaged: download it again"));
    }
    match reader.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            return Err(WeightsError::file(file, "a GGUF file in big-endian order: expected little-endian"));
        }
        version => {
            return Err(WeightsError::file(file, format!("GGUF version {version}: expected 2 or 3")));
        }
    }
    let (tensors, entries) = (reader.u64()?, reader.u64()?);
    if tensors > MAX_TENSORS as u64 || entries > MAX_ENTRIES {
        let reason = format!(
            "{tensors} tensors and {entries} entries of metadata: expected at most {MAX_TENSORS} and {MAX_ENTRIES}"
        );
        return Err(WeightsError::file(file, reason));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..entries {
        let key = reader.name()?;
        let value = reader.value(&key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.wrong(&key, "is there twice"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(Value::Integer(n)) if (1..=1 << 20).contains(n) => *n as u64,
        Some(_) => return Err(reader.wrong("general.alignment", "expected an integer in 1..=1048576")),
    };
    let mut found = Vec::new();
    for _ in 0..tensors {
        found.push(reader.tensor()?);
    }
    let data = (reader.at as u64).next_multiple_of(alignment);
    for Tensor { name, offset, .. } in &mut found {
        if !offset.is_multiple_of(alignment) {
            let reason = format!("begins at {offset}: expected a multiple of {alignment}");
            return Err(WeightsError::tensor(file, name, reason));
        }
        *offset = offset.saturating_add(data);
    }
    let end = found.iter().map(|t| t.offset.saturating_add(t.bytes)).max().unwrap_or(data);
    if end > length {
        return Err(shorter(file, length, end));
    }
    found.sort_by_key(|t| (t.offset, t.bytes));
    for pair in found.windows(2) {
        if pair[1].offset < pair[0].offset + pair[0].bytes {
            return Err(WeightsError::tensor(file, &pair[1].name, "overlaps its predecessor"));
        }
    }
    Ok(Header { metadata, tensors: found, length: reader.at as u64 })
}

/// Reads values one after the other; none may need more than what is left.
struct Reader<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
    /// Of the whole file.
    length: u64,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], WeightsError> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            // The file may be longer than what a header may have.
            let reason = match self.length > self.bytes.len() as u64 {
                true => format!("its header has more than {} bytes: expected fewer", self.bytes.len()),
                false => {
                    return Err(shorter(
                        self.file,
                        self.length,
                        (self.at as u64).saturating_add(count as u64),
                    ));
                }
            };
            return Err(WeightsError::file(self.file, reason));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WeightsError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, WeightsError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, WeightsError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// As many elements as the file says, each of `size` bytes at least: no more than there are bytes.
    fn count(&mut self, size: usize) -> Result<usize, WeightsError> {
        let count = self.u64()?;
        let left = (self.bytes.len() - self.at) / size;
        match usize::try_from(count) {
            Ok(count) if count <= left => Ok(count),
            _ => {
                let reason = format!("{count} elements at byte {}: expected at most {left}", self.at);
                Err(WeightsError::file(self.file, reason))
            }
        }
    }

    fn text(&mut self) -> Result<String, WeightsError> {
        let count = self.count(1)?;
        Ok(String::from_utf8_lossy(self.take(count)?).into_owned())
    }

    fn name(&mut self) -> Result<String, WeightsError> {
        let name = self.text()?;
        match name.len() {
            0..=MAX_NAME => Ok(name),
            n => Err(WeightsError::file(
                self.file,
                format!("a name of {n} bytes: expected at most {MAX_NAME}"),
            )),
        }
    }

    fn wrong(&self, key: &str, reason: &str) -> WeightsError {
        WeightsError::file(self.file, format!("metadata {}: {reason}", quoted(key)))
    }

    fn value(&mut self, key: &str) -> Result<Value, WeightsError> {
        let kind = self.u32()?;
        self.value_of(kind, key)
    }

    fn value_of(&mut self, kind: u32, key: &str) -> Result<Value, WeightsError> {
        Ok(match kind {
            0 => Value::Integer(self.array::<1>()?[0].into()),
            1 => Value::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Number(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Flag(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 => self.values(key)?,
            10 => Value::Integer(self.u64()?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Number(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.wrong(key, &format!("a value of kind {kind}: expected 0 to 12"))),
        })
    }

    fn values(&mut self, key: &str) -> Result<Value, WeightsError> {
        let kind = self.u32()?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(self.wrong(key, "lists in a list: expected values")),
            _ => return Err(self.wrong(key, &format!("a list of kind {kind}: expected 0 to 12"))),
        };
        let count = self.count(size)?;
        Ok(match kind {
            8 => {
                let mut texts = Vec::new();
                for _ in 0..count {
                    texts.push(self.text()?);
                }
                Value::Texts(texts)
            }
            6 => Value::Numbers(self.elements(count, f32::from_le_bytes)?),
            12 => Value::Numbers(self.elements(count, |b| f64::from_le_bytes(b) as f32)?),
            0 | 7 => Value::Integers(self.elements(count, |b: [u8; 1]| b[0].into())?),
            1 => Value::Integers(self.elements(count, |b| i8::from_le_bytes(b).into())?),
            2 => Value::Integers(self.elements(count, |b| u16::from_le_bytes(b).into())?),
            3 => Value::Integers(self.elements(count, |b| i16::from_le_bytes(b).into())?),
            4 => Value::Integers(self.elements(count, |b| u32::from_le_bytes(b).into())?),
            5 => Value::Integers(self.elements(count, |b| i32::from_le_bytes(b).into())?),
            _ => Value::Integers(self.elements(count, i64::from_le_bytes)?),
        })
    }

    fn elements<T, const N: usize>(
        &mut self,
        count: usize,
        one: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, WeightsError> {
        let bytes = self.take(count * N)?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| one(*bytes)).collect())
    }

    /// A tensor, whose offset is still that from the beginning of all tensors.
    fn tensor(&mut self) -> Result<Tensor, WeightsError> {
        let name = self.name()?;
        let file = self.file;
        let fail = |reason: String| WeightsError::tensor(file, &name, reason);
        let rank = self.u32()?;
        if rank > MAX_RANK {
            return Err(fail(format!("{rank} dimensions: expected at most {MAX_RANK}")));
        }
        let mut shape = Vec::new();
        let mut elements = 1u64;
        for _ in 0..rank {
            let dimension = self.u64()?;
            let product = elements.checked_mul(dimension).filter(|_| dimension <= usize::MAX as u64);
            elements = product.ok_or_else(|| fail("its dimensions overflow".into()))?;
            shape.push(dimension as usize);
        }
        let kind = self.u32()?;
        let float =
            [(0, DType::F32), (1, DType::F16), (30, DType::BF16)].into_iter().find(|(n, _)| *n == kind);
        let blocks = blocks::FORMATS.into_iter().find(|(n, ..)| *n == kind);
        let refused = blocks::REFUSED.into_iter().find(|(n, _)| *n == kind);
        let format = match (float, blocks, refused) {
            (Some((_, dtype)), ..) => Format::Float(dtype),
            (_, Some((_, blocks, _)), _) => Format::Blocks(Blocks(blocks)),
            (.., Some((_, refused))) => {
                return Err(fail(format!(
                    "its format {refused} is not read: expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, or Q2_K to Q8_K; \
                     download the model in one of these"
                )));
            }
            _ => return Err(fail(format!("its format {kind} is not known"))),
        };
        let (block, size) = format.unit();
        // Rows are whole blocks.
        let row = shape.first().copied().unwrap_or(1) as u64;
        if !row.is_multiple_of(block) {
            return Err(fail(format!("rows of {row} elements: expected a multiple of {block}")));
        }
        let bytes = (elements / block).checked_mul(size);
        let bytes = bytes.ok_or_else(|| fail("its dimensions overflow".into()))?;
        // The file has the innermost one first.
        shape.reverse();
        let offset = self.u64()?;
        Ok(Tensor { name, format, shape, offset, bytes })
    }
}
