//! Models of which a decoder of text is one part: their configurations have it in `text_config`, their files beside the
//! weights of what sees. Text is served; what sees is neither read nor counted.

use serde_json::json;

use super::{Description, defaults};
use crate::model::{
    architecture::{Slot, Source},
    config::{Config, ConfigError},
};

/// A model with a decoder of text inside.
struct Wrapper {
    /// `model_type` of its files.
    name: &'static str,
    /// The family of the decoder, where the file does not say it.
    family: &'static str,
}

const WRAPPERS: &[Wrapper] = &[
    Wrapper { name: "gemma3", family: "gemma3_text" },
    Wrapper { name: "idefics3", family: "llama" },
    Wrapper { name: "internvl", family: "qwen2" },
    Wrapper { name: "llava", family: "llama" },
    Wrapper { name: "mistral3", family: "mistral" },
    Wrapper { name: "qwen2_5_vl", family: "qwen2" },
    Wrapper { name: "qwen2_vl", family: "qwen2" },
    Wrapper { name: "qwen3_vl", family: "qwen3" },
    Wrapper { name: "smolvlm", family: "llama" },
];

/// Names of decoders that are those of other families with another way to count positions of images.
const ALIASES: &[(&str, &str)] =
    &[("qwen2_vl_text", "qwen2"), ("qwen2_5_vl_text", "qwen2"), ("qwen3_vl_text", "qwen3")];

/// Fields that a file may have beside `text_config` instead of inside.
const OUTER: [&str; 7] = [
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "quantization_config",
];

/// Where files have the decoder, and what is not of it.
const BASES: &[&str] = &["language_model.model.", "model.language_model.", "model.text_model.", "model.", ""];
const OTHERS: &[&str] = &[
    "vision_tower.*",
    "multi_modal_projector.*",
    "visual.*",
    "model.vision_tower.*",
    "model.vision_model.*",
    "model.multi_modal_projector.*",
    "model.connector.*",
    "model.visual.*",
    "rotary_emb.inv_freq",
];

/// The configuration of the decoder inside, if there is one inside.
pub(super) fn text(config: &Config) -> Result<Option<Config>, ConfigError> {
    let name = config.string("model_type")?;
    let Some(wrapper) = WRAPPERS.iter().find(|wrapper| Some(wrapper.name) == name) else { return Ok(None) };
    // Early files of Qwen2-VL have its fields beside those of the rest.
    let mut text = config.object("text_config")?.unwrap_or_else(|| config.clone());
    for field in OUTER {
        if let (None, Some(value)) = (text.get(field), config.get(field)) {
            text = text.with(field, value.clone());
        }
    }
    // Of the two, the outer one says whether the head may be missing.
    if config.flag("tie_word_embeddings", false)? {
        text = text.with("tie_word_embeddings", json!(true));
    }
    let inner = text.string("model_type")?.filter(|inner| Some(*inner) != name).unwrap_or(wrapper.family);
    let family = ALIASES.iter().find(|(alias, _)| *alias == inner).map_or(inner, |(_, family)| family);
    // By the inner name, whose class may assume something else than the family's; many published files leave most out.
    let text = defaults::complete(&text, inner)?;
    Ok(Some(text.with("model_type", json!(family))))
}

/// The decoder as such a file has it.
pub(super) fn wrap(mut description: Description) -> Description {
    let names = &mut description.names;
    (names.bases, names.ignore) = (BASES, OTHERS);
    names.root.push((Slot::Head, Source::Rows("language_model.lm_head")));
    description
}
