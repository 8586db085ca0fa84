//! Digests of a model's modules, over the checkpoint's own tensors.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use strata_proto::{DType, Digest, ModuleId, WeightDigests};

use super::{Model, ModelError, RangeSpec, architecture::Site, range};
use crate::weights::{Checkpoint, TensorDType, TensorInfo, stream};

/// A tensor as the checkpoint has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorDigest {
    /// Its name.
    pub name: String,
    /// Format of its elements.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// XXH3 of its bytes.
    pub digest: u128,
}

/// A module, and the tensors that it consists of, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleDigest {
    /// Which one.
    pub id: ModuleId,
    /// Over its tensors.
    pub digest: Digest,
    /// Each once, in order of names.
    pub tensors: Vec<TensorDigest>,
}

impl ModuleDigest {
    /// Over names, dtypes, shapes and digests, in order of names; each length goes in too, so that no two lists hash alike.
    fn new(id: ModuleId, tensors: Vec<TensorDigest>) -> Self {
        let mut hash = blake3::Hasher::new_derive_key("strata 2026 digest of a module");
        let text = |hash: &mut blake3::Hasher, text: &str| {
            hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        for TensorDigest { name, dtype, shape, digest } in &tensors {
            text(&mut hash, name);
            text(&mut hash, dtype.name());
            hash.update(&(shape.len() as u64).to_le_bytes());
            for dimension in shape {
                hash.update(&(*dimension as u64).to_le_bytes());
            }
            hash.update(&digest.to_be_bytes());
        }
        ModuleDigest { id, digest: hash.finalize().into(), tensors }
    }
}

/// Reads the whole model in `dir`, without keeping anything of it, and returns every module's digest, in order. Tensors
/// without a use may have names of the patterns `ignored`.
///
/// # Errors
/// If the model could not be loaded either, or a file cannot be read.
pub fn digests(dir: &Path, ignored: &[String]) -> Result<Vec<ModuleDigest>, ModelError> {
    let (checkpoint, model) = Model::open_dir_ignoring(dir, ignored)?;
    let names: BTreeSet<&str> = model.tower.sites().flat_map(|site| tensors(&model, site)).collect();
    let mut found: Vec<(&str, &TensorInfo)> = Vec::with_capacity(names.len());
    for name in names {
        found.push((name, tensor(&checkpoint, name)?));
    }
    found.sort_by_key(|(_, tensor)| tensor.place());
    let infos: Vec<&TensorInfo> = found.iter().map(|(_, tensor)| *tensor).collect();
    let digests = stream(&checkpoint, &infos, |_, _, _| Ok::<_, ModelError>(()))?;
    let digests = found.iter().map(|(name, _)| *name).zip(digests).collect();
    model.tower.sites().map(|site| module(&checkpoint, &model, site, &digests)).collect()
}

/// The digests of the modules of a range, from those of their tensors by name.
pub(super) fn of_range(
    checkpoint: &Checkpoint,
    model: &Model,
    spec: &RangeSpec,
    digests: &BTreeMap<&str, u128>,
) -> Result<WeightDigests, ModelError> {
    let mut of_range = WeightDigests::default();
    for site in spec.sites(model) {
        let ModuleDigest { id, digest, .. } = module(checkpoint, model, site, digests)?;
        match id {
            ModuleId::Embedding => of_range.embedding = Some(digest),
            ModuleId::Layer(_) => of_range.layers.push(digest),
            ModuleId::Head => of_range.head = Some(digest),
        }
    }
    Ok(of_range)
}

fn module(
    checkpoint: &Checkpoint,
    model: &Model,
    site: Site,
    digests: &BTreeMap<&str, u128>,
) -> Result<ModuleDigest, ModelError> {
    let id = match site {
        Site::Input => ModuleId::Embedding,
        Site::Layer(layer) => ModuleId::Layer(layer as u32),
        Site::Output => ModuleId::Head,
    };
    let tensors = tensors(model, site).into_iter().map(|name| {
        let TensorInfo { dtype, shape, .. } = tensor(checkpoint, name)?;
        let TensorDType::Float(dtype) = *dtype else { return Err(ModelError::Format(name.to_owned())) };
        let digest = *digests.get(name).ok_or_else(|| ModelError::MissingTensor(name.to_owned()))?;
        Ok(TensorDigest { name: name.to_owned(), dtype, shape: shape.clone(), digest })
    });
    Ok(ModuleDigest::new(id, tensors.collect::<Result<_, _>>()?))
}

fn tensor<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<&'a TensorInfo, ModelError> {
    checkpoint.tensor(name).ok_or_else(|| ModelError::MissingTensor(name.to_owned()))
}

/// Names of all tensors of a site, those included that it has in common with another one.
fn tensors(model: &Model, site: Site) -> BTreeSet<&str> {
    let bound = range::parts(model, site).flat_map(|(key, _)| model.bound(site, key));
    bound.flat_map(|bound| [Some(&bound.weight), bound.bias.as_ref()]).flatten().map(String::as_str).collect()
}
