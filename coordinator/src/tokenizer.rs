//! The model's own tokenizer, as it came with the weights; incremental text with stop strings.

use serde::Deserialize;
use strata_proto::{Files, ModelProfile};

/// Why a model's tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is not beside the weights.
    #[error("the model has no tokenizer.json: put the tokenizer's files beside the weights")]
    Missing,
    /// A file does not parse.
    #[error("{file}: {why}")]
    Broken {
        /// The file.
        file: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The tokenizer of another model.
    #[error(
        "the tokenizer knows token id {id} but the embedding has {rows} rows: this tokenizer belongs to another \
         model; put the right tokenizer.json beside the weights"
    )]
    WrongModel {
        /// Highest id of the tokenizer.
        id: u32,
        /// Rows of the embedding.
        rows: u32,
    },
    /// Encoding or decoding failed.
    #[error("tokenizer: {0}")]
    Failed(String),
}

/// Sampling defaults that a model ships in `generation_config.json`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GenerationDefaults {
    /// Whether it samples at all.
    pub do_sample: bool,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Most likely tokens kept.
    pub top_k: Option<u32>,
    /// Nucleus probability.
    pub top_p: Option<f32>,
    /// Minimum relative probability.
    pub min_p: Option<f32>,
    /// Penalty on repeated tokens.
    pub repetition_penalty: Option<f32>,
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    defaults: GenerationDefaults,
}

impl Tokenizer {
    /// Builds the tokenizer from a model's files and checks it against the model.
    ///
    /// # Errors
    /// If a file is missing or broken, or an id lies outside the embedding.
    pub fn new(files: &Files, profile: &ModelProfile) -> Result<Self, TokenizerError> {
        let json = files.get("tokenizer.json").ok_or(TokenizerError::Missing)?;
        let broken = |file, why: String| TokenizerError::Broken { file, why };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|e| broken("tokenizer.json", e.to_string()))?;
        // Text of users never becomes a control token.
        inner.set_encode_special_tokens(true);
        // Lengths are bounded by admission, out loud; nothing is cut or padded in silence.
        inner.with_truncation(None).map_err(|e| broken("tokenizer.json", e.to_string()))?;
        inner.with_padding(None);
        let highest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if highest >= profile.vocab_size {
            return Err(TokenizerError::WrongModel { id: highest, rows: profile.vocab_size });
        }
        let defaults = match files.get("generation_config.json") {
            None => GenerationDefaults::default(),
            Some(json) => {
                serde_json::from_slice(json).map_err(|e| broken("generation_config.json", e.to_string()))?
            }
        };
        Ok(Tokenizer { inner, defaults })
    }

    /// Text to ids; `special` adds what the tokenizer puts around a text (BOS).
    ///
    /// # Errors
    /// If the tokenizer fails on this text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, special);
        encoding.map(|e| e.get_ids().to_vec()).map_err(|e| TokenizerError::Failed(e.to_string()))
    }

    /// Ids to text.
    ///
    /// # Errors
    /// If the tokenizer fails on these ids.
    pub fn decode(&self, ids: &[u32], keep_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, !keep_special).map_err(|e| TokenizerError::Failed(e.to_string()))
    }

    /// What the model's makers suggest.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }
}

/// Turns an answer's tokens into text as they come. Holds back what may still change: an incomplete character,
/// or the beginning of a stop string.
#[derive(Debug)]
pub struct TextStream {
    ids: Vec<u32>,
    /// Decoding starts here, so that the tokenizer sees enough context for spaces.
    prefix: usize,
    /// Text of ids before this is out (or held).
    read: usize,
    held: String,
    stops: Vec<String>,
}

/// What a token added.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Text that is final.
    pub text: String,
    /// A stop string appeared; `text` ends before it.
    pub stopped: bool,
}

impl TextStream {
    /// An empty answer with these stop strings.
    pub fn new(stops: Vec<String>) -> Self {
        TextStream { ids: Vec::new(), prefix: 0, read: 0, held: String::new(), stops }
    }

    /// Adds a token.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) -> Result<Piece, TokenizerError> {
        self.ids.push(id);
        let before = tokenizer.decode(&self.ids[self.prefix..self.read], false)?;
        let after = tokenizer.decode(&self.ids[self.prefix..], false)?;
        if !after.ends_with('\u{fffd}') && after.len() > before.len() && after.is_char_boundary(before.len())
        {
            self.held.push_str(&after[before.len()..]);
            self.prefix = self.read;
            self.read = self.ids.len();
        }
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return Ok(Piece { text: std::mem::take(&mut self.held), stopped: true });
        }
        let free = self.held.len() - self.possible_stop();
        let rest = self.held.split_off(free);
        Ok(Piece { text: std::mem::replace(&mut self.held, rest), stopped: false })
    }

    /// Whatever is still held back, once no more tokens come.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn finish(mut self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let before = tokenizer.decode(&self.ids[self.prefix..self.read], false)?;
        let after = tokenizer.decode(&self.ids[self.prefix..], false)?;
        self.held.push_str(after.get(before.len()..).unwrap_or(""));
        Ok(self.held)
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn possible_stop(&self) -> usize {
        let mut longest = 0;
        for stop in &self.stops {
            for (at, _) in self.held.char_indices() {
                let tail = &self.held[at..];
                if stop.starts_with(tail) {
                    longest = longest.max(tail.len());
                    break;
                }
            }
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demo() -> Tokenizer {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/shakespeare");
        let json = std::fs::read(format!("{directory}/tokenizer.json")).unwrap();
        let inner = tokenizers::Tokenizer::from_bytes(json).unwrap();
        let mut tokenizer = Tokenizer { inner, defaults: GenerationDefaults::default() };
        tokenizer.inner.set_encode_special_tokens(true);
        tokenizer
    }

    fn stream(text: &str, stops: &[&str]) -> (Vec<Piece>, String) {
        let tokenizer = demo();
        let mut stream = TextStream::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut pieces = Vec::new();
        for id in tokenizer.encode(text, false).unwrap() {
            pieces.push(stream.push(id, &tokenizer).unwrap());
            if pieces.last().unwrap().stopped {
                break;
            }
        }
        let rest = stream.finish(&tokenizer).unwrap();
        (pieces, rest)
    }

    #[test]
    fn text_of_users_never_becomes_a_control_token() {
        let tokenizer = demo();
        let ids = tokenizer.encode("a<|eos|>b", true).unwrap();
        assert_eq!(ids[0], 0, "BOS is put in front");
        assert!(ids[1..].iter().all(|id| *id > 2), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "a<|eos|>b");
    }

    #[test]
    fn pieces_add_up_and_hold_no_half_characters() {
        for text in ["ROMEO:\nO, then, I'll be so.", "héllo wörld 🎭 漢字", "  two  spaces ", ""] {
            let (pieces, rest) = stream(text, &[]);
            assert!(pieces.iter().all(|p| !p.text.contains('\u{fffd}')), "{pieces:?}");
            let whole: String = pieces.into_iter().map(|p| p.text).collect();
            assert_eq!(whole + &rest, text);
        }
    }

    #[test]
    fn an_unfinished_character_comes_out_at_the_end() {
        let tokenizer = demo();
        let ids = tokenizer.encode("a🎭", false).unwrap();
        let mut stream = TextStream::new(vec![]);
        let cut = &ids[..ids.len() - 1];
        let text: String = cut.iter().map(|id| stream.push(*id, &tokenizer).unwrap().text).collect();
        assert_eq!(text + &stream.finish(&tokenizer).unwrap(), tokenizer.decode(cut, false).unwrap());
    }

    #[test]
    fn stops_before_a_stop_string_however_it_is_cut_into_tokens() {
        let (pieces, rest) = stream("Hark! who goes there? Speak", &["there?", "nothing"]);
        assert!(pieces.last().unwrap().stopped);
        let whole: String = pieces.into_iter().map(|p| p.text).collect();
        assert_eq!((whole.as_str(), rest.as_str()), ("Hark! who goes ", ""));
        let (pieces, rest) = stream("Hark! who goes the", &["there?"]);
        let whole: String = pieces.iter().map(|p| p.text.as_str()).collect();
        assert_eq!(
            (whole.as_str(), rest.as_str()),
            ("Hark! who goes ", "the"),
            "a possible stop was let out"
        );
    }
}
