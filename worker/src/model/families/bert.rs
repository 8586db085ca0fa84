//! BERT, RoBERTa, ELECTRA, DistilBERT and MPNet (transformers' `modeling_bert.py`, `modeling_roberta.py`, `modeling_electra.py`,
//! `modeling_distilbert.py`, `modeling_mpnet.py`): encoders whose norms follow each block, with learned positions. XLM-RoBERTa
//! and CamemBERT are RoBERTas. What they answer is named by `architectures`.

use super::{
    Description,
    task::{SPANS, TAGS, Task, classes, tags, task},
};
use crate::{
    kernels::ops::BUCKETS,
    model::{
        ModelError,
        architecture::{
            Act, Attention, AttentionMask, Embedding, Ffn, Flow, Head, Input, Layer, Learned, Mlp, Names,
            Norm, Pool, Position, Slot, Source, Tower,
        },
        config::Config,
    },
};

/// What one of them calls a thing.
pub(super) struct Dialect {
    pub bases: &'static [&'static str],
    pub sizes: Sizes,
    /// Row of the first position.
    pub first_position: usize,
    pub segments: usize,
    pub layer: &'static [(Slot, Source)],
    /// How positions enter attention, beside those that are learned.
    pub position: Position,
    /// Dense, head; the first is under the base prefix in BERT.
    pub classify: [(Slot, Source); 2],
    pub classify_act: Act,
    /// Dense, norm, head.
    pub mlm: [(Slot, Source); 3],
    /// `None` for that of the layers.
    pub mlm_act: Option<Act>,
}

/// Fields of `config.json`.
pub(super) struct Sizes {
    width: &'static str,
    layers: &'static str,
    heads: &'static str,
    inner: &'static str,
    act: &'static str,
}

pub(super) const SIZES: Sizes = Sizes {
    width: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    inner: "intermediate_size",
    act: "hidden_act",
};

const LAYER: &[(Slot, Source)] = &[
    (Slot::Segments, Source::Rows("embeddings.token_type_embeddings")),
    (Slot::Query, Source::Rows("encoder.layer.{}.attention.self.query")),
    (Slot::Key, Source::Rows("encoder.layer.{}.attention.self.key")),
    (Slot::Value, Source::Rows("encoder.layer.{}.attention.self.value")),
    (Slot::AttentionOut, Source::Rows("encoder.layer.{}.attention.output.dense")),
    (Slot::AttentionNorm, Source::Rows("encoder.layer.{}.attention.output.LayerNorm")),
    (Slot::Up, Source::Rows("encoder.layer.{}.intermediate.dense")),
    (Slot::Down, Source::Rows("encoder.layer.{}.output.dense")),
    (Slot::FfnNorm, Source::Rows("encoder.layer.{}.output.LayerNorm")),
];

/// Whatever is computed from the first token alone is of no use to heads that classify nothing.
pub(super) const POOLERS: &[&str] = &[
    "position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "seq_relationship.weight",
    "seq_relationship.bias",
];

/// Endings of old files, and heads' biases that are no part of a module.
pub(super) const ALIASES: &[(&str, &str)] = &[
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ("lm_head.bias", "lm_head.decoder.bias"),
];

const MPNET_LAYER: &[(Slot, Source)] = &[
    (Slot::Query, Source::Rows("encoder.layer.{}.attention.attn.q")),
    (Slot::Key, Source::Rows("encoder.layer.{}.attention.attn.k")),
    (Slot::Value, Source::Rows("encoder.layer.{}.attention.attn.v")),
    (Slot::AttentionOut, Source::Rows("encoder.layer.{}.attention.attn.o")),
    (Slot::PositionBias, Source::Rows("encoder.relative_attention_bias")),
    (Slot::AttentionNorm, Source::Rows("encoder.layer.{}.attention.LayerNorm")),
    (Slot::Up, Source::Rows("encoder.layer.{}.intermediate.dense")),
    (Slot::Down, Source::Rows("encoder.layer.{}.output.dense")),
    (Slot::FfnNorm, Source::Rows("encoder.layer.{}.output.LayerNorm")),
];

const DISTIL_LAYER: &[(Slot, Source)] = &[
    (Slot::Query, Source::Rows("transformer.layer.{}.attention.q_lin")),
    (Slot::Key, Source::Rows("transformer.layer.{}.attention.k_lin")),
    (Slot::Value, Source::Rows("transformer.layer.{}.attention.v_lin")),
    (Slot::AttentionOut, Source::Rows("transformer.layer.{}.attention.out_lin")),
    (Slot::AttentionNorm, Source::Rows("transformer.layer.{}.sa_layer_norm")),
    (Slot::Up, Source::Rows("transformer.layer.{}.ffn.lin1")),
    (Slot::Down, Source::Rows("transformer.layer.{}.ffn.lin2")),
    (Slot::FfnNorm, Source::Rows("transformer.layer.{}.output_layer_norm")),
];

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let dialect = Dialect {
        bases: &["bert.", ""],
        sizes: SIZES,
        first_position: 0,
        segments: config.integer("type_vocab_size", 1..=1 << 10)?.unwrap_or(2),
        layer: LAYER,
        position: Position::None,
        classify: [
            (Slot::HeadDense, Source::Rows("bert.pooler.dense")),
            (Slot::Head, Source::Rows("classifier")),
        ],
        classify_act: Act::Tanh,
        mlm: [
            (Slot::HeadDense, Source::Rows("cls.predictions.transform.dense")),
            (Slot::HeadNorm, Source::Rows("cls.predictions.transform.LayerNorm")),
            (Slot::Head, Source::Rows("cls.predictions.decoder")),
        ],
        mlm_act: None,
    };
    describe_as(config, dialect)
}

pub(super) fn describe_roberta(config: &Config) -> Result<Description, ModelError> {
    let pad = config.integer("pad_token_id", 0..=1 << 20)?.unwrap_or(1);
    let dialect = Dialect {
        bases: &["roberta.", ""],
        sizes: SIZES,
        // Positions are counted from the row after the padding token's.
        first_position: pad + 1,
        segments: config.integer("type_vocab_size", 1..=1 << 10)?.unwrap_or(2),
        layer: LAYER,
        position: Position::None,
        classify: [
            (Slot::HeadDense, Source::Rows("classifier.dense")),
            (Slot::Head, Source::Rows("classifier.out_proj")),
        ],
        classify_act: Act::Tanh,
        mlm: [
            (Slot::HeadDense, Source::Rows("lm_head.dense")),
            (Slot::HeadNorm, Source::Rows("lm_head.layer_norm")),
            (Slot::Head, Source::Rows("lm_head.decoder")),
        ],
        mlm_act: Some(Act::Gelu),
    };
    describe_as(config, dialect)
}

pub(super) fn describe_electra(config: &Config) -> Result<Description, ModelError> {
    let discriminates = |names: Vec<String>| names.iter().any(|name| name.ends_with("ForPreTraining"));
    if config.strings("architectures")?.is_some_and(discriminates) {
        let expected =
            "a model, or one for MaskedLM, SequenceClassification, TokenClassification or QuestionAnswering";
        return Err(config.error("architectures", expected).into());
    }
    let dialect = Dialect {
        bases: &["electra.", ""],
        sizes: SIZES,
        first_position: 0,
        segments: config.integer("type_vocab_size", 1..=1 << 10)?.unwrap_or(2),
        layer: LAYER,
        position: Position::None,
        classify: [
            (Slot::HeadDense, Source::Rows("classifier.dense")),
            (Slot::Head, Source::Rows("classifier.out_proj")),
        ],
        classify_act: Act::Gelu,
        mlm: [
            (Slot::HeadDense, Source::Rows("generator_predictions.dense")),
            (Slot::HeadNorm, Source::Rows("generator_predictions.LayerNorm")),
            (Slot::Head, Source::Rows("generator_lm_head")),
        ],
        mlm_act: Some(Act::Gelu),
    };
    let mut description = describe_as(config, dialect)?;
    let tower = &mut description.tower;
    let columns = config.required("embedding_size", 1..=1 << 20)?;
    tower.input.projected = Some(columns).filter(|columns| *columns != tower.width);
    description.names.slots.push((Slot::InputProjection, Source::Rows("embeddings_project")));
    Ok(description)
}

pub(super) fn describe_mpnet(config: &Config) -> Result<Description, ModelError> {
    config.integer("relative_attention_num_buckets", BUCKETS..=BUCKETS)?;
    let dialect = Dialect {
        bases: &["mpnet.", ""],
        sizes: SIZES,
        // Behind the padding token's, whose id is 1 whatever the file says.
        first_position: 2,
        segments: 0,
        layer: MPNET_LAYER,
        position: Position::Buckets,
        classify: [
            (Slot::HeadDense, Source::Rows("classifier.dense")),
            (Slot::Head, Source::Rows("classifier.out_proj")),
        ],
        classify_act: Act::Tanh,
        mlm: [
            (Slot::HeadDense, Source::Rows("lm_head.dense")),
            (Slot::HeadNorm, Source::Rows("lm_head.layer_norm")),
            (Slot::Head, Source::Rows("lm_head.decoder")),
        ],
        mlm_act: Some(Act::Gelu),
    };
    describe_as(config, dialect)
}

pub(super) fn describe_distil(config: &Config) -> Result<Description, ModelError> {
    let dialect = Dialect {
        bases: &["distilbert.", ""],
        sizes: Sizes {
            width: "dim",
            layers: "n_layers",
            heads: "n_heads",
            inner: "hidden_dim",
            act: "activation",
        },
        first_position: 0,
        segments: 0,
        layer: DISTIL_LAYER,
        position: Position::None,
        classify: [
            (Slot::HeadDense, Source::Rows("pre_classifier")),
            (Slot::Head, Source::Rows("classifier")),
        ],
        classify_act: Act::Relu,
        mlm: [
            (Slot::HeadDense, Source::Rows("vocab_transform")),
            (Slot::HeadNorm, Source::Rows("vocab_layer_norm")),
            (Slot::Head, Source::Rows("vocab_projector")),
        ],
        mlm_act: None,
    };
    describe_as(config, dialect)
}

pub(super) fn describe_as(config: &Config, dialect: Dialect) -> Result<Description, ModelError> {
    let Dialect { bases, sizes, first_position, segments, layer, .. } = dialect;
    if !matches!(config.string("position_embedding_type")?, None | Some("absolute")) {
        return Err(config.error("position_embedding_type", "absolute").into());
    }
    if config.flag("is_decoder", false)? {
        return Err(config.error("is_decoder", "false").into());
    }
    let width = config.required(sizes.width, 1..=1 << 20)?;
    let heads = config.required(sizes.heads, 1..=1 << 14)?;
    let head_dim = super::head_dim(config, sizes.width, width, heads)?;
    let act = super::act(config, sizes.act, Act::Gelu)?;
    let norm = Norm::Layer(config.positive("layer_norm_eps")?.unwrap_or(1e-12) as f32);
    let rows = config.integer("max_position_embeddings", first_position + 1..=1 << 23)?;
    let rows = rows.unwrap_or(first_position + 512);
    let (head, own) = match task(config)? {
        Task::FillMask => (Head::Mlm(dialect.mlm_act.unwrap_or(act), norm), &dialect.mlm[..]),
        Task::Classify => {
            let (labels, scoring) = classes(config)?;
            let act = Some(dialect.classify_act);
            let head = Head::Classify { pool: Pool::First, act, norm: None, labels, scoring };
            (head, &dialect.classify[..])
        }
        Task::Tag => (Head::Tag { act: None, norm: None, labels: tags(config)? }, TAGS),
        Task::Span => (Head::Span { act: None, norm: None }, SPANS),
        Task::Embed => (Head::Embed(Embedding::mean(width)), &[][..]),
    };
    let ignore = if matches!(head, Head::Classify { .. }) { &["position_ids"][..] } else { POOLERS };
    let block = Layer {
        flow: Flow::Post(norm),
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5) as f32,
            shares: None,
            mask: AttentionMask::Full,
            position: dialect.position,
            qk_norm: None,
            softcap: None,
            clip: None,
        },
        ffn: Ffn::Plain(Mlp { inner: config.required(sizes.inner, 1..=1 << 22)?, act }),
    };
    let mut slots = vec![
        (Slot::Embedding, Source::Rows("embeddings.word_embeddings")),
        (Slot::Positions, Source::Rows("embeddings.position_embeddings")),
        (Slot::InputNorm, Source::Rows("embeddings.LayerNorm")),
    ];
    slots.extend(layer);
    let learned = Learned { rows, first: first_position };
    Ok(Description {
        tower: Tower {
            width,
            vocab: config.required("vocab_size", 1..=1 << 24)?,
            context: rows - first_position,
            input: Input { positions: Some(learned), segments, norm: Some(norm), ..Input::TOKENS },
            ropes: Vec::new(),
            caches: false,
            whole_input: true,
            carried: Vec::new(),
            layers: vec![block; config.required(sizes.layers, 1..=10_000)?],
            norm: None,
            head,
        },
        names: Names {
            bases,
            slots,
            root: own.to_vec(),
            tied: config.flag("tie_word_embeddings", true)?,
            aliases: ALIASES,
            ignore,
        },
    })
}
