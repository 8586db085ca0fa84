//! Checkpoints whose matrices other programs have quantized: each becomes one tensor of floats, made of several stored ones.
//!
//! Whoever looks for tensors sees those floats, and nothing of the stored ones. The floats are what the program that wrote the
//! file would compute with in f32: `scale * (code - zero)`, rounded once. Where codes and scales are such that an engine's own
//! groups of 32 hold the same numbers, groups are handed out too, so that `--quantize` rounds nothing.

mod compressed;
mod fp8;
mod gptq;
mod grid;
mod mxfp4;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;
use strata_proto::error::quoted;

use self::grid::{Grid, ScaleFormat};
use super::{Checkpoint, TensorDType, TensorInfo, WeightsError};

const CONFIG: &str = "config.json";
const FIELD: &str = "quantization_config";

/// A tensor that is made of others, and the names of these.
type Made = (String, TensorInfo, Vec<String>);

/// Puts the tensors that `quantization_config` tells of in the place of what they are made of; returns the method.
///
/// # Errors
/// If the method is not known, or tensors are not as it says.
pub(super) fn add(checkpoint: &mut Checkpoint) -> Result<Option<&'static str>, WeightsError> {
    let Some(settings) = settings(checkpoint)? else { return Ok(None) };
    let method = settings.get("quant_method").and_then(Value::as_str).unwrap_or("a method without a name");
    let (method, made, left) = match method {
        "gptq" => ("GPTQ", gptq::gptq(checkpoint, read(&settings)?)?, &[][..]),
        "awq" => ("AWQ", gptq::awq(checkpoint, read(&settings)?)?, &[][..]),
        "compressed-tensors" => {
            ("compressed-tensors", compressed::tensors(checkpoint, &read(&settings)?)?, compressed::LEFT)
        }
        "fp8" => ("FP8", fp8::tensors(checkpoint, read(&settings)?)?, fp8::LEFT),
        "mxfp4" => ("MXFP4", mxfp4::tensors(checkpoint)?, &[][..]),
        method => {
            let reason = format!(
                "{FIELD}.quant_method is {}: expected gptq, awq, compressed-tensors, fp8 or mxfp4, which can be loaded; take the \
                 original checkpoint, and --quantize int8 or int4",
                quoted(method)
            );
            return Err(WeightsError::file(CONFIG, reason));
        }
    };
    let found = !made.is_empty();
    for (name, tensor, of) in made {
        of.iter().for_each(|name| drop(checkpoint.tensors.remove(name)));
        checkpoint.tensors.insert(name, tensor);
    }
    checkpoint.tensors.retain(|name, _| !left.iter().any(|ending| name.ends_with(ending)));
    Ok(found.then_some(method))
}

/// What `quantization_config` says, of the whole model or of the part of it that reads text.
fn settings(checkpoint: &Checkpoint) -> Result<Option<Value>, WeightsError> {
    let Some(mut config) = checkpoint.json(CONFIG)? else { return Ok(None) };
    let mut take = |path: &str| config.pointer_mut(path).map(Value::take).filter(|found| !found.is_null());
    Ok(take("/quantization_config")
        .or_else(|| take("/text_config/quantization_config"))
        .or_else(|| take("/compression_config")))
}

fn read<T: DeserializeOwned>(settings: &Value) -> Result<T, WeightsError> {
    T::deserialize(settings).map_err(|e| WeightsError::file(CONFIG, format!("{FIELD}: {e}")))
}

/// The error that a field of `quantization_config` is not as expected.
fn wrong(field: &str, found: impl std::fmt::Display, expected: &str) -> WeightsError {
    WeightsError::file(CONFIG, format!("{FIELD}.{field} is {found}: expected {expected}"))
}

/// A module whose weights are in several tensors, and which of them have been taken.
struct Module<'a> {
    checkpoint: &'a Checkpoint,
    /// What the names of its tensors begin with.
    name: &'a str,
    parts: Vec<&'a TensorInfo>,
    /// Bytes of the parts.
    bytes: u64,
    taken: Vec<String>,
}

impl<'a> Module<'a> {
    fn new(checkpoint: &'a Checkpoint, name: &'a str) -> Self {
        Module { checkpoint, name, parts: Vec::new(), bytes: 0, taken: Vec::new() }
    }

    /// The modules that have a tensor of some ending, by the beginning of its name.
    fn with(checkpoint: &Checkpoint, ending: &str) -> Vec<String> {
        let names = checkpoint.tensors.keys();
        names.filter_map(|name| name.strip_suffix(ending).map(str::to_owned)).collect()
    }

    fn get(&self, ending: &str) -> Option<&'a TensorInfo> {
        self.checkpoint.tensor(&format!("{}{ending}", self.name))
    }

    /// Takes a tensor that there must be; returns it, and the offset of its bytes.
    fn take(&mut self, ending: &str) -> Result<(&'a TensorInfo, usize), WeightsError> {
        let tensor = self.get(ending).ok_or_else(|| {
            let name = format!("{}{ending}", self.name);
            WeightsError::file(CONFIG, format!("{FIELD}: tensor {name:?} is missing from the checkpoint"))
        })?;
        let at = self.bytes as usize;
        self.bytes += tensor.bytes;
        self.parts.push(tensor);
        self.taken.push(format!("{}{ending}", self.name));
        Ok((tensor, at))
    }

    /// Takes a tensor of some dimensions, in a format that is no float, and returns the offset of its bytes.
    fn take_as(&mut self, ending: &str, format: &str, shape: &[usize]) -> Result<usize, WeightsError> {
        let (tensor, at) = self.take(ending)?;
        match tensor.dtype.is(format) && tensor.shape == shape {
            true => Ok(at),
            false => Err(self.misfit(ending, format!("{format} of shape {shape:?}"))),
        }
    }

    /// The error that a tensor is not as expected.
    fn misfit(&self, ending: &str, expected: impl std::fmt::Display) -> WeightsError {
        let Some(tensor) = self.get(ending) else { return WeightsError::file(CONFIG, FIELD) };
        let reason = format!(
            "is {} of shape {:?}: expected {expected} by {FIELD} of {CONFIG}",
            tensor.dtype.name(),
            tensor.shape
        );
        WeightsError::tensor(self.checkpoint.file_of(tensor), &format!("{}{ending}", self.name), reason)
    }

    /// The tensor that a grid over what was taken makes.
    fn made(self, name: String, shape: Vec<usize>, grid: Grid) -> Made {
        let grid = Grid { bytes: self.bytes, ..grid };
        (name, TensorInfo::made(&self.parts, shape, Arc::new(grid)), self.taken)
    }
}

impl TensorDType {
    /// Whether it is a format that is no float, by name.
    fn is(self, format: &str) -> bool {
        matches!(self, TensorDType::Other { name, .. } if name == format)
    }

    /// As a format of scales, if it may be one.
    fn as_scales(self) -> Option<ScaleFormat> {
        match self {
            TensorDType::Float(dtype) => Some(ScaleFormat::Float(dtype)),
            TensorDType::Other { name: "F8_E8M0", .. } => Some(ScaleFormat::Exponent),
            TensorDType::Other { .. } => None,
        }
    }
}
