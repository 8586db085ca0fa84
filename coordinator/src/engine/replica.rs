//! A replica of the model as it runs: its pipeline, and the sequences that it computes.

use std::{collections::BTreeMap, sync::Arc};

use strata_proto::Plan;
use tokio::time::Instant;

use super::{budget::PrefillBudget, series::OfStage};
use crate::{
    cluster::pipeline::Pipeline,
    scheduler::{self, Scheduler},
};

/// A pipeline, or what is being done about there being none.
pub(crate) enum State {
    /// It takes steps.
    Up(Pipeline),
    /// A task is at work; `lost` if its pipeline broke before the engine took it over.
    BringingUp {
        /// Of the pipeline to come.
        incarnation: u64,
        /// It broke already.
        lost: bool,
    },
    /// To be tried again.
    Down {
        /// When.
        retry: Instant,
    },
}

/// One replica of the model. The plan's word for it, `strata_proto::Replica`, is what its pipeline was brought up by.
pub(crate) struct Replica {
    /// Which pipeline it is in fences; never reused while another has it.
    pub number: u32,
    pub state: State,
    pub scheduler: Scheduler,
    /// How fast its pipeline is.
    pub budget: PrefillBudget,
    /// What it runs by, or is being brought up by, and nobody else: a plan of this replica alone.
    pub plan: Option<Arc<Plan>>,
    /// What it ran by last: the next plan leaves as much as it can as it was.
    pub last: Option<Arc<Plan>>,
    /// A worker of its pipeline that is about to end, and cannot be spared.
    pub ends_with: Option<String>,
    /// The stages of its pipeline.
    pub stages: Vec<OfStage>,
    /// When steps were issued that have no result yet.
    pub issued: BTreeMap<u64, Instant>,
}

impl Replica {
    pub fn new(number: u32, config: scheduler::Config, budget: PrefillBudget) -> Self {
        let state = State::Down { retry: Instant::now() };
        Replica {
            number,
            state,
            scheduler: Scheduler::new(config),
            budget,
            plan: None,
            last: None,
            ends_with: None,
            stages: Vec::new(),
            issued: BTreeMap::new(),
        }
    }

    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    pub fn is_up_or_coming(&self) -> bool {
        matches!(self.state, State::Up(_) | State::BringingUp { .. })
    }

    /// Whether its pipeline is, or is going to be, of this incarnation.
    pub fn has(&self, incarnation: u64) -> bool {
        match &self.state {
            State::Up(pipeline) => pipeline.fence().incarnation == incarnation,
            State::BringingUp { incarnation: coming, .. } => *coming == incarnation,
            State::Down { .. } => false,
        }
    }

    /// Whether it runs on `worker`, or is going to.
    pub fn is_planned_on(&self, worker: &str) -> bool {
        self.plan.iter().flat_map(|plan| &plan.replicas).flat_map(|r| &r.stages).any(|s| s.worker == worker)
    }

    /// Whether a stage of its live pipeline is on `worker`.
    pub fn uses(&self, worker: &str) -> bool {
        match &self.state {
            State::Up(pipeline) => pipeline.replica().stages.iter().any(|s| s.worker == worker),
            _ => false,
        }
    }

    /// Whether it is looking for devices.
    pub fn is_planning(&self) -> bool {
        matches!(self.state, State::BringingUp { .. }) && self.plan.is_none()
    }

    /// Sequences that it has.
    pub fn load(&self) -> u32 {
        let stats = self.scheduler.stats();
        stats.running + stats.waiting
    }
}

/// Gives all that `from` has to a replica that is to run it, whether or not that is up yet: the least busy of those that
/// are and could; if none is, the one that is going to have the largest cache.
pub(crate) fn hand_over(replicas: &mut [Replica], from: usize) {
    move_away(replicas, from);
    let room = |replica: &Replica| {
        let planned = replica.plan.as_ref().and_then(|plan| plan.replicas.first());
        (replica.is_up_or_coming(), planned.map_or(0, |planned| planned.kv_capacity_tokens))
    };
    let Some(to) = (0..replicas.len()).filter(|i| *i != from).max_by_key(|i| room(&replicas[*i])) else {
        return;
    };
    for sequence in replicas[from].scheduler.surrender() {
        replicas[to].scheduler.adopt(sequence);
    }
}

/// Gives what `from` can no longer compute to the least busy of the replicas that are up and could; what fits nowhere
/// else stays.
pub(crate) fn move_away(replicas: &mut [Replica], from: usize) {
    let mut others: Vec<usize> = (0..replicas.len()).filter(|i| *i != from && replicas[*i].is_up()).collect();
    if others.is_empty() {
        return;
    }
    for sequence in replicas[from].scheduler.surrender() {
        others.sort_by_key(|i| (replicas[*i].scheduler.is_closed(), replicas[*i].load()));
        let home = others.iter().copied().find(|i| replicas[*i].scheduler.check(&sequence).is_ok());
        replicas[home.unwrap_or(from)].scheduler.adopt(sequence);
    }
}
