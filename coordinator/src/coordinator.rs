//! Starting a coordinator: members, plan, tokenizer, engine, first pipeline.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use strata_proto::{
    ModelProfile, Plan,
    v1::{Task, generate_event},
};
use tokio::sync::mpsc;

use crate::{
    cluster::{
        PipelineError,
        discovery::{Discovery, discover},
        membership::{self, Member, MemberEvent},
    },
    config::{CoordinatorConfig, Deployment},
    engine::{Asked, Engine, EngineError, EngineHandle, Event, Notice, Observer, Reply, Submission},
    preflight::{self, Check, Finding},
    request::{Gate, Tokenizer, encode::CheckedInput, generate::Checked},
    scheduler::Encode,
};

/// Alternatives that the output check compares.
const PROBE_LOGPROBS: u32 = 20;

/// Why a coordinator did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Some workers did not come.
    #[error("{joined} of {expected} workers answered within {patience:?}; start the others, or list fewer")]
    Members {
        /// How many came.
        joined: usize,
        /// How many were listed.
        expected: usize,
        /// How long they had.
        patience: Duration,
    },
    /// No pipeline.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A check before serving failed.
    #[error("preflight: {}", refusals(.0))]
    Preflight(Vec<Finding>),
    /// The engine ended before it began.
    #[error("the engine ended unexpectedly")]
    Engine,
}

fn refusals(findings: &[Finding]) -> String {
    let one = |f: &Finding| format!("{}: {}", f.check, f.detail);
    let all: Vec<_> = findings.iter().filter(|f| f.refuses()).map(one).collect();
    format!("{} (a check can be ignored with --skip-check NAME)", all.join("; "))
}

/// A serving coordinator, without its ports.
#[derive(Clone)]
pub struct Coordinator {
    pub(crate) deployment: Deployment,
    pub(crate) profile: Arc<ModelProfile>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) engine: EngineHandle,
    pub(crate) gate: Gate,
    pub(crate) version: String,
    /// Members as the engine was last told.
    pub(crate) members: Arc<std::sync::Mutex<Vec<Member>>>,
}

/// Waits for the expected workers and asks them for their devices and the model; loads nothing.
///
/// # Errors
/// If workers stay away, or the model cannot be described.
pub async fn discover_members(
    config: &CoordinatorConfig,
    members: &mut mpsc::UnboundedReceiver<MemberEvent>,
    observer: &Observer,
) -> Result<Discovery, StartError> {
    let members = gather(config, members, observer).await?;
    Ok(discover(&members, &config.deployment.model).await?)
}

/// Waits for the expected workers, asks them, and plans, without loading anything.
///
/// # Errors
/// As for [`Coordinator::start`].
pub async fn preview(
    config: &CoordinatorConfig,
    members: &mut mpsc::UnboundedReceiver<MemberEvent>,
    observer: &Observer,
) -> Result<(Discovery, Plan), StartError> {
    let found = discover_members(config, members, observer).await?;
    let plan = found.plan(&config.deployment)?;
    Ok((found, plan))
}

impl Coordinator {
    /// Waits for the expected workers, plans, loads, and returns once requests can be answered.
    ///
    /// # Errors
    /// If workers stay away, the model does not fit, or the tokenizer is not the model's.
    pub async fn start(
        config: CoordinatorConfig,
        mut events: mpsc::UnboundedReceiver<MemberEvent>,
        observer: Observer,
    ) -> Result<Self, StartError> {
        let members = gather(&config, &mut events, &observer).await?;
        let found = discover(&members, &config.deployment.model).await?;
        // Planned here only to fail early and to learn whom to ask for the tokenizer; the engine plans anew.
        let plan = found.plan(&config.deployment)?;
        let files = found.tokenizer_files(&plan).await?;
        let mut profile = found.profile.clone();
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

        let shared = Arc::new(std::sync::Mutex::new(members.clone()));
        let (engine, up) = Engine::spawn(
            config.deployment.clone(),
            config.limits.clone(),
            (profile.clone(), tokenizer.clone()),
            observer.clone(),
            members,
        );
        let (handle, known) = (engine.events.clone(), shared.clone());
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                membership::note(
                    &mut known.lock().unwrap_or_else(std::sync::PoisonError::into_inner),
                    &event,
                );
                if handle.send(Event::Member(event)).is_err() {
                    break;
                }
            }
        });
        up.await.map_err(|_| StartError::Engine)??;
        let coordinator = Coordinator {
            gate: Gate::new(config.limits.max_requests),
            version: config.version,
            deployment: config.deployment,
            profile,
            tokenizer,
            engine,
            members: shared,
        };
        let output = coordinator.probe().await;
        findings.push(Finding::new(Check::Output, output, &config.skip_checks));
        observer(Notice::Checked(findings.clone()));
        if findings.iter().any(Finding::refuses) {
            return Err(StartError::Preflight(findings));
        }
        Ok(coordinator)
    }

    /// Asks the model about two inputs: what it says must be finite and differ.
    async fn probe(&self) -> Result<String, String> {
        let last = self.profile.vocab_size - 1;
        let (a, b) = (self.probe_one(vec![0]).await?, self.probe_one(vec![last]).await?);
        if !a.iter().chain(&b).all(|x| x.is_finite()) {
            return Err("the model's output is not finite: its weights are damaged".into());
        }
        if a == b {
            return Err("two different inputs give the same output: the weights are not the model's".into());
        }
        Ok("finite, and different for different inputs".into())
    }

    /// What the model makes of a prompt: log-probabilities, a vector, or the logits of classes.
    async fn probe_one(&self, prompt: Vec<u32>) -> Result<Vec<f32>, String> {
        let encode = |masked| {
            let encode = Encode { segments: Vec::new(), masked, candidates: PROBE_LOGPROBS };
            Asked::Encode(CheckedInput { ids: prompt.clone(), encode, dropped: 0 }, None)
        };
        let request = match self.profile.task {
            Task::Classify | Task::Embed => encode(Vec::new()),
            Task::FillMask => encode(vec![0]),
            Task::Generate | Task::Unspecified => Asked::Generate(Box::new(Checked {
                prompt: prompt.clone(),
                max_tokens: 1,
                sampling: strata_proto::v1::Sampling::default(),
                seed: 0,
                stop: Vec::new(),
                eos: Vec::new(),
                logprobs: Some(PROBE_LOGPROBS),
                deadline: None,
                tenant: "".into(),
            })),
        };
        let permit = self.gate.enter().map_err(|e| e.to_string())?;
        let (reply, mut replies) = mpsc::unbounded_channel();
        let submission = Submission { request, arrived: Instant::now(), reply, permit };
        let gone = || "the engine ended".to_owned();
        self.engine.events.send(Event::Submit(Box::new(submission))).map_err(|_| gone())?;
        loop {
            match replies.recv().await.ok_or_else(gone)? {
                Reply::Event(generate_event::Event::Tokens(tokens)) => {
                    let scores = tokens.logprobs.into_iter().flat_map(|l| l.top).map(|t| t.logprob);
                    return Ok(scores.collect());
                }
                Reply::Vector(values) => return Ok(values),
                Reply::Guesses(masks) => {
                    return Ok(masks.into_iter().flatten().map(|t| t.logprob).collect());
                }
                Reply::Failed(EngineError::Poisoned) => {
                    return Err("the forward pass fails or gives logits that are not finite: the weights are damaged, \
                                or this dtype cannot hold them; try --dtype f32"
                        .into());
                }
                Reply::Failed(error) => return Err(error.to_string()),
                Reply::Accepted(_) | Reply::Event(_) => {}
            }
        }
    }

    /// Most tokens of an input that is computed in one step.
    pub(crate) fn longest_input(&self) -> u32 {
        self.profile.context_length.min(self.deployment.max_step_tokens)
    }

    /// Whether the model has a template for chats.
    pub fn has_chat_template(&self) -> bool {
        self.tokenizer.has_chat_template()
    }

    /// The engine, for whoever wants to watch it.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }
}

/// Waits until the expected number of workers is there.
async fn gather(
    config: &CoordinatorConfig,
    events: &mut mpsc::UnboundedReceiver<MemberEvent>,
    observer: &Observer,
) -> Result<Vec<Member>, StartError> {
    let expected = config.expected_members;
    let mut members = Vec::new();
    let all_joined = async {
        while members.len() < expected {
            let event = match events.try_recv() {
                Ok(event) => Some(event),
                Err(_) => {
                    observer(Notice::Waiting(members.len(), expected));
                    events.recv().await
                }
            };
            match event {
                Some(event) => membership::note(&mut members, &event),
                None => break,
            }
        }
    };
    // A timeout is told by the count below.
    let _ = tokio::time::timeout(config.join_patience, all_joined).await;
    if members.len() < expected {
        return Err(StartError::Members { joined: members.len(), expected, patience: config.join_patience });
    }
    Ok(members)
}
