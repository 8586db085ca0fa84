//! The engine of a CPU device.

use std::{ops::ControlFlow, path::Path};

use candle_core::Tensor;

use super::{Allocated, Engine, Input, Loaded, Output, Size, Step, Values};
use crate::{
    kernels::cpu::Cpu,
    model::{
        LoadedBytes, Model, ModelError, RangeSpec, StageInput, StageOutput, StageState, StageWeights,
        StepError,
    },
    transport::{Hidden, candle_dtype},
    weights::Checkpoint,
};

pub(super) struct CpuEngine {
    cpu: Cpu,
    weights: Option<StageWeights>,
    state: Option<StageState>,
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
        self.weights = Some(StageWeights::load_in(spill, checkpoint, model, spec, &self.cpu, progress)?);
        Ok(())
    }

    fn unload(&mut self) {
        self.release();
        self.weights = None;
    }

    fn loaded(&self) -> Option<Loaded<'_>> {
        let weights = self.weights.as_ref()?;
        Some(Loaded { model: weights.model(), spec: weights.spec(), bytes: weights.resident_bytes() })
    }

    fn prepare(&mut self, Size { kv_blocks, tokens, outputs }: Size) -> Result<Allocated, ModelError> {
        self.release();
        let weights = self.weights.as_ref().ok_or(ModelError::NotLoaded)?;
        let (model, spec, cpu) = (weights.model(), weights.spec(), self.cpu.clone());
        let state = self.state.insert(StageState::new(model, spec, kv_blocks, tokens, outputs, cpu)?);
        Ok(Allocated { kv_bytes: state.kv_bytes(), workspace_bytes: state.workspace_bytes() })
    }

    fn release(&mut self) {
        self.state = None;
    }

    fn forward(&mut self, step: Step<'_>) -> Result<Output<'_>, StepError> {
        let (Some(weights), Some(state)) = (&self.weights, &mut self.state) else {
            return Err(StepError::Weights);
        };
        debug_assert_eq!(step.draws.len(), step.outputs.len());
        let (dtype, width) = (candle_dtype(weights.spec().dtype), weights.model().tower.width);
        let failed = |e: candle_core::Error| StepError::Device(e.to_string());
        let host;
        let input = match step.input {
            Input::Tokens { ids, segments } => StageInput::Tokens { ids, segments },
            Input::Hidden(hidden) => {
                let wide = hidden.into_host()?.to_dtype(candle_core::DType::F32);
                host = wide.and_then(|t| t.flatten_all()?.to_vec1::<f32>()).map_err(failed)?;
                StageInput::Hidden(&host)
            }
        };
        match state.forward(weights, step.rows, input, step.outputs)? {
            StageOutput::Hidden(values) => {
                let shape = (values.len() / width, width);
                let tensor = Tensor::from_slice(values, shape, &candle_core::Device::Cpu);
                let tensor = tensor.and_then(|t| t.to_dtype(dtype)).map_err(failed)?;
                Ok(Output::Hidden(Hidden::Host(tensor)))
            }
            StageOutput::Values { values, order, cpu } => {
                Ok(Output::Values(Values { values, order, drawn: &[], cpu }))
            }
        }
    }
}
