//! One file per model family: `config.json` and tensor names mapped onto the shared blocks.

mod llama;
mod mistral;
mod qwen;

use super::{
    ModelError,
    blocks::{Names, Tower},
    config::Config,
};

/// What a family makes of a configuration.
pub(super) struct Description {
    pub tower: Tower,
    pub names: Names,
}

/// Reads a configuration into the shared blocks.
type Describe = fn(&Config) -> Result<Description, ModelError>;

/// Families by `model_type`.
const FAMILIES: &[(&str, Describe)] = &[
    ("llama", llama::describe),
    ("mistral", mistral::describe),
    ("qwen2", qwen::describe_2),
    ("qwen3", qwen::describe_3),
];

/// The family that `model_type` names, and its description of `config`.
pub(super) fn describe(config: &Config) -> Result<(String, Description), ModelError> {
    let expected = || {
        let names: Vec<_> = FAMILIES.iter().map(|(name, _)| *name).collect();
        format!("a supported family ({})", names.join(", "))
    };
    let family = config.string("model_type")?.ok_or_else(|| config.error("model_type", expected()))?;
    let (_, describe) = FAMILIES
        .iter()
        .find(|(name, _)| *name == family)
        .ok_or_else(|| config.error("model_type", expected()))?;
    Ok((family.to_owned(), describe(config)?))
}
