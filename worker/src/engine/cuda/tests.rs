//! Steps of a whole model, run by the emulator (tests/emulator).

use std::ops::ControlFlow;

use strata_proto::{DType, LayerRange, v1};

use super::*;
use crate::{
    engine::Values,
    kernels::{
        cpu::isa::Isa,
        cuda::{memory::DOWNLOADED, tests::emulator},
        ops::BatchRow,
    },
    sampler::{Draw, Sampled, SamplingParams, TokenHistory, sample},
};

/// Of three sequences, the first of each.
const TOKENS: [u32; 3] = [5, 17, 60];

fn engine() -> (CudaEngine, usize) {
    emulator();
    let cpu = Cpu::on(Isa::detect());
    let mut engine = CudaEngine::new(&"cuda:0".parse().unwrap(), cpu, None).unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/llama-bias-f32");
    let (checkpoint, model) = Model::open_dir(&dir).unwrap();
    let layers = LayerRange::new(0, model.tower.layers.len() as u32);
    let spec = RangeSpec { layers, embedding: true, head: true, dtype: DType::F32, quantization: None };
    engine.load(None, &checkpoint, &model, &spec, &mut |_| ControlFlow::Continue(())).unwrap();
    // Recorded steps of three rows have one more, that stands for nothing.
    engine.prepare(Size { kv_blocks: 3, tokens: 16, outputs: 4 }).unwrap();
    (engine, model.tower.vocab)
}

/// A step of three sequences, and the bytes that left the GPU for it.
fn step<'a>(engine: &'a mut CudaEngine, draws: &[Option<Draw<'_>>]) -> (Values<'a>, u64) {
    let blocks = [[0], [1], [2]];
    let rows = blocks.each_ref().map(|blocks| BatchRow { start: 0, count: 1, blocks, rope_set: 0 });
    let input = Input::Tokens { ids: &TOKENS, segments: &[] };
    DOWNLOADED.set(0);
    match engine.forward(Step { rows: &rows, input, outputs: &[0, 1, 2], draws }).unwrap() {
        Output::Values(values) => (values, DOWNLOADED.get()),
        Output::Hidden(_) => panic!("the stage has the head"),
    }
}

#[test]
fn only_tokens_leave_a_gpu() {
    let (mut engine, vocab) = engine();
    let base = v1::Sampling { temperature: Some(0.8), ..v1::Sampling::default() };
    let mut history = TokenHistory::default();
    (0..40).for_each(|token| history.push_answer(token));
    let all = [
        (v1::Sampling::default(), None),
        (base.clone(), None),
        (v1::Sampling { top_k: Some(500), ..base.clone() }, None),
        (v1::Sampling { top_p: Some(0.9), ..base.clone() }, None),
        (v1::Sampling { min_p: Some(0.1), top_k: Some(50), top_p: Some(0.9), ..base.clone() }, Some(5)),
        (v1::Sampling { repetition_penalty: Some(1.3), frequency_penalty: Some(0.2), ..base.clone() }, None),
        (v1::Sampling { logit_bias: [(3, 9.0), (5, -100.0)].into_iter().collect(), ..base }, Some(20)),
        (v1::Sampling { presence_penalty: Some(2.0), ..v1::Sampling::default() }, Some(0)),
    ];
    for (sampling, logprobs) in all {
        let params = SamplingParams::try_from(&sampling).unwrap();
        // Alone, captured, and as a graph: the logits are the same.
        for position in 0..3 {
            let (values, bytes) = step(&mut engine, &[None; 3]);
            assert_eq!(bytes, 4 * 3 * vocab as u64);
            let logits: Vec<Vec<f32>> = values.values.chunks(vocab).map(<[f32]>::to_vec).collect();
            let draw = |seed| Draw { params: &params, history: Some(&history), seed, position, logprobs };
            let draws = [draw(1), draw(2), draw(3)];
            let (values, bytes) = step(&mut engine, &draws.map(Some));
            // A token and its log-probabilities.
            assert!(bytes <= 3 * 256, "{bytes} bytes");
            for ((mut logits, draw), got) in logits.into_iter().zip(&draws).zip(values.drawn) {
                let want = sample(values.cpu, &mut logits, &mut vec![0; vocab], draw).unwrap();
                let got: &Sampled = got.as_ref().unwrap().as_ref().unwrap();
                assert_eq!(*got, want, "{sampling:?}");
            }
        }
    }
}
