//! What it costs that layers are on a CPU although there are GPUs, and what would avoid it.

use strata_proto::{DeviceKind, Offload, Quantization, Replica, StagePlan};

use super::{Offer, Problem, Split, plan_replicas};

/// What a plan's first replica leaves to CPUs, if there are GPUs too. `None` where the user placed the layers.
pub(super) fn offload(problem: &Problem<'_>, replica: &Replica) -> Option<Offload> {
    let spilled = on_cpus(problem, replica);
    if spilled.is_empty() || matches!(problem.split, Split::Counts(_) | Split::DeviceMap(_)) {
        return None;
    }
    let mut large: Vec<Offer> =
        problem.offers.iter().filter(|o| o.device.kind == DeviceKind::Cuda).cloned().collect();
    if large.is_empty() {
        return None;
    }
    // More than any model, and sums of them do not overflow.
    large.iter_mut().for_each(|gpu| gpu.device.budget_bytes = 1 << 56);
    let without = plan_replicas(&Problem { offers: &large, ..*problem }).ok()?;
    let fits = |quantization: &Quantization| {
        let fewer = problem.quantization.is_none_or(|have| have < *quantization);
        let quantized = Problem { quantization: Some(*quantization), ..*problem };
        let all_on_gpus = |(_, replicas): (_, Vec<Replica>)| {
            replicas.first().is_some_and(|replica| on_cpus(problem, replica).is_empty())
        };
        fewer && plan_replicas(&quantized).is_ok_and(all_on_gpus)
    };
    Some(Offload {
        layers: spilled.iter().map(|stage| stage.layers.len()).sum(),
        of: problem.profile.layer_count(),
        bytes: spilled.iter().map(|stage| stage.weight_bytes).sum(),
        tokens_per_second: replica.forecast.single,
        without: without.1.first()?.forecast.single,
        quantize: Quantization::ALL.into_iter().find(fits),
    })
}

/// The stages of a replica that are on CPUs.
fn on_cpus<'a>(problem: &Problem<'_>, replica: &'a Replica) -> Vec<&'a StagePlan> {
    let is_cpu = |stage: &&StagePlan| {
        let of_stage = |o: &&Offer| o.worker == stage.worker && o.device.id == stage.device;
        problem.offers.iter().find(of_stage).is_some_and(|o| o.device.kind == DeviceKind::Cpu)
    };
    replica.stages.iter().filter(is_cpu).collect()
}
