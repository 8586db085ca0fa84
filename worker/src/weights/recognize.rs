//! What people have in the place of a checkpoint: told apart before anything is read.

use std::{fs, io::Read, path::Path};

use strata_proto::error::quoted;

use super::{INDEX, ModelDir, SINGLE};

/// Bytes at the beginning of a file by which it is told what it is.
const BEGINNING: u64 = 256;
/// Most unfinished downloads that are named.
const NAMED: usize = 3;
/// How the hub answers, as plain text, who asks for a file that there is not, or that is not for everyone.
const HUB_ANSWERS: [&str; 5] = [
    "entry not found",
    "repository not found",
    "invalid username or password",
    "access to model",
    "not found",
];

/// What a path is that is no directory, where a model's directory is expected, and what to do about it.
pub fn describe_file(path: &Path) -> String {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    match extension.as_str() {
        "ggml" => {
            "a GGML file, which Strata does not read; expected GGUF, or a directory in Hugging Face layout"
                .into()
        }
        "onnx" => onnx("an ONNX file"),
        "safetensors" | "json" | "bin" | "pt" | "pth" => {
            "a file; give the directory that holds it, with config.json and tokenizer.json".into()
        }
        "zip" | "tar" | "gz" | "tgz" => "an archive; unpack it, and give the directory".into(),
        _ => "not a directory; expected one in Hugging Face layout".into(),
    }
}

/// Whether a path is a file whose name is that of a GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

fn onnx(what: &str) -> String {
    format!("{what}, which Strata does not read; download the model's safetensors files")
}

/// What a directory is, and what to do about it, if it cannot be a model.
pub(super) fn unusable(dir: &ModelDir) -> Option<String> {
    if dir.gguf().is_some() {
        return None;
    }
    let directory = dir.path();
    let names = names(directory);
    let has = |name: &str| names.iter().any(|n| n == name);
    if let Some(what) = hub_cache(directory, &names) {
        return Some(what);
    }
    let weights = has(SINGLE) || has(INDEX);
    if has("adapter_config.json") && !(has("config.json") && weights) {
        return Some(
            "a LoRA adapter, which Strata does not load; merge it into its base model with peft: \
             `model.merge_and_unload().save_pretrained(DIR)`, and give DIR with the base model's tokenizer"
                .into(),
        );
    }
    let read = |name: &&String| [".json", ".jinja", ".safetensors"].iter().any(|end| name.ends_with(end));
    for name in names.iter().filter(read) {
        if let Some(what) = not_the_file(dir, name) {
            return Some(format!("{name} is {what}"));
        }
    }
    if weights { None } else { no_weights(directory, &names) }
}

/// What a part of the hub's cache is: all of it, or one model, whose revisions lie below `snapshots`.
fn hub_cache(directory: &Path, found: &[String]) -> Option<String> {
    let has = |name: &str| found.iter().any(|n| n == name);
    let revision = |model: &Path| {
        let snapshots = model.join("snapshots");
        let complete = names(&snapshots).into_iter().map(|name| snapshots.join(name));
        complete.into_iter().find(|revision| revision.join("config.json").is_file())
    };
    if has("snapshots") && has("refs") {
        return Some(match revision(directory) {
            Some(revision) => {
                format!("the hub's cache of a model; give the revision in it: {}", revision.display())
            }
            None => {
                "the hub's cache of a model, without a revision that is complete; download it again".into()
            }
        });
    }
    // With XDG's layout, the models are a folder further down.
    let root = if has("hub") { directory.join("hub") } else { directory.to_owned() };
    let models: Vec<_> = names(&root).into_iter().filter(|name| name.starts_with("models--")).collect();
    let (first, config) = (models.first()?, has("config.json"));
    (!config).then(|| match models.iter().find_map(|model| revision(&root.join(model))) {
        Some(revision) => {
            format!("the hub's cache of all models; give a revision of one, such as {}", revision.display())
        }
        None => format!(
            "the hub's cache of all models ({first}, …), none of which is complete; download the model again"
        ),
    })
}

/// What a directory without weights holds instead.
fn no_weights(directory: &Path, names: &[String]) -> Option<String> {
    let has = |name: &str| names.iter().any(|n| n == name);
    let any = |end: &str| names.iter().find(|name| name.to_lowercase().ends_with(end));
    let unfinished = unfinished(directory);
    if !unfinished.is_empty() {
        return Some(format!("a download that was not finished ({unfinished}); run the same download again"));
    }
    if names.iter().all(|name| name.starts_with('.')) {
        return Some("an empty folder; download the model into it, or mount it there".into());
    }
    if has("model_index.json") {
        return Some(
            "a pipeline of diffusers, which makes images or sound; Strata serves models of text only".into(),
        );
    }
    if let Some(name) = any(".safetensors") {
        return Some(format!(
            "it holds {name}, but neither {SINGLE} nor {INDEX}; download the file of the two that the model's repository has"
        ));
    }
    if any(".bin").is_some_and(|name| name.starts_with("pytorch_model")) || any(".pth").is_some() {
        return Some(
            "it has weights as PyTorch pickles them, which Strata does not read, as they can run code; convert them: \
             `transformers.AutoModel.from_pretrained(DIR).save_pretrained(DIR)`, with the class that config.json names in \
             `architectures` in the place of AutoModel"
                .into(),
        );
    }
    for (end, framework, flag) in [(".msgpack", "Flax", "from_flax"), (".h5", "TensorFlow", "from_tf")] {
        if any(end).is_some() {
            return Some(format!(
                "it has weights of {framework}, which Strata does not read; convert them with transformers 4: \
                 `transformers.AutoModel.from_pretrained(DIR, {flag}=True).save_pretrained(DIR)`, with the class that \
                 config.json names in `architectures` in the place of AutoModel"
            ));
        }
    }
    if any(".gguf").is_some() {
        let found: Vec<_> =
            names.iter().filter(|name| name.to_lowercase().ends_with(".gguf")).cloned().collect();
        let more = if found.len() > NAMED { ", …" } else { "" };
        let found = found.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
        return Some(format!(
            "it holds several GGUF models ({found}{more}); give the path of the file that is to be served"
        ));
    }
    let onnx_folder = self::names(&directory.join("onnx")).iter().any(|name| name.ends_with(".onnx"));
    if any(".onnx").is_some() || onnx_folder {
        return Some(onnx("it holds ONNX files"));
    }
    None
}

/// The files of downloads that have not ended, as a list for a message; empty without one. The hub's client keeps them beside
/// the model, in a folder there, or beside the blobs that a cached revision links to.
pub(super) fn unfinished(directory: &Path) -> String {
    let mut found = Vec::new();
    let mut folders = vec![directory.to_owned(), directory.join(".cache/huggingface/download")];
    if let Some(snapshots) = directory.parent().filter(|parent| parent.ends_with("snapshots")) {
        folders.push(snapshots.with_file_name("blobs"));
    }
    for folder in folders {
        found.extend(names(&folder).into_iter().filter(|name| name.ends_with(".incomplete")));
    }
    let more = if found.len() > NAMED { ", …" } else { "" };
    found.truncate(NAMED);
    found.join(", ") + more
}

/// What lies in the place of a file: a pointer of Git LFS, a page, or an answer of the hub.
fn not_the_file(dir: &ModelDir, name: &str) -> Option<String> {
    let mut beginning = Vec::new();
    // What may not be opened is refused when it is needed.
    dir.file(name).ok()??.take(BEGINNING).read_to_end(&mut beginning).ok()?;
    // The length of a safetensors header has zeros in front; text has none.
    if beginning.contains(&0) {
        return None;
    }
    let text = String::from_utf8_lossy(&beginning);
    let text = text.trim_start_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
    let lower = text.to_lowercase();
    if lower.starts_with("version https://git-lfs") {
        return Some(
            "a pointer of Git LFS, not the file itself; run `git lfs install` and `git lfs pull` in the repository"
                .into(),
        );
    }
    // A template may begin with a token in angle brackets.
    let page = ["<!doctype", "<html"].iter().any(|beginning| lower.starts_with(beginning));
    if page || (text.starts_with('<') && !name.ends_with(".jinja")) {
        return Some(
            "a web page, not the file itself; download it again, by its link that says resolve in the place of blob"
                .into(),
        );
    }
    let answer = HUB_ANSWERS.iter().any(|answer| lower.starts_with(answer));
    answer.then(|| {
        format!(
            "an answer of the hub, not the file itself: {}; download it again by `hf download`, if need be after `hf auth login`",
            quoted(text.lines().next().unwrap_or_default().trim_end())
        )
    })
}

/// Names in a directory, sorted; none if it cannot be read.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::describe;

    const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n";

    /// What is said of a directory with these files.
    fn said(files: &[(&str, &str)]) -> String {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        describe(directory.path(), "m").unwrap_err().to_string()
    }

    #[test]
    fn says_what_a_directory_is_instead_of_a_model() {
        let config = ("config.json", "{}");
        for (files, says) in [
            (&[config, ("model.safetensors", POINTER)][..], "model.safetensors is a pointer of Git LFS"),
            (&[config, ("pytorch_model.bin", "")], "as PyTorch pickles them"),
            (&[config, ("pytorch_model-00001-of-00002.bin", "")], "as PyTorch pickles them"),
            (&[config, ("flax_model.msgpack", "")], "from_flax=True"),
            (&[config, ("tf_model.h5", "")], "from_tf=True"),
            (&[("model_index.json", "{}"), ("sd-v1.safetensors", "")], "a pipeline of diffusers"),
            (&[config, ("consolidated.safetensors", "")], "holds consolidated.safetensors, but neither"),
            (
                &[("a-Q4_K_M.gguf", ""), ("a-Q8_0.gguf", "")],
                "several GGUF models (a-Q4_K_M.gguf, a-Q8_0.gguf)",
            ),
            (&[("a-Q4_K_M.gguf", "")], "a-Q4_K_M.gguf: 0 bytes, but its header"),
            (
                &[("a-00001-of-00002.gguf", "")],
                "a-00002-of-00002.gguf: it is a part of the model, but it is not there",
            ),
            (&[config, ("onnx/model.onnx", "")], "holds ONNX"),
            (&[("adapter_config.json", "{}"), ("adapter_model.safetensors", "")], "merge_and_unload"),
            (&[config, (".cache/huggingface/download/x.incomplete", "")], "not finished (x.incomplete)"),
            (&[("refs/main", "abc"), ("snapshots/abc/config.json", "{}")], "snapshots/abc"),
            (&[("refs/main", "abc"), ("snapshots/abc/README.md", "")], "download it again"),
            (
                &[("models--a--b/refs/main", "c"), ("models--a--b/snapshots/c/config.json", "{}")],
                "/models--a--b/snapshots/c",
            ),
            (&[("hub/models--a--b/refs/main", "c")], "(models--a--b, …), none of which is complete"),
            (&[], "an empty folder"),
            (&[(".gitignore", "")], "an empty folder"),
            (&[config], "neither model.safetensors nor model.safetensors.index.json is there"),
        ] {
            let said = said(files);
            assert!(said.contains(says), "{files:?}: {said}");
        }
    }

    #[test]
    fn says_what_lies_in_the_place_of_a_file() {
        for (content, says) in [
            ("<!DOCTYPE html><html>", "a web page"),
            ("\u{feff}\n  <!doctype HTML>", "a web page"),
            ("<!-- saved --><html>", "a web page"),
            ("<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", "a web page"),
            ("Entry not found", "an answer of the hub, not the file itself: \"Entry not found\""),
            (
                "Access to model a/b is restricted.\nLog in.",
                "an answer of the hub, not the file itself: \"Access to model a/b is restricted.\";",
            ),
            (POINTER, "a pointer of Git LFS"),
        ] {
            for name in ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"]
            {
                let mut files = vec![("model.safetensors", "\0"), ("config.json", "{}")];
                files.retain(|(other, _)| *other != name);
                files.push((name, content));
                let said = said(&files);
                assert!(said.contains(&format!("{name} is {says}")), "{said}");
            }
        }
    }

    #[test]
    fn a_header_whose_length_reads_as_a_bracket_is_no_page() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let mut file = u64::from(b'<').to_le_bytes().to_vec();
        file.extend(format!("{:60}", "{}").bytes());
        fs::write(&path, file).unwrap();
        assert_eq!(not_the_file(&ModelDir::open(directory.path()).unwrap(), "model.safetensors"), None);
    }

    #[test]
    fn says_what_a_file_is() {
        for (name, says) in
            [("a.ggml", "GGML"), ("a.ONNX", "ONNX"), ("a.safetensors", "that holds it"), ("a", "not a dir")]
        {
            let said = describe_file(Path::new(name));
            assert!(said.contains(says), "{said}");
        }
    }
}
