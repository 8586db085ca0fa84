//! What is let in: every bound on a request is checked here, before anything is allocated for it.

use std::{sync::Arc, time::Duration};

use strata_proto::{
    ModelProfile,
    error::{Classify, Kind},
    v1,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    chat::Message,
    encode::check_task,
    tokenizer::{GenerationDefaults, Tokenizer, TokenizerError},
};

/// Largest text that is tokenized, in bytes.
pub const MAX_TEXT: usize = 1 << 20;
/// Most token ids in a Detokenize.
pub const MAX_IDS: usize = 1 << 20;
const MAX_MESSAGES: usize = 1024;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_LOGPROBS: u32 = 20;
const MAX_BIASES: usize = 1024;
const MAX_TENANT_BYTES: usize = 256;
const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// When to try again after an overload: about the time a short answer takes.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Why a request was not let in.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// A field is out of its bounds.
    #[error("{field}: {why}")]
    Field {
        /// The field, as the `.proto` names it.
        field: &'static str,
        /// What it was and what was expected.
        why: String,
    },
    /// Another model was asked for.
    #[error("model {asked:?} is not served here; this server answers for {served:?}")]
    WrongModel {
        /// The name asked for.
        asked: String,
        /// The name served.
        served: String,
    },
    /// The model does something else.
    #[error("model {model:?} answers {served}, not {asked}")]
    WrongTask {
        /// The call made.
        asked: &'static str,
        /// The call that it answers.
        served: &'static str,
        /// The model.
        model: String,
    },
    /// Too many requests at once.
    #[error("{limit} requests are in progress or waiting, the most this server takes; try again later")]
    Overload {
        /// The bound.
        limit: usize,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl Classify for AdmissionError {
    fn kind(&self) -> Kind {
        match self {
            AdmissionError::Field { .. }
            | AdmissionError::WrongTask { .. }
            | AdmissionError::Tokenizer(_) => Kind::BadInput,
            AdmissionError::WrongModel { .. } => Kind::WrongModel,
            AdmissionError::Overload { .. } => Kind::Overload { retry_after: RETRY_AFTER },
        }
    }
}

pub(crate) fn field(field: &'static str, why: impl Into<String>) -> AdmissionError {
    AdmissionError::Field { field, why: why.into() }
}

/// A place among the requests in progress; freed by dropping it and all its clones.
#[derive(Debug, Clone)]
pub struct Permit(#[allow(dead_code, reason = "held for its Drop")] Arc<OwnedSemaphorePermit>);

/// Bounds the number of requests in progress.
#[derive(Debug, Clone)]
pub struct Gate {
    permits: Arc<Semaphore>,
    limit: usize,
}

impl Gate {
    /// A gate for `limit` requests at a time.
    pub fn new(limit: usize) -> Self {
        Gate { permits: Arc::new(Semaphore::new(limit)), limit }
    }

    /// A place, or the answer that there is none.
    ///
    /// # Errors
    /// [`AdmissionError::Overload`] at once if every place is taken.
    pub fn enter(&self) -> Result<Permit, AdmissionError> {
        let permit = self.permits.clone().try_acquire_owned();
        permit.map(|p| Permit(Arc::new(p))).map_err(|_| AdmissionError::Overload { limit: self.limit })
    }
}

/// A request whose every field is within its bounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    /// The prompt as the model reads it, never empty.
    pub prompt: Vec<u32>,
    /// Most new tokens.
    pub max_tokens: u32,
    /// Sampling parameters with defaults filled in.
    pub sampling: v1::Sampling,
    /// Seed, drawn if the caller gave none.
    pub seed: u64,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Ids that end the answer; empty if they are to be ignored.
    pub eos: Vec<u32>,
    /// Alternatives to report.
    pub logprobs: Option<u32>,
    /// Time allowed from arrival.
    pub deadline: Option<Duration>,
    /// Whose it is.
    pub tenant: Arc<str>,
}

/// Refuses a name other than the served one.
///
/// # Errors
/// [`AdmissionError::WrongModel`].
pub fn check_model(asked: &str, served: &str) -> Result<(), AdmissionError> {
    if asked.is_empty() || asked == served {
        return Ok(());
    }
    Err(AdmissionError::WrongModel { asked: asked.to_owned(), served: served.to_owned() })
}

/// Refuses a text that is too long to tokenize.
///
/// # Errors
/// If it is longer than [`MAX_TEXT`].
pub fn check_text(name: &'static str, text: &str) -> Result<(), AdmissionError> {
    if text.len() > MAX_TEXT {
        return Err(field(name, format!("{} bytes are too long: at most {MAX_TEXT} are taken", text.len())));
    }
    Ok(())
}

/// The time that a caller allows.
///
/// # Errors
/// If it is nothing, or more than a day.
pub(crate) fn check_deadline(millis: Option<u64>) -> Result<Option<Duration>, AdmissionError> {
    let deadline = millis.map(Duration::from_millis);
    if deadline.is_some_and(|d| d.is_zero() || d > MAX_DEADLINE) {
        return Err(field("deadline_ms", format!("expected 1 to {}", MAX_DEADLINE.as_millis())));
    }
    Ok(deadline)
}

/// Checks everything about a request, and tokenizes its prompt. Heavy: not for an async thread.
///
/// # Errors
/// The first field that is out of its bounds, with the bound.
pub fn check(
    request: v1::GenerateRequest,
    tokenizer: &Tokenizer,
    profile: &ModelProfile,
    kv_capacity: u64,
) -> Result<Checked, AdmissionError> {
    check_model(&request.model, &profile.model)?;
    check_task(v1::Task::Generate, profile)?;
    let defaults = request.model_defaults.then(|| tokenizer.defaults());
    let sampling = check_sampling(request.sampling.unwrap_or_default(), defaults, profile.vocab_size)?;
    if request.stop.len() > MAX_STOPS {
        return Err(field(
            "stop",
            format!("{} strings are too many: at most {MAX_STOPS}", request.stop.len()),
        ));
    }
    if let Some(stop) = request.stop.iter().find(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
        return Err(field(
            "stop",
            format!("a string of {} bytes: expected 1 to {MAX_STOP_BYTES}", stop.len()),
        ));
    }
    if let Some(n) = request.logprobs.filter(|n| *n > MAX_LOGPROBS) {
        return Err(field("logprobs", format!("{n} is too large: at most {MAX_LOGPROBS}")));
    }
    if request.tenant.len() > MAX_TENANT_BYTES {
        let why = format!("{} bytes are too long: at most {MAX_TENANT_BYTES}", request.tenant.len());
        return Err(field("tenant", why));
    }
    let deadline = check_deadline(request.deadline_ms)?;
    if request.max_tokens == Some(0) {
        return Err(field("max_tokens", "0 asks for nothing: expected at least 1"));
    }
    let prompt = match request.messages.is_empty() {
        true => prompt_ids(request.prompt, request.token_ids, tokenizer, profile)?,
        false if request.prompt.is_some() || !request.token_ids.is_empty() => {
            return Err(field("messages", "given together with prompt or token_ids: expected one of them"));
        }
        false => chat_ids(request.messages, tokenizer)?,
    };
    let max_tokens = check_length(prompt.len(), request.max_tokens, profile, kv_capacity)?;
    Ok(Checked {
        prompt,
        max_tokens,
        seed: sampling.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0),
        sampling,
        stop: request.stop,
        eos: if request.ignore_eos { Vec::new() } else { profile.eos_token_ids.clone() },
        logprobs: request.logprobs,
        deadline,
        tenant: request.tenant.into(),
    })
}

fn prompt_ids(
    text: Option<String>,
    ids: Vec<u32>,
    tokenizer: &Tokenizer,
    profile: &ModelProfile,
) -> Result<Vec<u32>, AdmissionError> {
    match text {
        Some(_) if !ids.is_empty() => {
            Err(field("prompt", "given together with token_ids: expected one of them"))
        }
        Some(text) => {
            check_text("prompt", &text)?;
            if text.is_empty() {
                return Err(field("prompt", "is empty: expected at least one character"));
            }
            Ok(tokenizer.encode(&text, true)?)
        }
        None if ids.is_empty() => Err(field("prompt", "is missing: expected prompt, token_ids or messages")),
        None => match ids.iter().position(|id| *id >= profile.vocab_size) {
            Some(at) => {
                let why = format!(
                    "id {} at index {at} is unknown: expected less than {}",
                    ids[at], profile.vocab_size
                );
                Err(field("token_ids", why))
            }
            None => Ok(ids),
        },
    }
}

fn chat_ids(messages: Vec<v1::ChatMessage>, tokenizer: &Tokenizer) -> Result<Vec<u32>, AdmissionError> {
    if messages.len() > MAX_MESSAGES {
        let why = format!("{} messages are too many: at most {MAX_MESSAGES}", messages.len());
        return Err(field("messages", why));
    }
    let bytes: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
    if bytes > MAX_TEXT {
        return Err(field("messages", format!("{bytes} bytes are too long: at most {MAX_TEXT} are taken")));
    }
    let messages = messages.into_iter().map(|m| Message { role: m.role, content: m.content });
    let ids = tokenizer.encode_chat(&messages.collect::<Vec<_>>())?;
    if ids.is_empty() {
        return Err(field("messages", "the model's chat template makes nothing of them"));
    }
    Ok(ids)
}

/// The number of new tokens that a prompt of this length may have.
fn check_length(
    prompt: usize,
    max_tokens: Option<u32>,
    profile: &ModelProfile,
    kv_capacity: u64,
) -> Result<u32, AdmissionError> {
    let context = u64::from(profile.context_length);
    let prompt = prompt as u64;
    let room = context.min(kv_capacity);
    let bound =
        if room < context { "what the cache of this deployment holds" } else { "the model's context" };
    if prompt >= room {
        return Err(field(
            "prompt",
            format!("{prompt} tokens leave no room for an answer: {bound} is {room} tokens"),
        ));
    }
    let rest = u32::try_from(room - prompt).unwrap_or(u32::MAX);
    match max_tokens {
        None => Ok(rest),
        Some(wanted) if wanted <= rest => Ok(wanted),
        Some(wanted) => Err(field(
            "max_tokens",
            format!(
                "{wanted} on top of {prompt} prompt tokens is too large: {bound} is {room} tokens, so at most {rest}"
            ),
        )),
    }
}

fn check_sampling(
    mut s: v1::Sampling,
    defaults: Option<&GenerationDefaults>,
    vocab: u32,
) -> Result<v1::Sampling, AdmissionError> {
    if let Some(d) = defaults {
        // As transformers reads the file: without do_sample the model is greedy and the rest means nothing.
        if d.do_sample {
            s.temperature = s.temperature.or(d.temperature).or(Some(1.0));
            s.top_k = s.top_k.or(d.top_k);
            s.top_p = s.top_p.or(d.top_p);
            s.min_p = s.min_p.or(d.min_p);
        }
        s.repetition_penalty = s.repetition_penalty.or(d.repetition_penalty);
    }
    let within = |name, value: Option<f32>, low: f32, open: bool, high: f32| match value {
        // Written so that NaN fails.
        Some(v) if !((if open { v > low } else { v >= low }) && v <= high) => {
            let bracket = if open { "(" } else { "[" };
            Err(field(name, format!("{v} is out of bounds: expected {bracket}{low}, {high}]")))
        }
        _ => Ok(()),
    };
    within("sampling.temperature", s.temperature, 0.0, false, 100.0)?;
    within("sampling.top_p", s.top_p, 0.0, true, 1.0)?;
    within("sampling.min_p", s.min_p, 0.0, false, 1.0)?;
    within("sampling.repetition_penalty", s.repetition_penalty, 0.0, true, 10.0)?;
    within("sampling.frequency_penalty", s.frequency_penalty, -2.0, false, 2.0)?;
    within("sampling.presence_penalty", s.presence_penalty, -2.0, false, 2.0)?;
    if s.top_k.is_some_and(|k| k > vocab) {
        return Err(field("sampling.top_k", format!("expected at most the vocabulary, {vocab}")));
    }
    if s.logit_bias.len() > MAX_BIASES {
        return Err(field("sampling.logit_bias", format!("at most {MAX_BIASES} entries are taken")));
    }
    for (id, bias) in &s.logit_bias {
        if *id >= vocab {
            return Err(field(
                "sampling.logit_bias",
                format!("id {id} is unknown: expected less than {vocab}"),
            ));
        }
        within("sampling.logit_bias", Some(*bias), -100.0, false, 100.0)?;
    }
    Ok(s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_bounds() {
        let check = |s: v1::Sampling| check_sampling(s, None, 100).map_err(|e| e.to_string());
        let base = v1::Sampling::default();
        check(base.clone()).unwrap();
        check(v1::Sampling { temperature: Some(0.0), top_k: Some(0), top_p: Some(1.0), ..base.clone() })
            .unwrap();
        let bad = [
            (v1::Sampling { temperature: Some(f32::NAN), ..base.clone() }, "sampling.temperature: NaN"),
            (v1::Sampling { temperature: Some(-1.0), ..base.clone() }, "expected [0, 100]"),
            (
                v1::Sampling { top_p: Some(0.0), ..base.clone() },
                "sampling.top_p: 0 is out of bounds: expected (0, 1]",
            ),
            (v1::Sampling { top_p: Some(1.5), ..base.clone() }, "sampling.top_p"),
            (v1::Sampling { top_k: Some(101), ..base.clone() }, "sampling.top_k"),
            (v1::Sampling { min_p: Some(f32::INFINITY), ..base.clone() }, "sampling.min_p"),
            (v1::Sampling { repetition_penalty: Some(0.0), ..base.clone() }, "sampling.repetition_penalty"),
            (v1::Sampling { logit_bias: [(100, 1.0)].into(), ..base.clone() }, "id 100 is unknown"),
            (v1::Sampling { logit_bias: [(1, f32::NAN)].into(), ..base.clone() }, "sampling.logit_bias: NaN"),
        ];
        for (sampling, says) in bad {
            let error = check(sampling).unwrap_err();
            assert!(error.contains(says), "{error:?} does not say {says:?}");
        }
    }

    #[test]
    fn model_defaults_count_only_where_the_caller_is_silent() {
        let defaults = GenerationDefaults {
            do_sample: true,
            temperature: Some(0.6),
            top_k: Some(7),
            ..GenerationDefaults::default()
        };
        let own = v1::Sampling { top_k: Some(3), ..Default::default() };
        let got = check_sampling(own, Some(&defaults), 100).unwrap();
        assert_eq!((got.temperature, got.top_k, got.top_p), (Some(0.6), Some(3), None));
        let greedy = GenerationDefaults { do_sample: false, ..defaults };
        assert_eq!(check_sampling(v1::Sampling::default(), Some(&greedy), 100).unwrap().temperature, None);
    }

    #[test]
    fn the_gate_frees_by_drop() {
        let gate = Gate::new(1);
        let permit = gate.enter().unwrap();
        assert!(matches!(gate.enter().unwrap_err().kind(), Kind::Overload { .. }));
        drop(permit);
        gate.enter().unwrap();
    }
}
