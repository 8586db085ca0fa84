//! What a coordinator shows of itself on its port for operators.

use std::{fmt, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};
use strata_proto::{Forecast, json, port::admin::Admin, v1};

use super::Coordinator;
use crate::{
    engine::{OfStage, Snapshot, State},
    metrics::OfModel,
};

/// An engine that has not gone around its loop for so long stands still: it does so twenty times a second.
const STANDS_STILL: Duration = Duration::from_secs(30);

impl Admin for Coordinator {
    fn metrics(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode_registry(&mut out, &self.shared.registry)?;
        text::encode_registry(&mut out, &self.now())?;
        text::encode_eof(&mut out)?;
        Ok(out)
    }

    fn live(&self) -> Result<(), String> {
        match self.shared.series.since_turn() {
            Some(since) if since > STANDS_STILL => Err(format!("the engine stands still, since {since:.0?}")),
            _ => Ok(()),
        }
    }

    fn started(&self) -> Result<(), String> {
        let snapshot = self.shared.snapshot.borrow();
        match snapshot.state {
            State::Serving | State::Draining => Ok(()),
            // One that stands by has started: it may do so for months.
            State::Standby if snapshot.fence.term > 0 => Ok(()),
            State::Standby | State::Starting => Err(snapshot.reason()),
        }
    }

    fn ready(&self) -> Result<(), String> {
        let snapshot = self.shared.snapshot.borrow();
        if snapshot.ready() { Ok(()) } else { Err(snapshot.reason()) }
    }

    fn status(&self) -> BoxFuture<'_, String> {
        async { json("StatusResponse", &Coordinator::status(self).await) }.boxed()
    }

    fn plan(&self) -> Option<String> {
        let plan = self.shared.snapshot.borrow().plan.clone()?;
        Some(json("Plan", &v1::Plan::from(&*plan)))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfState {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStreams {
    pipeline: u32,
    streams: String,
}

/// How a cache is laid out, as vLLM tells it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cache {
    engine: &'static str,
    model_name: String,
    block_size: u32,
    num_gpu_blocks: u64,
    cache_dtype: String,
    kv_cache_size_tokens: u64,
}

type Float = Gauge<f64, std::sync::atomic::AtomicU64>;

impl Coordinator {
    /// What is counted and measured elsewhere, as it is now.
    fn now(&self) -> Registry {
        let mut registry = Registry::default();
        let snapshot = self.shared.snapshot.borrow().clone();
        of_load(&mut registry, &snapshot, &OfModel::new(&self.shared.session.model()));
        of_plan(&mut registry, &snapshot);
        self.of_members(&mut registry, &snapshot);
        registry
    }

    fn of_members(&self, registry: &mut Registry, snapshot: &Snapshot) {
        let here = self.shared.members.answering().len();
        let (drained, away) = (self.drained().len(), self.shared.members.away().len());
        let members = [
            ("answering", here),
            ("drained", drained),
            ("away", away),
            ("left_out", snapshot.left_out.len()),
        ];
        let counts = Family::<OfState, Gauge>::default();
        for (state, count) in members {
            counts.get_or_create(&OfState { state }).set(count as i64);
        }
        registry.register("strata_workers", "Workers, by how they are; one may be several of it", counts);
        let is = Family::<OfState, Gauge>::default();
        let states = [
            ("standby", State::Standby),
            ("starting", State::Starting),
            ("serving", State::Serving),
            ("draining", State::Draining),
        ];
        for (name, state) in states {
            is.get_or_create(&OfState { state: name }).set((snapshot.state == state).into());
        }
        registry.register("strata_state", "1 for what the coordinator is doing", is);
        let mut one = |name: &str, help: &str, value: u64| {
            registry.register(name, help, gauge(i64::try_from(value).unwrap_or(i64::MAX)));
        };
        one("strata_ready", "1 while requests are taken and computed at once", snapshot.ready().into());
        one("strata_requests_in_progress", "Requests in progress", self.shared.session.in_progress() as u64);
        one("strata_term", "Term of the leader whose pipeline runs, or ran last", snapshot.fence.term);
        one(
            "strata_incarnation",
            "Number of the pipeline that runs, or ran last",
            snapshot.fence.incarnation,
        );
        one(
            "strata_standby_stages",
            "Stages whose weights wait on other devices",
            snapshot.standbys.len() as u64,
        );
        let build = Info::new([("version", self.shared.config.version.clone())]);
        registry.register("strata_build", "What runs", build);
    }
}

fn gauge(value: i64) -> Gauge {
    let gauge = Gauge::default();
    gauge.set(value);
    gauge
}

/// vLLM's words for what an engine does.
fn of_load(registry: &mut Registry, snapshot: &Snapshot, of: &OfModel) {
    let load = &snapshot.load;
    let gauges = [
        ("num_requests_running", "Sequences that hold cache", f64::from(load.running)),
        ("num_requests_waiting", "Sequences that wait for cache", f64::from(load.waiting)),
        (
            "kv_cache_usage_perc",
            "Share of the cache that is in use, from 0 to 1",
            load.kv_tokens_used as f64 / load.kv_tokens_total.max(1) as f64,
        ),
    ];
    for (name, help, value) in gauges {
        let family = Family::<OfModel, Float>::default();
        family.get_or_create(of).set(value);
        registry.register(format!("vllm:{name}"), help, family);
    }
    let counters = [
        ("prompt_tokens", "Tokens of prompts", load.prompt_tokens),
        ("generation_tokens", "Tokens of answers", load.generated_tokens),
        ("num_preemptions", "Sequences that lost their cache to an older one", load.preemptions),
        ("prefix_cache_queries", "Tokens of sequences that got cache", load.prefix_queries),
        ("prefix_cache_hits", "Tokens that were in the cache already", load.prefix_hits),
    ];
    for (name, help, value) in counters {
        let family = Family::<OfModel, Counter>::default();
        family.get_or_create(of).inc_by(value);
        registry.register(format!("vllm:{name}"), help, family);
    }
    let cache = Cache {
        engine: of.engine,
        model_name: of.model_name.clone(),
        block_size: strata_proto::BLOCK_TOKENS,
        num_gpu_blocks: load.kv_tokens_total / u64::from(strata_proto::BLOCK_TOKENS),
        cache_dtype: snapshot.plan.as_ref().map(|plan| plan.dtype.to_string()).unwrap_or_default(),
        kv_cache_size_tokens: load.kv_tokens_total,
    };
    let layout = Family::<Cache, Gauge>::default();
    layout.get_or_create(&cache).set(1);
    registry.register("vllm:cache_config_info", "How the cache is laid out", layout);
    registry.register("strata_steps_in_flight", "Steps on their way", gauge(load.steps_in_flight.into()));
    let steps = Counter::<u64>::default();
    steps.inc_by(load.steps);
    registry.register("strata_steps", "Steps that were committed or failed", steps);
}

/// What each stage holds, and what was predicted of it.
fn of_plan(registry: &mut Registry, snapshot: &Snapshot) {
    let [weights, cache, scratch, layers]: [Family<OfStage, Gauge>; 4] = Default::default();
    let predicted = Family::<OfStage, Float>::default();
    let rates = Family::<OfStreams, Float>::default();
    for (pipeline, replica) in (0u32..).zip(snapshot.plan.iter().flat_map(|plan| &plan.replicas)) {
        let Forecast { single, batch, full } = replica.forecast;
        for (streams, rate) in [("1".to_owned(), single), (batch.to_string(), full)] {
            rates.get_or_create(&OfStreams { pipeline, streams }).set(rate);
        }
        for (of, stage) in OfStage::all(pipeline, replica).into_iter().zip(&replica.stages) {
            let bytes = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            weights.get_or_create(&of).set(bytes(stage.weight_bytes));
            cache.get_or_create(&of).set(bytes(stage.states.total()));
            scratch.get_or_create(&of).set(bytes(stage.workspace_bytes));
            layers.get_or_create(&of).set(i64::from(stage.layers.len()));
            predicted.get_or_create(&of).set(stage.predicted_ms / 1e3);
        }
    }
    let r = registry;
    let mut add = |name: &str, help: &str, family: Family<OfStage, Gauge>| r.register(name, help, family);
    add("strata_stage_weight_bytes", "Bytes of weights that a stage holds", weights);
    add("strata_stage_cache_bytes", "Bytes of cache that a stage holds", cache);
    add("strata_stage_workspace_bytes", "Bytes of scratch that a stage holds", scratch);
    add("strata_stage_layers", "Layers that a stage holds", layers);
    r.register(
        "strata_stage_predicted_step_seconds",
        "What the planner expects a stage to take for one token",
        predicted,
    );
    r.register(
        "strata_predicted_tokens_per_second",
        "What the planner expects of a pipeline with so many streams; beside rate(vllm:generation_tokens_total)",
        rates,
    );
    let [read, all]: [Family<OfStage, Gauge>; 2] = Default::default();
    for loading in &snapshot.loading {
        let of = OfStage {
            pipeline: loading.pipeline,
            stage: loading.stage,
            worker: loading.worker.clone(),
            device: loading.device.clone(),
        };
        read.get_or_create(&of).set(i64::try_from(loading.bytes_read).unwrap_or(i64::MAX));
        all.get_or_create(&of).set(i64::try_from(loading.bytes_total).unwrap_or(i64::MAX));
    }
    r.register("strata_loading_read_bytes", "Bytes that a stage has read while it loads", read);
    r.register("strata_loading_all_bytes", "Bytes that a stage is to read while it loads", all);
}
