//! The CPU's operations, over preallocated buffers and packed weights.
//!
//! Batch-, split- and chunk-invariant: an output element is computed in an order that depends on the reduction length
//! alone. Sizes are the caller's promise; a wrong one panics on a slice bound, it never reads outside.

pub mod attention;
pub mod isa;
pub mod linear;
pub mod math;
pub mod moe;
pub mod norm;
pub mod packed;
pub mod rope;

use self::{
    attention::Attention,
    isa::Isa,
    linear::{Linear, LinearKernel},
    norm::{Activate, GateMul, HeadNorm, NormRows, SoftCap},
    rope::RopeAndStore,
};
use crate::kv_cache::KvLayer;

/// Names what the CPU computes: with an equal format, equal names promise equal bits, on any instruction set.
///
/// The number goes up whenever a kernel's order of operations changes.
pub const NUMERICS: &str = "cpu-1";

/// The operations, for one instruction set.
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    isa: Isa,
}

impl Cpu {
    /// The widest instruction set of this processor.
    pub fn detect() -> Self {
        Cpu { isa: Isa::detect() }
    }

    /// A given instruction set.
    pub fn on(isa: Isa) -> Self {
        Cpu { isa }
    }

    /// Product with packed weights, bias and residual fused.
    pub fn linear(&self, call: Linear<'_>) {
        self.isa.run(LinearKernel { call, row_group: self.isa.row_group() });
    }

    /// Norm of rows.
    pub fn norm(&self, call: NormRows<'_>) {
        self.isa.run(call);
    }

    /// Norm of every head of queries and keys.
    pub fn head_norm(&self, call: HeadNorm<'_>) {
        self.isa.run(call);
    }

    /// An activation.
    pub fn activate(&self, call: Activate<'_>) {
        self.isa.run(call);
    }

    /// The gate of a gated feed-forward block.
    pub fn gate_mul(&self, call: GateMul<'_>) {
        self.isa.run(call);
    }

    /// A soft bound.
    pub fn soft_cap(&self, call: SoftCap<'_>) {
        self.isa.run(call);
    }

    /// Rotation and cache write.
    pub fn rope_and_store(&self, call: RopeAndStore<'_>, cache: &mut KvLayer) {
        call.run(cache);
    }

    /// Attention over the cache.
    pub fn attention(&self, call: Attention<'_>) {
        self.isa.run(call);
    }
}
