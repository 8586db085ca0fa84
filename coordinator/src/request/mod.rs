//! What is let in, and how its texts become tokens and its tokens text.

mod asked_chat;
mod blocking;
pub(crate) mod bounds;
pub(crate) mod chat;
pub(crate) mod encode;
mod error;
mod estimate;
mod gate;
pub(crate) mod generate;
pub(crate) mod input_chat;
mod limit;
pub(crate) mod located;
pub(crate) mod parts;
mod pool;
mod reader;
mod sampling;
mod stops;
mod text_stream;
mod token_classes;
mod token_files;
mod tokenizer;

pub(crate) use blocking::blocking;
pub use error::{AdmissionError, TokenizerError};
pub(crate) use gate::{Gate, Permit};
pub(crate) use limit::Limit;
pub(crate) use located::tokens_alone;
pub(crate) use pool::Pool;
pub(crate) use text_stream::TextStream;
pub(crate) use tokenizer::Tokenizer;
