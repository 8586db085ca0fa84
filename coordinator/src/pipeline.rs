//! One incarnation of a pipeline: planning over members, bringing stages up, passing steps and answers.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::future::try_join_all;
use strata_proto::{
    BLOCK_TOKENS, DType, Device, Files, LinkKind, ModelProfile, Plan, Replica, StagePlan,
    error::{Classify, Kind},
    v1::{self, Fence, from_stage, to_stage},
};
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::{
    membership::Member,
    planner::{self, Offer, PlanError, Problem, Split},
};

/// Longest wait for a stage to answer a call other than Load.
const CALL_PATIENCE: Duration = Duration::from_secs(30);
/// Longest wait for Prepare, which touches every page of the cache: minutes on a machine with much memory.
const PREPARE_PATIENCE: Duration = Duration::from_secs(600);
/// How long an aborted stage has to acknowledge.
const ABORT_PATIENCE: Duration = Duration::from_secs(1);
/// Stages report their health twice a second; after this much silence one counts as lost.
const SILENCE: Duration = Duration::from_secs(3);
/// Longest time a stage may spend on one step.
const STEP_PATIENCE: Duration = Duration::from_secs(120);

/// What is to be served, and how.
#[derive(Debug, Clone)]
pub struct Deployment {
    /// Model name.
    pub model: String,
    /// How layers are split.
    pub split: Split,
    /// Format; `None` is the checkpoint's.
    pub dtype: Option<DType>,
    /// Size of the cache, in tokens; `None` is 16 contexts, or what fits.
    pub kv_tokens: Option<u64>,
    /// Size of the cache in full contexts, where `kv_tokens` is not set.
    pub max_sequences: Option<u32>,
    /// Longest sequence, if shorter than the model's context.
    pub context: Option<u32>,
    /// Forced link kind.
    pub links: Option<LinkKind>,
    /// Most tokens in one step.
    pub max_step_tokens: u32,
    /// Most rows with an output in one step.
    pub max_step_rows: u32,
}

impl Deployment {
    /// The longest sequence that is served.
    pub fn context_of(&self, profile: &ModelProfile) -> u32 {
        self.context.map_or(profile.context_length, |c| c.min(profile.context_length))
    }
}

/// Why no pipeline could be brought up.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// No member has answered.
    #[error("no worker is available")]
    NoWorkers,
    /// The model does not fit, or the split makes no sense.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Workers disagree about the model.
    #[error("workers {a} and {b} hold different versions of model {model:?}; make their directories equal")]
    Fingerprints {
        /// One worker.
        a: String,
        /// Another one.
        b: String,
        /// The model.
        model: String,
    },
    /// A forced link that two stages cannot have.
    #[error(
        "stages on {from} and {to} are in different processes: they cannot be linked by loopback; use --links tcp"
    )]
    NoLink {
        /// Upstream worker.
        from: String,
        /// Downstream worker.
        to: String,
    },
    /// A worker said something that makes no sense.
    #[error("worker {worker}: {why}")]
    Nonsense {
        /// The worker.
        worker: String,
        /// What it said.
        why: String,
    },
    /// A call failed.
    #[error("worker {worker}: {doing} failed: {}", status.message())]
    Call {
        /// The worker.
        worker: String,
        /// Which call.
        doing: &'static str,
        /// Its answer.
        status: Status,
    },
}

impl Classify for PipelineError {
    fn kind(&self) -> Kind {
        match self {
            PipelineError::Plan(error) => error.kind(),
            _ => Kind::NoCapacity,
        }
    }
}

/// What the members said of themselves and of the model.
#[derive(Debug, Clone)]
pub struct Survey {
    /// The model.
    pub profile: ModelProfile,
    /// Every device, in order of members.
    pub offers: Vec<Offer>,
    /// Members by name, with their hub.
    members: HashMap<String, (Member, String)>,
}

/// Asks every member for its devices and for the model.
///
/// # Errors
/// If no member answers, one has no such model, or two disagree about it.
pub async fn survey(members: &[Member], model: &str) -> Result<Survey, PipelineError> {
    let described = members.iter().map(|member| async move {
        let request = v1::DescribeRequest { model: model.to_owned() };
        // Reading headers and sampling bytes of a large checkpoint takes its time.
        match call(&member.name, "Describe", CALL_PATIENCE, member.worker.describe(request)).await {
            Ok(described) => Ok(Some((member, described))),
            // Membership may not have noticed yet that it is gone.
            Err(PipelineError::Call { status, .. }) if absent(&status) => {
                tracing::warn!(worker = member.name, %status, "does not answer; planning without it");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    });
    let mut profile: Option<(String, ModelProfile)> = None;
    let mut offers = Vec::new();
    let mut found = HashMap::new();
    for (member, described) in try_join_all(described).await?.into_iter().flatten() {
        let nonsense = |why| PipelineError::Nonsense { worker: member.name.clone(), why };
        if described.draining {
            continue;
        }
        let theirs = described.profile.ok_or_else(|| nonsense("it described no model".into()))?;
        let theirs = ModelProfile::try_from(theirs).map_err(nonsense)?;
        match &profile {
            Some((a, ours)) if ours.fingerprint != theirs.fingerprint => {
                let (a, b) = (a.clone(), member.name.clone());
                return Err(PipelineError::Fingerprints { a, b, model: model.to_owned() });
            }
            Some(_) => {}
            None => profile = Some((member.name.clone(), theirs)),
        }
        for device in described.devices {
            let device = Device::try_from(device).map_err(nonsense)?;
            offers.push(Offer { worker: member.name.clone(), device });
        }
        found.insert(member.name.clone(), (member.clone(), described.hub_id));
    }
    let (_, profile) = profile.ok_or(PipelineError::NoWorkers)?;
    Ok(Survey { profile, offers, members: found })
}

/// Whether a call failed because there was nobody to take it.
fn absent(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled)
}

impl Survey {
    /// Plans a deployment over devices that nobody needs to have; no links are chosen.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn plan_over(&self, offers: &[Offer], deployment: &Deployment) -> Result<Plan, PlanError> {
        let mut profile = self.profile.clone();
        profile.context_length = deployment.context_of(&profile);
        let contexts = deployment.max_sequences.map(|n| u64::from(n) * u64::from(profile.context_length));
        planner::solve(&Problem {
            profile: &profile,
            offers,
            split: &deployment.split,
            dtype: deployment.dtype.unwrap_or(self.profile.dtype),
            kv_tokens: deployment.kv_tokens.or(contexts),
            max_step_tokens: deployment.max_step_tokens,
            max_step_outputs: deployment.max_step_rows,
        })
    }

    /// Plans a deployment over what was found, links included.
    ///
    /// # Errors
    /// If it does not fit, or a forced link is impossible.
    pub fn plan(&self, deployment: &Deployment) -> Result<Plan, PipelineError> {
        let mut plan = self.plan_over(&self.offers, deployment)?;
        for replica in &mut plan.replicas {
            for at in 1..replica.stages.len() {
                let kind = self.link(&replica.stages[at - 1], &replica.stages[at], deployment.links)?;
                replica.stages[at - 1].link = Some(kind);
            }
        }
        Ok(plan)
    }

    /// The best link that both ends support, or the forced one.
    fn link(
        &self,
        a: &StagePlan,
        b: &StagePlan,
        forced: Option<LinkKind>,
    ) -> Result<LinkKind, PipelineError> {
        let hub = |stage: &StagePlan| self.members.get(&stage.worker).map(|(_, hub)| hub);
        match (hub(a) == hub(b), forced) {
            (_, Some(LinkKind::Tcp)) | (false, None) => Ok(LinkKind::Tcp),
            (true, _) => Ok(LinkKind::Loopback),
            (false, Some(LinkKind::Loopback)) => {
                Err(PipelineError::NoLink { from: a.worker.clone(), to: b.worker.clone() })
            }
        }
    }

    /// The tokenizer's files, from the worker of the first stage.
    ///
    /// # Errors
    /// If the worker does not answer.
    pub async fn tokenizer_files(&self, plan: &Plan) -> Result<Files, PipelineError> {
        let name = plan.replicas.first().and_then(|r| r.stages.first()).map(|s| &s.worker);
        let Some((member, _)) = name.and_then(|n| self.members.get(n)) else {
            return Err(PipelineError::NoWorkers);
        };
        let request = v1::ReadTokenizerRequest { model: self.profile.model.clone() };
        call(&member.name, "ReadTokenizer", CALL_PATIENCE, member.worker.read_tokenizer(request)).await
    }
}

/// How far a stage has loaded.
#[derive(Debug, Clone, Copy)]
pub struct LoadUpdate {
    /// Index of the stage.
    pub stage: usize,
    /// Bytes read from files so far.
    pub bytes_read: u64,
    /// Bytes to read in all.
    pub bytes_total: u64,
}

/// What a running pipeline tells its engine.
#[derive(Debug)]
pub enum PipelineEvent {
    /// The last stage committed a step.
    Result(v1::StepResult),
    /// A stage finished its part of a step.
    Done {
        /// Index of the stage.
        stage: usize,
        /// Time it computed, in microseconds.
        compute_us: u64,
    },
    /// A stage is gone; the generation is over.
    Lost {
        /// Name of its worker.
        worker: String,
        /// What happened.
        reason: String,
    },
}

/// A running pipeline. Dropping it closes the streams, which ends the generation on every stage.
#[derive(Debug)]
pub struct Pipeline {
    fence: Fence,
    replica: Replica,
    stages: Vec<mpsc::Sender<v1::ToStage>>,
    abort: AbortHandle,
}

/// Where the events of generation `.0` go.
pub type EventSink = Arc<dyn Fn(u64, PipelineEvent) + Send + Sync>;

impl Pipeline {
    /// Loads, prepares, connects and opens every stage of `replica`.
    ///
    /// # Errors
    /// The first call that fails; the stages that were up are aborted.
    pub async fn bring_up(
        survey: &Survey,
        plan: &Plan,
        fence: Fence,
        progress: Arc<dyn Fn(LoadUpdate) + Send + Sync>,
        sink: EventSink,
        deployment: &Deployment,
    ) -> Result<Pipeline, PipelineError> {
        let replica = plan.replicas.get(fence.pipeline as usize).cloned().ok_or(PipelineError::NoWorkers)?;
        let setups = setups(survey, plan, &replica, fence);
        let abort = AbortHandle {
            fence,
            stages: setups.iter().map(|s| (s.member.clone(), s.spec.device.clone())).collect(),
        };
        match open(&setups, &replica, progress, sink, deployment).await {
            Ok(stages) => Ok(Pipeline { fence, replica, stages, abort }),
            Err(error) => {
                abort.abort().await;
                Err(error)
            }
        }
    }

    /// Fence of this incarnation.
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// The replica of the plan that this runs.
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// Sends a step to every stage.
    ///
    /// # Errors
    /// The worker of a stage that cannot take it: then the generation is over.
    pub fn issue(&self, mut meta: v1::StepMeta) -> Result<(), String> {
        meta.fence = Some(self.fence);
        for (sender, stage) in self.stages.iter().zip(&self.replica.stages) {
            let order = v1::ToStage { message: Some(to_stage::Message::Step(meta.clone())) };
            // The queue is longer than any depth the scheduler uses: a full one is a stage that stopped reading.
            sender.try_send(order).map_err(|_| stage.worker.clone())?;
        }
        Ok(())
    }

    /// Ends the generation on every stage, without waiting.
    pub fn abort(self) -> AbortHandle {
        self.abort
    }
}

/// Ends a generation from outside.
#[derive(Debug, Clone)]
pub struct AbortHandle {
    fence: Fence,
    stages: Vec<(Member, String)>,
}

impl AbortHandle {
    /// Tells every stage, waiting a second at most: a stage that is silent is dead or will find its stream closed.
    pub async fn abort(&self) {
        let aborts = self.stages.iter().map(|(member, device)| async move {
            let request = v1::AbortRequest { fence: Some(self.fence), device: device.clone() };
            if !matches!(tokio::time::timeout(ABORT_PATIENCE, member.worker.abort(request)).await, Ok(Ok(())))
            {
                tracing::info!(worker = member.name, fence = %self.fence, "did not acknowledge an abort");
            }
        });
        futures::future::join_all(aborts).await;
    }
}

/// Everything needed to set one stage up.
struct Setup {
    member: Member,
    fence: Fence,
    spec: v1::StageSpec,
    plan: StagePlan,
}

fn setups(survey: &Survey, plan: &Plan, replica: &Replica, fence: Fence) -> Vec<Setup> {
    let last = replica.stages.len().saturating_sub(1);
    let setup = |(index, stage): (usize, &StagePlan)| {
        let (member, _) = survey.members.get(&stage.worker)?;
        let spec = v1::StageSpec {
            model: plan.model.clone(),
            fingerprint: survey.profile.fingerprint.clone(),
            device: stage.device.clone(),
            layers: Some(stage.layers.into()),
            embedding: index == 0,
            head: index == last,
            dtype: plan.dtype.name().to_owned(),
        };
        Some(Setup { member: member.clone(), fence, spec, plan: stage.clone() })
    };
    replica.stages.iter().enumerate().filter_map(setup).collect()
}

async fn open(
    setups: &[Setup],
    replica: &Replica,
    progress: Arc<dyn Fn(LoadUpdate) + Send + Sync>,
    sink: EventSink,
    deployment: &Deployment,
) -> Result<Vec<mpsc::Sender<v1::ToStage>>, PipelineError> {
    try_join_all(setups.iter().enumerate().map(|(index, setup)| setup.load(index, &*progress))).await?;

    // Secrets of the links, minted anew for each generation.
    let tokens: Vec<[u8; 32]> = (1..setups.len()).map(|_| mint_token()).collect();
    let blocks = u32::try_from(replica.kv_capacity_tokens / u64::from(BLOCK_TOKENS)).unwrap_or(u32::MAX);
    let prepared = setups.iter().enumerate().map(|(index, setup)| {
        let token = index.checked_sub(1).map_or(Vec::new(), |link| tokens[link].to_vec());
        setup.prepare(blocks, token, deployment)
    });
    let addresses = try_join_all(prepared).await?;

    let connected = setups.iter().enumerate().map(|(index, setup)| {
        let link = |at: usize, address: &str| {
            let kind = match setups[at].plan.link {
                Some(LinkKind::Loopback) => v1::LinkKind::Loopback,
                _ => v1::LinkKind::Tcp,
            };
            v1::Link { kind: kind as i32, token: tokens[at].to_vec().into(), address: address.to_owned() }
        };
        let upstream = index.checked_sub(1).map(|at| link(at, ""));
        let downstream = addresses.get(index + 1).map(|address| link(index, address));
        setup.connect(upstream, downstream)
    });
    try_join_all(connected).await?;
    let running = setups.iter().enumerate().map(|(index, setup)| setup.run(index, sink.clone()));
    try_join_all(running).await
}

/// 256 random bits from the operating system, by way of two UUIDs and the bits they do not fix.
fn mint_token() -> [u8; 32] {
    // A version-4 UUID has 122 random bits: two of them are a secret nobody guesses.
    let mut token = [0; 32];
    token[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    token[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    token
}

async fn call<T>(
    worker: &str,
    doing: &'static str,
    patience: Duration,
    future: impl Future<Output = Result<T, Status>>,
) -> Result<T, PipelineError> {
    let answer = match tokio::time::timeout(patience, future).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {patience:?}"))),
    };
    answer.map_err(|status| PipelineError::Call { worker: worker.to_owned(), doing, status })
}

impl Setup {
    async fn load(
        &self,
        stage: usize,
        progress: &(dyn Fn(LoadUpdate) + Send + Sync),
    ) -> Result<(), PipelineError> {
        let failed = |status| PipelineError::Call { worker: self.member.name.clone(), doing: "Load", status };
        let request = v1::LoadRequest { fence: Some(self.fence), spec: Some(self.spec.clone()) };
        let mut updates = self.member.worker.load(request).await.map_err(failed)?;
        let mut resident = None;
        while let Some(update) = updates.recv().await {
            let update = update.map_err(failed)?;
            progress(LoadUpdate { stage, bytes_read: update.bytes_read, bytes_total: update.bytes_total });
            resident = update.resident_bytes;
        }
        match resident {
            Some(bytes) if bytes == self.plan.weight_bytes => Ok(()),
            Some(bytes) => Err(self.nonsense(format!(
                "its weights take {bytes} bytes where {} were planned",
                self.plan.weight_bytes
            ))),
            None => Err(failed(Status::unavailable("the load broke off"))),
        }
    }

    /// Allocates what the plan says; returns where the stage takes activations.
    async fn prepare(
        &self,
        kv_blocks: u32,
        upstream_token: Vec<u8>,
        deployment: &Deployment,
    ) -> Result<String, PipelineError> {
        let request = v1::PrepareRequest {
            fence: Some(self.fence),
            spec: Some(self.spec.clone()),
            kv_blocks,
            block_tokens: BLOCK_TOKENS,
            max_step_tokens: deployment.max_step_tokens,
            max_step_outputs: deployment.max_step_rows,
            upstream_token: upstream_token.into(),
        };
        let prepared =
            call(&self.member.name, "Prepare", PREPARE_PATIENCE, self.member.worker.prepare(request)).await?;
        if (prepared.kv_bytes, prepared.workspace_bytes) != (self.plan.kv_bytes, self.plan.workspace_bytes) {
            return Err(self.nonsense(format!(
                "it allocated {} + {} bytes of cache and workspace where {} + {} were planned",
                prepared.kv_bytes, prepared.workspace_bytes, self.plan.kv_bytes, self.plan.workspace_bytes
            )));
        }
        Ok(reachable(&prepared.link_address, &self.member.host))
    }

    async fn connect(
        &self,
        upstream: Option<v1::Link>,
        downstream: Option<v1::Link>,
    ) -> Result<(), PipelineError> {
        let device = self.spec.device.clone();
        let request = v1::ConnectRequest { fence: Some(self.fence), device, upstream, downstream };
        call(&self.member.name, "Connect", CALL_PATIENCE, self.member.worker.connect(request)).await
    }

    /// Opens the stream of steps and forwards what the stage says to `sink`.
    async fn run(&self, stage: usize, sink: EventSink) -> Result<mpsc::Sender<v1::ToStage>, PipelineError> {
        let open = v1::Open { fence: Some(self.fence), device: self.spec.device.clone() };
        let channel = call(&self.member.name, "Run", CALL_PATIENCE, self.member.worker.run(open)).await?;
        let mut from = channel.from;
        match tokio::time::timeout(CALL_PATIENCE, from.recv()).await {
            Ok(Some(v1::FromStage {
                message: Some(from_stage::Message::Opened(v1::Opened { next_step: 0 })),
            })) => {}
            Ok(Some(v1::FromStage { message: Some(from_stage::Message::Fatal(why)) })) => {
                return Err(self.nonsense(why));
            }
            _ => return Err(self.nonsense("the run did not open".into())),
        }
        let generation = self.fence.generation;
        let worker = self.member.name.clone();
        tokio::spawn(async move {
            let reason = forward(stage, generation, &mut from, &sink).await;
            sink(generation, PipelineEvent::Lost { worker, reason });
        });
        Ok(channel.to)
    }

    fn nonsense(&self, why: String) -> PipelineError {
        PipelineError::Nonsense { worker: self.member.name.clone(), why }
    }
}

/// Forwards a stage's messages until it is lost; says why.
async fn forward(
    stage: usize,
    generation: u64,
    from: &mut mpsc::Receiver<v1::FromStage>,
    sink: &EventSink,
) -> String {
    loop {
        let message = match tokio::time::timeout(SILENCE, from.recv()).await {
            Ok(Some(message)) => message.message,
            Ok(None) => return "its stream ended".into(),
            Err(_) => return format!("it was silent for {SILENCE:?}"),
        };
        match message {
            Some(from_stage::Message::Result(result)) => sink(generation, PipelineEvent::Result(result)),
            Some(from_stage::Message::Done(done)) => {
                sink(generation, PipelineEvent::Done { stage, compute_us: done.compute_us });
            }
            Some(from_stage::Message::Health(health)) => {
                let busy = Duration::from_millis(health.busy_ms);
                if health.phase() == v1::StagePhase::Step && busy > STEP_PATIENCE {
                    return format!("it has been in one step for {busy:?}");
                }
            }
            Some(from_stage::Message::Fatal(why)) => return why,
            Some(from_stage::Message::Opened(_)) | None => return "it sent a message out of order".into(),
        }
    }
}

/// The address of a stage as its neighbour reaches it.
fn reachable(address: &str, host: &str) -> String {
    match address.parse::<std::net::SocketAddr>() {
        Ok(socket) if socket.ip().is_unspecified() => format!("{host}:{}", socket.port()),
        _ => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unspecified_hosts_become_the_workers_own() {
        assert_eq!(reachable("0.0.0.0:71", "10.0.0.2"), "10.0.0.2:71");
        assert_eq!(reachable("127.0.0.1:71", "10.0.0.2"), "127.0.0.1:71");
        assert_eq!(reachable("[::]:71", "node-3"), "node-3:71");
    }

    #[test]
    fn tokens_differ() {
        assert_ne!(mint_token(), mint_token());
    }
}
