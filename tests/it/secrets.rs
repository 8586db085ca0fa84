//! Ports that trust nobody: whoever lacks the cluster's secret reaches a worker's port in vain.

use strata_coordinator::RemoteWorker;
use strata_proto::{
    Secret, Worker,
    v1::{AbortRequest, Claim, DescribeRequest, Fence, LoadRequest, Open, StageSpec},
};
use tokio::io::AsyncWriteExt;
use tonic::Code;

use crate::{
    cluster::{ask, client, expectations, greedy, model, status},
    processes::{Process, free_dir},
};

const TEXT: &str = "a secret that nobody guesses";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_lacks_the_secret_is_refused_by_every_call_and_disturbs_nobody() {
    let folder = free_dir();
    let file = folder.path().join("secret");
    std::fs::write(&file, format!("{TEXT}\n")).unwrap();
    let file = file.to_str().unwrap();
    let models = model("");
    let worker = ["worker", "--models", models.to_str().unwrap()];
    // One has it from a file, the other from the environment.
    let workers = [
        Process::start(&[&worker[..], &["--secret-file", file]].concat(), "listening "),
        Process::start_with(&[("STRATA_SECRET", TEXT)], &worker, "listening "),
    ];
    let urls = workers.each_ref().map(|w| w.address.clone()).join(",");
    let args = ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    let args = [&args[..], &["--split", "balanced", "--secret-file", file]].concat();
    let coordinator = Process::start(&args, "ready ");
    let before = status(&coordinator.address).await.fence.unwrap();

    let (remote, ..) = RemoteWorker::lazy(&workers[0].address).unwrap();
    let other = Some(Secret::new("another secret that somebody guessed").unwrap());
    for (stranger, why) in
        [(remote.clone(), "proves none"), (remote.with_secret(other), "another cluster secret")]
    {
        let fence = Some(Fence { term: u64::MAX, pipeline: 0, incarnation: u64::MAX });
        let claim = Some(Claim { term: u64::MAX, coordinator: "stranger".into(), resigned: false });
        let spec =
            Some(StageSpec { model: "shakespeare".into(), device: "cpu".into(), ..StageSpec::default() });
        let device = || "cpu".to_owned();
        let refused = [
            stranger.describe(DescribeRequest { claim, ..DescribeRequest::default() }).await.err(),
            stranger.read_tokenizer(Default::default()).await.err(),
            stranger.load(LoadRequest { fence, spec: spec.clone(), ..LoadRequest::default() }).await.err(),
            stranger
                .prepare(strata_proto::v1::PrepareRequest { fence, spec, ..Default::default() })
                .await
                .err(),
            stranger
                .connect(strata_proto::v1::ConnectRequest { fence, device: device(), ..Default::default() })
                .await
                .err(),
            stranger.run(Open { fence, device: device(), ..Open::default() }).await.err(),
            stranger.abort(AbortRequest { fence: Some(before), device: device() }).await.err(),
        ];
        for status in refused {
            let status = status.expect("a stranger's call was taken");
            assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
            assert!(status.message().contains(why), "{status:?}");
        }
    }
    let expected = &expectations(&model("shakespeare"))[0];
    let answer = ask(&client(&coordinator.address).await, greedy(&expected.ids, 48)).await.unwrap();
    assert_eq!(answer.ids, expected.greedy);
    let after = status(&coordinator.address).await;
    assert_eq!(after.fence.unwrap(), before, "somebody's call ended an incarnation");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_without_the_secret_says_so_of_each_worker() {
    let models = model("");
    let worker = Process::start_with(
        &[("STRATA_SECRET", TEXT)],
        &["worker", "--models", models.to_str().unwrap()],
        "listening ",
    );
    let args = ["coordinator", "--worker", &worker.address, "--model", "shakespeare", "--join-timeout", "1"];
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_strata"))
        .args([&args[..], &["--port", "0"]].concat())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("--secret-file"), "{said}");
}

/// Strangers that hold every connection of a worker's port, and prove nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_strangers_keeps_no_coordinator_out_of_a_worker() {
    let models = model("");
    let args = ["worker", "--models", models.to_str().unwrap()];
    let worker = Process::start_with(&[("STRATA_SECRET", TEXT)], &args, "listening ");
    let port = worker.address.strip_prefix("http://").unwrap();
    let (stranger, ..) = RemoteWorker::lazy(&worker.address).unwrap();
    let mut crowd = Vec::new();
    for number in 0..300 {
        let mut connection = tokio::net::TcpStream::connect(port).await.unwrap();
        // Half of them begin as HTTP/2 does.
        if number % 2 == 0 {
            connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        }
        crowd.push(connection);
    }
    let refused = stranger.describe(DescribeRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    let args = ["coordinator", "--worker", &worker.address, "--model", "shakespeare", "--dtype", "f32"];
    let args = [&args[..], &["--port", "0"]].concat();
    let coordinator = Process::start_with(&[("STRATA_SECRET", TEXT)], &args, "ready ");
    for _ in 0..300 {
        crowd.push(tokio::net::TcpStream::connect(port).await.unwrap());
    }
    let expected = &expectations(&model("shakespeare"))[0];
    let answer = ask(&client(&coordinator.address).await, greedy(&expected.ids, 48)).await.unwrap();
    assert_eq!(answer.ids, expected.greedy);
}

#[test]
fn a_secret_that_is_none_is_refused_at_the_start() {
    let folder = free_dir();
    let file = folder.path().join("secret");
    std::fs::write(&file, "short").unwrap();
    let run = |environment: Option<&str>, args: &[&str]| {
        let worker = ["worker", "--models", folder.path().to_str().unwrap()];
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_strata"));
        command.args(worker).args(args);
        command.envs(environment.map(|value| ("STRATA_SECRET", value)));
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let file = file.to_str().unwrap();
    let (code, said) = run(None, &["--secret-file", file]);
    assert!(code == Some(2) && said.contains("has 16 to 1024 bytes, this one 5"), "{said}");
    let (code, said) = run(Some("short too"), &[]);
    assert!(code == Some(2) && said.contains("STRATA_SECRET: ") && said.contains("this one 9"), "{said}");
    let (code, said) = run(Some(TEXT), &["--secret-file", file]);
    assert!(code == Some(2) && said.contains("not both"), "{said}");
    let (code, said) = run(None, &["--secret-file", "/nowhere/secret"]);
    assert!(code == Some(1) && said.contains("--secret-file /nowhere/secret: No such file"), "{said}");
}
