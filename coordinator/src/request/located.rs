//! Inputs of which each token counts: texts to classify token by token, and a question with the windows of its context.

use std::time::Duration;

use strata_proto::{
    ModelProfile,
    limits::MAX_CANDIDATES,
    v1::{self, Task, Truncation},
};

use super::{
    bounds::{MAX_INPUTS, MAX_TEXT_BYTES, check_deadline, check_task},
    encode::{CheckedInput, refuse_long},
    error::{AdmissionError, TokenizerError, field},
    limit::Limit,
    tokenizer::{Located, Tokenizer},
};
use crate::scheduler::Encode;

/// Most tokens of a window unless asked for otherwise.
const WINDOW: u32 = 384;
/// Tokens that windows share unless asked for otherwise.
const STRIDE: u32 = 128;
/// Most tokens of an answer unless asked for otherwise, and whatever is asked for.
const ANSWER_TOKENS: (u32, u32) = (15, 512);

/// Inputs that are let in, and until when they may be computed.
pub(crate) type Checked = (Vec<CheckedInput>, Option<Duration>);

/// Checks and tokenizes texts, each of at most `limit` tokens. Heavy: not for an async thread.
///
/// # Errors
/// The first thing that is out of its bounds, with the bound and the index of the text.
pub(crate) fn check_texts(
    request: &v1::ClassifyTokensRequest,
    tokenizer: &Tokenizer,
    profile: &ModelProfile,
    limit: Limit,
) -> Result<Checked, AdmissionError> {
    check_task(Task::ClassifyTokens, profile)?;
    let deadline = check_deadline(request.deadline_ms)?;
    let texts = &request.texts;
    if !(1..=MAX_INPUTS).contains(&texts.len()) {
        return Err(field("texts", format!("{} texts: expected 1 to {MAX_INPUTS}", texts.len())));
    }
    let bytes: usize = texts.iter().map(String::len).sum();
    if bytes > MAX_TEXT_BYTES {
        let why = format!("{bytes} bytes are too long: at most {MAX_TEXT_BYTES} are taken");
        return Err(field("texts", why));
    }
    let longest = u32::try_from(limit.tokens).unwrap_or(u32::MAX);
    let truncation = request.truncation();
    let one = |(index, text): (usize, &String)| {
        let failed = |why: String| field("texts", format!("text {index}: {why}"));
        let cut = (truncation != Truncation::Unspecified).then_some((longest, truncation));
        if cut.is_none() {
            refuse_long(&[text], tokenizer, limit).map_err(failed)?;
        }
        let located = tokenizer.locate(text, cut).map_err(|e| failed(e.to_string()))?;
        if located.places.iter().all(|place| place.text.is_none()) {
            return Err(failed("is empty: the tokenizer makes nothing of it".into()));
        }
        if located.ids.len() as u64 > limit.tokens {
            let why = format!(
                "{} tokens are too many: {limit}; shorten it, or ask for truncation",
                located.ids.len()
            );
            return Err(failed(why));
        }
        input(located, profile).map_err(failed)
    };
    Ok((texts.iter().enumerate().map(one).collect::<Result<_, _>>()?, deadline))
}

/// The same for a question and its context, in windows.
///
/// # Errors
/// The first thing that is out of its bounds, with the bound.
pub(crate) fn check_question(
    request: &v1::AnswerRequest,
    tokenizer: &Tokenizer,
    profile: &ModelProfile,
    limit: Limit,
) -> Result<Checked, AdmissionError> {
    check_task(Task::Answer, profile)?;
    let deadline = check_deadline(request.deadline_ms)?;
    let v1::AnswerRequest { question, context, .. } = request;
    for (name, text) in [("question", question), ("context", context)] {
        if text.is_empty() {
            return Err(field(name, "is empty: expected a text".to_owned()));
        }
        if text.len() > MAX_TEXT_BYTES {
            let why = format!("{} bytes are too long: at most {MAX_TEXT_BYTES} are taken", text.len());
            return Err(field(name, why));
        }
    }
    wanted(request)?;
    let model = u32::try_from(limit.tokens).unwrap_or(u32::MAX);
    let window = request.max_window_tokens.unwrap_or(WINDOW.min(model));
    if !(1..=model).contains(&window) {
        return Err(field("max_window_tokens", format!("{window}: expected at least 1, and {limit}")));
    }
    let stride = request.stride.unwrap_or(STRIDE.min(window / 2));
    refuse_long(&[question], tokenizer, limit).map_err(|why| field("question", why))?;
    let windows = tokenizer.windows(question, context, window, stride).map_err(|error| match error {
        TokenizerError::Failed(why) => field("question", why),
        error => error.into(),
    })?;
    if !(1..=MAX_INPUTS).contains(&windows.len()) {
        let why = format!("is read in {} windows: expected 1 to {MAX_INPUTS}; shorten it", windows.len());
        return Err(field("context", why));
    }
    let one = |located| input(located, profile).map_err(|why| field("context", why));
    Ok((windows.into_iter().map(one).collect::<Result<_, _>>()?, deadline))
}

/// Answers that are wanted, and the most tokens of each.
///
/// # Errors
/// If they are out of their bounds.
pub(crate) fn wanted(request: &v1::AnswerRequest) -> Result<(usize, usize), AdmissionError> {
    let top_k = request.top_k.unwrap_or(1);
    if !(1..=MAX_CANDIDATES).contains(&top_k) {
        return Err(field("top_k", format!("{top_k}: expected 1 to {MAX_CANDIDATES}")));
    }
    let (usual, most) = ANSWER_TOKENS;
    let tokens = request.max_answer_tokens.unwrap_or(usual);
    if !(1..=most).contains(&tokens) {
        return Err(field("max_answer_tokens", format!("{tokens}: expected 1 to {most}")));
    }
    Ok((top_k as usize, tokens as usize))
}

/// Tokens without a text, for a model that tells something of each.
///
/// # Errors
/// If one of them is unknown.
pub(crate) fn tokens_alone(ids: Vec<u32>, profile: &ModelProfile) -> Result<Checked, AdmissionError> {
    let located = Located { ids, ..Located::default() };
    Ok((vec![input(located, profile).map_err(|why| field("token_ids", why))?], None))
}

/// An input that asks for the head's vector of each token.
fn input(located: Located, profile: &ModelProfile) -> Result<CheckedInput, String> {
    let Located { ids, segments, places, dropped } = located;
    if let Some(id) = ids.iter().find(|id| **id >= profile.vocab_size) {
        return Err(format!("token {id} is unknown: expected less than {}", profile.vocab_size));
    }
    let positions = (0..ids.len() as u32).collect();
    let segments = if profile.segments > 1 { segments } else { Vec::new() };
    let encode = Encode { segments, positions, candidates: 0, pooled_from: 0 };
    Ok(CheckedInput { ids, encode, dropped, places })
}
