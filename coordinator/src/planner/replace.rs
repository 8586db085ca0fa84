//! The stages that a replica had, with other devices in the places of those that are gone: all others keep what they hold.

use strata_proto::{BLOCK_TOKENS, LayerRange, Plan, Replica};

use super::{Offer, Problem, Share, Split, cost::Costs, describe, numerics, written};

/// Plans the stages of `old` again: those whose devices are still offered stay there, and each of the others goes to a
/// device that nobody has, preferably one for which `holds` says that it has the weights already. It has to compute the
/// same bits, so a stage does not go to a device of another kind. `None` if there is no such plan.
pub(crate) fn replace(
    problem: &Problem<'_>,
    old: &Replica,
    holds: &dyn Fn(&Offer, LayerRange) -> bool,
) -> Option<Plan> {
    let chosen_by_device = matches!(problem.split, Split::DeviceMap(_));
    if problem.offers.is_empty() || chosen_by_device || old.stages.iter().any(|stage| stage.mapped) {
        return None;
    }
    let costs = Costs::new(problem);
    if old.stages.last()?.layers.end != costs.layers() {
        return None;
    }
    let blocks = old.kv_capacity_tokens / u64::from(BLOCK_TOKENS);
    let place = |worker: &str, device: &str| {
        problem.offers.iter().position(|o| o.worker == worker && o.device.id == device)
    };
    let mut places: Vec<Option<usize>> =
        old.stages.iter().map(|stage| place(&stage.worker, &stage.device)).collect();
    let mut missing: Vec<usize> = (0..places.len()).filter(|stage| places[*stage].is_none()).collect();
    // The largest has the least choice.
    missing.sort_by_key(|stage| std::cmp::Reverse(old.stages[*stage].weight_bytes));
    for at in missing {
        let stage = &old.stages[at];
        let may = |offer: &usize| {
            !places.contains(&Some(*offer))
                && costs.fits(*offer, stage.layers, blocks)
                && numerics(problem, &problem.offers[*offer].device) == stage.numerics
        };
        let free = (0..problem.offers.len()).filter(may);
        let is_away = |offer: &usize| !holds(&problem.offers[*offer], stage.layers);
        places[at] = Some(free.min_by_key(|offer| (is_away(offer), costs.penalty(*offer)))?);
    }
    let shares = old.stages.iter().zip(places);
    let shares = shares.map(|(stage, offer)| Some(Share { offer: offer?, layers: stage.layers }));
    let shares: Vec<Share> = shares.collect::<Option<_>>()?;
    let fit = shares.iter().all(|share| costs.fits(share.offer, share.layers, blocks));
    fit.then(|| written(problem, &shares, vec![describe(problem, &costs, blocks, &shares)]))
}
