//! `config.json`, read field by field: whatever is absurd is refused with the field, what was found and what was
//! expected, before any size is computed from it.

use std::{fmt::Display, ops::RangeInclusive};

use serde_json::{Map, Value};
use strata_proto::DType;

/// A field of a configuration file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {field} is {found}: expected {expected}")]
pub struct ConfigError {
    /// The file.
    pub file: &'static str,
    /// The field, dotted where it is nested.
    pub field: String,
    /// Its value, shortened, or `absent`.
    pub found: String,
    /// What would do.
    pub expected: String,
}

/// A JSON object of a configuration file.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    file: &'static str,
    prefix: String,
    fields: Map<String, Value>,
}

impl Config {
    /// The object at the top of `file`.
    pub fn new(file: &'static str, value: Value) -> Result<Self, ConfigError> {
        match value {
            Value::Object(fields) => Ok(Config { file, prefix: String::new(), fields }),
            other => Err(ConfigError {
                file,
                field: "the whole".to_owned(),
                found: short(Some(&other)),
                expected: "an object".to_owned(),
            }),
        }
    }

    /// The objects of the list at the top of `file`.
    pub fn list(file: &'static str, value: Value) -> Result<Vec<Self>, ConfigError> {
        let wrong = |found: &Value| ConfigError {
            file,
            field: "the whole".to_owned(),
            found: short(Some(found)),
            expected: "a list of objects".to_owned(),
        };
        let Value::Array(items) = value else { return Err(wrong(&value)) };
        let object = |(i, item): (usize, Value)| match item {
            Value::Object(fields) => Ok(Config { file, prefix: format!("{i}."), fields }),
            other => Err(wrong(&other)),
        };
        items.into_iter().enumerate().map(object).collect()
    }

    /// Number of its fields.
    pub fn count(&self) -> usize {
        self.fields.len()
    }

    /// Names of its fields.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.fields.keys()
    }

    /// A field's value; `null` counts as absent.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|v| !v.is_null())
    }

    /// Whether a field is there, `null` or not.
    pub fn mentions(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    /// The error that `field` is not as `expected`.
    pub fn error(&self, field: &str, expected: impl Display) -> ConfigError {
        ConfigError {
            file: self.file,
            field: format!("{}{field}", self.prefix),
            found: short(self.get(field)),
            expected: expected.to_string(),
        }
    }

    /// An object inside this one.
    pub fn object(&self, field: &str) -> Result<Option<Config>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(fields)) => {
                let prefix = format!("{}{field}.", self.prefix);
                Ok(Some(Config { file: self.file, prefix, fields: fields.clone() }))
            }
            Some(_) => Err(self.error(field, "an object")),
        }
    }

    /// This object with another value of a field.
    pub fn with(mut self, field: &str, value: Value) -> Config {
        self.fields.insert(field.to_owned(), value);
        self
    }

    /// This object with one field in the place of another: `from` as `to`, which is absent if `from` is.
    pub fn with_only(mut self, from: &str, to: &str) -> Config {
        match self.fields.remove(from) {
            Some(value) => self.fields.insert(to.to_owned(), value),
            None => self.fields.remove(to),
        };
        self
    }

    /// This object with the fields of another one in the place of its own.
    pub fn updated_by(mut self, other: &Config) -> Config {
        self.fields.extend(other.fields.clone());
        self
    }

    /// An integer within `range`, if the field is there.
    pub fn integer(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| range.contains(n))
            .map(Some)
            .ok_or_else(|| self.error(field, format!("an integer in {}..={}", range.start(), range.end())))
    }

    /// An integer within `range`.
    pub fn required(&self, field: &str, range: RangeInclusive<usize>) -> Result<usize, ConfigError> {
        let expected = format!("an integer in {}..={}", range.start(), range.end());
        self.integer(field, range)?.ok_or_else(|| self.error(field, expected))
    }

    /// A list of integers within `range`, if the field is there.
    pub fn integers(
        &self,
        field: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<Vec<usize>>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let usable =
            |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n));
        let list = value.as_array().and_then(|l| l.iter().map(usable).collect());
        let expected = format!("a list of integers in {}..={}", range.start(), range.end());
        list.map(Some).ok_or_else(|| self.error(field, expected))
    }

    /// A positive, finite number, if the field is there.
    pub fn positive(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        // Positive as f32 as well, which is what computes with it.
        let usable = |x: &f64| *x > 0.0 && (*x as f32) > 0.0 && (*x as f32).is_finite();
        let number = value.as_f64().filter(usable);
        number.map(Some).ok_or_else(|| self.error(field, "a positive finite number"))
    }

    /// A list of positive, finite numbers, if the field is there.
    pub fn positives(&self, field: &str) -> Result<Option<Vec<f64>>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let usable =
            |v: &Value| v.as_f64().filter(|x| *x > 0.0 && (*x as f32) > 0.0 && (*x as f32).is_finite());
        let list = value.as_array().and_then(|l| l.iter().map(usable).collect());
        list.map(Some).ok_or_else(|| self.error(field, "a list of positive finite numbers"))
    }

    /// A string, if the field is there.
    pub fn string(&self, field: &str) -> Result<Option<&str>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(field, "a string"))
    }

    /// A list of strings, if the field is there.
    pub fn strings(&self, field: &str) -> Result<Option<Vec<String>>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let list = value.as_array().and_then(|l| l.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        list.map(Some).ok_or_else(|| self.error(field, "a list of strings"))
    }

    /// A boolean, `default` if the field is absent; `null` is false, as it is in Python.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(default && !self.mentions(field)) };
        value.as_bool().ok_or_else(|| self.error(field, "true or false"))
    }

    /// Token ids: an integer, a list of them, or nothing. A negative id means none, as some old files have it.
    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let values = match self.get(field) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let mut ids = Vec::new();
        for value in values {
            match value.as_i64() {
                Some(id) if id < 0 => {}
                Some(id) if id <= i64::from(u32::MAX) => ids.push(id as u32),
                _ => return Err(self.error(field, "a token id or a list of token ids")),
            }
        }
        Ok(ids)
    }

    /// `dtype` (transformers 5) or `torch_dtype` (4), if there.
    pub fn dtype(&self) -> Result<Option<DType>, ConfigError> {
        let field = if self.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        let Some(name) = self.string(field)? else { return Ok(None) };
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" => Ok(Some(DType::F32)),
            "bfloat16" => Ok(Some(DType::BF16)),
            "float16" => Ok(Some(DType::F16)),
            // That of the tensors.
            "auto" => Ok(None),
            _ => Err(self.error(field, "float32, bfloat16 or float16")),
        }
    }
}

/// A value as an error message shows it.
fn short(value: Option<&Value>) -> String {
    let Some(value) = value else { return "absent".to_owned() };
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
