//! What a coordinator tells of itself and of its workers.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use strata_proto::{LayerRange, v1};

use super::Coordinator;
use crate::{
    cluster::{membership::Member, records::DeploymentRecord},
    engine::{Loading, State},
};

/// Shortest time from one question to the members, whoever wants to know, to the next.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// How long a member may take to say that it is there.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// What members said when they were last asked.
#[derive(Debug, Default)]
pub(super) struct Probed {
    at: Option<Instant>,
    /// By member; none of one that did not answer.
    devices: HashMap<String, Option<Vec<v1::Device>>>,
}

impl Coordinator {
    /// What it is doing, over which workers; those are asked, at most twice a second.
    pub async fn status(&self) -> v1::StatusResponse {
        let mut snapshot = self.watch().borrow().clone();
        let mut reasons = std::mem::take(&mut snapshot.left_out);
        let drained = self.drained();
        reasons.extend(drained.clone());
        reasons.extend(self.members().away());
        let probed = self.probe(self.members().list()).await;
        let mut members: Vec<_> = probed
            .into_iter()
            .map(|(worker, devices)| {
                let reason = reasons.remove(&worker).unwrap_or_default();
                let live = devices.is_some();
                let drained = drained.contains_key(&worker);
                v1::Member { worker, live, devices: devices.unwrap_or_default(), reason, drained }
            })
            .collect();
        // Those that are not there at all.
        members.extend(reasons.into_iter().map(|(worker, reason)| v1::Member {
            drained: drained.contains_key(&worker),
            worker,
            reason,
            ..v1::Member::default()
        }));
        let deployed = self.deployed().clone();
        v1::StatusResponse {
            model: self.session().model(),
            names: self.session().names().to_vec(),
            ready: snapshot.ready(),
            reason: snapshot.reason(),
            state: state(snapshot.state) as i32,
            loading: snapshot.loading.into_iter().map(loading).collect(),
            plan: snapshot.plan.as_deref().map(Into::into),
            fence: Some(snapshot.fence),
            load: Some(snapshot.load),
            members,
            version: self.config().version.clone(),
            weights: snapshot.weights.map(|digest| digest.to_string()).unwrap_or_default(),
            requests: Some(self.session().requests()),
            deployment: Some(DeploymentRecord::from(&deployed.deployment).into()),
            deployment_version: deployed.version,
            commit: self.session().commit().unwrap_or_default(),
            sentences: self.session().sentences(),
            standbys: snapshot.standbys.into_iter().map(standby).collect(),
        }
    }

    /// The devices of each member, or none of one that does not answer; asked at most every [`PROBE_EVERY`], however
    /// many want to know.
    async fn probe(&self, members: Vec<Member>) -> Vec<(String, Option<Vec<v1::Device>>)> {
        let mut probed = self.shared.probed.lock().await;
        let is_known = |member: &Member| probed.devices.contains_key(&member.name);
        let is_fresh = probed.at.is_some_and(|at| at.elapsed() < PROBE_EVERY);
        if !(is_fresh && members.iter().all(is_known)) {
            let described = members.iter().map(|member| async {
                let answer = member.worker.describe(v1::DescribeRequest::default());
                let devices = match tokio::time::timeout(PROBE_TIMEOUT, answer).await {
                    Ok(Ok(described)) => Some(described.devices),
                    _ => None,
                };
                (member.name.clone(), devices)
            });
            let described: Vec<_> = described.collect();
            probed.devices = futures::future::join_all(described).await.into_iter().collect();
            probed.at = Some(Instant::now());
        }
        let devices = |name: &str| probed.devices.get(name).cloned().flatten();
        members.into_iter().map(|member| (member.name.clone(), devices(&member.name))).collect()
    }
}

fn state(state: State) -> v1::CoordinatorState {
    match state {
        State::Standby => v1::CoordinatorState::Standby,
        State::Starting => v1::CoordinatorState::Starting,
        State::Serving => v1::CoordinatorState::Serving,
        State::Draining => v1::CoordinatorState::Draining,
    }
}

fn standby((worker, device, layers): (String, String, LayerRange)) -> v1::Standby {
    v1::Standby { worker, device, layers: Some(layers.into()) }
}

fn loading(loading: Loading) -> v1::StageLoading {
    v1::StageLoading {
        pipeline: loading.pipeline,
        stage: loading.stage as u32,
        worker: loading.worker,
        device: loading.device,
        layers: Some(loading.layers.into()),
        bytes_read: loading.bytes_read,
        bytes_total: loading.bytes_total,
    }
}
