//! Requests in progress: what is remembered of each, and what a step's outputs mean to it.

use std::{collections::BTreeMap, time::Duration};

use strata_proto::v1::{self, FinishReason, finished::EndedBy, generate_event, step_result};

use super::{
    error::EngineError,
    replies::{Reply, ReplySender},
};
use crate::{
    request::{TextStream, Tokenizer, TokenizerError, generate::Checked},
    scheduler::{self, SequenceId},
};

/// A request in progress.
pub(crate) struct Live {
    pub reply: ReplySender,
    /// Of a generation.
    pub answer: Option<Answer>,
    /// Some of it went to a pipeline.
    pub begun: bool,
}

/// A text in progress.
pub(crate) struct Answer {
    pub text: TextStream,
    /// The request's stop strings, and tokens.
    pub stop: Vec<String>,
    pub stop_ids: Vec<u32>,
    pub prompt_tokens: u32,
    pub generated: u32,
    /// Of the prompt, tokens that were in the cache.
    pub cached: u32,
}

/// What the last stage made of a sequence, beside what the scheduler is told.
pub(crate) enum Yield {
    /// A token, with log-probabilities if they were asked for.
    Token(Option<v1::TokenLogprobs>),
    /// All that was asked for.
    Whole(Reply),
}

/// The outputs of a step as the scheduler sees them, and what else there is to each of them.
pub(crate) fn outputs(
    output: Option<step_result::Output>,
) -> (Vec<(SequenceId, scheduler::Output)>, Vec<Option<Yield>>) {
    let (mut outputs, mut results) = (Vec::new(), Vec::new());
    let whole = scheduler::Output::Whole;
    match output {
        None => {}
        Some(step_result::Output::Tokens(tokens)) => {
            for token in tokens.tokens {
                outputs.push((token.sequence, scheduler::Output::Token(token.token_id)));
                results.push(Some(Yield::Token(token.logprobs)));
            }
        }
        Some(step_result::Output::Vectors(vectors)) => {
            for vector in vectors.vectors {
                outputs.push((vector.sequence, whole));
                results.push(Some(Yield::Whole(Reply::Vector(vector.values))));
            }
        }
        Some(step_result::Output::Guesses(guesses)) => {
            let mut masks: BTreeMap<SequenceId, Vec<_>> = BTreeMap::new();
            for guess in guesses.guesses {
                masks.entry(guess.sequence).or_default().push(guess.top);
            }
            for (sequence, masks) in masks {
                outputs.push((sequence, whole));
                results.push(Some(Yield::Whole(Reply::Guesses(masks))));
            }
        }
    }
    (outputs, results)
}

/// A generation as the scheduler sees it, and its answer; it came by a connection and arrived at `arrived` on the engine's clock.
pub(crate) fn generation(
    request: Checked,
    tokenizer: &Tokenizer,
    connection: u64,
    arrived: Duration,
) -> (scheduler::Request, Option<Answer>) {
    let prompt_tokens = request.prompt.len() as u32;
    let ends: Vec<u32> = request.eos.iter().chain(&request.stop_ids).copied().collect();
    let sampling = v1::RowSampling {
        sampling: Some(request.sampling),
        seed: request.seed,
        prompt_tokens,
        logprobs: request.logprobs,
        history: Vec::new(),
        min_tokens: request.min_tokens,
        ends: if request.min_tokens > 0 { ends.clone() } else { Vec::new() },
    };
    let work = scheduler::Work::Generate { max_tokens: request.max_tokens, ends, sampling };
    let deadline = request.deadline.map(|d| arrived + d);
    let (prompt, tenant) = (request.prompt, request.tenant);
    let asked = scheduler::Request { prompt, tenant, connection, deadline, work };
    let text = TextStream::new(request.stop.clone(), request.min_tokens, tokenizer);
    let (stop, stop_ids) = (request.stop, request.stop_ids);
    (asked, Some(Answer { text, stop, stop_ids, prompt_tokens, generated: 0, cached: 0 }))
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// An end-of-sequence token, or one of the request's.
    Token(u32),
    /// The stop string of this number.
    Stop(usize),
    /// There may be no more.
    Length,
}

impl Answer {
    /// Takes a token, which `ends` it or not; gives the text that is final, and why the answer is complete if it is.
    pub fn push(
        &mut self,
        id: u32,
        finished: Option<scheduler::Finish>,
        tokenizer: &Tokenizer,
    ) -> Result<(String, Option<Ending>), TokenizerError> {
        // The text of a token that was to end it is left out.
        if finished == Some(scheduler::Finish::End) && self.stop_ids.contains(&id) {
            return Ok((String::new(), Some(Ending::Token(id))));
        }
        let piece = self.text.push(id, tokenizer)?;
        let ending = match (piece.stop, finished) {
            (Some(number), _) => Some(Ending::Stop(number)),
            (None, Some(scheduler::Finish::End)) => Some(Ending::Token(id)),
            (None, Some(scheduler::Finish::Length | scheduler::Finish::Encoded)) => Some(Ending::Length),
            (None, None) => None,
        };
        Ok((piece.text, ending))
    }
}

/// Ends an answer.
pub(crate) fn finish(live: Live, ending: Ending, tokenizer: &Tokenizer) {
    let Some(Answer { text, stop, stop_ids, prompt_tokens, generated, cached }) = live.answer else { return };
    let (reason, ended_by) = match ending {
        Ending::Length => (FinishReason::Length, None),
        Ending::Stop(number) => (FinishReason::Stop, stop.into_iter().nth(number).map(EndedBy::Stop)),
        Ending::Token(id) if stop_ids.contains(&id) => (FinishReason::Stop, Some(EndedBy::TokenId(id))),
        Ending::Token(id) => (FinishReason::Eos, Some(EndedBy::TokenId(id))),
    };
    // After a stop string, what was held back is behind it.
    let rest = match ending {
        Ending::Stop(_) => Ok(String::new()),
        _ => text.finish(tokenizer),
    };
    let reply = match rest {
        Ok(text) => {
            let usage = v1::Usage { prompt_tokens, completion_tokens: generated, cached_tokens: cached };
            let finished = v1::Finished { reason: reason as i32, usage: Some(usage), text, ended_by };
            Reply::Event(generate_event::Event::Finished(finished))
        }
        Err(error) => {
            tracing::error!(%error, "cannot decode the end of an answer");
            Reply::Failed(EngineError::Internal)
        }
    };
    live.reply.end(reply);
}
