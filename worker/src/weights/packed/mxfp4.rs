//! MXFP4 as gpt-oss stores it: experts in blocks of 32 floats of four bits, and a power of two for each block.
//!
//! A projection `P` of some experts is `P_blocks` `(experts, outputs, blocks, 16)`, two codes to a byte, the first in its low half,
//! and `P_scales` `(experts, outputs, blocks)`, exponents plus 127, both U8 (transformers' `convert_moe_packed_tensors`; OCP's
//! Microscaling Formats 1.0, E2M1 and E8M0). What comes of it is `P` `(experts, outputs, inputs)`: inputs innermost, as blocks lie,
//! and not turned around as transformers turns gpt-oss' for its own products. Without `experts`, it is one matrix.
//!
//! Values are exact in f32 and, as they have two significant bits, in bf16; in f16 within its range. In int8 too where half a
//! scale is an f16, so for scales from 2^-23 to 2^16. Int4 keeps a group that spans at most 15 halves of its scale; others it
//! fits anew, less than an eighth of its largest value off (`tests.rs` measures it). A scale of 255 stands for no number, and is refused
//! as the NaN that it makes.
//!
//! Which modules are packed is what their tensors say: those that `modules_to_not_convert` names have plain ones.

use super::{
    Made, Module, WeightsError,
    grid::{Codes, Columns, Grid, Meaning, ScaleFormat, Scales, Zero},
};
use crate::weights::Checkpoint;

/// Elements of a block, and bytes of them.
const BLOCK: (usize, usize) = (32, 16);

/// The projections that have blocks.
///
/// # Errors
/// If scales are missing, or one of the two is of another format or shape than the other says.
pub(super) fn tensors(checkpoint: &Checkpoint) -> Result<Vec<Made>, WeightsError> {
    let each = |name: &String| {
        let mut module = Module::new(checkpoint, name);
        let (blocks, at) = module.take("_blocks")?;
        let (outer, across) = match blocks.shape[..] {
            [ref outer @ .., across, bytes] if matches!(outer.len(), 1 | 2) && bytes == BLOCK.1 => {
                (outer.to_vec(), across)
            }
            _ => return Err(module.misfit("_blocks", "U8 of shape (experts, outputs, blocks, 16)")),
        };
        if !blocks.dtype.is("U8") || blocks.bytes == 0 {
            return Err(module.misfit("_blocks", "U8 of positive dimensions"));
        }
        let scales = module.take_as("_scales", "U8", &[&outer[..], &[across]].concat())?;
        let (n, k) = (outer.iter().product(), across * BLOCK.0);
        let grid = Grid {
            n,
            k,
            bytes: 0,
            meaning: Meaning::Float4,
            codes: Codes::halves(at, k),
            scales: Scales {
                at: scales,
                format: ScaleFormat::Exponent,
                strides: (across, 1),
                rows: 1,
                each: n,
            },
            zero: Zero::Same(0),
            columns: Columns::Blocks(BLOCK.0),
        };
        Ok(module.made(name.clone(), [&outer[..], &[k]].concat(), grid))
    };
    Module::with(checkpoint, "_blocks").iter().map(each).collect()
}
