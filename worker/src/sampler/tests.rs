//! What the sampler chooses, and what it refuses.

use super::*;
use crate::kernels::cpu::isa::Isa;

fn cpu() -> Cpu {
    Cpu::on(Isa::detect())
}

fn params(s: v1::Sampling) -> SamplingParams {
    SamplingParams::try_from(&s).unwrap()
}

fn run(logits: &[f32], params: &SamplingParams, history: Option<&TokenHistory>, position: u32) -> u32 {
    let draw = Draw { params, history, seed: 42, position, logprobs: None };
    sample(&cpu(), &mut logits.to_vec(), &mut vec![0; logits.len()], &draw).unwrap().token
}

fn shares(logits: &[f32], params: &SamplingParams, draws: u32) -> Vec<f64> {
    let mut counts = vec![0u32; logits.len()];
    (0..draws).for_each(|p| counts[run(logits, params, None, p) as usize] += 1);
    counts.iter().map(|c| f64::from(*c) / f64::from(draws)).collect()
}

#[test]
fn greedy_takes_the_largest_and_ties_go_to_the_lowest_id() {
    let greedy = params(v1::Sampling::default());
    assert_eq!(run(&[1.0, 3.0, 3.0, 2.0], &greedy, None, 0), 1);
    assert_eq!(run(&[-5.0, -5.0], &greedy, None, 9), 0);
}

#[test]
fn withheld_tokens_are_not_drawn_before_their_position_whatever_else_is_asked() {
    let bias = [(1, 100.0), (2, 5.0)].into_iter().collect();
    let mut params = params(v1::Sampling { logit_bias: bias, ..Default::default() });
    params.withheld = ([1, 900].into(), 7);
    assert_eq!([6, 7].map(|position| run(&[1.0, 9.0, 0.0, 2.0], &params, None, position)), [2, 1]);
    params.temperature = 100.0;
    assert!((0..7).all(|position| run(&[1.0, 9.0], &params, None, position) == 0));
}

#[test]
fn draws_follow_the_distribution_and_depend_on_seed_and_position_alone() {
    let logits: Vec<f32> = [0.5f32, 0.25, 0.15, 0.1].iter().map(|p| p.ln()).collect();
    let plain = params(v1::Sampling { temperature: Some(1.0), ..Default::default() });
    for (share, p) in shares(&logits, &plain, 40_000).iter().zip([0.5, 0.25, 0.15, 0.1]) {
        assert!((share - p).abs() < 0.01, "{share} {p}");
    }
    let hot = params(v1::Sampling { temperature: Some(2.0), ..Default::default() });
    let root: Vec<f64> = [0.5f64, 0.25, 0.15, 0.1].iter().map(|p| p.sqrt()).collect();
    for (share, p) in shares(&logits, &hot, 40_000).iter().zip(&root) {
        assert!((share - p / root.iter().sum::<f64>()).abs() < 0.01);
    }
    for position in 0..100 {
        assert_eq!(run(&logits, &plain, None, position), run(&logits, &plain, None, position));
    }
}

#[test]
fn filters_keep_exactly_their_tokens() {
    let logits: Vec<f32> = [0.1f32, 0.5, 0.15, 0.25].iter().map(|p| p.ln()).collect();
    let base = v1::Sampling { temperature: Some(1.0), ..Default::default() };
    for (sampling, kept) in [
        (v1::Sampling { top_k: Some(2), ..base.clone() }, vec![1, 3]),
        (v1::Sampling { top_k: Some(1), ..base.clone() }, vec![1]),
        (v1::Sampling { top_k: Some(1000), ..base.clone() }, vec![0, 1, 2, 3]),
        (v1::Sampling { top_p: Some(0.49), ..base.clone() }, vec![1]),
        (v1::Sampling { top_p: Some(0.51), ..base.clone() }, vec![1, 3]),
        (v1::Sampling { top_p: Some(0.8), ..base.clone() }, vec![1, 2, 3]),
        (v1::Sampling { top_p: Some(1e-6), ..base.clone() }, vec![1]),
        (v1::Sampling { min_p: Some(0.4), ..base.clone() }, vec![1, 3]),
        (v1::Sampling { min_p: Some(1.0), ..base.clone() }, vec![1]),
        // Among the first three, 0.5 + 0.25 are 0.83 of the weight.
        (v1::Sampling { top_k: Some(3), top_p: Some(0.8), ..base.clone() }, vec![1, 3]),
        (v1::Sampling { temperature: Some(1e-30), ..base.clone() }, vec![1]),
    ] {
        let shares = shares(&logits, &params(sampling.clone()), 2000);
        let drawn: Vec<usize> = (0..4).filter(|i| shares[*i] > 0.0).collect();
        assert_eq!(drawn, kept, "{sampling:?}");
    }
    // Ties at the border of top-k go to the lowest ids.
    let tied = params(v1::Sampling { top_k: Some(2), ..base });
    assert!(shares(&[1.0; 5], &tied, 500)[2..].iter().all(|s| *s == 0.0));
}

#[test]
fn penalties_and_bias_change_the_choice() {
    let mut history = TokenHistory::default();
    history.push_prompt(0);
    history.push_answer(1);
    history.push_answer(1);
    let pick = |s: v1::Sampling, logits: &[f32]| run(logits, &params(s), Some(&history), 0);
    let d = v1::Sampling::default;
    assert_eq!(pick(d(), &[3.0, 2.9, 2.0]), 0);
    // Prompt and answer are both penalised, whatever the sign.
    assert_eq!(pick(v1::Sampling { repetition_penalty: Some(2.0), ..d() }, &[3.0, 2.9, 2.0]), 2);
    assert_eq!(pick(v1::Sampling { repetition_penalty: Some(2.0), ..d() }, &[-1.0, -1.0, -1.5]), 2);
    // Only the answer, once or per occurrence.
    assert_eq!(pick(v1::Sampling { presence_penalty: Some(0.5), ..d() }, &[1.0, 1.4, 0.0]), 0);
    assert_eq!(pick(v1::Sampling { presence_penalty: Some(0.3), ..d() }, &[1.0, 1.4, 0.0]), 1);
    assert_eq!(pick(v1::Sampling { frequency_penalty: Some(0.3), ..d() }, &[1.0, 1.4, 0.0]), 0);
    let logit_bias = [(2, 5.0), (7_000_000, 1.0)].into_iter().collect();
    assert_eq!(pick(v1::Sampling { logit_bias, ..d() }, &[3.0, 2.9, 2.0]), 2);
    let tiny = v1::Sampling { repetition_penalty: Some(1e-38), temperature: Some(1.0), ..d() };
    assert_eq!(pick(tiny, &[0.0, 9.0, 0.0]), 1);
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let logits = [1.0f32, 2.0, 2.0, -1.0];
    let logit_bias = [(3, 100.0)].into_iter().collect();
    let params = params(v1::Sampling { logit_bias, temperature: Some(0.5), ..Default::default() });
    let draw = Draw { params: &params, history: None, seed: 1, position: 0, logprobs: Some(3) };
    let sampled = sample(&cpu(), &mut logits.to_vec(), &mut [0; 4], &draw).unwrap();
    let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    let logprob = |i: usize| (f64::from(logits[i]) - sum.ln()) as f32;
    let got = sampled.logprobs.unwrap();
    assert_eq!(sampled.token, 3);
    assert!((got.logprob - logprob(3)).abs() < 1e-6);
    assert_eq!(got.top.iter().map(|a| a.token_id).collect::<Vec<_>>(), [1, 2, 0]);
    assert!(got.top.iter().all(|a| (a.logprob - logprob(a.token_id as usize)).abs() < 1e-6));
}

#[test]
fn bad_input_is_an_error() {
    let greedy = params(v1::Sampling::default());
    let draw = Draw { params: &greedy, history: None, seed: 0, position: 0, logprobs: None };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let e = sample(&cpu(), &mut [0.0, bad], &mut [0; 2], &draw).unwrap_err();
        assert!(matches!(e, SampleError::NotFinite { token: 1, .. }));
    }
    assert!(sample(&cpu(), &mut [], &mut [], &draw).is_err());
    assert!(sample(&cpu(), &mut [0.0], &mut [], &draw).is_err());
    let d = v1::Sampling::default;
    for (sampling, field) in [
        (v1::Sampling { temperature: Some(-1.0), ..d() }, "temperature"),
        (v1::Sampling { temperature: Some(f32::NAN), ..d() }, "temperature"),
        (v1::Sampling { temperature: Some(101.0), ..d() }, "temperature"),
        (v1::Sampling { top_p: Some(0.0), ..d() }, "top_p"),
        (v1::Sampling { top_p: Some(1.5), ..d() }, "top_p"),
        (v1::Sampling { min_p: Some(-0.1), ..d() }, "min_p"),
        (v1::Sampling { repetition_penalty: Some(0.0), ..d() }, "repetition_penalty"),
        (v1::Sampling { frequency_penalty: Some(3.0), ..d() }, "frequency_penalty"),
        (v1::Sampling { presence_penalty: Some(f32::NAN), ..d() }, "presence_penalty"),
        (v1::Sampling { logit_bias: [(1, 101.0)].into_iter().collect(), ..d() }, "logit_bias"),
        (v1::Sampling { logit_bias: (0..1025).map(|i| (i, 0.0)).collect(), ..d() }, "logit_bias"),
    ] {
        assert_eq!(SamplingParams::try_from(&sampling).unwrap_err().field, field);
    }
}
