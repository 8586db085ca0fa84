//! What clients may take of a server: its time beside others, bytes, places; and what becomes of those who take more.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http_body::Frame;
use strata_coordinator::{ClientLimits, front::session::Outcome};
use strata_proto::v1::{self, GenerateRequest};
use tokio::sync::oneshot;
use tonic::{
    Code, Status,
    body::Body,
    client::GrpcService,
    codegen::{Bytes, http},
    transport::Channel,
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::cluster::{Cluster, Options, ask, greedy};

const PROMPT: [u32; 4] = [0, 842, 28, 201];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_one_tenant_keeps_another_waiting_no_longer_than_who_runs_already() {
    let slow: strata_worker::StepHook = Arc::new(|_| {
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    });
    let cluster =
        Cluster::start(&Options { max_requests: 2200, hook: Some(slow), ..Options::default() }).await;
    let of = |tenant: &str| GenerateRequest { tenant: tenant.into(), ..greedy(&PROMPT, 6) };
    let answered = Arc::new(AtomicUsize::new(0));
    let mut burst = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let client = cluster.client().await;
        for _ in 0..500 {
            let (client, request, answered) = (client.clone(), of("burst"), answered.clone());
            burst.spawn(async move {
                ask(&client, request).await.unwrap();
                answered.fetch_add(1, Ordering::Relaxed);
            });
        }
    }
    cluster.wait_for("the burst", |s| s.load.waiting > 1000).await;
    let client = cluster.client().await;
    let before = answered.load(Ordering::Relaxed);
    ask(&client, of("other")).await.unwrap();
    let meanwhile = answered.load(Ordering::Relaxed) - before;
    // A step has 64 rows: those that ran when it came, those that ran with it, and what this process is late by.
    assert!(meanwhile <= 8 * 64, "{meanwhile} of the burst were answered first");
    burst.abort_all();
    while burst.join_next().await.is_some() {}
    cluster.wait_idle().await;
}

/// A body that begins, and does not go on.
struct Unfinished(Option<Bytes>);

impl http_body::Body for Unfinished {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.0.take().map_or(Poll::Pending, |bytes| Poll::Ready(Some(Ok(Frame::data(bytes)))))
    }
}

/// The code with which a request is answered of which so many bytes come, and no more.
async fn unfinished(mut channel: Channel, bytes: usize) -> Code {
    // Not compressed, and a length that is not reached.
    let mut begin = vec![0, 0, 0x40, 0, 0];
    begin.resize(bytes, b'x');
    let request = http::Request::post("http://x/strata.v1.Inference/Generate")
        .header("content-type", "application/grpc")
        .body(Body::new(Unfinished(Some(begin.into()))))
        .unwrap();
    std::future::poll_fn(|context| GrpcService::poll_ready(&mut channel, context)).await.unwrap();
    let response = GrpcService::call(&mut channel, request).await.unwrap();
    Status::from_header_map(response.headers()).expect("an error is all headers").code()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_do_not_come_whole_take_so_many_bytes_and_so_much_time() {
    let clients = ClientLimits {
        unfinished_bytes: 400 << 10,
        // All of them are to come within it on a busy machine, too.
        request_timeout: Duration::from_secs(5),
        ..ClientLimits::default()
    };
    let cluster = Cluster::start(&Options { clients, ..Options::default() }).await;
    let connect =
        || async { Channel::from_shared(cluster.address.clone()).unwrap().connect().await.unwrap() };
    let channel = connect().await;
    let both = tokio::join!(unfinished(channel.clone(), 60 << 10), unfinished(channel.clone(), 60 << 10));
    let mut codes = [both.0, both.1];
    codes.sort_by_key(|code| *code as i32);
    assert_eq!(
        codes,
        [Code::DeadlineExceeded, Code::ResourceExhausted],
        "a connection has a quarter: 100 KiB"
    );
    let client = v1::inference_client::InferenceClient::new(channel);
    ask(&client, greedy(&PROMPT, 2)).await.expect("what was held is given back");

    let mut all = tokio::task::JoinSet::new();
    for _ in 0..6 {
        all.spawn(unfinished(connect().await, 80 << 10));
    }
    let codes = all.join_all().await;
    let refused = codes.iter().filter(|code| **code == Code::ResourceExhausted).count();
    assert!((1..=2).contains(&refused), "of 6 times 80 KiB, 400 KiB may be held: {codes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_stops_reading_loses_its_answer_and_keeps_nobody_out() {
    let clients = ClientLimits { slow_reader: Duration::from_millis(500), ..ClientLimits::default() };
    let options = Options { max_requests: 1, clients, ..Options::default() };
    let cluster = Cluster::start(&options).await;
    // The least window there may be: nothing of an answer can be sent ahead.
    let channel = Channel::from_shared(cluster.address.clone()).unwrap().initial_stream_window_size(1);
    let slow = v1::inference_client::InferenceClient::new(channel.connect().await.unwrap());
    let long = GenerateRequest { logprobs: Some(20), ..greedy(&PROMPT, 200) };
    let mut unread = slow.clone().generate(long).await.unwrap().into_inner();
    cluster.wait_idle().await;
    let client = cluster.client().await;
    ask(&client, greedy(&PROMPT, 2)).await.expect("the place is free, though the answer is unread");

    // The connection is open, and another answer over it is read to its end.
    let ended = cluster.coordinator.session().counts();
    while ended.ended(Outcome::Cancelled) == 0 {
        ask(&client, greedy(&PROMPT, 2)).await.unwrap();
    }
    let status = loop {
        match unread.message().await {
            Ok(event) => assert!(event.is_some(), "the answer ended as if it were whole"),
            Err(status) => break status,
        }
    };
    assert!(status.code() == Code::DeadlineExceeded && status.message().contains("not read"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_texts_are_refused_whatever_they_are_made_of() {
    let cluster = Cluster::start(&Options::default()).await;
    let client = cluster.client().await;
    for piece in ["a", " ", "to be or not ", "\u{1f469}\u{200d}\u{1f680}", "日本語", "\0", "<|eos|>"] {
        let text = piece.repeat((1 << 20) / piece.len());
        let prompt = GenerateRequest { prompt: Some(text.clone()), ..GenerateRequest::default() };
        let content = v1::ChatMessage {
            role: "user".into(),
            content: text[piece.len() * 16..].into(),
            ..Default::default()
        };
        let chat = GenerateRequest { messages: vec![content], ..GenerateRequest::default() };
        // The template trims what is blank.
        let requests = if piece.trim().is_empty() { vec![prompt] } else { vec![prompt, chat] };
        for request in requests {
            let refused = ask(&client, request).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
            assert!(refused.message().contains("tokens or more leave no room"), "{piece:?}: {refused:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_says_by_health_that_it_drains() {
    let worker = Options::default().members().remove(0).worker;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (drain, draining) = oneshot::channel::<()>();
    let (end, drained) = oneshot::channel::<()>();
    let until = |told: oneshot::Receiver<()>| async { drop(told.await) };
    let serving =
        tokio::spawn(strata_worker::grpc::serve(worker, None, listener, until(draining), until(drained)));
    let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel);
    let asked = HealthCheckRequest { service: "strata.v1.Stage".into() };
    let mut watch = health.watch(asked).await.unwrap().into_inner();
    let serves = ServingStatus::Serving as i32;
    assert_eq!(watch.message().await.unwrap().unwrap().status, serves);
    drain.send(()).unwrap();
    assert_eq!(watch.message().await.unwrap().unwrap().status, ServingStatus::NotServing as i32);
    end.send(()).unwrap();
    while let Ok(Some(_)) = watch.message().await {}
    serving.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_previews_and_questions_for_status_delays_no_answer() {
    let cluster = Cluster::start(&Options::default()).await;
    let gpu = |rank: usize| v1::Device {
        id: format!("cuda:{rank}"),
        kind: v1::DeviceKind::Cuda as i32,
        budget_bytes: 1 << 18,
        bytes_per_second: 1e12,
        flops_per_second: 1e14,
        ..v1::Device::default()
    };
    let devices: Vec<_> = (0..1000).map(gpu).collect();
    let channel = Channel::from_shared(cluster.address.clone()).unwrap().connect().await.unwrap();
    let flooding = v1::cluster_client::ClusterClient::new(channel);
    let mut previews = tokio::task::JoinSet::new();
    let mut questions = tokio::task::JoinSet::new();
    for _ in 0..60 {
        let (mut client, devices) = (flooding.clone(), devices.clone());
        let request =
            v1::PreviewPlanRequest { devices, split: "balanced".into(), ..v1::PreviewPlanRequest::default() };
        previews
            .spawn(async move { client.preview_plan(request).await.map_or_else(|s| s.code(), |_| Code::Ok) });
        let mut client = flooding.clone();
        questions.spawn(async move { client.status(v1::StatusRequest {}).await.map(|s| s.into_inner()) });
    }
    let client = cluster.client().await;
    assert_eq!(ask(&client, greedy(&PROMPT, 20)).await.unwrap().ids.len(), 20);
    let codes = previews.join_all().await;
    assert!(codes.contains(&Code::ResourceExhausted), "all of them were planned: {codes:?}");
    assert!(questions.join_all().await.iter().all(|shown| shown.as_ref().is_ok_and(|s| s.members[0].live)));
}
