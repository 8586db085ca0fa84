//! How tokens are chosen: what a request may ask for, and what a model suggests.

use serde_json::Value;
use strata_proto::{
    Files,
    limits::{self, Bounds, MAX_BIASES},
    v1,
};

use super::error::{AdmissionError, TokenizerError, field};

/// Sampling defaults that a model ships in `generation_config.json`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct GenerationDefaults {
    /// Whether it samples at all.
    pub do_sample: bool,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Most likely tokens kept.
    pub top_k: Option<u32>,
    /// Nucleus probability.
    pub top_p: Option<f32>,
    /// Minimum relative probability.
    pub min_p: Option<f32>,
    /// Penalty on repeated tokens.
    pub repetition_penalty: Option<f32>,
}

/// What else transformers' `generate` reads there, which changes what it answers and is not done here.
const NOT_DONE: [&str; 21] = [
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "penalty_alpha",
    "sequence_bias",
    "suppress_tokens",
    "top_h",
    "typical_p",
    "watermarking_config",
];

/// Whether it is as if it were not there: nothing, off, or the number that changes nothing.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64().is_some_and(|x| x == 0.0 || x == 1.0),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Bool(true) | Value::String(_) => false,
    }
}

impl GenerationDefaults {
    /// Reads them. Whoever asks for them alone needs them: what makes no sense is left out, with a word in the log.
    ///
    /// # Errors
    /// If the file is no JSON object.
    pub fn new(files: &Files) -> Result<Self, TokenizerError> {
        let file = "generation_config.json";
        let Some(json) = files.get(file) else { return Ok(GenerationDefaults::default()) };
        let fields: serde_json::Map<String, Value> =
            serde_json::from_slice(json).map_err(|e| TokenizerError::misread(file, &e))?;
        let not_done: Vec<_> =
            NOT_DONE.into_iter().filter(|name| fields.get(*name).is_some_and(|v| !is_neutral(v))).collect();
        if !not_done.is_empty() {
            tracing::warn!(
                "{file}: {} changes what transformers answers, and is not done here: answers may differ",
                not_done.join(", ")
            );
        }
        let given = |name: &str| fields.get(name).filter(|value| !value.is_null());
        let odd = |name: &str, value: &Value, expected: &str| {
            tracing::warn!(
                "{file}: {name} is {value}: expected {expected}; it is left out of the model's defaults"
            );
        };
        let number = |name: &str, bounds: Bounds| {
            let value = given(name)?;
            let number = value.as_f64().map(|x| x as f32).filter(|x| bounds.contains(*x));
            if number.is_none() {
                odd(name, value, &bounds.to_string());
            }
            number
        };
        // Whole numbers are written with a point now and then, and what is not above 0 means all tokens.
        let top_k = given("top_k").and_then(|value| match value.as_f64() {
            Some(k) if k <= 0.0 => None,
            Some(k) if k.fract() == 0.0 => Some(k as u32),
            _ => {
                odd("top_k", value, "a whole number");
                None
            }
        });
        let do_sample = given("do_sample").is_some_and(|value| {
            if !value.is_boolean() {
                odd("do_sample", value, "true or false");
            }
            value == true
        });
        Ok(GenerationDefaults {
            do_sample,
            temperature: number("temperature", limits::TEMPERATURE),
            top_k,
            top_p: number("top_p", limits::TOP_P),
            min_p: number("min_p", limits::MIN_P),
            repetition_penalty: number("repetition_penalty", limits::REPETITION_PENALTY),
        })
    }
}

/// Fills in the model's own defaults where the caller is silent and wants them, and checks every bound.
///
/// # Errors
/// The first parameter that is out of its bounds, with the bound.
pub(super) fn check(
    mut s: v1::Sampling,
    defaults: Option<&GenerationDefaults>,
    vocab: u32,
) -> Result<v1::Sampling, AdmissionError> {
    if let Some(d) = defaults {
        // As transformers reads the file: without do_sample the model is greedy and the rest means nothing.
        if d.do_sample {
            s.temperature = s.temperature.or(d.temperature).or(Some(1.0));
            s.top_k = s.top_k.or(d.top_k.map(|k| k.min(vocab)));
            s.top_p = s.top_p.or(d.top_p);
            s.min_p = s.min_p.or(d.min_p);
        }
        s.repetition_penalty = s.repetition_penalty.or(d.repetition_penalty);
    }
    let within = |name, value: Option<f32>, bounds: Bounds| match value {
        Some(v) if !bounds.contains(v) => {
            Err(field(name, format!("{v} is out of bounds: expected {bounds}")))
        }
        _ => Ok(()),
    };
    for (name, value, bounds) in limits::sampling_numbers(&s) {
        within(name, value, bounds)?;
    }
    if s.top_k.is_some_and(|k| k > vocab) {
        return Err(field("sampling.top_k", format!("expected at most the vocabulary, {vocab}")));
    }
    if s.logit_bias.len() > MAX_BIASES {
        return Err(field("sampling.logit_bias", format!("at most {MAX_BIASES} entries are taken")));
    }
    for (id, bias) in &s.logit_bias {
        if *id >= vocab {
            return Err(field(
                "sampling.logit_bias",
                format!("id {id} is unknown: expected less than {vocab}"),
            ));
        }
        within("sampling.logit_bias", Some(*bias), limits::BIAS)?;
    }
    Ok(s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_bounds() {
        let check = |s: v1::Sampling| super::check(s, None, 100).map_err(|e| e.to_string());
        let base = v1::Sampling::default();
        check(base.clone()).unwrap();
        check(v1::Sampling { temperature: Some(0.0), top_k: Some(0), top_p: Some(1.0), ..base.clone() })
            .unwrap();
        let bad = [
            (v1::Sampling { temperature: Some(f32::NAN), ..base.clone() }, "sampling.temperature: NaN"),
            (v1::Sampling { temperature: Some(-1.0), ..base.clone() }, "expected [0, 100]"),
            (
                v1::Sampling { top_p: Some(0.0), ..base.clone() },
                "sampling.top_p: 0 is out of bounds: expected (0, 1]",
            ),
            (v1::Sampling { top_p: Some(1.5), ..base.clone() }, "sampling.top_p"),
            (v1::Sampling { top_k: Some(101), ..base.clone() }, "sampling.top_k"),
            (v1::Sampling { min_p: Some(f32::INFINITY), ..base.clone() }, "sampling.min_p"),
            (v1::Sampling { repetition_penalty: Some(0.0), ..base.clone() }, "sampling.repetition_penalty"),
            (v1::Sampling { logit_bias: [(100, 1.0)].into(), ..base.clone() }, "id 100 is unknown"),
            (v1::Sampling { logit_bias: [(1, f32::NAN)].into(), ..base.clone() }, "sampling.logit_bias: NaN"),
        ];
        for (sampling, says) in bad {
            let error = check(sampling).unwrap_err();
            assert!(error.contains(says), "{error:?} does not say {says:?}");
        }
    }

    #[test]
    fn model_defaults_count_only_where_the_caller_is_silent() {
        let defaults = GenerationDefaults {
            do_sample: true,
            temperature: Some(0.6),
            top_k: Some(7),
            ..GenerationDefaults::default()
        };
        let own = v1::Sampling { top_k: Some(3), ..Default::default() };
        let got = super::check(own, Some(&defaults), 100).unwrap();
        assert_eq!((got.temperature, got.top_k, got.top_p), (Some(0.6), Some(3), None));
        let greedy = GenerationDefaults { do_sample: false, ..defaults };
        assert_eq!(super::check(v1::Sampling::default(), Some(&greedy), 100).unwrap().temperature, None);
    }
}
