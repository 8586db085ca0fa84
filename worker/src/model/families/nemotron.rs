//! Nemotron (transformers' `modeling_nemotron.py`): layer norms whose files hold the factors less one, plain feed-forward
//! blocks, half of each head turns.

use super::{Description, llama};
use crate::model::{
    ModelError,
    architecture::{Act, Ffn, Flow, Mlp, Norm, Slot},
    config::Config,
    rope,
};

pub(super) fn describe(config: &Config) -> Result<Description, ModelError> {
    let mut description =
        llama::describe_with(config, rope::Defaults { partial: Some(0.5), ..rope::DEFAULTS })?;
    let norm = Norm::Layer(config.positive("norm_eps")?.unwrap_or(1e-5) as f32);
    let act = super::act(config, "hidden_act", Act::ReluSquared)?;
    description.tower.norm = Some(norm);
    for layer in &mut description.tower.layers {
        layer.flow = Flow::Pre(norm);
        layer.ffn = Ffn::Plain(Mlp { act, ..layer.ffn.mlp() });
    }
    super::rename(&mut description.names, &[Slot::Gate], &[]);
    super::norms_less_one(&mut description.names);
    Ok(description)
}
