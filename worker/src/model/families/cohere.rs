//! Command R and Command A (transformers' `modeling_cohere.py`, `modeling_cohere2.py`): attention and feed-forward block
//! side by side from one norm, even dimensions turn with odd ones, logits have a factor. Cohere 2 has windows on three
//! layers of four, and the others turn nothing.

use super::{Description, llama};
use crate::model::{
    ModelError,
    architecture::{AttentionMask, Flow, Head, Norm, NormOver, Position, QkNorm, Slot, Source},
    config::Config,
    rope,
};

/// What transformers assumes where the file is silent.
const DEFAULT_WINDOW: usize = 4096;
const DEFAULT_PATTERN: usize = 4;
const DEFAULT_SCALE: f64 = 0.0625;

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = plain(config, 500_000.0)?;
    if config.flag("use_qk_norm", false)? {
        for layer in &mut description.tower.layers {
            let norm = layer.flow.norm();
            layer.attention.qk_norm = Some(QkNorm { norm, over: NormOver::EachHead, turned: false });
        }
        description.names.slots.extend([
            (Slot::QueryNorm, Source::EvenOdd("layers.{}.self_attn.q_norm")),
            (Slot::KeyNorm, Source::EvenOdd("layers.{}.self_attn.k_norm")),
        ]);
    }
    Ok(description)
}

pub(super) fn describe_2(config: &Config) -> Result<Description, ModelError> {
    let mut description = plain(config, 10_000.0)?;
    let window = super::window(config, Some(DEFAULT_WINDOW))?;
    let pattern = config.integer("sliding_window_pattern", 1..=10_000)?.unwrap_or(DEFAULT_PATTERN);
    let layers = &mut description.tower.layers;
    let slides = super::sliding_layers(config, layers.len(), |layer| (layer + 1) % pattern != 0)?;
    for (layer, slides) in layers.iter_mut().zip(slides) {
        match window {
            Some(window) if slides => layer.attention.mask = AttentionMask::Window(window),
            Some(_) => layer.attention.position = Position::None,
            None => {}
        }
    }
    Ok(description)
}

fn plain(config: &Config, theta: f64) -> Result<Description, ModelError> {
    let mut description = llama::describe_with(config, rope::Defaults { theta, ..rope::DEFAULTS })?;
    description.names.tied = config.flag("tie_word_embeddings", true)?;
    let norm = Norm::Layer(config.positive("layer_norm_eps")?.unwrap_or(1e-5) as f32);
    let tower = &mut description.tower;
    let scale = config.positive("logit_scale")?.unwrap_or(DEFAULT_SCALE) as f32;
    (tower.norm, tower.head) = (Some(norm), Head::Lm { scale, softcap: None });
    tower.layers.iter_mut().for_each(|layer| layer.flow = Flow::ParallelOne(norm));
    super::rename(
        &mut description.names,
        &[Slot::FfnNorm],
        &[
            (Slot::Query, Source::EvenOdd("layers.{}.self_attn.q_proj")),
            (Slot::Key, Source::EvenOdd("layers.{}.self_attn.k_proj")),
        ],
    );
    Ok(description)
}
