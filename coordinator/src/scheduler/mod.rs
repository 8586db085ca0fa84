//! Continuous batching over paged KV memory, as a pure state machine: no clock, no IO, no runtime.
//!
//! Sequences are `waiting` (no blocks) or `running` (blocks for every known token). A step holds decode rows first,
//! then chunks of prompts. The scheduler alone owns block ids and slots; since all changes to that memory ride inside
//! steps, which every stage runs in one order, what is freed may be given out again at once.
//!
//! A decode row may carry drafts, guesses of the tokens to come ([`Scheduler::propose`]). The last stage answers with those
//! that are what it samples, and one token more; the positions of the others are taken back.

// Pure: see clippy.toml.
#![deny(clippy::disallowed_methods, clippy::print_stdout, clippy::print_stderr)]

mod blocks;
mod compose;
mod rules;
mod sequence;
#[cfg(test)]
mod simulation;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Range,
    time::Duration,
};

use strata_proto::{
    StateKind,
    error::{Classify, Kind},
    v1,
};

use blocks::BlockAllocator;
use compose::{ALONE_AFTER, Step};
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
    /// Most rows, and most outputs, in one step.
    pub max_step_rows: u32,
    /// Most prompt tokens of one sequence in one step.
    pub prefill_chunk: u32,
    /// Steps in flight: enough to keep every stage busy.
    pub depth: u32,
    /// Stages of the pipeline. Those who decode are divided into as many shares: more would read the weights more often.
    pub stages: u32,
    /// Sequences that grow longer than this must be computed anew, by other rotary frequencies (longrope).
    pub rope_switch: Option<u32>,
    /// Sequences use what others of their tenant computed of the same prefix.
    pub prefix_cache: bool,
}

/// Why a request cannot be scheduled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// It could not run even alone.
    #[error("prompt and max_tokens need {needed} cached tokens, but this deployment holds {capacity}")]
    TooLarge {
        /// Prompt and answer together.
        needed: u64,
        /// What the cache holds.
        capacity: u64,
    },
    /// An input that must be computed at once does not fit a step.
    #[error(
        "an input of {tokens} tokens and {outputs} outputs does not fit a step of {max_tokens} and {max_outputs}; raise \
         --max-step-tokens or --max-step-rows"
    )]
    TooLargeForAStep {
        /// Tokens of the input.
        tokens: u32,
        /// Outputs wanted.
        outputs: u32,
        /// Tokens of a step.
        max_tokens: u32,
        /// Outputs of a step.
        max_outputs: u32,
    },
}

impl SubmitError {
    /// The room that there was.
    pub fn room(&self) -> u64 {
        match self {
            SubmitError::TooLarge { capacity, .. } => *capacity,
            SubmitError::TooLargeForAStep { max_tokens, .. } => u64::from(*max_tokens),
        }
    }
}

impl Classify for SubmitError {
    fn kind(&self) -> Kind {
        Kind::BadInput
    }
}

/// Something the pipeline said that cannot be; ends its incarnation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// Results come in the order of steps.
    #[error("a result for step {got} came where {due:?} was due")]
    OutOfOrder {
        /// The step of the result.
        got: u64,
        /// The oldest step in flight.
        due: Option<u64>,
    },
    /// A row that yields something has nothing.
    #[error("step {step} has no output for sequence {sequence}")]
    Missing {
        /// The step.
        step: u64,
        /// The sequence.
        sequence: SequenceId,
    },
    /// A row yields more than it may.
    #[error(
        "step {step} has {outputs} outputs for sequence {sequence}, of which all but the last must be its {drafts} drafts"
    )]
    NotDrafted {
        /// The step.
        step: u64,
        /// The sequence.
        sequence: SequenceId,
        /// What came for it, in one piece or in several.
        outputs: usize,
        /// Tokens that its row guessed.
        drafts: usize,
    },
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

/// A row in flight.
#[derive(Debug)]
struct Flight {
    sequence: SequenceId,
    epoch: u32,
    /// The position after its last one.
    end: u32,
    yields: bool,
    /// It is the one token that was sampled last.
    decodes: bool,
    /// Guesses of those that follow, which are in the row too.
    drafts: Vec<u32>,
}

impl Flight {
    /// Whether the row may yield these: some of its drafts, and one more token.
    fn may_yield(&self, outputs: &[(SequenceId, Output)]) -> bool {
        let Some((_, accepted)) = outputs.split_last() else { return false };
        let mut drafts = self.drafts.iter();
        accepted.iter().all(|(_, output)| drafts.next().is_some_and(|draft| *output == Output::Token(*draft)))
    }
}

/// Where the outputs of each sequence are. Of those that are not in one piece, the last piece.
fn bursts(outputs: &[(SequenceId, Output)]) -> HashMap<SequenceId, Range<usize>> {
    let mut bursts: HashMap<SequenceId, Range<usize>> = HashMap::with_capacity(outputs.len());
    for (at, (sequence, _)) in outputs.iter().enumerate() {
        let burst = bursts.entry(*sequence).or_insert(at..at);
        *burst = if burst.end == at { burst.start..at + 1 } else { at..at + 1 };
    }
    bursts
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
    waiting: BTreeSet<SequenceId>,
    in_flight: VecDeque<(u64, Vec<Flight>)>,
    /// Sequences that stages may forget, told with the next step.
    released: Vec<SequenceId>,
    next_step: u64,
    preemptions: u64,
    prefix_queries: u64,
    prefix_hits: u64,
    /// Most tokens of prompts in a step while somebody decodes.
    mixed_tokens: u32,
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
            waiting: BTreeSet::new(),
            in_flight: VecDeque::new(),
            released: Vec::new(),
            next_step: 0,
            preemptions: 0,
            prefix_queries: 0,
            prefix_hits: 0,
            mixed_tokens: u32::MAX,
        }
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
        self.waiting.clear();
        self.in_flight.clear();
        moved
    }

    /// Bounds the tokens of prompts in steps while somebody decodes, who would have to wait for them; at least one.
    pub fn limit_mixed_steps(&mut self, tokens: u32) {
        self.mixed_tokens = tokens.max(1);
    }

    /// Takes a sequence in, to be computed from its beginning when there is room and it is first in line by its id.
    /// [`check`](Self::check) it first, unless it was this scheduler's own; then [`restart`](Self::restart) decides.
    pub fn adopt(&mut self, unplaced: Unplaced) {
        self.waiting.insert(unplaced.id);
        self.live.insert(unplaced.id, unplaced.sequence);
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
            let (max_tokens, max_outputs) = (self.config.max_step_tokens, self.config.max_step_rows);
            return Err(SubmitError::TooLargeForAStep { tokens, outputs, max_tokens, max_outputs });
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

    /// Guesses how a sequence goes on: `drafts` are the tokens that may follow its last one. As many of them as there is
    /// room for go into its next decode step, and nobody gives way for them. They are forgotten with the next token; until
    /// then, later ones replace them. A guess costs time at most, never a token, and is ignored where states cannot be
    /// taken back.
    pub fn propose(&mut self, id: SequenceId, drafts: Vec<u32>) {
        if let Some(sequence) = self.live.get_mut(&id).filter(|_| self.rules.rewind == Rewind::Overwrite) {
            sequence.drafts = drafts;
        }
    }

    /// Takes the outputs of a step that the last stage committed; those of a sequence follow each other.
    ///
    /// # Errors
    /// If the step is not the oldest in flight, an output is missing, or there are others than the row allows: the pipeline
    /// is broken then, no output of the step counts, and only [`restart`](Self::restart) goes on.
    pub fn commit(
        &mut self,
        step: u64,
        outputs: &[(SequenceId, Output)],
    ) -> Result<Vec<Committed>, CommitError> {
        let flights = self.land(step)?;
        let bursts = bursts(outputs);
        // Looked for before anything is taken: an output must count if and only if the caller gets to see it.
        let current =
            |f: &&Flight| f.yields && self.live.get(&f.sequence).is_some_and(|s| s.epoch == f.epoch);
        for flight in flights.iter().filter(current) {
            let sequence = flight.sequence;
            let burst = bursts.get(&sequence).ok_or(CommitError::Missing { step, sequence })?;
            if !flight.may_yield(&outputs[burst.clone()]) {
                let (outputs, drafts) = (burst.len(), flight.drafts.len());
                return Err(CommitError::NotDrafted { step, sequence, outputs, drafts });
            }
        }
        let shares_prefixes = self.shares_prefixes();
        let mut committed = Vec::new();
        for flight in flights {
            let Some(sequence) = self.live.get_mut(&flight.sequence).filter(|s| s.epoch == flight.epoch)
            else {
                continue;
            };
            sequence.in_flight -= 1;
            if shares_prefixes {
                // Not before: a step that fails leaves anything in its blocks.
                sequence.publish(flight.end, &mut self.blocks, self.config.block_tokens);
            }
            let Some(burst) = bursts.get(&flight.sequence).cloned().filter(|_| flight.yields) else {
                continue;
            };
            let (id, cached_prompt) = (flight.sequence, sequence.cached_prompt);
            let mut finished = None;
            for index in burst {
                let output = outputs[index].1;
                finished = sequence.append(output);
                committed.push(Committed { sequence: id, output, index, finished, cached_prompt });
                if finished.is_some() {
                    // What was accepted behind the end is not part of the answer.
                    break;
                }
            }
            if !flight.drafts.is_empty() {
                self.blocks.give_back(&sequence.rewind(self.config.block_tokens));
            }
            let switches = Some(sequence.len() - 1) == self.config.rope_switch;
            if finished.is_some() {
                self.cancel(id);
            } else if switches {
                // All that is cached has turned by the wrong angles.
                self.requeue(id);
            }
        }
        Ok(committed)
    }

    /// Takes note that a step was poisoned: its sequences are computed anew, twice at most among others, then alone.
    /// Returns those that failed even so; they are gone.
    ///
    /// # Errors
    /// If the step is not the oldest in flight.
    pub fn fail(&mut self, step: u64) -> Result<Vec<SequenceId>, CommitError> {
        let flights = self.land(step)?;
        let mut given_up = Vec::new();
        for flight in flights {
            let Some(sequence) = self.live.get_mut(&flight.sequence).filter(|s| s.epoch == flight.epoch)
            else {
                continue;
            };
            sequence.failures += 1;
            if sequence.failures > ALONE_AFTER {
                self.cancel(flight.sequence);
                given_up.push(flight.sequence);
            } else {
                self.requeue(flight.sequence);
            }
        }
        Ok(given_up)
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
            self.waiting.remove(&id);
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

    /// Begins a new incarnation of the pipeline: steps count from 0, every live sequence is computed anew in order of
    /// arrival. Returns those that cannot fit any more; they are gone.
    pub fn restart(&mut self, config: Config) -> Vec<SequenceId> {
        self.config = config;
        self.rules = Rules::of_all(&self.config.states);
        self.blocks = BlockAllocator::new(self.config.blocks);
        self.in_flight.clear();
        self.next_step = 0;
        self.mixed_tokens = u32::MAX;
        for sequence in self.live.values_mut() {
            // What they had is gone with the old incarnation.
            sequence.forget();
            sequence.on_stages = false;
            sequence.last_step = 0;
        }
        self.slots = (0..self.config.state_slots).rev().collect();
        self.running.clear();
        self.waiting = self.live.keys().copied().collect();
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
            waiting: self.waiting.len() as u32,
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

    /// Token positions of the whole cache.
    fn capacity(&self) -> u64 {
        u64::from(self.config.blocks) * u64::from(self.config.block_tokens)
    }

    /// Removes the oldest step in flight, which must be `step`.
    fn land(&mut self, step: u64) -> Result<Vec<Flight>, CommitError> {
        let due = self.in_flight.front().map(|(number, _)| *number);
        match self.in_flight.pop_front() {
            Some((number, flights)) if number == step => Ok(flights),
            _ => Err(CommitError::OutOfOrder { got: step, due }),
        }
    }

    /// Sends a sequence back to wait; everything known of it is computed anew.
    fn requeue(&mut self, id: SequenceId) {
        if let Some(sequence) = self.live.get_mut(&id) {
            let (blocks, slot) = sequence.forget();
            self.blocks.give_back(&blocks);
            self.slots.extend(slot);
            self.running.remove(&id);
            self.waiting.insert(id);
        }
    }
}
