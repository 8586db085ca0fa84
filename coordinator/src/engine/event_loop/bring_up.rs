//! How replicas get their pipelines: what is planned once, brought up, lost, and brought up again.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use strata_proto::{Plan, error::Kind, v1::Fence};
use tokio::time::Instant;

use super::{Engine, RETRY_EVERY, TICK};
use crate::{
    cluster::{
        PipelineError,
        discovery::{Discovery, Planned, discover_enough},
        pipeline::{LoadUpdate, Pipeline},
    },
    engine::{
        budget::PrefillBudget,
        error::EngineError,
        messages::{Event, Notice},
        replica::{self, Replica, State},
        series::OfStage,
        snapshot::Loading,
    },
    planner::Offer,
};

/// How long workers have to describe the model again, if what the others have is enough.
pub(super) const PATIENCE: Duration = Duration::from_millis(500);

impl Engine {
    /// The live incarnation of a replica is over: its sequences go to other replicas, or wait for its next one.
    /// `what` became of a worker, or of its stage.
    pub(super) fn lost(&mut self, at: usize, worker: &str, what: &str) {
        tracing::warn!("worker {worker} {what}; planning anew");
        let replica = &mut self.replicas[at];
        let down = State::Down { retry: Instant::now() };
        let State::Up(pipeline) = std::mem::replace(&mut replica.state, down) else { return };
        replica.last = replica.plan.take();
        replica.ends_with = None;
        self.series.lost(worker);
        replica::move_away(&mut self.replicas, at);
        if !self.replicas.iter().any(Replica::is_up) {
            self.down_since = Some(Instant::now());
        }
        self.show_replicas(format!("worker {worker} {what}"));
        self.bring_up(at, Some((pipeline, Some(worker.to_owned()))), None);
    }

    /// Adds a replica and tries to bring a pipeline up for it, over devices that it has by a plan, or is to find; its
    /// number.
    pub(super) fn add_replica(&mut self, known: Option<Planned>) -> u32 {
        let others = self.claim.others();
        let is_free = |n: &u32| {
            self.replicas.iter().all(|replica| replica.number != *n)
                && others.iter().all(|(other, _)| other != n)
        };
        let number = (0..).find(is_free).unwrap_or(0);
        self.replicas.push(Replica::new(
            number,
            self.scheduler_config(0, 0, 1),
            PrefillBudget::new(self.limits.inter_token),
        ));
        self.bring_up(self.replicas.len() - 1, None, known);
        number
    }

    /// Adds a replica over what has joined since devices were last looked for: they may hold another copy. If not, it
    /// goes again. It waits until all others are up, as they may be looking for devices.
    pub(super) fn try_another(&mut self) {
        let is_full = self.deployment.replicas.is_some_and(|most| self.replicas.len() >= most as usize);
        if self.joined && self.changes.is_empty() && self.replicas.iter().all(Replica::is_up) {
            self.joined = false;
            if !is_full {
                self.add_replica(None);
            }
        }
    }

    /// Starts a task that ends `old`, of which a worker may be lost, and brings a new incarnation of a replica up: by a plan,
    /// or by one that it makes over the devices that no other replica has.
    pub(super) fn bring_up(
        &mut self,
        at: usize,
        old: Option<(Pipeline, Option<String>)>,
        known: Option<Planned>,
    ) {
        let others_plan = || self.replicas.iter().enumerate().any(|(i, r)| i != at && r.is_planning());
        if known.is_none() && others_plan() {
            // Two that look for devices at once might find the same.
            self.replicas[at].state = State::Down { retry: Instant::now() + TICK };
            if let Some((old, lost)) = old {
                tokio::spawn(async move { old.abort().abort(lost.as_deref()).await });
            }
            return;
        }
        let incarnation = self.incarnations.fetch_add(1, Ordering::Relaxed) + 1;
        let taken: Vec<_> = self.replicas.iter().filter_map(|replica| replica.plan.clone()).collect();
        let foreign = self.claim.plans_of_others();
        let replica = &mut self.replicas[at];
        // Whose sequences no other replica can run takes whatever holds the model.
        let further = !taken.is_empty() && replica.load() == 0;
        replica.state = State::BringingUp { incarnation, lost: false };
        let fence = Fence { term: self.term, pipeline: replica.number, incarnation };
        if let Some(known) = &known {
            self.takes(at, known.plan.clone());
        }
        let last = self.replicas[at].last.as_ref().and_then(|plan| plan.replicas.first().cloned());
        let members = self.plannable();
        let (profile, deployment) = (self.profile.clone(), self.deployment.clone());
        let (events, observer, history) = (self.handle.clone(), self.observer.clone(), self.history.clone());
        let sink_events = events.clone();
        let sink = Arc::new(move |incarnation, event| {
            let _ = sink_events.send(Event::Pipeline(incarnation, event));
        });
        let progress_events = events.clone();
        let progress = Arc::new(move |update| {
            observer(Notice::Loading(update));
            let _ = progress_events.send(Event::Loading(incarnation, update));
        });
        tokio::spawn(async move {
            if let Some((old, lost)) = old {
                old.abort().abort(lost.as_deref()).await;
            }
            let outcome = async {
                let planned = match known {
                    Some(known) => known,
                    None => {
                        let mine = |found: &mut Discovery| {
                            found.leave_out(&taken);
                            found.leave_out(&foreign);
                            if further {
                                found.offers.retain(Offer::may_hold_further);
                                found.hold_back(deployment.standbys);
                            }
                        };
                        let planned = |found: &Discovery| match &last {
                            Some(last) => found.plan_again(&deployment, last),
                            None => found.plan(&deployment),
                        };
                        let fits = |mut found: Discovery| {
                            mine(&mut found);
                            planned(&found).is_ok()
                        };
                        let asked = discover_enough(&members, &deployment, Some(&profile), PATIENCE, fits);
                        let mut found = asked.await?;
                        mine(&mut found);
                        let plan = planned(&found).map_err(|e| e.without(found.left_out.clone()))?;
                        let plan = plan.into();
                        let planned = Planned { plan, found: found.into() };
                        let _ = events.send(Event::Planned(incarnation, planned.clone()));
                        planned
                    }
                };
                let Planned { found, plan } = &planned;
                Pipeline::bring_up(found, plan, fence, progress, sink, &deployment, &history).await
            };
            let outcome = outcome.await;
            let _ = events.send(Event::BroughtUp(incarnation, Box::new(outcome)));
        });
    }

    /// A replica has found devices. What the same plan makes of those that are left over becomes replicas that wait for
    /// devices, or further ones.
    pub(super) fn planned(&mut self, incarnation: u64, planned: &Planned) {
        for (worker, why) in &planned.found.left_out {
            tracing::warn!(worker, "{why}; planning without it");
        }
        self.undescribed.clone_from(&planned.found.left_out);
        self.show_left_out();
        let Some(at) = self.replicas.iter().position(|replica| replica.has(incarnation)) else { return };
        if self.replicas.len() == 1 {
            self.show_plan(&planned.plan);
        }
        let mut replicas = planned.replicas();
        if let Some(own) = replicas.next() {
            self.takes(at, own.plan);
        }
        let most = self.deployment.replicas.map_or(usize::MAX, |most| most as usize);
        for further in replicas {
            if self.replicas.iter().filter(|replica| replica.is_up_or_coming()).count() >= most {
                break;
            }
            match self.replicas.iter().position(|replica| matches!(replica.state, State::Down { .. })) {
                Some(at) => self.bring_up(at, None, Some(further)),
                None => {
                    self.add_replica(Some(further));
                }
            }
        }
    }

    /// Tells whoever waits for the server what is about to be loaded.
    pub(super) fn show_plan(&self, plan: &Arc<Plan>) {
        (self.observer)(Notice::Planned(plan.clone()));
        plan.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    }

    /// A replica is brought up by a plan of its own from now on.
    fn takes(&mut self, at: usize, plan: Arc<Plan>) {
        let replica = &mut self.replicas[at];
        let (pipeline, stages) = (replica.number, plan.replicas.iter().flat_map(|r| &r.stages));
        let loading = stages.enumerate().map(|(stage, planned)| Loading {
            pipeline,
            stage,
            worker: planned.worker.clone(),
            device: planned.device.clone(),
            layers: planned.layers,
            bytes_read: 0,
            bytes_total: 0,
        });
        self.snapshot.send_modify(|s| {
            s.loading.retain(|l| l.pipeline != pipeline);
            s.loading.extend(loading);
        });
        replica.plan = Some(plan);
    }

    pub(super) fn loading(&self, incarnation: u64, update: LoadUpdate) {
        if !self.replicas.iter().any(|replica| replica.has(incarnation)) {
            return;
        }
        self.snapshot.send_modify(|s| {
            let of = |l: &&mut Loading| (l.pipeline, l.stage) == (update.pipeline, update.stage);
            if let Some(loading) = s.loading.iter_mut().find(of) {
                (loading.bytes_read, loading.bytes_total) = (update.bytes_read, update.bytes_total);
            }
        });
    }

    pub(super) fn brought_up(&mut self, incarnation: u64, outcome: Result<Pipeline, PipelineError>) {
        let Some(at) = self.replicas.iter().position(|replica| replica.has(incarnation)) else { return };
        let lost = matches!(self.replicas[at].state, State::BringingUp { lost: true, .. });
        let number = self.replicas[at].number;
        self.snapshot.send_modify(|s| s.loading.retain(|l| l.pipeline != number));
        match outcome {
            Ok(pipeline) => {
                let planned = pipeline.replica();
                let blocks = planned.kv_capacity_tokens / u64::from(strata_proto::BLOCK_TOKENS);
                let stages = planned.stages.len();
                let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
                let config = self.scheduler_config(blocks, planned.state_slots, stages as u32);
                let replica = &mut self.replicas[at];
                for id in replica.scheduler.restart(config) {
                    let message = "the cache that is left is too small for this request".to_owned();
                    self.fail(id, EngineError::Refused { message, kind: Kind::NoCapacity });
                }
                tracing::info!(fence = %pipeline.fence(), stages, "a pipeline is up");
                self.replicas[at].stages = OfStage::all(number, pipeline.replica());
                self.replicas[at].state = State::Up(pipeline);
                self.replicas[at].budget = PrefillBudget::new(self.limits.inter_token);
                self.replicas[at].issued.clear();
                let was_up = self.first.is_none();
                let gap = self.down_since.take().filter(|_| was_up).map(|since| since.elapsed());
                self.series.came_up(gap);
                self.standbys_due = true;
                let serving = self.replicas[at].plan.iter().flat_map(|plan| &plan.replicas);
                let serving: Vec<_> = serving.flat_map(|r| &r.stages).map(|s| s.worker.clone()).collect();
                serving.iter().for_each(|worker| self.left_out.forgive(worker));
                self.show_left_out();
                self.show_replicas(String::new());
                if let Some(first) = self.first.take() {
                    let _ = first.send(Ok(()));
                }
                if lost {
                    self.lost(at, "of the new pipeline", "broke as it came up");
                }
            }
            Err(error) => self.failed(at, error),
        }
    }

    /// A replica has no pipeline, for this reason. What failed on one worker is tried at once without it.
    fn failed(&mut self, at: usize, error: PipelineError) {
        let now = Instant::now();
        let stale = error.newest_term().filter(|term| *term > self.term);
        if let (Some(term), Some(worker)) = (stale, error.worker()) {
            self.deposed = Some(format!("worker {worker} follows a leader of a later term, {term}"));
            return;
        }
        let mut retry = RETRY_EVERY;
        if self.take_back(self.replicas[at].number, &error) {
            retry = Duration::ZERO;
        } else if let Some(worker) = error.worker() {
            tracing::warn!(worker, "left out of plans: {}", error.reason());
            self.left_out.failed(worker, error.reason(), now);
            self.show_left_out();
            if self.members.answering().iter().any(|member| !self.left_out.has(&member.name, now)) {
                retry = Duration::ZERO;
            }
        }
        let left_out = match error.worker() {
            Some(_) => BTreeMap::new(),
            None => self.left_out.reasons(),
        };
        let error = error.without(left_out);
        let replica = &mut self.replicas[at];
        replica.plan = None;
        if retry > Duration::ZERO {
            replica.last = None;
        }
        replica.state = State::Down { retry: now + retry };
        if retry > Duration::ZERO {
            // It may never come up: there may be devices for the others alone.
            replica::move_away(&mut self.replicas, at);
        }
        let replica = &self.replicas[at];
        if replica.load() == 0 && self.replicas.iter().any(Replica::is_up_or_coming) && retry > Duration::ZERO
        {
            tracing::info!(%error, "a replica less than there might be");
            self.replicas.remove(at);
            return;
        }
        // It is tried again and again; what is said already is said.
        if self.snapshot.borrow().down != error.to_string() {
            tracing::warn!(%error, "no pipeline came up");
        }
        if !self.replicas.iter().any(Replica::is_up) {
            self.show_replicas(error.to_string());
        }
        if retry > Duration::ZERO
            && let Some(first) = self.first.take()
        {
            let _ = first.send(Err(error));
        }
    }

    /// Shows which members are left out of plans, and why.
    pub(super) fn show_left_out(&self) {
        let mut left_out = self.undescribed.clone();
        left_out.extend(self.left_out.reasons());
        self.snapshot.send_if_modified(|s| {
            let changed = s.left_out != left_out;
            s.left_out = left_out;
            changed
        });
    }

    /// Shows which pipelines are up, and why none is.
    pub(super) fn show_replicas(&self, reason: String) {
        let up = self.replicas.iter().filter_map(|replica| match &replica.state {
            State::Up(pipeline) => Some((pipeline, replica.plan.as_ref()?)),
            _ => None,
        });
        let up: Vec<_> = up.collect();
        let replicas = up.iter().map(|(pipeline, _)| pipeline.replica().clone()).collect();
        self.snapshot.send_modify(|s| {
            s.up = !up.is_empty();
            s.capacity = up.iter().map(|(p, _)| p.replica().kv_capacity_tokens).max().unwrap_or(0);
            let Some((pipeline, plan)) = up.first() else {
                s.down = reason;
                return;
            };
            s.down.clear();
            s.plan = Some(Arc::new(Plan { replicas, ..Plan::clone(plan) }));
            s.fence = pipeline.fence();
            s.weights = self.history.weights.lock().unwrap_or_else(PoisonError::into_inner).root();
        });
    }
}
