//! The threads of a stage: tasks of one operation spread over cores, a few microseconds per operation.
//!
//! The caller works too. A helper joins an operation only while there are tasks left to take, so one that the system
//! has put aside delays nobody. Helpers spin for a while after an operation, since the next one mostly follows at once,
//! then sleep.

use std::{
    any::Any,
    panic::{self, AssertUnwindSafe},
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

use core_affinity::CoreId;

/// Looks for work before a helper sleeps: some tens of microseconds.
const SPINS: u32 = 2_000;

/// The word that says what is going on: number of the operation, whether it may be joined, and how many have.
#[derive(Clone, Copy, PartialEq, Eq)]
struct State(u64);

impl State {
    const OPEN: u64 = 1 << 31;
    const JOINED: u64 = Self::OPEN - 1;
    const STOP: u64 = u64::MAX;

    fn number(self) -> u64 {
        self.0 >> 32
    }

    fn is_open(self) -> bool {
        self.0 & Self::OPEN != 0 && self.0 != Self::STOP
    }

    fn joined(self) -> u64 {
        self.0 & Self::JOINED
    }
}

/// An operation: what to call with each number below `tasks`.
#[derive(Clone, Copy)]
struct Job<'a> {
    call: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
}

struct Shared {
    state: AtomicU64,
    /// Points to the caller's job while it is open or somebody is in it.
    job: AtomicPtr<Job<'static>>,
    next: AtomicUsize,
    /// Helpers that have left the operation.
    left: AtomicU64,
    asleep: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Shared {
    /// Does tasks until none is left; keeps the first panic and goes on, so that every task is accounted for.
    fn work(&self, job: &Job<'_>) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                return;
            }
            if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(|| (job.call)(task))) {
                lock(&self.panic).get_or_insert(panic);
            }
        }
    }

    fn help(&self) {
        let mut done = 0;
        let mut spins = 0;
        loop {
            let state = State(self.state.load(Ordering::SeqCst));
            if state.0 == State::STOP {
                return;
            }
            if state.is_open() && state.number() != done {
                let join = State(state.0 + 1);
                let (acquire, relaxed) = (Ordering::AcqRel, Ordering::Relaxed);
                if self.state.compare_exchange(state.0, join.0, acquire, relaxed).is_ok() {
                    done = state.number();
                    // SAFETY: whoever joined an open operation is waited for, so its job is alive until `left` counts
                    // this helper.
                    self.work(unsafe { &*self.job.load(Ordering::Acquire) });
                    self.left.fetch_add(1, Ordering::Release);
                    spins = 0;
                }
                continue;
            }
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            self.asleep.fetch_add(1, Ordering::SeqCst);
            // An operation that opened before it could know of a sleeper is seen here.
            let state = State(self.state.load(Ordering::SeqCst));
            if state.0 != State::STOP && (!state.is_open() || state.number() == done) {
                thread::park();
            }
            self.asleep.fetch_sub(1, Ordering::SeqCst);
            spins = 0;
        }
    }
}

/// Some threads that do the tasks of one operation at a time.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Number of the last operation. One caller at a time.
    operation: Mutex<u64>,
}

impl Pool {
    /// A pool of `threads`, the caller's included; fewer if the system has no more to give.
    pub fn new(threads: usize) -> Self {
        Self::on_cores(threads, &[])
    }

    /// A pool whose threads stay on `cores`, one each as far as there are any; the first one is the caller's, who sees
    /// to that.
    pub fn on_cores(threads: usize, cores: &[CoreId]) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: AtomicPtr::new(ptr::null_mut()),
            next: AtomicUsize::new(0),
            left: AtomicU64::new(0),
            asleep: AtomicUsize::new(0),
            panic: Mutex::new(None),
        });
        let helper = |i| {
            let (shared, core) = (shared.clone(), cores.get(i).copied());
            let work = move || {
                core.map(core_affinity::set_for_current);
                shared.help();
            };
            thread::Builder::new().name(format!("strata-help-{i}")).spawn(work).ok()
        };
        let helpers = (1..threads).map_while(helper).collect();
        Pool { shared, helpers, operation: Mutex::new(0) }
    }

    /// Threads that work on an operation, the caller's included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `call` once with each number below `tasks`, on any thread and in any order, and waits for all of it.
    ///
    /// # Panics
    /// With the panic of a task, after the others are done.
    pub fn run(&self, tasks: usize, call: &(dyn Fn(usize) + Sync)) {
        if self.helpers.is_empty() || tasks <= 1 {
            return (0..tasks).for_each(call);
        }
        let mut operation = lock(&self.operation);
        let shared = &*self.shared;
        let number = *operation % u64::from(u32::MAX - 1) + 1;
        *operation = number;
        let job = Job { call, tasks };
        shared.next.store(0, Ordering::Relaxed);
        shared.left.store(0, Ordering::Relaxed);
        shared.job.store(ptr::from_ref(&job).cast_mut().cast(), Ordering::Release);
        shared.state.store(number << 32 | State::OPEN, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            self.helpers.iter().for_each(|h| h.thread().unpark());
        }
        shared.work(&job);
        let joined = State(shared.state.fetch_and(!State::OPEN, Ordering::AcqRel)).joined();
        let mut spins = 0;
        while shared.left.load(Ordering::Acquire) < joined {
            spins += 1;
            // A helper in the middle of a task may need this core to go on.
            if spins < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let panic = lock(&shared.panic).take();
        drop(operation);
        if let Some(panic) = panic {
            panic::resume_unwind(panic);
        }
    }

    /// Calls `call` with the number and the elements of each piece of `data`, `piece` elements long (the last one may
    /// be shorter), as [`run`](Self::run) does; `grain` pieces are a task.
    pub fn pieces<T: Send>(
        &self,
        data: &mut [T],
        piece: usize,
        grain: usize,
        call: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let (len, data) = (data.len(), Parts(data.as_mut_ptr()));
        let pieces = len.div_ceil(piece);
        self.run(pieces.div_ceil(grain), &|task| {
            for i in task * grain..pieces.min((task + 1) * grain) {
                let first = i * piece;
                // SAFETY: pieces of different tasks do not overlap, each task runs once, and `data` is borrowed until
                // all are done.
                call(i, unsafe { std::slice::from_raw_parts_mut(data.at(first), piece.min(len - first)) });
            }
        });
    }

    /// Rows of `width` elements that are worth a task of their own.
    pub fn grain(width: usize) -> usize {
        (1 << 12) / width + 1
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.store(State::STOP, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // It ends by itself; its panics were a caller's.
            let _ = helper.join();
        }
    }
}

/// The start of a slice of which several tasks write different parts.
pub(super) struct Parts<T>(pub *mut T);

// SAFETY: tasks only make references to parts that no other task touches.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    /// The address of element `i`.
    pub fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_and_is_over_when_the_operation_is() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in (0..200).chain([10_000]) {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
            let mut data = vec![0; 1003];
            pool.pieces(&mut data, 10, 3, |i, piece| piece.iter_mut().for_each(|x| *x += i));
            assert!(data.iter().enumerate().all(|(i, x)| *x == i / 10));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_after_the_other_tasks_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        let done = AtomicUsize::new(0);
        let run = |bad: usize| {
            panic::catch_unwind(AssertUnwindSafe(|| {
                pool.run(50, &|i| {
                    if i == bad {
                        panic::resume_unwind(Box::new(bad));
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }))
        };
        assert_eq!(run(7).unwrap_err().downcast_ref(), Some(&7usize));
        assert_eq!(done.load(Ordering::Relaxed), 49);
        assert!(run(50).is_ok());
        assert_eq!(done.load(Ordering::Relaxed), 99);
    }
}
