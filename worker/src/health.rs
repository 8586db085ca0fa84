//! What a stage says of its health while it runs: how far it is, and whether its neighbours are there.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use strata_proto::{
    Side,
    v1::{self, LinkHealth, StagePhase, from_stage},
};
use tokio::sync::{mpsc, watch};

use crate::interrupt::Interrupt;

/// How the links to both neighbours are. Each says what became of it once: what follows is a consequence.
#[derive(Debug, Clone, Default)]
pub(crate) struct Neighbours(Arc<watch::Sender<[LinkHealth; 2]>>);

impl Neighbours {
    /// A link is no longer well.
    pub fn failed(&self, side: Side, health: LinkHealth) {
        self.0.send_if_modified(|links| {
            let first = links[side as usize] == LinkHealth::Unspecified;
            if first {
                links[side as usize] = health;
            }
            first && health != LinkHealth::Unspecified
        });
    }

    /// How a link is, once it is not well.
    #[cfg(test)]
    pub async fn until_failed(&self, side: Side) -> LinkHealth {
        let mut links = self.0.subscribe();
        let failed = links.wait_for(|links| links[side as usize] != LinkHealth::Unspecified);
        // The sender lives in `self`, so the wait cannot fail.
        failed.await.map_or(LinkHealth::Unspecified, |links| links[side as usize])
    }

    fn now(&self) -> [LinkHealth; 2] {
        *self.0.borrow()
    }
}

/// How far a stage thread is. Counts are of the run that is under way.
#[derive(Debug)]
pub(crate) struct Progress {
    begun: Instant,
    phase: AtomicI32,
    /// Milliseconds from `begun` to the beginning of the phase.
    since: AtomicU64,
    /// Activations that have come, steps that are done, activations that were handed on.
    received: AtomicU64,
    finished: AtomicU64,
    sent: AtomicU64,
}

impl Default for Progress {
    fn default() -> Self {
        let zero = AtomicU64::default;
        let (since, received, finished, sent) = (zero(), zero(), zero(), zero());
        Progress { begun: Instant::now(), phase: AtomicI32::default(), since, received, finished, sent }
    }
}

impl Progress {
    /// The thread does something else from now on.
    pub fn enter(&self, phase: StagePhase) {
        self.phase.store(phase as i32, Ordering::Relaxed);
        self.since.store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Since when it is at a step, if it is at one.
    pub fn in_step(&self) -> Option<Duration> {
        let since = Duration::from_millis(self.since.load(Ordering::Relaxed));
        let at_one = self.phase.load(Ordering::Relaxed) == StagePhase::Step as i32;
        at_one.then(|| self.begun.elapsed().saturating_sub(since))
    }

    /// A run begins.
    pub fn restart(&self) {
        for count in [&self.received, &self.finished, &self.sent] {
            count.store(0, Ordering::Relaxed);
        }
    }

    /// The activation of `step` has come: the stage waits no more, and computes.
    pub fn received(&self, step: u64) {
        self.enter(StagePhase::Step);
        self.received.store(step + 1, Ordering::Relaxed);
    }

    /// The activation of `step` was handed on.
    pub fn sent(&self, step: u64) {
        self.sent.store(step + 1, Ordering::Relaxed);
    }

    /// `step` is done.
    pub fn finished(&self, step: u64) {
        self.finished.store(step + 1, Ordering::Relaxed);
        self.phase.store(StagePhase::Idle as i32, Ordering::Relaxed);
    }
}

/// Whoever tells the coordinator of a run how the stage is.
pub(crate) struct Report {
    pub progress: Arc<Progress>,
    pub neighbours: Neighbours,
    pub draining: watch::Receiver<bool>,
    /// Time from one report to the next.
    pub every: Duration,
}

impl Report {
    /// Says it again and again, and at once when the worker begins to drain or a neighbour is missed, until the run
    /// is over.
    pub fn repeat(
        mut self,
        interrupt: Interrupt,
        answers: mpsc::Sender<v1::FromStage>,
    ) -> impl Future<Output = ()> {
        // From now on, not from when the future is first polled: what is missed until then is told, too.
        let mut links = self.neighbours.0.subscribe();
        let report = async move {
            let mut told = false;
            loop {
                tokio::select! {
                    () = tokio::time::sleep(self.every) => {}
                    Ok(_) = self.draining.wait_for(|draining| *draining), if !told => told = true,
                    Ok(()) = links.changed() => {}
                }
                let draining = *self.draining.borrow();
                if answers.send(health(&self.progress, &self.neighbours, draining)).await.is_err() {
                    return;
                }
            }
        };
        async move {
            tokio::select! {
                () = report => {}
                () = interrupt.tripped() => {}
            }
        }
    }
}

/// How a stage is now.
pub(crate) fn health(progress: &Progress, neighbours: &Neighbours, draining: bool) -> v1::FromStage {
    let now = progress.begun.elapsed().as_millis() as u64;
    let [upstream, downstream] = neighbours.now();
    let health = v1::StageHealth {
        phase: progress.phase.load(Ordering::Relaxed),
        busy_ms: now.saturating_sub(progress.since.load(Ordering::Relaxed)),
        draining,
        received: progress.received.load(Ordering::Relaxed),
        steps: progress.finished.load(Ordering::Relaxed),
        sent: progress.sent.load(Ordering::Relaxed),
        upstream: upstream.into(),
        downstream: downstream.into(),
    };
    v1::FromStage { message: Some(from_stage::Message::Health(health)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missed_neighbour_is_told_at_once_and_the_first_word_counts() {
        let (neighbours, interrupt) = (Neighbours::default(), Interrupt::default());
        let (_drain, draining) = watch::channel(false);
        let (answers, mut said) = mpsc::channel(8);
        let progress = Arc::<Progress>::default();
        progress.received(4);
        let report =
            Report { progress, neighbours: neighbours.clone(), draining, every: Duration::from_secs(3600) };
        let reporting = tokio::spawn(report.repeat(interrupt.clone(), answers));
        neighbours.failed(Side::Downstream, LinkHealth::Unspecified);
        neighbours.failed(Side::Downstream, LinkHealth::Silent);
        neighbours.failed(Side::Downstream, LinkHealth::Broken);
        let Some(from_stage::Message::Health(health)) = said.recv().await.unwrap().message else {
            panic!("no health")
        };
        assert_eq!((health.upstream(), health.downstream()), (LinkHealth::Unspecified, LinkHealth::Silent));
        assert_eq!((health.received, health.steps, health.sent), (5, 0, 0));
        interrupt.trip();
        reporting.await.unwrap();
        assert!(said.recv().await.is_none(), "what follows is no news");
    }
}
