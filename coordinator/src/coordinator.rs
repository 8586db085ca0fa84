//! A coordinator from its first moment on: it stands by, starts (members, plan, tokenizer, engine, pipelines, probe),
//! serves, and drains.

mod admin;
mod operators;
mod replace;
mod serve;
mod status;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::registry::Registry;
use strata_proto::Plan;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use crate::{
    cluster::{
        History, PipelineError,
        discovery::{Discovery, discover},
        leadership::Leadership,
        membership::{Members, Source},
        records::{InMemory, Keeper, RecordError},
    },
    config::{CoordinatorConfig, Deployment},
    engine::{self, Claims, Ended, Notice, Observer, Snapshot, State},
    front::session::{self, Session},
    preflight::Finding,
};

pub use admin::{AdminError, Applied, Comparison};

/// How long listed workers have to come at first, before those that are there are enough if they can hold the model.
/// Whoever has waited so long does not wait again when its turn comes: clients are waiting then.
const ENOUGH_AFTER: Duration = Duration::from_secs(5);
/// How long nobody may have joined, where nobody knows how many will, before those that are there may do.
const SETTLED_AFTER: Duration = Duration::from_secs(1);
/// Pause after a coordinator could not take over from another one.
const TAKE_OVER_AGAIN: Duration = Duration::from_secs(2);

/// Why a coordinator did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Some workers did not come.
    #[error(
        "{joined} of {expected} workers answered within {timeout:?}{}; start the others, or list fewer",
        because(away)
    )]
    Members {
        /// How many came.
        joined: usize,
        /// How many were listed.
        expected: usize,
        /// How long they had.
        timeout: Duration,
        /// What is known of those that did not come.
        away: BTreeMap<String, String>,
    },
    /// Two of those that are listed are one.
    #[error("workers {worker} and {again} are one process: expected each worker once")]
    Twice {
        /// One of its names.
        worker: String,
        /// The other one.
        again: String,
    },
    /// No pipeline.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// What operators have decided cannot be read.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// A check before serving failed.
    #[error("preflight: {}", refusals(.0))]
    Preflight(Vec<Finding>),
    /// It was started before.
    #[error("this coordinator was started before; make another one")]
    Again,
    /// Another coordinator has taken the workers over.
    #[error("another coordinator leads: {0}")]
    Outbid(String),
    /// The engine ended before it began.
    #[error("the engine ended unexpectedly")]
    Engine,
}

impl StartError {
    /// What to say if the reason is a leader of a later term than this one.
    fn outbid(&self, term: u64) -> Option<String> {
        let outbid = match self {
            StartError::Outbid(_) => true,
            StartError::Pipeline(error) => error.newest_term().is_some_and(|newest| newest > term),
            _ => false,
        };
        outbid.then(|| self.to_string())
    }
}

fn because(away: &BTreeMap<String, String>) -> String {
    away.iter().map(|(worker, why)| format!("; worker {worker}: {why}")).collect()
}

fn refusals(findings: &[Finding]) -> String {
    let refusing = || findings.iter().filter(|f| f.refuses());
    let all: Vec<_> = refusing().map(|f| format!("{}: {}", f.check, f.detail)).collect();
    let hint = match refusing().all(|f| f.check.can_be_skipped()) {
        true => " (a check can be ignored with --skip-check NAME)",
        false => "",
    };
    all.join("; ") + hint
}

/// What is deployed.
#[derive(Debug, Clone)]
pub(crate) struct Deployed {
    /// Of its record; 0 without one.
    pub version: u64,
    /// What is served.
    pub deployment: Deployment,
}

/// A request for another engine.
#[derive(Debug)]
struct Replacement {
    deployment: Deployment,
    reply: oneshot::Sender<Result<(), AdminError>>,
}

/// A coordinator, without its ports. It can be asked what it is doing from the moment it is made.
#[derive(Debug, Clone)]
pub struct Coordinator {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: CoordinatorConfig,
    members: Members,
    snapshot: watch::Sender<Snapshot>,
    session: Session,
    started: AtomicBool,
    /// Counts pipelines that were begun, whoever led then.
    incarnations: Arc<AtomicU64>,
    /// What earlier pipelines of the model have shown, whoever led when they were brought up.
    history: Mutex<Arc<History>>,
    /// What engines run on.
    claims: Claims,
    /// Asks for another engine; set when it serves.
    replacements: OnceLock<mpsc::UnboundedSender<Replacement>>,
    /// What is deployed.
    deployed: Mutex<Deployed>,
    /// Where it is kept what operators decide; set when it starts.
    keeper: OnceLock<Arc<dyn Keeper>>,
    /// Held while an operator's call is at work.
    admin: tokio::sync::Mutex<()>,
    /// What members said when they were last asked.
    probed: tokio::sync::Mutex<status::Probed>,
    /// What is measured.
    registry: Registry,
    /// Of all engines.
    series: Arc<engine::Series>,
}

impl Coordinator {
    /// A coordinator that stands by until it is [started](Self::start).
    pub fn new(config: CoordinatorConfig) -> Self {
        let doing = "it has not been started".to_owned();
        let (snapshot, view) = watch::channel(Snapshot { doing, ..Snapshot::default() });
        let names = match config.names.is_empty() {
            true => vec![config.deployment.model.clone()],
            false => config.names.clone(),
        };
        let mut registry = Registry::default();
        let series = Arc::new(engine::Series::new(&mut registry));
        let session = Session::new(
            names.into(),
            config.limits.max_requests,
            config.clients.unread_bytes,
            view,
            session::Series::new(&mut registry),
        );
        let (members, started) = (Members::default(), AtomicBool::new(false));
        let incarnations = Arc::default();
        let (keeper, admin) = (OnceLock::new(), tokio::sync::Mutex::default());
        let deployed = Mutex::new(Deployed { version: 0, deployment: config.deployment.clone() });
        let shared = Shared {
            config,
            members,
            snapshot,
            session,
            started,
            history: Mutex::default(),
            incarnations,
            claims: Claims::default(),
            replacements: OnceLock::new(),
            keeper,
            admin,
            deployed,
            probed: tokio::sync::Mutex::default(),
            registry,
            series,
        };
        Coordinator { shared: Arc::new(shared) }
    }

    /// Waits for its turn and for workers, plans, loads, checks, and returns once requests are answered. To be called
    /// once: when another coordinator leads, this one stands by, and serves again when it is its turn.
    ///
    /// # Errors
    /// If workers stay away, the model does not fit, the tokenizer is not the model's, or this was called before.
    pub async fn start(&self, source: impl Into<Source>, observer: Observer) -> Result<(), StartError> {
        if self.shared.started.swap(true, Ordering::Relaxed) {
            return Err(StartError::Again);
        }
        let Source { events, mut leadership, keeper } = source.into();
        // It is started once.
        let _ = self.shared.keeper.set(keeper);
        self.shared.members.follow(events);
        let started = async {
            // Who has none of the workers that are listed has nothing to wait for a turn with.
            if self.shared.config.expected_members.is_some() {
                self.gather(ENOUGH_AFTER, &observer).await?;
            }
            self.take_over(&mut leadership, 0, &observer).await
        };
        match started.await {
            Ok(reign) => {
                let (asks, replacements) = mpsc::unbounded_channel();
                // It is started once.
                let _ = self.shared.replacements.set(asks);
                tokio::spawn(self.clone().go_on(reign, leadership, replacements, observer));
                Ok(())
            }
            Err(error) => {
                self.show(State::Standby, error.to_string());
                Err(error)
            }
        }
    }

    /// Stands by when it leads no more, and serves again when it does; meanwhile it serves what it is told to.
    async fn go_on(
        self,
        mut reign: Reign,
        mut leadership: watch::Receiver<Leadership>,
        mut replacements: mpsc::UnboundedReceiver<Replacement>,
        observer: Observer,
    ) {
        loop {
            let ended = tokio::select! {
                ended = reign.ended(&mut leadership) => ended,
                Some(asked) = replacements.recv() => {
                    match self.replaced(&mut reign, &leadership, asked, &observer).await {
                        true => continue,
                        false => Some((Ended::Failed("neither the new deployment nor the old one came up".into()), 0)),
                    }
                }
            };
            let Some((ended, outbid)) = ended else { return };
            self.shared.session.close();
            match ended {
                Ended::Deposed(why) => {
                    tracing::warn!("stands by: {why}");
                    self.show(State::Standby, why.as_str());
                    reign.engine.depose(why);
                }
                Ended::Failed(why) => {
                    tracing::error!("{why}; starting another one");
                    self.show(State::Starting, why);
                    tokio::time::sleep(TAKE_OVER_AGAIN).await;
                }
            }
            reign = loop {
                match self.take_over(&mut leadership, outbid, &observer).await {
                    Ok(reign) => break reign,
                    Err(error) => {
                        tracing::error!(%error, "cannot take over; trying again");
                        self.show(State::Standby, error.to_string());
                        tokio::time::sleep(TAKE_OVER_AGAIN).await;
                    }
                }
            };
        }
    }

    /// Waits for its turn, by another term than the one that was `outbid`, and brings the deployment up; begins anew if
    /// another coordinator takes over meanwhile.
    async fn take_over(
        &self,
        leadership: &mut watch::Receiver<Leadership>,
        mut outbid: u64,
        observer: &Observer,
    ) -> Result<Reign, StartError> {
        loop {
            let term = self.turn(leadership, outbid, observer).await?;
            let mut theirs = leadership.clone();
            let deposed = theirs.wait_for(|now| now.term() != Some(term));
            tokio::select! {
                biased;
                brought_up = self.bring_up(term, observer) => match brought_up {
                    Ok((engine, unused)) => return Ok(Reign { term, engine, unused: Some(unused) }),
                    Err(error) => match error.outbid(term) {
                        // A worker has heard of the other coordinator before this one has.
                        Some(why) => {
                            self.show(State::Standby, why);
                            outbid = term;
                        }
                        None => return Err(error),
                    }
                },
                // It may lead by the same term again by now.
                Ok(_) = deposed => outbid = 0,
            }
            self.shared.session.close();
        }
    }

    /// Waits until it leads, by another term than the one that was `outbid`; or by that one, if it was taken from it first:
    /// then nobody else has led.
    async fn turn(
        &self,
        leadership: &mut watch::Receiver<Leadership>,
        mut outbid: u64,
        observer: &Observer,
    ) -> Result<u64, StartError> {
        let mut told = String::new();
        loop {
            let now = leadership.borrow_and_update().clone();
            if now.term() != Some(outbid) {
                outbid = 0;
            }
            match &now {
                Leadership::Leads { term } if *term != outbid => return Ok(*term),
                // Workers say that somebody else leads; whoever decides here is about to hear of it.
                Leadership::Leads { .. } => {}
                Leadership::StandsBy { why } if *why != told => {
                    told.clone_from(why);
                    self.show(State::Standby, why.as_str());
                    observer(Notice::StandingBy(why.clone()));
                }
                Leadership::StandsBy { .. } => {}
            }
            // Who never leads is not to wait for ever.
            if leadership.changed().await.is_err() {
                return Err(StartError::Engine);
            }
        }
    }

    /// Waits for workers, with `patience` for all of those that are listed; what they said of the model, if some are
    /// missing and it had to be asked.
    async fn gather(&self, patience: Duration, observer: &Observer) -> Result<Option<Discovery>, StartError> {
        let waiting = |joined, expected| {
            self.show(State::Standby, counted(joined, expected));
            observer(Notice::Waiting(joined, expected));
        };
        let deployment = self.deployed().deployment.clone();
        gather(&self.shared.config, &deployment, &self.shared.members, patience, waiting).await
    }

    /// Reads what operators have decided; what is deployed.
    async fn recorded(&self) -> Result<Deployment, StartError> {
        let records = self.keeper().read().await?;
        self.shared.members.set_drained(records.drained);
        let flags = &self.shared.config.deployment;
        let Some((version, record)) = records.deployed else { return Ok(self.deployed().deployment.clone()) };
        let deployment =
            record.onto(flags).map_err(|why| RecordError::Unkept(format!("the deployment: {why}")))?;
        if deployment != *flags {
            tracing::warn!(
                version,
                model = deployment.model,
                "what was applied is served, and not what flags say"
            );
        }
        *self.deployed() = Deployed { version, deployment: deployment.clone() };
        Ok(deployment)
    }

    async fn bring_up(
        &self,
        term: u64,
        observer: &Observer,
    ) -> Result<(engine::Running, oneshot::Receiver<()>), StartError> {
        let deployment = self.recorded().await?;
        let found = self.gather(Duration::ZERO, observer).await?;
        self.show(State::Starting, "asking the workers for the model");
        let found = match found {
            Some(found) => found,
            None => discover(&self.members().answering(), &deployment).await?,
        };
        self.show(State::Starting, "planning, and checking the tokenizer");
        let ready = self.ready(found, &deployment, observer).await?;
        self.serve(term, ready, observer).await
    }

    /// Takes no more requests, and waits until those in progress have ended.
    pub async fn drain(&self) {
        self.show(State::Draining, "");
        self.shared.session.idle().await;
    }

    /// Shows what it is doing, unless it is ending.
    fn show(&self, state: State, doing: impl Into<String>) {
        self.shared.snapshot.send_modify(|s| {
            if s.state != State::Draining {
                (s.state, s.doing) = (state, doing.into());
            }
        });
    }

    /// The way to ask the model.
    pub fn session(&self) -> &Session {
        &self.shared.session
    }

    /// What it is doing, now and whenever that changes.
    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        self.shared.snapshot.subscribe()
    }

    /// The workers that are there.
    pub fn members(&self) -> &Members {
        &self.shared.members
    }

    /// Where it is kept what operators decide.
    fn keeper(&self) -> Arc<dyn Keeper> {
        self.shared.keeper.get().cloned().unwrap_or_else(|| Arc::new(InMemory::default()))
    }

    /// What earlier pipelines of the model have shown.
    fn history(&self) -> Arc<History> {
        self.shared.history.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is deployed.
    pub(crate) fn deployed(&self) -> MutexGuard<'_, Deployed> {
        self.shared.deployed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it was made from.
    pub fn config(&self) -> &CoordinatorConfig {
        &self.shared.config
    }
}

/// While a coordinator leads.
struct Reign {
    term: u64,
    engine: engine::Running,
    /// Resolves when nobody asks the engine any more.
    unused: Option<oneshot::Receiver<()>>,
}

impl Reign {
    /// Returns when it is over, with why, and with its term if another coordinator's is higher; `None` when there is nobody
    /// any more to serve.
    async fn ended(&mut self, leadership: &mut watch::Receiver<Leadership>) -> Option<(Ended, u64)> {
        let term = self.term;
        let deposed = async {
            let now = leadership.wait_for(|now| now.term() != Some(term)).await.map(|now| now.clone());
            match now {
                Ok(Leadership::StandsBy { why }) => why,
                Ok(Leadership::Leads { term }) => format!("it leads anew, by term {term}"),
                // Who decided is gone, so what was decided holds.
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            why = deposed => Some((Ended::Deposed(why), 0)),
            ended = self.engine.ended() => match ended? {
                Ended::Deposed(why) => Some((Ended::Deposed(why), term)),
                failed => Some((failed, 0)),
            },
        }
    }
}

/// Waits until the expected number of workers is there, and calls `waiting` whenever that is to be waited for. After
/// `patience`, those are enough over which it can be planned; then what they said is returned. Where no number is expected,
/// that is waited for as long as it takes.
async fn gather(
    config: &CoordinatorConfig,
    deployment: &Deployment,
    members: &Members,
    patience: Duration,
    waiting: impl Fn(usize, Option<usize>),
) -> Result<Option<Discovery>, StartError> {
    let expected = config.expected_members;
    let mut events = members.subscribe();
    let begun = Instant::now();
    let deadline = expected.map(|_| begun + config.join_timeout);
    let mut look = begun + patience.min(config.join_timeout);
    let mut failed = false;
    let mut told = None;
    loop {
        if let Some((worker, again)) = members.twice() {
            return Err(StartError::Twice { worker, again });
        }
        let joined = members.list().len();
        if expected.is_some_and(|expected| joined >= expected) {
            return Ok(None);
        }
        if told != Some(joined) {
            waiting(joined, expected);
            told = Some(joined);
            failed = false;
        }
        if expected.is_none() && !failed {
            look = members.joined_last().unwrap_or(begun) + SETTLED_AFTER;
        }
        let mut nobody_comes = false;
        match tokio::time::timeout_at(look, events.recv()).await {
            Ok(Some(_)) => continue,
            Ok(None) => nobody_comes = true,
            Err(_) => {}
        }
        // Those that are there may do.
        let found = discover(&members.answering(), deployment).await;
        if let Ok(found) = found
            && found.plan(deployment).is_ok()
        {
            if let Some(expected) = expected {
                tracing::warn!(
                    "{joined} of {expected} workers are there, which is enough; starting without the others"
                );
            }
            return Ok(Some(found));
        }
        if nobody_comes || deadline.is_some_and(|deadline| look >= deadline) {
            let (expected, timeout, away) = (expected.unwrap_or(joined), config.join_timeout, members.away());
            return Err(StartError::Members { joined, expected, timeout, away });
        }
        failed = true;
        look = Instant::now() + ENOUGH_AFTER;
        look = deadline.map_or(look, |deadline| look.min(deadline));
    }
}

/// How many workers are there, in words.
fn counted(joined: usize, expected: Option<usize>) -> String {
    match expected {
        Some(expected) => format!("{joined} of {expected} workers are there"),
        None => format!("{joined} workers are there, over which the model cannot be planned yet"),
    }
}

/// Plans over those members that could describe the model, and says who could not.
fn plan_of(found: &Discovery, deployment: &Deployment) -> Result<Plan, PipelineError> {
    for (worker, why) in &found.left_out {
        tracing::warn!(worker, "{why}; planning without it");
    }
    found.plan(deployment).map_err(|error| error.without(found.left_out.clone()))
}

/// Waits for the expected workers and asks them for their devices and the model; loads nothing.
///
/// # Errors
/// If workers stay away, or the model cannot be described.
pub async fn discover_members(
    config: &CoordinatorConfig,
    source: impl Into<Source>,
    observer: &Observer,
) -> Result<Discovery, StartError> {
    let (source, members) = (source.into(), Members::default());
    members.follow(source.events);
    let waiting = |joined, expected| observer(Notice::Waiting(joined, expected));
    match gather(config, &config.deployment, &members, ENOUGH_AFTER, waiting).await? {
        Some(found) => Ok(found),
        None => Ok(discover(&members.answering(), &config.deployment).await?),
    }
}

/// Waits for the expected workers, asks them, and plans, without loading anything.
///
/// # Errors
/// As for [`Coordinator::start`].
pub async fn preview(
    config: &CoordinatorConfig,
    source: impl Into<Source>,
    observer: &Observer,
) -> Result<(Discovery, Plan), StartError> {
    let found = discover_members(config, source, observer).await?;
    let plan = plan_of(&found, &config.deployment)?;
    Ok((found, plan))
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    #[tokio::test]
    async fn a_term_that_was_taken_back_and_given_again_counts_again() {
        let coordinator = Coordinator::new(CoordinatorConfig::new("m", 1));
        let (decided, mut leadership) = watch::channel(Leadership::Leads { term: 7 });
        let observer: Observer = Arc::new(|_| {});
        assert_eq!(coordinator.turn(&mut leadership, 0, &observer).await.unwrap(), 7);
        // By a worker's word another one leads; whoever decides says so, too.
        let turn = coordinator.turn(&mut leadership, 7, &observer);
        tokio::pin!(turn);
        assert!(poll!(&mut turn).is_pending());
        decided.send_replace(Leadership::StandsBy { why: "coordinator b leads".into() });
        assert!(poll!(&mut turn).is_pending());
        assert_eq!(coordinator.watch().borrow().doing, "coordinator b leads");
        // And is gone before it has led.
        decided.send_replace(Leadership::Leads { term: 7 });
        assert_eq!(turn.await.unwrap(), 7);
    }
}
