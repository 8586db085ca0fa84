//! What can go wrong between Strata and etcd.

use std::{error::Error, time::Duration};

use tonic::Code;

/// What can go wrong between Strata and etcd.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// A flag that cannot be used.
    #[error("{0}")]
    Config(String),
    /// No endpoint took a connection and answered.
    #[error("no etcd answers ({tried}); is it running, and are --etcd, --etcd-ca and --etcd-user right?")]
    Unreachable {
        /// Each endpoint, with what happened there.
        tried: String,
    },
    /// etcd was reached, and refuses what it was asked, as it will again.
    #[error(
        "etcd refuses: {0}; see --etcd-user, --etcd-password-file and the rights of that user on /strata/"
    )]
    Denied(String),
    /// A call failed.
    #[error("etcd: {doing} failed: {why}")]
    Call {
        /// What was asked for.
        doing: &'static str,
        /// What came back.
        why: String,
    },
    /// A call took too long.
    #[error("etcd: {doing} was not answered within {limit:?}")]
    Timeout {
        /// What was asked for.
        doing: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// A lease is no more, and what was under it neither.
    #[error("etcd has ended the lease")]
    LeaseEnded,
    /// What this process wrote is there no more.
    #[error("key {0} is gone from etcd, or somebody else wrote it")]
    Gone(String),
    /// A watch has ended.
    #[error("etcd has ended a watch: {0}")]
    WatchEnded(String),
    /// Something in etcd is not what Strata wrote.
    #[error("etcd: key {key} holds {why}")]
    Nonsense {
        /// Where.
        key: String,
        /// What is there.
        why: String,
    },
    /// Another worker has the name or the address.
    #[error("{0}")]
    Taken(String),
}

impl EtcdError {
    /// An error of the crate, while `doing` something.
    pub(super) fn call(doing: &'static str, error: &etcd_client::Error) -> Self {
        match error {
            etcd_client::Error::GRpcStatus(status) if is_denial(status) => {
                EtcdError::Denied(status.message().to_owned())
            }
            // The crate says so of the answer to a renewal alone.
            etcd_client::Error::LeaseKeepAliveError(_) => EtcdError::LeaseEnded,
            error => EtcdError::Call { doing, why: reason(error) },
        }
    }

    /// Whether trying again would meet the same answer until somebody changes something.
    pub fn is_final(&self) -> bool {
        matches!(self, EtcdError::Config(_) | EtcdError::Denied(_) | EtcdError::Taken(_))
    }
}

/// Whether etcd knows who asks, and does not let them. An expired token is renewed by the crate and never seen here.
fn is_denial(status: &tonic::Status) -> bool {
    let message = status.message();
    match status.code() {
        Code::PermissionDenied => true,
        // etcd says so where a user is missing, unknown, or has another password.
        Code::InvalidArgument => {
            message.contains("authentication failed") || message.contains("user name is empty")
        }
        Code::FailedPrecondition => message.contains("authentication is not enabled"),
        _ => false,
    }
}

/// An error of the crate in few words: what lies deepest says most, such as `connection refused`.
pub(super) fn reason(error: &etcd_client::Error) -> String {
    let (top, mut deeper): (String, Option<&(dyn Error + 'static)>) = match error {
        etcd_client::Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
        etcd_client::Error::TransportError(error) => (error.to_string(), error.source()),
        error => (error.to_string(), None),
    };
    let mut last = top;
    while let Some(error) = deeper {
        last = error.to_string();
        deeper = error.source();
    }
    last
}
