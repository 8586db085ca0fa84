//! Binds the tensors of a checkpoint to the slots of a model; none may be missing, misshapen or left over.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    ModelError,
    blocks::{Names, Slot, Source, Tower},
};
use crate::weights::{Checkpoint, TensorDType};

/// The tensors of one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// The weight.
    pub weight: String,
    /// The bias, if the file has one.
    pub bias: Option<String>,
}

/// Slots that cannot have a bias: an embedding, and norms by the root mean square.
const WITHOUT_BIAS: [Slot; 6] =
    [Slot::Embedding, Slot::FinalNorm, Slot::AttentionNorm, Slot::FfnNorm, Slot::QueryNorm, Slot::KeyNorm];

pub(super) fn bind(
    checkpoint: &Checkpoint,
    tower: &Tower,
    names: &Names,
) -> Result<BTreeMap<(Slot, usize), Bound>, ModelError> {
    let base = base(checkpoint, names);
    let mut bound = BTreeMap::new();
    let mut claimed = BTreeSet::new();
    for &(slot, source) in &names.slots {
        let layers = if slot.is_per_layer() { tower.layers.len() } else { 1 };
        for layer in 0..layers {
            let module = match source {
                Source::Rows(name) => format!("{base}{}", name.replace("{}", &layer.to_string())),
                Source::Root(name) => name.to_owned(),
            };
            let tensors = find(checkpoint, tower, slot, layer, &module);
            let tie = names.ties.iter().find(|(s, _)| *s == slot).and_then(|(_, to)| bound.get(&(*to, 0)));
            let tensors = match (tensors, tie) {
                (Err(ModelError::MissingTensor(_)), Some(shared)) => Bound::clone(shared),
                (tensors, _) => tensors?,
            };
            claimed.insert(tensors.weight.clone());
            claimed.extend(tensors.bias.clone());
            bound.insert((slot, layer), tensors);
        }
    }
    let ignored = |name: &String| names.ignore.iter().any(|end| name.ends_with(end));
    match checkpoint.tensors().keys().find(|name| !claimed.contains(*name) && !ignored(name)) {
        Some(name) => Err(ModelError::UnclaimedTensor(name.clone())),
        None => Ok(bound),
    }
}

/// The prefix of this file's names.
fn base(checkpoint: &Checkpoint, names: &Names) -> &'static str {
    let embedding = names.slots.iter().find_map(|(slot, source)| match (slot, source) {
        (Slot::Embedding, Source::Rows(name)) => Some(*name),
        _ => None,
    });
    let fits = |base: &&&str| {
        embedding.is_some_and(|name| checkpoint.tensor(&format!("{base}{name}.weight")).is_some())
    };
    names.bases.iter().find(fits).or(names.bases.first()).copied().unwrap_or_default()
}

fn find(
    checkpoint: &Checkpoint,
    tower: &Tower,
    slot: Slot,
    layer: usize,
    module: &str,
) -> Result<Bound, ModelError> {
    let shape = tower.shape(slot, layer);
    let weight = format!("{module}.weight");
    check(checkpoint, &weight, &shape)?;
    let bias = format!("{module}.bias");
    let has_bias = checkpoint.tensor(&bias).is_some() && !WITHOUT_BIAS.contains(&slot);
    if has_bias {
        check(checkpoint, &bias, &shape[..1])?;
    }
    Ok(Bound { weight, bias: has_bias.then_some(bias) })
}

fn check(checkpoint: &Checkpoint, name: &str, expected: &[usize]) -> Result<(), ModelError> {
    let tensor = checkpoint.tensor(name).ok_or_else(|| ModelError::MissingTensor(name.to_owned()))?;
    if tensor.shape != expected {
        return Err(ModelError::Shape {
            tensor: name.to_owned(),
            found: tensor.shape.clone(),
            expected: expected.to_vec(),
        });
    }
    match tensor.dtype {
        TensorDType::Float(_) => Ok(()),
        TensorDType::Other { .. } => Err(ModelError::Format(name.to_owned())),
    }
}
