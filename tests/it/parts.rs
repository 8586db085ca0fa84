//! Parts of texts: classes of tokens, and answers to questions, as transformers' pipelines find them.

use std::process::Command;

use serde_json::Value;
use strata_coordinator::planner::Split;
use strata_proto::v1::{self, Task};
use tonic::Code;

use crate::cluster::{Cluster, Options, model};

/// Scores differ by less.
const TOLERANCE: f64 = 1e-3;

const TAGS: [&str; 4] = ["bert-tags-f32", "roberta-tags-bf16", "xlm-roberta-tags-f32", "modernbert-tags-f32"];
const SPANS: [&str; 4] =
    ["bert-spans-f32", "roberta-spans-f32", "electra-spans-bf16", "modernbert-spans-bf16"];

/// Whether a model's answers are parts of texts, which [`check`] asks for.
pub fn finds_parts(task: Task) -> bool {
    matches!(task, Task::ClassifyTokens | Task::Answer)
}

/// What transformers makes of texts by the model called `name`.
fn pipelines(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(model(name).join("expected.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    json["pipelines"].as_array().unwrap().clone()
}

fn number(value: &Value, name: &str) -> u32 {
    value[name].as_u64().unwrap() as u32
}

/// The part of a text between two characters, and where its bytes are.
fn part(text: &str, start: u32, end: u32) -> (String, u32, u32) {
    let upto = |n: u32| text.chars().take(n as usize).map(char::len_utf8).sum::<usize>();
    (text[upto(start)..upto(end)].to_owned(), upto(start) as u32, upto(end) as u32)
}

fn near(got: f32, want: &Value, what: &str) {
    let off = (f64::from(got) - want.as_f64().unwrap()).abs();
    assert!(off < TOLERANCE, "{what}: off by {off}");
}

/// Holds a cluster of the model called `name` to transformers; gives back all that it said.
pub async fn check(cluster: &Cluster, name: &str) -> String {
    let mut said = String::new();
    for pipeline in pipelines(name) {
        said += &match pipeline["asked"].is_null() {
            true => format!("{:?}", tagged(cluster, name, &pipeline).await),
            false => format!("{:?}", answered(cluster, name, &pipeline).await),
        };
    }
    said
}

async fn tagged(cluster: &Cluster, name: &str, pipeline: &Value) -> Vec<v1::Entity> {
    let (text, strategy) = (pipeline["text"].as_str().unwrap(), pipeline["strategy"].as_str().unwrap());
    let aggregation = format!("AGGREGATION_{}", strategy.to_uppercase());
    let request = v1::ClassifyTokensRequest {
        texts: vec![text.to_owned()],
        aggregation: v1::Aggregation::from_str_name(&aggregation).unwrap() as i32,
        ignore_labels: if strategy == "max" { Vec::new() } else { vec![String::new()] },
        ..Default::default()
    };
    let answer = cluster.client().await.classify_tokens(request).await.unwrap().into_inner();
    let got = answer.results[0].entities.clone();
    let want = pipeline["entities"].as_array().unwrap();
    let what = format!("{name} {strategy} {text:?}");
    assert_eq!(got.len(), want.len(), "{what}: {got:?}");
    for (got, want) in got.iter().zip(want) {
        let label = if want["entity"].is_null() { &want["entity_group"] } else { &want["entity"] };
        assert_eq!(got.label, label.as_str().unwrap(), "{what}");
        near(got.score, &want["score"], &what);
        let (start, end) = (number(want, "start"), number(want, "end"));
        assert_eq!((got.start, got.end), (start, end), "{what}");
        assert_eq!((got.text.clone(), got.start_byte, got.end_byte), part(text, start, end), "{what}");
        assert_eq!(got.index.map(u64::from), want["index"].as_u64(), "{what}");
    }
    got
}

/// The request that `pipeline` holds.
fn question(pipeline: &Value) -> v1::AnswerRequest {
    let asked = &pipeline["asked"];
    let optional = |name: &str| asked[name].as_u64().map(|n| n as u32);
    v1::AnswerRequest {
        question: asked["question"].as_str().unwrap().to_owned(),
        context: asked["context"].as_str().unwrap().to_owned(),
        top_k: optional("top_k"),
        max_answer_tokens: optional("max_answer_tokens"),
        handle_impossible_answer: asked["handle_impossible_answer"].as_bool().unwrap_or(false),
        max_window_tokens: optional("max_window_tokens"),
        stride: optional("stride"),
        ..Default::default()
    }
}

async fn answered(cluster: &Cluster, name: &str, pipeline: &Value) -> Vec<v1::FoundAnswer> {
    let request = question(pipeline);
    let what = format!("{name} {:?}", request.question);
    let answer = cluster.client().await.answer(request.clone()).await.unwrap().into_inner();
    assert_eq!(answer.windows, number(pipeline, "windows"), "{what}");
    let want = pipeline["answers"].as_array().unwrap();
    assert_eq!(answer.answers.len(), want.len(), "{what}");
    for (got, want) in answer.answers.iter().zip(want) {
        near(got.score, &want["score"], &what);
        let (start, end) = (number(want, "start"), number(want, "end"));
        assert_eq!((got.start, got.end), (start, end), "{what}: {got:?} {want}");
        assert_eq!((got.text.clone(), got.start_byte, got.end_byte), part(&request.context, start, end));
        if !got.text.is_empty() {
            near(got.start_logit, &want["start_logit"], &what);
            near(got.end_logit, &want["end_logit"], &what);
        }
    }
    answer.answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entities_and_answers_are_those_of_transformers_for_every_split() {
    for name in TAGS.into_iter().chain(SPANS) {
        let mut said: Option<String> = None;
        for workers in 1..=3 {
            let options =
                Options { model: model(name), workers, split: Split::Balanced, ..Options::default() };
            let now = check(&Cluster::start(&options).await, name).await;
            assert_eq!(*said.get_or_insert_with(|| now.clone()), now, "{name} on {workers} workers");
        }
    }
}

async fn run(args: &[&str], cluster: &Cluster) -> String {
    let args = args.iter().copied().chain(["--address", &cluster.address]);
    let args: Vec<String> = args.map(str::to_owned).collect();
    let run = move || Command::new(env!("CARGO_BIN_EXE_strata")).args(args).output().unwrap();
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tags_are_told_by_the_command_and_refused_by_name() {
    let cluster = Cluster::start(&Options { model: model(TAGS[0]), ..Options::default() }).await;
    let args = ["tag", "A worker dies.", "x", "--aggregation", "first", "--ignore-label", "", "--json"];
    let lines: Vec<Value> =
        run(&args, &cluster).await.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    let wanted = |p: &&Value| p["strategy"] == "first" && p["text"] == "A worker dies.";
    let want = pipelines(TAGS[0]).iter().find(wanted).unwrap()["entities"].as_array().unwrap().clone();
    let got = lines[0]["entities"].as_array().unwrap();
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(&want) {
        assert_eq!((&got["label"], &got["end"]), (&want["entity_group"], &want["end"]));
    }
    let mut client = cluster.client().await;
    let texts = |texts: &[&str]| v1::ClassifyTokensRequest {
        texts: texts.iter().map(|text| (*text).to_owned()).collect(),
        ..Default::default()
    };
    let long = "layers ".repeat(200);
    for (wrong, says) in [
        (texts(&[]), "texts: 0 texts: expected 1 to 1024"),
        (texts(&["a", ""]), "text 1: is empty"),
        (texts(&[&long]), "ask for truncation"),
    ] {
        let refused = client.classify_tokens(wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(says), "{}", refused.message());
    }
    let cut = v1::ClassifyTokensRequest { truncation: v1::Truncation::KeepHead as i32, ..texts(&[&long]) };
    let cut = client.classify_tokens(cut).await.unwrap().into_inner().results.remove(0);
    assert!(cut.tokens == 128 && cut.dropped_tokens > 0, "{cut:?}");
    let other = client.embed(v1::EmbedRequest::default()).await.unwrap_err();
    assert!(other.message().contains("answers ClassifyTokens, not Embed"), "{}", other.message());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_told_by_the_command_and_refused_by_name() {
    let cluster = Cluster::start(&Options { model: model(SPANS[0]), ..Options::default() }).await;
    let pipeline = &pipelines(SPANS[0])[1];
    let request = question(pipeline);
    let args = ["answer", "--question", &request.question, "--context", &request.context, "--top-k", "3"];
    let args: Vec<&str> = args.into_iter().chain(["--max-answer-tokens", "4", "--json"]).collect();
    let said = run(&args, &cluster).await;
    let got: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let want = pipeline["answers"].as_array().unwrap();
    assert_eq!(got.len(), 3);
    for (got, want) in got.iter().zip(want) {
        assert_eq!((&got["text"], &got["start"]), (&want["text"], &want["start"]));
    }
    let mut client = cluster.client().await;
    let with = |change: fn(&mut v1::AnswerRequest)| {
        let mut request = request.clone();
        change(&mut request);
        request
    };
    for (wrong, says) in [
        (with(|r| r.top_k = Some(0)), "top_k: 0: expected 1 to 100"),
        (with(|r| r.max_answer_tokens = Some(513)), "max_answer_tokens: 513: expected 1 to 512"),
        (
            with(|r| r.max_window_tokens = Some(129)),
            "max_window_tokens: 129: expected at least 1, and the model takes",
        ),
        (with(|r| r.stride = Some(126)), "leaves no room beside"),
        (with(|r| r.context.clear()), "context: is empty"),
        (with(|r| r.question.clear()), "question: is empty"),
        (with(|r| r.question = "layers ".repeat(200)), "question: "),
    ] {
        let refused = client.answer(wrong).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{}", refused.message());
        assert!(refused.message().contains(says), "{}", refused.message());
    }
}
