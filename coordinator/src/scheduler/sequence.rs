//! One request as the scheduler sees it.

use std::{sync::Arc, time::Duration};

use strata_proto::v1;

use super::{
    Output,
    blocks::{BlockAllocator, Contents, Scope},
    rules::Rules,
};

/// Names a request for its whole life; ascending in order of arrival, never reused.
pub type SequenceId = u64;

/// What the scheduler needs to know of a request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Prompt or input, never empty.
    pub prompt: Vec<u32>,
    /// Whose it is: computed prefixes are shared within a tenant.
    pub tenant: Arc<str>,
    /// Which of the tenant's connections it came by: they take turns.
    pub connection: u64,
    /// When to give up, on the caller's clock.
    pub deadline: Option<Duration>,
    /// What is to be done with it.
    pub work: Work,
}

/// What a model does with a prompt.
#[derive(Debug, Clone)]
pub enum Work {
    /// Go on, token by token, over a cache.
    Generate {
        /// Most new tokens, at least one.
        max_tokens: u32,
        /// Tokens that end the answer.
        ends: Vec<u32>,
        /// Sent to the last stage whenever the sequence's state is built anew.
        sampling: v1::RowSampling,
    },
    /// Compute it once, whole: an encoder.
    Encode(Encode),
}

/// What an encoder makes of an input.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encode {
    /// Segment of each token; empty if all are 0.
    pub segments: Vec<u32>,
    /// Positions that are asked of, ascending. Empty: the head's vector of the whole is wanted.
    pub positions: Vec<u32>,
    /// Candidates for the token at each of them. 0: the head's vector of each is wanted.
    pub candidates: u32,
    /// Index of the first token that is pooled.
    pub pooled_from: u32,
}

impl Encode {
    /// Outputs that the last stage yields for it.
    pub fn outputs(&self) -> u32 {
        (self.positions.len() as u32).max(1)
    }
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A token that ends it, and is a part of it.
    End,
    /// As many tokens as were asked for.
    Length,
    /// It was computed, whole.
    Encoded,
}

/// Whose a sequence is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Party {
    pub tenant: Arc<str>,
    pub connection: u64,
}

/// A live request.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Whose it is.
    pub party: Party,
    /// It had its turn.
    pub admitted: bool,
    /// Prompt and answer so far.
    pub tokens: Vec<u32>,
    /// Guesses of those that follow.
    pub drafts: Vec<u32>,
    prompt: u32,
    pub work: Work,
    pub deadline: Option<Duration>,
    /// Blocks it owns, in order of positions; none while it waits.
    pub blocks: Vec<u32>,
    /// How many of them the stages know of.
    announced: u32,
    /// Where its states of fixed size are; none while it waits, or has none.
    pub slot: Option<u32>,
    /// The stages know of its present state.
    begun: bool,
    /// How many of them others may use too, and what the last one of these holds.
    published: (u32, Option<Contents>),
    scope: Scope,
    /// Positions of the prompt that others had computed when it was first admitted.
    pub cached_prompt: u32,
    /// Positions that were to be computed when it began.
    pub prefill: u32,
    /// Stages hold state of it, be it outdated: they must be told when it is gone.
    pub on_stages: bool,
    /// Positions that are in steps, committed or in flight.
    pub scheduled: u32,
    /// Rows in flight.
    pub in_flight: u32,
    /// A token is being sampled: the next one is unknown.
    pub awaiting: bool,
    /// Counts how often its state was thrown away; results for an older state are dropped.
    pub epoch: u32,
    /// Failed steps since the last token.
    pub failures: u32,
    /// When it was last in a step, for fairness.
    pub last_step: u64,
}

impl Sequence {
    pub fn new(request: Request) -> Self {
        let party = Party { tenant: request.tenant.clone(), connection: request.connection };
        Sequence {
            party,
            admitted: false,
            prompt: request.prompt.len() as u32,
            tokens: request.prompt,
            drafts: Vec::new(),
            work: request.work,
            deadline: request.deadline,
            blocks: Vec::new(),
            announced: 0,
            slot: None,
            begun: false,
            published: (0, None),
            scope: Scope { tenant: request.tenant, rope_set: 0 },
            cached_prompt: 0,
            prefill: 0,
            on_stages: false,
            scheduled: 0,
            in_flight: 0,
            awaiting: false,
            epoch: 0,
            failures: 0,
            last_step: 0,
        }
    }

    pub fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Most positions in blocks that it can ever occupy.
    pub fn most(&self, rules: &Rules) -> u64 {
        match &self.work {
            Work::Generate { max_tokens, .. } if rules.blocks => {
                u64::from(self.prompt) + u64::from(*max_tokens)
            }
            _ => 0,
        }
    }

    /// Positions in blocks that it needs now.
    pub fn cached(&self, rules: &Rules) -> u32 {
        match self.work {
            Work::Generate { .. } if rules.blocks => self.len(),
            _ => 0,
        }
    }

    /// Whether it has states of fixed size.
    pub fn needs_slot(&self, rules: &Rules) -> bool {
        rules.slot && matches!(self.work, Work::Generate { .. })
    }

    /// Tokens that its answer may still have.
    pub fn left(&self) -> u32 {
        match &self.work {
            Work::Generate { max_tokens, .. } => max_tokens.saturating_sub(self.len() - self.prompt),
            Work::Encode(_) => 0,
        }
    }

    /// Outputs of the last stage that its next row takes, beside those of drafts.
    pub fn outputs(&self) -> u32 {
        match &self.work {
            Work::Generate { .. } => 1,
            Work::Encode(encode) => encode.outputs(),
        }
    }

    /// The tokens of its next row, if `room` are free in the step and chunks are at most `chunk`; 0 if it must wait.
    pub fn next_count(&self, chunk: u32, room: u32) -> u32 {
        match self.work {
            Work::Generate { .. } => self.remaining().min(chunk).min(room),
            // Whole or not at all.
            Work::Encode(_) if self.remaining() > room => 0,
            Work::Encode(_) => self.remaining(),
        }
    }

    /// Positions that are known and in no step yet.
    pub fn remaining(&self) -> u32 {
        if self.awaiting { 0 } else { self.len() - self.scheduled }
    }

    /// Whether its next row is the one token that was sampled last.
    pub fn decodes(&self) -> bool {
        !self.awaiting && !self.begins() && self.remaining() == 1
    }

    /// Whether its next row is the first of its state.
    fn begins(&self) -> bool {
        !self.begun
    }

    /// Tokens of its answer.
    pub fn answered(&self) -> u32 {
        self.len() - self.prompt
    }

    /// Whether a part of its answer is out, and its reader waits for more.
    pub fn has_answered(&self) -> bool {
        self.answered() > 0
    }

    /// Sequences longer than `switch` turn by the second set of frequencies.
    pub fn choose_ropes(&mut self, switch: Option<u32>) {
        self.scope.rope_set = u32::from(switch.is_some_and(|switch| self.len() > switch));
    }

    /// The blocks that hold the beginning of it already, as far as there are any. At least its last token is left,
    /// since somebody must compute what follows it.
    pub fn find(&self, blocks: &BlockAllocator, block_tokens: u32) -> Vec<u32> {
        match self.work {
            Work::Generate { .. } => {
                blocks.find(&self.scope, &self.tokens[..self.tokens.len() - 1], block_tokens)
            }
            Work::Encode(_) => Vec::new(),
        }
    }

    /// Begins with these blocks, of which the first `found` hold its beginning, up to `contents`.
    pub fn begin(&mut self, blocks: Vec<u32>, found: u32, contents: Option<Contents>, block_tokens: u32) {
        self.blocks = blocks;
        self.published = (found, contents);
        self.scheduled = found * block_tokens;
        self.prefill = self.len() - self.scheduled;
        if !self.has_answered() {
            self.cached_prompt = self.scheduled;
        }
    }

    /// Lets others use the blocks that are full now that the positions before `end` are certain.
    pub fn publish(&mut self, end: u32, blocks: &mut BlockAllocator, block_tokens: u32) {
        let (mut count, mut contents) = self.published;
        let full = self.tokens.chunks_exact(block_tokens as usize).take((end / block_tokens) as usize);
        for (tokens, block) in full.zip(&self.blocks).skip(count as usize) {
            contents = Some(blocks.publish(*block, &self.scope, contents, tokens));
            count += 1;
        }
        self.published = (count, contents);
    }

    /// Starts over: all its state is to be computed anew. Returns its blocks and its slot.
    pub fn forget(&mut self) -> (Vec<u32>, Option<u32>) {
        self.epoch += 1;
        self.published = (0, None);
        self.scheduled = 0;
        self.announced = 0;
        self.begun = false;
        self.in_flight = 0;
        self.awaiting = false;
        (std::mem::take(&mut self.blocks), self.slot.take())
    }

    /// The next `count` positions as a row of a step, and so many drafts behind them. Its blocks must cover all of it.
    pub fn row(&mut self, id: SequenceId, count: u32, drafts: u32, block_tokens: u32) -> v1::Row {
        let start = self.scheduled;
        let end = start + count;
        let ends = end == self.len();
        self.scheduled = end;
        self.in_flight += 1;
        self.awaiting = ends;
        let reset = self.begins();
        self.begun = true;
        let row = v1::Row { sequence: id, start, count: count + drafts, drafts, reset, ..v1::Row::default() };
        let sampling = match &self.work {
            Work::Generate { sampling, .. } => reset.then(|| {
                let history = self.tokens[..start as usize].to_vec();
                v1::RowSampling { history, ..sampling.clone() }
            }),
            Work::Encode(encode) => {
                let output = match (encode.positions.is_empty(), encode.candidates) {
                    (true, _) => v1::RowOutput::Vector,
                    (false, 0) => v1::RowOutput::Vectors,
                    (false, _) => v1::RowOutput::Masks,
                };
                return v1::Row {
                    output: output as i32,
                    segment_ids: encode.segments.clone(),
                    positions: encode.positions.clone(),
                    candidates: encode.candidates,
                    pooled_from: encode.pooled_from,
                    ..row
                };
            }
        };
        let covered = (end + drafts).div_ceil(block_tokens).min(self.blocks.len() as u32);
        let first_block_index = self.announced;
        let new_blocks =
            self.blocks[first_block_index as usize..covered.max(first_block_index) as usize].to_vec();
        self.announced += new_blocks.len() as u32;
        self.on_stages = true;
        v1::Row {
            first_block_index,
            new_blocks,
            output: if ends { v1::RowOutput::Token } else { v1::RowOutput::None } as i32,
            sampling,
            state_slot: self.slot.filter(|_| reset),
            rope_set: self.scope.rope_set,
            ..row
        }
    }

    /// Takes what the last stage made of its last row; says whether the answer is complete.
    pub fn append(&mut self, output: Output) -> Option<Finish> {
        self.awaiting = false;
        self.failures = 0;
        self.drafts.clear();
        match (&self.work, output) {
            (Work::Generate { max_tokens, ends, .. }, Output::Token(token)) => {
                self.tokens.push(token);
                if ends.contains(&token) {
                    Some(Finish::End)
                } else if self.len() - self.prompt >= *max_tokens {
                    Some(Finish::Length)
                } else {
                    None
                }
            }
            _ => Some(Finish::Encoded),
        }
    }

    /// Takes back what a row's drafts took beyond those that became tokens. Returns the blocks that held nothing else.
    pub fn rewind(&mut self, block_tokens: u32) -> Vec<u32> {
        // All but the last token are computed.
        self.scheduled = self.len() - 1;
        let kept = self.len().div_ceil(block_tokens).min(self.blocks.len() as u32);
        self.announced = self.announced.min(kept);
        self.blocks.split_off(kept as usize)
    }
}
