//! A CPU's kernels, measured.

use std::time::Duration;

use crate::{
    engine::measure::{Bench, Kernel, Request, choice, middle},
    error::WorkerError,
    kernels::{
        buffer::OutOfMemory,
        cpu::{
            Cpu,
            attention::Attention,
            kv_cache::KvLayer,
            linear::{Output, Rows},
            measure::{self, seconds},
            norm::NormRows,
            rope::{Angles, RopeAndStore},
        },
        ops::{BLOCK_TOKENS, BatchRow, kv_elements},
    },
    model::{ModelError, architecture::Position},
    sampler::{self, Draw},
};

/// More than caches hold, and the most that a measurement takes.
const CACHES: u64 = 64 << 20;
const MOST_BYTES: u64 = 4 << 30;

/// A CPU device.
pub(in crate::engine) struct CpuBench {
    cpu: Cpu,
    request: Request,
}

impl CpuBench {
    pub fn new(request: &Request) -> Self {
        CpuBench { cpu: request.compute.cpu(), request: request.clone() }
    }

    /// Attention of some tokens of each of some sequences, or what comes before it.
    fn attention(
        &self,
        sequences: u32,
        tokens: u32,
        context: u32,
        (places, patience): (bool, Duration),
    ) -> Result<Option<f64>, OutOfMemory> {
        let (cpu, tower) = (&self.cpu, &self.request.model.tower);
        let a = &middle(tower).attention;
        let each = (context + tokens).div_ceil(BLOCK_TOKENS as u32);
        let layer = || KvLayer::new(a.kv_heads, a.head_dim, each * sequences, self.request.dtype);
        let bytes = u64::from(each * sequences)
            * (BLOCK_TOKENS * kv_elements(a.kv_heads, a.head_dim)) as u64
            * self.request.dtype.size();
        if bytes > MOST_BYTES {
            return Ok(None);
        }
        let layers = (0..CACHES.div_ceil(bytes).clamp(1, 64)).map(|_| layer());
        let mut layers = layers.collect::<Result<Vec<_>, _>>()?;
        let blocks: Vec<u32> = (0..each * sequences).collect();
        let rows: Vec<_> = blocks
            .chunks(each as usize)
            .map(|blocks| BatchRow { start: context, count: tokens, blocks, rope_set: 0 })
            .collect();
        let (all, stride) = ((sequences * tokens) as usize, a.qkv_width());
        let mut qkv = vec![0.5; all * stride];
        let mut out = vec![0.0; all * a.q_width()];
        let pairs = match a.position {
            Position::Rope(set) => tower.ropes[set].pairs(),
            Position::None | Position::Buckets | Position::Distances(_) | Position::Slopes(_) => 0,
        };
        let angles = vec![0.5; all * 2 * pairs];
        let angles = (pairs > 0).then_some(Angles { table: &angles, stride: 2 * pairs, pairs });
        Ok(Some(seconds(patience, |turn| {
            let turn = turn % layers.len();
            let cache = &mut layers[turn];
            match places {
                true => cpu.rope_and_store(
                    RopeAndStore { qkv: &mut qkv, angles, heads: a.heads, rows: &rows },
                    cache,
                ),
                false => cpu.attention(Attention {
                    q: &qkv,
                    stride,
                    out: &mut out,
                    cache,
                    rows: &rows,
                    heads: a.heads,
                    scale: a.scale,
                    softcap: a.softcap,
                    mask: a.mask,
                    addends: None,
                    distant: None,
                    slopes: None,
                }),
            }
        })))
    }

    fn norm(&self, rows: usize, patience: Duration) -> f64 {
        let tower = &self.request.model.tower;
        let width = tower.width;
        let (x, weight, mut out) = (vec![0.5; rows * width], vec![1.0; width], vec![0.0; rows * width]);
        seconds(patience, |_| {
            let x = Rows { data: &x, stride: width, count: rows };
            let norm = middle(tower).flow.norm();
            self.cpu.norm(NormRows {
                norm,
                x,
                weight: &weight,
                bias: None,
                out: &mut out,
                output: Output::Store,
            });
        })
    }

    fn choose(&self, rows: usize, top_p: bool, patience: Duration) -> Result<f64, WorkerError> {
        let vocab = self.request.model.tower.vocab;
        let (params, mut logits) = choice(top_p, rows * vocab)?;
        let draw = Draw { params: &params, history: None, seed: 0, position: 0, logprobs: None };
        let mut order = vec![0; vocab];
        Ok(seconds(patience, |_| {
            for logits in logits.chunks_mut(vocab) {
                drop(std::hint::black_box(sampler::sample(&self.cpu, logits, &mut order, &draw)));
            }
        }))
    }
}

impl Bench for CpuBench {
    fn bytes_per_second(&mut self) -> Result<f64, WorkerError> {
        measure::bytes_per_second(&self.cpu)
            .ok_or_else(|| WorkerError::Model(OutOfMemory { bytes: CACHES }.into()))
    }

    fn seconds(&mut self, kernel: Kernel, patience: Duration) -> Result<Option<f64>, WorkerError> {
        let attention = |sequences, tokens, context, places| {
            self.attention(sequences, tokens, context, (places, patience))
                .map_err(|e| WorkerError::Model(ModelError::Memory(e)))
        };
        match kernel {
            Kernel::Product { shape, format, rows, .. } => {
                Ok(measure::product(&self.cpu, shape, format, rows as usize, (CACHES, patience)))
            }
            Kernel::Decode { sequences, context } => attention(sequences, 1, context - 1, false),
            Kernel::Prefill { tokens, context } => attention(1, tokens, context, false),
            Kernel::Place { rows } => attention(1, rows, 0, true),
            Kernel::Norm { rows } => Ok(Some(self.norm(rows as usize, patience))),
            Kernel::Choose { rows, top_p } => self.choose(rows as usize, top_p, patience).map(Some),
        }
    }
}
