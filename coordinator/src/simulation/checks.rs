//! What must hold, at every moment.

use std::collections::BTreeMap;

use strata_proto::v1::Fence;

use super::{letters::ProcessId, world::World};

#[derive(Default)]
pub struct Checks {
    /// Who acted by a term.
    actors: BTreeMap<u64, ProcessId>,
    /// The newest fence of a pipeline that a worker let in, since it began.
    newest: BTreeMap<(usize, u64, u32), Fence>,
    /// The highest term that it let in.
    terms: BTreeMap<(usize, u64), u64>,
    /// What did not hold.
    pub violation: Option<String>,
}

impl World {
    pub fn violated(&mut self, what: String) {
        self.note(|| format!("VIOLATION: {what}"));
        self.checks.violation.get_or_insert(what);
    }

    /// A worker has let a call in.
    pub fn let_in(&mut self, worker: usize, boot: u64, by: ProcessId, fence: Fence) {
        let actor = *self.checks.actors.entry(fence.term).or_insert(by);
        if actor != by {
            self.violated(format!(
                "{by} acts by term {} on w{worker}, by which {actor} has acted",
                fence.term
            ));
        }
        let highest = self.checks.terms.entry((worker, boot)).or_default();
        let (before, term) = (*highest, fence.term);
        *highest = before.max(term);
        if term < before {
            self.violated(format!("w{worker} lets a call of term {term} in after one of term {before}"));
        }
        let newest = self.checks.newest.entry((worker, boot, fence.pipeline)).or_insert(fence);
        let before = *newest;
        if fence.is_stale(&before) {
            self.violated(format!("w{worker} lets a call of {fence} in after one of {before}"));
        } else {
            *newest = fence;
        }
    }

    /// A worker computes a step.
    pub fn computes(&mut self, worker: usize, boot: u64, fence: Fence) {
        let highest = self.checks.terms.get(&(worker, boot)).copied().unwrap_or(0);
        if fence.term < highest {
            self.violated(format!("w{worker} computes for {fence} after it has let in term {highest}"));
        }
    }

    /// Who has acted by the highest term that a worker remembers.
    pub fn last_actor(&self) -> Option<ProcessId> {
        let boots = self.workers.iter().enumerate().map(|(worker, is)| (worker, is.boot));
        let highest = boots.filter_map(|key| self.checks.terms.get(&key)).max()?;
        self.checks.actors.get(highest).copied()
    }
}
