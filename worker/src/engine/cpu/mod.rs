//! The engine of a CPU device.

mod embed;
pub(super) mod measure;
mod pass;
mod state;
mod weights;
mod workspace;

use std::{ops::ControlFlow, path::Path};

pub use self::{state::State, weights::Weights};
use super::{Allocated, Engine, Loaded, Output, Size, Step, StepError};
use crate::{
    kernels::cpu::Cpu,
    model::{LoadedBytes, Model, ModelError, RangeSpec},
    weights::Checkpoint,
};

pub(super) struct CpuEngine {
    cpu: Cpu,
    weights: Option<Weights>,
    state: Option<State>,
}

impl CpuEngine {
    pub fn new(cpu: Cpu) -> Self {
        CpuEngine { cpu, weights: None, state: None }
    }
}

impl Engine for CpuEngine {
    fn load(
        &mut self,
        spill: Option<&Path>,
        checkpoint: &Checkpoint,
        model: &Model,
        spec: &RangeSpec,
        progress: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
    ) -> Result<(), ModelError> {
        self.unload();
        self.weights = Some(Weights::load_in(spill, checkpoint, model, spec, &self.cpu, progress)?);
        Ok(())
    }

    fn unload(&mut self) {
        self.release();
        self.weights = None;
    }

    fn loaded(&self) -> Option<Loaded<'_>> {
        let weights = self.weights.as_ref()?;
        Some(Loaded {
            model: weights.model(),
            spec: weights.spec(),
            bytes: weights.resident_bytes(),
            digests: weights.digests(),
        })
    }

    fn prepare(&mut self, Size { kv_blocks, tokens, outputs }: Size) -> Result<Allocated, ModelError> {
        self.release();
        let weights = self.weights.as_ref().ok_or(ModelError::NotLoaded)?;
        let (model, spec, cpu) = (weights.model(), weights.spec(), self.cpu.clone());
        let state = self.state.insert(State::new(model, spec, kv_blocks, tokens, outputs, cpu)?);
        Ok(Allocated { kv_bytes: state.kv_bytes(), workspace_bytes: state.workspace_bytes() })
    }

    fn release(&mut self) {
        self.state = None;
    }

    fn read_weights(&mut self, first: u64, to: &mut [u8]) -> Result<(), StepError> {
        let weights = self.weights.as_ref().map_or(&[][..], Weights::as_bytes);
        let from = weights.get(first as usize..).and_then(|rest| rest.get(..to.len()));
        to.copy_from_slice(from.ok_or(StepError::Weights)?);
        Ok(())
    }

    fn forward(&mut self, step: Step<'_>) -> Result<Output<'_>, StepError> {
        let (Some(weights), Some(state)) = (&self.weights, &mut self.state) else {
            return Err(StepError::Weights);
        };
        debug_assert_eq!(step.draws.len(), step.outputs.len());
        state.forward(weights, step.rows, step.input, step.outputs)
    }
}
