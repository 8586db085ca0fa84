//! Who is next: sequences that wait take turns by tenant and, within a tenant, by connection. It is deficit round robin
//! (Shreedhar and Varghese, 1995) over tokens, with a quantum of one token, so that a turn is one sequence: who has
//! credit is admitted and owes its prompt, later its answer, which the rounds that follow pay back.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use super::sequence::{Party, SequenceId};

/// Sequences that wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    tenants: Turns<Arc<str>, Tenant>,
}

impl Queue {
    /// A new one, whose prompt has so many tokens.
    pub fn push(&mut self, id: SequenceId, party: &Party, tokens: u32) {
        self.tenants.entry(&party.tenant).connections.entry(&party.connection).insert(id, tokens.into());
    }

    /// One that had its turn before.
    pub fn push_again(&mut self, id: SequenceId, party: &Party) {
        self.tenants.entry(&party.tenant).again.insert(id);
    }

    /// Who is next. It stays so until it is taken or removed, or one comes that had its turn before.
    pub fn first(&mut self) -> Option<SequenceId> {
        self.tenants.first()
    }

    /// The oldest of those that had their turn before.
    pub fn first_again(&self) -> Option<SequenceId> {
        self.tenants.0.iter().filter_map(|tenant| tenant.waiting.again.first().copied()).min()
    }

    /// Takes one whose turn it is; its party pays for its prompt. One that had its turn before has paid, and costs its
    /// tenant no more than the turn.
    pub fn take(&mut self, id: SequenceId, party: &Party) {
        match self.remove(id, party) {
            Some(Paid::No { tokens }) => self.charge(party, tokens),
            Some(Paid::Before) => self.tenants.get(&party.tenant).into_iter().for_each(|t| t.credit -= 1),
            None => {}
        }
    }

    /// Removes one, if it waits; nobody pays for it.
    pub fn remove(&mut self, id: SequenceId, party: &Party) -> Option<Paid> {
        let tenant = &mut self.tenants.get(&party.tenant)?.waiting;
        if tenant.again.remove(&id) {
            return Some(Paid::Before);
        }
        let line = &mut tenant.connections.get(&party.connection)?.waiting;
        line.remove(&id).map(|tokens| Paid::No { tokens })
    }

    /// A party that has others waiting pays for tokens; one that has none owes nothing.
    pub fn charge(&mut self, party: &Party, tokens: i64) {
        let Some(tenant) = self.tenants.get(&party.tenant) else { return };
        tenant.credit -= tokens;
        if let Some(connection) = tenant.waiting.connections.get(&party.connection) {
            connection.credit -= tokens;
        }
    }

    /// All of them.
    #[cfg(test)]
    pub fn ids(&self) -> BTreeSet<SequenceId> {
        let tenants = || self.tenants.0.iter().map(|tenant| &tenant.waiting);
        let new = tenants().flat_map(|t| &t.connections.0).flat_map(|line| line.waiting.keys());
        new.chain(tenants().flat_map(|t| &t.again)).copied().collect()
    }
}

/// Whether who waited has paid for its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Paid {
    /// When it had its first turn.
    Before,
    /// Not yet: it has so many tokens.
    No { tokens: i64 },
}

/// What waits of one tenant.
#[derive(Debug, Default)]
struct Tenant {
    /// Those that had their turn before, and lost what was computed of them: they go first, in order of arrival.
    again: BTreeSet<SequenceId>,
    connections: Turns<u64, Line>,
}

impl Waiting for Tenant {
    fn first(&mut self) -> Option<SequenceId> {
        self.again.first().copied().or_else(|| self.connections.first())
    }
}

/// The prompts of one connection in order of arrival, with their tokens.
type Line = BTreeMap<SequenceId, i64>;

/// What waits in an order of its own.
trait Waiting: Default {
    /// The next one.
    fn first(&mut self) -> Option<SequenceId>;
}

impl Waiting for Line {
    fn first(&mut self) -> Option<SequenceId> {
        self.first_key_value().map(|(id, _)| *id)
    }
}

/// Flows that take turns; the first one that has credit is next.
#[derive(Debug)]
struct Turns<K, W>(VecDeque<Flow<K, W>>);

#[derive(Debug)]
struct Flow<K, W> {
    key: K,
    /// Tokens: it may have its turn if they are above 0, and owes them if they are below.
    credit: i64,
    waiting: W,
}

impl<K, W> Default for Turns<K, W> {
    fn default() -> Self {
        Turns(VecDeque::new())
    }
}

impl<K: PartialEq + Clone, W: Waiting> Turns<K, W> {
    fn get(&mut self, key: &K) -> Option<&mut Flow<K, W>> {
        self.0.iter_mut().find(|flow| flow.key == *key)
    }

    /// What waits of this flow. A new one owes nothing, and is the last to have its turn.
    fn entry(&mut self, key: &K) -> &mut W {
        let known = self.0.iter().position(|flow| flow.key == *key);
        let at = known.unwrap_or_else(|| {
            self.0.push_back(Flow { key: key.clone(), credit: 1, waiting: W::default() });
            self.0.len() - 1
        });
        &mut self.0[at].waiting
    }
}

impl<K: PartialEq + Clone, W: Waiting> Waiting for Turns<K, W> {
    fn first(&mut self) -> Option<SequenceId> {
        // Who has nobody waiting owes nothing, and saves nothing for later.
        self.0.retain_mut(|flow| flow.waiting.first().is_some());
        // Rounds in which nobody has a turn are one step.
        let most = self.0.iter().map(|flow| flow.credit).max()?;
        let granted = (1 - most).max(0);
        self.0.iter_mut().for_each(|flow| flow.credit += granted);
        let at = self.0.iter().position(|flow| flow.credit > 0)?;
        self.0.rotate_left(at);
        self.0.front_mut()?.waiting.first()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Largest prompt of these tests, in tokens.
    const LARGEST: u32 = 2000;

    fn party(tenant: u8, connection: u8) -> Party {
        Party { tenant: tenant.to_string().into(), connection: connection.into() }
    }

    /// The next one is taken.
    fn next(queue: &mut Queue, parties: &[Party]) -> Option<SequenceId> {
        let id = queue.first()?;
        assert_eq!(queue.first(), Some(id), "who is next does not change by itself");
        queue.take(id, &parties[id as usize]);
        Some(id)
    }

    #[test]
    fn a_burst_delays_others_by_one_turn() {
        let mut queue = Queue::default();
        let mut parties = vec![party(0, 0); 2000];
        (0..2000).for_each(|id| queue.push(id, &parties[0], 8));
        (0..100).for_each(|id| assert_eq!(next(&mut queue, &parties), Some(id)));
        for (tenant, connection) in [(1, 0), (0, 1)] {
            let id = parties.len() as u64;
            parties.push(party(tenant, connection));
            queue.push(id, &parties[id as usize], LARGEST);
            let others = std::iter::from_fn(|| next(&mut queue, &parties)).take_while(|next| *next != id);
            assert!(others.count() <= 1, "one of the burst may have had its turn");
        }
    }

    #[test]
    fn who_had_a_turn_is_first_and_pays_once() {
        let mut queue = Queue::default();
        let parties = [party(0, 0), party(0, 0), party(1, 0)];
        (0..3).for_each(|id| queue.push(id, &parties[id as usize], 500));
        assert_eq!(next(&mut queue, &parties), Some(0));
        queue.push_again(0, &parties[0]);
        assert_eq!(queue.first_again(), Some(0));
        assert_eq!(next(&mut queue, &parties), Some(2), "the first tenant had its turn");
        assert_eq!(
            [0, 1].map(|_| next(&mut queue, &parties)),
            [Some(0), Some(1)],
            "it is before its tenant's new ones"
        );
        assert_eq!((next(&mut queue, &parties), queue.first_again()), (None, None));
    }

    #[test]
    fn those_who_had_a_turn_take_turns_with_other_tenants() {
        let mut queue = Queue::default();
        let mut parties = vec![party(0, 0); 100];
        (0..100).for_each(|id| queue.push_again(id, &parties[0]));
        (0..10).for_each(|id| assert_eq!(next(&mut queue, &parties), Some(id)));
        parties.push(party(1, 0));
        queue.push(100, &parties[100], LARGEST);
        let others = std::iter::from_fn(|| next(&mut queue, &parties)).take_while(|next| *next != 100);
        assert!(others.count() <= 1);
    }

    #[test]
    fn long_answers_are_paid_for_too() {
        let mut queue = Queue::default();
        let parties: Vec<_> = (0..40).map(|id| party(id % 2, 0)).collect();
        (0..40).for_each(|id| queue.push(id, &parties[id as usize], 1));
        queue.charge(&parties[0], 100);
        let first: Vec<_> = (0..20).map(|_| next(&mut queue, &parties).unwrap()).collect();
        assert!(first.iter().all(|id| id % 2 == 1), "{first:?}");
    }

    proptest! {
        #[test]
        fn everybody_has_a_turn_and_nobody_much_more_than_others(
            arrivals in prop::collection::vec((0u8..4, 0u8..3, 1..LARGEST, any::<bool>()), 1..300),
        ) {
            let mut queue = Queue::default();
            let parties: Vec<_> = arrivals.iter().map(|(t, c, ..)| party(*t, *c)).collect();
            for (id, (_, _, tokens, _)) in arrivals.iter().enumerate() {
                queue.push(id as u64, &parties[id], *tokens);
            }
            let mut left: BTreeMap<(u8, u8), VecDeque<u64>> = BTreeMap::new();
            for (id, (tenant, connection, _, cancelled)) in arrivals.iter().enumerate() {
                match cancelled {
                    true => prop_assert!(queue.remove(id as u64, &parties[id]).is_some()),
                    false => left.entry((*tenant, *connection)).or_default().push_back(id as u64),
                }
            }
            let mut served = [0i64; 4];
            while let Some(id) = next(&mut queue, &parties) {
                let (tenant, connection, tokens, _) = arrivals[id as usize];
                let own = left.get_mut(&(tenant, connection)).and_then(VecDeque::pop_front);
                prop_assert_eq!(own, Some(id), "a connection's own are in order");
                served[usize::from(tenant)] += i64::from(tokens);
                // All arrived at once, so whoever waits has always waited.
                for ((waits, _), _) in left.iter().filter(|(_, line)| !line.is_empty()) {
                    let ahead = served[usize::from(tenant)] - served[usize::from(*waits)];
                    prop_assert!(ahead <= i64::from(LARGEST), "tenant {} is {} tokens ahead", tenant, ahead);
                }
            }
            prop_assert!(left.values().all(VecDeque::is_empty), "some never had a turn: {:?}", left);
        }
    }
}
