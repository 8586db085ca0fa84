//! How a step that the last stage committed becomes tokens and answers.

use strata_proto::v1::{self, generate_event};

use super::Engine;
use crate::{
    engine::{
        answer::{self, Yield},
        error::EngineError,
        replica::Replica,
        replies::{Reply, Undelivered},
    },
    scheduler,
};

impl Engine {
    /// Takes what the last stage of a replica made of a step: tokens and answers, or a step that is replayed.
    pub(super) fn commit(&mut self, replica: usize, result: v1::StepResult) {
        self.counters.steps += 1;
        let Replica { number, scheduler, issued, .. } = &mut self.replicas[replica];
        if let Some(at) = issued.remove(&result.step) {
            self.series.committed(*number, at.elapsed());
        }
        if let Some(failure) = result.failure {
            tracing::warn!(step = result.step, failure, "a step was poisoned; its batch is replayed");
            match scheduler.fail(result.step) {
                Ok(given_up) => given_up.into_iter().for_each(|id| self.fail(id, EngineError::Poisoned)),
                Err(error) => self.lost(replica, "of the last stage", &format!("broke the order: {error}")),
            }
            return;
        }
        let (outputs, mut results) = answer::outputs(result.output);
        match scheduler.commit(result.step, &outputs) {
            Ok(committed) => {
                for output in committed {
                    let result = results.get_mut(output.index).and_then(Option::take);
                    match (output.output, result) {
                        (scheduler::Output::Token(token), Some(Yield::Token(logprobs))) => {
                            self.emit(output, token, logprobs);
                        }
                        (_, Some(Yield::Whole(reply))) => {
                            if let Some(live) = self.live.remove(&output.sequence) {
                                live.reply.end(reply);
                            }
                        }
                        _ => self.fail(output.sequence, EngineError::Internal),
                    }
                }
            }
            Err(error) => self.lost(replica, "of the last stage", &format!("broke the order: {error}")),
        }
    }

    /// Sends a committed token on, and ends the answer where it ends.
    fn emit(&mut self, committed: scheduler::Committed, id: u32, logprobs: Option<v1::TokenLogprobs>) {
        let scheduler::Committed { sequence, finished, cached_prompt, .. } = committed;
        let counted = self.counted(1);
        let Some(live) = self.live.get_mut(&sequence) else { return };
        let Some(answer) = &mut live.answer else { return };
        let (text, ending) = match answer.push(id, finished, &self.tokenizer) {
            Ok(pushed) => pushed,
            Err(error) => {
                tracing::error!(%error, token = id, "cannot decode a token");
                self.cancel(sequence);
                return self.fail(sequence, EngineError::Internal);
            }
        };
        let tokens = v1::Tokens {
            text,
            token_ids: vec![id],
            logprobs: logprobs.into_iter().collect(),
            index: answer.generated,
        };
        answer.generated += 1;
        answer.cached = cached_prompt;
        self.counters.generated_tokens += counted;
        let sent = live.reply.send(Reply::Event(generate_event::Event::Tokens(tokens)));
        if sent == Err(Undelivered::Unread) {
            self.cancel(sequence);
            return self.fail(sequence, EngineError::Unread);
        }
        if sent.is_err() || ending.is_some() {
            self.cancel(sequence);
            if let (Some(live), Some(ending)) = (self.live.remove(&sequence), ending) {
                answer::finish(live, ending, &self.tokenizer);
            }
        }
    }
}
