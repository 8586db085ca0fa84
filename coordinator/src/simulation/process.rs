//! A coordinator's process: the real coordinator on a runtime of its own, whose time the driver moves.

use std::{
    cell::Cell,
    sync::{Arc, Mutex},
    time::Duration,
};

use strata_proto::{Files, Progress, StageChannel, Worker, v1};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::Instant,
};
use tonic::{Status, async_trait};

use super::{
    client::{Ledger, ask},
    elected::elected,
    letters::{Answer, Letter, Node, ProcessId, Request},
    model,
    world::{Shared, Time, World, lock},
};
use crate::{
    Coordinator, CoordinatorConfig,
    cluster::membership::{Member, Source, over},
    preflight::Check,
};

/// Orders that wait to be sent.
const QUEUE: usize = 64;

/// The time of the process that runs.
#[derive(Clone, Copy)]
struct Here {
    begun: Time,
    base: Instant,
    /// What its machine's clock said then, in microseconds since 1970.
    clock: u64,
}

thread_local! {
    static HERE: Cell<Option<Here>> = const { Cell::new(None) };
}

impl Here {
    fn passed(&self) -> u64 {
        self.base.elapsed().as_micros() as u64
    }
}

/// Whether the code that asks is part of a simulation.
pub fn is_running() -> bool {
    HERE.get().is_some()
}

/// The time of the world, as the process that runs has it.
fn now() -> Time {
    HERE.get().map_or(0, |here| here.begun + here.passed())
}

/// The clock of the process that runs.
fn clock() -> u64 {
    HERE.get().map_or(0, |here| here.clock + here.passed())
}

/// How a coordinator finds out whether it leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// Claims on workers of a list.
    Claims,
    /// An election.
    Election,
}

pub struct Process {
    pub id: ProcessId,
    pub is_paused: bool,
    coordinator: Coordinator,
    /// Why it did not start.
    failed: Arc<Mutex<Option<String>>>,
    here: Here,
    runtime: Option<Runtime>,
}

impl Process {
    /// Starts a process at a moment, where its machine's clock says so much.
    pub fn start(id: ProcessId, world: &Shared, by: By, workers: usize, begun: Time, clock: u64) -> Self {
        let built = Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = built.expect("a runtime");
        let failed = Arc::default();
        let base = runtime.block_on(async { Instant::now() });
        let (here, coordinator) = (Here { begun, base, clock }, Coordinator::new(config(workers)));
        let process = Process { id, is_paused: false, coordinator, failed, here, runtime: Some(runtime) };
        let member = |rank| {
            let worker = Arc::new(Caller { world: world.clone(), by: id, to: Node::Worker(rank) });
            Member { name: format!("w{rank}"), worker, rank, host: format!("host-{rank}") }
        };
        let members = (0..workers).map(member).collect();
        let (coordinator, failed) = (process.coordinator.clone(), process.failed.clone());
        let store = Caller { world: world.clone(), by: id, to: Node::Store };
        process.on(async move {
            let source: Source = match by {
                By::Claims => over(members, format!("c{}", id.coordinator), self::clock).0,
                By::Election => elected(members, store),
            };
            tokio::spawn(async move {
                if let Err(error) = coordinator.start(source, Arc::new(|_| {})).await {
                    *lock(&failed) = Some(error.to_string());
                }
            });
        });
        process
    }

    /// Runs something short in it.
    fn on<T>(&self, run: impl Future<Output = T>) -> T {
        HERE.set(Some(self.here));
        let done = self.runtime.as_ref().expect("it runs").block_on(run);
        HERE.set(None);
        done
    }

    /// Lets it run until a moment.
    pub fn run_until(&self, end: Time) {
        let due = self.here.base + Duration::from_micros(end - self.here.begun);
        self.on(async { tokio::time::sleep_until(due).await });
    }

    /// Lets it go on after a pause, at a moment: all at once its time is later.
    pub fn resume(&mut self, at: Time) {
        if std::mem::take(&mut self.is_paused) {
            let due = self.here.base + Duration::from_micros(at - self.here.begun);
            self.on(async { tokio::time::advance(due.saturating_duration_since(Instant::now())).await });
        }
    }

    /// Sets the clock of its machine.
    pub fn set_clock(&mut self, by: i64) {
        self.here.clock = self.here.clock.saturating_add_signed(by);
    }

    /// Hands a client's request to it.
    pub fn ask(&self, ledger: &Arc<Mutex<Ledger>>, client: usize) {
        let (session, ledger) = (self.coordinator.session().over(client as u64), ledger.clone());
        self.on(async { drop(tokio::spawn(ask(session, ledger, client))) });
    }

    /// Why it has ended, if it could not start.
    pub fn failed(&self) -> Option<String> {
        lock(&self.failed).clone()
    }

    pub fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// Tasks that it has.
    pub fn tasks(&self) -> usize {
        self.runtime.as_ref().map_or(0, |runtime| runtime.metrics().num_alive_tasks())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Everything in it goes at once.
        HERE.set(Some(self.here));
        drop(self.runtime.take());
        HERE.set(None);
    }
}

fn config(workers: usize) -> CoordinatorConfig {
    let mut config = CoordinatorConfig::new(model::MODEL, workers);
    config.deployment.kv_tokens = Some(model::CACHE);
    config.deployment.max_step_tokens = model::STEP_TOKENS;
    config.deployment.max_step_rows = model::STEP_ROWS;
    config.limits.prefill_chunk = model::STEP_TOKENS;
    config.join_timeout = Duration::from_secs(30);
    config.skip_checks = Check::ALL.into_iter().filter(|check| check.can_be_skipped()).collect();
    config
}

/// The calls of a process on a node.
pub struct Caller {
    world: Shared,
    by: ProcessId,
    to: Node,
}

impl Caller {
    pub async fn ask(&self, request: Request) -> Result<Answer, Status> {
        let answer = lock(&self.world).call(now(), self.by, self.to, request);
        answer.await.unwrap_or_else(|_| Err(Status::unavailable("the connection broke")))
    }
}

fn nonsense(answer: &Answer) -> Status {
    Status::internal(format!("another answer was expected than {answer:?}"))
}

#[async_trait]
impl Worker for Caller {
    async fn describe(&self, request: v1::DescribeRequest) -> Result<v1::Described, Status> {
        match self.ask(Request::Describe(request)).await? {
            Answer::Described(described) => Ok(*described),
            other => Err(nonsense(&other)),
        }
    }

    async fn read_tokenizer(&self, _: v1::ReadTokenizerRequest) -> Result<Files, Status> {
        match self.ask(Request::ReadTokenizer).await? {
            Answer::Files(files) => Ok(files),
            other => Err(nonsense(&other)),
        }
    }

    async fn load(&self, request: v1::LoadRequest) -> Result<Progress, Status> {
        let Answer::Loaded(loaded) = self.ask(Request::Load(request)).await? else {
            return Err(Status::internal("it has loaded nothing"));
        };
        let (progress, receiver) = mpsc::channel(1);
        progress.try_send(Ok(loaded)).map_err(|_| Status::internal("a full queue"))?;
        Ok(receiver)
    }

    async fn prepare(&self, request: v1::PrepareRequest) -> Result<v1::Prepared, Status> {
        match self.ask(Request::Prepare(request)).await? {
            Answer::Prepared(prepared) => Ok(prepared),
            other => Err(nonsense(&other)),
        }
    }

    async fn connect(&self, request: v1::ConnectRequest) -> Result<(), Status> {
        self.ask(Request::Connect(request)).await.map(drop)
    }

    async fn run(&self, open: v1::Open) -> Result<StageChannel, Status> {
        let every = Duration::from_millis(open.heartbeat_timeout_ms.into()) / 4;
        let Answer::Running { stream, said } = self.ask(Request::Run(open)).await? else {
            return Err(Status::internal("it does not run"));
        };
        let (to, mut orders) = mpsc::channel::<v1::ToStage>(QUEUE);
        let (world, by, node) = (self.world.clone(), self.by, self.to);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(every);
            let heartbeat = v1::to_stage::Message::Heartbeat(v1::Heartbeat {});
            loop {
                let order = tokio::select! {
                    biased;
                    order = orders.recv() => order,
                    _ = ticks.tick() => Some(v1::ToStage { message: Some(heartbeat.clone()) }),
                };
                let last = order.is_none();
                let letter = order.map_or(Letter::Close { stream }, |order| Letter::Order { stream, order });
                lock(&world).send_at(now(), by.node(), node, letter);
                if last {
                    return;
                }
            }
        });
        Ok(StageChannel { to, from: said })
    }

    async fn abort(&self, request: v1::AbortRequest) -> Result<(), Status> {
        self.ask(Request::Abort(request)).await.map(drop)
    }
}

/// A report of a process, for a trace.
pub fn told(world: &mut World, process: &Process) {
    let (id, snapshot) = (process.id, process.coordinator.watch().borrow().clone());
    world.note(|| format!("{id} is {:?}: {}", snapshot.state, snapshot.reason()));
}
