//! `config.json` as it would lie beside a GGUF file, made of its metadata.

use serde_json::{Map, Value, json};

use super::{
    super::WeightsError,
    architectures::{COMMON, Tensors, architecture, insert},
    metadata::Metadata,
};

/// `config.json` of a file, whose answers end with one of `ends`.
///
/// # Errors
/// If an entry is of another kind than expected, or says what is not supported.
pub(super) fn config(metadata: &Metadata, tensors: &Tensors, ends: Vec<u32>) -> Result<Value, WeightsError> {
    let architecture = architecture(metadata)?;
    let mut config = Map::new();
    config.insert("model_type".into(), architecture.family.into());
    config.insert("vocab_size".into(), tensors.vocabulary.into());
    config.insert("tie_word_embeddings".into(), (!tensors.head).into());
    insert(metadata, &mut config, COMMON)?;
    // As llama.cpp has it, whatever a family's own default is.
    let whole = |field: &str| config.get(field).and_then(Value::as_u64);
    if let (None, Some(width), Some(heads)) =
        (whole("head_dim"), whole("hidden_size"), whole("num_attention_heads"))
    {
        config.insert("head_dim".into(), width.checked_div(heads).into());
    }
    insert(metadata, &mut config, architecture.fields)?;
    let [keys, values] = ["attention.key_length", "attention.value_length"].map(|key| metadata.integer(key));
    if let (Some(keys), Some(values)) = (keys?, values?)
        && keys != values
    {
        return Err(
            metadata.own_wrong("attention.value_length", &format!("expected {keys}, the length of keys"))
        );
    }
    config.insert("rope_parameters".into(), rope(metadata, tensors, &config)?);
    (architecture.more)(metadata, tensors, &mut config)?;
    for (field, key) in
        [("bos_token_id", "tokenizer.ggml.bos_token_id"), ("pad_token_id", "tokenizer.ggml.padding_token_id")]
    {
        if let Some(id) = metadata.id(key)? {
            config.insert(field.into(), id.into());
        }
    }
    config.insert("eos_token_id".into(), ends.into());
    Ok(Value::Object(config))
}

/// How dimensions turn.
fn rope(metadata: &Metadata, tensors: &Tensors, config: &Map<String, Value>) -> Result<Value, WeightsError> {
    let mut rope = Map::new();
    rope.insert("rope_theta".into(), metadata.number("rope.freq_base")?.unwrap_or(10_000.0).into());
    let head = config.get("head_dim").and_then(Value::as_u64);
    if let (Some(dimensions), Some(head)) = (metadata.integer("rope.dimension_count")?, head)
        && head > 0
    {
        // A little more, as it is rounded down.
        let partial = ((dimensions as f64 + 0.25) / head as f64).min(1.0);
        rope.insert("partial_rotary_factor".into(), partial.into());
    }
    let kind = metadata.own_text("rope.scaling.type")?.unwrap_or("none");
    let factor = match metadata.number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        // As old files have it.
        None => metadata.number("rope.scale_linear")?,
    };
    rope.insert("rope_type".into(), "default".into());
    match (kind, factor, &tensors.slowed) {
        (_, _, Some(slowed)) => {
            rope.insert("rope_type".into(), "longrope".into());
            rope.insert("short_factor".into(), json!(slowed));
            rope.insert("long_factor".into(), json!(slowed));
            rope.insert("attention_factor".into(), 1.0.into());
        }
        ("yarn", factor, None) => {
            rope.insert("rope_type".into(), "yarn".into());
            for (field, value) in [
                ("factor", factor),
                ("beta_fast", metadata.number("rope.scaling.yarn_beta_fast")?),
                ("beta_slow", metadata.number("rope.scaling.yarn_beta_slow")?),
            ] {
                if let Some(value) = value {
                    rope.insert(field.into(), value.into());
                }
            }
            if let Some(original) = metadata.integer("rope.scaling.original_context_length")? {
                rope.insert("original_max_position_embeddings".into(), original.into());
            }
        }
        ("linear" | "none", Some(factor), None) if factor != 1.0 && factor != 0.0 => {
            rope.insert("rope_type".into(), "linear".into());
            rope.insert("factor".into(), factor.into());
        }
        // The factors of longrope are tensors.
        ("linear" | "none" | "longrope", ..) => {}
        _ => return Err(metadata.own_wrong("rope.scaling.type", "expected none, linear, yarn or longrope")),
    }
    Ok(Value::Object(rope))
}
