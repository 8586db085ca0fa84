//! Llama 1 to 3 and whoever writes `"model_type": "llama"` (transformers' `modeling_llama.py`).

use super::Description;
use crate::model::{
    ModelError,
    architecture::{
        Act, Attention, AttentionMask, Ffn, Flow, Head, Input, Layer, Mlp, Names, Norm, Position, Slot,
        Source, Tower,
    },
    config::Config,
    rope,
};

pub(super) const SLOTS: &[(Slot, Source)] = &[
    (Slot::Embedding, Source::Rows("embed_tokens")),
    (Slot::AttentionNorm, Source::Rows("layers.{}.input_layernorm")),
    (Slot::Query, Source::Rows("layers.{}.self_attn.q_proj")),
    (Slot::Key, Source::Rows("layers.{}.self_attn.k_proj")),
    (Slot::Value, Source::Rows("layers.{}.self_attn.v_proj")),
    (Slot::AttentionOut, Source::Rows("layers.{}.self_attn.o_proj")),
    (Slot::FfnNorm, Source::Rows("layers.{}.post_attention_layernorm")),
    (Slot::Gate, Source::Rows("layers.{}.mlp.gate_proj")),
    (Slot::Up, Source::Rows("layers.{}.mlp.up_proj")),
    (Slot::Down, Source::Rows("layers.{}.mlp.down_proj")),
    (Slot::FinalNorm, Source::Rows("norm")),
];

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    describe_with(config, rope::DEFAULTS)
}

/// A Llama whose rotary frequencies have other defaults.
pub(super) fn describe_with(config: &Config, rope: rope::Defaults) -> Result<Description, ModelError> {
    let mut description = plain(config)?;
    let tower = &mut description.tower;
    let head_dim = tower.layers[0].attention.head_dim;
    tower.ropes = vec![rope::resolve(config, head_dim, tower.context, rope)?];
    Ok(description)
}

/// A Llama without its rotary frequencies.
pub(super) fn plain(config: &Config) -> Result<Description, ModelError> {
    let width = config.required("hidden_size", 1..=1 << 20)?;
    let heads = config.required("num_attention_heads", 1..=1 << 14)?;
    let kv_heads = config.integer("num_key_value_heads", 1..=heads)?.unwrap_or(heads);
    if heads % kv_heads != 0 {
        let expected = format!("a divisor of num_attention_heads ({heads})");
        return Err(config.error("num_key_value_heads", expected).into());
    }
    let head_dim = match config.integer("head_dim", 2..=1 << 13)? {
        Some(d) => d,
        None => super::head_dim(config, "hidden_size", width, heads)?,
    };
    if head_dim % 2 != 0 {
        return Err(config
            .error("head_dim", format!("even, not {head_dim}: dimensions turn in pairs"))
            .into());
    }
    let act = super::act(config, "hidden_act", Act::Silu)?;
    let norm = Norm::Rms(config.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32);
    let layer = Layer {
        flow: Flow::Pre(norm),
        attention: Attention {
            heads,
            kv_heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5) as f32,
            shares: None,
            mask: AttentionMask::Causal,
            position: Position::Rope(0),
            qk_norm: None,
            softcap: None,
            clip: None,
        },
        ffn: Ffn::Gated(Mlp { inner: config.required("intermediate_size", 1..=1 << 22)?, act }),
    };
    Ok(Description {
        tower: Tower {
            width,
            vocab: config.required("vocab_size", 1..=1 << 24)?,
            context: config.integer("max_position_embeddings", 1..=1 << 23)?.unwrap_or(2048),
            input: Input::TOKENS,
            ropes: Vec::new(),
            caches: true,
            whole_input: false,
            carried: Vec::new(),
            layers: vec![layer; config.required("num_hidden_layers", 1..=10_000)?],
            norm: Some(norm),
            head: Head::LM,
        },
        names: Names {
            bases: &["model.", ""],
            slots: SLOTS.to_vec(),
            root: vec![(Slot::Head, Source::Rows("lm_head"))],
            tied: config.flag("tie_word_embeddings", false)?,
            aliases: &[],
            ignore: &[],
        },
    })
}
