//! `strata.v1.Cluster`: status and plan previews.

use std::time::Duration;

use strata_proto::{
    DType, Device,
    error::{Classify, Kind, status},
    v1::{self, cluster_server::Cluster},
};
use tonic::{Request, Response, Status, async_trait};

use crate::{
    cluster::discovery::discover,
    config::Deployment,
    coordinator::Coordinator,
    engine::{Loading, State},
    planner::{IMAGINED, Offer, Split},
    request::bounds::MAX_IMAGINED_DEVICES,
};

pub(super) struct ClusterService {
    coordinator: Coordinator,
}

impl ClusterService {
    pub(super) fn new(coordinator: Coordinator) -> Self {
        ClusterService { coordinator }
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
        reasons.extend(self.coordinator.members().away());
        let described = self.coordinator.members().list().into_iter().map(|member| {
            let reason = reasons.remove(&member.name).unwrap_or_default();
            async move {
                let answer = member.worker.describe(v1::DescribeRequest::default());
                let devices = match tokio::time::timeout(Duration::from_secs(1), answer).await {
                    Ok(Ok(described)) => Some(described.devices),
                    _ => None,
                };
                let live = devices.is_some();
                v1::Member { worker: member.name, live, devices: devices.unwrap_or_default(), reason }
            }
        });
        let described: Vec<_> = described.collect();
        let mut members = futures::future::join_all(described).await;
        // Those that are not there at all.
        members.extend(reasons.into_iter().map(|(worker, reason)| v1::Member {
            worker,
            reason,
            ..v1::Member::default()
        }));
        Ok(Response::new(v1::StatusResponse {
            model: self.coordinator.session().model().to_owned(),
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
        }))
    }

    async fn preview_plan(
        &self,
        request: Request<v1::PreviewPlanRequest>,
    ) -> Result<Response<v1::PreviewPlanResponse>, Status> {
        let mut request = request.into_inner();
        let devices = std::mem::take(&mut request.devices);
        let deployment = changed(&self.coordinator.config().deployment, request).map_err(|e| status(&e))?;
        let found = discover(&self.coordinator.members().answering(), &deployment.model)
            .await
            .map_err(|e| status(&e))?;
        let plan = if devices.is_empty() {
            found.plan(&deployment).map_err(|e| status(&e))?
        } else {
            let offers = imagined(devices).map_err(|e| status(&e))?;
            found.plan_over(&offers, &deployment).map_err(|e| status(&e))?
        };
        Ok(Response::new(v1::PreviewPlanResponse { plan: Some((&plan).into()) }))
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
