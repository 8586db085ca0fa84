//! DeBERTa 2 and 3 (transformers' `modeling_deberta_v2.py`): BERTs whose queries and keys also meet vectors that stand for their
//! distance.

use super::{
    Description,
    bert::{Dialect, SIZES, describe_as},
};
use crate::model::{
    ModelError,
    architecture::{Act, Distances, Norm, Position, Slot, Source},
    config::Config,
};

/// What the modules of published files are trained with, and the models that are made of them have no use for.
const OTHER_HEADS: &[&str] = &[
    "mask_predictions.*",
    "lm_predictions.*",
    "cls.predictions.*",
    "deberta.embeddings.position_embeddings.weight",
    "pooler.dense.weight",
    "pooler.dense.bias",
];

const LAYER: &[(Slot, Source)] = &[
    (Slot::Segments, Source::Rows("embeddings.token_type_embeddings")),
    (Slot::Query, Source::Rows("encoder.layer.{}.attention.self.query_proj")),
    (Slot::Key, Source::Rows("encoder.layer.{}.attention.self.key_proj")),
    (Slot::Value, Source::Rows("encoder.layer.{}.attention.self.value_proj")),
    (Slot::Distances, Source::Rows("encoder.rel_embeddings")),
    (Slot::DistanceNorm, Source::Rows("encoder.LayerNorm")),
    (Slot::AttentionOut, Source::Rows("encoder.layer.{}.attention.output.dense")),
    (Slot::AttentionNorm, Source::Rows("encoder.layer.{}.attention.output.LayerNorm")),
    (Slot::Up, Source::Rows("encoder.layer.{}.intermediate.dense")),
    (Slot::Down, Source::Rows("encoder.layer.{}.output.dense")),
    (Slot::FfnNorm, Source::Rows("encoder.layer.{}.output.LayerNorm")),
];

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let width = config.required("hidden_size", 1..=1 << 20)?;
    for field in ["embedding_size", "pooler_hidden_size"] {
        config.integer(field, width..=width)?;
    }
    for (field, wanted, default) in [("relative_attention", true, false), ("share_att_key", true, false)] {
        if config.flag(field, default)? != wanted {
            return Err(config.error(field, format!("{wanted}: models without are not served")).into());
        }
    }
    if config.integer("conv_kernel_size", 0..=1 << 10)?.unwrap_or(0) > 0 {
        let expected = "0: models with a convolution behind their first layer are not served";
        return Err(config.error("conv_kernel_size", expected).into());
    }
    let context = config.integer("max_position_embeddings", 1..=1 << 23)?.unwrap_or(512);
    let distances = distances(config, context)?;
    let legacy = config.flag("legacy", true)?;
    let dialect = Dialect {
        bases: &["deberta.", ""],
        sizes: SIZES,
        first_position: 0,
        segments: config.integer("type_vocab_size", 0..=1 << 10)?.unwrap_or(0),
        layer: LAYER,
        position: Position::Distances(distances),
        classify: [(Slot::HeadDense, Source::Rows("pooler.dense")), (Slot::Head, Source::Rows("classifier"))],
        classify_act: super::act(config, "pooler_hidden_act", Act::Gelu)?,
        mlm: match legacy {
            true => [
                (Slot::HeadDense, Source::Rows("cls.predictions.transform.dense")),
                (Slot::HeadNorm, Source::Rows("cls.predictions.transform.LayerNorm")),
                (Slot::Head, Source::Rows("cls.predictions.decoder")),
            ],
            false => [
                (Slot::HeadDense, Source::Rows("lm_predictions.lm_head.dense")),
                (Slot::HeadNorm, Source::Rows("lm_predictions.lm_head.LayerNorm")),
                (Slot::Head, Source::Rows("lm_predictions.lm_head")),
            ],
        },
        mlm_act: None,
    };
    let mut description = describe_as(config, dialect)?;
    let tower = &mut description.tower;
    if !config.flag("position_biased_input", true)? {
        tower.input.positions = None;
    }
    for layer in &mut tower.layers {
        // Of the three products that a score is the sum of.
        layer.attention.scale = ((layer.attention.head_dim * 3) as f64).powf(-0.5) as f32;
    }
    description.names.ignore = OTHER_HEADS;
    Ok(description)
}

/// Which vectors there are for distances.
fn distances(config: &Config, context: usize) -> Result<Distances, ModelError> {
    let kinds = match config.get("pos_att_type") {
        Some(serde_json::Value::String(kinds)) => {
            kinds.split('|').map(|kind| kind.trim().to_lowercase()).collect()
        }
        _ => config.strings("pos_att_type")?.unwrap_or_default(),
    };
    let has = |kind: &str| kinds.iter().any(|k| k == kind);
    if !has("c2p") || !has("p2c") {
        let expected = "both c2p and p2c: models whose scores have one of them, or neither, are not served";
        return Err(config.error("pos_att_type", expected).into());
    }
    // What is below 1 stands for none.
    let positive = |field: &str, most: usize| match config.get(field).and_then(serde_json::Value::as_i64) {
        Some(..1) => Ok(None),
        _ => config.integer(field, 1..=most),
    };
    let farthest = positive("max_relative_positions", 1 << 23)?.unwrap_or(context);
    let buckets = positive("position_buckets", farthest)?;
    let norm = match config.string("norm_rel_ebd")?.unwrap_or("none").to_lowercase().as_str() {
        "layer_norm" => Some(Norm::Layer(config.positive("layer_norm_eps")?.unwrap_or(1e-7) as f32)),
        "none" => None,
        _ => return Err(config.error("norm_rel_ebd", "layer_norm or none").into()),
    };
    if buckets.is_some_and(|buckets| buckets < 4) {
        return Err(config.error("position_buckets", "at least 4, or -1").into());
    }
    let span = buckets.unwrap_or(farthest);
    if span > 1 << 16 {
        let field = if buckets.is_some() { "position_buckets" } else { "max_relative_positions" };
        return Err(config.error(field, "at most 65536").into());
    }
    Ok(Distances { span, farthest: buckets.map(|_| farthest), norm })
}
