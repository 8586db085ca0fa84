//! Which devices that no replica needs hold the weights of which stage, so that it has somewhere to go at once.

use std::{cmp::Reverse, sync::Arc};

use strata_proto::{LayerRange, Plan};

use super::discovery::Discovery;
use crate::config::Deployment;

/// A device that holds a stage's weights.
#[derive(Debug, Clone)]
pub(crate) struct Standby {
    /// Its worker.
    pub worker: String,
    /// The device.
    pub device: String,
    /// What it holds.
    pub layers: LayerRange,
    /// The replica's plan as it would be with this device in the stage's place.
    pub plan: Arc<Plan>,
}

/// Finds a device for each of the stages whose weights are most to read, as many as the deployment wants and `found` has to
/// spare, on other workers than the stages'. What is held already stays where it is.
pub(crate) fn standbys(found: &Discovery, plans: &[Arc<Plan>], deployment: &Deployment) -> Vec<Standby> {
    let mut free = found.clone();
    free.leave_out(plans);
    let mut stages: Vec<(&Arc<Plan>, usize)> = Vec::new();
    for plan in plans {
        let count = plan.replicas.first().map_or(0, |replica| replica.stages.len());
        stages.extend((0..count).map(|stage| (plan, stage)));
    }
    stages.sort_by_key(|(plan, stage)| Reverse(plan.replicas[0].stages[*stage].weight_bytes));
    let mut chosen: Vec<Standby> = Vec::new();
    // First those that hold it already.
    for held in [true, false] {
        for (plan, stage) in &stages {
            let layers = plan.replicas[0].stages[*stage].layers;
            let has = chosen.iter().any(|standby| standby.layers == layers);
            if chosen.len() < deployment.standbys as usize && !has {
                chosen.extend(standby(found, &mut free, (plan, *stage), deployment, held));
            }
        }
    }
    chosen
}

/// A device for one stage, which is free no more; one that holds its weights, or any.
fn standby(
    found: &Discovery,
    free: &mut Discovery,
    (plan, stage): (&Plan, usize),
    deployment: &Deployment,
    held: bool,
) -> Option<Standby> {
    let replica = plan.replicas.first()?;
    let lost = &replica.stages[stage];
    let at = free.offers.iter().enumerate().find_map(|(at, offer)| {
        if offer.worker == lost.worker || (held && !free.holds(offer, lost.layers, deployment)) {
            return None;
        }
        // The replica with this device alone to fall back on.
        let mut rest = found.clone();
        let is_of = |worker: &str, device: &str, at: usize| {
            let stage = &replica.stages[at];
            stage.worker == worker && stage.device == device
        };
        rest.offers.retain(|o| {
            o == offer
                || (0..replica.stages.len()).any(|at| at != stage && is_of(&o.worker, &o.device.id, at))
        });
        Some((at, rest.plan_replaced(deployment, replica)?))
    });
    let (at, plan) = at?;
    let offer = free.offers.remove(at);
    Some(Standby { worker: offer.worker, device: offer.device.id, layers: lost.layers, plan: plan.into() })
}
