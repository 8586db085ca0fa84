//! The engine loop: one closed set of events, one owner of the schedulers and of the live pipelines.

mod bring_up;
mod change;
mod commit;
mod standby;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use strata_proto::{ModelProfile, error::Classify, v1};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use self::change::Changing;
use super::{
    answer::{self, Live},
    change::Change,
    claims::{Claim, Claims},
    error::EngineError,
    messages::{Asked, Event, Observer, Submission},
    replica::{Replica, State},
    replies::Reply,
    series::Series,
    snapshot::{self, Snapshot},
};
use crate::{
    cluster::{
        History, PipelineError,
        discovery::Planned,
        left_out::LeftOut,
        membership::{MemberEvent, Members},
        pipeline::PipelineEvent,
    },
    config::{Deployment, Limits},
    planner::Split,
    request::Tokenizer,
    scheduler::{self, SequenceId},
};

/// How often deadlines are checked.
const TICK: Duration = Duration::from_millis(50);
/// How long requests wait while no pipeline is up.
const OUTAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between attempts to bring a pipeline up.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// How often members that were left out of plans are looked at again while all goes well.
const LOOK_AGAIN_EVERY: Duration = Duration::from_secs(60);

pub(crate) struct Engine {
    deployment: Deployment,
    limits: Limits,
    profile: Arc<ModelProfile>,
    tokenizer: Arc<Tokenizer>,
    observer: Observer,
    handle: mpsc::UnboundedSender<Event>,
    events: mpsc::UnboundedReceiver<Event>,
    snapshot: watch::Sender<Snapshot>,
    members: Members,
    /// Of the leader that this engine works for.
    term: u64,
    /// Members on which something failed.
    left_out: LeftOut,
    /// Members that could not describe the model when they were last asked, and why.
    undescribed: BTreeMap<String, String>,
    look_again: Instant,
    /// Why it is to end.
    deposed: Option<String>,
    /// Never empty once the engine runs.
    replicas: Vec<Replica>,
    /// What earlier pipelines have shown.
    history: Arc<History>,
    /// Somebody joined for whom no further replica was tried yet.
    joined: bool,
    /// What is to run otherwise; the first one is at work.
    changes: VecDeque<Changing>,
    /// Plans or members have changed since standbys were looked for.
    standbys_due: bool,
    /// They are looked for right now.
    standing_by: bool,
    /// What it and other engines run on.
    claim: Claim,
    /// Where it is shown; what tells of its end knows it, too.
    shown: Arc<Mutex<watch::Sender<Snapshot>>>,
    /// It is to end when nothing is in progress.
    retires: bool,
    /// Counts pipelines that were begun, of whichever replica.
    incarnations: Arc<AtomicU64>,
    last_id: SequenceId,
    live: BTreeMap<SequenceId, Live>,
    begun: Instant,
    /// Since when no pipeline is up.
    down_since: Option<Instant>,
    first: Option<oneshot::Sender<Result<(), PipelineError>>>,
    counters: v1::Load,
    series: Arc<Series>,
    /// By which the model is asked for.
    name: String,
}

/// What an engine begins with.
pub(crate) struct Start {
    pub deployment: Deployment,
    pub limits: Limits,
    pub profile: Arc<ModelProfile>,
    pub tokenizer: Arc<Tokenizer>,
    pub observer: Observer,
    pub members: Members,
    /// Of the leader that it works for.
    pub term: u64,
    /// Where it shows itself.
    pub snapshot: watch::Sender<Snapshot>,
    /// What the first pipelines are brought up by.
    pub planned: Planned,
    /// What earlier pipelines have shown.
    pub history: Arc<History>,
    /// What was counted before.
    pub counters: v1::Load,
    /// What other engines run on.
    pub claims: Claims,
    /// Counts pipelines that are begun; goes on where the engine before this one stopped.
    pub incarnations: Arc<AtomicU64>,
    /// What measures it.
    pub series: Arc<Series>,
    /// By which the model is asked for.
    pub name: String,
}

/// Why an engine ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Another coordinator leads, or nobody looks any more.
    Deposed(String),
    /// A defect of ours; another engine may do better.
    Failed(String),
}

/// An engine that runs, for as long as this is kept.
pub(crate) struct Running {
    handle: mpsc::UnboundedSender<Event>,
    up: oneshot::Receiver<Result<(), PipelineError>>,
    ended: oneshot::Receiver<Ended>,
}

impl Running {
    /// Takes its events.
    pub fn handle(&self) -> &mpsc::UnboundedSender<Event> {
        &self.handle
    }

    /// The outcome of the first attempts to bring a pipeline up: when one is up, or when none came. To be asked once;
    /// `None` if the engine is gone.
    pub async fn up(&mut self) -> Option<Result<(), PipelineError>> {
        (&mut self.up).await.ok()
    }

    /// Returns when it has ended, with why, once; `None` if that is not known.
    pub async fn ended(&mut self) -> Option<Ended> {
        (&mut self.ended).await.ok()
    }

    /// Shows it elsewhere; returns when nothing of it is shown where it was.
    pub async fn show(&self, place: watch::Sender<Snapshot>) {
        let (done, shown) = oneshot::channel();
        // One that is gone shows nothing.
        let _ = self.handle.send(Event::Show(place, done));
        let _ = shown.await;
    }

    /// Ends it when nothing is in progress any more.
    pub fn retire(&self) {
        let _ = self.handle.send(Event::Retire);
    }

    /// Ends it: its coordinator leads no more.
    pub fn depose(&self, why: String) {
        // One that is gone has ended already.
        let _ = self.handle.send(Event::Depose(why));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.depose("it gave up".into());
    }
}

impl Engine {
    /// Starts an engine.
    pub fn spawn(start: Start) -> Running {
        let (handle, events) = mpsc::unbounded_channel();
        let (first, up) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let (planned, shown) = (start.planned, Arc::new(Mutex::new(start.snapshot.clone())));
        let engine = Engine {
            deployment: start.deployment,
            limits: start.limits,
            profile: start.profile,
            tokenizer: start.tokenizer,
            observer: start.observer,
            handle: handle.clone(),
            events,
            snapshot: start.snapshot,
            members: start.members,
            term: start.term,
            left_out: LeftOut::default(),
            undescribed: planned.found.left_out.clone(),
            look_again: Instant::now() + LOOK_AGAIN_EVERY,
            deposed: None,
            replicas: Vec::new(),
            history: start.history,
            joined: false,
            changes: VecDeque::new(),
            standbys_due: true,
            standing_by: false,
            claim: start.claims.enter(),
            shown: shown.clone(),
            retires: false,
            incarnations: start.incarnations,
            last_id: 0,
            live: BTreeMap::new(),
            begun: Instant::now(),
            down_since: Some(Instant::now()),
            first: Some(first),
            counters: start.counters,
            series: start.series.clone(),
            name: start.name,
        };
        let series = start.series;
        tokio::spawn(async move {
            let ended = match tokio::spawn(engine.run(planned)).await {
                Ok(why) => Ended::Deposed(why),
                Err(error) => Ended::Failed(format!("the engine ended: {error}")),
            };
            let (Ended::Deposed(why) | Ended::Failed(why)) = &ended;
            let shown = shown.lock().unwrap_or_else(PoisonError::into_inner).clone();
            shown.send_modify(|s| s.engine_ended(why));
            series.ended();
            // Nobody may wait for its end.
            let _ = end.send(ended);
        });
        Running { handle, up, ended }
    }

    /// Runs until it is deposed, or nobody looks any more; says why.
    async fn run(mut self, planned: Planned) -> String {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        self.show_plan(&planned.plan);
        for replica in planned.replicas() {
            self.add_replica(Some(replica));
        }
        self.show_left_out();
        self.hold();
        while self.deposed.is_none() && !self.snapshot.is_closed() {
            tokio::select! {
                // Deadlines are kept however many events there are.
                biased;
                _ = tick.tick() => self.tick(),
                event = self.events.recv() => match event {
                    Some(event) => self.react(event),
                    None => break,
                },
            }
            while let Ok(event) = self.events.try_recv() {
                self.react(event);
            }
            self.series.turn();
            self.go_on();
            self.stand_by();
            self.issue();
            self.publish();
            self.hold();
            if self.retires && self.live.is_empty() {
                self.deposed = Some("another deployment is served".into());
            }
        }
        let failed = match &self.deposed {
            Some(why) => EngineError::Deposed(why.clone()),
            None => EngineError::ShuttingDown,
        };
        for live in self.live.into_values() {
            live.reply.end(Reply::Failed(failed.clone()));
        }
        let pipelines = self.replicas.into_iter().filter_map(|replica| match replica.state {
            State::Up(pipeline) => Some(pipeline.abort()),
            _ => None,
        });
        futures::future::join_all(pipelines.map(|abort| async move { abort.abort(None).await })).await;
        self.deposed.unwrap_or_else(|| "it has nothing to do any more".into())
    }

    fn react(&mut self, event: Event) {
        match event {
            Event::Submit(submission) => self.submit(*submission),
            Event::Cancel(id) => {
                self.live.remove(&id);
                self.cancel(id);
            }
            Event::Pipeline(incarnation, event) => self.pipeline_event(incarnation, event),
            Event::Planned(incarnation, planned) => self.planned(incarnation, &planned),
            Event::Loading(incarnation, update) => self.loading(incarnation, update),
            Event::BroughtUp(incarnation, outcome) => {
                self.brought_up(incarnation, *outcome);
                self.try_another();
            }
            Event::Member(event) => self.member_event(&event),
            Event::Change(change, reply) => self.change(change, reply),
            Event::Prepared(number, prepared) => self.prepared(number, *prepared),
            Event::StoodBy(standing, failed) => self.stood_by(standing, failed),
            Event::Show(place, shown) => {
                self.show_on(place);
                // Who asked may have gone.
                let _ = shown.send(());
            }
            Event::Retire => self.retires = true,
            Event::Freed => {
                self.standbys_due = true;
                self.joined |= self.deployment.split == Split::Auto;
                self.try_another();
            }
            Event::Depose(why) => self.deposed = Some(why),
        }
    }

    /// Shows itself there from now on; what is counted there goes on.
    fn show_on(&mut self, place: watch::Sender<Snapshot>) {
        let own = self.snapshot.borrow().clone();
        let before = snapshot::counters(&place.borrow().load);
        self.counters = snapshot::sum(&before, &self.counters);
        place.send_modify(|s| *s = Snapshot { state: s.state, doing: std::mem::take(&mut s.doing), ..own });
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = place.clone();
        self.snapshot = place;
    }

    /// Tells other engines what it runs on.
    fn hold(&mut self) {
        self.claim.hold(self.replicas.iter().map(|r| (r.number, r.plan.as_ref())));
    }

    fn member_event(&mut self, event: &MemberEvent) {
        match event {
            MemberEvent::Joined(member) => {
                tracing::info!(worker = member.name, "joined");
                self.left_out.forgive(&member.name);
                self.show_left_out();
                self.standbys_due = true;
                let down = |replica: &Replica| matches!(replica.state, State::Down { .. });
                if let Some(at) = self.replicas.iter().position(down) {
                    self.bring_up(at, None, None);
                } else if self.deployment.split == Split::Auto {
                    self.joined = true;
                    self.try_another();
                }
            }
            MemberEvent::Twice { worker, again } => {
                tracing::warn!("workers {worker} and {again} are one process, which takes part once");
            }
            MemberEvent::Left(name) => {
                tracing::warn!(worker = name, "left");
                self.standbys_due = true;
                while let Some(at) = self.replicas.iter().position(|replica| replica.uses(name)) {
                    self.lost(at, name, "left");
                }
            }
            // It counts when the next plan is made.
            MemberEvent::Away(..) => {}
        }
    }

    fn tick(&mut self) {
        self.leave_idle();
        let now = self.begun.elapsed();
        let expired: Vec<_> =
            self.replicas.iter_mut().flat_map(|replica| replica.scheduler.expire(now)).collect();
        for id in expired {
            let answer = self.live.get(&id).and_then(|l| l.answer.as_ref());
            let tokens = answer.map_or(0, |a| a.generated);
            self.fail(id, EngineError::Deadline { tokens });
        }
        let due =
            |replica: &Replica| matches!(replica.state, State::Down { retry } if Instant::now() >= retry);
        while let Some(at) = self.replicas.iter().position(due) {
            self.bring_up(at, None, None);
        }
        if Instant::now() >= self.look_again {
            self.look_again = Instant::now() + LOOK_AGAIN_EVERY;
            let some = self.left_out.any_due(Instant::now()) || !self.undescribed.is_empty();
            if some && self.deployment.split == Split::Auto {
                self.joined = true;
                self.try_another();
            }
        }
        if self.turned_away() {
            let reason = self.snapshot.borrow().reason();
            for id in self.live.keys().copied().collect::<Vec<_>>() {
                self.cancel(id);
                self.fail(id, EngineError::NoPipeline(reason.clone()));
            }
        }
    }

    /// Whether the outage has lasted so long that nobody should wait for its end.
    fn turned_away(&self) -> bool {
        self.down_since.is_some_and(|since| since.elapsed() > OUTAGE_TIMEOUT)
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { request, connection, arrived, reply } = submission;
        if self.turned_away() {
            let reason = self.snapshot.borrow().reason();
            reply.end(Reply::Failed(EngineError::NoPipeline(reason)));
            return;
        }
        let arrived = arrived.duration_since(self.begun);
        let (asked, answer) = match request {
            Asked::Generate(request) => answer::generation(*request, &self.tokenizer, connection, arrived),
            Asked::Encode(input, deadline) => {
                let work = scheduler::Work::Encode(input.encode);
                let deadline = deadline.map(|d| arrived + d);
                let (prompt, tenant) = (input.ids, "".into());
                (scheduler::Request { prompt, tenant, connection, deadline, work }, None)
            }
        };
        let prompt_tokens = asked.prompt.len() as u64;
        self.last_id += 1;
        let id = self.last_id;
        match self.place(id, asked) {
            Ok(()) => {
                self.counters.prompt_tokens += self.counted(prompt_tokens);
                match reply.send(Reply::Accepted(id)) {
                    Ok(()) => drop(self.live.insert(id, Live { reply, answer, begun: false })),
                    Err(_) => self.cancel(id),
                }
            }
            Err(error) => {
                let refused = EngineError::Refused { message: error.to_string(), kind: error.kind() };
                reply.end(Reply::Failed(refused));
            }
        }
    }

    /// So many tokens, or none of the coordinator's own questions: it asks them before it serves, and nobody else does.
    pub(super) fn counted(&self, tokens: u64) -> u64 {
        if self.snapshot.borrow().state == snapshot::State::Starting { 0 } else { tokens }
    }

    /// Gives a request to the least busy replica that is up and has room for it; to the first while none is up.
    fn place(&mut self, id: SequenceId, request: scheduler::Request) -> Result<(), scheduler::SubmitError> {
        let mut order: Vec<usize> = (0..self.replicas.len()).filter(|i| self.replicas[*i].is_up()).collect();
        if order.is_empty() {
            order.push(0);
        }
        order.sort_by_key(|i| (self.replicas[*i].scheduler.is_closed(), self.replicas[*i].load()));
        let unplaced = scheduler::Unplaced::new(id, request);
        let mut refused = None;
        for replica in order {
            let scheduler = &mut self.replicas[replica].scheduler;
            match scheduler.check(&unplaced) {
                Ok(()) => {
                    scheduler.adopt(unplaced);
                    return Ok(());
                }
                // The largest of the caches is the one to speak of.
                Err(error)
                    if refused.as_ref().is_none_or(|r: &scheduler::SubmitError| error.room() > r.room()) =>
                {
                    refused = Some(error)
                }
                Err(_) => {}
            }
        }
        Err(refused.unwrap_or(scheduler::SubmitError::TooLarge { needed: 0, capacity: 0 }))
    }

    fn pipeline_event(&mut self, incarnation: u64, event: PipelineEvent) {
        let Some(at) = self.replicas.iter().position(|replica| replica.has(incarnation)) else { return };
        if let PipelineEvent::Lost { worker, reason, leave_out: true } = &event {
            self.left_out.failed(worker, reason.clone(), Instant::now());
            self.show_left_out();
        }
        if let State::BringingUp { lost, .. } = &mut self.replicas[at].state {
            *lost |= matches!(event, PipelineEvent::Lost { .. } | PipelineEvent::Leaving { .. });
            return;
        }
        match event {
            PipelineEvent::Done { stage, step, compute } => {
                let Replica { budget, scheduler, stages, .. } = &mut self.replicas[at];
                budget.done(stage, step, compute);
                stages.get(stage).into_iter().for_each(|stage| self.series.computed(stage, compute));
                scheduler.limit_mixed_steps(budget.tokens());
            }
            PipelineEvent::Lost { worker, reason, .. } => self.lost(at, &worker, &reason),
            PipelineEvent::Leaving { worker } => {
                tracing::warn!("worker {worker} is about to end; planning without it");
                self.change(Change::Leave(worker), None);
            }
            PipelineEvent::Result(result) => self.commit(at, result),
        }
    }

    /// Takes a sequence from whichever scheduler has it.
    fn cancel(&mut self, id: SequenceId) {
        self.replicas.iter_mut().for_each(|replica| replica.scheduler.cancel(id));
    }

    fn fail(&mut self, id: SequenceId, error: EngineError) {
        if let Some(live) = self.live.remove(&id) {
            live.reply.end(Reply::Failed(error));
        }
    }

    /// Hands steps to the pipelines for as long as their schedulers have any.
    fn issue(&mut self) {
        for at in 0..self.replicas.len() {
            while let Some(Replica { state: State::Up(pipeline), scheduler, budget, issued, .. }) =
                self.replicas.get_mut(at)
            {
                let Some(meta) = scheduler.next_step() else { break };
                budget.sent(meta.step, meta.token_ids.len() as u32);
                issued.insert(meta.step, Instant::now());
                self.series.issued(&self.name, meta.token_ids.len());
                for row in meta.rows.iter().filter(|row| row.reset) {
                    if let Some(live) = self.live.get_mut(&row.sequence)
                        && !live.begun
                    {
                        live.begun = true;
                        // A receiver that is gone needs no telling.
                        let _ = live.reply.send(Reply::Begun(Instant::now()));
                    }
                }
                if let Err(worker) = pipeline.issue(meta) {
                    self.lost(at, &worker, "takes no steps");
                }
            }
        }
    }

    fn publish(&self) {
        let block = u64::from(strata_proto::BLOCK_TOKENS);
        let mut load = self.counters;
        for stats in self.replicas.iter().map(|replica| replica.scheduler.stats()) {
            load.running += stats.running;
            load.waiting += stats.waiting;
            load.kv_tokens_used += u64::from(stats.blocks_used) * block;
            load.kv_tokens_total += u64::from(stats.blocks_total) * block;
            load.steps_in_flight += stats.in_flight;
            load.preemptions += stats.preemptions;
            load.prefix_queries += stats.prefix_queries;
            load.prefix_hits += stats.prefix_hits;
        }
        self.snapshot.send_if_modified(|s| {
            let changed = s.load != load;
            s.load = load;
            changed
        });
    }

    fn scheduler_config(&self, blocks: u32, state_slots: u32, stages: u32) -> scheduler::Config {
        scheduler::Config {
            blocks,
            block_tokens: strata_proto::BLOCK_TOKENS,
            states: self.profile.state_kinds(),
            state_slots,
            max_step_tokens: self.deployment.max_step_tokens,
            max_step_rows: self.deployment.step_rows(&self.profile),
            prefill_chunk: self.limits.prefill_chunk,
            // One step for each stage, and one more that hides the way back to the coordinator.
            depth: if stages > 1 { stages + 1 } else { 1 },
            stages,
            rope_switch: self.profile.recompute_at,
            prefix_cache: self.limits.prefix_cache,
        }
    }
}
