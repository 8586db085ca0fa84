//! GGUF files: a model in one, or in parts, with its configuration and tokenizer as metadata.

mod architectures;
pub(crate) mod blocks;
mod config;
mod header;
mod metadata;
mod pooling;
mod splitting;
#[cfg(test)]
mod tests;
mod tokenizer;
mod tokens;
mod vocabulary;

use std::{collections::BTreeMap, fs, fs::File, os::unix::fs::FileExt, path::Path};

use strata_proto::{DType, Files, error::quoted};

use self::{
    blocks::Blocks,
    header::{Format, Header},
    metadata::Metadata,
};
use super::{MAX_HEADER, MAX_TENSORS, TensorInfo, WeightsError};

/// Most parts of a model.
const MAX_PARTS: usize = 4096;
/// Longest list of factors by which dimensions are slowed.
const MAX_FACTORS: u64 = 1 << 13;

/// One file, opened.
#[derive(Debug)]
pub(crate) struct Part {
    /// Its name in the model's directory.
    pub name: String,
    pub file: File,
    /// What stands before its tensors.
    pub header: Vec<u8>,
}

/// A model in GGUF files.
#[derive(Debug)]
pub(crate) struct Gguf {
    pub parts: Vec<Part>,
    /// Its tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// Those of them in blocks.
    pub blocks: BTreeMap<String, Blocks>,
    /// Whether rows of queries and keys lie as they turn: even ones with odd ones.
    pub turned: bool,
    /// The files that would lie beside safetensors.
    pub files: Files,
}

/// The GGUF files of a model, by their names in its directory: `path` itself, or all there is in a directory; parts of one model
/// in order. None if there are none, or several models.
pub(crate) fn names(path: &Path) -> Option<Vec<String>> {
    let is_gguf = |name: &str| name.to_lowercase().ends_with(".gguf");
    let (directory, wanted) = match path.is_dir() {
        true => (path, None),
        false => (path.parent()?, Some(path.file_name()?.to_str().filter(|name| is_gguf(name))?)),
    };
    let Some(wanted) = wanted else {
        let entries = fs::read_dir(directory).ok()?.flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        // What sees or hears is a model by itself.
        let names: Vec<_> = names.filter(|name| is_gguf(name) && !name.starts_with("mmproj")).collect();
        let [first, others @ ..] = &names[..] else { return None };
        let all = parts(first);
        return others.iter().all(|name| all.contains(name)).then_some(all);
    };
    Some(parts(wanted))
}

/// All parts of the model that a file is a part of, as llama.cpp names them: `NAME-00001-of-00003.gguf`.
pub(super) fn parts(name: &str) -> Vec<String> {
    let whole = || vec![name.to_owned()];
    let Some((stem, count)) = name.len().checked_sub(5).and_then(|end| name.get(..end)?.rsplit_once("-of-"))
    else {
        return whole();
    };
    let Some((stem, number)) = stem.rsplit_once('-') else { return whole() };
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    match count.parse::<usize>() {
        Ok(count) if is_number(number) && (1..=MAX_PARTS).contains(&count) => {
            (1..=count).map(|i| format!("{stem}-{i:05}-of-{count:05}.gguf")).collect()
        }
        _ => whole(),
    }
}

impl Gguf {
    /// Reads the headers of the files of a model, in order.
    ///
    /// # Errors
    /// If one is no GGUF file of a known version, or something in it is impossible or not read here.
    pub fn read(files: Vec<(String, File)>) -> Result<Self, WeightsError> {
        let (mut parts, mut found, mut metadata) = (Vec::new(), Vec::new(), None);
        let count = files.len();
        for (name, file) in files {
            let io = |e| WeightsError::io(&name, e);
            let length = file.metadata().map_err(io)?.len();
            let mut header = vec![0; length.min(MAX_HEADER) as usize];
            file.read_exact_at(&mut header, 0).map_err(io)?;
            let Header { metadata: entries, tensors, length } = header::parse(&name, &header, length)?;
            header.truncate(length as usize);
            if metadata.is_none() {
                metadata = Some(Metadata::new(&name, entries)?);
            }
            found.extend(tensors.into_iter().map(|tensor| (parts.len(), tensor)));
            parts.push(Part { name, file, header });
        }
        let metadata = metadata.ok_or_else(|| WeightsError::file("", "no GGUF file"))?;
        check(&metadata, count)?;
        let (mut tensors, mut blocks) = (BTreeMap::new(), BTreeMap::new());
        for (part, tensor) in found {
            let file = &parts[part].name;
            if let Format::Blocks(format) = tensor.format {
                blocks.insert(tensor.name.clone(), format);
            }
            if tensors.insert(tensor.name.clone(), tensor.info(part)).is_some() {
                return Err(WeightsError::tensor(file, &tensor.name, "is there twice"));
            }
            if tensors.len() > MAX_TENSORS {
                return Err(WeightsError::file(file, format!("more than {MAX_TENSORS} tensors")));
            }
        }
        let architecture = architectures::architecture(&metadata)?;
        let dense = tensors
            .keys()
            .filter_map(|name| name.strip_prefix("blk.")?.strip_suffix(".ffn_gate.weight")?.parse().ok());
        let said = architectures::Tensors {
            dense: dense.collect(),
            vocabulary: tensors.get("token_embd.weight").and_then(|t| t.shape.first().copied()).unwrap_or(0),
            head: tensors.contains_key("output.weight"),
            norms_queries: tensors.contains_key("blk.0.attn_q_norm.weight"),
            norms_attention: tensors.contains_key("blk.0.attn_norm_2.weight"),
            inner: tensors.get("blk.0.ffn_up.weight").and_then(|t| t.shape.first().copied()),
            segments: tensors.get("token_types.weight").and_then(|t| t.shape.first().copied()),
            classes: tensors.get("cls.output.weight").and_then(|t| t.shape.first().copied()),
            dense_head: tensors.contains_key("cls.weight"),
            slowed: factors(&parts, &tensors, "rope_freqs.weight")?,
            short_and_long: match [
                factors(&parts, &tensors, "rope_factors_short.weight")?,
                factors(&parts, &tensors, "rope_factors_long.weight")?,
            ] {
                [Some(short), Some(long)] => Some([short, long]),
                _ => None,
            },
        };
        let config = config::config(&metadata, &said, tokenizer::ends(&metadata)?)?;
        let mut files = tokenizer::files(&metadata)?;
        files.extend(pooling::files(&metadata, &said)?);
        files.insert("config.json".into(), config.to_string().into_bytes());
        Ok(Gguf { parts, tensors, blocks, turned: architecture.turned, files })
    }
}

/// What the header of a file alone leads to, for tests/fuzz: it is refused, or a configuration and a tokenizer come of it.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(header: &[u8], length: u64) -> Result<(), WeightsError> {
    let Header { metadata, tensors, length: read } = header::parse("file", header, length)?;
    assert!(read <= header.len() as u64, "more was read than there is");
    for tensor in &tensors {
        let info = tensor.info(0);
        assert!(info.offset >= read && info.offset + info.bytes <= length, "a tensor outside the file");
    }
    let metadata = Metadata::new("file", metadata)?;
    config::config(&metadata, &architectures::Tensors::default(), tokenizer::ends(&metadata)?)?;
    tokenizer::files(&metadata)?;
    Ok(())
}

/// Refuses what is no model, or not all of one.
fn check(metadata: &Metadata, count: usize) -> Result<(), WeightsError> {
    let kind = metadata.text("general.type")?;
    if kind.is_some_and(|kind| kind != "model") {
        return Err(metadata
            .wrong("general.type", &format!("expected model, not {}", quoted(kind.unwrap_or_default()))));
    }
    let parts = metadata.id("split.count")?.unwrap_or(1).max(1) as usize;
    match parts == count {
        true => Ok(()),
        false => {
            let expected = format!("{parts}, but there are {count}: give them the names that they came with");
            Err(metadata.wrong("split.count", &expected))
        }
    }
}

/// Floats of a short tensor, if it is there.
fn factors(
    parts: &[Part],
    tensors: &BTreeMap<String, TensorInfo>,
    name: &str,
) -> Result<Option<Vec<f32>>, WeightsError> {
    let Some(tensor) = tensors.get(name) else { return Ok(None) };
    let part = &parts[tensor.shard];
    let is_short = tensor.shape.len() == 1 && tensor.bytes <= 4 * MAX_FACTORS;
    if tensor.dtype != super::TensorDType::Float(DType::F32) || tensor.made.is_some() || !is_short {
        return Err(WeightsError::tensor(
            &part.name,
            name,
            format!("expected F32, at most {MAX_FACTORS} of them"),
        ));
    }
    let mut bytes = vec![0; tensor.bytes as usize];
    part.file.read_exact_at(&mut bytes, tensor.offset).map_err(|e| WeightsError::io(&part.name, e))?;
    Ok(Some(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
}
