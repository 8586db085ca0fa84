//! The same bits under every split, chunking, batch and placement of blocks, in every format.

use super::*;

const PROMPT: usize = 45;

fn prompt(seed: u32) -> Vec<u32> {
    (0..PROMPT as u32).map(|i| (i * 37 + seed * 101 + i * i) % 2048).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_split_and_chunking_gives_the_same_bits() {
    let dir = models().join("shakespeare");
    for way in Way::all() {
        let (logits, answer) = Pipeline::new(&dir, &[], way).generate(&prompt(1), PROMPT, 6);
        assert!(logits.iter().all(|x| x.is_finite()));
        for cut in 0..6 {
            let cuts: Vec<u32> = if cut == 0 { vec![] } else { vec![cut] };
            let mut pipeline = Pipeline::new(&dir, &cuts, way);
            for chunk in [1, 7, 16, PROMPT] {
                let got = pipeline.generate(&prompt(1), chunk, 6);
                assert_eq!(bits(&got.0), bits(&logits), "{way:?} cut {cut} chunk {chunk}");
                assert_eq!(got.1, answer);
            }
        }
        let mut six = Pipeline::new(&dir, &[1, 2, 3, 4, 5], way);
        assert_eq!(bits(&six.generate(&prompt(1), 10, 1).0), bits(&logits));
    }
}

#[test]
fn weights_that_stay_memory_mapped_give_the_same_bits() {
    let dir = models().join("shakespeare");
    let spill = tempfile::tempdir().unwrap();
    let (checkpoint, model) = Model::open_dir(&dir).unwrap();
    for way in Way::all() {
        let expected = Pipeline::new(&dir, &[2], way).generate(&prompt(1), 16, 6);
        let mut pipeline = Pipeline::new(&dir, &[2], way);
        for (weights, _) in &mut pipeline.stages {
            let (spec, cpu) = (*weights.spec(), way.cpu());
            let mut go_on = |_| ControlFlow::Continue(());
            let spill = Some(spill.path());
            let mapped = Weights::load_in(spill, &checkpoint, &model, &spec, &cpu, &mut go_on).unwrap();
            assert_eq!(mapped.resident_bytes(), weights.resident_bytes());
            *weights = mapped;
        }
        let got = pipeline.generate(&prompt(1), 16, 6);
        assert_eq!((bits(&got.0), got.1), (bits(&expected.0), expected.1), "{way:?}");
    }
}

/// Sequences at different stages of their prompts share steps and a cache; blocks lie anywhere in it.
#[test]
fn neighbours_and_block_placement_change_no_bit() {
    let dir = models().join("shakespeare");
    for way in Way::all() {
        let alone: Vec<_> =
            (0..3).map(|s| Pipeline::new(&dir, &[], way).generate(&prompt(s), PROMPT, 1).0).collect();
        let mut pipeline = Pipeline::new(&dir, &[], way);
        let (weights, state) = &mut pipeline.stages[0];
        let tables: [&[u32]; 3] = [&[9, 2, 14, 15], &[0, 1, 3, 8], &[7, 13, 5, 4]];
        let prompts: Vec<_> = (0..3).map(prompt).collect();
        let sizes = [1, 16, 7];
        let mut done = [0; 3];
        let mut seen = 0;
        while seen < 3 {
            let (mut rows, mut ids, mut outputs, mut finished) = (vec![], vec![], vec![], vec![]);
            for s in (0..3).rev() {
                if done[s] == PROMPT {
                    continue;
                }
                let count = sizes[s].min(PROMPT - done[s]);
                rows.push(BatchRow {
                    start: done[s] as u32,
                    count: count as u32,
                    blocks: tables[s],
                    rope_set: 0,
                });
                ids.extend_from_slice(&prompts[s][done[s]..done[s] + count]);
                done[s] += count;
                if done[s] == PROMPT {
                    outputs.push(ids.len() as u32 - 1);
                    finished.push(s);
                }
            }
            let Output::Values(Values { values: logits, .. }) =
                state.forward(weights, &rows, Input::Tokens { ids: &ids, segments: &[] }, &outputs).unwrap()
            else {
                panic!("the stage has the head");
            };
            for (s, logits) in finished.iter().zip(logits.chunks(2048)) {
                assert_eq!(bits(logits), bits(&alone[*s]), "{way:?} sequence {s}");
                seen += 1;
            }
        }
    }
}

#[test]
fn a_step_that_does_not_fit_is_refused() {
    let (checkpoint, model) = Model::open_dir(&models().join("shakespeare")).unwrap();
    let whole = spec(&model, 0, 6, Way::new(DType::F32));
    let weights = load(&checkpoint, &model, &whole);
    let mut state = State::new(&model, &whole, 4, 20, 2, Way::new(DType::F32).cpu()).unwrap();
    let ids = [1; 21];
    let blocks: &[u32] = &[0, 1, 2, 3];
    let row = |start, count, blocks| BatchRow { start, count, blocks, rope_set: 0 };
    let mut refuse = |rows: &[BatchRow<'_>], input, outputs: &[u32]| {
        state.forward(&weights, rows, input, outputs).map(|_| ()).unwrap_err()
    };
    let tokens = |n: usize| Input::Tokens { ids: &ids[..n], segments: &[] };
    assert!(matches!(refuse(&[], tokens(0), &[]), StepError::Tokens { tokens: 0, .. }));
    assert!(matches!(refuse(&[row(0, 21, blocks)], tokens(21), &[]), StepError::Tokens { .. }));
    let wrap = [row(0, u32::MAX, blocks), row(0, u32::MAX, blocks)];
    assert!(matches!(refuse(&wrap, tokens(1), &[]), StepError::Tokens { .. }));
    assert!(matches!(refuse(&[row(0, 2, blocks)], tokens(3), &[]), StepError::Input { .. }));
    let empty = [row(0, 0, blocks), row(0, 1, blocks)];
    assert!(matches!(refuse(&empty, tokens(1), &[]), StepError::Position { row: 0, .. }));
    assert!(matches!(refuse(&[row(256, 1, blocks)], tokens(1), &[]), StepError::Position { .. }));
    assert!(matches!(refuse(&[row(u32::MAX, 1, blocks)], tokens(1), &[]), StepError::Position { .. }));
    assert!(matches!(refuse(&[row(15, 2, &[0])], tokens(2), &[]), StepError::BlockTable { needed: 2, .. }));
    assert!(matches!(
        refuse(&[row(0, 1, &[4])], tokens(1), &[]),
        StepError::Block { block: 4, limit: 4, .. }
    ));
    let bad = Input::Tokens { ids: &[2048], segments: &[] };
    assert!(matches!(refuse(&[row(0, 1, blocks)], bad, &[]), StepError::TokenId { id: 2048, .. }));
    let rows = candle_core::Tensor::zeros((1, 192), candle_core::DType::F32, &candle_core::Device::Cpu);
    let hidden = Input::Hidden(Tensors::Host(vec![rows.unwrap()]));
    assert!(matches!(refuse(&[row(0, 1, blocks)], hidden, &[]), StepError::InputKind { .. }));
    for outputs in [&[3][..], &[1, 0], &[1, 1], &[0, 1, 2]] {
        assert!(matches!(refuse(&[row(0, 3, blocks)], tokens(3), outputs), StepError::Outputs { limit: 2 }));
    }
    let other = spec(&model, 0, 6, Way::new(DType::BF16));
    let other = load(&checkpoint, &model, &other);
    let e = state.forward(&other, &[row(0, 1, blocks)], tokens(1), &[]).map(|_| ()).unwrap_err();
    assert_eq!(e, StepError::Weights);
    for (first, end, embedding, head) in [
        (0, 0, true, false),
        (0, 7, true, true),
        (3, 2, false, false),
        (0, 3, false, false),
        (0, 3, true, true),
    ] {
        let spec = RangeSpec {
            layers: LayerRange::new(first, end),
            embedding,
            head,
            dtype: DType::F32,
            quantization: None,
        };
        assert!(matches!(
            State::new(&model, &spec, 1, 1, 1, Way::new(DType::F32).cpu()),
            Err(ModelError::Range { .. })
        ));
    }
    assert!(matches!(
        State::new(&model, &whole, u32::MAX, 1, 1, Way::new(DType::F32).cpu()),
        Err(ModelError::Memory(_))
    ));
}
