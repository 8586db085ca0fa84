//! Clusters by etcd, over a real one: who is there, who leads, and what etcd's own faults must not disturb.

mod server;

use std::{process::Command, time::Duration};

use etcd_client::{Client, EventType, GetOptions, KeyValue, WatchOptions};
use strata_coordinator::cluster::{
    etcd::{Candidate, Credentials, Election, Etcd, TlsFiles, WorkerRecord, election, members},
    leadership::Leadership,
    membership::{Member, MemberEvent},
};
use strata_proto::Secret;
use tokio::sync::mpsc;

use self::server::{Server, Version, Wire};
use crate::{
    cluster::{PATIENCE, ask, client, expectations, greedy, model, status},
    leaders::{answers_exactly, until},
    processes::Process,
};

/// Each of these runs over both versions of etcd.
macro_rules! over_both {
    ($($name:ident),* $(,)?) => {
        mod system {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(super::Version::System).await;
            })*
        }
        mod v3_5 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name(super::Version::V3_5).await;
            })*
        }
    };
}

over_both! {
    workers_join_when_they_register_and_keep_their_rank,
    a_lease_that_is_revoked_disturbs_nobody,
    etcd_may_hang_die_and_come_back,
    what_was_forgotten_while_nobody_watched_is_read_again,
    a_worker_that_is_cut_off_from_etcd_stays,
    a_name_belongs_to_one_worker,
    candidates_take_turns,
    a_leader_whose_key_is_gone_goes_on_unless_another_leads,
    etcd_may_ask_for_a_password,
    etcd_may_speak_tls,
    a_coordinator_takes_over_and_etcd_may_be_away_meanwhile,
    a_coordinator_waits_for_etcd,
}

/// Shortest that etcd grants.
const TTL: Duration = Duration::from_secs(2);

fn cluster(url: &str) -> Etcd {
    Etcd::new(&[url.to_owned()], "default", None, TlsFiles::default()).unwrap().with_secret(secret())
}

const SECRET: &str = "a secret that nobody guesses";
/// What processes of a test have in their environment.
const ENVIRONMENT: [(&str, &str); 2] = [("STRATA_SECRET", SECRET), ("STRATA_LEASE_TTL", "2")];

fn secret() -> Option<Secret> {
    Some(Secret::new(SECRET).unwrap())
}

/// A worker process in the cluster.
fn worker(url: &str, name: &str, more: &[&str]) -> Process {
    let models = model("");
    let args = ["worker", "--models", models.to_str().unwrap(), "--etcd", url, "--name", name];
    Process::start_with(&ENVIRONMENT, &[&args[..], more].concat(), "listening ")
}

/// The next that comes or goes, whoever does not answer for a moment.
async fn next(events: &mut mpsc::UnboundedReceiver<MemberEvent>) -> MemberEvent {
    loop {
        match tokio::time::timeout(PATIENCE, events.recv()).await.expect("nobody comes or goes").unwrap() {
            MemberEvent::Away(..) => {}
            event => return event,
        }
    }
}

/// The next event, which is that this one joins.
async fn joins(events: &mut mpsc::UnboundedReceiver<MemberEvent>, name: &str) -> Member {
    match next(events).await {
        MemberEvent::Joined(member) if member.name == name => member,
        other => panic!("{other:?} in the place of {name} joining"),
    }
}

/// The next event, which is that this one leaves.
async fn leaves(events: &mut mpsc::UnboundedReceiver<MemberEvent>, name: &str) {
    match next(events).await {
        MemberEvent::Left(left) if left == name => {}
        other => panic!("{other:?} in the place of {name} leaving"),
    }
}

/// What lies at a worker's key.
async fn entry(client: &mut Client, name: &str) -> Option<KeyValue> {
    let key = format!("/strata/default/workers/{name}");
    client.get(key, None).await.unwrap().take_kvs().pop()
}

fn record(entry: &KeyValue) -> WorkerRecord {
    serde_json::from_slice(entry.value()).unwrap()
}

/// Waits until a worker's key has an event for which `is` holds, beginning with what there is now.
async fn entry_until(client: &mut Client, name: &str, is: impl Fn(Option<&KeyValue>) -> bool) {
    let key = format!("/strata/default/workers/{name}");
    let found = client.get(key.as_str(), None).await.unwrap();
    if is(found.kvs().first()) {
        return;
    }
    let after = WatchOptions::new().with_start_revision(found.header().unwrap().revision() + 1);
    let mut watch = client.watch(key, Some(after)).await.unwrap();
    let changed = async {
        loop {
            let message = watch.message().await.unwrap().expect("the watch goes on");
            let matches = |event: &etcd_client::Event| match event.event_type() {
                EventType::Put => is(event.kv()),
                EventType::Delete => is(None),
            };
            if message.events().iter().any(matches) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, changed).await.expect("the entry does not change");
}

async fn workers_join_when_they_register_and_keep_their_rank(version: Version) {
    let Some(etcd) = Server::start(version) else { return };
    let mut client = etcd.client().await;
    let mut events = members(&cluster(&etcd.url));
    let a = worker(&etcd.url, "a", &[]);
    let first = joins(&mut events, "a").await;
    let _b = worker(&etcd.url, "b", &[]);
    let second = joins(&mut events, "b").await;
    assert!(first.rank < second.rank, "whoever came first is first");

    let listed = record(&entry(&mut client, "a").await.unwrap());
    assert_eq!(format!("http://{}", listed.address), a.address);
    assert_eq!(listed.rank, first.rank as u64);
    assert!(listed.devices.iter().any(|device| device.id == "cpu" && device.bytes > 0), "{listed:?}");
    assert!(listed.resident.is_empty());

    drop(a);
    leaves(&mut events, "a").await;
    let mut a = worker(&etcd.url, "a", &[]);
    assert_eq!(joins(&mut events, "a").await.rank, first.rank, "a rank changed with a restart");
    // One that is told to end takes its entry out before it ends.
    a.signal("-TERM");
    entry_until(&mut client, "a", |entry| entry.is_none()).await;
    leaves(&mut events, "a").await;
    assert!(a.exited().success());
}

async fn a_lease_that_is_revoked_disturbs_nobody(version: Version) {
    let Some(etcd) = Server::start(version) else { return };
    let mut client = etcd.client().await;
    let mut events = members(&cluster(&etcd.url));
    let _a = worker(&etcd.url, "a", &[]);
    joins(&mut events, "a").await;
    for _ in 0..3 {
        let lease = entry(&mut client, "a").await.unwrap().lease();
        client.lease_revoke(lease).await.unwrap();
        entry_until(&mut client, "a", |entry| entry.is_some_and(|entry| entry.lease() != lease)).await;
    }
    // Somebody deletes the key itself.
    client.delete("/strata/default/workers/a", None).await.unwrap();
    entry_until(&mut client, "a", |entry| entry.is_some()).await;
    let _b = worker(&etcd.url, "b", &[]);
    // The next thing that happens, in the order in which etcd tells.
    joins(&mut events, "b").await;
}

async fn etcd_may_hang_die_and_come_back(version: Version) {
    let Some(mut etcd) = Server::start(version) else { return };
    let mut events = members(&cluster(&etcd.url));
    let _a = worker(&etcd.url, "a", &[]);
    let b = worker(&etcd.url, "b", &["--lease-ttl", "60"]);
    let mut there = [next(&mut events).await, next(&mut events).await].map(|event| match event {
        MemberEvent::Joined(member) => member.name,
        other => panic!("{other:?}"),
    });
    there.sort();
    assert_eq!(there, ["a", "b"]);
    // For longer than a lease: etcd ends it as soon as it goes on.
    etcd.pause();
    tokio::time::sleep(2 * TTL).await;
    etcd.resume();
    let mut client = etcd.client().await;
    entry_until(&mut client, "a", |entry| entry.is_some()).await;
    let _c = worker(&etcd.url, "c", &[]);
    joins(&mut events, "c").await;

    etcd.kill();
    // Who goes while nobody lists workers is missed all the same.
    drop(b);
    leaves(&mut events, "b").await;
    etcd.restart();
    let _d = worker(&etcd.url, "d", &[]);
    joins(&mut events, "d").await;
}

async fn what_was_forgotten_while_nobody_watched_is_read_again(version: Version) {
    let Some(etcd) = Server::start(version) else { return };
    let mut client = etcd.client().await;
    let wire = Wire::to(&etcd.url).await;
    let mut events = members(&cluster(&wire.url));
    let a = worker(&etcd.url, "a", &[]);
    joins(&mut events, "a").await;
    wire.cut();
    drop(a);
    leaves(&mut events, "a").await;
    entry_until(&mut client, "a", |entry| entry.is_none()).await;
    let _b = worker(&etcd.url, "b", &[]);
    entry_until(&mut client, "b", |entry| entry.is_some()).await;
    let revision = client.get("b", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
    wire.mend();
    joins(&mut events, "b").await;
}

async fn a_worker_that_is_cut_off_from_etcd_stays(version: Version) {
    let Some(etcd) = Server::start(version) else { return };
    let mut client = etcd.client().await;
    let wire = Wire::to(&etcd.url).await;
    let mut events = members(&cluster(&etcd.url));
    let _a = worker(&wire.url, "a", &[]);
    joins(&mut events, "a").await;
    wire.cut();
    entry_until(&mut client, "a", |entry| entry.is_none()).await;
    let _b = worker(&etcd.url, "b", &[]);
    joins(&mut events, "b").await;
    wire.mend();
    entry_until(&mut client, "a", |entry| entry.is_some()).await;
    let _c = worker(&etcd.url, "c", &[]);
    joins(&mut events, "c").await;
}

/// What a worker says that may not be a part of the cluster.
fn refusal(url: &str, more: &[&str]) -> String {
    let models = model("");
    let args = ["worker", "--models", models.to_str().unwrap(), "--etcd", url];
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    let output = command.envs(ENVIRONMENT).args(args).args(more).output().unwrap();
    assert!(!output.status.success(), "it was let in");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn a_name_belongs_to_one_worker(version: Version) {
    let Some(etcd) = Server::start(version) else { return };
    let mut events = members(&cluster(&etcd.url));
    let a = worker(&etcd.url, "a", &[]);
    let rank = joins(&mut events, "a").await.rank;
    let address = a.address.trim_start_matches("http://").to_owned();
    let said = refusal(&etcd.url, &["--name", "a"]);
    let why = format!("worker a is registered already, at {address}, and answers there: give another --name");
    assert!(said.contains(&why), "{said}");
    let said = refusal(&etcd.url, &["--name", "b", "--advertise", &address]);
    assert!(said.contains(&format!("--advertise {address}: another worker answers there")), "{said}");
    let said = refusal(&etcd.url, &["--name", "a/b"]);
    assert!(said.contains("--name \"a/b\": expected letters"), "{said}");

    // One that comes back at once, elsewhere, has to wait until the lease of the one before is over.
    drop(a);
    let a = worker(&etcd.url, "a", &[]);
    leaves(&mut events, "a").await;
    assert_eq!(joins(&mut events, "a").await.rank, rank);
    // And one that comes back where it was need not wait.
    let listen = a.address.trim_start_matches("http://").to_owned();
    drop(a);
    let _a = worker(&etcd.url, "a", &["--listen", &listen]);
    leaves(&mut events, "a").await;
    joins(&mut events, "a").await;
}

/// A candidate whose coordinator is called `name`.
fn stand(url: &str, name: &str) -> Election {
    let candidate = Candidate { id: format!("{name}-{url}"), name: name.into(), ttl: TTL };
    election(&cluster(url), Candidate { id: candidate.id.replace('/', ""), ..candidate })
}

/// Waits for a decision for which `is` holds.
async fn decides<T>(election: &Election, is: impl Fn(&Leadership) -> Option<T>) -> T {
    let mut leadership = election.leadership();
    let decided = leadership.wait_for(|leadership| is(leadership).is_some());
    let decided = tokio::time::timeout(PATIENCE, decided).await.expect("nothing is decided").unwrap();
    is(&decided).unwrap()
}

fn waits_for(name: &str) -> impl Fn(&Leadership) -> Option<()> {
    let why = format!("coordinator {name} leads");
    move |leadership| (*leadership == Leadership::StandsBy { why: why.clone() }).then_some(())
}

async fn candidates_take_turns(version: Version) {
    let Some(etcd) = Server::start(version) else { return };
    let a = stand(&etcd.url, "a");
    let first = decides(&a, Leadership::term).await;
    let b = stand(&etcd.url, "b");
    decides(&b, waits_for("a")).await;
    // Longer than a lease lives that nobody renews.
    tokio::time::sleep(2 * TTL).await;
    let begun = std::time::Instant::now();
    a.resign().await;
    let second = decides(&b, Leadership::term).await;
    assert!(second > first && begun.elapsed() < TTL, "{second} after {:?}", begun.elapsed());
    let c = stand(&etcd.url, "c");
    decides(&c, waits_for("b")).await;
    // As a process that is killed.
    drop(b);
    assert!(decides(&c, Leadership::term).await > second);
}

async fn a_leader_whose_key_is_gone_goes_on_unless_another_leads(version: Version) {
    let Some(mut etcd) = Server::start(version) else { return };
    let wire = Wire::to(&etcd.url).await;
    let a = stand(&wire.url, "a");
    let first = decides(&a, Leadership::term).await;
    let mut leadership = a.leadership();
    leadership.mark_unchanged();
    let mut client = etcd.client().await;
    let all = || Some(GetOptions::new().with_prefix());
    let key = client.get("/strata/default/leader/", all()).await.unwrap().take_kvs().pop().unwrap();
    client.lease_revoke(key.lease()).await.unwrap();
    let renewed = async |client: &mut Client| {
        loop {
            let found = client.get("/strata/default/leader/", all()).await.unwrap().take_kvs();
            if found.iter().any(|other| other.lease() != key.lease()) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, renewed(&mut client)).await.expect("it stands again");
    etcd.kill();
    etcd.restart();
    let mut client = etcd.client().await;
    assert!(!leadership.has_changed().unwrap(), "{:?}", leadership.borrow());
    // Cut off for longer than its lease, while nobody else is there; then somebody is.
    wire.cut();
    let b = stand(&etcd.url, "b");
    let second = decides(&b, Leadership::term).await;
    assert!(second > first);
    assert_eq!(leadership.borrow().term(), Some(first), "it cannot know yet");
    wire.mend();
    decides(&a, waits_for("b")).await;
    b.resign().await;
    assert!(decides(&a, Leadership::term).await > second);
    assert_eq!(client.get("/strata/default/leader/", all()).await.unwrap().count(), 1);
}

async fn etcd_may_ask_for_a_password(version: Version) {
    let Some(etcd) = Server::start(version) else { return };
    let mut client = etcd.client().await;
    for (user, role) in [("root", "root"), ("strata", "strata")] {
        client.user_add(user, "secret", None).await.unwrap();
        client.role_add(role).await.unwrap();
        client.user_grant_role(user, role).await.unwrap();
    }
    let all = etcd_client::Permission::read_write("/strata/default/").with_prefix();
    client.role_grant_permission("strata", all).await.unwrap();
    client.auth_enable().await.unwrap();

    let said = refusal(&etcd.url, &["--name", "a"]);
    assert!(said.contains("etcd refuses: ") && said.contains("user name is empty"), "{said}");
    let directory = crate::processes::free_dir();
    let file = directory.path().join("password");
    std::fs::write(&file, "wrong\n").unwrap();
    let user = ["--name", "a", "--etcd-user", "strata", "--etcd-password-file", file.to_str().unwrap()];
    let said = refusal(&etcd.url, &user);
    assert!(said.contains("authentication failed"), "{said}");
    std::fs::write(&file, "secret\n").unwrap();
    let said = refusal(&etcd.url, &[&user[..], &["--cluster", "other"]].concat());
    assert!(said.contains("etcd refuses: ") && said.contains("permission denied"), "{said}");

    let credentials = Credentials { user: "strata".into(), password: "secret".into() };
    let urls = std::slice::from_ref(&etcd.url);
    let by_password = Etcd::new(urls, "default", Some(credentials), TlsFiles::default()).unwrap();
    let by_password = by_password.with_secret(secret());
    let mut events = members(&by_password);
    let _a = worker(&etcd.url, "a", &user[2..]);
    joins(&mut events, "a").await;
    let candidate = Candidate { id: "one".into(), name: "one".into(), ttl: TTL };
    decides(&election(&by_password, candidate), Leadership::term).await;
}

async fn etcd_may_speak_tls(version: Version) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    let directory = crate::processes::free_dir();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(path("ca"), authority.pem()).unwrap();
    for name in ["server", "client"] {
        let key = KeyPair::generate().unwrap();
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
        std::fs::write(path(&format!("{name}.crt")), certificate.pem()).unwrap();
        std::fs::write(path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }
    let files = ["ca", "server.crt", "server.key"].map(path);
    let flags = [
        "--trusted-ca-file",
        &files[0],
        "--cert-file",
        &files[1],
        "--key-file",
        &files[2],
        "--client-cert-auth",
    ];
    let Some(etcd) = Server::start_with(version, "https", &flags) else { return };

    let read = |name: &str| std::fs::read(path(name)).unwrap();
    let tls = TlsFiles { ca: Some(read("ca")), identity: Some((read("client.crt"), read("client.key"))) };
    let by_tls =
        Etcd::new(std::slice::from_ref(&etcd.url), "default", None, tls).unwrap().with_secret(secret());
    let mut events = members(&by_tls);
    let files = ["ca", "client.crt", "client.key"].map(path);
    let flags = ["--etcd-ca", &files[0], "--etcd-cert", &files[1], "--etcd-key", &files[2]];
    let _a = worker(&etcd.url, "a", &flags);
    joins(&mut events, "a").await;
    let said = refusal(&etcd.url, &["--name", "b"]);
    assert!(said.contains("give --etcd-ca"), "{said}");
}

/// A coordinator at this port of the machine, which may wait for its turn before it says that it is ready.
fn coordinator(url: &str, port: u16) -> std::thread::JoinHandle<Process> {
    let (url, port) = (url.to_owned(), port.to_string());
    std::thread::spawn(move || {
        let args = ["coordinator", "--etcd", &url, "--leader-ttl", "2", "--port", &port];
        let deployment = ["--model", "shakespeare", "--dtype", "f32", "--split", "balanced"];
        Process::start_with(&ENVIRONMENT[..1], &[&args[..], &deployment].concat(), "ready ")
    })
}

async fn ready(starting: std::thread::JoinHandle<Process>) -> Process {
    tokio::task::spawn_blocking(|| starting.join().unwrap()).await.unwrap()
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

async fn a_coordinator_takes_over_and_etcd_may_be_away_meanwhile(version: Version) {
    let Some(mut etcd) = Server::start(version) else { return };
    let mut keys = etcd.client().await;
    let _workers = ["a", "b"].map(|name| worker(&etcd.url, name, &[]));
    for name in ["a", "b"] {
        entry_until(&mut keys, name, |entry| entry.is_some()).await;
    }
    let first = ready(coordinator(&etcd.url, 0)).await;
    answers_exactly(&first.address).await;
    let before = status(&first.address).await;
    assert_eq!(before.plan.unwrap().replicas[0].stages.len(), 2);
    // What they hold is in their entries by now, or in a moment.
    entry_until(&mut keys, "a", |entry| {
        entry.is_some_and(|entry| record(entry).resident.iter().any(|weights| weights.model == "shakespeare"))
    })
    .await;

    let port = free_port();
    let second = coordinator(&etcd.url, port);
    let standby = format!("http://127.0.0.1:{port}");
    until(&standby, "a leader's name", |s| {
        s.reason.starts_with("coordinator ") && s.reason.ends_with(" leads")
    })
    .await;

    // An answer in progress, and new ones, while etcd is gone and when it has come back.
    let client = client(&first.address).await;
    let ids = expectations(&model("shakespeare")).remove(0).ids;
    let undisturbed = ask(&client, greedy(&ids, 200)).await.unwrap().ids;
    let mut stream = client.clone().generate(greedy(&ids, 200)).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    etcd.kill();
    let mut got = Vec::new();
    while let Some(event) = stream.message().await.unwrap() {
        if let Some(strata_proto::v1::generate_event::Event::Tokens(tokens)) = event.event {
            got.extend(tokens.token_ids);
        }
    }
    assert_eq!(got, undisturbed, "an answer changed while etcd was away");
    tokio::time::sleep(2 * TTL).await;
    answers_exactly(&first.address).await;
    etcd.restart();
    let mut keys = etcd.client().await;
    let candidates = async {
        while keys
            .get("/strata/default/leader/", Some(GetOptions::new().with_prefix()))
            .await
            .unwrap()
            .count()
            < 2
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, candidates).await.expect("both stand again");
    answers_exactly(&first.address).await;
    let after = status(&first.address).await;
    assert_eq!(after.fence, before.fence, "nothing was brought up anew");

    first.signal("-KILL");
    let second = ready(second).await;
    answers_exactly(&second.address).await;
    assert!(status(&second.address).await.fence.unwrap().term > before.fence.unwrap().term);
}

async fn a_coordinator_waits_for_etcd(version: Version) {
    let Some(mut etcd) = Server::start(version) else { return };
    etcd.kill();
    let (port, _worker) = (free_port(), worker(&etcd.url, "a", &[]));
    let starting = coordinator(&etcd.url, port);
    let address = format!("http://127.0.0.1:{port}");
    until(&address, "why it stands by", |s| s.reason.contains("no etcd answers")).await;
    etcd.restart();
    let coordinator = ready(starting).await;
    answers_exactly(&coordinator.address).await;
    // One that ends in good order is followed at once.
    let next = self::coordinator(&etcd.url, 0);
    let mut coordinator = coordinator;
    coordinator.signal("-TERM");
    assert!(coordinator.exited().success());
    answers_exactly(&ready(next).await.address).await;
}
