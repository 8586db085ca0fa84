//! What kernels can take at once.

use crate::{
    engine::Size,
    kernels::{cuda::limits::GRID, ops::BLOCK_TOKENS},
    model::{ModelError, architecture::Tower, widths::Widths},
};

/// Checks that kernels can take the longest step of a stage, with `outputs` rows of logits.
///
/// # Errors
/// If it has more rows than a grid has blocks, or more elements than 31 bits count.
pub(super) fn check(tower: &Tower, size: Size, outputs: u32) -> Result<(), ModelError> {
    let widths = Widths::of(tower);
    let values = widths.values();
    let Widths { residual, qkv, attention, up, experts, input, .. } = widths;
    let experts = experts.map_or(0, |(all, _)| all);
    let widest = [residual, qkv, attention, up, experts, input].into_iter().max().unwrap_or(1);
    // Scratch has room for whole blocks of tokens.
    let most = |width: usize| GRID.min(i32::MAX as usize / width.max(1)) / BLOCK_TOKENS * BLOCK_TOKENS;
    let limits = [
        (size.tokens, most(widest), "tokens", "--max-step-tokens"),
        (outputs, most(values), "rows of results", "--max-step-rows"),
    ];
    match limits.into_iter().find(|(asked, most, ..)| *asked as usize > *most) {
        Some((asked, most, what, flag)) => Err(ModelError::StepSize { asked, most, what, flag }),
        None => Ok(()),
    }
}
