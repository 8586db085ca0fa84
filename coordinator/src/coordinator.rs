//! Starting a coordinator: members, plan, tokenizer, engine, first pipeline.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use strata_proto::{
    ModelProfile, Plan,
    v1::{self, Task, generate_event::Event},
};
use tokio::sync::mpsc;

use crate::{
    cluster::{
        PipelineError,
        discovery::{Discovery, discover},
        membership::{self, Member, MemberEvent},
    },
    config::{CoordinatorConfig, Deployment},
    engine::{self, Engine, EngineError, EngineHandle, Notice, Observer},
    front::session::{Served, Session, SessionError},
    preflight::{self, Check, Finding},
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
    pub(crate) session: Session,
    pub(crate) engine: EngineHandle,
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
                if handle.send(engine::Event::Member(event)).is_err() {
                    break;
                }
            }
        });
        up.await.map_err(|_| StartError::Engine)??;
        let longest_input = profile.context_length.min(config.deployment.max_step_tokens);
        let names = match config.names.is_empty() {
            true => vec![config.deployment.model.clone()],
            false => config.names,
        };
        let served =
            Served { names, profile: profile.clone(), tokenizer, engine: engine.clone(), longest_input };
        let coordinator = Coordinator {
            session: Session::new(served, config.limits.max_requests),
            version: config.version,
            deployment: config.deployment,
            engine,
            members: shared,
        };
        let output = probe(&coordinator.session.probing(), &profile).await;
        findings.push(Finding::new(Check::Output, output, &config.skip_checks));
        observer(Notice::Checked(findings.clone()));
        if findings.iter().any(Finding::refuses) {
            return Err(StartError::Preflight(findings));
        }
        Ok(coordinator)
    }

    /// The way to ask the model.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The engine, for whoever wants to watch it.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
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
