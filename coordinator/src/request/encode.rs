//! Inputs of encoders: what is let in, and what is made of the answers.

use std::time::Duration;

use strata_proto::{
    ModelProfile,
    error::quoted,
    limits::MAX_CANDIDATES,
    v1::{self, Scoring, Task, Truncation},
};

use super::{
    bounds::{DEFAULT_CANDIDATES, MAX_INPUTS, MAX_TEXT_BYTES, check_deadline, check_task},
    chat::Conversation,
    error::{AdmissionError, TokenizerError, field},
    input_chat::Chats,
    limit::Limit,
    parts::Place,
    tokenizer::{Encoded, Tokenizer},
};
use crate::scheduler::Encode;

/// What is asked of an encoder, whichever call it came by.
#[derive(Debug)]
pub(crate) struct Request {
    /// As the client names it.
    pub model: String,
    /// What the call is for.
    pub task: Task,
    /// What to compute.
    pub inputs: Vec<v1::Input>,
    /// What to do with long ones.
    pub truncation: Truncation,
    /// Candidates for each mask; only for FillMask.
    pub candidates: Option<u32>,
    /// Whether texts are ranked by the logit of the one class that there must be.
    pub ranks: bool,
    /// Name of the prompt that is put before each text; only for Embed and where texts are ranked. None: the model's default. Empty: none.
    pub prompt_name: Option<String>,
    /// Milliseconds from arrival.
    pub deadline_ms: Option<u64>,
}

/// An input as the model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CheckedInput {
    /// Never empty.
    pub ids: Vec<u32>,
    /// What to compute.
    pub encode: Encode,
    /// Tokens left out.
    pub dropped: u32,
    /// Where each token comes from; empty where nobody asks.
    pub places: Vec<Place>,
}

/// Checks and tokenizes the inputs of a call, each of at most `limit` tokens. Heavy: not for an async
/// thread.
///
/// # Errors
/// The first thing that is out of its bounds, with the bound and the index of the input.
pub(crate) fn check(
    request: Request,
    tokenizer: &Tokenizer,
    profile: &ModelProfile,
    limit: Limit,
) -> Result<(Vec<CheckedInput>, Option<Duration>), AdmissionError> {
    check_task(request.task, profile)?;
    if request.ranks && profile.ranking == Scoring::Unspecified {
        let why = format!(
            "a classifier of {} classes cannot rank: expected a model of one class",
            profile.labels.len()
        );
        return Err(field("model", why));
    }
    let deadline = check_deadline(request.deadline_ms)?;
    let count = request.inputs.len();
    if !(1..=MAX_INPUTS).contains(&count) {
        return Err(field("inputs", format!("{count} inputs: expected 1 to {MAX_INPUTS}")));
    }
    let candidates = request.candidates.unwrap_or(DEFAULT_CANDIDATES);
    if !(1..=MAX_CANDIDATES.min(profile.vocab_size)).contains(&candidates) {
        return Err(field("top_k", format!("{candidates}: expected 1 to {MAX_CANDIDATES}")));
    }
    let bytes: usize = request.inputs.iter().map(text_bytes).sum();
    if bytes > MAX_TEXT_BYTES {
        return Err(field(
            "inputs",
            format!("{bytes} bytes are too long: at most {MAX_TEXT_BYTES} are taken"),
        ));
    }
    let prompt = Prompt::of(&request, tokenizer, profile)?;
    let how = profile.sentences.chat.as_ref().filter(|_| tokenizer.has_chat_template());
    let chats = how.map(|how| Chats::new(how, prompt.text, tokenizer)).transpose();
    let chats = chats.map_err(|why| field("model", why))?;
    if let Some(chats) = &chats
        && request.inputs.iter().any(|input| input.pair.is_some())
    {
        chats.check_pairs(tokenizer).map_err(|why| field("model", why))?;
    }
    let one = |(index, input): (usize, v1::Input)| {
        let is_text = input.text.is_some();
        let input = if chats.is_some() { input } else { prompt.put_before(input, profile) };
        let encoded = encode(input, request.truncation, (tokenizer, chats.as_ref()), profile, limit)
            .map_err(|why| field("inputs", format!("input {index}: {why}")))?;
        let pooled_from = if is_text { prompt.tokens } else { 0 };
        if pooled_from as usize >= encoded.ids.len() {
            return Err(field(
                "inputs",
                format!("input {index}: nothing is left behind the prompt: give a text"),
            ));
        }
        let positions = match request.task {
            Task::FillMask => masks(&encoded.ids, tokenizer)
                .map_err(|why| field("inputs", format!("input {index}: {why}")))?,
            _ => Vec::new(),
        };
        // Where the model knows one kind only, or is not told, a pair is told apart by its separators.
        let segments = if tokenizer.tells_segments(profile) { encoded.segments } else { Vec::new() };
        let encode = Encode { segments, positions, candidates, pooled_from };
        Ok(CheckedInput { ids: encoded.ids, encode, dropped: encoded.dropped, places: Vec::new() })
    };
    let inputs = request.inputs.into_iter().enumerate().map(one).collect::<Result<_, AdmissionError>>()?;
    Ok((inputs, deadline))
}

/// What is put before texts.
struct Prompt<'a> {
    text: &'a str,
    /// Its tokens, where they are left out of the vector.
    tokens: u32,
}

impl<'a> Prompt<'a> {
    /// The one that is asked for, or the model's default.
    fn of(
        request: &Request,
        tokenizer: &Tokenizer,
        profile: &'a ModelProfile,
    ) -> Result<Self, AdmissionError> {
        let sentences = &profile.sentences;
        let none = Prompt { text: "", tokens: 0 };
        let name = match &request.prompt_name {
            _ if request.task != Task::Embed && !request.ranks => return Ok(none),
            Some(name) => name,
            None => &sentences.default_prompt,
        };
        if name.is_empty() {
            return Ok(none);
        }
        let Some(prompt) = sentences.prompts.iter().find(|prompt| prompt.name == *name) else {
            let known: Vec<_> = sentences.prompts.iter().map(|prompt| quoted(&prompt.name)).collect();
            let expected =
                if known.is_empty() { "none: the model has no prompts".into() } else { known.join(", ") };
            return Err(field("prompt_name", format!("{}: expected {expected}", quoted(name))));
        };
        let excluded = sentences.excludes_prompt && !prompt.text.is_empty();
        let tokens =
            if excluded { tokenizer.prompt_tokens(&cased(prompt.text.clone(), profile))? } else { 0 };
        Ok(Prompt { text: &prompt.text, tokens: tokens as u32 })
    }

    /// An input as the tokenizer is to read it. Token ids are taken as they are.
    fn put_before(&self, input: v1::Input, profile: &ModelProfile) -> v1::Input {
        let text = input.text.map(|text| cased(format!("{}{text}", self.text), profile));
        v1::Input { text, pair: input.pair.map(|pair| cased(pair, profile)), ..input }
    }
}

/// A text in the case that the model was trained with.
fn cased(text: String, profile: &ModelProfile) -> String {
    // Letter by letter, as the tokenizers' own normalizer does.
    if profile.sentences.lowercase { text.chars().flat_map(char::to_lowercase).collect() } else { text }
}

/// Bytes of what of a request is tokenized or looked at.
pub(crate) fn bytes(request: &Request) -> usize {
    request.inputs.iter().map(|i| text_bytes(i) + size_of_val(i.token_ids.as_slice())).sum()
}

fn text_bytes(input: &v1::Input) -> usize {
    [&input.text, &input.pair].into_iter().flatten().map(String::len).sum()
}

fn encode(
    input: v1::Input,
    truncation: Truncation,
    (tokenizer, chats): (&Tokenizer, Option<&Chats<'_>>),
    profile: &ModelProfile,
    limit: Limit,
) -> Result<Encoded, String> {
    let v1::Input { text, pair, token_ids } = input;
    let longest = u32::try_from(limit.tokens).unwrap_or(u32::MAX);
    let mut encoded = match (text, pair) {
        (None, None) if token_ids.is_empty() => return Err("is empty: expected text or token_ids".into()),
        (None, None) => Encoded { ids: token_ids, segments: Vec::new(), dropped: 0 },
        (None, Some(_)) => return Err("has a pair but no text".into()),
        (Some(_), _) if !token_ids.is_empty() => return Err("has both text and token_ids".into()),
        (Some(text), pair) => match chats {
            Some(chats) => said(&chats.of(&text, pair.as_deref()), truncation, tokenizer, limit)?,
            None => read(&text, pair.as_deref(), truncation, tokenizer, limit)?,
        },
    };
    if let Some(at) = encoded.ids.iter().position(|id| *id >= profile.vocab_size) {
        let (id, vocab) = (encoded.ids[at], profile.vocab_size);
        return Err(format!("id {id} at index {at} is unknown: expected less than {vocab}"));
    }
    let excess = encoded.ids.len().saturating_sub(longest as usize);
    match truncation {
        _ if excess == 0 => {}
        Truncation::Unspecified => {
            return Err(format!(
                "{} tokens are too many: {limit}; shorten the input, or ask for truncation",
                encoded.ids.len()
            ));
        }
        // Only of token ids: a text has been cut, its special tokens kept.
        Truncation::KeepHead => encoded.ids.truncate(longest as usize),
        Truncation::KeepTail => drop(encoded.ids.drain(..excess)),
    }
    encoded.dropped += excess as u32;
    if encoded.ids.is_empty() {
        return Err("is empty: the tokenizer makes nothing of it".into());
    }
    Ok(encoded)
}

/// A text, or a pair of texts, as it is.
fn read(
    text: &str,
    pair: Option<&str>,
    truncation: Truncation,
    tokenizer: &Tokenizer,
    limit: Limit,
) -> Result<Encoded, String> {
    let longest = u32::try_from(limit.tokens).unwrap_or(u32::MAX);
    let longest = (truncation != Truncation::Unspecified).then_some((longest, truncation));
    if longest.is_none() {
        let texts: Vec<&str> = [Some(text), pair].into_iter().flatten().collect();
        refuse_long(&texts, tokenizer, limit)?;
    }
    tokenizer.encode_input(text, pair, longest).map_err(|e| e.to_string())
}

/// What is put as a chat. It has an end that a model judges by, so none is cut.
fn said(
    chat: &Conversation,
    truncation: Truncation,
    tokenizer: &Tokenizer,
    limit: Limit,
) -> Result<Encoded, String> {
    let longest = usize::try_from(limit.tokens).unwrap_or(usize::MAX);
    let too_many = |tokens: String| {
        let why = if truncation == Truncation::Unspecified {
            ""
        } else {
            ", as what is put as a chat is not truncated"
        };
        format!("{tokens} tokens are too many: {limit}; shorten the input{why}")
    };
    let ids = tokenizer.encode_chat(chat, longest).map_err(|error| match error {
        TokenizerError::TooLong { least } => too_many(format!("{least} or more")),
        error => error.to_string(),
    })?;
    match ids.len() > longest {
        true => Err(too_many(ids.len().to_string())),
        false => Ok(Encoded { ids, segments: Vec::new(), dropped: 0 }),
    }
}

/// Refuses texts that are far too long, of which as little is read as that takes.
///
/// # Errors
/// With the least number of tokens that one has.
pub(super) fn refuse_long(
    texts: &[impl AsRef<str>],
    tokenizer: &Tokenizer,
    limit: Limit,
) -> Result<(), String> {
    let most = usize::try_from(limit.tokens).unwrap_or(usize::MAX);
    for text in texts {
        if let Some(least) = tokenizer.input_exceeds(text.as_ref(), most).map_err(|e| e.to_string())? {
            return Err(format!(
                "{least} tokens or more are too many: {limit}; shorten the input, or ask for truncation"
            ));
        }
    }
    Ok(())
}

/// Where the mask tokens are.
fn masks(ids: &[u32], tokenizer: &Tokenizer) -> Result<Vec<u32>, String> {
    let Some((text, mask)) = tokenizer.mask() else { return Err("the tokenizer has no mask token".into()) };
    let positions = ids.iter().zip(0..).filter(|(id, _)| **id == mask);
    let positions: Vec<u32> = positions.map(|(_, position)| position).collect();
    match positions.is_empty() {
        true => Err(format!("has no mask: expected {text} at least once")),
        false => Ok(positions),
    }
}

/// The logit by which a text is ranked, of the values that the model gives for it: its one class's, or how much more likely the
/// first of two is than the second.
pub(crate) fn rank(values: &[f32]) -> Option<f32> {
    match values {
        [logit] => Some(*logit),
        [yes, no] => Some(yes - no),
        _ => None,
    }
}

/// The score of a logit that stands for itself.
pub(crate) fn single_score(scoring: Scoring, logit: f32) -> f32 {
    match scoring {
        Scoring::Sigmoid => (1.0 / (1.0 + f64::from(-logit).exp())) as f32,
        Scoring::Softmax | Scoring::None | Scoring::Unspecified => logit,
    }
}

/// Scores of a classifier's classes, best first.
pub(crate) fn classification(profile: &ModelProfile, logits: &[f32]) -> Vec<v1::ClassScore> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
    let score = |logit: f32| match profile.scoring {
        Scoring::Softmax => (f64::from(logit - largest).exp() / total) as f32,
        scoring => single_score(scoring, logit),
    };
    let label = |index: usize| profile.labels.get(index).cloned().unwrap_or_default();
    let classes = logits.iter().zip(0u32..);
    let mut classes: Vec<_> = classes
        .map(|(logit, index)| v1::ClassScore {
            index,
            label: label(index as usize),
            score: score(*logit),
            logit: *logit,
        })
        .collect();
    classes.sort_by(|a, b| b.logit.total_cmp(&a.logit).then(a.index.cmp(&b.index)));
    classes
}
