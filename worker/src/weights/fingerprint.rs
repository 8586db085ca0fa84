//! A checkpoint's identity, cheap enough to compute on every worker.

use std::{fmt::Write, io::Read};

use sha2::{Digest, Sha256};

use super::{Checkpoint, WeightsError};

/// Bytes taken at each sampled place of a tensor.
const SAMPLE: u64 = 64;

/// Files beside the weights that change what a model answers.
const NAMED: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
];

/// SHA-256 over the [files](NAMED) beside the weights and each module's config.json, every header, and three samples of each tensor (its beginning,
/// middle and end): enough to tell fine-tunes of one architecture apart without reading the weights.
pub(super) fn compute(checkpoint: &Checkpoint) -> Result<String, WeightsError> {
    let mut hash = Sha256::new();
    for name in NAMED {
        add_file(checkpoint, name, &mut hash)?;
    }
    for directory in checkpoint.module_directories()?.iter().filter(|d| !d.is_empty()) {
        add_file(checkpoint, &format!("{directory}/config.json"), &mut hash)?;
    }
    for shard in &checkpoint.shards {
        frame(&mut hash, &shard.name, shard.header.len() as u64);
        hash.update(&shard.header);
    }
    let mut tensors: Vec<_> = checkpoint.tensors.iter().collect();
    tensors.sort_by_key(|(_, t)| t.place());
    let mut sample = [0; SAMPLE as usize];
    for (name, t) in tensors {
        let len = t.bytes.min(SAMPLE);
        frame(&mut hash, name, len);
        for at in [0, (t.bytes - len) / 2, t.bytes - len] {
            let sample = &mut sample[..len as usize];
            checkpoint.read_at(t.shard, t.offset + at, sample)?;
            hash.update(&*sample);
        }
    }
    Ok(hash.finalize().iter().fold(String::new(), |mut hex, byte| {
        // Writing to a string cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

/// Lengths go in with the contents, so that no two sequences of parts hash alike.
fn frame(hash: &mut Sha256, name: &str, len: u64) {
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name.as_bytes());
    hash.update(len.to_le_bytes());
}

fn add_file(checkpoint: &Checkpoint, name: &str, hash: &mut Sha256) -> Result<(), WeightsError> {
    let Some(mut file) = checkpoint.dir.file(name)? else {
        frame(hash, name, u64::MAX);
        return Ok(());
    };
    let io = |e| WeightsError::io(name, e);
    frame(hash, name, file.metadata().map_err(io)?.len());
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(io)? {
            0 => return Ok(()),
            n => hash.update(&buffer[..n]),
        }
    }
}
