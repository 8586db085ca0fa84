//! Whole models against transformers, and against themselves under every split, chunking and batch.

mod bind;
mod digests;
mod encoders;
mod gguf;
mod invariance;
mod mutations;
mod refusals;
mod sentences;
mod sharing;

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use serde_json::Value;
use strata_proto::{DType, LayerRange, LayerState, Quantization, StateKind, StateRoom};

use super::*;
use crate::{
    engine::{
        Input, Output, StepError, Values,
        cpu::{State, Weights},
    },
    kernels::cpu::{Cpu, isa::Isa, pool::Pool},
    transport::Tensors,
};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models")
}

/// How a model is held and computed.
#[derive(Debug, Clone, Copy)]
struct Way {
    dtype: DType,
    quantization: Option<Quantization>,
    isa: Isa,
}

impl Way {
    fn new(dtype: DType) -> Way {
        Way { dtype, quantization: None, isa: Isa::detect() }
    }

    /// Every format on every instruction set.
    fn all() -> Vec<Way> {
        let formats = DType::ALL.map(|dtype| (dtype, None));
        let quantized = [(DType::F32, Some(Quantization::Int8)), (DType::BF16, Some(Quantization::Int4))];
        let ways = formats.into_iter().chain(quantized).flat_map(|(dtype, quantization)| {
            Isa::available().into_iter().map(move |isa| Way { dtype, quantization, isa })
        });
        ways.collect()
    }

    fn cpu(self) -> Cpu {
        Cpu::new(self.isa, Pool::new(2).into())
    }
}

fn spec(model: &Model, first: u32, end: u32, Way { dtype, quantization, .. }: Way) -> RangeSpec {
    let head = end as usize == model.tower.layers.len();
    RangeSpec { layers: LayerRange::new(first, end), embedding: first == 0, head, dtype, quantization }
}

fn load(checkpoint: &Checkpoint, model: &Model, spec: &RangeSpec) -> Weights {
    Weights::load(checkpoint, model, spec, &Cpu::on(Isa::detect()), &mut |_| ControlFlow::Continue(()))
        .unwrap()
}

/// Stages that hold a model together, and the blocks of one sequence (in the given order).
struct Pipeline {
    stages: Vec<(Weights, State)>,
    blocks: Vec<u32>,
    /// Sequences longer than this turn otherwise.
    switch: usize,
}

impl Pipeline {
    fn new(dir: &Path, cuts: &[u32], way: Way) -> Self {
        let (checkpoint, model) = Model::open_dir(dir).unwrap();
        Self::of(&checkpoint, &model, cuts, way)
    }

    fn of(checkpoint: &Checkpoint, model: &Model, cuts: &[u32], way: Way) -> Self {
        let ends: Vec<u32> = cuts.iter().copied().chain([model.tower.layers.len() as u32]).collect();
        let firsts = [0].iter().chain(cuts);
        let blocks = model.tower.context.div_ceil(BLOCK_TOKENS) as u32;
        let stages = firsts.zip(&ends).map(|(&first, &end)| {
            let spec = spec(model, first, end, way);
            let mut state = State::new(model, &spec, blocks, 512, 512, way.cpu()).unwrap();
            // Whatever was never written must not matter.
            state.poison();
            (load(checkpoint, model, &spec), state)
        });
        let switch = model.tower.ropes.iter().find_map(|r| r.switch).unwrap_or(usize::MAX);
        Pipeline { stages: stages.collect(), blocks: (0..blocks).collect(), switch }
    }

    /// What the last stage yields of `rows` for `outputs`.
    fn run(&mut self, rows: &[BatchRow<'_>], ids: &[u32], segments: &[u32], outputs: &[u32]) -> Vec<f32> {
        let mut hidden: Option<Tensors> = None;
        for (weights, state) in &mut self.stages {
            let input = hidden.take().map_or(Input::Tokens { ids, segments }, Input::Hidden);
            match state.forward(weights, rows, input, outputs).unwrap() {
                Output::Hidden(out) => hidden = Some(out),
                Output::Values(Values { values, .. }) => return values.to_vec(),
            }
        }
        panic!("no stage has the head");
    }

    /// Logits of the last of the tokens `ids`, those from `cached` on computed in chunks.
    fn step(&mut self, ids: &[u32], cached: usize, chunk: usize) -> Vec<f32> {
        let (mut at, mut logits) = (cached, Vec::new());
        let rope_set = u32::from(ids.len() > self.switch);
        for part in ids[cached..].chunks(chunk) {
            let blocks = self.blocks.clone();
            let row = BatchRow { start: at as u32, count: part.len() as u32, blocks: &blocks, rope_set };
            logits = self.run(&[row], part, &[], &[part.len() as u32 - 1]);
            at += part.len();
        }
        logits
    }

    /// The prompt in chunks, then greedy tokens: logits of the prompt's last token, and the tokens.
    fn generate(&mut self, prompt: &[u32], chunk: usize, tokens: usize) -> (Vec<f32>, Vec<u32>) {
        let mut logits = self.step(prompt, 0, chunk);
        let (first, mut ids) = (logits.clone(), prompt.to_vec());
        while ids.len() < prompt.len() + tokens {
            let best = logits.iter().enumerate().fold(0, |b, (i, x)| if *x > logits[b] { i } else { b });
            ids.push(best as u32);
            if ids.len() < prompt.len() + tokens {
                // One token past the switch, all that was cached has turned by the wrong angles.
                let cached = if ids.len() - 1 == self.switch { 0 } else { ids.len() - 1 };
                logits = self.step(&ids, cached, chunk);
            }
        }
        (first, ids.split_off(prompt.len()))
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).iter().map(|x| *x as u32).collect()
}

#[test]
fn every_fixture_matches_transformers_in_float32() {
    let mut checked = 0;
    for dir in fs::read_dir(models()).unwrap() {
        let dir = dir.unwrap().path();
        let Ok(expected) = fs::read_to_string(dir.join("expected.json")) else { continue };
        let expected: Value = serde_json::from_str(&expected).unwrap();
        let Some(prompts) = expected["prompts"].as_array() else { continue };
        for isa in Isa::available() {
            let mut pipeline = Pipeline::new(&dir, &[], Way { isa, ..Way::new(DType::F32) });
            for prompt in prompts {
                let (prompt_ids, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy_ids"]));
                let (logits, answer) = pipeline.generate(&prompt_ids, 64, greedy.len());
                let row = numbers(&prompt["last_row"]);
                assert_eq!(logits.len(), row.len());
                let differences = logits.iter().zip(&row).map(|(a, b)| (f64::from(*a) - b).abs());
                let worst = differences.fold(0.0, f64::max);
                println!("{}: {} ids, worst logit off by {worst:.2e}", dir.display(), prompt_ids.len());
                assert!(worst < 1e-3, "{} {}: {worst}", dir.display(), isa.name());
                assert_eq!(answer, greedy, "{} {}", dir.display(), isa.name());
                checked += 1;
            }
        }
    }
    assert!(checked >= 70);
}

#[test]
fn the_profile_says_exactly_what_is_allocated() {
    for dir in fs::read_dir(models()).unwrap() {
        let dir = dir.unwrap().path();
        if !dir.join("config.json").exists() {
            continue;
        }
        let (checkpoint, model) = Model::open_dir(&dir).unwrap();
        let profile = model.profile(&checkpoint, "m");
        assert_eq!(profile, describe(&dir, "m").unwrap());
        let count = profile.layer_count();
        for way in Way::all().into_iter().filter(|way| way.isa == Isa::detect()) {
            for first in 0..count {
                for end in first + 1..=count {
                    let spec = spec(&model, first, end, way);
                    let weights = load(&checkpoint, &model, &spec);
                    let expected = profile.weight_bytes(spec.layers, spec.format());
                    assert_eq!(weights.resident_bytes(), expected, "{spec:?}");
                    let state = State::new(&model, &spec, 3, 13, 5, way.cpu()).unwrap();
                    let room = StateRoom { positions: 3 * BLOCK_TOKENS as u64, slots: 0 };
                    let states = profile.state_bytes(spec.layers, way.dtype, room);
                    assert_eq!(state.kv_bytes(), states.total());
                    assert_eq!(state.workspace_bytes(), profile.workspace_bytes(spec.layers, 13, 5));
                }
            }
        }
    }
}

#[test]
fn a_range_reads_its_own_tensors_only_and_can_be_stopped() {
    let (checkpoint, model) = Model::open_dir(&models().join("shakespeare")).unwrap();
    let spec = spec(&model, 2, 4, Way::new(DType::BF16));
    let own: u64 = checkpoint
        .tensors()
        .iter()
        .filter(|(name, _)| name.starts_with("model.layers.2.") || name.starts_with("model.layers.3."))
        .map(|(_, t)| t.bytes)
        .sum();
    let count = || checkpoint.bytes_read().load(std::sync::atomic::Ordering::Relaxed);
    let before = count();
    let mut last = LoadedBytes { read: 0, total: 0 };
    let cpu = Cpu::on(Isa::detect());
    Weights::load(&checkpoint, &model, &spec, &cpu, &mut |p| {
        assert!(p.read > last.read);
        last = p;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((last, count() - before), (LoadedBytes { read: own, total: own }, own));
    let stopped = Weights::load(&checkpoint, &model, &spec, &cpu, &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(ModelError::Cancelled)));
}

#[test]
fn the_profile_of_the_fixture_is_as_expected() {
    let profile = describe(&models().join("shakespeare"), "shakespeare").unwrap();
    assert_eq!((profile.family.as_str(), profile.dtype, profile.layer_count()), ("llama", DType::BF16, 6));
    assert_eq!((profile.hidden_size, profile.vocab_size, profile.context_length), (192, 2048, 256));
    assert_eq!(profile.shared_tensors, ["model.embed_tokens.weight"]);
    assert_eq!(profile.shared.bf16, 2048 * 192 * 2);
    assert_eq!(profile.layers[3].names, ["model.layers.3"]);
    assert_eq!(profile.layers[3].states, [LayerState::own(StateKind::PagedKv, 2 * 2 * 32)]);
    assert!(profile.caches() && !profile.whole_input() && profile.source_positions() == 0);
    assert_eq!((profile.bos_token_ids, profile.eos_token_ids), (vec![0], vec![1]));
    assert_eq!(profile.pad_token_ids, [2]);
}
