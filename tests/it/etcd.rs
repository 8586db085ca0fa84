//! Clusters by etcd, over a real one: who is there, who leads, and what etcd's own faults must not disturb.

pub mod server;

use std::{process::Command, time::Duration};

use etcd_client::{Client, EventType, KeyValue, WatchOptions};
use strata_coordinator::cluster::{
    etcd::{Candidate, Credentials, Etcd, TlsFiles, WorkerRecord, election, members},
    leadership::Leadership,
    membership::{Member, MemberEvent},
};
use strata_proto::Secret;
use tokio::sync::mpsc;

use self::server::{Server, Version, Wire};
use crate::{
    cluster::{PATIENCE, model},
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

// Behind the macro that it uses.
mod turns;

over_both! {
    workers_join_when_they_register_and_keep_their_rank,
    a_lease_that_is_revoked_disturbs_nobody,
    etcd_may_hang_die_and_come_back,
    what_was_forgotten_while_nobody_watched_is_read_again,
    a_worker_that_is_cut_off_from_etcd_stays,
    a_name_belongs_to_one_worker,
    etcd_may_ask_for_a_password,
    etcd_may_speak_tls,
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
    turns::decides(&election(&by_password, candidate), Leadership::term).await;
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
