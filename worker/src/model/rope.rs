//! Rotary frequencies from `config.json`, scaling resolved (transformers' `modeling_rope_utils.py`, in f32 as there).

use super::{
    blocks::Rope,
    config::{Config, ConfigError},
};

/// Frequencies for `dims` rotating dimensions.
///
/// transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` and `rope_scaling`, whose kind is `rope_type` or, older,
/// `type`.
pub(super) fn resolve(config: &Config, dims: usize, context: usize) -> Result<Rope, ConfigError> {
    let scaling = match config.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    let theta = match scaling.as_ref().map(|s| s.positive("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => config.positive("rope_theta")?.unwrap_or(10_000.0),
    };
    for holder in scaling.iter().chain([config]) {
        if holder.positive("partial_rotary_factor")?.is_some_and(|f| f != 1.0) {
            return Err(holder.error("partial_rotary_factor", "1, or nothing"));
        }
    }
    let mut inv_freq: Vec<f32> = (0..dims)
        .step_by(2)
        .map(|i| {
            // The power is taken in f64: correctly rounded to f32 whatever the host's math library.
            let exponent = i as f32 / dims as f32;
            1.0 / f64::from(theta as f32).powf(f64::from(exponent)) as f32
        })
        .collect();
    let Some(scaling) = scaling else { return Ok(Rope { inv_freq: inv_freq.into(), factor: 1.0 }) };
    let field = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    match scaling.string(field)?.unwrap_or("default") {
        "default" => {}
        "linear" => {
            let factor = factor(&scaling)?;
            inv_freq.iter_mut().for_each(|f| *f /= factor);
        }
        "llama3" => llama3(config, &scaling, context, &mut inv_freq)?,
        _ => return Err(scaling.error(field, "default, linear or llama3")),
    }
    Ok(Rope { inv_freq: inv_freq.into(), factor: 1.0 })
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
        resolve(&Config::new("config.json", fields).unwrap(), 8, 64)
    }

    #[test]
    fn both_generations_of_config_give_the_same_frequencies() {
        let base = rope(json!({})).unwrap();
        assert_eq!(&*base.inv_freq, &[1.0, 0.1, 0.01, 0.001]);
        for same in [
            json!({"rope_theta": 10000}),
            json!({"rope_scaling": null, "rope_theta": 10000.0}),
            json!({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
            json!({"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
        ] {
            assert_eq!(rope(same).unwrap(), base);
        }
        let linear = rope(json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
        assert_eq!(&*linear.inv_freq, &[0.5, 0.05, 0.005, 0.0005]);
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
        assert_eq!(&*r.inv_freq, &[1.0, blended, 0.01 / 8.0, 0.001 / 8.0]);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for (fields, expected) in [
            (json!({"rope_scaling": {"type": "yarn", "factor": 2}}), "rope_scaling.type is \"yarn\""),
            (json!({"rope_parameters": {"rope_type": "longrope"}}), "expected default, linear or llama3"),
            (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor is absent"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "factor is 0"),
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 2}}), "low_freq_factor"),
            (json!({"rope_theta": -1}), "rope_theta is -1"),
            (json!({"rope_theta": 1e300}), "positive finite"),
            (json!({"rope_scaling": 3}), "an object"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        ] {
            let e = rope(fields.clone()).unwrap_err().to_string();
            assert!(e.contains(expected), "{fields}: {e}");
        }
    }
}
