//! What clients are told of a request that has no answer: nothing of the inside of the cluster.

use strata_proto::error::status;
use tonic::Status;

use crate::{engine::EngineError, front::session::SessionError};

/// What a client is told. Where an error tells of the inside of the cluster, such as workers and their addresses, that is
/// for the log and for Status.
pub(super) fn told(error: &SessionError) -> Status {
    let message = match error {
        SessionError::NotYet(_) => "the model is not served yet (Status says why); try again later",
        SessionError::Failed(EngineError::NoPipeline(_)) => {
            "no pipeline is serving (Status says why); try again later"
        }
        SessionError::Failed(EngineError::Deposed(_)) => {
            "this coordinator leads no more; ask again, and the one that leads answers"
        }
        error => return status(error),
    };
    let status = status(error);
    Status::with_metadata(status.code(), message, status.metadata().clone())
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn workers_and_their_addresses_are_not_told() {
        let why = || "worker http://10.0.0.7:4500 left".to_owned();
        for error in [
            SessionError::NotYet(why()),
            EngineError::NoPipeline(why()).into(),
            EngineError::Deposed(why()).into(),
        ] {
            assert!(error.to_string().contains("10.0.0.7"), "the log has it");
            let told = told(&error);
            assert!(told.code() == Code::Unavailable && !told.message().contains("10.0.0.7"), "{told:?}");
            assert!(told.metadata().contains_key("retry-after-ms"));
        }
    }
}
