//! What a stage keeps between steps (cache, scratch), and the checks of a step before it runs.

use super::{
    Model, ModelError,
    blocks::{Layer, Tower},
    forward::Pass,
    stage::{RangeSpec, StageWeights},
    workspace::{self, Workspace},
};
use crate::{
    kernels::cpu::Cpu,
    kv_cache::{BLOCK_TOKENS, BatchRow, KvLayer},
};

/// A step that does not fit the stage. Nothing was computed or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// Too many tokens, or none.
    #[error("a step of {tokens} tokens: expected 1..={limit}")]
    Tokens {
        /// In the step.
        tokens: u64,
        /// What the stage was prepared for.
        limit: u32,
    },
    /// Rows and input disagree.
    #[error("rows hold {rows} tokens, the input holds {input}")]
    Input {
        /// Tokens by the rows.
        rows: u64,
        /// Tokens by the input.
        input: u64,
    },
    /// Token ids where the stage needs the residual stream, or the other way round.
    #[error("this stage takes {expected}")]
    InputKind {
        /// What it takes.
        expected: &'static str,
    },
    /// A token id that the embedding has no row for.
    #[error("token id {id}: expected less than {vocab}")]
    TokenId {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A row without tokens, or past the context.
    #[error("row {row} holds {count} tokens from position {start}: expected at least 1, ending by {context}")]
    Position {
        /// Index of the row.
        row: usize,
        /// Its first position.
        start: u32,
        /// Its tokens.
        count: u32,
        /// Most positions of a sequence.
        context: usize,
    },
    /// A block table too short for its row.
    #[error("row {row} has {blocks} blocks: {needed} are needed")]
    BlockTable {
        /// Index of the row.
        row: usize,
        /// Blocks in its table.
        blocks: usize,
        /// Blocks up to its last token.
        needed: usize,
    },
    /// A block that the cache does not have.
    #[error("row {row} names block {block}: the cache has {limit}")]
    Block {
        /// Index of the row.
        row: usize,
        /// The block.
        block: u32,
        /// Blocks of the cache.
        limit: u32,
    },
    /// A segment that the model does not know.
    #[error("segment {segment}: expected less than {limit}")]
    Segment {
        /// The segment.
        segment: u32,
        /// Rows of the table.
        limit: usize,
    },
    /// A set of rotary frequencies that the model does not have.
    #[error("row {row} asks for set {set} of rotary frequencies: there are {sets}")]
    RopeSet {
        /// Index of the row.
        row: usize,
        /// The set.
        set: u32,
        /// What there is.
        sets: usize,
    },
    /// Output rows that do not fit.
    #[error("outputs must be ascending indexes of the step's tokens, at most {limit} of them")]
    Outputs {
        /// What the stage was prepared for.
        limit: u32,
    },
    /// Weights of another stage.
    #[error("the weights are not those that this state was made for")]
    Weights,
}

/// What a step begins with.
#[derive(Debug, Clone, Copy)]
pub enum StageInput<'a> {
    /// On the first stage.
    Tokens {
        /// Ids of all tokens.
        ids: &'a [u32],
        /// Their segments; empty if all are 0.
        segments: &'a [u32],
    },
    /// The residual stream `(tokens, width)` of the stage before.
    Hidden(&'a [f32]),
}

/// What a step yields.
pub enum StageOutput<'a> {
    /// The residual stream `(tokens, width)`, every value rounded to the plan's format.
    Hidden(&'a [f32]),
    /// On the last stage.
    Values {
        /// `(outputs, values)`, [`Tower::outputs`] values each; the sampler may overwrite it.
        values: &'a mut [f32],
        /// Scratch for the sampler: as many indexes.
        order: &'a mut [u32],
        /// What computed them.
        cpu: &'a Cpu,
    },
}

/// Cache and scratch of a stage, allocated once.
pub struct StageState {
    spec: RangeSpec,
    cpu: Cpu,
    kv_blocks: u32,
    max_tokens: u32,
    max_outputs: u32,
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
            spec: *spec,
            cpu,
            kv_blocks,
            max_tokens,
            max_outputs,
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
        let elements =
            |l: &Layer| KvLayer::elements_per_token(l.attention.kv_heads, l.attention.head_dim) as u64;
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
        if weights.spec != self.spec {
            return Err(StepError::Weights);
        }
        let tower = &weights.model.tower;
        let tokens = self.check_rows(tower, rows)?;
        let outputs = if weights.output.is_some() { outputs } else { &[] };
        let ascending = outputs.is_sorted_by(|a, b| a < b);
        if !ascending
            || outputs.len() > self.max_outputs as usize
            || outputs.last().is_some_and(|o| *o as usize >= tokens)
        {
            return Err(StepError::Outputs { limit: self.max_outputs });
        }
        self.check_input(weights, tokens, input)?;
        let mut pass = Pass {
            cpu: &self.cpu,
            work: &mut self.work,
            cache: &mut self.cache,
            tower,
            rows,
            tokens,
            dtype: self.spec.dtype,
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
            pass.layer(i, &tower.layers[self.spec.layers.first as usize + i], block)?;
        }
        let Some(head) = &weights.output else {
            return Ok(StageOutput::Hidden(&self.work.residual[..tokens * tower.width]));
        };
        pass.finish(head, outputs)?;
        let len = outputs.len() * tower.outputs();
        let Workspace { values, order, .. } = &mut self.work;
        Ok(StageOutput::Values { values: &mut values[..len], order: &mut order[..len], cpu: &self.cpu })
    }

    /// Checks rows against cache and context; gives the number of tokens.
    fn check_rows(&self, tower: &Tower, rows: &[BatchRow<'_>]) -> Result<usize, StepError> {
        let tokens: u64 = rows.iter().map(|r| u64::from(r.count)).sum();
        if tokens == 0 || tokens > u64::from(self.max_tokens) {
            return Err(StepError::Tokens { tokens, limit: self.max_tokens });
        }
        let sets = tower.ropes.iter().map(|r| r.sets.len()).max().unwrap_or(1);
        for (row, BatchRow { start, count, blocks, rope_set }) in rows.iter().enumerate() {
            let end = *start as usize + *count as usize;
            let whole = !tower.is_encoder() || *start == 0;
            if *count == 0 || end > tower.context || !whole {
                let (start, count, context) = (*start, *count, tower.context);
                return Err(StepError::Position { row, start, count, context });
            }
            if *rope_set as usize >= sets {
                return Err(StepError::RopeSet { row, set: *rope_set, sets });
            }
            let needed = if tower.is_encoder() { 0 } else { end.div_ceil(BLOCK_TOKENS) };
            if blocks.len() < needed {
                return Err(StepError::BlockTable { row, blocks: blocks.len(), needed });
            }
            if let Some(&block) = blocks[..needed].iter().find(|b| **b >= self.kv_blocks) {
                return Err(StepError::Block { row, block, limit: self.kv_blocks });
            }
        }
        Ok(tokens as usize)
    }

    /// Checks that the input is of the kind and the size that the stage needs.
    fn check_input(
        &self,
        weights: &StageWeights,
        tokens: usize,
        input: StageInput<'_>,
    ) -> Result<(), StepError> {
        let tower = &weights.model.tower;
        let mismatch = |input: usize| Err(StepError::Input { rows: tokens as u64, input: input as u64 });
        match (input, self.spec.embedding) {
            (StageInput::Tokens { .. }, false) => {
                Err(StepError::InputKind { expected: "the residual stream" })
            }
            (StageInput::Hidden(_), true) => Err(StepError::InputKind { expected: "token ids" }),
            (StageInput::Hidden(hidden), false) if hidden.len() != tokens * tower.width => {
                mismatch(hidden.len() / tower.width)
            }
            (StageInput::Hidden(_), false) => Ok(()),
            (StageInput::Tokens { ids, .. }, true) if ids.len() != tokens => mismatch(ids.len()),
            (StageInput::Tokens { segments, .. }, true) if ![0, tokens].contains(&segments.len()) => {
                mismatch(segments.len())
            }
            (StageInput::Tokens { ids, segments }, true) => {
                if let Some(&id) = ids.iter().find(|id| **id as usize >= tower.vocab) {
                    return Err(StepError::TokenId { id, vocab: tower.vocab });
                }
                let limit = tower.input.segments.max(1);
                match segments.iter().find(|s| **s as usize >= limit) {
                    Some(&segment) => Err(StepError::Segment { segment, limit }),
                    None => Ok(()),
                }
            }
        }
    }
}

/// The layers of a stage that have a cache.
fn cached<'a>(model: &'a Model, spec: &RangeSpec) -> &'a [Layer] {
    match model.tower.is_encoder() {
        true => &[],
        false => &model.tower.layers[spec.layers.first as usize..spec.layers.end as usize],
    }
}
