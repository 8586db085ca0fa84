//! What the planner is told about a model: bytes exactly as [`StageWeights`](super::StageWeights) and
//! [`StageState`](super::StageState) allocate them.

use std::path::Path;

use strata_proto::{FormatBytes, ModelProfile, Module, v1};

use super::{
    Model, ModelError,
    blocks::{Ffn, Layer, Slot},
    stage::{HeadWeights, LayerWeights},
    workspace,
};
use crate::{kernels::cpu::packed::Table, kv_cache::KvLayer, weights::Checkpoint};

/// Describes the model in `dir`, called `name` on the wire. Of the weights, only headers and a few sampled bytes are
/// read.
pub fn describe(dir: &Path, name: &str) -> Result<ModelProfile, ModelError> {
    let (checkpoint, model) = Model::open_dir(dir)?;
    Ok(model.profile(&checkpoint, name))
}

impl Model {
    /// The model as the planner sees it.
    pub fn profile(&self, checkpoint: &Checkpoint, name: &str) -> ModelProfile {
        let tower = &self.tower;
        let table = FormatBytes::of(|d| Table::bytes_for(tower.vocab, tower.width, d));
        let layers = tower.layers.iter().enumerate().map(|(i, layer)| Module {
            names: vec![format!("model.layers.{i}")],
            bytes: FormatBytes::of(|d| LayerWeights::bytes_for(self, i, d)),
            kv_elements_per_token: KvLayer::elements_per_token(
                layer.attention.kv_heads,
                layer.attention.head_dim,
            ) as u64,
            macs_per_token: macs(tower.width, layer),
        });
        ModelProfile {
            model: name.to_owned(),
            family: self.family.clone(),
            task: v1::Task::Generate,
            dtype: self.dtype,
            hidden_size: tower.width as u32,
            vocab_size: tower.vocab as u32,
            context_length: tower.context as u32,
            layers: layers.collect(),
            embedding: Module {
                names: vec!["model.embed_tokens".to_owned()],
                bytes: table,
                ..Module::default()
            },
            head: Module {
                names: vec!["model.norm".to_owned(), "lm_head".to_owned()],
                bytes: FormatBytes::of(|d| HeadWeights::bytes_for(self, d)),
                kv_elements_per_token: 0,
                macs_per_token: (tower.width * tower.vocab) as u64,
            },
            // With both on one stage, rows are gathered from the packed head and there is no table.
            shared: if self.is_tied() { table } else { FormatBytes::default() },
            shared_tensors: match self.bound(Slot::Embedding, 0) {
                Ok(embedding) if self.is_tied() => vec![embedding.weight.clone()],
                _ => Vec::new(),
            },
            bos_token_ids: self.special.bos.clone(),
            eos_token_ids: self.special.eos.clone(),
            pad_token_ids: self.special.pad.clone(),
            fingerprint: checkpoint.fingerprint().to_owned(),
            recompute_at: None,
            workspace_bytes_per_token: workspace::bytes_per_token(tower),
            workspace_bytes_per_output: workspace::bytes_per_output(tower),
        }
    }
}

/// Multiply-adds of a layer's products for one token; attention's depend on the context and are left out.
fn macs(width: usize, layer: &Layer) -> u64 {
    let Ffn::Gated(mlp) = layer.ffn;
    let attention = layer.attention.qkv_width() + layer.attention.q_width();
    (width as u64) * (attention as u64 + 3 * mlp.inner as u64)
}
