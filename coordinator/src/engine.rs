//! The engine loop: one closed set of events, one owner of the scheduler and of the live pipeline.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use strata_proto::{
    ModelProfile, Plan,
    error::{Classify, Kind},
    v1::{self, Fence, FinishReason, generate_event, step_result},
};
use tokio::sync::{mpsc, watch};

use crate::{
    admission::{Checked, Permit},
    membership::{self, Member, MemberEvent},
    messages::{
        Asked, EngineError, EngineHandle, Event, Limits, Notice, Observer, Reply, Snapshot, Submission,
    },
    pipeline::{Pipeline, PipelineEvent},
    scheduler::{self, Scheduler, SequenceId},
    survey::{Deployment, PipelineError, survey},
    tokenizer::{TextStream, Tokenizer},
};

/// How often deadlines are checked.
const TICK: Duration = Duration::from_millis(50);
/// How long requests wait while what is left of the members cannot hold the model.
const CAPACITY_PATIENCE: Duration = Duration::from_secs(30);
/// How long they wait in all for a pipeline, loading included.
const OUTAGE_PATIENCE: Duration = Duration::from_secs(600);
/// Pause between attempts to bring a pipeline up.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// Term of a coordinator without an election.
const FIXED_TERM: u64 = 1;

/// A request in progress.
struct Live {
    reply: mpsc::UnboundedSender<Reply>,
    /// Of a generation.
    answer: Option<Answer>,
    _permit: Permit,
}

/// A text in progress.
struct Answer {
    text: TextStream,
    prompt_tokens: u32,
    generated: u32,
}

/// The pipeline, or what is being done about there being none.
enum State {
    Up(Pipeline),
    /// A task is at work; `lost` if its pipeline broke before the engine took it over.
    BringingUp {
        generation: u64,
        lost: bool,
    },
    Down {
        retry: Instant,
    },
}

pub(crate) struct Engine {
    deployment: Deployment,
    limits: Limits,
    profile: Arc<ModelProfile>,
    tokenizer: Arc<Tokenizer>,
    observer: Observer,
    handle: mpsc::UnboundedSender<Event>,
    events: mpsc::UnboundedReceiver<Event>,
    snapshot: watch::Sender<Snapshot>,
    members: Vec<Member>,
    state: State,
    generation: u64,
    scheduler: Scheduler,
    live: HashMap<SequenceId, Live>,
    begun: Instant,
    down_since: Option<Instant>,
    no_capacity_since: Option<Instant>,
    first: Option<tokio::sync::oneshot::Sender<Result<(), PipelineError>>>,
    counters: v1::Load,
}

impl Engine {
    /// Starts an engine over `members`; the first attempt to bring a pipeline up is reported once.
    pub fn spawn(
        deployment: Deployment,
        limits: Limits,
        (profile, tokenizer): (Arc<ModelProfile>, Arc<Tokenizer>),
        observer: Observer,
        members: Vec<Member>,
    ) -> (EngineHandle, tokio::sync::oneshot::Receiver<Result<(), PipelineError>>) {
        let (handle, events) = mpsc::unbounded_channel();
        let (snapshot, view) = watch::channel(Snapshot { reason: "starting".into(), ..Snapshot::default() });
        let (first, up) = tokio::sync::oneshot::channel();
        let scheduler = Scheduler::new(scheduler_config(&deployment, &limits, &profile, 0, 1));
        let engine = Engine {
            deployment,
            limits,
            profile,
            tokenizer,
            observer,
            handle: handle.clone(),
            events,
            snapshot,
            members,
            state: State::Down { retry: Instant::now() },
            generation: 0,
            scheduler,
            live: HashMap::new(),
            begun: Instant::now(),
            down_since: Some(Instant::now()),
            no_capacity_since: None,
            first: Some(first),
            counters: v1::Load::default(),
        };
        tokio::spawn(engine.run());
        (EngineHandle { events: handle, snapshot: view }, up)
    }

    async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        self.bring_up(None);
        while !self.snapshot.is_closed() {
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.react(event),
                    None => break,
                },
                _ = tick.tick() => self.tick(),
            }
            while let Ok(event) = self.events.try_recv() {
                self.react(event);
            }
            self.issue();
            self.publish();
        }
        for (_, live) in self.live.drain() {
            let _ = live.reply.send(Reply::Failed(EngineError::ShuttingDown));
        }
        if let State::Up(pipeline) = self.state {
            pipeline.abort().abort().await;
        }
    }

    fn react(&mut self, event: Event) {
        match event {
            Event::Submit(submission) => self.submit(*submission),
            Event::Cancel(id) => {
                self.live.remove(&id);
                self.scheduler.cancel(id);
            }
            Event::Pipeline(generation, event) => self.pipeline_event(generation, event),
            Event::Planned => self.no_capacity_since = None,
            Event::BroughtUp(outcome) => self.brought_up(*outcome),
            Event::Member(event) => self.member_event(&event),
        }
    }

    fn member_event(&mut self, event: &MemberEvent) {
        membership::note(&mut self.members, event);
        match event {
            MemberEvent::Joined(member) => {
                tracing::info!(worker = member.name, "joined");
                if matches!(self.state, State::Down { .. }) {
                    self.bring_up(None);
                }
            }
            MemberEvent::Left(name) => {
                tracing::warn!(worker = name, "left");
                if let State::Up(pipeline) = &self.state
                    && pipeline.replica().stages.iter().any(|s| s.worker == *name)
                {
                    self.lost(name, "it left");
                }
            }
        }
    }

    fn tick(&mut self) {
        for id in self.scheduler.expire(self.begun.elapsed()) {
            let answer = self.live.get(&id).and_then(|l| l.answer.as_ref());
            let tokens = answer.map_or(0, |a| a.generated);
            self.fail(id, EngineError::Deadline { tokens });
        }
        if let State::Down { retry } = self.state
            && Instant::now() >= retry
        {
            self.bring_up(None);
        }
        if self.turned_away() {
            let reason = self.snapshot.borrow().reason.clone();
            for id in self.live.keys().copied().collect::<Vec<_>>() {
                self.scheduler.cancel(id);
                self.fail(id, EngineError::NoPipeline(reason.clone()));
            }
        }
    }

    /// Whether the outage has lasted so long that nobody should wait for its end.
    fn turned_away(&self) -> bool {
        let longer = |since: Option<Instant>, patience| since.is_some_and(|s| s.elapsed() > patience);
        longer(self.no_capacity_since, CAPACITY_PATIENCE) || longer(self.down_since, OUTAGE_PATIENCE)
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { request, arrived, reply, permit } = submission;
        if self.turned_away() {
            let reason = self.snapshot.borrow().reason.clone();
            let _ = reply.send(Reply::Failed(EngineError::NoPipeline(reason)));
            return;
        }
        let (asked, answer) = match request {
            Asked::Generate(request) => generation(*request, arrived.duration_since(self.begun)),
            Asked::Encode(input, deadline) => {
                let deadline = deadline.map(|d| arrived.duration_since(self.begun) + d);
                let work = scheduler::Work::Encode(input.encode);
                (scheduler::Request { prompt: input.ids, deadline, work }, None)
            }
        };
        let prompt_tokens = asked.prompt.len() as u64;
        match self.scheduler.submit(asked) {
            Ok(id) => {
                let live = Live { reply: reply.clone(), answer, _permit: permit };
                self.counters.prompt_tokens += prompt_tokens;
                self.live.insert(id, live);
                if reply.send(Reply::Accepted(id)).is_err() {
                    self.live.remove(&id);
                    self.scheduler.cancel(id);
                }
            }
            Err(error) => {
                let refused = EngineError::Refused { message: error.to_string(), kind: error.kind() };
                let _ = reply.send(Reply::Failed(refused));
            }
        }
    }

    fn pipeline_event(&mut self, generation: u64, event: PipelineEvent) {
        let current = match &mut self.state {
            State::Up(pipeline) => pipeline.fence().generation == generation,
            State::BringingUp { generation: coming, lost } if *coming == generation => {
                *lost |= matches!(event, PipelineEvent::Lost { .. });
                false
            }
            _ => false,
        };
        if !current {
            return;
        }
        match event {
            PipelineEvent::Done { .. } => {}
            PipelineEvent::Lost { worker, reason } => self.lost(&worker, &reason),
            PipelineEvent::Result(result) => self.commit(result),
        }
    }

    fn commit(&mut self, result: v1::StepResult) {
        self.counters.steps += 1;
        if let Some(failure) = result.failure {
            tracing::warn!(step = result.step, failure, "a step was poisoned; its batch is replayed");
            match self.scheduler.fail(result.step) {
                Ok(given_up) => given_up.into_iter().for_each(|id| self.fail(id, EngineError::Poisoned)),
                Err(error) => self.lost("the last stage", &error.to_string()),
            }
            return;
        }
        let (outputs, mut results) = outputs(result.output);
        match self.scheduler.commit(result.step, &outputs) {
            Ok(committed) => {
                for output in committed {
                    let result = results.remove(&output.sequence);
                    match (output.output, result) {
                        (scheduler::Output::Token(token), Some(Yield::Token(logprobs))) => {
                            self.emit(output.sequence, token, output.finished, logprobs);
                        }
                        (_, Some(Yield::Whole(reply))) => {
                            if let Some(live) = self.live.remove(&output.sequence) {
                                // A receiver that is gone needs no telling.
                                let _ = live.reply.send(reply);
                            }
                        }
                        _ => self.fail(output.sequence, EngineError::Internal),
                    }
                }
            }
            Err(error) => self.lost("the last stage", &error.to_string()),
        }
    }

    /// Sends a committed token on, and ends the answer where it ends.
    fn emit(
        &mut self,
        sequence: SequenceId,
        id: u32,
        finished: Option<scheduler::Finish>,
        logprobs: Option<v1::TokenLogprobs>,
    ) {
        let Some(live) = self.live.get_mut(&sequence) else { return };
        let Some(answer) = &mut live.answer else { return };
        let piece = match answer.text.push(id, &self.tokenizer) {
            Ok(piece) => piece,
            Err(error) => {
                tracing::error!(%error, token = id, "cannot decode a token");
                self.scheduler.cancel(sequence);
                return self.fail(sequence, EngineError::Internal);
            }
        };
        let tokens = v1::Tokens {
            text: piece.text,
            token_ids: vec![id],
            logprobs: logprobs.into_iter().collect(),
            index: answer.generated,
        };
        answer.generated += 1;
        self.counters.generated_tokens += 1;
        let gone = live.reply.send(Reply::Event(generate_event::Event::Tokens(tokens))).is_err();
        let finish = match finished {
            _ if piece.stopped => Some(FinishReason::Stop),
            Some(scheduler::Finish::Eos) => Some(FinishReason::Eos),
            Some(scheduler::Finish::Length | scheduler::Finish::Encoded) => Some(FinishReason::Length),
            None => None,
        };
        if gone || finish.is_some() {
            self.scheduler.cancel(sequence);
            if let (Some(live), Some(reason)) = (self.live.remove(&sequence), finish) {
                finish_answer(live, reason, &self.tokenizer);
            }
        }
    }

    fn fail(&mut self, id: SequenceId, error: EngineError) {
        if let Some(live) = self.live.remove(&id) {
            // A receiver that is gone needs no telling.
            let _ = live.reply.send(Reply::Failed(error));
        }
    }

    /// Hands steps to the pipeline for as long as the scheduler has any.
    fn issue(&mut self) {
        while let State::Up(pipeline) = &self.state {
            let Some(meta) = self.scheduler.next_step() else { return };
            if let Err(worker) = pipeline.issue(meta) {
                self.lost(&worker, "it takes no steps");
            }
        }
    }

    /// The live generation is over: its sequences wait for the next one.
    fn lost(&mut self, worker: &str, reason: &str) {
        tracing::warn!(worker, reason, "lost a stage; planning anew");
        let down = State::Down { retry: Instant::now() };
        if let State::Up(pipeline) = std::mem::replace(&mut self.state, down) {
            self.down_since = Some(Instant::now());
            self.set_reason(format!("worker {worker} was lost: {reason}"));
            self.bring_up(Some(pipeline));
        }
    }

    fn set_reason(&self, reason: String) {
        self.snapshot.send_modify(|s| {
            s.ready = false;
            s.reason = reason;
        });
    }

    /// Starts a task that ends `old` and brings a new generation up over the members there are.
    fn bring_up(&mut self, old: Option<Pipeline>) {
        self.generation += 1;
        let fence = Fence { term: FIXED_TERM, pipeline: 0, generation: self.generation };
        self.state = State::BringingUp { generation: self.generation, lost: false };
        let (members, deployment) = (self.members.clone(), self.deployment.clone());
        let (events, observer) = (self.handle.clone(), self.observer.clone());
        let sink_events = events.clone();
        let sink = Arc::new(move |generation, event| {
            let _ = sink_events.send(Event::Pipeline(generation, event));
        });
        tokio::spawn(async move {
            if let Some(old) = old {
                old.abort().abort().await;
            }
            let outcome = async {
                let survey = survey(&members, &deployment.model).await?;
                let plan = survey.plan(&deployment)?;
                let _ = events.send(Event::Planned);
                observer(Notice::Planned(Arc::new(plan.clone())));
                let progress = {
                    let observer = observer.clone();
                    Arc::new(move |update| observer(Notice::Loading(update)))
                };
                let pipeline = Pipeline::bring_up(&survey, &plan, fence, progress, sink, &deployment).await?;
                Ok((pipeline, plan))
            };
            let _ = events.send(Event::BroughtUp(Box::new(outcome.await)));
        });
    }

    fn brought_up(&mut self, outcome: Result<(Pipeline, Plan), PipelineError>) {
        let lost = matches!(self.state, State::BringingUp { lost: true, .. });
        match outcome {
            Ok((pipeline, plan)) => {
                let replica = pipeline.replica();
                let blocks =
                    u32::try_from(replica.kv_capacity_tokens / u64::from(strata_proto::BLOCK_TOKENS));
                let config = scheduler_config(
                    &self.deployment,
                    &self.limits,
                    &self.profile,
                    blocks.unwrap_or(u32::MAX),
                    replica.stages.len() as u32,
                );
                for id in self.scheduler.restart(config) {
                    let message = "the cache that is left is too small for this request".to_owned();
                    self.fail(id, EngineError::Refused { message, kind: Kind::NoCapacity });
                }
                let fence = pipeline.fence();
                tracing::info!(%fence, stages = replica.stages.len(), "the pipeline is up");
                self.snapshot.send_modify(|s| {
                    s.ready = true;
                    s.reason.clear();
                    s.plan = Some(Arc::new(plan));
                    s.fence = fence;
                });
                self.state = State::Up(pipeline);
                self.down_since = None;
                self.no_capacity_since = None;
                if let Some(first) = self.first.take() {
                    let _ = first.send(Ok(()));
                }
                if lost {
                    self.lost("of the new pipeline", "it broke as it came up");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "no pipeline came up");
                self.set_reason(error.to_string());
                self.no_capacity_since.get_or_insert_with(Instant::now);
                self.state = State::Down { retry: Instant::now() + RETRY_EVERY };
                if let Some(first) = self.first.take() {
                    let _ = first.send(Err(error));
                }
            }
        }
    }

    fn publish(&self) {
        let stats = self.scheduler.stats();
        let block = u64::from(strata_proto::BLOCK_TOKENS);
        let load = v1::Load {
            running: stats.running,
            waiting: stats.waiting,
            kv_tokens_used: u64::from(stats.blocks_used) * block,
            kv_tokens_total: u64::from(stats.blocks_total) * block,
            steps_in_flight: stats.in_flight,
            preemptions: stats.preemptions,
            ..self.counters
        };
        self.snapshot.send_if_modified(|s| {
            let changed = s.load != load || s.members.len() != self.members.len();
            if changed {
                s.load = load;
                s.members = self.members.iter().map(|m| m.name.clone()).collect();
            }
            changed
        });
    }
}

/// What the last stage made of a sequence, beside what the scheduler is told.
enum Yield {
    /// A token, with log-probabilities if they were asked for.
    Token(Option<v1::TokenLogprobs>),
    /// All that was asked for.
    Whole(Reply),
}

/// Sorts the outputs of a step by sequence.
fn outputs(
    output: Option<step_result::Output>,
) -> (Vec<(SequenceId, scheduler::Output)>, HashMap<SequenceId, Yield>) {
    let (mut outputs, mut results) = (Vec::new(), HashMap::new());
    let whole = scheduler::Output::Whole;
    match output {
        None => {}
        Some(step_result::Output::Tokens(tokens)) => {
            for token in tokens.tokens {
                outputs.push((token.sequence, scheduler::Output::Token(token.token_id)));
                results.insert(token.sequence, Yield::Token(token.logprobs));
            }
        }
        Some(step_result::Output::Vectors(vectors)) => {
            for vector in vectors.vectors {
                outputs.push((vector.sequence, whole));
                results.insert(vector.sequence, Yield::Whole(Reply::Vector(vector.values)));
            }
        }
        Some(step_result::Output::Guesses(guesses)) => {
            let mut masks: BTreeMap<SequenceId, Vec<_>> = BTreeMap::new();
            for guess in guesses.guesses {
                masks.entry(guess.sequence).or_default().push(guess.top);
            }
            for (sequence, masks) in masks {
                outputs.push((sequence, whole));
                results.insert(sequence, Yield::Whole(Reply::Guesses(masks)));
            }
        }
    }
    (outputs, results)
}

/// A generation as the scheduler sees it, and its answer; it arrived at `arrived` on the engine's clock.
fn generation(request: Checked, arrived: Duration) -> (scheduler::Request, Option<Answer>) {
    let prompt_tokens = request.prompt.len() as u32;
    let sampling = v1::RowSampling {
        sampling: Some(request.sampling),
        seed: request.seed,
        prompt_tokens,
        logprobs: request.logprobs,
    };
    let work = scheduler::Work::Generate { max_tokens: request.max_tokens, eos: request.eos, sampling };
    let asked =
        scheduler::Request { prompt: request.prompt, deadline: request.deadline.map(|d| arrived + d), work };
    (asked, Some(Answer { text: TextStream::new(request.stop), prompt_tokens, generated: 0 }))
}

fn finish_answer(live: Live, reason: FinishReason, tokenizer: &Tokenizer) {
    let Some(Answer { text, prompt_tokens, generated }) = live.answer else { return };
    // After a stop string, what was held back is behind it.
    let rest = match reason {
        FinishReason::Stop => Ok(String::new()),
        _ => text.finish(tokenizer),
    };
    let reply = match rest {
        Ok(text) => {
            let usage = v1::Usage { prompt_tokens, completion_tokens: generated };
            let finished = v1::Finished { reason: reason as i32, usage: Some(usage), text };
            Reply::Event(generate_event::Event::Finished(finished))
        }
        Err(error) => {
            tracing::error!(%error, "cannot decode the end of an answer");
            Reply::Failed(EngineError::Internal)
        }
    };
    // A receiver that is gone needs no telling.
    let _ = live.reply.send(reply);
}

fn scheduler_config(
    deployment: &Deployment,
    limits: &Limits,
    profile: &ModelProfile,
    blocks: u32,
    stages: u32,
) -> scheduler::Config {
    scheduler::Config {
        blocks,
        block_tokens: strata_proto::BLOCK_TOKENS,
        max_step_tokens: deployment.max_step_tokens,
        max_step_rows: deployment.max_step_rows,
        prefill_chunk: limits.prefill_chunk,
        // One step for each stage, and one more that hides the way back to the coordinator.
        depth: if stages > 1 { stages + 1 } else { 1 },
        rope_switch: profile.recompute_at,
    }
}
