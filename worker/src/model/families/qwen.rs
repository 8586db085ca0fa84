//! Qwen2, Qwen3 and both with experts (transformers' `modeling_qwen2.py`, `modeling_qwen2_moe.py`, `modeling_qwen3.py`,
//! `modeling_qwen3_moe.py`): Llama with windows on some layers; Qwen2 has biases on queries, keys and values, Qwen3 norms on
//! queries and keys; Qwen2-MoE has one more expert for all tokens.

use super::{Description, llama, mistral};
use crate::model::{
    ModelError,
    architecture::{AttentionMask, Ffn, Mlp, Moe, QkNorm, Shared, Slot, Source},
    config::Config,
};

/// What transformers assumes where the file is silent.
const DEFAULT_WINDOW: usize = 4096;
const DEFAULT_FIRST_WINDOW_LAYER: usize = 28;

pub(super) fn describe_2(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    let Some(window) = window(config)? else { return Ok(description) };
    let layers = &mut description.tower.layers;
    // Version 5 lists which layers slide; in version 4 they begin at `max_window_layers`.
    let first = config.integer("max_window_layers", 0..=1 << 20)?.unwrap_or(DEFAULT_FIRST_WINDOW_LAYER);
    let slides = super::sliding_layers(config, layers.len(), |layer| layer >= first)?;
    for (layer, slides) in layers.iter_mut().zip(slides) {
        if slides {
            layer.attention.mask = AttentionMask::Window(window);
        }
    }
    Ok(description)
}

pub(super) fn describe_3(config: &Config) -> Result<Description, ModelError> {
    let mut description = describe_2(config)?;
    norm_heads(&mut description);
    Ok(description)
}

pub(super) fn describe_2_moe(config: &Config) -> Result<Description, ModelError> {
    let inner = config.integer("shared_expert_intermediate_size", 1..=1 << 22)?.unwrap_or(5632);
    let shared = Some(Shared { inner, gated: true });
    let mut description = mix(describe_2(config)?, config, [60, 4], shared)?;
    description.names.slots.extend([
        (Slot::SharedRouter, Source::Rows("layers.{}.mlp.shared_expert_gate")),
        (Slot::SharedGate, Source::Rows("layers.{}.mlp.shared_expert.gate_proj")),
        (Slot::SharedUp, Source::Rows("layers.{}.mlp.shared_expert.up_proj")),
        (Slot::SharedDown, Source::Rows("layers.{}.mlp.shared_expert.down_proj")),
    ]);
    Ok(description)
}

pub(super) fn describe_3_moe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    norm_heads(&mut description);
    mistral::slide(&mut description, window(config)?);
    mix(description, config, [128, 8], None)
}

/// Experts in the layers that are to have some; `defaults` are how many there are, and how many for a token.
fn mix(
    mut description: Description,
    config: &Config,
    defaults: [usize; 2],
    shared: Option<Shared>,
) -> Result<Description, ModelError> {
    // Version 5 writes the second name.
    let field = if config.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let experts = config.integer(field, 1..=1 << 14)?.unwrap_or(defaults[0]);
    let active = config.integer("num_experts_per_tok", 1..=experts)?.unwrap_or(defaults[1].min(experts));
    let inner = config.required("moe_intermediate_size", 1..=1 << 22)?;
    let mlp = Mlp { inner, ..description.tower.layers[0].ffn.mlp() };
    let normalize = config.flag("norm_topk_prob", false)?;
    let moe = Moe { normalize, shared, ..Moe::new(experts, active, mlp) };
    let step = config.integer("decoder_sparse_step", 1..=10_000)?.unwrap_or(1);
    let dense = config.integers("mlp_only_layers", 0..=10_000)?.unwrap_or_default();
    for (i, layer) in description.tower.layers.iter_mut().enumerate() {
        if !dense.contains(&i) && (i + 1) % step == 0 {
            layer.ffn = Ffn::Moe(moe);
        }
    }
    description.names.slots.extend(EXPERTS);
    Ok(description)
}

/// The experts, each by itself or all fused.
pub(super) const EXPERTS: [(Slot, Source); 6] = [
    (Slot::Router, Source::Rows("layers.{}.mlp.gate")),
    (Slot::Gate, Source::Rows("layers.{}.mlp.experts.{e}.gate_proj")),
    (Slot::Up, Source::Rows("layers.{}.mlp.experts.{e}.up_proj")),
    (Slot::Down, Source::Rows("layers.{}.mlp.experts.{e}.down_proj")),
    super::FUSED_EXPERTS[1],
    super::FUSED_EXPERTS[2],
];

/// The window, which counts only if it is used.
fn window(config: &Config) -> Result<Option<usize>, ModelError> {
    if !config.flag("use_sliding_window", false)? {
        return Ok(None);
    }
    Ok(super::window(config, Some(DEFAULT_WINDOW))?)
}

/// Norms on every head of queries and keys, of the same kind as the others.
pub(super) fn norm_heads(description: &mut Description) {
    for layer in &mut description.tower.layers {
        layer.attention.qk_norm = Some(QkNorm::of_heads(layer.flow.norm()));
    }
    description.names.slots.extend([
        (Slot::QueryNorm, Source::Rows("layers.{}.self_attn.q_norm")),
        (Slot::KeyNorm, Source::Rows("layers.{}.self_attn.k_norm")),
    ]);
}
