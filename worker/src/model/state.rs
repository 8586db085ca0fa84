//! What a stage on the CPU keeps between steps: cache and scratch.

use super::{
    Model, ModelError,
    architecture::Layer,
    forward::{self, Pass},
    stage::{RangeSpec, StageWeights},
    step::{Limits, StageInput, StepError},
    workspace::{self, Workspace},
};
use crate::kernels::{
    cpu::{Cpu, kv_cache::KvLayer},
    ops::{BLOCK_TOKENS, BatchRow, kv_elements},
};

/// What a step yields.
pub enum StageOutput<'a> {
    /// The residual stream `(tokens, width)`, every value rounded to the plan's format.
    Hidden(&'a [f32]),
    /// On the last stage.
    Values {
        /// `(outputs, values)`, [`Tower::outputs`](super::architecture::Tower::outputs) values each; the sampler may overwrite it.
        values: &'a mut [f32],
        /// Scratch for the sampler: as many indexes.
        order: &'a mut [u32],
        /// What computed them.
        cpu: &'a Cpu,
    },
}

/// Cache and scratch of a stage, allocated once.
pub struct StageState {
    limits: Limits,
    cpu: Cpu,
    /// One per layer; none in an encoder.
    cache: Vec<KvLayer>,
    work: Workspace,
}

impl StageState {
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
        let max_outputs = if spec.head { max_outputs } else { 0 };
        let layers = cached(model, spec).iter();
        let cache = layers
            .map(|l| KvLayer::new(l.attention.kv_heads, l.attention.head_dim, kv_blocks, spec.dtype))
            .collect::<Result<_, _>>()?;
        Ok(StageState {
            limits: Limits { spec: *spec, kv_blocks, max_tokens, max_outputs },
            cpu,
            cache,
            work: Workspace::new(&model.tower, max_tokens, max_outputs)?,
        })
    }

    /// Bytes of cache and scratch that [`new`](Self::new) will allocate.
    pub fn bytes_for(
        model: &Model,
        spec: &RangeSpec,
        kv_blocks: u32,
        max_tokens: u32,
        max_outputs: u32,
    ) -> u64 {
        let elements = |l: &Layer| kv_elements(l.attention.kv_heads, l.attention.head_dim) as u64;
        let per_token: u64 = cached(model, spec).iter().map(elements).sum::<u64>() * spec.dtype.size();
        let outputs = if spec.head { u64::from(max_outputs) } else { 0 };
        u64::from(kv_blocks) * BLOCK_TOKENS as u64 * per_token
            + model.tower.step_bytes(max_tokens)
            + workspace::bytes_per_output(&model.tower) * outputs
    }

    /// Bytes of the cache.
    pub fn kv_bytes(&self) -> u64 {
        self.cache.iter().map(KvLayer::bytes).sum()
    }

    /// Bytes of the scratch memory.
    pub fn workspace_bytes(&self) -> u64 {
        self.work.bytes()
    }

    /// Makes NaN of the whole cache and scratch, for tests of what a step may read.
    #[cfg(test)]
    pub(super) fn poison(&mut self) {
        self.cache.iter_mut().for_each(KvLayer::poison);
        self.work.poison();
    }

    /// Runs one step. `outputs` are the packed tokens whose values are wanted, ascending; ignored without the head. A
    /// head that pools yields the vector of the row in which the token lies.
    ///
    /// Every index is checked first, so an error leaves the cache as it was.
    pub fn forward(
        &mut self,
        weights: &StageWeights,
        rows: &[BatchRow<'_>],
        input: StageInput<'_>,
        outputs: &[u32],
    ) -> Result<StageOutput<'_>, StepError> {
        if weights.spec != self.limits.spec {
            return Err(StepError::Weights);
        }
        let tower = &weights.model.tower;
        let outputs = if weights.output.is_some() { outputs } else { &[] };
        let tokens = self.limits.check(tower, rows, input.into(), outputs)?;
        let mut pass = Pass {
            cpu: &self.cpu,
            work: &mut self.work,
            cache: &mut self.cache,
            tower,
            rows,
            tokens,
            dtype: self.limits.spec.dtype,
        };
        match (input, &weights.input) {
            (StageInput::Tokens { ids, segments }, Some(block)) => {
                pass.embed(block, weights.output.as_ref(), ids, segments)?;
            }
            (StageInput::Hidden(hidden), _) => pass.work.residual[..hidden.len()].copy_from_slice(hidden),
            (StageInput::Tokens { .. }, None) => return Err(StepError::Weights),
        }
        pass.angles();
        for (i, block) in weights.layers.iter().enumerate() {
            forward::layer(&mut pass, i, &tower.layers[self.limits.spec.layers.first as usize + i], block)?;
        }
        let Some(head) = &weights.output else {
            return Ok(StageOutput::Hidden(&self.work.residual[..tokens * tower.width]));
        };
        pass.finish(head, outputs)?;
        let len = outputs.len() * tower.outputs();
        let Workspace { values, order, .. } = &mut self.work;
        Ok(StageOutput::Values { values: &mut values[..len], order: &mut order[..len], cpu: &self.cpu })
    }
}

/// The layers of a stage that have a cache.
pub(crate) fn cached<'a>(model: &'a Model, spec: &RangeSpec) -> &'a [Layer] {
    match model.tower.is_encoder() {
        true => &[],
        false => &model.tower.layers[spec.layers.first as usize..spec.layers.end as usize],
    }
}
