//! Members that are left out of plans for a while, since something failed on them.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

/// How long a member is left out after its first failure; each further one doubles it.
const FIRST: Duration = Duration::from_secs(1);
/// Longest that one is left out at once.
const LONGEST: Duration = Duration::from_secs(60);

/// Members that are left out of plans, each until it is to be tried again. Pure: time is an argument.
#[derive(Debug, Clone, Default)]
pub(crate) struct LeftOut(BTreeMap<String, Entry>);

#[derive(Debug, Clone)]
struct Entry {
    why: String,
    failures: u32,
    until: Instant,
}

impl LeftOut {
    /// Something failed on a member: it is left out, for longer each time.
    pub fn failed(&mut self, worker: &str, why: String, now: Instant) {
        let failures = self.0.get(worker).map_or(0, |entry| entry.failures);
        let pause = FIRST.saturating_mul(1 << failures.min(16)).min(LONGEST);
        let entry = Entry { why, failures: failures + 1, until: now + pause };
        self.0.insert(worker.to_owned(), entry);
    }

    /// A member is another one than before, or has done what it is there for.
    pub fn forgive(&mut self, worker: &str) {
        self.0.remove(worker);
    }

    /// Whether it is left out now.
    pub fn has(&self, worker: &str, now: Instant) -> bool {
        self.0.get(worker).is_some_and(|entry| now < entry.until)
    }

    /// Whether one is to be tried again now, and not only later.
    pub fn any_due(&self, now: Instant) -> bool {
        self.0.values().any(|entry| now >= entry.until)
    }

    /// Who has failed, and why; those that are about to be tried again too.
    pub fn reasons(&self) -> BTreeMap<String, String> {
        self.0.iter().map(|(worker, entry)| (worker.clone(), entry.why.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_left_out_for_longer_each_time_until_it_is_forgiven() {
        let now = Instant::now();
        let mut out = LeftOut::default();
        assert!(!out.has("a", now));
        let mut begun = now;
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            out.failed("a", format!("failed before {pause}"), begun);
            let end = begun + Duration::from_secs(pause);
            assert!(out.has("a", end - Duration::from_millis(1)) && !out.has("a", end), "{pause}");
            assert!(!out.any_due(end - Duration::from_millis(1)) && out.any_due(end));
            begun = end;
        }
        assert_eq!(out.reasons(), BTreeMap::from([("a".into(), "failed before 60".into())]));
        out.forgive("a");
        assert!(!out.any_due(begun) && out.reasons().is_empty());
        out.failed("a", String::new(), now);
        assert!(!out.has("a", now + FIRST));
    }
}
