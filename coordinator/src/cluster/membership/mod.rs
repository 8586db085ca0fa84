//! Who is there: workers as a stream of events, a file for each place that they come from.

mod fixed;
mod local;
pub(crate) mod probe;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use strata_proto::{Secret, Worker};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

#[cfg(test)]
pub(crate) use fixed::over;
pub use fixed::{Claimant, fixed};
pub use local::local;

use super::{
    leadership::{Leadership, unrivalled},
    records::{InMemory, Keeper},
};

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
#[derive(Debug, Clone)]
pub enum MemberEvent {
    /// A worker is there, or is there again under a new boot id.
    Joined(Member),
    /// The named worker is gone.
    Left(String),
    /// The named worker cannot be planned over, for this reason: it is not there, or is there and does not answer for
    /// the moment. What it computes goes on. An empty reason takes that back.
    Away(String, String),
    /// What is listed as two workers is one, and takes part once.
    Twice {
        /// Its name, which joined.
        worker: String,
        /// Its other name, which does not.
        again: String,
    },
}

/// A coordinator as its workers know it.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// Its name, which no other coordinator has.
    pub name: String,
    /// What its calls prove.
    pub secret: Option<Secret>,
}

/// Where a coordinator's workers come from, and whether it may act upon them.
#[derive(Debug)]
pub struct Source {
    /// Who comes and goes.
    pub events: mpsc::UnboundedReceiver<MemberEvent>,
    /// Whether it may act.
    pub leadership: watch::Receiver<Leadership>,
    /// What operators have decided about them.
    pub keeper: Arc<dyn Keeper>,
}

impl From<mpsc::UnboundedReceiver<MemberEvent>> for Source {
    /// Workers that nobody else has.
    fn from(events: mpsc::UnboundedReceiver<MemberEvent>) -> Self {
        Source { events, leadership: unrivalled(), keeper: Arc::new(InMemory::default()) }
    }
}

/// The workers that are there, in order of rank: the one list, which everything reads.
#[derive(Debug, Clone, Default)]
pub struct Members(Arc<Mutex<List>>);

#[derive(Debug, Default)]
struct List {
    there: Vec<Member>,
    /// Why some of them, or others, cannot be planned over.
    away: BTreeMap<String, String>,
    /// Whom an operator has drained, and why.
    drained: BTreeMap<String, String>,
    /// One that is listed as two.
    twice: Option<(String, String)>,
    subscribers: Vec<mpsc::UnboundedSender<MemberEvent>>,
    /// When one last joined.
    joined_last: Option<Instant>,
}

impl Members {
    /// Those that are there now.
    pub fn list(&self) -> Vec<Member> {
        self.lock().there.clone()
    }

    /// Those of them that answer, and that are not drained: whom there may be plans over.
    pub fn answering(&self) -> Vec<Member> {
        let list = self.lock();
        let may = |name: &String| !list.away.contains_key(name) && !list.drained.contains_key(name);
        list.there.iter().filter(|member| may(&member.name)).cloned().collect()
    }

    /// Whether it is one of them, whatever else is to be said of it.
    pub fn has(&self, name: &str) -> bool {
        self.lock().there.iter().any(|member| member.name == name)
    }

    /// Whom an operator has drained, and why.
    pub fn drained(&self) -> BTreeMap<String, String> {
        self.lock().drained.clone()
    }

    /// Who is drained from now on, whether it is there or not. Those that are taken back join anew.
    pub(crate) fn set_drained(&self, drained: BTreeMap<String, String>) {
        let mut list = self.lock();
        let before = std::mem::replace(&mut list.drained, drained);
        let back =
            |member: &&Member| before.contains_key(&member.name) && !list.drained.contains_key(&member.name);
        let back: Vec<_> = list.there.iter().filter(back).cloned().map(MemberEvent::Joined).collect();
        for event in back {
            list.subscribers.retain(|subscriber| subscriber.send(event.clone()).is_ok());
        }
    }

    /// Those that cannot be planned over, and why.
    pub fn away(&self) -> BTreeMap<String, String> {
        self.lock().away.clone()
    }

    /// When one last joined, if any has.
    pub(crate) fn joined_last(&self) -> Option<Instant> {
        self.lock().joined_last
    }

    /// One that is listed as two, if any: both names.
    pub(crate) fn twice(&self) -> Option<(String, String)> {
        self.lock().twice.clone()
    }

    /// The changes from now on, as far as the list has taken note of them.
    pub(crate) fn subscribe(&self) -> mpsc::UnboundedReceiver<MemberEvent> {
        let (subscriber, events) = mpsc::unbounded_channel();
        self.lock().subscribers.push(subscriber);
        events
    }

    /// Takes note of every change: of those that have come at once, of others until there will be none.
    pub(crate) fn follow(&self, mut events: mpsc::UnboundedReceiver<MemberEvent>) {
        while let Ok(event) = events.try_recv() {
            self.note(event);
        }
        let members = self.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                members.note(event);
            }
            // Whoever waits for workers is to know that none will come.
            members.lock().subscribers.clear();
        });
    }

    fn note(&self, event: MemberEvent) {
        let mut list = self.lock();
        match &event {
            MemberEvent::Joined(member) => {
                list.there.retain(|m| m.name != member.name);
                list.there.push(member.clone());
                list.there.sort_by_key(|m| m.rank);
                list.away.remove(&member.name);
                list.joined_last = Some(Instant::now());
            }
            MemberEvent::Twice { worker, again } => list.twice = Some((worker.clone(), again.clone())),
            MemberEvent::Left(name) => list.there.retain(|m| m.name != *name),
            MemberEvent::Away(name, why) if why.is_empty() => drop(list.away.remove(name)),
            MemberEvent::Away(name, why) => drop(list.away.insert(name.clone(), why.clone())),
        }
        list.subscribers.retain(|subscriber| subscriber.send(event.clone()).is_ok());
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
