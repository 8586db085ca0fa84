//! How requests end.

use strata_proto::{
    error::{Classify, Kind},
    v1,
};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// An end-of-sequence token was generated.
    Eos,
    /// A stop string appeared.
    Stop,
    /// As many tokens as were asked for, or as there was room for.
    Length,
    /// A call other than Generate has its answer.
    Answered,
    /// The caller went away.
    Cancelled,
    /// The caller's deadline passed.
    Deadline,
    /// A field was out of its bounds.
    BadInput,
    /// Another model was asked for.
    WrongModel,
    /// Too many requests at once.
    Overload,
    /// Nothing could serve it.
    Unavailable,
    /// A defect of ours.
    Internal,
}

impl Outcome {
    /// Every outcome, in order.
    pub const ALL: [Outcome; 11] = [
        Outcome::Eos,
        Outcome::Stop,
        Outcome::Length,
        Outcome::Answered,
        Outcome::Cancelled,
        Outcome::Deadline,
        Outcome::BadInput,
        Outcome::WrongModel,
        Outcome::Overload,
        Outcome::Unavailable,
        Outcome::Internal,
    ];

    /// What it is called in Status and in the log.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Eos => "eos",
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::Answered => "answered",
            Outcome::Cancelled => "cancelled",
            Outcome::Deadline => "deadline",
            Outcome::BadInput => "bad-input",
            Outcome::WrongModel => "wrong-model",
            Outcome::Overload => "overload",
            Outcome::Unavailable => "unavailable",
            Outcome::Internal => "internal",
        }
    }

    /// Of an answer that is complete.
    pub(super) fn finished(reason: v1::FinishReason) -> Self {
        match reason {
            v1::FinishReason::Eos => Outcome::Eos,
            v1::FinishReason::Stop => Outcome::Stop,
            v1::FinishReason::Length | v1::FinishReason::Unspecified => Outcome::Length,
        }
    }

    /// Of one that failed.
    pub(super) fn of(error: &(impl Classify + ?Sized)) -> Self {
        match error.kind() {
            Kind::BadInput => Outcome::BadInput,
            Kind::WrongModel => Outcome::WrongModel,
            Kind::Overload { .. } => Outcome::Overload,
            Kind::NoCapacity => Outcome::Unavailable,
            Kind::Deadline => Outcome::Deadline,
            Kind::WrongState | Kind::Stale { .. } | Kind::Internal => Outcome::Internal,
        }
    }
}
