//! The weights of a stage: packed in the plan's format while they are read, one piece at a time.
//!
//! Matrices are held in the plan's format, rounded to nearest even. Norms and biases stay f32 in every format, exactly
//! as the checkpoint has them: they are small, and nothing is gained by rounding them.

use std::ops::ControlFlow;

use strata_proto::{DType, LayerRange};

use super::{Model, ModelError, blocks::Slot};
use crate::{
    kernels::{
        buffer::{Buffer, OutOfMemory},
        cpu::packed::{PackedMatrix, Table, Unrepresentable, write_f32},
    },
    weights::{Checkpoint, TensorDType, TensorInfo},
};

/// Slots whose matrices are one product, in the order of their outputs.
pub(super) const QKV: &[Slot] = &[Slot::Query, Slot::Key, Slot::Value];
pub(super) const ATTENTION_OUT: &[Slot] = &[Slot::AttentionOut];
pub(super) const GATE_UP: &[Slot] = &[Slot::Gate, Slot::Up];
pub(super) const DOWN: &[Slot] = &[Slot::Down];
pub(super) const HEAD: &[Slot] = &[Slot::Head];

/// Which part of a model a stage holds, and in which format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeSpec {
    /// Its layers.
    pub layers: LayerRange,
    /// With the embedding: exactly if it holds the first layer.
    pub embedding: bool,
    /// With final norm and head: exactly if it holds the last layer.
    pub head: bool,
    /// Format of matrices, residual stream and cache.
    pub dtype: DType,
}

impl RangeSpec {
    pub(super) fn check(&self, model: &Model) -> Result<(), ModelError> {
        let (LayerRange { first, end }, layers) = (self.layers, model.tower.layers.len());
        let within = first < end && end as usize <= layers;
        if within && self.embedding == (first == 0) && self.head == (end as usize == layers) {
            return Ok(());
        }
        Err(ModelError::Range { range: self.layers, embedding: self.embedding, head: self.head, layers })
    }
}

/// Progress of a load, in bytes of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedBytes {
    /// Read so far.
    pub read: u64,
    /// To be read in all.
    pub total: u64,
}

/// Packed weights of one product, `(sum of the slots' rows, columns)`, and their bias.
pub(super) struct Projection {
    pub matrix: PackedMatrix,
    pub bias: Option<Buffer<f32>>,
}

impl Projection {
    fn shape(model: &Model, slots: &[Slot], layer: usize) -> (usize, usize) {
        let shapes = slots.iter().map(|s| model.tower.shape(*s, layer));
        shapes.fold((0, 0), |(rows, _), shape| (rows + shape[0], shape[1]))
    }

    pub fn bytes_for(model: &Model, slots: &[Slot], layer: usize, dtype: DType) -> u64 {
        let (n, k) = Self::shape(model, slots, layer);
        let bias = if model.has_bias(slots, layer) { Buffer::<f32>::bytes_for(n) } else { 0 };
        PackedMatrix::bytes_for(n, k, dtype) + bias
    }

    fn zeros(model: &Model, slots: &[Slot], layer: usize, dtype: DType) -> Result<Self, OutOfMemory> {
        let (n, k) = Self::shape(model, slots, layer);
        // A slot without a bias beside one with a bias adds zero.
        let bias = model.has_bias(slots, layer).then(|| Buffer::zeros(n)).transpose()?;
        Ok(Projection { matrix: PackedMatrix::zeros(n, k, dtype)?, bias })
    }

    fn bytes(&self) -> u64 {
        self.matrix.bytes() + self.bias.as_ref().map_or(0, Buffer::bytes)
    }

    fn write(&mut self, first_row: usize, piece: &Piece<'_>) -> Result<(), Unrepresentable> {
        match &mut self.bias {
            Some(bias) if piece.is_bias => write_f32(bias, first_row + piece.first, piece.data, piece.from),
            _ => self.matrix.write(first_row * self.matrix.k() + piece.first, piece.data, piece.from),
        }
    }
}

/// Weights of one layer.
pub(super) struct LayerWeights {
    pub attention_norm: Buffer<f32>,
    /// On each head of queries and of keys.
    pub qk_norm: Option<[Buffer<f32>; 2]>,
    pub qkv: Projection,
    pub attention_out: Projection,
    pub ffn_norm: Buffer<f32>,
    pub gate_up: Projection,
    pub down: Projection,
}

impl LayerWeights {
    pub fn bytes_for(model: &Model, layer: usize, dtype: DType) -> u64 {
        let projections = [QKV, ATTENTION_OUT, GATE_UP, DOWN];
        let attention = &model.tower.layers[layer].attention;
        let head_norms = if attention.qk_norm.is_some() { 2 } else { 0 };
        2 * Buffer::<f32>::bytes_for(model.tower.width)
            + head_norms * Buffer::<f32>::bytes_for(attention.head_dim)
            + projections.iter().map(|p| Projection::bytes_for(model, p, layer, dtype)).sum::<u64>()
    }

    fn zeros(model: &Model, layer: usize, dtype: DType) -> Result<Self, OutOfMemory> {
        let attention = &model.tower.layers[layer].attention;
        let head_norm = || Buffer::zeros(attention.head_dim);
        let qk_norm = match attention.qk_norm {
            Some(_) => Some([head_norm()?, head_norm()?]),
            None => None,
        };
        Ok(LayerWeights {
            qk_norm,
            attention_norm: Buffer::zeros(model.tower.width)?,
            qkv: Projection::zeros(model, QKV, layer, dtype)?,
            attention_out: Projection::zeros(model, ATTENTION_OUT, layer, dtype)?,
            ffn_norm: Buffer::zeros(model.tower.width)?,
            gate_up: Projection::zeros(model, GATE_UP, layer, dtype)?,
            down: Projection::zeros(model, DOWN, layer, dtype)?,
        })
    }

    fn bytes(&self) -> u64 {
        let projections = [&self.qkv, &self.attention_out, &self.gate_up, &self.down];
        let head_norms = self.qk_norm.iter().flatten().map(Buffer::bytes).sum::<u64>();
        head_norms
            + self.attention_norm.bytes()
            + self.ffn_norm.bytes()
            + projections.iter().map(|p| p.bytes()).sum::<u64>()
    }
}

/// Final norm and head.
pub(super) struct HeadWeights {
    pub norm: Buffer<f32>,
    pub projection: Projection,
}

impl HeadWeights {
    pub fn bytes_for(model: &Model, dtype: DType) -> u64 {
        Buffer::<f32>::bytes_for(model.tower.width) + Projection::bytes_for(model, HEAD, 0, dtype)
    }
}

/// The weights of a stage, resident.
pub struct StageWeights {
    pub(super) model: Model,
    pub(super) spec: RangeSpec,
    /// Absent if the head is here and tied: then rows are gathered from the packed head.
    pub(super) embedding: Option<Table>,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) head: Option<HeadWeights>,
}

/// Some elements of a tensor on their way into memory.
struct Piece<'a> {
    is_bias: bool,
    /// Index of the first element in its tensor.
    first: usize,
    data: &'a [u8],
    from: DType,
}

/// A tensor to be read.
struct Job<'a> {
    name: &'a str,
    tensor: &'a TensorInfo,
    slot: Slot,
    layer: usize,
    is_bias: bool,
}

impl StageWeights {
    /// Reads the tensors of a range, and no others, in the order of the files. `progress` is called after each piece
    /// and may stop the load. Beside the weights, one piece is in memory at a time.
    pub fn load(
        checkpoint: &Checkpoint,
        model: &Model,
        spec: &RangeSpec,
        progress: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
    ) -> Result<Self, ModelError> {
        spec.check(model)?;
        let mut weights = Self::zeros(model, spec)?;
        let jobs = weights.jobs(checkpoint, model)?;
        let total = jobs.iter().map(|j| j.tensor.bytes).sum();
        let (mut read, mut buffer) = (0, Vec::new());
        for job in jobs {
            let TensorDType::Float(from) = job.tensor.dtype else {
                return Err(ModelError::Format(job.name.to_owned()));
            };
            checkpoint.read(job.tensor, &mut buffer, |offset, data| {
                let first = (offset / from.size()) as usize;
                let piece = Piece { is_bias: job.is_bias, first, data, from };
                weights.write(job.slot, job.layer, &piece).map_err(|e| ModelError::Unrepresentable {
                    tensor: job.name.to_owned(),
                    value: e.0,
                    dtype: spec.dtype,
                })?;
                read += data.len() as u64;
                match progress(LoadedBytes { read, total }) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(ModelError::Cancelled),
                }
            })?;
        }
        Ok(weights)
    }

    /// What it holds.
    pub fn spec(&self) -> &RangeSpec {
        &self.spec
    }

    /// The model it is a part of.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Bytes of memory it occupies: exactly what the model's profile says.
    pub fn resident_bytes(&self) -> u64 {
        let head = self.head.as_ref().map_or(0, |h| h.norm.bytes() + h.projection.bytes());
        let layers: u64 = self.layers.iter().map(LayerWeights::bytes).sum();
        self.embedding.as_ref().map_or(0, Table::bytes) + layers + head
    }

    fn zeros(model: &Model, spec: &RangeSpec) -> Result<Self, ModelError> {
        let (width, vocab) = (model.tower.width, model.tower.vocab);
        let own_table = spec.embedding && !(spec.head && model.is_tied());
        let mut weights = StageWeights {
            model: model.clone(),
            spec: *spec,
            embedding: own_table.then(|| Table::zeros(vocab, width, spec.dtype)).transpose()?,
            layers: Vec::with_capacity(spec.layers.len() as usize),
            head: None,
        };
        for layer in spec.layers.first..spec.layers.end {
            weights.layers.push(LayerWeights::zeros(model, layer as usize, spec.dtype)?);
        }
        if spec.head {
            let projection = Projection::zeros(model, HEAD, 0, spec.dtype)?;
            weights.head = Some(HeadWeights { norm: Buffer::zeros(width)?, projection });
        }
        Ok(weights)
    }

    /// The tensors of this stage, as they lie in the files.
    fn jobs<'a>(&self, checkpoint: &'a Checkpoint, model: &'a Model) -> Result<Vec<Job<'a>>, ModelError> {
        let mut slots = Vec::new();
        if self.embedding.is_some() {
            slots.push((Slot::Embedding, 0));
        }
        for layer in self.spec.layers.first..self.spec.layers.end {
            let all = [&[Slot::AttentionNorm, Slot::FfnNorm], QKV, ATTENTION_OUT, GATE_UP, DOWN];
            slots.extend(all.concat().into_iter().map(|slot| (slot, layer as usize)));
            if model.tower.layers[layer as usize].attention.qk_norm.is_some() {
                slots.extend([(Slot::QueryNorm, layer as usize), (Slot::KeyNorm, layer as usize)]);
            }
        }
        if self.head.is_some() {
            slots.extend([(Slot::FinalNorm, 0), (Slot::Head, 0)]);
        }
        let mut jobs = Vec::new();
        for (slot, layer) in slots {
            let bound = model.bound(slot, layer)?;
            for (name, is_bias) in [(Some(&bound.weight), false), (bound.bias.as_ref(), true)] {
                let Some(name) = name else { continue };
                let missing = || ModelError::MissingTensor(name.clone());
                let tensor = checkpoint.tensor(name).ok_or_else(missing)?;
                jobs.push(Job { name, tensor, slot, layer, is_bias });
            }
        }
        jobs.sort_by_key(|j| j.tensor.place());
        Ok(jobs)
    }

    fn write(&mut self, slot: Slot, layer: usize, piece: &Piece<'_>) -> Result<(), Unrepresentable> {
        let rows = |slot| self.model.tower.shape(slot, layer)[0];
        let first_row = match slot {
            Slot::Key => rows(Slot::Query),
            Slot::Value => rows(Slot::Query) + rows(Slot::Key),
            Slot::Up => rows(Slot::Gate),
            _ => 0,
        };
        let vector = |v: &mut Buffer<f32>| write_f32(v, piece.first, piece.data, piece.from);
        match slot {
            Slot::Embedding => {
                self.embedding.as_mut().map_or(Ok(()), |t| t.write(piece.first, piece.data, piece.from))
            }
            Slot::FinalNorm => self.head.as_mut().map_or(Ok(()), |h| vector(&mut h.norm)),
            Slot::Head => self.head.as_mut().map_or(Ok(()), |h| h.projection.write(first_row, piece)),
            _ => {
                let l = &mut self.layers[layer - self.spec.layers.first as usize];
                match slot {
                    Slot::AttentionNorm => vector(&mut l.attention_norm),
                    Slot::FfnNorm => vector(&mut l.ffn_norm),
                    Slot::QueryNorm | Slot::KeyNorm => {
                        let which = usize::from(slot == Slot::KeyNorm);
                        l.qk_norm.as_mut().map_or(Ok(()), |norms| vector(&mut norms[which]))
                    }
                    Slot::AttentionOut => l.attention_out.write(first_row, piece),
                    Slot::Gate | Slot::Up => l.gate_up.write(first_row, piece),
                    Slot::Down => l.down.write(first_row, piece),
                    _ => l.qkv.write(first_row, piece),
                }
            }
        }
    }
}
