//! Logits of every position of some texts in every format, for tests/bench/quality.py.
//!
//! `cargo bench -p strata-worker --bench logits -- MODEL_DIR IDS.json OUT_DIR`: IDS.json holds lists of token ids; for
//! each format, OUT_DIR gets a file of little-endian f32 `(tokens, vocabulary)`. The residual stream is f32 throughout,
//! so that only the weights differ.

use std::{fs, io::Write, ops::ControlFlow, path::Path};

use strata_proto::{DType, LayerRange, Quantization};
use strata_worker::{
    device::Compute,
    engine::{
        Input, Output, Values,
        cpu::{State, Weights},
    },
    model::{BLOCK_TOKENS, BatchRow, Model, RangeSpec},
};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [model, ids, out] = &arguments[..] else {
        // Run with all benchmarks, it has nothing to do.
        println!("logits: expected MODEL_DIR IDS.json OUT_DIR");
        return;
    };
    let ids = fs::read_to_string(ids).expect("the ids");
    let texts: Vec<Vec<u32>> = serde_json::from_str(&ids).expect("lists of token ids");
    let formats = [("f32", DType::F32, None), ("bf16", DType::BF16, None)]
        .into_iter()
        .chain(Quantization::ALL.map(|q| (q.name(), DType::F32, Some(q))));
    for (name, dtype, quantization) in formats {
        let mut file =
            fs::File::create(Path::new(out).join(format!("{name}.bin"))).expect("a file for logits");
        for logits in logits(Path::new(model), &texts, dtype, quantization) {
            file.write_all(&logits.to_le_bytes()).expect("writing logits");
        }
    }
}

fn logits(dir: &Path, texts: &[Vec<u32>], dtype: DType, quantization: Option<Quantization>) -> Vec<f32> {
    let (checkpoint, model) = Model::open_dir(dir).expect("a model");
    let layers = LayerRange::new(0, model.profile(&checkpoint, "model").layer_count());
    let spec = RangeSpec { layers, embedding: true, head: true, dtype, quantization };
    let cpu = Compute::shared_by(1).cpu();
    let weights = Weights::load(&checkpoint, &model, &spec, &cpu, &mut |_| ControlFlow::Continue(()));
    let weights = weights.expect("loading");
    let longest = texts.iter().map(Vec::len).max().expect("a text");
    let blocks: Vec<u32> = (0..longest.div_ceil(BLOCK_TOKENS) as u32).collect();
    let (count, most) = (blocks.len() as u32, longest as u32);
    let mut state = State::new(&model, &spec, count, most, most, cpu).expect("memory");
    let mut all = Vec::new();
    for ids in texts {
        let row = BatchRow { start: 0, count: ids.len() as u32, blocks: &blocks, rope_set: 0 };
        let outputs: Vec<u32> = (0..ids.len() as u32).collect();
        let input = Input::Tokens { ids, segments: &[] };
        match state.forward(&weights, &[row], input, &outputs).expect("a step") {
            Output::Values(Values { values, .. }) => all.extend_from_slice(values),
            Output::Hidden(_) => unreachable!("the stage has the head"),
        }
    }
    all
}
