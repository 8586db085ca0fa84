//! Starting a coordinator: members, plan, tokenizer, engine, first pipeline.

use std::{sync::Arc, time::Duration};

use strata_proto::{ModelProfile, Plan};
use tokio::sync::mpsc;

use crate::{
    admission::Gate,
    engine::{Engine, EngineHandle, Event, Limits, Notice, Observer},
    membership::{self, Member, MemberEvent},
    pipeline::{Deployment, PipelineError, Survey, survey},
    tokenizer::{Tokenizer, TokenizerError},
};

/// Everything a coordinator needs to know.
#[derive(Debug, Clone)]
pub struct CoordinatorConfig {
    /// What is served.
    pub deployment: Deployment,
    /// Bounds on requests.
    pub limits: Limits,
    /// Workers to wait for before the first plan.
    pub expected_members: usize,
    /// How long to wait for them.
    pub join_patience: Duration,
}

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
    /// No tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The engine ended before it began.
    #[error("the engine ended unexpectedly")]
    Engine,
}

/// A serving coordinator, without its ports.
#[derive(Clone)]
pub struct Coordinator {
    pub(crate) deployment: Deployment,
    pub(crate) profile: Arc<ModelProfile>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) engine: EngineHandle,
    pub(crate) gate: Gate,
    /// Members as the engine was last told.
    pub(crate) members: Arc<std::sync::Mutex<Vec<Member>>>,
}

/// Surveys `members` and plans, without loading anything.
///
/// # Errors
/// As for [`Coordinator::start`].
pub async fn preview(
    config: &CoordinatorConfig,
    members: &mut mpsc::UnboundedReceiver<MemberEvent>,
    observer: &Observer,
) -> Result<(Survey, Plan), StartError> {
    let members = gather(config, members, observer).await?;
    let survey = survey(&members, &config.deployment.model).await?;
    let plan = survey.plan(&config.deployment)?;
    Ok((survey, plan))
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
        let found = survey(&members, &config.deployment.model).await?;
        // Planned here only to fail early and to learn whom to ask for the tokenizer; the engine plans anew.
        let plan = found.plan(&config.deployment)?;
        let files = found.tokenizer_files(&plan).await?;
        let profile = Arc::new(found.profile.clone());
        let checked = profile.clone();
        let tokenizer = tokio::task::spawn_blocking(move || Tokenizer::new(&files, &checked))
            .await
            .map_err(|_| StartError::Engine)??;
        let tokenizer = Arc::new(tokenizer);

        let shared = Arc::new(std::sync::Mutex::new(members.clone()));
        let (engine, up) = Engine::spawn(
            config.deployment.clone(),
            config.limits.clone(),
            tokenizer.clone(),
            observer,
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
        Ok(Coordinator {
            gate: Gate::new(config.limits.max_requests),
            deployment: config.deployment,
            profile,
            tokenizer,
            engine,
            members: shared,
        })
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
