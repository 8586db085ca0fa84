//! A worker: what `LocalWorker` makes of calls, by the real memory of leaders, over a simulated device.

use std::collections::VecDeque;

use strata_proto::{
    Lead, PROTOCOL, Side,
    error::Kind,
    v1::{self, Fence},
};
use tonic::Status;

use super::{
    Plant,
    faults::Deed,
    letters::{Answer, Letter, Node, ProcessId, Request, Signal},
    model,
    network::LEAST_DELAY,
    stage::{Incarnation, LinkEnd},
    world::{Happening, MILLISECOND, Time, World},
};

/// How long links have to come up.
const CONNECT_TIMEOUT: Time = 3000 * MILLISECOND;
/// How often a coordinator looks whether a connection is still one.
const PING_EVERY: Time = 1000 * MILLISECOND;

/// A process, and the thread of its only device.
pub struct Worker {
    /// Counts its starts.
    pub boot: u64,
    pub is_there: bool,
    /// Its machine is not there either.
    pub is_off: bool,
    pub is_paused: bool,
    /// What came while it was paused.
    inbox: VecDeque<(Node, Letter)>,
    /// Layers that its device has room for.
    room: u64,
    lead: Lead,
    /// Until when the thread loads.
    busy: Time,
    resident: Option<v1::StageSpec>,
    /// What was last asked for, and whether it is to run on.
    current: Option<Fence>,
    pub incarnation: Option<Incarnation>,
}

impl Worker {
    pub fn new(room: u64) -> Self {
        Worker {
            boot: 1,
            is_there: true,
            is_off: false,
            is_paused: false,
            inbox: VecDeque::new(),
            room,
            lead: Lead::default(),
            busy: 0,
            resident: None,
            current: None,
            incarnation: None,
        }
    }
}

/// What the stage's thread is told.
#[derive(Debug)]
pub enum Work {
    Load { id: u64, by: ProcessId, spec: v1::StageSpec },
    Prepare { id: u64, by: ProcessId, request: Box<v1::PrepareRequest> },
    Connect { id: u64, by: ProcessId, request: Box<v1::ConnectRequest> },
    Run { by: ProcessId, fence: Fence, stream: u64, silence: Time },
    Release { id: u64, by: ProcessId, fence: Fence },
}

fn not_prepared(fence: &Fence) -> Status {
    Status::failed_precondition(format!("incarnation {fence} is not prepared on this device"))
}

impl World {
    pub fn name(worker: usize) -> String {
        format!("w{worker}:1")
    }

    /// A letter has come to a worker's machine.
    pub fn receive(&mut self, worker: usize, from: Node, letter: Letter) {
        let Worker { is_there, is_off, is_paused, inbox, .. } = &mut self.workers[worker];
        let node = Node::Worker(worker);
        match letter {
            letter if *is_paused => inbox.push_back((from, letter)),
            _ if *is_off => {}
            // The system answers for a process that is not there.
            Letter::Call { id, .. } if !*is_there => {
                let answer = Err(Status::unavailable("connection refused"));
                self.send(node, from, Letter::Answer { id, answer });
            }
            Letter::Order { stream, .. } if !*is_there => self.send(node, from, Letter::Ended { stream }),
            Letter::Link { token, downwards, signal } if !*is_there => {
                self.refuse(worker, from, token, downwards, &signal)
            }
            _ if !*is_there => {}
            Letter::Call { id, by, request } => {
                if let Err(status) = self.take(worker, id, by, request) {
                    self.send(node, from, Letter::Answer { id, answer: Err(status) });
                }
            }
            Letter::Order { stream, order } => self.order(worker, from, stream, order),
            Letter::Close { stream } => self.closed(worker, stream),
            Letter::Link { token, downwards, signal } => {
                self.signalled(worker, from, token, downwards, signal)
            }
            Letter::Answer { .. } | Letter::Said { .. } | Letter::Ended { .. } => {}
        }
    }

    /// A call; one that is refused is answered at once.
    fn take(&mut self, worker: usize, id: u64, by: ProcessId, request: Request) -> Result<(), Status> {
        match request {
            Request::Describe(request) => {
                let now = self.instant();
                let Worker { lead, boot, room, .. } = &mut self.workers[worker];
                if let Some(claim) = request.claim {
                    lead.claim(claim, now);
                }
                let described = v1::Described {
                    protocol_min: PROTOCOL,
                    protocol_max: PROTOCOL,
                    boot_id: format!("{worker}-{boot}"),
                    hub_id: format!("hub {worker}"),
                    devices: vec![model::offered(*room).into()],
                    profile: (!request.model.is_empty()).then(|| model::described().into()),
                    draining: false,
                    lead: Some(lead.told(now)),
                    resident: Vec::new(),
                };
                self.answer(worker, by, id, Ok(Answer::Described(Box::new(described))));
            }
            Request::ReadTokenizer => self.answer(worker, by, id, Ok(Answer::Files(model::tokenizer()))),
            Request::Load(request) => {
                let spec = request.spec.unwrap_or_default();
                self.admit(worker, by, request.fence, "Load")?;
                let is_resident = self.workers[worker].resident.as_ref() == Some(&spec);
                let time = if is_resident && !request.reread { 1 } else { self.random.within(50..500) };
                self.hand_on(worker, time * MILLISECOND, Work::Load { id, by, spec });
            }
            Request::Prepare(request) => {
                let fence = self.admit(worker, by, request.fence, "Prepare")?;
                self.workers[worker].current = Some(fence);
                let request = Box::new(request);
                self.hand_on(worker, MILLISECOND, Work::Prepare { id, by, request });
            }
            Request::Connect(request) => {
                self.admit(worker, by, request.fence, "Connect")?;
                let request = Box::new(request);
                self.hand_on(worker, MILLISECOND, Work::Connect { id, by, request });
            }
            Request::Run(open) => {
                let fence = self.admit(worker, by, open.fence, "Run")?;
                if self.workers[worker].current != Some(fence) {
                    return Err(not_prepared(&fence));
                }
                let (stream, said) = self.open(by, worker);
                let silence = Time::from(open.heartbeat_timeout_ms) * MILLISECOND;
                self.hand_on(worker, 0, Work::Run { by, fence, stream, silence });
                self.answer(worker, by, id, Ok(Answer::Running { stream, said }));
            }
            Request::Abort(request) => {
                let fence = request.fence.unwrap_or_default();
                if self.workers[worker].current != Some(fence) {
                    self.answer(worker, by, id, Ok(Answer::Done));
                    return Ok(());
                }
                self.workers[worker].current = None;
                self.leave(worker, &format!("{by} aborts {fence}"));
                self.hand_on(worker, 0, Work::Release { id, by, fence });
            }
            Request::Stand { .. } => return Err(Status::unimplemented("this is a worker")),
        }
        Ok(())
    }

    fn answer(&mut self, worker: usize, by: ProcessId, id: u64, answer: Result<Answer, Status>) {
        self.send(Node::Worker(worker), by.node(), Letter::Answer { id, answer });
    }

    /// Refuses a stale fence, remembers a new one, and ends what it supersedes.
    fn admit(
        &mut self,
        worker: usize,
        by: ProcessId,
        fence: Option<Fence>,
        call: &str,
    ) -> Result<Fence, Status> {
        let fence = fence.ok_or_else(|| Status::invalid_argument("the call carries no fence"))?;
        let (now, plant) = (self.instant(), self.plant);
        let admitted = self.workers[worker].lead.admit(fence, now);
        if let Err(newest) =
            admitted.or_else(|newest| if plant == Plant::NoFence { Ok(()) } else { Err(newest) })
        {
            self.note(|| format!("w{worker} refuses {call} {fence} of {by}: it has seen {newest}"));
            return Err(strata_proto::error::status(&Stale { fence, newest }));
        }
        let boot = self.workers[worker].boot;
        self.note(|| format!("w{worker} takes {call} {fence} of {by}"));
        self.let_in(worker, boot, by, fence);
        if let Some(current) = self.workers[worker].current
            && current != fence
            && (plant == Plant::NoFence || !fence.is_stale(&current))
        {
            self.workers[worker].current = None;
            self.leave(worker, &format!("{fence} supersedes {current}"));
        }
        Ok(fence)
    }

    /// Hands something to the stage's thread, which takes so much time with it.
    fn hand_on(&mut self, worker: usize, time: Time, work: Work) {
        let now = self.now;
        let Worker { busy, boot, .. } = &mut self.workers[worker];
        *busy = now.max(*busy) + time;
        let (at, boot) = (*busy, *boot);
        self.schedule(at, Happening::Work { worker, boot, work });
    }

    /// The stage's thread does what it was told.
    pub fn work(&mut self, worker: usize, boot: u64, work: Work) {
        let Worker { is_there, is_paused, boot: now, .. } = &self.workers[worker];
        if !is_there || boot != *now {
            return;
        }
        if *is_paused {
            // It comes to it later.
            self.schedule(self.now + 20 * MILLISECOND, Happening::Work { worker, boot, work });
            return;
        }
        match work {
            Work::Load { id, by, spec } => {
                self.leave(worker, "it loads");
                let loaded = model::loaded(&spec);
                self.workers[worker].resident = Some(spec);
                self.answer(worker, by, id, Ok(Answer::Loaded(loaded)));
            }
            Work::Prepare { id, by, request } => {
                let answer = self.prepare(worker, &request);
                self.answer(worker, by, id, answer.map(Answer::Prepared));
            }
            Work::Connect { id, by, request } => {
                if let Err(status) = self.connect(worker, id, by, &request) {
                    self.answer(worker, by, id, Err(status));
                }
            }
            Work::Run { by, fence, stream, silence } => self.start(worker, by, fence, stream, silence),
            Work::Release { id, by, fence } => {
                if self.workers[worker].incarnation.as_ref().is_some_and(|i| i.fence == fence) {
                    self.leave(worker, "it is aborted");
                }
                self.answer(worker, by, id, Ok(Answer::Done));
            }
        }
    }

    fn prepare(&mut self, worker: usize, request: &v1::PrepareRequest) -> Result<v1::Prepared, Status> {
        self.leave(worker, "it is prepared anew");
        let (fence, spec) = (request.fence.unwrap_or_default(), request.spec.clone().unwrap_or_default());
        let Worker { current, resident, boot, .. } = &self.workers[worker];
        if *current != Some(fence) {
            return Err(Status::unavailable("the incarnation was ended"));
        }
        if resident.as_ref() != Some(&spec) {
            return Err(Status::failed_precondition("no weights are loaded"));
        }
        let boot = *boot;
        let incarnation = Incarnation::new(request);
        let every = incarnation.timeout / 4;
        self.workers[worker].incarnation = Some(incarnation);
        self.schedule(self.now + every, Happening::Beat { worker, boot, fence });
        Ok(model::prepared(request, World::name(worker)))
    }

    fn connect(
        &mut self,
        worker: usize,
        id: u64,
        by: ProcessId,
        request: &v1::ConnectRequest,
    ) -> Result<(), Status> {
        let (fence, until) = (request.fence.unwrap_or_default(), self.now + CONNECT_TIMEOUT);
        let now = self.now;
        let prepared = self.workers[worker].incarnation.as_mut().filter(|i| i.fence == fence);
        let incarnation = prepared.ok_or_else(|| not_prepared(&fence))?;
        incarnation.connecting = Some((id, by, until));
        incarnation.needs_upstream = request.upstream.is_some();
        let down = request.downstream.as_ref().map(|link| {
            let peer =
                link.address.trim_start_matches('w').trim_end_matches(":1").parse().unwrap_or(usize::MAX);
            let token = link.token.to_vec();
            incarnation.downstream = Some(LinkEnd::new(peer, token.clone(), false, now));
            (peer, token)
        });
        if let Some((peer, token)) = down {
            let hello = Letter::Link { token, downwards: true, signal: Signal::Hello };
            self.send(Node::Worker(worker), Node::Worker(peer), hello);
        }
        self.look_whether_connected(worker);
        Ok(())
    }

    /// Answers a call of Connect once all links are up.
    pub fn look_whether_connected(&mut self, worker: usize) {
        let Some(incarnation) = &mut self.workers[worker].incarnation else { return };
        let down = incarnation.downstream.as_ref().is_none_or(|link| link.is_up);
        let up = !incarnation.needs_upstream || incarnation.upstream.is_some();
        if let Some((id, by, _)) = incarnation.connecting.take_if(|_| up && down) {
            self.answer(worker, by, id, Ok(Answer::Done));
        }
    }

    /// Links did not come up.
    pub fn not_connected(&mut self, worker: usize, side: Side) {
        let Some(incarnation) = &mut self.workers[worker].incarnation else { return };
        if let Some((id, by, _)) = incarnation.connecting.take() {
            let mut status = Status::unavailable("no link to the neighbour");
            strata_proto::error::miss(&mut status, side);
            self.answer(worker, by, id, Err(status));
        }
        self.leave(worker, "its links do not come up");
    }

    /// The process ends without a word of its own, which its system tells others, or with its machine.
    pub fn crash(&mut self, worker: usize, tells: bool) {
        if !self.workers[worker].is_there {
            return;
        }
        self.note(|| format!("w{worker} crashes"));
        if tells {
            self.leave(worker, "its process is gone");
            let closed = Happening::Driver(Deed::Disconnect(Node::Worker(worker)));
            self.schedule(self.now + LEAST_DELAY, closed);
        }
        let Worker { boot, room, .. } = self.workers[worker];
        let mut gone = Worker::new(room);
        (gone.boot, gone.is_there, gone.is_off) = (boot, false, !tells);
        self.workers[worker] = gone;
    }

    /// Starts the process anew.
    pub fn restart(&mut self, worker: usize) {
        let Worker { boot, room, is_there, is_off, .. } = self.workers[worker];
        if !is_there {
            self.note(|| format!("w{worker} starts anew"));
            self.workers[worker] = Worker { boot: boot + 1, ..Worker::new(room) };
            if is_off {
                // The machine knows nothing of connections that it had, as the next ping shows.
                self.schedule(
                    self.now + PING_EVERY,
                    Happening::Driver(Deed::Disconnect(Node::Worker(worker))),
                );
            }
        }
    }

    /// Stops the process where it is.
    pub fn pause(&mut self, worker: usize) {
        self.workers[worker].is_paused = self.workers[worker].is_there;
        self.note(|| format!("w{worker} is stopped"));
    }

    /// Lets it go on; what came meanwhile it finds now.
    pub fn resume(&mut self, worker: usize) {
        if std::mem::take(&mut self.workers[worker].is_paused) {
            self.note(|| format!("w{worker} goes on"));
            for (from, letter) in std::mem::take(&mut self.workers[worker].inbox) {
                self.receive(worker, from, letter);
            }
        }
    }
}

/// As the worker's own error says it.
struct Stale {
    fence: Fence,
    newest: Fence,
}

impl std::fmt::Display for Stale {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "fence {} is stale: this worker has seen {}", self.fence, self.newest)
    }
}

impl strata_proto::error::Classify for Stale {
    fn kind(&self) -> Kind {
        Kind::Stale { term: self.newest.term }
    }
}
