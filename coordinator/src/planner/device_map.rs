//! accelerate's device maps, in and out: module name to an integer for a CUDA device, `cpu`, or `cpu:N`.

use std::collections::BTreeMap;

use strata_proto::{DeviceKind, LayerRange, MapDevice, Module, error::quoted};

use super::{PlanError, Problem, Share};

/// The modules of a stage: embedding if first, head if last.
fn modules<'a>(problem: &Problem<'a>, layers: LayerRange) -> impl Iterator<Item = &'a Module> {
    let profile = problem.profile;
    let embedding = (layers.first == 0).then_some(&profile.embedding);
    let head = (layers.end == profile.layer_count()).then_some(&profile.head);
    let own = &profile.layers[layers.first as usize..layers.end as usize];
    embedding.into_iter().chain(own).chain(head)
}

/// A plan as accelerate's users know it.
pub(super) fn export(problem: &Problem<'_>, shares: &[Share]) -> BTreeMap<String, MapDevice> {
    let cpus: Vec<usize> = shares
        .iter()
        .map(|s| s.offer)
        .filter(|o| problem.offers[*o].device.kind == DeviceKind::Cpu)
        .collect();
    let name = |offer: usize| {
        let device = &problem.offers[offer].device;
        match (device.kind, cpus.iter().position(|c| *c == offer)) {
            (DeviceKind::Cuda, _) => MapDevice::Cuda(number(&device.id)),
            (DeviceKind::Cpu, Some(n)) if cpus.len() > 1 => MapDevice::Named(format!("cpu:{n}")),
            (DeviceKind::Cpu, _) => MapDevice::Named("cpu".into()),
        }
    };
    let mut map = BTreeMap::new();
    for share in shares {
        let names = modules(problem, share.layers).flat_map(|m| m.names.iter().cloned());
        map.extend(names.map(|module| (module, name(share.offer))));
    }
    map
}

/// The number in `cuda:3`.
fn number(id: &str) -> u32 {
    id.rsplit(':').next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// The shares that a map describes. A key stands for every module whose name it is, or begins, up to a dot; the longest
/// key counts.
pub(super) fn shares(
    problem: &Problem<'_>,
    map: &BTreeMap<String, MapDevice>,
) -> Result<Vec<Share>, PlanError> {
    let wrong = |why: String| PlanError::DeviceMap { why };
    let device_of = |module: &str| {
        let covers = |key: &str| {
            let rest = module.strip_prefix(key);
            key.is_empty() || rest.is_some_and(|r| r.is_empty() || r.starts_with('.'))
        };
        let best = map.iter().filter(|(key, _)| covers(key)).max_by_key(|(key, _)| key.len());
        best.map(|(_, device)| device).ok_or_else(|| wrong(format!("module {module:?} is given no device")))
    };
    let count = problem.profile.layer_count();
    let mut shares: Vec<Share> = Vec::new();
    for layer in 0..count {
        let mut offer = None;
        for module in modules(problem, LayerRange::new(layer, layer + 1)) {
            for name in &module.names {
                let named = resolve(problem, device_of(name)?).map_err(wrong)?;
                if *offer.get_or_insert(named) != named {
                    return Err(wrong(format!(
                        "{name:?} must be on the device of layer {layer}: the embedding goes with the first layer, norm \
                         and head with the last"
                    )));
                }
            }
        }
        let Some(offer) = offer else { return Err(wrong(format!("layer {layer} has no module names"))) };
        match shares.iter().rposition(|s| s.offer == offer) {
            Some(at) if at + 1 == shares.len() => shares[at].layers.end = layer + 1,
            Some(_) => {
                return Err(wrong(format!(
                    "layer {layer} returns to a device that has earlier layers: a stage is contiguous"
                )));
            }
            None => shares.push(Share { offer, layers: LayerRange::new(layer, layer + 1) }),
        }
    }
    Ok(shares)
}

/// The offer that a device of a map means: a CUDA device by number, a CPU by its place among CPUs.
fn resolve(problem: &Problem<'_>, device: &MapDevice) -> Result<usize, String> {
    let of_kind = |kind: DeviceKind| {
        problem.offers.iter().enumerate().filter(move |(_, o)| o.device.kind == kind).map(|(i, _)| i)
    };
    let none = || match device {
        MapDevice::Cuda(n) => format!("there is no device {n}"),
        MapDevice::Named(name) => format!("there is no device {}", quoted(name)),
    };
    match device {
        MapDevice::Cuda(n) => {
            of_kind(DeviceKind::Cuda).find(|i| number(&problem.offers[*i].device.id) == *n).ok_or_else(none)
        }
        MapDevice::Named(name) => match name.split_once(':').unwrap_or((name, "0")) {
            ("cpu", n) => n.parse().ok().and_then(|n| of_kind(DeviceKind::Cpu).nth(n)).ok_or_else(none),
            ("cuda", n) => {
                let n = n.parse().map_err(|_| none())?;
                resolve(problem, &MapDevice::Cuda(n))
            }
            ("disk", _) => Err("layers cannot stay on disk: give them a device with memory".into()),
            _ => Err(format!("device {} is unknown: expected a number, \"cpu\" or \"cpu:N\"", quoted(name))),
        },
    }
}
