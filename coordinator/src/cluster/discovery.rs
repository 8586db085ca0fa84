//! What the members said of themselves and of the model, and what can be planned over them.

use std::{collections::HashMap, sync::Arc};

use futures::future::join_all;
use strata_proto::{Device, Files, LinkChoice, LinkKind, ModelProfile, Plan, StagePlan, error::words, v1};
use tonic::{Code, Status};

use super::{
    call::{CALL_TIMEOUT, call},
    error::PipelineError,
    links::{self, End},
    membership::Member,
};
use crate::{
    config::Deployment,
    planner::{self, Offer, PlanError, Problem},
};

/// What the members said of themselves and of the model.
#[derive(Debug, Clone)]
pub struct Discovery {
    /// The model.
    pub profile: ModelProfile,
    /// Every device, in order of members.
    pub offers: Vec<Offer>,
    /// Members by name, with their hub.
    pub(crate) members: HashMap<String, (Member, String)>,
}

/// A plan, and what it was made over.
#[derive(Debug, Clone)]
pub struct Planned {
    /// What was found.
    pub found: Arc<Discovery>,
    /// The plan over it.
    pub plan: Arc<Plan>,
}

impl Planned {
    /// Each replica of the plan by itself.
    pub fn replicas(&self) -> impl Iterator<Item = Planned> {
        self.plan.replicas.iter().map(|replica| {
            let plan = Plan { replicas: vec![replica.clone()], ..Plan::clone(&self.plan) };
            Planned { found: self.found.clone(), plan: plan.into() }
        })
    }
}

/// Asks every member for its devices and for the model.
///
/// # Errors
/// If no member answers, one has no such model, or two disagree about it.
pub async fn discover(members: &[Member], model: &str) -> Result<Discovery, PipelineError> {
    let described = members.iter().map(|member| async move {
        let request = v1::DescribeRequest { model: model.to_owned() };
        // Reading headers and sampling bytes of a large checkpoint takes its time.
        match call(&member.name, "Describe", CALL_TIMEOUT, member.worker.describe(request)).await {
            Ok(described) => Ok(Some((member, described))),
            // Membership may not have noticed yet that it is gone.
            Err(PipelineError::Call { status, .. }) if absent(&status) => {
                let why = words(&status);
                tracing::warn!(worker = member.name, why, "does not answer; planning without it");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    });
    let mut profile: Option<(String, ModelProfile)> = None;
    let mut offers = Vec::new();
    let mut found = HashMap::new();
    let described = models(join_all(described).await)?;
    for (member, described) in described.into_iter().flatten() {
        let nonsense = |why| PipelineError::Nonsense { worker: member.name.clone(), why };
        if described.draining {
            continue;
        }
        let theirs = described.profile.ok_or_else(|| nonsense("it described no model".into()))?;
        let theirs = ModelProfile::try_from(theirs).map_err(nonsense)?;
        match &profile {
            Some((a, ours)) if ours.fingerprint != theirs.fingerprint => {
                let (a, b) = (a.clone(), member.name.clone());
                return Err(PipelineError::Fingerprints { a, b, model: model.to_owned() });
            }
            Some(_) => {}
            None => profile = Some((member.name.clone(), theirs)),
        }
        for device in described.devices {
            let device = Device::try_from(device).map_err(nonsense)?;
            let (worker, host) = (member.name.clone(), member.host.clone());
            offers.push(Offer { worker, host, device });
        }
        found.insert(member.name.clone(), (member.clone(), described.hub_id));
    }
    let (_, profile) = profile.ok_or(PipelineError::NoWorkers)?;
    Ok(Discovery { profile, offers, members: found })
}

/// The answers, or what is wrong with the model: said without a worker's name if all say the same, as it is then no worker's
/// fault.
fn models<T>(answers: Vec<Result<Option<T>, PipelineError>>) -> Result<Vec<Option<T>>, PipelineError> {
    let refusal = |answer: &Result<Option<T>, PipelineError>| match answer {
        Err(PipelineError::Call { status, .. }) if is_of_model(status) => Some(status.message().to_owned()),
        _ => None,
    };
    let mut said = answers.iter().filter(|answer| !matches!(answer, Ok(None))).map(refusal);
    if let Some(Some(why)) = said.next()
        && said.all(|other| other.as_ref() == Some(&why))
    {
        return Err(PipelineError::Model(why));
    }
    let one = |error| match error {
        PipelineError::Call { worker, status, .. } if is_of_model(&status) => {
            PipelineError::ModelOf { worker, why: status.message().to_owned() }
        }
        error => error,
    };
    answers.into_iter().map(|answer| answer.map_err(one)).collect()
}

/// Whether a worker refused to describe a model because of the model.
fn is_of_model(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::FailedPrecondition)
}

/// Whether a call failed because there was nobody to take it.
fn absent(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled)
}

impl Discovery {
    /// Leaves out the devices that `plans` have.
    pub(crate) fn leave_out(&mut self, plans: &[Arc<Plan>]) {
        let taken = |offer: &Offer| {
            let stages = plans.iter().flat_map(|plan| &plan.replicas).flat_map(|r| &r.stages);
            stages.clone().any(|s| s.worker == offer.worker && s.device == offer.device.id)
        };
        self.offers.retain(|offer| !taken(offer));
    }

    /// Plans a deployment over devices that nobody needs to have; no links are chosen.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn plan_over(&self, offers: &[Offer], deployment: &Deployment) -> Result<Plan, PlanError> {
        let mut profile = self.profile.clone();
        profile.context_length = deployment.context_of(&profile);
        let contexts = deployment.max_sequences.map(|n| u64::from(n) * u64::from(profile.context_length));
        let mut plan = planner::solve(&Problem {
            profile: &profile,
            offers,
            split: &deployment.split,
            dtype: deployment.dtype.unwrap_or(self.profile.dtype),
            quantization: deployment.quantization,
            kv_tokens: deployment.kv_tokens.or(contexts),
            state_slots: deployment.max_sequences.unwrap_or(deployment.max_step_rows),
            max_step_tokens: deployment.max_step_tokens,
            max_step_rows: deployment.max_step_rows,
        })?;
        let models = self.profile.context_length;
        if let Some(asked) = deployment.context.filter(|asked| *asked > models) {
            plan.warnings.push(format!(
                "a context of {asked} is more than the model's, so {models} tokens are served"
            ));
        }
        let generates = matches!(self.profile.task, v1::Task::Generate | v1::Task::Unspecified);
        if !generates && (deployment.kv_tokens.is_some() || deployment.max_sequences.is_some()) {
            plan.warnings.push("the size of a cache was given, but this model needs none".to_owned());
        }
        Ok(plan)
    }

    /// Plans a deployment over what was found, links included.
    ///
    /// # Errors
    /// If it does not fit, or a forced link is impossible.
    pub fn plan(&self, deployment: &Deployment) -> Result<Plan, PipelineError> {
        let mut plan = self.plan_over(&self.offers, deployment)?;
        for replica in &mut plan.replicas {
            for at in 1..replica.stages.len() {
                let link = self.link(&replica.stages[at - 1], &replica.stages[at], deployment.links)?;
                replica.stages[at - 1].link = Some(link);
            }
        }
        if let Some(forced) = deployment.links.filter(|_| plan.replicas.iter().all(|r| r.stages.len() < 2)) {
            plan.warnings.push(format!("nothing is linked by {forced}: there is one stage"));
        }
        Ok(plan)
    }

    /// The best link that both ends support, or the forced one.
    fn link(
        &self,
        a: &StagePlan,
        b: &StagePlan,
        forced: Option<LinkKind>,
    ) -> Result<LinkChoice, PipelineError> {
        let (from, to) = (self.end(a)?, self.end(b)?);
        let refused = |why| {
            let asked = forced.unwrap_or(LinkKind::Tcp);
            let best = links::choose(from, to, None).map_or(LinkKind::Tcp, |choice| choice.kind);
            let [from, to] = [from, to].map(|end| format!("{}/{}", end.worker, end.device.id));
            PipelineError::NoLink { from, to, asked, why, best }
        };
        links::choose(from, to, forced).map_err(refused)
    }

    /// A stage as an end of a link.
    fn end(&self, stage: &StagePlan) -> Result<End<'_>, PipelineError> {
        let is_there = |o: &&Offer| o.worker == stage.worker && o.device.id == stage.device;
        let offer = self.offers.iter().find(is_there).ok_or(PipelineError::NoWorkers)?;
        let (_, hub) = self.members.get(&offer.worker).ok_or(PipelineError::NoWorkers)?;
        Ok(End { worker: &offer.worker, host: &offer.host, hub, device: &offer.device })
    }

    /// The tokenizer's files, from the worker of the first stage.
    ///
    /// # Errors
    /// If the worker does not answer.
    pub(crate) async fn tokenizer_files(&self, plan: &Plan) -> Result<Files, PipelineError> {
        let name = plan.replicas.first().and_then(|r| r.stages.first()).map(|s| &s.worker);
        let Some((member, _)) = name.and_then(|n| self.members.get(n)) else {
            return Err(PipelineError::NoWorkers);
        };
        let request = v1::ReadTokenizerRequest { model: self.profile.model.clone() };
        call(&member.name, "ReadTokenizer", CALL_TIMEOUT, member.worker.read_tokenizer(request)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_workers_say_of_a_model_needs_no_name() {
        let call =
            |worker: &str, status| PipelineError::Call { worker: worker.into(), doing: "Describe", status };
        let refused = |worker: &str, why: &str| Err(call(worker, Status::failed_precondition(why)));
        let said = |answers: Vec<Result<Option<()>, _>>| models(answers).unwrap_err().to_string();
        assert_eq!(said(vec![refused("a", "no model")]), "no model");
        assert_eq!(said(vec![refused("a", "no model"), Ok(None), refused("b", "no model")]), "no model");
        assert_eq!(said(vec![Ok(Some(())), refused("b", "no model")]), "worker b: no model");
        assert_eq!(said(vec![refused("a", "cut off"), refused("b", "no model")]), "worker a: cut off");
        // What is no model's fault says what was done.
        let internal = said(vec![Err(call("a", Status::internal("defect"))), refused("b", "no model")]);
        assert_eq!(internal, "worker a: Describe failed: defect");
        assert_eq!(models(vec![Ok(Some(1)), Ok(None)]).unwrap(), [Some(1), None]);
    }
}
