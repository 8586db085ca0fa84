//! SmolLM3 (transformers' `modeling_smollm3.py`): Llama of which some layers turn nothing, and may have windows.

use super::{Description, llama};
use crate::model::{
    ModelError,
    architecture::{AttentionMask, Position},
    config::Config,
    rope,
};

/// Every so many layers one turns nothing, where the file is silent.
const DEFAULT_INTERVAL: usize = 4;

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe_with(config, rope::Defaults { theta: 2e6, ..rope::DEFAULTS })?;
    description.names.tied = config.flag("tie_word_embeddings", true)?;
    let layers = &mut description.tower.layers;
    let interval = config.integer("no_rope_layer_interval", 1..=10_000)?.unwrap_or(DEFAULT_INTERVAL);
    let turns = match config.integers("no_rope_layers", 0..=1)? {
        None => (0..layers.len()).map(|layer| usize::from((layer + 1) % interval != 0)).collect(),
        Some(turns) if turns.len() == layers.len() => turns,
        Some(_) => {
            let expected = format!("0 or 1 for each of {} layers", layers.len());
            return Err(config.error("no_rope_layers", expected).into());
        }
    };
    // Where the file lists which layers slide, they do, used or not; otherwise those that turn nothing, if it is used.
    let window = super::window(config, None)?;
    let used = window.is_some() && config.flag("use_sliding_window", false)?;
    let slides = super::sliding_layers(config, layers.len(), |layer| used && turns[layer] == 0)?;
    for ((layer, turns), slides) in layers.iter_mut().zip(turns).zip(slides) {
        if turns == 0 {
            layer.attention.position = Position::None;
        }
        if let (true, Some(window)) = (slides, window) {
            layer.attention.mask = AttentionMask::Window(window);
        }
    }
    Ok(description)
}
