//! MPT (transformers' `modeling_mpt.py`): layer norms without a bias, queries, keys and values in one tensor and perhaps cut off at
//! a bound, ALiBi.

use super::{Description, gpt};
use crate::model::{
    ModelError,
    architecture::{
        Act, Attention, Ffn, Flow, Head, Input, Layer, Mlp, Names, Norm, Position, Slopes, Slot, Source,
        Tower,
    },
    config::Config,
};

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    if config.get("logit_scale").is_some() {
        return Err(config.error("logit_scale", "null: transformers has no factor on logits").into());
    }
    let width = config.required("d_model", 1..=1 << 20)?;
    let heads = config.required("n_heads", 1..=1 << 14)?;
    let head_dim = super::head_dim(config, "d_model", width, heads)?;
    let norm = Norm::Layer(config.positive("layer_norm_epsilon")?.unwrap_or(1e-5) as f32);
    let layer = Layer {
        flow: Flow::Pre(norm),
        attention: attention(config, heads, head_dim)?,
        ffn: Ffn::Plain(Mlp { inner: 4 * width, act: Act::Gelu }),
    };
    Ok(Description {
        tower: Tower {
            width,
            vocab: config.required("vocab_size", 1..=1 << 24)?,
            context: config.integer("max_seq_len", 1..=1 << 23)?.unwrap_or(2048),
            input: Input::TOKENS,
            ropes: Vec::new(),
            caches: true,
            whole_input: false,
            carried: Vec::new(),
            layers: vec![layer; config.required("n_layers", 1..=10_000)?],
            norm: Some(norm),
            head: Head::LM,
        },
        names: Names {
            bases: &["transformer.", ""],
            slots: vec![
                (Slot::Embedding, Source::Rows("wte")),
                (Slot::AttentionNorm, Source::Rows("blocks.{}.norm_1")),
                (Slot::Qkv, Source::Rows("blocks.{}.attn.Wqkv")),
                (Slot::AttentionOut, Source::Rows("blocks.{}.attn.out_proj")),
                (Slot::FfnNorm, Source::Rows("blocks.{}.norm_2")),
                (Slot::Up, Source::Rows("blocks.{}.ffn.up_proj")),
                (Slot::Down, Source::Rows("blocks.{}.ffn.down_proj")),
                (Slot::FinalNorm, Source::Rows("norm_f")),
            ],
            root: vec![(Slot::Head, Source::Rows("lm_head"))],
            tied: config.flag("tie_word_embeddings", true)?,
            aliases: &[],
            ignore: &[],
        },
    })
}

/// What `attn_config` says.
fn attention(config: &Config, heads: usize, head_dim: usize) -> Result<Attention, ModelError> {
    let scale = (head_dim as f64).powf(-0.5) as f32;
    let plain = gpt::attention(heads, head_dim, scale, Position::Slopes(Slopes { rounded: None }));
    let Some(config) = config.object("attn_config")? else { return Ok(plain) };
    for (field, served) in [("alibi", true), ("qk_ln", false), ("prefix_lm", false)] {
        if config.flag(field, served)? != served {
            return Err(config.error(field, format!("{served}: transformers has no others")).into());
        }
    }
    if config.positive("alibi_bias_max")?.is_some_and(|most| most != 8.0) {
        return Err(config.error("alibi_bias_max", "8, which is what transformers takes it for").into());
    }
    Ok(Attention {
        scale: config.positive("softmax_scale")?.map_or(scale, |scale| scale as f32),
        clip: config.positive("clip_qkv")?.map(|most| most as f32),
        ..plain
    })
}
