//! What a GPU is asked for at once, at most: the parts of its memory that no stage is given, and what kernels can take.
//!
//! How kernels are cut (threads, rows of a block) is no limit and beside what launches them.

/// Bytes of a GPU that no stage is given: the parts below, activations on their way, what tokens are drawn by, and what
/// CUDA and NCCL take for themselves when they are first used.
pub(crate) const RESERVE: u64 = 1 << 30;

/// Bytes where cuBLAS may work; 32 MiB is what NVIDIA recommends for Hopper.
pub(super) const BLAS_WORKSPACE: u64 = 32 << 20;
/// Bytes for what attention puts together.
pub(crate) const PARTIALS: u64 = 16 << 20;
/// Bytes of one turn of quantized weights into elements: small enough to be read again before it has left the cache.
pub(crate) const UNPACKED: u64 = 64 << 20;
/// Bytes after which no further step is recorded. What a graph takes is measured.
pub(crate) const RECORDED: u64 = 256 << 20;

/// Half of the reserve is for what cannot be counted.
const _: () = assert!(BLAS_WORKSPACE + PARTIALS + UNPACKED + RECORDED <= RESERVE / 2);

/// Blocks of a grid along its second and third dimension, where some kernels have rows.
pub(crate) const GRID: usize = 65_535;
/// Most experts per token.
pub(crate) const MAX_ACTIVE: usize = 32;
/// Most parts that one row's attention is split into.
pub(crate) const MAX_SPLITS: usize = 64;

/// Activations that can be under way to the next stage without another allocation.
pub(crate) const SLOTS: usize = 4;
/// Biases and tokens of histories that a step has room for; rows beyond are sampled by the host.
pub(crate) const ENTRIES: usize = 1 << 18;
/// Sequences that a step has room for whose contexts are as long as the model's.
pub(crate) const LONG_ROWS: usize = 256;
