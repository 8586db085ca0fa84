//! Generations that are let in: every bound on one is checked here, before anything is allocated for it.

use std::{sync::Arc, time::Duration};

use strata_proto::{ModelProfile, limits::MAX_LOGPROBS, v1};

use super::{
    bounds::{
        MAX_MESSAGES, MAX_STOP_BYTES, MAX_STOP_IDS, MAX_STOPS, MAX_TEXT_BYTES, check_deadline, check_task,
        check_tenant, check_text,
    },
    chat::Message,
    error::{AdmissionError, TokenizerError, field},
    limit::Limit,
    sampling,
    tokenizer::Tokenizer,
};

/// A request whose every field is within its bounds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Checked {
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
    /// End-of-sequence ids; empty if they are to be ignored.
    pub eos: Vec<u32>,
    /// Further ids that end the answer.
    pub stop_ids: Vec<u32>,
    /// Tokens before it may end by itself.
    pub min_tokens: u32,
    /// Alternatives to report.
    pub logprobs: Option<u32>,
    /// Time allowed from arrival.
    pub deadline: Option<Duration>,
    /// Whose it is.
    pub tenant: Arc<str>,
}

/// Checks everything about a request, and tokenizes its prompt. Heavy: not for an async thread.
///
/// # Errors
/// The first field that is out of its bounds, with the bound.
pub(crate) fn check(
    request: v1::GenerateRequest,
    tokenizer: &Tokenizer,
    profile: &ModelProfile,
    limit: Limit,
) -> Result<Checked, AdmissionError> {
    check_task(v1::Task::Generate, profile)?;
    let defaults = request.model_defaults.then(|| tokenizer.defaults());
    let sampling = sampling::check(request.sampling.unwrap_or_default(), defaults, profile.vocab_size)?;
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
    check_stop_ids(&request.stop_token_ids, profile)?;
    if let Some(n) = request.logprobs.filter(|n| *n > MAX_LOGPROBS) {
        return Err(field("logprobs", format!("{n} is too large: at most {MAX_LOGPROBS}")));
    }
    check_tenant(&request.tenant)?;
    let deadline = check_deadline(request.deadline_ms)?;
    if request.max_tokens == Some(0) {
        return Err(field("max_tokens", "0 asks for nothing: expected at least 1"));
    }
    let prompt = match request.messages.is_empty() {
        true => prompt_ids((request.prompt, request.token_ids), tokenizer, profile, limit)?,
        false if request.prompt.is_some() || !request.token_ids.is_empty() => {
            return Err(field("messages", "given together with prompt or token_ids: expected one of them"));
        }
        false => chat_ids(request.messages, tokenizer, limit)?,
    };
    let max_tokens = check_length(prompt.len(), request.max_tokens, limit)?;
    if request.min_tokens > max_tokens {
        let why = format!("{} are more than there may be: at most {max_tokens}", request.min_tokens);
        return Err(field("min_tokens", why));
    }
    Ok(Checked {
        prompt,
        max_tokens,
        seed: sampling.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0),
        sampling,
        stop: request.stop,
        eos: if request.ignore_eos { Vec::new() } else { tokenizer.eos(profile) },
        stop_ids: request.stop_token_ids,
        min_tokens: request.min_tokens,
        logprobs: request.logprobs,
        deadline,
        tenant: request.tenant.into(),
    })
}

fn check_stop_ids(ids: &[u32], profile: &ModelProfile) -> Result<(), AdmissionError> {
    if ids.len() > MAX_STOP_IDS {
        return Err(field("stop_token_ids", format!("{} are too many: at most {MAX_STOP_IDS}", ids.len())));
    }
    match ids.iter().find(|id| **id >= profile.vocab_size) {
        Some(id) => Err(field(
            "stop_token_ids",
            format!("{id} is unknown: expected less than {}", profile.vocab_size),
        )),
        None => Ok(()),
    }
}

/// Bytes of what of a request is tokenized or looked at.
pub(crate) fn bytes(request: &v1::GenerateRequest) -> usize {
    let messages = request.messages.iter().map(|m| m.role.len() + m.content.len());
    let prompt = request.prompt.as_ref().map_or(0, String::len);
    prompt + size_of_val(request.token_ids.as_slice()) + messages.sum::<usize>()
}

fn prompt_ids(
    (text, ids): (Option<String>, Vec<u32>),
    tokenizer: &Tokenizer,
    profile: &ModelProfile,
    limit: Limit,
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
            tokenizer.encode_at_most(&text, most(limit)).map_err(|error| too_long(error, limit))
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

fn chat_ids(
    messages: Vec<v1::ChatMessage>,
    tokenizer: &Tokenizer,
    limit: Limit,
) -> Result<Vec<u32>, AdmissionError> {
    if messages.len() > MAX_MESSAGES {
        let why = format!("{} messages are too many: at most {MAX_MESSAGES}", messages.len());
        return Err(field("messages", why));
    }
    let bytes: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
    if bytes > MAX_TEXT_BYTES {
        return Err(field(
            "messages",
            format!("{bytes} bytes are too long: at most {MAX_TEXT_BYTES} are taken"),
        ));
    }
    let messages = messages.into_iter().map(|m| Message { role: m.role, content: m.content });
    let ids = tokenizer.encode_chat(&messages.collect::<Vec<_>>(), most(limit));
    let ids = ids.map_err(|error| too_long(error, limit))?;
    if ids.is_empty() {
        return Err(field("messages", "the model's chat template makes nothing of them"));
    }
    Ok(ids)
}

/// Most tokens of a prompt.
fn most(limit: Limit) -> usize {
    usize::try_from(limit.tokens.saturating_sub(1)).unwrap_or(usize::MAX)
}

/// What a tokenizer says, where it is too many tokens in terms of the limit.
fn too_long(error: TokenizerError, limit: Limit) -> AdmissionError {
    match error {
        TokenizerError::TooLong { least } => {
            AdmissionError::NoRoom { tokens: format!("{least} tokens or more"), limit: limit.to_string() }
        }
        error => error.into(),
    }
}

/// The number of new tokens that a prompt of this length may have.
fn check_length(prompt: usize, max_tokens: Option<u32>, limit: Limit) -> Result<u32, AdmissionError> {
    let prompt = prompt as u64;
    if prompt >= limit.tokens {
        let (tokens, limit) = (format!("{prompt} tokens"), limit.to_string());
        return Err(AdmissionError::NoRoom { tokens, limit });
    }
    let rest = u32::try_from(limit.tokens - prompt).unwrap_or(u32::MAX);
    match max_tokens {
        None => Ok(rest),
        Some(wanted) if wanted <= rest => Ok(wanted),
        Some(wanted) => Err(field(
            "max_tokens",
            format!(
                "{wanted} on top of {prompt} prompt tokens is too large: {limit}; ask for at most {rest}"
            ),
        )),
    }
}
