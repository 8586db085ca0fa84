//! What each engine of a coordinator runs on, so that no other one takes it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use strata_proto::Plan;

/// A replica's number, and what it runs on, or is going to.
type Held = (u32, Option<Arc<Plan>>);

/// The claims of all engines.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claims(Arc<Mutex<All>>);

#[derive(Debug, Default)]
struct All {
    /// Of the engine that came last.
    last: u64,
    by_engine: BTreeMap<u64, Vec<Held>>,
}

/// Those of one engine; given back when dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    all: Claims,
    id: u64,
}

impl Claims {
    /// The claim of an engine that holds nothing yet.
    pub fn enter(&self) -> Claim {
        let mut all = self.lock();
        all.last += 1;
        Claim { all: self.clone(), id: all.last }
    }

    /// Every plan that is followed.
    pub fn plans(&self) -> Vec<Arc<Plan>> {
        self.lock().by_engine.values().flatten().filter_map(|(_, plan)| plan.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// What the engine holds from now on.
    pub fn hold(&self, held: Vec<Held>) {
        self.all.lock().by_engine.insert(self.id, held);
    }

    /// What others hold.
    pub fn others(&self) -> Vec<Held> {
        let all = self.all.lock();
        all.by_engine.iter().filter(|(id, _)| **id != self.id).flat_map(|(_, held)| held).cloned().collect()
    }

    /// The plans that others follow.
    pub fn plans_of_others(&self) -> Vec<Arc<Plan>> {
        self.others().into_iter().filter_map(|(_, plan)| plan).collect()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.all.lock().by_engine.remove(&self.id);
    }
}
