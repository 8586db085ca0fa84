//! From the plans that replicas run by to others, with as little as possible in another place.

use std::{collections::BTreeSet, sync::Arc};

use strata_proto::{Plan, StagePlan};

use super::{PipelineError, discovery::Discovery};
use crate::config::Deployment;

/// What is gained by less is within what forecasts err by.
const WORTH: f64 = 1.02;

/// A replica that runs.
#[derive(Debug, Clone)]
pub(crate) struct Current {
    /// Its number in fences.
    pub number: u32,
    /// Of its pipeline.
    pub incarnation: u64,
    /// What it runs by, and nobody else.
    pub plan: Arc<Plan>,
}

/// What is to become of the replicas. Those that it does not name run on.
#[derive(Debug)]
pub(crate) struct Target {
    /// What it was planned over.
    pub found: Arc<Discovery>,
    /// Numbers of replicas, and what each is to run by instead.
    pub changed: Vec<(u32, Arc<Plan>)>,
    /// Further replicas.
    pub added: Vec<Arc<Plan>>,
    /// Replicas that end.
    pub retired: Vec<u32>,
}

impl Target {
    /// The plans that are new.
    pub fn plans(&self) -> impl Iterator<Item = &Arc<Plan>> {
        self.changed.iter().map(|(_, plan)| plan).chain(&self.added)
    }
}

/// The same replicas without a worker, whose devices `found` may still have.
///
/// # Errors
/// If a replica cannot do without it, nor the others without that replica.
pub(crate) fn without(
    worker: &str,
    mut found: Discovery,
    current: &[Current],
    deployment: &Deployment,
) -> Result<Target, PipelineError> {
    found.offers.retain(|offer| offer.worker != worker);
    let uses = |current: &&Current| stages(&current.plan).any(|stage| stage.worker == worker);
    let (leave, stay): (Vec<&Current>, Vec<&Current>) = current.iter().partition(uses);
    let mut taken: Vec<Arc<Plan>> = stay.iter().map(|current| current.plan.clone()).collect();
    let room = |plan: &Plan| plan.replicas.first().map_or(0, |replica| replica.kv_capacity_tokens);
    let roomiest = taken.iter().map(|plan| room(plan)).max();
    let (mut changed, mut retired) = (Vec::new(), Vec::new());
    for Current { number, plan, .. } in leave {
        let mut left = found.clone();
        left.leave_out(&taken);
        let old = plan.replicas.first().ok_or(PipelineError::NoWorkers)?;
        match left.plan_again(deployment, old) {
            Ok(plan) => {
                let own: Arc<Plan> = plan.apart().next().ok_or(PipelineError::NoWorkers)?.into();
                taken.push(own.clone());
                changed.push((*number, own));
            }
            // Whatever it computes, another one can.
            Err(_) if roomiest.is_some_and(|most| most >= room(plan)) => retired.push(*number),
            Err(error) => return Err(error.without(found.left_out.clone())),
        }
    }
    Ok(Target { found: found.into(), changed, added: Vec::new(), retired })
}

/// From the plans that there are to the one that would be made today.
///
/// # Errors
/// If there is none.
pub(crate) fn best(
    found: Discovery,
    current: &[Current],
    deployment: &Deployment,
) -> Result<Target, PipelineError> {
    let plan = found.plan(deployment).map_err(|error| error.without(found.left_out.clone()))?;
    let mut left: Vec<&Current> = current.iter().collect();
    let mut new: Vec<Arc<Plan>> = Vec::new();
    for plan in plan.apart() {
        match left.iter().position(|current| is_alike(&current.plan, &plan)) {
            Some(at) => drop(left.remove(at)),
            None => new.push(plan.into()),
        }
    }
    let added = new.split_off(new.len().min(left.len()));
    let retired = left.split_off(new.len()).into_iter().map(|current| current.number).collect();
    let changed = left.into_iter().map(|current| current.number).zip(new).collect();
    Ok(Target { found: found.into(), changed, added, retired })
}

/// Whether two plans say the same, whatever they forecast.
pub(crate) fn is_alike(a: &Plan, b: &Plan) -> bool {
    let shape = |plan: &Plan| -> BTreeSet<Vec<String>> {
        let stage = |stage: &StagePlan| {
            let link = stage.link.as_ref().map(|link| link.kind.name());
            format!("{}/{} {} {link:?}", stage.worker, stage.device, stage.layers)
        };
        let of = |replica: &strata_proto::Replica| {
            let cache = format!("{} {}", replica.kv_capacity_tokens, replica.state_slots);
            replica.stages.iter().map(stage).chain([cache]).collect()
        };
        plan.replicas.iter().map(of).collect()
    };
    (&a.model, a.dtype, a.quantization, shape(a)) == (&b.model, b.dtype, b.quantization, shape(b))
}

/// Whether a plan promises so much more than another that it is worth to change over: speed, room in caches, or less to
/// hold for whoever holds most.
pub(crate) fn gains(now: &Plan, then: &Plan) -> bool {
    let promise = |plan: &Plan| -> [f64; 4] {
        let [single, full] = plan.speed();
        let room = plan.replicas.iter().map(|replica| replica.kv_capacity_tokens as f64).sum();
        let most = stages(plan).map(|stage| stage.weight_bytes).max().unwrap_or(0).max(1);
        [single, full, room, 1.0 / most as f64]
    };
    promise(now).into_iter().zip(promise(then)).any(|(now, then)| then > WORTH * now)
}

/// Every stage of a plan.
pub(crate) fn stages(plan: &Plan) -> impl Iterator<Item = &StagePlan> {
    plan.replicas.iter().flat_map(|replica| &replica.stages)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use strata_proto::{DType, Forecast, FormatBytes, LayerRange, Replica, StateBytes};

    use super::*;

    fn plan(speed: f64, room: u64, most: u64) -> Plan {
        let stage = StagePlan {
            worker: "w".into(),
            device: "cpu".into(),
            layers: LayerRange { first: 0, end: 1 },
            weight_bytes: most,
            states: StateBytes::default(),
            workspace_bytes: 0,
            predicted_ms: 0.0,
            budget_bytes: 0,
            numerics: String::new(),
            link: None,
            mapped: false,
            footprint: FormatBytes::default(),
        };
        let forecast = Forecast { single: speed, batch: 1, full: 10.0 * speed };
        let replica = Replica { stages: vec![stage], kv_capacity_tokens: room, state_slots: 0, forecast };
        Plan {
            model: "m".into(),
            dtype: DType::F32,
            quantization: None,
            replicas: vec![replica],
            hf_device_map: BTreeMap::new(),
            offload: None,
            warnings: Vec::new(),
        }
    }

    #[test]
    fn a_change_is_worth_it_if_something_gets_better_by_more_than_forecasts_err() {
        let now = plan(1530.0, 4096, 1000);
        for (then, worth) in [
            (plan(1529.2, 4096, 1000), false),
            (plan(1545.0, 4096, 1000), false),
            (plan(1600.0, 4096, 1000), true),
            (plan(1400.0, 4096, 1000), false),
            (plan(1400.0, 8192, 1000), true),
            (plan(1500.0, 4096, 667), true),
        ] {
            assert_eq!(gains(&now, &then), worth, "{then:?}");
        }
    }
}
