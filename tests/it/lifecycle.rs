//! A coordinator from its first moment to its last: what it says of itself while it stands by, starts, serves and
//! drains.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
};

use futures::StreamExt;
use strata_coordinator::{
    RemoteWorker, SessionError, cluster::membership::MemberEvent, engine::State, planner::Split,
};
use strata_proto::{
    Files, Progress, StageChannel, Worker,
    error::{Classify, Kind},
    v1::{self, CoordinatorState},
};
use tokio::sync::watch;
use tonic::{Code, Status, async_trait, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    cluster::{Cluster, Options, PATIENCE, ask, client, greedy, model, status},
    processes::Process,
};

const PROMPT: [u32; 4] = [0, 842, 28, 201];

/// A worker that says that it has read 40 % of its weights, and no more until it may.
struct Held {
    inner: Arc<dyn Worker>,
    may_load: watch::Receiver<bool>,
    /// How often it was asked about a model.
    described: Arc<AtomicU32>,
}

#[async_trait]
impl Worker for Held {
    async fn describe(&self, request: v1::DescribeRequest) -> Result<v1::Described, Status> {
        self.described.fetch_add(u32::from(!request.model.is_empty()), Ordering::Relaxed);
        self.inner.describe(request).await
    }
    async fn read_tokenizer(&self, request: v1::ReadTokenizerRequest) -> Result<Files, Status> {
        self.inner.read_tokenizer(request).await
    }
    async fn load(&self, request: v1::LoadRequest) -> Result<Progress, Status> {
        let mut updates = self.inner.load(request).await?;
        let (sender, progress) = tokio::sync::mpsc::channel(1);
        let mut may_load = self.may_load.clone();
        tokio::spawn(async move {
            let part = v1::LoadProgress { bytes_read: 409, bytes_total: 1000, ..v1::LoadProgress::default() };
            let _ = sender.send(Ok(part)).await;
            let _ = may_load.wait_for(|may| *may).await;
            while let Some(update) = updates.recv().await {
                let _ = sender.send(update).await;
            }
        });
        Ok(progress)
    }
    async fn prepare(&self, request: v1::PrepareRequest) -> Result<v1::Prepared, Status> {
        self.inner.prepare(request).await
    }
    async fn connect(&self, request: v1::ConnectRequest) -> Result<(), Status> {
        self.inner.connect(request).await
    }
    async fn run(&self, open: v1::Open) -> Result<StageChannel, Status> {
        self.inner.run(open).await
    }
    async fn abort(&self, request: v1::AbortRequest) -> Result<(), Status> {
        self.inner.abort(request).await
    }
}

/// The members of `options`, held back; what lets them load, and how often they were asked about a model.
fn held(options: &Options) -> (Vec<MemberEvent>, watch::Sender<bool>, Arc<AtomicU32>) {
    let (let_load, may_load) = watch::channel(false);
    let described = Arc::<AtomicU32>::default();
    let hold = |mut member: strata_coordinator::cluster::membership::Member| {
        let (may_load, described) = (may_load.clone(), described.clone());
        member.worker = Arc::new(Held { inner: member.worker, may_load, described });
        MemberEvent::Joined(member)
    };
    (options.members().into_iter().map(hold).collect(), let_load, described)
}

/// The health of the service that answers requests, now and whenever it changes.
async fn watch_health(address: &str) -> tonic::Streaming<tonic_health::pb::HealthCheckResponse> {
    let channel = Channel::from_shared(address.to_owned()).unwrap().connect().await.unwrap();
    let request = HealthCheckRequest { service: "strata.v1.Inference".into() };
    HealthClient::new(channel).watch(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_and_health_are_answered_in_every_state_and_requests_say_what_there_is_to_wait_for() {
    let options = Options::default();
    let (cluster, events) = Cluster::open(&options).await;
    let starting = {
        let coordinator = cluster.coordinator.clone();
        tokio::spawn(async move { coordinator.start(events, Arc::new(|_| {})).await })
    };
    let client = cluster.client().await;
    let mut health = watch_health(&cluster.address).await;
    let mut healthy = async || health.next().await.map(|answer| answer.unwrap().status());
    assert_eq!(healthy().await, Some(ServingStatus::NotServing));
    let refused = async |code: Code, reason: &str| {
        for status in [
            ask(&client, greedy(&PROMPT, 1)).await.unwrap_err(),
            client.clone().tokenize(v1::TokenizeRequest::default()).await.unwrap_err(),
        ] {
            assert!(status.code() == code && status.message().contains(reason), "{status:?}");
        }
    };

    let waiting = "0 of 1 workers are there";
    cluster.wait_for("a start", |s| s.reason() == waiting).await;
    let shown = status(&cluster.address).await;
    assert_eq!(
        (shown.state(), shown.ready, shown.reason.as_str()),
        (CoordinatorState::Standby, false, waiting)
    );
    assert_eq!(shown.model, "shakespeare");
    refused(Code::Unavailable, "the model is not served yet (Status says why); try again later").await;

    let (members, let_load, _) = held(&options);
    for member in members {
        cluster.members.send(member).unwrap();
    }
    let loading = "loading layers 0..6 on worker-0/cpu, 40 %";
    cluster.wait_for("a part of the weights", |s| s.reason() == loading).await;
    let shown = status(&cluster.address).await;
    assert_eq!(
        (shown.state(), shown.ready, shown.reason.as_str()),
        (CoordinatorState::Starting, false, loading)
    );
    let stage = &shown.loading[0];
    assert_eq!((stage.bytes_read, stage.bytes_total, shown.members.len()), (409, 1000, 1));
    // Which worker loads what is no business of clients.
    refused(Code::Unavailable, "the model is not served yet (Status says why); try again later").await;

    let_load.send_replace(true);
    assert_eq!(healthy().await, Some(ServingStatus::Serving));
    starting.await.unwrap().unwrap();
    let shown = status(&cluster.address).await;
    assert_eq!((shown.state(), shown.ready, shown.reason.as_str()), (CoordinatorState::Serving, true, ""));
    assert!(shown.loading.is_empty());
    assert_eq!(ask(&client, greedy(&PROMPT, 2)).await.unwrap().ids.len(), 2);

    // An answer that nobody reads is in progress until it is dropped.
    let unread = cluster.coordinator.session().generate(greedy(&PROMPT, 4)).await.unwrap();
    let (coordinator, address) = (cluster.coordinator.clone(), cluster.address.clone());
    let stopping = cluster.stop();
    coordinator.watch().wait_for(|s| s.state == State::Draining).await.unwrap();
    assert_eq!(healthy().await, Some(ServingStatus::NotServing));
    let shown = status(&address).await;
    assert_eq!((shown.state(), shown.requests.unwrap().in_progress), (CoordinatorState::Draining, 1));
    refused(Code::Unavailable, "the server is shutting down").await;
    drop(unread);
    while healthy().await.is_some() {}
    tokio::time::timeout(PATIENCE, stopping).await.expect("a port stays open").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_replicas_come_up_by_one_plan() {
    let options = Options { workers: 3, split: Split::Auto, ..Options::default() };
    let (cluster, events) = Cluster::open(&options).await;
    let (members, let_load, described) = held(&options);
    for member in members {
        cluster.members.send(member).unwrap();
    }
    let coordinator = cluster.coordinator.clone();
    let starting = tokio::spawn(async move { coordinator.start(events, Arc::new(|_| {})).await });
    cluster
        .wait_for("all of them loading", |s| s.loading.iter().filter(|l| l.bytes_read > 0).count() == 3)
        .await;
    let_load.send_replace(true);
    starting.await.unwrap().unwrap();
    let three = |s: &strata_coordinator::engine::Snapshot| {
        s.loading.is_empty() && s.plan.as_ref().is_some_and(|p| p.replicas.len() == 3)
    };
    cluster.wait_for("three replicas", three).await;
    assert_eq!(described.load(Ordering::Relaxed), 3, "each worker is asked about the model once");

    // A copy that is lost is planned anew, over what is left.
    cluster.members.send(MemberEvent::Left("worker-1".into())).unwrap();
    cluster.wait_for("two replicas", |s| s.plan.as_ref().is_some_and(|p| p.replicas.len() == 2)).await;
    ask(&cluster.client().await, greedy(&PROMPT, 2)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_failed_says_why_and_starts_once() {
    let options = Options { split: Split::Counts(vec![9, 9]), ..Options::default() };
    let (cluster, events) = Cluster::open(&options).await;
    let session = cluster.coordinator.session();
    let error = session.tokenize(v1::TokenizeRequest::default()).await.unwrap_err();
    assert!(matches!(&error, SessionError::NotYet(why) if why == "it has not been started"), "{error}");
    assert_eq!(error.kind(), Kind::NoCapacity);
    for member in options.members() {
        cluster.members.send(MemberEvent::Joined(member)).unwrap();
    }
    let failed = cluster.coordinator.start(events, Arc::new(|_| {})).await.unwrap_err().to_string();
    let shown = status(&cluster.address).await;
    assert_eq!((shown.state(), shown.reason), (CoordinatorState::Standby, failed));
    let (_, events) = tokio::sync::mpsc::unbounded_channel();
    let again = cluster.coordinator.start(events, Arc::new(|_| {})).await.unwrap_err();
    assert!(again.to_string().contains("started before"), "{again}");
}

/// A `strata` process, and the lines that it writes; killed when dropped.
struct Lines {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Lines {
    fn start(args: &[&str]) -> Lines {
        let mut child = Command::new(env!("CARGO_BIN_EXE_strata"))
            .args(args)
            .env("NO_COLOR", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = mpsc::channel();
        let out =
            (BufReader::new(child.stdout.take().unwrap()), BufReader::new(child.stderr.take().unwrap()));
        let other = sender.clone();
        thread::spawn(move || out.0.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        thread::spawn(move || out.1.lines().map_while(Result::ok).try_for_each(|line| other.send(line)));
        Lines { child, lines }
    }

    /// Waits for a line with these words in it; says which lines came before.
    fn wait_for(&self, words: &str) -> (Vec<String>, String) {
        let mut before = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(words) => return (before, line),
                Ok(line) => before.push(line),
                Err(_) => panic!("{words:?} does not come after {before:?}"),
            }
        }
    }

    fn signal(&self, signal: &str) {
        assert!(
            Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success()
        );
    }

    /// Waits for the end of its lines, and then of itself.
    fn exited(&mut self) -> (ExitStatus, String) {
        let mut rest = String::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => rest += &format!("{line}\n"),
                Err(mpsc::RecvTimeoutError::Disconnected) => return (self.child.wait().unwrap(), rest),
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("the process does not end after {rest:?}"),
            }
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address on which nobody listens.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn coordinator(address: &str, workers: &str) -> Lines {
    let (_, port) = address.split_once(':').unwrap();
    let args =
        ["coordinator", "--worker", workers, "--model", "shakespeare", "--dtype", "f32", "--port", port];
    Lines::start(&[&args[..], &["--split", "balanced"]].concat())
}

fn worker(listen: &str) -> Process {
    let models = model("");
    Process::start(&["worker", "--models", models.to_str().unwrap(), "--listen", listen], "listening ")
}

#[test]
fn who_watches_sees_a_coordinator_stand_by_serve_end_and_come_again() {
    let (address, late) = (free_address(), free_address());
    let there = worker("127.0.0.1:0");
    let workers = format!("{},{late}", there.address);
    let mut watching = Lines::start(&["status", "--watch", "--address", &address]);
    watching.wait_for("no server answers");
    let mut first = coordinator(&address, &workers);
    let (_, standby) = watching.wait_for("shakespeare standby");
    assert!(standby.ends_with("1 of 2 workers are there") || standby.contains("0 of 2"), "{standby}");
    let (failed, shown) = Lines::start(&["status", "--address", &address]).exited();
    assert!(!failed.success() && shown.contains("error: the server is not ready: "), "{shown}");
    let second_worker = worker(&late);
    watching.wait_for("shakespeare ready");
    first.wait_for("ready http://");
    first.signal("-TERM");
    let (ended, said) = first.exited();
    assert!(ended.success(), "{said}");
    watching.wait_for("no server answers");

    // A worker is missing: it stands by until somebody loses patience.
    drop(second_worker);
    let mut second = coordinator(&address, &workers);
    watching.wait_for("1 of 2 workers are there");
    second.signal("-INT");
    let (ended, said) = second.exited();
    assert!(!ended.success() && said.contains("error: stopped before the model was served"), "{said}");
    watching.wait_for("no server answers");
    watching.signal("-INT");
    assert!(watching.exited().0.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_signal_says_what_is_waited_for_and_the_second_ends_at_once() {
    let address = free_address();
    let only = worker("127.0.0.1:0");
    let mut server = coordinator(&address, &only.address);
    server.wait_for("ready http://");
    let mut client = client(&format!("http://{address}")).await;
    // Nothing is computed from now on.
    only.signal("-STOP");
    let _answer = client.generate(greedy(&PROMPT, 250)).await.unwrap();
    server.signal("-INT");
    server.wait_for("waiting for 1 request to end, 30 s at most; a second signal ends at once");
    let shown = status(&format!("http://{address}")).await;
    assert_eq!((shown.state(), shown.requests.unwrap().in_progress), (CoordinatorState::Draining, 1));
    server.signal("-INT");
    let (ended, said) = server.exited();
    assert!(!ended.success() && said.contains("ended at once, as asked, before 1 request did"), "{said}");
    only.signal("-CONT");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_says_that_it_waits_for_its_coordinator_and_ends_when_it_is_told_twice() {
    let models = model("");
    let mut worker = Lines::start(&["worker", "--models", models.to_str().unwrap(), "--devices", "cpu"]);
    let (_, listening) = worker.wait_for("listening http://");
    let url = listening.trim_start_matches("listening ");
    let server = coordinator(&free_address(), url);
    server.wait_for("ready http://");
    // Whoever is stopped cannot plan anew.
    server.signal("-STOP");
    worker.signal("-TERM");
    worker.wait_for(
        "waiting for its coordinator's pipeline over cpu to end, 30 s at most; a second signal ends at once",
    );
    let (remote, ..) = RemoteWorker::lazy(url).unwrap();
    assert!(remote.describe(v1::DescribeRequest::default()).await.expect("it still answers").draining);
    worker.signal("-TERM");
    let (ended, said) = worker.exited();
    let says = "ended at once, as asked, before its coordinator's pipeline over cpu did";
    assert!(!ended.success() && said.contains(says), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_names_the_worker_that_was_lost_and_what_became_of_it() {
    let workers: Vec<_> = (0..3).map(|_| worker("127.0.0.1:0")).collect();
    let urls: Vec<_> = workers.iter().map(|worker| worker.address.as_str()).collect();
    let address = free_address();
    let server = coordinator(&address, &urls.join(","));
    server.wait_for("ready http://");
    let mut client = client(&format!("http://{address}")).await;
    let mut answer = client.generate(greedy(&PROMPT, 250)).await.unwrap().into_inner();
    answer.message().await.unwrap().expect("it has begun");
    workers[1].signal("-KILL");
    let (before, named) = server.wait_for("; planning without it");
    let [first, victim, last] = [0, 1, 2].map(|at| workers[at].address.trim_start_matches("http://"));
    assert!(named.contains(victim) && named.contains("Connection refused"), "{named}");
    let said = before.join("\n");
    for neighbour in [first, last] {
        assert!(!said.contains(&format!("{neighbour} was lost")), "{said}");
    }
    assert!(said.contains("; planning anew") && !(said + &named).contains("tonic::"), "{before:?} {named}");
}

#[test]
fn connections_without_a_request_keep_no_server_from_ending() {
    let mut server =
        Lines::start(&["serve", model("shakespeare").to_str().unwrap(), "--port", "0", "--grace", "3600"]);
    let (_, ready) = server.wait_for("ready http://");
    let address = ready.trim_start_matches("ready http://");
    // The beginning of HTTP/2, empty settings, and the half of a frame of headers.
    let mut foreign = std::net::TcpStream::connect(address).unwrap();
    let begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x20\x01";
    std::io::Write::write_all(&mut foreign, begin).unwrap();
    // Its settings: it has taken the connection.
    std::io::Read::read_exact(&mut foreign, &mut [0; 9]).unwrap();
    server.signal("-TERM");
    let (ended, said) = server.exited();
    assert!(ended.success() && !said.contains("request"), "{said}");
}

#[test]
fn a_signal_right_after_the_first_word_ends_a_worker_in_good_order() {
    let models = model("");
    let mut worker = Lines::start(&["worker", "--models", models.to_str().unwrap()]);
    worker.wait_for("listening ");
    worker.signal("-TERM");
    let (ended, said) = worker.exited();
    assert!(ended.success(), "{ended}: {said}");
}
