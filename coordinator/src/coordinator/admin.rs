//! What operators change while a coordinator serves.

use std::{collections::BTreeMap, sync::Arc};

use strata_proto::{
    Plan,
    error::{Classify, Kind, quoted},
};
use tokio::sync::oneshot;

use super::{Coordinator, Deployed, Replacement, StartError};
use crate::{
    cluster::{
        PipelineError,
        discovery::discover,
        records::{DeploymentRecord, RecordError},
        relocation,
    },
    config::Deployment,
    engine::{Change, ChangeError, Event, State},
    request::blocking,
};

/// Longest reason that is kept of why a worker is drained, in bytes.
const MAX_REASON: usize = 200;

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Only who leads and serves changes anything.
    #[error("this coordinator does not serve: {0}")]
    NotServing(String),
    /// No such member.
    #[error("there is no worker {}: expected one of {have}", quoted(.asked))]
    NoWorker {
        /// Whom the caller named.
        asked: String,
        /// Whom there is.
        have: String,
    },
    /// It is not drained.
    #[error("worker {} is not drained; {have}", quoted(.asked))]
    NotDrained {
        /// Whom the caller named.
        asked: String,
        /// Who is, in words.
        have: String,
    },
    /// A field that cannot be.
    #[error("{0}")]
    Field(String),
    /// It was not kept.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It cannot be planned.
    #[error("nothing was changed: {0}")]
    Plan(#[from] PipelineError),
    /// It did not come up.
    #[error("nothing was changed: {0}")]
    Start(Box<StartError>),
    /// Somebody else has deployed something.
    #[error(
        "nothing was changed: version {version} is deployed, not {over}; look at it in `strata status`, and apply again"
    )]
    Outdated {
        /// What the caller knows of.
        over: u64,
        /// What there is.
        version: u64,
    },
    /// The engine has not changed.
    #[error(transparent)]
    Change(#[from] ChangeError),
}

impl From<StartError> for AdminError {
    fn from(error: StartError) -> Self {
        AdminError::Start(Box::new(error))
    }
}

impl Classify for AdminError {
    fn kind(&self) -> Kind {
        match self {
            AdminError::Record(RecordError::Outrun) => Kind::WrongState,
            AdminError::NotServing(_) | AdminError::Record(_) => Kind::NoCapacity,
            AdminError::NoWorker { .. } | AdminError::NotDrained { .. } | AdminError::Field(_) => {
                Kind::BadInput
            }
            AdminError::Plan(_) | AdminError::Start(_) | AdminError::Outdated { .. } => Kind::WrongState,
            AdminError::Change(error) => error.kind(),
        }
    }
}

/// What is, or was, live, and what takes its place.
#[derive(Debug)]
pub struct Comparison {
    /// The live plan.
    pub now: Arc<Plan>,
    /// The one that today's members would have.
    pub then: Plan,
    /// Whether they differ.
    pub differs: bool,
}

/// What was deployed.
#[derive(Debug)]
pub struct Applied {
    /// Its version; of a dry run, the one that there is.
    pub version: u64,
    /// The plans before and after.
    pub compared: Comparison,
}

/// Whoever asks may go; what was begun is done and recorded all the same.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, AdminError>> + Send + 'static,
) -> Result<T, AdminError> {
    tokio::spawn(work).await.unwrap_or(Err(AdminError::Change(ChangeError::Gone)))
}

impl Coordinator {
    /// Plans without a worker from now on, and returns once nothing is left on it. It stays so, also when it is restarted,
    /// until it is [taken back](Self::take_back).
    ///
    /// # Errors
    /// If it cannot be spared, and then it is not drained; or if this coordinator does not serve.
    pub async fn vacate(&self, worker: &str, reason: &str) -> Result<(), AdminError> {
        let (own, worker, reason) = (self.clone(), worker.to_owned(), reason.to_owned());
        to_its_end(async move { own.vacate_now(&worker, &reason).await }).await
    }

    async fn vacate_now(&self, worker: &str, reason: &str) -> Result<(), AdminError> {
        let _one_at_a_time = self.shared.admin.lock().await;
        self.check_serving().map_err(AdminError::NotServing)?;
        let members = self.members();
        if !members.has(worker) {
            let have: Vec<_> = members.list().into_iter().map(|member| member.name).collect();
            return Err(AdminError::NoWorker { asked: worker.to_owned(), have: have.join(", ") });
        }
        if reason.len() > MAX_REASON || reason.chars().any(char::is_control) {
            return Err(AdminError::Field(format!("reason: expected a line of at most {MAX_REASON} bytes")));
        }
        let before = members.drained();
        let mut drained = before.clone();
        drained.insert(worker.to_owned(), reason.to_owned());
        members.set_drained(drained);
        let outcome = async {
            self.change(Change::Leave(worker.to_owned())).await?;
            self.keeper().mark(worker, Some(reason)).await?;
            Ok(())
        };
        let outcome: Result<(), AdminError> = outcome.await;
        if outcome.is_err() {
            members.set_drained(before);
        }
        outcome
    }

    /// Plans over a worker again that was drained.
    ///
    /// # Errors
    /// If it is not drained, or that cannot be kept.
    pub async fn take_back(&self, worker: &str) -> Result<(), AdminError> {
        let (own, worker) = (self.clone(), worker.to_owned());
        to_its_end(async move { own.take_back_now(&worker).await }).await
    }

    async fn take_back_now(&self, worker: &str) -> Result<(), AdminError> {
        let _one_at_a_time = self.shared.admin.lock().await;
        self.check_serving().map_err(AdminError::NotServing)?;
        let mut drained = self.members().drained();
        if drained.remove(worker).is_none() {
            let have = match drained.is_empty() {
                true => "none is".to_owned(),
                false => format!("those are: {}", drained.into_keys().collect::<Vec<_>>().join(", ")),
            };
            return Err(AdminError::NotDrained { asked: worker.to_owned(), have });
        }
        self.keeper().mark(worker, None).await?;
        self.members().set_drained(drained);
        Ok(())
    }

    /// Compares the live plan with the one that today's members would have, and changes to that if it gains by it, unless
    /// it is a `dry_run`.
    ///
    /// # Errors
    /// If nothing is live, or the other plan cannot be made or did not come up.
    pub async fn rebalance(&self, dry_run: bool) -> Result<Comparison, AdminError> {
        let own = self.clone();
        to_its_end(async move { own.rebalance_now(dry_run).await }).await
    }

    async fn rebalance_now(&self, dry_run: bool) -> Result<Comparison, AdminError> {
        let _one_at_a_time = self.shared.admin.lock().await;
        self.check_serving().map_err(AdminError::NotServing)?;
        let deployment = self.deployed().deployment.clone();
        let mut compared = self.compare(&deployment).await?;
        // Streams are not moved for nothing.
        compared.differs &= relocation::gains(&compared.now, &compared.then);
        if compared.differs && !dry_run {
            self.change(Change::Deploy(Box::new(deployment))).await?;
        }
        Ok(compared)
    }

    /// Deploys what a record says, over the version `over`, if one is given, and returns once that is served. Unless it is
    /// a `dry_run`: then it is planned.
    ///
    /// # Errors
    /// If there is another version, a field makes no sense, or it does not fit or come up; then what was served is served.
    pub async fn apply(
        &self,
        record: DeploymentRecord,
        over: Option<u64>,
        dry_run: bool,
    ) -> Result<Applied, AdminError> {
        let own = self.clone();
        to_its_end(async move { own.apply_now(record, over, dry_run).await }).await
    }

    async fn apply_now(
        &self,
        record: DeploymentRecord,
        over: Option<u64>,
        dry_run: bool,
    ) -> Result<Applied, AdminError> {
        let _one_at_a_time = self.shared.admin.lock().await;
        self.check_serving().map_err(AdminError::NotServing)?;
        let before = self.deployed().clone();
        if let Some(over) = over.filter(|over| *over != before.version) {
            return Err(AdminError::Outdated { over, version: before.version });
        }
        let deployment = record.onto(&self.shared.config.deployment).map_err(AdminError::Field)?;
        let loaded = self.watch().borrow().weights;
        if let (Some(expected), Some(loaded)) = (&deployment.weights, loaded)
            && deployment.model == before.deployment.model
            && *expected != loaded.to_string()
        {
            return Err(AdminError::Field(format!(
                "weights: those of {:?} that are loaded have the digest {loaded}, not {expected}",
                deployment.model
            )));
        }
        let compared = self.compare(&deployment).await?;
        if dry_run {
            return Ok(Applied { version: before.version, compared });
        }
        self.deploy(deployment.clone()).await?;
        self.deployed().deployment = deployment.clone();
        let written = self.keeper().deploy(&record, before.version).await;
        match written {
            Ok(version) => {
                tracing::info!(version, model = deployment.model, "deployed");
                *self.deployed() = Deployed { version, deployment };
                Ok(Applied { version, compared })
            }
            Err(error) => {
                self.deploy(before.deployment.clone()).await?;
                *self.deployed() = before;
                Err(error.into())
            }
        }
    }

    /// Serves something else: by the engine that there is, or, if it is another model, format or context, by another one.
    async fn deploy(&self, deployment: Deployment) -> Result<(), AdminError> {
        let is = self.deployed().deployment.clone();
        let kept = (&is.model, is.dtype, is.quantization, is.context);
        if kept == (&deployment.model, deployment.dtype, deployment.quantization, deployment.context) {
            return Ok(self.change(Change::Deploy(Box::new(deployment))).await?);
        }
        let gone = || AdminError::Change(ChangeError::Gone);
        let (reply, replaced) = oneshot::channel();
        let asks = self.shared.replacements.get().ok_or_else(gone)?;
        asks.send(Replacement { deployment, reply }).map_err(|_| gone())?;
        replaced.await.map_err(|_| gone())?
    }

    /// Compares the live plan with that of another deployment over today's members.
    async fn compare(&self, deployment: &Deployment) -> Result<Comparison, AdminError> {
        let snapshot = self.watch().borrow().clone();
        let now = snapshot.plan.filter(|_| snapshot.up).ok_or(AdminError::NotServing(snapshot.down))?;
        let found = discover(&self.members().answering(), deployment).await?;
        let (deployment, left_out) = (deployment.clone(), found.left_out.clone());
        let planned = blocking(move || found.plan(&deployment)).await.map_err(|_| ChangeError::Gone)?;
        let then = planned.map_err(|error| error.without(left_out))?;
        let differs = !relocation::is_alike(&now, &then);
        Ok(Comparison { now, then, differs })
    }

    /// Has the engine change something, and waits for what comes of it.
    async fn change(&self, change: Change) -> Result<(), ChangeError> {
        let engine = self.shared.session.engine().ok_or(ChangeError::Gone)?;
        let (reply, changed) = oneshot::channel();
        engine.send(Event::Change(change, Some(reply))).map_err(|_| ChangeError::Gone)?;
        changed.await.map_err(|_| ChangeError::Gone)?
    }

    /// Why it does not serve, unless it does.
    fn check_serving(&self) -> Result<(), String> {
        let snapshot = self.watch().borrow().clone();
        match snapshot.state {
            State::Serving => Ok(()),
            _ => Err(snapshot.reason()),
        }
    }

    /// Whom operators have drained, and why, as Status says it.
    pub(crate) fn drained(&self) -> BTreeMap<String, String> {
        let said = |why: String| match why.is_empty() {
            true => "drained".to_owned(),
            false => format!("drained: {why}"),
        };
        self.members().drained().into_iter().map(|(worker, why)| (worker, said(why))).collect()
    }
}
