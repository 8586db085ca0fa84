//! The weights of a stage in a GPU's memory, by rows. They are read in pieces, turned into their format by all threads
//! of the processor, and copied from pinned memory while the next piece is. Quantized ones are the same integers and
//! factors that the CPU's kernels have, and every part takes as many bytes as on the CPU.

use std::{collections::BTreeMap, ops::ControlFlow};

use cudarc::driver::CudaEvent;
use half::{bf16, f16};
use strata_proto::{DType, Format, Quantization, WeightDigests};

use crate::{
    engine::StepError,
    kernels::{
        buffer::Element,
        cpu::{
            Cpu, packed,
            quant::{self, Group, SHARE},
        },
        cuda::{
            CudaError, Doing, Gpu,
            gate::Handle,
            memory::{self, Arena, Pinned, Ptr},
            product::Matrix,
        },
        ops::{GROUP, held_format},
    },
    model::{
        LoadedBytes, Model, ModelError, RangeSpec,
        architecture::{Shape, Site, Slot},
        bytes::{self, held, part_bytes},
        load::{Data, Piece, PieceError, read_tensors},
        names::Layout,
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
    pub digests: WeightDigests,
    pub memory: Arena,
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
        let mut weights = Self::empty(gpu, model, spec)?;
        let mut loader = Loader::new(gpu, cpu)?;
        weights.fill_ones(&mut loader)?;
        let mut put = |piece: &Piece<'_>| {
            let part = weights.part(piece.site, piece.key).ok_or_else(|| piece.misplaced())?;
            loader.put(part, piece)
        };
        let read = read_tensors(checkpoint, model, spec, &mut put, progress);
        // Also after an error: what was sent still uses the loader's memory.
        gpu.wait()?;
        weights.digests = read?;
        Ok(weights)
    }

    /// Zeros in place of the tensors of a range.
    pub fn empty(gpu: &Gpu, model: &Model, spec: &RangeSpec) -> Result<Self, CudaError> {
        let bytes = bytes::of_weights(model, spec);
        let mut memory = Arena::new(&gpu.context, bytes)?;
        let mut block = |site: Site| {
            let part = |(key, shape): ((Slot, usize), Shape)| {
                let (format, biased) = (held(model, site, key.0, spec.format()), model.has_bias(site, key));
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
            digests: WeightDigests::default(),
            memory,
        })
    }

    /// The factors of norms that the checkpoint has none of.
    fn fill_ones(&self, loader: &mut Loader<'_>) -> Result<(), CudaError> {
        for site in self.spec.sites(&self.model) {
            for (key, part) in self.block(site).iter().flat_map(|block| &block.0) {
                if let (Part::Norm(n, norm), []) = (part, self.model.bound(site, *key)) {
                    loader.floats(norm.weight, 0, &vec![1.0; *n])?;
                }
            }
        }
        Ok(())
    }

    fn block(&self, site: Site) -> Option<&Block> {
        match site {
            Site::Input => self.input.as_ref(),
            Site::Layer(layer) => self.layers.get(layer.checked_sub(self.spec.layers.first as usize)?),
            Site::Output => self.output.as_ref(),
        }
    }

    fn part(&self, site: Site, key: (Slot, usize)) -> Option<&Part> {
        self.block(site)?.0.get(&key)
    }
}

/// An `(n, k)` matrix at `values`, in the format that it is held in; factors follow the values.
fn matrix(n: usize, k: usize, format: Format, values: Ptr) -> Matrix {
    let format = held_format(k, format);
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
    buffer: Vec<f32>,
    /// Elements of a tensor in another order, until all are there, and the groups that they are.
    staged: Vec<f32>,
    staged_groups: Vec<Option<Group>>,
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
            buffer: Vec::new(),
            staged: Vec::new(),
            staged_groups: Vec::new(),
        })
    }

    /// Writes a piece into its part.
    fn put(&mut self, part: &Part, piece: &Piece<'_>) -> Result<(), PieceError> {
        let Piece { bound, is_bias, rows, first, total, data, .. } = *piece;
        let (layout, first_row) = (bound.layout, bound.first_row);
        let as_stored = match (part, data) {
            (Part::Table(matrix), Data::Stored(bytes, from)) if matrix.format == Format::Float(from) => {
                Some((matrix, first, bytes, from))
            }
            (Part::Product(Projection { matrix, .. }), Data::Stored(bytes, from))
                if !is_bias && layout == Layout::Rows && matrix.format == Format::Float(from) =>
            {
                Some((matrix, first_row * matrix.k + first, bytes, from))
            }
            _ => None,
        };
        if let Some((matrix, first, bytes, from)) = as_stored {
            packed::check_numbers(bytes, from)?;
            let to = matrix.values.offset(first as u64 * from.size());
            return Ok(self.send(to, bytes.len(), |out| out.copy_from_slice(bytes))?);
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let (values, groups) = data.widened(self.cpu, &mut buffer)?;
        match part {
            Part::Norm(_, norm) if is_bias => self.floats(norm.bias, first, values)?,
            Part::Norm(n, norm) => {
                debug_assert!(first + values.len() <= *n);
                let plus = if layout == Layout::PlusOne { 1.0 } else { 0.0 };
                let mut placed = vec![0.0; values.len()];
                // A vector comes in one piece where it is in another order.
                (0..).zip(values).for_each(|(i, x)| placed[layout.row(i)] = x + plus);
                self.floats(norm.weight, first_row + first, &placed)?;
            }
            Part::Product(product) if is_bias => match layout {
                Layout::Heads { .. } | Layout::EvenOdd { .. } | Layout::Swapped { .. } => {
                    let mut placed = vec![0.0; values.len()];
                    (first..).zip(values).for_each(|(i, x)| placed[layout.row(i)] = *x);
                    self.floats(product.bias, first_row, &placed)?;
                }
                _ => self.floats(product.bias, first_row + first, values)?,
            },
            Part::Table(matrix) => self.elements(matrix, first, (values, groups))?,
            Part::Product(product) => {
                let (matrix, k) = (&product.matrix, product.matrix.k);
                match layout {
                    Layout::Rows | Layout::PlusOne => {
                        self.elements(matrix, first_row * k + first, (values, groups))?
                    }
                    Layout::Columns
                    | Layout::Heads { .. }
                    | Layout::EvenOdd { .. }
                    | Layout::Swapped { .. } => {
                        self.staged.extend(values);
                        // Groups lie along rows.
                        if layout != Layout::Columns {
                            self.staged_groups.extend(groups);
                        }
                        if self.staged.len() == total {
                            let staged = std::mem::take(&mut self.staged);
                            let mut placed = vec![0.0; total];
                            place(self.cpu, layout, &staged, (rows, k), &mut placed);
                            drop(staged);
                            let staged = std::mem::take(&mut self.staged_groups);
                            let mut groups = vec![None; staged.len()];
                            if !staged.is_empty() {
                                place_rows(layout, &staged, k / GROUP, &mut groups);
                            }
                            self.elements(matrix, first_row * k, (&placed, &groups))?;
                        }
                    }
                }
            }
        }
        self.buffer = buffer;
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
    fn elements(
        &mut self,
        matrix: &Matrix,
        first: usize,
        (values, own): (&[f32], &[Option<Group>]),
    ) -> Result<(), PieceError> {
        packed::check_fits(self.cpu, values, matrix.format)?;
        const CHUNK: usize = PIECE / 4;
        let mut own = own.chunks(CHUNK / GROUP);
        for (i, values) in values.chunks(CHUNK).enumerate() {
            self.chunk(matrix, first + i * CHUNK, (values, own.next().unwrap_or_default()))?;
        }
        Ok(())
    }

    fn chunk(
        &mut self,
        matrix: &Matrix,
        first: usize,
        (values, own): (&[f32], &[Option<Group>]),
    ) -> Result<(), CudaError> {
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
        let (group, groups, cpu) = (first / GROUP, values.len() / GROUP, self.cpu);
        let (value_bytes, factor_bytes) = group_bytes(quantization);
        let parts = [
            (at(group * value_bytes), groups * value_bytes),
            (factors(group * factor_bytes), groups * factor_bytes),
        ];
        self.send_parts(&parts, |out| {
            let (integers, factors) = out.split_at_mut(groups * value_bytes);
            quantize(cpu, quantization, (values, own), (integers, factors));
        })
    }

    /// Fills pinned memory and copies it, while the other one may still be under way.
    fn send(&mut self, to: Ptr, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<(), CudaError> {
        self.send_parts(&[(to, bytes)], fill)
    }

    /// As [`send`](Self::send), of what lies side by side in pinned memory and goes to several places.
    fn send_parts(&mut self, to: &[(Ptr, usize)], fill: impl FnOnce(&mut [u8])) -> Result<(), CudaError> {
        let stream = &self.gpu.stream;
        let (pinned, copied) = &mut self.staging[self.turn];
        copied.synchronize().doing("copying weights")?;
        let bytes = to.iter().map(|(_, bytes)| bytes).sum();
        let mut staging = &mut pinned.as_mut::<u8>()[..bytes];
        fill(staging);
        for (to, bytes) in to {
            let (part, others) = staging.split_at_mut(*bytes);
            memory::upload(stream, *to, part)?;
            staging = others;
        }
        copied.record(stream).doing("copying weights")?;
        self.turn ^= 1;
        Ok(())
    }
}

fn put<const N: usize>(out: &mut [u8], values: &[f32], bytes: impl Fn(f32) -> [u8; N]) {
    out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, x)| *o = bytes(*x));
}

/// Puts the elements of a whole tensor, of `n` rows in its slot, where they belong there.
fn place(cpu: &Cpu, layout: Layout, elements: &[f32], (n, k): (usize, usize), placed: &mut [f32]) {
    if layout != Layout::Columns {
        return place_rows(layout, elements, k, placed);
    }
    // As many rows to a task as a cache line of the columns holds.
    let mut tasks: Vec<_> = placed.chunks_mut(16 * k).enumerate().collect();
    cpu.each(&mut tasks, |(task, rows)| {
        for (row, out) in rows.chunks_exact_mut(k).enumerate() {
            let column = elements[*task * 16 + row..].iter().step_by(n);
            out.iter_mut().zip(column).for_each(|(o, x)| *o = *x);
        }
    });
}

/// Puts rows of so many items where they belong.
fn place_rows<T: Copy>(layout: Layout, items: &[T], each: usize, placed: &mut [T]) {
    for (row, items) in items.chunks_exact(each).enumerate() {
        placed[layout.row(row) * each..][..each].copy_from_slice(items);
    }
}

/// Bytes of a group's integers, and of what they are multiplied by and added to.
fn group_bytes(quantization: Quantization) -> (usize, usize) {
    match quantization {
        Quantization::Int8 => (GROUP, 2),
        Quantization::Int4 => (GROUP / 2, 4),
    }
}

/// Quantizes values, whole groups, into bytes as they lie on the GPU: integers and factors. `own` is the checkpoint's own
/// groups of the same values, or nothing.
fn quantize(
    cpu: &Cpu,
    quantization: Quantization,
    (values, own): (&[f32], &[Option<Group>]),
    (integers, factors): (&mut [u8], &mut [u8]),
) {
    let (value_bytes, factor_bytes) = group_bytes(quantization);
    let groups = values.as_chunks::<GROUP>().0.chunks(SHARE);
    let out = integers.chunks_mut(SHARE * value_bytes).zip(factors.chunks_mut(SHARE * factor_bytes));
    let own = own.chunks(SHARE).chain(std::iter::repeat(&[][..]));
    let mut tasks: Vec<_> = groups.zip(own).zip(out).collect();
    cpu.each(&mut tasks, |((groups, own), (integers, factors))| {
        let mut quantized = [Group::default(); SHARE];
        let quantized = &mut quantized[..groups.len()];
        quant::quantize_or_keep(cpu, quantization, (groups, own), quantized);
        match quantization {
            Quantization::Int8 => {
                for (out, g) in integers.as_chunks_mut::<GROUP>().0.iter_mut().zip(&*quantized) {
                    *out = g.values.map(|v| v as u8);
                }
                for (out, g) in factors.as_chunks_mut().0.iter_mut().zip(quantized) {
                    *out = g.factor.to_le_bytes();
                }
            }
            Quantization::Int4 => {
                for (out, g) in integers.as_chunks_mut::<{ GROUP / 2 }>().0.iter_mut().zip(&*quantized) {
                    // Of eight values, the first four in the low halves of the bytes, the others in the high ones.
                    for (out, eight) in out.as_chunks_mut::<4>().0.iter_mut().zip(g.values.as_chunks::<8>().0)
                    {
                        *out = std::array::from_fn(|i| eight[i] as u8 | (eight[i + 4] as u8) << 4);
                    }
                }
                for (out, g) in factors.as_chunks_mut::<4>().0.iter_mut().zip(quantized) {
                    out[..2].copy_from_slice(&g.factor.to_le_bytes());
                    out[2..].copy_from_slice(&g.least.to_le_bytes());
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::{isa::Isa, pool::Pool};

    #[test]
    fn many_threads_make_the_bytes_that_each_group_by_itself_makes() {
        let values: Vec<f32> = (0..1003 * GROUP).map(|i| ((i * 7919) as f32 * 0.618).sin().powi(3)).collect();
        let many = Cpu::new(Isa::detect(), Pool::new(5).into());
        let one = Cpu::on(Isa::detect());
        for quantization in Quantization::ALL {
            let (value_bytes, factor_bytes) = group_bytes(quantization);
            let groups = values.len() / GROUP;
            let [mut a, mut b] =
                [(); 2].map(|()| (vec![0; groups * value_bytes], vec![0; groups * factor_bytes]));
            quantize(&many, quantization, (&values, &[]), (&mut a.0, &mut a.1));
            for (i, group) in values.chunks(GROUP).enumerate() {
                let integers = &mut b.0[i * value_bytes..][..value_bytes];
                let factors = &mut b.1[i * factor_bytes..][..factor_bytes];
                quantize(&one, quantization, (group, &[]), (integers, factors));
            }
            assert_eq!(a, b);
        }
    }

    #[test]
    fn tensors_in_another_order_come_to_the_places_that_their_layout_says() {
        let (n, k) = (36, 40);
        let elements: Vec<f32> = (0..n * k).map(|i| i as f32).collect();
        for layout in [
            Layout::Columns,
            Layout::Heads { heads: 3, kv_heads: 3, head_dim: 4 },
            Layout::Heads { heads: 5, kv_heads: 2, head_dim: 4 },
            Layout::Swapped { rows: 36 },
            Layout::EvenOdd { head_dim: 12, pairs: 4 },
        ] {
            let mut placed = vec![-1.0; n * k];
            place(&Cpu::new(Isa::detect(), Pool::new(3).into()), layout, &elements, (n, k), &mut placed);
            for (i, x) in elements.iter().enumerate() {
                let (row, column) = layout.place(i, n, k);
                assert_eq!(placed[row * k + column], *x);
            }
        }
    }
}
