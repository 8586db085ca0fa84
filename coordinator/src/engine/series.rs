//! What is measured of steps and stages.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use strata_proto::{Replica, StagePlan};
use tokio::time::Instant;

use crate::metrics::{Bounds, OfModel};

/// Bounds of a step's tokens.
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
/// Of a step's time, in seconds.
const STEP: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Of the time without any pipeline, in seconds.
const GAP: &[f64] = &[0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0];

type Seconds = Counter<f64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfPipeline {
    pub pipeline: u32,
}

/// A stage of a pipeline, and where it runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfStage {
    pub pipeline: u32,
    pub stage: usize,
    pub worker: String,
    pub device: String,
}

impl OfStage {
    /// Each stage of a pipeline.
    pub fn all(pipeline: u32, replica: &Replica) -> Vec<OfStage> {
        let of = |(stage, at): (usize, &StagePlan)| OfStage {
            pipeline,
            stage,
            worker: at.worker.clone(),
            device: at.device.clone(),
        };
        replica.stages.iter().enumerate().map(of).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfWorker {
    worker: String,
}

/// What is measured of all engines of a coordinator.
#[derive(Debug)]
pub(crate) struct Series {
    step_tokens: Family<OfModel, Histogram, Bounds>,
    step_seconds: Family<OfPipeline, Histogram, Bounds>,
    busy: Family<OfStage, Seconds>,
    steps: Family<OfStage, Counter>,
    losses: Family<OfWorker, Counter>,
    pipelines: Counter,
    gaps: Histogram,
    made: Instant,
    /// When an engine last went around its loop, in milliseconds from when this was made; 0 while there is none.
    turned: AtomicU64,
}

impl Series {
    /// Registers it.
    pub fn new(registry: &mut Registry) -> Self {
        let series = Series {
            step_tokens: Family::new_with_constructor(Bounds(STEP_TOKENS)),
            step_seconds: Family::new_with_constructor(Bounds(STEP)),
            busy: Family::default(),
            steps: Family::default(),
            losses: Family::default(),
            pipelines: Counter::default(),
            gaps: Histogram::new(GAP.iter().copied()),
            made: Instant::now(),
            turned: AtomicU64::new(0),
        };
        let r = registry;
        r.register("vllm:iteration_tokens_total", "Tokens of each step", series.step_tokens.clone());
        r.register(
            "strata_step_seconds",
            "From a step's issue to its result, through all stages",
            series.step_seconds.clone(),
        );
        r.register("strata_stage_busy_seconds", "Time that a stage computed", series.busy.clone());
        r.register("strata_stage_steps", "Steps that a stage computed", series.steps.clone());
        r.register("strata_worker_losses", "Pipelines that ended because of a worker", series.losses.clone());
        r.register("strata_pipelines_started", "Pipelines that came up", series.pipelines.clone());
        r.register(
            "strata_recovery_gap_seconds",
            "Time without any pipeline, after the last one was lost",
            series.gaps.clone(),
        );
        series
    }

    /// A step of so many tokens is on its way.
    pub fn issued(&self, model: &str, tokens: usize) {
        self.step_tokens.get_or_create(&OfModel::new(model)).observe(tokens as f64);
    }

    /// A step has its result.
    pub fn committed(&self, pipeline: u32, took: Duration) {
        self.step_seconds.get_or_create(&OfPipeline { pipeline }).observe(took.as_secs_f64());
    }

    /// A stage computed its part of a step.
    pub fn computed(&self, stage: &OfStage, took: Duration) {
        self.busy.get_or_create(stage).inc_by(took.as_secs_f64());
        self.steps.get_or_create(stage).inc();
    }

    /// A pipeline ended because of a worker.
    pub fn lost(&self, worker: &str) {
        self.losses.get_or_create(&OfWorker { worker: worker.to_owned() }).inc();
    }

    /// A pipeline came up; for how long there was none, if one was lost.
    pub fn came_up(&self, gap: Option<Duration>) {
        self.pipelines.inc();
        gap.into_iter().for_each(|gap| self.gaps.observe(gap.as_secs_f64()));
    }

    /// An engine goes around its loop.
    pub fn turn(&self) {
        let now = u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.turned.store(now.max(1), Ordering::Relaxed);
    }

    /// An engine has ended.
    pub fn ended(&self) {
        self.turned.store(0, Ordering::Relaxed);
    }

    /// How long ago an engine last went around its loop; none while there is none.
    pub fn since_turn(&self) -> Option<Duration> {
        match self.turned.load(Ordering::Relaxed) {
            0 => None,
            at => Some(self.made.elapsed().saturating_sub(Duration::from_millis(at))),
        }
    }
}
