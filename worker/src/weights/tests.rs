//! Malformed checkpoints are refused with the file and the tensor; well-formed ones read back.

use std::{fs, path::Path};

use serde_json::json;
use twox_hash::XxHash3_128;

use super::*;

fn write(dir: &Path, name: &str, header: &serde_json::Value, data: &[u8]) {
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    fs::write(dir.join(name), file).unwrap();
}

fn entry(shape: &[u64], begin: u64, end: u64) -> serde_json::Value {
    json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]})
}

fn open_error(header: &serde_json::Value, data: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), SINGLE, header, data);
    match Checkpoint::open(dir.path()) {
        Ok(_) => panic!("{header} was accepted"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_good_file_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..32).collect();
    let header =
        json!({"__metadata__": {"format": "pt"}, "b": entry(&[2, 2], 16, 32), "a": entry(&[4], 0, 16)});
    write(dir.path(), SINGLE, &header, &data);
    let c = Checkpoint::open(dir.path()).unwrap();
    let before = c.bytes_read().load(Ordering::Relaxed);
    let mut got = Vec::new();
    let b = c.tensor("b").unwrap();
    c.read(b, 0, &mut got).unwrap();
    assert_eq!((got.as_slice(), b.shape.as_slice()), (&data[16..], &[2, 2][..]));
    assert_eq!(c.bytes_read().load(Ordering::Relaxed) - before, 16);
    assert_eq!(c.fingerprint().len(), 64);
}

#[test]
fn the_fingerprint_follows_config_tokenizer_and_weights() {
    let dir = tempfile::tempdir().unwrap();
    let fingerprint = |config: &str, tokenizer: &str, data: &[u8]| {
        fs::write(dir.path().join("config.json"), config).unwrap();
        fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
        write(dir.path(), SINGLE, &json!({"a": entry(&[4], 0, 16)}), data);
        Checkpoint::open(dir.path()).unwrap().fingerprint().to_owned()
    };
    let base = fingerprint("{}", "{}", &[0; 16]);
    assert_eq!(base, fingerprint("{}", "{}", &[0; 16]));
    assert_ne!(base, fingerprint("{ }", "{}", &[0; 16]));
    assert_ne!(base, fingerprint("{}", "{ }", &[0; 16]));
    assert_ne!(base, fingerprint("{}", "{}", &[1; 16]));
}

#[test]
fn impossible_headers_are_refused_by_name() {
    let huge = u64::MAX / 2;
    for (header, data, expected) in [
        (json!({"a": entry(&[4], 0, 16), "b": entry(&[4], 8, 24)}), 24, "\"b\": begins at 8 and overlaps"),
        (
            json!({"a": entry(&[4], 0, 16), "b": entry(&[4], 20, 36)}),
            36,
            "\"b\": begins at 20 and leaves a hole",
        ),
        (json!({"a": entry(&[4], 4, 20)}), 20, "\"a\": begins at 4 and leaves a hole"),
        (json!({"a": entry(&[4], 0, 16)}), 20, "4 bytes follow"),
        (json!({"a": entry(&[4], 16, 0)}), 16, "\"a\": data_offsets 16..0 end before"),
        (json!({"a": entry(&[5], 0, 16)}), 16, "\"a\": 16 bytes of data: shape [5] of F32 needs 20"),
        (json!({"a": entry(&[huge, huge], 0, 16)}), 16, "\"a\": shape"),
        (json!({"a": entry(&[1 << 62, 4], 0, 0)}), 0, "overflows"),
        (json!({"a": entry(&[1; 9], 0, 4)}), 4, "\"a\": 9 dimensions"),
        (json!({"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}}), 16, "\"a\": dtype \"F33\""),
        (json!({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}), 16, "\"a\": expected"),
        (json!({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}), 1, "\"a\": 1 bytes"),
        (json!({"a": 3}), 0, "\"a\": expected dtype"),
        (json!([1]), 0, "not a JSON object"),
    ] {
        let e = open_error(&header, &vec![0; data]);
        assert!(e.contains(SINGLE) && e.contains(expected), "{header}: {e}");
    }
}

#[test]
fn truncated_and_huge_headers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (bytes, expected) in [
        (vec![], "0 bytes are too few for safetensors: it was cut off"),
        (vec![1, 0, 0], "3 bytes are too few"),
        (u64::MAX.to_le_bytes().to_vec(), "header of 18446744073709551615 bytes"),
        (
            [100u64.to_le_bytes().as_slice(), b"{}"].concat(),
            "10 bytes, but its header says that it has 108: it was cut off",
        ),
        ([2u64.to_le_bytes().as_slice(), b"{\""].concat(), "not a JSON object"),
        ([2u64.to_le_bytes().as_slice(), b"\xff\xff"].concat(), "not a JSON object"),
    ] {
        fs::write(dir.path().join(SINGLE), bytes).unwrap();
        let e = Checkpoint::open(dir.path()).err().unwrap().to_string();
        assert!(e.contains(SINGLE) && e.contains(expected), "{e}");
    }
    fs::remove_file(dir.path().join(SINGLE)).unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(WeightsError::NoWeights { .. })));
    fs::create_dir(dir.path().join(SINGLE)).unwrap();
    assert!(Checkpoint::open(dir.path()).err().unwrap().to_string().contains("not a regular file"));
}

#[test]
fn shards_are_read_by_the_index_and_never_leave_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let index = |map: serde_json::Value| {
        fs::write(dir.path().join(INDEX), json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
        Checkpoint::open(dir.path()).map(|c| c.tensors().keys().cloned().collect::<Vec<_>>())
    };
    write(dir.path(), "s1.safetensors", &json!({"a": entry(&[1], 0, 4)}), &[0; 4]);
    write(dir.path(), "s2.safetensors", &json!({"b": entry(&[1], 0, 4)}), &[0; 4]);
    write(dir.path(), "stray.safetensors", &json!({"a": entry(&[1], 0, 4)}), &[0; 4]);
    assert_eq!(index(json!({"a": "s1.safetensors", "b": "s2.safetensors"})).unwrap(), ["a", "b"]);
    for (map, expected) in [
        (json!({"a": "../x.safetensors"}), "plain file name"),
        (json!({"a": "/etc/passwd"}), "plain file name"),
        (json!({"a": "./s1.safetensors"}), "plain file name"),
        (json!({"a": "."}), "plain file name"),
        (json!({"a": ""}), "plain file name"),
        (json!({"a": "sub/s1.safetensors"}), "plain file name"),
        (json!({"a": "s1.safetensors", "c": "s1.safetensors"}), "\"c\": is not in s1.safetensors"),
        (json!({"a": "s2.safetensors", "b": "s1.safetensors"}), "is not in"),
        (json!({"a": "s1.safetensors", "b": "stray.safetensors"}), "\"a\": is in s1.safetensors too"),
        (
            json!({"a": "s1.safetensors", "b": "s3.safetensors"}),
            "s3.safetensors: model.safetensors.index.json lists it, but it is not in",
        ),
        (json!({}), "names no tensor"),
    ] {
        let e = index(map.clone()).err().unwrap_or_else(|| panic!("{map} was accepted")).to_string();
        assert!(e.contains(expected), "{map}: {e}");
    }
    fs::write(dir.path().join("s3.safetensors.incomplete"), "").unwrap();
    let e = index(json!({"a": "s1.safetensors", "b": "s3.safetensors"})).unwrap_err().to_string();
    assert!(e.contains("not finished (s3.safetensors.incomplete); run the same"), "{e}");
}

#[test]
fn a_file_that_was_cut_off_is_told_with_its_bytes() {
    let header = json!({"a": entry(&[4], 0, 16), "b": entry(&[4], 16, 32)});
    let begin = 8 + header.to_string().len();
    for have in [31, 16, 12, 0] {
        let e = open_error(&header, &vec![0; have]);
        let says =
            format!("{} bytes, but its header says that it has {}: it was cut off", begin + have, begin + 32);
        assert!(e.contains(SINGLE) && e.contains(&says) && e.contains("download it again"), "{e}");
    }
    let e = open_error(&json!({"a": entry(&[4], 0, u64::MAX)}), &[0; 16]);
    assert!(e.contains(&u64::MAX.to_string()), "{e}");
}

#[test]
fn tensors_are_streamed_whole_and_hashed_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    // Longer than two pieces, of one piece exactly, and empty; in the file in this order.
    let lengths = [2 * PIECE + 12, PIECE, 0, 8];
    let data: Vec<u8> = (0..lengths.iter().sum()).map(|i: usize| ((i * 31) >> 4) as u8).collect();
    let mut header = serde_json::Map::new();
    let mut begin = 0;
    for (name, length) in ["a", "b", "c", "d"].into_iter().zip(lengths) {
        header.insert(name.into(), entry(&[length as u64 / 4], begin as u64, (begin + length) as u64));
        begin += length;
    }
    write(dir.path(), SINGLE, &header.into(), &data);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    // Not all of them, and not in order.
    let names = ["d", "a", "c", "b"];
    let tensors = names.map(|name| checkpoint.tensor(name).unwrap());
    let mut read = vec![Vec::new(); names.len()];
    let digests = stream(&checkpoint, &tensors, |number, offset, bytes| {
        assert_eq!(offset, read[number].len() as u64);
        read[number].extend_from_slice(bytes);
        Ok::<_, WeightsError>(())
    })
    .unwrap();
    for ((tensor, read), digest) in tensors.iter().zip(&read).zip(digests) {
        let begin = tensor.offset as usize
            - (fs::metadata(dir.path().join(SINGLE)).unwrap().len() as usize - data.len());
        assert!(*read == data[begin..begin + tensor.bytes as usize]);
        assert_eq!(digest, XxHash3_128::oneshot(read));
    }
    // Whoever has enough ends it.
    let enough = stream(&checkpoint, &tensors, |_, _, _| Err(WeightsError::file(SINGLE, "enough")));
    assert!(enough.unwrap_err().to_string().contains("enough"));
}
