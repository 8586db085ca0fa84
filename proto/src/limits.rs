//! Sizes and times that a coordinator and its workers must agree on, and what both allow a request to ask of sampling.

use std::{fmt, time::Duration};

use crate::v1;

/// Token positions in one block of KV memory.
pub const BLOCK_TOKENS: u32 = 16;

/// Largest message of the internal service, in bytes: a step with its token ids, or one row of logits.
pub const MAX_STAGE_MESSAGE: usize = 64 << 20;

/// Largest list of headers that servers and clients take, in bytes, as HTTP/2 counts them.
pub const MAX_HEADER_LIST: u32 = 64 << 10;

/// Most bytes of all the small files that travel with a model, the tokenizer's above all.
pub const MAX_MODEL_FILES: u64 = 256 << 20;

/// Most patterns of names of tensors that a model may have without a use.
pub const MAX_IGNORED: usize = 64;
/// Longest of them, in bytes.
pub const MAX_IGNORED_BYTES: usize = 256;

/// Whether patterns of names of tensors are few and short enough.
///
/// # Errors
/// How many, or how long a one, there are, and what is expected.
pub fn check_ignored(patterns: &[String]) -> Result<(), String> {
    if patterns.len() > MAX_IGNORED {
        return Err(format!("ignore-tensors: {} patterns: expected {MAX_IGNORED} at most", patterns.len()));
    }
    match patterns.iter().map(String::len).find(|bytes| *bytes > MAX_IGNORED_BYTES) {
        Some(bytes) => {
            Err(format!("ignore-tensors: a pattern of {bytes} bytes: expected {MAX_IGNORED_BYTES} at most"))
        }
        None => Ok(()),
    }
}

/// Bytes of the secret that names a link.
pub const LINK_TOKEN_BYTES: usize = 32;

/// Bytes of an NCCL id.
pub const NCCL_ID_BYTES: usize = 128;

/// How often either end of a connection between coordinator and worker asks whether the other is there, in the system or
/// the process that has the connection. Stages that run are heard sooner, by heartbeats.
pub const PING_EVERY: Duration = Duration::from_secs(2);
/// How long the answer may take, before the connection counts as broken.
pub const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// How often either end of a connection between client and coordinator asks whether the other is there.
pub const CLIENT_PING_EVERY: Duration = Duration::from_secs(10);
/// How long the answer may take, before the connection counts as broken: a coordinator that computes for long answers
/// still.
pub const CLIENT_PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Most alternatives that are reported beside a token.
pub const MAX_LOGPROBS: u32 = 20;
/// Most candidates for a mask.
pub const MAX_CANDIDATES: u32 = 100;
/// Most entries of a logit bias.
pub const MAX_BIASES: usize = 1024;

/// Of `temperature`.
pub const TEMPERATURE: Bounds = Bounds::closed(0.0, 100.0);
/// Of `top_p`.
pub const TOP_P: Bounds = Bounds::above(0.0, 1.0);
/// Of `min_p`.
pub const MIN_P: Bounds = Bounds::closed(0.0, 1.0);
/// Of `repetition_penalty`.
pub const REPETITION_PENALTY: Bounds = Bounds::above(0.0, 10.0);
/// Of `frequency_penalty`.
pub const FREQUENCY_PENALTY: Bounds = Bounds::closed(-2.0, 2.0);
/// Of `presence_penalty`.
pub const PRESENCE_PENALTY: Bounds = Bounds::closed(-2.0, 2.0);
/// Of each value of `logit_bias`.
pub const BIAS: Bounds = Bounds::closed(-100.0, 100.0);

/// Every parameter of sampling that is one number, by the field that a client sets, with its bounds.
pub fn sampling_numbers(s: &v1::Sampling) -> [(&'static str, Option<f32>, Bounds); 6] {
    [
        ("sampling.temperature", s.temperature, TEMPERATURE),
        ("sampling.top_p", s.top_p, TOP_P),
        ("sampling.min_p", s.min_p, MIN_P),
        ("sampling.repetition_penalty", s.repetition_penalty, REPETITION_PENALTY),
        ("sampling.frequency_penalty", s.frequency_penalty, FREQUENCY_PENALTY),
        ("sampling.presence_penalty", s.presence_penalty, PRESENCE_PENALTY),
    ]
}

/// What a number may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    low: f32,
    /// `low` itself is out.
    open: bool,
    high: f32,
}

impl Bounds {
    const fn closed(low: f32, high: f32) -> Self {
        Bounds { low, open: false, high }
    }

    const fn above(low: f32, high: f32) -> Self {
        Bounds { low, open: true, high }
    }

    /// Whether `value` is within. NaN is not.
    pub fn contains(self, value: f32) -> bool {
        (if self.open { value > self.low } else { value >= self.low }) && value <= self.high
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bracket = if self.open { "(" } else { "[" };
        write!(f, "{bracket}{}, {}]", self.low, self.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_count_where_the_bracket_says_so_and_nan_never() {
        assert!(TOP_P.contains(1.0) && !TOP_P.contains(0.0) && !TOP_P.contains(1.5));
        assert!(MIN_P.contains(0.0) && MIN_P.contains(1.0) && !MIN_P.contains(-0.1));
        assert!(!MIN_P.contains(f32::NAN) && !TOP_P.contains(f32::NAN) && !TOP_P.contains(f32::INFINITY));
        assert_eq!([TOP_P, BIAS].map(|b| b.to_string()), ["(0, 1]", "[-100, 100]"]);
    }
}
