//! Which files of a repository on the hub a model is served from, before any of its weights are here.

use std::collections::{BTreeMap, BTreeSet};

use super::{INDEX, MAX_SHARDS, SINGLE, gguf, is_plain};

/// Small files that travel with a model.
pub(crate) const TOKENIZER_FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
];
/// The folder of chat templates that have names.
pub(crate) const NAMED_TEMPLATES: &str = "additional_chat_templates";
/// What sentence-transformers writes beside a model.
const MODULES: &str = "modules.json";
const SENTENCES: [&str; 3] = [MODULES, "config_sentence_transformers.json", "sentence_bert_config.json"];
/// Most files that an error names.
const NAMED: usize = 12;

/// Files of a repository that say what else is wanted; [`wanted`] reads them.
pub const LISTS: [&str; 2] = [INDEX, MODULES];

/// Names of the files of a repository that `strata serve` reads: configuration, tokenizer, chat templates, weights as
/// safetensors, and the modules of sentence-transformers. `names` is all that the repository has, `lists` the content of what it
/// has of [`LISTS`].
///
/// # Errors
/// If nothing can be served of it: what there is instead, and what to do.
pub fn wanted(
    names: &BTreeSet<String>,
    lists: &BTreeMap<String, Vec<u8>>,
) -> Result<BTreeSet<String>, String> {
    let mut wanted = weights(names, lists.get(INDEX).map(Vec::as_slice))?;
    if !names.contains("config.json") {
        return Err(
            "there is no config.json: it is no model in the layout of transformers; look for one that is"
                .into(),
        );
    }
    let template = |name: &str| {
        let inner = name.strip_prefix(NAMED_TEMPLATES).and_then(|name| name.strip_prefix('/'));
        inner.is_some_and(|name| name.ends_with(".jinja") && !name.contains('/'))
    };
    let small = |name: &str| TOKENIZER_FILES.contains(&name) || SENTENCES.contains(&name) || template(name);
    wanted.extend(names.iter().filter(|name| small(name)).cloned());
    for directory in directories(lists.get(MODULES).map(Vec::as_slice))? {
        let files = ["config.json", SINGLE].map(|file| format!("{directory}/{file}"));
        wanted.extend(files.into_iter().filter(|name| names.contains(name)));
    }
    Ok(wanted)
}

/// Names of the files of a GGUF model of which `name` is one: itself, or all of its parts.
///
/// # Errors
/// If one of them is not there, with the GGUF files that are.
pub fn wanted_gguf(names: &BTreeSet<String>, name: &str) -> Result<BTreeSet<String>, String> {
    let parts = gguf::parts(name);
    match parts.iter().find(|part| !names.contains(*part)) {
        None => Ok(parts.into_iter().collect()),
        Some(missing) => Err(match listed(names, ".gguf") {
            Some(there) => format!("there is no {missing}; its GGUF files are {there}"),
            None => format!("there is no {missing}, and no other GGUF file"),
        }),
    }
}

/// The files of safetensors.
fn weights(names: &BTreeSet<String>, index: Option<&[u8]>) -> Result<BTreeSet<String>, String> {
    if names.contains(SINGLE) {
        return Ok([SINGLE.to_owned()].into());
    }
    let Some(index) = index else { return Err(no_weights(names)) };
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|e| format!("{INDEX}: {e}"))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    if shards.len() > MAX_SHARDS {
        return Err(format!("{INDEX} names {} files; expected {MAX_SHARDS} at most", shards.len()));
    }
    match shards.iter().find(|shard| !names.contains(*shard)) {
        Some(missing) => Err(format!("{INDEX} names {missing}, which is not there: ask its owner for it")),
        None => Ok(shards.into_iter().chain([INDEX.to_owned()]).collect()),
    }
}

/// The directories of sentence-transformers' modules.
fn directories(modules: Option<&[u8]>) -> Result<Vec<String>, String> {
    #[derive(serde::Deserialize)]
    struct Module {
        #[serde(default)]
        path: String,
    }
    let Some(modules) = modules else { return Ok(Vec::new()) };
    let modules: Vec<Module> = serde_json::from_slice(modules).map_err(|e| format!("{MODULES}: {e}"))?;
    Ok(modules.into_iter().map(|module| module.path).filter(|path| is_plain(path)).collect())
}

/// What there is instead of safetensors, and what to do about it.
fn no_weights(names: &BTreeSet<String>) -> String {
    const NONE: &str = "there is neither model.safetensors nor model.safetensors.index.json";
    if let Some(there) = listed(names, ".gguf") {
        return format!("{NONE}, but GGUF files: choose one by --file: {there}");
    }
    if names.contains("adapter_config.json") {
        return format!(
            "{NONE}, but a LoRA adapter, which Strata does not load: merge it into its base model with peft"
        );
    }
    for (end, what) in [
        (".bin", "pickles of PyTorch, which Strata does not read, as they can run code"),
        (".pth", "pickles of PyTorch, which Strata does not read, as they can run code"),
        (".h5", "TensorFlow's weights, which Strata does not read"),
        (".msgpack", "Flax's weights, which Strata does not read"),
        (".onnx", "ONNX, which Strata does not read"),
        (".safetensors", "files of another layout"),
    ] {
        if let Some(there) = listed(names, end) {
            return format!(
                "{NONE}, but {there}: {what}. Look for a revision with safetensors (the hub offers some as refs/pr/N), or convert \
                 them: `transformers.AutoModel.from_pretrained(…).save_pretrained(DIR)`, with the class that config.json names in \
                 `architectures`"
            );
        }
    }
    format!("{NONE}, nor other weights")
}

/// The names with an ending, some of them if there are many.
fn listed(names: &BTreeSet<String>, end: &str) -> Option<String> {
    let found: Vec<_> =
        names.iter().filter(|name| name.to_lowercase().ends_with(end)).map(String::as_str).collect();
    let more = if found.len() > NAMED { ", …" } else { "" };
    (!found.is_empty()).then(|| found.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ") + more)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn choose(names: &[&str], lists: &[(&str, &str)]) -> Result<BTreeSet<String>, String> {
        let lists = lists.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec()));
        wanted(&set(names), &lists.collect())
    }

    #[test]
    fn only_what_serving_reads_is_wanted() {
        let names = [
            ".gitattributes",
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/model.safetensors",
            "2_Dense/pytorch_model.bin",
            "README.md",
            "additional_chat_templates/rag.jinja",
            "chat_template.jinja",
            "config.json",
            "config_sentence_transformers.json",
            "generation_config.json",
            "model.safetensors",
            "modules.json",
            "onnx/config.json",
            "onnx/model.onnx",
            "onnx/model.safetensors",
            "pytorch_model.bin",
            "tf_model.h5",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        ];
        let modules = r#"[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../x"}]"#;
        let expected = [
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/model.safetensors",
            "additional_chat_templates/rag.jinja",
            "chat_template.jinja",
            "config.json",
            "config_sentence_transformers.json",
            "generation_config.json",
            "model.safetensors",
            "modules.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(choose(&names, &[(MODULES, modules)]), Ok(set(&expected)));
    }

    #[test]
    fn shards_are_those_of_the_index() {
        let index = r#"{"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}"#;
        let names = ["config.json", INDEX, "m-1.safetensors", "m-2.safetensors", "consolidated.safetensors"];
        let expected = ["config.json", INDEX, "m-1.safetensors", "m-2.safetensors"];
        assert_eq!(choose(&names, &[(INDEX, index)]), Ok(set(&expected)));
        let missing = choose(&["config.json", INDEX, "m-1.safetensors"], &[(INDEX, index)]).unwrap_err();
        assert!(missing.contains("names m-2.safetensors, which is not there"), "{missing}");
        assert!(choose(&names, &[(INDEX, "[")]).unwrap_err().starts_with(INDEX));
    }

    #[test]
    fn without_safetensors_it_is_said_what_there_is() {
        for (names, says) in [
            (&["config.json", "pytorch_model.bin"][..], "but pytorch_model.bin: pickles of PyTorch"),
            (&["a-Q4_K_M.gguf", "a-Q8_0.gguf"], "choose one by --file: a-Q4_K_M.gguf, a-Q8_0.gguf"),
            (&["config.json", "onnx/model.onnx"], "but onnx/model.onnx: ONNX"),
            (&["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter"),
            (&["config.json", "consolidated.safetensors"], "files of another layout"),
            (&["README.md"], "nor other weights"),
            (&["model.safetensors"], "there is no config.json"),
        ] {
            let refused = choose(names, &[]).unwrap_err();
            assert!(refused.contains(says), "{names:?}: {refused}");
        }
    }

    #[test]
    fn all_parts_of_a_gguf_model_are_wanted() {
        let parts = ["q/a-00001-of-00002.gguf", "q/a-00002-of-00002.gguf", "b.gguf"];
        assert_eq!(wanted_gguf(&set(&parts), "q/a-00002-of-00002.gguf"), Ok(set(&parts[..2])));
        assert_eq!(wanted_gguf(&set(&parts), "b.gguf"), Ok(set(&["b.gguf"])));
        let refused = wanted_gguf(&set(&parts), "c.gguf").unwrap_err();
        assert_eq!(
            refused,
            "there is no c.gguf; its GGUF files are b.gguf, q/a-00001-of-00002.gguf, q/a-00002-of-00002.gguf"
        );
    }
}
