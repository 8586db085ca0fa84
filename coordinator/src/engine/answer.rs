//! Requests in progress: what is remembered of each, and what a step's outputs mean to it.

use std::{collections::BTreeMap, time::Duration};

use strata_proto::v1::{self, FinishReason, generate_event, step_result};

use super::{
    error::EngineError,
    replies::{Reply, ReplySender},
};
use crate::{
    request::{TextStream, Tokenizer, generate::Checked},
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
    connection: u64,
    arrived: Duration,
) -> (scheduler::Request, Option<Answer>) {
    let prompt_tokens = request.prompt.len() as u32;
    let sampling = v1::RowSampling {
        sampling: Some(request.sampling),
        seed: request.seed,
        prompt_tokens,
        logprobs: request.logprobs,
        history: Vec::new(),
    };
    let work = scheduler::Work::Generate { max_tokens: request.max_tokens, eos: request.eos, sampling };
    let deadline = request.deadline.map(|d| arrived + d);
    let (prompt, tenant) = (request.prompt, request.tenant);
    let asked = scheduler::Request { prompt, tenant, connection, deadline, work };
    (asked, Some(Answer { text: TextStream::new(request.stop), prompt_tokens, generated: 0, cached: 0 }))
}

/// Ends an answer for `reason`.
pub(crate) fn finish(live: Live, reason: FinishReason, tokenizer: &Tokenizer) {
    let Some(Answer { text, prompt_tokens, generated, cached }) = live.answer else { return };
    // After a stop string, what was held back is behind it.
    let rest = match reason {
        FinishReason::Stop => Ok(String::new()),
        _ => text.finish(tokenizer),
    };
    let reply = match rest {
        Ok(text) => {
            let usage = v1::Usage { prompt_tokens, completion_tokens: generated, cached_tokens: cached };
            let finished = v1::Finished { reason: reason as i32, usage: Some(usage), text };
            Reply::Event(generate_event::Event::Finished(finished))
        }
        Err(error) => {
            tracing::error!(%error, "cannot decode the end of an answer");
            Reply::Failed(EngineError::Internal)
        }
    };
    live.reply.end(reply);
}
