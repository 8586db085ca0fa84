//! Hunyuan, dense (transformers' `modeling_hunyuan_v1_dense.py`): Llama with norms on every head of queries and keys once
//! they are turned.

use super::{Description, llama};
use crate::model::{
    ModelError,
    architecture::{NormOver, QkNorm, Slot, Source},
    config::Config,
};

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    for layer in &mut description.tower.layers {
        let norm = layer.flow.norm();
        layer.attention.qk_norm = Some(QkNorm { norm, over: NormOver::Head, turned: true });
    }
    description.names.slots.extend([
        (Slot::QueryNorm, Source::Rows("layers.{}.self_attn.query_layernorm")),
        (Slot::KeyNorm, Source::Rows("layers.{}.self_attn.key_layernorm")),
    ]);
    Ok(description)
}
