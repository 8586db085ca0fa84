//! The one place that maps what went wrong to gRPC codes.
//!
//! Every component has an error enum of its own and says its [`Kind`]; [`status`] does the rest.

use std::time::Duration;

use tonic::{Code, Status};

/// What an error means to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is wrong and will be wrong again.
    BadInput,
    /// Too much at once; try again after the hint.
    Overload {
        /// When to try again.
        retry_after: Duration,
    },
    /// Nothing can serve this now.
    NoCapacity,
    /// There is no such model.
    WrongModel,
    /// The call does not fit the state of the callee, such as a stale fence.
    WrongState,
    /// The caller's deadline passed.
    Deadline,
    /// A defect of ours; details are in the log.
    Internal,
}

/// Metadata key of the retry hint, in milliseconds.
pub const RETRY_AFTER: &str = "retry-after-ms";

/// An error that knows what it means to the caller.
pub trait Classify: std::fmt::Display {
    /// What the caller should make of it.
    fn kind(&self) -> Kind;
}

/// The gRPC status of an error: its kind's code and its own message.
pub fn status(error: &(impl Classify + ?Sized)) -> Status {
    let code = match error.kind() {
        Kind::BadInput => Code::InvalidArgument,
        Kind::Overload { .. } => Code::ResourceExhausted,
        Kind::NoCapacity => Code::Unavailable,
        Kind::WrongModel => Code::NotFound,
        Kind::WrongState => Code::FailedPrecondition,
        Kind::Deadline => Code::DeadlineExceeded,
        Kind::Internal => Code::Internal,
    };
    let mut status = Status::new(code, error.to_string());
    if let Kind::Overload { retry_after } = error.kind() {
        let millis = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX);
        status.metadata_mut().insert(RETRY_AFTER, millis.into());
    }
    status
}
