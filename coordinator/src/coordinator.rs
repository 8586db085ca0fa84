//! A coordinator from its first moment on: it stands by, starts (members, plan, tokenizer, engine, pipelines, probe),
//! serves, and drains.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use strata_proto::{
    ModelProfile, Plan,
    v1::{self, Task, generate_event::Event},
};
use tokio::sync::{mpsc, watch};

use crate::{
    cluster::{
        PipelineError,
        discovery::{Discovery, Planned, discover},
        membership::{MemberEvent, Members},
    },
    config::CoordinatorConfig,
    engine::{self, Engine, EngineError, Notice, Observer, Snapshot, State},
    front::session::{Served, Session, SessionError},
    preflight::{self, Check, Finding},
    request::Limit,
};

/// Alternatives that the output check compares.
const PROBE_LOGPROBS: u32 = 20;

/// Why a coordinator did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Some workers did not come.
    #[error("{joined} of {expected} workers answered within {timeout:?}; start the others, or list fewer")]
    Members {
        /// How many came.
        joined: usize,
        /// How many were listed.
        expected: usize,
        /// How long they had.
        timeout: Duration,
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
    /// A check before serving failed.
    #[error("preflight: {}", refusals(.0))]
    Preflight(Vec<Finding>),
    /// It was started before.
    #[error("this coordinator was started before; make another one")]
    Again,
    /// The engine ended before it began.
    #[error("the engine ended unexpectedly")]
    Engine,
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
        let session = Session::new(names.into(), config.limits.max_requests, view);
        let (members, started) = (Members::default(), AtomicBool::new(false));
        let shared = Shared { config, members, snapshot, session, started };
        Coordinator { shared: Arc::new(shared) }
    }

    /// Waits for the expected workers, plans, loads, checks, and returns once requests are answered. To be called once.
    ///
    /// # Errors
    /// If workers stay away, the model does not fit, the tokenizer is not the model's, or this was called before.
    pub async fn start(
        &self,
        events: mpsc::UnboundedReceiver<MemberEvent>,
        observer: Observer,
    ) -> Result<(), StartError> {
        if self.shared.started.swap(true, Ordering::Relaxed) {
            return Err(StartError::Again);
        }
        let started = self.bring_up(events, observer).await;
        if let Err(error) = &started {
            self.show(State::Standby, error.to_string());
        }
        started
    }

    async fn bring_up(
        &self,
        mut events: mpsc::UnboundedReceiver<MemberEvent>,
        observer: Observer,
    ) -> Result<(), StartError> {
        let Shared { config, members, session, snapshot, .. } = &*self.shared;
        let waiting = |joined, expected| {
            self.show(State::Standby, format!("{joined} of {expected} workers are there"));
            observer(Notice::Waiting(joined, expected));
        };
        gather(config, &mut events, members, waiting).await?;
        self.show(State::Starting, "asking the workers for the model");
        let found = Arc::new(discover(&members.list(), &config.deployment.model).await?);
        self.show(State::Starting, "planning");
        let plan = Arc::new(found.plan(&config.deployment)?);
        self.show(State::Starting, "checking the tokenizer");
        let files = found.tokenizer_files(&plan).await?;
        let mut profile = found.profile.clone();
        let longest = Limit::of_context(profile.context_length, config.deployment.context);
        profile.context_length = config.deployment.context_of(&profile);
        let profile = Arc::new(profile);
        let (checked, skip) = (profile.clone(), config.skip_checks.clone());
        let inspected = tokio::task::spawn_blocking(move || preflight::inspect(&files, &checked, &skip));
        let (tokenizer, mut findings) = inspected.await.map_err(|_| StartError::Engine)?;
        let tokenizer = match tokenizer {
            Some(tokenizer) if !findings.iter().any(Finding::refuses) => Arc::new(tokenizer),
            _ => {
                observer(Notice::Checked(findings.clone()));
                return Err(StartError::Preflight(findings));
            }
        };

        self.show(State::Starting, "loading");
        let (engine, up) = Engine::spawn(engine::Start {
            deployment: config.deployment.clone(),
            limits: config.limits.clone(),
            profile: profile.clone(),
            tokenizer: tokenizer.clone(),
            observer: observer.clone(),
            members: members.clone(),
            snapshot: snapshot.clone(),
            planned: Planned { found, plan },
        });
        session.open(Served {
            profile: profile.clone(),
            tokenizer,
            engine: engine.clone(),
            longest,
            longest_input: longest.within_step(config.deployment.max_step_tokens),
            is_cache_chosen: config.deployment.kv_tokens.is_some(),
        });
        tokio::spawn(follow(events, members.clone(), engine));
        up.await.map_err(|_| StartError::Engine)??;
        self.show(State::Starting, "checking the model's output");
        let output = probe(&session.probing(), &profile).await;
        findings.push(Finding::new(Check::Output, output, &config.skip_checks));
        observer(Notice::Checked(findings.clone()));
        if findings.iter().any(Finding::refuses) {
            return Err(StartError::Preflight(findings));
        }
        self.show(State::Serving, "");
        Ok(())
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

    /// What it was made from.
    pub fn config(&self) -> &CoordinatorConfig {
        &self.shared.config
    }
}

/// Waits until the expected number of workers is there, and calls `waiting` whenever that is to be waited for.
async fn gather(
    config: &CoordinatorConfig,
    events: &mut mpsc::UnboundedReceiver<MemberEvent>,
    members: &Members,
    waiting: impl Fn(usize, usize),
) -> Result<(), StartError> {
    let expected = config.expected_members;
    let mut joined = members.list().len();
    let all_joined = async {
        while joined < expected {
            let event = match events.try_recv() {
                Ok(event) => Some(event),
                Err(_) => {
                    waiting(joined, expected);
                    events.recv().await
                }
            };
            match event {
                Some(MemberEvent::Twice { worker, again }) => {
                    return Err(StartError::Twice { worker, again });
                }
                Some(event) => joined = members.note(&event),
                None => break,
            }
        }
        Ok(())
    };
    // A timeout is told by the count below.
    if let Ok(Err(twice)) = tokio::time::timeout(config.join_timeout, all_joined).await {
        return Err(twice);
    }
    if joined < expected {
        return Err(StartError::Members { joined, expected, timeout: config.join_timeout });
    }
    Ok(())
}

/// Keeps the list of members, and tells the engine, until that is gone.
async fn follow(
    mut events: mpsc::UnboundedReceiver<MemberEvent>,
    members: Members,
    engine: mpsc::UnboundedSender<engine::Event>,
) {
    while let Some(event) = events.recv().await {
        members.note(&event);
        if engine.send(engine::Event::Member(event)).is_err() {
            break;
        }
    }
}

/// Asks the model about two inputs: what it says must be finite and differ.
async fn probe(session: &Session, profile: &ModelProfile) -> Result<String, String> {
    let asked = async {
        let first = answer(session, profile.task, 0).await?;
        let last = answer(session, profile.task, profile.vocab_size - 1).await?;
        Ok::<_, SessionError>((first, last))
    };
    let (a, b) = asked.await.map_err(|error| match error {
        SessionError::Failed(EngineError::Poisoned) => {
            "the forward pass fails or gives logits that are not finite: the weights are damaged, or this dtype cannot \
             hold them; try --dtype f32"
                .to_owned()
        }
        error => error.to_string(),
    })?;
    if !a.iter().chain(&b).all(|x| x.is_finite()) {
        return Err("the model's output is not finite: its weights are damaged".into());
    }
    if a == b {
        return Err("two different inputs give the same output: the weights are not the model's".into());
    }
    Ok("finite, and different for different inputs".into())
}

/// What the model makes of a token: log-probabilities, a vector, the logits of classes, or probabilities.
async fn answer(session: &Session, task: Task, token: u32) -> Result<Vec<f32>, SessionError> {
    let mut ids = vec![token];
    if task == Task::FillMask {
        ids.extend(session.mask_token());
    }
    let inputs = vec![v1::Input { token_ids: ids.clone(), ..v1::Input::default() }];
    match task {
        Task::Classify => {
            let request = v1::ClassifyRequest { inputs, ..v1::ClassifyRequest::default() };
            let results = session.classify(request).await?.results.into_iter();
            Ok(results.flat_map(|r| r.classes).map(|class| class.logit).collect())
        }
        Task::Embed => {
            let request = v1::EmbedRequest { inputs, ..v1::EmbedRequest::default() };
            Ok(session.embed(request).await?.results.into_iter().flat_map(|r| r.values).collect())
        }
        Task::FillMask => {
            let request =
                v1::FillMaskRequest { inputs, top_k: Some(PROBE_LOGPROBS), ..v1::FillMaskRequest::default() };
            let results = session.fill_masks(request).await?.results.into_iter();
            let masks = results.flat_map(|r| r.masks);
            Ok(masks.flat_map(|mask| mask.candidates).map(|candidate| candidate.score).collect())
        }
        Task::Generate | Task::Unspecified => {
            let request = v1::GenerateRequest {
                token_ids: ids,
                max_tokens: Some(1),
                logprobs: Some(PROBE_LOGPROBS),
                ..v1::GenerateRequest::default()
            };
            let mut events = session.generate(request).await?;
            let mut scores = Vec::new();
            while let Some(event) = events.next().await {
                if let Event::Tokens(tokens) = event? {
                    scores.extend(tokens.logprobs.into_iter().flat_map(|l| l.top).map(|t| t.logprob));
                }
            }
            Ok(scores)
        }
    }
}

/// Waits for the expected workers and asks them for their devices and the model; loads nothing.
///
/// # Errors
/// If workers stay away, or the model cannot be described.
pub async fn discover_members(
    config: &CoordinatorConfig,
    events: &mut mpsc::UnboundedReceiver<MemberEvent>,
    observer: &Observer,
) -> Result<Discovery, StartError> {
    let members = Members::default();
    gather(config, events, &members, |joined, expected| observer(Notice::Waiting(joined, expected))).await?;
    Ok(discover(&members.list(), &config.deployment.model).await?)
}

/// Waits for the expected workers, asks them, and plans, without loading anything.
///
/// # Errors
/// As for [`Coordinator::start`].
pub async fn preview(
    config: &CoordinatorConfig,
    events: &mut mpsc::UnboundedReceiver<MemberEvent>,
    observer: &Observer,
) -> Result<(Discovery, Plan), StartError> {
    let found = discover_members(config, events, observer).await?;
    let plan = found.plan(&config.deployment)?;
    Ok((found, plan))
}
