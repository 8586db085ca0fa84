//! What packing is worth: an encoder of MiniLM's shape over inputs of mixed lengths, packed as Strata does, and padded
//! to the longest as a rectangular batch would be.
//!
//! `cargo bench -p strata-worker --bench packing` prints medians of interleaved runs.

use std::{ops::ControlFlow, path::Path, time::Instant};

use serde_json::json;
use strata_proto::{DType, LayerRange};
use strata_worker::{
    device::Compute,
    engine::{
        Input, Output,
        cpu::{State, Weights},
    },
    model::{BatchRow, Model, RangeSpec},
};

const LAYERS: usize = 6;
const WIDTH: usize = 384;
const INNER: usize = 1536;
const VOCAB: usize = 2000;
const INPUTS: usize = 32;
const LONGEST: usize = 256;
const RUNS: usize = 9;

fn main() {
    let dir = tempfile::tempdir().expect("a directory for the model");
    write_model(dir.path());
    let (checkpoint, model) = Model::open_dir(dir.path()).expect("the model that was just written");
    let layers = LayerRange::new(0, LAYERS as u32);
    let spec = RangeSpec { layers, embedding: true, head: true, dtype: DType::F32, quantization: None };
    let cpu = Compute::shared_by(1).cpu();
    let weights =
        Weights::load(&checkpoint, &model, &spec, &cpu, &mut |_| ControlFlow::Continue(())).expect("loading");
    let mut state =
        State::new(&model, &spec, 0, (INPUTS * LONGEST) as u32, INPUTS as u32, Compute::shared_by(1).cpu())
            .expect("memory");
    // Lengths as sentences have them: many short, few long.
    let lengths: Vec<usize> = (0..INPUTS)
        .map(|i| (8.0 * (LONGEST as f64 / 8.0).powf((i * 7 % INPUTS) as f64 / (INPUTS - 1) as f64)) as usize)
        .collect();
    let padded = vec![LONGEST; INPUTS];
    let mut run = |lengths: &[usize]| {
        let rows: Vec<BatchRow<'_>> = lengths
            .iter()
            .map(|n| BatchRow { start: 0, count: *n as u32, blocks: &[], rope_set: 0 })
            .collect();
        let tokens: usize = lengths.iter().sum();
        let ids: Vec<u32> = (0..tokens).map(|i| (i * 31 % VOCAB) as u32).collect();
        let mut first = 0;
        let outputs: Vec<u32> = lengths
            .iter()
            .map(|n| {
                first += n;
                (first - n) as u32
            })
            .collect();
        let begun = Instant::now();
        let out = state.forward(&weights, &rows, Input::Tokens { ids: &ids, segments: &[] }, &outputs);
        assert!(matches!(out, Ok(Output::Values(_))));
        begun.elapsed().as_secs_f64()
    };
    let (mut packed_times, mut padded_times) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        packed_times.push(run(&lengths));
        padded_times.push(run(&padded));
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[RUNS / 2]
    };
    let (packed, rectangular) = (median(&mut packed_times), median(&mut padded_times));
    let tokens: usize = lengths.iter().sum();
    println!(
        "{INPUTS} inputs of 8 to {LONGEST} tokens, {tokens} in all; padded they are {}",
        INPUTS * LONGEST
    );
    println!("packed: {:.0} ms, padded: {:.0} ms", packed * 1e3, rectangular * 1e3);
    println!(
        "packed takes {:.2} of the padded time for {:.2} of its tokens",
        packed / rectangular,
        tokens as f64 / (INPUTS * LONGEST) as f64
    );
}

/// A BERT with weights of no meaning.
fn write_model(dir: &Path) {
    let config = json!({"model_type": "bert", "architectures": ["BertModel"], "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": 12, "intermediate_size": INNER, "vocab_size": VOCAB, "max_position_embeddings": 512,
        "type_vocab_size": 2, "hidden_act": "gelu"});
    std::fs::write(dir.join("config.json"), config.to_string()).expect("writing config.json");
    let mut tensors = vec![
        ("embeddings.word_embeddings.weight".to_owned(), vec![VOCAB, WIDTH]),
        ("embeddings.position_embeddings.weight".to_owned(), vec![512, WIDTH]),
        ("embeddings.token_type_embeddings.weight".to_owned(), vec![2, WIDTH]),
        ("embeddings.LayerNorm.weight".to_owned(), vec![WIDTH]),
    ];
    for layer in 0..LAYERS {
        for (name, n, k) in [
            ("attention.self.query", WIDTH, WIDTH),
            ("attention.self.key", WIDTH, WIDTH),
            ("attention.self.value", WIDTH, WIDTH),
            ("attention.output.dense", WIDTH, WIDTH),
            ("intermediate.dense", INNER, WIDTH),
            ("output.dense", WIDTH, INNER),
        ] {
            tensors.push((format!("encoder.layer.{layer}.{name}.weight"), vec![n, k]));
        }
        for name in ["attention.output.LayerNorm", "output.LayerNorm"] {
            tensors.push((format!("encoder.layer.{layer}.{name}.weight"), vec![WIDTH]));
        }
    }
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    for (name, shape) in tensors {
        let begin = data.len();
        let count: usize = shape.iter().product();
        data.extend(
            (0..count).flat_map(|i| (((i * 2_654_435_761 % 1000) as f32 - 500.0) * 1e-4).to_le_bytes()),
        );
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]}));
    }
    let header = serde_json::Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(dir.join("model.safetensors"), file).expect("writing model.safetensors");
}
