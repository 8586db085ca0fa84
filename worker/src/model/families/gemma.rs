//! Gemma 1, 2 and the text of 3 (transformers' `modeling_gemma.py`, `modeling_gemma2.py`, `modeling_gemma3.py`): Llama with scaled
//! embeddings and norms whose files hold the factors less one. Gemma 2 and 3 have them on both sides of each block, and
//! windows on most layers; Gemma 2 bounds scores and logits softly; Gemma 3 norms the heads and turns local layers by other
//! frequencies.

use super::{Description, llama, qwen};
use crate::model::{
    ModelError,
    architecture::{Act, AttentionMask, Ffn, Flow, Head, Mlp, Position, Slot, Source},
    config::Config,
    rope,
};

/// What transformers assumes where the file is silent.
const DEFAULT_WINDOW: usize = 4096;
const DEFAULT_PATTERN: usize = 6;
const DEFAULT_SCALAR: f64 = 256.0;

pub(super) fn describe_1(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    let tower = &mut description.tower;
    tower.input.scale = (tower.width as f64).sqrt() as f32;
    for layer in &mut tower.layers {
        let mlp = layer.ffn.mlp();
        // Files of the first release say `gelu`, and mean its approximation.
        let act = if mlp.act == Act::Gelu { Act::GeluTanh } else { mlp.act };
        layer.ffn = Ffn::Gated(Mlp { act, ..mlp });
    }
    super::norms_less_one(&mut description.names);
    Ok(description)
}

pub(super) fn describe_2(config: &Config) -> Result<Description, ModelError> {
    // Every second layer sees all.
    let mut description = describe(config, |layer| layer % 2 == 0, Some(30.0))?;
    let scores = softcap(config, "attn_logit_softcapping", Some(50.0))?;
    let tower = &mut description.tower;
    tower.layers.iter_mut().for_each(|layer| layer.attention.softcap = scores);
    let head_dim = tower.layers[0].attention.head_dim;
    tower.ropes = vec![rope::resolve(config, head_dim, tower.context, rope::DEFAULTS)?];
    super::norms_less_one(&mut description.names);
    Ok(description)
}

pub(super) fn describe_3(config: &Config) -> Result<Description, ModelError> {
    // What transformers 5 writes as `_sliding_window_pattern`, it does not read again: `layer_types` say it.
    let pattern = config.integer("sliding_window_pattern", 1..=10_000)?.unwrap_or(DEFAULT_PATTERN);
    let mut description = describe(config, |layer| (layer + 1) % pattern != 0, None)?;
    qwen::norm_heads(&mut description);
    let tower = &mut description.tower;
    let (head_dim, context) = (tower.layers[0].attention.head_dim, tower.context);
    // Version 4 has a base of their own for local layers.
    let rope = |kind, field, theta| {
        let defaults = rope::Defaults { theta, ..rope::DEFAULTS };
        rope::resolve_for(config, (kind, field), head_dim, context, defaults)
    };
    tower.ropes = vec![
        rope("full_attention", "rope_theta", 1e6)?,
        rope("sliding_attention", "rope_local_base_freq", 1e4)?,
    ];
    for layer in &mut tower.layers {
        if matches!(layer.attention.mask, AttentionMask::Window(_)) {
            layer.attention.position = Position::Rope(1);
        }
    }
    super::norms_less_one(&mut description.names);
    Ok(description)
}

/// What both have in common; `softcap` is the bound of logits where the file is silent.
fn describe(
    config: &Config,
    slides: impl Fn(usize) -> bool,
    logits: Option<f64>,
) -> Result<Description, ModelError> {
    let Description { mut tower, mut names } = llama::plain(config)?;
    let field = if config.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    let act = super::act(config, field, Act::GeluTanh)?;
    let logits = softcap(config, "final_logit_softcapping", logits)?;
    let scale = config.positive("query_pre_attn_scalar")?.unwrap_or(DEFAULT_SCALAR).powf(-0.5) as f32;
    let window = config.integer("sliding_window", 1..=1 << 23)?.unwrap_or(DEFAULT_WINDOW);
    let sliding = super::sliding_layers(config, tower.layers.len(), slides)?;
    for (layer, slides) in tower.layers.iter_mut().zip(sliding) {
        layer.flow = Flow::Sandwich(layer.flow.norm());
        layer.ffn = Ffn::Gated(Mlp { act, ..layer.ffn.mlp() });
        layer.attention.scale = scale;
        if slides {
            layer.attention.mask = AttentionMask::Window(window);
        }
    }
    tower.input.scale = (tower.width as f64).sqrt() as f32;
    tower.head = Head::Lm { scale: 1.0, softcap: logits };
    names.tied = config.flag("tie_word_embeddings", true)?;
    names.slots.retain(|(slot, _)| *slot != Slot::FfnNorm);
    names.slots.extend([
        (Slot::AttentionPostNorm, Source::Rows("layers.{}.post_attention_layernorm")),
        (Slot::FfnNorm, Source::Rows("layers.{}.pre_feedforward_layernorm")),
        (Slot::FfnPostNorm, Source::Rows("layers.{}.post_feedforward_layernorm")),
    ]);
    Ok(Description { tower, names })
}

/// A bound; `default` if the file does not mention it, none if it is null there.
fn softcap(config: &Config, field: &str, default: Option<f64>) -> Result<Option<f32>, ModelError> {
    let cap = if config.mentions(field) { config.positive(field)? } else { default };
    Ok(cap.map(|cap| cap as f32))
}
