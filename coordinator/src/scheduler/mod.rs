//! Continuous batching over paged KV memory, as a pure state machine: no clock, no IO, no runtime.
//!
//! Sequences are `waiting` (no blocks; by turns, see `queue.rs`) or `running` (blocks for every known token). A step holds
//! decode rows first, then chunks of prompts. The scheduler alone owns block ids and slots; since all changes to that memory ride inside
//! steps, which every stage runs in one order, what is freed may be given out again at once.
//!
//! A decode row may carry drafts, guesses of the tokens to come ([`Scheduler::propose`]). The last stage answers with
//! those that are what it samples, and one token more; the positions of the others are taken back.

// Pure: see clippy.toml.
#![deny(clippy::disallowed_methods, clippy::print_stdout, clippy::print_stderr)]

mod blocks;
mod commit;
mod compose;
mod error;
mod flight;
mod queue;
mod rules;
mod sequence;
#[cfg(test)]
mod simulation;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use strata_proto::{StateKind, v1};

use blocks::BlockAllocator;
use compose::Step;
pub use error::{CommitError, SubmitError};
use flight::Flight;
use queue::Queue;
use rules::{Reuse, Rewind, Rules};
use sequence::Sequence;
pub use sequence::{Encode, Finish, Request, SequenceId, Work};

/// Size of the machine that is scheduled for.
#[derive(Debug, Clone)]
pub struct Config {
    /// KV blocks of the pipeline.
    pub blocks: u32,
    /// Token positions in a block.
    pub block_tokens: u32,
    /// Kinds of state that sequences have.
    pub states: Vec<StateKind>,
    /// Sequences whose states of fixed size the pipeline holds at once.
    pub state_slots: u32,
    /// Most tokens in one step.
    pub max_step_tokens: u32,
    /// Most rows in one step, each counted by its outputs: one, or as many as it has masks, and one more for each
    /// draft.
    pub max_step_rows: u32,
    /// Most prompt tokens of one sequence in one step.
    pub prefill_chunk: u32,
    /// Steps in flight: enough to keep every stage busy.
    pub depth: u32,
    /// Stages of the pipeline. Those who decode are divided into as many shares: more would read the weights more
    /// often.
    pub stages: u32,
    /// Sequences that grow longer than this must be computed anew, by other rotary frequencies (longrope).
    pub rope_switch: Option<u32>,
    /// Sequences use what others of their tenant computed of the same prefix.
    pub prefix_cache: bool,
}

/// What the last stage made of a row, as far as the scheduler cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// A sampled token.
    Token(u32),
    /// All that an encoder was asked for.
    Whole,
}

/// An output that counts from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// Whose.
    pub sequence: SequenceId,
    /// The output.
    pub output: Output,
    /// Which of the step's outputs it is.
    pub index: usize,
    /// Set if it was the last one; the sequence is gone then.
    pub finished: Option<Finish>,
    /// Tokens of the prompt that had been computed for others before.
    pub cached_prompt: u32,
}

/// Gauges and counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences with blocks.
    pub running: u32,
    /// Sequences without.
    pub waiting: u32,
    /// Blocks in use.
    pub blocks_used: u32,
    /// Blocks in all.
    pub blocks_total: u32,
    /// Steps in flight.
    pub in_flight: u32,
    /// Sequences that lost their blocks to an older one, since the start.
    pub preemptions: u64,
    /// Tokens of admitted sequences, since the start, and how many of them had been computed for others before.
    pub prefix_queries: u64,
    /// See `prefix_queries`.
    pub prefix_hits: u64,
}

/// A sequence that no scheduler has: a new one, or one that was given up.
#[derive(Debug)]
pub struct Unplaced {
    /// Its id, which it keeps. Higher than that of any sequence before it, whichever scheduler had that.
    pub id: SequenceId,
    sequence: Sequence,
}

impl Unplaced {
    /// A new one.
    pub fn new(id: SequenceId, request: Request) -> Self {
        Unplaced { id, sequence: Sequence::new(request) }
    }
}

/// The scheduler of one pipeline.
#[derive(Debug)]
pub struct Scheduler {
    config: Config,
    rules: Rules,
    blocks: BlockAllocator,
    /// Slots for states of fixed size that nobody has.
    slots: Vec<u32>,
    live: BTreeMap<SequenceId, Sequence>,
    running: BTreeSet<SequenceId>,
    waiting: Queue,
    in_flight: VecDeque<(u64, Vec<Flight>)>,
    /// Sequences that stages may forget, told with the next step.
    released: Vec<SequenceId>,
    next_step: u64,
    preemptions: u64,
    prefix_queries: u64,
    prefix_hits: u64,
    /// Most tokens of prompts in a step while somebody decodes.
    mixed_tokens: u32,
    /// Nobody begins any more.
    closed: bool,
}

impl Scheduler {
    /// A scheduler with nothing to do.
    pub fn new(config: Config) -> Self {
        Scheduler {
            rules: Rules::of_all(&config.states),
            blocks: BlockAllocator::new(config.blocks),
            slots: (0..config.state_slots).rev().collect(),
            config,
            live: BTreeMap::new(),
            running: BTreeSet::new(),
            waiting: Queue::default(),
            in_flight: VecDeque::new(),
            released: Vec::new(),
            next_step: 0,
            preemptions: 0,
            prefix_queries: 0,
            prefix_hits: 0,
            mixed_tokens: u32::MAX,
            closed: false,
        }
    }

    /// Lets nobody begin any more until it is [restarted](Self::restart): who has begun goes on, the others wait.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Whether it is [closed](Self::close).
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether everybody who had begun has ended.
    pub fn is_idle(&self) -> bool {
        !self.live.values().any(|sequence| sequence.admitted)
    }

    /// Gives up every sequence, with all that is known of it, for other schedulers to [adopt](Self::adopt).
    pub fn surrender(&mut self) -> Vec<Unplaced> {
        let live = std::mem::take(&mut self.live).into_iter();
        let moved = live.map(|(id, mut sequence)| {
            let (blocks, slot) = sequence.forget();
            self.blocks.give_back(&blocks);
            self.slots.extend(slot);
            sequence.on_stages = false;
            sequence.last_step = 0;
            Unplaced { id, sequence }
        });
        let moved = moved.collect();
        self.running.clear();
        self.waiting = Queue::default();
        self.in_flight.clear();
        moved
    }

    /// Bounds the tokens of prompts in steps while somebody decodes, who would have to wait for them; at least one.
    pub fn limit_mixed_steps(&mut self, tokens: u32) {
        self.mixed_tokens = tokens.max(1);
    }

    /// Takes a sequence in, to be computed from its beginning when there is room and it is its turn, by turns of tenants and
    /// connections; one that ran on another scheduler goes before its tenant's new ones.
    /// [`check`](Self::check) it first, unless it was this scheduler's own; then [`restart`](Self::restart) decides.
    pub fn adopt(&mut self, unplaced: Unplaced) {
        let Unplaced { id, sequence } = unplaced;
        match sequence.admitted {
            true => self.waiting.push_again(id, &sequence.party),
            false => self.waiting.push(id, &sequence.party, sequence.len()),
        }
        self.live.insert(id, sequence);
    }

    /// Whether a sequence could run here at all.
    ///
    /// # Errors
    /// If it could not run even with the whole cache. Not looked at while there is no cache (0 blocks): then
    /// [`restart`](Self::restart) looks.
    pub fn check(&self, unplaced: &Unplaced) -> Result<(), SubmitError> {
        let (sequence, capacity) = (&unplaced.sequence, self.capacity());
        let needed = sequence.most(&self.rules);
        if capacity > 0 && needed > capacity {
            return Err(SubmitError::TooLarge { needed, capacity });
        }
        if !self.fits_a_step(sequence) {
            let (tokens, outputs) = (sequence.len(), sequence.outputs());
            let (max_tokens, max_rows) = (self.config.max_step_tokens, self.config.max_step_rows);
            return Err(SubmitError::TooLargeForAStep { tokens, outputs, max_tokens, max_rows });
        }
        Ok(())
    }

    /// The next step, its fence left empty; `None` if enough are in flight or nothing can be done now.
    pub fn next_step(&mut self) -> Option<v1::StepMeta> {
        if self.in_flight.len() >= self.config.depth as usize {
            return None;
        }
        let suspects: Vec<_> = self.live.iter().filter(|(_, s)| s.suspect()).map(|(id, _)| *id).collect();
        // Those who decode wait for this step, even if they are in another one.
        let somebody_waits = self.running.iter().any(|id| self.live[id].has_answered());
        let mut step = Step::new(if somebody_waits { self.mixed_tokens } else { u32::MAX });
        for id in suspects {
            // A sequence whose batch failed again and again goes alone, so that it can only harm itself.
            self.add_alone(id, &mut step);
            if !step.rows.is_empty() {
                break;
            }
        }
        if step.rows.is_empty() {
            // More micro-batches would be smaller ones, and weights are read once for each.
            let decoding = self.in_flight.iter().filter(|(_, flights)| flights.iter().any(|f| f.decodes));
            if decoding.count() < self.config.stages as usize {
                self.add_decodes(&mut step);
            }
            self.add_prefills(&mut step);
        }
        if step.rows.is_empty() {
            return None;
        }
        let number = self.next_step;
        self.next_step += 1;
        self.in_flight.push_back((number, step.flights));
        Some(v1::StepMeta {
            fence: None,
            step: number,
            rows: step.rows,
            token_ids: step.token_ids,
            released: std::mem::take(&mut self.released),
        })
    }

    /// Guesses how a sequence goes on: `drafts` are the tokens that may follow its last one. As many of them as there
    /// is room for go into its next decode step, and nobody gives way for them. They are forgotten with the next token;
    /// until then, later ones replace them. A guess costs time at most, never a token, and is ignored where states
    /// cannot be taken back.
    pub fn propose(&mut self, id: SequenceId, drafts: Vec<u32>) {
        if let Some(sequence) = self.live.get_mut(&id).filter(|_| self.rules.rewind == Rewind::Overwrite) {
            sequence.drafts = drafts;
        }
    }

    /// Removes a sequence and frees its blocks. Unknown ids are ignored: it may have ended meanwhile.
    pub fn cancel(&mut self, id: SequenceId) {
        if let Some(sequence) = self.live.remove(&id) {
            if sequence.on_stages {
                self.released.push(id);
            }
            self.blocks.give_back(&sequence.blocks);
            self.slots.extend(sequence.slot);
            self.running.remove(&id);
            self.waiting.remove(id, &sequence.party);
            self.waiting.charge(&sequence.party, sequence.answered().into());
        }
    }

    /// Removes the sequences whose deadline is not after `now`.
    pub fn expire(&mut self, now: Duration) -> Vec<SequenceId> {
        let late = |s: &Sequence| s.deadline.is_some_and(|d| d <= now);
        let expired: Vec<_> = self.live.iter().filter(|(_, s)| late(s)).map(|(id, _)| *id).collect();
        for id in &expired {
            self.cancel(*id);
        }
        expired
    }

    /// Begins a new incarnation of the pipeline: steps count from 0, every live sequence is computed anew, of
    /// each tenant those that ran first, in order of arrival. Returns those that cannot fit any more; they are gone.
    pub fn restart(&mut self, config: Config) -> Vec<SequenceId> {
        self.config = config;
        self.rules = Rules::of_all(&self.config.states);
        self.blocks = BlockAllocator::new(self.config.blocks);
        self.in_flight.clear();
        self.next_step = 0;
        self.mixed_tokens = u32::MAX;
        self.closed = false;
        for sequence in self.live.values_mut() {
            // What they had is gone with the old incarnation.
            sequence.forget();
            sequence.on_stages = false;
            sequence.last_step = 0;
        }
        self.slots = (0..self.config.state_slots).rev().collect();
        for id in std::mem::take(&mut self.running) {
            self.waiting.push_again(id, &self.live[&id].party);
        }
        let capacity = self.capacity();
        let lost = |s: &Sequence| s.most(&self.rules) > capacity || !self.fits_a_step(s);
        let lost: Vec<_> = self.live.iter().filter(|(_, s)| lost(s)).map(|(id, _)| *id).collect();
        for id in &lost {
            self.cancel(*id);
        }
        self.released.clear();
        lost
    }

    /// Gauges and counters.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len() as u32,
            waiting: (self.live.len() - self.running.len()) as u32,
            blocks_used: self.blocks.total() - self.blocks.available(),
            blocks_total: self.blocks.total(),
            in_flight: self.in_flight.len() as u32,
            preemptions: self.preemptions,
            prefix_queries: self.prefix_queries,
            prefix_hits: self.prefix_hits,
        }
    }

    /// Whether what must be computed at once can be.
    fn fits_a_step(&self, sequence: &Sequence) -> bool {
        match &sequence.work {
            Work::Generate { .. } => true,
            Work::Encode(encode) => {
                sequence.len() <= self.config.max_step_tokens && encode.outputs() <= self.config.max_step_rows
            }
        }
    }

    /// Whether sequences may begin behind positions that others computed.
    fn shares_prefixes(&self) -> bool {
        self.config.prefix_cache && self.rules.reuse == Reuse::WholeBlocks
    }

    /// Positions that the largest of its sequences may need.
    pub fn largest(&self) -> u64 {
        self.live.values().map(|sequence| sequence.most(&self.rules)).max().unwrap_or(0)
    }

    /// Token positions of the whole cache.
    fn capacity(&self) -> u64 {
        u64::from(self.config.blocks) * u64::from(self.config.block_tokens)
    }

    /// Sends a sequence back to wait; everything known of it is computed anew.
    fn requeue(&mut self, id: SequenceId) {
        if let Some(sequence) = self.live.get_mut(&id) {
            let (blocks, slot) = sequence.forget();
            self.blocks.give_back(&blocks);
            self.slots.extend(slot);
            self.running.remove(&id);
            self.waiting.push_again(id, &sequence.party);
        }
    }
}
