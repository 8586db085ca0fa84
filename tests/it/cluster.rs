//! A whole cluster in one process, on free ports, and what tests need around it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use serde_json::Value;
use strata_coordinator::{
    ClientLimits, Coordinator, CoordinatorConfig, Deployment, Limits, StartError,
    cluster::membership::{Member, MemberEvent},
    config,
    engine::Snapshot,
    front::grpc,
    planner::Split,
};
use strata_proto::{
    DType, LinkKind, Quantization, Worker,
    v1::{self, cluster_client::ClusterClient, generate_event, inference_client::InferenceClient},
};
use strata_worker::{
    Hub, LocalWorker, Models, StepHook, WorkerConfig,
    device::{Compute, DeviceSpec, Directories},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tonic::{Status, transport::Channel};

/// Longest wait for anything in a test.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A directory of `tests/models`.
pub fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models").join(name)
}

/// Every model with expected outputs, by directory.
pub fn models_with_expectations() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(model(""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("expected.json").exists())
        .collect();
    found.sort();
    assert!(found.len() >= 5, "the fixtures are missing: {found:?}");
    found
}

/// What transformers makes of one input of an encoder.
#[derive(Debug, Clone, Deserialize)]
pub struct ExpectedInput {
    pub text: String,
    pub pair: Option<String>,
    pub ids: Vec<u32>,
    #[serde(default)]
    pub masked: Vec<u32>,
    /// Tokens in front that are left out of the vector.
    #[serde(default)]
    pub pooled_from: u32,
    /// A vector, the logits of classes, or the logits of each mask.
    pub values: Vec<Vec<f32>>,
}

/// What transformers makes of the inputs of an encoder; `None` for a decoder.
pub fn encoder_expectations(directory: &Path) -> Option<Vec<ExpectedInput>> {
    let text = std::fs::read_to_string(directory.join("expected.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let inputs = json["inputs"].take();
    (!inputs.is_null()).then(|| serde_json::from_value(inputs).unwrap())
}

/// What transformers says about one prompt.
#[derive(Debug, Clone)]
pub struct Expected {
    pub ids: Vec<u32>,
    pub greedy: Vec<u32>,
    pub last_row: Vec<f32>,
}

/// What transformers says about a model.
pub fn expectations(directory: &Path) -> Vec<Expected> {
    let text = std::fs::read_to_string(directory.join("expected.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let ids = |v: &Value| v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect();
    let row = |v: &Value| v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
    let prompts = json["prompts"].as_array().unwrap().iter();
    prompts
        .map(|p| Expected {
            ids: ids(&p["ids"]),
            greedy: ids(&p["greedy_ids"]),
            last_row: row(&p["last_row"]),
        })
        .collect()
}

/// How a test wants its cluster. The defaults: the demo model on one worker, in float32.
#[derive(Clone)]
pub struct Options {
    pub model: PathBuf,
    pub workers: usize,
    /// Of each worker.
    pub devices: Vec<DeviceSpec>,
    pub split: Split,
    pub links: Option<LinkKind>,
    pub dtype: Option<DType>,
    pub quantization: Option<Quantization>,
    pub threads: usize,
    pub kv_tokens: Option<u64>,
    pub max_step_tokens: u32,
    pub prefill_chunk: u32,
    pub inter_token: Duration,
    pub prefix_cache: bool,
    pub max_requests: usize,
    pub clients: ClientLimits,
    pub standbys: u32,
    pub hook: Option<StepHook>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            model: model("shakespeare"),
            workers: 1,
            devices: vec![DeviceSpec::cpu(Some(1 << 30))],
            split: Split::Balanced,
            links: None,
            dtype: Some(DType::F32),
            quantization: None,
            threads: 1,
            kv_tokens: None,
            max_step_tokens: 256,
            prefill_chunk: 64,
            inter_token: Duration::ZERO,
            prefix_cache: true,
            max_requests: 256,
            clients: ClientLimits::default(),
            standbys: 0,
            hook: None,
        }
    }
}

impl Options {
    pub fn deployment(&self) -> Deployment {
        Deployment {
            ignore_tensors: Vec::new(),
            weights: None,
            model: name_of(&self.model),
            split: self.split.clone(),
            dtype: self.dtype,
            quantization: self.quantization,
            kv_tokens: self.kv_tokens,
            max_sequences: None,
            context: None,
            replicas: None,
            standbys: self.standbys,
            links: self.links,
            max_step_tokens: self.max_step_tokens,
            max_step_rows: self.max_step_tokens.min(64),
            heartbeat_timeout: config::HEARTBEAT_TIMEOUT,
        }
    }

    /// Workers of this process, each with the same devices.
    pub fn members(&self) -> Vec<Member> {
        let hub = Arc::<Hub>::default();
        let start = |rank: usize| {
            let worker = LocalWorker::start(WorkerConfig {
                models: Models::One { name: name_of(&self.model), directory: self.model.clone() },
                devices: self.devices.clone(),
                compute: Compute { threads: self.threads, ..Compute::shared_by(1) },
                link_address: "127.0.0.1:0".parse().unwrap(),
                link_advertise: None,
                hub: hub.clone(),
                step_hook: self.hook.clone(),
                directories: Directories { spill: Some(std::env::temp_dir()), kernels: None },
                verify_every: Some(Duration::from_secs(1)),
            });
            let worker: Arc<dyn Worker> = Arc::new(worker.unwrap());
            Member { name: format!("worker-{rank}"), worker, rank, host: "127.0.0.1".into() }
        };
        (0..self.workers).map(start).collect()
    }
}

pub fn name_of(model: &Path) -> String {
    model.file_name().unwrap().to_string_lossy().into_owned()
}

/// A running cluster; ends when dropped.
pub struct Cluster {
    pub address: String,
    pub coordinator: Coordinator,
    pub members: mpsc::UnboundedSender<MemberEvent>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
    leave: Leave,
}

/// Takes the workers away at the end, so that they give back what their devices hold: an emulated GPU has no more than a real
/// one, and a coordinator lives for as long as its process.
struct Leave {
    members: mpsc::UnboundedSender<MemberEvent>,
    workers: usize,
}

impl Drop for Leave {
    fn drop(&mut self) {
        for rank in 0..self.workers {
            // Whoever listened may be gone.
            let _ = self.members.send(MemberEvent::Left(format!("worker-{rank}")));
        }
    }
}

impl Cluster {
    pub async fn start(options: &Options) -> Cluster {
        Self::try_start(options).await.unwrap()
    }

    pub async fn try_start(options: &Options) -> Result<Cluster, StartError> {
        let (cluster, events) = Cluster::open(options).await;
        for member in options.members() {
            cluster.members.send(MemberEvent::Joined(member)).unwrap();
        }
        cluster.coordinator.start(events, Arc::new(|_| {})).await?;
        Ok(cluster)
    }

    /// A coordinator with a port that has not started yet, and what it is to be started with.
    pub async fn open(options: &Options) -> (Cluster, mpsc::UnboundedReceiver<MemberEvent>) {
        let config = CoordinatorConfig {
            deployment: options.deployment(),
            limits: Limits {
                prefill_chunk: options.prefill_chunk,
                inter_token: options.inter_token,
                prefix_cache: options.prefix_cache,
                max_requests: options.max_requests,
            },
            clients: options.clients.clone(),
            expected_members: Some(options.workers),
            join_timeout: PATIENCE,
            skip_checks: Vec::new(),
            names: Vec::new(),
            version: String::new(),
            secret: None,
        };
        let coordinator = Coordinator::new(config);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = grpc::serve(coordinator.clone(), listener, async {
            let _ = stopped.await;
        });
        let serving = tokio::spawn(async move { serving.await.unwrap() });
        let (members, events) = mpsc::unbounded_channel();
        let leave = Leave { members: members.clone(), workers: options.workers };
        (Cluster { address, coordinator, members, stop, serving, leave }, events)
    }

    /// Tells it to stop; what it still does then.
    pub fn stop(self) -> JoinHandle<()> {
        drop(self.stop);
        // It finishes what it has begun.
        std::mem::forget(self.leave);
        self.serving
    }

    pub async fn client(&self) -> InferenceClient<Channel> {
        client(&self.address).await
    }

    /// Waits until the engine shows what the test waits for.
    pub async fn wait_for(&self, what: &str, holds: impl FnMut(&Snapshot) -> bool) -> Snapshot {
        let mut snapshot = self.coordinator.watch();
        let waited = tokio::time::timeout(PATIENCE, snapshot.wait_for(holds)).await;
        match waited {
            Ok(snapshot) => snapshot.unwrap().clone(),
            Err(_) => panic!("waited in vain for {what}"),
        }
    }

    /// Waits until nothing is running, waiting or held.
    pub async fn wait_idle(&self) {
        self.wait_for("an idle engine", |s| {
            s.load.running + s.load.waiting == 0 && s.load.kv_tokens_used == 0
        })
        .await;
    }
}

pub async fn client(address: &str) -> InferenceClient<Channel> {
    let channel = Channel::from_shared(address.to_owned()).unwrap().connect().await.unwrap();
    InferenceClient::new(channel)
}

/// What a server says of itself.
pub async fn status(address: &str) -> v1::StatusResponse {
    let channel = Channel::from_shared(address.to_owned()).unwrap().connect().await.unwrap();
    ClusterClient::new(channel).status(v1::StatusRequest {}).await.unwrap().into_inner()
}

/// A whole answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    pub prompt_ids: Vec<u32>,
    pub ids: Vec<u32>,
    pub text: String,
    pub reason: i32,
    pub ended_by: Option<v1::finished::EndedBy>,
    pub seed: u64,
    pub usage: v1::Usage,
    pub logprobs: Vec<v1::TokenLogprobs>,
}

/// Sends a request and reads the answer to its end; indexes must be complete.
pub async fn ask(client: &InferenceClient<Channel>, request: v1::GenerateRequest) -> Result<Answer, Status> {
    let mut stream = client.clone().generate(request).await?.into_inner();
    let mut answer = Answer::default();
    while let Some(event) =
        tokio::time::timeout(PATIENCE, stream.message()).await.expect("a silent stream")?
    {
        match event.event.unwrap() {
            generate_event::Event::Started(started) => {
                answer.prompt_ids = started.prompt_token_ids;
                answer.seed = started.seed;
            }
            generate_event::Event::Tokens(tokens) => {
                assert_eq!(tokens.index as usize, answer.ids.len(), "an index is missing or repeated");
                answer.ids.extend(tokens.token_ids);
                answer.text += &tokens.text;
                answer.logprobs.extend(tokens.logprobs);
            }
            generate_event::Event::Finished(finished) => {
                answer.text += &finished.text;
                answer.reason = finished.reason;
                answer.ended_by = finished.ended_by;
                answer.usage = finished.usage.unwrap();
                return Ok(answer);
            }
        }
    }
    panic!("a stream ended without `finished`");
}

/// A greedy request over token ids that ignores eos.
pub fn greedy(ids: &[u32], max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        token_ids: ids.to_vec(),
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        ..v1::GenerateRequest::default()
    }
}
