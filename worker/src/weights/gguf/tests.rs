//! Blocks, headers and parts of GGUF files: what they mean, and what is refused.

use std::{io::Write, path::PathBuf};

use half::f16;
use strata_proto::{Format as Held, Quantization};

use super::*;
use crate::{
    kernels::{
        buffer::{Arena, Element},
        cpu::{
            Cpu,
            isa::Isa,
            packed::{Elements, PackedMatrix},
        },
    },
    weights::{
        Checkpoint,
        decode::{Decode, Decoded},
    },
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/gguf")
}

/// Bytes of base64.
fn bytes(text: &serde_json::Value) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = Vec::new();
    for four in text.as_str().unwrap().as_bytes().chunks(4) {
        let digits = four.iter().filter_map(|c| DIGITS.iter().position(|d| d == c));
        let (word, count) = digits.fold((0u32, 0), |(word, count), d| (word << 6 | d as u32, count + 1));
        let word = word << (6 * (4 - count));
        out.extend_from_slice(&word.to_be_bytes()[1..count]);
    }
    out
}

/// The formats, with blocks of each and what ggml's own package makes of them.
fn blocks() -> Vec<(Blocks, &'static str, Vec<u8>, Vec<f32>)> {
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(folder().join("blocks.json")).unwrap()).unwrap();
    let case = |(name, case): (&String, &serde_json::Value)| {
        let (_, format, name) = blocks::FORMATS.into_iter().find(|(.., n)| n == name).unwrap();
        let values = bytes(&case["values"]).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        (Blocks(format), name, bytes(&case["blocks"]), values)
    };
    json.as_object().unwrap().iter().map(case).collect()
}

#[test]
fn blocks_of_every_format_are_widened_to_the_bits_that_ggml_makes() {
    let all = blocks();
    assert_eq!(all.len(), 10);
    for (format, name, stored, expected) in all {
        let (size, elements) = format.unit();
        assert_eq!(stored.len() as u64 / size * elements as u64, expected.len() as u64);
        let mut out = Decoded::default();
        format.decode(&stored, 0..expected.len(), &mut out).unwrap();
        let differ = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits() && (a - b).abs() > 0.0;
        assert!(!out.values.iter().zip(&expected).any(differ), "{name}");
        // The second half alone, too.
        let mut part = Decoded::default();
        format.decode(&stored, expected.len() / 2..expected.len(), &mut part).unwrap();
        assert_eq!(part.values, out.values[expected.len() / 2..], "{name}");
    }
}

#[test]
fn blocks_that_are_groups_stay_what_they_are() {
    let cpu = Cpu::on(Isa::detect());
    for (format, name, stored, expected) in blocks() {
        let mut out = Decoded::default();
        format.decode(&stored, 0..expected.len(), &mut out).unwrap();
        for quantization in Quantization::ALL {
            let (n, k) = (8, expected.len() / 8);
            let mut arena = Arena::new(1 << 20).unwrap();
            let mut matrix = PackedMatrix::zeros(n, k, Held::Quantized(quantization), &mut arena).unwrap();
            let elements =
                Elements { first: 0, total: n * k, values: &out.values, groups: &out.groups, cpu: &cpu };
            matrix.write(&elements, |i| (i / k, i % k)).unwrap();
            let exact = matches!(
                (name, quantization),
                ("Q8_0" | "Q5_0" | "Q4_0", Quantization::Int8) | ("Q4_0" | "Q4_1", Quantization::Int4)
            );
            let (mut row, mut worst, mut largest) = (vec![0.0; k], 0.0f32, 0.0f32);
            for i in 0..n {
                matrix.gather(i, &mut row);
                for (x, y) in row.iter().zip(&expected[i * k..]) {
                    worst = worst.max((x - y).abs());
                    largest = largest.max(y.abs());
                }
            }
            match (exact, name, quantization) {
                // A value of -128 is the one that int8 leaves out.
                (true, "Q8_0", _) => assert!(worst <= largest / 250.0, "{name} {quantization}: {worst}"),
                (true, ..) => assert_eq!(worst, 0.0, "{name} {quantization}"),
                // Integers stay, factors are rounded.
                (false, "Q4_K", Quantization::Int4) => {
                    assert!(worst < largest * 1.5e-3, "{worst} of {largest}")
                }
                (false, _, Quantization::Int8) => {
                    assert!(worst < largest * 0.01, "{name}: {worst} of {largest}")
                }
                (false, ..) => assert!(worst < largest * 0.2, "{name}: {worst} of {largest}"),
            }
        }
    }
}

#[test]
fn every_group_of_q8_0_but_those_with_the_lowest_value_is_exact_in_int8() {
    let cpu = Cpu::on(Isa::detect());
    let mut stored = Vec::new();
    for i in 0..64u8 {
        stored.extend(f16::from_f32(0.001 * f32::from(i) - 0.03).to_le_bytes());
        // None of them uses the whole range, so that another factor would seem better.
        stored.extend((0..32).map(|j| ((i as i8).wrapping_mul(7) / 2 + j).clamp(-100, 100) as u8));
    }
    let mut out = Decoded::default();
    let format = Blocks(candle_core::quantized::GgmlDType::Q8_0);
    format.decode(&stored, 0..64 * 32, &mut out).unwrap();
    let mut matrix =
        PackedMatrix::zeros(64, 32, Held::Quantized(Quantization::Int8), &mut Arena::new(1 << 20).unwrap())
            .unwrap();
    let elements = Elements { first: 0, total: 64 * 32, values: &out.values, groups: &out.groups, cpu: &cpu };
    matrix.write(&elements, |i| (i / 32, i % 32)).unwrap();
    let mut row = vec![0.0; 32];
    for (i, block) in stored.chunks(34).enumerate() {
        matrix.gather(i, &mut row);
        let factor = Element::to_f32(f16::from_le_bytes([block[0], block[1]]));
        for (x, byte) in row.iter().zip(&block[2..]) {
            assert_eq!(*x, factor * f32::from(*byte as i8));
        }
    }
}

/// A header by hand.
struct Builder(Vec<u8>);

impl Builder {
    fn new(tensors: u64, entries: u64) -> Self {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        Builder(bytes)
    }

    fn text(mut self, text: &str) -> Self {
        self.0.extend((text.len() as u64).to_le_bytes());
        self.0.extend(text.bytes());
        self
    }

    fn u32(mut self, n: u32) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn u64(mut self, n: u64) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn tensor(self, name: &str, shape: &[u64], format: u32, offset: u64) -> Self {
        let named = self.text(name).u32(shape.len() as u32);
        shape.iter().fold(named, |b, d| b.u64(*d)).u32(format).u64(offset)
    }

    /// With so many bytes of data.
    fn parse(&self, data: usize) -> Result<Header, String> {
        let mut bytes = self.0.clone();
        bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
        header::parse("a.gguf", &bytes, bytes.len() as u64).map_err(|e| e.to_string())
    }
}

#[test]
fn what_a_header_claims_is_bounded_by_what_the_file_has() {
    let good = Builder::new(1, 1).text("k").u32(9).u32(4).u64(2).u32(5).u32(6).tensor("t", &[32, 2], 8, 0);
    let header = good.parse(68).unwrap();
    assert_eq!(header.metadata["k"], header::Value::Integers(vec![5, 6]));
    assert_eq!((header.tensors[0].shape.clone(), header.length), (vec![2, 32], good.0.len() as u64));
    let none = || Builder::new(1, 0);
    for (builder, data, says) in [
        (Builder::new(u64::MAX, 0), 0, "expected at most"),
        (Builder::new(0, u64::MAX), 0, "expected at most"),
        (Builder::new(0, 1).u64(u64::MAX), 0, "elements at byte"),
        (Builder::new(0, 1).text("k").u32(8).u64(1 << 60), 0, "elements at byte"),
        (Builder::new(0, 1).text("k").u32(9).u32(0).u64(1 << 40), 0, "elements at byte"),
        (Builder::new(0, 1).text("k").u32(9).u32(8).u64(1 << 40), 0, "elements at byte"),
        (Builder::new(0, 1).text("k").u32(9).u32(9).u64(1), 0, "lists in a list"),
        (Builder::new(0, 1).text("k").u32(77), 0, "a value of kind 77"),
        (Builder::new(0, 2).text("k").u32(4).u32(1).text("k").u32(4).u32(1), 0, "is there twice"),
        (Builder::new(0, 1).text("general.alignment").u32(4).u32(0), 0, "expected an integer in 1..="),
        (none().tensor("t", &[1, 1, 1, 1, 1], 0, 0), 0, "5 dimensions"),
        (none().tensor("t", &[1 << 62, 1 << 62], 0, 0), 0, "overflow"),
        (none().tensor("t", &[1 << 62], 0, 0), 0, "overflow"),
        (none().tensor("t", &[33], 8, 0), 0, "rows of 33 elements: expected a multiple of 32"),
        (none().tensor("t", &[32], 8, 32), 34, "but its header says"),
        (none().tensor("t", &[32], 8, 1), 64, "expected a multiple of 32"),
        (none().tensor("t", &[32], 8, u64::MAX / 32 * 32), 64, "but its header says"),
        (none().tensor("t", &[256], 23, 0), 999, "its format IQ4_XS is not read"),
        (none().tensor("t", &[256], 34, 0), 999, "its format TQ1_0 is not read"),
        (none().tensor("t", &[256], 999, 0), 999, "its format 999 is not known"),
        (Builder::new(2, 0).tensor("a", &[32], 8, 0).tensor("b", &[32], 8, 32), 128, "overlaps"),
        (Builder(b"GGML".to_vec()), 0, "no GGUF file"),
    ] {
        let said = builder.parse(data).map(|_| ()).unwrap_err();
        assert!(said.contains(says), "{says}: {said}");
    }
    for end in 0..good.0.len() {
        let cut = &good.0[..end];
        assert!(header::parse("a.gguf", cut, end as u64).is_err(), "{end}");
    }
}

#[test]
fn parts_of_a_model_are_one() {
    for (name, expected) in [
        ("a-00001-of-00002.gguf", vec!["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]),
        ("a.gguf", vec!["a.gguf"]),
        ("a-1-of-2.gguf", vec!["a-1-of-2.gguf"]),
        ("a-00001-of-99999.gguf", vec!["a-00001-of-99999.gguf"]),
    ] {
        assert_eq!(parts(name), expected);
    }
}

#[test]
fn a_file_that_is_cut_off_or_no_model_says_so() {
    let whole = fs::read(folder().join("llama3-rope-f16.gguf")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.gguf");
    let open = |bytes: &[u8]| {
        fs::File::create(&path).unwrap().write_all(bytes).unwrap();
        Checkpoint::open(&path).map(|_| ()).map_err(|e| e.to_string())
    };
    open(&whole).unwrap();
    let cut = open(&whole[..whole.len() - 1]).unwrap_err();
    assert!(cut.contains("a.gguf") && cut.contains("download it again"), "{cut}");
    let other = String::from_utf8_lossy(&whole[..64]).into_owned();
    assert!(other.contains("general.architecture"));
    let at = whole.windows(5).position(|w| w == b"llama").unwrap();
    let mut renamed = whole.clone();
    renamed[at..at + 5].copy_from_slice(b"mamba");
    let said = open(&renamed).unwrap_err();
    assert!(said.contains("mamba is not read: expected one of"), "{said}");
}
