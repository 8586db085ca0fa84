//! The next token as a pure function of logits, parameters, seed and position.
//!
//! Order: logit bias, repetition penalty (prompt and answer), frequency and presence penalties (answer), temperature,
//! top-k, top-p, min-p, then a draw by Philox with the position as counter and the seed as key. Sums run in a fixed
//! order in f64 over our own `exp`, so a replay draws the same token on any host.

use std::{cmp::Ordering, collections::BTreeMap};

use strata_proto::v1;

use crate::{engine::Candidate, kernels::cpu::Cpu};

/// Most alternatives that are reported.
const MAX_ALTERNATIVES: u32 = 20;
/// Most tokens that are drawn from without the other logits.
pub(crate) const MOST_AMONG: usize = 64;
/// Most candidates for a masked position.
const MAX_CANDIDATES: u32 = 100;
/// Most entries of a logit bias.
const MAX_BIASES: usize = 1024;

/// A sampling parameter outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {found}: expected {expected}")]
pub struct SamplingError {
    /// The field of `strata.v1.Sampling`.
    pub field: &'static str,
    /// Its value.
    pub found: String,
    /// What would do.
    pub expected: &'static str,
}

/// Logits that no token can be chosen from.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// Not a number, or infinite.
    #[error("the logit of token {token} is {value}")]
    NotFinite {
        /// The token.
        token: u32,
        /// Its logit.
        value: f32,
    },
    /// No logits, or less scratch than logits.
    #[error("{logits} logits and {scratch} places of scratch")]
    Sizes {
        /// Logits given.
        logits: usize,
        /// Scratch given.
        scratch: usize,
    },
}

/// How tokens are chosen, within the ranges that `inference.proto` documents.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    logit_bias: BTreeMap<u32, f32>,
}

impl TryFrom<&v1::Sampling> for SamplingParams {
    type Error = SamplingError;

    fn try_from(s: &v1::Sampling) -> Result<Self, SamplingError> {
        let check = |field, value: Option<f32>, default: f32, ok: fn(f32) -> bool, expected| {
            let x = value.unwrap_or(default);
            // A comparison with NaN is false, so NaN is out of every range.
            if ok(x) { Ok(x) } else { Err(SamplingError { field, found: x.to_string(), expected }) }
        };
        let penalty = |x: f32| (-2.0..=2.0).contains(&x);
        let biases_ok = s.logit_bias.values().all(|b| (-100.0..=100.0).contains(b));
        if !biases_ok || s.logit_bias.len() > MAX_BIASES {
            let found = format!("a map of {} entries", s.logit_bias.len());
            let expected = "at most 1024 entries in -100..=100";
            return Err(SamplingError { field: "logit_bias", found, expected });
        }
        Ok(SamplingParams {
            temperature: check("temperature", s.temperature, 0.0, |x| (0.0..=100.0).contains(&x), "0..=100")?,
            top_k: s.top_k.unwrap_or(0) as usize,
            top_p: check("top_p", s.top_p, 1.0, |x| x > 0.0 && x <= 1.0, "more than 0, at most 1")?,
            min_p: check("min_p", s.min_p, 0.0, |x| (0.0..=1.0).contains(&x), "0..=1")?,
            repetition_penalty: check(
                "repetition_penalty",
                s.repetition_penalty,
                1.0,
                |x| x > 0.0 && x <= 10.0,
                "more than 0, at most 10",
            )?,
            frequency_penalty: check("frequency_penalty", s.frequency_penalty, 0.0, penalty, "-2..=2")?,
            presence_penalty: check("presence_penalty", s.presence_penalty, 0.0, penalty, "-2..=2")?,
            logit_bias: s.logit_bias.iter().map(|(id, b)| (*id, *b)).collect(),
        })
    }
}

impl SamplingParams {
    /// Whether tokens seen so far matter: only then is a [`TokenHistory`] worth keeping.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

/// Which tokens a sequence has seen.
#[derive(Debug, Clone, Default)]
pub struct TokenHistory {
    /// Occurrences in the answer; 0 for tokens of the prompt alone.
    answer_counts: BTreeMap<u32, u32>,
}

impl TokenHistory {
    /// Adds a token of the prompt.
    pub fn push_prompt(&mut self, token: u32) {
        self.answer_counts.entry(token).or_default();
    }

    /// Adds a token of the answer.
    pub fn push_answer(&mut self, token: u32) {
        *self.answer_counts.entry(token).or_default() += 1;
    }
}

/// What a draw depends on, beside the logits.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    /// How to choose.
    pub params: &'a SamplingParams,
    /// Tokens so far; needed only if the parameters say so.
    pub history: Option<&'a TokenHistory>,
    /// The request's seed.
    pub seed: u64,
    /// Position of the token to be drawn.
    pub position: u32,
    /// Alternatives to report; `None` for no log-probabilities.
    pub logprobs: Option<u32>,
}

impl Draw<'_> {
    /// How many of the most likely tokens are enough to draw from; 0 if all logits are needed.
    pub fn candidates(&self) -> u32 {
        let SamplingParams { temperature, top_k, logit_bias, .. } = self.params;
        match (*temperature, *top_k) {
            _ if self.logprobs.is_some() || !logit_bias.is_empty() || self.params.needs_history() => 0,
            (0.0, _) => 1,
            (_, 1..=MOST_AMONG) => *top_k as u32,
            _ => 0,
        }
    }
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Of the logits before anything was done to them, if asked for.
    pub logprobs: Option<v1::TokenLogprobs>,
}

/// Chooses a token, on the caller's thread; any processor chooses the same one. `logits` (one per token id) is overwritten where bias and penalties apply; `order` is scratch, at
/// least as long.
pub fn sample(
    cpu: &Cpu,
    logits: &mut [f32],
    order: &mut [u32],
    draw: &Draw<'_>,
) -> Result<Sampled, SampleError> {
    if logits.is_empty() || order.len() < logits.len() {
        return Err(SampleError::Sizes { logits: logits.len(), scratch: order.len() });
    }
    if let Some(token) = logits.iter().position(|x| !x.is_finite()) {
        return Err(SampleError::NotFinite { token: token as u32, value: logits[token] });
    }
    let raw = draw.logprobs.map(|count| Raw::of(cpu, logits, count.min(MAX_ALTERNATIVES)));
    let changed = adjust(logits, draw);
    let token =
        if draw.params.temperature == 0.0 { argmax(logits) } else { choose(cpu, logits, order, draw) };
    let logprobs = raw.map(|raw| {
        let logit = changed.get(&token).copied().unwrap_or(logits[token as usize]);
        v1::TokenLogprobs { logprob: raw.logprob(logit), top: raw.alternatives() }
    });
    Ok(Sampled { token, logprobs })
}

/// Chooses as [`sample`] does, where the [`candidates`](Draw::candidates) most likely tokens, best first, are known and
/// enough. Of logits that are not finite, the first is the only candidate.
pub(crate) fn sample_among(
    cpu: &Cpu,
    candidates: &[Candidate],
    draw: &Draw<'_>,
) -> Result<Sampled, SampleError> {
    let (mut logits, mut order) = ([0.0; MOST_AMONG], [0; MOST_AMONG]);
    let count = candidates.len().min(MOST_AMONG);
    logits.iter_mut().zip(candidates).for_each(|(x, c)| *x = c.logit);
    let token = |index: u32| candidates[index as usize].token;
    match sample(cpu, &mut logits[..count], &mut order, draw) {
        Ok(sampled) => Ok(Sampled { token: token(sampled.token), ..sampled }),
        Err(SampleError::NotFinite { token: index, value }) => {
            Err(SampleError::NotFinite { token: token(index), value })
        }
        Err(error) => Err(error),
    }
}

/// The `count` most likely tokens by `logits`, best first, with their log-probabilities.
///
/// # Errors
/// If a logit is not a number.
pub fn likeliest(cpu: &Cpu, logits: &[f32], count: u32) -> Result<Vec<v1::Alternative>, SampleError> {
    if let Some(token) = logits.iter().position(|x| !x.is_finite()) {
        return Err(SampleError::NotFinite { token: token as u32, value: logits[token] });
    }
    Ok(Raw::of(cpu, logits, count.min(MAX_CANDIDATES)).alternatives())
}

/// The most likely token; ties to the lowest id.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let max = largest(logits);
    logits.iter().position(|x| *x == max).unwrap_or(0) as u32
}

/// Applies bias and penalties; gives the raw logits of the tokens it changed.
fn adjust(logits: &mut [f32], draw: &Draw<'_>) -> BTreeMap<u32, f32> {
    let params = draw.params;
    let mut changed = BTreeMap::new();
    let mut change = |token: u32, f: &dyn Fn(f32) -> f32| {
        // The front end refuses ids outside the vocabulary.
        if let Some(x) = logits.get_mut(token as usize) {
            changed.entry(token).or_insert(*x);
            *x = f(*x).clamp(f32::MIN, f32::MAX);
        }
    };
    for (token, bias) in &params.logit_bias {
        change(*token, &|x| x + bias);
    }
    if !params.needs_history() {
        return changed;
    }
    let penalty = params.repetition_penalty;
    for (token, &count) in draw.history.iter().flat_map(|h| &h.answer_counts) {
        change(*token, &|x| if x > 0.0 { x / penalty } else { x * penalty });
        if count > 0 {
            let frequency = params.frequency_penalty * count as f32;
            change(*token, &|x| x - frequency - params.presence_penalty);
        }
    }
    changed
}

/// Draws from the filtered distribution.
fn choose(cpu: &Cpu, logits: &[f32], order: &mut [u32], draw: &Draw<'_>) -> u32 {
    let params = draw.params;
    let weigh = Weigh { cpu, logits, max: largest(logits), temperature: params.temperature };
    let best_first = |a: &u32, b: &u32| {
        let (x, y) = (logits[*a as usize], logits[*b as usize]);
        y.partial_cmp(&x).unwrap_or(Ordering::Equal).then(a.cmp(b))
    };
    let mut kept = &mut order[..logits.len()];
    kept.iter_mut().zip(0..).for_each(|(o, id)| *o = id);
    if params.top_k > 0 && params.top_k < kept.len() {
        kept.select_nth_unstable_by(params.top_k - 1, best_first);
        kept = &mut kept[..params.top_k];
        kept.sort_unstable_by(best_first);
    }
    if params.top_p < 1.0 {
        kept = top_p(kept, f64::from(params.top_p), &weigh, best_first);
    }
    let total = weigh.total(kept, params.min_p);
    kept[weigh.reach(kept, params.min_p, uniform(draw.seed, draw.position) * total)]
}

fn largest(logits: &[f32]) -> f32 {
    logits.iter().fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m })
}

/// Values whose powers are computed at a time.
const CHUNK: usize = 256;

/// Weights of tokens, relative to the most likely one, which has weight 1.
struct Weigh<'a> {
    cpu: &'a Cpu,
    logits: &'a [f32],
    max: f32,
    temperature: f32,
}

impl Weigh<'_> {
    /// The sum of those of `ids` that are `least` and more, in their order.
    fn total(&self, ids: &[u32], least: f32) -> f64 {
        let mut sum = 0.0;
        for ids in ids.chunks(CHUNK) {
            for weight in &self.chunk(ids)[..ids.len()] {
                sum += if *weight >= least { f64::from(*weight) } else { 0.0 };
            }
        }
        sum
    }

    /// Where the same sum reaches `target`; should rounding leave it short of that, the last place that adds to it.
    fn reach(&self, ids: &[u32], least: f32, target: f64) -> usize {
        let (mut sum, mut last) = (0.0, 0);
        for (c, ids) in ids.chunks(CHUNK).enumerate() {
            for (i, weight) in self.chunk(ids)[..ids.len()].iter().enumerate() {
                if *weight >= least && *weight > 0.0 {
                    sum += f64::from(*weight);
                    last = c * CHUNK + i;
                    if sum >= target {
                        return last;
                    }
                }
            }
        }
        last
    }

    /// Those of at most [`CHUNK`] tokens.
    fn chunk(&self, ids: &[u32]) -> [f32; CHUNK] {
        powers(self.cpu, ids.iter().map(|id| (self.logits[*id as usize] - self.max) / self.temperature))
    }
}

/// `e^x` of at most [`CHUNK`] values; what follows them is anything.
fn powers(cpu: &Cpu, values: impl Iterator<Item = f32>) -> [f32; CHUNK] {
    let mut x = [0.0; CHUNK];
    x.iter_mut().zip(values).for_each(|(x, value)| *x = value);
    cpu.exp(&mut x);
    x
}

/// The smallest set of most likely tokens whose share of the weight reaches `p`, best first.
fn top_p<'a>(
    kept: &'a mut [u32],
    p: f64,
    weigh: &Weigh<'_>,
    best_first: impl Fn(&u32, &u32) -> Ordering,
) -> &'a mut [u32] {
    let total = weigh.total(kept, 0.0);
    // All tokens lighter than this together weigh less than what may be left out, so that they need no sorting.
    let needless = (1.0 - p) * total / kept.len() as f64;
    let mut count = 0;
    for first in (0..kept.len()).step_by(CHUNK) {
        let chunk = first..kept.len().min(first + CHUNK);
        let weights = weigh.chunk(&kept[chunk.clone()]);
        for (i, weight) in chunk.zip(weights) {
            if f64::from(weight) >= needless {
                kept.swap(i, count);
                count += 1;
            }
        }
    }
    let kept = &mut kept[..count.max(1)];
    kept.sort_unstable_by(best_first);
    let end = weigh.reach(kept, 0.0, p * total) + 1;
    &mut kept[..end]
}

/// A number in `[0, 1)` from 53 bits of Philox.
fn uniform(seed: u64, position: u32) -> f64 {
    let words = rand_philox::philox4x32_10([position, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(words[0]) << 32 | u64::from(words[1])) >> 11;
    bits as f64 * (1.0 / (1u64 << 53) as f64)
}

/// What is remembered of the logits as the model gave them.
struct Raw {
    max: f32,
    /// Logarithm of the sum of `e^(logit - max)`.
    log_sum: f64,
    /// Best first; ties to the lowest id.
    top: Vec<(u32, f32)>,
}

impl Raw {
    fn of(cpu: &Cpu, logits: &[f32], count: u32) -> Self {
        let count = count as usize;
        let max = largest(logits);
        let mut sum = 0.0;
        for logits in logits.chunks(CHUNK) {
            let powers = powers(cpu, logits.iter().map(|x| x - max));
            powers[..logits.len()].iter().for_each(|w| sum += f64::from(*w));
        }
        let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
        for (&x, id) in logits.iter().zip(0..) {
            if top.len() < count || top.last().is_some_and(|(_, worst)| x > *worst) {
                let at = top.partition_point(|(_, y)| *y >= x);
                top.insert(at, (id, x));
                top.truncate(count);
            }
        }
        Raw { max, log_sum: sum.ln(), top }
    }

    fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit - self.max) - self.log_sum) as f32
    }

    fn alternatives(&self) -> Vec<v1::Alternative> {
        let alternative = |(id, x): &(u32, f32)| v1::Alternative { token_id: *id, logprob: self.logprob(*x) };
        self.top.iter().map(alternative).collect()
    }
}

#[cfg(test)]
mod tests {
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
}
