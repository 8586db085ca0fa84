//! `strata.v1.Inference`: an adapter to [`Session`], no logic.

use std::time::Duration;

use strata_proto::{
    port::Peer,
    v1::{self, inference_server::Inference},
};
use tonic::{Request, Response, Status, async_trait, metadata::MetadataMap};

use super::{read::Read, told::told};
use crate::{
    front::session::{Session, SessionError},
    request::bounds::MAX_DEADLINE,
};

pub(super) struct InferenceService {
    pub session: Session,
    /// Longest that an answer waits for its client to read on.
    pub slow_reader: Duration,
}

impl InferenceService {
    /// The session for a call's connection, what came with the call, and its message.
    fn parts<T>(&self, request: Request<T>) -> (Session, MetadataMap, T) {
        let (metadata, extensions, message) = request.into_parts();
        let connection = extensions.get::<Peer>().map_or(0, |peer| peer.connection);
        (self.session.over(connection), metadata, message)
    }
}

#[async_trait]
impl Inference for InferenceService {
    type GenerateStream = Read;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (session, metadata, mut request) = self.parts(request);
        request.deadline_ms = sooner(request.deadline_ms, &metadata);
        let answer = session.generate(request).await.map_err(|e| told(&e))?;
        Ok(Response::new(Read::new(answer, self.slow_reader)))
    }

    async fn classify(
        &self,
        request: Request<v1::ClassifyRequest>,
    ) -> Result<Response<v1::ClassifyResponse>, Status> {
        let (session, metadata, mut request) = self.parts(request);
        request.deadline_ms = sooner(request.deadline_ms, &metadata);
        response(session.classify(request).await)
    }

    async fn rerank(
        &self,
        request: Request<v1::RerankRequest>,
    ) -> Result<Response<v1::RerankResponse>, Status> {
        let (session, metadata, mut request) = self.parts(request);
        request.deadline_ms = sooner(request.deadline_ms, &metadata);
        response(session.rerank(request).await)
    }

    async fn embed(&self, request: Request<v1::EmbedRequest>) -> Result<Response<v1::EmbedResponse>, Status> {
        let (session, metadata, mut request) = self.parts(request);
        request.deadline_ms = sooner(request.deadline_ms, &metadata);
        response(session.embed(request).await)
    }

    async fn fill_mask(
        &self,
        request: Request<v1::FillMaskRequest>,
    ) -> Result<Response<v1::FillMaskResponse>, Status> {
        let (session, metadata, mut request) = self.parts(request);
        request.deadline_ms = sooner(request.deadline_ms, &metadata);
        response(session.fill_masks(request).await)
    }

    async fn classify_tokens(
        &self,
        request: Request<v1::ClassifyTokensRequest>,
    ) -> Result<Response<v1::ClassifyTokensResponse>, Status> {
        let (session, metadata, mut request) = self.parts(request);
        request.deadline_ms = sooner(request.deadline_ms, &metadata);
        response(session.classify_tokens(request).await)
    }

    async fn answer(
        &self,
        request: Request<v1::AnswerRequest>,
    ) -> Result<Response<v1::AnswerResponse>, Status> {
        let (session, metadata, mut request) = self.parts(request);
        request.deadline_ms = sooner(request.deadline_ms, &metadata);
        response(session.answer(request).await)
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let (session, _, request) = self.parts(request);
        response(session.tokenize(request).await)
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let (session, _, request) = self.parts(request);
        response(session.detokenize(request).await)
    }
}

fn response<T>(answer: Result<T, SessionError>) -> Result<Response<T>, Status> {
    answer.map(Response::new).map_err(|error| told(&error))
}

/// The sooner of the request's own deadline and of the one that gRPC clients send, in milliseconds.
fn sooner(deadline_ms: Option<u64>, metadata: &MetadataMap) -> Option<u64> {
    let timeout = grpc_timeout(metadata).map(|timeout| {
        // One that a request could not have is as long as it may be.
        let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        millis.clamp(1, MAX_DEADLINE.as_millis() as u64)
    });
    deadline_ms.into_iter().chain(timeout).min()
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

    fn timeout(value: &'static str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", value.parse().unwrap());
        metadata
    }

    #[test]
    fn reads_grpc_timeouts() {
        let read = |value| grpc_timeout(&timeout(value));
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        for bad in ["", "S", "5", "5x", "123456789S", "-1S"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_sooner_deadline_counts_and_a_client_may_wait_for_ever() {
        assert_eq!(sooner(None, &MetadataMap::new()), None);
        assert_eq!(sooner(Some(0), &timeout("1S")), Some(0), "which is refused");
        assert_eq!(sooner(Some(7), &timeout("1S")), Some(7));
        assert_eq!(sooner(Some(7000), &timeout("1S")), Some(1000));
        assert_eq!(sooner(None, &timeout("10n")), Some(1));
        assert_eq!(sooner(None, &timeout("99999999H")), Some(24 * 3600 * 1000));
    }
}
