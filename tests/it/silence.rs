//! Links and workers that fall silent without a word: real processes, their links through a proxy.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::join_all;
use strata_coordinator::{
    cluster::{
        History, RemoteWorker,
        discovery::discover,
        membership::Member,
        pipeline::{Pipeline, PipelineEvent},
    },
    config::HEARTBEAT_TIMEOUT,
};
use strata_proto::v1::{self, Fence, generate_event, inference_client::InferenceClient};
use strata_worker::{
    LocalWorker, Models, WorkerConfig,
    device::{Compute, DeviceSpec},
    grpc,
};
use tokio::sync::{mpsc, watch};
use tonic::transport::Channel;

use crate::{
    cluster::{Options, PATIENCE, client, expectations, greedy, model, status},
    processes::{Process, workers},
    proxy::{Fault, Proxy, Way},
};

const TOKENS: u32 = 200;
const STREAMS: usize = 8;
/// The gap that a fault may cause, by the issue: what it takes to notice, and two seconds. Three times as long on
/// machines that others use, too.
const GAP: Duration = Duration::from_secs(3 * (HEARTBEAT_TIMEOUT.as_secs() + 2));

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A worker whose links come in through a proxy.
async fn behind_a_proxy() -> (Process, Proxy) {
    let models = model("");
    let listen = free_address();
    let proxy = Proxy::to(listen).await;
    let (listen, advertise) = (listen.to_string(), proxy.address.to_string());
    let args = [
        "worker",
        "--models",
        models.to_str().unwrap(),
        "--link-listen",
        &listen,
        "--link-advertise",
        &advertise,
    ];
    (Process::start(&args, "listening "), proxy)
}

/// A coordinator that gives each of the first workers two layers; further ones are spares.
fn coordinator(workers: &[&Process]) -> Process {
    let urls: Vec<_> = workers.iter().map(|w| w.address.as_str()).collect();
    let urls = urls.join(",");
    let args = ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    Process::start(&[&args[..], &["--split", "2,2,2"]].concat(), "ready ")
}

/// One answer, and the longest pause between two of its tokens. Counts tokens.
async fn answer(
    mut client: InferenceClient<Channel>,
    ids: Vec<u32>,
    seen: watch::Sender<u32>,
) -> (Vec<u32>, Duration) {
    let mut stream = client.generate(greedy(&ids, TOKENS)).await.unwrap().into_inner();
    let (mut got, mut longest) = (Vec::new(), Duration::ZERO);
    let mut last = Instant::now();
    while let Some(event) =
        tokio::time::timeout(PATIENCE, stream.message()).await.expect("a silent stream").unwrap()
    {
        if let Some(generate_event::Event::Tokens(tokens)) = event.event {
            assert_eq!(tokens.index as usize, got.len(), "an index is missing or repeated");
            longest = longest.max(last.elapsed());
            last = Instant::now();
            got.extend(tokens.token_ids);
            seen.send_modify(|count| *count += 1);
        }
    }
    (got, longest)
}

/// Streams that are disturbed once they run; each answer is exact, whatever the disturbance. Returns the longest gap,
/// and what the server says then.
async fn disturbed(coordinator: &Process, disturb: impl FnOnce()) -> (Duration, v1::StatusResponse) {
    let client = client(&coordinator.address).await;
    let prompts: Vec<_> = expectations(&model("shakespeare")).into_iter().map(|e| e.ids).collect();
    let count = watch::Sender::default();
    let run = |i: usize| answer(client.clone(), prompts[i % prompts.len()].clone(), count.clone());
    let undisturbed = join_all((0..prompts.len()).map(run)).await;
    let before = *count.borrow();
    let streams: Vec<_> = (0..STREAMS).map(|i| tokio::spawn(run(i))).collect();
    count.subscribe().wait_for(|count| *count > before + 100).await.unwrap();
    disturb();
    let mut longest = Duration::ZERO;
    for (i, stream) in streams.into_iter().enumerate() {
        let (got, gap) = stream.await.unwrap();
        assert_eq!(got, undisturbed[i % undisturbed.len()].0, "answer {i} changed");
        longest = longest.max(gap);
    }
    // What disturbs no answer may be noticed after the last one.
    let noticed = tokio::time::timeout(PATIENCE, async {
        loop {
            let status = status(&coordinator.address).await;
            if status.ready && status.fence.unwrap().incarnation > 1 {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let status = noticed.await.expect("the disturbance is not noticed");
    (longest, status)
}

fn stages(status: &v1::StatusResponse) -> Vec<String> {
    let stages = &status.plan.as_ref().unwrap().replicas[0].stages;
    stages.iter().map(|stage| format!("http://{}", stage.worker)).collect()
}

/// FAULTS 19, measured failure 4: bytes stop, sockets stay open. The spare takes the range of the stage that is not
/// reached.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_open_link_is_noticed_whichever_way_is_cut_and_the_spare_takes_over() {
    for way in [Way::Forth, Way::Back, Way::Both] {
        let others = workers(3);
        let (second, proxy) = behind_a_proxy().await;
        let coordinator = coordinator(&[&others[0], &second, &others[1], &others[2]]);
        assert_eq!(stages(&status(&coordinator.address).await)[1], second.address);
        assert!(proxy.carried() > 0, "the link does not come in through the proxy");
        let (gap, status) = disturbed(&coordinator, || proxy.set(way, Fault::Blackhole)).await;
        assert!(gap < GAP, "{way:?}: {gap:?}");
        let now = stages(&status);
        assert_eq!(now.len(), 3);
        assert!(!now.contains(&second.address), "{way:?}: {now:?}");
    }
}

/// FAULTS 6: a stage that is stopped, and whose machine acknowledges for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_stage_costs_a_bounded_pause_and_is_replaced() {
    let workers = workers(4);
    let coordinator = coordinator(&workers.iter().collect::<Vec<_>>());
    let (gap, status) = disturbed(&coordinator, || workers[1].signal("-STOP")).await;
    assert!(gap < GAP, "{gap:?}");
    assert_eq!(stages(&status), [0, 3, 2].map(|i: usize| workers[i].address.clone()));
    workers[1].signal("-CONT");
}

/// A spare that is stopped is not waited for when another stage is lost: that takes no silence to notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_spare_delays_nobody() {
    let workers = workers(5);
    let coordinator = coordinator(&workers.iter().collect::<Vec<_>>());
    workers[3].signal("-STOP");
    let (gap, status) = disturbed(&coordinator, || workers[1].signal("-KILL")).await;
    assert!(gap < 3 * Duration::from_secs(2), "{gap:?}");
    assert_eq!(stages(&status), [0, 4, 2].map(|i: usize| workers[i].address.clone()));
    workers[3].signal("-CONT");
}

/// What a link breaks by, other than silence: nobody is at fault, and the same stages go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_breaks_costs_a_pause_and_moves_nobody() {
    for fault in [Fault::Cut, Fault::Flip, Fault::Truncate] {
        let others = workers(2);
        let (second, proxy) = behind_a_proxy().await;
        let coordinator = coordinator(&[&others[0], &second, &others[1]]);
        let before = stages(&status(&coordinator.address).await);
        let (_, status) = disturbed(&coordinator, || proxy.set(Way::Forth, fault)).await;
        assert_eq!(stages(&status), before, "{fault:?}");
    }
}

/// A coordinator that is not heard any more: the worker ends its run, long before HTTP/2's pings would.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_ends_the_run_of_a_coordinator_that_is_silent_and_of_no_other() {
    let timeout = Duration::from_millis(500);
    let models = Models::One { name: "shakespeare".into(), directory: model("shakespeare") };
    let worker = LocalWorker::start(WorkerConfig {
        devices: vec![DeviceSpec::cpu(Some(1 << 30))],
        compute: Compute { threads: 1, ..Compute::shared_by(1) },
        ..WorkerConfig::new(models)
    });
    let worker = Arc::new(worker.unwrap());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::to(listener.local_addr().unwrap()).await;
    tokio::spawn(grpc::serve(worker.clone(), None, listener, std::future::pending(), std::future::pending()));

    let (remote, name, host) = RemoteWorker::lazy(&format!("http://{}", proxy.address)).unwrap();
    let member = Member { name, worker: Arc::new(remote), rank: 0, host };
    let mut deployment = Options::default().deployment();
    let found = discover(&[member], &deployment).await.unwrap();
    deployment.heartbeat_timeout = timeout;
    let plan = found.plan(&deployment).unwrap();
    let fence = Fence { term: 1, pipeline: 0, incarnation: 1 };
    let (events, mut told) = mpsc::unbounded_channel();
    let sink = Arc::new(move |_, event| drop(events.send(event)));
    let history = History::default();
    let up = Pipeline::bring_up(&found, &plan, fence, Arc::new(|_| {}), sink, &deployment, &history).await;
    let pipeline = up.unwrap();
    // Nobody has anything to do, and nobody is missed.
    assert!(tokio::time::timeout(4 * timeout, told.recv()).await.is_err());
    assert_eq!(worker.occupied(), ["cpu"]);

    let begun = Instant::now();
    proxy.set(Way::Forth, Fault::Blackhole);
    let lost = tokio::time::timeout(PATIENCE, told.recv()).await.unwrap().unwrap();
    assert!(
        matches!(&lost, PipelineEvent::Lost { reason, .. } if reason.contains("stream ended")),
        "{lost:?}"
    );
    tokio::time::timeout(PATIENCE, worker.drain()).await.expect("the run goes on");
    assert!(begun.elapsed() < Duration::from_millis(2500), "{:?}", begun.elapsed());
    drop(pipeline);
}
