//! The model directory, and what people give instead of one: told apart before anything starts.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

/// The name and the directory of a model.
///
/// # Errors
/// If it is something else, with what to do about it. What is wrong inside of a checkpoint is for the worker to say.
pub fn open(given: &Path) -> anyhow::Result<(String, PathBuf)> {
    let shown = given.display();
    let directory = match given.canonicalize() {
        Err(_) if is_hub_id(given) => bail!(
            "model {shown}: no such directory; if it is the id of a model on the Hugging Face hub, download it first: `hf download \
             {shown} --local-dir {name}`, and give that directory",
            name = given.file_name().unwrap_or_default().display()
        ),
        found => found.with_context(|| format!("model {shown}"))?,
    };
    if !directory.is_dir() {
        bail!("model {shown}: {}", file(&directory));
    }
    if let Some(what) = unusable(&directory) {
        bail!("model {shown}: {what}");
    }
    let name = directory.file_name().context("the model directory has no name")?;
    Ok((name.to_string_lossy().into_owned(), directory))
}

/// `OWNER/NAME`, as the hub allows them.
fn is_hub_id(given: &Path) -> bool {
    let Some((owner, name)) = given.to_str().and_then(|text| text.split_once('/')) else { return false };
    let word = |word: &str| {
        word.starts_with(|c: char| c.is_ascii_alphanumeric())
            && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    word(owner) && word(name)
}

/// What a file is that was given as a model.
fn file(path: &Path) -> String {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    match extension.as_str() {
        "gguf" | "ggml" => gguf("a GGUF file"),
        "onnx" => onnx("an ONNX file"),
        "safetensors" | "json" | "bin" | "pt" | "pth" => {
            "a file; give the directory that holds it, with config.json and tokenizer.json".into()
        }
        "zip" | "tar" | "gz" | "tgz" => "an archive; unpack it, and give the directory".into(),
        _ => "not a directory; expected one in Hugging Face layout".into(),
    }
}

fn gguf(what: &str) -> String {
    format!(
        "{what}, which Strata does not read; download the repository that it was made from, with its safetensors files \
         (--quantize makes int8 or int4 of them while they load)"
    )
}

fn onnx(what: &str) -> String {
    format!("{what}, which Strata does not read; download the model's safetensors files")
}

/// What a directory is, if it cannot be a model.
fn unusable(directory: &Path) -> Option<String> {
    let names = names(directory);
    let any = |end: &str| names.iter().find(|name| name.to_lowercase().ends_with(end));
    let has = |name: &str| names.iter().any(|n| n == name);
    // The hub's cache keeps the files of a revision below `snapshots`.
    if has("snapshots") && has("refs") {
        let snapshots = directory.join("snapshots");
        let found = self::names(&snapshots)
            .into_iter()
            .find(|name| snapshots.join(name).join("config.json").is_file());
        return Some(match found {
            Some(revision) => {
                format!(
                    "the hub's cache of a model; give the revision in it: {}",
                    snapshots.join(revision).display()
                )
            }
            None => {
                "the hub's cache of a model, without a revision that is complete; download it again".into()
            }
        });
    }
    let weights = any(".safetensors").is_some_and(|name| name != "adapter_model.safetensors")
        || has("model.safetensors.index.json");
    if has("adapter_config.json") && !(has("config.json") && weights) {
        return Some(
            "a LoRA adapter, which Strata does not load; merge it into its base model with peft: \
             `model.merge_and_unload().save_pretrained(DIR)`, and give DIR with the base model's tokenizer"
                .into(),
        );
    }
    for name in names.iter().filter(|name| name.ends_with(".json") || name.ends_with(".safetensors")) {
        if let Some(what) = not_the_file(&directory.join(name)) {
            return Some(format!("{name} is {what}"));
        }
    }
    if weights {
        return None;
    }
    let partial = [directory.to_owned(), directory.join(".cache/huggingface/download")];
    if partial.iter().any(|folder| self::names(folder).iter().any(|name| name.ends_with(".incomplete"))) {
        return Some(
            "a download that was not finished (there are .incomplete files); run the same download again"
                .into(),
        );
    }
    if any(".bin").is_some_and(|name| name.starts_with("pytorch_model")) || any(".pth").is_some() {
        return Some(
            "it has weights as PyTorch pickles them, which Strata does not read, as they can run code; convert them: \
             `transformers.AutoModel.from_pretrained(DIR).save_pretrained(DIR)`, with the class that config.json names in \
             `architectures` in the place of AutoModel"
                .into(),
        );
    }
    if any(".gguf").is_some() {
        return Some(gguf("it holds GGUF files"));
    }
    let onnx_folder = self::names(&directory.join("onnx")).iter().any(|name| name.ends_with(".onnx"));
    if any(".onnx").is_some() || onnx_folder {
        return Some(onnx("it holds ONNX files"));
    }
    None
}

/// What lies in the place of a file: a pointer of Git LFS, or a page.
fn not_the_file(path: &Path) -> Option<&'static str> {
    let mut beginning = Vec::new();
    File::open(path).ok()?.take(64).read_to_end(&mut beginning).ok()?;
    let text = String::from_utf8_lossy(&beginning).trim_start().to_lowercase();
    if text.starts_with("version https://git-lfs") {
        return Some(
            "a pointer of Git LFS, not the file itself; run `git lfs install` and `git lfs pull` in the repository",
        );
    }
    if text.starts_with("<!doctype html") || text.starts_with("<html") {
        return Some(
            "a web page, not the file itself; download it again, by its link that says resolve in the place of blob",
        );
    }
    None
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

    const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n";

    #[test]
    fn says_what_was_given_instead_of_a_model() {
        for (files, says) in [
            (
                &[("config.json", "{}"), ("model.safetensors", POINTER)][..],
                "model.safetensors is a pointer of Git LFS",
            ),
            (
                &[("config.json", "<!DOCTYPE html><html>"), ("model.safetensors", "")],
                "config.json is a web page",
            ),
            (&[("config.json", "{}"), ("pytorch_model.bin", "")], "save_pretrained"),
            (&[("config.json", "{}"), ("pytorch_model-00001-of-00002.bin", "")], "save_pretrained"),
            (&[("model-q4_k_m.gguf", "")], "holds GGUF"),
            (&[("config.json", "{}"), ("onnx/model.onnx", "")], "holds ONNX"),
            (&[("adapter_config.json", "{}"), ("adapter_model.safetensors", "")], "merge_and_unload"),
            (&[("config.json", "{}"), (".cache/huggingface/download/x.incomplete", "")], "not finished"),
            (&[("refs/main", "abc"), ("snapshots/abc/config.json", "{}")], "snapshots/abc"),
            (&[("refs/main", "abc"), ("snapshots/abc/README.md", "")], "download it again"),
        ] {
            let directory = tempfile::tempdir().unwrap();
            for (name, content) in files {
                let path = directory.path().join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, content).unwrap();
            }
            let error = open(directory.path()).unwrap_err().to_string();
            assert!(error.contains(says), "{files:?}: {error}");
        }
        // What may be a model is the worker's to judge.
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("model.safetensors"), "").unwrap();
        assert!(open(directory.path()).is_ok());
    }

    #[test]
    fn tells_a_name_on_the_hub_from_a_path() {
        let error = |given: &str| format!("{:#}", open(Path::new(given)).unwrap_err());
        let hub = error("Qwen/Qwen3-0.6B");
        assert!(hub.contains("`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B`"), "{hub}");
        for path in ["/srv/models", "models/a/b", "./a", "../a", "a"] {
            assert!(error(path).contains("No such file"), "{path}");
        }
        let directory = tempfile::tempdir().unwrap();
        for (name, says) in
            [("a.gguf", "GGUF"), ("a.ONNX", "ONNX"), ("a.safetensors", "that holds it"), ("a", "not a dir")]
        {
            let path = directory.path().join(name);
            fs::write(&path, "").unwrap();
            let said = error(path.to_str().unwrap());
            assert!(said.contains(says), "{said}");
        }
    }
}
