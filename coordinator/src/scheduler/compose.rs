//! What goes into a step: who is admitted, who grows, who must give way.

use std::collections::HashMap;

use strata_proto::v1;

use super::{Config, Scheduler, SequenceId, flight::Flight, sequence::Sequence};

/// Failed steps after which a sequence is tried alone: the first one and two replays. One more is the end.
pub(super) const ALONE_AFTER: u32 = 3;

/// Chunks of a prompt for each stage after the first: stages idle for so small a part of the time that a prompt takes.
const CHUNKS: u32 = 8;
/// Fewer tokens are not worth the reading of the weights.
const LEAST_CHUNK: u32 = 32;

impl Scheduler {
    /// Gives a waiting sequence blocks for all its known tokens, if there are any to spare.
    fn admit(&mut self, id: SequenceId) -> bool {
        let Config { block_tokens, rope_switch, .. } = self.config;
        let shares_prefixes = self.shares_prefixes();
        let Some(sequence) = self.live.get_mut(&id) else { return false };
        let takes_slot = sequence.needs_slot(&self.rules);
        if takes_slot && self.slots.is_empty() {
            // Whoever has one keeps it to its end: it would have to begin at 0 again.
            return false;
        }
        let known = sequence.cached(&self.rules).div_ceil(block_tokens);
        // Every running sequence may soon want a block; whoever runs alone need not mind.
        let headroom = self.running.len() as u32;
        if known > 0 && self.blocks.available() <= headroom {
            // Whatever is found, one block at least is needed. Whoever waits is asked again and again.
            return false;
        }
        sequence.choose_ropes(rope_switch);
        let mut blocks = if shares_prefixes { sequence.find(&self.blocks, block_tokens) } else { Vec::new() };
        let found = blocks.len() as u32;
        if known > 0 {
            // The first sampled token needs a slot too.
            let needed = (sequence.cached(&self.rules) + 1).div_ceil(block_tokens) - found;
            if self.blocks.available() - self.blocks.idle_among(&blocks) < needed + headroom {
                return false;
            }
        }
        let contents = self.blocks.share(&blocks);
        let Some(new) = self.blocks.take(known - found) else {
            self.blocks.give_back(&blocks);
            return false;
        };
        blocks.extend(new);
        sequence.begin(blocks, found, contents, block_tokens);
        sequence.slot = if takes_slot { self.slots.pop() } else { None };
        if known > 0 {
            self.prefix_queries += u64::from(sequence.len());
            self.prefix_hits += u64::from(sequence.scheduled);
        }
        sequence.admitted = true;
        self.waiting.take(id, &sequence.party);
        self.running.insert(id);
        true
    }

    /// One row per running sequence whose next token is known, the longest unserved first, and only a fair share of
    /// them: the others go into the micro-batches that follow through the stages.
    pub(super) fn add_decodes(&mut self, step: &mut Step) {
        let mut ready: Vec<(u64, SequenceId)> = Vec::new();
        let mut decoders = 0;
        for id in &self.running {
            let sequence = &self.live[id];
            if sequence.suspect() {
                continue;
            }
            if sequence.decodes() {
                ready.push((sequence.last_step, *id));
            }
            decoders += u32::from(sequence.decodes() || sequence.awaiting);
        }
        ready.sort_unstable();
        let share = decoders.div_ceil(self.config.stages).min(self.config.max_step_rows);
        // Drafts take what tokens and outputs everybody's own row leaves.
        let room = self.config.max_step_tokens.min(self.config.max_step_rows);
        let mut spare = room.saturating_sub(share.min(ready.len() as u32));
        for (_, id) in ready {
            if step.rows.len() as u32 >= share || step.tokens() >= self.config.max_step_tokens {
                break;
            }
            if self.running.contains(&id) && self.grow(id, step) {
                let drafts = self.place_drafts(id, spare);
                spare -= drafts;
                self.add_row(id, 1, drafts, step);
            }
        }
    }

    /// How many of a sequence's drafts, at most `spare`, its next row can carry; it has blocks for them then.
    fn place_drafts(&mut self, id: SequenceId, spare: u32) -> u32 {
        let Config { block_tokens, rope_switch, .. } = self.config;
        let Some(sequence) = self.live.get_mut(&id).filter(|s| !s.drafts.is_empty()) else { return 0 };
        let len = sequence.len();
        // One set of frequencies for all that a row yields, and never more than the answer may still have.
        let until_switch = rope_switch.and_then(|switch| switch.checked_sub(len)).unwrap_or(u32::MAX);
        let wanted = (sequence.drafts.len() as u32)
            .min(sequence.left().saturating_sub(1))
            .min(until_switch)
            .min(spare);
        if !self.rules.blocks {
            return wanted;
        }
        // Every running sequence may soon want a block, and a guess is not worth another's place.
        let idle = self.blocks.available().saturating_sub(self.running.len() as u32);
        let held = sequence.blocks.len() as u32;
        let room = (held + idle).saturating_mul(block_tokens).saturating_sub(len);
        let drafts = wanted.min(room);
        let more = (len + drafts).div_ceil(block_tokens).saturating_sub(held);
        match self.blocks.take(more) {
            Some(blocks) => sequence.blocks.extend(blocks),
            None => return 0,
        }
        drafts
    }

    /// Chunks of prompts: first those that run, then waiting ones in their turns, while there is room.
    pub(super) fn add_prefills(&mut self, step: &mut Step) {
        let running: Vec<_> = self.running.iter().copied().collect();
        for id in running {
            self.add_chunk(id, step);
        }
        // Nobody overtakes the first in line.
        while let Some(id) = if self.closed { self.waiting.first_again() } else { self.waiting.first() } {
            let sequence = &self.live[&id];
            if sequence.suspect() || self.count_for(sequence, step) == 0 || !self.admit(id) {
                break;
            }
            self.add_chunk(id, step);
        }
    }

    /// The tokens of a sequence that go into this step.
    fn count_for(&self, sequence: &Sequence, step: &Step) -> u32 {
        let Config { max_step_tokens, max_step_rows, prefill_chunk, stages, .. } = self.config;
        if step.outputs + sequence.outputs() > max_step_rows {
            return 0;
        }
        // The last chunk is in the last stage when the others have nothing left to do, and the first one in the first
        // stage when they have nothing to do yet.
        let chunk = match stages {
            0 | 1 => prefill_chunk,
            _ => (sequence.prefill / (CHUNKS * (stages - 1))).max(LEAST_CHUNK).min(prefill_chunk),
        };
        sequence.next_count(chunk, (max_step_tokens - step.tokens()).min(step.prompt_room))
    }

    fn add_chunk(&mut self, id: SequenceId, step: &mut Step) {
        let sequence = &self.live[&id];
        let count = self.count_for(sequence, step);
        if count > 0 && !sequence.decodes() && !sequence.suspect() {
            self.add_row(id, count, 0, step);
        }
    }

    pub(super) fn add_alone(&mut self, id: SequenceId, step: &mut Step) {
        if !self.running.contains(&id) && !self.admit(id) {
            return;
        }
        let Some(sequence) = self.live.get(&id) else { return };
        let count = self.count_for(sequence, step);
        if count > 0 && self.grow(id, step) {
            self.add_row(id, count, 0, step);
        }
    }

    /// Makes sure that a running sequence has a block for its last known token, preempting others if need be.
    fn grow(&mut self, id: SequenceId, step: &Step) -> bool {
        loop {
            let Some(sequence) = self.live.get_mut(&id) else { return false };
            if sequence.cached(&self.rules).div_ceil(self.config.block_tokens) <= sequence.blocks.len() as u32
            {
                return true;
            }
            if let Some(block) = self.blocks.take(1) {
                sequence.blocks.extend(block);
                continue;
            }
            match self.victim(step) {
                Some(victim) => {
                    self.preemptions += 1;
                    self.requeue(victim);
                    if victim == id {
                        return false;
                    }
                }
                // Steps in flight will free or finish something.
                None => return false,
            }
        }
    }

    /// Who gives way: the youngest of the tenant that holds most of the cache, so that a burst takes nothing from others;
    /// never the oldest of all, so that somebody always gets on. None while that tenant's are all at work.
    fn victim(&self, step: &Step) -> Option<SequenceId> {
        let mut held: HashMap<&str, usize> = HashMap::new();
        for id in &self.running {
            let sequence = &self.live[id];
            *held.entry(&sequence.party.tenant).or_default() += sequence.blocks.len();
        }
        let tenant = |id: &SequenceId| &*self.live[id].party.tenant;
        let others = || self.running.iter().skip(1);
        let (_, _, most) = others().map(|id| (held[tenant(id)], *id, tenant(id))).max()?;
        let at_work =
            |id: &SequenceId| self.live[id].in_flight > 0 || step.rows.iter().any(|r| r.sequence == *id);
        others().rev().copied().find(|id| tenant(id) == most && !at_work(id))
    }

    /// Adds the next `count` positions of a sequence, and so many of its drafts behind them.
    fn add_row(&mut self, id: SequenceId, count: u32, drafts: u32, step: &mut Step) {
        let Some(sequence) = self.live.get_mut(&id) else { return };
        let (start, decodes) = (sequence.scheduled as usize, sequence.decodes());
        if !decodes {
            step.prompt_room -= count;
        }
        let drafts = sequence.drafts[..drafts as usize].to_vec();
        step.token_ids.extend(&sequence.tokens[start..start + count as usize]);
        step.token_ids.extend(&drafts);
        // A chunk that is not the last counts too: the bound is on rows as well.
        step.outputs += sequence.outputs() + drafts.len() as u32;
        step.rows.push(sequence.row(id, count, drafts.len() as u32, self.config.block_tokens));
        sequence.last_step = self.next_step + 1;
        step.flights.push(Flight {
            sequence: id,
            epoch: sequence.epoch,
            end: sequence.scheduled,
            yields: sequence.awaiting,
            decodes,
            drafts,
        });
    }
}

impl Sequence {
    /// Whether it goes alone because its batches failed again and again.
    pub(super) fn suspect(&self) -> bool {
        self.failures >= ALONE_AFTER
    }
}

/// A step being built.
#[derive(Debug)]
pub(super) struct Step {
    pub rows: Vec<v1::Row>,
    pub token_ids: Vec<u32>,
    pub flights: Vec<Flight>,
    /// Outputs that the rows may take, at least one each.
    outputs: u32,
    /// Tokens of prompts that there is still room for, whoever they belong to.
    prompt_room: u32,
}

impl Step {
    pub fn new(prompt_room: u32) -> Self {
        Step { rows: Vec::new(), token_ids: Vec::new(), flights: Vec::new(), outputs: 0, prompt_room }
    }

    fn tokens(&self) -> u32 {
        self.token_ids.len() as u32
    }
}
