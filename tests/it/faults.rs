//! What breaks, and what must hold: poisoned steps, lost workers, stale fences, wrong peers.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use futures::future::join_all;
use strata_coordinator::{
    cluster::{discovery::discover, membership::MemberEvent},
    engine::{Notice, Observer, Snapshot},
};
use strata_proto::v1::{self, Fence};
use tonic::Code;

use crate::cluster::{Cluster, Options, ask, expectations, greedy, model};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_or_panicking_step_is_replayed_and_nobody_notices() {
    // Rare enough that no request meets four faults between two tokens, which would be its end.
    let calls = Arc::new(AtomicU32::new(0));
    let hook: strata_worker::StepHook = {
        let calls = calls.clone();
        Arc::new(move |meta| match calls.fetch_add(1, Ordering::Relaxed) {
            n if n % 401 == 20 => panic!("injected panic in step {}", meta.step),
            n if n % 173 == 50 => Err("injected failure".into()),
            _ => Ok(()),
        })
    };
    let options = Options { workers: 3, hook: Some(hook), prefill_chunk: 3, ..Options::default() };
    let cluster = Cluster::start(&options).await;
    let client = cluster.client().await;
    let expected = expectations(&model("shakespeare"));
    for e in &expected[..4] {
        let answer = ask(&client, greedy(&e.ids, 20)).await.unwrap();
        assert_eq!(answer.ids, e.greedy[..20]);
    }
    assert!(calls.load(Ordering::Relaxed) > 230, "too few steps to have met the faults");
    cluster.wait_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poison_request_is_given_up_and_its_neighbours_are_not() {
    // Token 7 in a prompt is poison.
    let hook: strata_worker::StepHook = Arc::new(|meta| match meta.token_ids.contains(&7) {
        true => Err("injected poison".into()),
        false => Ok(()),
    });
    let cluster = Cluster::start(&Options { workers: 2, hook: Some(hook), ..Options::default() }).await;
    let client = cluster.client().await;
    let expected = expectations(&model("shakespeare"));
    let clean: Vec<_> = expected.iter().filter(|e| !e.ids.contains(&7) && !e.greedy.contains(&7)).collect();
    assert!(!clean.is_empty());
    let good = join_all((0..8).map(|i| ask(&client, greedy(&clean[i % clean.len()].ids, 48))));
    let (good, bad) = tokio::join!(good, ask(&client, greedy(&[0, 7, 7], 8)));
    assert_eq!(bad.unwrap_err().code(), Code::Internal);
    for (i, answer) in good.into_iter().enumerate() {
        assert_eq!(answer.unwrap().ids, clean[i % clean.len()].greedy);
    }
    cluster.wait_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_leaves_costs_a_pause_and_no_error() {
    // Slow enough that the answers last longer than the news takes.
    let slow: strata_worker::StepHook = Arc::new(|_| {
        std::thread::sleep(std::time::Duration::from_millis(2));
        Ok(())
    });
    let cluster = Cluster::start(&Options { workers: 3, hook: Some(slow), ..Options::default() }).await;
    let client = cluster.client().await;
    let expected = expectations(&model("shakespeare"));
    let answers = join_all((0..10).map(|i| ask(&client, greedy(&expected[i % 5].ids, 48))));
    let leave = async {
        cluster.wait_for("tokens", |s| s.load.generated_tokens > 40).await;
        cluster.members.send(MemberEvent::Left("worker-1".into())).unwrap();
        cluster.wait_for("the next incarnation", |s| s.ready() && s.fence.incarnation == 2).await
    };
    let (answers, snapshot) = tokio::join!(answers, leave);
    for (i, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap().ids, expected[i % 5].greedy, "an answer changed when a worker left");
    }
    assert_eq!(snapshot.plan.unwrap().replicas[0].stages.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_ends_by_a_defect_is_followed_by_another_one() {
    let options = Options { workers: 2, ..Options::default() };
    let (cluster, events) = Cluster::open(&options).await;
    for member in options.members() {
        cluster.members.send(MemberEvent::Joined(member)).unwrap();
    }
    // The engine tells of each plan by this, the second time in vain.
    let plans = AtomicU32::new(0);
    let observer: Observer = Arc::new(move |notice| {
        if matches!(notice, Notice::Planned(_)) && plans.fetch_add(1, Ordering::Relaxed) == 1 {
            panic!("injected panic in the engine");
        }
    });
    cluster.coordinator.start(events, observer).await.unwrap();
    let client = cluster.client().await;
    let e = &expectations(&model("shakespeare"))[0];
    assert_eq!(ask(&client, greedy(&e.ids, 48)).await.unwrap().ids, e.greedy);
    cluster.members.send(MemberEvent::Left("worker-1".into())).unwrap();
    let failed = cluster.wait_for("the end of the engine", |s| s.reason().contains("the engine ended")).await;
    assert!(!failed.ready());
    let again = cluster.wait_for("another engine", Snapshot::ready).await;
    assert_eq!(again.plan.unwrap().replicas[0].stages.len(), 1);
    assert_eq!(ask(&client, greedy(&e.ids, 48)).await.unwrap().ids, e.greedy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_refuse_stale_fences_on_every_call() {
    let options = Options::default();
    let members = options.members();
    let worker = &members[0].worker;
    let found = discover(&members, &options.deployment()).await.unwrap();
    let spec = v1::StageSpec {
        model: "shakespeare".into(),
        fingerprint: found.profile.fingerprint.clone(),
        device: "cpu".into(),
        layers: Some(v1::LayerRange { first: 0, end: 6 }),
        embedding: true,
        head: true,
        dtype: "f32".into(),
        quantization: String::new(),
        mapped: false,
    };
    let fence = |term, incarnation| Some(Fence { term, pipeline: 0, incarnation });
    let open = || v1::Open { device: "cpu".into(), heartbeat_timeout_ms: 2000, ..v1::Open::default() };
    let load = |fence| v1::LoadRequest { fence, spec: Some(spec.clone()), ..v1::LoadRequest::default() };
    let mut progress = worker.load(load(fence(2, 5))).await.unwrap();
    while let Some(update) = progress.recv().await {
        update.unwrap();
    }
    for stale in [fence(2, 4), fence(1, 9)] {
        let prepare = v1::PrepareRequest {
            fence: stale,
            spec: Some(spec.clone()),
            kv_blocks: 4,
            block_tokens: 16,
            max_step_tokens: 16,
            max_step_rows: 4,
            heartbeat_timeout_ms: 2000,
            ..v1::PrepareRequest::default()
        };
        let connect =
            v1::ConnectRequest { fence: stale, device: "cpu".into(), ..v1::ConnectRequest::default() };
        let refused = [
            worker.load(load(stale)).await.err(),
            worker.prepare(prepare).await.err(),
            worker.connect(connect).await.err(),
            worker.run(v1::Open { fence: stale, ..open() }).await.err(),
        ];
        for status in refused {
            let status = status.expect("a stale call was taken");
            assert_eq!(status.code(), Code::FailedPrecondition);
            assert!(status.message().contains("is stale"), "{status:?}");
        }
    }
    let none = worker
        .load(v1::LoadRequest { fence: None, spec: Some(spec.clone()), ..v1::LoadRequest::default() })
        .await
        .unwrap_err();
    assert_eq!(none.code(), Code::InvalidArgument);
    let unopened = worker.run(v1::Open { fence: fence(2, 6), ..open() }).await.unwrap_err();
    assert!(unopened.message().contains("not prepared"), "{unopened:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_says_nothing_sensible_is_refused_before_it_serves() {
    let hook: strata_worker::StepHook = Arc::new(|_| Err("injected: every forward pass fails".into()));
    let options = Options { hook: Some(hook), ..Options::default() };
    let Err(error) = Cluster::try_start(&options).await else { panic!("it serves") };
    assert!(error.to_string().contains("preflight: output: the forward pass fails"), "{error}");
}
