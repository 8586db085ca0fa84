//! Scratch memory of a stage on the CPU, as `model/widths.rs` counts it.

use crate::{
    kernels::{
        buffer::{Buffer, OutOfMemory},
        cpu::kv_cache::KvLayer,
        ops::BLOCK_TOKENS,
    },
    model::{
        architecture::Tower,
        widths::{Widths, padded},
    },
};

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
    /// `(tokens, up)`: the first product of the feed-forward block.
    pub up: Buffer<f32>,
    /// `(tokens, words)`: the packed inputs of a product.
    pub packed: Buffer<u32>,
    /// Per set of frequencies: `(tokens, stride)` and the stride.
    pub angles: Vec<(Buffer<f32>, usize)>,
    /// What is added to scores in a layer: `(heads, 2 * tokens)`, and a row of it. Or keys, then queries, of distances:
    /// `(heads * head_dim, 2 * tokens)`.
    pub addends: Buffer<f32>,
    /// `(2 * tokens, width)` and `(2 * tokens, qkv)`: vectors of distances, and what the layer makes of them.
    pub distances: Buffer<f32>,
    /// `(outputs, values)`.
    pub values: Buffer<f32>,
    /// Vectors of sequences on their way to values.
    pub vectors: Buffer<f32>,
    /// One row of indices per output, for the sampler.
    pub order: Buffer<u32>,
    /// Keys and values of one sequence in one layer of an encoder, in f32.
    pub sequence: Option<KvLayer>,
    /// Its blocks, all of them.
    pub blocks: Vec<u32>,
    /// Of models with experts.
    pub experts: Option<Experts>,
}

/// Scratch of a mixture of experts.
pub(super) struct Experts {
    /// `(tokens, experts)`: the router's logits.
    pub logits: Buffer<f32>,
    /// `(tokens, active)`: chosen experts.
    pub chosen: Buffer<u32>,
    /// `(tokens, active)`: their shares.
    pub shares: Buffer<f32>,
    /// `(tokens, width)`: the rows of one expert.
    pub rows: Buffer<f32>,
    /// `(tokens, width)`: what all of them yield.
    pub sum: Buffer<f32>,
}

impl Workspace {
    pub fn new(tower: &Tower, tokens: u32, outputs: u32) -> Result<Self, OutOfMemory> {
        let widths = Widths::of(tower);
        let (tokens, outputs) = (padded(tokens), outputs as usize);
        let rows =
            |count: usize, width: usize| count.checked_mul(width).ok_or(OutOfMemory { bytes: u64::MAX });
        let per_token = |width| Buffer::zeros(rows(tokens, width)?);
        let experts = |(all, active): (usize, usize)| {
            Ok(Experts {
                logits: per_token(all)?,
                chosen: Buffer::zeros(rows(tokens, active)?)?,
                shares: per_token(active)?,
                rows: per_token(widths.residual)?,
                sum: per_token(widths.residual)?,
            })
        };
        let blocks = (tokens / BLOCK_TOKENS) as u32;
        let sequence = |(heads, d)| KvLayer::new(heads, d, blocks, strata_proto::DType::F32);
        Ok(Workspace {
            residual: per_token(widths.residual)?,
            normed: per_token(widths.residual)?,
            qkv: per_token(widths.qkv)?,
            attention: per_token(widths.attention)?,
            up: per_token(widths.up)?,
            packed: Buffer::zeros(rows(tokens, widths.packed())?)?,
            angles: widths
                .angles
                .iter()
                .map(|&w| Ok((per_token(w)?, w)))
                .collect::<Result<_, OutOfMemory>>()?,
            addends: per_token(widths.addends)?,
            distances: per_token(widths.distances)?,
            values: Buffer::zeros(rows(outputs, widths.values())?)?,
            vectors: Buffer::zeros(rows(outputs, widths.vectors)?)?,
            order: Buffer::zeros(rows(outputs, widths.outputs)?)?,
            sequence: widths.keys.map(sequence).transpose()?,
            blocks: (0..blocks).collect(),
            experts: widths.experts.map(experts).transpose()?,
        })
    }

    pub fn bytes(&self) -> u64 {
        let mut floats =
            vec![&self.residual, &self.normed, &self.qkv, &self.attention, &self.up, &self.values];
        floats.extend([&self.vectors, &self.addends, &self.distances]);
        floats.extend(self.angles.iter().map(|(table, _)| table));
        let mut ids = vec![&self.order, &self.packed];
        if let Some(experts) = &self.experts {
            floats.extend([&experts.logits, &experts.shares, &experts.rows, &experts.sum]);
            ids.push(&experts.chosen);
        }
        let sequence = self.sequence.as_ref().map_or(0, KvLayer::bytes);
        let floats: u64 = floats.iter().map(|b| b.bytes()).sum();
        floats + ids.iter().map(|b| b.bytes()).sum::<u64>() + sequence
    }

    /// Makes NaN of all of it, for tests of what a step may read.
    #[cfg(test)]
    pub fn poison(&mut self) {
        for buffer in [&mut self.residual, &mut self.normed, &mut self.qkv, &mut self.attention] {
            buffer.fill(f32::NAN);
        }
        self.up.fill(f32::NAN);
        self.packed.fill(f32::NAN.to_bits());
        self.values.fill(f32::NAN);
        self.addends.fill(f32::NAN);
        self.distances.fill(f32::NAN);
        self.vectors.fill(f32::NAN);
        self.sequence.iter_mut().for_each(KvLayer::poison);
        if let Some(experts) = &mut self.experts {
            experts.rows.fill(f32::NAN);
            experts.sum.fill(f32::NAN);
            experts.chosen.fill(u32::MAX);
        }
    }
}
