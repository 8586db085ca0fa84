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
    /// What it holds, as others see it.
    held: Vec<Held>,
}

impl Claims {
    /// The claim of an engine that holds nothing yet.
    pub fn enter(&self) -> Claim {
        let mut all = self.lock();
        all.last += 1;
        Claim { all: self.clone(), id: all.last, held: Vec::new() }
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
    /// What the engine holds from now on. It is asked after every step, and does nothing if that is as before.
    pub fn hold<'a>(&mut self, held: impl Iterator<Item = (u32, Option<&'a Arc<Plan>>)> + Clone) {
        let is_same = |((number, plan), (own, held)): ((u32, Option<&Arc<Plan>>), &Held)| {
            number == *own && plan.map(Arc::as_ptr) == held.as_ref().map(Arc::as_ptr)
        };
        if held.clone().count() == self.held.len() && held.clone().zip(&self.held).all(is_same) {
            return;
        }
        self.held = held.map(|(number, plan)| (number, plan.cloned())).collect();
        self.all.lock().by_engine.insert(self.id, self.held.clone());
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use strata_proto::DType;

    use super::*;

    #[test]
    fn others_see_what_an_engine_holds_until_it_is_gone() {
        let plan = |model: &str| {
            Arc::new(Plan {
                model: model.into(),
                dtype: DType::F32,
                quantization: None,
                replicas: Vec::new(),
                hf_device_map: BTreeMap::new(),
                offload: None,
                warnings: Vec::new(),
            })
        };
        let (all, a, b) = (Claims::default(), plan("a"), plan("b"));
        let (mut first, second) = (all.enter(), all.enter());
        let seen =
            || second.others().into_iter().map(|(number, plan)| (number, plan.map(|p| p.model.clone())));
        let seen = || seen().collect::<Vec<_>>();
        let named = |number, name: &str| (number, Some(name.to_owned()));
        first.hold([(0, Some(&a)), (1, None)].into_iter());
        assert_eq!(seen(), [named(0, "a"), (1, None)]);
        first.hold([(0, Some(&a)), (1, Some(&b))].into_iter());
        assert_eq!(seen(), [named(0, "a"), named(1, "b")]);
        first.hold([(0, Some(&b)), (1, Some(&b))].into_iter());
        assert_eq!(seen(), [named(0, "b"), named(1, "b")]);
        first.hold([(1, Some(&b))].into_iter());
        assert_eq!((seen(), all.plans().len()), (vec![named(1, "b")], 1));
        drop(first);
        assert_eq!((seen(), all.plans().len()), (vec![], 0));
    }
}
