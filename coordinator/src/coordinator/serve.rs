//! From what was found to an engine that was checked: plan, tokenizer, pipelines, and what the model says to two inputs.

use std::sync::Arc;

use futures::StreamExt;
use strata_proto::{
    ModelProfile,
    v1::{self, Task, generate_event::Event},
};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Coordinator, StartError, plan_of};
use crate::{
    cluster::{
        History,
        discovery::{Discovery, Planned},
        membership::MemberEvent,
    },
    config::Deployment,
    engine::{self, Ended, Engine, EngineError, Notice, Observer, Snapshot, State},
    front::session::{Served, Session, SessionError},
    preflight::{self, Check, Finding},
    request::{Limit, Tokenizer, blocking},
};

/// Alternatives that the output check compares.
const PROBE_LOGPROBS: u32 = 20;

/// A deployment that was planned, and whose tokenizer is the model's.
pub(super) struct Ready {
    deployment: Deployment,
    planned: Planned,
    /// With the context that is served.
    profile: Arc<ModelProfile>,
    tokenizer: Arc<Tokenizer>,
    findings: Vec<Finding>,
    longest: Limit,
}

impl Ready {
    /// What it was planned over.
    pub fn found(&self) -> &Discovery {
        &self.planned.found
    }
}

/// An engine that was spawned, and what there will be to ask.
pub(super) struct Spawned {
    pub engine: engine::Running,
    pub served: Arc<Served>,
    /// Resolves when nobody asks it any more.
    pub unused: oneshot::Receiver<()>,
    ready: Ready,
}

impl Coordinator {
    /// Brings up what was planned, where everybody sees it; returns once requests are answered.
    pub(super) async fn serve(
        &self,
        term: u64,
        ready: Ready,
        observer: &Observer,
    ) -> Result<(engine::Running, oneshot::Receiver<()>), StartError> {
        self.show(State::Starting, "loading");
        let mut spawned = self.spawn(term, ready, self.shared.snapshot.clone(), self.history(), observer);
        self.shared.session.open(spawned.served.clone());
        spawned.up().await?;
        self.show(State::Starting, "checking the model's output");
        self.check(&mut spawned, observer).await?;
        self.show(State::Serving, "");
        Ok((spawned.engine, spawned.unused))
    }

    /// Plans a deployment and checks its tokenizer.
    pub(super) async fn ready(
        &self,
        found: Discovery,
        deployment: &Deployment,
        observer: &Observer,
    ) -> Result<Ready, StartError> {
        let skip = &self.shared.config.skip_checks;
        let found = Arc::new(found);
        let plan = plan_of(&found, deployment)?;
        let files = found.tokenizer_files(&plan).await?;
        let mut profile = found.profile.clone();
        let longest = Limit::of_context(profile.context_length, deployment.context);
        profile.context_length = deployment.context_of(&profile);
        let profile = Arc::new(profile);
        let (checked, skipped) = (profile.clone(), skip.clone());
        let inspected = blocking(move || preflight::inspect(&files, &checked, &skipped));
        let (tokenizer, mut findings) = inspected.await.map_err(|_| StartError::Engine)?;
        let tokenizer = match tokenizer {
            Some(tokenizer) if !findings.iter().any(Finding::refuses) => Arc::new(tokenizer),
            _ => {
                if found.members.len() > 1 {
                    let first = plan.replicas.first().and_then(|replica| replica.stages.first());
                    let whose =
                        first.map_or_else(String::new, |s| format!(" (the files are worker {}'s)", s.worker));
                    findings.iter_mut().filter(|f| f.refuses()).for_each(|f| f.detail += &whose);
                }
                observer(Notice::Checked(findings.clone()));
                return Err(StartError::Preflight(findings));
            }
        };
        let planned = Planned { found, plan: plan.into() };
        Ok(Ready { deployment: deployment.clone(), planned, profile, tokenizer, findings, longest })
    }

    /// Starts an engine for it, which shows itself by `snapshot`.
    pub(super) fn spawn(
        &self,
        term: u64,
        ready: Ready,
        snapshot: watch::Sender<Snapshot>,
        history: Arc<History>,
        observer: &Observer,
    ) -> Spawned {
        let config = &self.shared.config;
        let events = self.members().subscribe();
        let counters = engine::counters(&snapshot.borrow().load);
        let names: Arc<[String]> = match config.names.is_empty() {
            true => [ready.deployment.model.clone()].into(),
            false => config.names.as_slice().into(),
        };
        let engine = Engine::spawn(engine::Start {
            deployment: ready.deployment.clone(),
            limits: config.limits.clone(),
            profile: ready.profile.clone(),
            tokenizer: ready.tokenizer.clone(),
            observer: observer.clone(),
            members: self.members().clone(),
            term,
            snapshot,
            planned: ready.planned.clone(),
            history,
            counters,
            claims: self.shared.claims.clone(),
            incarnations: self.shared.incarnations.clone(),
            series: self.shared.series.clone(),
            name: names.first().cloned().unwrap_or_default(),
        });
        tokio::spawn(pass_on(events, engine.handle().clone()));
        let (in_use, unused) = oneshot::channel();
        let served = Served {
            profile: ready.profile.clone(),
            tokenizer: ready.tokenizer.clone(),
            engine: engine.handle().clone(),
            longest: ready.longest,
            longest_input: ready.longest.within_step(ready.deployment.max_step_tokens),
            is_cache_chosen: ready.deployment.kv_tokens.is_some(),
            names,
            _in_use: in_use,
        };
        Spawned { engine, served: Arc::new(served), unused, ready }
    }

    /// Asks the model two things before anybody else does.
    pub(super) async fn check(&self, spawned: &mut Spawned, observer: &Observer) -> Result<(), StartError> {
        let session = self.shared.session.probing(spawned.served.clone());
        let output = probe(&session, &spawned.ready.profile).await;
        let findings = &mut spawned.ready.findings;
        findings.push(Finding::new(Check::Output, output, &self.shared.config.skip_checks));
        observer(Notice::Checked(findings.clone()));
        match findings.iter().any(Finding::refuses) {
            true => Err(StartError::Preflight(findings.clone())),
            false => Ok(()),
        }
    }
}

impl Spawned {
    /// Waits until a pipeline is up.
    pub async fn up(&mut self) -> Result<(), StartError> {
        match self.engine.up().await {
            Some(up) => Ok(up?),
            None => Err(match self.engine.ended().await {
                Some(Ended::Deposed(why)) => StartError::Outbid(why),
                _ => StartError::Engine,
            }),
        }
    }
}

/// Tells the engine about members, until that is gone.
async fn pass_on(
    mut events: mpsc::UnboundedReceiver<MemberEvent>,
    engine: mpsc::UnboundedSender<engine::Event>,
) {
    while let Some(event) = events.recv().await {
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
        Task::ClassifyTokens | Task::Answer => session.tell_tokens(ids).await,
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
