//! The port for operators: metrics as Prometheus reads them, probes, and what is served.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use serde_json::Value;
use strata_proto::v1;
use tokio_stream::StreamExt;

use crate::{
    cluster::{PATIENCE, ask, client, greedy, model},
    processes::{Process, Starting, workers},
};

const OPEN_METRICS: &str =
    "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.4,*/*;q=0.3";

/// An answer: its status, media type and body.
pub struct Answer {
    pub status: u16,
    pub kind: String,
    pub body: String,
}

/// Asks for a path; none if nobody listens yet.
pub fn get(address: &str, path: &str, accept: &str) -> Option<Answer> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nAccept: {accept}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let kind = head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap_or_default();
    Some(Answer { status, kind: kind.to_owned(), body: body.to_owned() })
}

/// Samples by name and labels, from the plain form.
fn samples(address: &str) -> BTreeMap<String, f64> {
    let answer = get(address, "/metrics", "*/*").unwrap();
    assert_eq!((answer.status, answer.kind.as_str()), (200, "text/plain; version=0.0.4; charset=utf-8"));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    answer.body.lines().filter(|line| !line.starts_with('#')).map(sample).collect()
}

pub fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Waits for a probe to say so.
fn probed(address: &str, path: &str, status: u16) -> String {
    let begun = std::time::Instant::now();
    loop {
        if let Some(answer) = get(address, path, "*/*").filter(|answer| answer.status == status) {
            return answer.body;
        }
        assert!(begun.elapsed() < PATIENCE, "{path} never answers {status}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_is_measured_by_the_names_that_boards_have() {
    let (admin, model) = (free_address(), model("shakespeare"));
    let arguments = [
        "serve",
        model.to_str().unwrap(),
        "--name",
        "bard",
        "--dtype",
        "f32",
        "--port",
        "0",
        "--admin",
        &admin,
    ];
    let starting = Starting::new(&[], &arguments, "ready ");
    // It answers before there is anything to serve.
    assert_eq!(probed(&admin, "/livez", 200), "ok\n");
    let server = starting.ready();
    for probe in ["/livez", "/readyz", "/startupz"] {
        assert_eq!(probed(&admin, probe, 200), "ok\n");
    }
    let before = samples(&admin);
    assert_eq!(before["vllm:generation_tokens_total{engine=\"0\",model_name=\"bard\"}"], 0.0);
    assert!(
        !before.keys().any(|name| name.starts_with("vllm:e2e")),
        "the server's own questions count nowhere"
    );

    let client = client(&server.address).await;
    for tokens in [1, 5] {
        assert_eq!(ask(&client, greedy(&[5, 6, 7], tokens)).await.unwrap().ids.len(), tokens as usize);
    }
    assert!(ask(&client, greedy(&[5, 6, 7], 0)).await.is_err());
    let mut asking = client.clone();
    let mut dropped = asking.generate(greedy(&[5, 6, 7], 200)).await.unwrap().into_inner();
    for _ in 0..4 {
        dropped.next().await.unwrap().unwrap();
    }
    drop((dropped, asking));

    let of = |name: &str| format!("{name}{{engine=\"0\",model_name=\"bard\"}}");
    let begun = std::time::Instant::now();
    let aborted = "vllm:request_success_total{engine=\"0\",model_name=\"bard\",finished_reason=\"abort\"}";
    let after = loop {
        let after = samples(&admin);
        if after.contains_key(aborted) && after[&of("vllm:num_requests_running")] == 0.0 {
            break after;
        }
        assert!(begun.elapsed() < PATIENCE, "the request that was dropped is not told");
        std::thread::sleep(Duration::from_millis(10));
    };
    let length = aborted.replace("abort", "length");
    assert_eq!((after[aborted], after[&length]), (1.0, 2.0));
    assert_eq!(after["strata_requests_total{call=\"Generate\",outcome=\"bad-input\"}"], 1.0);
    assert_eq!(after[&of("vllm:prompt_tokens_total")], 9.0);
    for (name, count) in [
        ("e2e_request_latency_seconds", 3.0),
        ("time_to_first_token_seconds", 3.0),
        ("request_queue_time_seconds", 3.0),
        ("request_prefill_time_seconds", 3.0),
        ("request_decode_time_seconds", 3.0),
        ("request_prompt_tokens", 3.0),
        // An answer of one token has no time from token to token.
        ("request_time_per_output_token_seconds", 2.0),
    ] {
        assert_eq!(after[&of(&format!("vllm:{name}_count"))], count, "{name}");
    }
    let generated = after[&of("vllm:request_generation_tokens_sum")];
    assert!(generated >= 9.0, "{generated}");
    assert_eq!(after[&of("vllm:inter_token_latency_seconds_count")], generated - 3.0);
    assert_eq!(after[&of("vllm:kv_cache_usage_perc")], 0.0);
    let stage = "{pipeline=\"0\",stage=\"0\",worker=\"worker-0\",device=\"cpu\"}";
    assert!(after[&format!("strata_stage_busy_seconds_total{stage}")] > 0.0);
    assert!(after[&format!("strata_stage_weight_bytes{stage}")] > 0.0);
    assert!(after["strata_predicted_tokens_per_second{pipeline=\"0\",streams=\"1\"}"] > 0.0);
    assert_eq!(after["strata_ready"], 1.0);
    assert_eq!(after["strata_state{state=\"serving\"}"], 1.0);

    let open = get(&admin, "/metrics", OPEN_METRICS).unwrap();
    assert_eq!(open.kind, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(open.body.ends_with("# EOF\n"));
    assert!(open.body.contains("# {request_id=\""), "an exemplar leads from a bucket to a request");

    let status: Value = serde_json::from_str(&get(&admin, "/status", "*/*").unwrap().body).unwrap();
    assert_eq!((&status["ready"], &status["names"][0]), (&Value::Bool(true), &Value::from("bard")));
    let plan: Value = serde_json::from_str(&get(&admin, "/plan", "*/*").unwrap().body).unwrap();
    assert_eq!(plan["replicas"][0]["stages"][0]["device"], "cpu");
    let version = get(&admin, "/version", "*/*").unwrap().body;
    assert!(version.starts_with(env!("CARGO_PKG_VERSION")), "{version}");
    let nothing = get(&admin, "/nothing", "*/*").unwrap();
    assert!(nothing.status == 404 && nothing.body.contains("/metrics"), "{}", nothing.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_worker_and_the_gap_that_it_leaves_are_measured() {
    let (admin, mut workers) = (free_address(), workers(3));
    let urls: Vec<_> = workers.iter().map(|worker| worker.address.clone()).collect();
    let urls = urls.join(",");
    let arguments = [
        "coordinator",
        "--worker",
        &urls,
        "--model",
        "shakespeare",
        "--dtype",
        "f32",
        "--port",
        "0",
        "--admin",
        &admin,
    ];
    let starting = Starting::new(&[], &[&arguments[..], &["--split", "balanced"]].concat(), "ready ");
    let waiting = probed(&admin, "/readyz", 503);
    assert!(!waiting.trim().is_empty(), "who is not ready says why");
    let coordinator = starting.ready();
    let client = client(&coordinator.address).await;
    let expected = ask(&client, greedy(&[5, 6, 7], 8)).await.unwrap().ids;
    assert_eq!(samples(&admin)["strata_pipelines_started_total"], 1.0);

    let lost: Process = workers.remove(1);
    let name =
        format!("strata_worker_losses_total{{worker=\"{}\"}}", lost.address.trim_start_matches("http://"));
    drop(lost);
    let again: v1::GenerateRequest = greedy(&[5, 6, 7], 8);
    assert_eq!(ask(&client, again).await.unwrap().ids, expected);
    let after = samples(&admin);
    assert_eq!(
        after.get(&name),
        Some(&1.0),
        "{:?}",
        after.keys().filter(|k| k.contains("loss")).collect::<Vec<_>>()
    );
    assert_eq!(
        (after["strata_recovery_gap_seconds_count"], after["strata_pipelines_started_total"]),
        (1.0, 2.0)
    );
    // Who left is found out beside the recovery.
    let begun = std::time::Instant::now();
    while samples(&admin)["strata_workers{state=\"answering\"}"] != 2.0 {
        assert!(begun.elapsed() < PATIENCE, "who is gone counts as there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_tell_what_their_devices_do() {
    let (models, admins) = (model(""), [free_address(), free_address()]);
    let start = |admin: &String| {
        Process::start(&["worker", "--models", models.to_str().unwrap(), "--admin", admin], "listening ")
    };
    let workers: Vec<_> = admins.iter().map(start).collect();
    for probe in ["/livez", "/readyz", "/startupz"] {
        assert_eq!(probed(&admins[0], probe, 200), "ok\n");
    }
    let of = |name: &str| format!("strata_device_{name}{{device=\"cpu\"}}");
    assert_eq!(samples(&admins[0])[&of("weight_bytes")], 0.0);
    let urls = workers.iter().map(|worker| worker.address.as_str()).collect::<Vec<_>>().join(",");
    let arguments =
        ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    let coordinator = Process::start(&[&arguments[..], &["--split", "balanced"]].concat(), "ready ");
    let client = client(&coordinator.address).await;
    assert_eq!(ask(&client, greedy(&[5, 6, 7], 8)).await.unwrap().ids.len(), 8);

    let [first, last] = admins.each_ref().map(|admin| samples(admin));
    for device in [&first, &last] {
        assert!(device[&of("steps_total")] >= 8.0 && device[&of("tokens_total")] >= 10.0);
        assert!(device[&of("busy_seconds_total")] > 0.0 && device[&of("weight_bytes")] > 0.0);
        assert_eq!((device[&of("occupied")], device[&of("poisoned_steps_total")]), (1.0, 0.0));
    }
    assert_eq!((first[&of("received_bytes_total")], last[&of("sent_bytes_total")]), (0.0, 0.0));
    let carried = first[&of("sent_bytes_total")];
    assert!(carried > 0.0 && last[&of("received_bytes_total")] == carried, "{carried}");
    assert!(last[&of("waiting_seconds_total")] > 0.0);
    let status: Value = serde_json::from_str(&get(&admins[1], "/status", "*/*").unwrap().body).unwrap();
    assert_eq!(
        (&status["draining"], &status["resident"][0]["model"]),
        (&false.into(), &"shakespeare".into())
    );
}
