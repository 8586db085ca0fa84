//! GPTQ and AWQ: codes of a few bits in words of 32, a scale and a zero for each output and group of inputs.

use serde::Deserialize;
use strata_proto::error::quoted;

use super::{
    Made, Module, WeightsError,
    grid::{Codes, Columns, Grid, Meaning, ScaleFormat, Scales, Zero},
    wrong,
};
use crate::weights::{Checkpoint, TensorDType};

/// Places of the codes of eight columns in a word of AWQ's.
const AWQ_ORDER: [u8; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// `quantization_config` of both.
#[derive(Debug, Deserialize)]
pub(super) struct Settings {
    #[serde(alias = "w_bit")]
    bits: u32,
    #[serde(alias = "q_group_size", default = "usual_group")]
    group_size: i64,
    #[serde(default, alias = "version", alias = "checkpoint_format")]
    format: Option<String>,
    zero_point: Option<bool>,
    /// Other bits and groups for some modules.
    dynamic: Option<serde_json::Map<String, serde_json::Value>>,
}

fn usual_group() -> i64 {
    128
}

impl Settings {
    /// Inputs of a group, of `k` inputs.
    fn group(&self, k: usize) -> Result<usize, WeightsError> {
        match usize::try_from(self.group_size) {
            Ok(size) if size > 0 => Ok(size),
            Err(_) if self.group_size == -1 => Ok(k.max(1)),
            _ => Err(wrong("group_size", self.group_size, "-1 or a positive number")),
        }
    }
}

/// The weights of a checkpoint by GPTQModel, AutoGPTQ and their like: codes are packed along inputs, zeros along outputs.
pub(super) fn gptq(checkpoint: &Checkpoint, settings: Settings) -> Result<Vec<Made>, WeightsError> {
    if ![2, 4, 8].contains(&settings.bits) {
        return Err(wrong("bits", settings.bits, "2, 4 or 8"));
    }
    // A rule that begins so leaves modules as they are.
    if let Some(rule) =
        settings.dynamic.iter().flat_map(|rules| rules.keys()).find(|rule| !rule.starts_with("-:"))
    {
        return Err(wrong("dynamic", quoted(rule), "the same bits and groups for all modules"));
    }
    // The first version holds zeros less by one.
    let plus = match settings.format.as_deref().unwrap_or("gptq").to_ascii_lowercase().as_str() {
        "gptq" => 1,
        "gptq_v2" => 0,
        _ => {
            return Err(wrong(
                "checkpoint_format",
                quoted(settings.format.as_deref().unwrap_or_default()),
                "gptq or gptq_v2",
            ));
        }
    };
    let per = 32 / settings.bits as usize;
    let each = |name: &String| {
        let mut module = Module::new(checkpoint, name);
        let (weight, _) = module.take(".qweight")?;
        let is_words = weight.dtype.is("I32");
        let &[words, n] = &weight.shape[..] else {
            return Err(module.misfit(".qweight", "I32 of two dimensions"));
        };
        if !is_words || n % per != 0 || words == 0 {
            return Err(module.misfit(".qweight", format!("I32, its second dimension a multiple of {per}")));
        }
        let k = words * per;
        let size = settings.group(k)?;
        let groups = k.div_ceil(size);
        let codes = Codes {
            at: 0,
            bits: settings.bits,
            word: 4,
            along_rows: true,
            strides: (n, 1),
            order: None,
            signed: false,
        };
        let zeros = Codes {
            at: module.take_as(".qzeros", "I32", &[groups, n / per])?,
            along_rows: false,
            strides: (1, n / per),
            ..codes
        };
        let scales = scales(&mut module, groups, n)?;
        let columns = match module.get(".g_idx") {
            Some(_) => Columns::Listed { at: module.take_as(".g_idx", "I32", &[k])?, groups },
            None => Columns::Blocks(size),
        };
        let zero = Zero::Each { codes: zeros, plus, mask: (1 << settings.bits) - 1 };
        let grid = Grid { n, k, bytes: 0, meaning: Meaning::Integer, codes, scales, zero, columns };
        Ok(module.made(format!("{name}.weight"), vec![n, k], grid))
    };
    Module::with(checkpoint, ".qweight").iter().map(each).collect()
}

/// The weights of a checkpoint by AutoAWQ and its like: codes and zeros are packed along outputs, in AWQ's order.
pub(super) fn awq(checkpoint: &Checkpoint, settings: Settings) -> Result<Vec<Made>, WeightsError> {
    if settings.bits != 4 {
        return Err(wrong("bits", settings.bits, "4"));
    }
    if settings.zero_point == Some(false) {
        return Err(wrong("zero_point", false, "true"));
    }
    if !settings.format.as_deref().unwrap_or("gemm").eq_ignore_ascii_case("gemm") {
        return Err(wrong("version", quoted(settings.format.as_deref().unwrap_or_default()), "gemm"));
    }
    let each = |name: &String| {
        let mut module = Module::new(checkpoint, name);
        let (weight, _) = module.take(".qweight")?;
        let is_words = weight.dtype.is("I32");
        let &[k, words] = &weight.shape[..] else {
            return Err(module.misfit(".qweight", "I32 of two dimensions"));
        };
        if !is_words || k == 0 {
            return Err(module.misfit(".qweight", "I32"));
        }
        let n = words.checked_mul(8).ok_or_else(|| module.misfit(".qweight", "less"))?;
        let size = settings.group(k)?;
        let groups = k.div_ceil(size);
        let codes = Codes {
            at: 0,
            bits: 4,
            word: 4,
            along_rows: false,
            strides: (1, words),
            order: Some(AWQ_ORDER),
            signed: false,
        };
        let zeros = Codes { at: module.take_as(".qzeros", "I32", &[groups, words])?, ..codes };
        let scales = scales(&mut module, groups, n)?;
        let zero = Zero::Each { codes: zeros, plus: 0, mask: 15 };
        let columns = Columns::Blocks(size);
        let grid = Grid { n, k, bytes: 0, meaning: Meaning::Integer, codes, scales, zero, columns };
        Ok(module.made(format!("{name}.weight"), vec![n, k], grid))
    };
    Module::with(checkpoint, ".qweight").iter().map(each).collect()
}

/// Scales `(groups, n)`.
fn scales(module: &mut Module<'_>, groups: usize, n: usize) -> Result<Scales, WeightsError> {
    let (scales, at) = module.take(".scales")?;
    match scales.dtype {
        TensorDType::Float(dtype) if scales.shape == [groups, n] => {
            Ok(Scales { at, format: ScaleFormat::Float(dtype), strides: (1, n), rows: 1, each: n.max(1) })
        }
        _ => Err(module.misfit(".scales", format!("floats of shape {:?}", [groups, n]))),
    }
}
