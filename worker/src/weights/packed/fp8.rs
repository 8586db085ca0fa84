//! The fine-grained FP8 of DeepSeek and transformers: E4M3 codes, and a scale for each block of a matrix.

use serde::Deserialize;
use strata_proto::error::quoted;

use super::{
    Made, Module, WeightsError,
    grid::{Codes, Columns, Grid, Meaning, Scales, Zero},
    wrong,
};
use crate::weights::Checkpoint;

/// `quantization_config` of method `fp8`.
#[derive(Debug, Deserialize)]
pub(super) struct Settings {
    /// Rows and columns of a block; the whole matrix if it is null.
    #[serde(default = "usual_block")]
    weight_block_size: Option<(usize, usize)>,
    expert_dtype: Option<String>,
}

/// Endings of tensors that are left: of activations, which stay as they are.
pub(super) const LEFT: &[&str] = &[".activation_scale"];

fn usual_block() -> Option<(usize, usize)> {
    Some((128, 128))
}

/// The weights that have scales, of one matrix or, with a dimension more, of several one after the other.
pub(super) fn tensors(checkpoint: &Checkpoint, settings: Settings) -> Result<Vec<Made>, WeightsError> {
    if settings.weight_block_size.is_some_and(|(rows, columns)| rows == 0 || columns == 0) {
        return Err(wrong(
            "weight_block_size",
            format!("{:?}", settings.weight_block_size),
            "two positive numbers, or null",
        ));
    }
    if settings.expert_dtype.as_deref().is_some_and(|dtype| dtype != "fp8") {
        return Err(wrong(
            "expert_dtype",
            quoted(settings.expert_dtype.as_deref().unwrap_or_default()),
            "fp8",
        ));
    }
    let each = |name: &String| {
        let mut module = Module::new(checkpoint, name);
        let (weight, _) = module.take("")?;
        let shape = weight.shape.clone();
        let (matrices, rows, k) = match shape[..] {
            [rows, k] => (1, rows, k),
            [matrices, rows, k] => (matrices, rows, k),
            _ => return Err(module.misfit("", "F8_E4M3 of two or three dimensions")),
        };
        if !weight.dtype.is("F8_E4M3") || rows == 0 || k == 0 {
            return Err(module.misfit("", "F8_E4M3 of positive dimensions"));
        }
        let block = settings.weight_block_size.unwrap_or((rows, k));
        let (down, across) = (rows.div_ceil(block.0), k.div_ceil(block.1));
        let (scales, at) = module.take("_scale_inv")?;
        let fits = match settings.weight_block_size {
            Some(_) => {
                scales.shape.iter().product::<usize>() == matrices * down * across
                    && scales.shape.ends_with(&[down, across])
            }
            None => scales.elements() == matrices,
        };
        let format = scales.dtype.as_scales().filter(|_| fits);
        let expected = || format!("floats or F8_E8M0 of shape {:?}", [down, across]);
        let format = format.ok_or_else(|| module.misfit("_scale_inv", expected()))?;
        let scales = Scales { at, format, strides: (across, 1), rows: block.0, each: rows };
        let columns = Columns::Blocks(block.1);
        let (codes, meaning, zero) = (Codes::bytes(k, false), Meaning::Float8, Zero::Same(0));
        let grid = Grid { n: matrices * rows, k, bytes: 0, meaning, codes, scales, zero, columns };
        Ok(module.made(name.clone(), shape, grid))
    };
    Module::with(checkpoint, "_scale_inv").iter().map(each).collect()
}
