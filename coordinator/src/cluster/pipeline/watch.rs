//! Listening to the stages of a running pipeline, and finding out who is to blame when it breaks.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use strata_proto::{
    Side,
    error::missed,
    v1::{self, LinkHealth, StageHealth, from_stage},
};
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};
use tonic::Status;

use super::{EventSink, PipelineEvent};
use crate::cluster::{
    PipelineError,
    blame::{Report, SilentLinks},
};

/// Longest time a stage may compute one step.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// How long others have to say what became of them, once a stage misses its neighbour.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// What the stages of one incarnation have said.
#[derive(Debug)]
pub(super) struct Watch {
    stages: Mutex<Vec<Stage>>,
    /// Changes when a stage ends or misses a neighbour.
    worse: Notify,
    silent_links: SilentLinks,
    timeout: Duration,
}

#[derive(Debug)]
struct Stage {
    worker: String,
    ended: bool,
    heard: Instant,
    health: StageHealth,
}

/// What became of a stage, or of its worker: to be read behind the name.
#[derive(Debug, PartialEq)]
enum End {
    /// It was lost, or failed by itself.
    Failed(String),
    /// Nothing was heard of it for too long.
    Silent(String),
    /// It misses a neighbour.
    Misses(String),
}

impl Watch {
    /// Of stages on these workers, all of them well. A stage counts as lost after a silence of `timeout`.
    pub fn new(
        workers: impl Iterator<Item = String>,
        timeout: Duration,
        silent_links: SilentLinks,
    ) -> Arc<Self> {
        let heard = Instant::now();
        let stage = |worker| Stage { worker, ended: false, heard, health: StageHealth::default() };
        let stages = Mutex::new(workers.map(stage).collect());
        Arc::new(Watch { stages, worse: Notify::new(), silent_links, timeout })
    }

    /// Forwards a stage's messages to `sink` until it runs no more, and then says who is to blame.
    pub async fn follow(
        self: Arc<Self>,
        stage: usize,
        incarnation: u64,
        mut from: mpsc::Receiver<v1::FromStage>,
        sink: EventSink,
    ) {
        let own = self.lock()[stage].worker.clone();
        let lost = |worker, reason, leave_out| PipelineEvent::Lost { worker, reason, leave_out };
        let event = match self.listen(stage, incarnation, &mut from, &sink).await {
            End::Failed(reason) => {
                self.update(stage, |stage| stage.ended = true);
                lost(own, reason, false)
            }
            End::Silent(reason) => {
                self.update(stage, |stage| stage.ended = true);
                lost(own, reason, true)
            }
            End::Misses(reason) => match self.last_words().await {
                Some((worker, true)) => lost(worker, format!("is gone: worker {own} {reason}"), false),
                Some((worker, false)) if worker == own => lost(own, reason, true),
                Some((worker, false)) => lost(worker, format!("is not heard: worker {own} {reason}"), true),
                None => lost(own, reason, false),
            },
        };
        sink(incarnation, event);
    }

    /// Who is to blame, and whether that is known for sure: once somebody is gone, both ends of a link have missed
    /// each other, or no more comes.
    async fn last_words(&self) -> Option<(String, bool)> {
        let settled = async {
            loop {
                let worse = self.worse.notified();
                if is_settled(&self.reports(), self.timeout) {
                    break;
                }
                worse.await;
            }
        };
        // Nobody has to have last words.
        let _ = tokio::time::timeout(LAST_WORDS, settled).await;
        let reports = self.reports();
        self.silent_links
            .blame(&reports, self.timeout)
            .map(|at| (reports[at].worker.clone(), reports[at].ended))
    }

    /// Waits until all links are up, or it is known who is to blame that one is not: of two ends that miss each other
    /// one may be cut off. The calls are those of the stages, in order.
    ///
    /// # Errors
    /// What is wrong with the worker to blame.
    pub async fn connected(
        &self,
        calls: impl Iterator<Item = impl Future<Output = Result<(), PipelineError>>>,
    ) -> Result<(), PipelineError> {
        let calls = calls.enumerate().map(|(stage, call)| async move { (stage, call.await) });
        let mut calls: FuturesUnordered<_> = calls.collect();
        let mut errors: Vec<Option<PipelineError>> = self.lock().iter().map(|_| None).collect();
        let mut wait = Duration::MAX;
        while let Ok(Some((stage, result))) = tokio::time::timeout(wait, calls.next()).await {
            if let Err(error) = result {
                errors[stage] = Some(error);
                wait = LAST_WORDS;
            }
        }
        let first = errors.iter().enumerate().find_map(|(stage, error)| Some((stage, error.clone()?)));
        let Some((complains, why)) = first else {
            // Nobody is missed for what came before.
            self.lock().iter_mut().for_each(|stage| stage.heard = Instant::now());
            return Ok(());
        };
        let reports: Vec<_> =
            self.lock().iter().zip(&errors).map(|(stage, error)| unconnected(&stage.worker, error)).collect();
        let blamed = self.silent_links.blame(&reports, self.timeout).unwrap_or(complains);
        Err(errors.swap_remove(blamed).unwrap_or_else(|| {
            let status =
                Status::unavailable(format!("worker {}: {}", reports[complains].worker, why.reason()));
            PipelineError::Call { worker: reports[blamed].worker.clone(), doing: "Connect", status }
        }))
    }

    fn reports(&self) -> Vec<Report> {
        let report = |stage: &Stage| Report {
            worker: stage.worker.clone(),
            ended: stage.ended,
            silent: stage.heard.elapsed(),
            health: stage.health,
        };
        self.lock().iter().map(report).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Stage>> {
        self.stages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, at: usize, update: impl FnOnce(&mut Stage)) {
        update(&mut self.lock()[at]);
        self.worse.notify_waiters();
    }

    /// Forwards a stage's messages until it runs no more.
    async fn listen(
        &self,
        stage: usize,
        incarnation: u64,
        from: &mut mpsc::Receiver<v1::FromStage>,
        sink: &EventSink,
    ) -> End {
        let mut leaves = false;
        loop {
            let message = match tokio::time::timeout(self.timeout, from.recv()).await {
                Ok(Some(message)) => message.message,
                Ok(None) => return End::Failed("was lost: its stream ended".into()),
                Err(_) => return End::Silent(format!("was lost: it was silent for {:?}", self.timeout)),
            };
            self.lock()[stage].heard = Instant::now();
            match message {
                Some(from_stage::Message::Result(result)) => sink(incarnation, PipelineEvent::Result(result)),
                Some(from_stage::Message::Done(done)) => {
                    let compute = Duration::from_micros(done.compute_us);
                    sink(incarnation, PipelineEvent::Done { stage, step: done.step, compute });
                }
                Some(from_stage::Message::Health(health)) => {
                    self.lock()[stage].health = health;
                    if health.draining && !leaves {
                        leaves = true;
                        let worker = self.lock()[stage].worker.clone();
                        sink(incarnation, PipelineEvent::Leaving { worker });
                    }
                    if let Some(end) = end_of(&health) {
                        self.worse.notify_waiters();
                        return end;
                    }
                }
                Some(from_stage::Message::Fatal(why)) => {
                    return End::Failed(format!("ended its stage: {why}"));
                }
                Some(from_stage::Message::Opened(_)) | None => {
                    return End::Failed("sent a message out of order".into());
                }
            }
        }
    }
}

/// A stage as its call of Connect shows it.
fn unconnected(worker: &str, error: &Option<PipelineError>) -> Report {
    let side = match error {
        Some(PipelineError::Call { status, .. }) => missed(status),
        _ => None,
    };
    let silent = |of| if side == Some(of) { LinkHealth::Silent.into() } else { 0 };
    let (upstream, downstream) = (silent(Side::Upstream), silent(Side::Downstream));
    let health = StageHealth { upstream, downstream, ..StageHealth::default() };
    let ended = error.is_some() && side.is_none();
    Report { worker: worker.to_owned(), ended, silent: Duration::ZERO, health }
}

/// Whether there is nothing to wait for before somebody is blamed.
fn is_settled(reports: &[Report], timeout: Duration) -> bool {
    let gone = reports.iter().any(|report| report.is_gone(timeout));
    let well = LinkHealth::Unspecified;
    let both = reports.windows(2).any(|ends| {
        let said = [ends[0].health.downstream(), ends[1].health.upstream()];
        said.contains(&LinkHealth::Silent) || !said.contains(&well)
    });
    gone || both
}

/// What the health of a stage says that makes its run be over.
fn end_of(health: &StageHealth) -> Option<End> {
    let busy = Duration::from_millis(health.busy_ms);
    // One that waits for its activation has received no more than it has finished.
    if health.received > health.steps && busy > STEP_TIMEOUT {
        return Some(End::Failed(format!("has computed one step for {busy:?}")));
    }
    let complaint = |link, side| match link {
        LinkHealth::Unspecified => None,
        LinkHealth::Silent => Some(End::Misses(format!("hears nothing of the {}", neighbour(side)))),
        LinkHealth::Broken => Some(End::Misses(format!("lost its link to the {}", neighbour(side)))),
    };
    let upstream = complaint(health.upstream(), Side::Upstream);
    upstream.or_else(|| complaint(health.downstream(), Side::Downstream))
}

/// The stage on a side of another one.
fn neighbour(side: Side) -> &'static str {
    match side {
        Side::Upstream => "stage before it",
        Side::Downstream => "stage after it",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(2);

    fn watched(workers: [&str; 3], links: SilentLinks) -> Arc<Watch> {
        Watch::new(workers.map(str::to_owned).into_iter(), TIMEOUT, links)
    }

    /// A pipeline over workers `a`, `b` and `c`: what each of its stages says goes in, what is told to the engine comes
    /// out.
    fn followed() -> (Vec<mpsc::Sender<v1::FromStage>>, mpsc::UnboundedReceiver<PipelineEvent>) {
        let watch =
            Watch::new(["a", "b", "c"].map(str::to_owned).into_iter(), TIMEOUT, SilentLinks::default());
        let (events, told) = mpsc::unbounded_channel();
        let sink: EventSink = Arc::new(move |_, event| drop(events.send(event)));
        let follow = |stage| {
            let (to, from) = mpsc::channel(8);
            tokio::spawn(watch.clone().follow(stage, 1, from, sink.clone()));
            to
        };
        ((0..3).map(follow).collect(), told)
    }

    async fn say(stage: &mpsc::Sender<v1::FromStage>, health: StageHealth) {
        let health = v1::FromStage { message: Some(from_stage::Message::Health(health)) };
        stage.send(health).await.unwrap();
    }

    fn missing(upstream: LinkHealth, downstream: LinkHealth) -> StageHealth {
        StageHealth { upstream: upstream.into(), downstream: downstream.into(), ..StageHealth::default() }
    }

    async fn lost(told: &mut mpsc::UnboundedReceiver<PipelineEvent>) -> (String, bool) {
        match told.recv().await.unwrap() {
            PipelineEvent::Lost { worker, leave_out, .. } => (worker, leave_out),
            event => panic!("{event:?}"),
        }
    }

    #[tokio::test]
    async fn a_stage_whose_worker_drains_says_so_once_and_runs_on() {
        let (stages, mut told) = followed();
        let leaves = StageHealth { draining: true, ..StageHealth::default() };
        for health in [StageHealth::default(), leaves, leaves] {
            say(&stages[0], health).await;
        }
        match told.recv().await.unwrap() {
            PipelineEvent::Leaving { worker } => assert_eq!(worker, "a"),
            event => panic!("{event:?}"),
        }
        say(&stages[0], missing(LinkHealth::Unspecified, LinkHealth::Broken)).await;
        assert!(matches!(told.recv().await.unwrap(), PipelineEvent::Lost { .. }));
    }

    #[tokio::test]
    async fn a_neighbour_that_complains_first_is_not_blamed_for_who_is_gone() {
        let (mut stages, mut told) = followed();
        say(&stages[0], missing(LinkHealth::Unspecified, LinkHealth::Broken)).await;
        tokio::task::yield_now().await;
        drop(stages.remove(1));
        assert_eq!(lost(&mut told).await, ("b".into(), false));
        assert_eq!(lost(&mut told).await, ("b".into(), false));
    }

    #[tokio::test]
    async fn a_silent_link_moves_a_stage_and_one_that_broke_does_not() {
        let (stages, mut told) = followed();
        say(&stages[1], missing(LinkHealth::Unspecified, LinkHealth::Silent)).await;
        assert_eq!(lost(&mut told).await, ("c".into(), true));
        let (stages, mut told) = followed();
        say(&stages[1], missing(LinkHealth::Unspecified, LinkHealth::Broken)).await;
        say(&stages[2], missing(LinkHealth::Broken, LinkHealth::Unspecified)).await;
        assert!(!lost(&mut told).await.1);
    }

    #[tokio::test]
    async fn of_links_that_do_not_come_up_the_end_is_blamed_that_is_not_reached() {
        let fails = |worker: &str, side: Option<Side>| {
            let mut status = Status::unavailable("no answer");
            side.iter().for_each(|side| strata_proto::error::miss(&mut status, *side));
            Err(PipelineError::Call { worker: worker.into(), doing: "Connect", status })
        };
        let connect =
            async |workers, results: [Option<Result<(), PipelineError>>; 3], links: &SilentLinks| {
                let calls = results.into_iter().map(async |result| match result {
                    Some(result) => result,
                    None => std::future::pending().await,
                });
                watched(workers, links.clone()).connected(calls).await.unwrap_err().to_string()
            };
        let (abc, links) = (["a", "b", "c"], SilentLinks::default());
        let misses = |worker| Some(fails(worker, Some(Side::Downstream)));
        let said = connect(abc, [misses("a"), None, Some(Ok(()))], &links).await;
        assert_eq!(said, "worker b: Connect failed: worker a: Connect failed: no answer");
        // The one in the place of `b` is not reached either.
        let said = connect(["a", "s", "c"], [misses("a"), None, None], &links).await;
        assert_eq!(said, "worker a: Connect failed: no answer");
        // Who fails by itself is to blame, whoever complains.
        let results = [misses("a"), None, Some(fails("c", None))];
        let said = connect(abc, results, &SilentLinks::default()).await;
        assert_eq!(said, "worker c: Connect failed: no answer");
    }

    #[test]
    fn who_waits_for_an_activation_computes_no_step() {
        let long = |received| StageHealth { received, steps: 4, busy_ms: 121_000, ..StageHealth::default() };
        assert_eq!(end_of(&long(4)), None);
        assert!(matches!(end_of(&long(5)), Some(End::Failed(why)) if why.contains("one step for 121s")));
    }
}
