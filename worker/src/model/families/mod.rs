//! One file per model family: `config.json` and tensor names mapped onto the shared blocks.

mod bert;
mod gemma;
mod gpt;
mod llama;
mod mistral;
mod modernbert;
mod phi;
mod qwen;
mod rotary_encoders;
mod task;

use super::{
    ModelError,
    architecture::{Act, Names, Tower},
    config::{Config, ConfigError},
};

/// What a family makes of a configuration.
pub(super) struct Description {
    pub tower: Tower,
    pub names: Names,
}

/// Reads a configuration into the shared blocks.
type Describe = fn(&Config) -> Result<Description, ModelError>;

/// A family that is served.
struct Family {
    /// `model_type` of its files.
    name: &'static str,
    describe: Describe,
    /// Kinds of tokenizer that its models have, as `model.type` of tokenizer.json names them.
    tokenizers: &'static [&'static str],
}

const fn bpe(name: &'static str, describe: Describe) -> Family {
    Family { name, describe, tokenizers: &["BPE", "Unigram"] }
}

const fn word_piece(name: &'static str, describe: Describe) -> Family {
    Family { name, describe, tokenizers: &["WordPiece"] }
}

const fn any(name: &'static str, describe: Describe) -> Family {
    Family { name, describe, tokenizers: &["BPE", "Unigram", "WordPiece"] }
}

/// Every family, by name.
const FAMILIES: &[Family] = &[
    word_piece("bert", bert::describe),
    bpe("camembert", bert::describe_roberta),
    word_piece("distilbert", bert::describe_distil),
    word_piece("electra", bert::describe_electra),
    bpe("gemma2", gemma::describe_2),
    bpe("gemma3_text", gemma::describe_3),
    any("gte", rotary_encoders::describe_gte),
    bpe("gpt2", gpt::describe_2),
    bpe("gpt_neox", gpt::describe_neox),
    bpe("jina_embeddings_v3", rotary_encoders::describe_jina),
    bpe("llama", llama::describe),
    bpe("mistral", mistral::describe),
    bpe("mixtral", mistral::describe_mixtral),
    any("modernbert", modernbert::describe),
    any("nomic_bert", rotary_encoders::describe_nomic),
    bpe("phi", phi::describe),
    bpe("phi3", phi::describe_3),
    bpe("qwen2", qwen::describe_2),
    bpe("qwen3", qwen::describe_3),
    bpe("qwen3_moe", qwen::describe_3_moe),
    bpe("roberta", bert::describe_roberta),
    bpe("xlm-roberta", bert::describe_roberta),
];

/// The family that `model_type` names, and its description of `config`. `is_pooled`: files of sentence-transformers beside it
/// say how its vectors are pooled.
pub(super) fn describe(config: &Config, is_pooled: bool) -> Result<(String, Description), ModelError> {
    let expected = || {
        let names: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
        format!("a supported family ({})", names.join(", "))
    };
    let name = config.string("model_type")?.ok_or_else(|| config.error("model_type", expected()))?;
    let family = FAMILIES.iter().find(|family| family.name == name);
    let family = family.ok_or_else(|| config.error("model_type", expected()))?;
    let mut description = (family.describe)(config)?;
    task::of_decoder(config, &mut description, is_pooled)?;
    Ok((name.to_owned(), description))
}

/// Kinds of tokenizer that models of a family have.
pub(super) fn tokenizers(family: &str) -> Vec<String> {
    let family = FAMILIES.iter().find(|f| f.name == family);
    family.map_or(&[][..], |f| f.tokenizers).iter().map(|t| (*t).to_owned()).collect()
}

/// The activation that `field` names.
fn act(config: &Config, field: &str, default: Act) -> Result<Act, ConfigError> {
    match config.string(field)? {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Act::Silu),
        Some("gelu") => Ok(Act::Gelu),
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Ok(Act::GeluTanh),
        Some("quick_gelu") => Ok(Act::GeluQuick),
        Some("relu") => Ok(Act::Relu),
        Some("tanh") => Ok(Act::Tanh),
        Some(_) => Err(config
            .error(field, "silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, quick_gelu, relu or tanh")),
    }
}

/// Elements per head, where `heads` of them make up `width`, which `field` gives.
fn head_dim(config: &Config, field: &str, width: usize, heads: usize) -> Result<usize, ConfigError> {
    match width % heads {
        0 if width > heads => Ok(width / heads),
        _ => Err(config.error(field, format!("a multiple of the number of heads ({heads})"))),
    }
}

/// Which layers have a window: as `layer_types` lists them, or by `default`.
fn sliding_layers(
    config: &Config,
    layers: usize,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<bool>, ConfigError> {
    let Some(types) = config.strings("layer_types")? else { return Ok((0..layers).map(default).collect()) };
    let known = |t: &String| ["full_attention", "sliding_attention"].contains(&t.as_str());
    if types.len() != layers || !types.iter().all(known) {
        let expected = format!("full_attention or sliding_attention for each of {layers} layers");
        return Err(config.error("layer_types", expected));
    }
    Ok(types.iter().map(|t| t == "sliding_attention").collect())
}
