//! Metadata of a GGUF file, read entry by entry: what is of another kind than expected is refused by its key.

use std::collections::BTreeMap;

use strata_proto::error::quoted;

use super::{super::WeightsError, header::Value};

/// The metadata of a file.
#[derive(Debug)]
pub(super) struct Metadata {
    /// The file, for errors.
    pub file: String,
    pub entries: BTreeMap<String, Value>,
    /// `general.architecture`, before whose keys it stands.
    pub architecture: String,
}

impl Metadata {
    /// The metadata of `file`.
    ///
    /// # Errors
    /// If they name no architecture.
    pub fn new(file: &str, entries: BTreeMap<String, Value>) -> Result<Self, WeightsError> {
        let mut metadata = Metadata { file: file.to_owned(), entries, architecture: String::new() };
        let architecture = metadata.text("general.architecture")?;
        metadata.architecture = architecture.map(str::to_owned).unwrap_or_default();
        match metadata.architecture.is_empty() {
            true => Err(metadata.wrong("general.architecture", "expected the name of an architecture")),
            false => Ok(metadata),
        }
    }

    /// The key of an architecture's own entry.
    fn own(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// The error that an entry is not as it should be.
    pub fn wrong(&self, key: &str, expected: &str) -> WeightsError {
        WeightsError::file(&self.file, format!("metadata {}: {expected}", quoted(key)))
    }

    /// An entry, if it is there, made of its value by `read`.
    fn read<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, WeightsError> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, &format!("expected {expected}")))
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&str>, WeightsError> {
        self.read(key, "a text", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        self.read(key, "true or false", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A token id.
    pub fn id(&self, key: &str) -> Result<Option<u32>, WeightsError> {
        self.read(key, "a token id", |value| match value {
            Value::Integer(id) => u32::try_from(*id).ok(),
            _ => None,
        })
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, WeightsError> {
        self.read(key, "a list of texts", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<&[f32]>, WeightsError> {
        self.read(key, "a list of numbers", |value| match value {
            Value::Numbers(numbers) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    /// A list of integers.
    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>, WeightsError> {
        self.read(key, "a list of integers", |value| match value {
            Value::Integers(integers) => Some(integers.as_slice()),
            _ => None,
        })
    }

    /// A number of the architecture, which may be written as an integer.
    pub fn number(&self, key: &str) -> Result<Option<f64>, WeightsError> {
        self.read(&self.own(key), "a number", |value| match value {
            Value::Number(number) => Some(*number),
            Value::Integer(integer) => Some(*integer as f64),
            _ => None,
        })
    }

    /// An integer of the architecture; of a list with one for each layer, the one that all have.
    pub fn integer(&self, key: &str) -> Result<Option<u64>, WeightsError> {
        self.read(&self.own(key), "an integer, the same for all layers", |value| match value {
            Value::Integer(integer) => u64::try_from(*integer).ok(),
            Value::Integers(list) => {
                let first = list.first()?;
                list.iter().all(|n| n == first).then(|| u64::try_from(*first).ok())?
            }
            _ => None,
        })
    }

    /// Integers or flags of the architecture, if it is a list.
    pub fn list(&self, key: &str) -> Result<Option<&[i64]>, WeightsError> {
        match self.entries.get(&self.own(key)) {
            Some(Value::Integers(_)) => self.integers(&self.own(key)),
            _ => Ok(None),
        }
    }

    /// A flag of the architecture.
    pub fn own_flag(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        self.flag(&self.own(key))
    }

    /// A text of the architecture.
    pub fn own_text(&self, key: &str) -> Result<Option<&str>, WeightsError> {
        self.text(&self.own(key))
    }

    /// The error that one of its own entries is not as it should be.
    pub fn own_wrong(&self, key: &str, expected: &str) -> WeightsError {
        self.wrong(&self.own(key), expected)
    }
}
