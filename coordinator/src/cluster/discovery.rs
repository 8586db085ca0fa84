//! What the members said of themselves and of the model, and what can be planned over them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use strata_proto::{
    Device, Files, LayerRange, LinkChoice, LinkKind, ModelProfile, Plan, Quantization, Replica, StagePlan,
    error::words, v1,
};
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
    /// Patterns of names of tensors that it was described, and is loaded, without.
    pub(crate) ignore_tensors: Vec<String>,
    /// Every device, in order of members.
    pub offers: Vec<Offer>,
    /// Members by name, with their hub.
    pub(crate) members: HashMap<String, (Member, String)>,
    /// The weights that members hold, by name.
    pub(crate) resident: HashMap<String, Vec<v1::StageSpec>>,
    /// Members that nothing can be planned over, and why.
    pub left_out: BTreeMap<String, String>,
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
        self.plan.apart().map(|plan| Planned { found: self.found.clone(), plan: plan.into() })
    }
}

/// Asks members for their devices and for the model. Whoever cannot describe it, or has another version of it than most, is
/// left out.
///
/// # Errors
/// If nobody is left, or as many have one version as have another.
pub async fn discover(members: &[Member], deployment: &Deployment) -> Result<Discovery, PipelineError> {
    discover_enough(members, deployment, None, Duration::MAX, |_| false).await
}

/// The same, but who has another version than the one that is `served` is left out, and who has not answered after
/// `patience` if what the others said is `enough`.
///
/// # Errors
/// As above.
pub(crate) async fn discover_enough(
    members: &[Member],
    deployment: &Deployment,
    served: Option<&ModelProfile>,
    patience: Duration,
    enough: impl Fn(Discovery) -> bool,
) -> Result<Discovery, PipelineError> {
    let ask = |(index, member): (usize, &Member)| {
        let (member, request) = (
            member.clone(),
            v1::DescribeRequest {
                model: deployment.model.clone(),
                claim: None,
                ignore_tensors: deployment.ignore_tensors.clone(),
            },
        );
        async move {
            // Reading headers and sampling bytes of a large checkpoint takes its time.
            let described = member.worker.describe(request);
            (index, call(&member.name, "Describe", CALL_TIMEOUT, described).await)
        }
    };
    let mut asked: FuturesUnordered<_> = members.iter().enumerate().map(ask).collect();
    let mut answers: Vec<Option<Answer>> = members.iter().map(|_| None).collect();
    let hurry = tokio::time::sleep(patience);
    tokio::pin!(hurry);
    let mut hurried = false;
    loop {
        tokio::select! {
            biased;
            answer = asked.next() => match answer {
                Some((index, answer)) => answers[index] = Some(answer),
                None => break,
            },
            () = &mut hurry, if !hurried => hurried = true,
        }
        if hurried && discovery(members, answers.clone(), deployment, served).is_ok_and(&enough) {
            break;
        }
    }
    discovery(members, answers, deployment, served)
}

type Answer = Result<v1::Described, PipelineError>;

/// What the answers say together; `None` has not come yet.
fn discovery(
    members: &[Member],
    answers: Vec<Option<Answer>>,
    Deployment { model, ignore_tensors, .. }: &Deployment,
    served: Option<&ModelProfile>,
) -> Result<Discovery, PipelineError> {
    let mut left_out = BTreeMap::new();
    let mut good: Vec<(&Member, v1::Described, ModelProfile)> = Vec::new();
    let mut bad = Vec::new();
    for (member, answer) in members.iter().zip(answers) {
        let nonsense = |why| PipelineError::Nonsense { worker: member.name.clone(), why };
        let described = match answer {
            None => {
                left_out.insert(member.name.clone(), "it has not described the model in time".to_owned());
                continue;
            }
            // It ends by itself.
            Some(Ok(described)) if described.draining => continue,
            Some(Ok(described)) => match described.profile.clone() {
                Some(profile) => ModelProfile::try_from(profile).map_err(nonsense).map(|p| (described, p)),
                None => Err(nonsense("it described no model".into())),
            },
            Some(Err(error)) => Err(error),
        };
        match described {
            Ok((described, profile)) => good.push((member, described, profile)),
            // Membership may not have noticed yet that it is gone.
            Err(PipelineError::Call { status, .. }) if absent(&status) => {
                left_out.insert(member.name.clone(), format!("it does not answer: {}", words(&status)));
            }
            Err(error) => bad.push((member, error)),
        }
    }
    if good.is_empty() {
        return Err(common(bad.into_iter().map(|(_, error)| error).collect()));
    }
    for (member, error) in bad {
        left_out.insert(member.name.clone(), error.reason());
    }
    let version = match served {
        Some(served) => served.fingerprint.clone(),
        None => version(&good).ok_or_else(|| {
            let (a, b) = (good[0].0.name.clone(), other(&good).to_owned());
            PipelineError::Fingerprints { a, b, model: model.to_owned() }
        })?,
    };
    let mut found: Option<Discovery> = None;
    for (member, described, profile) in good {
        if profile.fingerprint != version {
            let why = format!(
                "it holds another version of model {model:?}; make the directories equal (`strata verify` says in what \
                 two differ)"
            );
            left_out.insert(member.name.clone(), why);
            continue;
        }
        let devices: Result<Vec<_>, _> = described.devices.into_iter().map(Device::try_from).collect();
        let devices = match devices {
            Ok(devices) => devices,
            Err(why) => {
                left_out.insert(member.name.clone(), why);
                continue;
            }
        };
        let found = found.get_or_insert_with(|| Discovery {
            profile,
            ignore_tensors: ignore_tensors.clone(),
            offers: Vec::new(),
            members: HashMap::new(),
            resident: HashMap::new(),
            left_out: BTreeMap::new(),
        });
        found.offers.extend(devices.into_iter().map(|device| {
            let (worker, host) = (member.name.clone(), member.host.clone());
            Offer { worker, host, device }
        }));
        found.members.insert(member.name.clone(), (member.clone(), described.hub_id));
        found.resident.insert(member.name.clone(), described.resident);
    }
    let mut found = found.ok_or(PipelineError::NoWorkers)?;
    found.left_out = left_out;
    Ok(found)
}

/// The version of the model that most of the members have; none if two versions have as many.
fn version(good: &[(&Member, v1::Described, ModelProfile)]) -> Option<String> {
    let mut votes: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, _, profile) in good {
        *votes.entry(&profile.fingerprint).or_default() += 1;
    }
    let most = votes.values().copied().max()?;
    let mut winners = votes.iter().filter(|(_, count)| **count == most);
    let (winner, _) = winners.next()?;
    winners.next().is_none().then(|| (*winner).to_owned())
}

/// A member that has another version than the first one.
fn other<'a>(good: &[(&'a Member, v1::Described, ModelProfile)]) -> &'a str {
    let differs = |(_, _, profile): &&(&Member, v1::Described, ModelProfile)| {
        good.first().is_none_or(|(_, _, first)| first.fingerprint != profile.fingerprint)
    };
    good.iter().find(differs).map_or("", |(member, _, _)| &member.name)
}

/// What is wrong where no member described the model: said without a worker's name if all say the same, as it is then no
/// worker's fault. Of those that are merely not there nothing is said.
fn common(errors: Vec<PipelineError>) -> PipelineError {
    let refusal = |error: &PipelineError| match error {
        PipelineError::Call { status, .. } if is_of_model(status) => Some(status.message().to_owned()),
        _ => None,
    };
    let mut said = errors.iter().map(refusal);
    if let Some(Some(why)) = said.next()
        && said.all(|other| other.as_ref() == Some(&why))
    {
        return PipelineError::Model(why);
    }
    match errors.into_iter().next() {
        Some(PipelineError::Call { worker, status, .. }) if is_of_model(&status) => {
            PipelineError::ModelOf { worker, why: status.message().to_owned() }
        }
        Some(error) => error,
        None => PipelineError::NoWorkers,
    }
}

/// Whether a worker refused to describe a model because of the model.
fn is_of_model(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::FailedPrecondition)
}

/// Whether a call failed because there was nobody to take it, or nobody any more who answers it.
fn absent(status: &Status) -> bool {
    // What has a source was said by the transport here, not by a worker.
    std::error::Error::source(status).is_some()
        || matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled)
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

    /// Leaves out the last devices on which there may be standbys, so that these stay free.
    pub(crate) fn hold_back(&mut self, standbys: u32) {
        for _ in 0..standbys {
            let Some(last) = self.offers.iter().rposition(Offer::may_hold_further) else { return };
            self.offers.remove(last);
        }
    }

    /// Plans a deployment over devices that nobody needs to have; no links are chosen.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn plan_over(&self, offers: &[Offer], deployment: &Deployment) -> Result<Plan, PlanError> {
        let profile = self.profile_for(deployment);
        let mut plan = planner::solve(&problem(&profile, offers, deployment))?;
        plan.replicas.truncate(deployment.replicas.map_or(usize::MAX, |most| most.max(1) as usize));
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

    /// The model, with the context that is served.
    fn profile_for(&self, deployment: &Deployment) -> ModelProfile {
        ModelProfile { context_length: deployment.context_of(&self.profile), ..self.profile.clone() }
    }

    /// Plans a deployment over what was found, links included. As many devices as it can spare, of those that it wants
    /// standbys on, stay free.
    ///
    /// # Errors
    /// If it does not fit, or a forced link is impossible.
    pub fn plan(&self, deployment: &Deployment) -> Result<Plan, PipelineError> {
        let most = u32::try_from(self.offers.len()).unwrap_or(u32::MAX);
        for standbys in (1..=deployment.standbys.min(most)).rev() {
            let mut fewer = self.clone();
            fewer.hold_back(standbys);
            if let Ok(plan) = fewer.plan_over(&fewer.offers, deployment) {
                return self.linked(plan, deployment);
            }
        }
        self.linked(self.plan_over(&self.offers, deployment)?, deployment)
    }

    /// The same for a replica that had a plan: what is left of that stays where it is, if devices can take the places of
    /// those that are gone; only if not, everything is planned anew.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn plan_again(&self, deployment: &Deployment, old: &Replica) -> Result<Plan, PipelineError> {
        match self.plan_replaced(deployment, old) {
            Some(plan) => Ok(plan),
            None => self.plan(deployment),
        }
    }

    /// What a replica had, with devices of those that were found in the places of those that are gone, if there are any.
    pub(crate) fn plan_replaced(&self, deployment: &Deployment, old: &Replica) -> Option<Plan> {
        let profile = self.profile_for(deployment);
        let problem = problem(&profile, &self.offers, deployment);
        let holds = |offer: &Offer, layers| self.holds(offer, layers, deployment);
        self.linked(planner::replace(&problem, old, &holds)?, deployment).ok()
    }

    /// Whether a device holds the weights of these layers, in the format of the deployment.
    pub(crate) fn holds(&self, offer: &Offer, layers: LayerRange, deployment: &Deployment) -> bool {
        let (dtype, quantization) = deployment.formats(&self.profile);
        self.resident.get(&offer.worker).into_iter().flatten().any(|spec| {
            spec.device == offer.device.id
                && spec.fingerprint == self.profile.fingerprint
                && spec.layers.map(LayerRange::from) == Some(layers)
                && spec.dtype == dtype.name()
                && spec.quantization == Quantization::to_wire(quantization)
        })
    }

    /// The plan with its links.
    fn linked(&self, mut plan: Plan, deployment: &Deployment) -> Result<Plan, PipelineError> {
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

/// What the planner is asked about a deployment.
fn problem<'a>(profile: &'a ModelProfile, offers: &'a [Offer], deployment: &'a Deployment) -> Problem<'a> {
    let contexts = deployment.max_sequences.map(|n| u64::from(n) * u64::from(profile.context_length));
    let (dtype, quantization) = deployment.formats(profile);
    Problem {
        profile,
        offers,
        split: &deployment.split,
        dtype,
        quantization,
        kv_tokens: deployment.kv_tokens.or(contexts),
        state_slots: deployment.max_sequences.unwrap_or(deployment.max_step_rows),
        max_step_tokens: deployment.max_step_tokens,
        max_step_rows: deployment.step_rows(profile),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_workers_say_of_a_model_needs_no_name() {
        let call =
            |worker: &str, status| PipelineError::Call { worker: worker.into(), doing: "Describe", status };
        let refused = |worker: &str, why: &str| call(worker, Status::failed_precondition(why));
        let said = |errors| common(errors).to_string();
        assert_eq!(said(vec![refused("a", "no model")]), "no model");
        assert_eq!(said(vec![refused("a", "no model"), refused("b", "no model")]), "no model");
        assert_eq!(said(vec![refused("a", "cut off"), refused("b", "no model")]), "worker a: cut off");
        // What is no model's fault says what was done.
        let internal = said(vec![call("a", Status::internal("defect")), refused("b", "no model")]);
        assert_eq!(internal, "worker a: Describe failed: defect");
        assert_eq!(said(Vec::new()), "no worker is available");
    }
}
