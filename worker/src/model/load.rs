//! Reads the tensors of a stage, one piece while the ones before are hashed and put where they belong.

use std::ops::ControlFlow;

use strata_proto::{DType, WeightDigests};

use super::{
    Model, ModelError, RangeSpec,
    architecture::{Site, Slot},
    digest,
    names::{Bound, Layout},
};
use crate::{
    kernels::cpu::packed::Unrepresentable,
    weights::{Checkpoint, TensorDType, TensorInfo, stream},
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
    from: DType,
    bound: &'a Bound,
    is_bias: bool,
    site: Site,
    key: (Slot, usize),
}

impl Job<'_> {
    /// The bytes of the tensor that begin at `offset`, on their way.
    fn piece<'a>(&'a self, offset: u64, data: &'a [u8]) -> Piece<'a> {
        let &Job { tensor, from, bound, is_bias, site, key, .. } = self;
        let rows = match (bound.layout, &tensor.shape[..]) {
            (Layout::Columns, [_, rows]) | (_, [rows, ..]) => *rows,
            _ => 0,
        };
        let [first, total] = [offset, tensor.bytes].map(|bytes| (bytes / from.size()) as usize);
        Piece { site, key, bound, is_bias, rows, from, first, total, data }
    }

    /// Why a piece of it could not be written.
    fn refused(&self, error: PieceError, spec: &RangeSpec) -> ModelError {
        match error {
            PieceError::Value(Unrepresentable(x)) if x.is_nan() => {
                ModelError::NotANumber(self.name.to_owned())
            }
            PieceError::Value(Unrepresentable(value)) => {
                ModelError::Unrepresentable { tensor: self.name.to_owned(), value, format: spec.format() }
            }
            PieceError::Other(error) => error,
        }
    }
}

/// Hands the tensors of a range, and no others, to `put`, in the order of the files; returns the digests of the range's
/// modules. `progress` is called after each piece and may stop the load. There are three pieces in memory: one that was
/// handed out, and two on their way.
pub(crate) fn read_tensors(
    checkpoint: &Checkpoint,
    model: &Model,
    spec: &RangeSpec,
    put: &mut dyn FnMut(&Piece<'_>) -> Result<(), PieceError>,
    progress: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
) -> Result<WeightDigests, ModelError> {
    let jobs = jobs(checkpoint, model, spec)?;
    let tensors: Vec<_> = jobs.iter().map(|job| job.tensor).collect();
    let total = tensors.iter().map(|tensor| tensor.bytes).sum();
    let mut read = 0;
    let digests = stream(checkpoint, &tensors, |number, offset, data| {
        let job = &jobs[number];
        put(&job.piece(offset, data)).map_err(|error| job.refused(error, spec))?;
        read += data.len() as u64;
        match progress(LoadedBytes { read, total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ModelError::Cancelled),
        }
    })?;
    let digests = jobs.iter().map(|job| job.name).zip(digests).collect();
    digest::of_range(checkpoint, model, spec, &digests)
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
                    let TensorDType::Float(from) = tensor.dtype else {
                        return Err(ModelError::Format(name.clone()));
                    };
                    jobs.push(Job { name, tensor, from, bound, is_bias, site, key });
                }
            }
        }
    }
    jobs.sort_by_key(|j| j.tensor.place());
    Ok(jobs)
}
