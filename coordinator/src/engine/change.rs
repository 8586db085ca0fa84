//! What can be asked of an engine beside requests: to run the same model otherwise.

use strata_proto::error::{Classify, Kind};
use tokio::sync::oneshot;

use crate::{cluster::PipelineError, config::Deployment};

/// What is to change.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// Nothing is to run on this worker any more.
    Leave(String),
    /// The plan that this deployment has over today's members: of the same model, in the same format and with the same
    /// context.
    Deploy(Box<Deployment>),
}

/// Told once what a change came to.
pub(crate) type ChangeReply = oneshot::Sender<Result<(), ChangeError>>;

/// Why something runs as before.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ChangeError {
    /// A worker cannot be spared.
    #[error("worker {worker} cannot be spared: {why}")]
    Needed {
        /// The worker.
        worker: String,
        /// What is missing without it.
        why: PipelineError,
    },
    /// It cannot be planned, or did not come up.
    #[error("nothing was changed: {0}")]
    Failed(PipelineError),
    /// What runs needs more than there would be.
    #[error(
        "nothing was changed: a request in progress may need {needed} tokens of a cache, and there would be one for {room}; \
         choose a larger one, or wait for its end"
    )]
    TooSmall {
        /// Token positions that it may need.
        needed: u64,
        /// Those that there would be.
        room: u64,
    },
    /// Something else is going on for too long.
    #[error(
        "nothing was changed: pipelines were coming up or lost all the time; try again when Status says ready"
    )]
    Unsettled,
    /// The engine is gone.
    #[error("the coordinator leads no more; ask the one that does")]
    Gone,
}

impl Classify for ChangeError {
    fn kind(&self) -> Kind {
        match self {
            ChangeError::Needed { .. } | ChangeError::Failed(_) | ChangeError::TooSmall { .. } => {
                Kind::WrongState
            }
            ChangeError::Unsettled | ChangeError::Gone => Kind::NoCapacity,
        }
    }
}
