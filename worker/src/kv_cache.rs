//! The paged key-value cache of a stage. Blocks are chosen by the scheduler; here is only their memory.

use strata_proto::DType;

use crate::kernels::buffer::{OutOfMemory, Values};

/// Positions per block.
pub const BLOCK_TOKENS: usize = strata_proto::BLOCK_TOKENS as usize;

/// The tokens of one sequence within a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchRow<'a> {
    /// Position of the first token.
    pub start: u32,
    /// Tokens, at least 1.
    pub count: u32,
    /// The sequence's whole block table: position `p` lies in block `blocks[p / 16]`.
    pub blocks: &'a [u32],
    /// Which set of rotary frequencies the sequence uses.
    pub rope_set: u32,
}

/// Keys and values of one layer.
///
/// Keys lie as `[block][kv_head][head_dim][16]` (one tile of the product kernel per block), values as
/// `[block][kv_head][16][head_dim]`.
pub struct KvLayer {
    kv_heads: usize,
    head_dim: usize,
    keys: Values,
    values: Values,
}

impl KvLayer {
    /// Elements, keys and values together, that one position takes.
    pub fn elements_per_token(kv_heads: usize, head_dim: usize) -> usize {
        2 * kv_heads * head_dim
    }

    /// Zeroed memory for `blocks` blocks.
    pub fn new(kv_heads: usize, head_dim: usize, blocks: u32, dtype: DType) -> Result<Self, OutOfMemory> {
        let len = (blocks as usize)
            .checked_mul(BLOCK_TOKENS * kv_heads * head_dim)
            .ok_or(OutOfMemory { bytes: u64::MAX })?;
        Ok(KvLayer {
            kv_heads,
            head_dim,
            keys: Values::zeros(len, dtype)?,
            values: Values::zeros(len, dtype)?,
        })
    }

    /// Key-value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Elements per head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> u64 {
        self.keys.bytes() + self.values.bytes()
    }

    /// Makes NaN of all of it, for tests of what a step may read.
    #[cfg(test)]
    pub fn poison(&mut self) {
        use crate::kernels::buffer::{Element, with_values};
        with_values!(&mut self.keys, k => k.fill(Element::from_f32(f32::NAN)));
        with_values!(&mut self.values, v => v.fill(Element::from_f32(f32::NAN)));
    }

    pub(crate) fn parts(&self) -> (&Values, &Values) {
        (&self.keys, &self.values)
    }

    pub(crate) fn parts_mut(&mut self) -> (&mut Values, &mut Values) {
        (&mut self.keys, &mut self.values)
    }
}
