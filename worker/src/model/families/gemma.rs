//! Gemma 2 and the text of Gemma 3 (transformers' `modeling_gemma2.py`, `modeling_gemma3.py`): Llama with norms on both
//! sides of each block, whose files hold the factors less one; scaled embeddings; windows on most layers. Gemma 2
//! bounds scores and logits softly, Gemma 3 norms the heads and turns local layers by other frequencies.

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

pub(super) fn describe_2(config: &Config) -> Result<Description, ModelError> {
    // Every second layer sees all.
    let mut description = describe(config, |layer| layer % 2 == 0, [Some(50.0), Some(30.0)])?;
    let tower = &mut description.tower;
    let head_dim = tower.layers[0].attention.head_dim;
    tower.ropes = vec![rope::resolve(config, head_dim, tower.context, rope::DEFAULTS)?];
    Ok(plus_one(description))
}

pub(super) fn describe_3(config: &Config) -> Result<Description, ModelError> {
    let pattern =
        ["sliding_window_pattern", "_sliding_window_pattern"].map(|f| config.integer(f, 1..=10_000));
    let [pattern, private] = pattern;
    let pattern = pattern?.or(private?).unwrap_or(DEFAULT_PATTERN);
    let mut description = describe(config, |layer| (layer + 1) % pattern != 0, [None, None])?;
    qwen::norm_heads(&mut description);
    let tower = &mut description.tower;
    let (head_dim, context) = (tower.layers[0].attention.head_dim, tower.context);
    // Version 5 has parameters per kind of layer; version 4 has a base for local layers, which are never scaled.
    let parameters = config.object("rope_parameters")?;
    let of = |kind| parameters.as_ref().map(|p| p.object(kind)).transpose().map(Option::flatten);
    let legacy = config.object("rope_scaling")?;
    let (global, local) = (of("full_attention")?.or(legacy), of("sliding_attention")?);
    let rope = |scaling: Option<Config>, field, default| {
        let theta = scaling.as_ref().map(|s| s.positive("rope_theta")).transpose()?.flatten();
        let theta = theta.or(config.positive(field)?).unwrap_or(default);
        rope::resolve_with(config, scaling.as_ref(), theta, head_dim, context)
    };
    tower.ropes = vec![rope(global, "rope_theta", 1e6)?, rope(local, "rope_local_base_freq", 1e4)?];
    for layer in &mut tower.layers {
        if matches!(layer.attention.mask, AttentionMask::Window(_)) {
            layer.attention.position = Position::Rope(1);
        }
    }
    Ok(plus_one(description))
}

/// What both have in common; `softcaps` are the bounds of scores and of logits where the file is silent.
fn describe(
    config: &Config,
    slides: impl Fn(usize) -> bool,
    softcaps: [Option<f64>; 2],
) -> Result<Description, ModelError> {
    let Description { mut tower, mut names } = llama::plain(config)?;
    let field = if config.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    let act = super::act(config, field, Act::GeluTanh)?;
    let softcap = |field, default: Option<f64>| match config.mentions(field) {
        true => config.positive(field),
        false => Ok(default),
    };
    let scores = softcap("attn_logit_softcapping", softcaps[0])?.map(|c| c as f32);
    let logits = softcap("final_logit_softcapping", softcaps[1])?.map(|c| c as f32);
    let scale = config.positive("query_pre_attn_scalar")?.unwrap_or(DEFAULT_SCALAR).powf(-0.5) as f32;
    let window = config.integer("sliding_window", 1..=1 << 23)?.unwrap_or(DEFAULT_WINDOW);
    let sliding = super::sliding_layers(config, tower.layers.len(), slides)?;
    for (layer, slides) in tower.layers.iter_mut().zip(sliding) {
        layer.flow = Flow::Sandwich(layer.flow.norm());
        layer.ffn = Ffn::Gated(Mlp { act, ..layer.ffn.mlp() });
        layer.attention.scale = scale;
        layer.attention.softcap = scores;
        if slides {
            layer.attention.mask = AttentionMask::Window(window);
        }
    }
    tower.input.scale = (tower.width as f64).sqrt() as f32;
    tower.head = Head::Lm { softcap: logits };
    names.tied = config.flag("tie_word_embeddings", true)?;
    names.slots.retain(|(slot, _)| *slot != Slot::FfnNorm);
    names.slots.extend([
        (Slot::AttentionPostNorm, Source::Rows("layers.{}.post_attention_layernorm")),
        (Slot::FfnNorm, Source::Rows("layers.{}.pre_feedforward_layernorm")),
        (Slot::FfnPostNorm, Source::Rows("layers.{}.post_feedforward_layernorm")),
    ]);
    Ok(Description { tower, names })
}

/// The norms of a file hold their factors less one.
fn plus_one(mut description: Description) -> Description {
    let norm = |slot: Slot| {
        matches!(
            slot,
            Slot::AttentionNorm
                | Slot::AttentionPostNorm
                | Slot::FfnNorm
                | Slot::FfnPostNorm
                | Slot::QueryNorm
                | Slot::KeyNorm
                | Slot::FinalNorm
        )
    };
    for (slot, source) in &mut description.names.slots {
        if norm(*slot) {
            *source = Source::PlusOne(source.name());
        }
    }
    description
}
