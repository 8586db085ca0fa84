//! Who may use CUDA for what, while a step is recorded.
//!
//! What a stream is asked for while it is captured becomes a graph; what is no work of a stream (memory that comes and
//! goes, modules, handles, waiting for a whole context) CUDA refuses beside it, and the capture is lost. How far that
//! reaches, to other threads and other GPUs, depends on the call and the mode of the capture. So here it is one rule
//! for the whole process: either something is recorded, or such things happen. A step is never kept waiting for its
//! turn to be recorded, for it can be recorded another time.

use std::{
    mem::ManuallyDrop,
    ops::Deref,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
};

struct State {
    /// How many are changing something.
    changing: usize,
    recording: Option<ThreadId>,
}

impl State {
    fn take(&mut self) -> Option<Recording> {
        let free = self.changing == 0 && self.recording.is_none();
        free.then(|| {
            self.recording = Some(thread::current().id());
            Recording(())
        })
    }
}

static STATE: Mutex<State> = Mutex::new(State { changing: 0, recording: None });
static CHANGED: Condvar = Condvar::new();

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Held while memory, modules or handles come or go. One may be held within another.
pub(crate) struct Changing(());

/// Waits for a recording to end. Within one, it does not: CUDA will say what is wrong.
pub(crate) fn changing() -> Changing {
    let mut state = lock();
    while state.recording.is_some_and(|thread| thread != thread::current().id()) {
        state = CHANGED.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    state.changing += 1;
    Changing(())
}

impl Drop for Changing {
    fn drop(&mut self) {
        lock().changing -= 1;
        CHANGED.notify_all();
    }
}

/// Held while something is recorded.
pub(crate) struct Recording(());

/// The turn to record, unless something is changing, or somebody else records.
pub(crate) fn try_recording() -> Option<Recording> {
    lock().take()
}

/// The turn to record, when nothing is changing any more and nobody else records.
pub(crate) fn recording() -> Recording {
    let mut state = lock();
    loop {
        match state.take() {
            Some(turn) => return turn,
            None => state = CHANGED.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        lock().recording = None;
        CHANGED.notify_all();
    }
}

/// Something of CUDA that is made and destroyed while nothing is recorded.
pub(crate) struct Handle<T>(ManuallyDrop<T>);

impl<T> Handle<T> {
    /// Makes it.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn new<E>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        let _turn = changing();
        make().map(|made| Handle(ManuallyDrop::new(made)))
    }
}

impl<T> Deref for Handle<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Drop for Handle<T> {
    fn drop(&mut self) {
        let _turn = changing();
        // SAFETY: dropped here only, and never used again.
        unsafe { ManuallyDrop::drop(&mut self.0) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// The only test of the process that may hold on to a turn: others, of this process too, then wait a moment.
    #[test]
    fn who_changes_something_waits_for_a_recording_and_no_recording_waits() {
        let recording = recording();
        assert!(try_recording().is_none(), "one at a time");
        // The thread that records is not kept from being refused.
        drop(changing());
        let (sender, done) = mpsc::channel();
        let other = thread::spawn(move || {
            let _outer = changing();
            let _inner = changing();
            sender.send(try_recording().is_none()).unwrap();
        });
        assert!(done.try_recv().is_err(), "the other one waits");
        drop(recording);
        assert!(done.recv().unwrap(), "nothing is recorded beside a change");
        other.join().unwrap();
    }
}
