//! Work that takes time, beside the async threads.

use tokio::task::JoinError;

/// Runs work on a thread where it keeps nobody waiting. It is finished even if nobody waits for it any more.
///
/// # Errors
/// If it panics.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    #[cfg(test)]
    if crate::simulation::is_running() {
        // One thread has an order, two have none.
        return tokio::spawn(async { work() }).await;
    }
    tokio::task::spawn_blocking(work).await
}
