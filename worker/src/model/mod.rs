//! A model: what it computes, the tensors that it needs, and what each part of it takes.

pub(crate) mod architecture;
pub(crate) mod bytes;
pub(crate) mod config;
mod digest;
mod families;
mod gguf;
pub(crate) mod layer;
pub(crate) mod load;
pub(crate) mod names;
mod profile;
mod range;
mod rope;
mod sentences;
#[cfg(test)]
mod tests;
pub(crate) mod widths;

use std::path::Path;

use strata_proto::{DType, Format, error::quoted, v1};

use self::{
    architecture::{Head, Names, Site, Slot, Tower},
    config::{Config, ConfigError},
    gguf::Stored,
    names::{Bindings, Bound},
};
pub use self::{
    digest::{ModuleDigest, TensorDigest, digests},
    load::LoadedBytes,
    profile::{describe, describe_ignoring},
    range::RangeSpec,
};
pub use crate::kernels::ops::{BLOCK_TOKENS, BatchRow};
use crate::{
    kernels::buffer::{OutOfMemory, SpillError},
    weights::{Checkpoint, TensorDType, WeightsError},
};

/// Why a model cannot be described or loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The files of weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A field of a configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no configuration.
    #[error("{0} is missing: expected a directory in Hugging Face layout")]
    NoConfig(String),
    /// A tensor that the model needs is not there.
    #[error("tensor {0:?} is missing from the checkpoint")]
    MissingTensor(String),
    /// Tensors that nothing in the model uses.
    #[error(
        "{} to nothing in the model that config.json describes: if what they are for is not wanted, --ignore-tensors GLOB \
         leaves them out, as in --ignore-tensors {:?}",
        belonging(.0), .0.first().map(String::as_str).unwrap_or_default()
    )]
    UnclaimedTensors(Vec<String>),
    /// A tensor of other dimensions than the configuration says.
    #[error("tensor {tensor:?} has shape {found:?}: expected {expected:?} by config.json")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its dimensions.
        found: Vec<usize>,
        /// What they must be.
        expected: Vec<usize>,
    },
    /// A tensor in a format that weights cannot have.
    #[error("tensor {0:?} is not of dtype F32, BF16 or F16")]
    Format(String),
    /// A weight that the asked-for format cannot hold.
    #[error("tensor {tensor:?} holds {value}, too large for {format}: load it as bf16 or f32")]
    Unrepresentable {
        /// The tensor.
        tensor: String,
        /// One such value.
        value: f32,
        /// The format.
        format: Format,
    },
    /// A weight that is no number.
    #[error("tensor {0:?} holds NaN: the file is damaged; download it again")]
    NotANumber(String),
    /// A range that is not of this model.
    #[error(
        "layers {range} (embedding: {embedding}, head: {head}) are no stage of a model of {layers} layers"
    )]
    Range {
        /// What was asked for.
        range: strata_proto::LayerRange,
        /// With the embedding.
        embedding: bool,
        /// With the head.
        head: bool,
        /// What the model has.
        layers: usize,
    },
    /// A range that lacks what one of its layers reads.
    #[error(
        "layers {range} hold layer {layer}, which reads the keys and values of layer {owner}: expected both in one stage, the \
         owner first, with as many heads of its own; cut elsewhere"
    )]
    SharedCache {
        /// What was asked for.
        range: strata_proto::LayerRange,
        /// Which layer shares.
        layer: usize,
        /// Whose cache it is.
        owner: usize,
    },
    /// A model that the engine of a device cannot compute.
    #[error("{processor} cannot compute a model {with}: expected one without; {instead}")]
    Unsupported {
        /// What was to compute it.
        processor: &'static str,
        /// What it has.
        with: &'static str,
        /// What to do.
        instead: &'static str,
    },
    /// No memory.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// No file for weights that stay memory-mapped.
    #[error(transparent)]
    Spill(#[from] SpillError),
    /// The caller asked to stop.
    #[error("loading was cancelled")]
    Cancelled,
    /// Cache and scratch were asked for before weights.
    #[error("the weights of this stage are not loaded; Load comes first")]
    NotLoaded,
    /// Longer steps than the kernels of a device can take.
    #[error("steps of {asked} {what}: a GPU takes at most {most}; use {flag} {most} or less")]
    StepSize {
        /// What was asked for.
        asked: u32,
        /// What there may be.
        most: usize,
        /// Of what.
        what: &'static str,
        /// What says how many.
        flag: &'static str,
    },
    /// The device failed.
    #[error("{0}")]
    Device(String),
}

/// Some tensors, clipped, and the verb.
fn belonging(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| quoted(name)).collect();
    let more = match names.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let (tensors, belong) = if names.len() == 1 { ("tensor", "belongs") } else { ("tensors", "belong") };
    format!("{tensors} {}{more} {belong}", shown.join(", "))
}

/// Tensors that an error names.
const SHOWN: usize = 5;

/// Special token ids by `config.json` and `generation_config.json`, each id once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of a sequence.
    pub bos: Vec<u32>,
    /// End of a sequence.
    pub eos: Vec<u32>,
    /// Padding.
    pub pad: Vec<u32>,
}

/// A model whose every tensor has been found, with the right dimensions, and no tensor left over.
#[derive(Debug, Clone)]
pub struct Model {
    /// `model_type` of `config.json`.
    pub family: String,
    /// Its blocks.
    pub(crate) tower: Tower,
    /// The checkpoint's own format.
    pub dtype: DType,
    /// Special token ids.
    pub special: SpecialTokens,
    /// What sentence-transformers' files say.
    pub(crate) sentences: v1::Sentences,
    /// What becomes of the logit of one class where it ranks.
    pub(crate) ranking: v1::Scoring,
    names: Names,
    bound: Bindings,
    /// In which formats the checkpoint has its weights, where some of them are quantized.
    pub(crate) stored: Option<Stored>,
}

impl Model {
    /// Reads `config.json` beside the weights and binds the tensors of `checkpoint` to it.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let path = || checkpoint.dir().join("config.json").display().to_string();
        let value = checkpoint.json("config.json")?.ok_or_else(|| ModelError::NoConfig(path()))?;
        let whole = Config::new("config.json", value)?;
        let config = families::text(whole.clone())?;
        let (family, mut description) = families::describe(&whole, sentences::are_pooled(checkpoint)?)?;
        let tower = &mut description.tower;
        let (mut sentences, mut ranking) = (v1::Sentences::default(), v1::Scoring::Unspecified);
        let judges = sentences::judges(checkpoint, tower)?;
        if judges.is_some() || matches!(tower.head, Head::Embed(_) | Head::Classify { .. }) {
            tower.context = sentences::longest(checkpoint)?.map_or(tower.context, |n| n.min(tower.context));
        }
        if matches!(tower.head, Head::Embed(_) | Head::Classify { .. }) {
            if let Head::Embed(embedding) = &mut tower.head {
                *embedding = sentences::embedding(checkpoint, tower.width)?;
            }
            let dimensions = if matches!(tower.head, Head::Embed(_)) { tower.outputs() } else { 0 };
            sentences = sentences::read(checkpoint, dimensions, false)?;
            if matches!(tower.head, Head::Classify { .. }) && tower.outputs() == 1 {
                ranking = sentences::ranking(checkpoint, &config)?;
            }
        }
        if let Some(gguf) = checkpoint.gguf() {
            description.names = gguf::names(&description.names, gguf);
        }
        let mut bound = names::bind(checkpoint, &description.tower, &description.names)?;
        if let Some(tokens) = judges {
            families::judge(&mut description.tower, tokens.len());
            let heads = bound.get_mut(&(Site::Output, Slot::Head, 0)).into_iter().flatten();
            heads.for_each(|head| head.chosen = Some(tokens.clone()));
            sentences = sentences::read(checkpoint, 0, true)?;
            ranking = sentences::ranking(checkpoint, &config)?;
        }
        let generation = checkpoint
            .json("generation_config.json")?
            .map(|v| Config::new("generation_config.json", v))
            .transpose()?;
        let ids = |field| {
            let mut ids = config.token_ids(field)?;
            if let Some(generation) = &generation {
                ids.extend(generation.token_ids(field)?);
            }
            let mut seen = std::collections::BTreeSet::new();
            ids.retain(|id| seen.insert(*id));
            Ok::<_, ModelError>(ids)
        };
        // As transformers: what generation_config.json says of the end stands in the place of config.json's.
        let own = generation.as_ref().map(|g| g.token_ids("eos_token_id")).transpose()?;
        let eos = match own.filter(|own| !own.is_empty()) {
            Some(own) => own,
            None => ids("eos_token_id")?,
        };
        let asks = matches!(description.tower.head, Head::Lm { .. }) && !config.mentions("eos_token_id");
        let eos = match asks && generation.is_none() && !names_eos(checkpoint)? {
            // No file says it: the class does.
            true => families::eos(&family)
                .filter(|id| (*id as usize) < description.tower.vocab)
                .into_iter()
                .collect(),
            false => eos,
        };
        let special = SpecialTokens { bos: ids("bos_token_id")?, eos, pad: ids("pad_token_id")? };
        let embedding = bound.get(&(Site::Input, Slot::Embedding, 0)).and_then(|b| b.first());
        let stored = match embedding.and_then(|b| checkpoint.tensor(&b.weight)).map(|t| t.dtype) {
            Some(TensorDType::Float(dtype)) => dtype,
            _ => DType::F32,
        };
        let dtype = config.dtype()?.unwrap_or(stored);
        let mut model = Model {
            family,
            tower: description.tower,
            dtype,
            special,
            sentences,
            ranking,
            names: description.names,
            bound,
            stored: None,
        };
        model.stored = Stored::of(checkpoint, &model);
        // What was quantized has no format of numbers; what it was made of had this one, mostly.
        if model.stored.is_some() {
            model.dtype = DType::BF16;
        }
        Ok(model)
    }

    /// The model that `config.json` alone describes, to measure with: no product has a bias, and the head is a tensor
    /// of its own.
    pub fn without_checkpoint(config: serde_json::Value) -> Result<Self, ModelError> {
        let config = Config::new("config.json", config)?;
        let (family, description) = families::describe(&config, false)?;
        Ok(Model {
            family,
            tower: description.tower,
            dtype: config.dtype()?.unwrap_or(DType::F32),
            special: SpecialTokens::default(),
            sentences: v1::Sentences::default(),
            ranking: v1::Scoring::Unspecified,
            names: description.names,
            bound: Bindings::new(),
            stored: None,
        })
    }

    /// Opens the checkpoint in `dir` and the model in it.
    pub fn open_dir(dir: &Path) -> Result<(Checkpoint, Self), ModelError> {
        Self::open_dir_ignoring(dir, &[])
    }

    /// The same, though tensors that nothing uses be there, if one of these patterns is their name: `*` stands for any text,
    /// `?` for a character.
    pub fn open_dir_ignoring(dir: &Path, ignored: &[String]) -> Result<(Checkpoint, Self), ModelError> {
        let mut checkpoint = Checkpoint::open(dir)?;
        checkpoint.ignore(ignored);
        let model = Model::open(&checkpoint)?;
        Ok((checkpoint, model))
    }

    /// The tensors that fill a slot, of one expert.
    pub(crate) fn bound(&self, site: Site, (slot, expert): (Slot, usize)) -> &[Bound] {
        self.bound.get(&(site, slot, expert)).map_or(&[], Vec::as_slice)
    }

    /// The tensor that is both head and embedding, if there is one.
    pub fn tied(&self) -> Option<&str> {
        let whole = |site, slot| self.bound(site, (slot, 0)).first().filter(|b| b.chosen.is_none());
        let weight = |site, slot| whole(site, slot).map(|b| b.weight.as_str());
        let embedding = weight(Site::Input, Slot::Embedding);
        embedding.filter(|_| weight(Site::Output, Slot::Head) == embedding)
    }

    /// Whether head and embedding are one tensor.
    pub fn is_tied(&self) -> bool {
        self.tied().is_some()
    }

    /// Whether a slot has a bias.
    pub(crate) fn has_bias(&self, site: Site, key: (Slot, usize)) -> bool {
        self.bound(site, key).iter().any(|b| b.bias.is_some())
    }
}

/// Whether a file of the tokenizer says by which token a text ends.
fn names_eos(checkpoint: &Checkpoint) -> Result<bool, ModelError> {
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let json = checkpoint.json(file)?;
        if json.is_some_and(|json| json.get("eos_token").is_some_and(|token| !token.is_null())) {
            return Ok(true);
        }
    }
    Ok(false)
}
