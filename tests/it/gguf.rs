//! GGUF files served: their tokenizers and chat templates, and the bits that they have.

use strata_proto::{
    DType, Quantization,
    v1::{DetokenizeRequest, TokenizeRequest},
};

use crate::cluster::{Cluster, Options, ask, greedy, model};

fn of(file: &str) -> Options {
    Options { model: model("gguf").join(file), dtype: None, ..Options::default() }
}

async fn ids(cluster: &Cluster, text: &str) -> Vec<u32> {
    let request = TokenizeRequest { text: text.into(), ..TokenizeRequest::default() };
    cluster.client().await.tokenize(request).await.unwrap().into_inner().token_ids
}

async fn text(cluster: &Cluster, ids: &[u32]) -> String {
    let request = DetokenizeRequest { token_ids: ids.to_vec(), ..DetokenizeRequest::default() };
    cluster.client().await.detokenize(request).await.unwrap().into_inner().text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_served_in_the_bits_that_it_has_with_its_own_tokenizer_and_template() {
    let (file, original) =
        (Cluster::start(&of("shakespeare.gguf")).await, Cluster::start(&Options::default()).await);
    let snapshot = file.wait_for("a plan", |s| s.ready()).await;
    let plan = snapshot.plan.unwrap();
    assert_eq!((plan.dtype, plan.quantization), (DType::BF16, Some(Quantization::Int4)));
    for said in
        ["ROMEO:\nO, then", "", " two  spaces\t\n\n", "naïve 日本 🙂", "<|bos|>x<|eos|>", "don't 1234"]
    {
        assert_eq!(ids(&file, said).await, ids(&original, said).await, "{said:?}");
        let there = ids(&file, said).await;
        assert_eq!(text(&file, &there).await, text(&original, &there).await, "{said:?}");
    }
    let chat = strata_proto::v1::GenerateRequest {
        messages: vec![strata_proto::v1::ChatMessage {
            role: "user".into(),
            content: "Who is there?".into(),
            ..strata_proto::v1::ChatMessage::default()
        }],
        max_tokens: Some(1),
        ..greedy(&[], 1)
    };
    let [a, b] = [&file, &original].map(|cluster| cluster.client());
    let (a, b) = (ask(&a.await, chat.clone()).await.unwrap(), ask(&b.await, chat).await.unwrap());
    assert_eq!(a.prompt_ids, b.prompt_ids);
    // A format that is asked for makes numbers of it.
    let wide = Cluster::start(&Options { dtype: Some(DType::F32), ..of("shakespeare.gguf") }).await;
    let plan = wide.wait_for("a plan", |s| s.ready()).await.plan.unwrap();
    assert_eq!((plan.dtype, plan.quantization), (DType::F32, None));
}

/// Texts, and the tokens that sentencepiece makes of them.
fn expected(file: &str) -> Vec<(String, Vec<u32>)> {
    let json = std::fs::read(model("gguf").join(file)).unwrap();
    let cases: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let case = |case: &serde_json::Value| {
        let ids = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
        (case["text"].as_str().unwrap().to_owned(), ids.collect())
    };
    cases.as_array().unwrap().iter().map(case).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn texts_become_the_tokens_that_sentencepiece_makes_of_them() {
    let cluster = Cluster::start(&of("sentence-piece.gguf")).await;
    for (said, expected) in expected("sentence_piece.json") {
        assert_eq!(ids(&cluster, &said).await, expected, "{said:?}");
        assert_eq!(text(&cluster, &expected[1..]).await, said, "{said:?}");
    }
    // Of a Unigram with a table of characters, as T5 and XLM-RoBERTa have it.
    let cluster = Cluster::start(&of("unigram.gguf")).await;
    for (said, expected) in expected("unigram.json") {
        assert_eq!(ids(&cluster, &said).await, expected, "{said:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encoders_file_reads_texts_as_its_tokenizer_json_does() {
    let file = Cluster::start(&of("bert-embed-f32.gguf")).await;
    let directory = Options { model: model("bert-embed-f32"), dtype: None, ..Options::default() };
    let original = Cluster::start(&directory).await;
    for said in [
        "",
        "Shall I compare thee?",
        "unbelievable, QUEEN-like",
        "na\u{ef}ve \u{65e5}\u{672c}",
        "[MASK] [SEP] x",
        "\t a \n",
    ] {
        let theirs = ids(&original, said).await;
        assert!(theirs.len() >= 2, "it is framed: {theirs:?}");
        assert_eq!(ids(&file, said).await, theirs, "{said:?}");
    }
}
