//! A model as the planner sees it: an ordered list of modules with costs.

use serde::Serialize;

use crate::{BLOCK_TOKENS, DType, Format, LayerRange, Quantization, v1};

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
    /// K and V elements cached per token.
    pub kv_elements_per_token: u64,
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
    /// Kinds of segments that the embedding knows.
    pub segments: u32,
    /// Kinds of tokenizer that models of this family have, as `model.type` of tokenizer.json names them.
    pub tokenizers: Vec<String>,
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

    /// Cache bytes that `layers` need for one token.
    pub fn kv_bytes_per_token(&self, layers: LayerRange, dtype: DType) -> u64 {
        self.slice(layers).iter().map(|m| m.kv_elements_per_token).sum::<u64>() * dtype.size()
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

impl From<Module> for v1::Module {
    fn from(m: Module) -> Self {
        v1::Module {
            names: m.names,
            bytes: Some(m.bytes.into()),
            kv_elements_per_token: m.kv_elements_per_token,
            macs_per_token: m.macs_per_token,
            experts: m.experts.map(Into::into),
        }
    }
}

impl From<v1::Module> for Module {
    fn from(m: v1::Module) -> Self {
        Module {
            names: m.names,
            bytes: m.bytes.unwrap_or_default().into(),
            kv_elements_per_token: m.kv_elements_per_token,
            macs_per_token: m.macs_per_token,
            experts: m.experts.map(Into::into),
        }
    }
}

impl From<ModelProfile> for v1::Profile {
    fn from(p: ModelProfile) -> Self {
        v1::Profile {
            model: p.model,
            family: p.family,
            task: p.task as i32,
            dtype: p.dtype.name().to_owned(),
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
            segments: p.segments,
            tokenizers: p.tokenizers,
        }
    }
}

impl TryFrom<v1::Profile> for ModelProfile {
    type Error = String;

    fn try_from(p: v1::Profile) -> Result<Self, String> {
        let (task, scoring) = (p.task(), p.scoring());
        if p.layers.is_empty() || p.vocab_size == 0 || p.context_length == 0 {
            return Err(format!("profile of {:?} has no layers, vocabulary or context", p.model));
        }
        Ok(ModelProfile {
            task,
            scoring,
            labels: p.labels,
            segments: p.segments,
            tokenizers: p.tokenizers,
            dtype: p.dtype.parse()?,
            hidden_size: p.hidden_size,
            vocab_size: p.vocab_size,
            context_length: p.context_length,
            layers: p.layers.into_iter().map(Into::into).collect(),
            embedding: p.embedding.unwrap_or_default().into(),
            head: p.head.unwrap_or_default().into(),
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
