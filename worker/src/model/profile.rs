//! What the planner is told about a model: bytes exactly as the engines allocate them.

use std::path::Path;

use strata_proto::{Experts, FormatBytes, LayerRange, ModelProfile, Module, Stack, v1};

use super::{
    Model, ModelError,
    architecture::{Ffn, Head, Layer, Shape, Site, Slot, Source},
    bytes, families, widths,
};
use crate::{
    kernels::cpu::packed::Table,
    weights::{Checkpoint, hub_cache},
};

/// Describes the model in `dir`, called `name` on the wire. Of the weights, only headers and a few sampled bytes are
/// read.
pub fn describe(dir: &Path, name: &str) -> Result<ModelProfile, ModelError> {
    describe_ignoring(dir, name, &[])
}

/// The same, of a model in whose files there may be tensors without a use whose names are of these patterns.
pub fn describe_ignoring(dir: &Path, name: &str, ignored: &[String]) -> Result<ModelProfile, ModelError> {
    let (checkpoint, model) = Model::open_dir_ignoring(dir, ignored)?;
    Ok(model.profile(&checkpoint, name))
}

impl Model {
    /// The model as the planner sees it.
    pub fn profile(&self, checkpoint: &Checkpoint, name: &str) -> ModelProfile {
        let tower = &self.tower;
        let module = |site, states, macs_per_token| Module {
            names: self.modules(site),
            bytes: FormatBytes::of(|d| bytes::of_site(self, site, d)),
            states,
            macs_per_token,
            experts: match site {
                Site::Layer(i) => experts(self, i),
                _ => None,
            },
        };
        let layers = tower
            .layers
            .iter()
            .enumerate()
            .map(|(i, layer)| module(Site::Layer(i), tower.states(i), macs(tower.width, layer)));
        let head_macs = tower.slots(Site::Output).into_iter().map(|(_, shape)| match shape {
            Shape::Product(n, k) => (n * k) as u64,
            Shape::Norm(_) | Shape::Table(..) => 0,
        });
        let head_macs = head_macs.sum();
        let (scoring, labels) = match &tower.head {
            Head::Classify { labels, scoring, .. } => (*scoring, labels.clone()),
            Head::Tag { labels, .. } => (v1::Scoring::Softmax, labels.clone()),
            _ => (v1::Scoring::Unspecified, Vec::new()),
        };
        let table = FormatBytes::of(|format| {
            Table::bytes_for(
                tower.vocab,
                tower.table_width(),
                bytes::held(self, Site::Input, Slot::Embedding, format),
            )
        });
        ModelProfile {
            model: name.to_owned(),
            family: self.family.clone(),
            task: match tower.head {
                Head::Lm { .. } => v1::Task::Generate,
                Head::Mlm(..) => v1::Task::FillMask,
                Head::Classify { .. } => v1::Task::Classify,
                Head::Embed(_) => v1::Task::Embed,
                Head::Tag { .. } => v1::Task::ClassifyTokens,
                Head::Span { .. } => v1::Task::Answer,
            },
            dtype: self.dtype,
            quantization: self.stored.as_ref().map(|stored| stored.quantization),
            hidden_size: tower.width as u32,
            vocab_size: tower.vocab as u32,
            context_length: tower.context as u32,
            layers: layers.collect(),
            embedding: module(
                Site::Input,
                vec![],
                tower.input.projected.map_or(0, |columns| (columns * tower.width) as u64),
            ),
            head: module(Site::Output, vec![], head_macs),
            // With both on one stage, rows are gathered from the packed head and there is no table.
            shared: if self.is_tied() { table } else { FormatBytes::default() },
            shared_tensors: self.tied().map(str::to_owned).into_iter().collect(),
            bos_token_ids: self.special.bos.clone(),
            eos_token_ids: self.special.eos.clone(),
            pad_token_ids: self.special.pad.clone(),
            fingerprint: checkpoint.fingerprint().to_owned(),
            commit: hub_cache::commit(checkpoint.dir()).unwrap_or_default(),
            recompute_at: tower.ropes.iter().filter_map(|r| r.switch).min().map(|n| n as u32),
            workspace_bytes_per_token: widths::bytes_per_token(tower),
            workspace_bytes_per_output: widths::bytes_per_output(tower),
            labels,
            scoring,
            sentences: self.sentences.clone(),
            ranking: self.ranking,
            segments: tower.input.segments as u32,
            tokenizers: families::tokenizers(&self.family),
            stacks: vec![Stack {
                layers: LayerRange::new(0, tower.layers.len() as u32),
                whole_input: tower.whole_input,
                positions: tower.context as u32,
            }],
        }
    }
}

impl Model {
    /// What transformers calls the modules of `site`.
    fn modules(&self, site: Site) -> Vec<String> {
        let names = &self.names;
        let base = names.bases.first().copied().unwrap_or_default();
        if let Site::Layer(layer) = site {
            let stem = names.slots.iter().find_map(|(_, source)| source.name().split_once("{}"));
            return stem.map(|(stem, _)| format!("{base}{stem}{layer}")).into_iter().collect();
        }
        let slots = self.tower.slots(site);
        let here = |(slot, source): &&(Slot, Source)| {
            *source != Source::Ones && slots.iter().any(|(s, _)| s == slot)
        };
        let under = names.slots.iter().filter(here).map(|(_, source)| format!("{base}{}", source.name()));
        let root = names.root.iter().filter(here).map(|(_, source)| source.name().to_owned());
        under.chain(root).collect()
    }
}

/// The experts of a layer, if it has several.
fn experts(model: &Model, layer: usize) -> Option<Experts> {
    let ffn = model.tower.layers[layer].ffn;
    matches!(ffn, Ffn::Moe(_)).then(|| Experts {
        count: ffn.experts() as u32,
        active: ffn.active() as u32,
        bytes: FormatBytes::of(|d| bytes::of_expert(model, Site::Layer(layer), d)),
    })
}

/// Multiply-adds of a layer's products for one token; attention's depend on the context and are left out.
fn macs(width: usize, layer: &Layer) -> u64 {
    let Layer { attention, ffn, .. } = layer;
    let router = if let Ffn::Moe(moe) = ffn { moe.experts } else { 0 };
    let attention = attention.qkv_width() + attention.q_width();
    let shared = ffn.shared().map_or(0, |shared| 3 * shared.inner + usize::from(shared.gated));
    let ffn = ffn.active() * (ffn.up_width() + ffn.mlp().inner);
    width as u64 * (attention + router + shared + ffn) as u64
}
