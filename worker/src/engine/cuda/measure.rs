//! A GPU's kernels, measured.

use std::time::Duration;

use strata_proto::{Format, LayerRange};

use super::{
    pass::Pass,
    state::{Checked, State},
    weights::Weights,
};
use crate::{
    engine::{
        Size, StepError,
        measure::{Bench, Kernel, Request, Role, choice, middle, products},
    },
    error::WorkerError,
    kernels::{
        cpu::Cpu,
        cuda::{
            CudaError, Doing, Gpu,
            launch::Kernels,
            measure::{self, Pool, Product, Room, seconds_within},
            memory,
            product::Epilogue,
        },
        ops::{Act, BLOCK_TOKENS, BatchRow, kv_elements},
    },
    model::{
        Model, ModelError, RangeSpec,
        architecture::{Ffn, Layer, Mlp, Slot},
        bytes,
        layer::Operations,
    },
    sampler::Draw,
};

/// Bytes of matrices that runs take in turn, if the GPU has as many: several times what its caches hold.
const POOL: u64 = 512 << 20;
/// Bytes of cache that attention takes in turn.
const CACHES: u64 = 512 << 20;
/// Most layers whose caches are taken in turn.
const LAYERS: u64 = 32;

/// A GPU.
pub(in crate::engine) struct GpuBench {
    // Dropped before the GPU.
    pool: Option<(Format, Pool)>,
    kernels: Kernels,
    request: Request,
    cpu: Cpu,
    gpu: Gpu,
}

impl GpuBench {
    pub fn new(request: &Request) -> Result<Self, WorkerError> {
        let name = &request.device.id;
        let failed = |e: CudaError| WorkerError::WrongState(format!("device {name}: {e}"));
        let gpu = Gpu::open(request.device.ordinal()).map_err(failed)?;
        let gpu = gpu.keeping_kernels_in(request.kernels.clone());
        let head_dim = middle(&request.model.tower).attention.head_dim;
        let kernels = gpu.kernels(request.dtype, head_dim).map_err(failed)?;
        let cpu = request.compute.cpu();
        Ok(GpuBench { pool: None, kernels, request: request.clone(), cpu, gpu })
    }

    fn failed(&self, error: impl std::fmt::Display) -> WorkerError {
        WorkerError::WrongState(format!("device {}: {error}", self.request.device.id))
    }

    fn free(&self) -> Result<u64, CudaError> {
        let (free, _) = self.gpu.context.mem_get_info().doing("asking for free memory")?;
        Ok(free as u64)
    }

    /// The matrices, in a format.
    fn pool(&mut self, format: Format) -> Result<&Pool, CudaError> {
        let (held, mut pool) = match self.pool.take() {
            Some((held, pool)) => (Some(held), pool),
            None => {
                let shapes = products(&self.request.model.tower);
                // In the widest format.
                let largest = shapes.iter().map(|(_, (n, k))| (4 * n * k) as u64).max().unwrap_or(0);
                (None, Pool::new(&self.gpu, largest.max(POOL.min(self.free()? / 8)))?)
            }
        };
        if held != Some(format) {
            pool.fill(&self.gpu, format)?;
        }
        Ok(&self.pool.insert((format, pool)).1)
    }

    fn product(
        &mut self,
        role: Role,
        (n, k): (usize, usize),
        format: Format,
        (rows, patience): (usize, Duration),
    ) -> Result<Option<f64>, CudaError> {
        let (epilogue, makes_bytes) = match role {
            Role::Qkv => (Epilogue::Store, false),
            Role::AttentionOut | Role::Down => (Epilogue::Add, true),
            Role::Up(act) => (Epilogue::Activated(act), false),
            Role::GateUp(act) => (Epilogue::Gated(act), false),
            Role::Head => (Epilogue::StoreValues, false),
        };
        if !self.pool(format)?.holds((n, k)) || Room::bytes(rows * k, rows * n) > self.free()? / 2 {
            return Ok(None);
        }
        let room = Room::new(&self.gpu, rows * k, rows * n)?;
        let Some((_, pool)) = &self.pool else { return Ok(None) };
        let product = Product { format, shape: (n, k), rows, epilogue, makes_bytes, patience };
        measure::product(&self.gpu, &self.kernels, (pool, &room), product).map(Some)
    }

    /// A stage of some layers without what the kernel has no use for; `None` if the GPU has no memory for it.
    fn stage(&self, layers: usize, vocab: usize, size: Size) -> Result<Option<(Weights, State)>, ModelError> {
        let mut model: Model = self.request.model.clone();
        let ffn = Ffn::Plain(Mlp { inner: 64, act: Act::Silu });
        model.tower.layers = vec![Layer { ffn, ..middle(&model.tower).clone() }; layers];
        model.tower.vocab = vocab;
        let spec = RangeSpec {
            layers: LayerRange { first: 0, end: layers as u32 },
            embedding: true,
            head: true,
            dtype: self.request.dtype,
            quantization: None,
        };
        let state = bytes::of_state(&model, &spec, size.kv_blocks, size.tokens, size.outputs);
        let weights: u64 = bytes::of_weights(&model, &spec);
        if state + weights > self.free()? / 2 {
            return Ok(None);
        }
        let weights = Weights::empty(&self.gpu, &model, &spec)?;
        let state = State::new(&self.gpu, &weights, size, self.cpu.clone())?;
        Ok(Some((weights, state)))
    }

    /// A kernel other than a product, in a step of some tokens of each of some sequences after `context` others.
    fn step(
        &self,
        (kernel, patience): (Kernel, Duration),
        sequences: u32,
        tokens: u32,
        context: u32,
    ) -> Result<Option<f64>, ModelError> {
        let (model, size) = (&self.request.model, self.request.dtype.size());
        let each = (context + tokens).div_ceil(BLOCK_TOKENS as u32);
        let a = &middle(&model.tower).attention;
        let per_block = (kv_elements(a.kv_heads, a.head_dim) * BLOCK_TOKENS) as u64 * size;
        let (kv_blocks, all) = (each * sequences, tokens * sequences);
        let (layers, vocab, outputs) = match kernel {
            Kernel::Choose { rows, .. } => (1, model.tower.vocab, rows),
            _ => (CACHES.div_ceil(u64::from(kv_blocks) * per_block).clamp(1, LAYERS) as usize, 64, 1),
        };
        let Some((weights, mut state)) =
            self.stage(layers, vocab, Size { kv_blocks, tokens: all, outputs })?
        else {
            return Ok(None);
        };
        let blocks: Vec<u32> = (0..kv_blocks).collect();
        let rows = blocks.chunks(each as usize);
        let rows: Vec<_> =
            rows.map(|blocks| BatchRow { start: context, count: tokens, blocks, rope_set: 0 }).collect();
        let ids = vec![0; all as usize];
        let chosen: Vec<u32> = (0..outputs.min(all)).collect();
        let top_p = matches!(kernel, Kernel::Choose { top_p: true, .. });
        let (params, logits) = choice(top_p, chosen.len() * weights.model.tower.outputs())
            .map_err(|e| ModelError::Device(e.to_string()))?;
        let draw = Draw { params: &params, history: None, seed: 0, position: 0, logprobs: None };
        let draws = vec![Some(draw); chosen.len()];
        let step = Checked {
            weights: &weights,
            rows: &rows,
            tokens: all as usize,
            padding: 0,
            is_recorded: false,
            ids: &ids,
            segments: &[],
            outputs: &chosen,
            draws: &draws,
        };
        let failed = |e: StepError| ModelError::Device(e.to_string());
        let inputs = state.upload(&self.gpu, &step).map_err(failed)?;
        state.sampling.ask(&self.gpu, &draws)?;
        memory::upload(&self.gpu.stream, state.scratch.values, &logits)?;
        let state = state;
        let layer = middle(step.tower());
        let mut pass = Pass::new(&self.gpu, &state, step.tower(), step.tokens, &rows, inputs);
        pass.angles().map_err(failed)?;
        let seconds = seconds_within(&self.gpu, patience, |turn| {
            let index = turn % layers;
            let block = &weights.layers[index];
            match kernel {
                Kernel::Norm { .. } => {
                    pass.enter(layer.flow, block, Slot::AttentionNorm)?;
                    pass.input().map(|_| ())
                }
                Kernel::Place { .. } => pass.place(&layer.attention, index, block),
                Kernel::Choose { .. } => {
                    Ok(state.sampling.start(&self.gpu, &self.kernels, state.scratch.values)?)
                }
                _ => pass.attend_rows(&layer.attention, index, block),
            }
        });
        seconds.map(Some).map_err(failed)
    }
}

impl Bench for GpuBench {
    fn bytes_per_second(&mut self) -> Result<f64, WorkerError> {
        let format = Format::Float(self.request.dtype);
        self.pool(format).map(|_| ()).map_err(|e| self.failed(e))?;
        let Some((_, pool)) = &self.pool else { return Err(self.failed("no memory")) };
        pool.copy(&self.gpu).map_err(|e| self.failed(e))
    }

    fn seconds(&mut self, kernel: Kernel, patience: Duration) -> Result<Option<f64>, WorkerError> {
        let stepped = |sequences, tokens, context| {
            self.step((kernel, patience), sequences, tokens, context).map_err(|e| self.failed(e))
        };
        match kernel {
            Kernel::Product { role, shape, format, rows } => {
                self.product(role, shape, format, (rows as usize, patience)).map_err(|e| self.failed(e))
            }
            Kernel::Decode { sequences, context } => stepped(sequences, 1, context - 1),
            Kernel::Prefill { tokens, context } => stepped(1, tokens, context),
            Kernel::Norm { rows } | Kernel::Place { rows } | Kernel::Choose { rows, .. } => {
                stepped(1, rows, 0)
            }
        }
    }
}
