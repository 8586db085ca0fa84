//! Checks that the weights on a device are what was loaded, again and again: memory may fail, and whatever writes where
//! it should not makes answers wrong without a word.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use crate::{
    engine::{Engine, StepError},
    error::WorkerError,
    interrupt::Interrupt,
};

/// Bytes that are checked at once, which keep a step waiting for about a millisecond.
const PIECE: u64 = 1 << 20;
/// How often a running stage is told to look what is due.
const TICK: Duration = Duration::from_millis(20);
/// Most pieces that are checked then, if the stage has nothing else to do.
pub(crate) const IDLE: usize = 16;
/// Most pieces that are checked after a step.
pub(crate) const BUSY: usize = 2;
/// How far behind its time it may be and still catch up.
const ARREARS: Duration = Duration::from_secs(1);

/// What the weights of an engine were when this was made.
#[derive(Debug)]
pub(crate) struct Verifier {
    pieces: Vec<blake3::Hash>,
    /// From one piece to the next.
    pause: Duration,
    /// When the next one is to be checked.
    due: Instant,
    /// Which one is next.
    next: usize,
    bytes: Vec<u8>,
}

impl Verifier {
    /// Reads all weights of an engine, which are to be checked once `every` so often.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn new(engine: &mut dyn Engine, every: Duration) -> Result<Self, WorkerError> {
        let total = engine.loaded().map_or(0, |loaded| loaded.bytes);
        let due = Instant::now();
        let mut verifier = Verifier { pieces: Vec::new(), pause: every, due, next: 0, bytes: Vec::new() };
        for piece in 0..total.div_ceil(PIECE) {
            let hash = verifier.hash(engine, piece, total).map_err(unreadable)?;
            verifier.pieces.push(hash);
        }
        let pieces = u32::try_from(verifier.pieces.len()).unwrap_or(u32::MAX);
        verifier.pause = every.checked_div(pieces).unwrap_or(every);
        Ok(verifier)
    }

    /// Checks what is due, `most` pieces of it.
    ///
    /// # Errors
    /// If a piece is not what it was, or cannot be read.
    pub fn catch_up(&mut self, engine: &mut dyn Engine, most: usize) -> Result<(), WorkerError> {
        for _ in 0..most {
            let now = Instant::now();
            if now < self.due {
                break;
            }
            let earliest = now.checked_sub(ARREARS).unwrap_or(now);
            self.due = self.due.max(earliest) + self.pause;
            self.check(engine)?;
        }
        Ok(())
    }

    fn check(&mut self, engine: &mut dyn Engine) -> Result<(), WorkerError> {
        let total = engine.loaded().map_or(0, |loaded| loaded.bytes);
        let Some(&expected) = self.pieces.get(self.next) else { return Ok(()) };
        let piece = self.next as u64;
        self.next = (self.next + 1) % self.pieces.len();
        match self.hash(engine, piece, total).map_err(unreadable)? == expected {
            true => Ok(()),
            false => Err(WorkerError::Changed { first: piece * PIECE, end: total.min((piece + 1) * PIECE) }),
        }
    }

    fn hash(&mut self, engine: &mut dyn Engine, piece: u64, total: u64) -> Result<blake3::Hash, StepError> {
        let first = piece * PIECE;
        self.bytes.resize(total.saturating_sub(first).min(PIECE) as usize, 0);
        engine.read_weights(first, &mut self.bytes)?;
        Ok(blake3::hash(&self.bytes))
    }
}

/// Has a stage look what is due, again and again until its run is over.
pub(crate) async fn tick(due: Arc<Notify>, interrupt: Interrupt) {
    let mut every = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            _ = every.tick() => due.notify_one(),
            () = interrupt.tripped() => return,
        }
    }
}

fn unreadable(error: StepError) -> WorkerError {
    WorkerError::Internal(format!("the weights cannot be read back: {error}"))
}
