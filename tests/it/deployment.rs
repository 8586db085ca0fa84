//! Changing what a cluster runs on while it answers: nothing is lost, and what cannot be leaves everything as it was.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use futures::future::join_all;
use strata_coordinator::{
    AdminError,
    cluster::membership::{Member, MemberEvent},
    planner::Split,
};
use strata_proto::{
    Files, Progress, StageChannel, Worker,
    error::{Classify, Kind},
    v1,
};
use tonic::{Code, Status, async_trait};

use crate::{
    cluster::{Cluster, Options, ask, client, expectations, greedy, model, status},
    etcd::server::{Server, Version},
    leaders::until,
    processes::{Process, run, workers},
};

const TOKENS: u32 = 200;
const STREAMS: usize = 8;

/// Answers to the prompts of the demo model, all at once, while something is done: each must be as it is undisturbed.
async fn exact_while<T>(address: &str, disturb: impl Future<Output = T>) -> T {
    let client = client(address).await;
    let prompts: Vec<_> = expectations(&model("shakespeare")).into_iter().map(|e| e.ids).collect();
    let undisturbed = join_all(prompts.iter().map(|ids| ask(&client, greedy(ids, TOKENS)))).await;
    let undisturbed: Vec<_> = undisturbed.into_iter().map(|answer| answer.unwrap().ids).collect();
    let begun = status(address).await.load.unwrap().generated_tokens;
    let streams = join_all((0..STREAMS).map(|i| ask(&client, greedy(&prompts[i % prompts.len()], TOKENS))));
    let disturbed = async {
        until(address, "tokens", |s| s.load.unwrap().generated_tokens > begun + 80).await;
        disturb.await
    };
    let (answers, value) = tokio::join!(streams, disturbed);
    for (i, answer) in answers.into_iter().enumerate() {
        let answer = answer.unwrap_or_else(|error| panic!("answer {i}: {error}"));
        assert_eq!(answer.ids, undisturbed[i % prompts.len()], "answer {i} changed");
    }
    value
}

/// A coordinator over workers of the demo model.
fn coordinator(workers: &[Process], more: &[&str]) -> Process {
    let urls = workers.iter().map(|worker| worker.address.clone()).collect::<Vec<_>>().join(",");
    let args = ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    Process::start(&[&args[..], more].concat(), "ready ")
}

/// Workers of the stages of the first replica.
fn stages(status: &v1::StatusResponse) -> Vec<String> {
    let stages = &status.plan.as_ref().unwrap().replicas[0].stages;
    stages.iter().map(|stage| stage.worker.clone()).collect()
}

fn name(worker: &Process) -> &str {
    worker.address.strip_prefix("http://").unwrap()
}

async fn strata(args: &[&str]) -> Result<String, String> {
    let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let asked = move || run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    tokio::task::spawn_blocking(asked).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_drained_and_taken_back_under_load_and_no_token_changes() {
    let workers = workers(4);
    let coordinator = coordinator(&workers, &["--split", "2,2,2"]);
    let at = ["--address", &coordinator.address];
    assert_eq!(stages(&status(&coordinator.address).await), [0, 1, 2].map(|i: usize| name(&workers[i])));
    let drained = exact_while(&coordinator.address, async {
        strata(&[&["drain", name(&workers[1]), "--reason", "new memory"], &at[..]].concat()).await.unwrap();
        status(&coordinator.address).await
    });
    let drained = drained.await;
    // The others keep what they hold, and the spare has taken the range.
    assert_eq!(stages(&drained), [0, 3, 2].map(|i: usize| name(&workers[i])));
    let member = drained.members.iter().find(|m| m.worker == name(&workers[1])).unwrap();
    assert!(member.drained && member.live && member.reason == "drained: new memory", "{member:?}");

    // What cannot be spared stays, and works.
    let refused = strata(&[&["drain", name(&workers[2])], &at[..]].concat()).await.unwrap_err();
    assert!(refused.contains("cannot be spared"), "{refused}");
    let after = status(&coordinator.address).await;
    assert!(after.ready && stages(&after) == stages(&drained));
    assert!(!after.members.iter().any(|m| m.drained && m.worker == name(&workers[2])));

    strata(&[&["undrain", name(&workers[1])], &at[..]].concat()).await.unwrap();
    let again = exact_while(&coordinator.address, async {
        strata(&[&["drain", name(&workers[2])], &at[..]].concat()).await.unwrap();
        status(&coordinator.address).await
    });
    assert_eq!(stages(&again.await), [0, 3, 1].map(|i: usize| name(&workers[i])));
    let unknown = strata(&[&["drain", "nobody"], &at[..]].concat()).await.unwrap_err();
    assert!(unknown.contains("there is no worker \"nobody\": expected one of "), "{unknown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_whose_worker_is_drained_gives_its_sequences_to_another_one() {
    let options = Options { workers: 2, split: Split::Auto, ..Options::default() };
    let cluster = Cluster::start(&options).await;
    let replicas = async |count| {
        cluster
            .wait_for("replicas", move |s| s.plan.as_ref().is_some_and(|p| p.replicas.len() == count))
            .await
    };
    replicas(2).await;
    exact_while(&cluster.address, async { cluster.coordinator.vacate("worker-0", "").await.unwrap() }).await;
    let left = replicas(1).await;
    assert_eq!(left.plan.unwrap().replicas[0].stages[0].worker, "worker-1");
    let refused = cluster.coordinator.vacate("worker-1", "").await.unwrap_err();
    assert!(matches!(refused, AdminError::Change(_)) && refused.kind() == Kind::WrongState, "{refused}");
    cluster.coordinator.take_back("worker-0").await.unwrap();
    replicas(2).await;
}

/// Who was drained and what was applied is so for the next coordinator, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_operators_decide_outlives_the_coordinator_in_etcd() {
    let Some(etcd) = Server::start(Version::V3_5) else { return };
    let environment = [("STRATA_SECRET", "a secret that nobody guesses"), ("STRATA_LEASE_TTL", "2")];
    let models = model("");
    let worker = |name: &str| {
        let args = ["worker", "--models", models.to_str().unwrap(), "--etcd", &etcd.url, "--name", name];
        Process::start_with(&environment, &args, "listening ")
    };
    let _workers = ["a", "b", "c"].map(worker);
    let coordinator = || {
        let args = ["coordinator", "--etcd", &etcd.url, "--model", "shakespeare", "--dtype", "f32"];
        let args = [&args[..], &["--split", "3,3", "--port", "0", "--leader-ttl", "2"]].concat();
        Process::start_with(&environment, &args, "ready ")
    };
    let first = coordinator();
    let victim = stages(&status(&first.address).await).remove(0);
    let drain = async |address: &str, secret: Option<&str>| {
        let mut client = v1::cluster_client::ClusterClient::new(
            tonic::transport::Channel::from_shared(address.to_owned()).unwrap().connect().await.unwrap(),
        );
        let message = v1::DrainRequest { worker: victim.clone(), reason: String::new() };
        let mut proof = tonic::metadata::MetadataMap::new();
        if let Some(secret) = secret {
            strata_proto::Secret::new(secret).unwrap().sign(&mut proof, "Drain", &message);
        }
        client.drain(tonic::Request::from_parts(proof, tonic::Extensions::default(), message)).await
    };
    // Who may change what is served proves it.
    for secret in [None, Some("another secret that was guessed")] {
        let refused = drain(&first.address, secret).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    }
    exact_while(&first.address, async { drain(&first.address, Some(environment[0].1)).await.unwrap() }).await;
    let secret = file(environment[0].1);
    let at = ["--address", &first.address, "--secret-file", secret.path().to_str().unwrap()];
    let text = "model = 'shakespeare'\ndtype = 'f32'\nsplit = '2,4'\n";
    exact_while(&first.address, async { apply(text, &at).await.unwrap() }).await;
    let version = status(&first.address).await.deployment_version;
    assert!(version > 0);
    let left = |status: &v1::StatusResponse| BTreeSet::from_iter(stages(status));
    let others: BTreeSet<_> =
        ["a", "b", "c"].map(str::to_owned).into_iter().filter(|w| *w != victim).collect();
    assert_eq!(left(&status(&first.address).await), others);
    drop(first);
    let second = coordinator();
    let status = status(&second.address).await;
    assert_eq!(left(&status), others);
    // The record is served, whatever the flags say.
    let layers = status.plan.as_ref().unwrap().replicas[0].stages[0].layers.unwrap();
    assert_eq!((layers.end, status.deployment_version), (2, version));
    assert!(status.members.iter().any(|member| member.worker == victim && member.drained));
}

/// A file with a deployment.
fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    file
}

async fn apply(text: &str, more: &[&str]) -> Result<String, String> {
    let file = file(text);
    strata(&[&["apply", file.path().to_str().unwrap()], more].concat()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_split_and_cache_are_applied_under_load_and_what_does_not_fit_changes_nothing() {
    let workers = workers(3);
    let coordinator = coordinator(&workers, &["--split", "2,2,2"]);
    let at = ["--address", &coordinator.address];
    let text =
        |split: &str, more: &str| format!("model = 'shakespeare'\ndtype = 'f32'\nsplit = '{split}'\n{more}");
    let shown = apply(&text("4,2", ""), &[&["--dry-run", "--json"], &at[..]].concat()).await.unwrap();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        (&shown["version"], &shown["done"], &shown["differs"]),
        (&0.into(), &false.into(), &true.into())
    );
    assert_eq!(shown["then"]["replicas"][0]["stages"].as_array().unwrap().len(), 2);
    assert_eq!(status(&coordinator.address).await.fence.unwrap().incarnation, 1);

    let applied = exact_while(&coordinator.address, async {
        let said = apply(&text("1,4,1", "kv-tokens = 2048\n"), &at).await.unwrap();
        assert!(said.contains("has become") && said.ends_with("version 1 is served\n"), "{said}");
        status(&coordinator.address).await
    });
    let applied = applied.await;
    let replica = &applied.plan.as_ref().unwrap().replicas[0];
    let counts = replica.stages.iter().map(|stage| stage.layers.map(|l| l.end - l.first).unwrap());
    assert_eq!((counts.collect::<Vec<_>>(), replica.kv_capacity_tokens), (vec![1, 4, 1], 2048));
    let deployed = applied.deployment.unwrap();
    assert_eq!((deployed.split.as_str(), deployed.kv_tokens, applied.deployment_version), ("1,4,1", 2048, 1));

    for (text, more, why) in [
        // Of two who apply over one version, the second is refused.
        (text("3,3", ""), &["--over", "0"][..], "version 1 is deployed, not 0"),
        (text("1,1,1,1,2", ""), &[], "5 stages"),
        (text("2,2,2", "kv-tokens = 1000000000000"), &[], "nothing was changed"),
        (text("2,2,2", "color = 'red'"), &[], "unknown field `color`"),
        (text("2,2,2", &format!("weights = '{}'", "0".repeat(64))), &[], "have the digest"),
        (text("half", ""), &[], "split: unknown split"),
    ] {
        let refused = apply(&text, &[more, &at[..]].concat()).await.unwrap_err();
        assert!(refused.contains(why), "{text}: {refused}");
    }
    let after = status(&coordinator.address).await;
    assert_eq!((after.ready, after.fence, after.deployment_version), (true, applied.fence, 1));
    // The weights that are served may be named.
    apply(&text("1,4,1", &format!("kv-tokens = 2048\nweights = '{}'", after.weights)), &at).await.unwrap();
    let last = status(&coordinator.address).await;
    assert_eq!((last.fence, last.deployment_version), (after.fence, 2), "nothing had to change over");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_format_comes_up_beside_the_one_that_is_served_and_old_answers_end_on_that() {
    let workers = workers(4);
    let coordinator = coordinator(&workers, &["--split", "3,3"]);
    let at = ["--address", &coordinator.address];
    let before = status(&coordinator.address).await;
    let applied = exact_while(&coordinator.address, async {
        let text = "model = 'shakespeare'\ndtype = 'f32'\nquantize = 'int8'\nsplit = '3,3'\n";
        apply(text, &at).await.unwrap();
        status(&coordinator.address).await
    });
    let applied = applied.await;
    assert_eq!(applied.plan.as_ref().unwrap().quantization, "int8");
    assert!(applied.ready && stages(&applied).iter().all(|worker| !stages(&before).contains(worker)));
    let options = Options { quantization: Some(strata_proto::Quantization::Int8), ..Options::default() };
    let alone = Cluster::start(&options).await;
    let ids = &expectations(&model("shakespeare"))[0].ids;
    let expected = ask(&alone.client().await, greedy(ids, 48)).await.unwrap().ids;
    assert_eq!(ask(&client(&coordinator.address).await, greedy(ids, 48)).await.unwrap().ids, expected);
    let after = status(&coordinator.address).await.load.unwrap();
    assert!(after.generated_tokens > before.load.unwrap().generated_tokens, "what was counted is counted on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_model_takes_the_place_of_the_one_that_is_served_or_leaves_it_there() {
    const OTHER: &str = "llama-bias-f32";
    let workers = workers(2);
    let coordinator = coordinator(&workers, &["--split", "3,3"]);
    let at = ["--address", &coordinator.address];
    let text = |more: &str| format!("model = '{OTHER}'\nsplit = 'balanced'\n{more}");
    // What is wrong with it is seen when it is loaded: then there is the other one again.
    let wrong = format!("weights = '{}'", "0".repeat(64));
    let refused =
        exact_while(&coordinator.address, async { apply(&text(&wrong), &at).await.unwrap_err() }).await;
    assert!(refused.contains("nothing was changed") && refused.contains("have the digest"), "{refused}");
    let left = until(&coordinator.address, "the old model", |s| s.ready).await;
    assert_eq!((left.model.as_str(), left.deployment_version), ("shakespeare", 0));
    let unknown = apply("model = 'nobody'", &at).await.unwrap_err();
    assert!(unknown.contains("no model \"nobody\""), "{unknown}");

    let expected = &expectations(&model(OTHER))[0];
    exact_while(&coordinator.address, async {
        let late = async {
            // Whoever comes meanwhile waits, and is answered by either.
            let client = client(&coordinator.address).await;
            ask(&client, greedy(&[0, 1], 2)).await.unwrap();
        };
        let (applied, ()) = tokio::join!(async { apply(&text(""), &at).await.unwrap() }, late);
        assert!(applied.ends_with("version 1 is served\n"), "{applied}");
    })
    .await;
    let served = status(&coordinator.address).await;
    assert_eq!((served.ready, served.model.as_str()), (true, OTHER));
    let client = client(&coordinator.address).await;
    let tokens = expected.greedy.len() as u32;
    assert_eq!(ask(&client, greedy(&expected.ids, tokens)).await.unwrap().ids, expected.greedy);
    let old = v1::GenerateRequest { model: "shakespeare".into(), ..greedy(&expected.ids, 1) };
    assert_eq!(ask(&client, old).await.unwrap_err().code(), Code::NotFound);
}

/// A worker whose loads are counted: 1 for each that found its weights there, more for those that read them.
struct Counted(Arc<dyn Worker>, String, Loads);

/// Messages of each load so far, by worker.
type Loads = Arc<Mutex<BTreeMap<String, Vec<usize>>>>;

#[async_trait]
impl Worker for Counted {
    async fn describe(&self, request: v1::DescribeRequest) -> Result<v1::Described, Status> {
        self.0.describe(request).await
    }
    async fn read_tokenizer(&self, request: v1::ReadTokenizerRequest) -> Result<Files, Status> {
        self.0.read_tokenizer(request).await
    }
    async fn load(&self, request: v1::LoadRequest) -> Result<Progress, Status> {
        let mut progress = self.0.load(request).await?;
        let (to, counted) = tokio::sync::mpsc::channel(16);
        let (loads, name) = (self.2.clone(), self.1.clone());
        tokio::spawn(async move {
            let mut count = 0;
            while let Some(update) = progress.recv().await {
                count += 1;
                let _ = to.send(update).await;
            }
            loads.lock().unwrap().entry(name).or_default().push(count);
        });
        Ok(counted)
    }
    async fn prepare(&self, request: v1::PrepareRequest) -> Result<v1::Prepared, Status> {
        self.0.prepare(request).await
    }
    async fn connect(&self, request: v1::ConnectRequest) -> Result<(), Status> {
        self.0.connect(request).await
    }
    async fn run(&self, open: v1::Open) -> Result<StageChannel, Status> {
        self.0.run(open).await
    }
    async fn abort(&self, request: v1::AbortRequest) -> Result<(), Status> {
        self.0.abort(request).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_takes_the_largest_stage_over_and_nothing_is_read() {
    // The last stage has most layers.
    let split = Split::Counts(vec![1, 2, 3]);
    let options = Options { workers: 4, split, standbys: 1, ..Options::default() };
    let (cluster, events) = Cluster::open(&options).await;
    let loads = Loads::default();
    for member in options.members() {
        let worker = Counted(member.worker.clone(), member.name.clone(), loads.clone());
        cluster.members.send(MemberEvent::Joined(Member { worker: Arc::new(worker), ..member })).unwrap();
    }
    cluster.coordinator.start(events, Arc::new(|_| {})).await.unwrap();
    let standing = cluster.wait_for("a standby", |s| !s.standbys.is_empty()).await;
    let (worker, device, layers) = standing.standbys[0].clone();
    assert_eq!((worker.as_str(), device.as_str(), layers.to_string().as_str()), ("worker-3", "cpu", "3..6"));
    loads.lock().unwrap().clear();
    exact_while(&cluster.address, async {
        cluster.members.send(MemberEvent::Left("worker-2".into())).unwrap();
        cluster
            .wait_for("the next incarnation", |s| {
                s.up && s.plan.as_ref().unwrap().replicas[0].stages[2].worker == "worker-3"
            })
            .await;
    })
    .await;
    let loads = loads.lock().unwrap().clone();
    assert_eq!(loads.keys().collect::<Vec<_>>(), ["worker-0", "worker-1", "worker-3"]);
    assert!(loads.values().all(|counts| counts == &[1]), "weights were read again: {loads:?}");
    assert!(cluster.coordinator.watch().borrow().standbys.is_empty(), "none is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_joins_disturbs_nobody_until_the_plan_is_balanced_anew() {
    let mut workers = workers(2);
    let mut urls: Vec<_> = workers.iter().map(|worker| worker.address.clone()).collect();
    let late = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    urls.push(format!("http://{late}"));
    let urls = urls.join(",");
    let args = ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    let coordinator = Process::start(&[&args[..], &["--split", "balanced"]].concat(), "ready ");
    let at = ["--address", &coordinator.address];
    let before = status(&coordinator.address).await;
    assert_eq!(stages(&before).len(), 2);
    let best = strata(&[&["rebalance", "--dry-run"], &at[..]].concat()).await.unwrap();
    assert!(best.contains("what runs is the best plan"), "{best}");

    let models = model("");
    let listen = late.to_string();
    let args = ["worker", "--models", models.to_str().unwrap(), "--listen", &listen];
    workers.push(Process::start(&args, "listening "));
    until(&coordinator.address, "who joins", |s| s.members.iter().all(|m| m.live && m.reason.is_empty()))
        .await;
    let shown = strata(&[&["rebalance", "--dry-run", "--json"], &at[..]].concat()).await.unwrap();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((&shown["differs"], &shown["done"]), (&true.into(), &false.into()));
    assert_eq!(shown["then"]["replicas"][0]["stages"].as_array().unwrap().len(), 3);
    assert!(shown["tokens_per_second"]["then"]["full"].as_f64().unwrap() > 0.0);
    let joined = status(&coordinator.address).await;
    assert_eq!((joined.fence, stages(&joined).len()), (before.fence, 2), "a join replans nothing");

    let balanced = exact_while(&coordinator.address, async {
        let said = strata(&[&["rebalance"], &at[..]].concat()).await.unwrap();
        assert!(said.contains("has become") && said.contains("predicted tokens/s"), "{said}");
        status(&coordinator.address).await
    });
    assert_eq!(stages(&balanced.await).len(), 3);
}

/// A worker that is told to end hands its stage over while it still runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_told_to_end_is_replaced_before_it_does() {
    let mut workers = workers(3);
    let coordinator = coordinator(&workers, &["--split", "3,3"]);
    exact_while(&coordinator.address, async {
        workers[0].signal("-TERM");
        let ended = tokio::task::block_in_place(|| workers[0].exited());
        assert!(ended.success());
    })
    .await;
    let after = status(&coordinator.address).await;
    assert_eq!(stages(&after), [2, 1].map(|i: usize| name(&workers[i])));
}

/// One that cannot be spared ends when the answers that had begun have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_cannot_be_spared_ends_when_its_answers_have() {
    let mut workers = workers(2);
    let coordinator = coordinator(&workers, &["--split", "3,3"]);
    exact_while(&coordinator.address, async { workers[1].signal("-TERM") }).await;
    // Longer than that would be the coordinator's time for it.
    let ended = tokio::task::block_in_place(|| workers[1].exited());
    assert!(ended.success());
    let left = until(&coordinator.address, "that no pipeline is up", |s| !s.ready).await;
    assert!(left.reason.contains("needs as many devices"), "{left:?}");
    // What waits is answered when there is a worker again.
    let address = coordinator.address.clone();
    let waiting = tokio::spawn(async move {
        let ids = expectations(&model("shakespeare")).remove(0).ids;
        ask(&client(&address).await, greedy(&ids, 8)).await
    });
    until(&coordinator.address, "who waits", |s| s.load.unwrap().waiting == 1).await;
    let models = model("");
    let port = workers[1].address.strip_prefix("http://").unwrap();
    let args = ["worker", "--models", models.to_str().unwrap(), "--listen", port];
    let _again = Process::start(&args, "listening ");
    waiting.await.unwrap().unwrap();
}
