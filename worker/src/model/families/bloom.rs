//! BLOOM (transformers' `modeling_bloom.py`): layer norms, of the embedding too, queries, keys and values in one tensor, ALiBi.

use super::{Description, gpt};
use crate::model::{
    ModelError,
    architecture::{
        Act, Ffn, Flow, Head, Input, Layer, Mlp, Names, Norm, Position, Slopes, Slot, Source, Tower,
    },
    config::Config,
};

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    if config.flag("apply_residual_connection_post_layernorm", false)? {
        let expected = "false: what blocks yield is added to what they are given";
        return Err(config.error("apply_residual_connection_post_layernorm", expected).into());
    }
    let field = if config.get("n_embed").is_some() { "n_embed" } else { "hidden_size" };
    let width = config.required(field, 1..=1 << 20)?;
    let heads = config.required("n_head", 1..=1 << 14)?;
    let head_dim = super::head_dim(config, field, width, heads)?;
    let norm = Norm::Layer(config.positive("layer_norm_epsilon")?.unwrap_or(1e-5) as f32);
    let scale = (head_dim as f64).powf(-0.5) as f32;
    let position = Position::Slopes(Slopes { rounded: None });
    let layer = Layer {
        flow: Flow::Pre(norm),
        attention: gpt::attention(heads, head_dim, scale, position),
        ffn: Ffn::Plain(Mlp { inner: 4 * width, act: Act::GeluTanh }),
    };
    Ok(Description {
        tower: Tower {
            width,
            vocab: config.required("vocab_size", 1..=1 << 24)?,
            // Files say for how long it was trained; the class itself has no bound.
            context: config.integer("seq_length", 1..=1 << 23)?.unwrap_or(2048),
            input: Input { norm: Some(norm), ..Input::TOKENS },
            ropes: Vec::new(),
            caches: true,
            whole_input: false,
            carried: Vec::new(),
            layers: vec![layer; config.required("n_layer", 1..=10_000)?],
            norm: Some(norm),
            head: Head::LM,
        },
        names: Names {
            bases: &["transformer.", ""],
            slots: vec![
                (Slot::Embedding, Source::Rows("word_embeddings")),
                (Slot::InputNorm, Source::Rows("word_embeddings_layernorm")),
                (Slot::AttentionNorm, Source::Rows("h.{}.input_layernorm")),
                (Slot::Qkv, Source::Heads("h.{}.self_attention.query_key_value")),
                (Slot::AttentionOut, Source::Rows("h.{}.self_attention.dense")),
                (Slot::FfnNorm, Source::Rows("h.{}.post_attention_layernorm")),
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
