//! What can go wrong in a worker, and what it means to the coordinator.

use strata_proto::{
    Side,
    error::{Classify, Kind},
    v1::Fence,
};

use crate::{model::ModelError, transport::LinkError};

/// An error of a worker's service.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The model's directory, configuration or tensors are not usable.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A model name that is no plain directory name, or has no directory.
    #[error("no model {name:?}: {why}")]
    NoModel {
        /// The name asked for.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A device that this worker does not have.
    #[error("this worker has no device {asked:?}; it has {have}")]
    NoDevice {
        /// The id asked for.
        asked: String,
        /// The ids there are.
        have: String,
    },
    /// A message without a field it must have, or with a value out of bounds.
    #[error("{0}")]
    BadMessage(String),
    /// A call from an older incarnation.
    #[error("fence {got} is stale: this worker has seen {newest}")]
    Stale {
        /// Fence of the call.
        got: Fence,
        /// Highest fence seen.
        newest: Fence,
    },
    /// A call that does not fit the stage's state.
    #[error("{0}")]
    WrongState(String),
    /// The plan asks for more memory than the device may use.
    #[error(
        "device {device} may hold {budget} bytes, but weights, cache and workspace need {needed}; plan again"
    )]
    OverBudget {
        /// The device.
        device: String,
        /// Its budget.
        budget: u64,
        /// What the plan needs.
        needed: u64,
    },
    /// A link to a neighbour failed.
    #[error("{error}")]
    Neighbour {
        /// Where it is.
        side: Side,
        /// How the link failed.
        error: LinkError,
    },
    /// A call that describes a link wrongly, or asks for one that cannot be.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The worker is shutting down.
    #[error("this worker is draining and takes no new work")]
    Draining,
    /// The incarnation was aborted while the call was under way.
    #[error("the incarnation was ended")]
    Aborted,
    /// Reading the model directory failed.
    #[error("{path}: {source}")]
    Io {
        /// What was read.
        path: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Weights are not what they were when they were loaded.
    #[error(
        "bytes {first}..{end} of the weights have changed in memory: it is failing, or something wrote there; they \
         are read anew"
    )]
    Changed {
        /// First byte of the weights that may differ.
        first: u64,
        /// The byte behind the last one.
        end: u64,
    },
    /// A defect of ours.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Classify for WorkerError {
    fn kind(&self) -> Kind {
        match self {
            WorkerError::NoModel { .. } => Kind::WrongModel,
            WorkerError::Model(_) | WorkerError::Io { .. } => Kind::WrongState,
            WorkerError::BadMessage(_) | WorkerError::NoDevice { .. } => Kind::BadInput,
            WorkerError::Stale { newest, .. } => Kind::Stale { term: newest.term },
            WorkerError::WrongState(_) | WorkerError::OverBudget { .. } => Kind::WrongState,
            WorkerError::Draining | WorkerError::Aborted => Kind::NoCapacity,
            WorkerError::Link(_) | WorkerError::Neighbour { .. } => Kind::NoCapacity,
            WorkerError::Changed { .. } | WorkerError::Internal(_) => Kind::Internal,
        }
    }
}

impl From<WorkerError> for tonic::Status {
    fn from(error: WorkerError) -> Self {
        let mut status = strata_proto::error::status(&error);
        if let WorkerError::Neighbour { side, .. } = error {
            strata_proto::error::miss(&mut status, side);
        }
        status
    }
}
