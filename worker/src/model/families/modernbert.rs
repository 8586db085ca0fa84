//! ModernBERT (transformers' `modeling_modernbert.py`): an encoder with rotary positions and norms before each block, whose
//! layers see all of an input or what is near.

use super::{
    Description,
    task::{Task, classes, tags, task},
};
use crate::model::{
    ModelError,
    architecture::{
        Act, Attention, AttentionMask, Embedding, Ffn, Flow, Head, Input, Layer, Mlp, Names, Norm, Pool,
        Position, Rope, Slot, Source, Tower,
    },
    config::{Config, ConfigError},
    rope,
};

const SLOTS: &[(Slot, Source)] = &[
    (Slot::Embedding, Source::Rows("embeddings.tok_embeddings")),
    (Slot::InputNorm, Source::Rows("embeddings.norm")),
    (Slot::AttentionNorm, Source::Rows("layers.{}.attn_norm")),
    (Slot::Qkv, Source::Rows("layers.{}.attn.Wqkv")),
    (Slot::AttentionOut, Source::Rows("layers.{}.attn.Wo")),
    (Slot::FfnNorm, Source::Rows("layers.{}.mlp_norm")),
    (Slot::GateUp, Source::Rows("layers.{}.mlp.Wi")),
    (Slot::Down, Source::Rows("layers.{}.mlp.Wo")),
    (Slot::FinalNorm, Source::Rows("final_norm")),
];

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let width = config.required("hidden_size", 1..=1 << 20)?;
    let heads = config.required("num_attention_heads", 1..=1 << 14)?;
    let head_dim = super::head_dim(config, "hidden_size", width, heads)?;
    let count = config.required("num_hidden_layers", 1..=10_000)?;
    let context = config.integer("max_position_embeddings", 1..=1 << 23)?.unwrap_or(8192);
    let norm = Norm::Layer(config.positive("norm_eps")?.unwrap_or(1e-5) as f32);
    let act = super::act(config, "hidden_activation", Act::Gelu)?;
    let inner = config.required("intermediate_size", 1..=1 << 22)?;
    let near = config.integer("local_attention", 0..=1 << 23)?.unwrap_or(128) / 2;
    let every = config.integer("global_attn_every_n_layers", 1..=10_000)?.unwrap_or(3);
    let slides = super::sliding_layers(config, count, |layer| layer % every != 0)?;
    let layer = |(number, slides): (usize, bool)| Layer {
        // The sum of the embeddings has a norm already.
        flow: if number == 0 { Flow::PreFfn(norm) } else { Flow::Pre(norm) },
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5) as f32,
            shares: None,
            mask: if slides { AttentionMask::Near(near) } else { AttentionMask::Full },
            position: Position::Rope(usize::from(slides)),
            qk_norm: None,
            softcap: None,
            clip: None,
        },
        ffn: Ffn::Gated(Mlp { inner, act }),
    };
    let head_act = super::act(config, "classifier_activation", Act::Gelu)?;
    let (head, last) = match task(config)? {
        Task::FillMask => (Head::Mlm(head_act, norm), "decoder"),
        Task::Classify => {
            let (labels, scoring) = classes(config)?;
            let pool = match config.string("classifier_pooling")? {
                None | Some("cls") => Pool::First,
                Some("mean") => Pool::Mean,
                Some(_) => return Err(config.error("classifier_pooling", "cls or mean").into()),
            };
            let head = Head::Classify { pool, act: Some(head_act), norm: Some(norm), labels, scoring };
            (head, "classifier")
        }
        Task::Tag => {
            let head = Head::Tag { act: Some(head_act), norm: Some(norm), labels: tags(config)? };
            (head, "classifier")
        }
        Task::Span => (Head::Span { act: Some(head_act), norm: Some(norm) }, "classifier"),
        Task::Embed => (Head::Embed(Embedding::mean(width)), "classifier"),
    };
    let root = [("head.dense", Slot::HeadDense), ("head.norm", Slot::HeadNorm), (last, Slot::Head)]
        .map(|(name, slot)| (slot, Source::Rows(name)));
    Ok(Description {
        tower: Tower {
            width,
            vocab: config.required("vocab_size", 1..=1 << 24)?,
            context,
            input: Input { norm: Some(norm), ..Input::TOKENS },
            ropes: ropes(config, head_dim, context)?,
            layers: slides.into_iter().enumerate().map(layer).collect(),
            caches: false,
            whole_input: true,
            carried: Vec::new(),
            norm: Some(norm),
            head,
        },
        names: Names {
            bases: &["model.", ""],
            slots: SLOTS.to_vec(),
            root: root.to_vec(),
            tied: last == "decoder" && config.flag("tie_word_embeddings", true)?,
            aliases: &[],
            ignore: &[],
        },
    })
}

/// Those of layers that see all of an input, and those of the others.
fn ropes(config: &Config, head_dim: usize, context: usize) -> Result<Vec<Rope>, ConfigError> {
    let one = |kind: &str, old: &str, theta: f64| {
        let defaults = rope::Defaults { theta, ..rope::DEFAULTS };
        rope::resolve_for(config, (kind, old), head_dim, context, defaults)
    };
    Ok(vec![
        one("full_attention", "global_rope_theta", 160_000.0)?,
        one("sliding_attention", "local_rope_theta", 10_000.0)?,
    ])
}
