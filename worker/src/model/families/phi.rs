//! Phi and Phi-3 (transformers' `modeling_phi.py`, `modeling_phi3.py`): Phi computes attention and feed-forward block
//! side by side from one norm and has biases everywhere; Phi-3 is a Llama with fused products and rotations for long
//! inputs.

use super::{Description, llama, mistral};
use crate::model::{
    ModelError,
    architecture::{Act, Ffn, Flow, Mlp, Norm, QkNorm, Slot, Source},
    config::Config,
    rope,
};

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let Description { mut tower, mut names } =
        llama::describe_with(config, rope::Defaults { partial: Some(0.5), ..rope::DEFAULTS })?;
    let norm = Norm::Layer(config.positive("layer_norm_eps")?.unwrap_or(1e-5) as f32);
    let act = super::act(config, "hidden_act", Act::GeluTanh)?;
    let norm_heads = config.flag("qk_layernorm", false)?;
    for layer in &mut tower.layers {
        layer.flow = Flow::ParallelOne(norm);
        layer.ffn = Ffn::Plain(Mlp { act, ..layer.ffn.mlp() });
        layer.attention.qk_norm = norm_heads.then_some(QkNorm::of_heads(norm));
    }
    tower.norm = Some(norm);
    let replaced = [Slot::AttentionOut, Slot::FfnNorm, Slot::Gate, Slot::Up, Slot::Down, Slot::FinalNorm];
    names.slots.retain(|(slot, _)| !replaced.contains(slot));
    names.slots.extend([
        (Slot::QueryNorm, Source::Rows("layers.{}.self_attn.q_layernorm")),
        (Slot::KeyNorm, Source::Rows("layers.{}.self_attn.k_layernorm")),
        (Slot::AttentionOut, Source::Rows("layers.{}.self_attn.dense")),
        (Slot::Up, Source::Rows("layers.{}.mlp.fc1")),
        (Slot::Down, Source::Rows("layers.{}.mlp.fc2")),
        (Slot::FinalNorm, Source::Rows("final_layernorm")),
    ]);
    Ok(Description { tower, names })
}

pub(super) fn describe_3(config: &Config) -> Result<Description, ModelError> {
    let rope = rope::Defaults { partial: Some(1.0), ..rope::DEFAULTS };
    let mut description = llama::describe_with(config, rope)?;
    mistral::slide(&mut description, super::window(config, None)?);
    let names = &mut description.names.slots;
    let replaced = [Slot::Query, Slot::Key, Slot::Value, Slot::Gate, Slot::Up];
    names.retain(|(slot, _)| !replaced.contains(slot));
    names.extend([
        (Slot::Qkv, Source::Rows("layers.{}.self_attn.qkv_proj")),
        (Slot::GateUp, Source::Rows("layers.{}.mlp.gate_up_proj")),
    ]);
    Ok(description)
}
