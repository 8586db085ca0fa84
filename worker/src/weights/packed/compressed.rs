//! The formats of compressed-tensors (llm-compressor): packed or whole integers, FP8 and MXFP4, with scales of tensors, rows,
//! groups or blocks.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use strata_proto::error::quoted;

use super::{
    Made, Module, WeightsError,
    grid::{Codes, Columns, Grid, Meaning, ScaleFormat, Scales, Zero},
    wrong,
};
use crate::weights::{Checkpoint, TensorInfo};

/// `quantization_config` of method `compressed-tensors`.
#[derive(Debug, Deserialize)]
pub(super) struct Settings {
    #[serde(default)]
    config_groups: BTreeMap<String, Scheme>,
    sparsity_config: Option<Sparsity>,
    transform_config: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Sparsity {
    format: Option<String>,
}

/// How some modules are quantized.
#[derive(Debug, Deserialize)]
struct Scheme {
    weights: Option<Weights>,
}

/// How their weights are.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Weights {
    #[serde(default = "usual_bits")]
    num_bits: u32,
    #[serde(default = "usual_type", rename = "type")]
    kind: String,
    #[serde(default = "symmetric")]
    symmetric: bool,
    strategy: Option<String>,
    group_size: Option<i64>,
    block_structure: Option<(usize, usize)>,
}

fn usual_bits() -> u32 {
    8
}

fn usual_type() -> String {
    "int".to_owned()
}

fn symmetric() -> bool {
    true
}

/// Endings of tensors that are left: what is kept of activations and caches, and zeros that count for nothing.
pub(super) const LEFT: &[&str] = &[
    ".input_scale",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
    ".weight_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
];

/// The weights of every module that has scales.
pub(super) fn tensors(checkpoint: &Checkpoint, settings: &Settings) -> Result<Vec<Made>, WeightsError> {
    let sparse = settings.sparsity_config.as_ref().and_then(|sparsity| sparsity.format.as_deref());
    if let Some(format) = sparse.filter(|format| *format != "dense") {
        return Err(wrong("sparsity_config.format", quoted(format), "dense"));
    }
    let has_transforms = |config: &Value| match config.get("config_groups") {
        Some(groups) => groups.as_object().is_none_or(|groups| !groups.is_empty()),
        None => config.as_object().is_none_or(|config| !config.is_empty()),
    };
    if settings.transform_config.as_ref().is_some_and(|config| !config.is_null() && has_transforms(config)) {
        return Err(wrong(
            "transform_config",
            "an object",
            "none: rotations of activations are not computed",
        ));
    }
    let mut schemes: Vec<&Weights> = Vec::new();
    for scheme in settings.config_groups.values().filter_map(|scheme| scheme.weights.as_ref()) {
        if !schemes.contains(&scheme) {
            schemes.push(scheme);
        }
    }
    let names = Module::with(checkpoint, ".weight_scale");
    names.iter().map(|name| by_the_fitting_one(checkpoint, name, &schemes)).collect()
}

/// The weight of a module by the scheme that fits its tensors, where there are several.
fn by_the_fitting_one(
    checkpoint: &Checkpoint,
    name: &str,
    schemes: &[&Weights],
) -> Result<Made, WeightsError> {
    let mut fitting = schemes.iter().map(|scheme| by(checkpoint, name, scheme));
    let mut first = fitting.next().unwrap_or_else(|| Err(wrong("config_groups", 0, "a group with weights")));
    for other in fitting {
        first = match (first, other) {
            (Ok(_), Ok(_)) => {
                let reason =
                    format!("several of config_groups fit the tensors of {}: expected one", quoted(name));
                return Err(WeightsError::file(super::CONFIG, format!("{}: {reason}", super::FIELD)));
            }
            (Err(_), other) => other,
            (first, Err(_)) => first,
        };
    }
    first
}

/// How integers or floats are stored.
enum Stored {
    /// In the low bits of words first, 2^(bits - 1) added.
    Packed,
    /// A byte each.
    Bytes,
    /// Two to a byte, the first in its low half.
    Halves,
}

fn by(checkpoint: &Checkpoint, name: &str, scheme: &Weights) -> Result<Made, WeightsError> {
    let mut module = Module::new(checkpoint, name);
    let bits = scheme.num_bits;
    let (stored, meaning) = match (scheme.kind.as_str(), bits, module.get(".weight_packed")) {
        ("int", 2 | 4 | 8, Some(_)) => (Stored::Packed, Meaning::Integer),
        ("int", 8, None) => (Stored::Bytes, Meaning::Integer),
        ("float", 8, None) => (Stored::Bytes, Meaning::Float8),
        ("float", 4, Some(_)) if scheme.group_size == Some(32) => (Stored::Halves, Meaning::Float4),
        (kind, bits, packed) => {
            let packed = if packed.is_some() { "packed" } else { "not packed" };
            let expected = "integers of 2, 4 or 8 bits, floats of 8, or MXFP4 (floats of 4 in groups of 32)";
            return Err(wrong(
                "config_groups.weights",
                format!("{} of {bits} bits, {packed}", quoted(kind)),
                expected,
            ));
        }
    };
    let (codes, [n, k]) = match stored {
        Stored::Packed => {
            let (weight, at) = module.take(".weight_packed")?;
            let [n, k] = shape(&mut module)?;
            let words = k.div_ceil(32 / bits as usize);
            if !weight.dtype.is("I32") || weight.shape != [n, words] {
                return Err(module.misfit(".weight_packed", format!("I32 of shape {:?}", [n, words])));
            }
            let strides = (1, words);
            (Codes { at, bits, word: 4, along_rows: true, strides, order: None, signed: false }, [n, k])
        }
        Stored::Bytes => {
            let (weight, _) = module.take(".weight")?;
            let (format, signed) =
                if meaning == Meaning::Integer { ("I8", true) } else { ("F8_E4M3", false) };
            match weight.shape[..] {
                [n, k] if weight.dtype.is(format) => (Codes::bytes(k, signed), [n, k]),
                _ => return Err(module.misfit(".weight", format!("{format} of two dimensions"))),
            }
        }
        Stored::Halves => {
            let (weight, at) = module.take(".weight_packed")?;
            let [n, bytes] = weight.shape[..] else {
                return Err(module.misfit(".weight_packed", "U8 of two dimensions"));
            };
            if !weight.dtype.is("U8") {
                return Err(module.misfit(".weight_packed", "U8"));
            }
            (Codes::halves(at, 2 * bytes), [n, 2 * bytes])
        }
    };
    if n == 0 || k == 0 {
        return Err(wrong(
            "config_groups.weights",
            format!("{n} by {k} in {}", quoted(name)),
            "positive dimensions",
        ));
    }
    let (rows, block) = block(scheme, n, k)?;
    let (down, across) = (n.div_ceil(rows), k.div_ceil(block));
    let (scales, at) = module.take(".weight_scale")?;
    let format = match meaning {
        Meaning::Float4 => scales.dtype.is("U8").then_some(ScaleFormat::Exponent),
        _ => scales.dtype.as_scales(),
    };
    let format = format.filter(|_| is_grid(scales, down, across));
    let expected = || format!("scales of shape {:?}", [down, across]);
    let format = format.ok_or_else(|| module.misfit(".weight_scale", expected()))?;
    let scales = Scales { at, format, strides: (across, 1), rows, each: n };
    let zero = match (meaning, scheme.symmetric) {
        // Integers were made positive.
        (Meaning::Integer, true) => Zero::Same(1 << (bits - 1)),
        (Meaning::Integer, false) => zeros(&mut module, bits, (n, rows), (down, across))?,
        _ => Zero::Same(0),
    };
    let columns = match module.get(".weight_g_idx") {
        Some(_) => Columns::Listed { at: module.take_as(".weight_g_idx", "I32", &[k])?, groups: across },
        None => Columns::Blocks(block),
    };
    let grid = Grid { n, k, bytes: 0, meaning, codes, scales, zero, columns };
    Ok(module.made(format!("{name}.weight"), vec![n, k], grid))
}

/// Whether scales or zeros are so many down and across.
fn is_grid(tensor: &TensorInfo, down: usize, across: usize) -> bool {
    match tensor.shape[..] {
        [] | [1] => down == 1 && across == 1,
        [rows] => rows == down && across == 1,
        [rows, columns] => rows == down && columns == across,
        _ => false,
    }
}

/// Rows and columns that have one scale.
fn block(scheme: &Weights, n: usize, k: usize) -> Result<(usize, usize), WeightsError> {
    let group = scheme.group_size.and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0);
    let inferred = match (scheme.block_structure, scheme.group_size) {
        (Some(_), _) => "block",
        (None, Some(-1)) => "channel",
        (None, Some(_)) => "group",
        (None, None) => "tensor",
    };
    match (scheme.strategy.as_deref().unwrap_or(inferred), group, scheme.block_structure) {
        ("tensor", ..) => Ok((n, k)),
        ("channel", ..) => Ok((1, k)),
        ("group", Some(size), _) => Ok((1, size)),
        ("block", _, Some((rows, columns))) if rows > 0 && columns > 0 => Ok((rows, columns)),
        (strategy, ..) => {
            let expected =
                "tensor, channel, group with a positive group_size, or block with a block_structure";
            Err(wrong("config_groups.weights.strategy", quoted(strategy), expected))
        }
    }
}

/// What `weight_shape` says, which is read: how long rows are, words do not say.
fn shape(module: &mut Module<'_>) -> Result<[usize; 2], WeightsError> {
    module.take_as(".weight_shape", "I64", &[2])?;
    let mut bytes = Vec::new();
    if let Some(tensor) = module.parts.last() {
        module.checkpoint.read(tensor, 0, &mut bytes)?;
    }
    let mut sizes = bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes));
    let mut next =
        || sizes.next().and_then(|size| usize::try_from(size).ok()).filter(|size| *size <= 1 << 32);
    match (next(), next()) {
        (Some(n), Some(k)) => Ok([n, k]),
        _ => Err(module.misfit(".weight_shape", "two sizes of at most 2^32")),
    }
}

/// What is taken from integers, which are packed down columns, or a byte each.
fn zeros(
    module: &mut Module<'_>,
    bits: u32,
    (n, rows): (usize, usize),
    (down, across): (usize, usize),
) -> Result<Zero, WeightsError> {
    if rows != 1 && rows != n {
        return Err(wrong("config_groups.weights.symmetric", false, "true for blocks"));
    }
    let (zeros, at) = module.take(".weight_zero_point")?;
    // A tensor has one for all rows.
    let stride = |stride| if rows == 1 { stride } else { 0 };
    if zeros.dtype.is("I8") && is_grid(zeros, down, across) {
        let codes =
            Codes { at, strides: (stride(across), 1), along_rows: false, ..Codes::bytes(across, true) };
        return Ok(Zero::Each { codes, plus: (1 << (bits - 1)) - 128, mask: -1 });
    }
    let words = down.div_ceil(32 / bits as usize);
    if zeros.dtype.is("I32") && rows == 1 && is_grid(zeros, words, across) {
        let strides = (across, 1);
        let codes = Codes { at, bits, word: 4, along_rows: false, strides, order: None, signed: false };
        return Ok(Zero::Each { codes, plus: 0, mask: -1 });
    }
    let expected = format!("I32 of shape {:?}, or I8 of shape {:?}", [words, across], [down, across]);
    Err(module.misfit(".weight_zero_point", expected))
}
