//! Decoders of every family with configurations drawn at random, beside what transformers made of them: its tokens, its
//! logits within 1e-3, and the same bits over any split. `tests/models/make_random_configs.py` says how they were drawn.

use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorView};
use serde::Deserialize;
use strata_coordinator::planner::Split;
use strata_proto::v1::RowOutput;

use crate::{
    cluster::{Options, model},
    parity::{Driver, Request},
    processes::free_dir,
};

#[derive(Deserialize)]
struct Drawn {
    models: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    number: usize,
    config: serde_json::Value,
    dtype: String,
    tensors: Vec<Tensors>,
    prompts: Vec<Prompt>,
}

/// Tensors that are alike: a name with `{}` for numbers, shape, scale, offset, and the numbers of each.
#[derive(Deserialize)]
struct Tensors(String, Vec<usize>, f32, f32, Vec<Vec<u32>>);

#[derive(Deserialize)]
struct Prompt {
    ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    last_row: Vec<f32>,
}

/// FNV-1a of 64 bits.
fn fnv(text: &str) -> u64 {
    text.bytes()
        .fold(0xCBF2_9CE4_8422_2325, |value, byte| (value ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

/// Values of a tensor, as the script's `weight` makes them.
fn weight(name: &str, count: usize, scale: f32, offset: f32) -> impl Iterator<Item = f32> {
    let (seed, bits) = (fnv(name), if offset == 0.0 { 8 } else { 5 });
    (0..count).map(move |i| {
        let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        let u = (z >> (64 - bits)) as f32 / (1u32 << (bits - 1)) as f32 - 1.0;
        offset + scale * u
    })
}

fn write(case: &Case, directory: &Path) {
    std::fs::write(directory.join("config.json"), case.config.to_string()).unwrap();
    let dtype = match case.dtype.as_str() {
        "float32" => Dtype::F32,
        "bfloat16" => Dtype::BF16,
        "float16" => Dtype::F16,
        other => panic!("model {}: {other}", case.number),
    };
    let mut tensors = Vec::new();
    for Tensors(pattern, shape, scale, offset, all) in &case.tensors {
        for numbers in all {
            let name = numbers
                .iter()
                .fold(pattern.clone(), |name, number| name.replacen("{}", &number.to_string(), 1));
            let values = weight(&name, shape.iter().product(), *scale, *offset);
            let data: Vec<u8> = match dtype {
                Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
                Dtype::BF16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
                _ => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
            };
            tensors.push((name, shape.clone(), data));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, shape, data)| (name, TensorView::new(dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();
}

/// What a split answers: logits of both prompts, and the tokens that follow.
async fn answers(
    case: &Case,
    directory: &Path,
    counts: &[u32],
    chunk: usize,
) -> (Vec<Vec<f32>>, Vec<Vec<u32>>) {
    let options = Options {
        model: directory.to_owned(),
        workers: counts.len(),
        split: Split::Counts(counts.to_vec()),
        kv_tokens: Some(1024),
        ..Options::default()
    };
    let mut driver = Driver::start(&options).await;
    let request = |prompt: &Prompt, output| Request::new(&prompt.ids, chunk, prompt.greedy_ids.len(), output);
    let logits = case.prompts.iter().map(|prompt| request(prompt, RowOutput::Logits));
    let logits = driver.run(logits.collect()).await;
    let tokens = case.prompts.iter().map(|prompt| request(prompt, RowOutput::Token));
    let tokens = driver.run(tokens.collect()).await;
    let ids = |r: &Request| r.sampled.iter().map(|t| t.token_id).collect();
    (logits.into_iter().map(|r| r.logits).collect(), tokens.iter().map(ids).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn configurations_drawn_at_random_answer_as_transformers_does() {
    let text = std::fs::read_to_string(model("random_configs.json")).unwrap();
    let drawn: Drawn = serde_json::from_str(&text).unwrap();
    assert!(drawn.models.len() >= 300, "{} models", drawn.models.len());
    let folder = free_dir();
    let mut wrong = Vec::new();
    for case in &drawn.models {
        let directory = folder.path().join(format!("random-{}", case.number));
        std::fs::create_dir(&directory).unwrap();
        write(case, &directory);
        if let Some(why) = differs(case, &directory).await {
            wrong.push(format!("{} {}: {why}", case.number, case.config["model_type"]));
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), drawn.models.len(), wrong.join("\n"));
}

/// In what a model differs from transformers, if in anything.
async fn differs(case: &Case, directory: &Path) -> Option<String> {
    let profile = match strata_worker::model::describe(directory, "m") {
        Ok(profile) => profile,
        Err(error) => return Some(error.to_string()),
    };
    let layers = profile.layer_count();
    let (logits, tokens) = answers(case, directory, &[layers], usize::MAX).await;
    for ((prompt, logits), tokens) in case.prompts.iter().zip(&logits).zip(&tokens) {
        let distances = prompt.last_row.iter().zip(logits).map(|(a, b)| (a - b).abs());
        let worst = distances.fold(0.0, f32::max);
        if worst >= 1e-3 || logits.len() != prompt.last_row.len() {
            return Some(format!("logits of {} tokens differ by {worst}", prompt.ids.len()));
        }
        if *tokens != prompt.greedy_ids {
            return Some(format!("greedy ids after {} tokens", prompt.ids.len()));
        }
    }
    let every = vec![1; layers as usize];
    let again = answers(case, directory, &every, 7).await;
    (again != (logits, tokens)).then(|| format!("other bits over {layers} stages in chunks of 7"))
}
