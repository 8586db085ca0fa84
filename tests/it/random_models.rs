//! Models of every family with configurations drawn at random, beside what transformers made of them: its tokens, its logits
//! within 1e-3, and the same bits over any split. `tests/models/make_random_configs.py` says how they were drawn.

use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorView};
use serde::Deserialize;
use strata_coordinator::{StartError, planner::Split};
use strata_proto::v1::{self, Input, RowOutput};

use crate::{
    cluster::{Cluster, Options, model},
    parity::{Driver, Request},
    processes::free_dir,
};

#[derive(Deserialize)]
struct Drawn {
    models: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    family: String,
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
    /// None of an encoder.
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
        other => panic!("{} {}: {other}", case.family, case.number),
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

fn options(directory: &Path, counts: &[u32]) -> Options {
    Options {
        model: directory.to_owned(),
        workers: counts.len(),
        split: Split::Counts(counts.to_vec()),
        kv_tokens: Some(1024),
        ..Options::default()
    }
}

/// What a split answers: logits of both prompts, and the tokens that follow.
type Answers = (Vec<Vec<f32>>, Vec<Vec<u32>>);

async fn generated(case: &Case, options: &Options, chunk: usize) -> Answers {
    let mut driver = Driver::start(options).await;
    let request = |prompt: &Prompt, output| Request::new(&prompt.ids, chunk, prompt.greedy_ids.len(), output);
    let logits = case.prompts.iter().map(|prompt| request(prompt, RowOutput::Logits));
    let logits = driver.run(logits.collect()).await;
    let tokens = case.prompts.iter().map(|prompt| request(prompt, RowOutput::Token));
    let tokens = driver.run(tokens.collect()).await;
    let ids = |r: &Request| r.sampled.iter().map(|t| t.token_id).collect();
    (logits.into_iter().map(|r| r.logits).collect(), tokens.iter().map(ids).collect())
}

/// The same of an encoder: logits of classes.
async fn classified(case: &Case, options: &Options) -> Result<Answers, StartError> {
    let cluster = Cluster::try_start(options).await?;
    let input = |prompt: &Prompt| Input { token_ids: prompt.ids.clone(), ..Input::default() };
    let inputs = case.prompts.iter().map(input).collect();
    let request = v1::ClassifyRequest { inputs, ..Default::default() };
    let answer = cluster.client().await.classify(request).await.unwrap().into_inner();
    let logits = answer.results.into_iter().map(|mut result| {
        result.classes.sort_by_key(|class| class.index);
        result.classes.iter().map(|class| class.logit).collect()
    });
    Ok((logits.collect(), vec![Vec::new(); case.prompts.len()]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn configurations_drawn_at_random_answer_as_transformers_does() {
    let text = std::fs::read_to_string(model("random_configs.json")).unwrap();
    let drawn: Drawn = serde_json::from_str(&text).unwrap();
    assert!(drawn.models.len() >= 300, "{} models", drawn.models.len());
    let folder = free_dir();
    let mut wrong = Vec::new();
    for case in &drawn.models {
        let directory = folder.path().join(format!("{}-{}", case.family, case.number));
        std::fs::create_dir(&directory).unwrap();
        write(case, &directory);
        if let Some(why) = differs(case, &directory).await {
            wrong.push(format!("{} {}: {why}", case.family, case.number));
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
    let every = vec![1; layers as usize];
    let (whole, split) = (options(directory, &[layers]), options(directory, &every));
    let (first, again) = if case.prompts[0].greedy_ids.is_empty() {
        // It is asked as clients do, and so has a tokenizer of its family's kind.
        let tokenizer = match profile.tokenizers.iter().any(|kind| kind == "WordPiece") {
            true => "bert-classify-f32",
            false => "roberta-mlm-f16",
        };
        std::fs::copy(model(tokenizer).join("tokenizer.json"), directory.join("tokenizer.json")).unwrap();
        match (classified(case, &whole).await, classified(case, &split).await) {
            (Ok(first), Ok(again)) => (first, again),
            (Err(error), _) | (_, Err(error)) => return Some(error.to_string()),
        }
    } else {
        (generated(case, &whole, usize::MAX).await, generated(case, &split, 7).await)
    };
    for (i, prompt) in case.prompts.iter().enumerate() {
        let (logits, tokens) = (&first.0[i], &first.1[i]);
        let distances = prompt.last_row.iter().zip(logits).map(|(a, b)| (a - b).abs());
        let worst = distances.fold(0.0, f32::max);
        if worst >= 1e-3 || logits.len() != prompt.last_row.len() {
            return Some(format!("logits of {} tokens differ by {worst}", prompt.ids.len()));
        }
        if *tokens != prompt.greedy_ids {
            return Some(format!("greedy ids after {} tokens", prompt.ids.len()));
        }
    }
    (again != first).then(|| format!("other bits over {layers} stages"))
}
