//! The engine of a GPU.
//!
//! All memory is allocated when weights are loaded and when an incarnation is prepared. A step uploads one small buffer
//! (ids, positions, block tables), runs kernels in order on one stream, and waits once, at its end. Steps in which
//! every sequence has one token are recorded as CUDA graphs.

mod attention;
mod embed;
pub(super) mod measure;

mod pass;
mod recordings;
#[cfg(test)]
mod refusals;
mod sampling;
mod size;
mod state;
mod weights;
mod workspace;

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use self::{
    pass::Pass,
    recordings::PADDING,
    state::{Checked, State},
    weights::Weights,
};
use super::{Allocated, Engine, Input, Loaded, Output, Size, Step, StepError};
use crate::{
    device::DeviceSpec,
    error::WorkerError,
    kernels::{
        cpu::Cpu,
        cuda::{self, CudaError, DeviceTensors, Gpu, GpuInfo},
    },
    model::{LoadedBytes, Model, ModelError, RangeSpec, load::PieceError},
    transport::Tensors,
    weights::Checkpoint,
};

pub(super) struct CudaEngine {
    // Dropped in this order: what lies in a GPU's memory before the GPU.
    state: Option<State>,
    weights: Option<Weights>,
    cpu: Cpu,
    gpu: Gpu,
}

impl CudaEngine {
    /// Opens the GPU that `device` names; compiled kernels are kept in the directory `kernels`, if there is one.
    pub fn new(device: &DeviceSpec, cpu: Cpu, kernels: Option<PathBuf>) -> Result<Self, WorkerError> {
        let failed = |e: CudaError| WorkerError::WrongState(format!("device {}: {e}", device.id));
        let gpu = Gpu::open(device.ordinal()).map_err(failed)?.keeping_kernels_in(kernels);
        let GpuInfo { name, capability: (major, minor), free_bytes, total_bytes, .. } =
            cuda::info(device.ordinal()).map_err(failed)?;
        tracing::info!(
            device = device.id,
            name,
            capability = format!("{major}.{minor}"),
            free_bytes,
            total_bytes,
            "GPU"
        );
        Ok(CudaEngine { state: None, weights: None, cpu, gpu })
    }
}

impl From<CudaError> for ModelError {
    fn from(error: CudaError) -> Self {
        ModelError::Device(error.survived().to_string())
    }
}

impl From<CudaError> for PieceError {
    fn from(error: CudaError) -> Self {
        PieceError::Other(error.into())
    }
}

impl From<CudaError> for StepError {
    fn from(error: CudaError) -> Self {
        StepError::Device(error.survived().to_string())
    }
}

impl Engine for CudaEngine {
    fn load(
        &mut self,
        _spill: Option<&Path>,
        checkpoint: &Checkpoint,
        model: &Model,
        spec: &RangeSpec,
        progress: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
    ) -> Result<(), ModelError> {
        self.unload();
        self.weights = Some(Weights::load(&self.gpu, &self.cpu, checkpoint, model, spec, progress)?);
        Ok(())
    }

    fn unload(&mut self) {
        self.release();
        self.weights = None;
    }

    fn loaded(&self) -> Option<Loaded<'_>> {
        let weights = self.weights.as_ref()?;
        Some(Loaded {
            model: &weights.model,
            spec: &weights.spec,
            bytes: weights.bytes,
            digests: &weights.digests,
        })
    }

    fn read_weights(&mut self, first: u64, to: &mut [u8]) -> Result<(), StepError> {
        let weights = self.weights.as_ref().ok_or(StepError::Weights)?;
        if first.saturating_add(to.len() as u64) > weights.bytes {
            return Err(StepError::Weights);
        }
        weights.memory.read(&self.gpu.stream, first, to)?;
        Ok(self.gpu.wait()?)
    }

    fn prepare(&mut self, size: Size) -> Result<Allocated, ModelError> {
        self.release();
        let weights = self.weights.as_ref().ok_or(ModelError::NotLoaded)?;
        let state = self.state.insert(State::new(&self.gpu, weights, size, self.cpu.clone())?);
        Ok(state.allocated())
    }

    fn release(&mut self) {
        self.state = None;
    }

    fn forward(&mut self, step: Step<'_>) -> Result<Output<'_>, StepError> {
        let (Some(weights), Some(state)) = (&self.weights, &mut self.state) else {
            return Err(StepError::Weights);
        };
        let tower = &weights.model.tower;
        let Step { rows, input, outputs, draws } = step;
        let tokens = state.limits.check(tower, rows, &input, outputs)?;
        let (ids, segments, hidden): (&[u32], &[u32], _) = match input {
            Input::Tokens { ids, segments } => (ids, segments, None),
            Input::Hidden(hidden) => (&[], &[], Some(hidden)),
        };
        let padded = state.padded(tower, rows, outputs);
        let padding = padded.map_or(0, |padded| padded - rows.len());
        let rows = &*[rows, &vec![PADDING; padding]].concat();
        let is_recorded = padded.is_some();
        let tokens = tokens + padding;
        let step = Checked { weights, rows, tokens, padding, is_recorded, ids, segments, outputs, draws };
        let ran = run(state, &self.gpu, &step, hidden);
        if ran.is_err() {
            // What was asked for before the error still uses the buffers of this step.
            let _ = self.gpu.wait();
        }
        match ran? {
            Some(rows) => Ok(Output::Hidden(Tensors::Device(rows))),
            None => Ok(Output::Values(state.values(outputs.len(), tower.outputs()))),
        }
    }
}

/// Runs a step, up to its end on the GPU. Without the head, it yields the residual stream, on its way to the next
/// stage.
fn run(
    state: &mut State,
    gpu: &Gpu,
    step: &Checked<'_>,
    hidden: Option<Tensors>,
) -> Result<Option<DeviceTensors>, StepError> {
    let inputs = state.upload(gpu, step)?;
    // Kept until the step is done, for its memory is read.
    let hidden = hidden.and_then(|hidden| state.receive(gpu, step, hidden).transpose()).transpose()?;
    match step.is_recorded {
        true => {
            let mut recordings = std::mem::take(&mut state.recordings);
            let ran = recordings.run(gpu, step.rows.len(), || Pass::run(gpu, state, step, inputs));
            state.recordings = recordings;
            ran?;
        }
        false => Pass::run(gpu, state, step, inputs)?,
    }
    let yielded = state.ask_for_results(gpu, step)?;
    gpu.wait()?;
    drop(hidden);
    state.sampling.read();
    Ok(yielded)
}

#[cfg(test)]
mod tests;
