//! How fast a pipeline is going to be: tokens per second of one stream, and of as many as its cache holds.
//!
//! A step of `m` rows takes a stage the sum of its operations (see [`cost`](super::cost)). With `M` micro-batches of
//! `m` rows between `S` stages, one leaves the pipeline every `max(slowest stage, (all stages + hops + control) / M)`
//! seconds. What attention computes for long prompts is left out; what it reads of the cache is not.

use std::collections::BTreeMap;

use strata_proto::{DeviceKind, Forecast, StateKind};

use super::{Problem, Share, cost::Costs};

/// Scheduling, and the way from the last stage over the coordinator to the first, in seconds.
const CONTROL: f64 = 100e-6;
/// Handing activations on from GPU to GPU, within a host, and between hosts, in seconds.
const HOP_DIRECT: f64 = 10e-6;
const HOP_WITHIN: f64 = 20e-6;
const HOP_BETWEEN: f64 = 100e-6;
/// Bytes per second between hosts: a network of 10 Gbit/s.
const WIRE: f64 = 1.25e9;

/// The forecast for stages with a cache of `blocks` blocks each.
pub(super) fn forecast(problem: &Problem<'_>, costs: &Costs, blocks: u64, shares: &[Share]) -> Forecast {
    let profile = problem.profile;
    let stages = shares.len() as f64;
    let hop = |a: &Share, b: &Share, rows: f64| {
        let [from, to] = [a, b].map(|share| &problem.offers[share.offer]);
        if from.worker == to.worker && from.device.copies_to(&to.device) {
            return HOP_DIRECT;
        }
        if from.host == to.host {
            return HOP_WITHIN;
        }
        HOP_BETWEEN + rows * f64::from(profile.hidden_size) * problem.dtype.size() as f64 / WIRE
    };
    // Seconds of one pass of `rows` rows: the slowest stage, and all of it.
    let pass = |rows: f64| {
        let times: Vec<f64> =
            shares.iter().map(|s| costs.step_seconds(problem, s.offer, s.layers, rows)).collect();
        let hops: f64 = shares.windows(2).map(|pair| hop(&pair[0], &pair[1], rows)).sum();
        let slowest = times.iter().copied().fold(0.0, f64::max).max(busiest_host(problem, shares, &times));
        (slowest, times.iter().sum::<f64>() + hops + CONTROL)
    };
    if !profile.caches() {
        // Steps of whole inputs are full whenever there is enough to do; a single input is as long as it may be.
        let longest = profile.context_length.min(problem.max_step_tokens);
        let full = f64::from(problem.max_step_tokens);
        let (slowest, whole) = pass(full);
        return Forecast {
            single: f64::from(longest) / pass(f64::from(longest)).1,
            batch: problem.max_step_tokens,
            full: full / slowest.max(whole / (stages + 1.0)),
        };
    }
    let (kinds, room) = (profile.state_kinds(), problem.room(blocks));
    let paged = kinds.contains(&StateKind::PagedKv);
    let contexts = if paged { room.positions / u64::from(profile.context_length.max(1)) } else { u64::MAX };
    let contexts = if room.slots > 0 { contexts.min(u64::from(room.slots)) } else { contexts };
    let micro_batches = if shares.len() > 1 { stages + 1.0 } else { 1.0 };
    let most = f64::from(problem.max_step_rows) * micro_batches;
    let batch = (contexts as f64).min(most).max(1.0);
    // A batch smaller than the number of micro-batches leaves some of them out.
    let used = micro_batches.min(batch);
    let rows = batch / used;
    let (slowest, whole) = pass(rows);
    Forecast { single: 1.0 / pass(1.0).1, batch: batch as u32, full: rows / slowest.max(whole / used) }
}

/// The least time in which the processors of a host get through one pass of all their stages.
fn busiest_host(problem: &Problem<'_>, shares: &[Share], times: &[f64]) -> f64 {
    let mut hosts: BTreeMap<&str, (f64, u32)> = BTreeMap::new();
    for (share, time) in shares.iter().zip(times) {
        let offer = &problem.offers[share.offer];
        if offer.device.kind == DeviceKind::Cpu {
            let (sum, at_once) = hosts.entry(&offer.host).or_default();
            *sum += time;
            *at_once = offer.device.stages_at_once.max(1);
        }
    }
    hosts.values().map(|(sum, at_once)| sum / f64::from(*at_once)).fold(0.0, f64::max)
}
