//! Scratch memory of a stage: so many bytes per token of a step, so many per output row, nothing else.

use super::architecture::{Ffn, Layer, Tower};
use crate::kernels::{
    buffer::{Buffer, OutOfMemory},
    cpu::{kv_cache::KvLayer, linear},
    ops::{BLOCK_TOKENS, kv_elements},
};

/// Elements of a cache line: buffers of whole lines per row keep the sum linear in the rows.
const LINE: usize = crate::kernels::buffer::LINE / 4;

/// The widest layer's rows, in elements, padded to whole lines.
pub(crate) struct Widths {
    /// The residual stream.
    pub residual: usize,
    /// Queries, keys and values.
    pub qkv: usize,
    /// What attention yields.
    pub attention: usize,
    /// The first product of the feed-forward block.
    pub up: usize,
    /// Cosines and sines of each set of frequencies.
    pub angles: Vec<usize>,
    /// Values of the head.
    pub outputs: usize,
    /// Heads and their width of the keys and values of an encoder's layer.
    keys: Option<(usize, usize)>,
    /// Experts, and experts per token, of a layer that has some.
    pub experts: Option<(usize, usize)>,
    /// The widest input of a product.
    pub input: usize,
}

impl Widths {
    /// Those of a model.
    pub fn of(tower: &Tower) -> Self {
        let widest = |f: &dyn Fn(&Layer) -> usize| {
            tower.layers.iter().map(f).max().unwrap_or(0).next_multiple_of(LINE)
        };
        let experts = tower.layers.iter().filter_map(|l| match l.ffn {
            Ffn::Moe(moe) => Some((moe.experts.next_multiple_of(LINE), moe.active.next_multiple_of(LINE))),
            _ => None,
        });
        let keys = |l: &Layer| (l.attention.kv_heads, l.attention.head_dim);
        let input = |l: &Layer| tower.width.max(l.attention.q_width()).max(l.ffn.mlp().inner);
        Widths {
            residual: tower.width.next_multiple_of(LINE),
            qkv: widest(&|l| l.attention.qkv_width()),
            attention: widest(&|l| l.attention.q_width()),
            up: widest(&|l| l.ffn.up_width()),
            angles: tower.ropes.iter().map(|r| (2 * r.pairs()).next_multiple_of(LINE)).collect(),
            outputs: tower.outputs().next_multiple_of(LINE),
            keys: tower.is_encoder().then(|| tower.layers.first().map(keys)).flatten(),
            experts: experts.reduce(|a, b| (a.0.max(b.0), a.1.max(b.1))),
            input: widest(&input),
        }
    }

    /// Words of packed inputs of a product.
    fn packed(&self) -> usize {
        linear::packed_words(self.input).next_multiple_of(LINE)
    }

    fn per_token(&self) -> usize {
        let experts = self.experts.map_or(0, |(all, active)| 2 * self.residual + all + 2 * active);
        let keys = self.keys.map_or(0, |(heads, d)| kv_elements(heads, d));
        let angles: usize = self.angles.iter().sum();
        2 * self.residual + self.qkv + self.attention + self.up + self.packed() + angles + experts + keys
    }
}

/// Bytes for each token a step may hold.
pub(super) fn bytes_per_token(tower: &Tower) -> u64 {
    4 * Widths::of(tower).per_token() as u64
}

/// Bytes for each row a step may yield on the stage with the head: its values, and an index per value for the sampler.
pub(super) fn bytes_per_output(tower: &Tower) -> u64 {
    8 * Widths::of(tower).outputs as u64
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
    /// `(tokens, up)`: the first product of the feed-forward block.
    pub up: Buffer<f32>,
    /// `(tokens, words)`: the packed inputs of a product.
    pub packed: Buffer<u32>,
    /// Per set of frequencies: `(tokens, stride)` and the stride.
    pub angles: Vec<(Buffer<f32>, usize)>,
    /// `(outputs, values)`.
    pub values: Buffer<f32>,
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

/// Tokens that there is room for in a stage prepared for steps of `tokens`: whole blocks.
pub(crate) fn padded(tokens: u32) -> usize {
    (tokens as usize).next_multiple_of(BLOCK_TOKENS)
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
            values: Buffer::zeros(rows(outputs, widths.outputs)?)?,
            order: Buffer::zeros(rows(outputs, widths.outputs)?)?,
            sequence: widths.keys.map(sequence).transpose()?,
            blocks: (0..blocks).collect(),
            experts: widths.experts.map(experts).transpose()?,
        })
    }

    pub fn bytes(&self) -> u64 {
        let mut floats =
            vec![&self.residual, &self.normed, &self.qkv, &self.attention, &self.up, &self.values];
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
        self.sequence.iter_mut().for_each(KvLayer::poison);
        if let Some(experts) = &mut self.experts {
            experts.rows.fill(f32::NAN);
            experts.sum.fill(f32::NAN);
            experts.chosen.fill(u32::MAX);
        }
    }
}

impl Tower {
    /// Bytes that [`Workspace::new`] allocates for the tokens of a step.
    pub(super) fn step_bytes(&self, tokens: u32) -> u64 {
        bytes_per_token(self).saturating_mul(padded(tokens) as u64)
    }
}
