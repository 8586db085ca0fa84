//! Granite and GraniteMoE (transformers' `modeling_granite.py`, `modeling_granitemoe.py`): Llama with a factor on
//! embeddings, scores, what blocks yield, and logits; GraniteMoE with fused experts.

use super::{Description, llama};
use crate::model::{
    ModelError,
    architecture::{Ffn, Flow, Head, Moe, Slot, Source},
    config::Config,
};

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    let factor = |field| Ok::<_, ModelError>(config.positive(field)?.unwrap_or(1.0) as f32);
    let tower = &mut description.tower;
    tower.input.scale = factor("embedding_multiplier")?;
    tower.head = Head::Lm { scale: 1.0 / factor("logits_scaling")?, softcap: None };
    let (scores, residual) = (factor("attention_multiplier")?, factor("residual_multiplier")?);
    for layer in &mut tower.layers {
        layer.attention.scale = scores;
        layer.flow = Flow::Scaled(layer.flow.norm(), residual);
    }
    Ok(description)
}

pub(super) fn describe_moe(config: &Config) -> Result<Description, ModelError> {
    let mut description = describe(config)?;
    let experts = config.integer("num_local_experts", 1..=1 << 14)?.unwrap_or(8);
    let active = config.integer("num_experts_per_tok", 1..=experts)?.unwrap_or(2.min(experts));
    for layer in &mut description.tower.layers {
        layer.ffn = Ffn::Moe(Moe::new(experts, active, layer.ffn.mlp()));
    }
    description.names.slots.extend([
        (Slot::Router, Source::Rows("layers.{}.block_sparse_moe.router.layer")),
        (Slot::GateUp, Source::Experts("layers.{}.block_sparse_moe.input_linear.weight")),
        (Slot::Down, Source::Experts("layers.{}.block_sparse_moe.output_linear.weight")),
    ]);
    Ok(description)
}
