//! Who is there: workers as a stream of events, a file for each place that they come from.

mod fixed;
mod local;

use std::{fmt, sync::Arc};

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
}

/// Keeps the list of members, in order of rank.
pub(crate) fn note(members: &mut Vec<Member>, event: &MemberEvent) {
    match event {
        MemberEvent::Joined(member) => {
            members.retain(|m| m.name != member.name);
            members.push(member.clone());
        }
        MemberEvent::Left(name) => members.retain(|m| m.name != *name),
    }
    members.sort_by_key(|m| m.rank);
}
