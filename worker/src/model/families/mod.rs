//! One file per model family: `config.json` and tensor names mapped onto the shared blocks.

mod bert;
mod bloom;
mod cohere;
mod deberta;
mod defaults;
mod exaone;
mod falcon;
mod gemma;
mod glm;
mod gpt;
mod granite;
mod hunyuan;
mod llama;
mod mistral;
mod modernbert;
mod mpt;
mod nemotron;
mod olmo;
mod phi;
mod qwen;
mod rotary_encoders;
mod smollm;
mod stablelm;
mod starcoder;
mod task;
mod wrapped;

use super::{
    ModelError,
    architecture::{Act, Names, Slot, Source, Tower},
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
    // In GGUF files, RoBERTas are called so too.
    any("bert", bert::describe),
    bpe("bloom", bloom::describe),
    bpe("camembert", bert::describe_roberta),
    bpe("cohere", cohere::describe),
    bpe("cohere2", cohere::describe_2),
    any("deberta-v2", deberta::describe),
    word_piece("distilbert", bert::describe_distil),
    word_piece("electra", bert::describe_electra),
    bpe("exaone4", exaone::describe),
    bpe("falcon", falcon::describe),
    bpe("gemma", gemma::describe_1),
    bpe("gemma2", gemma::describe_2),
    bpe("gemma3_text", gemma::describe_3),
    bpe("glm", glm::describe),
    bpe("glm4", glm::describe_4),
    bpe("glm4_moe", glm::describe_4_moe),
    bpe("gpt2", gpt::describe_2),
    bpe("gpt_neox", gpt::describe_neox),
    bpe("granite", granite::describe),
    bpe("granitemoe", granite::describe_moe),
    any("gte", rotary_encoders::describe_gte),
    bpe("hunyuan_v1_dense", hunyuan::describe),
    bpe("jina_embeddings_v3", rotary_encoders::describe_jina),
    bpe("llama", llama::describe),
    bpe("ministral", mistral::describe),
    bpe("ministral3", mistral::describe_ministral_3),
    bpe("mistral", mistral::describe),
    bpe("mixtral", mistral::describe_mixtral),
    any("modernbert", modernbert::describe),
    bpe("nemotron", nemotron::describe),
    any("mpnet", bert::describe_mpnet),
    bpe("mpt", mpt::describe),
    any("nomic_bert", rotary_encoders::describe_nomic),
    bpe("olmo", olmo::describe),
    bpe("olmo2", olmo::describe_2),
    bpe("olmo3", olmo::describe_3),
    bpe("olmoe", olmo::describe_moe),
    bpe("phi", phi::describe),
    bpe("phi3", phi::describe_3),
    bpe("qwen2", qwen::describe_2),
    bpe("qwen2_moe", qwen::describe_2_moe),
    bpe("qwen3", qwen::describe_3),
    bpe("qwen3_moe", qwen::describe_3_moe),
    bpe("roberta", bert::describe_roberta),
    bpe("seed_oss", llama::describe),
    bpe("smollm3", smollm::describe),
    bpe("stablelm", stablelm::describe),
    bpe("starcoder2", starcoder::describe),
    bpe("xlm-roberta", bert::describe_roberta),
];

/// The family that `model_type` names, and its description of `config`. `is_pooled`: files of sentence-transformers beside it
/// say how its vectors are pooled.
pub(super) fn describe(config: &Config, is_pooled: bool) -> Result<(String, Description), ModelError> {
    if let Some(text) = wrapped::text(config)? {
        let (family, description) = describe_plain(&text, is_pooled)?;
        return Ok((family, wrapped::wrap(description)));
    }
    describe_plain(config, is_pooled)
}

pub(super) use task::judge;

/// What counts of `config.json`: all of it, or the part about text where that is one of several.
pub(super) fn text(config: Config) -> Result<Config, ConfigError> {
    Ok(wrapped::text(&config)?.unwrap_or(config))
}

fn describe_plain(config: &Config, is_pooled: bool) -> Result<(String, Description), ModelError> {
    let expected = || {
        let names: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
        format!("a supported family ({})", names.join(", "))
    };
    let name = config.string("model_type")?.ok_or_else(|| config.error("model_type", expected()))?;
    let family = FAMILIES.iter().find(|family| family.name == name);
    let family = family.ok_or_else(|| config.error("model_type", expected()))?;
    let config = &defaults::complete(config, family.name)?;
    let mut description = (family.describe)(config)?;
    task::of_decoder(config, &mut description, is_pooled)?;
    Ok((name.to_owned(), description))
}

/// The token that ends a text by the family's class, where no file says which does.
pub(super) fn eos(family: &str) -> Option<u32> {
    defaults::eos(family)
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
        Some("gelu" | "gelu_python") => Ok(Act::Gelu),
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast" | "gelu_accurate") => {
            Ok(Act::GeluTanh)
        }
        Some("gelu_10") => Ok(Act::GeluClipped),
        Some("quick_gelu") => Ok(Act::GeluQuick),
        Some("relu") => Ok(Act::Relu),
        Some("relu2") => Ok(Act::ReluSquared),
        Some("relu6") => Ok(Act::Relu6),
        Some("leaky_relu") => Ok(Act::LeakyRelu),
        Some("mish") => Ok(Act::Mish),
        Some("sigmoid") => Ok(Act::Sigmoid),
        Some("tanh") => Ok(Act::Tanh),
        Some("linear") => Ok(Act::Identity),
        Some(_) => Err(config.error(
            field,
            "silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, gelu_10, quick_gelu, relu, relu2, relu6, leaky_relu, mish, \
             sigmoid, tanh or linear",
        )),
    }
}

/// Where the experts of all layers are if a file has them fused, as transformers 5 holds them.
const FUSED_EXPERTS: [(Slot, Source); 3] = [
    (Slot::Router, Source::Rows("layers.{}.mlp.gate")),
    (Slot::GateUp, Source::Experts("layers.{}.mlp.experts.gate_up_proj")),
    (Slot::Down, Source::Experts("layers.{}.mlp.experts.down_proj")),
];

/// Puts `to` in the place of what filled the same slots, and takes away what filled those of `without`.
fn rename(names: &mut Names, without: &[Slot], to: &[(Slot, Source)]) {
    names.slots.retain(|(slot, _)| !without.contains(slot) && !to.iter().any(|(s, _)| s == slot));
    names.slots.extend(to);
}

/// The files hold the factors of all norms less one.
fn norms_less_one(names: &mut Names) {
    let norm = |slot: Slot| {
        matches!(
            slot,
            Slot::AttentionNorm
                | Slot::AttentionPostNorm
                | Slot::FfnNorm
                | Slot::FfnPostNorm
                | Slot::QueryNorm
                | Slot::KeyNorm
                | Slot::FinalNorm
        )
    };
    for (slot, source) in &mut names.slots {
        if norm(*slot) {
            *source = Source::PlusOne(source.name());
        }
    }
}

/// The window, `default` if the file does not mention it; none if it is null or 0 there.
fn window(config: &Config, default: Option<usize>) -> Result<Option<usize>, ConfigError> {
    match config.integer("sliding_window", 0..=1 << 23)? {
        Some(0) => Ok(None),
        None if config.mentions("sliding_window") => Ok(None),
        window => Ok(window.or(default)),
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
