//! Why a request has no answer.

use strata_proto::error::{Classify, Kind};

use crate::{engine::EngineError, request::AdmissionError};

/// Why a request has no answer, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// It was not let in.
    #[error(transparent)]
    Refused(#[from] AdmissionError),
    /// It was let in, and ended without an answer.
    #[error(transparent)]
    Failed(#[from] EngineError),
    /// No request is taken yet.
    #[error("the model is not served yet: {0}; try again later")]
    NotYet(String),
    /// No request is taken any more.
    #[error("the server is shutting down")]
    Draining,
}

impl Classify for SessionError {
    fn kind(&self) -> Kind {
        match self {
            SessionError::Refused(error) => error.kind(),
            SessionError::Failed(error) => error.kind(),
            SessionError::NotYet(_) | SessionError::Draining => Kind::NoCapacity,
        }
    }
}
