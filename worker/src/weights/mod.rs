//! A checkpoint on disk: safetensors headers, validated, and positioned reads of tensors.

pub(crate) mod decode;
mod files;
mod fingerprint;
pub(crate) mod gguf;
mod glob;
pub(crate) mod header;
pub(crate) mod hub_cache;
mod modules;
mod packed;
mod recognize;
mod stream;
mod wanted;

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Component, Path},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

pub(crate) use decode::Decoder;
pub(crate) use files::ModelDir;
use gguf::Gguf;
pub(crate) use header::{TensorDType, TensorInfo};
pub use hub_cache::{HubError, HubId, hub_cache, is_word};
pub(crate) use modules::module_prefix;
pub use recognize::{describe_file, is_gguf};
pub(crate) use stream::stream;
pub use wanted::{LISTS, wanted, wanted_gguf};
pub(crate) use wanted::{NAMED_TEMPLATES, TOKENIZER_FILES};

/// Largest piece of a tensor that is read at once.
pub(crate) const PIECE: usize = 8 << 20;
/// Largest header of one safetensors file, and largest index.
const MAX_HEADER: u64 = 64 << 20;
/// Most tensors of a checkpoint.
const MAX_TENSORS: usize = 1 << 20;
/// Most files of a checkpoint.
const MAX_SHARDS: usize = 4096;
/// Largest `config.json` or `generation_config.json`.
const MAX_CONFIG: u64 = 4 << 20;

/// Why a file is shorter than it should be, and what to do.
const CUT_OFF: &str = "it was cut off, or not fully downloaded; download it again";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The operating system refused.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What it said.
        source: io::Error,
    },
    /// The directory is something else than a model, or holds what is not its files.
    #[error("{dir}: {what}")]
    NotAModel {
        /// The directory.
        dir: String,
        /// What it is, and what to do about it.
        what: String,
    },
    /// Neither of the two files that begin a checkpoint is there.
    #[error("{dir}: neither model.safetensors nor model.safetensors.index.json is there")]
    NoWeights {
        /// The directory.
        dir: String,
    },
    /// A file is not what it claims to be.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// What was wrong, and what was expected.
        reason: String,
    },
    /// A tensor's header entry is impossible.
    #[error("{file}: tensor {tensor:?}: {reason}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What was wrong, and what was expected.
        reason: String,
    },
}

impl WeightsError {
    pub(crate) fn file(file: &str, reason: impl Into<String>) -> Self {
        WeightsError::File { file: file.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tensor(file: &str, tensor: &str, reason: impl Into<String>) -> Self {
        WeightsError::Tensor { file: file.to_owned(), tensor: tensor.to_owned(), reason: reason.into() }
    }

    fn io(file: &str, source: io::Error) -> Self {
        WeightsError::Io { file: file.to_owned(), source }
    }
}

/// One open file of weights.
struct Shard {
    name: String,
    file: File,
    header: Vec<u8>,
}

/// An opened checkpoint: every header read and validated, no weights read but for a few sampled bytes.
pub struct Checkpoint {
    dir: ModelDir,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorInfo>,
    fingerprint: String,
    bytes_read: Arc<AtomicU64>,
    /// Patterns of names of tensors that may be there without a use.
    ignored: Vec<String>,
    /// By which method another program has quantized its weights.
    quantized_by: Option<&'static str>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names, in `dir`, or a GGUF file.
    ///
    /// # Errors
    /// If `dir` is something else than a model, or a file of weights is missing, cut off or malformed.
    pub fn open(dir: &Path) -> Result<Self, WeightsError> {
        let dir = ModelDir::open(dir)?;
        if let Some(what) = recognize::unusable(&dir) {
            return Err(WeightsError::NotAModel { dir: dir.path().display().to_string(), what });
        }
        let mut checkpoint = Checkpoint {
            dir,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            fingerprint: String::new(),
            bytes_read: Arc::default(),
            ignored: Vec::new(),
            quantized_by: None,
        };
        if let Some(gguf) = checkpoint.dir.gguf().cloned() {
            checkpoint.add_gguf(&gguf)?;
        } else if let Some(file) = checkpoint.dir.file(SINGLE)? {
            checkpoint.add_shard(SINGLE, file, "")?;
        } else if let Some(index) = read_index(&checkpoint.dir)? {
            let mut names: Vec<&String> = index.values().collect();
            names.sort();
            names.dedup();
            if names.len() > MAX_SHARDS {
                return Err(WeightsError::file(INDEX, format!("names more than {MAX_SHARDS} files")));
            }
            for name in names {
                let file = checkpoint.dir.file(name)?;
                let file = file.ok_or_else(|| missing_shard(checkpoint.dir(), name))?;
                checkpoint.add_shard(name, file, "")?;
            }
            checkpoint.check_index(&index)?;
        } else {
            return Err(WeightsError::NoWeights { dir: checkpoint.dir().display().to_string() });
        }
        checkpoint.add_modules()?;
        checkpoint.fingerprint = fingerprint::compute(&checkpoint)?;
        checkpoint.quantized_by = packed::add(&mut checkpoint)?;
        // The headers are needed no longer.
        checkpoint.shards.iter_mut().for_each(|s| s.header = Vec::new());
        Ok(checkpoint)
    }

    /// The directory it was opened in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Every tensor by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The file that a tensor lies in, or begins in.
    pub(crate) fn file_of(&self, tensor: &TensorInfo) -> &str {
        &self.shards[tensor.shard].name
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// From now on, tensors that nothing uses may have names of these patterns: `*` stands for any text, `?` for a character.
    pub fn ignore(&mut self, patterns: &[String]) {
        self.ignored = patterns.to_vec();
    }

    /// Whether a tensor may be there without a use.
    pub(crate) fn is_ignored(&self, name: &str) -> bool {
        self.ignored.iter().any(|pattern| glob::matches(pattern, name))
    }

    /// By which method another program has quantized its weights, if it has.
    pub(crate) fn quantized_by(&self) -> Option<&'static str> {
        self.quantized_by
    }

    /// SHA-256, in hexadecimal, over config, headers, tokenizer and sampled bytes of each tensor.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Bytes read from files of weights since the checkpoint was opened, headers included.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.bytes_read)
    }

    /// Contents of a small JSON file beside the weights; `None` if there is no such file.
    pub fn json(&self, name: &str) -> Result<Option<serde_json::Value>, WeightsError> {
        self.json_in("", name)
    }

    /// The same for a file in a directory beside the weights.
    pub fn json_in(&self, directory: &str, name: &str) -> Result<Option<serde_json::Value>, WeightsError> {
        if !directory.is_empty() && !is_plain(directory) {
            return Err(WeightsError::file(directory, "not a plain directory name beside the weights"));
        }
        let path = match directory {
            "" => name.to_owned(),
            directory => format!("{directory}/{name}"),
        };
        let Some(bytes) = self.dir.read(&path, MAX_CONFIG)? else { return Ok(None) };
        let value = serde_json::from_slice(&bytes)
            .map_err(|e| WeightsError::file(name, format!("not JSON: {}", misread(&e))))?;
        Ok(Some(value))
    }

    /// Reads the piece of a tensor that begins at byte `offset`: `PIECE` bytes, or what is left of it.
    pub fn read(&self, tensor: &TensorInfo, offset: u64, buffer: &mut Vec<u8>) -> Result<(), WeightsError> {
        buffer.resize(tensor.bytes.saturating_sub(offset).min(PIECE as u64) as usize, 0);
        self.fill(tensor, offset, buffer)
    }

    /// Fills `buffer` with the bytes of a tensor from byte `offset` on, which has as many.
    fn fill(&self, tensor: &TensorInfo, offset: u64, mut buffer: &mut [u8]) -> Result<(), WeightsError> {
        let Some(made) = &tensor.made else {
            return self.read_at(tensor.shard, tensor.offset + offset, buffer);
        };
        let mut begin = 0;
        for &(shard, at, bytes) in &made.parts {
            let skipped = offset.saturating_sub(begin).min(bytes);
            let here = (bytes - skipped).min(buffer.len() as u64) as usize;
            let (part, rest) = std::mem::take(&mut buffer).split_at_mut(here);
            self.read_at(shard, at + skipped, part)?;
            (begin, buffer) = (begin + bytes, rest);
        }
        Ok(())
    }

    fn read_at(&self, shard: usize, offset: u64, buffer: &mut [u8]) -> Result<(), WeightsError> {
        let shard = &self.shards[shard];
        shard.file.read_exact_at(buffer, offset).map_err(|e| WeightsError::io(&shard.name, e))?;
        self.bytes_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Adds the tensors of a file, each under its name with `prefix` before it.
    fn add_shard(&mut self, name: &str, file: File, prefix: &str) -> Result<(), WeightsError> {
        let io = |e| WeightsError::io(name, e);
        let length = file.metadata().map_err(io)?.len();
        let mut size = [0; 8];
        if length < 8 {
            let reason = format!("{length} bytes are too few for safetensors: {CUT_OFF}");
            return Err(WeightsError::file(name, reason));
        }
        file.read_exact_at(&mut size, 0).map_err(io)?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER {
            let reason = format!(
                "header of {size} bytes: expected at most {MAX_HEADER}; it is no safetensors file, or damaged: download it again"
            );
            return Err(WeightsError::file(name, reason));
        }
        if size > length - 8 {
            return Err(shorter(name, length, size + 8));
        }
        let mut header = vec![0; size as usize];
        file.read_exact_at(&mut header, 8).map_err(io)?;
        self.bytes_read.fetch_add(8 + size, Ordering::Relaxed);
        let shard = self.shards.len();
        for (tensor, info) in header::parse(name, shard, &header, 8 + size, length)? {
            let tensor = format!("{prefix}{tensor}");
            if let Some(other) = self.tensors.get(&tensor) {
                let reason = format!("is in {} too", self.shards[other.shard].name);
                return Err(WeightsError::tensor(name, &tensor, reason));
            }
            self.tensors.insert(tensor, info);
        }
        if self.tensors.len() > MAX_TENSORS {
            return Err(WeightsError::file(name, format!("more than {MAX_TENSORS} tensors")));
        }
        self.shards.push(Shard { name: name.to_owned(), file, header });
        Ok(())
    }

    /// Adds the parts of a model in GGUF files.
    fn add_gguf(&mut self, gguf: &Gguf) -> Result<(), WeightsError> {
        for part in &gguf.parts {
            let file = part.file.try_clone().map_err(|e| WeightsError::io(&part.name, e))?;
            self.bytes_read.fetch_add(part.header.len() as u64, Ordering::Relaxed);
            self.shards.push(Shard { name: part.name.clone(), file, header: part.header.clone() });
        }
        self.tensors = gguf.tensors.clone();
        Ok(())
    }

    /// The GGUF files that it is, if it is some.
    pub(crate) fn gguf(&self) -> Option<&Gguf> {
        self.dir.gguf().map(Arc::as_ref)
    }

    fn check_index(&self, index: &BTreeMap<String, String>) -> Result<(), WeightsError> {
        for (tensor, shard) in index {
            match self.tensors.get(tensor) {
                Some(info) if self.shards[info.shard].name == *shard => {}
                _ => return Err(WeightsError::tensor(INDEX, tensor, format!("is not in {shard}"))),
            }
        }
        Ok(())
    }
}

/// A file of `have` bytes that by its own header has at least `expected`.
fn shorter(file: &str, have: u64, expected: u64) -> WeightsError {
    let reason = format!("{have} bytes, but its header says that it has {expected}: {CUT_OFF}");
    WeightsError::file(file, reason)
}

/// A shard that only the index knows.
fn missing_shard(dir: &Path, name: &str) -> WeightsError {
    let unfinished = recognize::unfinished(dir);
    let remedy = match unfinished.is_empty() {
        true => "download it again, into the same folder".to_owned(),
        false => format!("a download was not finished ({unfinished}); run the same download again"),
    };
    WeightsError::file(name, format!("{INDEX} lists it, but it is not in {}: {remedy}", dir.display()))
}

/// What is wrong with JSON, and what to do where the end of it is missing.
fn misread(error: &serde_json::Error) -> String {
    match error.is_eof() {
        true => format!("{error}: the file is empty or was cut off; download it again"),
        false => error.to_string(),
    }
}

/// `weight_map` of the index, if there is one: tensor to file name, names checked to stay in the directory.
fn read_index(dir: &ModelDir) -> Result<Option<BTreeMap<String, String>>, WeightsError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(bytes) = dir.read(INDEX, MAX_HEADER)? else { return Ok(None) };
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|e| WeightsError::file(INDEX, format!("not an index with a weight_map: {}", misread(&e))))?;
    for (tensor, shard) in &index.weight_map {
        if !is_plain(shard) {
            let reason = format!("{shard:?} is not a plain file name: shards lie beside the index");
            return Err(WeightsError::tensor(INDEX, tensor, reason));
        }
    }
    if index.weight_map.is_empty() {
        return Err(WeightsError::file(INDEX, "weight_map names no tensor"));
    }
    Ok(Some(index.weight_map))
}

/// Whether `name` is one component of a path, and no way out of a directory.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(p)), None) if p == OsStr::new(name))
}

#[cfg(test)]
mod tests;
