//! What new users meet: the ports, when they come with another client or ask for what is not there, and what every
//! client is told.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;

use strata_proto::{
    MAX_HEADER_LIST,
    v1::{
        DescribeRequest, StatusRequest, TokenizeRequest, cluster_client::ClusterClient,
        inference_client::InferenceClient, stage_client::StageClient,
    },
};
use tonic::{Code, Request, codec::CompressionEncoding::Gzip, transport::Channel};

use crate::{
    cluster::{Cluster, Options, ask, client, greedy, model, status},
    processes::{Process, workers},
};

async fn one_worker() -> (Cluster, Channel) {
    let cluster = Cluster::start(&Options { workers: 1, ..Options::default() }).await;
    let endpoint = Channel::from_shared(cluster.address.clone()).unwrap();
    let channel = endpoint.http2_max_header_list_size(MAX_HEADER_LIST).connect_lazy();
    (cluster, channel)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_calls_what_is_not_served_is_told_what_is() {
    let (cluster, channel) = one_worker().await;
    let refused = StageClient::new(channel).describe(DescribeRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    let says = "\"/strata.v1.Stage/Describe\" is not served here: strata.v1.Inference has Generate, ";
    assert!(refused.message().starts_with(says), "{}", refused.message());

    let answer = browse(cluster.address.clone()).await;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("This port speaks gRPC"), "{answer}");
}

/// What a browser shows that is given this address.
async fn browse(address: String) -> String {
    let browser = tokio::task::spawn_blocking(move || {
        let address = address.trim_start_matches("http://");
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET / HTTP/1.1\r\nHost: {address}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    browser.await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_says_what_it_is_to_clients_and_does_not_wait_for_them() {
    let mut worker = workers(1).remove(0);
    let channel = Channel::from_shared(worker.address.clone()).unwrap().connect_lazy();
    let refused = InferenceClient::new(channel).tokenize(TokenizeRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    let says =
        "\"/strata.v1.Inference/Tokenize\" is not served here: strata.v1.Stage has Describe, ReadTokenizer, ";
    assert!(refused.message().starts_with(says), "{}", refused.message());
    assert!(refused.message().ends_with("ask the coordinator that it works for"), "{}", refused.message());

    let answer = browse(worker.address.clone()).await;
    assert!(
        answer.starts_with("HTTP/1.1 400 ") && answer.contains("This is the port of a worker"),
        "{answer}"
    );

    // A stranger that begins to speak and goes on no further: --grace is 30 s.
    let mut stranger = TcpStream::connect(worker.address.trim_start_matches("http://")).unwrap();
    stranger.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    stranger.read_exact(&mut [0; 9]).unwrap();
    let begun = Instant::now();
    worker.signal("-TERM");
    assert!(worker.exited().success());
    assert!(begun.elapsed() < Duration::from_secs(20), "it waited for a stranger: {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_code_is_never_lost_to_a_long_text() {
    let (_cluster, channel) = one_worker().await;
    let mut client = InferenceClient::new(channel);
    for text in ["x", "ä", "\n", "𝄞"] {
        let request = TokenizeRequest { model: text.repeat(1 << 18), ..TokenizeRequest::default() };
        let refused = client.tokenize(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        let says = "is not served here; this server answers for \"shakespeare\"";
        assert!(refused.message().ends_with(says), "{}", refused.message());
    }
    // What a proxy adds has room, too.
    let mut request = Request::new(TokenizeRequest { text: "ROMEO:".into(), ..TokenizeRequest::default() });
    request.metadata_mut().insert("x-forwarded", "x".repeat(48 << 10).parse().unwrap());
    assert!(!client.tokenize(request).await.unwrap().into_inner().token_ids.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_requests_are_taken_and_answers_compressed_for_those_who_ask() {
    let (_cluster, channel) = one_worker().await;
    let request = TokenizeRequest { text: "ROMEO:\n".repeat(100), ..TokenizeRequest::default() };
    let plain = InferenceClient::new(channel.clone()).tokenize(request.clone()).await.unwrap();
    let packed = InferenceClient::new(channel.clone()).send_compressed(Gzip).tokenize(request).await.unwrap();
    assert_eq!(packed.into_inner(), plain.into_inner());

    let encoding = async |client: ClusterClient<Channel>| {
        let answer = client.clone().status(StatusRequest {}).await.unwrap();
        answer.metadata().get("grpc-encoding").map(|encoding| encoding.to_str().unwrap().to_owned())
    };
    let client = ClusterClient::new(channel);
    assert_eq!(encoding(client.clone()).await, None);
    assert_eq!(encoding(client.accept_compressed(Gzip)).await.as_deref(), Some("gzip"));
}

/// Runs `strata ARGS`: its exit code, and what it said on standard output and standard error.
pub fn strata(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_strata")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

pub fn shakespeare() -> String {
    model("shakespeare").to_str().unwrap().to_owned()
}

#[test]
fn values_may_begin_with_a_dash_and_errors_are_for_programs_too() {
    let demo = shakespeare();
    let server = Process::start(&["serve", &demo, "--port", "0", "--dtype", "f32"], "ready ");
    let generate =
        |extra: &[&str]| strata(&[&["generate", "--address", &server.address, "--json"], extra].concat());
    let last = |out: &str| serde_json::from_str::<Value>(out.lines().last().unwrap()).unwrap();
    let (code, out, said) = generate(&["--prompt", "-5 degrees", "--stop", "--", "--max-tokens", "3"]);
    assert_eq!((code, said.as_str()), (0, ""));
    assert_eq!(last(&out)["finish_reason"], "length");
    let ids = ["--token-ids", "0,842,28,201", "--max-tokens", "1"];
    assert_eq!(last(&generate(&ids).1)["token_ids"], serde_json::json!([49]));
    let biased = last(&generate(&[&ids[..], &["--logit-bias", "49=-100"]].concat()).1);
    assert_ne!(biased["token_ids"], serde_json::json!([49]), "a bias has no effect");

    let error = |said: &str| serde_json::from_str::<Value>(said).unwrap();
    let (code, out, said) = generate(&["--prompt", "x", "--temperature", "-1"]);
    assert_eq!((code, out.as_str(), &error(&said)["code"]), (3, "", &"INVALID_ARGUMENT".into()));
    assert!(error(&said)["error"].as_str().unwrap().contains("sampling.temperature: -1"), "{said}");
    assert_eq!(error(&said)["exit_code"], 3);
    let (code, _, said) = generate(&["--prompt", "x", "--max-tokens", "some"]);
    assert_eq!((code, &error(&said)["code"]), (2, &"USAGE".into()));
    drop(server);
    let (code, _, said) = strata(&["status", "--address", "127.0.0.1:1", "--json"]);
    assert_eq!((code, &error(&said)["code"]), (4, &"UNAVAILABLE".into()), "{said}");
}

#[tokio::test]
async fn a_model_is_asked_for_by_any_of_its_names() {
    let names = ["--name", "bard,will", "--name", "b"];
    let server = Process::start(&[&["serve", &shakespeare(), "--port", "0"], &names[..]].concat(), "ready ");
    let channel = Channel::from_shared(server.address.clone()).unwrap().connect_lazy();
    let status = ClusterClient::new(channel.clone()).status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (status.model.as_str(), status.names),
        ("bard", ["bard", "will", "b"].map(String::from).into())
    );
    let (_, shown, _) = strata(&["status", "--address", &server.address]);
    assert!(shown.starts_with("bard ready") && shown.contains("\nnames     bard, will, b\n"), "{shown}");
    let ask = |model: &str| {
        let mut client = InferenceClient::new(channel.clone());
        let request = TokenizeRequest { model: model.into(), text: "x".into(), ..TokenizeRequest::default() };
        async move { client.tokenize(request).await }
    };
    for name in ["", "bard", "will", "b"] {
        ask(name).await.unwrap();
    }
    let asked = |args: &[&str]| strata(&[args, &["--address", &server.address]].concat());
    let (code, ids, said) = asked(&["tokenize", "To be", "--plain", "--model", "will"]);
    assert_eq!(code, 0, "{said}");
    let directory = crate::processes::free_dir();
    let file = directory.path().join("ids");
    std::fs::write(&file, ids.replace(',', " ")).unwrap();
    let file = format!("@{}", file.display());
    assert_eq!(asked(&["detokenize", &file, "--model", "b"]).1, "To be\n");
    let (code, _, said) = asked(&["detokenize", "1,x"]);
    assert!(code == 2 && said.contains("\"x\" is none; expected numbers"), "{said}");
    let (code, _, said) = asked(&["generate", "x", "--model", "other"]);
    assert!(code == 3 && said.contains("answers for \"bard\""), "{said}");
    let refused = ask("shakespeare").await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let says = "model \"shakespeare\" is not served here; this server answers for \"bard\", \"will\", \"b\"";
    assert_eq!(refused.message(), says);
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let (code, _, said) = strata(&["status", "--address", &address, "--timeout", "1"]);
    assert_eq!(code, 4, "{said}");
    assert!(said.starts_with(&format!("error: nothing came from {address} for 1s")), "{said}");
    drop(silent);
    let (code, _, said) = strata(&["status", "--address", &address]);
    assert_eq!(code, 4, "{said}");
    assert!(
        said.contains(&format!("no server answers at {address}: ")) && said.contains("--timeout"),
        "{said}"
    );
}

#[test]
fn a_coordinator_shows_its_plan_and_loads_nothing() {
    let workers = workers(2);
    let urls = format!("{},{}", workers[0].address, workers[1].address);
    let coordinator = |extra: &[&str]| {
        strata(
            &[&["coordinator", "--worker", &urls, "--model", "shakespeare", "--split", "balanced"], extra]
                .concat(),
        )
    };
    let (code, out, said) = coordinator(&["--dry-run", "--json"]);
    assert_eq!(code, 0, "{said}");
    let plan: Value = serde_json::from_str(&out).unwrap();
    let stages = plan["replicas"][0]["stages"].as_array().unwrap();
    assert_eq!((stages.len(), &stages[0]["link"]), (2, &"tcp".into()), "{out}");
    assert!(!said.contains("loaded"), "{said}");
    let (code, out, _) = coordinator(&["--dry-run"]);
    assert!(code == 0 && out.contains("weights of"), "{out}");
    let (code, _, said) =
        strata(&["coordinator", "--worker", &urls, "--model", "nosuch", "--dry-run", "--split", "3,3"]);
    assert!(code == 1 && said.contains("no model \"nosuch\""), "{said}");
    let twice = format!("{0},{0}", workers[0].address);
    let (code, _, said) = strata(&["coordinator", "--worker", &twice, "--model", "x", "--dry-run"]);
    assert!(code == 2 && said.contains("is listed twice"), "{said}");
    let port = workers[0].address.rsplit(':').next().unwrap();
    let alias = format!("localhost:{port},{}", workers[0].address);
    let (code, _, said) = strata(&["coordinator", "--worker", &alias, "--model", "shakespeare", "--dry-run"]);
    assert!(code == 2 && said.contains("are one process: expected each worker once"), "{said}");
}

#[test]
fn json_logs_are_json_in_every_line_and_nothing_has_colours() {
    let demo = shakespeare();
    let lines = |said: &str| -> Vec<Value> {
        said.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    };
    let json = ["--log-format", "json"];
    let (code, _, said) =
        strata(&[&["check", &demo, "--workers", "2", "--log", "debug"], &json[..]].concat());
    let said = lines(&said);
    assert_eq!(code, 0);
    let find = |message: &str| said.iter().find(|line| line["fields"]["message"] == message);
    assert_eq!(find("planned").unwrap()["fields"]["plan"]["model"], "shakespeare");
    assert!(said.iter().all(|line| line["timestamp"].is_string() && line["level"].is_string()), "{said:?}");
    for (args, code, word) in [
        (&["check", "/nowhere"][..], 1, "/nowhere"),
        (&["plan", &demo, "--workers", "many"], 2, "many"),
        (&["plan", &demo, "--threads", "1000"], 0, "--threads 1000"),
    ] {
        let (exited, _, said) = strata(&[args, &json].concat());
        assert_eq!(exited, code, "{said}");
        let messages: Vec<_> =
            lines(&said).iter().map(|line| line["fields"]["message"].to_string()).collect();
        let shown = messages.concat();
        assert!(shown.contains(word), "{args:?}: {shown}");
    }
    let (_, _, said) = strata(&["check", &demo, "--log", "debug"]);
    assert!(said.contains(" INFO ") && !said.contains('\x1b'), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_so_far_are_those_of_clients() {
    let cluster = Cluster::start(&Options { workers: 1, ..Options::default() }).await;
    let load = status(&cluster.address).await.load.unwrap();
    assert_eq!((load.prompt_tokens, load.generated_tokens), (0, 0), "the coordinator's own questions count");
    ask(&client(&cluster.address).await, greedy(&[0, 842, 28, 201], 3)).await.unwrap();
    cluster.wait_for("its tokens", |s| (s.load.prompt_tokens, s.load.generated_tokens) == (4, 3)).await;
}
