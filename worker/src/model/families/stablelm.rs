//! StableLM (transformers' `modeling_stablelm.py`): Llama with layer norms that turns a part of each head; larger ones norm
//! every head with factors of its own, and compute attention and feed-forward block side by side.

use super::{Description, llama};
use crate::model::{
    ModelError,
    architecture::{Flow, Norm, NormOver, QkNorm, Slot, Source},
    config::Config,
    rope,
};

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description =
        llama::describe_with(config, rope::Defaults { partial: Some(0.25), ..rope::DEFAULTS })?;
    let norm = Norm::Layer(config.positive("layer_norm_eps")?.unwrap_or(1e-5) as f32);
    let norm_heads = config.flag("qk_layernorm", false)?;
    let parallel = config.flag("use_parallel_residual", false)?;
    description.tower.norm = Some(norm);
    for layer in &mut description.tower.layers {
        layer.flow = if parallel { Flow::ParallelOne(norm) } else { Flow::Pre(norm) };
        layer.attention.qk_norm =
            norm_heads.then_some(QkNorm { norm, over: NormOver::EachHead, turned: false });
    }
    description.names.slots.extend([
        (Slot::QueryNorm, Source::Rows("layers.{}.self_attn.q_layernorm.norms.{h}")),
        (Slot::KeyNorm, Source::Rows("layers.{}.self_attn.k_layernorm.norms.{h}")),
    ]);
    Ok(description)
}
