//! A model as the planner sees it: an ordered list of modules with costs.

use serde::Serialize;

use crate::{
    BLOCK_TOKENS, DType, Format, LayerRange, LayerState, Quantization, Stack, StateBytes, StateKind,
    StateRoom, v1,
};

/// Resident bytes of something in each format it could be held in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct FormatBytes {
    /// Held as f32.
    pub f32: u64,
    /// Held as bf16.
    pub bf16: u64,
    /// Held as f16.
    pub f16: u64,
    /// Held as int8.
    pub int8: u64,
    /// Held as int4.
    pub int4: u64,
}

impl FormatBytes {
    /// Bytes when held in `format`.
    pub fn at(&self, format: Format) -> u64 {
        match format {
            Format::Float(DType::F32) => self.f32,
            Format::Float(DType::BF16) => self.bf16,
            Format::Float(DType::F16) => self.f16,
            Format::Quantized(Quantization::Int8) => self.int8,
            Format::Quantized(Quantization::Int4) => self.int4,
        }
    }

    /// Computes the bytes for every format.
    pub fn of(f: impl Fn(Format) -> u64) -> Self {
        FormatBytes {
            f32: f(Format::Float(DType::F32)),
            bf16: f(Format::Float(DType::BF16)),
            f16: f(Format::Float(DType::F16)),
            int8: f(Format::Quantized(Quantization::Int8)),
            int4: f(Format::Quantized(Quantization::Int4)),
        }
    }
}

/// One planned unit: a layer, the embedding, or the head with the final norm.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Module {
    /// Module names in the checkpoint, for device maps.
    pub names: Vec<String>,
    /// Resident bytes of its weights as the worker packs them.
    pub bytes: FormatBytes,
    /// What it keeps of a sequence between steps.
    pub states: Vec<LayerState>,
    /// Multiply-adds per token (per output row for the head).
    pub macs_per_token: u64,
    /// Set if it is a mixture of experts; their bytes are part of `bytes`.
    pub experts: Option<Experts>,
}

/// The experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// All of them.
    pub count: u32,
    /// Those that one token goes through.
    pub active: u32,
    /// Resident bytes of one.
    pub bytes: FormatBytes,
}

/// What a worker says of a model, read from `config.json` and the safetensors headers.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelProfile {
    /// Name on the wire.
    pub model: String,
    /// `model_type` of `config.json`.
    pub family: String,
    /// What the model answers.
    pub task: v1::Task,
    /// The checkpoint's own format.
    pub dtype: DType,
    /// What most of its weights are quantized to already, if they are.
    pub quantization: Option<Quantization>,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Most token positions of one sequence.
    pub context_length: u32,
    /// Layers, in order.
    pub layers: Vec<Module>,
    /// The embedding, on the first stage.
    pub embedding: Module,
    /// Final norm and head, on the last stage.
    pub head: Module,
    /// Bytes counted in both `embedding` and `head` but held once when one stage has both (tied embeddings).
    pub shared: FormatBytes,
    /// Tensors that `shared` is about.
    pub shared_tensors: Vec<String>,
    /// Beginning-of-sequence ids by `config.json` and `generation_config.json`.
    pub bos_token_ids: Vec<u32>,
    /// End-of-sequence ids.
    pub eos_token_ids: Vec<u32>,
    /// Padding ids.
    pub pad_token_ids: Vec<u32>,
    /// Over headers, config, tokenizer and sampled tensor bytes, in hexadecimal.
    pub fingerprint: String,
    /// The commit that it is, where it lies in the hub's cache; empty elsewhere.
    pub commit: String,
    /// Sequences that grow past this length must recompute their cache.
    pub recompute_at: Option<u32>,
    /// Workspace bytes for each token a step may hold.
    pub workspace_bytes_per_token: u64,
    /// Workspace bytes on the last stage for each row that may yield an output in a step.
    pub workspace_bytes_per_output: u64,
    /// Names of a classifier's classes, in order of its logits.
    pub labels: Vec<String>,
    /// What becomes of them.
    pub scoring: v1::Scoring,
    /// What becomes of the logit of a classifier of one class where documents are ranked.
    pub ranking: v1::Scoring,
    /// What sentence-transformers' files say.
    pub sentences: v1::Sentences,
    /// Kinds of segments that the embedding knows.
    pub segments: u32,
    /// Kinds of tokenizer that models of this family have, as `model.type` of tokenizer.json names them.
    pub tokenizers: Vec<String>,
    /// Together all layers, in order.
    pub stacks: Vec<Stack>,
}

impl ModelProfile {
    /// Number of layers.
    pub fn layer_count(&self) -> u32 {
        self.layers.len() as u32
    }

    /// Resident weight bytes of a stage that holds `layers`, with embedding if first and head if last.
    pub fn weight_bytes(&self, layers: LayerRange, format: Format) -> u64 {
        let first = layers.first == 0;
        let last = layers.end == self.layer_count();
        let mut bytes: u64 = self.slice(layers).iter().map(|m| m.bytes.at(format)).sum();
        if first {
            bytes += self.embedding.bytes.at(format);
        }
        if last {
            bytes += self.head.bytes.at(format);
        }
        if first && last {
            bytes -= self.shared.at(format);
        }
        bytes
    }

    /// Bytes of the states of `layers`, by kind, with `room` for so many. Saturating: the room may be anything that a
    /// caller asks for.
    pub fn state_bytes(&self, layers: LayerRange, dtype: DType, room: StateRoom) -> StateBytes {
        let mut bytes = StateBytes::default();
        for state in self.slice(layers).iter().flat_map(|m| &m.states) {
            let units = match state.kind {
                StateKind::PagedKv => room.positions,
                StateKind::Recurrent | StateKind::CrossKv => self.fixed_units(state.kind, room.slots),
            };
            let more = state.own_elements().saturating_mul(dtype.size()).saturating_mul(units);
            let sum = bytes.of(state.kind);
            *sum = sum.saturating_add(more);
        }
        bytes
    }

    /// Times that the elements of a state of fixed size are held for `slots` sequences.
    pub fn fixed_units(&self, kind: StateKind, slots: u32) -> u64 {
        let per_slot = if kind == StateKind::CrossKv { self.source_positions() } else { 1 };
        u64::from(per_slot) * u64::from(slots)
    }

    /// Kinds of state that its layers have, each once.
    pub fn state_kinds(&self) -> Vec<StateKind> {
        let has = |kind: &StateKind| self.layers.iter().flat_map(|m| &m.states).any(|s| s.kind == *kind);
        StateKind::ALL.into_iter().filter(has).collect()
    }

    /// Whether sequences keep something between steps.
    pub fn caches(&self) -> bool {
        self.layers.iter().any(|m| !m.states.is_empty())
    }

    /// Whether inputs are computed whole, in one step.
    pub fn whole_input(&self) -> bool {
        self.stacks.first().is_some_and(|stack| stack.whole_input)
    }

    /// Most positions of an input that is computed whole; 0 if there is none.
    pub fn source_positions(&self) -> u32 {
        self.stacks.iter().filter(|s| s.whole_input).map(|s| s.positions).max().unwrap_or(0)
    }

    /// For each number of layers whether a stage may end behind so many of them: not between two that share a state.
    pub fn cuts(&self) -> Vec<bool> {
        let mut cuts = vec![true; self.layers.len() + 1];
        for (layer, module) in self.layers.iter().enumerate() {
            for owner in module.states.iter().filter_map(|s| s.shares) {
                cuts[owner as usize + 1..=layer].fill(false);
            }
        }
        cuts
    }

    /// Workspace bytes of a stage for steps of at most `tokens` tokens and `outputs` output rows.
    pub fn workspace_bytes(&self, layers: LayerRange, tokens: u32, outputs: u32) -> u64 {
        let last = layers.end == self.layer_count();
        let head = if last { self.workspace_bytes_per_output * u64::from(outputs) } else { 0 };
        // Whole blocks, as the worker allocates it.
        self.workspace_bytes_per_token * u64::from(tokens).next_multiple_of(u64::from(BLOCK_TOKENS)) + head
    }

    fn slice(&self, layers: LayerRange) -> &[Module] {
        &self.layers[layers.first as usize..layers.end as usize]
    }
}

impl From<FormatBytes> for v1::FormatBytes {
    fn from(b: FormatBytes) -> Self {
        v1::FormatBytes { f32: b.f32, bf16: b.bf16, f16: b.f16, int8: b.int8, int4: b.int4 }
    }
}

impl From<v1::FormatBytes> for FormatBytes {
    fn from(b: v1::FormatBytes) -> Self {
        FormatBytes { f32: b.f32, bf16: b.bf16, f16: b.f16, int8: b.int8, int4: b.int4 }
    }
}

impl From<Experts> for v1::Experts {
    fn from(e: Experts) -> Self {
        v1::Experts { count: e.count, active: e.active, bytes: Some(e.bytes.into()) }
    }
}

impl From<v1::Experts> for Experts {
    fn from(e: v1::Experts) -> Self {
        Experts { count: e.count, active: e.active, bytes: e.bytes.unwrap_or_default().into() }
    }
}

/// Checks what layers say of each other's states, and that stacks are all layers.
fn check_layers(layers: &[Module], stacks: &[Stack]) -> Result<(), String> {
    for (layer, state) in layers.iter().enumerate().flat_map(|(i, m)| m.states.iter().map(move |s| (i, s))) {
        let Some(owner) = state.shares else { continue };
        let owned = |m: &Module| m.states.contains(&LayerState { shares: None, ..*state });
        if owner as usize >= layer || !layers.get(owner as usize).is_some_and(owned) {
            return Err(format!(
                "layer {layer} shares a state with layer {owner}: expected an earlier layer with such a state of its own"
            ));
        }
    }
    let mut end = 0;
    for stack in stacks {
        if stack.layers.first != end || stack.layers.is_empty() {
            return Err(format!("a stack of layers {} follows {end} layers: expected no gap", stack.layers));
        }
        end = stack.layers.end;
    }
    if end as usize != layers.len() {
        return Err(format!("stacks hold {end} layers: expected all {}", layers.len()));
    }
    Ok(())
}

impl From<Module> for v1::Module {
    fn from(m: Module) -> Self {
        v1::Module {
            names: m.names,
            bytes: Some(m.bytes.into()),
            states: m.states.into_iter().map(Into::into).collect(),
            macs_per_token: m.macs_per_token,
            experts: m.experts.map(Into::into),
        }
    }
}

impl TryFrom<v1::Module> for Module {
    type Error = String;

    fn try_from(m: v1::Module) -> Result<Self, String> {
        Ok(Module {
            names: m.names,
            bytes: m.bytes.unwrap_or_default().into(),
            states: m.states.into_iter().map(LayerState::try_from).collect::<Result<_, _>>()?,
            macs_per_token: m.macs_per_token,
            experts: m.experts.map(Into::into),
        })
    }
}

impl From<ModelProfile> for v1::Profile {
    fn from(p: ModelProfile) -> Self {
        v1::Profile {
            model: p.model,
            family: p.family,
            task: p.task as i32,
            dtype: p.dtype.name().to_owned(),
            quantization: Quantization::to_wire(p.quantization),
            hidden_size: p.hidden_size,
            vocab_size: p.vocab_size,
            context_length: p.context_length,
            layers: p.layers.into_iter().map(Into::into).collect(),
            embedding: Some(p.embedding.into()),
            head: Some(p.head.into()),
            shared: Some(p.shared.into()),
            bos_token_ids: p.bos_token_ids,
            eos_token_ids: p.eos_token_ids,
            pad_token_ids: p.pad_token_ids,
            fingerprint: p.fingerprint,
            recompute_at: p.recompute_at,
            shared_tensors: p.shared_tensors,
            workspace_bytes_per_token: p.workspace_bytes_per_token,
            workspace_bytes_per_output: p.workspace_bytes_per_output,
            labels: p.labels,
            scoring: p.scoring as i32,
            commit: p.commit,
            ranking: p.ranking as i32,
            sentences: Some(p.sentences),
            segments: p.segments,
            tokenizers: p.tokenizers,
            stacks: p.stacks.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Profile> for ModelProfile {
    type Error = String;

    fn try_from(p: v1::Profile) -> Result<Self, String> {
        let (task, scoring, ranking) = (p.task(), p.scoring(), p.ranking());
        if p.layers.is_empty() || p.vocab_size == 0 || p.context_length == 0 {
            return Err(format!("profile of {:?} has no layers, vocabulary or context", p.model));
        }
        let layers: Vec<Module> = p.layers.into_iter().map(Module::try_from).collect::<Result<_, _>>()?;
        let stacks: Vec<Stack> = p.stacks.into_iter().map(Stack::try_from).collect::<Result<_, _>>()?;
        check_layers(&layers, &stacks).map_err(|e| format!("profile of {:?}: {e}", p.model))?;
        Ok(ModelProfile {
            task,
            scoring,
            ranking,
            labels: p.labels,
            commit: p.commit,
            sentences: p.sentences.unwrap_or_default(),
            segments: p.segments,
            tokenizers: p.tokenizers,
            dtype: p.dtype.parse()?,
            quantization: Quantization::from_wire(&p.quantization)?,
            hidden_size: p.hidden_size,
            vocab_size: p.vocab_size,
            context_length: p.context_length,
            layers,
            embedding: p.embedding.unwrap_or_default().try_into()?,
            head: p.head.unwrap_or_default().try_into()?,
            stacks,
            shared: p.shared.unwrap_or_default().into(),
            bos_token_ids: p.bos_token_ids,
            eos_token_ids: p.eos_token_ids,
            pad_token_ids: p.pad_token_ids,
            fingerprint: p.fingerprint,
            recompute_at: p.recompute_at,
            shared_tensors: p.shared_tensors,
            workspace_bytes_per_token: p.workspace_bytes_per_token,
            workspace_bytes_per_output: p.workspace_bytes_per_output,
            model: p.model,
            family: p.family,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl Fn(&mut v1::Profile)) -> String {
        let layer = |shares| v1::Module {
            bytes: Some(v1::FormatBytes::default()),
            states: vec![v1::LayerState { kind: v1::StateKind::PagedKv as i32, elements: 4, shares }],
            ..v1::Module::default()
        };
        let whole = v1::LayerRange { first: 0, end: 3 };
        let mut profile = v1::Profile {
            model: "m".into(),
            dtype: "f32".into(),
            vocab_size: 1,
            context_length: 1,
            layers: vec![layer(None), layer(Some(0)), layer(Some(0))],
            stacks: vec![v1::Stack { layers: Some(whole), whole_input: false, positions: 1 }],
            ..v1::Profile::default()
        };
        let valid = ModelProfile::try_from(profile.clone()).unwrap();
        assert_eq!(valid.cuts(), [true, false, false, true]);
        assert_eq!(v1::Profile::from(valid).layers, profile.layers);
        change(&mut profile);
        ModelProfile::try_from(profile).unwrap_err()
    }

    #[test]
    fn profiles_that_cannot_be_are_refused() {
        let shares =
            |layer: usize, owner: u32| refused(move |p| p.layers[layer].states[0].shares = Some(owner));
        assert!(shares(0, 0).contains("layer 0 shares a state with layer 0: expected an earlier layer"));
        assert!(shares(1, 2).contains("layer 1 shares a state with layer 2"));
        assert!(shares(2, 1).contains("layer 2 shares a state with layer 1"), "which has none of its own");
        assert!(shares(1, u32::MAX).contains("layer 1"));
        let unknown = refused(|p| p.layers[1].states[0].kind = 9);
        assert!(unknown.contains("kind 9") && unknown.contains("upgrade"), "{unknown}");
        let gap = refused(|p| p.stacks[0].layers = Some(v1::LayerRange { first: 1, end: 3 }));
        assert!(gap.contains("a stack of layers 1..3 follows 0 layers"), "{gap}");
        assert!(refused(|p| p.stacks.clear()).contains("stacks hold 0 layers: expected all 3"));
    }
}
