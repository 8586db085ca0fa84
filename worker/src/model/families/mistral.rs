//! Mistral (transformers' `modeling_mistral.py`): Llama with a sliding window.

use super::{Description, llama};
use crate::model::{ModelError, blocks::Span, config::Config};

/// What transformers assumes where the file does not mention a window.
const DEFAULT_WINDOW: usize = 4096;

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    let window = match config.integer("sliding_window", 1..=1 << 23)? {
        None if config.mentions("sliding_window") => None,
        window => Some(window.unwrap_or(DEFAULT_WINDOW)),
    };
    if let Some(window) = window {
        for layer in &mut description.tower.layers {
            layer.attention.span = Span::Window(window);
        }
    }
    Ok(description)
}
