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
    kernels::{
        cpu::{
            Cpu,
            packed::{Unrepresentable, check_not_nan, widen},
            quant::Group,
        },
        ops::GROUP,
    },
    weights::{Checkpoint, Decoder, TensorDType, TensorInfo, WeightsError, stream},
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
    /// Index of the first one in the tensor, or in its part for one expert: a multiple of 32 where groups are whole.
    pub first: usize,
    /// Elements of all of that.
    pub total: usize,
    /// The elements.
    pub data: Data<'a>,
}

/// Elements of a tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Data<'a> {
    /// As the file has them, little-endian, and their format.
    Stored(&'a [u8], DType),
    /// Made of what the file has: their values, and the same as groups, if they are on such a grid.
    Made(&'a [f32], &'a [Option<Group>]),
}

impl<'a> Data<'a> {
    /// How many.
    fn len(self) -> usize {
        match self {
            Data::Stored(bytes, from) => bytes.len() / from.size() as usize,
            Data::Made(values, _) => values.len(),
        }
    }

    /// The first `count`, and the others.
    fn split_at(self, count: usize) -> (Self, Self) {
        match self {
            Data::Stored(bytes, from) => {
                let (own, others) = bytes.split_at(count * from.size() as usize);
                (Data::Stored(own, from), Data::Stored(others, from))
            }
            Data::Made(values, groups) => {
                let (own, others) = values.split_at(count);
                let (own_groups, other_groups) = groups.split_at((count / GROUP).min(groups.len()));
                (Data::Made(own, own_groups), Data::Made(others, other_groups))
            }
        }
    }

    /// Their values, those of the file widened into `buffer`; and groups of them, if there are any.
    ///
    /// # Errors
    /// If one is NaN.
    pub fn widened(
        self,
        cpu: &Cpu,
        buffer: &'a mut Vec<f32>,
    ) -> Result<(&'a [f32], &'a [Option<Group>]), Unrepresentable> {
        match self {
            Data::Stored(bytes, from) => {
                widen(cpu, bytes, from, buffer)?;
                Ok((buffer, &[]))
            }
            Data::Made(values, groups) => {
                check_not_nan(cpu, values)?;
                Ok((values, groups))
            }
        }
    }
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
        PieceError::Other(ModelError::UnclaimedTensors(vec![self.bound.weight.clone()]))
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
    /// The elements of the tensor that begin with number `first`, on their way: a piece for each expert that they are of, where
    /// the tensor holds several.
    fn pieces<'a>(&'a self, first: usize, data: Data<'a>) -> impl Iterator<Item = Piece<'a>> {
        let &Job { tensor, bound, is_bias, site, key: (slot, number), .. } = self;
        let (experts, shape) = match (bound.expert, &tensor.shape[..]) {
            (Some(_), [experts, shape @ ..]) => (*experts, shape),
            (_, shape) => (1, shape),
        };
        let rows = match (bound.layout, shape) {
            (Layout::Columns, [_, rows]) | (_, [rows, ..]) => *rows,
            _ => 0,
        };
        let each = tensor.elements() / experts;
        let (mut at, mut data) = (first, data);
        std::iter::from_fn(move || {
            let (expert, first) = (at / each, at % each);
            let here = data.len().min(each - first);
            let (own, others) = data.split_at(here);
            (data, at) = (others, at + here);
            let key = (slot, number + expert);
            (here > 0).then_some(Piece { site, key, bound, is_bias, rows, first, total: each, data: own })
        })
    }

    /// The same of a tensor of which `rows` alone count: a piece for each that some of the elements are of.
    fn chosen<'a>(
        &'a self,
        rows: &'a [usize],
        first: usize,
        data: Data<'a>,
    ) -> impl Iterator<Item = Piece<'a>> {
        let &Job { tensor, bound, is_bias, site, key, .. } = self;
        let width: usize = tensor.shape.iter().skip(1).product();
        let last = first + data.len();
        rows.iter().enumerate().filter_map(move |(to, row)| {
            let (begin, end) = ((row * width).max(first), ((row + 1) * width).min(last));
            let here = end.checked_sub(begin).filter(|here| *here > 0)?;
            let (own, _) = data.split_at(begin - first).1.split_at(here);
            let (first, total) = (to * width + begin - row * width, rows.len() * width);
            Some(Piece { site, key, bound, is_bias, rows: rows.len(), first, total, data: own })
        })
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
    let (mut read, mut decoder) = (0, Decoder::default());
    let digests = stream(checkpoint, &tensors, |number, offset, data| {
        let job = &jobs[number];
        let mut put = |first, data: Data<'_>| {
            let mut put = |piece: Piece<'_>| put(&piece).map_err(|error| job.refused(error, spec));
            match &job.bound.chosen {
                None => job.pieces(first, data).try_for_each(&mut put),
                Some(rows) => job.chosen(rows, first, data).try_for_each(&mut put),
            }
        };
        match &job.tensor.made {
            None => put((offset / job.from.size()) as usize, Data::Stored(data, job.from))?,
            Some(made) => {
                let wrong =
                    |reason| WeightsError::tensor(checkpoint.file_of(job.tensor), job.name, reason).into();
                decoder.push(&*made.decode, offset, data, wrong, |first, decoded| {
                    put(first, Data::Made(&decoded.values, &decoded.groups))
                })?;
            }
        }
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
            // A tensor of several experts is read once, with the first of them.
            for bound in model.bound(site, key).iter().filter(|bound| bound.expert.is_none_or(|e| e == 0)) {
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
