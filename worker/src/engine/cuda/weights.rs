//! The weights of a stage in a GPU's memory, by rows. They are read in pieces, turned into their format by the processor,
//! and copied from pinned memory while the next piece is read. Quantized ones are the same integers and factors that the
//! CPU's kernels have, and every part takes as many bytes as on the CPU.

use std::{collections::BTreeMap, ops::ControlFlow};

use cudarc::driver::CudaEvent;
use half::{bf16, f16};
use strata_proto::{DType, Format, Quantization};

use crate::{
    kernels::{
        buffer::Element,
        cpu::{
            Cpu,
            packed::{self, PackedMatrix},
            quant::{self, GROUP},
        },
        cuda::{
            CudaError, Doing, Gpu,
            gate::Handle,
            memory::{self, Arena, Pinned, Ptr},
            product::Matrix,
        },
    },
    model::{
        LoadedBytes, Model, ModelError, RangeSpec, StepError,
        blocks::{Shape, Site, Slot},
        load::{Piece, PieceError, read_tensors},
        names::Layout,
        stage::{held, part_bytes},
    },
    weights::{Checkpoint, PIECE},
};

/// Factors of a norm, and its bias, or null; both f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct NormWeights {
    pub weight: Ptr,
    pub bias: Ptr,
}

/// Weights of a product and their bias, or null.
#[derive(Debug, Clone, Copy)]
pub(super) struct Projection {
    pub matrix: Matrix,
    pub bias: Ptr,
}

/// What fills one slot.
enum Part {
    Norm(usize, NormWeights),
    Table(Matrix),
    Product(Projection),
}

/// The weights of one site, by slot and expert.
#[derive(Default)]
pub(super) struct Block(BTreeMap<(Slot, usize), Part>);

impl Block {
    /// The norm in `slot`.
    pub fn norm(&self, slot: Slot) -> Result<NormWeights, StepError> {
        match self.0.get(&(slot, 0)) {
            Some(Part::Norm(_, norm)) => Ok(*norm),
            _ => Err(StepError::Weights),
        }
    }

    /// The product in `slot`, of `expert` where there are several.
    pub fn product(&self, slot: Slot, expert: usize) -> Result<Projection, StepError> {
        match self.0.get(&(slot, expert)) {
            Some(Part::Product(product)) => Ok(*product),
            _ => Err(StepError::Weights),
        }
    }

    /// The table in `slot`, if it is here.
    pub fn table(&self, slot: Slot) -> Option<Matrix> {
        match self.0.get(&(slot, 0)) {
            Some(Part::Table(table)) => Some(*table),
            _ => None,
        }
    }
}

/// The weights of a stage, resident on a GPU.
pub(super) struct Weights {
    pub model: Model,
    pub spec: RangeSpec,
    pub input: Option<Block>,
    pub layers: Vec<Block>,
    pub output: Option<Block>,
    pub bytes: u64,
    _memory: Arena,
}

impl Weights {
    /// Reads the tensors of a range.
    pub fn load(
        gpu: &Gpu,
        cpu: &Cpu,
        checkpoint: &Checkpoint,
        model: &Model,
        spec: &RangeSpec,
        progress: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
    ) -> Result<Self, ModelError> {
        spec.check(model)?;
        let weights = Self::empty(gpu, model, spec)?;
        let mut loader = Loader::new(gpu, cpu)?;
        let mut put = |piece: &Piece<'_>| {
            let part = weights.part(piece.site, piece.key).ok_or_else(|| piece.misplaced())?;
            loader.put(part, piece)
        };
        let read = read_tensors(checkpoint, model, spec, &mut put, progress);
        // Also after an error: what was sent still uses the loader's memory.
        gpu.wait()?;
        read.map(|()| weights)
    }

    /// Zeros in place of the tensors of a range.
    pub fn empty(gpu: &Gpu, model: &Model, spec: &RangeSpec) -> Result<Self, CudaError> {
        let bytes = spec.sites(model).map(|site| spec.bytes_of(model, site)).sum();
        let mut memory = Arena::new(&gpu.context, bytes)?;
        let mut block = |site: Site| {
            let part = |(key, shape): ((Slot, usize), Shape)| {
                let (format, biased) = (held(site, key.0, spec.format()), model.has_bias(site, key));
                let weight = memory.take(part_bytes(shape, false, format))?;
                let bias = match shape {
                    Shape::Norm(n) | Shape::Product(n, _) if biased => memory.take(n as u64 * 4)?,
                    _ => Ptr::NULL,
                };
                let part = match shape {
                    Shape::Norm(n) => Part::Norm(n, NormWeights { weight, bias }),
                    Shape::Table(n, k) => Part::Table(matrix(n, k, format, weight)),
                    Shape::Product(n, k) => {
                        Part::Product(Projection { matrix: matrix(n, k, format, weight), bias })
                    }
                };
                Ok((key, part))
            };
            spec.parts(model, site).map(part).collect::<Result<_, CudaError>>().map(Block)
        };
        let layers = spec.layers.first as usize..spec.layers.end as usize;
        Ok(Weights {
            model: model.clone(),
            spec: *spec,
            input: spec.embedding.then(|| block(Site::Input)).transpose()?,
            layers: layers.map(|layer| block(Site::Layer(layer))).collect::<Result<_, _>>()?,
            output: spec.head.then(|| block(Site::Output)).transpose()?,
            bytes,
            _memory: memory,
        })
    }

    fn part(&self, site: Site, key: (Slot, usize)) -> Option<&Part> {
        let block = match site {
            Site::Input => self.input.as_ref(),
            Site::Layer(layer) => self.layers.get(layer.checked_sub(self.spec.layers.first as usize)?),
            Site::Output => self.output.as_ref(),
        };
        block?.0.get(&key)
    }
}

/// An `(n, k)` matrix at `values`, in the format that it is held in; factors follow the values.
fn matrix(n: usize, k: usize, format: Format, values: Ptr) -> Matrix {
    let format = PackedMatrix::held(k, format);
    let bytes = match format {
        Format::Float(dtype) => (n * k) as u64 * dtype.size(),
        Format::Quantized(Quantization::Int8) => (n * k) as u64,
        Format::Quantized(Quantization::Int4) => (n * k / 2) as u64,
    };
    Matrix { format, n, k, values, factors: values.offset(bytes) }
}

/// Carries pieces of tensors to the GPU.
struct Loader<'a> {
    gpu: &'a Gpu,
    cpu: &'a Cpu,
    /// Two, so that one is filled while the other is copied; and when each was last copied.
    staging: [(Pinned, Handle<CudaEvent>); 2],
    turn: usize,
    values: Vec<f32>,
    /// Elements of a tensor in another order, until all are there.
    staged: Vec<f32>,
}

impl<'a> Loader<'a> {
    fn new(gpu: &'a Gpu, cpu: &'a Cpu) -> Result<Self, CudaError> {
        let staging = || {
            // A piece of 16-bit elements that becomes f32 is twice as long.
            let pinned = Pinned::new(&gpu.context, 2 * PIECE)?;
            Ok((pinned, Handle::new(|| gpu.context.new_event(None)).doing("making an event")?))
        };
        Ok(Loader {
            gpu,
            cpu,
            staging: [staging()?, staging()?],
            turn: 0,
            values: Vec::new(),
            staged: Vec::new(),
        })
    }

    /// Writes a piece into its part.
    fn put(&mut self, part: &Part, piece: &Piece<'_>) -> Result<(), PieceError> {
        let Piece { bound, is_bias, rows, from, first, total, data, .. } = *piece;
        let (layout, first_row) = (bound.layout, bound.first_row);
        let as_stored = match part {
            Part::Table(matrix) if matrix.format == Format::Float(from) => Some((matrix, first)),
            Part::Product(Projection { matrix, .. })
                if !is_bias && layout == Layout::Rows && matrix.format == Format::Float(from) =>
            {
                Some((matrix, first_row * matrix.k + first))
            }
            _ => None,
        };
        if let Some((matrix, first)) = as_stored {
            packed::check_numbers(data, from)?;
            let to = matrix.values.offset(first as u64 * from.size());
            return Ok(self.send(to, data.len(), |out| out.copy_from_slice(data))?);
        }
        let mut values = std::mem::take(&mut self.values);
        packed::widen(data, from, &mut values)?;
        match part {
            Part::Norm(_, norm) if is_bias => self.floats(norm.bias, first, &values)?,
            Part::Norm(n, norm) => {
                debug_assert!(first + values.len() <= *n);
                let plus = if layout == Layout::PlusOne { 1.0 } else { 0.0 };
                values.iter_mut().for_each(|x| *x += plus);
                self.floats(norm.weight, first, &values)?;
            }
            Part::Product(product) if is_bias => match layout {
                Layout::Heads { .. } => {
                    let mut placed = vec![0.0; values.len()];
                    (first..).zip(&values).for_each(|(i, x)| placed[layout.row(i)] = *x);
                    self.floats(product.bias, first_row, &placed)?;
                }
                _ => self.floats(product.bias, first_row + first, &values)?,
            },
            Part::Table(matrix) => self.elements(matrix, first, &values)?,
            Part::Product(product) => {
                let (matrix, k) = (&product.matrix, product.matrix.k);
                match layout {
                    Layout::Rows | Layout::PlusOne => {
                        self.elements(matrix, first_row * k + first, &values)?
                    }
                    Layout::Columns | Layout::Heads { .. } => {
                        self.staged.extend(&values);
                        if self.staged.len() == total {
                            let staged = std::mem::take(&mut self.staged);
                            let mut placed = vec![0.0; total];
                            for (i, x) in staged.into_iter().enumerate() {
                                let (row, column) = layout.place(i, rows, k);
                                placed[row * k + column] = x;
                            }
                            self.elements(matrix, first_row * k, &placed)?;
                        }
                    }
                }
            }
        }
        self.values = values;
        Ok(())
    }

    fn floats(&mut self, to: Ptr, first: usize, values: &[f32]) -> Result<(), CudaError> {
        for (i, values) in values.chunks(PIECE / 4).enumerate() {
            let at = to.offset(4 * (first + i * (PIECE / 4)) as u64);
            self.send(at, 4 * values.len(), |out| put(out, values, f32::to_le_bytes))?;
        }
        Ok(())
    }

    /// Writes elements of a matrix from its element `first` on; both are whole groups where it is quantized.
    fn elements(&mut self, matrix: &Matrix, first: usize, values: &[f32]) -> Result<(), PieceError> {
        packed::check_fits(values, matrix.format)?;
        const CHUNK: usize = PIECE / 4;
        for (i, values) in values.chunks(CHUNK).enumerate() {
            self.chunk(matrix, first + i * CHUNK, values)?;
        }
        Ok(())
    }

    fn chunk(&mut self, matrix: &Matrix, first: usize, values: &[f32]) -> Result<(), CudaError> {
        let at = |bytes: usize| matrix.values.offset(bytes as u64);
        let factors = |bytes: usize| matrix.factors.offset(bytes as u64);
        let quantization = match matrix.format {
            Format::Float(DType::F32) => return self.floats(matrix.values, first, values),
            Format::Float(DType::BF16) => {
                let bytes = |x| <bf16 as Element>::from_f32(x).to_le_bytes();
                return self.send(at(2 * first), 2 * values.len(), |out| put(out, values, bytes));
            }
            Format::Float(DType::F16) => {
                let bytes = |x| f16::from_f32(x).to_le_bytes();
                return self.send(at(2 * first), 2 * values.len(), |out| put(out, values, bytes));
            }
            Format::Quantized(quantization) => quantization,
        };
        let groups: Vec<_> = values.as_chunks::<GROUP>().0.iter().collect();
        let quantized = quant::quantize(self.cpu, quantization, &groups);
        let group = first / GROUP;
        match quantization {
            Quantization::Int8 => {
                self.send(at(first), values.len(), |out| {
                    for (out, g) in out.as_chunks_mut::<GROUP>().0.iter_mut().zip(&quantized) {
                        *out = g.values.map(|v| v as u8);
                    }
                })?;
                self.send(factors(2 * group), 2 * quantized.len(), |out| {
                    for (out, g) in out.as_chunks_mut().0.iter_mut().zip(&quantized) {
                        *out = g.factor.to_le_bytes();
                    }
                })
            }
            Quantization::Int4 => {
                self.send(at(first / 2), values.len() / 2, |out| {
                    let groups = out.as_chunks_mut::<{ GROUP / 2 }>().0.iter_mut().zip(&quantized);
                    for (out, g) in groups {
                        // Of eight values, the first four in the low halves of the bytes, the others in the high ones.
                        for (out, eight) in
                            out.as_chunks_mut::<4>().0.iter_mut().zip(g.values.as_chunks::<8>().0)
                        {
                            *out = std::array::from_fn(|i| eight[i] as u8 | (eight[i + 4] as u8) << 4);
                        }
                    }
                })?;
                self.send(factors(4 * group), 4 * quantized.len(), |out| {
                    for (out, g) in out.as_chunks_mut::<4>().0.iter_mut().zip(&quantized) {
                        out[..2].copy_from_slice(&g.factor.to_le_bytes());
                        out[2..].copy_from_slice(&g.least.to_le_bytes());
                    }
                })
            }
        }
    }

    /// Fills pinned memory and copies it, while the other one may still be under way.
    fn send(&mut self, to: Ptr, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<(), CudaError> {
        let stream = &self.gpu.stream;
        let (pinned, copied) = &mut self.staging[self.turn];
        copied.synchronize().doing("copying weights")?;
        let staging = &mut pinned.as_mut::<u8>()[..bytes];
        fill(staging);
        memory::upload(stream, to, staging)?;
        copied.record(stream).doing("copying weights")?;
        self.turn ^= 1;
        Ok(())
    }
}

fn put<const N: usize>(out: &mut [u8], values: &[f32], bytes: impl Fn(f32) -> [u8; N]) {
    out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, x)| *o = bytes(*x));
}
