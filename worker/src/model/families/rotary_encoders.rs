//! Encoders of BERT's kind with rotary positions: Nomic BERT, GTE and Jina embeddings v3 (transformers'
//! `modeling_nomic_bert.py`, `modeling_gte.py`, `modeling_jina_embeddings_v3.py`). Norms follow each block.

use super::{
    Description, bert,
    task::{SPANS, TAGS, Task, classes, tags, task},
};
use crate::model::{
    ModelError,
    architecture::{
        Act, Attention, AttentionMask, Embedding, Ffn, Flow, Head, Input, Layer, Mlp, Names, Norm, Pool,
        Position, Slot, Source, Tower,
    },
    config::Config,
    rope,
};

type Sources = &'static [(Slot, Source)];

/// What one of them calls a thing, and what it assumes where the file is silent.
struct Dialect {
    bases: &'static [&'static str],
    theta: f64,
    context: usize,
    segments: usize,
    epsilon: f64,
    act: Act,
    gated: bool,
    slots: Sources,
    /// Dense, unless it is the pooler; head.
    classify: &'static [(Slot, Source)],
    /// Dense, norm, head.
    mlm: [(Slot, Source); 3],
    /// `None` for that of the layers.
    mlm_act: Option<Act>,
}

const NOMIC: Sources = &[
    (Slot::Embedding, Source::Rows("embeddings.word_embeddings")),
    (Slot::Segments, Source::Rows("embeddings.token_type_embeddings")),
    (Slot::InputNorm, Source::Rows("emb_ln")),
    (Slot::Qkv, Source::Rows("encoder.layers.{}.attn.Wqkv")),
    (Slot::AttentionOut, Source::Rows("encoder.layers.{}.attn.out_proj")),
    (Slot::AttentionNorm, Source::Rows("encoder.layers.{}.norm1")),
    (Slot::Up, Source::Rows("encoder.layers.{}.mlp.fc11")),
    (Slot::Gate, Source::Rows("encoder.layers.{}.mlp.fc12")),
    (Slot::Down, Source::Rows("encoder.layers.{}.mlp.fc2")),
    (Slot::FfnNorm, Source::Rows("encoder.layers.{}.norm2")),
];

const GTE: Sources = &[
    (Slot::Embedding, Source::Rows("embeddings.word_embeddings")),
    (Slot::Segments, Source::Rows("embeddings.token_type_embeddings")),
    (Slot::InputNorm, Source::Rows("embeddings.LayerNorm")),
    (Slot::Qkv, Source::Rows("encoder.layer.{}.attention.qkv_proj")),
    (Slot::AttentionOut, Source::Rows("encoder.layer.{}.attention.o_proj")),
    (Slot::AttentionNorm, Source::Rows("encoder.layer.{}.attn_ln")),
    (Slot::GateUp, Source::Swapped("encoder.layer.{}.mlp.up_gate_proj")),
    (Slot::Down, Source::Rows("encoder.layer.{}.mlp.down_proj")),
    (Slot::FfnNorm, Source::Rows("encoder.layer.{}.mlp_ln")),
];

const JINA: Sources = &[
    (Slot::Embedding, Source::Rows("embeddings.word_embeddings")),
    (Slot::Segments, Source::Rows("embeddings.token_type_embeddings")),
    (Slot::InputNorm, Source::Rows("emb_ln")),
    (Slot::Qkv, Source::Rows("encoder.layers.{}.mixer.Wqkv")),
    (Slot::AttentionOut, Source::Rows("encoder.layers.{}.mixer.out_proj")),
    (Slot::AttentionNorm, Source::Rows("encoder.layers.{}.norm1")),
    (Slot::Up, Source::Rows("encoder.layers.{}.mlp.fc1")),
    (Slot::Down, Source::Rows("encoder.layers.{}.mlp.fc2")),
    (Slot::FfnNorm, Source::Rows("encoder.layers.{}.norm2")),
];

pub(super) fn describe_nomic(config: &Config) -> Result<Description, ModelError> {
    let dialect = Dialect {
        bases: &["nomic_bert.", "bert.", ""],
        theta: 1000.0,
        context: 2048,
        segments: 2,
        epsilon: 1e-12,
        act: Act::Silu,
        gated: true,
        slots: NOMIC,
        classify: &[(Slot::Head, Source::Rows("classifier"))],
        mlm: [
            (Slot::HeadDense, Source::Rows("cls.predictions.transform.dense")),
            (Slot::HeadNorm, Source::Rows("cls.predictions.transform.layer_norm")),
            (Slot::Head, Source::Rows("cls.predictions.decoder")),
        ],
        mlm_act: None,
    };
    describe(config, dialect)
}

pub(super) fn describe_gte(config: &Config) -> Result<Description, ModelError> {
    let dialect = Dialect {
        bases: &["new.", "gte.", ""],
        theta: 160_000.0,
        context: 8192,
        segments: 1,
        epsilon: 1e-12,
        act: Act::Gelu,
        gated: true,
        slots: GTE,
        classify: &[(Slot::Head, Source::Rows("classifier"))],
        mlm: [
            (Slot::HeadDense, Source::Rows("lm_head.dense")),
            (Slot::HeadNorm, Source::Rows("lm_head.norm")),
            (Slot::Head, Source::Rows("lm_head.decoder")),
        ],
        mlm_act: Some(Act::Gelu),
    };
    describe(config, dialect)
}

pub(super) fn describe_jina(config: &Config) -> Result<Description, ModelError> {
    let dialect = Dialect {
        bases: &["roberta.", ""],
        theta: 20_000.0,
        context: 8194,
        segments: 1,
        epsilon: 1e-5,
        act: Act::Gelu,
        gated: false,
        slots: JINA,
        classify: &[
            (Slot::HeadDense, Source::Rows("classifier.dense")),
            (Slot::Head, Source::Rows("classifier.out_proj")),
        ],
        mlm: [
            (Slot::HeadDense, Source::Rows("lm_head.dense")),
            (Slot::HeadNorm, Source::Rows("lm_head.layer_norm")),
            (Slot::Head, Source::Rows("lm_head.decoder")),
        ],
        mlm_act: Some(Act::Gelu),
    };
    describe(config, dialect)
}

fn describe(config: &Config, dialect: Dialect) -> Result<Description, ModelError> {
    let width = config.required("hidden_size", 1..=1 << 20)?;
    let heads = config.required("num_attention_heads", 1..=1 << 14)?;
    let head_dim = match config.integer("head_dim", 2..=1 << 13)? {
        Some(head_dim) => head_dim,
        None => super::head_dim(config, "hidden_size", width, heads)?,
    };
    let context = config.integer("max_position_embeddings", 1..=1 << 23)?.unwrap_or(dialect.context);
    let norm = Norm::Layer(config.positive("layer_norm_eps")?.unwrap_or(dialect.epsilon) as f32);
    let act = super::act(config, "hidden_act", dialect.act)?;
    let mlp = Mlp { inner: config.required("intermediate_size", 1..=1 << 22)?, act };
    let layer = Layer {
        flow: Flow::Post(norm),
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5) as f32,
            shares: None,
            mask: AttentionMask::Full,
            position: Position::Rope(0),
            qk_norm: None,
            softcap: None,
            clip: None,
        },
        ffn: if dialect.gated { Ffn::Gated(mlp) } else { Ffn::Plain(mlp) },
    };
    let mut slots = dialect.slots.to_vec();
    let (head, root) = match task(config)? {
        Task::FillMask => (Head::Mlm(dialect.mlm_act.unwrap_or(act), norm), dialect.mlm.to_vec()),
        Task::Classify => {
            let (labels, scoring) = classes(config)?;
            let (pool, act) = (Pool::First, Some(Act::Tanh));
            if !dialect.classify.iter().any(|(slot, _)| *slot == Slot::HeadDense) {
                slots.push((Slot::HeadDense, Source::Rows("pooler.dense")));
            }
            (Head::Classify { pool, act, norm: None, labels, scoring }, dialect.classify.to_vec())
        }
        Task::Tag => (Head::Tag { act: None, norm: None, labels: tags(config)? }, TAGS.to_vec()),
        Task::Span => (Head::Span { act: None, norm: None }, SPANS.to_vec()),
        Task::Embed => (Head::Embed(Embedding::mean(width)), Vec::new()),
    };
    let ignore = if matches!(head, Head::Classify { .. }) { &["position_ids"][..] } else { bert::POOLERS };
    let segments = config.integer("type_vocab_size", 0..=1 << 10)?.unwrap_or(dialect.segments);
    let theta = rope::Defaults { theta: dialect.theta, ..rope::DEFAULTS };
    Ok(Description {
        tower: Tower {
            width,
            vocab: config.required("vocab_size", 1..=1 << 24)?,
            context,
            input: Input { segments, norm: Some(norm), ..Input::TOKENS },
            ropes: vec![rope::resolve(config, head_dim, context, theta)?],
            layers: vec![layer; config.required("num_hidden_layers", 1..=10_000)?],
            caches: false,
            whole_input: true,
            carried: Vec::new(),
            norm: None,
            head,
        },
        names: Names {
            bases: dialect.bases,
            slots,
            root,
            tied: config.flag("tie_word_embeddings", true)?,
            aliases: bert::ALIASES,
            ignore,
        },
    })
}
