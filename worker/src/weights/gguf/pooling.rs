//! Files of sentence-transformers as they would lie beside a GGUF file that embeds, made of its metadata.

use serde_json::json;
use strata_proto::Files;

use super::{super::WeightsError, architectures::Tensors, metadata::Metadata};

/// How llama.cpp makes one vector of an input, by its numbers, in sentence-transformers' words.
const WAYS: [(u64, &str); 3] = [(1, "mean"), (2, "cls"), (3, "lasttoken")];

/// modules.json and the configuration of its Pooling; nothing where metadata say of no vectors. They have length 1, as
/// llama.cpp's programs give them out.
///
/// # Errors
/// If vectors are made in a way that is not known.
pub(super) fn files(metadata: &Metadata, tensors: &Tensors) -> Result<Files, WeightsError> {
    const WAY: &str = "pooling_type";
    let mut files = Files::new();
    // Of a model that classifies, it says what its head takes.
    let way = metadata.integer(WAY)?.filter(|way| *way > 0 && tensors.classes.is_none());
    let Some(way) = way else { return Ok(files) };
    let known = WAYS.iter().find(|(number, _)| *number == way);
    let (_, mode) =
        known.ok_or_else(|| metadata.own_wrong(WAY, "expected 1 (mean), 2 (first) or 3 (last)"))?;
    let width = metadata.integer("embedding_length")?;
    let module = |number: u8, path: &str, kind: &str| json!({"idx": number, "name": number.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}")});
    let modules = [
        module(0, "", "Transformer"),
        module(1, "1_Pooling", "Pooling"),
        module(2, "2_Normalize", "Normalize"),
    ];
    let pooling = json!({"word_embedding_dimension": width, "pooling_mode": mode});
    files.insert("modules.json".into(), json!(modules).to_string().into_bytes());
    files.insert("1_Pooling/config.json".into(), pooling.to_string().into_bytes());
    Ok(files)
}
