//! What a real card refuses, and the engine by itself has no need of.

use std::ops::Range;

use candle_core::{Device, Tensor};
use strata_proto::{DType, LayerRange};

use super::{recordings::Recordings, *};
use crate::kernels::{
    cpu::isa::Isa,
    cuda::{
        memory,
        tests::{changes, emulator},
    },
    ops::{BLOCK_TOKENS, BatchRow},
};

/// Sequences that there is a block for.
const SEQUENCES: usize = 24;

/// A stage of a model of six layers, in float32.
fn engine(first: u32) -> CudaEngine {
    emulator();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/shakespeare");
    let (checkpoint, model) = Model::open_dir(&directory).unwrap();
    let layers = LayerRange::new(first, model.tower.layers.len() as u32);
    let spec = RangeSpec { layers, embedding: first == 0, head: true, dtype: DType::F32, quantization: None };
    let mut engine = CudaEngine::new(&"cuda:0".parse().unwrap(), Cpu::on(Isa::detect()), None).unwrap();
    engine.load(None, &checkpoint, &model, &spec, &mut |_| ControlFlow::Continue(())).unwrap();
    engine.prepare(size(64)).unwrap();
    engine
}

fn size(tokens: u32) -> Size {
    Size { kv_blocks: SEQUENCES as u32, tokens, outputs: SEQUENCES as u32 }
}

/// A token for each of some sequences, at one position of all; gives their logits.
fn decode(engine: &mut CudaEngine, sequences: Range<usize>, position: u32) -> Vec<f32> {
    let blocks: Vec<u32> = (0..SEQUENCES as u32).rev().collect();
    let row = |r: usize| BatchRow { start: position, count: 1, blocks: &blocks[r..=r], rope_set: 0 };
    let rows: Vec<_> = sequences.clone().map(row).collect();
    let ids: Vec<u32> = sequences.map(|r| 7 * r as u32 + position).collect();
    let outputs: Vec<u32> = (0..rows.len() as u32).collect();
    let input = Input::Tokens { ids: &ids, segments: &[] };
    let draws = vec![None; rows.len()];
    values(engine, Step { rows: &rows, input, outputs: &outputs, draws: &draws })
}

fn values(engine: &mut CudaEngine, step: Step<'_>) -> Vec<f32> {
    match engine.forward(step).unwrap() {
        Output::Values(values) => values.values.to_vec(),
        Output::Hidden(_) => panic!("the stage has the head"),
    }
}

fn recordings(engine: &mut CudaEngine) -> &mut Recordings {
    &mut engine.state.as_mut().unwrap().recordings
}

/// The same, until steps of so many rows are recorded: others of this process may have the turn.
fn decode_recorded(engine: &mut CudaEngine, count: usize, position: u32) -> Vec<f32> {
    loop {
        let values = decode(engine, 0..count, position);
        let number = recordings(engine).padded(count).unwrap();
        if recordings(engine).recorded().contains(&number) {
            return values;
        }
        std::thread::yield_now();
    }
}

/// The keys of the first layer, and elements of a block of them.
fn keys(engine: &CudaEngine) -> (Vec<f32>, usize) {
    let attention = &engine.weights.as_ref().unwrap().model.tower.layers[0].attention;
    let block = attention.kv_heads * attention.head_dim * BLOCK_TOKENS;
    let mut values = vec![0f32; SEQUENCES * block];
    memory::download(&engine.gpu.stream, &mut values, engine.state.as_ref().unwrap().cache.own()[0].keys)
        .unwrap();
    engine.gpu.wait().unwrap();
    (values, block)
}

#[test]
fn few_numbers_of_rows_are_recorded_and_padding_leaves_no_trace() {
    let (mut engine, mut alone) = (engine(0), engine(0));
    let vocab = engine.weights.as_ref().unwrap().model.tower.vocab;
    for (position, count) in [1, 3, 5, 9, 17].into_iter().enumerate() {
        let (before, block) = keys(&engine);
        let values = decode_recorded(&mut engine, count, position as u32);
        let (after, _) = keys(&engine);
        let changed = |b: &usize| before[b * block..][..block] != after[b * block..][..block];
        let changed: Vec<usize> = (0..SEQUENCES).filter(changed).collect();
        assert_eq!(changed, (SEQUENCES - count..SEQUENCES).collect::<Vec<_>>(), "a step of {count} rows");
        for (row, got) in values.chunks(vocab).enumerate() {
            let want = decode(&mut alone, row..row + 1, position as u32);
            let worst = got.iter().zip(&want).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs()));
            assert!(worst < 1e-3, "row {row} of {count}: {worst} off");
        }
    }
    assert_eq!(recordings(&mut engine).recorded(), [1, 4, 8, 16, 24]);
}

#[test]
fn recordings_take_so_much_memory_and_no_more() {
    let mut engine = engine(0);
    recordings(&mut engine).limit(1);
    decode_recorded(&mut engine, 1, 0);
    assert!(recordings(&mut engine).bytes() > 0, "a graph takes memory");
    for _ in 0..20 {
        decode(&mut engine, 0..2, 0);
    }
    assert_eq!(recordings(&mut engine).recorded(), [1]);
}

/// What is beside a recording refused, a step has no need of, wherever its rows come from.
#[test]
fn a_step_allocates_nothing() {
    let (mut first, mut last) = (engine(0), engine(3));
    let width = last.weights.as_ref().unwrap().model.tower.width;
    // Of a prompt, so that nothing is recorded.
    let run = |engine: &mut CudaEngine, count: usize| {
        let ids: Vec<u32> = (0..count as u32).collect();
        let rows = [BatchRow { start: 0, count: count as u32, blocks: &[0], rope_set: 0 }];
        let input = match engine.loaded().unwrap().spec.embedding {
            true => Input::Tokens { ids: &ids, segments: &[] },
            false => {
                let hidden = Tensor::ones((count, width), candle_core::DType::F32, &Device::Cpu).unwrap();
                Input::Hidden(Tensors::Host(vec![hidden]))
            }
        };
        values(engine, Step { rows: &rows, input, outputs: &[count as u32 - 1], draws: &[None] });
    };
    for engine in [&mut first, &mut last] {
        let before = changes();
        for count in [3, 16, 2] {
            run(engine, count);
        }
        assert_eq!(changes(), before, "memory, modules and handles stay as they were prepared");
    }
}

#[test]
fn longer_steps_than_a_grid_has_blocks_are_refused_when_a_stage_is_prepared() {
    let mut engine = engine(3);
    let error = engine.prepare(size(70_000)).unwrap_err().to_string();
    assert!(error.contains("70000") && error.contains("--max-step-tokens 65520"), "{error}");
    let outputs = Size { outputs: 66_000, ..size(64) };
    let error = engine.prepare(outputs).unwrap_err().to_string();
    assert!(error.contains("--max-step-rows"), "{error}");
    engine.prepare(size(64)).unwrap();
}
