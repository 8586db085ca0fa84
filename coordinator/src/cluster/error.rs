//! Why no pipeline could be brought up.

use strata_proto::{
    LinkKind,
    error::{Classify, Kind, words},
};
use tonic::Status;

use crate::planner::PlanError;

/// Why no pipeline could be brought up.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// No member has answered.
    #[error("no worker is available")]
    NoWorkers,
    /// The model does not fit, or the split makes no sense.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Workers disagree about the model.
    #[error("workers {a} and {b} hold different versions of model {model:?}; make their directories equal")]
    Fingerprints {
        /// One worker.
        a: String,
        /// Another one.
        b: String,
        /// The model.
        model: String,
    },
    /// A forced link that two stages cannot have.
    #[error(
        "the stages on {from} and {to} cannot be linked by {asked}: {why}; use --links auto, which takes {best} between \
         them, or --links tcp, which is always possible"
    )]
    NoLink {
        /// Where the upstream stage is.
        from: String,
        /// Where the downstream stage is.
        to: String,
        /// The kind that was asked for.
        asked: LinkKind,
        /// What is in its way.
        why: String,
        /// What would be chosen.
        best: LinkKind,
    },
    /// A worker said something that makes no sense.
    #[error("worker {worker}: {why}")]
    Nonsense {
        /// The worker.
        worker: String,
        /// What it said.
        why: String,
    },
    /// The model cannot be served, as every worker says that was asked.
    #[error("{0}")]
    Model(String),
    /// The model of one worker cannot be served.
    #[error("worker {worker}: {why}")]
    ModelOf {
        /// The worker.
        worker: String,
        /// What is wrong with its model.
        why: String,
    },
    /// A call failed.
    #[error("worker {worker}: {doing} failed: {}", words(status))]
    Call {
        /// The worker.
        worker: String,
        /// Which call.
        doing: &'static str,
        /// Its answer.
        status: Status,
    },
}

impl Classify for PipelineError {
    fn kind(&self) -> Kind {
        match self {
            PipelineError::Plan(error) => error.kind(),
            _ => Kind::NoCapacity,
        }
    }
}
