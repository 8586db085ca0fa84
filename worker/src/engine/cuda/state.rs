//! What a stage on a GPU keeps between steps: cache, scratch, and recorded steps; and the way of a step's inputs and
//! results between host and GPU.

use std::collections::{BTreeSet, HashMap};

use strata_proto::DType;

use super::{recordings::Recordings, sampling::Sampling, size, weights::Weights, workspace::Scratch};
use crate::{
    engine::{Allocated, Caches, Limits, Size, StepError, Values, check_carried},
    kernels::{
        cpu::Cpu,
        cuda::{
            self, CudaError, DeviceTensors, Gpu,
            activations::Slots,
            launch::{Kernels, RawCache},
            limits::{ENTRIES, LONG_ROWS, MAX_ACTIVE, SLOTS},
            memory::{self, Arena, Memory, Pinned, Ptr},
        },
        ops::{BLOCK_TOKENS, BatchRow, kv_elements},
        tensor::bytes_of,
    },
    model::{
        ModelError,
        architecture::{Ffn, Tower},
        bytes,
        widths::padded,
    },
    sampler::Draw,
    transport::Tensors,
};

/// The words of a step's inputs, one after the other in one buffer, so that they travel in one copy and lie at the same
/// places whenever a step has as many tokens, rows and outputs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Inputs {
    pub ids: Ptr,
    pub positions: Ptr,
    pub row_of: Ptr,
    pub segments: Ptr,
    pub sets: Ptr,
    pub row_first: Ptr,
    pub row_start: Ptr,
    pub row_count: Ptr,
    pub first_block: Ptr,
    /// Rows of one token, then the others.
    pub by_length: Ptr,
    pub outputs: Ptr,
    pub tables: Ptr,
}

/// A step that has been checked.
pub(super) struct Checked<'a> {
    pub weights: &'a Weights,
    /// Padding comes last.
    pub rows: &'a [BatchRow<'a>],
    /// Of all rows.
    pub tokens: usize,
    /// Rows, of one token each, that stand for nothing.
    pub padding: usize,
    /// Whether steps of as many rows are alike, and recorded.
    pub is_recorded: bool,
    /// Of all tokens, but those that padding stands for; none where the residual stream comes from another stage.
    pub ids: &'a [u32],
    /// Their segments; none if all are 0.
    pub segments: &'a [u32],
    pub outputs: &'a [u32],
    /// For each output the token to be drawn; `None` if all values are wanted.
    pub draws: &'a [Option<Draw<'a>>],
}

impl<'a> Checked<'a> {
    pub fn tower(&self) -> &'a Tower {
        &self.weights.model.tower
    }

    /// Blocks up to the last token of a row.
    fn blocks(&self, row: &BatchRow<'_>) -> usize {
        match self.tower().caches {
            true => ((row.start + row.count) as usize).div_ceil(BLOCK_TOKENS),
            false => 0,
        }
    }

    /// Outputs that the head computes: in a recorded step, as many as rows.
    pub fn outputs(&self) -> usize {
        let all = self.is_recorded && self.weights.output.is_some();
        if all { self.rows.len() } else { self.outputs.len() }
    }
}

/// Cache and scratch of a stage on a GPU, allocated once.
pub(super) struct State {
    pub limits: Limits,
    pub element: DType,
    /// Whether there are quantized weights.
    pub is_quantized: bool,
    /// By width of a head.
    pub kernels: HashMap<usize, Kernels>,
    pub cache: Caches<RawCache>,
    pub scratch: Scratch,
    allocated: Allocated,
    slots: Option<Slots>,
    pub(super) recordings: Recordings,
    /// Rows that come from the host, on their way.
    staging: Pinned,
    /// A step's inputs, here and there.
    words: Pinned,
    capacity: usize,
    inputs: Ptr,
    /// Values that come back.
    values: Pinned,
    order: Vec<u32>,
    pub sampling: Sampling,
    cpu: Cpu,
    _memory: Arena,
    _inputs: Memory,
}

impl State {
    pub fn new(gpu: &Gpu, weights: &Weights, size: Size, cpu: Cpu) -> Result<Self, ModelError> {
        let Weights { model, spec, .. } = weights;
        let (tower, element) = (&model.tower, spec.dtype);
        let outputs = if spec.head { size.outputs } else { 0 };
        check_carried(model)?;
        size::check(tower, size, outputs)?;
        let limits =
            Limits { spec: *spec, kv_blocks: size.kv_blocks, max_tokens: size.tokens, max_outputs: outputs };
        let bytes = bytes::of_state(model, spec, size.kv_blocks, size.tokens, outputs);
        let mut memory = Arena::new(&gpu.context, bytes)?;
        let mut kv_bytes = 0;
        let cache = Caches::new(model, spec, |a| {
            let elements = kv_elements(a.kv_heads, a.head_dim) * BLOCK_TOKENS;
            let half = u64::from(size.kv_blocks) * (elements / 2) as u64 * element.size();
            kv_bytes += 2 * half;
            Ok::<_, ModelError>(RawCache { keys: memory.take(half)?, values: memory.take(half)? })
        })?;
        let layers = &tower.layers[spec.layers.first as usize..spec.layers.end as usize];
        let head_dims: BTreeSet<_> = layers.iter().map(|layer| layer.attention.head_dim).collect();
        let head_dims = Vec::from_iter(head_dims);
        gpu.compile(element, &head_dims)?;
        let kernels = head_dims.iter().map(|width| Ok((*width, gpu.kernels(element, *width)?)));
        let kernels = kernels.collect::<Result<_, CudaError>>()?;
        let (compiled, read) = cuda::counts();
        tracing::info!("kernels: {compiled} compiled, {read} from the cache");
        for layer in layers {
            if layer.attention.shares.is_some() {
                return Err(ModelError::Unsupported {
                    processor: "a GPU",
                    with: "whose layers share keys and values",
                    instead: "take the device cpu",
                });
            }
            // The pairs of one token and its experts must have room.
            let most = MAX_ACTIVE.min(padded(size.tokens));
            if let Ffn::Moe(moe) = layer.ffn
                && moe.active > most
            {
                let text = format!("{} experts per token: a GPU takes at most {most}", moe.active);
                return Err(ModelError::Device(text));
            }
        }
        let (tokens, rows) = (size.tokens as usize, outputs as usize);
        let scratch = Scratch::new(gpu, tower, &limits, &mut memory)?;
        let longest = tower.context.div_ceil(BLOCK_TOKENS);
        let capacity = 10 * tokens + rows + LONG_ROWS.min(tokens) * longest;
        let inputs = Memory::new(&gpu.context, 4 * capacity as u64)?;
        let width = tower.width as u64 * element.size();
        let slots = match spec.head {
            true => None,
            false => {
                let longest = tower.activation(tokens, element);
                Some(Slots::new(&gpu.context, &longest, SLOTS)?)
            }
        };
        Ok(State {
            limits,
            element,
            is_quantized: spec.quantization.is_some(),
            kernels,
            cache,
            scratch,
            allocated: Allocated { kv_bytes, workspace_bytes: bytes - kv_bytes },
            slots,
            recordings: Recordings::new(if spec.head { tokens.min(rows) } else { tokens }),
            staging: Pinned::new(&gpu.context, if spec.embedding { 0 } else { tokens * width as usize })?,
            words: Pinned::new(&gpu.context, 4 * capacity)?,
            capacity,
            inputs: inputs.ptr(),
            values: Pinned::new(&gpu.context, 4 * rows * tower.outputs())?,
            order: vec![0; rows * tower.outputs()],
            sampling: Sampling::new(gpu, rows, tower.outputs(), ENTRIES)?,
            cpu,
            _memory: memory,
            _inputs: inputs,
        })
    }

    pub fn allocated(&self) -> Allocated {
        self.allocated
    }

    /// How many rows a step is given, if it is one of those that are recorded: every row has one token, and the head
    /// has something to do if it is here.
    pub fn padded(&self, tower: &Tower, rows: &[BatchRow<'_>], outputs: &[u32]) -> Option<usize> {
        let single = rows.iter().all(|r| r.count == 1);
        let idle = self.limits.spec.head && outputs.is_empty();
        self.recordings.padded(rows.len()).filter(|_| single && !idle && tower.caches)
    }

    /// Asks for what a step yields: values and tokens, or the residual stream, which is there when the GPU is done.
    pub fn ask_for_results(
        &mut self,
        gpu: &Gpu,
        step: &Checked<'_>,
    ) -> Result<Option<DeviceTensors>, StepError> {
        let Some(slots) = &self.slots else {
            let kernels = self.kernels.values().next().ok_or(StepError::Weights)?;
            self.sampling.ask(gpu, step.draws)?;
            self.sampling.start(gpu, kernels, self.scratch.values)?;
            self.sampling.fetch(gpu)?;
            self.fetch(gpu, step.tower().outputs(), step.outputs.len())?;
            return Ok(None);
        };
        let rows = step.tokens - step.padding;
        let tensors = slots.tensors(step.tower().activation(rows, self.element))?;
        let bytes = (rows * step.tower().width) as u64 * self.element.size();
        memory::copy(&gpu.stream, tensors.first(), self.scratch.residual, bytes)?;
        Ok(Some(tensors))
    }

    /// Sends a step's inputs.
    pub fn upload(&mut self, gpu: &Gpu, step: &Checked<'_>) -> Result<Inputs, StepError> {
        let &Checked { rows, tokens, ids, segments, outputs, .. } = step;
        let blocks: usize = rows.iter().map(|row| step.blocks(row)).sum();
        let (count, computed) = (rows.len(), step.outputs());
        let total = 5 * tokens + 5 * count + computed + blocks;
        if total > self.capacity {
            let text =
                format!("the block tables of this step take {total} words: expected {}", self.capacity);
            return Err(StepError::Device(text));
        }
        let (mut rest, mut at) = (&mut self.words.as_mut::<u32>()[..total], self.inputs);
        // Fills the next part of the buffer, and says where it lies.
        let mut put = |values: &mut dyn Iterator<Item = u32>, count: usize| {
            let (part, more) = std::mem::take(&mut rest).split_at_mut(count);
            part.iter_mut().zip(values).for_each(|(word, value)| *word = value);
            let here = at;
            (rest, at) = (more, at.offset(4 * count as u64));
            here
        };
        let zeros = || std::iter::repeat(0);
        let per_token = |f: &dyn Fn(usize, &BatchRow<'_>, u32) -> u32| -> Vec<u32> {
            let each = rows.iter().enumerate();
            each.flat_map(|(r, row)| (0..row.count).map(move |i| f(r, row, i))).collect()
        };
        // The sum of what comes before each row.
        let before = |f: &dyn Fn(&BatchRow<'_>) -> u32| -> Vec<u32> {
            let sums = rows.iter().scan(0, |sum, row| Some(std::mem::replace(sum, *sum + f(row))));
            sums.collect()
        };
        let tables = rows.iter().flat_map(|r| r.blocks[..step.blocks(r)].iter().copied());
        let real = count - step.padding;
        let counts = |(r, row): (usize, &BatchRow<'_>)| if r < real { row.count } else { 0 };
        let inputs = Inputs {
            ids: put(&mut ids.iter().copied().chain(zeros()), tokens),
            positions: put(&mut per_token(&|_, row, i| row.start + i).into_iter(), tokens),
            row_of: put(&mut per_token(&|r, _, _| r as u32).into_iter(), tokens),
            segments: put(&mut segments.iter().copied().chain(zeros()), tokens),
            sets: put(&mut per_token(&|_, row, _| row.rope_set).into_iter(), tokens),
            row_first: put(&mut before(&|row| row.count).into_iter(), count),
            row_start: put(&mut rows.iter().map(|r| r.start), count),
            row_count: put(&mut rows.iter().enumerate().map(counts), count),
            first_block: put(&mut before(&|row| step.blocks(row) as u32).into_iter(), count),
            by_length: put(&mut by_length(rows), count),
            outputs: put(&mut outputs.iter().copied().chain(zeros()), computed),
            tables: put(&mut { tables }, blocks),
        };
        memory::upload(&gpu.stream, self.inputs, &self.words.as_mut::<u32>()[..total])?;
        Ok(inputs)
    }

    /// Copies the residual stream of the stage before into its place; gives what must stay until that is done.
    pub fn receive(
        &mut self,
        gpu: &Gpu,
        step: &Checked<'_>,
        hidden: Tensors,
    ) -> Result<Option<DeviceTensors>, StepError> {
        let residual = self.scratch.residual;
        let row_bytes = step.tower().width as u64 * self.element.size();
        let real = (step.tokens - step.padding) as u64 * row_bytes;
        if step.padding > 0 {
            // What was there before would grow from step to step.
            memory::zero(&gpu.stream, residual.offset(real), step.padding as u64 * row_bytes)?;
        }
        match hidden {
            Tensors::Device(rows) => {
                rows.copy_first_to(&gpu.stream, residual)?;
                Ok(Some(rows))
            }
            Tensors::Host(tensors) => {
                let staging = &mut self.staging.as_mut::<u8>()[..real as usize];
                tensors.iter().take(1).for_each(|residual| bytes_of(residual, staging));
                memory::upload(&gpu.stream, residual, staging)?;
                Ok(None)
            }
        }
    }

    /// Asks for the values of the outputs whose tokens are not drawn here.
    fn fetch(&mut self, gpu: &Gpu, width: usize, outputs: usize) -> Result<(), CudaError> {
        let values = self.values.as_mut::<f32>();
        let mut row = 0;
        while row < outputs {
            let whole = (row..outputs).take_while(|row| !self.sampling.draws(*row)).count();
            if whole > 0 {
                let from = self.scratch.values.offset(4 * (row * width) as u64);
                memory::download(&gpu.stream, &mut values[row * width..(row + whole) * width], from)?;
            }
            row += whole.max(1);
        }
        Ok(())
    }

    /// What the head yielded.
    pub fn values(&mut self, outputs: usize, width: usize) -> Values<'_> {
        Values {
            values: &mut self.values.as_mut::<f32>()[..outputs * width],
            order: &mut self.order[..outputs * width],
            drawn: self.sampling.drawn(),
            cpu: &self.cpu,
        }
    }
}

/// The rows of a step, those of one token first.
pub(super) fn by_length(rows: &[BatchRow<'_>]) -> impl Iterator<Item = u32> {
    let of = |single: bool| {
        rows.iter().enumerate().filter(move |(_, r)| (r.count == 1) == single).map(|(i, _)| i as u32)
    };
    of(true).chain(of(false))
}
