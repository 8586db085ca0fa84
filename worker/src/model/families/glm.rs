//! GLM-4 (0414 and before) and GLM-4.5 (transformers' `modeling_glm.py`, `modeling_glm4.py`, `modeling_glm4_moe.py`). The
//! former turn half of each head, even dimensions with odd ones, and fuse gate and up; `glm4` has norms on both sides of
//! each block. GLM-4.5 is a Llama that turns half of each head, with experts chosen by sigmoids, and one for all tokens.

use super::{Description, llama, qwen};
use crate::kernels::ops::MAX_GROUPS;
use crate::model::{
    ModelError,
    architecture::{Ffn, Flow, Mlp, Moe, Router, Shared, Slot, Source},
    config::Config,
    rope,
};

const HALF: rope::Defaults = rope::Defaults { partial: Some(0.5), ..rope::DEFAULTS };

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe_with(config, HALF)?;
    super::rename(
        &mut description.names,
        &[Slot::Gate, Slot::Up],
        &[
            (Slot::Query, Source::EvenOdd("layers.{}.self_attn.q_proj")),
            (Slot::Key, Source::EvenOdd("layers.{}.self_attn.k_proj")),
            (Slot::GateUp, Source::Rows("layers.{}.mlp.gate_up_proj")),
        ],
    );
    Ok(description)
}

pub(super) fn describe_4(config: &Config) -> Result<Description, ModelError> {
    let mut description = describe(config)?;
    for layer in &mut description.tower.layers {
        layer.flow = Flow::Sandwich(layer.flow.norm());
    }
    description.names.slots.extend([
        (Slot::AttentionPostNorm, Source::Rows("layers.{}.post_self_attn_layernorm")),
        (Slot::FfnPostNorm, Source::Rows("layers.{}.post_mlp_layernorm")),
    ]);
    Ok(description)
}

pub(super) fn describe_4_moe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe_with(config, HALF)?;
    if config.flag("use_qk_norm", false)? {
        qwen::norm_heads(&mut description);
    }
    let field =
        if config.get("n_routed_experts").is_some() { "n_routed_experts" } else { "num_local_experts" };
    let experts = config.integer(field, 1..=1 << 14)?.unwrap_or(128);
    let groups = config.integer("n_group", 1..=MAX_GROUPS)?.unwrap_or(1);
    if experts % groups != 0 || experts / groups < 2 {
        return Err(config
            .error("n_group", format!("groups of at least 2 of {experts} experts each"))
            .into());
    }
    let kept = config.integer("topk_group", 1..=groups)?.unwrap_or(1);
    let most = experts / groups * kept;
    let active = config.integer("num_experts_per_tok", 1..=most)?.unwrap_or(8.min(most));
    let inner = config.integer("moe_intermediate_size", 1..=1 << 22)?.unwrap_or(1408);
    let shared = config.integer("n_shared_experts", 0..=64)?.unwrap_or(1);
    let moe = Moe {
        router: Router::Sigmoid { groups, kept },
        normalize: config.flag("norm_topk_prob", true)?,
        scale: config.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32,
        shared: (shared > 0).then_some(Shared { inner: shared * inner, gated: false }),
        ..Moe::new(experts, active, Mlp { inner, ..description.tower.layers[0].ffn.mlp() })
    };
    let dense = config.integer("first_k_dense_replace", 0..=10_000)?.unwrap_or(1);
    for layer in description.tower.layers.iter_mut().skip(dense) {
        layer.ffn = Ffn::Moe(moe);
    }
    description.names.slots.extend(qwen::EXPERTS);
    description.names.slots.extend([
        (Slot::RouterCorrection, Source::Bare("layers.{}.mlp.gate.e_score_correction_bias")),
        (Slot::SharedGate, Source::Rows("layers.{}.mlp.shared_experts.gate_proj")),
        (Slot::SharedUp, Source::Rows("layers.{}.mlp.shared_experts.up_proj")),
        (Slot::SharedDown, Source::Rows("layers.{}.mlp.shared_experts.down_proj")),
    ]);
    // Behind the last layer are those that guess tokens ahead (num_nextn_predict_layers).
    description.names.ignore = &["layers.{}."];
    Ok(description)
}
