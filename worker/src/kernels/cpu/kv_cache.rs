//! The paged key-value cache of a stage on the CPU. Blocks are chosen by the scheduler; here is only their memory.

use strata_proto::DType;

use crate::kernels::{
    buffer::{OutOfMemory, Values},
    ops::BLOCK_TOKENS,
};

/// Keys and values of one layer.
///
/// Keys lie as `[block][kv_head][head_dim][16]` (one tile of the product kernel per block), values as
/// `[block][kv_head][16][head_dim]`.
pub(crate) struct KvLayer {
    kv_heads: usize,
    head_dim: usize,
    keys: Values,
    values: Values,
}

impl KvLayer {
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
