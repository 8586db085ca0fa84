//! Rows of scratch memory: so many bytes per token of a step, so many per output row, nothing else.

use super::architecture::{Ffn, Head, Layer, Position, Tower};
use crate::kernels::{
    cpu::linear,
    ops::{BLOCK_TOKENS, kv_elements},
};

/// Elements of a cache line: buffers of whole lines per row keep the sum linear in the rows.
const LINE: usize = crate::kernels::buffer::LINE / 4;

/// The widest layer's rows, in elements, padded to whole lines.
pub(crate) struct Widths {
    /// The residual stream, and what it is made of.
    pub residual: usize,
    /// Queries, keys and values.
    pub qkv: usize,
    /// What attention yields.
    pub attention: usize,
    /// The first product of the feed-forward block.
    pub up: usize,
    /// Cosines and sines of each set of frequencies.
    pub angles: Vec<usize>,
    /// What is added to scores by distance, ahead and behind, and one row of it; or queries and keys of each distance.
    pub addends: usize,
    /// Vectors of distances, ahead and behind, and queries, keys and values of them.
    pub distances: usize,
    /// Values of the head.
    pub outputs: usize,
    /// The widest form that the vector of a sequence has before it is given out; 0 where there is none.
    pub vectors: usize,
    /// Heads and their width of the keys and values of a layer, where they are kept no longer than a step.
    pub keys: Option<(usize, usize)>,
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
        let vectors = match &tower.head {
            Head::Embed(embedding) => embedding.widths(tower.width).into_iter().max().unwrap_or(0),
            head => head.pooled_classes().map_or(0, |_| tower.width),
        };
        let shared = |l: &Layer| l.ffn.shared().map_or(0, |shared| shared.inner);
        let input = |l: &Layer| {
            let inner = l.ffn.mlp().inner.max(shared(l));
            vectors.max(tower.width).max(tower.table_width()).max(l.attention.q_width()).max(inner)
        };
        Widths {
            residual: tower.width.max(tower.table_width()).next_multiple_of(LINE),
            qkv: widest(&|l| l.attention.qkv_width()),
            // GPUs keep what the shared expert yields there.
            attention: widest(&|l| l.attention.q_width().max(l.ffn.shared().map_or(0, |_| tower.width))),
            up: widest(&|l| l.ffn.up_width().max(l.ffn.shared().map_or(0, |shared| 2 * shared.inner))),
            angles: tower.ropes.iter().map(|r| (2 * r.pairs()).next_multiple_of(LINE)).collect(),
            addends: widest(&|l| match l.attention.position {
                Position::Buckets => 3 * l.attention.heads,
                Position::Distances(_) => 4 * l.attention.q_width(),
                Position::None | Position::Rope(_) | Position::Slopes(_) => 0,
            }),
            distances: widest(&|l| match l.attention.position {
                Position::Distances(_) => 2 * (tower.width + l.attention.qkv_width()),
                _ => 0,
            }),
            outputs: tower.outputs().next_multiple_of(LINE),
            vectors: vectors.next_multiple_of(LINE),
            keys: if tower.caches { None } else { tower.layers.first().map(keys) },
            experts: experts.reduce(|a, b| (a.0.max(b.0), a.1.max(b.1))),
            input: widest(&input),
        }
    }

    /// Words of packed inputs of a product.
    pub fn packed(&self) -> usize {
        linear::packed_words(self.input).next_multiple_of(LINE)
    }

    /// Elements that a row of values has room for.
    pub fn values(&self) -> usize {
        self.outputs.max(self.vectors)
    }

    fn per_token(&self) -> usize {
        let experts = self.experts.map_or(0, |(all, active)| 2 * self.residual + all + 2 * active);
        let keys = self.keys.map_or(0, |(heads, d)| kv_elements(heads, d));
        let angles: usize = self.angles.iter().sum();
        2 * self.residual
            + self.qkv
            + self.attention
            + self.up
            + self.packed()
            + angles
            + self.addends
            + self.distances
            + experts
            + keys
    }
}

/// Bytes for each token a step may hold.
pub(crate) fn bytes_per_token(tower: &Tower) -> u64 {
    4 * Widths::of(tower).per_token() as u64
}

/// Bytes for each row a step may yield on the stage with the head: its values, an index per value for the sampler, and a
/// vector on its way to them.
pub(crate) fn bytes_per_output(tower: &Tower) -> u64 {
    let widths = Widths::of(tower);
    4 * (widths.values() + widths.outputs + widths.vectors) as u64
}

/// Tokens that there is room for in a stage prepared for steps of `tokens`: whole blocks.
pub(crate) fn padded(tokens: u32) -> usize {
    (tokens as usize).next_multiple_of(BLOCK_TOKENS)
}
