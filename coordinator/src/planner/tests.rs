//! The planner against brute force on small problems, and the cases people ask about.

use std::cmp::Reverse;

use proptest::prelude::*;
use strata_proto::{DeviceKind, FormatBytes, LayerState, Module, Stack, StateBytes, v1::Task};

use super::*;

/// `bytes` in f32, less in other formats.
fn sized(bytes: u64) -> FormatBytes {
    FormatBytes::of(|format| match format {
        Format::Float(dtype) => bytes * dtype.size() / 4,
        Format::Quantized(Quantization::Int8) => bytes / 4,
        Format::Quantized(Quantization::Int4) => bytes / 8,
    })
}

fn module(name: &str, bytes: u64, kv: u64, macs: u64) -> Module {
    let bytes = sized(bytes);
    Module {
        names: vec![name.to_owned()],
        bytes,
        states: if kv > 0 { vec![LayerState::own(StateKind::PagedKv, kv)] } else { vec![] },
        macs_per_token: macs,
        experts: None,
    }
}

/// A model whose layers cost `(bytes in f32, multiply-adds)` each.
pub(crate) fn profile(layers: &[(u64, u64)], embedding: u64, tied: bool) -> ModelProfile {
    let head = module("lm_head", embedding + 8, 0, embedding / 4);
    ModelProfile {
        model: "m".into(),
        family: "llama".into(),
        task: Task::Generate,
        dtype: DType::F32,
        quantization: None,
        hidden_size: 8,
        vocab_size: 16,
        context_length: 32,
        layers: layers
            .iter()
            .enumerate()
            .map(|(i, (b, m))| module(&format!("layers.{i}"), *b, 4, *m))
            .collect(),
        embedding: module("embed", embedding, 0, 0),
        shared: if tied { sized(embedding) } else { FormatBytes::default() },
        shared_tensors: Vec::new(),
        head,
        bos_token_ids: vec![],
        eos_token_ids: vec![],
        pad_token_ids: vec![],
        fingerprint: "f".into(),
        recompute_at: None,
        workspace_bytes_per_token: 3,
        workspace_bytes_per_output: 5,
        labels: vec![],
        scoring: strata_proto::v1::Scoring::Unspecified,
        commit: String::new(),
        sentences: Default::default(),
        ranking: Default::default(),
        segments: 0,
        tokenizers: vec!["BPE".into()],
        stacks: vec![Stack {
            layers: LayerRange::new(0, layers.len() as u32),
            whole_input: false,
            positions: 32,
        }],
    }
}

pub(crate) fn device(kind: DeviceKind, id: &str, budget: u64, capped: bool) -> Offer {
    let device = Device {
        id: id.into(),
        kind,
        budget_bytes: budget,
        total_bytes: budget,
        capped,
        bytes_per_second: if kind == DeviceKind::Cuda { 1e6 } else { 1e4 },
        flops_per_second: if kind == DeviceKind::Cuda { 1e6 } else { 1e4 },
        numerics: "test".into(),
        rates: Vec::new(),
        stages_at_once: 0,
        hardware: if kind == DeviceKind::Cuda { format!("GPU {id}") } else { String::new() },
        peers: Vec::new(),
        links: Vec::new(),
        spill_bytes: 0,
        spill_directory: String::new(),
        libraries: Vec::new(),
    };
    Offer { worker: "w".into(), host: "h".into(), device }
}

fn problem<'a>(profile: &'a ModelProfile, offers: &'a [Offer], split: &'a Split) -> Problem<'a> {
    Problem {
        profile,
        offers,
        split,
        dtype: DType::F32,
        quantization: None,
        kv_tokens: Some(32),
        state_slots: 3,
        max_step_tokens: 4,
        max_step_rows: 2,
    }
}

/// Whether a layer from `end` on uses a state of one before it.
fn severs(profile: &ModelProfile, end: u32) -> bool {
    let behind = profile.layers.iter().skip(end as usize).flat_map(|m| &m.states);
    behind.filter_map(|s| s.shares).any(|owner| owner < end)
}

/// Every assignment of contiguous ranges to devices in this order that fits with `blocks` blocks.
fn brute_force(profile: &ModelProfile, costs: &Costs, order: &[usize], blocks: u64) -> Vec<Vec<Share>> {
    fn go(
        profile: &ModelProfile,
        costs: &Costs,
        blocks: u64,
        order: &[usize],
        first: u32,
        so_far: &mut Vec<Share>,
        all: &mut Vec<Vec<Share>>,
    ) {
        if first == costs.layers() {
            all.push(so_far.clone());
            return;
        }
        let Some((&offer, order)) = order.split_first() else { return };
        go(profile, costs, blocks, order, first, so_far, all);
        for end in first + 1..=costs.layers() {
            let layers = LayerRange::new(first, end);
            if costs.fits(offer, layers, blocks) && !severs(profile, end) {
                so_far.push(Share { offer, layers });
                go(profile, costs, blocks, order, end, so_far, all);
                so_far.pop();
            }
        }
    }
    let mut all = Vec::new();
    go(profile, costs, blocks, order, 0, &mut Vec::new(), &mut all);
    all
}

/// The devices as listed, and with those first that layers only spill to.
fn orders(costs: &Costs) -> [Vec<usize>; 2] {
    let listed: Vec<usize> = (0..costs.offers()).collect();
    let mut cpus_first = listed.clone();
    cpus_first.sort_by_key(|offer| costs.penalty(*offer) == 0);
    [listed, cpus_first]
}

fn slowest(shares: &[Share], seconds: impl Fn(usize, LayerRange) -> f64) -> f64 {
    shares.iter().map(|s| seconds(s.offer, s.layers)).fold(0.0, f64::max)
}

prop_compose! {
    fn small_problem()(
        layers in prop::collection::vec((1u64..200, 1u64..200), 1..7),
        embedding in 0u64..300,
        tied in any::<bool>(),
        owners in prop::collection::vec(prop::option::weighted(0.2, any::<prop::sample::Index>()), 6),
        recurrent in prop::collection::vec(prop::option::weighted(0.1, 1u64..20), 6),
        devices in prop::collection::vec((any::<bool>(), 0u64..2500, any::<bool>()), 1..5),
    ) -> (ModelProfile, Vec<Offer>) {
        let mut profile = profile(&layers, embedding * 4, tied);
        for (layer, owner) in owners.into_iter().enumerate().take(layers.len()).skip(1) {
            // Only a layer with a state of its own can share it.
            let owner = owner.map(|o| o.index(layer)).filter(|o| profile.layers[*o].states[0].shares.is_none());
            profile.layers[layer].states[0].shares = owner.map(|o| o as u32);
        }
        for (module, elements) in profile.layers.iter_mut().zip(recurrent) {
            module.states.extend(elements.map(|n| LayerState::own(StateKind::Recurrent, n)));
        }
        let offers = devices.iter().enumerate().map(|(i, (gpu, budget, capped))| {
            let kind = if *gpu { DeviceKind::Cuda } else { DeviceKind::Cpu };
            device(kind, &format!("d:{i}"), *budget, *capped)
        });
        (profile, offers.collect())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn plans_are_optimal_and_within_every_budget((profile, offers) in small_problem(), policy in 0..3usize) {
        let split = [Split::Auto, Split::Balanced, Split::BalancedLow0][policy].clone();
        let auto = split == Split::Auto;
        let problem = problem(&profile, &offers, &split);
        let costs = Costs::new(&problem);
        let [listed, mut all] = orders(&costs).map(|order| brute_force(&profile, &costs, &order, 2));
        if auto {
            all.extend(listed.iter().cloned());
        } else {
            all = listed.clone();
        }
        let plan = match solve(&problem) {
            Ok(plan) => plan,
            Err(PlanError::DoesNotFit { .. }) => {
                prop_assert!(all.is_empty(), "a plan exists");
                return Ok(());
            }
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        };
        let stages = &plan.replicas[0].stages;
        let mut next = 0;
        for stage in stages {
            prop_assert_eq!(stage.layers.first, next);
            prop_assert!(!stage.layers.is_empty());
            prop_assert!(stage.total_bytes() <= stage.budget_bytes);
            next = stage.layers.end;
        }
        prop_assert_eq!(next, profile.layer_count());

        let shares: Vec<Share> = stages.iter().map(|s| Share {
            offer: offers.iter().position(|o| o.device.id == s.device).unwrap(),
            layers: s.layers,
        }).collect();
        let penalty = |s: &[Share]| s.iter().map(|s| costs.penalty(s.offer) * u64::from(s.layers.len())).sum::<u64>();
        let key = |s: &Vec<Share>| (penalty(s), if auto { s.len() as i64 } else { -(s.len() as i64) });
        let best = all.iter().map(key).min().unwrap();
        prop_assert_eq!(key(&shares), best);
        let rivals: Vec<_> = all.iter().filter(|s| key(s) == best).collect();
        let decode = |s: &[Share]| slowest(s, |o, r| costs.decode_seconds(o, r));
        let prefill = |s: &[Share]| slowest(s, |o, r| costs.prefill_seconds(o, r));
        let fastest = rivals.iter().map(|s| decode(s)).fold(f64::INFINITY, f64::min);
        prop_assert!(decode(&shares) <= fastest * (1.0 + 1e-9));
        // Between the orders, only decode counts.
        let in_order = |s: &&&Vec<Share>| !listed.contains(&shares) || listed.contains(s);
        let ties = rivals.iter().filter(in_order).filter(|s| decode(s) <= fastest * (1.0 + 1e-13));
        let quickest = ties.map(|s| prefill(s)).fold(f64::INFINITY, f64::min);
        prop_assert!(prefill(&shares) <= quickest * (1.0 + 1e-9));
    }

    #[test]
    fn what_is_on_a_cpu_is_the_least_and_what_avoids_it_does((profile, offers) in small_problem()) {
        let mut offers = offers;
        offers.iter_mut().for_each(|offer| offer.device.capped = false);
        let problem = problem(&profile, &offers, &Split::Auto);
        let Ok(plan) = solve(&problem) else { return Ok(()) };
        let cpu = |offer: usize| offers[offer].device.kind == DeviceKind::Cpu;
        // The least number of layers on CPUs of all ways there are.
        let least = |quantization| {
            let problem = Problem { quantization, ..problem };
            let costs = Costs::new(&problem);
            let on_cpus = |s: &Vec<Share>| s.iter().filter(|s| cpu(s.offer)).map(|s| s.layers.len()).sum::<u32>();
            orders(&costs).iter().flat_map(|order| brute_force(&profile, &costs, order, 2)).map(|s| on_cpus(&s)).min()
        };
        let spilled = least(None).unwrap();
        let Some(offload) = plan.offload else {
            prop_assert!(spilled == 0 || (0..offers.len()).all(cpu));
            return Ok(());
        };
        prop_assert_eq!((offload.layers, offload.of), (spilled, profile.layer_count()));
        let on_cpus = plan.replicas[0].stages.iter().filter(|s| {
            offers.iter().any(|o| o.device.id == s.device && o.device.kind == DeviceKind::Cpu)
        });
        prop_assert_eq!(offload.bytes, on_cpus.map(|s| s.weight_bytes).sum::<u64>());
        prop_assert_eq!(offload.tokens_per_second, plan.replicas[0].forecast.single);
        prop_assert!(offload.without > offload.tokens_per_second);
        let remedy = Quantization::ALL.into_iter().find(|q| least(Some(*q)) == Some(0));
        prop_assert_eq!(offload.quantize, remedy);
    }

    #[test]
    fn weights_stay_on_a_disk_only_as_a_last_resort((profile, offers) in small_problem(), spill in 1u64..4000) {
        let in_memory = solve(&problem(&profile, &offers, &Split::Auto));
        let mut offers = offers;
        offers.iter_mut().for_each(|offer| offer.device.spill_bytes = spill);
        let problem = problem(&profile, &offers, &Split::Auto);
        let plan = solve(&problem);
        if in_memory.is_ok() {
            prop_assert_eq!(plan, in_memory);
            return Ok(());
        }
        let Some(costs) = Costs::new(&problem).mapped(&problem) else {
            prop_assert_eq!(plan, in_memory);
            return Ok(());
        };
        let all = orders(&costs).map(|order| brute_force(&profile, &costs, &order, 2)).concat();
        let Ok(plan) = plan else {
            prop_assert!(all.is_empty(), "a plan exists");
            return Ok(());
        };
        let stages = &plan.replicas[0].stages;
        let place = |s: &StagePlan| offers.iter().position(|o| o.device.id == s.device).unwrap();
        for stage in stages {
            let device = &offers[place(stage)].device;
            let may_map = device.kind == DeviceKind::Cpu && !device.capped && stage.weight_bytes <= spill;
            let fits = match stage.mapped {
                true => may_map && stage.states.total() + stage.workspace_bytes <= stage.budget_bytes,
                false => stage.total_bytes() <= stage.budget_bytes,
            };
            prop_assert!(fits, "{stage:?}");
        }
        let mapped = stages.iter().filter(|s| s.mapped).count();
        prop_assert!(mapped > 0 && mapped == plan.warnings.len());
        // As little as possible on processors, as many stages as possible, and the slowest as fast as possible.
        let shares: Vec<Share> = stages.iter().map(|s| Share { offer: place(s), layers: s.layers }).collect();
        let worth = |s: &[Share]| {
            let penalty = s.iter().map(|s| costs.penalty(s.offer) * u64::from(s.layers.len())).sum::<u64>();
            (penalty, Reverse(s.len()))
        };
        let best = all.iter().map(|s| worth(s)).min().unwrap();
        prop_assert_eq!(worth(&shares), best);
        let decode = |s: &[Share]| slowest(s, |o, r| costs.decode_seconds(o, r));
        let rivals = all.iter().filter(|s| worth(s) == best).map(|s| decode(s));
        prop_assert!(decode(&shares) <= rivals.fold(f64::INFINITY, f64::min) * (1.0 + 1e-9));
    }

    #[test]
    fn the_cache_is_as_large_as_the_shape_allows((profile, offers) in small_problem()) {
        let problem = Problem { kv_tokens: None, ..problem(&profile, &offers, &Split::Auto) };
        let Ok(plan) = solve(&problem) else { return Ok(()) };
        let replica = &plan.replicas[0];
        let blocks = replica.kv_capacity_tokens / 16;
        prop_assert!((2..=32).contains(&blocks), "between one and sixteen contexts");
        prop_assert!(replica.stages.iter().all(|s| s.total_bytes() <= s.budget_bytes));
        if blocks < 32 {
            let costs = Costs::new(&problem);
            let fits_more = brute_force(&profile, &costs, &orders(&costs)[0], blocks + 1);
            let stages = replica.stages.len();
            let ranks = |s: &Vec<Share>| s.iter().all(|s| offers[s.offer].device.capped
                || offers[s.offer].device.kind == DeviceKind::Cuda);
            let spills = replica.stages.iter().any(|s| Costs::new(&problem)
                .penalty(offers.iter().position(|o| o.device.id == s.device).unwrap()) > 0);
            if !spills && offers.iter().any(|o| o.device.capped || o.device.kind == DeviceKind::Cuda) {
                prop_assert!(!fits_more.iter().any(|s| s.len() <= stages && ranks(s)), "a larger cache fits");
            }
        }
    }
}

/// `INTERFACES.md`: GPUs of 10, 40 and 10 GB and a 50 GB model, of which accelerate puts 12 GB on the CPU.
#[test]
fn uneven_gpus_hold_the_whole_model() {
    let gb = 1_000_000_000;
    let profile = profile(&[(gb / 2, 1); 100], gb / 4, true);
    let offers = [
        device(DeviceKind::Cuda, "cuda:0", 10 * gb, false),
        device(DeviceKind::Cuda, "cuda:1", 40 * gb + gb / 2, false),
        device(DeviceKind::Cuda, "cuda:2", 10 * gb, false),
        device(DeviceKind::Cpu, "cpu", 64 * gb, false),
    ];
    for split in [Split::Auto, Split::Balanced] {
        let plan = solve(&problem(&profile, &offers, &split)).unwrap();
        assert!(plan.replicas[0].stages.iter().all(|s| s.device.starts_with("cuda")), "{split}: {plan:?}");
        assert_eq!(plan.hf_device_map["layers.0"], MapDevice::Cuda(0));
    }
}

#[test]
fn one_gpu_that_fits_is_never_split_and_a_cpu_only_takes_the_rest() {
    let profile = profile(&[(100, 1); 6], 0, false);
    let fits =
        [device(DeviceKind::Cpu, "cpu", 1 << 20, false), device(DeviceKind::Cuda, "cuda:0", 5000, false)];
    let plan = solve(&problem(&profile, &fits, &Split::Auto)).unwrap();
    assert_eq!(plan.replicas[0].stages.len(), 1);
    assert_eq!(plan.replicas[0].stages[0].device, "cuda:0");
    let tight =
        [device(DeviceKind::Cuda, "cuda:0", 2000, false), device(DeviceKind::Cpu, "cpu", 1 << 20, false)];
    let plan = solve(&problem(&profile, &tight, &Split::Auto)).unwrap();
    let layers: Vec<_> = plan.replicas[0].stages.iter().map(|s| s.layers.len()).collect();
    assert_eq!(layers, [3, 3], "the GPU takes the three layers that fit");
}

/// The stages of a plan, as worker, device and layers.
fn stages(plan: &Plan) -> Vec<String> {
    let stage = |s: &StagePlan| format!("{}/{} {}", s.worker, s.device, s.layers);
    plan.replicas[0].stages.iter().map(stage).collect()
}

#[test]
fn layers_spill_to_the_cpu_nearby_and_to_the_end_that_costs_least() {
    let gpu =
        |worker: &str, id: &str| Offer { worker: worker.into(), ..device(DeviceKind::Cuda, id, 2100, false) };
    let cpu =
        |worker: &str| Offer { worker: worker.into(), ..device(DeviceKind::Cpu, "cpu", 1 << 20, false) };
    let plan =
        |profile: &ModelProfile, offers: &[Offer]| solve(&problem(profile, offers, &Split::Auto)).unwrap();
    let small = profile(&[(100, 1); 8], 0, false);
    // Three layers fit a GPU. A CPU that is alone on its worker is the last resort, wherever it is listed.
    for offers in [
        [cpu("far"), gpu("near", "cuda:0"), gpu("near", "cuda:1"), cpu("near")],
        [gpu("near", "cuda:0"), gpu("near", "cuda:1"), cpu("near"), cpu("far")],
        [cpu("far"), cpu("near"), gpu("near", "cuda:0"), gpu("near", "cuda:1")],
    ] {
        let split = stages(&plan(&small, &offers));
        assert!(split.iter().any(|s| s.starts_with("near/cpu")), "{split:?}");
        assert!(!split.iter().any(|s| s.starts_with("far")), "{split:?}");
    }
    let split = stages(&plan(&small, &[gpu("near", "cuda:0"), gpu("near", "cuda:1"), cpu("far")]));
    assert_eq!(split.iter().filter(|s| s.starts_with("far/cpu")).count(), 1, "{split:?}");
    // The head takes as long as four layers.
    let large = profile(&[(100, 1); 8], 400, false);
    let spilled = plan(&large, &[gpu("near", "cuda:0"), gpu("near", "cuda:1"), cpu("near")]);
    assert_eq!(
        stages(&spilled)[0].split(' ').next(),
        Some("near/cpu"),
        "the head stays on a GPU: {spilled:?}"
    );
    assert_eq!(spilled.hf_device_map["embed"], MapDevice::Named("cpu".into()));
    assert_eq!(spilled.offload.unwrap().quantize, None, "the cache alone is too large");
    let remedied = plan(&profile(&[(600, 1); 3], 0, false), &[gpu("near", "cuda:0"), cpu("near")]);
    let offload = remedied.offload.unwrap();
    assert_eq!((offload.layers, offload.of, offload.quantize), (2, 3, Some(Quantization::Int8)));
    assert_eq!(Plan::try_from(strata_proto::v1::Plan::from(&remedied)).unwrap(), remedied);
    let json = serde_json::to_value(&remedied).unwrap();
    assert_eq!((&json["offload"]["layers"], &json["offload"]["quantize"]), (&2.into(), &"int8".into()));
    // Whoever places layers on a CPU does not need to be told.
    let own = Split::Counts(vec![7, 1]);
    let offers = [cpu("near"), gpu("near", "cuda:0")];
    assert_eq!(solve(&problem(&small, &offers, &own)).unwrap().offload, None);
}

#[test]
fn counts_are_taken_as_they_are_or_refused() {
    let profile = profile(&[(100, 1); 6], 0, false);
    let offers =
        vec![device(DeviceKind::Cpu, "cpu:0", 1 << 20, true), device(DeviceKind::Cpu, "cpu:1", 3000, true)];
    let plan = |counts: &str| {
        let split: Split = counts.parse().unwrap();
        solve(&problem(&profile, &offers, &split)).map_err(|e| e.to_string())
    };
    let stages = plan("5,1").unwrap().replicas[0].stages.clone();
    assert_eq!((stages[0].layers, stages[1].layers), (LayerRange::new(0, 5), LayerRange::new(5, 6)));
    assert!(plan("5,2").unwrap_err().contains("places 7 layers"));
    assert!(plan("2,2,2").unwrap_err().contains("3 stages"));
    let error = plan("1,5").unwrap_err();
    assert!(error.contains("stage 1 (layers 1..6)") && error.contains("w/cpu:1 offers 2.9 KiB"), "{error}");
    assert!("1,0".parse::<Split>().is_err() && "".parse::<Split>().is_err());
}

#[test]
fn a_refusal_says_what_is_missing_and_what_would_fit() {
    let profile = profile(&[(1 << 20, 1); 4], 0, false);
    let refuse = |budget: u64, kv_tokens| {
        let offers = [device(DeviceKind::Cpu, "cpu", budget, true)];
        let problem = Problem { kv_tokens, ..problem(&profile, &offers, &Split::Auto) };
        solve(&problem).unwrap_err().to_string()
    };
    let half = refuse(3 << 20, None);
    assert!(half.contains("1.0 MiB are missing") && half.contains("--dtype bf16"), "{half}");
    let cache = refuse((4 << 20) + 5000, Some(1 << 20));
    assert!(cache.contains("it would fit with --kv-tokens"), "{cache}");
    let none = refuse(1 << 10, None);
    assert!(none.contains("more devices or memory"), "{none}");
}

#[test]
fn the_names_accelerates_users_know() {
    let profile = profile(&[(100, 1); 6], 0, false);
    let gpus: Vec<_> = (0..3).map(|n| device(DeviceKind::Cuda, &format!("cuda:{n}"), 2100, false)).collect();
    let layers = |split: &str| -> Vec<(String, u32)> {
        let split: Split = split.parse().unwrap();
        let plan = solve(&problem(&profile, &gpus, &split)).unwrap();
        plan.replicas[0].stages.iter().map(|s| (s.device.clone(), s.layers.len())).collect()
    };
    let on = |counts: &[(u32, u32)]| -> Vec<(String, u32)> {
        counts.iter().map(|(gpu, n)| (format!("cuda:{gpu}"), *n)).collect()
    };
    assert_eq!(layers("balanced"), on(&[(0, 2), (1, 2), (2, 2)]));
    assert_eq!(layers("balanced_low_0"), on(&[(1, 3), (2, 3)]), "the first GPU is spared");
    assert_eq!(layers("sequential"), on(&[(0, 3), (1, 3)]), "each takes what fits");
    assert_eq!("balanced_low_0".parse::<Split>().unwrap().to_string(), "balanced_low_0");
}

#[test]
fn device_maps_go_in_as_they_come_out() {
    let profile = profile(&[(100, 1); 6], 0, false);
    let offers = [
        device(DeviceKind::Cuda, "cuda:0", 9000, false),
        device(DeviceKind::Cuda, "cuda:1", 9000, false),
        device(DeviceKind::Cpu, "cpu", 9000, false),
    ];
    let plan = |map: &str| {
        let split: Split = map.parse()?;
        solve(&problem(&profile, &offers, &split)).map_err(|e| e.to_string())
    };
    let balanced = solve(&problem(&profile, &offers, &Split::Balanced)).unwrap();
    let again = plan(&serde_json::to_string(&balanced.hf_device_map).unwrap()).unwrap();
    assert_eq!(again, balanced);
    let mixed =
        plan(r#"{"": 1, "embed": "cuda:0", "layers.0": 0, "layers.5": "cpu", "lm_head": "cpu"}"#).unwrap();
    let stages: Vec<_> =
        mixed.replicas[0].stages.iter().map(|s| (s.device.as_str(), s.layers.len())).collect();
    assert_eq!(stages, [("cuda:0", 1), ("cuda:1", 4), ("cpu", 1)]);
    for (map, says) in [
        (r#"{"layers": 0}"#, "\"embed\" is given no device"),
        (r#"{"": 0, "layers.1": 1}"#, "contiguous"),
        (r#"{"": 0, "lm_head": 1}"#, "norm and head with the last"),
        (r#"{"": 7}"#, "no device 7"),
        (r#"{"": "disk"}"#, "disk"),
        (r#"{"": "tpu"}"#, "unknown"),
        (r#"{"": [1]}"#, "device map"),
    ] {
        let error = plan(map).unwrap_err();
        assert!(error.contains(says), "{map}: {error:?} does not say {says:?}");
    }
}

#[test]
fn a_cache_of_any_size_is_refused_not_overflowed() {
    let profile = profile(&[(100, 1); 6], 0, false);
    let offers = [device(DeviceKind::Cpu, "cpu", 1 << 30, true)];
    for split in [Split::Auto, Split::Sequential, Split::Counts(vec![6])] {
        let problem = Problem { kv_tokens: Some(u64::MAX), ..problem(&profile, &offers, &split) };
        assert!(solve(&problem).is_err(), "{split}");
    }
}

#[test]
fn a_plan_over_a_disk_says_so_and_is_slow() {
    let gb = 1_000_000_000;
    let profile = profile(&[(gb, 1); 80], 0, false);
    let mut cpu = device(DeviceKind::Cpu, "cpu", 20 * gb, false);
    cpu.device.bytes_per_second = 1e11;
    let free = vec![cpu.clone()];
    let error = solve(&problem(&profile, &free, &Split::Auto)).unwrap_err().to_string();
    assert!(error.contains("are missing"), "{error}");
    cpu.device.spill_bytes = 100 * gb;
    cpu.device.spill_directory = "/spill".into();
    for split in [Split::Auto, Split::Balanced, Split::Sequential, Split::Counts(vec![80])] {
        let offers = [cpu.clone()];
        let given = Problem { kv_tokens: None, ..problem(&profile, &offers, &split) };
        let plan = solve(&given).unwrap();
        let replica = &plan.replicas[0];
        assert!(replica.stages[0].mapped);
        assert_eq!(replica.kv_capacity_tokens, 32, "the smallest cache");
        assert_eq!(
            plan.warnings,
            [
                "the weights of cpu on w (74.5 GiB) do not fit into the memory that is free (18.6 GiB): they stay \
              memory-mapped in /spill and are read from disk in every step; expect seconds per token"
            ]
        );
        // 60 GB at 1 GB/s, and 80 GB at 100 GB/s.
        assert!((replica.forecast.single * 60.8 - 1.0).abs() < 1e-3, "{:?}", replica.forecast);
        assert_eq!(Plan::try_from(strata_proto::v1::Plan::from(&plan)).unwrap(), plan);
        let json = serde_json::to_value(&plan).unwrap();
        assert_eq!(json["replicas"][0]["stages"][0]["mapped"], true);
        assert!(json["warnings"][0].as_str().unwrap().contains("/spill"));
    }
    // A GPU takes what it holds.
    let offers = [device(DeviceKind::Cuda, "cuda:0", 30 * gb, false), cpu];
    let plan = solve(&problem(&profile, &offers, &Split::Auto)).unwrap();
    let mapped: Vec<_> =
        plan.replicas[0].stages.iter().map(|s| (s.device.as_str(), s.mapped, s.layers.len())).collect();
    assert_eq!(mapped, [("cpu", true, 51), ("cuda:0", false, 29)]);
    assert_eq!(plan.offload.unwrap().layers, 51);
}

/// Devices of a kind, one per worker, with `bytes` each.
fn workers(count: usize, kind: DeviceKind, bytes: u64) -> Vec<Offer> {
    let offer =
        |i| Offer { worker: format!("w{i}"), host: format!("host {i}"), ..device(kind, "d", bytes, true) };
    (0..count).map(offer).collect()
}

#[test]
fn forecasts_follow_the_cost_model() {
    // Layers of 1000 bytes and 250 multiply-adds: on these devices memory and arithmetic take 1 ms and 0.5 ms a row.
    let profile = profile(&[(1000, 250); 4], 0, false);
    let (mut offers, split) = (workers(2, DeviceKind::Cuda, 1 << 20), Split::Balanced);
    for offer in &mut offers {
        offer.device.flops_per_second = 1e6;
    }
    let given = |kv_tokens, max_step_rows| Problem {
        kv_tokens: Some(kv_tokens),
        max_step_rows,
        ..problem(&profile, &offers, &split)
    };
    let layer = |rows: f64| (1000.0f64 / 1e6).max(500.0 * rows / 1e6) + rows * 4.0 * 4.0 * 16.0 / 1e6 + 30e-6;
    let lookup = 8.0 * 4.0 / 1e6;
    let stage = |rows: f64| [2.0 * layer(rows) + rows * lookup, 2.0 * layer(rows) + 8.0 / 1e6];
    let hop = |rows: f64| 100e-6 + rows * 8.0 * 4.0 / 1.25e9;
    let whole = |rows: f64| stage(rows).iter().sum::<f64>() + hop(rows) + 100e-6;
    let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{a}, not {b}");

    let one = solve(&given(32, 100)).unwrap().replicas[0].forecast;
    near(one.single, 1.0 / whole(1.0));
    assert_eq!(one.batch, 1);
    near(one.full, one.single);
    // A cache for 24 contexts: eight rows in each of three micro-batches, which keep both stages busy.
    let many = solve(&given(24 * 32, 100)).unwrap().replicas[0].forecast;
    assert_eq!(many.batch, 24);
    near(many.full, 8.0 / stage(8.0)[0].max(whole(8.0) / 3.0));
    assert!(many.full > many.single);
    let bounded = solve(&given(24 * 32, 2)).unwrap().replicas[0].forecast;
    assert_eq!(bounded.batch, 6, "two rows in each of three micro-batches");
}

#[test]
fn experts_are_read_only_if_chosen_and_cores_of_a_host_are_shared() {
    let mut profile = profile(&[(9000, 250); 2], 0, false);
    let expert = sized(1000);
    for layer in &mut profile.layers {
        layer.experts = Some(strata_proto::Experts { count: 8, active: 2, bytes: expert });
        layer.states = vec![LayerState::own(StateKind::PagedKv, 1)];
    }
    let offers = workers(1, DeviceKind::Cuda, 1 << 20);
    let split = Split::Auto;
    let problem = problem(&profile, &offers, &split);
    let costs = Costs::new(&problem);
    let seconds = |rows| costs.step_seconds(&problem, 0, LayerRange::new(0, 1), rows) - rows * 96e-6 - 30e-6;
    // 1000 bytes that all rows share, and 8 (1 - (1 - 2/8)^rows) experts.
    for rows in [1.0, 4.0, 30.0] {
        #[expect(clippy::disallowed_methods, reason = "what is tested does the same")]
        let bytes = 1000.0 + 8000.0 * (1.0 - 0.75f64.powf(rows));
        assert!((seconds(rows) / (bytes / 1e6).max(500.0 * rows / 1e6) - 1.0).abs() < 1e-6, "{rows}");
    }

    let profile = super::tests::profile(&[(1000, 0); 4], 0, false);
    let full = |stages_at_once, hosts: usize| {
        let mut offers = workers(4, DeviceKind::Cpu, 1 << 20);
        for (i, offer) in offers.iter_mut().enumerate() {
            offer.device.stages_at_once = stages_at_once;
            offer.host = format!("host {}", i % hosts);
        }
        let kv_tokens = Some(64 * 32);
        solve(&Problem { kv_tokens, ..super::tests::problem(&profile, &offers, &Split::Balanced) })
            .unwrap()
            .replicas[0]
            .forecast
            .full
    };
    let alone = full(1, 4);
    assert!((alone / full(4, 1) - 1.0).abs() < 1e-9, "as many cores as stages");
    assert!((3.0..4.2).contains(&(alone / full(1, 1))), "four stages on one core");
}

#[test]
fn devices_that_are_left_over_become_replicas() {
    let profile = profile(&[(1000, 1); 4], 0, false);
    let plan = |offers: &[Offer], split: &Split| solve(&problem(&profile, offers, split)).unwrap();
    let names = |plan: &Plan| -> Vec<Vec<String>> {
        let stages = |r: &Replica| r.stages.iter().map(|s| format!("{} {}", s.worker, s.layers)).collect();
        plan.replicas.iter().map(stages).collect()
    };
    // Each device holds half of the model and its cache.
    let mut offers = workers(5, DeviceKind::Cuda, 3300);
    let auto = plan(&offers, &Split::Auto);
    assert_eq!(names(&auto), [["w0 0..2", "w1 2..4"], ["w2 0..2", "w3 2..4"]], "the fifth is left over");
    assert!(auto.replicas.iter().all(|r| r.kv_capacity_tokens == auto.replicas[0].kv_capacity_tokens));
    assert_eq!(plan(&offers, &Split::Balanced).replicas.len(), 1);
    // One that holds all becomes a copy of its own, between others too small for anything.
    offers.insert(3, device(DeviceKind::Cuda, "large", 1 << 20, false));
    offers.insert(1, device(DeviceKind::Cuda, "tiny", 10, false));
    let auto = names(&plan(&offers, &Split::Auto));
    assert_eq!(auto, [vec!["w 0..4"], vec!["w0 0..2", "w1 2..4"], vec!["w2 0..2", "w3 2..4"]]);
    // Processors that nobody capped are for what fits nowhere else.
    let mut cpus = workers(3, DeviceKind::Cpu, 1 << 20);
    cpus.iter_mut().for_each(|offer| offer.device.capped = false);
    assert_eq!(plan(&cpus, &Split::Auto).replicas.len(), 1);
    assert_eq!(plan(&workers(3, DeviceKind::Cpu, 1 << 20), &Split::Auto).replicas.len(), 3);
    assert_eq!(plan(&workers(100, DeviceKind::Cuda, 1 << 20), &Split::Auto).replicas.len(), MAX_REPLICAS);
}

#[test]
fn a_spare_takes_the_place_of_what_is_gone_and_the_others_keep_theirs() {
    let profile = profile(&[(1000, 1); 4], 0, false);
    let split = Split::Counts(vec![1, 2, 1]);
    let offers = workers(6, DeviceKind::Cuda, 3300);
    let old = solve(&problem(&profile, &offers[..3], &split)).unwrap().replicas.remove(0);
    let replaced = |offers: &[Offer], holds: &str| {
        let holds =
            |offer: &Offer, layers: LayerRange| offer.worker == holds && layers == LayerRange::new(1, 3);
        let plan = replace(&problem(&profile, offers, &split), &old, &holds)?;
        assert_eq!(plan.replicas[0].kv_capacity_tokens, old.kv_capacity_tokens);
        Some(plan.replicas[0].stages.iter().map(|s| format!("{} {}", s.worker, s.layers)).collect::<Vec<_>>())
    };
    let without = |gone: &[usize]| -> Vec<Offer> {
        (0..6).filter(|i| !gone.contains(i)).map(|i| offers[i].clone()).collect()
    };
    assert_eq!(replaced(&offers, "").unwrap(), ["w0 0..1", "w1 1..3", "w2 3..4"]);
    assert_eq!(replaced(&without(&[1]), "").unwrap(), ["w0 0..1", "w3 1..3", "w2 3..4"]);
    assert_eq!(
        replaced(&without(&[1]), "w5").unwrap(),
        ["w0 0..1", "w5 1..3", "w2 3..4"],
        "it has the weights"
    );
    assert_eq!(replaced(&without(&[1, 2]), "w5").unwrap(), ["w0 0..1", "w5 1..3", "w3 3..4"]);
    assert_eq!(replaced(&without(&[1, 3, 4, 5]), ""), None, "nobody is left");
    // Neither one that has no room, nor one that would compute other bits.
    let mut others = without(&[1, 4, 5]);
    others[2].device.budget_bytes = 1000;
    assert_eq!(replaced(&others, ""), None);
    others[2].device.budget_bytes = 3300;
    others[2].device.numerics = "other kernels".into();
    assert_eq!(replaced(&others, ""), None);
}

#[test]
fn states_are_counted_by_kind_and_shared_ones_once() {
    let mut profile = profile(&[(100, 1); 6], 0, false);
    let encoder = Stack { layers: LayerRange::new(0, 2), whole_input: true, positions: 10 };
    profile.stacks =
        vec![encoder, Stack { layers: LayerRange::new(2, 6), whole_input: false, positions: 32 }];
    let paged = LayerState::own(StateKind::PagedKv, 4);
    let states = [
        vec![],
        vec![],
        vec![paged, LayerState::own(StateKind::CrossKv, 5)],
        vec![LayerState::own(StateKind::Recurrent, 7)],
        vec![paged],
        vec![LayerState { shares: Some(4), ..paged }],
    ];
    profile.layers.iter_mut().zip(states).for_each(|(module, states)| module.states = states);
    let offers = workers(2, DeviceKind::Cuda, 1 << 20);
    // Two blocks of 16 positions, three sequences, an encoder of 10 positions, four bytes each.
    let plan = solve(&problem(&profile, &offers, &Split::Counts(vec![3, 3]))).unwrap();
    let replica = &plan.replicas[0];
    assert_eq!((replica.kv_capacity_tokens, replica.state_slots), (32, 3));
    let bytes: Vec<_> = replica.stages.iter().map(|s| s.states).collect();
    let first = StateBytes { paged_kv: 4 * 4 * 32, recurrent: 0, cross_kv: 5 * 4 * 3 * 10 };
    assert_eq!(bytes, [first, StateBytes { paged_kv: 4 * 4 * 32, recurrent: 7 * 4 * 3, cross_kv: 0 }]);
    assert_eq!(Plan::try_from(strata_proto::v1::Plan::from(&plan)).unwrap(), plan);
    let json = serde_json::to_value(&replica.stages[1]).unwrap();
    assert_eq!(
        (&json["kv_bytes"], &json["recurrent_bytes"], &json["cross_kv_bytes"]),
        (&512.into(), &84.into(), &0.into())
    );
    // They are a part of what has to fit.
    let least = replica.stages.iter().map(StagePlan::total_bytes).max().unwrap();
    let with =
        |bytes| solve(&problem(&profile, &workers(2, DeviceKind::Cuda, bytes), &Split::Counts(vec![3, 3])));
    assert!(with(least).is_ok() && with(least - 1).is_err());
    // Without pages, sequences are bounded by their states alone.
    profile.layers.iter_mut().for_each(|m| m.states = vec![LayerState::own(StateKind::Recurrent, 7)]);
    let plan = solve(&problem(&profile, &offers, &Split::Auto)).unwrap();
    let replica = &plan.replicas[0];
    assert_eq!((replica.kv_capacity_tokens, replica.state_slots, replica.forecast.batch), (0, 3, 2));
}

#[test]
fn layers_that_share_a_state_are_never_apart() {
    let mut profile = profile(&[(100, 1); 6], 0, false);
    // Layers 2 and 4 use what layer 1 keeps: nothing from 1 to 4 may be cut.
    for layer in [2, 4] {
        profile.layers[layer].states[0].shares = Some(1);
    }
    let gpu = |n: usize| device(DeviceKind::Cuda, &format!("cuda:{n}"), 2100, false);
    let offers = [gpu(0), gpu(1), device(DeviceKind::Cpu, "cpu", 1 << 20, false)];
    let plan = |split: &str| {
        let split: Split = split.parse()?;
        solve(&problem(&profile, &offers, &split)).map_err(|e| e.to_string())
    };
    for split in ["auto", "balanced", "balanced_low_0", "sequential"] {
        let plan = plan(split).unwrap();
        let ends: Vec<_> = plan.replicas[0].stages.iter().map(|s| s.layers.end).collect();
        assert!(ends.iter().all(|end| [1, 5, 6].contains(end)), "{split}: {ends:?}");
    }
    let error = "layers 1 and 2 cannot be on two devices: layer 2 uses the keys and values of layer 1; end the stage \
                 before layer 1 or behind layer 2";
    assert_eq!(plan("2,4").unwrap_err(), error);
    assert_eq!(
        plan(r#"{"": 0, "layers.2": 1, "layers.3": 1, "layers.4": 1, "layers.5": 1, "lm_head": 1}"#)
            .unwrap_err(),
        error
    );
    let error = plan(r#"{"": 0, "layers.4": 1, "layers.5": 1, "lm_head": 1}"#).unwrap_err();
    assert!(error.contains("layers 1 and 4") && error.contains("behind layer 4"), "{error}");
    assert!(plan(r#"{"": 0, "layers.5": 1, "lm_head": 1}"#).is_ok());
    // The first three of them would fit, but what spills, spills together.
    let tight =
        [device(DeviceKind::Cuda, "cuda:0", 2000, false), device(DeviceKind::Cpu, "cpu", 1 << 20, false)];
    let plan = solve(&problem(&profile, &tight, &Split::Auto)).unwrap();
    assert_eq!(
        (stages(&plan), plan.offload.unwrap().layers),
        (vec!["w/cuda:0 0..1".into(), "w/cpu 1..6".into()], 5)
    );
}
