//! Scratch memory of a stage: so many bytes per token of a step, so many per output row, nothing else.

use super::blocks::{Ffn, Tower};
use crate::kernels::buffer::{Buffer, OutOfMemory};

/// Elements of a cache line: buffers of whole lines per row keep the sum linear in the rows.
const LINE: usize = crate::kernels::buffer::LINE / 4;

/// The widest layer's rows, padded to whole lines.
struct Widths {
    residual: usize,
    qkv: usize,
    attention: usize,
    gate_up: usize,
    /// Cosines and sines of each set of frequencies.
    angles: Vec<usize>,
    logits: usize,
}

impl Widths {
    fn of(tower: &Tower) -> Self {
        let widest = |f: &dyn Fn(usize) -> usize| {
            (0..tower.layers.len()).map(f).max().unwrap_or(0).next_multiple_of(LINE)
        };
        Widths {
            residual: tower.width.next_multiple_of(LINE),
            qkv: widest(&|i| tower.layers[i].attention.qkv_width()),
            attention: widest(&|i| tower.layers[i].attention.q_width()),
            gate_up: widest(&|i| {
                let Ffn::Gated(mlp) = tower.layers[i].ffn;
                2 * mlp.inner
            }),
            angles: tower.ropes.iter().map(|r| (2 * r.inv_freq.len()).next_multiple_of(LINE)).collect(),
            logits: tower.vocab.next_multiple_of(LINE),
        }
    }

    fn per_token(&self) -> usize {
        2 * self.residual + self.qkv + self.attention + self.gate_up + self.angles.iter().sum::<usize>()
    }
}

/// Bytes for each token a step may hold.
pub(super) fn bytes_per_token(tower: &Tower) -> u64 {
    4 * Widths::of(tower).per_token() as u64
}

/// Bytes for each row a step may yield on the stage with the head: its logits, and an index per logit for the sampler.
pub(super) fn bytes_per_output(tower: &Tower) -> u64 {
    8 * Widths::of(tower).logits as u64
}

/// Scratch of a stage.
pub(super) struct Workspace {
    /// `(tokens, width)`, rounded to the plan's format.
    pub residual: Buffer<f32>,
    /// `(tokens, width)`: normed rows.
    pub normed: Buffer<f32>,
    /// `(tokens, qkv)`.
    pub qkv: Buffer<f32>,
    /// `(tokens, heads * head_dim)`.
    pub attention: Buffer<f32>,
    /// `(tokens, 2 * inner)`.
    pub gate_up: Buffer<f32>,
    /// Per set of frequencies: `(tokens, stride)` and the stride.
    pub angles: Vec<(Buffer<f32>, usize)>,
    /// `(outputs, vocab)`.
    pub logits: Buffer<f32>,
    /// One row of indices per output, for the sampler.
    pub order: Buffer<u32>,
}

impl Workspace {
    pub fn new(tower: &Tower, tokens: u32, outputs: u32) -> Result<Self, OutOfMemory> {
        let widths = Widths::of(tower);
        let (tokens, outputs) = (tokens as usize, outputs as usize);
        let rows =
            |count: usize, width: usize| count.checked_mul(width).ok_or(OutOfMemory { bytes: u64::MAX });
        Ok(Workspace {
            residual: Buffer::zeros(rows(tokens, widths.residual)?)?,
            normed: Buffer::zeros(rows(tokens, widths.residual)?)?,
            qkv: Buffer::zeros(rows(tokens, widths.qkv)?)?,
            attention: Buffer::zeros(rows(tokens, widths.attention)?)?,
            gate_up: Buffer::zeros(rows(tokens, widths.gate_up)?)?,
            angles: widths
                .angles
                .iter()
                .map(|&w| Ok((Buffer::zeros(rows(tokens, w)?)?, w)))
                .collect::<Result<_, OutOfMemory>>()?,
            logits: Buffer::zeros(rows(outputs, widths.logits)?)?,
            order: Buffer::zeros(rows(outputs, widths.logits)?)?,
        })
    }

    pub fn bytes(&self) -> u64 {
        let rows = [&self.residual, &self.normed, &self.qkv, &self.attention, &self.gate_up, &self.logits];
        let angles: u64 = self.angles.iter().map(|(a, _)| a.bytes()).sum();
        rows.iter().map(|b| b.bytes()).sum::<u64>() + angles + self.order.bytes()
    }
}
