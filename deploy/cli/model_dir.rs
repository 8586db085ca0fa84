//! The model that a command is given: a directory, a model in the hub's cache, or what people give instead of one.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use strata_worker::{HubId, hub_cache, is_word};

/// The name and the directory of a model.
///
/// # Errors
/// If there is no such directory, with what to do about it. What is in it is for the worker to judge.
pub fn open(given: &Path) -> anyhow::Result<(String, PathBuf)> {
    let shown = given.display();
    let cached = given.to_str().and_then(HubId::parse).filter(|_| !given.exists());
    if let Some(id) = cached {
        let cache = hub_cache(|name| std::env::var_os(name))
            .context("HOME is not set: there is no cache of the hub")?;
        let found = id.snapshot(&cache).with_context(|| format!("model {shown}: no such directory here"))?;
        return Ok((id.name, found));
    }
    let directory = match (given.canonicalize(), given.to_str().and_then(|given| download(given, "."))) {
        (Err(_), Some(how)) => bail!("model {shown}: no such directory; {how}"),
        (Err(error), None) if error.kind() == ErrorKind::NotFound && given.to_str().is_some_and(is_word) => {
            bail!(
                "model {shown}: no such directory here; expected the directory of a model in Hugging Face layout. One of the hub \
             is downloaded first: `strata pull OWNER/{shown}`, and OWNER/{shown} is given here"
            )
        }
        (found, _) => found.with_context(|| format!("model {shown}"))?,
    };
    if !directory.is_dir() && !strata_worker::is_gguf(given) {
        bail!("model {shown}: {}", strata_worker::describe_file(&directory));
    }
    // In the hub's cache, a file's own name is that of a link to it.
    let (name, directory) = match directory.is_dir() {
        true => (directory.file_name(), directory.clone()),
        false => (given.file_stem(), given.to_owned()),
    };
    let name = name.context("the model directory has no name")?;
    Ok((name.to_string_lossy().into_owned(), directory))
}

/// How to get a model whose id on the hub, or whose page there, is given in the place of a directory: into the hub's cache, where
/// `parent` is `.`, or, for a worker, into the directory of its models.
pub fn download(given: &str, parent: &str) -> Option<String> {
    let id = hub_id(given)?;
    let name = id.rsplit('/').next().unwrap_or_default();
    let how = match parent {
        "." => format!("`strata pull {id}`, and give {id}"),
        parent => format!(
            "`hf download {id} --local-dir {parent}/{name}`, and give --models {parent} to workers and --model {name} to the \
             coordinator"
        ),
    };
    Some(format!("if it is the id of a model on the Hugging Face hub, download it first: {how}"))
}

/// The id of a model on the hub, given as `OWNER/NAME` or as an address of one of its pages.
fn hub_id(given: &str) -> Option<String> {
    let given = given.strip_prefix("hf://").unwrap_or(given);
    let address = given.strip_prefix("https://").or_else(|| given.strip_prefix("http://"));
    let path = address.unwrap_or(given);
    let path = ["huggingface.co/", "www.huggingface.co/", "hf.co/"].iter().find_map(|h| path.strip_prefix(h));
    let id: String = match (path, address) {
        // Below a model's page, there are its revisions and files.
        (Some(path), _) => {
            let path = path.split(['?', '#']).next().unwrap_or_default();
            let id: Vec<_> = path.split('/').filter(|word| !word.is_empty()).take(2).collect();
            id.join("/")
        }
        (None, Some(_)) => return None,
        // A tag, as other programs have it behind a colon, the hub has not.
        (None, None) => given.split(':').next().unwrap_or_default().to_owned(),
    };
    let (owner, name) = id.split_once('/')?;
    (is_word(owner) && is_word(name)).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_a_name_on_the_hub_from_a_path() {
        let error = |given: &str| format!("{:#}", open(Path::new(given)).unwrap_err());
        for given in [
            "Qwen/Qwen3-0.6B",
            "https://huggingface.co/Qwen/Qwen3-0.6B",
            "http://hf.co/Qwen/Qwen3-0.6B/",
            "huggingface.co/Qwen/Qwen3-0.6B/tree/main?x#y",
            "https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json",
            "hf://Qwen/Qwen3-0.6B",
            "Qwen/Qwen3-0.6B:latest",
        ] {
            let hub = error(given);
            assert!(hub.contains("`strata pull Qwen/Qwen3-0.6B`"), "{hub}");
        }
        for path in ["/srv/models", "models/a/b", "./a", "../a", "https://example.org/a", "https://hf.co/"] {
            assert!(error(path).contains("No such file"), "{path}");
        }
        assert!(error("qwen3").contains("`strata pull OWNER/qwen3`"));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.onnx");
        std::fs::write(&file, "").unwrap();
        assert!(error(file.to_str().unwrap()).contains("an ONNX file"));
        let file = directory.path().join("a-Q8_0.gguf");
        std::fs::write(&file, "").unwrap();
        assert_eq!(open(&file).unwrap(), ("a-Q8_0".to_owned(), file));
        // What is in it is not judged here.
        assert_eq!(open(directory.path()).unwrap().1, directory.path().canonicalize().unwrap());
    }
}
