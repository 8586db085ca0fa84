//! Steps of one token per sequence, recorded as CUDA graphs: one launch instead of some hundreds.
//!
//! What such a step starts depends on its number of rows alone. Few numbers are recorded, each the second time it comes
//! (the first loads what CUDA loads when it is first used); steps in between are padded with rows that stand for
//! nothing.

use std::collections::BTreeMap;

use cudarc::driver::{CudaGraph, sys};

use crate::{
    engine::StepError,
    kernels::{
        cuda::{
            CudaError, Doing, Gpu,
            gate::{self, Handle},
            limits::RECORDED,
        },
        ops::BatchRow,
    },
};

/// The numbers of rows that are recorded.
const ROWS: [usize; 11] = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64];

/// The block of a row that stands for nothing: kernels write no key and no value there.
const NO_BLOCK: u32 = u32::MAX;
/// Such a row. Kernels are told that it has no tokens; of its one, nothing is used.
pub(super) const PADDING: BatchRow<'static> =
    BatchRow { start: 0, count: 1, blocks: &[NO_BLOCK], rope_set: 0 };

/// What became of a number of rows.
enum Recording {
    /// It came once.
    Seen,
    Graph(Handle<CudaGraph>),
    /// It could not be recorded.
    Never,
}

/// The recordings of a stage.
#[derive(Default)]
pub(super) struct Recordings {
    by_rows: BTreeMap<usize, Recording>,
    /// Most rows of a step that is recorded.
    room: usize,
    /// What recordings take of the GPU.
    bytes: u64,
    most_bytes: u64,
}

impl Recordings {
    /// For steps of at most `room` rows.
    pub fn new(room: usize) -> Self {
        Recordings { room, most_bytes: RECORDED, ..Recordings::default() }
    }

    /// How many rows a step is given, for it to be recorded; none if it has too many.
    pub fn padded(&self, rows: usize) -> Option<usize> {
        let step = ROWS.into_iter().find(|step| *step >= rows)?.min(self.room);
        (step >= rows).then_some(step)
    }

    /// Runs a step of as many rows as [`padded`](Self::padded) says, whose kernels `compute` starts.
    pub fn run(
        &mut self,
        gpu: &Gpu,
        rows: usize,
        compute: impl Fn() -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        match self.by_rows.get(&rows) {
            Some(Recording::Graph(graph)) => return Ok(graph.launch().doing("starting a graph")?),
            Some(Recording::Seen) if self.bytes < self.most_bytes => {
                // If it is not this thread's turn, the next step of this kind is recorded.
                if let Some(turn) = gate::try_recording() {
                    let recorded = record(gpu, &compute);
                    drop(turn);
                    let recording = self.keep(rows, recorded);
                    self.by_rows.insert(rows, recording);
                    if let Some(Recording::Graph(graph)) = self.by_rows.get(&rows) {
                        return Ok(graph.launch().doing("starting a graph")?);
                    }
                }
            }
            Some(_) => {}
            None => drop(self.by_rows.insert(rows, Recording::Seen)),
        }
        compute()
    }

    fn keep(&mut self, rows: usize, recorded: Result<(Handle<CudaGraph>, u64), StepError>) -> Recording {
        match recorded {
            Ok((graph, bytes)) => {
                self.bytes += bytes;
                tracing::debug!(rows, bytes, all_bytes = self.bytes, "recorded a step as a CUDA graph");
                if self.bytes >= self.most_bytes {
                    let (bytes, most) = (self.bytes, self.most_bytes);
                    tracing::warn!(
                        bytes,
                        most,
                        "CUDA graphs take all the memory they may: no more are recorded"
                    );
                }
                Recording::Graph(graph)
            }
            Err(error) => {
                tracing::warn!(%error, rows, "a step could not be recorded as a CUDA graph");
                Recording::Never
            }
        }
    }
}

/// Captures a step, and makes it ready to be launched; gives what that took of the GPU's memory, too.
fn record(
    gpu: &Gpu,
    compute: impl Fn() -> Result<(), StepError>,
) -> Result<(Handle<CudaGraph>, u64), StepError> {
    let free = || gpu.context.mem_get_info().map(|(free, _)| free as u64).doing("asking for free memory");
    let before = free()?;
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    gpu.stream.begin_capture(mode).doing("recording a step")?;
    let computed = compute();
    // Also after an error: the stream must not stay captured.
    let captured = gpu.stream.end_capture(sys::CUgraphInstantiate_flags(0)).doing("recording a step");
    computed?;
    let none = || StepError::Device("recording a step: nothing was captured".into());
    let graph = captured?.ok_or_else(none)?;
    let graph = Handle::new(|| Ok::<_, CudaError>(graph))?;
    graph.upload().doing("recording a step")?;
    Ok((graph, before.saturating_sub(free()?)))
}

#[cfg(test)]
impl Recordings {
    /// The numbers of rows that are recorded.
    pub fn recorded(&self) -> Vec<usize> {
        let graphs = self.by_rows.iter().filter(|(_, recording)| matches!(recording, Recording::Graph(_)));
        graphs.map(|(rows, _)| *rows).collect()
    }

    /// What they take of the GPU.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Lets them take less of it.
    pub fn limit(&mut self, most_bytes: u64) {
        self.most_bytes = most_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_numbers_of_rows_are_recorded_and_the_others_are_padded_a_little() {
        for room in [1, 2, 5, 12, 64, 512] {
            let recordings = Recordings::new(room);
            let padded: Vec<_> = (1..=room).map(|rows| recordings.padded(rows)).collect();
            let mut numbers: Vec<_> = padded.iter().flatten().collect();
            numbers.dedup();
            assert!(numbers.is_sorted() && numbers.len() <= 16, "{numbers:?}");
            for (rows, padded) in (1..).zip(padded) {
                assert_eq!(padded.is_some(), rows <= 64);
                let padded = padded.unwrap_or(rows);
                assert!((rows..=room).contains(&padded) && padded < 2 * rows.max(8), "{rows} {padded}");
                assert!(rows > 8 || padded < 2 * rows);
            }
        }
        assert_eq!(Recordings::new(5).padded(6), None);
    }
}
