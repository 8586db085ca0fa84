//! One incarnation of a pipeline: bringing stages up, passing steps and answers.

#[cfg(test)]
mod tests;
mod watch;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::try_join_all;
use strata_proto::{
    BLOCK_TOKENS, LINK_TOKEN_BYTES, LinkKind, NCCL_ID_BYTES, Plan, Quantization, Replica, StagePlan,
    StateBytes, WeightDigests,
    v1::{self, Fence, from_stage, to_stage},
};
use tokio::sync::mpsc;
use tonic::Status;

use self::watch::Watch;
use super::{
    blame::SilentLinks,
    call::{CALL_TIMEOUT, call},
    discovery::Discovery,
    error::PipelineError,
    membership::Member,
    weights::WeightRecord,
};
use crate::config::Deployment;

/// Longest wait for Prepare, which touches every page of the cache: minutes on a machine with much memory.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(600);
/// How long an aborted stage has to acknowledge.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long one has whose worker counts as lost: it frees its memory at once, if it is there after all.
const ABORT_LOST_TIMEOUT: Duration = Duration::from_millis(250);
/// What earlier pipelines have shown, whatever their plans and whoever led.
#[derive(Debug, Default)]
pub struct History {
    /// What the weights of the model are, as far as it is known.
    pub weights: Mutex<WeightRecord>,
    /// Links that were silent since a pipeline last came up.
    pub silent_links: SilentLinks,
}

/// How far a stage has loaded.
#[derive(Debug, Clone, Copy)]
pub struct LoadUpdate {
    /// Which pipeline.
    pub pipeline: u32,
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
        /// The step.
        step: u64,
        /// Time it computed.
        compute: Duration,
    },
    /// A stage still runs, but its worker is about to end.
    Leaving {
        /// Name of the worker.
        worker: String,
    },
    /// A stage runs no more; the incarnation is over.
    Lost {
        /// Name of its worker.
        worker: String,
        /// What became of it, to be read behind the name.
        reason: String,
        /// Nothing should be planned over the worker for a while.
        leave_out: bool,
    },
}

/// A running pipeline. Dropping it closes the streams, which ends the incarnation on every stage.
#[derive(Debug)]
pub struct Pipeline {
    fence: Fence,
    replica: Replica,
    stages: Vec<mpsc::Sender<v1::ToStage>>,
    abort: AbortHandle,
}

/// Where the events of incarnation `.0` go.
pub type EventSink = Arc<dyn Fn(u64, PipelineEvent) + Send + Sync>;

impl Pipeline {
    /// Loads, prepares, connects and opens every stage of the plan's first replica. What a stage has read must be what
    /// `history` says of the model's weights, which learns what it did not know.
    ///
    /// # Errors
    /// The first call that fails, or weights that differ; the stages that were up are aborted.
    pub async fn bring_up(
        found: &Discovery,
        plan: &Plan,
        fence: Fence,
        progress: Arc<dyn Fn(LoadUpdate) + Send + Sync>,
        sink: EventSink,
        deployment: &Deployment,
        history: &History,
    ) -> Result<Pipeline, PipelineError> {
        let max_step_rows = deployment.step_rows(&found.profile);
        let deployment = &Deployment { max_step_rows, ..deployment.clone() };
        let replica = plan.replicas.first().cloned().ok_or(PipelineError::NoWorkers)?;
        let setups = setups(found, plan, &replica, fence);
        let abort = AbortHandle {
            fence,
            stages: setups.iter().map(|s| (s.member.clone(), s.spec.device.clone())).collect(),
        };
        let workers = setups.iter().map(|setup| setup.member.name.clone());
        let watch = Watch::new(workers, deployment.heartbeat_timeout, history.silent_links.clone());
        let opened = async {
            let loads = setups.iter().enumerate();
            let loads = loads.map(|(index, setup)| setup.load(index, &*progress, &history.weights));
            try_join_all(loads).await?;
            let root = history.weights.lock().unwrap_or_else(PoisonError::into_inner).root();
            if let (Some(expected), Some(root)) = (&deployment.weights, root)
                && *expected != root.to_string()
            {
                return Err(PipelineError::Model(format!(
                    "the weights of {:?} have the digest {root} where {expected} is deployed; copy the model again, or \
                     deploy this one",
                    plan.model
                )));
            }
            open(&setups, &replica, Running { watch, sink }, deployment).await
        };
        match opened.await {
            Ok(stages) => {
                history.silent_links.forget();
                Ok(Pipeline { fence, replica, stages, abort })
            }
            Err(error) => {
                abort.abort(error.worker()).await;
                Err(error)
            }
        }
    }

    /// Makes weights resident for the stages of a plan's first replica that are `chosen`, and does no more: what runs goes
    /// on, as long as it is on other devices.
    ///
    /// # Errors
    /// The first load that fails, or weights that differ.
    pub async fn preload(
        (found, plan): (&Discovery, &Plan),
        fence: Fence,
        chosen: impl Fn(&StagePlan) -> bool,
        progress: &(dyn Fn(LoadUpdate) + Send + Sync),
        history: &History,
    ) -> Result<(), PipelineError> {
        let replica = plan.replicas.first().ok_or(PipelineError::NoWorkers)?;
        let setups = setups(found, plan, replica, fence);
        let loads = setups.iter().enumerate().filter(|(_, setup)| chosen(&setup.plan));
        let loads = loads.map(|(index, setup)| setup.load(index, progress, &history.weights));
        try_join_all(loads).await.map(drop)
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
    /// The worker of a stage that cannot take it: then the incarnation is over.
    pub fn issue(&self, mut meta: v1::StepMeta) -> Result<(), String> {
        meta.fence = Some(self.fence);
        for (sender, stage) in self.stages.iter().zip(&self.replica.stages) {
            let order = v1::ToStage { message: Some(to_stage::Message::Step(meta.clone())) };
            // The queue is longer than any depth the scheduler uses: a full one is a stage that stopped reading.
            sender.try_send(order).map_err(|_| stage.worker.clone())?;
        }
        Ok(())
    }

    /// Ends the incarnation on every stage, without waiting.
    pub fn abort(self) -> AbortHandle {
        self.abort
    }
}

/// Ends an incarnation from outside.
#[derive(Debug, Clone)]
pub struct AbortHandle {
    fence: Fence,
    stages: Vec<(Member, String)>,
}

impl AbortHandle {
    /// Tells every stage, and waits a second at most: a stage that is silent is dead or will find its stream closed.
    /// The worker that was `lost` is likely to be silent, and has less time.
    pub async fn abort(&self, lost: Option<&str>) {
        let aborts = self.stages.iter().map(|(member, device)| async move {
            let request = v1::AbortRequest { fence: Some(self.fence), device: device.clone() };
            let timeout = if lost == Some(&member.name) { ABORT_LOST_TIMEOUT } else { ABORT_TIMEOUT };
            if !matches!(tokio::time::timeout(timeout, member.worker.abort(request)).await, Ok(Ok(()))) {
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
    ignore_tensors: Vec<String>,
    plan: StagePlan,
}

fn setups(found: &Discovery, plan: &Plan, replica: &Replica, fence: Fence) -> Vec<Setup> {
    let last = replica.stages.len().saturating_sub(1);
    let setup = |(index, stage): (usize, &StagePlan)| {
        let (member, _) = found.members.get(&stage.worker)?;
        let spec = v1::StageSpec {
            model: plan.model.clone(),
            fingerprint: found.profile.fingerprint.clone(),
            device: stage.device.clone(),
            layers: Some(stage.layers.into()),
            embedding: index == 0,
            head: index == last,
            dtype: plan.dtype.name().to_owned(),
            quantization: Quantization::to_wire(plan.quantization),
            mapped: stage.mapped,
        };
        let ignore_tensors = found.ignore_tensors.clone();
        Some(Setup { member: member.clone(), fence, spec, ignore_tensors, plan: stage.clone() })
    };
    replica.stages.iter().enumerate().filter_map(setup).collect()
}

/// Where what happens on running stages goes.
struct Running {
    watch: Arc<Watch>,
    sink: EventSink,
}

/// Prepares, connects and runs stages whose weights are loaded.
async fn open(
    setups: &[Setup],
    replica: &Replica,
    running: Running,
    deployment: &Deployment,
) -> Result<Vec<mpsc::Sender<v1::ToStage>>, PipelineError> {
    // Secrets of the links, minted anew for each incarnation.
    let tokens: Vec<[u8; LINK_TOKEN_BYTES]> = (1..setups.len()).map(|_| mint_token()).collect();
    let blocks = u32::try_from(replica.kv_capacity_tokens / u64::from(BLOCK_TOKENS)).unwrap_or(u32::MAX);
    let prepared = setups.iter().enumerate().map(|(index, setup)| {
        let token = index.checked_sub(1).map_or(Vec::new(), |link| tokens[link].to_vec());
        setup.prepare(blocks, replica.state_slots, token, deployment)
    });
    let prepared = try_join_all(prepared).await?;

    let connected = setups.iter().enumerate().map(|(index, setup)| {
        let link = |at: usize, address: &str| v1::Link {
            kind: v1::LinkKind::from(setups[at].link().unwrap_or(LinkKind::Tcp)).into(),
            token: tokens[at].to_vec().into(),
            address: address.to_owned(),
            nccl_id: prepared[at].nccl_id.clone(),
        };
        let upstream = index.checked_sub(1).map(|at| link(at, ""));
        let downstream = prepared.get(index + 1).map(|next| link(index, &next.link_address));
        setup.connect(upstream, downstream)
    });
    // All at once: neither end of a link is up before the other.
    running.watch.connected(connected).await?;
    let runs = setups.iter().enumerate().map(|(index, setup)| setup.run(index, &running, deployment));
    try_join_all(runs).await
}

/// A secret of 244 random bits, by way of two UUIDs.
fn mint_token() -> [u8; LINK_TOKEN_BYTES] {
    let mut token = [0; LINK_TOKEN_BYTES];
    token[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    token[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    token
}

impl Setup {
    /// How activations travel to the next stage; none on the last.
    fn link(&self) -> Option<LinkKind> {
        self.plan.link.as_ref().map(|link| link.kind)
    }

    async fn load(
        &self,
        stage: usize,
        progress: &(dyn Fn(LoadUpdate) + Send + Sync),
        weights: &Mutex<WeightRecord>,
    ) -> Result<(), PipelineError> {
        let lock = || weights.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |status| PipelineError::Call { worker: self.member.name.clone(), doing: "Load", status };
        let request = v1::LoadRequest {
            fence: Some(self.fence),
            spec: Some(self.spec.clone()),
            reread: lock().has_refused(&self.member.name),
            ignore_tensors: self.ignore_tensors.clone(),
        };
        let mut updates = self.member.worker.load(request).await.map_err(failed)?;
        let mut last = v1::LoadProgress::default();
        while let Some(update) = updates.recv().await {
            let update = update.map_err(failed)?;
            let pipeline = self.fence.pipeline;
            progress(LoadUpdate {
                pipeline,
                stage,
                bytes_read: update.bytes_read,
                bytes_total: update.bytes_total,
            });
            last = update;
        }
        match last.resident_bytes {
            Some(bytes) if bytes == self.plan.weight_bytes => {}
            Some(bytes) => {
                let planned = self.plan.weight_bytes;
                return Err(
                    self.nonsense(format!("its weights take {bytes} bytes where {planned} were planned"))
                );
            }
            None => return Err(failed(Status::unavailable("the load broke off"))),
        }
        let v1::StageSpec { fingerprint, embedding, head, .. } = &self.spec;
        let layers = self.plan.layers;
        let digests = WeightDigests::of_stage(last.digests, layers, *embedding, *head);
        let digests = digests.map_err(|why| self.nonsense(why))?;
        let worker = &self.member.name;
        let checked = lock().check(fingerprint, worker, digests.modules(layers.first));
        checked.map_err(|difference| PipelineError::Weights { worker: worker.clone(), difference })
    }

    /// Allocates what the plan says; returns where the stage takes activations, and the id of its NCCL link if it has
    /// one downstream.
    async fn prepare(
        &self,
        kv_blocks: u32,
        state_slots: u32,
        upstream_token: Vec<u8>,
        deployment: &Deployment,
    ) -> Result<v1::Prepared, PipelineError> {
        let mint_nccl_id = self.link() == Some(LinkKind::Nccl);
        let request = v1::PrepareRequest {
            fence: Some(self.fence),
            spec: Some(self.spec.clone()),
            kv_blocks,
            block_tokens: BLOCK_TOKENS,
            max_step_tokens: deployment.max_step_tokens,
            max_step_rows: deployment.max_step_rows,
            upstream_token: upstream_token.into(),
            mint_nccl_id,
            state_slots,
            heartbeat_timeout_ms: deployment.heartbeat_timeout_ms(),
        };
        let mut prepared =
            call(&self.member.name, "Prepare", PREPARE_TIMEOUT, self.member.worker.prepare(request)).await?;
        let states = StateBytes::from(prepared.states.unwrap_or_default());
        if (states, prepared.workspace_bytes) != (self.plan.states, self.plan.workspace_bytes) {
            let StateBytes { paged_kv, recurrent, cross_kv } = states;
            return Err(self.nonsense(format!(
                "it allocated {paged_kv} + {recurrent} + {cross_kv} bytes of paged, recurrent and cross states and {} of \
                 workspace where {} + {} + {} and {} were planned",
                prepared.workspace_bytes,
                self.plan.states.paged_kv,
                self.plan.states.recurrent,
                self.plan.states.cross_kv,
                self.plan.workspace_bytes
            )));
        }
        let expected = if mint_nccl_id { NCCL_ID_BYTES } else { 0 };
        if prepared.nccl_id.len() != expected {
            let got = prepared.nccl_id.len();
            return Err(self.nonsense(format!("its NCCL id has {got} bytes where {expected} were expected")));
        }
        prepared.link_address = reachable(&prepared.link_address, &self.member.host);
        Ok(prepared)
    }

    async fn connect(
        &self,
        upstream: Option<v1::Link>,
        downstream: Option<v1::Link>,
    ) -> Result<(), PipelineError> {
        let device = self.spec.device.clone();
        let request = v1::ConnectRequest { fence: Some(self.fence), device, upstream, downstream };
        call(&self.member.name, "Connect", CALL_TIMEOUT, self.member.worker.connect(request)).await
    }

    /// Opens the stream of steps and forwards what the stage says.
    async fn run(
        &self,
        stage: usize,
        running: &Running,
        deployment: &Deployment,
    ) -> Result<mpsc::Sender<v1::ToStage>, PipelineError> {
        let heartbeat_timeout_ms = deployment.heartbeat_timeout_ms();
        let open =
            v1::Open { fence: Some(self.fence), device: self.spec.device.clone(), heartbeat_timeout_ms };
        let channel = call(&self.member.name, "Run", CALL_TIMEOUT, self.member.worker.run(open)).await?;
        let mut from = channel.from;
        match tokio::time::timeout(CALL_TIMEOUT, from.recv()).await {
            Ok(Some(v1::FromStage {
                message: Some(from_stage::Message::Opened(v1::Opened { next_step: 0 })),
            })) => {}
            Ok(Some(v1::FromStage { message: Some(from_stage::Message::Fatal(why)) })) => {
                return Err(self.nonsense(why));
            }
            _ => return Err(self.nonsense("the run did not open".into())),
        }
        let (watch, sink) = (running.watch.clone(), running.sink.clone());
        tokio::spawn(watch.follow(stage, self.fence.incarnation, from, sink));
        Ok(channel.to)
    }

    fn nonsense(&self, why: String) -> PipelineError {
        PipelineError::Nonsense { worker: self.member.name.clone(), why }
    }
}

/// The address of a stage as its neighbour reaches it.
fn reachable(address: &str, host: &str) -> String {
    match address.parse::<std::net::SocketAddr>() {
        Ok(socket) if socket.ip().is_unspecified() => format!("{host}:{}", socket.port()),
        _ => address.to_owned(),
    }
}
