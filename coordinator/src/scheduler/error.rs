//! What the scheduler refuses, of requests and of the pipeline.

use strata_proto::error::{Classify, Kind};

use super::SequenceId;

/// Why a request cannot be scheduled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// It could not run even alone.
    #[error("prompt and max_tokens need {needed} cached tokens, but this deployment holds {capacity}")]
    TooLarge {
        /// Prompt and answer together.
        needed: u64,
        /// What the cache holds.
        capacity: u64,
    },
    /// An input that must be computed at once does not fit a step.
    #[error(
        "an input of {tokens} tokens and {outputs} outputs does not fit a step of {max_tokens} and {max_rows}; raise \
         --max-step-tokens or --max-step-rows"
    )]
    TooLargeForAStep {
        /// Tokens of the input.
        tokens: u32,
        /// Outputs wanted.
        outputs: u32,
        /// Tokens of a step.
        max_tokens: u32,
        /// Outputs of a step: its `max_step_rows`.
        max_rows: u32,
    },
}

impl SubmitError {
    /// The room that there was.
    pub fn room(&self) -> u64 {
        match self {
            SubmitError::TooLarge { capacity, .. } => *capacity,
            SubmitError::TooLargeForAStep { max_tokens, .. } => u64::from(*max_tokens),
        }
    }
}

impl Classify for SubmitError {
    fn kind(&self) -> Kind {
        Kind::BadInput
    }
}

/// Something the pipeline said that cannot be; ends its incarnation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// Results come in the order of steps.
    #[error("a result for step {got} came where {due:?} was due")]
    OutOfOrder {
        /// The step of the result.
        got: u64,
        /// The oldest step in flight.
        due: Option<u64>,
    },
    /// A row that yields something has nothing.
    #[error("step {step} has no output for sequence {sequence}")]
    Missing {
        /// The step.
        step: u64,
        /// The sequence.
        sequence: SequenceId,
    },
    /// A row yields more than it may.
    #[error(
        "step {step} has {outputs} outputs for sequence {sequence}, of which all but the last must be its {drafts} drafts"
    )]
    NotDrafted {
        /// The step.
        step: u64,
        /// The sequence.
        sequence: SequenceId,
        /// What came for it, in one piece or in several.
        outputs: usize,
        /// Tokens that its row guessed.
        drafts: usize,
    },
}
