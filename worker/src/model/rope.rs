//! Rotary frequencies from `config.json`, scaling resolved (transformers' `modeling_rope_utils.py`, in f32 as there).

use super::{
    architecture::{Frequencies, Rope, Sharpening},
    config::{Config, ConfigError},
};

/// What a family assumes where the file is silent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    /// Base of the frequencies.
    pub theta: f64,
    /// Share of a head's dimensions that turn. None where plain rotation turns all of them, whatever the file says:
    /// most families look at `partial_rotary_factor` only where frequencies are scaled.
    pub partial: Option<f64>,
}

/// As in most families.
pub(super) const DEFAULTS: Defaults = Defaults { theta: 10_000.0, partial: None };

/// The longest original context that a file may claim.
const MOST_POSITIONS: usize = 1 << 23;

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
    let parameters = parameters(config)?;
    let theta = match parameters.as_ref().map(|p| p.positive("rope_theta")).transpose()?.flatten() {
        Some(theta) => Some(theta),
        None => config.positive("rope_theta")?,
    };
    let theta = theta.unwrap_or(defaults.theta);
    frequencies(config, parameters.as_ref(), (theta, head_dim), context, defaults)
}

/// The parameters that count where a file has both spellings: `rope_scaling`, as model cards say to add it, replaces all
/// of `rope_parameters`.
fn parameters(config: &Config) -> Result<Option<Config>, ConfigError> {
    match config.object("rope_scaling")?.filter(|scaling| scaling.count() > 0) {
        Some(scaling) => Ok(Some(scaling)),
        None => config.object("rope_parameters"),
    }
}

/// How queries far into a sequence are sharpened, if they are (Ministral 3).
pub(super) fn sharpening(config: &Config, context: usize) -> Result<Option<Sharpening>, ConfigError> {
    let Some(parameters) = parameters(config)? else { return Ok(None) };
    let Some(beta) = parameters.positive("llama_4_scaling_beta")? else { return Ok(None) };
    let scaling = Scaling { config, parameters: &parameters, context, dims: 0, theta: 0.0 };
    let period = scaling.original()?;
    let factor = |i: usize| (1.0 + beta * (1.0 + i as f64).ln()) as f32;
    let factors = (0..context.div_ceil(period)).map(factor).collect();
    Ok(Some(Sharpening { beta: beta as f32, period, factors }))
}

/// As [`resolve`], for one kind of layer where those of different kinds turn differently: `of` is what `rope_parameters`
/// calls the kind, and the field beside them that may hold its base.
pub(super) fn resolve_for(
    config: &Config,
    of: (&str, &str),
    head_dim: usize,
    context: usize,
    defaults: Defaults,
) -> Result<Rope, ConfigError> {
    let theta = config.positive(of.1)?.unwrap_or(defaults.theta);
    let own = parameters_for(config, of.0)?;
    let theta = own.as_ref().map(|own| own.positive("rope_theta")).transpose()?.flatten().unwrap_or(theta);
    frequencies(config, own.as_ref(), (theta, head_dim), context, defaults)
}

/// The parameters of one kind of layer: an entry of `rope_parameters`. `rope_scaling` changes the entry of full attention,
/// field by field.
///
/// # Errors
/// If `rope_parameters` are of no kind of layer: transformers 5.24 would ignore them.
fn parameters_for(config: &Config, kind: &str) -> Result<Option<Config>, ConfigError> {
    let all = config.object("rope_parameters")?.filter(|all| all.count() > 0);
    if let Some(all) = &all
        && !["full_attention", "sliding_attention"].iter().any(|kind| all.mentions(kind))
    {
        let expected =
            "an object for each of full_attention and sliding_attention, as layers of both kinds turn";
        return Err(config.error("rope_parameters", expected));
    }
    let own = all.map(|all| all.object(kind)).transpose()?.flatten();
    match config.object("rope_scaling")? {
        Some(scaling) if kind == "full_attention" => {
            Ok(Some(own.map_or_else(|| scaling.clone(), |own| own.updated_by(&scaling))))
        }
        _ => Ok(own),
    }
}

/// Frequencies of a base for heads of some width, as `parameters` scale them; a share of dimensions that they leave open
/// is looked for beside them.
fn frequencies(
    config: &Config,
    parameters: Option<&Config>,
    (theta, head_dim): (f64, usize),
    context: usize,
    defaults: Defaults,
) -> Result<Rope, ConfigError> {
    let either = |field: &str| match parameters.map(|p| p.positive(field)).transpose()?.flatten() {
        Some(number) => Ok(Some(number)),
        None => config.positive(field),
    };
    let kind = kind(parameters)?;
    let plain = matches!(kind, Kind::Plain | Kind::Dynamic);
    let partial = match defaults.partial {
        // Nobody looks at it, so it may be anything.
        None if kind == Kind::Plain => 1.0,
        default => either("partial_rotary_factor")?.or(default).unwrap_or(1.0),
    };
    // Hunyuan calls dynamic what stretches the base once and for all.
    let alpha = match (kind, parameters) {
        (Kind::Dynamic, Some(parameters)) => parameters.positive("alpha")?,
        _ => None,
    };
    let theta =
        alpha.map_or(theta, |alpha| theta * alpha.powf(head_dim as f64 / (head_dim as f64 - 2.0).max(1.0)));
    let wrong = |dims: usize| {
        let expected =
            format!("a share of {head_dim} dimensions that is even, as they turn in pairs, not {dims}");
        config.error("partial_rotary_factor", expected)
    };
    let dims = (head_dim as f64 * partial) as usize;
    if dims > head_dim || !head_dim.is_multiple_of(2) {
        return Err(wrong(dims));
    }
    let power = |i: usize, dims: usize| power(theta, i, dims);
    if let (Kind::Proportional, Some(parameters)) = (kind, parameters) {
        // Pairs are half a head apart however few of them turn.
        let factor = parameters.positive("factor")?.unwrap_or(1.0) as f32;
        let turning = dims / 2;
        let frequency = |i| if i < turning { 1.0 / power(2 * i, head_dim) / factor } else { 0.0 };
        return Ok(one((0..head_dim / 2).map(frequency).collect(), 1.0));
    }
    if dims == 0 || !dims.is_multiple_of(2) {
        return Err(wrong(dims));
    }
    let inv_freq: Vec<f32> = (0..dims).step_by(2).map(|i| 1.0 / power(i, dims)).collect();
    // Dynamic scaling begins behind the context that the model was made for, which is as far as we go: beyond it the
    // frequencies depend on how long a sequence is when each of its tokens is computed.
    let Some(parameters) = parameters.filter(|_| !plain) else { return Ok(one(inv_freq, 1.0)) };
    let scaling = Scaling { config, parameters, context, dims, theta };
    match kind {
        Kind::Llama3 => scaling.llama3(inv_freq),
        Kind::Longrope => scaling.longrope(),
        Kind::Yarn => scaling.yarn(),
        _ => {
            let factor = factor(parameters)?;
            Ok(one(inv_freq.into_iter().map(|f| f / factor).collect(), 1.0))
        }
    }
}

/// How frequencies are scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Linear,
    Dynamic,
    Llama3,
    Longrope,
    Yarn,
    Proportional,
}

fn kind(parameters: Option<&Config>) -> Result<Kind, ConfigError> {
    let Some(parameters) = parameters else { return Ok(Kind::Plain) };
    let field = if parameters.get("rope_type").is_some() { "rope_type" } else { "type" };
    match parameters.string(field)?.unwrap_or("default") {
        // Three axes of positions (Qwen-VL), which are all the same for text.
        "default" | "mrope" => Ok(Kind::Plain),
        "linear" => Ok(Kind::Linear),
        "dynamic" => Ok(Kind::Dynamic),
        "llama3" => Ok(Kind::Llama3),
        "longrope" | "su" => Ok(Kind::Longrope),
        // What early files of Phi-3 call it.
        "yarn" if parameters.get("short_factor").is_some() => Ok(Kind::Longrope),
        "yarn" => Ok(Kind::Yarn),
        "proportional" => Ok(Kind::Proportional),
        _ => Err(parameters.error(field, "default, linear, dynamic, llama3, longrope, yarn or proportional")),
    }
}

/// `theta^(i / dims)`. The power is taken in f64: correctly rounded to f32 whatever the host's math library.
fn power(theta: f64, i: usize, dims: usize) -> f32 {
    f64::from(theta as f32).powf(f64::from(i as f32 / dims as f32)) as f32
}

fn one(inv_freq: Vec<f32>, factor: f32) -> Rope {
    Rope { sets: vec![Frequencies { inv_freq: inv_freq.into(), factor }], switch: None, sharpening: None }
}

fn factor(parameters: &Config) -> Result<f32, ConfigError> {
    let factor = parameters.positive("factor")?;
    factor.map(|f| f as f32).ok_or_else(|| parameters.error("factor", "a positive finite number"))
}

/// What scaling starts from.
struct Scaling<'a> {
    config: &'a Config,
    parameters: &'a Config,
    context: usize,
    dims: usize,
    theta: f64,
}

impl Scaling<'_> {
    /// Positions that the model was trained on before its frequencies were scaled. One beside the parameters counts before
    /// the one among them.
    fn original(&self) -> Result<usize, ConfigError> {
        let field = "original_max_position_embeddings";
        let range = 2..=MOST_POSITIONS;
        match self.config.integer(field, range.clone())? {
            Some(n) => Ok(n),
            None => Ok(self.parameters.integer(field, range)?.unwrap_or(self.context.max(2))),
        }
    }

    /// By how much the context was stretched; where it is not said, as the two lengths say.
    fn stretch(&self, original: usize) -> Result<f64, ConfigError> {
        Ok(self.parameters.positive("factor")?.unwrap_or(self.context as f64 / original as f64))
    }

    fn required(&self, field: &str) -> Result<f32, ConfigError> {
        let number = self.parameters.positive(field)?;
        number.map(|n| n as f32).ok_or_else(|| self.parameters.error(field, "a positive finite number"))
    }

    /// Phi-3: every pair of dimensions has a divisor of its own, one for short sequences and one for long ones.
    fn longrope(&self) -> Result<Rope, ConfigError> {
        let &Scaling { parameters, dims, theta, .. } = self;
        let original = self.original()?;
        let stretch = self.stretch(original)?;
        let factor = match parameters.positive("attention_factor")? {
            Some(factor) => factor,
            None if stretch <= 1.0 => 1.0,
            None => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
        };
        let pairs = dims / 2;
        let set = |field| {
            let divisors = parameters.positives(field)?.filter(|d| d.len() == pairs);
            let expected = || parameters.error(field, format!("a list of {pairs} positive numbers"));
            let divisors = divisors.ok_or_else(expected)?.into_iter().enumerate();
            let inv_freq = divisors.map(|(i, d)| 1.0 / (d as f32 * power(theta, 2 * i, dims))).collect();
            Ok::<_, ConfigError>(Frequencies { inv_freq, factor: factor as f32 })
        };
        let sets = vec![set("short_factor")?, set("long_factor")?];
        Ok(Rope { sets, switch: Some(original), sharpening: None })
    }

    /// YaRN (arXiv 2309.00071): pairs that turn more than `beta_fast` times within the original context stay, those that
    /// turn less than `beta_slow` times are stretched, those between are blended; scores are sharpened by a factor on sine
    /// and cosine.
    fn yarn(&self) -> Result<Rope, ConfigError> {
        let &Scaling { config, parameters, dims, theta, .. } = self;
        if theta <= 1.0 {
            return Err(parameters.error("rope_theta", format!("more than 1 for yarn, not {theta}")));
        }
        let original = self.original()?;
        let stretch = self.stretch(original)?;
        // Zero counts as absent.
        let optional = |field: &str| match parameters.get(field).and_then(serde_json::Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => parameters.positive(field),
        };
        let sharpening = |scale: f64| if stretch <= 1.0 { 1.0 } else { 0.1 * scale * stretch.ln() + 1.0 };
        let factor = match parameters.positive("attention_factor")? {
            Some(factor) => factor,
            None => match (optional("mscale")?, optional("mscale_all_dim")?) {
                (Some(scale), Some(all)) => sharpening(scale) / sharpening(all),
                _ => sharpening(1.0),
            },
        };
        // The dimension whose pair turns so many times within the original context.
        let dimension = |turns: f64| {
            dims as f64 * (original as f64 / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
        };
        let mut low = dimension(optional("beta_fast")?.unwrap_or(32.0));
        let mut high = dimension(optional("beta_slow")?.unwrap_or(1.0));
        // Only looked for at the top, also where kinds of layers have parameters of their own.
        let top = self::parameters(config)?;
        if top.map_or(Ok(true), |top| top.flag("truncate", true))? {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dims as f64 - 1.0));
        let width = if low == high { 0.001 } else { high - low } as f32;
        let frequency = |i: usize| {
            let power = power(theta, 2 * i, dims);
            let kept = 1.0 - ((i as f32 - low as f32) / width).clamp(0.0, 1.0);
            1.0 / (stretch as f32 * power) * (1.0 - kept) + 1.0 / power * kept
        };
        Ok(one((0..dims / 2).map(frequency).collect(), factor as f32))
    }

    /// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    fn llama3(&self, mut inv_freq: Vec<f32>) -> Result<Rope, ConfigError> {
        let factor = factor(self.parameters)?;
        let (low, high) = (self.required("low_freq_factor")?, self.required("high_freq_factor")?);
        if high <= low {
            let expected = format!("more than low_freq_factor ({low})");
            return Err(self.parameters.error("high_freq_factor", expected));
        }
        let original = self.original()? as f32;
        for f in &mut inv_freq {
            let wavelength = std::f32::consts::TAU / *f;
            if wavelength > original / low {
                *f /= factor;
            } else if wavelength >= original / high {
                let smooth = (original / wavelength - low) / (high - low);
                *f = (1.0 - smooth) * *f / factor + smooth * *f;
            }
        }
        Ok(one(inv_freq, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config(fields: Value) -> Config {
        Config::new("config.json", fields).unwrap()
    }

    fn rope(fields: Value) -> Result<Rope, ConfigError> {
        resolve(&config(fields), 8, 64, DEFAULTS)
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
            json!({"partial_rotary_factor": 0.5, "rope_theta": 10000}),
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25}),
        ] {
            assert_eq!(rope(fields.clone()).unwrap().pairs(), 4, "most families never look at it");
            let half = resolve(&config(fields), 8, 64, Defaults { partial: Some(1.0), ..DEFAULTS }).unwrap();
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

    /// Values by transformers 5.24 (`ROPE_INIT_FUNCTIONS`), for heads of 16 and 256 positions.
    #[test]
    fn scaled_frequencies_are_those_of_transformers() {
        let yarn = |changes: Value| {
            let mut all = json!({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                "original_max_position_embeddings": 64});
            all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            json!({"rope_parameters": all})
        };
        let long = [7.905_695e-4, 2.5e-4, 7.905_695e-5];
        for (fields, inv_freq, factor) in [
            (
                yarn(json!({})),
                vec![1.0, 0.237_170_82, 0.05, 7.905_695e-3, 2.5e-3, long[0], long[1], long[2]],
                1.138_629_4,
            ),
            (
                yarn(json!({"truncate": false, "beta_fast": 16, "beta_slow": 2})),
                vec![1.0, 0.148_490_25, 0.025, 7.905_695e-3, 2.5e-3, long[0], long[1], long[2]],
                1.138_629_4,
            ),
            (
                yarn(json!({"factor": null, "original_max_position_embeddings": 32, "mscale": 0.7,
                    "mscale_all_dim": 0.3})),
                vec![
                    1.0,
                    0.177_878_11,
                    0.0125,
                    long[0] * 5.0,
                    1.25e-3,
                    long[0] / 2.0,
                    long[1] / 2.0,
                    long[2] / 2.0,
                ],
                1.078_293_5,
            ),
            (
                yarn(json!({"factor": 8.0, "attention_factor": 1.25, "partial_rotary_factor": 0.5,
                    "original_max_position_embeddings": null, "mscale": 0, "mscale_all_dim": null})),
                vec![1.0, 0.056_25, 1.25e-3, 1.25e-4],
                1.25,
            ),
            (
                // Of two spellings, the older one counts, and all of it; of two lengths, the one outside.
                json!({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
                    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
                    "original_max_position_embeddings": 128}),
                vec![1.0, 0.263_523_13, 0.066_666_66, 0.015_811_39, 5e-3, 1.581_139e-3, 5e-4, 1.581_139e-4],
                1.069_314_7,
            ),
            (
                json!({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25}}),
                vec![1.0, 0.316_227_76, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
                1.0,
            ),
            (
                // As far as the model's own context, dynamic scaling changes nothing.
                json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
                vec![1.0, 0.316_227_76, 0.1, 0.031_622_78, 0.01, 3.162_278e-3, 1e-3, 3.162_278e-4],
                1.0,
            ),
            (
                json!({"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 0.5}}),
                vec![2.0, 0.632_455_5, 0.2, 0.063_245_55, 0.02, 6.324_555e-3, 2e-3, 6.324_555e-4],
                1.0,
            ),
        ] {
            let rope = resolve(&config(fields.clone()), 16, 256, DEFAULTS).unwrap();
            let [set] = &rope.sets[..] else { panic!("one set") };
            assert_eq!(set.inv_freq.len(), inv_freq.len(), "{fields}");
            let near = |a: f32, b: f32| (a - b).abs() <= 4e-7 * b.abs();
            assert!(set.inv_freq.iter().zip(&inv_freq).all(|(a, b)| near(*a, *b)), "{fields}: {set:?}");
            assert!(near(set.factor, factor), "{fields}: {}", set.factor);
        }
    }

    #[test]
    fn layers_of_two_kinds_have_parameters_of_their_own() {
        let of = |fields: Value, kind| {
            let field = if kind == "full_attention" { "rope_theta" } else { "rope_local_base_freq" };
            let rope = resolve_for(&config(fields), (kind, field), 8, 64, DEFAULTS)?;
            Ok::<_, ConfigError>(rope.sets[0].inv_freq.to_vec())
        };
        let nested = json!({"rope_parameters": {"full_attention": {"rope_theta": 100.0}, "sliding_attention": null},
            "rope_scaling": {"type": "linear", "factor": 2}, "rope_local_base_freq": 16});
        assert_eq!(of(nested.clone(), "full_attention").unwrap()[..2], [0.5, 0.5 / 100f32.powf(0.25)]);
        assert_eq!(of(nested, "sliding_attention").unwrap()[1], 0.5);
        let flat = json!({"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}});
        let e = of(flat, "full_attention").unwrap_err().to_string();
        assert!(
            e.contains("rope_parameters is {") && e.contains("full_attention and sliding_attention"),
            "{e}"
        );
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for (fields, expected) in [
            (json!({"rope_scaling": {"type": "axial", "factor": 2}}), "rope_scaling.type is \"axial\""),
            (
                json!({"rope_parameters": {"rope_type": "ntk"}}),
                "expected default, linear, dynamic, llama3, longrope, yarn or",
            ),
            (
                json!({"rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 1}}),
                "more than 1 for yarn",
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
            (json!({"partial_rotary_factor": 1e-9}), "a share of 8 dimensions"),
        ] {
            let defaults = Defaults { partial: Some(1.0), ..DEFAULTS };
            let e = resolve(&config(fields.clone()), 8, 64, defaults).unwrap_err().to_string();
            assert!(e.contains(expected), "{fields}: {e}");
        }
    }
}
