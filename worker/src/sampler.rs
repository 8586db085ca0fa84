//! The next token as a pure function of logits, parameters, seed and position.
//!
//! Order: logit bias, repetition penalty (prompt and answer), frequency and presence penalties (answer), temperature,
//! top-k, top-p, min-p, then a draw by Philox with the position as counter and the seed as key.
//!
//! A token's weight is our own `exp` of its distance from the most likely one, which weighs `ONE`, as an integer: so
//! no sum depends on its order, and a replay draws the same token on any host and on any GPU (`sample.cu`).

// Tests compare with libm.
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
};

use strata_proto::{
    limits::{self, Bounds, MAX_BIASES, MAX_CANDIDATES, MAX_LOGPROBS},
    v1,
};

use crate::kernels::cpu::Cpu;

/// A sampling parameter outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {found}: expected {expected}")]
pub(crate) struct SamplingError {
    /// The field of `strata.v1.Sampling`.
    pub field: &'static str,
    /// Its value.
    pub found: String,
    /// What would do.
    pub expected: String,
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
pub(crate) struct SamplingParams {
    pub(crate) temperature: f32,
    pub(crate) top_k: usize,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    pub(crate) repetition_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) presence_penalty: f32,
    pub(crate) logit_bias: BTreeMap<u32, f32>,
    /// Tokens that are not drawn for positions before the other.
    pub(crate) withheld: (BTreeSet<u32>, u32),
}

impl TryFrom<&v1::Sampling> for SamplingParams {
    type Error = SamplingError;

    fn try_from(s: &v1::Sampling) -> Result<Self, SamplingError> {
        let error = |field, found: String, expected: String| SamplingError { field, found, expected };
        let check = |field, value: Option<f32>, default: f32, bounds: Bounds| match value.unwrap_or(default) {
            x if bounds.contains(x) => Ok(x),
            x => Err(error(field, x.to_string(), bounds.to_string())),
        };
        let biases = &s.logit_bias;
        if biases.len() > MAX_BIASES || !biases.values().all(|bias| limits::BIAS.contains(*bias)) {
            let expected = format!("at most {MAX_BIASES} entries within {}", limits::BIAS);
            return Err(error("logit_bias", format!("a map of {} entries", biases.len()), expected));
        }
        Ok(SamplingParams {
            temperature: check("temperature", s.temperature, 0.0, limits::TEMPERATURE)?,
            top_k: s.top_k.unwrap_or(0) as usize,
            top_p: check("top_p", s.top_p, 1.0, limits::TOP_P)?,
            min_p: check("min_p", s.min_p, 0.0, limits::MIN_P)?,
            repetition_penalty: check(
                "repetition_penalty",
                s.repetition_penalty,
                1.0,
                limits::REPETITION_PENALTY,
            )?,
            frequency_penalty: check(
                "frequency_penalty",
                s.frequency_penalty,
                0.0,
                limits::FREQUENCY_PENALTY,
            )?,
            presence_penalty: check("presence_penalty", s.presence_penalty, 0.0, limits::PRESENCE_PENALTY)?,
            logit_bias: s.logit_bias.iter().map(|(id, b)| (*id, *b)).collect(),
            withheld: (BTreeSet::new(), 0),
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
pub(crate) struct TokenHistory {
    /// Occurrences in the answer; 0 for tokens of the prompt alone.
    pub(crate) answer_counts: BTreeMap<u32, u32>,
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
pub(crate) struct Draw<'a> {
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
    /// 64 bits of Philox.
    pub(crate) fn random(&self) -> u64 {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let words = rand_philox::philox4x32_10([self.position, 0, 0, 0], key);
        u64::from(words[0]) << 32 | u64::from(words[1])
    }

    /// What is added to the logits of single tokens.
    pub(crate) fn biases(&self) -> impl Iterator<Item = (u32, f32)> {
        let SamplingParams { logit_bias, withheld: (withheld, until), .. } = self.params;
        let withheld = withheld.iter().filter(|_| self.position < *until);
        let others = logit_bias
            .iter()
            .filter(move |(id, _)| self.position >= *until || !self.params.withheld.0.contains(id));
        // As little as there is: drawn only if there is nothing else.
        withheld.map(|id| (*id, f32::MIN)).chain(others.map(|(id, bias)| (*id, *bias)))
    }

    /// Top-p in parts of 2^64; `None` if it keeps all tokens.
    pub(crate) fn top_p(&self) -> Option<u64> {
        let p = f64::from(self.params.top_p);
        // As f64, the largest u64 is 2^64.
        (p < 1.0).then_some((p * u64::MAX as f64) as u64)
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

/// Chooses a token, on the caller's thread; any processor chooses the same one. `logits` (one per token id) is
/// overwritten where bias and penalties apply; `order` is scratch, at least as long.
pub(crate) fn sample(
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
    let raw = draw.logprobs.map(|count| Raw::of(cpu, logits, count.min(MAX_LOGPROBS)));
    let changed = adjust(logits, draw);
    let token =
        if draw.params.temperature == 0.0 { argmax(logits) } else { choose(cpu, logits, order, draw) };
    let logprobs = raw.map(|raw| {
        let logit = changed.get(&token).copied().unwrap_or(logits[token as usize]);
        raw.logprobs(logit)
    });
    Ok(Sampled { token, logprobs })
}

/// The `count` most likely tokens by `logits`, best first, with their log-probabilities.
///
/// # Errors
/// If a logit is not a number.
pub(crate) fn likeliest(cpu: &Cpu, logits: &[f32], count: u32) -> Result<Vec<v1::Alternative>, SampleError> {
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
    for (token, bias) in draw.biases() {
        change(token, &|x| x + bias);
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

/// Draws from the filtered distribution: with the tokens that are left in the order of their ids, the first at which
/// the sum of weights passes a random share of all of it.
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
    }
    if let Some(p) = draw.top_p() {
        kept = top_p(kept, p, &weigh, best_first);
    }
    if !kept.is_sorted() {
        kept.sort_unstable();
    }
    let total = weigh.total(kept, params.min_p);
    kept[weigh.passing(kept, params.min_p, share(draw.random(), total))]
}

fn largest(logits: &[f32]) -> f32 {
    logits.iter().fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m })
}

/// Values whose powers are computed at a time.
const CHUNK: usize = 256;

/// The weight of the most likely token. What weighs less than one is never drawn; a sum holds for up to 2^24 tokens.
pub(crate) const ONE: u64 = 1 << 40;

/// A weight that is given as a share of the most likely token's.
fn fixed(weight: f32) -> u64 {
    (weight * ONE as f32) as u64
}

/// `parts` / 2^64 of `total`, rounded down.
fn share(parts: u64, total: u64) -> u64 {
    ((u128::from(parts) * u128::from(total)) >> 64) as u64
}

/// Weights of tokens, relative to the most likely one.
struct Weigh<'a> {
    cpu: &'a Cpu,
    logits: &'a [f32],
    max: f32,
    temperature: f32,
}

impl Weigh<'_> {
    /// The sum of those of `ids` whose share is `least` and more.
    fn total(&self, ids: &[u32], least: f32) -> u64 {
        let mut sum = 0;
        for ids in ids.chunks(CHUNK) {
            for weight in &self.chunk(ids)[..ids.len()] {
                sum += if *weight >= least { fixed(*weight) } else { 0 };
            }
        }
        sum
    }

    /// Where the same sum, in the order of `ids`, passes `target`, which must be less than all of it.
    fn passing(&self, ids: &[u32], least: f32, target: u64) -> usize {
        let mut sum = 0;
        for (c, ids) in ids.chunks(CHUNK).enumerate() {
            for (i, weight) in self.chunk(ids)[..ids.len()].iter().enumerate() {
                sum += if *weight >= least { fixed(*weight) } else { 0 };
                if sum > target {
                    return c * CHUNK + i;
                }
            }
        }
        0
    }

    /// Those of at most [`CHUNK`] tokens, as shares.
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

/// The smallest set of most likely tokens whose share of the weight reaches `p` (in parts of 2^64). So light a token
/// that all of its kind together weigh no more than what may be left out, is left out first: most need no sorting then.
fn top_p<'a>(
    kept: &'a mut [u32],
    p: u64,
    weigh: &Weigh<'_>,
    best_first: impl Fn(&u32, &u32) -> Ordering,
) -> &'a mut [u32] {
    let total = weigh.total(kept, 0.0);
    let needed = share(p, total).max(1);
    let light = (total - needed) / weigh.logits.len() as u64;
    let mut count = 0;
    for first in (0..kept.len()).step_by(CHUNK) {
        let chunk = first..kept.len().min(first + CHUNK);
        let weights = weigh.chunk(&kept[chunk.clone()]);
        for (i, weight) in chunk.zip(weights) {
            if fixed(weight) >= light {
                kept.swap(i, count);
                count += 1;
            }
        }
    }
    let kept = &mut kept[..count];
    kept.sort_unstable_by(best_first);
    let end = weigh.passing(kept, 0.0, needed - 1) + 1;
    &mut kept[..end]
}

/// What is remembered of the logits as the model gave them.
pub(crate) struct Raw {
    pub max: f32,
    /// The sum of their weights at temperature 1.
    pub sum: u64,
    /// The most likely ones, best first; ties to the lowest id.
    pub top: Vec<(u32, f32)>,
}

impl Raw {
    fn of(cpu: &Cpu, logits: &[f32], count: u32) -> Self {
        let count = count as usize;
        let max = largest(logits);
        let mut sum = 0;
        for logits in logits.chunks(CHUNK) {
            let powers = powers(cpu, logits.iter().map(|x| x - max));
            powers[..logits.len()].iter().for_each(|w| sum += fixed(*w));
        }
        let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
        for (&x, id) in logits.iter().zip(0..) {
            if top.len() < count || top.last().is_some_and(|(_, worst)| x > *worst) {
                let at = top.partition_point(|(_, y)| *y >= x);
                top.insert(at, (id, x));
                top.truncate(count);
            }
        }
        Raw { max, sum, top }
    }

    /// Those of a token with this raw logit, and of the most likely ones.
    pub fn logprobs(&self, logit: f32) -> v1::TokenLogprobs {
        v1::TokenLogprobs { logprob: self.logprob(logit), top: self.alternatives() }
    }

    #[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "it is reported, and draws nothing"))]
    fn logprob(&self, logit: f32) -> f32 {
        let log_sum = (self.sum as f64 / ONE as f64).ln();
        (f64::from(logit - self.max) - log_sum) as f32
    }

    fn alternatives(&self) -> Vec<v1::Alternative> {
        let alternative = |(id, x): &(u32, f32)| v1::Alternative { token_id: *id, logprob: self.logprob(*x) };
        self.top.iter().map(alternative).collect()
    }
}

#[cfg(test)]
mod tests;
