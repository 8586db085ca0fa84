//! StarCoder 2 (transformers' `modeling_starcoder2.py`): layer norms, plain feed-forward blocks, biases, perhaps a window.

use super::{Description, llama, mistral};
use crate::model::{
    ModelError,
    architecture::{Act, Ffn, Flow, Mlp, Norm, Slot, Source},
    config::Config,
};

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description = llama::describe(config)?;
    mistral::slide(&mut description, super::window(config, None)?);
    description.names.tied = config.flag("tie_word_embeddings", true)?;
    let norm = Norm::Layer(config.positive("norm_epsilon")?.unwrap_or(1e-5) as f32);
    let act = super::act(config, "hidden_act", Act::GeluTanh)?;
    description.tower.norm = Some(norm);
    for layer in &mut description.tower.layers {
        layer.flow = Flow::Pre(norm);
        layer.ffn = Ffn::Plain(Mlp { act, ..layer.ffn.mlp() });
    }
    super::rename(
        &mut description.names,
        &[Slot::Gate],
        &[(Slot::Up, Source::Rows("layers.{}.mlp.c_fc")), (Slot::Down, Source::Rows("layers.{}.mlp.c_proj"))],
    );
    Ok(description)
}
