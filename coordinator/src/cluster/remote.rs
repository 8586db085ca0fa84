//! A worker behind gRPC: an adapter, no logic.

use std::time::Duration;

use futures::Stream;
use strata_proto::{
    Files, MAX_HEADER_LIST, MAX_MODEL_FILES, MAX_STAGE_MESSAGE, PING_EVERY, PING_TIMEOUT, Progress, Secret,
    StageChannel, Worker, http_url,
    v1::{self, stage_client::StageClient, to_stage},
};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tonic::{
    Extensions, Request, Status, async_trait,
    metadata::MetadataMap,
    transport::{Channel, Endpoint},
};

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const QUEUE: usize = 64;
/// Signs of life in the time after which the coordinator would be missed.
const HEARTBEATS: u32 = 4;

/// A worker in another process.
#[derive(Debug, Clone)]
pub struct RemoteWorker {
    client: StageClient<Channel>,
    secret: Option<Secret>,
}

impl RemoteWorker {
    /// A worker at `url`; connects when first called. Also returns its name in plans (`HOST:PORT`) and its host.
    ///
    /// # Errors
    /// If the URL has no host and port, or is not one of `http`.
    pub fn lazy(url: &str) -> Result<(Self, String, String), String> {
        let url = http_url(url).map_err(|why| format!("worker {url}: {why}"))?;
        let bad = |why: &str| format!("worker {url:?}: {why}; expected a URL such as http://10.0.0.7:7801");
        let endpoint = Endpoint::from_shared(url.clone()).map_err(|e| bad(&e.to_string()))?;
        let host = endpoint.uri().host().ok_or_else(|| bad("it has no host"))?.to_owned();
        let port = endpoint.uri().port_u16().ok_or_else(|| bad("it has no port"))?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_max_header_list_size(MAX_HEADER_LIST)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_lazy();
        let client = StageClient::new(channel)
            .max_decoding_message_size(MAX_STAGE_MESSAGE)
            .max_encoding_message_size(MAX_STAGE_MESSAGE);
        Ok((RemoteWorker { client, secret: None }, format!("{host}:{port}"), host))
    }

    /// The same, whose calls prove this secret.
    pub fn with_secret(self, secret: Option<Secret>) -> Self {
        RemoteWorker { secret, ..self }
    }

    /// A call with its proof.
    fn signed<T: strata_proto::Message>(&self, message: T, method: &str) -> Request<T> {
        let proof = self.proof(method, &message);
        Request::from_parts(proof, Extensions::default(), message)
    }

    /// The metadata of a call with `message`, or with a stream that begins with it.
    fn proof(&self, method: &str, message: &impl strata_proto::Message) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        if let Some(secret) = &self.secret {
            secret.sign(&mut metadata, method, message);
        }
        metadata
    }
}

fn message(message: to_stage::Message) -> v1::ToStage {
    v1::ToStage { message: Some(message) }
}

/// Orders, with signs of life of the coordinator among them, until there will be no more orders.
fn alive(orders: mpsc::Receiver<v1::ToStage>, every: Duration) -> impl Stream<Item = v1::ToStage> {
    let ticks = tokio::time::interval(every.max(Duration::from_millis(1)));
    futures::stream::unfold((orders, ticks), |(mut orders, mut ticks)| async move {
        let next = tokio::select! {
            order = orders.recv() => order?,
            _ = ticks.tick() => message(to_stage::Message::Heartbeat(v1::Heartbeat {})),
        };
        Some((next, (orders, ticks)))
    })
}

#[async_trait]
impl Worker for RemoteWorker {
    async fn describe(&self, request: v1::DescribeRequest) -> Result<v1::Described, Status> {
        self.client.clone().describe(self.signed(request, "Describe")).await.map(tonic::Response::into_inner)
    }

    async fn read_tokenizer(&self, request: v1::ReadTokenizerRequest) -> Result<Files, Status> {
        let mut chunks =
            self.client.clone().read_tokenizer(self.signed(request, "ReadTokenizer")).await?.into_inner();
        let mut files = Files::new();
        let mut total = 0;
        while let Some(chunk) = chunks.message().await? {
            total += chunk.data.len() as u64;
            if total > MAX_MODEL_FILES {
                return Err(Status::failed_precondition(format!(
                    "the worker sends more than {MAX_MODEL_FILES} bytes of tokenizer files"
                )));
            }
            files.entry(chunk.name).or_default().extend(chunk.data);
        }
        Ok(files)
    }

    async fn load(&self, request: v1::LoadRequest) -> Result<Progress, Status> {
        let mut updates = self.client.clone().load(self.signed(request, "Load")).await?.into_inner();
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            while let Some(update) = updates.next().await {
                if sender.send(update).await.is_err() {
                    break;
                }
            }
        });
        Ok(receiver)
    }

    async fn prepare(&self, request: v1::PrepareRequest) -> Result<v1::Prepared, Status> {
        self.client.clone().prepare(self.signed(request, "Prepare")).await.map(tonic::Response::into_inner)
    }

    async fn connect(&self, request: v1::ConnectRequest) -> Result<(), Status> {
        self.client.clone().connect(self.signed(request, "Connect")).await.map(drop)
    }

    async fn run(&self, open: v1::Open) -> Result<StageChannel, Status> {
        let (to, orders) = mpsc::channel(QUEUE);
        let proof = self.proof("Run", &open);
        let every = Duration::from_millis(open.heartbeat_timeout_ms.into()) / HEARTBEATS;
        let stream = tokio_stream::once(message(to_stage::Message::Open(open))).chain(alive(orders, every));
        let mut answers = self
            .client
            .clone()
            .run(Request::from_parts(proof, Extensions::default(), stream))
            .await?
            .into_inner();
        let (sender, from) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            while let Some(Ok(answer)) = answers.next().await {
                if sender.send(answer).await.is_err() {
                    break;
                }
            }
        });
        Ok(StageChannel { to, from })
    }

    async fn abort(&self, request: v1::AbortRequest) -> Result<(), Status> {
        self.client.clone().abort(self.signed(request, "Abort")).await.map(drop)
    }
}
