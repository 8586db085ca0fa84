//! How many requests are let in at a time; an overload is an answer, at once.

use tokio::sync::watch;

use super::error::AdmissionError;

/// A place among the requests in progress; freed by dropping it.
#[derive(Debug)]
pub(crate) struct Permit(watch::Sender<usize>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.send_modify(|inside| *inside -= 1);
    }
}

/// Bounds the number of requests in progress.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    inside: watch::Sender<usize>,
    limit: usize,
}

impl Gate {
    /// A gate for `limit` requests at a time.
    pub fn new(limit: usize) -> Self {
        Gate { inside: watch::Sender::new(0), limit }
    }

    /// A place, or the answer that there is none.
    ///
    /// # Errors
    /// [`AdmissionError::Overload`] at once if every place is taken.
    pub fn enter(&self) -> Result<Permit, AdmissionError> {
        let enter = |inside: &mut usize| {
            let free = *inside < self.limit;
            *inside += usize::from(free);
            free
        };
        match self.inside.send_if_modified(enter) {
            true => Ok(Permit(self.inside.clone())),
            false => Err(AdmissionError::Overload { limit: self.limit }),
        }
    }

    /// Places that are taken.
    pub fn inside(&self) -> usize {
        *self.inside.borrow()
    }

    /// Waits until none is.
    pub async fn empty(&self) {
        // The sender is in hand, so this cannot fail.
        let _ = self.inside.subscribe().wait_for(|inside| *inside == 0).await;
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use strata_proto::error::{Classify, Kind};

    use super::*;

    #[test]
    fn the_gate_frees_by_drop() {
        let gate = Gate::new(1);
        let permit = gate.enter().unwrap();
        assert!(matches!(gate.enter().unwrap_err().kind(), Kind::Overload { .. }));
        assert_eq!((gate.inside(), gate.empty().now_or_never()), (1, None));
        drop(permit);
        assert_eq!((gate.inside(), gate.empty().now_or_never()), (0, Some(())));
        gate.enter().unwrap();
    }
}
