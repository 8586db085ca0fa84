//! Plans with links, and what workers are told of them.

use std::{
    collections::BTreeMap,
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use strata_proto::{DeviceKind, Digest, Files, LayerRange, Progress, StageChannel, Worker};
use tonic::async_trait;

use super::*;
use crate::planner::{
    Split,
    tests::{device, profile},
};

/// A worker that does as it is told at once, and remembers it.
#[derive(Default)]
struct Obedient {
    plan: Mutex<HashMap<String, StagePlan>>,
    asked_to_mint: Mutex<Vec<String>>,
    connected: Mutex<HashMap<String, v1::ConnectRequest>>,
    /// Bytes of the ids it mints.
    id_bytes: usize,
    /// Holds `connect` back until both ends of the link are there.
    both: Option<Arc<tokio::sync::Barrier>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Obedient {
    fn stage(&self, device: &str) -> StagePlan {
        lock(&self.plan)[device].clone()
    }
}

#[async_trait]
impl Worker for Obedient {
    async fn describe(&self, _: v1::DescribeRequest) -> Result<v1::Described, Status> {
        Ok(v1::Described::default())
    }

    async fn read_tokenizer(&self, _: v1::ReadTokenizerRequest) -> Result<Files, Status> {
        Ok(Files::new())
    }

    async fn load(&self, request: v1::LoadRequest) -> Result<Progress, Status> {
        let (progress, receiver) = mpsc::channel(1);
        let spec = request.spec.unwrap();
        let stage = self.stage(&spec.device);
        let digest = |module: u32| vec![module as u8; Digest::BYTES].into();
        let digests = v1::WeightDigests {
            embedding: spec.embedding.then(|| digest(100)),
            layers: (stage.layers.first..stage.layers.end).map(digest).collect(),
            head: spec.head.then(|| digest(101)),
        };
        let (resident_bytes, digests) = (Some(stage.weight_bytes), Some(digests));
        let done = v1::LoadProgress { resident_bytes, digests, ..v1::LoadProgress::default() };
        progress.try_send(Ok(done)).unwrap();
        Ok(receiver)
    }

    async fn prepare(&self, request: v1::PrepareRequest) -> Result<v1::Prepared, Status> {
        let device = request.spec.unwrap().device;
        let StagePlan { states, workspace_bytes, .. } = self.stage(&device);
        let mut nccl_id = Vec::new();
        if request.mint_nccl_id {
            nccl_id = vec![device.as_bytes()[device.len() - 1]; self.id_bytes];
            lock(&self.asked_to_mint).push(device);
        }
        let link_address = "0.0.0.0:7".to_owned();
        let states = Some(states.into());
        Ok(v1::Prepared { states, workspace_bytes, link_address, nccl_id: nccl_id.into() })
    }

    async fn connect(&self, request: v1::ConnectRequest) -> Result<(), Status> {
        if let Some(both) = &self.both {
            both.wait().await;
        }
        lock(&self.connected).insert(request.device.clone(), request);
        Ok(())
    }

    async fn run(&self, _: v1::Open) -> Result<StageChannel, Status> {
        let (to, _) = mpsc::channel(1);
        let (answers, from) = mpsc::channel(1);
        let opened = from_stage::Message::Opened(v1::Opened { next_step: 0 });
        answers.try_send(v1::FromStage { message: Some(opened) }).unwrap();
        Ok(StageChannel { to, from })
    }

    async fn abort(&self, _: v1::AbortRequest) -> Result<(), Status> {
        Ok(())
    }
}

/// One process with a CPU and two GPUs that do not reach each other.
fn discovered(worker: Arc<Obedient>, nccl: bool) -> Discovery {
    let mut offers = vec![
        device(DeviceKind::Cuda, "cuda:0", 1 << 20, false),
        device(DeviceKind::Cuda, "cuda:1", 1 << 20, false),
        device(DeviceKind::Cpu, "cpu", 1 << 20, false),
    ];
    let gpus = offers.iter_mut().filter(|offer| nccl && offer.device.kind == DeviceKind::Cuda);
    gpus.for_each(|offer| offer.device.links = vec![LinkKind::Nccl]);
    let member = Member { name: "w".into(), worker, rank: 0, host: "h".into() };
    let members = HashMap::from([("w".to_owned(), (member, "hub".to_owned()))]);
    Discovery {
        ignore_tensors: Vec::new(),
        profile: profile(&[(100, 1); 6], 0, false),
        offers,
        members,
        resident: HashMap::new(),
        left_out: BTreeMap::new(),
    }
}

fn deployment(links: Option<LinkKind>) -> Deployment {
    Deployment {
        weights: None,
        model: "m".into(),
        ignore_tensors: Vec::new(),
        split: Split::Counts(vec![2, 2, 2]),
        dtype: None,
        quantization: None,
        kv_tokens: Some(32),
        max_sequences: None,
        context: None,
        replicas: None,
        standbys: 0,
        links,
        max_step_tokens: 4,
        max_step_rows: 2,
        heartbeat_timeout: Duration::from_secs(2),
    }
}

fn fence() -> Fence {
    Fence { term: 1, pipeline: 0, incarnation: 1 }
}

async fn bring_up(found: &Discovery, worker: &Obedient) -> Result<Pipeline, PipelineError> {
    let plan = found.plan(&deployment(None))?;
    let stages = plan.replicas[0].stages.iter();
    *lock(&worker.plan) = stages.map(|stage| (stage.device.clone(), stage.clone())).collect();
    let deployment = deployment(None);
    Pipeline::bring_up(
        found,
        &plan,
        fence(),
        Arc::new(|_| {}),
        Arc::new(|_, _| {}),
        &deployment,
        &History::default(),
    )
    .await
}

#[tokio::test]
async fn both_ends_of_an_nccl_link_get_the_id_that_the_sending_end_minted() {
    // Were stages connected one after the other, the first one would wait for ever.
    let both = Some(Arc::new(tokio::sync::Barrier::new(3)));
    let worker = Arc::new(Obedient { id_bytes: NCCL_ID_BYTES, both, ..Obedient::default() });
    bring_up(&discovered(worker.clone(), true), &worker).await.unwrap();
    assert_eq!(*lock(&worker.asked_to_mint), ["cuda:0"], "only the first link is by NCCL");
    let connected = lock(&worker.connected);
    let down = connected["cuda:0"].downstream.clone().unwrap();
    let up = connected["cuda:1"].upstream.clone().unwrap();
    for link in [&down, &up] {
        assert_eq!((link.kind(), &link.nccl_id[..]), (v1::LinkKind::Nccl, &[b'0'; NCCL_ID_BYTES][..]));
    }
    let next = connected["cuda:1"].downstream.clone().unwrap();
    assert_eq!((next.kind(), next.nccl_id.len()), (v1::LinkKind::Loopback, 0));
    assert_eq!(connected["cpu"].downstream, None);
}

#[tokio::test]
async fn a_missing_or_short_id_is_an_error() {
    for id_bytes in [0, 127] {
        let worker = Arc::new(Obedient { id_bytes, ..Obedient::default() });
        let error = bring_up(&discovered(worker.clone(), true), &worker).await.unwrap_err().to_string();
        let says = format!("worker w: its NCCL id has {id_bytes} bytes where 128 were expected");
        assert_eq!(error, says);
    }
}

#[test]
fn plans_say_which_links_and_why() {
    let found = discovered(Arc::default(), false);
    let plan = found.plan(&deployment(None)).unwrap();
    let json = serde_json::to_value(&plan).unwrap();
    let link = |at: usize| {
        let stage = &json["replicas"][0]["stages"][at];
        (stage["link"].clone(), stage["link_reason"].clone())
    };
    let no_peers = "same process, no peer access from cuda:0 to cuda:1, no NCCL on h/w";
    assert_eq!(link(0), ("loopback".into(), no_peers.into()));
    assert_eq!(link(1), ("loopback".into(), "same process, cpu is no GPU".into()));
    assert_eq!(link(2), (serde_json::Value::Null, serde_json::Value::Null));
    assert_eq!(json["replicas"][0]["stages"][0]["layers"], serde_json::json!([0, 2]));
    assert_eq!(Plan::try_from(v1::Plan::from(&plan)).unwrap(), plan);
    let tcp = found.plan(&deployment(Some(LinkKind::Tcp))).unwrap();
    let kinds = |plan: &Plan| -> Vec<_> {
        plan.replicas[0].stages.iter().map(|s| s.link.as_ref().map(|l| l.kind)).collect()
    };
    assert_eq!(kinds(&tcp), [Some(LinkKind::Tcp), Some(LinkKind::Tcp), None]);
    let error = found.plan(&deployment(Some(LinkKind::Nccl))).unwrap_err().to_string();
    assert_eq!(
        error,
        "the stages on w/cuda:0 and w/cuda:1 cannot be linked by nccl: no NCCL on h/w; use --links auto, which takes \
         loopback between them, or --links tcp, which is always possible"
    );
    assert_eq!(plan.replicas[0].stages[2].layers, LayerRange::new(4, 6));
}

#[test]
fn unspecified_hosts_become_the_workers_own() {
    assert_eq!(reachable("0.0.0.0:71", "10.0.0.2"), "10.0.0.2:71");
    assert_eq!(reachable("127.0.0.1:71", "10.0.0.2"), "127.0.0.1:71");
    assert_eq!(reachable("[::]:71", "node-3"), "node-3:71");
}

#[test]
fn tokens_differ() {
    assert_ne!(mint_token(), mint_token());
}
