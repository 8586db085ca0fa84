//! Whether this coordinator may act, and by which term: who leads the workers.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use strata_proto::v1;
use tokio::{sync::watch, time::Instant};

/// How long a claim on workers holds after it was last renewed. Members are probed, and claims renewed, several times as
/// often.
pub(crate) const CLAIM_TTL: Duration = Duration::from_secs(3);
/// How long to wait for the other listed workers before the word of those that answered counts.
const LISTEN: Duration = Duration::from_secs(1);
/// Last bits of a term that stand for its coordinator's name. They are 66 ms of the clock: nobody stands up again so soon.
const NAME_BITS: u32 = 16;

/// Whether this coordinator may act.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leadership {
    /// It may, and its calls carry this term.
    Leads {
        /// Later leaders have higher ones.
        term: u64,
    },
    /// It may not.
    StandsBy {
        /// What it waits for.
        why: String,
    },
}

impl Leadership {
    /// The term, if it leads.
    pub fn term(&self) -> Option<u64> {
        match self {
            Leadership::Leads { term } => Some(*term),
            Leadership::StandsBy { .. } => None,
        }
    }
}

/// The leadership of a coordinator that has its workers to itself.
pub fn unrivalled() -> watch::Receiver<Leadership> {
    // The value outlives its sender.
    static LAST: AtomicU64 = AtomicU64::new(0);
    let clock = wall_clock();
    let next = |last: u64| clock.max(last.saturating_add(1));
    let last = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(next(last)));
    let term = next(last.unwrap_or_else(|last| last));
    watch::Sender::new(Leadership::Leads { term }).subscribe()
}

/// Microseconds since 1970.
pub(crate) type Clock = fn() -> u64;

/// This machine's clock.
pub(crate) fn wall_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// A term above `seen`, and, as far as clocks are right, above every one that came before. Without an election, terms are
/// comparable because clocks are; those of two coordinators differ in their last bits, even if both take over from a third
/// one at the same moment, or their clocks are behind the last term.
fn next_term(clock: u64, seen: u64, coordinator: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    coordinator.hash(&mut hasher);
    let own = hasher.finish() >> (u64::BITS - NAME_BITS);
    let least = clock.max(seen.saturating_add(1));
    let term = least >> NAME_BITS << NAME_BITS | own;
    if term >= least { term } else { term.saturating_add(1 << NAME_BITS) }
}

/// The highest term that any worker has heard of, and when whoever has it was last heard.
#[derive(Debug, Clone, Default)]
pub(crate) struct Followed {
    /// The term.
    pub term: u64,
    /// Who has it, where a worker has been told.
    pub coordinator: String,
    heard: Option<Instant>,
}

impl Followed {
    /// A worker says whom it follows. Whether that is a higher term than was known.
    pub fn heard(&mut self, lead: &v1::Lead, now: Instant) -> bool {
        let heard = now.checked_sub(Duration::from_millis(lead.age_ms));
        let is_news = lead.term > self.term;
        if is_news {
            *self = Followed { term: lead.term, coordinator: lead.coordinator.clone(), heard };
        } else if lead.term == self.term {
            self.heard = self.heard.max(heard);
            if !lead.coordinator.is_empty() {
                self.coordinator.clone_from(&lead.coordinator);
            }
        }
        is_news
    }

    /// Whether whoever leads by `term` was heard within `ttl`.
    pub fn leads(&self, term: u64, ttl: Duration, now: Instant) -> bool {
        let silent = self.heard.map(|at| now.saturating_duration_since(at));
        self.term == term && silent.is_some_and(|silent| silent < ttl)
    }
}

/// Leadership without an election: coordinators over one list of workers claim them, and workers tell everybody who asks
/// about the latest claim. Pure: what was heard and when are arguments.
///
/// A claim outranks those with lower terms. Nobody claims workers that somebody else has claimed within [`CLAIM_TTL`], so
/// of two coordinators that start together the one with the higher term leads, and one that starts later waits until
/// the leader is silent. A leader that hears of a higher term stands by.
#[derive(Debug)]
pub(crate) struct Claims {
    me: String,
    listed: usize,
    clock: Clock,
    /// Of its last turn.
    last: u64,
    term: Option<u64>,
    resigned: bool,
    heard: BTreeMap<String, Heard>,
    first_heard: Option<Instant>,
}

/// What a worker said last.
#[derive(Debug)]
struct Heard {
    lead: v1::Lead,
    at: Instant,
}

impl Claims {
    /// Of a coordinator by this name, over so many workers. Names of coordinators differ.
    pub fn new(me: String, listed: usize, clock: Clock) -> Self {
        let (heard, first_heard) = (BTreeMap::new(), None);
        Claims { me, listed, clock, last: 0, term: None, resigned: false, heard, first_heard }
    }

    /// What to tell workers.
    pub fn claim(&self) -> Option<v1::Claim> {
        self.term.map(|term| v1::Claim { term, coordinator: self.me.clone(), resigned: false })
    }

    /// It leads no more, and never will again; what to tell workers, if it did.
    pub fn resign(&mut self) -> Option<v1::Claim> {
        let claim = self.claim().map(|claim| v1::Claim { resigned: true, ..claim });
        (self.term, self.resigned) = (None, true);
        claim
    }

    /// A worker said whom it follows.
    pub fn heard(&mut self, worker: &str, lead: v1::Lead, now: Instant) {
        self.first_heard.get_or_insert(now);
        self.heard.insert(worker.to_owned(), Heard { lead, at: now });
    }

    /// A worker is gone; what it said holds no more.
    pub fn gone(&mut self, worker: &str) {
        self.heard.remove(worker);
    }

    /// Whether to act, by what was heard so far.
    pub fn decide(&mut self, now: Instant) -> Leadership {
        if self.resigned {
            return Leadership::StandsBy { why: "it has resigned".into() };
        }
        let highest = self.heard.iter().max_by_key(|(_, heard)| heard.lead.term);
        if let Some(term) = self.term {
            match highest {
                Some((worker, heard)) if heard.lead.term > term => {
                    let why = format!("{} has taken worker {worker} over", named(&heard.lead));
                    self.term = None;
                    return Leadership::StandsBy { why };
                }
                _ => return Leadership::Leads { term },
            }
        }
        let fresh = |heard: &Heard| {
            let age = Duration::from_millis(heard.lead.age_ms)
                .saturating_add(now.saturating_duration_since(heard.at));
            heard.lead.term > 0 && heard.lead.coordinator != self.me && age < CLAIM_TTL
        };
        if let Some((worker, heard)) = self.heard.iter().find(|(_, heard)| fresh(heard)) {
            let why = format!(
                "{} leads worker {worker}; this coordinator takes over when that one is silent for {CLAIM_TTL:?}",
                named(&heard.lead)
            );
            return Leadership::StandsBy { why };
        }
        let listened = self.first_heard.is_some_and(|first| now.saturating_duration_since(first) >= LISTEN);
        if self.heard.is_empty() || (self.heard.len() < self.listed && !listened) {
            let why = format!("{} of {} workers are there", self.heard.len(), self.listed);
            return Leadership::StandsBy { why };
        }
        let seen = highest.map_or(0, |(_, heard)| heard.lead.term).max(self.last);
        let term = next_term((self.clock)(), seen, &self.me);
        self.last = term;
        self.term = Some(term);
        Leadership::Leads { term }
    }
}

fn named(lead: &v1::Lead) -> String {
    match lead.coordinator.is_empty() {
        true => format!("a coordinator of term {}", lead.term),
        false => format!("coordinator {}", lead.coordinator),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lead(term: u64, coordinator: &str, age_ms: u64) -> v1::Lead {
        v1::Lead { term, coordinator: coordinator.into(), age_ms }
    }

    fn waits(leadership: &Leadership) -> &str {
        match leadership {
            Leadership::StandsBy { why } => why,
            leads => panic!("{leads:?}"),
        }
    }

    #[test]
    fn terms_only_rise() {
        let terms: Vec<_> = (0..3).map(|_| unrivalled().borrow().term()).collect();
        assert!(terms.is_sorted_by(|a, b| a < b), "{terms:?}");
        assert_eq!(next_term(7, u64::MAX - 1, "a"), u64::MAX);
    }

    #[test]
    fn coordinators_that_take_over_at_the_same_moment_have_different_terms() {
        for clock in [0, 1 << NAME_BITS, 1_795_827_568_812_355] {
            for seen in [0, clock, clock + (1 << 40)] {
                let [a, b] = ["10.0.0.1:7717", "10.0.0.2:7717"].map(|name| next_term(clock, seen, name));
                assert!(a != b && a.min(b) > seen && a.min(b) >= clock, "{a} {b}");
                assert!(a.max(b) - seen.max(clock) <= 2 << NAME_BITS, "{a} {b}");
            }
        }
    }

    #[test]
    fn a_leader_leads_while_any_worker_hears_it() {
        let now = Instant::now() + Duration::from_secs(60);
        let (ttl, mut followed) = (Duration::from_secs(3), Followed::default());
        assert!(!followed.heard(&v1::Lead::default(), now) && !followed.leads(1, ttl, now));
        assert!(followed.heard(&lead(7, "", 2000), now));
        assert!(!followed.heard(&lead(7, "a", 500), now) && !followed.heard(&lead(7, "a", 2500), now));
        assert!(!followed.heard(&lead(6, "b", 0), now));
        assert_eq!((followed.term, followed.coordinator.as_str()), (7, "a"));
        assert!(followed.leads(7, ttl, now + Duration::from_millis(2499)) && !followed.leads(6, ttl, now));
        assert!(!followed.leads(7, ttl, now + Duration::from_millis(2500)));
        // One that has resigned is not heard any more.
        assert!(followed.heard(&lead(8, "b", u64::MAX), now) && !followed.leads(8, ttl, now));
    }

    #[test]
    fn who_starts_later_waits_until_the_leader_is_silent() {
        let begun = Instant::now();
        let mut claims = Claims::new("b".into(), 2, wall_clock);
        assert_eq!(waits(&claims.decide(begun)), "0 of 2 workers are there");
        claims.heard("w1", lead(7, "a", 100), begun);
        assert!(waits(&claims.decide(begun)).starts_with("coordinator a leads worker w1; "));
        claims.heard("w2", lead(7, "a", 400), begun);
        assert!(claims.claim().is_none());
        let later = begun + CLAIM_TTL - Duration::from_millis(101);
        waits(&claims.decide(later));
        let term = claims.decide(begun + CLAIM_TTL - Duration::from_millis(100)).term().unwrap();
        assert_eq!(claims.claim(), Some(v1::Claim { term, coordinator: "b".into(), resigned: false }));
        // Its own claim, seen again, changes nothing; a higher one ends its turn.
        claims.heard("w1", lead(term, "b", 0), later);
        assert_eq!(claims.decide(later).term(), Some(term));
        claims.heard("w2", lead(term + 1, "c", 0), later);
        assert_eq!(waits(&claims.decide(later)), "coordinator c has taken worker w2 over");
        // And when that one is gone, it leads by a term of its own.
        assert!(claims.decide(later + CLAIM_TTL).term().unwrap() > term + 1);
    }

    #[test]
    fn who_has_acted_and_not_said_its_name_yet_leads_too() {
        let now = Instant::now();
        let mut claims = Claims::new("b".into(), 1, wall_clock);
        claims.heard("w1", lead(u64::MAX / 2, "", 0), now);
        assert!(waits(&claims.decide(now)).starts_with("a coordinator of term 9223372036854775807 leads"));
        assert!(claims.decide(now + CLAIM_TTL).term().unwrap() > u64::MAX / 2);
    }

    #[test]
    fn nobody_waits_for_one_that_has_resigned() {
        let now = Instant::now();
        let mut first = Claims::new("a".into(), 1, wall_clock);
        first.heard("w1", v1::Lead::default(), now);
        let term = first.decide(now).term().unwrap();
        assert_eq!(first.resign(), Some(v1::Claim { term, coordinator: "a".into(), resigned: true }));
        assert_eq!(waits(&first.decide(now + CLAIM_TTL)), "it has resigned");
        assert_eq!((first.claim(), first.resign()), (None, None));
        let mut second = Claims::new("b".into(), 1, wall_clock);
        second.heard("w1", lead(term, "a", u64::MAX), now);
        assert!(second.decide(now).term().unwrap() > term);
    }

    #[test]
    fn workers_that_stay_away_are_waited_for_a_moment() {
        let now = Instant::now();
        let mut claims = Claims::new("b".into(), 2, wall_clock);
        claims.heard("w1", v1::Lead::default(), now);
        assert_eq!(waits(&claims.decide(now)), "1 of 2 workers are there");
        claims.decide(now + LISTEN).term().unwrap();
    }

    proptest! {
        /// Coordinators that probe two workers in any order, with pauses: in the end one leads, and each time somebody
        /// is told to act its term is the highest that the workers it heard of had seen.
        #[test]
        fn one_leads_in_the_end(turns in prop::collection::vec((0usize..3, 0usize..2, 0u64..900), 0..60)) {
            let mut now = Instant::now();
            let mut coordinators = ["a", "b", "c"].map(|name| Claims::new(name.into(), 2, wall_clock));
            let mut workers = [(v1::Lead::default(), now), (v1::Lead::default(), now)];
            let mut probe = |who: &mut Claims, worker: usize, now: Instant| {
                let (lead, at) = &mut workers[worker];
                if let Some(claim) = who.claim().filter(|claim| claim.term >= lead.term) {
                    *lead = v1::Lead { term: claim.term, coordinator: claim.coordinator, age_ms: 0 };
                    *at = now;
                }
                let age_ms = now.duration_since(*at).as_millis() as u64;
                who.heard(["w0", "w1"][worker], v1::Lead { age_ms, ..lead.clone() }, now);
                if let Some(term) = who.decide(now).term() {
                    assert!(term >= lead.term);
                }
            };
            for (who, worker, pause) in turns {
                now += Duration::from_millis(pause);
                probe(&mut coordinators[who], worker, now);
            }
            for _ in 0..40 {
                for coordinator in &mut coordinators {
                    for worker in 0..2 {
                        now += Duration::from_millis(50);
                        probe(coordinator, worker, now);
                    }
                }
            }
            let leading = coordinators.iter().filter(|c| c.claim().is_some()).count();
            prop_assert_eq!(leading, 1);
        }
    }
}
