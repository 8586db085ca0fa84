//! Qwen2 and Qwen3 (transformers' `modeling_qwen2.py`, `modeling_qwen3.py`): Llama with windows on some layers; Qwen2 has
//! biases on queries, keys and values, Qwen3 norms on queries and keys.

use super::{Description, llama};
use crate::model::{
    ModelError,
    blocks::{Flow, Slot, Source, Span},
    config::Config,
};

/// What transformers assumes where the file is silent.
const DEFAULT_WINDOW: usize = 4096;
const DEFAULT_FIRST_WINDOW_LAYER: usize = 28;

pub(super) fn describe_2(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    let layers = description.tower.layers.len();
    for (layer, slides) in description.tower.layers.iter_mut().zip(sliding(config, layers)?) {
        if let Some(window) = slides {
            layer.attention.span = Span::Window(window);
        }
    }
    Ok(description)
}

pub(super) fn describe_3(config: &Config) -> Result<Description, ModelError> {
    let mut description = describe_2(config)?;
    for layer in &mut description.tower.layers {
        let Flow::Pre(norm) = layer.flow;
        layer.attention.qk_norm = Some(norm);
    }
    description.names.slots.extend([
        (Slot::QueryNorm, Source::Rows("layers.{}.self_attn.q_norm")),
        (Slot::KeyNorm, Source::Rows("layers.{}.self_attn.k_norm")),
    ]);
    Ok(description)
}

/// The window of each layer that has one. Nothing counts unless `use_sliding_window`; which layers slide is listed by
/// version 5, and begins at `max_window_layers` in version 4.
fn sliding(config: &Config, layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
    if !config.flag("use_sliding_window", false)? {
        return Ok(vec![None; layers]);
    }
    let window = config.integer("sliding_window", 1..=1 << 23)?.unwrap_or(DEFAULT_WINDOW);
    let slides = match config.strings("layer_types")? {
        Some(types) => {
            let known = |t: &String| ["full_attention", "sliding_attention"].contains(&t.as_str());
            if types.len() != layers || !types.iter().all(known) {
                let expected = format!("full_attention or sliding_attention for each of {layers} layers");
                return Err(config.error("layer_types", expected).into());
            }
            types.iter().map(|t| t == "sliding_attention").collect::<Vec<_>>()
        }
        None => {
            let first =
                config.integer("max_window_layers", 0..=1 << 20)?.unwrap_or(DEFAULT_FIRST_WINDOW_LAYER);
            (0..layers).map(|layer| layer >= first).collect()
        }
    };
    Ok(slides.into_iter().map(|slides| slides.then_some(window)).collect())
}
