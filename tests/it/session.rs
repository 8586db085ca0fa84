//! Requests without a port, as every front makes them: how they end, and what is told of them.

use std::{process::Command, time::Duration};

use futures::StreamExt;
use strata_coordinator::{Session, SessionError, front::session::Outcome};
use strata_proto::{
    error::{Classify, Kind},
    v1::{self, GenerateRequest, Sampling, generate_event::Event},
};

use crate::cluster::{Cluster, Options, ask, greedy, model, status};

const PROMPT: [u32; 4] = [0, 842, 28, 201];

/// Reads an answer to its end.
async fn finish(session: &Session, request: GenerateRequest) -> Result<v1::Finished, SessionError> {
    let mut answer = session.generate(request).await?;
    loop {
        match answer.next().await.expect("an answer ended without a word")? {
            Event::Finished(finished) => {
                assert!(answer.next().await.is_none(), "something came after the end");
                return Ok(finished);
            }
            Event::Started(_) | Event::Tokens(_) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_is_counted_once_by_how_it_ended() {
    let slow: strata_worker::StepHook = std::sync::Arc::new(|_| {
        std::thread::sleep(Duration::from_millis(5));
        Ok(())
    });
    let options = Options { max_requests: 2, hook: Some(slow), ..Options::default() };
    let cluster = Cluster::start(&options).await;
    let session = cluster.coordinator.session();
    assert_eq!(session.counts().begun(), 0, "the coordinator's own questions count");

    finish(session, greedy(&PROMPT, 3)).await.unwrap();
    let bias = |id| Some(Sampling { logit_bias: [(id, 100.0)].into(), ..Sampling::default() });
    let eos = GenerateRequest { sampling: bias(1), ignore_eos: false, ..greedy(&PROMPT, 3) };
    finish(session, eos).await.unwrap();
    finish(session, GenerateRequest { stop: vec![",".into()], ..greedy(&PROMPT, 9) }).await.unwrap();
    let kind = |outcome: Result<v1::Finished, SessionError>| outcome.unwrap_err().kind();
    assert_eq!(kind(finish(session, greedy(&PROMPT, 0)).await), Kind::BadInput);
    let other = GenerateRequest { model: "other".into(), ..greedy(&PROMPT, 1) };
    assert_eq!(kind(finish(session, other).await), Kind::WrongModel);
    let late = GenerateRequest { deadline_ms: Some(20), ..greedy(&PROMPT, 200) };
    assert_eq!(kind(finish(session, late).await), Kind::Deadline);
    let ids = session.tokenize(v1::TokenizeRequest { text: "ROMEO:\n".into(), ..Default::default() });
    assert_eq!(ids.await.unwrap().token_ids, PROMPT);

    // Two have both places, until they are dropped: one that was read from, and one that was not.
    let mut read = session.generate(greedy(&PROMPT, 250)).await.unwrap();
    let unread = session.generate(greedy(&PROMPT, 250)).await.unwrap();
    while !matches!(read.next().await.unwrap().unwrap(), Event::Tokens(_)) {}
    assert!(matches!(kind(finish(session, greedy(&PROMPT, 1)).await), Kind::Overload { .. }));
    let requests = status(&cluster.address).await.requests.unwrap();
    assert_eq!(requests.in_progress, 2);
    drop((read, unread));
    cluster.wait_idle().await;

    let requests = status(&cluster.address).await.requests.unwrap();
    assert_eq!((requests.begun, requests.in_progress), (10, 0));
    let ended = Outcome::ALL.map(|outcome| requests.ended.get(outcome.name()).copied().unwrap_or(0));
    assert_eq!(ended, [1, 1, 1, 1, 2, 1, 1, 1, 1, 0, 0], "{:?}", requests.ended);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_place_is_enough_to_start_and_is_free_when_an_answer_ends() {
    for name in ["bert-classify-f32", "bert-embed-f32", "distilbert-mlm-f32"] {
        drop(Cluster::start(&Options { model: model(name), max_requests: 1, ..Options::default() }).await);
    }
    let cluster = Cluster::start(&Options { max_requests: 1, ..Options::default() }).await;
    let client = cluster.client().await;
    for _ in 0..20 {
        ask(&client, greedy(&PROMPT, 2)).await.unwrap();
    }
}

#[test]
fn the_log_has_a_line_for_each_request_when_it_ends() {
    let demo = model("shakespeare");
    let run = ["--log", "info", "run", demo.to_str().unwrap(), "--complete", "ROMEO:\n", "--max-tokens", "3"];
    let output = Command::new(env!("CARGO_BIN_EXE_strata")).args(run).env("NO_COLOR", "1").output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("request ended")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    for part in [
        " id=",
        "call=\"Generate\" model=\"shakespeare\" prompt_tokens=4 answer_tokens=3",
        "ended=\"length\"",
    ] {
        assert!(lines[0].contains(part), "{part} is not in {}", lines[0]);
    }
    let number = |key: &str| -> f64 {
        let (_, rest) = lines[0].split_once(key).unwrap_or_else(|| panic!("no {key} in {}", lines[0]));
        rest.split(' ').next().unwrap().parse().unwrap()
    };
    let [queue, first, total] = ["queue_ms=", "first_token_ms=", "total_ms="].map(number);
    assert!(0.0 < queue && queue < first && first < total, "{}", lines[0]);
}
