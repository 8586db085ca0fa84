//! Chats: messages to the text a model was trained to continue, as transformers renders them.

mod conversation;
mod template;

pub(crate) use conversation::{Conversation, Ending};
pub(crate) use template::ChatTemplate;

/// Why a chat cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The model has none.
    #[error(
        "the model has no chat template (chat_template.jinja, additional_chat_templates, or in tokenizer_config.json); \
         send a prompt instead"
    )]
    NoTemplate,
    /// None of the model's templates has this name, or none of several is the one to take without a name.
    #[error("chat_template: {asked} is none of the model's chat templates, which are {}", names.join(", "))]
    NoSuchTemplate {
        /// The name that was asked for, quoted, or what stands for none.
        asked: String,
        /// The names there are.
        names: Vec<String>,
    },
    /// A template does not compile.
    #[error("the model's chat template {file} does not compile: {why}")]
    Syntax {
        /// Where it is.
        file: String,
        /// What is wrong with it, and where.
        why: String,
    },
    /// The template refuses these messages, or fails on them.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The last message cannot be continued.
    #[error("continue_final_message: {0}")]
    Continue(String),
    /// A file that cannot be read as what it is to be.
    #[error("{file}: {why}")]
    Config {
        /// The file.
        file: String,
        /// What is wrong with it.
        why: String,
    },
}
