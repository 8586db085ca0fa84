//! The one place that maps what went wrong to gRPC codes.
//!
//! Every component has an error enum of its own and says its [`Kind`]; [`status`] does the rest. A status travels in
//! headers, which HTTP/2 bounds: one that is too long arrives without its code. So [`status`] clips what it says, and
//! whoever repeats a caller's text does so by [`quoted`].

use std::time::Duration;

use tonic::{Code, Status, metadata::MetadataValue};

use crate::Side;

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
    /// Nothing can serve this now; try again in a moment.
    NoCapacity,
    /// There is no such model.
    WrongModel,
    /// The call does not fit the state of the callee.
    WrongState,
    /// The caller leads no more, or calls for an incarnation that was followed by another one.
    Stale {
        /// The highest term that the callee has heard of.
        term: u64,
    },
    /// The caller's deadline passed.
    Deadline,
    /// A defect of ours; details are in the log.
    Internal,
}

/// Longest message of a status, in bytes; three times as long in headers, if nothing of it is ASCII. gRPC's C library
/// takes 8 KiB of headers.
const MAX_MESSAGE: usize = 2048;
/// Most characters that a message repeats of a caller's text.
const MAX_QUOTED: usize = 200;

/// Metadata key of the retry hint, in milliseconds.
pub const RETRY_AFTER: &str = "retry-after-ms";
/// When to try again what nothing could serve.
const RETRY_UNAVAILABLE: Duration = Duration::from_secs(1);
/// Metadata key of the term that a stale call meets.
const NEWEST_TERM: &str = "newest-term";
/// Metadata key of the side on which a stage misses its neighbour.
const MISSED: &str = "missed-neighbour";

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
        Kind::WrongState | Kind::Stale { .. } => Code::FailedPrecondition,
        Kind::Deadline => Code::DeadlineExceeded,
        Kind::Internal => Code::Internal,
    };
    let mut status = Status::new(code, clipped(error.to_string()));
    let retry = |after: Duration| u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
    let (key, value) = match error.kind() {
        Kind::Overload { retry_after } => (RETRY_AFTER, retry(retry_after)),
        Kind::NoCapacity => (RETRY_AFTER, retry(RETRY_UNAVAILABLE)),
        Kind::Stale { term } => (NEWEST_TERM, term),
        _ => return status,
    };
    status.metadata_mut().insert(key, value.into());
    status
}

/// The highest term that a worker has heard of, if it refused a call as stale.
pub fn newest_term(status: &Status) -> Option<u64> {
    status.metadata().get(NEWEST_TERM)?.to_str().ok()?.parse().ok()
}

/// Notes in a status that a stage misses its neighbour on this side.
pub fn miss(status: &mut Status, side: Side) {
    let side = match side {
        Side::Upstream => "upstream",
        Side::Downstream => "downstream",
    };
    status.metadata_mut().insert(MISSED, MetadataValue::from_static(side));
}

/// The side on which a stage misses its neighbour, if a call failed for that.
pub fn missed(status: &Status) -> Option<Side> {
    match status.metadata().get(MISSED)?.to_str().ok()? {
        "upstream" => Some(Side::Upstream),
        "downstream" => Some(Side::Downstream),
        _ => None,
    }
}

/// A message of at most [`MAX_MESSAGE`] bytes, that says so if it was longer.
fn clipped(mut message: String) -> String {
    let length = message.len();
    if length > MAX_MESSAGE {
        let note = format!("… (clipped: {length} bytes)");
        message.truncate(message.floor_char_boundary(MAX_MESSAGE - note.len()));
        message += &note;
    }
    message
}

/// A caller's text for a message: in quotes, escaped, and of at most 200 characters, with `…` for the rest.
pub fn quoted(text: &str) -> String {
    // What is beyond them need not be escaped.
    let begin: String = text.chars().take(MAX_QUOTED + 1).collect();
    let escaped = format!("{begin:?}");
    match escaped.char_indices().nth(1 + MAX_QUOTED) {
        Some((end, _)) if end + 1 < escaped.len() => format!("{}…\"", &escaped[..end]),
        _ => escaped,
    }
}

/// What a status says, in words for people: the callee's, or what became of the connection.
pub fn words(status: &Status) -> String {
    std::error::Error::source(status).map_or_else(|| status.message().to_owned(), root)
}

/// What is at the bottom of an error: of a connection, what the system said of it.
pub fn root(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(cause) = error.source() {
        error = cause;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Long(String);

    impl std::fmt::Display for Long {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(&self.0)
        }
    }

    impl Classify for Long {
        fn kind(&self) -> Kind {
            Kind::WrongModel
        }
    }

    #[test]
    fn a_status_is_clipped_between_characters_and_keeps_its_code() {
        for text in ["x".repeat(MAX_MESSAGE + 1), "ä".repeat(1 << 20), format!("x{}", "𝄞".repeat(9999))] {
            let length = text.len();
            let status = status(&Long(text));
            assert_eq!(status.code(), Code::NotFound);
            assert!((MAX_MESSAGE - 3..=MAX_MESSAGE).contains(&status.message().len()));
            assert!(
                status.message().ends_with(&format!("… (clipped: {length} bytes)")),
                "{}",
                status.message()
            );
        }
        let whole = "x".repeat(MAX_MESSAGE);
        assert_eq!(status(&Long(whole.clone())).message(), whole);
    }

    #[test]
    fn words_are_those_of_the_cause() {
        assert_eq!(words(&Status::not_found("no model")), "no model");
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let status = Status::from_error(Box::new(std::io::Error::other(refused)));
        assert_eq!(words(&status), "connection refused");
    }

    #[test]
    fn a_callers_text_is_repeated_up_to_a_length() {
        assert_eq!(quoted("a \"b\"\n"), r#""a \"b\"\n""#);
        assert_eq!(quoted(&"ä".repeat(MAX_QUOTED)), format!("\"{}\"", "ä".repeat(MAX_QUOTED)));
        assert_eq!(quoted(&"ä".repeat(1 << 20)), format!("\"{}…\"", "ä".repeat(MAX_QUOTED)));
        assert_eq!(quoted(&"\0".repeat(1 << 20)).chars().count(), MAX_QUOTED + 3);
    }
}
