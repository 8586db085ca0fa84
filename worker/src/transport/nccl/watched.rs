//! Waiting for the other rank of a communicator, but never in vain.

use std::time::{Duration, Instant};

use crate::{interrupt::Interrupt, transport::LinkError};

/// How long an abort may take; each says how long it took.
const ABORT_TIMEOUT: Duration = Duration::from_secs(8);
/// Polls without a pause, which is how long an activation takes within a host, and the pauses after that.
const EAGER: Duration = Duration::from_millis(1);
const PAUSE: Duration = Duration::from_micros(50);

/// One end of a link, as far as waiting for it goes.
pub(crate) trait Communicator {
    /// Whether all that was asked for is done.
    ///
    /// # Errors
    /// Why it will never be.
    fn poll(&mut self) -> Result<bool, String>;

    /// Gives up whatever is under way; nothing uses its buffers when this comes back. Called once, last.
    fn abort(&mut self);
}

/// A communicator that is never waited for in vain.
pub(crate) struct Watched<C: Communicator> {
    communicator: C,
    interrupt: Interrupt,
    abort_timeout: Duration,
    /// What ends a process whose abort does not come back.
    give_up: fn(),
    aborted: bool,
}

impl<C: Communicator> Watched<C> {
    pub fn new(communicator: C, interrupt: Interrupt) -> Self {
        let give_up = || {
            tracing::error!("aborting an NCCL communicator did not come to an end; this process ends");
            std::process::exit(70);
        };
        Watched { communicator, interrupt, abort_timeout: ABORT_TIMEOUT, give_up, aborted: false }
    }

    /// What is watched.
    pub fn get(&mut self) -> &mut C {
        &mut self.communicator
    }

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// If it fails, takes longer than `timeout`, or the incarnation is ended; then the communicator is aborted.
    pub fn wait(&mut self, timeout: Duration) -> Result<(), LinkError> {
        self.wait_until(C::poll, timeout)
    }

    /// The same, until `holds` says so.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_until(
        &mut self,
        holds: impl Fn(&mut C) -> Result<bool, String>,
        timeout: Duration,
    ) -> Result<(), LinkError> {
        let begun = Instant::now();
        let error = loop {
            if self.aborted {
                return Err(LinkError::Closed("the link was aborted".into()));
            }
            match holds(&mut self.communicator) {
                Ok(true) => return Ok(()),
                // An ended incarnation closes what the two ends have in common.
                _ if self.interrupt.is_tripped() => break LinkError::Interrupted,
                Err(why) => break LinkError::Closed(why),
                Ok(false) => {}
            }
            match begun.elapsed() {
                waited if waited > timeout => break LinkError::Timeout(timeout),
                waited if waited > EAGER => std::thread::sleep(PAUSE),
                _ => std::hint::spin_loop(),
            }
        };
        self.abort();
        Err(error)
    }

    fn abort(&mut self) {
        if std::mem::replace(&mut self.aborted, true) {
            return;
        }
        let (done, watch) = std::sync::mpsc::channel::<()>();
        let (timeout, give_up) = (self.abort_timeout, self.give_up);
        // Without the thread, an abort that hangs would; but there is nothing better to do.
        let _ = std::thread::Builder::new().name("strata-abort".into()).spawn(move || {
            if let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = watch.recv_timeout(timeout) {
                give_up();
            }
        });
        self.communicator.abort();
        drop(done);
    }
}

impl<C: Communicator> Drop for Watched<C> {
    fn drop(&mut self) {
        self.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    };

    use super::*;

    /// A communicator that does as it is told.
    #[derive(Default)]
    struct Fake {
        /// Polls until all is done; never, if none.
        done_after: Option<usize>,
        /// Polls until the other rank is found to have failed.
        fails_after: Option<usize>,
        polls: usize,
        aborts: Arc<AtomicUsize>,
        slow_abort: Duration,
    }

    impl Communicator for Fake {
        fn poll(&mut self) -> Result<bool, String> {
            self.polls += 1;
            if self.fails_after.is_some_and(|n| self.polls > n) {
                return Err("remote error".into());
            }
            Ok(self.done_after.is_some_and(|n| self.polls > n))
        }

        fn abort(&mut self) {
            self.aborts.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(self.slow_abort);
        }
    }

    #[test]
    fn what_is_done_is_waited_for_and_what_is_dropped_is_aborted_once() {
        let fake = Fake { done_after: Some(300), ..Fake::default() };
        let aborts = fake.aborts.clone();
        let mut watched = Watched::new(fake, Interrupt::default());
        watched.wait(Duration::from_secs(60)).unwrap();
        assert_eq!(watched.get().polls, 301);
        assert_eq!(aborts.load(Ordering::SeqCst), 0, "a link that works is not aborted");
        watched.wait(Duration::from_secs(60)).unwrap();
        drop(watched);
        assert_eq!(aborts.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_peer_that_fails_ends_the_wait_and_the_link() {
        let fake = Fake { fails_after: Some(10), ..Fake::default() };
        let aborts = fake.aborts.clone();
        let mut watched = Watched::new(fake, Interrupt::default());
        let error = watched.wait(Duration::from_secs(60)).unwrap_err();
        assert!(matches!(error, LinkError::Closed(why) if why == "remote error"));
        assert_eq!(aborts.load(Ordering::SeqCst), 1);
        assert!(matches!(watched.wait(Duration::from_secs(60)), Err(LinkError::Closed(_))));
        drop(watched);
        assert_eq!(aborts.load(Ordering::SeqCst), 1, "an abort is not repeated");
    }

    #[test]
    fn a_peer_that_is_silent_is_given_up() {
        let mut watched = Watched::new(Fake::default(), Interrupt::default());
        let timeout = Duration::from_millis(20);
        assert!(matches!(watched.wait(timeout), Err(LinkError::Timeout(p)) if p == timeout));
    }

    #[test]
    fn an_ended_incarnation_ends_the_wait() {
        let interrupt = Interrupt::default();
        let other = interrupt.clone();
        let waiter = std::thread::spawn(move || {
            let mut watched = Watched::new(Fake::default(), other);
            watched.wait(Duration::from_secs(60))
        });
        interrupt.trip();
        assert!(matches!(waiter.join().unwrap(), Err(LinkError::Interrupted)));
    }

    #[test]
    fn an_abort_that_hangs_ends_the_process() {
        static ENDED: AtomicBool = AtomicBool::new(false);
        let fake = Fake { slow_abort: Duration::from_millis(200), ..Fake::default() };
        let mut watched = Watched::new(fake, Interrupt::default());
        assert_eq!(watched.abort_timeout, Duration::from_secs(8));
        watched.abort_timeout = Duration::from_millis(10);
        watched.give_up = || ENDED.store(true, Ordering::SeqCst);
        drop(watched);
        assert!(ENDED.load(Ordering::SeqCst));

        static QUICK: AtomicBool = AtomicBool::new(false);
        let mut watched = Watched::new(Fake::default(), Interrupt::default());
        watched.give_up = || QUICK.store(true, Ordering::SeqCst);
        drop(watched);
        assert!(!QUICK.load(Ordering::SeqCst));
    }
}
