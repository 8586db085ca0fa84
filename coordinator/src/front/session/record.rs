//! One request from its arrival to its end, told once: as a number and as a line of the log.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use strata_proto::{error::Classify, v1};

use tokio::{sync::watch, time::Instant};

use super::{
    SessionError,
    outcome::Outcome,
    series::{Ended, Gaps, Moments, Series},
};
use crate::request::Permit;

/// Requests since the coordinator started, whichever way they came.
#[derive(Debug)]
pub struct Counts {
    begun: AtomicU64,
    ended: [AtomicU64; Outcome::ALL.len()],
    series: Arc<Series>,
}

impl Counts {
    /// None so far; they are measured by `series`.
    pub(super) fn new(series: Series) -> Self {
        Counts { begun: AtomicU64::default(), ended: Default::default(), series: Arc::new(series) }
    }

    /// Requests that arrived.
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Requests that ended so.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.ended[outcome as usize].load(Ordering::Relaxed)
    }

    /// As Status shows them, with those `in_progress`.
    pub(super) fn shown(&self, in_progress: usize) -> v1::Requests {
        let ended = Outcome::ALL.into_iter().map(|o| (o.name().to_owned(), self.ended(o)));
        v1::Requests {
            begun: self.begun(),
            in_progress: u32::try_from(in_progress).unwrap_or(u32::MAX),
            ended: ended.filter(|(_, count)| *count > 0).collect(),
        }
    }
}

/// Counts as a request in progress until it is dropped.
#[derive(Debug)]
pub(super) struct Open(watch::Sender<usize>);

impl Open {
    pub fn new(open: &watch::Sender<usize>) -> Self {
        open.send_modify(|open| *open += 1);
        Open(open.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

/// A request in progress. Dropping it ends the request: it is counted, and the log gets a line.
#[derive(Debug)]
pub(super) struct Record {
    /// Where it counts; the coordinator's own questions count nowhere.
    pub counts: Option<Arc<Counts>>,
    /// Its place among the requests in progress, until the engine has it.
    pub permit: Option<Arc<Permit>>,
    /// Until its answer is read to its end.
    pub open: Option<Open>,
    pub id: uuid::Uuid,
    pub call: &'static str,
    pub model: Arc<str>,
    pub tenant: Arc<str>,
    pub arrived: Instant,
    /// When its first tokens were sent to a pipeline.
    pub begun: Option<Instant>,
    /// When its first token came.
    pub first_token: Option<Instant>,
    /// Tokens of the prompt, or of all inputs.
    pub prompt_tokens: u32,
    pub answer_tokens: u32,
    /// Tokens of the answer that were asked for at most.
    pub most_tokens: Option<u32>,
    /// From token to token.
    gaps: Option<Gaps>,
    /// What went wrong, in full, for the log alone.
    pub why: String,
    /// Cancelled until something else is known.
    pub outcome: Outcome,
}

impl Record {
    /// A request arrives.
    pub fn begin(counts: Option<Arc<Counts>>, call: &'static str, model: Arc<str>) -> Self {
        if let Some(counts) = &counts {
            counts.begun.fetch_add(1, Ordering::Relaxed);
        }
        Record {
            counts,
            permit: None,
            open: None,
            why: String::new(),
            id: uuid::Uuid::now_v7(),
            call,
            model,
            tenant: "".into(),
            arrived: Instant::now(),
            begun: None,
            first_token: None,
            prompt_tokens: 0,
            answer_tokens: 0,
            most_tokens: None,
            gaps: None,
            outcome: Outcome::Cancelled,
        }
    }

    /// So many tokens of the answer have come.
    pub fn came(&mut self, tokens: usize) {
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.answer_tokens += tokens as u32;
        if let Some(counts) = &self.counts {
            self.gaps.get_or_insert_with(|| Gaps::new(&counts.series, &self.model)).came(tokens, now);
        }
    }

    /// It has no answer, or no more of it.
    pub fn failed(&mut self, error: &(impl Classify + ?Sized)) {
        self.outcome = Outcome::of(error);
        self.why = error.to_string();
    }

    /// A call that is answered at once has ended.
    pub fn end<T>(mut self, answer: Result<T, SessionError>) -> Result<T, SessionError> {
        match &answer {
            Ok(_) => self.outcome = Outcome::Answered,
            Err(error) => self.failed(error),
        }
        answer
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Some(counts) = &self.counts else { return };
        counts.ended[self.outcome as usize].fetch_add(1, Ordering::Relaxed);
        let Record { arrived, begun, first_token, .. } = *self;
        counts.series.ended(&Ended {
            call: self.call,
            model: &self.model,
            id: self.id,
            outcome: self.outcome,
            prompt: self.prompt_tokens,
            answer: self.answer_tokens,
            most: self.most_tokens,
            times: Moments { arrived, begun, first_token, ended: Instant::now() },
        });
        let since = |then: Instant| ms(then.saturating_duration_since(self.arrived));
        tracing::info!(
            id = %self.id,
            call = self.call,
            model = &*self.model,
            tenant = (!self.tenant.is_empty()).then_some(&*self.tenant),
            prompt_tokens = self.prompt_tokens,
            answer_tokens = self.answer_tokens,
            queue_ms = self.begun.map(since),
            first_token_ms = self.first_token.map(since),
            total_ms = ms(self.arrived.elapsed()),
            ended = self.outcome.name(),
            why = (!self.why.is_empty()).then_some(&*self.why),
            "request ended"
        );
    }
}

/// Milliseconds, to the microsecond.
fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
