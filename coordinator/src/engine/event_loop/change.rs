//! Changing what replicas run on while they run. What the next plan needs is loaded first, on devices on which nothing runs;
//! then pipelines change over, and what they were computing goes on as after a loss.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use strata_proto::{Plan, StagePlan, v1::Fence};
use tokio::time::Instant;

use super::{Engine, bring_up::PATIENCE, standby::NO_PIPELINE};
use crate::{
    cluster::{
        PipelineError,
        discovery::{Discovery, Planned, discover_enough},
        pipeline::Pipeline,
        relocation::{self, Current, Target, stages},
    },
    config::Deployment,
    engine::{
        change::{Change, ChangeError, ChangeReply},
        messages::Event,
        replica::{self, Replica, State},
    },
};

/// How long a change waits until nothing else is going on.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often another member is tried where one could not load.
const TRIES: u32 = 3;

/// A change that was asked for. One at a time is at work.
pub(super) struct Changing {
    change: Change,
    /// Nobody, if a worker says that it is about to end.
    reply: Option<ChangeReply>,
    phase: Phase,
    begun: Instant,
    tries: u32,
}

enum Phase {
    /// Until nothing else is going on.
    Waiting,
    /// A task plans and loads.
    Preparing { number: u64, current: Vec<Current> },
    /// These replicas have changed over, and come up; what was deployed before.
    ComingUp { replicas: Vec<u32>, before: Box<Deployment> },
}

impl Engine {
    pub(super) fn change(&mut self, change: Change, reply: Option<ChangeReply>) {
        let (phase, begun) = (Phase::Waiting, Instant::now());
        self.changes.push_back(Changing { change, reply, phase, begun, tries: 0 });
    }

    /// Goes on with the changes that were asked for, as far as that is possible now.
    pub(super) fn go_on(&mut self) {
        while let Some(first) = self.changes.front() {
            match &first.phase {
                Phase::Preparing { .. } => return,
                Phase::ComingUp { replicas, .. } => {
                    let is_up = |number: &u32| self.replicas.iter().any(|r| r.number == *number && r.is_up());
                    if !replicas.iter().all(is_up) {
                        return;
                    }
                    self.changed(Ok(()));
                }
                Phase::Waiting => {
                    let is_left = |worker: &str| !self.replicas.iter().any(|r| r.is_planned_on(worker));
                    let is_planning = self.replicas.iter().any(Replica::is_planning);
                    match &first.change {
                        Change::Leave(worker) if is_left(worker) && !is_planning => self.changed(Ok(())),
                        _ if self.replicas.iter().all(Replica::is_up) => return self.prepare(),
                        _ if first.begun.elapsed() > SETTLE_TIMEOUT => {
                            self.changed(Err(ChangeError::Unsettled))
                        }
                        _ => return,
                    }
                }
            }
        }
    }

    /// Leaves workers that are about to end, where what had begun has ended.
    pub(super) fn leave_idle(&mut self) {
        let is_due = |replica: &Replica| replica.ends_with.is_some() && replica.scheduler.is_idle();
        while let Some(at) = self.replicas.iter().position(is_due) {
            if let Some(worker) = self.replicas[at].ends_with.take() {
                self.lost(at, &worker, "is about to end");
            }
        }
    }

    /// The first change has come to an end.
    fn changed(&mut self, outcome: Result<(), ChangeError>) {
        let Some(Changing { change, reply, .. }) = self.changes.pop_front() else { return };
        if let Err(error) = &outcome {
            tracing::warn!("{error}");
        }
        // A worker that ends cannot be kept, but has some time: what has begun on it may end.
        if let (Change::Leave(worker), None, Err(_)) = (&change, &reply, &outcome) {
            for replica in self.replicas.iter_mut().filter(|replica| replica.uses(worker)) {
                replica.scheduler.close();
                replica.ends_with = Some(worker.clone());
            }
        }
        if let Some(reply) = reply {
            // Who asked may have gone.
            let _ = reply.send(outcome);
        }
        self.standbys_due = true;
    }

    /// Starts a task that plans the first change, and loads what it can while everything runs on.
    fn prepare(&mut self) {
        let number = self.incarnations.fetch_add(1, Ordering::Relaxed) + 1;
        let current: Vec<Current> = self.replicas.iter().filter_map(current).collect();
        let (members, profile) = (self.plannable(), self.profile.clone());
        let Some(first) = self.changes.front_mut() else { return };
        let (change, theirs) = (first.change.clone(), current.clone());
        first.phase = Phase::Preparing { number, current };
        let deployment = match &change {
            Change::Deploy(deployment) => Deployment::clone(deployment),
            _ => self.deployment.clone(),
        };
        let foreign = self.claim.plans_of_others();
        let (events, history, term) = (self.handle.clone(), self.history.clone(), self.term);
        tokio::spawn(async move {
            let plan = |mut found: Discovery| {
                found.leave_out(&foreign);
                match &change {
                    Change::Leave(worker) => relocation::without(worker, found, &theirs, &deployment),
                    Change::Deploy(_) => relocation::best(found, &theirs, &deployment),
                }
            };
            let prepared = async {
                let enough = |found| plan(found).is_ok();
                let found = discover_enough(&members, &deployment, Some(&profile), PATIENCE, enough).await?;
                let target = plan(found)?;
                let is_free = |stage: &StagePlan| {
                    let mut taken = theirs.iter().flat_map(|current| stages(&current.plan));
                    !taken.any(|s| (&s.worker, &s.device) == (&stage.worker, &stage.device))
                };
                let fence = Fence { term, pipeline: NO_PIPELINE, incarnation: number };
                let loads = target
                    .plans()
                    .map(|plan| Pipeline::preload((&target.found, plan), fence, is_free, &|_| {}, &history));
                futures::future::try_join_all(loads).await?;
                Ok(target)
            };
            let prepared = prepared.await;
            // An engine that has ended changes nothing.
            let _ = events.send(Event::Prepared(number, Box::new(prepared)));
        });
    }

    /// What a change needs is loaded, or cannot be.
    pub(super) fn prepared(&mut self, number: u64, prepared: Result<Target, PipelineError>) {
        let Some(Changing { change, phase, tries, .. }) = self.changes.front_mut() else { return };
        let Phase::Preparing { number: asked, current } = &*phase else { return };
        if *asked != number {
            return;
        }
        let runs_on = |c: &Current| {
            let is_it = |r: &Replica| r.number == c.number && r.is_up() && r.has(c.incarnation);
            self.replicas.iter().any(is_it)
        };
        // A pipeline was lost meanwhile, or one has come up: then nothing of this is right any more.
        let is_as_planned = current.len() == self.replicas.len() && current.iter().all(runs_on);
        let error = match prepared {
            Ok(target) if is_as_planned => {
                return match self.too_small(&target) {
                    None => self.change_over(target),
                    Some(error) => self.changed(Err(error)),
                };
            }
            Ok(_) => {
                *phase = Phase::Waiting;
                return;
            }
            Err(error) => error,
        };
        if let Some(worker) = error.worker() {
            *tries += 1;
            self.left_out.failed(worker, error.reason(), Instant::now());
            if *tries < TRIES {
                *phase = Phase::Waiting;
                return self.show_left_out();
            }
        }
        let why = match change {
            Change::Leave(worker) => ChangeError::Needed { worker: worker.clone(), why: error },
            Change::Deploy(_) => ChangeError::Failed(error),
        };
        self.show_left_out();
        self.changed(Err(why));
    }

    /// What is wrong with the caches of a target, if they are too small for what their replicas compute.
    fn too_small(&self, target: &Target) -> Option<ChangeError> {
        let room = |plan: &Plan| plan.replicas.first().map_or(0, |planned| planned.kv_capacity_tokens);
        let planned = |replica: &Replica| {
            let changed = target.changed.iter().find(|(number, _)| *number == replica.number);
            changed.map(|(_, plan)| plan.clone()).or_else(|| replica.plan.clone())
        };
        let stays = |replica: &&Replica| !target.retired.contains(&replica.number);
        let left = self.replicas.iter().filter(stays).filter_map(planned);
        let roomiest = left.chain(target.added.iter().cloned()).map(|plan| room(&plan)).max().unwrap_or(0);
        self.replicas.iter().find_map(|replica| {
            let needed = replica.scheduler.largest();
            let room = match stays(&replica) {
                true => planned(replica).map_or(0, |plan| room(&plan)),
                false => roomiest,
            };
            (needed > room).then_some(ChangeError::TooSmall { needed, room })
        })
    }

    /// Ends the pipelines that are to change, and brings up what is to take their places.
    fn change_over(&mut self, target: Target) {
        let Target { found, changed, added, retired } = target;
        let before = Box::new(self.deployment.clone());
        let Some(Changing { change, .. }) = self.changes.front_mut() else { return };
        let why = match &*change {
            Change::Leave(worker) => format!("worker {worker} is left"),
            Change::Deploy(deployment) => {
                self.deployment = Deployment::clone(deployment);
                "the members are planned over anew".to_owned()
            }
        };
        tracing::info!(
            changed = changed.len(),
            added = added.len(),
            retired = retired.len(),
            "{why}; pipelines change over"
        );
        let planned = |plan: Arc<Plan>| Planned { found: found.clone(), plan };
        let mut moving = Vec::new();
        for (number, plan) in changed {
            let Some(at) = self.replicas.iter().position(|replica| replica.number == number) else {
                continue;
            };
            let replica = &mut self.replicas[at];
            let down = State::Down { retry: Instant::now() };
            let State::Up(old) = std::mem::replace(&mut replica.state, down) else { continue };
            replica.last = replica.plan.take();
            moving.push((number, old, planned(plan)));
        }
        for (number, ..) in &moving {
            if let Some(at) = self.replicas.iter().position(|replica| replica.number == *number) {
                replica::move_away(&mut self.replicas, at);
            }
        }
        if !self.replicas.iter().any(Replica::is_up) {
            self.down_since = Some(Instant::now());
        }
        let mut coming = Vec::new();
        for (number, old, planned) in moving {
            coming.push(number);
            if let Some(at) = self.replicas.iter().position(|replica| replica.number == number) {
                self.bring_up(at, Some((old, None)), Some(planned));
            }
        }
        for plan in added {
            coming.push(self.add_replica(Some(planned(plan))));
        }
        for number in retired {
            let Some(at) = self.replicas.iter().position(|replica| replica.number == number) else {
                continue;
            };
            let down = State::Down { retry: Instant::now() };
            let old = std::mem::replace(&mut self.replicas[at].state, down);
            replica::hand_over(&mut self.replicas, at);
            self.replicas.remove(at);
            if let State::Up(old) = old {
                tokio::spawn(async move { old.abort().abort(None).await });
            }
        }
        self.show_replicas(why);
        if let Some(first) = self.changes.front_mut() {
            first.phase = Phase::ComingUp { replicas: coming, before };
        }
    }

    /// A replica did not come up: if that is since another deployment was asked for, there is the one before again.
    pub(super) fn take_back(&mut self, number: u32, error: &PipelineError) -> bool {
        let Some(Changing { change: Change::Deploy(_), phase: Phase::ComingUp { replicas, before }, .. }) =
            self.changes.front()
        else {
            return false;
        };
        if !replicas.contains(&number) {
            return false;
        }
        self.deployment = Deployment::clone(before);
        self.changed(Err(ChangeError::Failed(error.clone())));
        true
    }
}

/// A replica that is up.
fn current(replica: &Replica) -> Option<Current> {
    let State::Up(pipeline) = &replica.state else { return None };
    let plan = replica.plan.clone()?;
    Some(Current { number: replica.number, incarnation: pipeline.fence().incarnation, plan })
}
