//! Seeded damage to configurations and headers: whatever it is, a model opens and runs, or is refused; nothing panics
//! and nothing allocates more than the damaged file could mean.

use serde_json::json;

use super::*;

/// Cases per model and kind of damage.
const CASES: u64 = 80;
/// Largest model that is loaded, if damage makes it larger.
const LARGEST: u64 = 64 << 20;

/// A small generator (SplitMix64), so that a case can be run again by its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// A value that a field should not have, or a neighbour of the one it has.
fn absurd(random: &mut Random, old: &Value) -> Value {
    let values = [
        Value::Null,
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!(1_000_000_000u64),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e300),
        json!(1e-300),
        json!(0.5),
        json!(""),
        json!("relu"),
        json!("sliding_attention"),
        json!(true),
        json!(false),
        json!([]),
        json!([0, -1, 1e9, "x", null]),
        json!({}),
        json!({"rope_type": "longrope", "factor": 0}),
    ];
    match (random.below(4), old.as_i64()) {
        (0, Some(n)) => json!(n.wrapping_add(random.below(5) as i64).wrapping_sub(2)),
        (1, Some(n)) => json!(n.wrapping_mul(2)),
        _ => values[random.below(values.len())].clone(),
    }
}

/// Changes, adds or removes one field of an object, perhaps deep inside.
fn mutate(random: &mut Random, object: &mut serde_json::Map<String, Value>) {
    let keys: Vec<String> = object.keys().cloned().collect();
    if keys.is_empty() {
        return;
    }
    let key = &keys[random.below(keys.len())];
    match object.get_mut(key) {
        Some(Value::Object(inner)) if random.below(3) > 0 => mutate(random, inner),
        Some(Value::Array(list)) if !list.is_empty() && random.below(2) == 0 => {
            let at = random.below(list.len());
            list[at] = absurd(random, &list[at].clone());
        }
        Some(_) if random.below(6) == 0 => drop(object.remove(key)),
        Some(value) => *value = absurd(random, &value.clone()),
        None => {}
    }
}

/// Opens what lies in `dir` and, if it is a model, runs it.
fn try_out(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (checkpoint, model) = Model::open_dir(dir)?;
    let profile = model.profile(&checkpoint, "m");
    let layers = LayerRange::new(0, profile.layer_count());
    let bytes = profile.weight_bytes(layers, Format::Float(DType::BF16))
        + profile.workspace_bytes(layers, 16, 2)
        + profile.state_bytes(layers, DType::BF16, StateRoom { positions: 64, slots: 1 }).total();
    if bytes > LARGEST {
        return Ok(());
    }
    let spec = spec(&model, 0, profile.layer_count(), Way::new(DType::BF16));
    let cpu = Way::new(DType::BF16).cpu();
    let weights = Weights::load(&checkpoint, &model, &spec, &cpu, &mut |_| ControlFlow::Continue(()))?;
    let mut state = State::new(&model, &spec, 4, 16, 2, cpu)?;
    let count = 3.min(model.tower.context) as u32;
    let row = BatchRow { start: 0, count, blocks: &[2], rope_set: 0 };
    let ids = &[0; 3][..count as usize];
    state.forward(&weights, &[row], Input::Tokens { ids, segments: &[] }, &[0])?;
    Ok(())
}

/// A directory with the files of `model`, into which a case writes what it damages.
pub(super) fn directory(model: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(model, dir.path());
    dir
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_file() {
            fs::copy(&path, target).unwrap();
        } else {
            fs::create_dir(&target).unwrap();
            copy(&path, &target);
        }
    }
}

/// Every model with a configuration.
fn all_models() -> Vec<PathBuf> {
    let dirs = fs::read_dir(models()).unwrap().map(|d| d.unwrap().path());
    let mut dirs: Vec<_> = dirs.filter(|d| d.join("config.json").exists()).collect();
    dirs.sort();
    dirs
}

/// How many cases were refused, and how many ran.
#[derive(Default, Debug)]
struct Counts {
    refused: u64,
    ran: u64,
}

impl Counts {
    fn count(&mut self, what: &str, outcome: Result<(), Box<dyn std::error::Error>>) {
        match outcome {
            Ok(()) => self.ran += 1,
            Err(error) => {
                println!("{what}: {error}");
                assert!(!error.to_string().is_empty());
                self.refused += 1;
            }
        }
    }
}

#[test]
fn damaged_configurations_are_refused_or_run_and_never_panic() {
    let mut counts = Counts::default();
    for (number, model) in all_models().iter().enumerate() {
        let dir = directory(model);
        let text = fs::read_to_string(model.join("config.json")).unwrap();
        for case in 0..CASES {
            let mut random = Random(number as u64 * 1000 + case);
            let mut config: Value = serde_json::from_str(&text).unwrap();
            for _ in 0..=random.below(3) {
                mutate(&mut random, config.as_object_mut().unwrap());
            }
            fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            let what = format!("{} case {case}", model.display());
            println!("{what}");
            counts.count(&what, try_out(dir.path()));
        }
    }
    assert!(counts.refused > 500 && counts.ran > 300, "{counts:?}");
}

#[test]
fn damaged_files_of_sentence_transformers_are_refused_or_run_and_never_panic() {
    let files = [
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "3_LayerNorm/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "tokenizer_config.json",
    ];
    let model = models().join("bert-sentences-f32");
    let mut counts = Counts::default();
    for (number, file) in files.iter().enumerate() {
        let dir = directory(&model);
        let text = fs::read_to_string(model.join(file)).unwrap();
        for case in 0..CASES {
            let mut random = Random((2 << 32) + number as u64 * 1000 + case);
            let mut value: Value = serde_json::from_str(&text).unwrap();
            for _ in 0..=random.below(3) {
                match &mut value {
                    Value::Array(list) if random.below(4) > 0 => {
                        let at = random.below(list.len());
                        mutate(&mut random, list[at].as_object_mut().unwrap());
                    }
                    Value::Array(list) if list.len() > 1 => drop(list.remove(random.below(list.len()))),
                    Value::Array(_) => {}
                    other => mutate(&mut random, other.as_object_mut().unwrap()),
                }
            }
            fs::write(dir.path().join(file), value.to_string()).unwrap();
            counts.count(&format!("{file} case {case}"), try_out(dir.path()));
        }
    }
    assert!(counts.refused > 100 && counts.ran > 100, "{counts:?}");
}

#[test]
fn damaged_headers_are_refused_or_run_and_never_panic() {
    let mut counts = Counts::default();
    for (number, model) in all_models().iter().enumerate() {
        let dir = directory(model);
        let mut shards: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        shards.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
        shards.sort();
        let path = &shards[0];
        let whole = fs::read(path).unwrap();
        let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        for case in 0..CASES {
            let mut random = Random((1 << 32) + number as u64 * 1000 + case);
            let mut bytes = whole.clone();
            match random.below(5) {
                0 => bytes.truncate(random.below(whole.len())),
                1 => bytes[random.below(8)] = random.next() as u8,
                _ => {
                    for _ in 0..=random.below(4) {
                        let at = 8 + random.below(header);
                        // Mostly digits, brackets and commas, so that much of it still parses.
                        let likely = b"0123456789,:[]{}\"-eF3261";
                        bytes[at] = likely[random.below(likely.len())];
                    }
                }
            }
            fs::write(path, bytes).unwrap();
            let what = format!("{} case {case}", path.display());
            println!("{what}");
            counts.count(&what, try_out(dir.path()));
        }
    }
    assert!(counts.refused > 500, "{counts:?}");
}
