//! What is fuzzed, by name.

use std::{fs, path::PathBuf};

use prost::Message;
use strata_coordinator::{
    fuzzing::{self, Reader},
    planner::{Offer, Problem, Split, solve},
};
use strata_proto::{DType, Device, Files, ModelProfile, v1};
use strata_worker::{Checkpoint, model};

/// Takes any bytes, and panics only if something is wrong with Strata.
pub type Target = Box<dyn Fn(&[u8]) + Send + Sync>;

/// Where models lie.
pub const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models");

/// The target of a name.
///
/// # Panics
/// If there is none, or the models are not there.
pub fn open(name: &str) -> Target {
    match name {
        "frames" => Box::new(strata_worker::fuzzing::frame),
        "headers" => Box::new(strata_worker::fuzzing::header),
        "gguf" => Box::new(strata_worker::fuzzing::gguf),
        "config" => {
            let weights = weights();
            Box::new(move |data| strata_worker::fuzzing::config(data, &weights))
        }
        "tokenizer" => Box::new(fuzzing::tokenizer),
        "template" => Box::new(fuzzing::template),
        "generate" => {
            let (reader, profile) = model("shakespeare");
            let run = move |request| fuzzing::generate(request, &reader, &profile);
            Box::new(move |data| drop(v1::GenerateRequest::decode(data).map(&run)))
        }
        "encode" => {
            let (reader, profile) = model("bert-mlm-old-bf16");
            let run = move |request| fuzzing::encode(request, &reader, &profile);
            Box::new(move |data| drop(v1::FillMaskRequest::decode(data).map(&run)))
        }
        "split" => {
            let (_, profile) = model("shakespeare");
            let offers = offers();
            Box::new(move |data| split(data, &offers, &profile))
        }
        name => panic!("FUZZ_TARGET is {name:?}: expected one that tests/fuzz/run lists"),
    }
}

/// Weights in a directory of their own, where a `config.json` can be written beside them.
fn weights() -> Checkpoint {
    let directory = std::env::temp_dir().join("strata-fuzz");
    // A run before may have left a configuration there.
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).expect("a temporary directory");
    let file = "model.safetensors";
    fs::copy(PathBuf::from(MODELS).join("llama-bias-f32").join(file), directory.join(file)).expect("a model");
    Checkpoint::open(&directory).expect("the model is whole")
}

/// The tokenizer and the description of a model of the tests.
fn model(name: &str) -> (Reader, ModelProfile) {
    let directory = PathBuf::from(MODELS).join(name);
    let read = |file: &str| fs::read(directory.join(file)).ok().map(|data| (file.to_owned(), data));
    let files = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
    let files = files.into_iter().filter_map(read).collect::<Files>();
    let reader = Reader::new(&files).expect("the model has a tokenizer");
    (reader, model::describe(&directory, name).expect("the model is whole"))
}

/// Two GPUs and two processors.
fn offers() -> Vec<Offer> {
    let device = |(id, kind): (&str, v1::DeviceKind)| {
        let device = v1::Device {
            id: id.to_owned(),
            kind: kind.into(),
            budget_bytes: 4 << 20,
            total_bytes: 4 << 20,
            bytes_per_second: 1e11,
            flops_per_second: 1e12,
            ..v1::Device::default()
        };
        let device = Device::try_from(device).expect("a device as a worker describes it");
        Offer { worker: format!("worker of {id}"), host: "host".to_owned(), device }
    };
    let kinds = [v1::DeviceKind::Cuda, v1::DeviceKind::Cuda, v1::DeviceKind::Cpu, v1::DeviceKind::Cpu];
    ["cuda:0", "cuda:1", "cpu", "cpu:1"].into_iter().zip(kinds).map(device).collect()
}

/// A split, device maps among them: it is refused, or places every layer once.
fn split(data: &[u8], offers: &[Offer], profile: &ModelProfile) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(split) = text.parse::<Split>() else { return };
    let problem = Problem {
        profile,
        offers,
        split: &split,
        dtype: DType::BF16,
        quantization: None,
        kv_tokens: None,
        max_step_tokens: 64,
        max_step_rows: 8,
        state_slots: 8,
    };
    let Ok(plan) = solve(&problem) else { return };
    for replica in &plan.replicas {
        let mut next = 0;
        for stage in &replica.stages {
            assert_eq!(stage.layers.first, next, "a hole or an overlap");
            next = stage.layers.end;
        }
        assert_eq!(next, profile.layer_count());
    }
}
