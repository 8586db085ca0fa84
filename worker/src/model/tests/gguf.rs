//! Models in GGUF files, which tests/models/make_gguf.py made of the models beside them.

use super::*;
use crate::model::architecture::Head;

/// Where more files are, and the models that they were made of: what llama.cpp's own converter writes, for instance
/// (tests/models/README.md).
const FURTHER: [&str; 2] = ["STRATA_TEST_GGUF", "STRATA_TEST_GGUF_MODELS"];

/// Files, and the directories of the models that they were made of.
fn files() -> Vec<(PathBuf, PathBuf)> {
    let [further, their_models] = FURTHER.map(|variable| std::env::var_os(variable).map(PathBuf::from));
    let folder = further.unwrap_or_else(|| models().join("gguf"));
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.extension().is_some_and(|e| e == "gguf"));
    let places: Vec<PathBuf> = their_models.into_iter().chain([models()]).collect();
    let made_of = |file: PathBuf| {
        let directories = places.iter().map(|place| place.join(file.file_stem().unwrap()));
        let directory = directories.into_iter().find(|directory| directory.is_dir())?;
        Some((file, directory))
    };
    files.filter_map(made_of).collect()
}

/// A copy of a model whose configuration says what metadata cannot, as llama.cpp has it for all models of the architecture.
fn as_llama_cpp_knows_it(directory: &Path) -> Option<tempfile::TempDir> {
    let unsaid: &[&str] = match directory.file_name().and_then(|name| name.to_str()) {
        Some("smollm3-f32") => &["no_rope_layers", "layer_types", "sliding_window", "use_sliding_window"],
        Some("gpt2-old-bf16") => &["scale_attn_weights"],
        Some("mixtral-bf16") => &["sliding_window"],
        _ => return None,
    };
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&fs::read(directory.join("config.json")).unwrap()).unwrap();
    for field in unsaid {
        config.as_object_mut().unwrap().remove(*field);
    }
    fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    Some(copy)
}

#[test]
fn an_encoders_gguf_file_answers_as_the_model_that_it_was_made_of() {
    let mut checked = 0;
    let all = super::encoders::encoders();
    for (file, directory) in files() {
        let Some((_, inputs)) = all.iter().find(|(dir, _)| dir.file_name() == directory.file_name()) else {
            continue;
        };
        let (checkpoint, model) =
            Model::open_dir(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        // Of decoders that embed, the file may not say so.
        if model.tower.caches {
            continue;
        }
        let mut ours = Pipeline::of(&checkpoint, &model, &[], Way::new(DType::F32));
        for input in inputs {
            let got = super::encoders::encode(&mut ours, &[input]);
            let mut want: Vec<f32> = input.values.concat().iter().map(|x| *x as f32).collect();
            // Vectors of a GGUF file have length 1.
            if matches!(model.tower.head, Head::Embed(_)) {
                let length = want.iter().map(|x| x * x).sum::<f32>().sqrt();
                want.iter_mut().for_each(|x| *x /= length);
            }
            let off = distance(&got, &want);
            println!("{}: {} ids, off by {off:.2e}", file.display(), input.ids.len());
            assert!(off < 1e-4, "{}: {off}", file.display());
            checked += 1;
        }
    }
    assert!(checked > 0);
}

/// How far logits are from others, beside the largest of these.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

#[test]
fn a_gguf_file_answers_as_the_model_that_it_was_made_of() {
    let whole = Way::new(DType::F32);
    let (mut checked, mut wrong) = (0, Vec::new());
    for (file, directory) in files() {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let expected = fs::read_to_string(directory.join("expected.json")).unwrap();
        let expected: Value = serde_json::from_str(&expected).unwrap();
        // Encoders have no prompts.
        let Some(prompts) = expected["prompts"].as_array() else { continue };
        let (checkpoint, model) = match Model::open_dir(&file) {
            Ok(opened) => opened,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        let changed = as_llama_cpp_knows_it(&directory);
        let directory = changed.as_ref().map_or(directory.as_path(), |changed| changed.path());
        let original = Model::open_dir(directory).unwrap().1;
        if (&model.special.bos, &model.special.eos) != (&original.special.bos, &original.special.eos) {
            wrong.push(format!("{name}: {:?}, not {:?}", model.special, original.special));
        }
        let mut ours = Pipeline::of(&checkpoint, &model, &[], whole);
        let mut theirs = Pipeline::new(directory, &[], whole);
        for prompt in prompts {
            let (prompt, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy_ids"]));
            let (a, answer) = ours.generate(&prompt, 64, greedy.len());
            let (b, expected) = theirs.generate(&prompt, 64, greedy.len());
            let off = distance(&a, &b);
            println!("{name}: {} ids, logits off by {off:.2e}", prompt.len());
            let Some(stored) = &model.stored else {
                // Factors of rotation may differ in their last bit.
                wrong.extend((off > 1e-5 || answer != expected).then(|| format!("{name}: {off:.2e}")));
                continue;
            };
            // As it is, and widened.
            let way = Way { quantization: Some(stored.quantization), ..whole };
            let own = distance(&Pipeline::of(&checkpoint, &model, &[], way).step(&prompt, 0, 64), &a);
            println!("    {own:.2e} in {}", stored.quantization);
            wrong.extend((off > 0.5 || own > 0.05).then(|| format!("{name}: {off:.2e}, {own:.2e}")));
        }
        checked += 1;
    }
    assert!(checked >= 12 && wrong.is_empty(), "{checked}: {wrong:#?}");
}
