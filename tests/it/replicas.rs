//! Several copies of a model: all of them answer, one's loss moves its sequences to the others, new devices become
//! another.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use futures::future::join_all;
use strata_coordinator::{
    cluster::membership::{Member, MemberEvent},
    engine::Snapshot,
    planner::Split,
};
use strata_proto::v1;
use strata_worker::device::DeviceSpec;

use crate::cluster::{Cluster, Options, ask, expectations, greedy, model};

/// Steps that each pipeline has run.
type Steps = Arc<Mutex<BTreeMap<u32, u64>>>;

/// A demo cluster of `workers` that may each hold a copy, and the steps that the copies run.
fn options(workers: usize) -> (Options, Steps) {
    let steps = Steps::default();
    let counted = steps.clone();
    let hook = move |meta: &v1::StepMeta| {
        let pipeline = meta.fence.as_ref().unwrap().pipeline;
        *counted.lock().unwrap().entry(pipeline).or_default() += 1;
        Ok(())
    };
    (Options { workers, split: Split::Auto, hook: Some(Arc::new(hook)), ..Options::default() }, steps)
}

/// A worker with a CPU that may have so much memory.
fn another(name: &str, cap: Option<u64>) -> Member {
    let (options, _) = options(1);
    let mut member = Options { devices: vec![DeviceSpec::cpu(cap)], ..options }.members().remove(0);
    member.name = name.into();
    member
}

async fn wait_for_replicas(cluster: &Cluster, count: usize) {
    cluster
        .wait_for("another number of replicas", |s| {
            s.plan.as_ref().is_some_and(|p| p.replicas.len() == count)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_copy_answers_and_gives_the_same_answers() {
    let (options, steps) = options(3);
    let cluster = Cluster::start(&options).await;
    wait_for_replicas(&cluster, 3).await;
    let client = cluster.client().await;
    let expected = expectations(&model("shakespeare"));
    let answers = join_all((0..24).map(|i| ask(&client, greedy(&expected[i % 5].ids, 48)))).await;
    for (i, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap().ids, expected[i % 5].greedy);
    }
    let steps = steps.lock().unwrap().clone();
    assert!(steps.len() == 3 && steps.values().all(|n| *n >= 48), "one was spared: {steps:?}");
    cluster.wait_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lost_copy_was_answering_goes_on_in_another() {
    let (options, steps) = options(2);
    let cluster = Cluster::start(&options).await;
    wait_for_replicas(&cluster, 2).await;
    let client = cluster.client().await;
    let expected = expectations(&model("shakespeare"));
    let lose = async {
        cluster.wait_for("tokens", |s| s.load.generated_tokens > 100).await;
        cluster.members.send(MemberEvent::Left("worker-1".into())).unwrap();
        wait_for_replicas(&cluster, 1).await;
    };
    let asked = join_all((0..16).map(|i| ask(&client, greedy(&expected[i % 5].ids, 48))));
    let (answers, ()) = tokio::join!(asked, lose);
    for (i, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap().ids, expected[i % 5].greedy, "no token was lost or sampled again");
    }
    assert_eq!(steps.lock().unwrap().len(), 2, "both were at work");
    cluster.wait_idle().await;

    // A worker that comes becomes a copy without anybody waiting.
    cluster.members.send(MemberEvent::Joined(another("worker-2", Some(1 << 30)))).unwrap();
    wait_for_replicas(&cluster, 2).await;
    assert_eq!(ask(&client, greedy(&expected[0].ids, 48)).await.unwrap().ids, expected[0].greedy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_joins_becomes_a_copy_by_the_rule_of_the_start() {
    let (options, _) = options(1);
    let cluster = Cluster::start(&options).await;
    // A CPU without a cap is for what fits nowhere else. The next worker comes while that is being found out.
    for (name, cap) in [("uncapped", None), ("capped", Some(1 << 30))] {
        cluster.members.send(MemberEvent::Joined(another(name, cap))).unwrap();
    }
    wait_for_replicas(&cluster, 2).await;
    let status = cluster.coordinator.watch().borrow().clone();
    let stages = status.plan.iter().flat_map(|plan| &plan.replicas).flat_map(|replica| &replica.stages);
    assert_eq!(stages.map(|stage| stage.worker.as_str()).collect::<Vec<_>>(), ["worker-0", "capped"]);
    // Where nothing else is left, it holds the model.
    for name in ["worker-0", "capped"] {
        cluster.members.send(MemberEvent::Left(name.into())).unwrap();
    }
    let on = |s: &Snapshot, worker: &str| {
        s.plan.as_ref().is_some_and(|p| p.replicas.len() == 1 && p.replicas[0].stages[0].worker == worker)
    };
    cluster.wait_for("the model on what is left", |s| s.up && on(s, "uncapped")).await;
}
