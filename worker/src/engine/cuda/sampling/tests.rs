//! The GPU's draws beside the sampler's, run by the emulator (tests/emulator): token for token, and bit for bit where
//! log-probabilities are asked for.

use strata_proto::{DType, v1};

use super::*;
use crate::{
    kernels::{
        cpu::{Cpu, isa::Isa},
        cuda::tests::emulator,
    },
    sampler::{SamplingParams, TokenHistory, sample},
};

/// Numbers that look random and are not (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }

    /// In -1..1, about 0.
    fn noise(&mut self) -> f32 {
        (0..3).map(|_| (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).sum::<f32>() / 3.0
    }

    fn logits(&mut self, vocab: usize) -> Vec<f32> {
        let kind = self.below(9);
        let spread = self.of(&[0.01, 1.0, 8.0, 40.0]);
        let mut logits: Vec<f32> = match kind {
            // Many equal ones, all equal, zeros of both signs, the ends of the range.
            0 => (0..vocab).map(|_| (self.noise() * 4.0).round()).collect(),
            1 => vec![self.noise() * spread; vocab],
            2 => (0..vocab).map(|_| self.of(&[0.0, -0.0])).collect(),
            3 => (0..vocab).map(|_| self.of(&[f32::MAX, f32::MIN, 0.0, 1e-40, 3e38])).collect(),
            _ => (0..vocab).map(|_| self.noise() * spread - 1.5).collect(),
        };
        if kind == 4 {
            logits[self.below(vocab)] += 30.0;
        }
        if kind == 5 && self.below(2) == 0 {
            for _ in 0..=self.below(3) {
                logits[self.below(vocab)] = self.of(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
            }
        }
        logits
    }

    fn sampling(&mut self, vocab: usize) -> v1::Sampling {
        let few = vocab as u32;
        let mut sampling = v1::Sampling {
            temperature: Some(self.of(&[0.0, 1e-40, 1e-3, 0.3, 1.0, 1.0, 2.5, 100.0])),
            top_k: Some(self.of(&[0, 0, 1, 2, 40, few.saturating_sub(1), few, 1_000_000])),
            top_p: Some(self.of(&[1.0, 1.0, 0.95, 0.5, 0.999_999, 1e-6, 1e-38])),
            min_p: Some(self.of(&[0.0, 0.0, 0.05, 0.5, 1.0])),
            ..v1::Sampling::default()
        };
        if self.below(2) == 0 {
            sampling.repetition_penalty = Some(self.of(&[1.0, 1.3, 0.5, 10.0, 1e-38]));
            sampling.frequency_penalty = Some(self.of(&[0.0, 0.1, -2.0]));
            sampling.presence_penalty = Some(self.of(&[0.0, 0.7, -0.3]));
        }
        if self.below(3) == 0 {
            // Some of them of no token.
            let count = self.of(&[1, 5, 300]);
            let biases = (0..count).map(|_| (self.below(vocab + 2) as u32, self.noise() * 100.0));
            sampling.logit_bias = biases.collect();
        }
        sampling
    }

    fn history(&mut self, vocab: usize) -> TokenHistory {
        let mut history = TokenHistory::default();
        let count = self.of(&[0, 3, 600]);
        (0..count).for_each(|_| history.push_prompt(self.below(vocab) as u32));
        (0..count / 2).for_each(|_| history.push_answer(self.below(vocab.min(40)) as u32));
        history
    }
}

/// A GPU with its sampler, and the processor.
struct Bench {
    gpu: Gpu,
    kernels: Kernels,
    cpu: Cpu,
}

impl Bench {
    fn new() -> Self {
        emulator();
        let gpu = Gpu::open(0).unwrap();
        let kernels = gpu.kernels(DType::F32, 64).unwrap();
        Bench { gpu, kernels, cpu: Cpu::on(Isa::detect()) }
    }

    /// Draws on the GPU.
    fn draw(&self, sampling: &mut Sampling, logits: &[f32], draws: &[Option<Draw<'_>>]) {
        let memory = Memory::new(&self.gpu.context, 4 * logits.len() as u64).unwrap();
        memory::upload(&self.gpu.stream, memory.ptr(), logits).unwrap();
        sampling.ask(&self.gpu, draws).unwrap();
        sampling.start(&self.gpu, &self.kernels, memory.ptr()).unwrap();
        sampling.fetch(&self.gpu).unwrap();
        self.gpu.wait().unwrap();
        sampling.read();
    }

    /// What the sampler says.
    fn want(&self, logits: &[f32], draw: &Draw<'_>) -> Result<Sampled, SampleError> {
        sample(&self.cpu, &mut logits.to_vec(), &mut vec![0; logits.len()], draw)
    }
}

/// To be compared: NaN is equal to itself.
fn bits(sampled: &Result<Sampled, SampleError>) -> (u32, Vec<(u32, u32)>) {
    match sampled {
        Ok(Sampled { token, logprobs: None }) => (*token, Vec::new()),
        Ok(Sampled { token, logprobs: Some(logprobs) }) => {
            let top = logprobs.top.iter().map(|a| (a.token_id, a.logprob.to_bits()));
            (*token, std::iter::once((0, logprobs.logprob.to_bits())).chain(top).collect())
        }
        Err(SampleError::NotFinite { token, value }) => (u32::MAX, vec![(*token, value.to_bits())]),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_gpu_draws_the_samplers_tokens() {
    const ROWS: usize = 100;
    let (b, mut random) = (Bench::new(), Random(1));
    let mut broken = 0;
    // Less than a slice, whole slices and not, less than a warp.
    for vocab in [1, 2, 31, 500, 2048, 2049, 4096, 6001] {
        let mut sampling = Sampling::new(&b.gpu, ROWS, vocab, 1 << 17).unwrap();
        for round in 0..3 {
            let logits: Vec<_> = (0..ROWS).map(|_| random.logits(vocab)).collect();
            let asked: Vec<_> = (0..ROWS).map(|_| random.sampling(vocab)).collect();
            let mut params: Vec<_> = asked.iter().map(|s| SamplingParams::try_from(s).unwrap()).collect();
            for params in params.iter_mut().step_by(2) {
                params.withheld = ([0, 3, vocab as u32].into(), random.below(5000) as u32);
            }
            let histories: Vec<_> = (0..ROWS).map(|_| random.history(vocab)).collect();
            let draws: Vec<_> = (0..ROWS)
                .map(|row| {
                    Some(Draw {
                        params: &params[row],
                        history: Some(&histories[row]),
                        seed: random.next(),
                        position: random.below(5000) as u32,
                        logprobs: random.of(&[None, None, Some(0), Some(1), Some(5), Some(20), Some(99)]),
                    })
                })
                .collect();
            b.draw(&mut sampling, &logits.concat(), &draws);
            for (row, draw) in draws.iter().flatten().enumerate() {
                let want = b.want(&logits[row], draw);
                let got = sampling.drawn()[row].as_ref().unwrap();
                broken += u32::from(want.is_err());
                let what = format!("row {row} of round {round}, {vocab} tokens: {draw:?}");
                assert_eq!(bits(got), bits(&want), "{what}");
            }
        }
    }
    assert!(broken > 20, "{broken}");
}

/// Whole rows are the host's: those that nothing is drawn from, and those whose history has no room.
#[test]
fn rows_that_a_gpu_does_not_draw_from_are_left_to_the_host() {
    let (b, vocab) = (Bench::new(), 50);
    let logits: Vec<f32> = (0..4 * vocab).map(|i| ((i * 37 % 101) as f32).sin()).collect();
    let penal = v1::Sampling { presence_penalty: Some(0.5), ..v1::Sampling::default() };
    let (penal, greedy) = (SamplingParams::try_from(&penal).unwrap(), v1::Sampling::default());
    let greedy = SamplingParams::try_from(&greedy).unwrap();
    let mut history = TokenHistory::default();
    (0..10).for_each(|token| history.push_answer(token));
    let draw = |params| Some(Draw { params, history: Some(&history), seed: 1, position: 2, logprobs: None });
    // Twice ten tokens do not fit, and what comes after them still does.
    let mut sampling = Sampling::new(&b.gpu, 4, vocab, 15).unwrap();
    let draws = [draw(&penal), None, draw(&penal), draw(&greedy)];
    b.draw(&mut sampling, &logits, &draws);
    let drawn: Vec<bool> = (0..4).map(|row| sampling.draws(row)).collect();
    assert_eq!(drawn, [true, false, false, true]);
    for row in 0..4 {
        let got = sampling.drawn()[row].clone();
        let want = draws[row].filter(|_| drawn[row]).map(|d| b.want(&logits[row * vocab..][..vocab], &d));
        assert_eq!(got, want);
    }
}
