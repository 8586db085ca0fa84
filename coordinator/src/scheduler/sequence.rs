//! One request as the scheduler sees it.

use std::time::Duration;

use strata_proto::v1;

/// Names a request for its whole life; ascending in order of arrival, never reused.
pub type SequenceId = u64;

/// What the scheduler needs to know of a request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Prompt, never empty.
    pub prompt: Vec<u32>,
    /// Most new tokens, at least one.
    pub max_tokens: u32,
    /// Tokens that end the answer.
    pub eos: Vec<u32>,
    /// When to give up, on the caller's clock.
    pub deadline: Option<Duration>,
    /// Sent to the last stage whenever the sequence's state is built anew.
    pub sampling: v1::RowSampling,
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token, which is part of the answer.
    Eos,
    /// As many tokens as were asked for.
    Length,
}

/// A live request.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Prompt and answer so far.
    pub tokens: Vec<u32>,
    prompt: u32,
    max_tokens: u32,
    eos: Vec<u32>,
    pub deadline: Option<Duration>,
    sampling: v1::RowSampling,
    /// Blocks it owns, in order of positions; none while it waits.
    pub blocks: Vec<u32>,
    /// How many of them the stages know of.
    announced: u32,
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
        Sequence {
            prompt: request.prompt.len() as u32,
            tokens: request.prompt,
            max_tokens: request.max_tokens,
            eos: request.eos,
            deadline: request.deadline,
            sampling: request.sampling,
            blocks: Vec::new(),
            announced: 0,
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

    /// Most positions it can ever occupy.
    pub fn most(&self) -> u64 {
        u64::from(self.prompt) + u64::from(self.max_tokens)
    }

    /// Positions that are known and in no step yet.
    pub fn remaining(&self) -> u32 {
        if self.awaiting { 0 } else { self.len() - self.scheduled }
    }

    /// Whether its next row is the one token that was sampled last.
    pub fn decodes(&self) -> bool {
        !self.awaiting && self.scheduled > 0 && self.remaining() == 1
    }

    /// Starts over: all its state is to be computed anew. Returns its blocks.
    pub fn forget(&mut self) -> Vec<u32> {
        self.epoch += 1;
        self.scheduled = 0;
        self.announced = 0;
        self.in_flight = 0;
        self.awaiting = false;
        std::mem::take(&mut self.blocks)
    }

    /// The next `count` positions as a row of a step. Its blocks must cover them.
    pub fn row(&mut self, id: SequenceId, count: u32, block_tokens: u32) -> v1::Row {
        let start = self.scheduled;
        let end = start + count;
        let covered = end.div_ceil(block_tokens);
        let first_block_index = self.announced;
        let new_blocks =
            self.blocks[first_block_index as usize..covered.max(first_block_index) as usize].to_vec();
        let samples = end == self.len();
        self.announced += new_blocks.len() as u32;
        self.scheduled = end;
        self.in_flight += 1;
        self.on_stages = true;
        self.awaiting = samples;
        v1::Row {
            sequence: id,
            start,
            count,
            reset: start == 0,
            first_block_index,
            new_blocks,
            output: if samples { v1::RowOutput::Token } else { v1::RowOutput::None } as i32,
            sampling: (start == 0).then(|| self.sampling.clone()),
            segment_ids: Vec::new(),
            rope_set: 0,
        }
    }

    /// Takes a sampled token; says whether the answer is complete.
    pub fn append(&mut self, token: u32) -> Option<Finish> {
        self.awaiting = false;
        self.failures = 0;
        self.tokens.push(token);
        if self.eos.contains(&token) {
            Some(Finish::Eos)
        } else if self.len() - self.prompt >= self.max_tokens {
            Some(Finish::Length)
        } else {
            None
        }
    }
}
