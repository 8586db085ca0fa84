//! GPT-2 and GPT-NeoX (transformers' `modeling_gpt2.py`, `modeling_gpt_neox.py`): layer norms, plain feed-forward
//! blocks, queries, keys and values in one tensor. GPT-2 learns its positions and transposes its weights; GPT-NeoX
//! turns a part of each head and may compute attention and feed-forward block side by side.

use super::Description;
use crate::model::{
    ModelError,
    architecture::{
        Act, Attention, AttentionMask, Ffn, Flow, Head, Input, Layer, Learned, Mlp, Names, Norm, Position,
        Slot, Source, Tower,
    },
    config::Config,
    rope,
};

pub(super) fn describe_2(config: &Config) -> Result<Description, ModelError> {
    if config.flag("add_cross_attention", false)? {
        return Err(config.error("add_cross_attention", "false: there is no encoder to attend to").into());
    }
    let width = config.required("n_embd", 1..=1 << 20)?;
    let heads = config.required("n_head", 1..=1 << 14)?;
    let head_dim = super::head_dim(config, "n_embd", width, heads)?;
    let norm = Norm::Layer(config.positive("layer_norm_epsilon")?.unwrap_or(1e-5) as f32);
    let mlp = Mlp {
        inner: config.integer("n_inner", 1..=1 << 22)?.unwrap_or(4 * width),
        act: super::act(config, "activation_function", Act::GeluTanh)?,
    };
    let scaled = config.flag("scale_attn_weights", true)?;
    let by_layer = config.flag("scale_attn_by_inverse_layer_idx", false)?;
    let layer = |index: usize| {
        let scale = if scaled { (head_dim as f64).powf(-0.5) } else { 1.0 };
        let scale = if by_layer { scale / (index + 1) as f64 } else { scale };
        Layer {
            flow: Flow::Pre(norm),
            attention: attention(heads, head_dim, scale as f32, Position::None),
            ffn: Ffn::Plain(mlp),
        }
    };
    let context = config.integer("n_positions", 1..=1 << 23)?.unwrap_or(1024);
    let learned = Learned { rows: context, first: 0 };
    Ok(Description {
        tower: Tower {
            width,
            vocab: config.required("vocab_size", 1..=1 << 24)?,
            context,
            input: Input { positions: Some(learned), ..Input::TOKENS },
            ropes: Vec::new(),
            caches: true,
            whole_input: false,
            carried: Vec::new(),
            layers: (0..config.required("n_layer", 1..=10_000)?).map(layer).collect(),
            norm: Some(norm),
            head: Head::LM,
        },
        names: Names {
            bases: &["transformer.", ""],
            slots: vec![
                (Slot::Embedding, Source::Rows("wte")),
                (Slot::Positions, Source::Rows("wpe")),
                (Slot::AttentionNorm, Source::Rows("h.{}.ln_1")),
                (Slot::Qkv, Source::Columns("h.{}.attn.c_attn")),
                (Slot::AttentionOut, Source::Columns("h.{}.attn.c_proj")),
                (Slot::FfnNorm, Source::Rows("h.{}.ln_2")),
                (Slot::Up, Source::Columns("h.{}.mlp.c_fc")),
                (Slot::Down, Source::Columns("h.{}.mlp.c_proj")),
                (Slot::FinalNorm, Source::Rows("ln_f")),
            ],
            root: vec![(Slot::Head, Source::Rows("lm_head"))],
            tied: config.flag("tie_word_embeddings", true)?,
            aliases: &[],
            // Masks that old files carry.
            ignore: &[".attn.bias", ".attn.masked_bias", ".crossattention.bias"],
        },
    })
}

pub(super) fn describe_neox(config: &Config) -> Result<Description, ModelError> {
    let width = config.required("hidden_size", 1..=1 << 20)?;
    let heads = config.required("num_attention_heads", 1..=1 << 14)?;
    let head_dim = super::head_dim(config, "hidden_size", width, heads)?;
    let norm = Norm::Layer(config.positive("layer_norm_eps")?.unwrap_or(1e-5) as f32);
    let parallel = config.flag("use_parallel_residual", true)?;
    let scale = (head_dim as f64).powf(-0.5) as f32;
    let layer = Layer {
        flow: if parallel { Flow::ParallelTwo(norm) } else { Flow::Pre(norm) },
        attention: attention(heads, head_dim, scale, Position::Rope(0)),
        ffn: Ffn::Plain(Mlp {
            inner: config.required("intermediate_size", 1..=1 << 22)?,
            act: super::act(config, "hidden_act", Act::Gelu)?,
        }),
    };
    let context = config.integer("max_position_embeddings", 1..=1 << 23)?.unwrap_or(2048);
    let defaults = rope::Defaults { partial: Some(0.25), ..rope::DEFAULTS };
    // Its own names for what others have by these; the class does not look at those.
    let turning = config.clone().with_only("rotary_emb_base", "rope_theta");
    let turning = turning.with_only("rotary_pct", "partial_rotary_factor");
    Ok(Description {
        tower: Tower {
            width,
            vocab: config.required("vocab_size", 1..=1 << 24)?,
            context,
            input: Input::TOKENS,
            ropes: vec![rope::resolve(&turning, head_dim, context, defaults)?],
            caches: true,
            whole_input: false,
            carried: Vec::new(),
            layers: vec![layer; config.required("num_hidden_layers", 1..=10_000)?],
            norm: Some(norm),
            head: Head::LM,
        },
        names: Names {
            bases: &["gpt_neox.", ""],
            slots: vec![
                (Slot::Embedding, Source::Rows("embed_in")),
                (Slot::AttentionNorm, Source::Rows("layers.{}.input_layernorm")),
                (Slot::Qkv, Source::Heads("layers.{}.attention.query_key_value")),
                (Slot::AttentionOut, Source::Rows("layers.{}.attention.dense")),
                (Slot::FfnNorm, Source::Rows("layers.{}.post_attention_layernorm")),
                (Slot::Up, Source::Rows("layers.{}.mlp.dense_h_to_4h")),
                (Slot::Down, Source::Rows("layers.{}.mlp.dense_4h_to_h")),
                (Slot::FinalNorm, Source::Rows("final_layer_norm")),
            ],
            root: vec![(Slot::Head, Source::Rows("embed_out"))],
            tied: config.flag("tie_word_embeddings", false)?,
            aliases: &[],
            ignore: &[".attention.bias", ".attention.masked_bias"],
        },
    })
}

pub(super) fn attention(heads: usize, head_dim: usize, scale: f32, position: Position) -> Attention {
    Attention {
        heads,
        kv_heads: heads,
        head_dim,
        scale,
        shares: None,
        mask: AttentionMask::Causal,
        position,
        qk_norm: None,
        softcap: None,
        clip: None,
    }
}
