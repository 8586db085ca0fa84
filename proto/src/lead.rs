//! Whom a worker follows, the latest leader that it has heard of, and the newest incarnation of each of its pipelines.

use std::time::Instant;

use crate::v1::{self, Fence};

/// What a worker remembers of those who lead, or say so. Pure: time is an argument.
#[derive(Debug, Default)]
pub struct Lead {
    /// Of the latest term that called; one for each pipeline.
    newest: Vec<Fence>,
    /// The claim with the highest term.
    claim: v1::Claim,
    /// When whoever has the highest term was last heard of; never, if it has resigned.
    heard: Option<Instant>,
}

impl Lead {
    /// Takes note of a claim, or of the end of one, unless a higher one was made or acted upon.
    pub fn claim(&mut self, claim: v1::Claim, now: Instant) {
        if claim.term >= self.term() {
            self.heard = (!claim.resigned).then_some(now);
            self.claim = claim;
        }
    }

    /// Refuses a stale fence, and remembers a new one.
    ///
    /// # Errors
    /// The newest, if a higher term, or a later incarnation of its pipeline, was heard of.
    pub fn admit(&mut self, fence: Fence, now: Instant) -> Result<(), Fence> {
        if let Some(newest) = self.newest.iter().find(|newest| fence.is_stale(newest)) {
            return Err(*newest);
        }
        if fence.term < self.term() {
            return Err(Fence { term: self.term(), ..Fence::default() });
        }
        self.newest.retain(|old| old.term == fence.term && old.pipeline != fence.pipeline);
        self.newest.push(fence);
        self.heard = Some(now);
        Ok(())
    }

    /// The same, as coordinators are told.
    pub fn told(&self, now: Instant) -> v1::Lead {
        let (term, claim) = (self.term(), &self.claim);
        let coordinator = if claim.term == term { claim.coordinator.clone() } else { String::new() };
        let age = self.heard.map(|at| now.saturating_duration_since(at).as_millis());
        let age_ms = match age {
            Some(age) => u64::try_from(age).unwrap_or(u64::MAX),
            None if term == 0 => 0,
            None => u64::MAX,
        };
        v1::Lead { term, coordinator, age_ms }
    }

    /// The highest term that was heard of.
    fn term(&self) -> u64 {
        let called = self.newest.iter().map(|fence| fence.term);
        called.fold(self.claim.term, u64::max)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn claim(term: u64, coordinator: &str) -> v1::Claim {
        v1::Claim { term, coordinator: coordinator.into(), resigned: false }
    }

    fn fence(term: u64, pipeline: u32, incarnation: u64) -> Fence {
        Fence { term, pipeline, incarnation }
    }

    #[test]
    fn the_highest_term_leads_whether_it_was_claimed_or_acted_upon() {
        let now = Instant::now();
        let later = now + Duration::from_millis(250);
        let mut lead = Lead::default();
        assert_eq!(lead.told(now), v1::Lead::default());
        lead.claim(claim(3, "a"), now);
        lead.claim(claim(2, "b"), later);
        assert_eq!(lead.told(later), v1::Lead { term: 3, coordinator: "a".into(), age_ms: 250 });
        lead.claim(claim(3, "a"), later);
        assert_eq!(lead.told(later).age_ms, 0);
        assert_eq!(lead.admit(fence(2, 0, 9), later).unwrap_err().term, 3);
        lead.admit(fence(3, 0, 1), later).unwrap();
        lead.admit(fence(3, 1, 2), later).unwrap();
        lead.admit(fence(3, 0, 3), later).unwrap();
        lead.admit(fence(3, 0, 2), later).unwrap_err();
        lead.admit(fence(3, 1, 2), later).unwrap();
        // Whoever acts by a higher term leads, though it has not said its name yet.
        lead.admit(fence(5, 0, 1), later).unwrap();
        assert_eq!(lead.told(later), v1::Lead { term: 5, ..v1::Lead::default() });
        lead.claim(claim(4, "a"), later);
        assert_eq!(lead.told(later).term, 5);
        lead.admit(fence(4, 7, 1), later).unwrap_err();
        // Nobody needs to wait for one that says that it is over; what it did stays refused to others.
        lead.claim(v1::Claim { resigned: true, ..claim(5, "b") }, later);
        assert_eq!(lead.told(later), v1::Lead { term: 5, coordinator: "b".into(), age_ms: u64::MAX });
        lead.admit(fence(4, 7, 1), later).unwrap_err();
    }
}
