//! What goes into a step: who is admitted, who grows, who must give way.

use strata_proto::v1;

use super::{Config, Flight, Scheduler, SequenceId, sequence::Sequence};

/// Failed steps after which a sequence is tried alone: the first one and two replays. One more is the end.
pub(super) const ALONE_AFTER: u32 = 3;

impl Scheduler {
    /// Gives a waiting sequence blocks for all its known tokens, if there are any to spare.
    fn admit(&mut self, id: SequenceId) -> bool {
        let Some(sequence) = self.live.get_mut(&id) else { return false };
        let known = sequence.len().div_ceil(self.config.block_tokens);
        // The first sampled token needs a slot too.
        let needed = (sequence.len() + 1).div_ceil(self.config.block_tokens);
        // Every running sequence may soon want a block; whoever runs alone need not mind.
        let headroom = self.running.len() as u32;
        if self.blocks.free() < needed + headroom {
            return false;
        }
        let Some(blocks) = self.blocks.take(known) else { return false };
        sequence.blocks = blocks;
        self.waiting.remove(&id);
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
        let share = decoders.div_ceil(self.config.depth).min(self.config.max_step_rows);
        for (_, id) in ready {
            if step.rows.len() as u32 >= share || step.tokens() >= self.config.max_step_tokens {
                break;
            }
            if self.running.contains(&id) && self.grow(id, step) {
                self.add_row(id, 1, step);
            }
        }
    }

    /// Chunks of prompts: first those that run, then waiting ones in order of arrival, while there is room.
    pub(super) fn add_prefills(&mut self, step: &mut Step) {
        let running: Vec<_> = self.running.iter().copied().collect();
        for id in running {
            self.add_chunk(id, step);
        }
        while step.has_room(&self.config) {
            // Nobody overtakes the first in line.
            match self.waiting.first().copied() {
                Some(id) if !self.live[&id].suspect() && self.admit(id) => self.add_chunk(id, step),
                _ => break,
            }
        }
    }

    fn add_chunk(&mut self, id: SequenceId, step: &mut Step) {
        let sequence = &self.live[&id];
        let room = self.config.max_step_tokens - step.tokens();
        let count = sequence.remaining().min(self.config.prefill_chunk).min(room);
        if count > 0 && !sequence.decodes() && !sequence.suspect() && step.has_room(&self.config) {
            self.add_row(id, count, step);
        }
    }

    pub(super) fn add_alone(&mut self, id: SequenceId, step: &mut Step) {
        if self.waiting.contains(&id) && !self.admit(id) {
            return;
        }
        let Some(sequence) = self.live.get(&id) else { return };
        let count = sequence.remaining().min(self.config.prefill_chunk).min(self.config.max_step_tokens);
        if count > 0 && self.grow(id, step) {
            self.add_row(id, count, step);
        }
    }

    /// Makes sure that a running sequence has a block for its last known token, preempting others if need be.
    fn grow(&mut self, id: SequenceId, step: &Step) -> bool {
        loop {
            let Some(sequence) = self.live.get_mut(&id) else { return false };
            if sequence.len().div_ceil(self.config.block_tokens) <= sequence.blocks.len() as u32 {
                return true;
            }
            if let Some(block) = self.blocks.take(1) {
                sequence.blocks.extend(block);
                continue;
            }
            let oldest = self.running.first().copied();
            let victim = self.running.iter().rev().copied().find(|v| {
                Some(*v) != oldest
                    && self.live[v].in_flight == 0
                    && !step.rows.iter().any(|r| r.sequence == *v)
            });
            match victim {
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

    fn add_row(&mut self, id: SequenceId, count: u32, step: &mut Step) {
        let Some(sequence) = self.live.get_mut(&id) else { return };
        let start = sequence.scheduled as usize;
        step.token_ids.extend(&sequence.tokens[start..start + count as usize]);
        step.rows.push(sequence.row(id, count, self.config.block_tokens));
        sequence.last_step = self.next_step + 1;
        step.flights.push(Flight { sequence: id, epoch: sequence.epoch, samples: sequence.awaiting });
    }
}

impl Sequence {
    /// Whether it goes alone because its batches failed again and again.
    pub(super) fn suspect(&self) -> bool {
        self.failures >= ALONE_AFTER
    }
}

/// A step being built.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub rows: Vec<v1::Row>,
    pub token_ids: Vec<u32>,
    pub flights: Vec<Flight>,
}

impl Step {
    fn tokens(&self) -> u32 {
        self.token_ids.len() as u32
    }

    fn has_room(&self, config: &Config) -> bool {
        self.tokens() < config.max_step_tokens && (self.rows.len() as u32) < config.max_step_rows
    }
}
