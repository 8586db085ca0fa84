//! Several coordinators over one list of workers, and members of which some are bad: real processes.

use std::time::{Duration, Instant};

use strata_coordinator::RemoteWorker;
use strata_proto::{
    Worker,
    v1::{self, CoordinatorState, StatusRequest, cluster_client::ClusterClient},
};
use tonic::{Code, transport::Channel};

use crate::{
    cluster::{PATIENCE, ask, client, expectations, greedy, model, status},
    processes::{Process, Starting, free_dir, workers},
};

/// Arguments of a coordinator over these workers.
fn over(urls: &[&str]) -> Vec<String> {
    let urls = urls.join(",");
    let args = ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    args.iter().chain(&["--split", "balanced"]).map(|arg| (*arg).to_owned()).collect()
}

fn coordinator(urls: &[&str]) -> Process {
    let args = over(urls);
    Process::start(&args.iter().map(String::as_str).collect::<Vec<_>>(), "ready ")
}

/// Asks a server again and again until it says what the test waits for.
pub async fn until(
    address: &str,
    what: &str,
    holds: impl Fn(&v1::StatusResponse) -> bool,
) -> v1::StatusResponse {
    let channel = Channel::from_shared(address.to_owned()).unwrap().connect_lazy();
    let mut client = ClusterClient::new(channel);
    let waited = tokio::time::timeout(PATIENCE, async {
        loop {
            // One that is stopped answers later.
            if let Ok(status) = client.status(StatusRequest {}).await {
                let status = status.into_inner();
                if holds(&status) {
                    return status;
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

pub async fn answers_exactly(address: &str) {
    let client = client(address).await;
    let expected = &expectations(&model("shakespeare"))[0];
    assert_eq!(ask(&client, greedy(&expected.ids, 48)).await.unwrap().ids, expected.greedy);
}

/// FAULTS, measured failure 1: the workers have seen later incarnations than a coordinator begins with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_starts_anew_takes_workers_over_that_have_seen_a_failover() {
    let mut workers = workers(3);
    let addresses: Vec<_> = workers.iter().map(|w| w.address.clone()).collect();
    let urls: Vec<_> = addresses.iter().map(String::as_str).collect();
    let first = coordinator(&urls);
    drop(workers.remove(0));
    let after = until(&first.address, "the failover", |s| {
        s.ready && s.plan.as_ref().unwrap().replicas[0].stages.len() == 2
    });
    let fence = after.await.fence.unwrap();
    drop(first);
    let second = coordinator(&urls);
    let status = status(&second.address).await;
    assert!(status.fence.unwrap().term > fence.term, "{:?} after {fence:?}", status.fence);
    let away = status.members.iter().find(|m| urls[0].ends_with(&m.worker)).expect("who is away is listed");
    assert!(!away.live && away.reason.contains("does not answer"), "{away:?}");
    answers_exactly(&second.address).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_coordinators_one_serves_and_the_other_says_why_it_does_not() {
    let workers = workers(2);
    let addresses: Vec<_> = workers.iter().map(|w| w.address.clone()).collect();
    let urls: Vec<_> = addresses.iter().map(String::as_str).collect();
    let first = coordinator(&urls);
    // The other one has a port from its first moment on, which nobody tells; so it is given one.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (port, address) = (port.to_string(), format!("http://127.0.0.1:{port}"));
    let mut args = over(&urls);
    let at = args.iter().position(|arg| arg == "--port").unwrap();
    args[at + 1] = port;
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let second = Starting::new(&[], &args, "ready ");
    let waiting = until(&address, "a reason", |s| s.reason.contains("takes over when")).await;
    assert_eq!(waiting.state(), CoordinatorState::Standby);
    answers_exactly(&first.address).await;
    let refused = ask(&client(&address).await, greedy(&[0], 1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("Status says why"), "{refused:?}");

    // One that is stopped is silent; when it goes on, it is refused everywhere, and stands by.
    first.signal("-STOP");
    let second = tokio::task::spawn_blocking(|| second.ready()).await.unwrap();
    answers_exactly(&second.address).await;
    first.signal("-CONT");
    let deposed = until(&first.address, "a deposed leader", |s| s.reason.contains("takes over when")).await;
    assert_eq!((deposed.state(), deposed.ready), (CoordinatorState::Standby, false));
    answers_exactly(&second.address).await;

    // And it serves again when the other one is gone.
    let term = status(&second.address).await.fence.unwrap().term;
    drop(second);
    let again = until(&first.address, "its next turn", |s| s.ready).await;
    assert!(again.fence.unwrap().term > term);
    answers_exactly(&first.address).await;
}

/// A worker that is listed and away is waited for at the start of a cluster, not when clients wait for a leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_waits_for_no_absent_worker_when_its_turn_comes() {
    let workers = workers(2);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let urls = [workers[0].address.as_str(), workers[1].address.as_str(), &nobody];
    let first = coordinator(&urls);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let address = format!("http://127.0.0.1:{port}");
    let mut args = over(&urls);
    let at = args.iter().position(|arg| arg == "--port").unwrap();
    args[at + 1] = port;
    let second = Starting::new(&[], &args.iter().map(String::as_str).collect::<Vec<_>>(), "ready ");
    until(&address, "a standby", |s| s.reason.contains("takes over when")).await;
    let killed = Instant::now();
    drop(first);
    let second = tokio::task::spawn_blocking(|| second.ready()).await.unwrap();
    let (silent, waited) = (Duration::from_secs(3), Duration::from_secs(5));
    assert!(killed.elapsed() < silent + waited, "{:?}", killed.elapsed());
    answers_exactly(&second.address).await;
}

/// FAULTS, measured failure 3: one that has no such model, and one that is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_members_are_left_out_with_their_reasons_and_hold_up_nobody() {
    let (mut good, empty) = (workers(3), free_dir());
    let bad = Process::start(&["worker", "--models", empty.path().to_str().unwrap()], "listening ");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let addresses: Vec<_> = good.iter().map(|w| w.address.clone()).collect();
    let mut urls: Vec<_> = addresses.iter().map(String::as_str).collect();
    urls.extend([bad.address.as_str(), nobody.as_str()]);
    let coordinator = coordinator(&urls);
    let said = status(&coordinator.address).await;
    let reason = |s: &v1::StatusResponse, address: &str| {
        let member = s.members.iter().find(|m| address.ends_with(&m.worker));
        member.unwrap_or_else(|| panic!("{address} is not listed")).reason.clone()
    };
    assert!(reason(&said, &bad.address).contains("no model \"shakespeare\""), "{said:?}");
    assert!(reason(&said, &nobody).contains("does not answer"), "{said:?}");
    assert_eq!(reason(&said, &good[0].address), "");

    let client = client(&coordinator.address).await;
    let expected = &expectations(&model("shakespeare"))[0];
    let before = ask(&client, greedy(&expected.ids, 200)).await.unwrap().ids;
    let (answer, ()) = tokio::join!(ask(&client, greedy(&expected.ids, 200)), async {
        until(&coordinator.address, "tokens", |s| s.load.unwrap().generated_tokens > 220).await;
        drop(good.remove(1));
    });
    assert_eq!(answer.unwrap().ids, before);
    let after =
        until(&coordinator.address, "the failover", |s| s.ready && s.fence.unwrap().incarnation > 1).await;
    assert_eq!(after.plan.unwrap().replicas[0].stages.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_is_told_to_end_leaves_its_workers_to_the_next_one() {
    let workers = workers(1);
    let mut coordinator = coordinator(&[&workers[0].address]);
    let (remote, ..) = RemoteWorker::lazy(&workers[0].address).unwrap();
    let lead = async || remote.describe(v1::DescribeRequest::default()).await.unwrap().lead.unwrap();
    let led = lead().await;
    assert!(led.age_ms < 60_000, "{led:?}");
    coordinator.signal("-TERM");
    assert!(coordinator.exited().success());
    let left = lead().await;
    assert_eq!((left.term, left.age_ms), (led.term, u64::MAX));
}
