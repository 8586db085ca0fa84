//! Where texts are tokenized: beside the async threads, so many at a time, and so many bytes that wait for it.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::{blocking::blocking, error::AdmissionError};

/// Most bytes of requests that are tokenized or wait for it: eight of the largest.
const MAX_BYTES: usize = 64 << 20;
/// A permit of the bytes stands for so many of them.
const UNIT: usize = 1 << 10;

/// Threads for work that takes time and memory in proportion to a text.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    threads: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

impl Default for Pool {
    /// As many threads as there are cores.
    fn default() -> Self {
        Pool::new(std::thread::available_parallelism().map_or(1, usize::from), MAX_BYTES)
    }
}

impl Pool {
    fn new(threads: usize, bytes: usize) -> Self {
        Pool { threads: Arc::new(Semaphore::new(threads)), bytes: Arc::new(Semaphore::new(bytes / UNIT)) }
    }

    /// Does work on a request of so many bytes as soon as a thread is free; it is finished even if nobody waits for it
    /// any more.
    ///
    /// # Errors
    /// [`AdmissionError::Busy`] at once if too many bytes wait already; [`AdmissionError::Panicked`] if the work does.
    pub async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, AdmissionError> + Send + 'static,
    ) -> Result<T, AdmissionError> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX);
        let busy = |_| AdmissionError::Busy { most: MAX_BYTES };
        let held = self.bytes.clone().try_acquire_many_owned(units).map_err(busy)?;
        // Neither is ever closed.
        let thread = self.threads.clone().acquire_owned().await.map_err(|_| AdmissionError::Panicked)?;
        let done = blocking(move || {
            let _until_done = (held, thread);
            work()
        });
        done.await.unwrap_or_else(|error| {
            tracing::error!(%error, "the tokenizer panicked");
            Err(AdmissionError::Panicked)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use strata_proto::error::{Classify, Kind};

    use super::*;

    #[tokio::test]
    async fn so_many_run_at_a_time_and_so_many_bytes_wait() {
        let pool = Pool::new(1, 8 * UNIT);
        let (go, wait) = mpsc::channel::<()>();
        let first = pool.run(4 * UNIT, move || Ok(wait.recv().is_err()));
        let second = pool.run(4 * UNIT, || Ok(true));
        tokio::pin!(first, second);
        assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
        assert_eq!(pool.threads.available_permits(), 0, "the first one has the thread");
        let refused = pool.run(1, || Ok(())).await.unwrap_err();
        assert!(matches!(refused.kind(), Kind::Overload { .. }), "{refused}");
        drop(go);
        assert!(first.await.unwrap() && second.await.unwrap());
        pool.run(8 * UNIT, || Ok(())).await.unwrap();
        let panicked = pool.run(1, || -> Result<(), _> { panic!("a tokenizer") }).await.unwrap_err();
        assert_eq!(panicked.kind(), Kind::Internal);
        pool.run(8 * UNIT, || Ok(())).await.expect("what a panic held is free again");
    }
}
