//! What is done when the last stage answers: what counts from then on, or what is tried again.

use super::{
    CommitError, Committed, Output, Scheduler, SequenceId,
    compose::ALONE_AFTER,
    flight::{Flight, bursts},
};

impl Scheduler {
    /// Takes the outputs of a step that the last stage committed; those of a sequence follow each other.
    ///
    /// # Errors
    /// If the step is not the oldest in flight, an output is missing, or there are others than the row allows: the
    /// pipeline is broken then, no output of the step counts, and only [`restart`](Self::restart) goes on.
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

    /// Removes the oldest step in flight, which must be `step`.
    fn land(&mut self, step: u64) -> Result<Vec<Flight>, CommitError> {
        let due = self.in_flight.front().map(|(number, _)| *number);
        match self.in_flight.pop_front() {
            Some((number, flights)) if number == step => Ok(flights),
            _ => Err(CommitError::OutOfOrder { got: step, due }),
        }
    }
}
