//! Falcon (transformers' `modeling_falcon.py`): layer norms, plain feed-forward blocks beside attention, queries, keys and
//! values in one tensor. The 7B has one head of keys; the 40B and 180B have several, and a norm for each block; the RW ones
//! compute one block after the other, and have ALiBi, as transformers adds it by default (its eager attention does so twice).

use super::Description;
use crate::model::{
    ModelError,
    architecture::{
        Act, Attention, AttentionMask, Ffn, Flow, Head, Input, Layer, Mlp, Names, Norm, Position, Slopes,
        Slot, Source, Tower,
    },
    config::Config,
    rope,
};

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let width = config.required("hidden_size", 1..=1 << 20)?;
    let heads = config.required("num_attention_heads", 1..=1 << 14)?;
    let head_dim = super::head_dim(config, "hidden_size", width, heads)?;
    let new = config.flag("new_decoder_architecture", false)?;
    let kv_heads = match (new, config.flag("multi_query", true)?) {
        (true, _) => config.integer("num_kv_heads", 1..=heads)?.unwrap_or(heads),
        (false, true) => 1,
        (false, false) => heads,
    };
    if heads % kv_heads != 0 {
        let expected = format!("a divisor of num_attention_heads ({heads})");
        return Err(config.error("num_kv_heads", expected).into());
    }
    let norm = Norm::Layer(config.positive("layer_norm_epsilon")?.unwrap_or(1e-5) as f32);
    let parallel = config.flag("parallel_attn", true)?;
    if new && !parallel {
        return Err(config.error("parallel_attn", "true with new_decoder_architecture").into());
    }
    let norms = config.integer("num_ln_in_parallel_attn", 1..=2)?.unwrap_or(if new { 2 } else { 1 });
    let flow = match (parallel, new && norms == 2) {
        (true, true) => Flow::ParallelTwo(norm),
        (true, false) => Flow::ParallelOne(norm),
        (false, _) => Flow::Pre(norm),
    };
    let scale = (head_dim as f64).powf(-0.5) as f32;
    let sloped = config.flag("alibi", false)?;
    let slopes = Slopes { rounded: Some(scale) };
    let layer = Layer {
        flow,
        attention: Attention {
            heads,
            kv_heads,
            head_dim,
            scale,
            shares: None,
            mask: AttentionMask::Causal,
            position: if sloped { Position::Slopes(slopes) } else { Position::Rope(0) },
            qk_norm: None,
            softcap: None,
            clip: None,
        },
        ffn: Ffn::Plain(Mlp {
            inner: config.integer("ffn_hidden_size", 1..=1 << 22)?.unwrap_or(4 * width),
            act: super::act(config, "activation", Act::Gelu)?,
        }),
    };
    let context = config.integer("max_position_embeddings", 1..=1 << 23)?.unwrap_or(2048);
    Ok(Description {
        tower: Tower {
            width,
            vocab: config.required("vocab_size", 1..=1 << 24)?,
            context,
            input: Input::TOKENS,
            ropes: match sloped {
                true => Vec::new(),
                false => vec![rope::resolve(config, head_dim, context, rope::DEFAULTS)?],
            },
            caches: true,
            whole_input: false,
            carried: Vec::new(),
            layers: vec![layer; config.required("num_hidden_layers", 1..=10_000)?],
            norm: Some(norm),
            head: Head::LM,
        },
        names: Names {
            bases: &["transformer.", ""],
            slots: vec![
                (Slot::Embedding, Source::Rows("word_embeddings")),
                (Slot::AttentionNorm, Source::Rows("h.{}.input_layernorm")),
                (Slot::AttentionNorm, Source::Rows("h.{}.ln_attn")),
                (Slot::Qkv, Source::Heads("h.{}.self_attention.query_key_value")),
                (Slot::AttentionOut, Source::Rows("h.{}.self_attention.dense")),
                (Slot::FfnNorm, Source::Rows("h.{}.post_attention_layernorm")),
                (Slot::FfnNorm, Source::Rows("h.{}.ln_mlp")),
                (Slot::Up, Source::Rows("h.{}.mlp.dense_h_to_4h")),
                (Slot::Down, Source::Rows("h.{}.mlp.dense_4h_to_h")),
                (Slot::FinalNorm, Source::Rows("ln_f")),
            ],
            root: vec![(Slot::Head, Source::Rows("lm_head"))],
            tied: config.flag("tie_word_embeddings", true)?,
            aliases: &[],
            ignore: &[],
        },
    })
}
