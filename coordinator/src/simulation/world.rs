//! Everything outside of the coordinators: what happens when, who is there, what is on its way.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use strata_proto::v1;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::{
    Plant,
    checks::Checks,
    faults::Deed,
    letters::{Answer, Letter, Node, ProcessId, Request},
    network::Network,
    random::Random,
    store::Store,
    worker::{Work, Worker},
};

/// Microseconds since the world began.
pub type Time = u64;

pub const MILLISECOND: Time = 1000;
pub const SECOND: Time = 1000 * MILLISECOND;

/// Lines of the trace that a report has.
const LINES: usize = 120;

/// What is going to happen.
#[derive(Debug)]
pub enum Happening {
    Arrives {
        from: Node,
        to: Node,
        letter: Letter,
    },
    /// A stage's thread comes to an order.
    Work {
        worker: usize,
        boot: u64,
        work: Work,
    },
    /// A stage's timer.
    Beat {
        worker: usize,
        boot: u64,
        fence: v1::Fence,
    },
    /// A stage has computed a step.
    Computed {
        worker: usize,
        boot: u64,
        fence: v1::Fence,
    },
    /// Connections are looked at.
    Keepalive,
    /// The driver does something.
    Driver(Deed),
}

/// A call that was not answered yet.
struct Pending {
    by: ProcessId,
    to: Node,
    reply: oneshot::Sender<Result<Answer, Status>>,
}

/// A stream between a coordinator and a stage, at the coordinator's end.
struct Stream {
    by: ProcessId,
    worker: usize,
    said: mpsc::Sender<v1::FromStage>,
}

pub struct World {
    pub now: Time,
    pub random: Random,
    pub plant: Plant,
    pub network: Network,
    pub workers: Vec<Worker>,
    pub store: Store,
    pub checks: Checks,
    /// What the driver is to do, when it is due.
    pub due: VecDeque<Deed>,
    /// Steps that are still to be poisoned.
    pub poison: u32,
    queue: BTreeMap<(Time, u64), Happening>,
    numbers: u64,
    calls: BTreeMap<u64, Pending>,
    streams: BTreeMap<u64, Stream>,
    begun: Instant,
    trace: VecDeque<String>,
    /// Of the whole trace.
    pub hash: u64,
    pub is_loud: bool,
}

/// The world, as all who are in it have it.
pub type Shared = Arc<Mutex<World>>;

pub fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub fn new(seed: u64, plant: Plant, workers: Vec<Worker>) -> Self {
        World {
            now: 0,
            random: Random::new(seed),
            plant,
            network: Network::default(),
            workers,
            store: Store::default(),
            checks: Checks::default(),
            due: VecDeque::new(),
            poison: 0,
            queue: BTreeMap::new(),
            numbers: 0,
            calls: BTreeMap::new(),
            streams: BTreeMap::new(),
            begun: Instant::now(),
            trace: VecDeque::new(),
            hash: 0,
            is_loud: false,
        }
    }

    /// A number that nothing else has.
    pub fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// The moment as clocks of programs have it.
    pub fn instant(&self) -> Instant {
        self.begun + std::time::Duration::from_micros(self.now)
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let line = line();
        self.hash = line.bytes().fold(super::random::mix(self.hash, self.now), |hash, byte| {
            hash.wrapping_mul(0x100_0000_01b3) ^ u64::from(byte)
        });
        let line = format!("{:>10.3} ms  {line}", self.now as f64 / 1e3);
        if self.is_loud {
            println!("{line}");
        }
        if self.trace.len() == LINES {
            self.trace.pop_front();
        }
        self.trace.push_back(line);
    }

    /// The last lines of the trace.
    pub fn report(&self) -> String {
        self.trace.iter().map(|line| format!("{line}\n")).collect()
    }

    pub fn schedule(&mut self, at: Time, happening: Happening) {
        let number = self.number();
        self.queue.insert((at.max(self.now), number), happening);
    }

    /// Everything that happens until then.
    pub fn run_until(&mut self, end: Time) {
        while let Some(entry) = self.queue.first_entry() {
            let (at, _) = *entry.key();
            if at > end {
                break;
            }
            self.now = at;
            match entry.remove() {
                Happening::Arrives { from, to, letter } => self.deliver(from, to, letter),
                Happening::Work { worker, boot, work } => self.work(worker, boot, work),
                Happening::Beat { worker, boot, fence } => self.beat(worker, boot, fence),
                Happening::Computed { worker, boot, fence } => self.computed(worker, boot, fence),
                Happening::Keepalive => self.keep_alive(),
                Happening::Driver(deed) => self.due.push_back(deed),
            }
            if !self.due.is_empty() {
                return;
            }
        }
        self.now = end;
    }

    /// Sends a letter now.
    pub fn send(&mut self, from: Node, to: Node, letter: Letter) {
        self.send_at(self.now, from, to, letter);
    }

    /// Sends a letter; what one node sends another comes in order, and not while the way is cut.
    pub fn send_at(&mut self, at: Time, from: Node, to: Node, letter: Letter) {
        if let Some((arrival, letter)) = self.network.send(at, from, to, letter, &mut self.random) {
            self.schedule(arrival, Happening::Arrives { from, to, letter });
        }
    }

    /// Lets a way be open again; what was sent meanwhile comes now.
    pub fn heal(&mut self, from: Node, to: Node) {
        for letter in self.network.heal(from, to) {
            self.send(from, to, letter);
        }
    }

    fn deliver(&mut self, from: Node, to: Node, letter: Letter) {
        match (to, letter) {
            (Node::Worker(worker), letter) => self.receive(worker, from, letter),
            (Node::Store, Letter::Call { id, by, request: Request::Stand { followed, is_heard } }) => {
                let answer = self.stand(by, followed, is_heard);
                self.send(Node::Store, from, Letter::Answer { id, answer });
            }
            (_, Letter::Answer { id, answer }) => {
                if let Some(pending) = self.calls.remove(&id) {
                    // Nobody has to wait for it.
                    let _ = pending.reply.send(answer);
                }
            }
            (_, Letter::Said { stream, said }) => {
                let Some(open) = self.streams.get(&stream) else { return };
                if open.said.try_send(said).is_err() {
                    self.streams.remove(&stream);
                    self.send(to, from, Letter::Close { stream });
                }
            }
            (_, Letter::Ended { stream }) => drop(self.streams.remove(&stream)),
            (to, letter) => unreachable!("{to} does not take {letter:?}"),
        }
    }

    /// A coordinator calls.
    pub fn call(
        &mut self,
        at: Time,
        by: ProcessId,
        to: Node,
        request: Request,
    ) -> oneshot::Receiver<Result<Answer, Status>> {
        let (id, (reply, answer)) = (self.number(), oneshot::channel());
        self.calls.insert(id, Pending { by, to, reply });
        self.send_at(at, by.node(), to, Letter::Call { id, by, request });
        answer
    }

    /// Opens a stream of a coordinator's call.
    pub fn open(&mut self, by: ProcessId, worker: usize) -> (u64, mpsc::Receiver<v1::FromStage>) {
        let (said, from) = mpsc::channel(1 << 12);
        let stream = self.number();
        self.streams.insert(stream, Stream { by, worker, said });
        (stream, from)
    }

    /// Streams that a process has open.
    pub fn streams_of(&self, by: ProcessId) -> usize {
        self.streams.values().filter(|stream| stream.by == by && !stream.said.is_closed()).count()
    }

    /// The connection of a coordinator to somebody breaks: calls fail, streams end; of what is on its way some comes.
    pub fn disconnect(&mut self, coordinator: Node, to: Node) {
        self.note(|| format!("the connection of {coordinator} to {to} breaks"));
        let broken = self.calls.extract_if(.., |_, call| call.by.node() == coordinator && call.to == to);
        for (_, pending) in broken.collect::<Vec<_>>() {
            let _ = pending.reply.send(Err(Status::unavailable("the connection broke")));
        }
        let is_theirs =
            |stream: &Stream| stream.by.node() == coordinator && Node::Worker(stream.worker) == to;
        let ended: Vec<_> =
            self.streams.extract_if(.., |_, stream| is_theirs(stream)).map(|(id, _)| id).collect();
        self.network.lose(coordinator, to, &mut self.random);
        self.network.lose(to, coordinator, &mut self.random);
        for stream in ended {
            self.send(coordinator, to, Letter::Close { stream });
        }
    }

    /// The connections of all coordinators to somebody break.
    pub fn disconnect_all(&mut self, to: Node) {
        (0..self.network.coordinators)
            .for_each(|coordinator| self.disconnect(Node::Coordinator(coordinator), to));
    }

    /// A coordinator's process is gone. Its system may still tell others so.
    pub fn forget(&mut self, gone: ProcessId, tells: bool) {
        self.calls.retain(|_, call| call.by != gone);
        let ended = self.streams.extract_if(.., |_, stream| stream.by == gone);
        let ended: Vec<_> = ended.map(|(id, stream)| (id, stream.worker)).collect();
        for (stream, worker) in ended {
            if tells {
                self.send(gone.node(), Node::Worker(worker), Letter::Close { stream });
            }
        }
    }

    /// Connections on which nothing has come for too long break.
    fn keep_alive(&mut self) {
        for worker in 0..self.workers.len() {
            let stopped = self.workers[worker].is_paused || self.workers[worker].is_off;
            for (coordinator, to) in self.network.silent(Node::Worker(worker), stopped) {
                self.disconnect(coordinator, to);
            }
        }
        for (coordinator, to) in self.network.silent(Node::Store, self.store.is_down) {
            self.disconnect(coordinator, to);
        }
        self.schedule(self.now + SECOND, Happening::Keepalive);
    }
}
