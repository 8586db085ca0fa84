//! Mistral, Ministral and Mixtral (transformers' `modeling_mistral.py`, `modeling_ministral.py`, `modeling_mixtral.py`):
//! Llama with a sliding window, of Ministral on some layers; Ministral 3 sharpens queries far into a sequence; Mixtral has
//! experts.

use serde_json::{Value, json};

use super::{Description, llama};
use crate::model::{
    ModelError,
    architecture::{AttentionMask, Ffn, Moe, Slot, Source},
    config::Config,
    rope,
};

/// What transformers assumes where Mistral's file does not mention a window.
const DEFAULT_WINDOW: usize = 4096;

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    slide(&mut description, super::window(config, Some(DEFAULT_WINDOW))?);
    // Where layers are listed, transformers reads the file as one of Ministral.
    let listed = super::sliding_layers(config, description.tower.layers.len(), |_| true)?;
    for (layer, slides) in description.tower.layers.iter_mut().zip(listed) {
        if !slides {
            layer.attention.mask = AttentionMask::Causal;
        }
    }
    Ok(description)
}

pub(super) fn describe_ministral_3(config: &Config) -> Result<Description, ModelError> {
    let mut config = config.clone();
    if config.get("rope_parameters").is_none() && config.get("rope_scaling").is_none() {
        config = config.with("rope_parameters", ministral_3_ropes());
    }
    let mut description = llama::describe(&config)?;
    slide(&mut description, super::window(&config, None)?);
    let tower = &mut description.tower;
    tower.ropes[0].sharpening = rope::sharpening(&config, tower.context)?;
    Ok(description)
}

/// What transformers assumes where Ministral 3's file is silent.
fn ministral_3_ropes() -> Value {
    json!({
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    })
}

pub(super) fn describe_mixtral(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe_with(config, rope::Defaults { theta: 1e6, ..rope::DEFAULTS })?;
    slide(&mut description, super::window(config, None)?);
    let experts = config.integer("num_local_experts", 1..=1 << 14)?.unwrap_or(8);
    let active = config.integer("num_experts_per_tok", 1..=experts)?.unwrap_or(2.min(experts));
    for layer in &mut description.tower.layers {
        layer.ffn = Ffn::Moe(Moe::new(experts, active, layer.ffn.mlp()));
    }
    let names = &mut description.names.slots;
    names.retain(|(slot, _)| ![Slot::Gate, Slot::Up, Slot::Down].contains(slot));
    names.extend([
        (Slot::Router, Source::Rows("layers.{}.block_sparse_moe.gate")),
        (Slot::Gate, Source::Rows("layers.{}.block_sparse_moe.experts.{e}.w1")),
        (Slot::Up, Source::Rows("layers.{}.block_sparse_moe.experts.{e}.w3")),
        (Slot::Down, Source::Rows("layers.{}.block_sparse_moe.experts.{e}.w2")),
    ]);
    names.extend(super::FUSED_EXPERTS);
    Ok(description)
}

/// Gives every layer the same window.
pub(super) fn slide(description: &mut Description, window: Option<usize>) {
    for layer in &mut description.tower.layers {
        layer.attention.mask = window.map_or(AttentionMask::Causal, AttentionMask::Window);
    }
}
