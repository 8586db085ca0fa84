//! What is measured of requests: vLLM's names, labels and bounds where the meaning is the same, so that boards and autoscalers
//! made for it show this.

use std::{fmt::Debug, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, exemplar::HistogramWithExemplars, family::Family, histogram::Histogram},
    registry::Registry,
};
use tokio::time::Instant;

use super::outcome::Outcome;
use crate::metrics::{Bounds, OfModel};

/// Bounds of the time to the first token, in seconds.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Of times from token to token.
const PER_TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Of the parts of a request's time.
const WHOLE: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// Of counts of tokens.
const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];

type Traced = HistogramWithExemplars<RequestId>;

/// The label of an exemplar.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestId {
    request_id: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfReason {
    engine: &'static str,
    model_name: String,
    finished_reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCall {
    call: &'static str,
    outcome: &'static str,
}

type Times = Family<OfModel, Histogram, Bounds>;
type TracedTimes = Family<OfModel, Traced, Bounds>;

/// What is measured of requests, by the model that they asked for.
#[derive(Debug)]
pub(crate) struct Series {
    first_token: TracedTimes,
    whole: TracedTimes,
    inter_token: Times,
    per_token: Times,
    queue: Times,
    inference: Times,
    prefill: Times,
    decode: Times,
    prompt: Times,
    answer: Times,
    most: Times,
    samples: Times,
    success: Family<OfReason, Counter>,
    ended: Family<OfCall, Counter>,
}

impl Series {
    /// Registers it.
    pub fn new(registry: &mut Registry) -> Self {
        fn family<M>(
            registry: &mut Registry,
            name: &str,
            help: &str,
            bounds: Bounds,
        ) -> Family<OfModel, M, Bounds>
        where
            Family<OfModel, M, Bounds>: prometheus_client::registry::Metric + Clone,
        {
            let family = Family::new_with_constructor(bounds);
            registry.register(format!("vllm:{name}"), help, family.clone());
            family
        }
        let r = registry;
        let (whole, per_token) = (Bounds(WHOLE), Bounds(PER_TOKEN));
        let (tokens, one) = (Bounds(TOKENS), Bounds(&[1.0, 2.0, 5.0, 10.0, 20.0]));
        let (success, ended) = (Family::default(), Family::default());
        r.register("vllm:request_success", "Requests that were computed, by how they ended", success.clone());
        r.register("strata_requests", "Requests that ended, by call and outcome", ended.clone());
        Series {
            first_token: family(
                r,
                "time_to_first_token_seconds",
                "From a request's arrival to its first token",
                Bounds(FIRST_TOKEN),
            ),
            whole: family(r, "e2e_request_latency_seconds", "From a request's arrival to its end", whole),
            inter_token: family(
                r,
                "inter_token_latency_seconds",
                "From one token of an answer to the next",
                per_token,
            ),
            per_token: family(
                r,
                "request_time_per_output_token_seconds",
                "Mean time from token to token, of each answer",
                per_token,
            ),
            queue: family(
                r,
                "request_queue_time_seconds",
                "From a request's arrival to its first tokens in a step",
                whole,
            ),
            inference: family(
                r,
                "request_inference_time_seconds",
                "From a request's first tokens in a step to its end",
                whole,
            ),
            prefill: family(
                r,
                "request_prefill_time_seconds",
                "From a request's first tokens in a step to its first token out",
                whole,
            ),
            decode: family(
                r,
                "request_decode_time_seconds",
                "From a request's first token out to its end",
                whole,
            ),
            prompt: family(r, "request_prompt_tokens", "Tokens of prompts", tokens),
            answer: family(r, "request_generation_tokens", "Tokens of answers", tokens),
            most: family(r, "request_params_max_tokens", "Tokens that were asked for at most", tokens),
            samples: family(r, "request_params_n", "Answers that were asked for", one),
            success,
            ended,
        }
    }

    /// The series of one model, to observe tokens as they come.
    pub fn tokens(&self, model: &str) -> Histogram {
        self.inter_token.get_or_create_owned(&OfModel::new(model))
    }

    /// A request has ended.
    pub(super) fn ended(&self, request: &Ended<'_>) {
        let Ended { call, model, id, outcome, prompt, answer, most, times } = *request;
        self.ended.get_or_create(&OfCall { call, outcome: outcome.name() }).inc();
        let (Some(begun), Some(finished_reason)) = (times.begun, reason(outcome)) else { return };
        let of = OfModel::new(model);
        let OfModel { engine, model_name } = of.clone();
        self.success.get_or_create(&OfReason { engine, model_name, finished_reason }).inc();
        let seconds = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        let observe = |series: &Times, value: f64| series.get_or_create(&of).observe(value);
        let trace = |series: &TracedTimes, value: f64| {
            let request = RequestId { request_id: id.to_string() };
            series.get_or_create(&of).observe(value, Some(request), None);
        };
        trace(&self.whole, seconds(times.arrived, times.ended));
        observe(&self.queue, seconds(times.arrived, begun));
        observe(&self.inference, seconds(begun, times.ended));
        observe(&self.prompt, f64::from(prompt));
        if let Some(first) = times.first_token {
            trace(&self.first_token, seconds(times.arrived, first));
            observe(&self.prefill, seconds(begun, first));
            observe(&self.decode, seconds(first, times.ended));
            observe(&self.answer, f64::from(answer));
            observe(&self.samples, 1.0);
            most.into_iter().for_each(|most| observe(&self.most, f64::from(most)));
            if answer > 1 {
                observe(&self.per_token, seconds(first, times.ended) / f64::from(answer - 1));
            }
        }
    }
}

/// A request at its end.
pub(super) struct Ended<'a> {
    pub call: &'static str,
    pub model: &'a str,
    pub id: uuid::Uuid,
    pub outcome: Outcome,
    /// Tokens of the prompt, or of all inputs.
    pub prompt: u32,
    /// Tokens of the answer.
    pub answer: u32,
    /// Tokens that were asked for at most.
    pub most: Option<u32>,
    pub times: Moments,
}

/// When what happened to a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moments {
    pub arrived: Instant,
    /// Its first tokens were sent to a pipeline.
    pub begun: Option<Instant>,
    /// Its first token came.
    pub first_token: Option<Instant>,
    pub ended: Instant,
}

/// vLLM's word for how a request ended that was computed.
fn reason(outcome: Outcome) -> Option<&'static str> {
    match outcome {
        Outcome::Eos | Outcome::Stop | Outcome::Answered => Some("stop"),
        Outcome::Length => Some("length"),
        Outcome::Cancelled | Outcome::Deadline => Some("abort"),
        Outcome::Unavailable | Outcome::Internal => Some("error"),
        Outcome::BadInput | Outcome::WrongModel | Outcome::Overload => None,
    }
}

/// Times from token to token of one answer.
#[derive(Debug)]
pub(super) struct Gaps {
    series: Histogram,
    last: Option<Instant>,
}

impl Gaps {
    /// Of an answer by a model.
    pub fn new(series: &Arc<Series>, model: &str) -> Self {
        Gaps { series: series.tokens(model), last: None }
    }

    /// So many tokens have come at once: each has taken its part of the time since those before them.
    pub fn came(&mut self, tokens: usize, now: Instant) {
        let last = self.last.replace(now);
        let Some(gap) = last.map(|last| now.saturating_duration_since(last)) else { return };
        let each = gap.checked_div(tokens.try_into().unwrap_or(u32::MAX)).unwrap_or(Duration::ZERO);
        (0..tokens).for_each(|_| self.series.observe(each.as_secs_f64()));
    }
}
