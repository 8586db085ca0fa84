//! The checks of a step before anything is computed.

use super::Input;
use crate::{
    kernels::ops::{BLOCK_TOKENS, BatchRow},
    model::{RangeSpec, architecture::Tower},
    transport::LinkError,
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
    /// The device failed.
    #[error("{0}")]
    Device(String),
}

/// What a stage was prepared for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Its part of the model.
    pub spec: RangeSpec,
    /// Blocks of its cache.
    pub kv_blocks: u32,
    /// Most tokens of a step.
    pub max_tokens: u32,
    /// Most outputs of a step: `max_step_rows` of the plan with the head, none without it.
    pub max_outputs: u32,
}

impl Limits {
    /// Checks every index of a step, so that an error leaves the cache as it was; gives the number of tokens.
    pub fn check(
        &self,
        tower: &Tower,
        rows: &[BatchRow<'_>],
        input: &Input<'_>,
        outputs: &[u32],
    ) -> Result<usize, StepError> {
        let tokens = self.check_rows(tower, rows)?;
        let ascending = outputs.is_sorted_by(|a, b| a < b);
        if !ascending
            || outputs.len() > self.max_outputs as usize
            || outputs.last().is_some_and(|o| *o as usize >= tokens)
        {
            return Err(StepError::Outputs { limit: self.max_outputs });
        }
        self.check_input(tower, tokens, input)?;
        Ok(tokens)
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
            // What came before must be in the cache, and must not be seen without what comes.
            let whole = *start == 0 || (tower.caches && !tower.whole_input);
            if *count == 0 || end > tower.context || !whole {
                let (start, count, context) = (*start, *count, tower.context);
                return Err(StepError::Position { row, start, count, context });
            }
            if *rope_set as usize >= sets {
                return Err(StepError::RopeSet { row, set: *rope_set, sets });
            }
            let needed = if tower.caches { end.div_ceil(BLOCK_TOKENS) } else { 0 };
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
    fn check_input(&self, tower: &Tower, tokens: usize, input: &Input<'_>) -> Result<(), StepError> {
        let mismatch = |input: usize| Err(StepError::Input { rows: tokens as u64, input: input as u64 });
        match (input, self.spec.embedding) {
            (Input::Tokens { .. }, false) => Err(StepError::InputKind { expected: "the residual stream" }),
            (Input::Hidden(_), true) => Err(StepError::InputKind { expected: "token ids" }),
            (Input::Hidden(hidden), false) if hidden.fit(&tower.activation(tokens, self.spec.dtype)) => {
                Ok(())
            }
            (Input::Hidden(hidden), false) if hidden.rows() != tokens => mismatch(hidden.rows()),
            (Input::Hidden(_), false) => {
                Err(StepError::InputKind { expected: "what the model's stages hand on" })
            }
            (Input::Tokens { ids, .. }, true) if ids.len() != tokens => mismatch(ids.len()),
            (Input::Tokens { segments, .. }, true) if ![0, tokens].contains(&segments.len()) => {
                mismatch(segments.len())
            }
            (Input::Tokens { ids, segments }, true) => {
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

impl From<LinkError> for StepError {
    fn from(error: LinkError) -> Self {
        StepError::Device(error.to_string())
    }
}
