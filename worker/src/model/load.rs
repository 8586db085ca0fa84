//! Reads the tensors of a stage, one piece while the one before is being put where it belongs.

use std::{ops::ControlFlow, sync::mpsc, thread};

use strata_proto::DType;

use super::{
    Model, ModelError, RangeSpec,
    architecture::{Site, Slot},
    names::{Bound, Layout},
};
use crate::{
    kernels::cpu::packed::Unrepresentable,
    weights::{Checkpoint, PIECE, TensorDType, TensorInfo, WeightsError},
};

/// Progress of a load, in bytes of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedBytes {
    /// Read so far.
    pub read: u64,
    /// To be read in all.
    pub total: u64,
}

/// Some elements of a tensor on their way into memory.
pub(crate) struct Piece<'a> {
    /// Whose weights it is a part of.
    pub site: Site,
    /// Which of them.
    pub key: (Slot, usize),
    /// Where in its slot the tensor belongs.
    pub bound: &'a Bound,
    /// Whether it is the bias.
    pub is_bias: bool,
    /// Rows that the whole tensor fills.
    pub rows: usize,
    /// Format of the elements.
    pub from: DType,
    /// Index of the first one in the tensor: a multiple of 32.
    pub first: usize,
    /// Elements of the whole tensor.
    pub total: usize,
    /// The elements, little-endian.
    pub data: &'a [u8],
}

/// Why a piece cannot be written.
pub(crate) enum PieceError {
    /// It holds a value that the format does not.
    Value(Unrepresentable),
    /// What is wrong has nothing to do with the tensor's values.
    Other(ModelError),
}

impl From<Unrepresentable> for PieceError {
    fn from(value: Unrepresentable) -> Self {
        PieceError::Value(value)
    }
}

impl Piece<'_> {
    /// The error if the stage has no place for it.
    pub fn misplaced(&self) -> PieceError {
        PieceError::Other(ModelError::UnclaimedTensor(self.bound.weight.clone()))
    }
}

/// A tensor to be read.
struct Job<'a> {
    name: &'a str,
    tensor: &'a TensorInfo,
    bound: &'a Bound,
    is_bias: bool,
    site: Site,
    key: (Slot, usize),
}

/// A piece of a tensor that was read: the tensor's number, the offset in it, and the bytes.
type Read = Result<(usize, u64, Vec<u8>), WeightsError>;

/// Hands the tensors of a range, and no others, to `put`, in the order of the files. `progress` is called after each
/// piece and may stop the load. There are two pieces in memory: one that was handed out, and the next one.
pub(crate) fn read_tensors(
    checkpoint: &Checkpoint,
    model: &Model,
    spec: &RangeSpec,
    put: &mut dyn FnMut(&Piece<'_>) -> Result<(), PieceError>,
    progress: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
) -> Result<(), ModelError> {
    let jobs = jobs(checkpoint, model, spec)?;
    let total = jobs.iter().map(|j| j.tensor.bytes).sum();
    let formats = jobs.iter().map(|job| match job.tensor.dtype {
        TensorDType::Float(from) => Ok(from),
        _ => Err(ModelError::Format(job.name.to_owned())),
    });
    let formats = formats.collect::<Result<Vec<_>, _>>()?;
    let (filled, pieces) = mpsc::sync_channel::<Read>(1);
    let (emptied, buffers) = mpsc::channel();
    for _ in 0..2 {
        // The receiver is here.
        let _ = emptied.send(Vec::new());
    }
    thread::scope(|scope| {
        let tensors: Vec<_> = jobs.iter().map(|job| job.tensor).collect();
        // Ends when the receivers are gone, too.
        let reader = move || read_pieces(checkpoint, &tensors, &buffers, &filled);
        let started = thread::Builder::new().name("strata-read".into()).spawn_scoped(scope, reader);
        started.map_err(|source| WeightsError::Io { file: "starting a thread".into(), source })?;
        // Moved here, so that they are gone before the thread is waited for.
        let (pieces, emptied) = (pieces, emptied);
        let mut read = 0;
        for piece in &pieces {
            let (number, offset, data) = piece?;
            let (&Job { name, tensor, bound, is_bias, site, key }, from) = (&jobs[number], formats[number]);
            let rows = match (bound.layout, &tensor.shape[..]) {
                (Layout::Columns, [_, rows]) | (_, [rows, ..]) => *rows,
                _ => 0,
            };
            let [first, elements] = [offset, tensor.bytes].map(|bytes| (bytes / from.size()) as usize);
            let piece = Piece { site, key, bound, is_bias, rows, from, first, total: elements, data: &data };
            put(&piece).map_err(|error| match error {
                PieceError::Value(Unrepresentable(x)) if x.is_nan() => {
                    ModelError::NotANumber(name.to_owned())
                }
                PieceError::Value(Unrepresentable(value)) => {
                    ModelError::Unrepresentable { tensor: name.to_owned(), value, format: spec.format() }
                }
                PieceError::Other(error) => error,
            })?;
            read += data.len() as u64;
            // When all is read, nobody waits for it.
            let _ = emptied.send(data);
            if progress(LoadedBytes { read, total }).is_break() {
                return Err(ModelError::Cancelled);
            }
        }
        Ok(())
    })
}

/// Reads tensors into the buffers that come, and hands them on in order; ends at an error, or if nobody is there any
/// more.
fn read_pieces(
    checkpoint: &Checkpoint,
    tensors: &[&TensorInfo],
    buffers: &mpsc::Receiver<Vec<u8>>,
    filled: &mpsc::SyncSender<Read>,
) {
    for (number, tensor) in tensors.iter().enumerate() {
        for offset in (0..tensor.bytes).step_by(PIECE) {
            let Ok(mut buffer) = buffers.recv() else { return };
            let read = checkpoint.read(tensor, offset, &mut buffer).map(|()| (number, offset, buffer));
            let failed = read.is_err();
            if filled.send(read).is_err() || failed {
                return;
            }
        }
    }
}

/// The tensors of a stage, as they lie in the files.
fn jobs<'a>(
    checkpoint: &'a Checkpoint,
    model: &'a Model,
    spec: &RangeSpec,
) -> Result<Vec<Job<'a>>, ModelError> {
    let mut jobs = Vec::new();
    for site in spec.sites(model) {
        for (key, _) in spec.parts(model, site) {
            for bound in model.bound(site, key) {
                for (name, is_bias) in [(Some(&bound.weight), false), (bound.bias.as_ref(), true)] {
                    let Some(name) = name else { continue };
                    let tensor =
                        checkpoint.tensor(name).ok_or_else(|| ModelError::MissingTensor(name.clone()))?;
                    jobs.push(Job { name, tensor, bound, is_bias, site, key });
                }
            }
        }
    }
    jobs.sort_by_key(|j| j.tensor.place());
    Ok(jobs)
}
