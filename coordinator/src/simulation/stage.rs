//! An incarnation of a stage: links, and steps in their order.

use std::collections::VecDeque;

use strata_proto::{
    LayerRange, Side,
    v1::{self, Fence, LinkHealth, StageHealth, from_stage, to_stage},
};

use super::{
    Plant,
    cache::{Cache, begin, sampled},
    letters::{Letter, Node, ProcessId, Signal},
    model,
    world::{Happening, MILLISECOND, Time, World},
};

/// What is computed of a step so far: the residual stream of each of its tokens, or why there is none.
#[derive(Debug)]
pub struct Activation {
    pub step: u64,
    pub tokens: Result<Vec<u64>, String>,
}

/// This end of a link.
pub struct LinkEnd {
    peer: usize,
    token: Vec<u8>,
    pub is_up: bool,
    heard: Time,
    arrived: VecDeque<Activation>,
}

impl LinkEnd {
    pub fn new(peer: usize, token: Vec<u8>, is_up: bool, heard: Time) -> Self {
        LinkEnd { peer, token, is_up, heard, arrived: VecDeque::new() }
    }
}

pub struct Incarnation {
    pub fence: Fence,
    /// Silence after which somebody counts as lost.
    pub timeout: Time,
    layers: LayerRange,
    head: bool,
    expected: Vec<u8>,
    pub needs_upstream: bool,
    pub upstream: Option<LinkEnd>,
    pub downstream: Option<LinkEnd>,
    /// The call of Connect that waits, and until when.
    pub connecting: Option<(u64, ProcessId, Time)>,
    run: Option<Run>,
    blocks: u32,
}

/// While steps come.
struct Run {
    by: ProcessId,
    stream: u64,
    /// Silence of the coordinator after which it ends.
    silence: Time,
    heard: Time,
    orders: VecDeque<v1::StepMeta>,
    due: u64,
    done: u64,
    received: u64,
    sent: u64,
    is_computing: bool,
    cache: Cache,
}

impl Incarnation {
    pub fn new(request: &v1::PrepareRequest) -> Self {
        let spec = request.spec.clone().unwrap_or_default();
        Incarnation {
            fence: request.fence.unwrap_or_default(),
            timeout: Time::from(request.heartbeat_timeout_ms) * MILLISECOND,
            layers: model::layers_of(&spec),
            head: spec.head,
            expected: request.upstream_token.to_vec(),
            needs_upstream: false,
            upstream: None,
            downstream: None,
            connecting: None,
            run: None,
            blocks: request.kv_blocks,
        }
    }
}

impl World {
    /// The stage's part of an incarnation is over; neighbours and the coordinator notice.
    pub fn leave(&mut self, worker: usize, why: &str) {
        let Some(incarnation) = self.workers[worker].incarnation.take() else { return };
        self.note(|| format!("w{worker} leaves {}: {why}", incarnation.fence));
        let node = Node::Worker(worker);
        for (link, downwards) in [(incarnation.upstream, false), (incarnation.downstream, true)] {
            if let Some(LinkEnd { peer, token, .. }) = link {
                self.send(
                    node,
                    Node::Worker(peer),
                    Letter::Link { token, downwards, signal: Signal::Closed },
                );
            }
        }
        if let Some(run) = incarnation.run {
            self.send(node, run.by.node(), Letter::Ended { stream: run.stream });
        }
        if let Some((id, by, _)) = incarnation.connecting {
            let answer = Err(tonic::Status::unavailable("the incarnation was ended"));
            self.send(node, by.node(), Letter::Answer { id, answer });
        }
    }

    /// A link to a neighbour is not what it should be: says so, and ends.
    fn miss(&mut self, worker: usize, side: Side, health: LinkHealth) {
        let Some(incarnation) = &self.workers[worker].incarnation else { return };
        if incarnation.connecting.is_some() {
            return self.not_connected(worker, side);
        }
        let mut said = incarnation.health();
        match side {
            Side::Upstream => said.upstream = health.into(),
            Side::Downstream => said.downstream = health.into(),
        }
        self.say(worker, from_stage::Message::Health(said));
        self.say(worker, from_stage::Message::Fatal("the neighbouring stage is gone".into()));
        self.leave(worker, &format!("{side:?} is {health:?}"));
    }

    fn say(&mut self, worker: usize, message: from_stage::Message) {
        let run = self.workers[worker].incarnation.as_ref().and_then(|incarnation| incarnation.run.as_ref());
        let Some((by, stream)) = run.map(|run| (run.by, run.stream)) else { return };
        let said = v1::FromStage { message: Some(message) };
        self.send(Node::Worker(worker), by.node(), Letter::Said { stream, said });
    }

    /// A run begins, if the incarnation is there.
    pub fn start(&mut self, worker: usize, by: ProcessId, fence: Fence, stream: u64, silence: Time) {
        let now = self.now;
        let Some(incarnation) = self.workers[worker].incarnation.as_mut().filter(|i| i.fence == fence) else {
            return self.send(Node::Worker(worker), by.node(), Letter::Ended { stream });
        };
        let (layers, blocks) = (incarnation.layers, incarnation.blocks);
        let cache = Cache::new(layers, blocks);
        incarnation.run = Some(Run {
            by,
            stream,
            silence,
            heard: now,
            orders: VecDeque::new(),
            due: 0,
            done: 0,
            received: 0,
            sent: 0,
            is_computing: false,
            cache,
        });
        self.say(worker, from_stage::Message::Opened(v1::Opened { next_step: 0 }));
    }

    /// The coordinator ends a run.
    pub fn closed(&mut self, worker: usize, stream: u64) {
        let run = self.workers[worker].incarnation.as_ref().and_then(|incarnation| incarnation.run.as_ref());
        if run.is_some_and(|run| run.stream == stream) {
            self.leave(worker, "its coordinator is gone");
        }
    }

    /// Something on the stream of a run.
    pub fn order(&mut self, worker: usize, by: Node, stream: u64, order: v1::ToStage) {
        let now = self.now;
        let incarnation = self.workers[worker].incarnation.as_mut();
        let running =
            incarnation.and_then(|i| Some((i.run.as_mut().filter(|run| run.stream == stream)?, &i.fence)));
        let Some((run, fence)) = running else {
            return self.send(Node::Worker(worker), by, Letter::Ended { stream });
        };
        run.heard = now;
        let Some(to_stage::Message::Step(meta)) = order.message else { return };
        let fence = *fence;
        if meta.fence != Some(fence) || meta.step != run.due {
            let due = run.due;
            return self.violated(format!(
                "step {} of {:?} came to w{worker}, where {due} of {fence} was due",
                meta.step, meta.fence
            ));
        }
        run.due += 1;
        run.orders.push_back(meta);
        self.compute(worker);
    }

    /// Begins with the next step, if all that it needs is there.
    fn compute(&mut self, worker: usize) {
        let boot = self.workers[worker].boot;
        let Some(Incarnation { run: Some(run), upstream, fence, .. }) = &mut self.workers[worker].incarnation
        else {
            return;
        };
        let Some(meta) = run.orders.front().filter(|_| !run.is_computing) else { return };
        match upstream.as_ref().map(|link| link.arrived.front()) {
            Some(None) => return,
            Some(Some(activation)) if activation.step != meta.step => {
                return self.miss(worker, Side::Upstream, LinkHealth::Broken);
            }
            _ => {}
        }
        let (fence, tokens) = (*fence, meta.token_ids.len() as u64);
        run.is_computing = true;
        run.received += 1;
        let time = self.random.within(1..6) * MILLISECOND + tokens * 100;
        self.schedule(self.now + time, Happening::Computed { worker, boot, fence });
    }

    /// A step is computed: hands on what it is, or says it.
    pub fn computed(&mut self, worker: usize, boot: u64, fence: Fence) {
        let (plant, now) = (self.plant, self.now);
        let at = &mut self.workers[worker];
        if at.boot != boot || !at.is_there {
            return;
        }
        if at.is_paused {
            return self.schedule(now + 20 * MILLISECOND, Happening::Computed { worker, boot, fence });
        }
        let Some(incarnation) = at.incarnation.as_mut().filter(|incarnation| incarnation.fence == fence)
        else {
            return;
        };
        let (first, head) = (incarnation.upstream.is_none(), incarnation.head);
        let Some(run) = &mut incarnation.run else { return };
        let Some(meta) = run.orders.pop_front() else { return };
        let arrived = incarnation.upstream.as_mut().and_then(|link| link.arrived.pop_front());
        let poisons = self.poison > 0 && self.random.percent(20);
        run.is_computing = false;
        run.done += 1;
        let mut tokens = match arrived {
            Some(activation) => activation.tokens,
            None if first => Ok(begin(&meta)),
            None => return,
        };
        let accepted = run.cache.take(&meta, plant);
        if let Err(why) = accepted {
            return self.violated(format!("step {} of {fence} on w{worker}: {why}", meta.step));
        }
        if poisons {
            self.poison -= 1;
            tokens = Err("poison".into());
        }
        if let Ok(tokens) = &mut tokens {
            // A defective stage computes some steps twice.
            let times = if plant == Plant::TwiceComputed && meta.step % 7 == 6 { 2 } else { 1 };
            (0..times).for_each(|_| run.cache.compute(&meta, tokens, plant));
        }
        let step = meta.step;
        if let Some(link) = incarnation.downstream.as_ref() {
            run.sent += 1;
            let (peer, token) = (link.peer, link.token.clone());
            let signal = Signal::Activation(Activation { step, tokens });
            self.send(
                Node::Worker(worker),
                Node::Worker(peer),
                Letter::Link { token, downwards: true, signal },
            );
        } else if head {
            let (output, failure) = match tokens {
                Ok(tokens) => (Some(sampled(&meta, &tokens)), None),
                Err(why) => (None, Some(why)),
            };
            self.say(worker, from_stage::Message::Result(v1::StepResult { step, failure, output }));
        }
        self.computes(worker, boot, fence);
        self.say(worker, from_stage::Message::Done(v1::StepDone { step, compute_us: 1000 }));
        self.compute(worker);
    }

    /// A signal on a link.
    pub fn signalled(&mut self, worker: usize, from: Node, token: Vec<u8>, downwards: bool, signal: Signal) {
        let now = self.now;
        let Node::Worker(peer) = from else { return };
        let Some(incarnation) = &mut self.workers[worker].incarnation else {
            return self.refuse(worker, from, token, downwards, &signal);
        };
        if matches!(signal, Signal::Hello) && incarnation.expected == token && incarnation.upstream.is_none()
        {
            incarnation.upstream = Some(LinkEnd::new(peer, token.clone(), true, now));
            self.send(
                Node::Worker(worker),
                from,
                Letter::Link { token, downwards: false, signal: Signal::Welcome },
            );
            return self.look_whether_connected(worker);
        }
        let (link, side) = match downwards {
            true => (&mut incarnation.upstream, Side::Upstream),
            false => (&mut incarnation.downstream, Side::Downstream),
        };
        let Some(link) = link.as_mut().filter(|link| link.token == token) else {
            return self.refuse(worker, from, token, downwards, &signal);
        };
        link.heard = now;
        match signal {
            Signal::Hello | Signal::Alive => {}
            Signal::Welcome => {
                link.is_up = true;
                self.look_whether_connected(worker);
            }
            Signal::Activation(activation) => {
                link.arrived.push_back(activation);
                self.compute(worker);
            }
            Signal::Closed => {
                // Nobody is told who is gone already.
                match side {
                    Side::Upstream => incarnation.upstream = None,
                    Side::Downstream => incarnation.downstream = None,
                }
                self.miss(worker, side, LinkHealth::Broken);
            }
        }
    }

    /// Nobody is there whom a signal is for.
    pub fn refuse(&mut self, worker: usize, from: Node, token: Vec<u8>, downwards: bool, signal: &Signal) {
        if !matches!(signal, Signal::Closed) {
            let closed = Letter::Link { token, downwards: !downwards, signal: Signal::Closed };
            self.send(Node::Worker(worker), from, closed);
        }
    }

    /// A stage's timer: it says that it is there, and looks who else is.
    pub fn beat(&mut self, worker: usize, boot: u64, fence: Fence) {
        let (now, at) = (self.now, &self.workers[worker]);
        if at.boot != boot || !at.is_there {
            return;
        }
        let Some(incarnation) = at.incarnation.as_ref().filter(|incarnation| incarnation.fence == fence)
        else {
            return;
        };
        let (timeout, is_paused) = (incarnation.timeout, at.is_paused);
        let is_late = incarnation.connecting.as_ref().is_some_and(|(_, _, until)| now > *until);
        let down = incarnation.downstream.as_ref().is_some_and(|link| !link.is_up);
        let ends = [(&incarnation.upstream, Side::Upstream), (&incarnation.downstream, Side::Downstream)];
        let there =
            ends.iter().filter_map(|(link, side)| Some((link.as_ref().filter(|link| link.is_up)?, *side)));
        let there: Vec<_> =
            there.map(|(link, side)| (link.peer, link.token.clone(), link.heard, side)).collect();
        let health = incarnation.health();
        let is_alone = incarnation.run.as_ref().is_some_and(|run| now - run.heard > run.silence);
        self.schedule(now + timeout / 4, Happening::Beat { worker, boot, fence });
        if is_paused {
            return;
        }
        if is_alone {
            return self.leave(worker, "its coordinator is silent");
        }
        if is_late {
            return self.not_connected(worker, if down { Side::Downstream } else { Side::Upstream });
        }
        self.say(worker, from_stage::Message::Health(health));
        for (peer, token, heard, side) in there {
            if now - heard > timeout {
                return self.miss(worker, side, LinkHealth::Silent);
            }
            let downwards = side == Side::Downstream;
            self.send(
                Node::Worker(worker),
                Node::Worker(peer),
                Letter::Link { token, downwards, signal: Signal::Alive },
            );
        }
    }
}

impl Incarnation {
    fn health(&self) -> StageHealth {
        let Some(run) = &self.run else { return StageHealth::default() };
        StageHealth { received: run.received, steps: run.done, sent: run.sent, ..StageHealth::default() }
    }

    /// Whether steps are run for a process.
    pub fn is_run_by(&self, by: ProcessId) -> bool {
        self.run.as_ref().is_some_and(|run| run.by == by)
    }

    /// Sequences that it knows.
    pub fn sequences(&self) -> usize {
        self.run.as_ref().map_or(0, |run| run.cache.sequences())
    }
}
