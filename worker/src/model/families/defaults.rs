//! What transformers' configuration classes assume where `config.json` is silent, and the other names that they take for a
//! field: `defaults.json`, which `tests/models/make_defaults.py` makes of the classes.

use std::{collections::BTreeMap, sync::LazyLock};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::config::{Config, ConfigError};

#[derive(Deserialize)]
struct Class {
    /// Fields with their values.
    defaults: Map<String, Value>,
    /// Names that stand for a field.
    aliases: BTreeMap<String, String>,
}

static CLASSES: LazyLock<BTreeMap<String, Class>> =
    LazyLock::new(|| serde_json::from_str(include_str!("defaults.json")).unwrap_or_default());

/// The configuration as the family's class has it: with the fields that the file leaves out (a field that is `null` is none of
/// them), by the names that the class has for them.
///
/// # Errors
/// If a field is there by two names, with different values.
pub(super) fn complete(config: &Config, family: &str) -> Result<Config, ConfigError> {
    let mut config = config.clone();
    let Some(class) = CLASSES.get(family) else { return Ok(config) };
    for (alias, field) in &class.aliases {
        let Some(value) = config.get(alias).cloned() else { continue };
        if config.get(field).is_some_and(|other| *other != value) {
            return Err(
                config.error(alias, format!("as {field}, which means the same: {}", shown(&config, field)))
            );
        }
        config = config.with(field, value);
    }
    for (field, value) in &class.defaults {
        if !config.mentions(field) {
            config = config.with(field, value.clone());
        }
    }
    Ok(config)
}

/// The token that ends a text by the family's class, where no file says which does.
pub(super) fn eos(family: &str) -> Option<u32> {
    CLASSES.get(family)?.defaults.get("eos_token_id")?.as_u64()?.try_into().ok()
}

fn shown(config: &Config, field: &str) -> String {
    config.get(field).map(Value::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn completed(family: &str, fields: Value) -> Result<Config, ConfigError> {
        complete(&Config::new("config.json", fields).unwrap(), family)
    }

    #[test]
    fn what_a_file_leaves_out_is_as_the_class_has_it() {
        let config =
            completed("mixtral", json!({"num_experts": 5, "sliding_window": null, "hidden_size": 40}))
                .unwrap();
        assert_eq!(config.get("num_local_experts"), Some(&json!(5)));
        assert_eq!(config.get("rms_norm_eps"), Some(&json!(1e-5)));
        assert_eq!(config.get("hidden_size"), Some(&json!(40)));
        let config = completed("mistral", json!({"sliding_window": null})).unwrap();
        assert_eq!(config.get("sliding_window"), None, "null is not left out");
        let said = completed("gpt2", json!({"n_head": 4, "num_attention_heads": 5})).unwrap_err().to_string();
        assert!(
            said.contains("num_attention_heads is 5: expected as n_head, which means the same: 4"),
            "{said}"
        );
    }

    #[test]
    fn every_family_of_transformers_has_a_class() {
        let own = super::super::FAMILIES.iter().filter(|family| !CLASSES.contains_key(family.name));
        assert_eq!(own.map(|family| family.name).collect::<Vec<_>>(), [""; 0]);
    }
}
