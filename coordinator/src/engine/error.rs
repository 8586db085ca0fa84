//! Why a request that was let in has no answer.

use std::time::Duration;

use strata_proto::error::{Classify, Kind};

/// When to try again after too much was unread: about the time that it takes to read it.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why an accepted or waiting request ended without an answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// The scheduler has no room.
    #[error("{message}")]
    Refused {
        /// What was wrong.
        message: String,
        /// What it means to the caller.
        kind: Kind,
    },
    /// The caller's deadline passed.
    #[error("the deadline passed after {tokens} tokens")]
    Deadline {
        /// Tokens generated until then.
        tokens: u32,
    },
    /// No pipeline came back in time.
    #[error("no pipeline is serving: {0}; try again later")]
    NoPipeline(String),
    /// The batch of this request failed again and again, even alone.
    #[error("this request failed in the model three times and was given up; the server's log has the reason")]
    Poisoned,
    /// Too much was unread, and much of it of this answer.
    #[error(
        "the answers that wait to be read are too many bytes, and many are this one's: read faster, or ask for less"
    )]
    Unread,
    /// A defect of ours.
    #[error("internal error; the server's log has the reason")]
    Internal,
    /// Another coordinator leads.
    #[error("this coordinator leads no more: {0}; ask again, and the one that leads answers")]
    Deposed(String),
    /// The coordinator is going down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl Classify for EngineError {
    fn kind(&self) -> Kind {
        match self {
            EngineError::Refused { kind, .. } => *kind,
            EngineError::Deadline { .. } => Kind::Deadline,
            EngineError::Unread => Kind::Overload { retry_after: RETRY_AFTER },
            EngineError::NoPipeline(_) | EngineError::Deposed(_) | EngineError::ShuttingDown => {
                Kind::NoCapacity
            }
            EngineError::Poisoned | EngineError::Internal => Kind::Internal,
        }
    }
}
