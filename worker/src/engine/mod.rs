//! What computes a stage on its device, behind one interface: weights, cache and scratch, and the forward pass.

pub mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod measure;
mod states;
mod step;

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use strata_proto::{DeviceKind, WeightDigests};

pub use self::step::StepError;
pub(crate) use self::{states::Caches, step::Limits};
use crate::{
    device::DeviceSpec,
    error::WorkerError,
    kernels::{cpu::Cpu, ops::BatchRow},
    model::{LoadedBytes, Model, ModelError, RangeSpec},
    sampler::{Draw, SampleError, Sampled},
    transport::Tensors,
    weights::Checkpoint,
};

/// The engine of a stage. It lives on the stage's thread.
pub(crate) trait Engine {
    /// Replaces the weights by those of a range; they stay memory-mapped in the directory `spill` if there is one,
    /// which only a CPU can do. `progress` is called after each piece and may stop the load; then,
    /// and after an error, there are none.
    fn load(
        &mut self,
        spill: Option<&Path>,
        checkpoint: &Checkpoint,
        model: &Model,
        spec: &RangeSpec,
        progress: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
    ) -> Result<(), ModelError>;

    /// Frees the weights, and cache and scratch with them.
    fn unload(&mut self);

    /// The weights that are here.
    fn loaded(&self) -> Option<Loaded<'_>>;

    /// Allocates cache and scratch for the weights that are here, in place of others.
    fn prepare(&mut self, size: Size) -> Result<Allocated, ModelError>;

    /// Frees cache and scratch.
    fn release(&mut self);

    /// Copies bytes of the weights as they lie on the device, from the byte `first` on.
    ///
    /// # Errors
    /// If there are fewer, or the device fails.
    fn read_weights(&mut self, first: u64, to: &mut [u8]) -> Result<(), StepError>;

    /// Computes one step. Every index is checked first, so that an error leaves the cache as it was.
    fn forward(&mut self, step: Step<'_>) -> Result<Output<'_>, StepError>;
}

/// Weights on a device.
pub(crate) struct Loaded<'a> {
    /// The model they are a part of.
    pub model: &'a Model,
    /// Which part.
    pub spec: &'a RangeSpec,
    /// Bytes they occupy: exactly what the model's profile says.
    pub bytes: u64,
    /// What was read from the files.
    pub digests: &'a WeightDigests,
}

/// What a stage is prepared for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    /// Blocks of the cache; an encoder needs none.
    pub kv_blocks: u32,
    /// Most tokens of a step.
    pub tokens: u32,
    /// Most outputs of a step, where the head is: `max_step_rows` of the plan.
    pub outputs: u32,
}

/// What was allocated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allocated {
    /// Bytes of the cache.
    pub kv_bytes: u64,
    /// Bytes of the scratch memory.
    pub workspace_bytes: u64,
}

/// What is to be computed.
pub(crate) struct Step<'a> {
    /// The tokens of each sequence.
    pub rows: &'a [BatchRow<'a>],
    /// What the step begins with.
    pub input: Input<'a>,
    /// The packed tokens whose values are wanted, ascending. A head that pools yields the vector of the row in which
    /// the token lies. Without the head: none.
    pub outputs: &'a [u32],
    /// For each of them the token to be drawn from its values, if one is all that is wanted of them.
    pub draws: &'a [Option<Draw<'a>>],
}

/// What a step begins with.
pub enum Input<'a> {
    /// On the first stage.
    Tokens {
        /// Ids of all tokens.
        ids: &'a [u32],
        /// Their segments; empty if all are 0.
        segments: &'a [u32],
    },
    /// What the stage before hands on, the residual stream `(tokens, width)` first.
    Hidden(Tensors),
}

/// What a step yields.
pub enum Output<'a> {
    /// What goes on to the next stage, the residual stream `(tokens, width)` first, every value of it rounded to the
    /// plan's format.
    Hidden(Tensors),
    /// On the stage with the head.
    Values(Values<'a>),
}

/// What the head yields.
pub struct Values<'a> {
    /// `(outputs, values)`; the sampler may overwrite it. Of an output whose token the engine drew, anything.
    pub values: &'a mut [f32],
    /// Scratch for the sampler: as many indexes.
    pub order: &'a mut [u32],
    /// Per output its token, if the engine drew it; none at all if it draws none.
    pub drawn: &'a [Option<Result<Sampled, SampleError>>],
    /// What samples.
    pub cpu: &'a Cpu,
}

/// Refuses a model whose stages hand on what no engine computes yet.
fn check_carried(model: &Model) -> Result<(), ModelError> {
    match model.tower.carried.is_empty() {
        true => Ok(()),
        false => Err(ModelError::Unsupported {
            processor: "this build",
            with: "whose stages hand on more than the residual stream",
            instead: "upgrade it",
        }),
    }
}

/// What measures the kernels of a device.
///
/// # Errors
/// If the device cannot be used.
fn bench(request: &measure::Request) -> Result<Box<dyn measure::Bench>, WorkerError> {
    match request.device.kind {
        DeviceKind::Cpu => Ok(Box::new(cpu::measure::CpuBench::new(request))),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Ok(Box::new(cuda::measure::GpuBench::new(request)?)),
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => Err(WorkerError::BadMessage(crate::device::no_cuda(&request.device.id))),
    }
}

/// The engine of a device; `cpu` computes where the device does not, and `kernels` is a directory for compiled kernels.
///
/// # Errors
/// If the device cannot be used.
pub(crate) fn on(
    device: &DeviceSpec,
    cpu: Cpu,
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only GPUs compile kernels"))]
    kernels: Option<PathBuf>,
) -> Result<Box<dyn Engine>, WorkerError> {
    match device.kind {
        DeviceKind::Cpu => Ok(Box::new(cpu::CpuEngine::new(cpu))),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Ok(Box::new(cuda::CudaEngine::new(device, cpu, kernels)?)),
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => Err(WorkerError::BadMessage(crate::device::no_cuda(&device.id))),
    }
}
