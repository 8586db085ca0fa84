//! What coordinators elect each other by, to the contract of `cluster/etcd/election.rs`: one key for each process under a
//! lease; the last leader leads while it has one, or the oldest, once workers do not hear the last leader any more; by a term
//! above all that this store, and workers, have seen. It does everything at once, in one order.

use tonic::Status;

use super::{
    Plant,
    letters::{Answer, ProcessId},
    world::{SECOND, Time, World},
};

/// How long a key outlives its process.
const TTL: Time = 5 * SECOND;

#[derive(Default)]
pub struct Store {
    /// It answers nobody.
    pub is_down: bool,
    revision: u64,
    /// Candidates by age, with the end of their leases.
    candidates: Vec<(ProcessId, u64, Time)>,
    /// Who led last, and by which term.
    led: Option<(ProcessId, u64)>,
}

impl World {
    /// A candidate renews its lease, and hears whether it leads.
    pub fn stand(&mut self, by: ProcessId, followed: u64, is_heard: bool) -> Result<Answer, Status> {
        let (now, plant, store) = (self.now, self.plant, &mut self.store);
        if store.is_down {
            return Err(Status::unavailable("the store is down"));
        }
        store.candidates.retain(|(_, _, end)| *end > now);
        match store.candidates.iter_mut().find(|(candidate, ..)| *candidate == by) {
            Some((_, _, end)) => *end = now + TTL,
            None => {
                store.revision += 1;
                store.candidates.push((by, store.revision, now + TTL));
            }
        }
        let led = store
            .candidates
            .iter()
            .find(|(candidate, ..)| store.led.is_some_and(|(last, _)| last == *candidate));
        let Some((first, created, _)) = led.or(store.candidates.first()).copied() else {
            return Ok(Answer::Stands(None));
        };
        let leads_on = |(last, term)| last != by && term == followed && is_heard;
        if first != by || store.led.is_some_and(leads_on) {
            return Ok(Answer::Stands(None));
        }
        let term = match store.led {
            Some((last, term)) if last == by && term >= followed => term,
            last => {
                let above = last.map_or(0, |(_, term)| term).max(followed);
                if plant == Plant::SameTerm { above.max(1) } else { created.max(above + 1) }
            }
        };
        if store.led != Some((by, term)) {
            store.led = Some((by, term));
            self.note(|| format!("{by} is elected, by term {term}"));
        }
        Ok(Answer::Stands(Some(term)))
    }
}
