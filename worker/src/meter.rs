//! What a device has done since its worker started.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::kernels::ops::TensorSpec;

/// Counts and times, which only grow.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    pub steps: AtomicU64,
    pub poisoned: AtomicU64,
    pub tokens: AtomicU64,
    /// Microseconds that it computed.
    pub busy: AtomicU64,
    /// Microseconds that it waited for the activation of a step that it was told of.
    pub waiting: AtomicU64,
    /// Microseconds that handing an activation on kept it.
    pub sending: AtomicU64,
    /// Bytes of activations.
    pub received: AtomicU64,
    pub sent: AtomicU64,
}

impl Meter {
    /// So much more of it.
    pub fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    /// So much longer.
    pub fn spend(counter: &AtomicU64, time: Duration) {
        Self::add(counter, u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// The bytes of an activation.
    pub fn carry(counter: &AtomicU64, tensors: &[TensorSpec]) {
        Self::add(counter, tensors.iter().map(|tensor| tensor.bytes() as u64).sum());
    }
}

/// A device, as its operators see it.
pub(crate) struct Seen<'a> {
    pub id: &'a str,
    pub meter: Arc<Meter>,
    /// Whether a stage runs on it.
    pub is_occupied: bool,
    /// Bytes of weights, and of all else that it holds.
    pub weights: u64,
    pub allocated: u64,
    /// Since when it is at one step, if it is at one.
    pub step_since: Option<Duration>,
}
