//! `strata.v1.Inference`: from messages to the engine and back.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::Stream;
use strata_proto::{
    error::status,
    v1::{self, generate_event, inference_server::Inference},
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, async_trait, metadata::MetadataMap};

use crate::{
    admission::{self, AdmissionError, MAX_IDS},
    coordinator::Coordinator,
    messages::{EngineError, Event, Reply, Submission},
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
                let capacity = c.engine.snapshot.borrow().load.kv_tokens_total;
                // While no pipeline is up its capacity is unknown; the scheduler checks again when there is one.
                let capacity = if capacity == 0 { u64::MAX } else { capacity };
                admission::check(request, &c.tokenizer, &c.profile, capacity)
            })
            .await?;
        checked.deadline = match (checked.deadline, timeout) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let started = v1::Started {
            request_id: uuid::Uuid::now_v7().to_string(),
            model: self.coordinator.profile.model.clone(),
            prompt_token_ids: checked.prompt.clone(),
            seed: checked.seed,
        };
        tracing::debug!(request_id = started.request_id, prompt_tokens = checked.prompt.len(), "accepted");
        let (reply, mut replies) = mpsc::unbounded_channel();
        let submission = Submission { request: checked, arrived, reply, permit };
        let events = self.coordinator.engine.events.clone();
        let gone = || status(&EngineError::ShuttingDown);
        events.send(Event::Submit(Box::new(submission))).map_err(|_| gone())?;
        match replies.recv().await {
            Some(Reply::Accepted(id)) => {
                Ok(Response::new(Answer { started: Some(started), replies, cancel: Some((id, events)) }))
            }
            Some(Reply::Failed(error)) => Err(status(&error)),
            Some(Reply::Event(_)) | None => Err(gone()),
        }
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let _permit = self.coordinator.gate.enter().map_err(|e| status(&e))?;
        let request = request.into_inner();
        let token_ids = self.tokenizing(move |c| {
            admission::check_model(&request.model, &c.profile.model)?;
            admission::check_text("text", &request.text)?;
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
            admission::check_model(&request.model, &c.profile.model)?;
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
            Poll::Ready(Some(Reply::Accepted(_)) | None) => {
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
