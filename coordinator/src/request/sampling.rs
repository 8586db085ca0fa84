//! How tokens are chosen: what a request may ask for, and what a model suggests.

use serde::Deserialize;
use strata_proto::{
    limits::{self, Bounds, MAX_BIASES},
    v1,
};

use super::error::{AdmissionError, field};

/// Sampling defaults that a model ships in `generation_config.json`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
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
            s.top_k = s.top_k.or(d.top_k);
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
