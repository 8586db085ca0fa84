//! The stage thread: owns the weights, cache, workspace and links of one device, and runs steps in order.

use std::{
    collections::HashMap,
    ops::ControlFlow,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc as std_mpsc,
    },
    thread,
    time::Duration,
};

use strata_proto::{
    LayerRange, Quantization, Side,
    v1::{self, Fence, StagePhase, from_stage, to_stage},
};
use tokio::sync::{
    Notify,
    mpsc::{self, error::TrySendError},
    oneshot, watch,
};
use tonic::Status;

use crate::{
    device::{Compute, DeviceSpec, Directories, Held},
    engine::{self, Allocated, Engine, Size},
    error::WorkerError,
    health::{Neighbours, Progress, Report, health},
    incarnation::{Incarnation, RunEnd, StepHook},
    interrupt::Interrupt,
    meter::{Meter, Seen},
    model::{LoadedBytes, Model, ModelError, RangeSpec, bytes},
    transport::{self, End, Link, loopback::Hub, tcp::Pending},
    verify::{self, Verifier},
};

/// Steps the coordinator may queue on a stage.
const STEP_QUEUE: usize = 64;
/// Messages a stage may be ahead of the coordinator.
const ANSWER_QUEUE: usize = 1024;
/// Reports of its health that a running stage sends in the time after which it would be missed.
const HEARTBEATS: u32 = 4;

/// Orders to the stage thread. Replies that nobody waits for are dropped.
enum Command {
    Load { load: Load, progress: mpsc::Sender<Result<v1::LoadProgress, Status>> },
    Prepare { request: Box<Prepare>, reply: oneshot::Sender<Result<v1::Prepared, WorkerError>> },
    Connect { request: Box<Connect>, reply: oneshot::Sender<Result<(), WorkerError>> },
    Run { fence: Fence, steps: mpsc::Receiver<v1::ToStage>, answers: mpsc::Sender<v1::FromStage> },
    Release { reply: oneshot::Sender<()> },
}

/// Weights to make resident.
pub(crate) struct Load {
    pub spec: v1::StageSpec,
    /// Where the model is.
    pub directory: PathBuf,
    /// Patterns of names of tensors that may be there without a use.
    pub ignored: Vec<String>,
    /// Even if they are resident.
    pub reread: bool,
}

/// Validated form of a `PrepareRequest`.
pub(crate) struct Prepare {
    pub fence: Fence,
    pub spec: v1::StageSpec,
    pub kv_blocks: u32,
    pub max_step_tokens: u32,
    pub max_step_rows: u32,
    pub budget: u64,
    pub pending: Option<Pending>,
    /// Silence after which a neighbour counts as lost.
    pub heartbeat_timeout: Duration,
}

/// Links to bring up.
pub(crate) struct Connect {
    pub fence: Fence,
    pub upstream: Option<Link>,
    pub downstream: Option<Link>,
    /// Where links inside this process meet.
    pub hub: Arc<Hub>,
}

/// What others may see of a stage thread while it works.
#[derive(Default)]
struct Shared {
    progress: Arc<Progress>,
    meter: Arc<Meter>,
    /// Bytes of the weights, and whether they are memory-mapped.
    weights: Mutex<(u64, bool)>,
    /// Cache and workspace bytes of the live incarnation.
    allocated: AtomicU64,
    /// Whether there is an incarnation.
    occupied: watch::Sender<bool>,
    /// Told when weights may be due to be verified.
    tick: Arc<Notify>,
    current: Mutex<Option<Current>>,
    /// Weights of all stages of the worker.
    resident: Resident,
}

/// The incarnation that was last asked for.
#[derive(Clone)]
struct Current {
    fence: Fence,
    interrupt: Interrupt,
    neighbours: Neighbours,
    heartbeat_timeout: Duration,
}

impl Shared {
    /// The incarnation that was last asked for, if it is this one.
    fn current(&self, fence: &Fence) -> Option<Current> {
        lock(&self.current).clone().filter(|current| current.fence == *fence)
    }
}

/// The weights that a worker holds, which whoever lists its workers is told of.
pub(crate) type Resident = Arc<watch::Sender<Vec<v1::StageSpec>>>;

/// Handle of the thread that serves one device.
pub(crate) struct StageThread {
    commands: std_mpsc::Sender<Command>,
    shared: Arc<Shared>,
    /// Whether it verifies its weights while it runs.
    verifies: bool,
}

impl StageThread {
    /// Starts the thread of a device.
    ///
    /// # Errors
    /// If there can be no thread, or the device cannot be used.
    pub fn spawn(
        device: &DeviceSpec,
        compute: Compute,
        hook: Option<StepHook>,
        directories: Directories,
        resident: Resident,
        verify_every: Option<Duration>,
    ) -> Result<Self, WorkerError> {
        let (commands, orders) = std_mpsc::channel();
        let (report, started) = std_mpsc::channel();
        let shared = Arc::new(Shared { resident, ..Shared::default() });
        let cores = compute.take_cores();
        let (device, theirs) = (device.clone(), shared.clone());
        let name = format!("strata-{}", device.id);
        let run = move || {
            cores.first().copied().map(core_affinity::set_for_current);
            // What belongs to a device is made where it is used.
            let engine = match engine::on(&device, compute.cpu_on(&cores), directories.kernels) {
                Ok(engine) => engine,
                Err(error) => return report.send(Err(error)).unwrap_or(()),
            };
            let _ = report.send(Ok(()));
            let mut stage = Stage {
                shared: theirs,
                ordinal: device.ordinal(),
                engine,
                hook,
                spill: directories.spill,
                verify_every,
                verifier: None,
                spec: None,
                bytes_read: 0,
                incarnation: None,
            };
            while let Ok(command) = orders.recv() {
                stage.obey(command);
            }
        };
        let io = |source| WorkerError::Io { path: "starting a stage thread".into(), source };
        thread::Builder::new().name(name).spawn(run).map_err(io)?;
        started.recv().unwrap_or_else(|_| Err(gone()))?;
        Ok(StageThread { commands, shared, verifies: verify_every.is_some() })
    }

    /// What this stage holds now.
    pub fn held(&self) -> Held {
        let (weights, mapped) = *lock(&self.shared.weights);
        let allocated = self.shared.allocated.load(Ordering::Relaxed);
        match mapped {
            true => Held { memory: allocated, mapped: weights },
            false => Held { memory: allocated + weights, mapped: 0 },
        }
    }

    /// It, as operators see it.
    pub fn seen<'a>(&self, id: &'a str) -> Seen<'a> {
        Seen {
            id,
            meter: self.shared.meter.clone(),
            is_occupied: self.is_occupied(),
            weights: lock(&self.shared.weights).0,
            allocated: self.shared.allocated.load(Ordering::Relaxed),
            step_since: self.shared.progress.in_step(),
        }
    }

    /// Ends the running incarnation if `newer` supersedes it.
    pub fn supersede(&self, newer: &Fence) {
        let current = lock(&self.shared.current);
        if let Some(current) = &*current
            && current.fence != *newer
            && !newer.is_stale(&current.fence)
        {
            current.interrupt.trip();
        }
    }

    pub fn load(&self, load: Load) -> strata_proto::Progress {
        let (progress, receiver) = mpsc::channel(16);
        self.order(Command::Load { load, progress });
        receiver
    }

    pub async fn prepare(&self, request: Prepare) -> Result<v1::Prepared, WorkerError> {
        let (reply, done) = oneshot::channel();
        *lock(&self.shared.current) = Some(Current {
            fence: request.fence,
            interrupt: Interrupt::default(),
            neighbours: Neighbours::default(),
            heartbeat_timeout: request.heartbeat_timeout,
        });
        self.order(Command::Prepare { request: Box::new(request), reply });
        done.await.unwrap_or_else(|_| Err(gone()))
    }

    pub async fn connect(&self, request: Connect) -> Result<(), WorkerError> {
        let (reply, done) = oneshot::channel();
        self.order(Command::Connect { request: Box::new(request), reply });
        done.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Whether there is an incarnation.
    pub fn is_occupied(&self) -> bool {
        *self.shared.occupied.borrow()
    }

    /// Returns when there is no incarnation.
    pub async fn vacant(&self) {
        // The sender lives in `self`, so the wait cannot fail.
        let _ = self.shared.occupied.subscribe().wait_for(|occupied| !occupied).await;
    }

    /// Starts the run loop; what goes wrong arrives as `fatal` on the channel, and health says when the worker is
    /// `draining`.
    pub fn run(
        &self,
        fence: Fence,
        draining: watch::Receiver<bool>,
    ) -> Result<strata_proto::StageChannel, WorkerError> {
        let current = self.shared.current(&fence).ok_or_else(|| not_prepared(&fence))?;
        let (to, steps) = mpsc::channel(STEP_QUEUE);
        let (answers, from) = mpsc::channel(ANSWER_QUEUE);
        let report = Report {
            progress: self.shared.progress.clone(),
            neighbours: current.neighbours,
            draining,
            every: current.heartbeat_timeout / HEARTBEATS,
        };
        if self.verifies {
            tokio::spawn(verify::tick(self.shared.tick.clone(), current.interrupt.clone()));
        }
        tokio::spawn(report.repeat(current.interrupt, answers.clone()));
        self.order(Command::Run { fence, steps, answers });
        Ok(strata_proto::StageChannel { to, from })
    }

    /// Ends the incarnation `fence` if it is the current one, and waits until its memory is free.
    pub async fn abort(&self, fence: &Fence) {
        let Some(current) = self.shared.current(fence) else { return };
        current.interrupt.trip();
        let (reply, done) = oneshot::channel();
        self.order(Command::Release { reply });
        let _ = done.await;
    }

    fn order(&self, command: Command) {
        // A thread that is gone drops the reply channel, which its caller notices.
        let _ = self.commands.send(command);
    }
}

fn gone() -> WorkerError {
    WorkerError::Internal("the stage thread ended".into())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn message(message: from_stage::Message) -> v1::FromStage {
    v1::FromStage { message: Some(message) }
}

/// State of the stage thread.
struct Stage {
    shared: Arc<Shared>,
    /// The device's number.
    ordinal: usize,
    engine: Box<dyn Engine>,
    hook: Option<StepHook>,
    /// Directory of weights that stay memory-mapped.
    spill: Option<PathBuf>,
    /// How often weights are verified, if they are.
    verify_every: Option<Duration>,
    verifier: Option<Verifier>,
    /// What the engine's weights were loaded as.
    spec: Option<v1::StageSpec>,
    /// What the last load read from files.
    bytes_read: u64,
    incarnation: Option<Incarnation>,
}

impl Stage {
    fn obey(&mut self, command: Command) {
        match command {
            Command::Load { load, progress } => {
                self.shared.progress.enter(StagePhase::Loading);
                if let Err(error) = self.load(load, &progress) {
                    let _ = progress.blocking_send(Err(error.into()));
                }
                self.shared.progress.enter(StagePhase::Idle);
            }
            Command::Prepare { request, reply } => {
                let _ = reply.send(self.prepare(*request));
            }
            Command::Connect { request, reply } => {
                let _ = reply.send(self.connect(*request));
            }
            Command::Run { fence, steps, answers } => {
                self.run(fence, steps, &answers);
                self.drop_incarnation();
            }
            Command::Release { reply } => {
                if self.incarnation.as_ref().is_some_and(|g| g.interrupt.is_tripped()) {
                    self.drop_incarnation();
                }
                let _ = reply.send(());
            }
        }
    }

    fn drop_weights(&mut self) {
        if let Some(spec) = self.spec.take() {
            self.shared.resident.send_modify(|all| all.retain(|other| other.device != spec.device));
        }
        self.engine.unload();
        self.verifier = None;
        *lock(&self.shared.weights) = (0, false);
    }

    fn drop_incarnation(&mut self) {
        if let Some(incarnation) = self.incarnation.take() {
            // Also ends the health reports and a neighbour's wait on our sockets.
            incarnation.interrupt.trip();
        }
        self.engine.release();
        self.shared.allocated.store(0, Ordering::Relaxed);
        self.shared.occupied.send_replace(false);
    }

    fn load(
        &mut self,
        Load { spec, directory, ignored, reread }: Load,
        progress: &mpsc::Sender<Result<v1::LoadProgress, Status>>,
    ) -> Result<(), WorkerError> {
        // A new range means a new incarnation: the old one's cache would only be in the way.
        self.drop_incarnation();
        if reread || self.spec.as_ref() != Some(&spec) {
            self.drop_weights();
            let (checkpoint, model) = Model::open_dir_ignoring(&directory, &ignored)?;
            if checkpoint.fingerprint() != spec.fingerprint {
                return Err(WorkerError::WrongState(format!(
                    "model {:?} changed on disk since it was described; restart the coordinator to plan anew",
                    spec.model
                )));
            }
            if let Some(method) = checkpoint.quantized_by() {
                let to = if spec.quantization.is_empty() { &spec.dtype } else { &spec.quantization };
                tracing::info!(
                    "weights that {method} has quantized become {to}: what {to} does not have is rounded"
                );
            }
            let mut report = |done: LoadedBytes| {
                self.bytes_read = done.total;
                let update = v1::LoadProgress {
                    bytes_read: done.read,
                    bytes_total: done.total,
                    ..v1::LoadProgress::default()
                };
                // Progress is for show: a slow reader must not slow the load. One that is gone ends it.
                match progress.try_send(Ok(update)) {
                    Err(TrySendError::Closed(_)) => ControlFlow::Break(()),
                    _ => ControlFlow::Continue(()),
                }
            };
            let spill = match (spec.mapped, self.spill.as_deref()) {
                (true, None) => {
                    let why = "weights cannot stay memory-mapped here: this worker has no --spill-dir";
                    return Err(WorkerError::WrongState(why.into()));
                }
                (mapped, directory) => directory.filter(|_| mapped),
            };
            self.engine.load(spill, &checkpoint, &model, &range_spec(&spec)?, &mut report)?;
            let verifier = self.verify_every.map(|every| Verifier::new(&mut *self.engine, every));
            self.verifier = verifier.transpose()?;
            let bytes = self.engine.loaded().map_or(0, |loaded| loaded.bytes);
            *lock(&self.shared.weights) = (bytes, spec.mapped);
            self.shared.resident.send_modify(|all| all.push(spec.clone()));
            self.spec = Some(spec);
        }
        if let Some(loaded) = self.engine.loaded() {
            let done = v1::LoadProgress {
                bytes_read: self.bytes_read,
                bytes_total: self.bytes_read,
                resident_bytes: Some(loaded.bytes),
                digests: Some(loaded.digests.into()),
            };
            let _ = progress.blocking_send(Ok(done));
        }
        Ok(())
    }

    fn prepare(&mut self, request: Prepare) -> Result<v1::Prepared, WorkerError> {
        self.drop_incarnation();
        let current = self.shared.current(&request.fence).ok_or(WorkerError::Aborted)?;
        let loaded = match self.engine.loaded() {
            Some(loaded) if self.spec.as_ref() == Some(&request.spec) => loaded,
            _ => return Err(ModelError::NotLoaded.into()),
        };
        let (tokens, outputs) = (request.max_step_tokens, request.max_step_rows);
        let size = Size { kv_blocks: request.kv_blocks, tokens, outputs };
        let state = bytes::of_state(loaded.model, loaded.spec, request.kv_blocks, tokens, outputs);
        // Weights that stay memory-mapped have their room on a disk.
        let resident = if request.spec.mapped { 0 } else { loaded.bytes };
        let (needed, dtype) = (resident + state, loaded.spec.dtype);
        if needed > request.budget {
            return Err(WorkerError::OverBudget {
                device: request.spec.device,
                budget: request.budget,
                needed,
            });
        }
        let Allocated { kv_bytes, workspace_bytes } = self.engine.prepare(size)?;
        let prepared = v1::Prepared {
            states: Some(v1::StateBytes { paged_kv: kv_bytes, ..v1::StateBytes::default() }),
            workspace_bytes,
            link_address: String::new(),
            nccl_id: Vec::new().into(),
        };
        self.shared.allocated.store(kv_bytes + workspace_bytes, Ordering::Relaxed);
        self.incarnation = Some(Incarnation {
            fence: request.fence,
            interrupt: current.interrupt,
            neighbours: current.neighbours,
            meter: self.shared.meter.clone(),
            progress: self.shared.progress.clone(),
            heartbeat_timeout: request.heartbeat_timeout,
            dtype,
            max_step_tokens: request.max_step_tokens as usize,
            pending: request.pending,
            upstream: None,
            downstream: None,
            sequences: HashMap::new(),
        });
        self.shared.occupied.send_replace(true);
        Ok(prepared)
    }

    fn connect(&mut self, request: Connect) -> Result<(), WorkerError> {
        let loaded = self.engine.loaded().ok_or_else(|| WorkerError::from(ModelError::NotLoaded))?;
        let incarnation = current(&mut self.incarnation, &request.fence)?;
        let longest = loaded.model.tower.activation(incarnation.max_step_tokens, incarnation.dtype);
        let ordinal = self.ordinal;
        let end = |pending| End {
            fence: incarnation.fence,
            interrupt: incarnation.interrupt.clone(),
            hub: request.hub.clone(),
            pending,
            ordinal,
            longest: longest.clone(),
            neighbours: incarnation.neighbours.clone(),
            timeout: incarnation.heartbeat_timeout,
        };
        let missed = |side| move |error| WorkerError::Neighbour { side, error };
        // Down first: the next stage answers the hello without waiting for its own neighbours.
        if let Some(link) = request.downstream {
            let opened = transport::open(link.kind)?.downstream(link, end(None));
            incarnation.downstream = Some(opened.map_err(missed(Side::Downstream))?);
        }
        if let Some(link) = request.upstream {
            let pending = incarnation.pending.take();
            let opened = transport::open(link.kind)?.upstream(link, end(pending));
            incarnation.upstream = Some(opened.map_err(missed(Side::Upstream))?);
        }
        Ok(())
    }

    fn run(
        &mut self,
        fence: Fence,
        mut steps: mpsc::Receiver<v1::ToStage>,
        answers: &mpsc::Sender<v1::FromStage>,
    ) {
        let end = self.run_steps(&fence, &mut steps, answers);
        self.shared.progress.enter(StagePhase::Idle);
        if let Err(RunEnd::Broken(error)) = end {
            tracing::warn!(%fence, %error, "the run of a stage broke");
            if let Some(current) = self.shared.current(&fence) {
                // A stage that only lost its neighbour is not to be taken for one that failed.
                let last = health(&self.shared.progress, &current.neighbours, false);
                let _ = answers.blocking_send(last);
            }
            let _ = answers.blocking_send(message(from_stage::Message::Fatal(error.to_string())));
            if matches!(error, WorkerError::Changed { .. }) {
                self.drop_incarnation();
                self.drop_weights();
            }
        }
    }

    /// Runs steps until the stream ends; never returns `Ok`.
    fn run_steps(
        &mut self,
        fence: &Fence,
        steps: &mut mpsc::Receiver<v1::ToStage>,
        answers: &mpsc::Sender<v1::FromStage>,
    ) -> Result<(), RunEnd> {
        let shared = self.shared.clone();
        let engine = &mut *self.engine;
        let verifier = &mut self.verifier;
        let mut verify = |engine: &mut dyn Engine, most| match verifier {
            Some(verifier) => verifier.catch_up(engine, most),
            None => Ok(()),
        };
        let incarnation = current(&mut self.incarnation, fence)?;
        let interrupt = incarnation.interrupt.clone();
        let answer = |m| match interrupt.block_on(answers.send(message(m))) {
            Some(Ok(())) => Ok(()),
            _ => Err(RunEnd::Quiet),
        };
        shared.progress.restart();
        answer(from_stage::Message::Opened(v1::Opened { next_step: 0 }))?;
        for due in 0.. {
            let order = loop {
                let next = async {
                    tokio::select! {
                        biased;
                        order = steps.recv() => Some(order),
                        () = shared.tick.notified() => None,
                    }
                };
                match interrupt.block_on(next) {
                    Some(Some(Some(order))) => break order,
                    Some(None) => verify(engine, verify::IDLE)?,
                    _ => return Err(RunEnd::Quiet),
                }
            };
            let Some(to_stage::Message::Step(meta)) = order.message else {
                return Err(WorkerError::BadMessage("a running stage takes steps only".into()).into());
            };
            shared.progress.enter(StagePhase::Step);
            let loaded = engine.loaded().ok_or_else(|| WorkerError::from(ModelError::NotLoaded))?;
            incarnation.accept(&meta, due, &loaded)?;
            let (result, compute) = incarnation.execute(&meta, engine, self.hook.as_ref())?;
            if let Some(result) = result {
                answer(from_stage::Message::Result(result))?;
            }
            let compute_us = compute.as_micros() as u64;
            answer(from_stage::Message::Done(v1::StepDone { step: meta.step, compute_us }))?;
            shared.progress.finished(due);
            verify(engine, verify::BUSY)?;
        }
        Ok(())
    }
}

fn current<'a>(
    incarnation: &'a mut Option<Incarnation>,
    fence: &Fence,
) -> Result<&'a mut Incarnation, WorkerError> {
    match incarnation {
        Some(g) if g.fence == *fence && !g.interrupt.is_tripped() => Ok(g),
        _ => Err(not_prepared(fence)),
    }
}

fn not_prepared(fence: &Fence) -> WorkerError {
    WorkerError::WrongState(format!("incarnation {fence} is not prepared on this device"))
}

/// The range of a stage as the model understands it.
///
/// # Errors
/// If the dtype is unknown or the range is missing.
fn range_spec(spec: &v1::StageSpec) -> Result<RangeSpec, WorkerError> {
    let layers = spec.layers.ok_or_else(|| WorkerError::BadMessage("a stage needs a layer range".into()))?;
    Ok(RangeSpec {
        layers: LayerRange::from(layers),
        embedding: spec.embedding,
        head: spec.head,
        dtype: spec.dtype.parse().map_err(WorkerError::BadMessage)?,
        quantization: Quantization::from_wire(&spec.quantization).map_err(WorkerError::BadMessage)?,
    })
}
