//! `strata.v1.Cluster`: status and plan previews.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use strata_proto::{
    DType, Device, LayerRange,
    error::{Classify, Kind, status},
    v1::{self, cluster_server::Cluster},
};
use tokio::sync::{Mutex, Semaphore};
use tonic::{Request, Response, Status, async_trait};

use super::admin;
use crate::{
    cluster::{discovery::discover, membership::Member, records::DeploymentRecord},
    config::Deployment,
    coordinator::Coordinator,
    engine::{Loading, State},
    planner::{IMAGINED, Offer, Split},
    request::bounds::MAX_IMAGINED_DEVICES,
};

/// Most plans that are made at a time, each of which keeps a core busy.
const MAX_PREVIEWS: usize = 2;
/// How long workers may take to describe a model for a preview.
const PREVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// Shortest time from one question to the members, whoever wants to know, to the next.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// How long a member may take to say that it is there.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) struct ClusterService {
    coordinator: Coordinator,
    previews: Arc<Semaphore>,
    probed: Mutex<Probed>,
}

/// What members said when they were last asked.
#[derive(Default)]
struct Probed {
    at: Option<Instant>,
    /// By member; none of one that did not answer.
    devices: HashMap<String, Option<Vec<v1::Device>>>,
}

impl ClusterService {
    pub(super) fn new(coordinator: Coordinator) -> Self {
        let previews = Arc::new(Semaphore::new(MAX_PREVIEWS));
        ClusterService { coordinator, previews, probed: Mutex::default() }
    }
}

/// A field of a preview that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BadField(String);

impl Classify for BadField {
    fn kind(&self) -> Kind {
        Kind::BadInput
    }
}

#[async_trait]
impl Cluster for ClusterService {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let mut snapshot = self.coordinator.watch().borrow().clone();
        let mut reasons = std::mem::take(&mut snapshot.left_out);
        let drained = self.coordinator.drained();
        reasons.extend(drained.clone());
        reasons.extend(self.coordinator.members().away());
        let probed = self.probe(self.coordinator.members().list()).await;
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
        let deployed = self.coordinator.deployed().clone();
        Ok(Response::new(v1::StatusResponse {
            model: self.coordinator.session().model(),
            names: self.coordinator.session().names().to_vec(),
            ready: snapshot.ready(),
            reason: snapshot.reason(),
            state: state(snapshot.state) as i32,
            loading: snapshot.loading.into_iter().map(loading).collect(),
            plan: snapshot.plan.as_deref().map(Into::into),
            fence: Some(snapshot.fence),
            load: Some(snapshot.load),
            members,
            version: self.coordinator.config().version.clone(),
            weights: snapshot.weights.map(|digest| digest.to_string()).unwrap_or_default(),
            requests: Some(self.coordinator.session().requests()),
            deployment: Some(DeploymentRecord::from(&deployed.deployment).into()),
            deployment_version: deployed.version,
            commit: self.coordinator.session().commit().unwrap_or_default(),
            sentences: self.coordinator.session().sentences(),
            standbys: snapshot.standbys.into_iter().map(standby).collect(),
        }))
    }

    async fn preview_plan(
        &self,
        request: Request<v1::PreviewPlanRequest>,
    ) -> Result<Response<v1::PreviewPlanResponse>, Status> {
        let mut request = request.into_inner();
        let devices = std::mem::take(&mut request.devices);
        let deployment = changed(&self.coordinator.deployed().deployment, request).map_err(|e| status(&e))?;
        let offers = imagined(devices).map_err(|e| status(&e))?;
        let place = self.previews.clone().try_acquire_owned().map_err(|_| status(&Unpreviewed::Busy))?;
        let members = self.coordinator.members().answering();
        let found = tokio::time::timeout(PREVIEW_TIMEOUT, discover(&members, &deployment)).await;
        let found = found.map_err(|_| status(&Unpreviewed::Silent))?.map_err(|e| status(&e))?;
        let planned = tokio::task::spawn_blocking(move || {
            let _until_done = place;
            match offers.is_empty() {
                true => found.plan(&deployment).map_err(|e| status(&e)),
                false => found.plan_over(&offers, &deployment).map_err(|e| status(&e)),
            }
        });
        let plan = planned.await.map_err(|_| status(&Unpreviewed::Failed))??;
        Ok(Response::new(v1::PreviewPlanResponse { plan: Some((&plan).into()) }))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let v1::DrainRequest { worker, reason } = self.admit(request, "Drain")?;
        self.coordinator.vacate(&worker, &reason).await.map_err(|e| status(&e))?;
        Ok(Response::new(v1::DrainResponse {}))
    }

    async fn undrain(
        &self,
        request: Request<v1::UndrainRequest>,
    ) -> Result<Response<v1::UndrainResponse>, Status> {
        let v1::UndrainRequest { worker } = self.admit(request, "Undrain")?;
        self.coordinator.take_back(&worker).await.map_err(|e| status(&e))?;
        Ok(Response::new(v1::UndrainResponse {}))
    }

    async fn rebalance(
        &self,
        request: Request<v1::RebalanceRequest>,
    ) -> Result<Response<v1::RebalanceResponse>, Status> {
        let v1::RebalanceRequest { dry_run } = self.admit(request, "Rebalance")?;
        let compared = self.coordinator.rebalance(dry_run).await.map_err(|e| status(&e))?;
        Ok(Response::new(v1::RebalanceResponse {
            now: Some((&*compared.now).into()),
            then: Some((&compared.then).into()),
            differs: compared.differs,
        }))
    }

    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        let v1::ApplyRequest { deployment, over, dry_run } = self.admit(request, "Apply")?;
        let record = deployment.unwrap_or_default().into();
        let applied = self.coordinator.apply(record, over, dry_run).await.map_err(|e| status(&e))?;
        Ok(Response::new(v1::ApplyResponse {
            version: applied.version,
            now: Some((&*applied.compared.now).into()),
            then: Some((&applied.compared.then).into()),
            differs: applied.compared.differs,
        }))
    }
}

impl ClusterService {
    /// The message of an operator's call.
    fn admit<T: strata_proto::Message>(
        &self,
        request: Request<T>,
        method: &'static str,
    ) -> Result<T, Status> {
        admin::admit(request, self.coordinator.config().secret.as_ref(), method)
    }

    /// The devices of each member, or none of one that does not answer; asked at most every [`PROBE_EVERY`], however
    /// many want to know.
    async fn probe(&self, members: Vec<Member>) -> Vec<(String, Option<Vec<v1::Device>>)> {
        let mut probed = self.probed.lock().await;
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

/// Why there is no preview.
#[derive(Debug, thiserror::Error)]
enum Unpreviewed {
    #[error("{MAX_PREVIEWS} plans are made for others, the most at a time; try again later")]
    Busy,
    #[error("the workers did not answer within {PREVIEW_TIMEOUT:?}; try again later")]
    Silent,
    #[error("the planner failed; the server's log has the reason")]
    Failed,
}

impl Classify for Unpreviewed {
    fn kind(&self) -> Kind {
        match self {
            Unpreviewed::Busy => Kind::Overload { retry_after: PROBE_EVERY },
            Unpreviewed::Silent => Kind::NoCapacity,
            Unpreviewed::Failed => Kind::Internal,
        }
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

/// Devices that a preview is to plan over.
fn imagined(devices: Vec<v1::Device>) -> Result<Vec<Offer>, BadField> {
    if devices.len() > MAX_IMAGINED_DEVICES {
        return Err(BadField(format!(
            "devices: {} are too many: at most {MAX_IMAGINED_DEVICES}",
            devices.len()
        )));
    }
    let offer = |device: v1::Device| {
        let device = Device::try_from(device).map_err(|e| BadField(format!("devices: {e}")))?;
        Ok(Offer { worker: IMAGINED.into(), host: IMAGINED.into(), device })
    };
    devices.into_iter().map(offer).collect()
}

/// The deployment with what the request sets.
fn changed(deployment: &Deployment, request: v1::PreviewPlanRequest) -> Result<Deployment, BadField> {
    let mut deployment = deployment.clone();
    if !request.split.is_empty() {
        deployment.split = request.split.parse::<Split>().map_err(|e| BadField(format!("split: {e}")))?;
    }
    match request.dtype.as_str() {
        "" => {}
        "auto" => deployment.dtype = None,
        name => {
            deployment.dtype = Some(name.parse::<DType>().map_err(|e| BadField(format!("dtype: {e}")))?);
        }
    }
    match request.quantization.as_str() {
        "" => {}
        "none" => deployment.quantization = None,
        name => {
            let quantization = name.parse().map_err(|e| BadField(format!("quantization: {e}, or none")))?;
            deployment.quantization = Some(quantization);
        }
    }
    if request.kv_tokens > 0 {
        deployment.kv_tokens = Some(request.kv_tokens);
    }
    Ok(deployment)
}
