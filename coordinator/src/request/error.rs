//! Why a request is not let in, and why a tokenizer cannot be used.

use std::time::Duration;

use strata_proto::error::{Classify, Kind, quoted};

use super::chat::ChatError;

/// When to try again after an overload: about the time a short answer takes.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Why a request was not let in.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// A field is out of its bounds.
    #[error("{field}: {why}")]
    Field {
        /// The field, as the `.proto` names it.
        field: &'static str,
        /// What it was and what was expected.
        why: String,
    },
    /// The prompt is as long as everything may be.
    #[error("prompt: {tokens} leave no room for an answer: {limit}; shorten the prompt")]
    NoRoom {
        /// How long it is, in words.
        tokens: String,
        /// Which limit that meets, in words.
        limit: String,
    },
    /// Another model was asked for.
    #[error("model {} is not served here; this server answers for {served}", quoted(asked))]
    WrongModel {
        /// The name asked for.
        asked: String,
        /// The names served, in quotes.
        served: String,
    },
    /// The model does something else.
    #[error("model {model:?} answers {served}, not {asked}")]
    WrongTask {
        /// The call made.
        asked: &'static str,
        /// The call that it answers.
        served: &'static str,
        /// The model.
        model: String,
    },
    /// Too many requests at once.
    #[error("{limit} requests are in progress or waiting, the most this server takes; try again later")]
    Overload {
        /// The bound.
        limit: usize,
    },
    /// As many requests of one tenant, or connection, as are let in beside those of others.
    #[error(
        "{taken} requests of this {whose} are in progress or waiting, its share of the {limit} that this server takes; \
         try again later"
    )]
    Share {
        /// "tenant" or "connection".
        whose: &'static str,
        /// Those it has.
        taken: usize,
        /// The bound on those of everybody.
        limit: usize,
    },
    /// Too much is to be tokenized at once.
    #[error(
        "{most} bytes of texts are read already, the most that this server reads at a time; try again later"
    )]
    Busy {
        /// The bound.
        most: usize,
    },
    /// Too much of what was answered is unread.
    #[error("more than {most} bytes of answers wait for their clients to read them; try again later")]
    Unread {
        /// The bound.
        most: usize,
    },
    /// A defect of ours.
    #[error("the tokenizer failed; the server's log has the reason")]
    Panicked,
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl Classify for AdmissionError {
    fn kind(&self) -> Kind {
        match self {
            AdmissionError::Field { .. }
            | AdmissionError::NoRoom { .. }
            | AdmissionError::WrongTask { .. }
            | AdmissionError::Tokenizer(_) => Kind::BadInput,
            AdmissionError::WrongModel { .. } => Kind::WrongModel,
            AdmissionError::Panicked => Kind::Internal,
            AdmissionError::Overload { .. }
            | AdmissionError::Share { .. }
            | AdmissionError::Busy { .. }
            | AdmissionError::Unread { .. } => Kind::Overload { retry_after: RETRY_AFTER },
        }
    }
}

/// What is wrong with a field.
pub(super) fn field(field: &'static str, why: impl Into<String>) -> AdmissionError {
    AdmissionError::Field { field, why: why.into() }
}

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
    /// The chat template is broken, missing, or refuses the messages.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A text has more tokens than it may have.
    #[error("{least} tokens or more are too many")]
    TooLong {
        /// It has so many at least.
        least: usize,
    },
    /// Encoding or decoding failed.
    #[error("tokenizer: {0}")]
    Failed(String),
}

impl TokenizerError {
    /// A file that is no JSON of what it should be.
    pub(super) fn misread(file: &'static str, error: &serde_json::Error) -> Self {
        let cut = if error.is_eof() { ": it was cut off; download it again" } else { "" };
        TokenizerError::Broken { file, why: format!("{error}{cut}") }
    }
}
