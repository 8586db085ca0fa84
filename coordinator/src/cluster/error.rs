//! Why no pipeline could be brought up.

use std::collections::BTreeMap;

use strata_proto::{
    LinkKind,
    error::{Classify, Kind, words},
};
use tonic::Status;

use super::weights::WeightDifference;
use crate::planner::PlanError;

/// Why no pipeline could be brought up.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PipelineError {
    /// No member has answered.
    #[error("no worker is available")]
    NoWorkers,
    /// The model does not fit, or the split makes no sense.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Workers disagree about the model.
    #[error(
        "workers {a} and {b} hold different versions of model {model:?}; make their directories equal \
             (`strata verify` says in what two differ)"
    )]
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
    /// The weights that a worker has read are not those that another one has.
    #[error("worker {worker}: {difference}")]
    Weights {
        /// The worker that is refused.
        worker: String,
        /// What differs.
        difference: WeightDifference,
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
    /// It cannot be planned over the members that are left.
    #[error("{error}; left out: {}", listed(left_out))]
    Without {
        /// What is wrong with a plan over the others.
        error: Box<PipelineError>,
        /// Who was left out, and why.
        left_out: BTreeMap<String, String>,
    },
}

fn listed(left_out: &BTreeMap<String, String>) -> String {
    let each = left_out.iter().map(|(worker, why)| format!("worker {worker} ({why})"));
    each.collect::<Vec<_>>().join(", ")
}

impl PipelineError {
    /// The worker whose fault it is, if it is one's.
    pub fn worker(&self) -> Option<&str> {
        match self {
            PipelineError::Nonsense { worker, .. }
            | PipelineError::ModelOf { worker, .. }
            | PipelineError::Weights { worker, .. }
            | PipelineError::Call { worker, .. } => Some(worker),
            _ => None,
        }
    }

    /// What went wrong, said of the worker whose fault it is.
    pub fn reason(&self) -> String {
        match self {
            PipelineError::Nonsense { why, .. } | PipelineError::ModelOf { why, .. } => why.clone(),
            PipelineError::Weights { difference, .. } => difference.to_string(),
            // What a worker says of its model says enough.
            PipelineError::Call { doing: "Describe", status, .. } => words(status),
            PipelineError::Call { doing, status, .. } => format!("{doing} failed: {}", words(status)),
            error => error.to_string(),
        }
    }

    /// The term of the leader that a worker follows instead of this one.
    pub fn newest_term(&self) -> Option<u64> {
        match self {
            PipelineError::Call { status, .. } => strata_proto::error::newest_term(status),
            _ => None,
        }
    }

    /// The same, where those were left out over whom it could have been planned.
    pub(crate) fn without(self, left_out: BTreeMap<String, String>) -> Self {
        match left_out.is_empty() {
            true => self,
            false => PipelineError::Without { error: Box::new(self), left_out },
        }
    }
}

impl Classify for PipelineError {
    fn kind(&self) -> Kind {
        match self {
            PipelineError::Plan(error) => error.kind(),
            PipelineError::Without { error, .. } => error.kind(),
            _ => Kind::NoCapacity,
        }
    }
}
