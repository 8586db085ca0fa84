//! The examples of `deploy/examples`, with models that are here.

use crate::cluster::{encoder_expectations, model};

#[allow(dead_code, reason = "its main is for whoever starts it")]
#[path = "../../deploy/examples/embed.rs"]
mod embed;
#[allow(dead_code, reason = "its main is for whoever starts it")]
#[path = "../../deploy/examples/generate.rs"]
mod generate;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_generates_text_without_a_port() {
    let text = generate::generate(&model("shakespeare"), "ROMEO:\n".into()).await.unwrap();
    assert!(text.starts_with("O, then, I'll be so.\n\nROMEO:\n"), "{text:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_embeds_texts_without_a_port() {
    let directory = model("bert-embed-f32");
    let expected = encoder_expectations(&directory).unwrap();
    let single: Vec<_> = expected.iter().filter(|e| e.pair.is_none()).collect();
    let texts: Vec<_> = single.iter().map(|e| e.text.clone()).collect();
    let vectors = embed::embed(&directory, &texts).await.unwrap();
    assert!(!vectors.is_empty());
    for (vector, expected) in vectors.iter().zip(single) {
        let far = vector.iter().zip(&expected.values[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(vector.len() == expected.values[0].len() && far < 1e-4, "{far} away from transformers'");
    }
}
