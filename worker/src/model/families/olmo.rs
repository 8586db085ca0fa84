//! OLMo, OLMo 2, OLMo 3 and OLMoE (transformers' `modeling_olmo.py`, `modeling_olmo2.py`, `modeling_olmo3.py`,
//! `modeling_olmoe.py`): Llama, whose norms have no factors in OLMo; later ones have norms of all heads of queries together, and
//! of keys. OLMo 2 and 3 norm what blocks yield instead of what they take; OLMo 3
//! has windows on three layers of four; OLMoE has experts.

use super::{Description, llama, qwen};
use crate::model::{
    ModelError,
    architecture::{AttentionMask, Ffn, Flow, Moe, Norm, NormOver, Position, QkNorm, Slot, Source},
    config::Config,
    rope,
};

/// What transformers assumes where the file is silent.
const DEFAULT_WINDOW: usize = 4096;
const DEFAULT_THETA: f64 = 500_000.0;

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    let norm = Norm::Layer(1e-5);
    description.tower.norm = Some(norm);
    for layer in &mut description.tower.layers {
        layer.flow = Flow::Pre(norm);
    }
    clip(&mut description, config)?;
    let norms = [Slot::AttentionNorm, Slot::FfnNorm, Slot::FinalNorm];
    super::rename(&mut description.names, &[], &norms.map(|slot| (slot, Source::Ones)));
    Ok(description)
}

pub(super) fn describe_2(config: &Config) -> Result<Description, ModelError> {
    let mut description = plain(config)?;
    let tower = &mut description.tower;
    let head_dim = tower.layers[0].attention.head_dim;
    tower.ropes = vec![rope::resolve(config, head_dim, tower.context, rope::DEFAULTS)?];
    Ok(description)
}

pub(super) fn describe_3(config: &Config) -> Result<Description, ModelError> {
    let mut description = plain(config)?;
    let tower = &mut description.tower;
    let (head_dim, context) = (tower.layers[0].attention.head_dim, tower.context);
    let rope = |kind, theta| {
        let defaults = rope::Defaults { theta, ..rope::DEFAULTS };
        rope::resolve_for(config, (kind, "rope_theta"), head_dim, context, defaults)
    };
    tower.ropes = vec![rope("full_attention", DEFAULT_THETA)?, rope("sliding_attention", DEFAULT_THETA)?];
    let window = super::window(config, Some(DEFAULT_WINDOW))?;
    let slides = super::sliding_layers(config, tower.layers.len(), |layer| (layer + 1) % 4 != 0)?;
    for (layer, _) in tower.layers.iter_mut().zip(slides).filter(|(_, slides)| *slides) {
        layer.attention.position = Position::Rope(1);
        layer.attention.mask = window.map_or(AttentionMask::Causal, AttentionMask::Window);
    }
    Ok(description)
}

pub(super) fn describe_moe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    norm_all(&mut description, config)?;
    clip(&mut description, config)?;
    let field = if config.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let experts = config.integer(field, 1..=1 << 14)?.unwrap_or(64);
    let active = config.integer("num_experts_per_tok", 1..=experts)?.unwrap_or(8.min(experts));
    let normalize = config.flag("norm_topk_prob", false)?;
    for layer in &mut description.tower.layers {
        layer.ffn = Ffn::Moe(Moe { normalize, ..Moe::new(experts, active, layer.ffn.mlp()) });
    }
    description.names.slots.extend(qwen::EXPERTS);
    Ok(description)
}

/// Bounds on queries, keys and values.
fn clip(description: &mut Description, config: &Config) -> Result<(), ModelError> {
    let most = config.positive("clip_qkv")?.map(|most| most as f32);
    description.tower.layers.iter_mut().for_each(|layer| layer.attention.clip = most);
    Ok(())
}

/// OLMo 2 without its rotary frequencies.
fn plain(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::plain(config)?;
    norm_all(&mut description, config)?;
    for layer in &mut description.tower.layers {
        layer.flow = Flow::After(layer.flow.norm());
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

/// Norms of queries and keys over all their heads; and the default of all norms, which differs from Llama's.
fn norm_all(description: &mut Description, config: &Config) -> Result<(), ModelError> {
    qwen::norm_heads(description);
    let norm = Norm::Rms(config.positive("rms_norm_eps")?.unwrap_or(1e-5) as f32);
    description.tower.norm = Some(norm);
    for layer in &mut description.tower.layers {
        layer.flow = Flow::Pre(norm);
        layer.attention.qk_norm = Some(QkNorm { norm, over: NormOver::All, turned: false });
    }
    Ok(())
}
