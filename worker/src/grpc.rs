//! The worker's calls over gRPC: an adapter, no logic.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt};
use strata_proto::{
    MAX_STAGE_MESSAGE, Message, PING_EVERY, PING_TIMEOUT, STAGE_METHODS, Secret, Worker,
    port::{self, Limits, Peer, Pings, Served},
    v1::{self, stage_server, to_stage},
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming, async_trait,
    metadata::MetadataMap,
    service::{Interceptor, Routes, interceptor::InterceptedService},
};
use tonic_health::ServingStatus;

use crate::sparing::Sparing;

/// How long the first message of a run may take.
const BEGIN_WITHIN: Duration = Duration::from_secs(10);
/// Pieces in which small files travel.
const CHUNK: usize = 256 << 10;

/// A coordinator that goes away without a word is noticed, whatever it has asked for. A run hears its heartbeats besides.
const PINGS: Pings = Pings { every: PING_EVERY, timeout: PING_TIMEOUT };

/// A coordinator has few.
const CONNECTIONS: usize = 256;

const SERVED: Served = Served {
    methods: STAGE_METHODS,
    standard: &[tonic_health::pb::health_server::SERVICE_NAME],
    http1: "This is the port of a worker, which a coordinator calls by gRPC (HTTP/2 without TLS): give its address to \
            `strata coordinator --worker http://HOST:PORT`, and ask the coordinator's port.\n",
    elsewhere: Some("this is the port of a worker: ask the coordinator that it works for"),
};

/// What health tells of.
const SERVICES: [&str; 2] = ["", "strata.v1.Stage"];

/// Answers a coordinator's calls until `drained` resolves, which is when the worker has no incarnation left. Health says
/// that it serves until `draining` does.
///
/// # Errors
/// If the transport fails.
pub async fn serve(
    worker: Arc<dyn Worker>,
    secret: Option<Secret>,
    listener: TcpListener,
    draining: impl Future<Output = ()> + Send + 'static,
    drained: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    for service in SERVICES {
        reporter.set_service_status(service, ServingStatus::Serving).await;
    }
    let mut closing = reporter.clone();
    let telling = tokio::spawn(async move {
        draining.await;
        for service in SERVICES {
            reporter.set_service_status(service, ServingStatus::NotServing).await;
        }
    });
    let closed = async move {
        drained.await;
        telling.abort();
        for service in SERVICES {
            // Whoever watches would keep the port open.
            closing.clear_service_status(service).await;
        }
    };
    let limits = Limits {
        pings: PINGS,
        connections: CONNECTIONS,
        calls_count: secret.is_none(),
        // Calls of who has the secret are streams of messages that go on for ever.
        bodies: None,
    };
    let routes = Routes::new(health).add_service(service(worker, secret));
    port::serve(listener, routes, &SERVED, limits, closed).await
}

/// The service `strata.v1.Stage` over any worker, for whoever has the secret, if there is one.
pub fn service(worker: Arc<dyn Worker>, secret: Option<Secret>) -> Guarded {
    let service = stage_server::StageServer::new(StageService { worker, secret: secret.clone() })
        .max_decoding_message_size(MAX_STAGE_MESSAGE)
        .max_encoding_message_size(MAX_STAGE_MESSAGE);
    InterceptedService::new(service, Guard(secret))
}

/// The service behind its guard.
pub type Guarded = InterceptedService<stage_server::StageServer<StageService>, Guard>;

/// Adapter of a [`Worker`] to tonic.
pub struct StageService {
    worker: Arc<dyn Worker>,
    secret: Option<Secret>,
}

impl StageService {
    /// The message of a call, if one made it who has the secret.
    fn admit<T: Message>(&self, request: Request<T>, method: &str) -> Result<T, Status> {
        let (metadata, _, message) = request.into_parts();
        self.check(&metadata, method, &message)?;
        Ok(message)
    }

    fn check(&self, metadata: &MetadataMap, method: &str, message: &impl Message) -> Result<(), Status> {
        let Some(secret) = &self.secret else { return Ok(()) };
        secret.check(metadata, method, message).inspect_err(tell)
    }
}

/// Refuses who has not the secret, if there is one, before anything of a call is read but its head.
#[derive(Debug, Clone)]
pub struct Guard(Option<Secret>);

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(secret) = &self.0 {
            secret.check_caller(request.metadata()).inspect_err(tell)?;
            request.extensions().get::<Peer>().into_iter().for_each(Peer::prove);
        }
        Ok(request)
    }
}

fn tell(status: &Status) {
    static REFUSALS: Sparing = Sparing::new();
    if REFUSALS.may_tell() {
        tracing::warn!("refused a call: {}", status.message());
    }
}

fn is_heartbeat(order: &v1::ToStage) -> bool {
    matches!(order.message, Some(to_stage::Message::Heartbeat(_)))
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn ack((): ()) -> Response<v1::Ack> {
    Response::new(v1::Ack {})
}

#[async_trait]
impl stage_server::Stage for StageService {
    type ReadTokenizerStream = BoxStream<v1::FileChunk>;
    type LoadStream = ReceiverStream<Result<v1::LoadProgress, Status>>;
    type RunStream = BoxStream<v1::FromStage>;

    async fn describe(
        &self,
        request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::Described>, Status> {
        self.worker.describe(self.admit(request, "Describe")?).await.map(Response::new)
    }

    async fn read_tokenizer(
        &self,
        request: Request<v1::ReadTokenizerRequest>,
    ) -> Result<Response<Self::ReadTokenizerStream>, Status> {
        let files = self.worker.read_tokenizer(self.admit(request, "ReadTokenizer")?).await?;
        let chunks = files.into_iter().flat_map(|(name, data)| {
            // An empty file is one empty chunk.
            let count = data.len().div_ceil(CHUNK).max(1);
            (0..count).map(move |i| {
                let piece = &data[i * CHUNK..data.len().min((i + 1) * CHUNK)];
                Ok(v1::FileChunk { name: name.clone(), data: piece.to_vec().into() })
            })
        });
        Ok(Response::new(Box::pin(futures::stream::iter(chunks.collect::<Vec<_>>()))))
    }

    async fn load(&self, request: Request<v1::LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        Ok(Response::new(ReceiverStream::new(self.worker.load(self.admit(request, "Load")?).await?)))
    }

    async fn prepare(&self, request: Request<v1::PrepareRequest>) -> Result<Response<v1::Prepared>, Status> {
        self.worker.prepare(self.admit(request, "Prepare")?).await.map(Response::new)
    }

    async fn connect(&self, request: Request<v1::ConnectRequest>) -> Result<Response<v1::Ack>, Status> {
        self.worker.connect(self.admit(request, "Connect")?).await.map(ack)
    }

    async fn run(
        &self,
        request: Request<Streaming<v1::ToStage>>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let (metadata, _, mut orders) = request.into_parts();
        let first = tokio::time::timeout(BEGIN_WITHIN, orders.message()).await;
        let late = |_| Status::deadline_exceeded(format!("the run did not begin within {BEGIN_WITHIN:?}"));
        let Some(v1::ToStage { message: Some(to_stage::Message::Open(open)) }) = first.map_err(late)?? else {
            return Err(Status::invalid_argument("the first message of a run must be `open`"));
        };
        self.check(&metadata, "Run", &open)?;
        let silence = Duration::from_millis(open.heartbeat_timeout_ms.into());
        let channel = self.worker.run(open).await?;
        // When the coordinator goes away, its half ends, breaks or is silent; dropping `to` then ends the run.
        tokio::spawn(async move {
            loop {
                match tokio::time::timeout(silence, orders.message()).await {
                    Ok(Ok(Some(order))) if is_heartbeat(&order) => {}
                    Ok(Ok(Some(order))) => {
                        if channel.to.send(order).await.is_err() {
                            break;
                        }
                    }
                    Ok(_) => break,
                    Err(_) => {
                        tracing::warn!("the coordinator has been silent for {silence:?}; its run ends");
                        break;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(channel.from).map(Ok))))
    }

    async fn abort(&self, request: Request<v1::AbortRequest>) -> Result<Response<v1::Ack>, Status> {
        self.worker.abort(self.admit(request, "Abort")?).await.map(ack)
    }
}
