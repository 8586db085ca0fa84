//! Whose fault it is that a pipeline broke: decided by what every stage said last.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use strata_proto::v1::{LinkHealth, StageHealth};

/// What is known of a stage whose pipeline broke.
#[derive(Debug, Clone, Default)]
pub(super) struct Report {
    pub worker: String,
    /// Its stream has ended, or it said that it failed by itself.
    pub ended: bool,
    /// Since it was heard of.
    pub silent: Duration,
    /// What it said last.
    pub health: StageHealth,
}

impl Report {
    /// Whether it ended, or has missed two reports, each of which is due after a quarter of `timeout`.
    pub fn is_gone(&self, timeout: Duration) -> bool {
        self.ended || self.silent > timeout / 2
    }
}

/// The stage that the next plan had better do without, and the link that it is about if it is about one; none if all are
/// well, as far as they say, and only a connection broke.
///
/// A neighbour of a stage that is gone says that its link failed, which is no fault of its own. So what counts is, in this
/// order: who is gone or failed by itself; who has missed two reports, of which each is due after a quarter of `timeout`;
/// who has trouble with more than one neighbour, now or `lately`; and of a link that is silent, though both of its ends
/// are well, the end that is dialled, as whoever comes in the place of the other one would dial it, too. Of several silent links
/// the one counts on which something was lost: its upstream stage has sent what never came.
fn blame(stages: &[Report], before: &[Pair], timeout: Duration) -> Option<usize> {
    if let Some(gone) = stages.iter().position(|stage| stage.ended) {
        return Some(gone);
    }
    let (quietest, stage) = stages.iter().enumerate().max_by_key(|(_, stage)| stage.silent)?;
    if stage.is_gone(timeout) {
        return Some(quietest);
    }
    let links = silent_links(stages);
    let now = links.iter().map(|at| pair(stages, *at));
    let all: HashSet<Pair> = now.chain(before.iter().cloned()).collect();
    let trouble = |at: &usize| all.iter().filter(|(a, b)| [a, b].contains(&&stages[*at].worker)).count();
    let ends = links.iter().flat_map(|at| [*at, at + 1]);
    // Of equals the last one: it is dialled.
    if let Some(common) = ends.max_by_key(trouble).filter(|at| trouble(at) > 1) {
        return Some(common);
    }
    let lossy = links.iter().find(|at| stages[**at].health.sent > stages[**at + 1].health.received);
    lossy.or(links.first()).map(|at| at + 1)
}

/// Links that one of their ends hears nothing of, by their upstream stages. Others may have been closed only since a stage
/// ended that misses a neighbour.
fn silent_links(stages: &[Report]) -> Vec<usize> {
    let said = stages.windows(2).map(|ends| [ends[0].health.downstream(), ends[1].health.upstream()]);
    let silent = said.enumerate().filter(|(_, said)| said.contains(&LinkHealth::Silent));
    silent.map(|(at, _)| at).collect()
}

/// Two workers, in the order of their names.
type Pair = (String, String);

/// The ends of the link behind a stage.
fn pair(stages: &[Report], at: usize) -> Pair {
    let (a, b) = (&stages[at].worker, &stages[at + 1].worker);
    (a.min(b).clone(), a.max(b).clone())
}

/// Links between workers that were silent since a pipeline last came up.
#[derive(Debug, Clone, Default)]
pub struct SilentLinks(Arc<Mutex<Vec<Pair>>>);

impl SilentLinks {
    fn lock(&self) -> MutexGuard<'_, Vec<Pair>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blames somebody, and remembers the links that are silent though all stages are heard.
    pub(super) fn blame(&self, stages: &[Report], timeout: Duration) -> Option<usize> {
        let mut before = self.lock();
        let blamed = blame(stages, &before, timeout);
        if !stages.iter().any(|stage| stage.is_gone(timeout)) {
            before.extend(silent_links(stages).into_iter().map(|at| pair(stages, at)));
        }
        blamed
    }

    /// A pipeline is up: who was to blame was found.
    pub(super) fn forget(&self) {
        self.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(2);

    /// Stages on workers `a`, `b`, …, all of them well.
    fn well(count: u8) -> Vec<Report> {
        let health = StageHealth { received: 8, steps: 8, sent: 8, ..StageHealth::default() };
        let silent = Duration::from_millis(400);
        let report = |n| Report { worker: char::from(b'a' + n).into(), ended: false, silent, health };
        (0..count).map(report).collect()
    }

    fn blamed(stages: &[Report]) -> Option<&str> {
        blame(stages, &[], TIMEOUT).map(|at| stages[at].worker.as_str())
    }

    fn misses(stages: &mut [Report], upstream_of: usize, ends: [LinkHealth; 2]) {
        stages[upstream_of].health.downstream = ends[0].into();
        stages[upstream_of + 1].health.upstream = ends[1].into();
    }

    const WELL: LinkHealth = LinkHealth::Unspecified;
    const SILENT: LinkHealth = LinkHealth::Silent;
    const BROKEN: LinkHealth = LinkHealth::Broken;

    #[test]
    fn neighbours_of_who_is_gone_are_never_blamed() {
        for gone in 0..4 {
            for ends in [[BROKEN, WELL], [WELL, BROKEN], [BROKEN, BROKEN], [SILENT, BROKEN]] {
                let mut stages = well(4);
                // Each neighbour complains, and so may somebody behind it, whose neighbour ended in turn.
                (0..3).for_each(|link| misses(&mut stages, link, ends));
                stages[gone].ended = true;
                assert_eq!(blame(&stages, &[], TIMEOUT), Some(gone));
            }
        }
    }

    #[test]
    fn who_is_stopped_says_nothing_and_its_neighbours_only_that() {
        for stopped in 0..3 {
            let mut stages = well(3);
            stages[stopped].silent = Duration::from_millis(1600);
            if stopped > 0 {
                misses(&mut stages, stopped - 1, [SILENT, WELL]);
            }
            if stopped < 2 {
                misses(&mut stages, stopped, [WELL, SILENT]);
            }
            assert_eq!(blame(&stages, &[], TIMEOUT), Some(stopped));
        }
    }

    #[test]
    fn of_a_silent_link_the_end_that_is_dialled_is_moved_whichever_way_is_cut() {
        for ends in [[SILENT, WELL], [WELL, SILENT], [SILENT, SILENT], [SILENT, BROKEN], [BROKEN, SILENT]] {
            let mut stages = well(3);
            misses(&mut stages, 0, ends);
            assert_eq!(blamed(&stages), Some("b"), "{ends:?}");
        }
    }

    #[test]
    fn progress_tells_which_of_two_silent_links_lost_something() {
        let mut stages = well(4);
        misses(&mut stages, 0, [WELL, SILENT]);
        misses(&mut stages, 2, [WELL, SILENT]);
        stages[2].health.sent = 9;
        assert_eq!(blamed(&stages), Some("d"));
    }

    #[test]
    fn trouble_with_two_neighbours_is_trouble_of_ones_own() {
        let mut stages = well(4);
        misses(&mut stages, 0, [WELL, SILENT]);
        misses(&mut stages, 1, [SILENT, WELL]);
        assert_eq!(blamed(&stages), Some("b"), "cut off on both sides");

        // A spare that came in the place of `c`, and that `a` does not reach either.
        let mut stages = well(3);
        misses(&mut stages, 0, [SILENT, WELL]);
        let before = [("a".to_owned(), "c".to_owned())];
        assert_eq!(blame(&stages, &before, TIMEOUT), Some(0));
    }

    #[test]
    fn a_connection_that_broke_between_stages_that_are_well_is_nobodys_fault() {
        let mut stages = well(3);
        misses(&mut stages, 1, [BROKEN, BROKEN]);
        assert_eq!(blamed(&stages), None);
        assert_eq!(blame(&well(3), &[], TIMEOUT), None);
        assert_eq!(blame(&[], &[], TIMEOUT), None);
        let links = SilentLinks::default();
        assert_eq!((links.blame(&stages, TIMEOUT), links.lock().len()), (None, 0));
        misses(&mut stages, 1, [BROKEN, SILENT]);
        assert_eq!((links.blame(&stages, TIMEOUT), links.lock().len()), (Some(2), 1));
        links.forget();
        stages[1].silent = TIMEOUT;
        assert_eq!((links.blame(&stages, TIMEOUT), links.lock().len()), (Some(1), 0));
    }
}
