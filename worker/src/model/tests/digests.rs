//! Digests of modules: the same however a model is split, held and stored, and others as soon as one byte is.

use std::collections::BTreeMap;

use proptest::prelude::*;
use strata_proto::ModuleId;

use super::*;
use crate::{model::digest::digests as read_digests, weights::TensorInfo};

/// Every model of the tests whose tensors are as the files have them.
fn fixtures() -> Vec<PathBuf> {
    let found = fs::read_dir(models()).unwrap().map(|entry| entry.unwrap().path());
    let is_plain =
        |dir: &PathBuf| Checkpoint::open(dir).unwrap().tensors().values().all(|t| t.made.is_none());
    found.filter(|dir| dir.join("expected.json").exists()).filter(is_plain).collect()
}

fn digests(dir: &Path) -> Vec<ModuleDigest> {
    read_digests(dir, &[]).unwrap()
}

fn ids(digests: &[ModuleDigest]) -> Vec<(ModuleId, strata_proto::Digest)> {
    digests.iter().map(|module| (module.id, module.digest)).collect()
}

/// Writes tensors into a safetensors file.
fn write(path: &Path, tensors: &[(&String, &TensorInfo, Vec<u8>)]) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, tensor, bytes) in tensors {
        let TensorDType::Float(dtype) = tensor.dtype else { panic!("{name} has no floats") };
        let offsets = [data.len(), data.len() + bytes.len()];
        let entry = serde_json::json!({
            "dtype": dtype.name().to_uppercase(), "shape": tensor.shape, "data_offsets": offsets
        });
        header.insert((*name).clone(), entry);
        data.extend_from_slice(bytes);
    }
    let header = Value::from(header).to_string();
    let size = (header.len() as u64).to_le_bytes();
    fs::write(path, [&size[..], header.as_bytes(), &data].concat()).unwrap();
}

/// A copy of a model with the tensors of its modules spread over three files, in another order, but for those that lie in
/// directories of sentence-transformers. What a model ignores is left out.
fn spread(dir: &Path) -> tempfile::TempDir {
    let copy = super::mutations::directory(dir);
    for entry in fs::read_dir(copy.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains(".safetensors") {
            fs::remove_file(path).unwrap();
        }
    }
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut shards = vec![Vec::new(); 3];
    let modules = digests(dir);
    let named = |name: &String| modules.iter().any(|m| m.tensors.iter().any(|tensor| tensor.name == *name));
    let used = checkpoint.tensors().iter().filter(|(name, _)| named(name) && !name.starts_with("modules."));
    for (i, (name, tensor)) in used.rev().enumerate() {
        let mut bytes = Vec::new();
        checkpoint.read(tensor, 0, &mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, tensor.bytes, "a model of the tests has small tensors");
        shards[i % 3].push((name, tensor, bytes));
    }
    let mut map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{i}.safetensors");
        write(&copy.path().join(&file), shard);
        map.extend(shard.iter().map(|(name, ..)| ((*name).clone(), file.clone())));
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    fs::write(copy.path().join("model.safetensors.index.json"), index).unwrap();
    copy
}

#[test]
fn every_split_format_and_layout_of_files_has_the_digests_of_the_whole() {
    for dir in fixtures() {
        let whole = digests(&dir);
        assert_eq!(ids(&digests(spread(&dir).path())), ids(&whole), "{}: spread over files", dir.display());
        let (checkpoint, model) = Model::open_dir(&dir).unwrap();
        let layers = model.tower.layers.len() as u32;
        let ways =
            [Way::new(DType::F32), Way { quantization: Some(Quantization::Int4), ..Way::new(DType::BF16) }];
        for (cuts, way) in [vec![], vec![1], (1..layers).collect()].into_iter().zip(ways.into_iter().cycle())
        {
            let ends = cuts.iter().copied().chain([layers]);
            let stages = [0].into_iter().chain(cuts.clone()).zip(ends).flat_map(|(first, end)| {
                let weights = load(&checkpoint, &model, &spec(&model, first, end, way));
                weights.digests().modules(first).collect::<Vec<_>>()
            });
            let stages: Vec<_> = stages.collect();
            assert_eq!(stages, ids(&whole), "{} cut at {cuts:?}", dir.display());
        }
    }
}

#[test]
fn a_tensor_that_two_modules_have_counts_in_both() {
    let modules = digests(&models().join("shakespeare"));
    let with = |name: &str| {
        let has = |m: &&ModuleDigest| m.tensors.iter().any(|tensor| tensor.name == name);
        modules.iter().filter(has).map(|m| m.id).collect::<Vec<_>>()
    };
    assert_eq!(with("model.embed_tokens.weight"), [ModuleId::Embedding, ModuleId::Head]);
    assert_eq!(with("model.layers.3.mlp.up_proj.weight"), [ModuleId::Layer(3)]);
}

#[test]
fn a_flipped_bit_of_any_part_of_a_packed_weight_changes_the_digest_of_its_module() {
    let copy = super::mutations::directory(&models().join("packed-gptq-f16"));
    let file = copy.path().join("model.safetensors");
    let (whole, before) = (fs::read(&file).unwrap(), digests(copy.path()));
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let offsets: Value = serde_json::from_slice(&whole[8..header]).unwrap();
    for part in ["qweight", "qzeros", "scales", "g_idx"] {
        let name = format!("model.layers.1.mlp.down_proj.{part}");
        let mut bytes = whole.clone();
        bytes[header + offsets[name]["data_offsets"][1].as_u64().unwrap() as usize - 1] ^= 1;
        fs::write(&file, &bytes).unwrap();
        let changed = before.iter().zip(digests(copy.path())).filter(|(old, new)| old.digest != new.digest);
        let changed: Vec<ModuleId> = changed.map(|(old, _)| old.id).collect();
        assert_eq!(changed, [ModuleId::Layer(1)], "{part}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_flipped_bit_changes_the_digests_of_the_modules_that_have_it_and_no_others(
        fixture: prop::sample::Index,
        place: prop::sample::Index,
        bit in 0..8u32,
    ) {
        let fixtures = fixtures();
        let dir = fixture.get(&fixtures);
        let copy = spread(dir);
        let before = digests(copy.path());
        let file = copy.path().join(format!("model-{}.safetensors", place.index(3)));
        let mut bytes = fs::read(&file).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let at = header + place.index(bytes.len() - header);
        bytes[at] ^= 1u8 << bit;
        fs::write(&file, &bytes).unwrap();
        let checkpoint = Checkpoint::open(copy.path()).unwrap();
        let hit = checkpoint.tensors().iter().find(|(_, tensor)| {
            let (shard, offset) = tensor.place();
            shard == place.index(3) && (offset..offset + tensor.bytes).contains(&(at as u64))
        });
        let hit = hit.unwrap().0;
        let mut changed = Vec::new();
        for (old, new) in before.iter().zip(digests(copy.path())) {
            let has = old.tensors.iter().any(|tensor| tensor.name == *hit);
            prop_assert_eq!(old.digest != new.digest, has, "{}: byte {} of {}", old.id, at, hit);
            changed.extend(has.then_some(old.id));
        }
        prop_assert!(!changed.is_empty(), "{hit} is in no module");
    }
}
