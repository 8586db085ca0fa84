//! EXAONE 4 (transformers' `modeling_exaone4.py`): norms of what blocks yield, and of every head; where there are windows,
//! on three layers of four, the others turn nothing.

use super::{Description, llama, qwen};
use crate::model::{
    ModelError,
    architecture::{AttentionMask, Flow, Position, Slot, Source},
    config::Config,
};

/// What transformers assumes where the file is silent.
const DEFAULT_WINDOW: usize = 4096;
const DEFAULT_PATTERN: usize = 4;

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    qwen::norm_heads(&mut description);
    let window = super::window(config, Some(DEFAULT_WINDOW))?;
    // A pattern may also be written as letters, beside a list of layers that says the same.
    let pattern = match config.get("layer_types") {
        Some(_) => DEFAULT_PATTERN,
        None => config.integer("sliding_window_pattern", 1..=10_000)?.unwrap_or(DEFAULT_PATTERN),
    };
    let layers = &mut description.tower.layers;
    let slides = super::sliding_layers(config, layers.len(), |layer| (layer + 1) % pattern != 0)?;
    for (layer, slides) in layers.iter_mut().zip(slides) {
        layer.flow = Flow::After(layer.flow.norm());
        match window {
            Some(window) if slides => layer.attention.mask = AttentionMask::Window(window),
            Some(_) => layer.attention.position = Position::None,
            None => {}
        }
    }
    super::rename(
        &mut description.names,
        &[Slot::AttentionNorm, Slot::FfnNorm],
        &[
            (Slot::AttentionPostNorm, Source::Rows("layers.{}.post_attention_layernorm")),
            (Slot::FfnPostNorm, Source::Rows("layers.{}.post_feedforward_layernorm")),
        ],
    );
    Ok(description)
}
