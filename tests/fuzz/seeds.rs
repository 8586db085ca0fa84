//! Inputs to begin with, made from the models of the tests.

use std::{fs, path::PathBuf};

use prost::Message;
use serde_json::Value;
use strata_proto::v1;

use crate::targets::MODELS;

/// Largest seed in bytes: what is longer is changed too slowly to be worth it.
const LONGEST: usize = 32 << 10;

/// Inputs that the target of this name takes without complaint.
pub fn of(target: &str) -> Vec<Vec<u8>> {
    let mut seeds = match target {
        "frames" => strata_worker::fuzzing::frames(),
        "headers" => of_each_model("model.safetensors").iter().filter_map(|file| header(file)).collect(),
        "gguf" => ggufs(),
        "config" => of_each_model("config.json"),
        "tokenizer" => tokenizers(),
        "template" => templates(),
        "generate" => requests().iter().map(Message::encode_to_vec).collect(),
        "encode" => inputs().iter().map(Message::encode_to_vec).collect(),
        "split" => splits().map(Vec::from).into(),
        _ => Vec::new(),
    };
    seeds.retain(|seed| seed.len() <= LONGEST);
    seeds
}

fn of_each_model(file: &str) -> Vec<Vec<u8>> {
    let models = fs::read_dir(MODELS).expect("tests/models is there");
    models.filter_map(|model| fs::read(model.ok()?.path().join(file)).ok()).collect()
}

/// As the target takes it: the length of the file in four bytes, and the header.
fn header(file: &[u8]) -> Option<Vec<u8>> {
    let (size, rest) = file.split_first_chunk()?;
    let header = rest.get(..usize::try_from(u64::from_le_bytes(*size)).ok()?)?;
    Some([&(file.len() as u32).to_le_bytes(), header].concat())
}

/// As the target takes them: the length of the file in four bytes, and its beginning.
fn ggufs() -> Vec<Vec<u8>> {
    let files = fs::read_dir(PathBuf::from(MODELS).join("gguf")).expect("tests/models is there");
    let files =
        files.filter_map(|file| fs::read(file.ok()?.path()).ok()).filter(|file| file.starts_with(b"GGUF"));
    let beginning =
        |file: Vec<u8>| [&(file.len() as u32).to_le_bytes(), &file[..file.len().min(LONGEST - 4)]].concat();
    files.map(beginning).collect()
}

fn json(file: &str) -> Value {
    let text = fs::read(PathBuf::from(MODELS).join(file)).expect("tests/models is there");
    serde_json::from_slice(&text).expect("JSON")
}

fn tokenizers() -> Vec<Vec<u8>> {
    let kinds = json("tokenizers.json");
    kinds
        .as_object()
        .into_iter()
        .flatten()
        .map(|(_, kind)| kind["tokenizer"].to_string().into_bytes())
        .collect()
}

fn templates() -> Vec<Vec<u8>> {
    let cases = json("chat_templates.json");
    let whole = cases["templates"].as_object().into_iter().flatten().map(|(_, case)| &case["template"]);
    let pieces = cases["pieces"].as_array().into_iter().flatten().map(|piece| &piece[0]);
    let mut seeds: Vec<_> = whole.chain(pieces).filter_map(|text| Some(text.as_str()?.into())).collect();
    seeds.extend(of_each_model("tokenizer_config.json"));
    seeds
}

fn requests() -> [v1::GenerateRequest; 3] {
    let message = |role: &str| v1::ChatMessage {
        role: role.into(),
        content: "Who <|eos|> there?".into(),
        fields: r#"{"name": "x"}"#.into(),
    };
    let sampling = v1::Sampling {
        temperature: Some(0.7),
        top_k: Some(40),
        top_p: Some(0.9),
        min_p: Some(0.1),
        repetition_penalty: Some(1.1),
        frequency_penalty: Some(0.5),
        presence_penalty: Some(-0.5),
        seed: Some(7),
        logit_bias: [(3, 1.0)].into(),
    };
    let text = v1::GenerateRequest {
        prompt: Some("To be, or not".into()),
        max_tokens: Some(8),
        sampling: Some(sampling),
        stop: vec!["\n".into(), "é".into()],
        logprobs: Some(2),
        deadline_ms: Some(1000),
        tenant: "someone".into(),
        ..Default::default()
    };
    let ids = v1::GenerateRequest { token_ids: vec![1, 2, 300], model_defaults: true, ..Default::default() };
    let chat = v1::GenerateRequest {
        messages: vec![message("system"), message("user")],
        tools: Some(r#"[{"type": "function"}]"#.into()),
        documents: Some("[]".into()),
        template_arguments: Some(r#"{"enable_thinking": false}"#.into()),
        continue_final_message: "content".into(),
        ..Default::default()
    };
    [text, ids, chat]
}

fn inputs() -> [v1::FillMaskRequest; 3] {
    let input = |text: &str, pair: Option<&str>| v1::Input {
        text: Some(text.into()),
        pair: pair.map(Into::into),
        token_ids: Vec::new(),
    };
    let request = |inputs, truncation: v1::Truncation| v1::FillMaskRequest {
        inputs,
        top_k: Some(3),
        truncation: truncation.into(),
        deadline_ms: Some(1000),
        ..Default::default()
    };
    let ids = v1::Input { token_ids: vec![2, 4, 3], ..Default::default() };
    [
        request(vec![input("To [MASK] or not", None), ids], v1::Truncation::Unspecified),
        request(vec![input(&"[MASK] a ".repeat(60), Some("b"))], v1::Truncation::KeepHead),
        request(vec![input(&"a [MASK] ".repeat(60), None)], v1::Truncation::KeepTail),
    ]
}

fn splits() -> [&'static str; 6] {
    [
        "auto",
        "balanced_low_0",
        "sequential",
        "2,1,1",
        r#"{"": 0}"#,
        r#"{"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers": "cuda:1", "model.norm": 1, "lm_head": 1}"#,
    ]
}
