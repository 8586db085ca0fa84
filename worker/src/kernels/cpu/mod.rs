//! The CPU's operations, over preallocated buffers and packed weights.
//!
//! Batch-, split- and chunk-invariant: an output element is computed in an order that depends on the reduction length
//! alone. Sizes are the caller's promise; a wrong one panics on a slice bound, it never reads outside.

// Tests compare with libm.
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub(crate) mod attention;
pub mod isa;
pub(crate) mod kv_cache;
pub mod linear;
pub(crate) mod math;
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "it is what reads the clock"))]
pub(crate) mod measure;
pub(crate) mod moe;
pub(crate) mod norm;
pub mod packed;
pub mod pool;
pub(crate) mod quant;
pub(crate) mod rope;

use std::sync::Arc;

use self::{
    attention::Attention,
    isa::Isa,
    kv_cache::KvLayer,
    linear::Linear,
    norm::{Activate, Exp, GateMul, HeadNorm, NormRows, SoftCap},
    pool::Pool,
    rope::{Rope, RopeAndStore},
};

/// The operations, for one instruction set, on the threads of a pool.
#[derive(Clone)]
pub struct Cpu {
    isa: Isa,
    pool: Arc<Pool>,
}

impl Cpu {
    /// The operations for an instruction set, on some threads.
    pub fn new(isa: Isa, pool: Arc<Pool>) -> Self {
        Cpu { isa, pool }
    }

    /// The operations for an instruction set, on the caller's thread.
    pub fn on(isa: Isa) -> Self {
        Cpu::new(isa, Pool::new(1).into())
    }

    /// Names what `isa` computes: with an equal format, equal names promise equal bits, for any number of threads.
    ///
    /// The number goes up whenever a kernel's order of operations changes.
    pub fn numerics(isa: Isa) -> String {
        format!("cpu-3-{}", isa.name())
    }

    /// Product with packed weights, bias and residual fused.
    pub fn linear(&self, call: Linear<'_>) {
        call.run(self);
    }

    /// Norm of rows.
    pub(crate) fn norm(&self, call: NormRows<'_>) {
        call.run(self);
    }

    /// Norm of every head of queries and keys.
    pub(crate) fn head_norm(&self, call: HeadNorm<'_>) {
        call.run(self);
    }

    /// An activation.
    pub(crate) fn activate(&self, call: Activate<'_>) {
        call.run(self);
    }

    /// The gate of a gated feed-forward block.
    pub(crate) fn gate_mul(&self, call: GateMul<'_>) {
        call.run(self);
    }

    /// A soft bound.
    pub(crate) fn soft_cap(&self, call: SoftCap<'_>) {
        call.run(self);
    }

    /// `e^x` of every value, in place, on the caller's thread.
    pub fn exp(&self, x: &mut [f32]) {
        self.isa.run(Exp(x));
    }

    /// Something for each of `items`, on all threads.
    pub fn each<T: Send>(&self, items: &mut [T], call: impl Fn(&mut T) + Sync) {
        self.pool.pieces(items, 1, 1, |_, item| item.iter_mut().for_each(&call));
    }

    /// Rotation and cache write.
    pub(crate) fn rope_and_store(&self, call: RopeAndStore<'_>, cache: &mut KvLayer) {
        call.run(self, cache);
    }

    /// Rotation of queries.
    pub(crate) fn rope(&self, call: Rope<'_>) {
        call.run(self);
    }

    /// Attention over the cache.
    pub(crate) fn attention(&self, call: Attention<'_>) {
        call.run(self);
    }
}
