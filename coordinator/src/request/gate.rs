//! How many requests are let in at a time; an overload is an answer, at once.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::AdmissionError;

/// A place among the requests in progress; freed by dropping it.
#[derive(Debug)]
pub struct Permit(#[allow(dead_code, reason = "held for its Drop")] OwnedSemaphorePermit);

/// Bounds the number of requests in progress.
#[derive(Debug, Clone)]
pub struct Gate {
    permits: Arc<Semaphore>,
    limit: usize,
}

impl Gate {
    /// A gate for `limit` requests at a time.
    pub fn new(limit: usize) -> Self {
        Gate { permits: Arc::new(Semaphore::new(limit)), limit }
    }

    /// A place, or the answer that there is none.
    ///
    /// # Errors
    /// [`AdmissionError::Overload`] at once if every place is taken.
    pub fn enter(&self) -> Result<Permit, AdmissionError> {
        let permit = self.permits.clone().try_acquire_owned();
        permit.map(Permit).map_err(|_| AdmissionError::Overload { limit: self.limit })
    }

    /// Places that are taken.
    pub fn inside(&self) -> usize {
        self.limit - self.permits.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use strata_proto::error::{Classify, Kind};

    use super::*;

    #[test]
    fn the_gate_frees_by_drop() {
        let gate = Gate::new(1);
        let permit = gate.enter().unwrap();
        assert!(matches!(gate.enter().unwrap_err().kind(), Kind::Overload { .. }));
        assert_eq!(gate.inside(), 1);
        drop(permit);
        assert_eq!(gate.inside(), 0);
        gate.enter().unwrap();
    }
}
