//! `strata.v1.Inference`: from messages to the engine and back.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::Stream;
use strata_proto::{
    error::status,
    v1::{self, Task, generate_event, inference_server::Inference},
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, async_trait, metadata::MetadataMap};

use crate::{
    coordinator::Coordinator,
    engine::{Asked, EngineError, Event, Reply, Submission},
    request::{
        AdmissionError,
        bounds::{self, MAX_IDS},
        encode, generate,
    },
    scheduler::SequenceId,
};

pub(super) struct InferenceService {
    coordinator: Coordinator,
}

impl InferenceService {
    pub(super) fn new(coordinator: Coordinator) -> Self {
        InferenceService { coordinator }
    }

    /// Runs tokenizer work off the async threads.
    async fn tokenizing<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Coordinator) -> Result<T, AdmissionError> + Send + 'static,
    ) -> Result<T, Status> {
        let coordinator = self.coordinator.clone();
        match tokio::task::spawn_blocking(move || work(&coordinator)).await {
            Ok(outcome) => outcome.map_err(|e| status(&e)),
            Err(error) => {
                tracing::error!(%error, "the tokenizer panicked");
                Err(Status::internal("the tokenizer failed; the server's log has the reason"))
            }
        }
    }
}

/// What is remembered of an input until its answer comes.
struct Sent {
    tokens: u32,
    dropped: u32,
    masked: Vec<u32>,
}

impl InferenceService {
    /// Has every input computed, and makes an answer of each with `answer`. Inputs whose call ended are dropped.
    async fn encode<T>(
        &self,
        asked: encode::Request,
        metadata: &MetadataMap,
        mut answer: impl FnMut(Sent, Reply) -> Option<T>,
    ) -> Result<Vec<T>, Status> {
        let arrived = Instant::now();
        let permit = self.coordinator.gate.enter().map_err(|e| status(&e))?;
        let timeout = grpc_timeout(metadata);
        let (inputs, deadline) = self
            .tokenizing(move |c| encode::check(asked, &c.tokenizer, &c.profile, c.longest_input()))
            .await?;
        let deadline = sooner(deadline, timeout);
        let events = &self.coordinator.engine.events;
        let gone = || status(&EngineError::ShuttingDown);
        let mut waiting = Vec::with_capacity(inputs.len());
        for input in inputs {
            let sent = Sent {
                tokens: input.ids.len() as u32,
                dropped: input.dropped,
                masked: input.encode.masked.clone(),
            };
            let (reply, replies) = mpsc::unbounded_channel();
            let request = Asked::Encode(input, deadline);
            let submission = Submission { request, arrived, reply, permit: permit.clone() };
            events.send(Event::Submit(Box::new(submission))).map_err(|_| gone())?;
            waiting.push((sent, Awaited { replies, cancel: None, events }));
        }
        let mut answers = Vec::with_capacity(waiting.len());
        for (sent, awaited) in waiting {
            let reply = awaited.reply().await?;
            answers.push(answer(sent, reply).ok_or_else(|| status(&EngineError::Internal))?);
        }
        Ok(answers)
    }
}

/// An input whose answer is awaited. Dropped before, it cancels the computation.
struct Awaited<'a> {
    replies: mpsc::UnboundedReceiver<Reply>,
    cancel: Option<SequenceId>,
    events: &'a mpsc::UnboundedSender<Event>,
}

impl Awaited<'_> {
    async fn reply(mut self) -> Result<Reply, Status> {
        loop {
            match self.replies.recv().await {
                Some(Reply::Accepted(id)) => self.cancel = Some(id),
                other => {
                    self.cancel = None;
                    return match other {
                        Some(Reply::Failed(error)) => Err(status(&error)),
                        Some(reply) => Ok(reply),
                        None => Err(status(&EngineError::ShuttingDown)),
                    };
                }
            }
        }
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        // Its number may have come meanwhile.
        while let Ok(Reply::Accepted(id)) = self.replies.try_recv() {
            self.cancel = Some(id);
        }
        if let Some(id) = self.cancel {
            // An engine that is gone has nothing to free.
            let _ = self.events.send(Event::Cancel(id));
        }
    }
}

/// The sooner of two deadlines.
fn sooner(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[async_trait]
impl Inference for InferenceService {
    type GenerateStream = Answer;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Answer>, Status> {
        let arrived = Instant::now();
        // A place first: what follows costs memory and time.
        let permit = self.coordinator.gate.enter().map_err(|e| status(&e))?;
        let timeout = grpc_timeout(request.metadata());
        let request = request.into_inner();
        let mut checked = self
            .tokenizing(move |c| {
                let capacity = c.engine.snapshot.borrow().capacity;
                // While no pipeline is up its capacity is unknown; the scheduler checks again when there is one.
                let capacity = if capacity == 0 { u64::MAX } else { capacity };
                generate::check(request, &c.tokenizer, &c.profile, capacity)
            })
            .await?;
        checked.deadline = sooner(checked.deadline, timeout);
        let started = v1::Started {
            request_id: uuid::Uuid::now_v7().to_string(),
            model: self.coordinator.profile.model.clone(),
            prompt_token_ids: checked.prompt.clone(),
            seed: checked.seed,
        };
        tracing::debug!(request_id = started.request_id, prompt_tokens = checked.prompt.len(), "accepted");
        let (reply, mut replies) = mpsc::unbounded_channel();
        let request = Asked::Generate(Box::new(checked));
        let submission = Submission { request, arrived, reply, permit };
        let events = self.coordinator.engine.events.clone();
        let gone = || status(&EngineError::ShuttingDown);
        events.send(Event::Submit(Box::new(submission))).map_err(|_| gone())?;
        match replies.recv().await {
            Some(Reply::Accepted(id)) => {
                Ok(Response::new(Answer { started: Some(started), replies, cancel: Some((id, events)) }))
            }
            Some(Reply::Failed(error)) => Err(status(&error)),
            Some(Reply::Event(_) | Reply::Vector(_) | Reply::Guesses(_)) | None => Err(gone()),
        }
    }

    async fn classify(
        &self,
        request: Request<v1::ClassifyRequest>,
    ) -> Result<Response<v1::ClassifyResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let asked = encode::Request {
            truncation: request.truncation(),
            model: request.model,
            task: Task::Classify,
            inputs: request.inputs,
            candidates: None,
            deadline_ms: request.deadline_ms,
        };
        let profile = self.coordinator.profile.clone();
        let results = self.encode(asked, &metadata, |input, reply| {
            let Reply::Vector(logits) = reply else { return None };
            let classes = encode::classification(&profile, &logits);
            Some(v1::Classification { classes, tokens: input.tokens, dropped_tokens: input.dropped })
        });
        let results = results.await?;
        Ok(Response::new(v1::ClassifyResponse { model: self.coordinator.profile.model.clone(), results }))
    }

    async fn embed(&self, request: Request<v1::EmbedRequest>) -> Result<Response<v1::EmbedResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let asked = encode::Request {
            truncation: request.truncation(),
            model: request.model,
            task: Task::Embed,
            inputs: request.inputs,
            candidates: None,
            deadline_ms: request.deadline_ms,
        };
        let results = self.encode(asked, &metadata, |input, reply| {
            let Reply::Vector(values) = reply else { return None };
            Some(v1::Embedding { values, tokens: input.tokens, dropped_tokens: input.dropped })
        });
        let results = results.await?;
        Ok(Response::new(v1::EmbedResponse { model: self.coordinator.profile.model.clone(), results }))
    }

    async fn fill_mask(
        &self,
        request: Request<v1::FillMaskRequest>,
    ) -> Result<Response<v1::FillMaskResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let asked = encode::Request {
            truncation: request.truncation(),
            model: request.model,
            task: Task::FillMask,
            inputs: request.inputs,
            candidates: Some(request.top_k.unwrap_or(encode::DEFAULT_CANDIDATES)),
            deadline_ms: request.deadline_ms,
        };
        let tokenizer = self.coordinator.tokenizer.clone();
        let results = self.encode(asked, &metadata, |input, reply| {
            let Reply::Guesses(guesses) = reply else { return None };
            let candidate = |c: v1::Alternative| v1::Candidate {
                token_id: c.token_id,
                // An id without a text is shown as none.
                text: tokenizer.decode(&[c.token_id], true).unwrap_or_default(),
                score: c.logprob.exp(),
            };
            let masks = input.masked.iter().zip(guesses).map(|(position, top)| v1::FilledMask {
                position: *position,
                candidates: top.into_iter().map(candidate).collect(),
            });
            let masks = masks.collect();
            Some(v1::FilledMasks { masks, tokens: input.tokens, dropped_tokens: input.dropped })
        });
        let results = results.await?;
        Ok(Response::new(v1::FillMaskResponse { model: self.coordinator.profile.model.clone(), results }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let _permit = self.coordinator.gate.enter().map_err(|e| status(&e))?;
        let request = request.into_inner();
        let token_ids = self.tokenizing(move |c| {
            bounds::check_model(&request.model, &c.profile.model)?;
            bounds::check_text("text", &request.text)?;
            Ok(c.tokenizer.encode(&request.text, !request.plain)?)
        });
        Ok(Response::new(v1::TokenizeResponse { token_ids: token_ids.await? }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let _permit = self.coordinator.gate.enter().map_err(|e| status(&e))?;
        let request = request.into_inner();
        let text = self.tokenizing(move |c| {
            bounds::check_model(&request.model, &c.profile.model)?;
            let field = |why| AdmissionError::Field { field: "token_ids", why };
            if request.token_ids.len() > MAX_IDS {
                return Err(field(format!(
                    "{} ids are too many: at most {MAX_IDS}",
                    request.token_ids.len()
                )));
            }
            let rows = c.profile.vocab_size;
            if let Some(id) = request.token_ids.iter().find(|id| **id >= rows) {
                return Err(field(format!("id {id} is unknown: expected less than {rows}")));
            }
            Ok(c.tokenizer.decode(&request.token_ids, request.keep_special)?)
        });
        Ok(Response::new(v1::DetokenizeResponse { text: text.await? }))
    }
}

/// The events of one answer. Dropped before its end, it cancels the request.
pub(super) struct Answer {
    started: Option<v1::Started>,
    replies: mpsc::UnboundedReceiver<Reply>,
    cancel: Option<(SequenceId, mpsc::UnboundedSender<Event>)>,
}

impl Stream for Answer {
    type Item = Result<v1::GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = |event| Poll::Ready(Some(Ok(v1::GenerateEvent { event: Some(event) })));
        if let Some(started) = self.started.take() {
            return event(generate_event::Event::Started(started));
        }
        if self.cancel.is_none() {
            return Poll::Ready(None);
        }
        match self.replies.poll_recv(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Reply::Event(e))) => {
                if matches!(e, generate_event::Event::Finished(_)) {
                    self.cancel = None;
                }
                event(e)
            }
            Poll::Ready(Some(Reply::Failed(error))) => {
                self.cancel = None;
                Poll::Ready(Some(Err(status(&error))))
            }
            Poll::Ready(Some(Reply::Accepted(_) | Reply::Vector(_) | Reply::Guesses(_)) | None) => {
                self.cancel = None;
                Poll::Ready(Some(Err(status(&EngineError::ShuttingDown))))
            }
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some((id, events)) = self.cancel.take() {
            // An engine that is gone has nothing to free.
            let _ = events.send(Event::Cancel(id));
        }
    }
}

/// The deadline that gRPC clients send as `grpc-timeout`: up to eight digits and a unit.
fn grpc_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let value = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let n: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_grpc_timeouts() {
        let read = |value: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", value.parse().unwrap());
            grpc_timeout(&metadata)
        };
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        for bad in ["", "S", "5", "5x", "123456789S", "-1S"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }
}
