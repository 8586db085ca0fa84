//! Directories of sentence-transformers that are refused, each by its file and field.

use serde_json::json;

use super::{mutations::directory, *};

/// The error after `change` to a file of the fixture.
fn refused(file: &str, change: impl Fn(&mut Value)) -> String {
    refused_of("bert-sentences-f32", file, change)
}

pub(super) fn refused_of(name: &str, file: &str, change: impl Fn(&mut Value)) -> String {
    let dir = directory(&models().join(name));
    let path = dir.path().join(file);
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
    Model::open_dir(dir.path()).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn what_is_not_served_of_sentence_transformers_is_refused_by_name() {
    let module = |number: usize, kind: &str| {
        let kind = format!("sentence_transformers.models.{kind}");
        refused("modules.json", |modules| modules[number]["type"] = json!(kind))
    };
    for (number, kind) in [(1, "WeightedLayerPooling"), (2, "CNN"), (2, "Pooling"), (0, "StaticEmbedding")] {
        let error = module(number, kind);
        let says = [&format!("modules.json: {number}.type"), kind, "a Transformer, then Pooling"];
        assert!(says.iter().all(|s| error.contains(s)), "{error}");
    }
    let moved = refused("modules.json", |modules| modules[0]["path"] = json!("0_Transformer"));
    assert!(
        moved.contains("0.path") && moved.contains("give Strata the directory of the Transformer"),
        "{moved}"
    );
    let lost = refused("modules.json", |modules| modules[2]["path"] = json!("1_Pooling"));
    assert!(lost.contains("2.path") && lost.contains("pytorch_model.bin may hold programs"), "{lost}");
    for (file, field, value, says) in [
        (
            "1_Pooling/config.json",
            "pooling_mode",
            json!(["mean", "best"]),
            "one or several of cls, max, mean",
        ),
        ("2_Dense/config.json", "in_features", json!(95), "an integer in 96..=96"),
        (
            "2_Dense/config.json",
            "activation_function",
            json!("torch.nn.modules.activation.Mish"),
            "torch's Identity",
        ),
        ("2_Dense/config.json", "use_residual", json!(true), "expected false"),
        ("2_Dense/config.json", "module_input_name", json!("token_embeddings"), "sentence_embedding"),
        ("4_Dense/config.json", "out_features", json!(25), "[24, 20]"),
        ("3_LayerNorm/config.json", "dimension", json!(21), "an integer in 20..=20"),
        (
            "config_sentence_transformers.json",
            "model_type",
            json!("SparseEncoder"),
            "a SparseEncoder is not served",
        ),
        (
            "config_sentence_transformers.json",
            "default_prompt_name",
            json!("none"),
            "the name of one of prompts",
        ),
        ("config_sentence_transformers.json", "similarity_fn_name", json!("jaccard"), "cosine, dot"),
        ("config_sentence_transformers.json", "truncate_dim", json!(0), "an integer in 1..="),
        ("sentence_bert_config.json", "query_length", json!(32), "a vector per token"),
    ] {
        let error = refused(file, |config| config[field] = value.clone());
        assert!(error.contains(says), "{file} {field}: {error}");
    }
}

#[test]
fn what_becomes_of_a_rank_is_what_the_cross_encoder_was_saved_with() {
    use strata_proto::v1::Scoring;
    let identity = "torch.nn.modules.linear.Identity";
    let read = |facts: Value, more: &[(&str, Value)]| {
        let dir = directory(&models().join("bert-cross-encoder-bf16"));
        fs::write(dir.path().join("config_sentence_transformers.json"), facts.to_string()).unwrap();
        let path = dir.path().join("config.json");
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        more.iter().for_each(|(field, value)| config[field] = value.clone());
        fs::write(path, config.to_string()).unwrap();
        Model::open_dir(dir.path()).map(|(_, model)| model.ranking).map_err(|e| e.to_string())
    };
    assert_eq!(read(json!({}), &[]), Ok(Scoring::Sigmoid), "as a rule");
    assert_eq!(read(json!({"activation_fn": identity}), &[]), Ok(Scoring::None));
    let old = ("sbert_ce_default_activation_function", json!(identity));
    let newer = ("sentence_transformers", json!({"activation_fn": "torch.nn.modules.activation.Sigmoid"}));
    assert_eq!(read(json!({}), std::slice::from_ref(&old)), Ok(Scoring::None));
    assert_eq!(read(json!({}), &[old, newer]), Ok(Scoring::Sigmoid), "the newer key comes first");
    assert_eq!(
        read(json!({"activation_fn": "mine.Own"}), &[]),
        Ok(Scoring::Sigmoid),
        "no programs of others"
    );
    let refused = read(json!({"activation_fn": "torch.nn.modules.activation.Tanh"}), &[]).unwrap_err();
    assert!(
        refused.contains("activation_fn") && refused.contains("torch's Sigmoid or Identity"),
        "{refused}"
    );
}

#[test]
fn judges_by_tokens_that_are_not_served_are_refused_by_name() {
    let judge = "1_LogitScore/config.json";
    let limits = "sentence_bert_config.json";
    for (file, pointer, value, says) in [
        (judge, "/true_token_id", json!(300), "true_token_id is 300: expected an integer in 0..=299"),
        (judge, "/false_token_id", json!("n"), "false_token_id"),
        (judge, "/true_token_id", json!(null), "true_token_id is absent"),
        (judge, "/module_input_name", json!("scores"), "causal_logits"),
        ("modules.json", "/0/type", json!("x.Router"), "a LogitScore that follows a Transformer"),
        ("modules.json", "/0/path", json!("0_Transformer"), "a LogitScore that follows a Transformer"),
        ("modules.json", "/1/path", json!("elsewhere"), "a directory with a config.json"),
        ("config.json", "/architectures/0", json!("Qwen3Model"), "a model for CausalLM"),
        (limits, "/modality_config/message/format", json!("odd"), "flat, structured or auto"),
        (limits, "/processing_kwargs", json!({"text": {"max_length": 8}}), "processing_kwargs.text"),
        (limits, "/processing_kwargs/chat_template", json!({"padding": true}), "max_seq_length says"),
    ] {
        let error =
            refused_of("qwen3-judge-f32", file, |all| *all.pointer_mut(pointer).unwrap() = value.clone());
        assert!(error.contains(says), "{file} {pointer}: {error}");
    }
    // The yes alone counts as it is.
    let dir = directory(&models().join("qwen3-judge-f32"));
    fs::write(dir.path().join(judge), json!({"true_token_id": 93}).to_string()).unwrap();
    let (_, model) = Model::open_dir(dir.path()).unwrap();
    assert_eq!((model.tower.outputs(), model.ranking), (1, strata_proto::v1::Scoring::Sigmoid));
}
