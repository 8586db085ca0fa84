//! Rotary frequencies from `config.json`, scaling resolved (transformers' `modeling_rope_utils.py`, in f32 as there).

use super::{
    architecture::{Frequencies, Rope},
    config::{Config, ConfigError},
};

/// What a family assumes where the file is silent.
pub(super) struct Defaults {
    /// Base of the frequencies.
    pub theta: f64,
    /// Share of a head's dimensions that turn.
    pub partial: f64,
}

/// As in most families.
pub(super) const DEFAULTS: Defaults = Defaults { theta: 10_000.0, partial: 1.0 };

/// Frequencies for heads of `head_dim`.
///
/// transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` and `rope_scaling`, whose kind is `rope_type` or,
/// older, `type`.
pub(super) fn resolve(
    config: &Config,
    head_dim: usize,
    context: usize,
    defaults: Defaults,
) -> Result<Rope, ConfigError> {
    let scaling = match config.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    let either = |field: &str| match scaling.as_ref().map(|s| s.positive(field)).transpose()?.flatten() {
        Some(number) => Ok(Some(number)),
        None => config.positive(field),
    };
    let theta = match either("rope_theta")? {
        Some(theta) => theta,
        None => config.positive("rotary_emb_base")?.unwrap_or(defaults.theta),
    };
    let partial = match either("partial_rotary_factor")? {
        Some(partial) => partial,
        None => config.positive("rotary_pct")?.unwrap_or(defaults.partial),
    };
    let dims = (head_dim as f64 * partial) as usize;
    if dims == 0 || !dims.is_multiple_of(2) || dims > head_dim {
        let expected =
            format!("a share of {head_dim} dimensions that is even, as they turn in pairs, not {dims}");
        return Err(config.error("partial_rotary_factor", expected));
    }
    resolve_with(config, scaling.as_ref(), theta, dims, context)
}

/// Frequencies for `dims` rotating dimensions, scaled as `scaling` says.
pub(super) fn resolve_with(
    config: &Config,
    scaling: Option<&Config>,
    theta: f64,
    dims: usize,
    context: usize,
) -> Result<Rope, ConfigError> {
    // The power is taken in f64: correctly rounded to f32 whatever the host's math library.
    let power = |i: usize| f64::from(theta as f32).powf(f64::from(i as f32 / dims as f32)) as f32;
    let mut inv_freq: Vec<f32> = (0..dims).step_by(2).map(|i| 1.0 / power(i)).collect();
    let one = |inv_freq: Vec<f32>| Rope {
        sets: vec![Frequencies { inv_freq: inv_freq.into(), factor: 1.0 }],
        switch: None,
    };
    let Some(scaling) = scaling else { return Ok(one(inv_freq)) };
    let field = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    match scaling.string(field)?.unwrap_or("default") {
        "default" => {}
        "linear" => {
            let factor = factor(scaling)?;
            inv_freq.iter_mut().for_each(|f| *f /= factor);
        }
        "llama3" => llama3(config, scaling, context, &mut inv_freq)?,
        "longrope" | "su" => return longrope(config, scaling, context, |i| power(2 * i), dims / 2),
        _ => return Err(scaling.error(field, "default, linear, llama3 or longrope")),
    }
    Ok(one(inv_freq))
}

/// Phi-3: every pair of dimensions has a divisor of its own, one for short sequences and one for long ones.
fn longrope(
    config: &Config,
    scaling: &Config,
    context: usize,
    power: impl Fn(usize) -> f32,
    pairs: usize,
) -> Result<Rope, ConfigError> {
    let field = "original_max_position_embeddings";
    let original = match config.integer(field, 2..=1 << 23)? {
        Some(n) => n,
        None => scaling.integer(field, 2..=1 << 23)?.unwrap_or(context),
    };
    let stretch = match scaling.positive("factor")? {
        Some(factor) => factor,
        None => context as f64 / original as f64,
    };
    let factor = match scaling.positive("attention_factor")? {
        Some(factor) => factor,
        None if stretch <= 1.0 => 1.0,
        None => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
    };
    let set = |field| {
        let divisors = scaling.positives(field)?.filter(|d| d.len() == pairs);
        let divisors =
            divisors.ok_or_else(|| scaling.error(field, format!("a list of {pairs} positive numbers")))?;
        let inv_freq = divisors.iter().enumerate().map(|(i, d)| 1.0 / (*d as f32 * power(i))).collect();
        Ok::<_, ConfigError>(Frequencies { inv_freq, factor: factor as f32 })
    };
    Ok(Rope { sets: vec![set("short_factor")?, set("long_factor")?], switch: Some(original) })
}

fn factor(scaling: &Config) -> Result<f32, ConfigError> {
    let factor = scaling.positive("factor")?.filter(|f| *f >= 1.0);
    factor.map(|f| f as f32).ok_or_else(|| scaling.error("factor", "a number of at least 1"))
}

/// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
fn llama3(
    config: &Config,
    scaling: &Config,
    context: usize,
    inv_freq: &mut [f32],
) -> Result<(), ConfigError> {
    let factor = factor(scaling)?;
    let number =
        |field| scaling.positive(field)?.ok_or_else(|| scaling.error(field, "a positive finite number"));
    let (low, high) = (number("low_freq_factor")? as f32, number("high_freq_factor")? as f32);
    if high <= low {
        return Err(scaling.error("high_freq_factor", format!("more than low_freq_factor ({low})")));
    }
    let field = "original_max_position_embeddings";
    let original = match scaling.integer(field, 1..=1 << 23)? {
        Some(n) => n,
        None => config.integer(field, 1..=1 << 23)?.unwrap_or(context),
    } as f32;
    for f in inv_freq {
        let wavelength = std::f32::consts::TAU / *f;
        if wavelength > original / low {
            *f /= factor;
        } else if wavelength >= original / high {
            let smooth = (original / wavelength - low) / (high - low);
            *f = (1.0 - smooth) * *f / factor + smooth * *f;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rope(fields: Value) -> Result<Rope, ConfigError> {
        resolve(&Config::new("config.json", fields).unwrap(), 8, 64, DEFAULTS)
    }

    #[test]
    fn both_generations_of_config_give_the_same_frequencies() {
        let base = rope(json!({})).unwrap();
        assert_eq!(&*base.sets[0].inv_freq, &[1.0, 0.1, 0.01, 0.001]);
        for same in [
            json!({"rope_theta": 10000}),
            json!({"rope_scaling": null, "rope_theta": 10000.0}),
            json!({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
            json!({"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
        ] {
            assert_eq!(rope(same).unwrap(), base);
        }
        let linear = rope(json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
        assert_eq!(&*linear.sets[0].inv_freq, &[0.5, 0.05, 0.005, 0.0005]);
        let v5 = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}});
        assert_eq!(rope(v5).unwrap(), linear);
    }

    #[test]
    fn llama3_keeps_short_waves_stretches_long_ones_and_blends_between() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128});
        let r = rope(json!({"rope_scaling": scaling})).unwrap();
        // Wavelengths 6.3, 62.8, 628, 6283 against 32 and 128.
        let smooth = (128.0 / (std::f32::consts::TAU / 0.1) - 1.0) / 3.0;
        let blended = (1.0 - smooth) * 0.1 / 8.0 + smooth * 0.1;
        assert_eq!(&*r.sets[0].inv_freq, &[1.0, blended, 0.01 / 8.0, 0.001 / 8.0]);
    }

    #[test]
    fn a_part_of_a_head_turns_and_longrope_has_a_set_for_long_sequences() {
        for fields in [
            json!({"partial_rotary_factor": 0.5}),
            json!({"rotary_pct": 0.5, "rotary_emb_base": 10000}),
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ] {
            let half = rope(fields).unwrap();
            assert_eq!((half.pairs(), &*half.sets[0].inv_freq), (2, &[1.0, 0.01][..]));
        }
        let long = json!({"rope_scaling": {"type": "su", "short_factor": [1, 1, 2, 1], "long_factor": [4, 5, 8, 10]},
            "original_max_position_embeddings": 16});
        let long = rope(long).unwrap();
        assert_eq!(long.switch, Some(16));
        assert_eq!(&*long.sets[0].inv_freq, &[1.0, 0.1, 0.005, 0.001]);
        assert_eq!(&*long.sets[1].inv_freq, &[0.25, 0.02, 0.00125, 0.0001]);
        // sqrt(1 + ln(64 / 16) / ln(16))
        assert!(long.sets.iter().all(|s| (s.factor - 1.5f32.sqrt()).abs() < 1e-6));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for (fields, expected) in [
            (json!({"rope_scaling": {"type": "yarn", "factor": 2}}), "rope_scaling.type is \"yarn\""),
            (
                json!({"rope_parameters": {"rope_type": "dynamic"}}),
                "expected default, linear, llama3 or longrope",
            ),
            (json!({"rope_parameters": {"rope_type": "longrope"}}), "short_factor is absent"),
            (
                json!({"rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1]}}),
                "a list of 4 positive",
            ),
            (json!({"rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1, 0]}}), "a list of"),
            (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor is absent"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "factor is 0"),
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 2}}), "low_freq_factor"),
            (json!({"rope_theta": -1}), "rope_theta is -1"),
            (json!({"rope_theta": 1e300}), "positive finite"),
            (json!({"rope_scaling": 3}), "an object"),
            (json!({"partial_rotary_factor": 0.4}), "partial_rotary_factor is 0.4"),
            (json!({"partial_rotary_factor": 2}), "partial_rotary_factor is 2"),
            (json!({"rotary_pct": 1e-9}), "a share of 8 dimensions"),
        ] {
            let e = rope(fields.clone()).unwrap_err().to_string();
            assert!(e.contains(expected), "{fields}: {e}");
        }
    }
}
