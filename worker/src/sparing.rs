//! Log lines that strangers cause: they are not to fill the log.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Shortest time from one line to the next.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// One kind of line.
#[derive(Debug, Default)]
pub(crate) struct Sparing(Mutex<Option<Instant>>);

impl Sparing {
    pub const fn new() -> Self {
        Sparing(Mutex::new(None))
    }

    /// Whether one may be told now.
    pub fn may_tell(&self) -> bool {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let may = told.is_none_or(|told| told.elapsed() > TELL_EVERY);
        if may {
            *told = Some(Instant::now());
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_one_line() {
        let refusals = Sparing::new();
        assert_eq!((0..1000).filter(|_| refusals.may_tell()).count(), 1);
    }
}
