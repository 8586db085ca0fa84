//! Packed matrices against the values that the programs that write them have for them (tests/models/make_packed.py).

use std::{
    fs,
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Map, json};
use strata_proto::{DType, Format, Quantization};

use super::*;
use crate::{
    kernels::{
        buffer::Arena,
        cpu::{
            Cpu,
            isa::Isa,
            packed::{Elements, PackedMatrix},
        },
        ops::GROUP,
    },
    weights::Decoder,
};

#[derive(Deserialize, Clone)]
struct Stored {
    dtype: String,
    shape: Vec<usize>,
    data: String,
}

#[derive(Deserialize, Clone)]
struct Case {
    name: String,
    quantization_config: Value,
    tensors: Map<String, Value>,
    shape: Vec<usize>,
    values: String,
}

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models")
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&fs::read(models().join("packed.json")).unwrap()).unwrap()
}

fn case(beginning: &str) -> Case {
    cases().into_iter().find(|case| case.name.starts_with(beginning)).unwrap()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

impl Case {
    fn write(&self, dir: &Path) {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, tensor) in &self.tensors {
            let Stored { dtype, shape, data: hex } = Stored::deserialize(tensor).unwrap();
            let begin = data.len();
            data.extend(bytes(&hex));
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert(name.clone(), entry);
        }
        let header = Value::from(header).to_string();
        let size = (header.len() as u64).to_le_bytes();
        fs::write(dir.join("model.safetensors"), [&size[..], header.as_bytes(), &data].concat()).unwrap();
        let config = json!({"quantization_config": self.quantization_config});
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
    }

    fn open(&self) -> Result<(tempfile::TempDir, Checkpoint), String> {
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path());
        let checkpoint = Checkpoint::open(dir.path()).map_err(|error| error.to_string())?;
        Ok((dir, checkpoint))
    }

    /// Name of the tensor that is made.
    fn made(&self) -> &'static str {
        if self.tensors.contains_key("m_blocks") { "m" } else { "m.weight" }
    }

    fn expected(&self) -> Vec<f32> {
        bytes(&self.values).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn tensor(&mut self, name: &str) -> &mut Map<String, Value> {
        self.tensors.get_mut(name).unwrap().as_object_mut().unwrap()
    }
}

/// All values of a tensor and its groups, read in pieces of so many bytes.
fn decode(
    checkpoint: &Checkpoint,
    name: &str,
    piece: usize,
) -> Result<crate::weights::decode::Decoded, String> {
    let tensor = checkpoint.tensor(name).unwrap();
    let mut stored = Vec::new();
    checkpoint.read(tensor, 0, &mut stored).unwrap();
    assert_eq!(stored.len() as u64, tensor.bytes);
    let mut all = crate::weights::decode::Decoded::default();
    let made = tensor.made.as_ref().unwrap();
    let mut decoder = Decoder::default();
    for (i, bytes) in stored.chunks(piece).enumerate() {
        let offset = (i * piece) as u64;
        decoder.push(
            &*made.decode,
            offset,
            bytes,
            |wrong| wrong,
            |first, decoded| {
                assert_eq!(first, all.values.len());
                all.values.extend(&decoded.values);
                all.groups.extend(&decoded.groups);
                Ok(())
            },
        )?;
    }
    Ok(all)
}

#[test]
fn every_packing_gives_the_values_of_the_program_that_wrote_it() {
    for case in cases() {
        let (_dir, checkpoint) = case.open().unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let names: Vec<&String> = checkpoint.tensors().keys().collect();
        let [name] = names[..] else { panic!("{}: {names:?}", case.name) };
        assert_eq!(name, case.made(), "{}", case.name);
        let tensor = checkpoint.tensor(name).unwrap();
        assert_eq!(tensor.shape, case.shape, "{}", case.name);
        let expected = case.expected();
        for piece in [7, 1 << 20] {
            let decoded = decode(&checkpoint, name, piece).unwrap();
            assert_eq!(decoded.values.len(), expected.len());
            for (i, (value, expected)) in decoded.values.iter().zip(&expected).enumerate() {
                // To the bit, but for the sign of zero.
                assert_eq!(value, expected, "{}: {i}", case.name);
            }
            for (values, group) in decoded.values.chunks(GROUP).zip(decoded.groups) {
                let Some(group) = group else { continue };
                let of = |v: &i8| group.factor.to_f32() * f32::from(*v) + group.least.to_f32();
                assert_eq!(values, group.values.iter().map(of).collect::<Vec<_>>(), "{}", case.name);
            }
        }
    }
}

/// The largest error of a case's matrix in a format, as a share of a group's largest value; that of quantizing where the
/// checkpoint's groups are not told.
fn error(case: &Case, quantization: Quantization, with_groups: bool) -> f32 {
    let (_dir, checkpoint) = case.open().unwrap();
    let decoded = decode(&checkpoint, case.made(), 1 << 20).unwrap();
    let [outer @ .., k] = &case.shape[..] else { panic!("{}: {:?}", case.name, case.shape) };
    let (n, k) = (outer.iter().product::<usize>(), *k);
    let format = Format::Quantized(quantization);
    let mut arena = Arena::new(PackedMatrix::bytes_for(n, k, format)).unwrap();
    let mut matrix = PackedMatrix::zeros(n, k, format, &mut arena).unwrap();
    let groups = if with_groups { &decoded.groups[..] } else { &[] };
    let cpu = Cpu::on(Isa::detect());
    let elements = Elements { first: 0, total: n * k, values: &decoded.values, groups, cpu: &cpu };
    matrix.write(&elements, |i| (i / k, i % k)).unwrap();
    let mut row = vec![0.0; k];
    let mut worst = 0.0f32;
    for (i, expected) in decoded.values.chunks(k).enumerate() {
        matrix.gather(i, &mut row);
        for (expected, row) in expected.chunks(GROUP).zip(row.chunks(GROUP)) {
            let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let differs = expected.iter().zip(row).fold(0.0f32, |most, (x, y)| most.max((x - y).abs()));
            worst = worst.max(differs / largest);
        }
    }
    worst
}

#[test]
fn formats_round_nothing_where_they_have_the_grid() {
    let (int8, int4) = (Quantization::Int8, Quantization::Int4);
    for (name, quantization) in [
        ("GPTQ, version 1", int8),
        ("GPTQ, version 2", int8),
        ("GPTQ, 2 bits", int4),
        ("AWQ", int8),
        ("packed, symmetric", int8),
        ("packed, symmetric", int4),
        ("MXFP4", int8),
        ("gpt-oss' MXFP4", int8),
    ] {
        let case = case(name);
        let (kept, rounded) = (error(&case, quantization, true), error(&case, quantization, false));
        assert!(kept == 0.0 && rounded > 0.0, "{name} in {quantization}: {kept}, {rounded}");
    }
    // Of -128, which our int8 leaves out, a group is quantized anew.
    let kept = error(&case("integers, whole groups"), int8, true);
    assert!(0.0 < kept && kept < 0.0045, "{kept}");
    // An offset that is no f16 is rounded to one.
    for name in ["GPTQ, version 1", "AWQ"] {
        let (kept, rounded) = (error(&case(name), int4, true), error(&case(name), int4, false));
        assert!(0.0 < kept && kept < 0.0006 && kept <= rounded, "{name}: {kept}, {rounded}");
    }
    // Codes of 24 halves' span are too many for 16 steps.
    for name in ["MXFP4", "gpt-oss' MXFP4"] {
        let (kept, rounded) = (error(&case(name), int4, true), error(&case(name), int4, false));
        assert!(0.0 < kept && kept < 0.125 && kept <= rounded, "{name}: {kept}, {rounded}");
    }
}

#[test]
fn settings_and_tensors_that_do_not_fit_are_refused_by_name() {
    let with = |case: &str, field: &str, value: Value| {
        let mut case = self::case(case);
        case.quantization_config.as_object_mut().unwrap().insert(field.into(), value);
        case
    };
    let other = |case: &str, tensor: &str, field: &str, value: Value| {
        let mut case = self::case(case);
        case.tensor(tensor).insert(field.into(), value);
        case
    };
    let weights = |case: &str, field: &str, value: Value| {
        let mut case = self::case(case);
        case.quantization_config["config_groups"]["group_0"]["weights"][field] = value;
        case
    };
    let without = |case: &str, tensor: &str| {
        let mut case = self::case(case);
        case.tensors.remove(tensor);
        case
    };
    for (case, expected) in [
        (
            with("AWQ", "quant_method", json!("bitsandbytes")),
            "quant_method is \"bitsandbytes\": expected gptq, awq, compressed-tensors, fp8 or mxfp4",
        ),
        (with("AWQ", "quant_method", json!(3)), "quant_method is \"a method without a name\""),
        (with("AWQ", "version", json!("gemv")), "quantization_config.version is \"gemv\": expected gemm"),
        (with("AWQ", "zero_point", json!(false)), "zero_point is false"),
        (with("AWQ", "bits", json!(3)), "bits is 3: expected 4"),
        (with("AWQ", "bits", json!("four")), "config.json: quantization_config: invalid type"),
        (with("AWQ", "group_size", json!(0)), "group_size is 0: expected -1 or a positive"),
        (
            with("AWQ", "group_size", json!(16)),
            "tensor \"m.qzeros\": is I32 of shape [2, 2]: expected I32 of shape [4, 2]",
        ),
        (with("GPTQ, version 1", "bits", json!(3)), "bits is 3: expected 2, 4 or 8"),
        (with("GPTQ, version 1", "bits", json!(8)), "m.qzeros"),
        (with("GPTQ, version 1", "checkpoint_format", json!("marlin")), "checkpoint_format is \"marlin\""),
        (with("GPTQ, version 1", "dynamic", json!({"+:.*": {"bits": 8}})), "dynamic is \"+:.*\""),
        (without("GPTQ, version 1", "m.scales"), "tensor \"m.scales\" is missing"),
        (other("GPTQ, version 1", "m.g_idx", "dtype", json!("F32")), "\"m.g_idx\": is F32 of shape [64]"),
        (other("GPTQ, version 1", "m.scales", "shape", json!([32])), "\"m.scales\": is F16 of shape [32]"),
        (
            other("GPTQ, version 1", "m.qweight", "shape", json!([128])),
            "\"m.qweight\": is I32 of shape [128]",
        ),
        (with("packed, symmetric", "config_groups", json!({})), "config_groups is 0"),
        (with("packed, symmetric", "sparsity_config", json!({"format": "sparse-bitmask"})), "expected dense"),
        (
            with("packed, symmetric", "transform_config", json!({"config_groups": {"a": {}}})),
            "transform_config",
        ),
        (weights("packed, symmetric", "num_bits", json!(3)), "int\" of 3 bits, packed"),
        (weights("packed, symmetric", "strategy", json!("token")), "strategy is \"token\""),
        (
            weights("packed, symmetric", "group_size", json!(16)),
            "\"m.weight_scale\": is BF16 of shape [16, 2]",
        ),
        (weights("packed, symmetric", "symmetric", json!(false)), "\"m.weight_zero_point\" is missing"),
        (other("packed, symmetric", "m.weight_shape", "data", json!("00".repeat(16))), "m.weight_packed"),
        (
            other("packed, symmetric", "m.weight_shape", "data", json!("ff".repeat(16))),
            "two sizes of at most",
        ),
        (with("transformers' FP8", "weight_block_size", json!([0, 4])), "weight_block_size is Some((0, 4))"),
        (
            with("transformers' FP8", "weight_block_size", json!([16, 16])),
            "\"m.weight_scale_inv\": is F32 of shape",
        ),
        (with("transformers' FP8", "expert_dtype", json!("fp4")), "expert_dtype is \"fp4\": expected fp8"),
        (without("transformers' FP8", "m.weight"), "tensor \"m.weight\" is missing"),
        (without("gpt-oss' MXFP4", "m_scales"), "tensor \"m_scales\" is missing"),
        (
            other("gpt-oss' MXFP4", "m_scales", "shape", json!([3, 30])),
            "\"m_scales\": is U8 of shape [3, 30]: expected U8 of shape [3, 10, 3]",
        ),
        (other("gpt-oss' MXFP4", "m_scales", "dtype", json!("I8")), "\"m_scales\": is I8"),
        (
            other("gpt-oss' MXFP4", "m_blocks", "shape", json!([3, 10, 6, 8])),
            "\"m_blocks\": is U8 of shape [3, 10, 6, 8]: expected U8 of shape (experts, outputs, blocks, 16)",
        ),
        (other("gpt-oss' MXFP4", "m_blocks", "dtype", json!("I8")), "\"m_blocks\": is I8"),
    ] {
        let said = case.open().map(|_| ()).unwrap_err();
        assert!(said.contains(expected), "{}: {said}\nexpected: {expected}", case.name);
    }
    let two = json!({
        "a": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
        "b": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "type": "int", "symmetric": true}},
        "c": {"weights": {"num_bits": 8}},
    });
    // Two groups that say the same are one, and the one that does not fit is no choice.
    assert!(with("packed, symmetric", "config_groups", two.clone()).open().is_ok());
    let three = json!({"d": {"weights": {"num_bits": 4, "strategy": "block", "block_structure": [1, 32]}}});
    let mut ambiguous = two;
    ambiguous.as_object_mut().unwrap().extend(three.as_object().unwrap().clone());
    let said = with("packed, symmetric", "config_groups", ambiguous).open().map(|_| ()).unwrap_err();
    assert!(said.contains("several of config_groups fit the tensors of \"m\""), "{said}");
}

#[test]
fn a_group_that_is_not_there_is_an_error_of_the_tensor() {
    let mut case = case("GPTQ, groups in the order");
    for (index, said) in [(4u32, "group 4 of column 0: expected 0..4"), (u32::MAX, "group -1 of column 0")] {
        let hex = &case.tensor("m.g_idx")["data"].as_str().unwrap()[8..];
        let index: String = index.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let data = format!("{index}{hex}");
        case.tensor("m.g_idx").insert("data".into(), data.into());
        let (_dir, checkpoint) = case.open().unwrap();
        let wrong = decode(&checkpoint, "m.weight", 1 << 20).unwrap_err();
        assert!(wrong.contains(said), "{wrong}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_headers_and_bytes_say_nothing_panics(
        which: prop::sample::Index,
        tensor: prop::sample::Index,
        shape in prop::collection::vec(prop::sample::select(vec![0usize, 1, 2, 3, 8, 16, 64, 65]), 0..4),
        setting: prop::sample::Index,
        value in prop::sample::select(vec![json!(null), json!(-1), json!(0), json!(1), json!(7), json!("x"), json!([1, 0])]),
        what in 0..3,
        byte: prop::sample::Index,
        to: u8,
    ) {
        let all = cases();
        let mut case = which.get(&all).clone();
        let name = case.tensors.keys().nth(tensor.index(case.tensors.len())).unwrap().clone();
        match what {
            0 => {
                let size = {
                    let stored = Stored::deserialize(&case.tensors[&name]).unwrap();
                    let elements: usize = stored.shape.iter().product();
                    stored.data.len() / 2 / elements.max(1)
                };
                let bytes = shape.iter().product::<usize>() * size;
                case.tensor(&name).insert("shape".into(), json!(shape));
                case.tensor(&name).insert("data".into(), json!("5a".repeat(bytes)));
            }
            1 => {
                let fields = case.quantization_config.as_object_mut().unwrap();
                let field = fields.keys().nth(setting.index(fields.len())).unwrap().clone();
                fields.insert(field, value);
            }
            _ => {
                let mut data = case.tensor(&name)["data"].as_str().unwrap().to_owned();
                let at = 2 * byte.index(data.len() / 2);
                data.replace_range(at..at + 2, &format!("{to:02x}"));
                case.tensor(&name).insert("data".into(), json!(data));
            }
        }
        if let Ok((_dir, checkpoint)) = case.open() {
            for (name, tensor) in checkpoint.tensors() {
                if tensor.made.is_some() {
                    let _ = decode(&checkpoint, name, 64);
                }
            }
        }
    }
}

#[test]
fn what_is_kept_of_activations_is_left() {
    for (name, beside) in [
        ("packed, symmetric", &["m.input_scale", "m.weight_zero_point", "self_attn.k_scale"][..]),
        ("transformers' FP8", &["m.activation_scale"]),
    ] {
        let mut case = case(name);
        for beside in beside {
            let tensor = json!({"dtype": "F32", "shape": [1], "data": "0000803f"});
            case.tensors.insert((*beside).to_owned(), tensor);
        }
        let (_dir, checkpoint) = case.open().unwrap();
        assert_eq!(checkpoint.tensors().keys().collect::<Vec<_>>(), ["m.weight"]);
    }
}

#[test]
fn a_plain_dtype_is_what_is_stored_beside() {
    let (_, model) = crate::model::Model::open_dir(&models().join("packed-gptq-f16")).unwrap();
    assert_eq!(model.dtype, DType::F16);
}
