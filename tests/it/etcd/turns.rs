//! Coordinators that take turns by etcd's election, as candidates alone and as whole processes.

use std::time::Duration;

use etcd_client::{Client, GetOptions};
use strata_coordinator::cluster::{
    etcd::{Candidate, Election, election},
    leadership::Leadership,
};

use super::{
    ENVIRONMENT, TTL, Version, cluster, entry_until, record,
    server::{Server, Wire},
    worker,
};
use crate::{
    cluster::{PATIENCE, ask, client, expectations, greedy, model, status},
    leaders::{answers_exactly, until},
    processes::{Process, Starting},
};

over_both! {
    candidates_take_turns,
    a_leader_whose_key_is_gone_goes_on_unless_another_leads,
    a_coordinator_takes_over_and_etcd_may_be_away_meanwhile,
    a_leader_that_is_cut_off_from_etcd_leads_on,
    a_coordinator_waits_for_etcd,
}

/// A candidate whose coordinator is called `name`.
fn stand(url: &str, name: &str) -> Election {
    let candidate = Candidate { id: format!("{name}-{url}"), name: name.into(), ttl: TTL };
    election(&cluster(url), Candidate { id: candidate.id.replace('/', ""), ..candidate })
}

/// Waits for a decision for which `is` holds.
pub async fn decides<T>(election: &Election, is: impl Fn(&Leadership) -> Option<T>) -> T {
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

/// A coordinator at this port of the machine, which may wait for its turn before it says that it is ready.
fn coordinator(url: &str, port: u16) -> Starting {
    let port = port.to_string();
    let args = ["coordinator", "--etcd", url, "--leader-ttl", "2", "--port", &port];
    let deployment = ["--model", "shakespeare", "--dtype", "f32", "--split", "balanced"];
    Starting::new(&ENVIRONMENT[..1], &[&args[..], &deployment].concat(), "ready ")
}

async fn ready(starting: Starting) -> Process {
    tokio::task::spawn_blocking(|| starting.ready()).await.unwrap()
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

async fn a_leader_that_is_cut_off_from_etcd_leads_on(version: Version) {
    let Some(etcd) = Server::start(version) else { return };
    let wire = Wire::to(&etcd.url).await;
    let _workers = ["a", "b"].map(|name| worker(&etcd.url, name, &[]));
    let mut keys = etcd.client().await;
    for name in ["a", "b"] {
        entry_until(&mut keys, name, |entry| entry.is_some()).await;
    }
    let first = ready(coordinator(&wire.url, 0)).await;
    let before = status(&first.address).await;
    let port = free_port();
    let second = coordinator(&etcd.url, port);
    let standby = format!("http://127.0.0.1:{port}");
    let standing_by = until(&standby, "a leader's name", |s| s.reason.ends_with(" leads"));
    let waits = standing_by.await.reason;

    // Etcd drops its key after two seconds, and the other's turn it would be.
    wire.cut();
    let waits_on = format!("{waits}, as workers say, though etcd has forgotten it");
    until(&standby, "that workers follow the leader", |s| s.reason == waits_on).await;
    answers_exactly(&first.address).await;
    tokio::time::sleep(2 * TTL).await;
    assert_eq!(status(&standby).await.reason, waits_on);
    // When it comes back its key is the younger one, and it leads on.
    wire.mend();
    until(&standby, "that the leader is back", |s| s.reason == waits).await;
    answers_exactly(&first.address).await;
    assert_eq!(status(&first.address).await.fence, before.fence, "nothing was brought up anew");

    // One that is cut off and ends is not waited for.
    wire.cut();
    until(&standby, "that workers follow the leader", |s| s.reason == waits_on).await;
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
