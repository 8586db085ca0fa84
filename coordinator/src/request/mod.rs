//! What is let in, and how its texts become tokens and its tokens text.

pub mod bounds;
pub mod chat;
pub mod encode;
mod error;
mod gate;
pub mod generate;
mod sampling;
mod text_stream;
mod tokenizer;

pub use error::{AdmissionError, TokenizerError};
pub use gate::{Gate, Permit};
pub use text_stream::TextStream;
pub use tokenizer::Tokenizer;
