//! What a stage on the CPU keeps between steps: cache and scratch.

use candle_core::Tensor;

use super::{pass::Pass, weights::Weights, workspace::Workspace};
use crate::{
    engine::{Caches, Input, Limits, Output, StepError, Values, check_carried},
    kernels::{
        cpu::{Cpu, kv_cache::KvLayer},
        ops::BatchRow,
        tensor::candle_dtype,
    },
    model::{Model, ModelError, RangeSpec, layer::layer},
    transport::Tensors,
};

/// Cache and scratch of a stage, allocated once.
pub struct State {
    limits: Limits,
    cpu: Cpu,
    cache: Caches<KvLayer>,
    work: Workspace,
}

impl State {
    /// Memory for `kv_blocks` blocks (which an encoder needs none of), and for steps of at most `max_tokens` tokens
    /// and, with the head, `max_outputs` output rows; `cpu` computes them.
    pub fn new(
        model: &Model,
        spec: &RangeSpec,
        kv_blocks: u32,
        max_tokens: u32,
        max_outputs: u32,
        cpu: Cpu,
    ) -> Result<Self, ModelError> {
        spec.check(model)?;
        check_carried(model)?;
        let max_outputs = if spec.head { max_outputs } else { 0 };
        let cache = Caches::new(model, spec, |attention| {
            let layer = KvLayer::new(attention.kv_heads, attention.head_dim, kv_blocks, spec.dtype);
            layer.map_err(ModelError::from)
        })?;
        Ok(State {
            limits: Limits { spec: *spec, kv_blocks, max_tokens, max_outputs },
            cpu,
            cache,
            work: Workspace::new(&model.tower, max_tokens, max_outputs)?,
        })
    }

    /// Bytes of the cache.
    pub fn kv_bytes(&self) -> u64 {
        self.cache.own().iter().map(KvLayer::bytes).sum()
    }

    /// Bytes of the scratch memory.
    pub fn workspace_bytes(&self) -> u64 {
        self.work.bytes()
    }

    /// Makes NaN of the whole cache and scratch, for tests of what a step may read.
    #[cfg(test)]
    pub(crate) fn poison(&mut self) {
        self.cache.own_mut().iter_mut().for_each(KvLayer::poison);
        self.work.poison();
    }

    /// Runs one step. `outputs` are the packed tokens whose values are wanted, ascending; ignored without the head. A
    /// head that pools yields the vector of the row in which the token lies.
    ///
    /// Every index is checked first, so an error leaves the cache as it was.
    pub fn forward(
        &mut self,
        weights: &Weights,
        rows: &[BatchRow<'_>],
        input: Input<'_>,
        outputs: &[u32],
    ) -> Result<Output<'_>, StepError> {
        if weights.spec != self.limits.spec {
            return Err(StepError::Weights);
        }
        let (tower, dtype) = (&weights.model.tower, self.limits.spec.dtype);
        let outputs = if weights.output.is_some() { outputs } else { &[] };
        let tokens = self.limits.check(tower, rows, &input, outputs)?;
        let mut pass =
            Pass { cpu: &self.cpu, work: &mut self.work, cache: &mut self.cache, tower, rows, tokens, dtype };
        let failed = |e: candle_core::Error| StepError::Device(e.to_string());
        match (input, &weights.input) {
            (Input::Tokens { ids, segments }, Some(block)) => {
                pass.embed(block, weights.output.as_ref(), ids, segments)?;
            }
            (Input::Hidden(hidden), _) => {
                // Of what comes, this engine computes with the residual stream.
                for residual in hidden.into_host()?.into_iter().take(1) {
                    let wide = residual.to_dtype(candle_core::DType::F32);
                    let wide = wide.and_then(|t| t.flatten_all()?.to_vec1::<f32>()).map_err(failed)?;
                    pass.work.residual[..wide.len()].copy_from_slice(&wide);
                }
            }
            (Input::Tokens { .. }, None) => return Err(StepError::Weights),
        }
        pass.angles();
        for (i, block) in weights.layers.iter().enumerate() {
            layer(&mut pass, i, &tower.layers[self.limits.spec.layers.first as usize + i], block)?;
        }
        let Some(head) = &weights.output else {
            let values = &self.work.residual[..tokens * tower.width];
            let tensor = Tensor::from_slice(values, (tokens, tower.width), &candle_core::Device::Cpu);
            let tensor = tensor.and_then(|t| t.to_dtype(candle_dtype(dtype))).map_err(failed)?;
            return Ok(Output::Hidden(Tensors::Host(vec![tensor])));
        };
        pass.finish(head, outputs)?;
        let len = outputs.len() * tower.outputs();
        let Workspace { values, order, .. } = &mut self.work;
        let (values, order) = (&mut values[..len], &mut order[..len]);
        Ok(Output::Values(Values { values, order, drawn: &[], cpu: &self.cpu }))
    }
}
