//! `strata.v1.Cluster`: status and plan previews.

use std::{sync::Arc, time::Duration};

use strata_proto::{
    DType, Device,
    error::{Classify, Kind, status},
    v1::{self, cluster_server::Cluster},
};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, async_trait};

use super::admin;
use crate::{
    cluster::discovery::discover,
    config::Deployment,
    coordinator::Coordinator,
    planner::{IMAGINED, Offer, Split},
    request::bounds::MAX_IMAGINED_DEVICES,
};

/// Most plans that are made at a time, each of which keeps a core busy.
const MAX_PREVIEWS: usize = 2;
/// How long workers may take to describe a model for a preview.
const PREVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// When somebody may try again who was one too many.
const PREVIEW_AGAIN: Duration = Duration::from_millis(500);
pub(super) struct ClusterService {
    coordinator: Coordinator,
    previews: Arc<Semaphore>,
}

impl ClusterService {
    pub(super) fn new(coordinator: Coordinator) -> Self {
        let previews = Arc::new(Semaphore::new(MAX_PREVIEWS));
        ClusterService { coordinator, previews }
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
        Ok(Response::new(self.coordinator.status().await))
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
            Unpreviewed::Busy => Kind::Overload { retry_after: PREVIEW_AGAIN },
            Unpreviewed::Silent => Kind::NoCapacity,
            Unpreviewed::Failed => Kind::Internal,
        }
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
