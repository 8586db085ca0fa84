//! Who is there: workers as a stream of events, a file for each place that they come from.

mod fixed;
mod local;

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use strata_proto::Worker;

pub use fixed::fixed;
pub use local::local;

/// A worker that can be planned over.
#[derive(Clone)]
pub struct Member {
    /// Name in plans; unique.
    pub name: String,
    /// Its calls.
    pub worker: Arc<dyn Worker>,
    /// Place in the list; plans keep this order.
    pub rank: usize,
    /// Host that activations for this worker are sent to when it listens on every address.
    pub host: String,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A change of the membership.
#[derive(Debug)]
pub enum MemberEvent {
    /// A worker is there, or is there again under a new boot id.
    Joined(Member),
    /// The named worker is gone.
    Left(String),
    /// What is listed as two workers is one, and takes part once.
    Twice {
        /// Its name, which joined.
        worker: String,
        /// Its other name, which does not.
        again: String,
    },
}

/// The workers that are there, in order of rank: the one list, which everything reads.
#[derive(Debug, Clone, Default)]
pub struct Members(Arc<Mutex<Vec<Member>>>);

impl Members {
    /// Those that are there now.
    pub fn list(&self) -> Vec<Member> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes note of a change; returns how many are there.
    pub(crate) fn note(&self, event: &MemberEvent) -> usize {
        let mut members = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            MemberEvent::Joined(member) => {
                members.retain(|m| m.name != member.name);
                members.push(member.clone());
            }
            MemberEvent::Left(name) => members.retain(|m| m.name != *name),
            MemberEvent::Twice { .. } => {}
        }
        members.sort_by_key(|m| m.rank);
        members.len()
    }
}
