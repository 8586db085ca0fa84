//! Calls on workers, none of which is waited for without end.

use std::time::Duration;

use tonic::Status;

use super::error::PipelineError;

/// Longest wait for a worker to answer a call that only looks something up or sets something small up.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Makes a call on a worker; an answer that does not come in time is an error too.
pub(super) async fn call<T>(
    worker: &str,
    doing: &'static str,
    timeout: Duration,
    future: impl Future<Output = Result<T, Status>>,
) -> Result<T, PipelineError> {
    let answer = match tokio::time::timeout(timeout, future).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {timeout:?}"))),
    };
    answer.map_err(|status| PipelineError::Call { worker: worker.to_owned(), doing, status })
}
