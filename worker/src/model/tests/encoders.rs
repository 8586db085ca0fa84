//! Encoders against transformers, and against themselves under every split and packing.

use super::*;

/// An input, and what transformers makes of it.
pub(super) struct Sample {
    pub ids: Vec<u32>,
    segments: Vec<u32>,
    masked: Vec<u32>,
    pooled_from: u32,
    pub values: Vec<Vec<f64>>,
}

impl Sample {
    fn outputs(&self, first: u32) -> Vec<u32> {
        match self.masked.is_empty() {
            true => vec![first + self.pooled_from],
            false => self.masked.iter().map(|p| first + p).collect(),
        }
    }
}

/// Every encoder's directory, and its inputs.
pub(super) fn encoders() -> Vec<(PathBuf, Vec<Sample>)> {
    let mut all = Vec::new();
    for dir in fs::read_dir(models()).unwrap() {
        let dir = dir.unwrap().path();
        let Ok(expected) = fs::read_to_string(dir.join("expected.json")) else { continue };
        let expected: Value = serde_json::from_str(&expected).unwrap();
        let Some(inputs) = expected["inputs"].as_array() else { continue };
        let list = |v: &Value| if v.is_array() { ids(v) } else { Vec::new() };
        let inputs = inputs.iter().map(|i| Sample {
            ids: ids(&i["ids"]),
            segments: list(&i["segments"]),
            masked: list(&i["masked"]),
            pooled_from: i["pooled_from"].as_u64().unwrap_or(0) as u32,
            values: i["values"].as_array().unwrap().iter().map(numbers).collect(),
        });
        all.push((dir.clone(), inputs.collect()));
    }
    assert!(all.len() >= 8);
    all
}

/// What a pipeline makes of inputs that share one step.
pub(super) fn encode(pipeline: &mut Pipeline, inputs: &[&Sample]) -> Vec<f32> {
    let (mut rows, mut ids, mut segments, mut outputs) = (vec![], vec![], vec![], vec![]);
    for input in inputs {
        outputs.extend(input.outputs(ids.len() as u32));
        rows.push(BatchRow { start: 0, count: input.ids.len() as u32, blocks: &[], rope_set: 0 });
        ids.extend(&input.ids);
        segments.extend(&input.segments);
    }
    pipeline.run(&rows, &ids, &segments, &outputs)
}

#[test]
fn every_encoder_matches_transformers_in_float32() {
    for (dir, inputs) in encoders() {
        let mut pipeline = Pipeline::new(&dir, &[], Way::new(DType::F32));
        for input in &inputs {
            let got = encode(&mut pipeline, &[input]);
            let want = input.values.concat();
            assert_eq!(got.len(), want.len(), "{}", dir.display());
            let worst = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            println!("{}: {} ids, worst value off by {worst:.2e}", dir.display(), input.ids.len());
            assert!(worst < 1e-4, "{}: {worst}", dir.display());
        }
    }
}

#[test]
fn every_split_and_packing_gives_the_same_bits() {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for (dir, inputs) in encoders() {
        let layers = describe(&dir, "m").unwrap().layer_count();
        for way in Way::all() {
            let mut whole = Pipeline::new(&dir, &[], way);
            let alone: Vec<f32> = inputs.iter().flat_map(|i| encode(&mut whole, &[i])).collect();
            assert!(alone.iter().all(|x| x.is_finite()));
            for cut in 0..layers {
                let cuts: Vec<u32> = if cut == 0 { (1..layers).collect() } else { vec![cut] };
                let mut pipeline = Pipeline::new(&dir, &cuts, way);
                let packed = encode(&mut pipeline, &inputs.iter().collect::<Vec<_>>());
                assert!(bits(&packed) == bits(&alone), "{} {way:?} cuts {cuts:?}", dir.display());
            }
        }
    }
}

#[test]
fn an_encoder_takes_whole_sequences_and_known_segments_only() {
    let (checkpoint, model) = Model::open_dir(&models().join("bert-classify-f32")).unwrap();
    let whole = spec(&model, 0, 4, Way::new(DType::F32));
    let weights = load(&checkpoint, &model, &whole);
    let mut state = State::new(&model, &whole, 0, 20, 2, Way::new(DType::F32).cpu()).unwrap();
    let mut refuse = |start, segments: &[u32], outputs: &[u32]| {
        let row = BatchRow { start, count: 3, blocks: &[], rope_set: 0 };
        let input = Input::Tokens { ids: &[2, 7, 3], segments };
        state.forward(&weights, &[row], input, outputs).map(|_| ()).unwrap_err()
    };
    assert!(matches!(refuse(1, &[], &[0]), StepError::Position { start: 1, .. }));
    assert!(matches!(refuse(0, &[0, 2, 0], &[0]), StepError::Segment { segment: 2, limit: 2 }));
    assert!(matches!(refuse(0, &[0], &[0]), StepError::Input { .. }));
    assert!(matches!(refuse(0, &[], &[3]), StepError::Outputs { .. }));
}
