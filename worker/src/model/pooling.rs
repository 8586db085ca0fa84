//! How sentence-transformers pools: `modules.json` and the directories that it names.

use super::{
    ModelError,
    architecture::Pool,
    config::{Config, ConfigError},
};
use crate::weights::Checkpoint;

/// What the files beside a model say of its vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pooling {
    pub pool: Pool,
    pub normalize: bool,
    /// Most tokens of an input, if fewer than the model could take.
    pub longest: Option<usize>,
}

const MODULES: &str = "modules.json";
const POOLING: &str = "the pooling module's config.json";
const LIMITS: &str = "sentence_bert_config.json";

/// Reads them; without any, sentence-transformers takes the mean and leaves its length alone.
pub(super) fn read(checkpoint: &Checkpoint) -> Result<Pooling, ModelError> {
    let mut pooling = Pooling { pool: Pool::Mean, normalize: false, longest: None };
    if let Some(limits) = checkpoint.json(LIMITS)? {
        pooling.longest = Config::new(LIMITS, limits)?.integer("max_seq_length", 1..=1 << 23)?;
    }
    let Some(modules) = checkpoint.json(MODULES)? else { return Ok(pooling) };
    for module in Config::list(MODULES, modules)? {
        let kind = module.string("type")?.unwrap_or_default();
        match kind.rsplit('.').next().unwrap_or_default() {
            "Transformer" => {}
            "Pooling" => {
                let path = module.string("path")?.unwrap_or_default();
                let config = checkpoint.json_in(path, "config.json")?;
                let missing = || module.error("path", "a directory with a config.json");
                pooling.pool = pool(&Config::new(POOLING, config.ok_or_else(missing)?)?)?;
            }
            "Normalize" => pooling.normalize = true,
            _ => return Err(module.error("type", "Transformer, Pooling or Normalize").into()),
        }
    }
    Ok(pooling)
}

/// The one mode that is on; several side by side are not supported.
fn pool(config: &Config) -> Result<Pool, ConfigError> {
    let modes = [
        ("pooling_mode_cls_token", "cls", Pool::First),
        ("pooling_mode_mean_tokens", "mean", Pool::Mean),
        ("pooling_mode_max_tokens", "max", Pool::Max),
        ("pooling_mode_lasttoken", "lasttoken", Pool::Last),
    ];
    // Newer files name it.
    if let Some(name) = config.string("pooling_mode")? {
        let mode = modes.iter().find(|(_, n, _)| *n == name);
        return mode
            .map(|(_, _, pool)| *pool)
            .ok_or_else(|| config.error("pooling_mode", "cls, mean, max or lasttoken"));
    }
    for other in ["pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens"] {
        if config.flag(other, false)? {
            return Err(config.error(other, "false: vectors are pooled by cls, mean, max or lasttoken"));
        }
    }
    let mut on = Vec::new();
    for (field, _, pool) in modes {
        if config.flag(field, false)? {
            on.push(pool);
        }
    }
    match on[..] {
        [pool] => Ok(pool),
        _ => {
            Err(config
                .error("pooling_mode_mean_tokens", format!("one pooling mode to be on, not {}", on.len())))
        }
    }
}
