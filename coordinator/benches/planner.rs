//! How long plans take: 128 layers over 1000 uneven devices, by every policy.
//!
//! `cargo bench -p strata-coordinator --bench planner` prints the median of eleven runs of each.

use std::time::Instant;

use strata_coordinator::planner::{Offer, Problem, Split, solve};
use strata_proto::{
    DType, Device, DeviceKind, FormatBytes, LayerRange, LayerState, ModelProfile, Module, Stack, StateKind,
    v1::{Scoring, Task},
};

const DEVICES: usize = 1000;
const LAYERS: usize = 128;
const RUNS: usize = 11;

fn main() {
    let layer = |i: usize| module(format!("model.layers.{i}"), (900 + 13 * (i as u64 % 7)) << 20, 2048);
    let profile = ModelProfile {
        model: "bench".into(),
        family: "llama".into(),
        task: Task::Generate,
        dtype: DType::BF16,
        quantization: None,
        hidden_size: 8192,
        vocab_size: 128_256,
        context_length: 8192,
        layers: (0..LAYERS).map(layer).collect(),
        embedding: module("model.embed_tokens".into(), 2 << 30, 0),
        head: module("lm_head".into(), 2 << 30, 0),
        shared: FormatBytes::default(),
        shared_tensors: vec![],
        bos_token_ids: vec![],
        eos_token_ids: vec![],
        pad_token_ids: vec![],
        fingerprint: String::new(),
        recompute_at: None,
        workspace_bytes_per_token: 400_000,
        workspace_bytes_per_output: 1_000_000,
        labels: vec![],
        scoring: Scoring::Unspecified,
        commit: String::new(),
        sentences: Default::default(),
        ranking: Default::default(),
        segments: 0,
        tokenizers: vec!["BPE".into()],
        stacks: vec![Stack {
            layers: LayerRange::new(0, LAYERS as u32),
            whole_input: false,
            positions: 8192,
        }],
    };
    for (name, range) in [("3 to 82 GiB", 80), ("3 to 14 GiB", 12), ("all of 24 GiB", 1)] {
        let offers: Vec<Offer> = (0..DEVICES).map(|i| offer(i, range)).collect();
        for split in [Split::Auto, Split::Balanced, Split::BalancedLow0, Split::Sequential] {
            let problem = Problem {
                profile: &profile,
                offers: &offers,
                split: &split,
                dtype: DType::BF16,
                quantization: None,
                kv_tokens: None,
                state_slots: 128,
                max_step_tokens: 512,
                max_step_rows: 128,
            };
            let mut stages = 0;
            let mut once = || {
                let begun = Instant::now();
                let plan = std::hint::black_box(solve(&problem));
                let seconds = begun.elapsed().as_secs_f64();
                stages = plan.map_or(0, |p| p.replicas[0].stages.len());
                seconds
            };
            let mut times: Vec<f64> = (0..RUNS).map(|_| once()).collect();
            times.sort_by(f64::total_cmp);
            println!("{name}: {split}: {:.1} ms, {stages} stages", times[RUNS / 2] * 1e3);
        }
    }
}

fn module(name: String, bytes: u64, kv: u64) -> Module {
    Module {
        names: vec![name],
        bytes: FormatBytes { f32: 2 * bytes, bf16: bytes, f16: bytes, int8: bytes / 2, int4: bytes / 4 },
        states: if kv > 0 { vec![LayerState::own(StateKind::PagedKv, kv)] } else { vec![] },
        macs_per_token: bytes / 2,
        experts: None,
    }
}

/// A device of one of `range` sizes, in no order; one in eight is a CPU.
fn offer(i: usize, range: u64) -> Offer {
    let gib = if range == 1 { 24 } else { 3 + (i as u64 * 7919) % range };
    let kind = if i % 8 == 7 { DeviceKind::Cpu } else { DeviceKind::Cuda };
    let device = Device {
        id: format!("cuda:{i}"),
        kind,
        budget_bytes: gib << 30,
        total_bytes: gib << 30,
        capped: false,
        bytes_per_second: 1e12,
        flops_per_second: 1e14,
        numerics: "bench".into(),
        rates: Vec::new(),
        stages_at_once: 0,
        hardware: String::new(),
        peers: Vec::new(),
        links: Vec::new(),
        spill_bytes: 0,
        spill_directory: String::new(),
        libraries: Vec::new(),
    };
    Offer { worker: "w".into(), host: "h".into(), device }
}
