//! Everything that differs by device: buffers, packed weights and the fused operations of the forward pass.

pub mod buffer;
pub mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod measure;
pub(crate) mod ops;
pub(crate) mod tensor;
