//! Tokens of a GGUF file: texts, and what kind each is of.

use serde_json::{Map, Value};

use super::{super::WeightsError, metadata::Metadata};

/// Where texts of tokens are.
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
/// Where scores of SentencePiece's pieces of tokens are.
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
/// Where kinds of tokens are.
pub(super) const TYPES: &str = "tokenizer.ggml.token_type";

/// What stands for a space in pieces of SentencePiece.
pub(super) const SPACE: char = '\u{2581}';

/// Kinds of tokens, by their numbers in ggml.
pub(super) mod kind {
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
}

/// Tokens of a file.
pub(super) struct Tokens<'a> {
    pub texts: &'a [String],
    /// One for each token; none if the file does not say it.
    pub kinds: &'a [i64],
}

impl<'a> Tokens<'a> {
    /// The tokens of a file, if it has some.
    ///
    /// # Errors
    /// If there are kinds, but not one for each.
    pub fn of(metadata: &'a Metadata) -> Result<Option<Self>, WeightsError> {
        let Some(texts) = metadata.texts(TOKENS)? else { return Ok(None) };
        let kinds = metadata.integers(TYPES)?.unwrap_or_default();
        if !kinds.is_empty() && kinds.len() != texts.len() {
            return Err(metadata.wrong(TYPES, &format!("expected one for each of {} tokens", texts.len())));
        }
        Ok(Some(Tokens { texts, kinds }))
    }

    /// Those of a kind, with their ids.
    pub fn of_kind(&self, kind: i64) -> impl Iterator<Item = (usize, &'a String)> {
        let kinds = self.kinds;
        self.texts.iter().enumerate().filter(move |(id, _)| kinds.get(*id) == Some(&kind))
    }

    /// The text of the token that an entry names.
    pub fn named(&self, metadata: &Metadata, key: &str) -> Result<Option<&'a String>, WeightsError> {
        let Some(id) = metadata.id(key)? else { return Ok(None) };
        let text = self.texts.get(id as usize);
        text.map(Some)
            .ok_or_else(|| metadata.wrong(key, &format!("expected an id below {}", self.texts.len())))
    }
}

/// The tokens by text; of two that are the same, the first.
pub(super) fn by_text(texts: &[String]) -> Map<String, Value> {
    let mut vocabulary = Map::new();
    for (id, text) in texts.iter().enumerate() {
        vocabulary.entry(text.as_str()).or_insert(id.into());
    }
    vocabulary
}
