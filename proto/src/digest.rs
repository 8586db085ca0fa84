//! What weights are: digests of a model's modules, and of all of them together.

use std::fmt;

use crate::{LayerRange, v1};

/// BLAKE3 of something, 32 bytes. Shown as hexadecimal digits: all 64, or 16 of them with `{:.16}`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; Digest::BYTES]);

impl Digest {
    /// Length of a digest.
    pub const BYTES: usize = 32;
}

impl From<[u8; Digest::BYTES]> for Digest {
    fn from(bytes: [u8; Digest::BYTES]) -> Self {
        Digest(bytes)
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Digest(hash.into())
    }
}

impl AsRef<[u8]> for Digest {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = blake3::Hash::from_bytes(self.0).to_hex();
        f.write_str(&hex[..f.precision().unwrap_or(hex.len()).min(hex.len())])
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:.16}")
    }
}

/// A part of a model that is planned as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ModuleId {
    /// What turns tokens into the residual stream.
    Embedding,
    /// A layer, counted from 0.
    Layer(u32),
    /// Final norm and head.
    Head,
}

impl fmt::Display for ModuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModuleId::Embedding => f.write_str("embedding"),
            ModuleId::Layer(layer) => write!(f, "layer {layer}"),
            ModuleId::Head => f.write_str("head"),
        }
    }
}

/// The digest of a whole model, over those of all its modules, in order.
pub fn root(modules: impl IntoIterator<Item = (ModuleId, Digest)>) -> Digest {
    let mut hash = blake3::Hasher::new_derive_key("strata 2026 digest of a model");
    for (module, digest) in modules {
        let (kind, layer) = match module {
            ModuleId::Embedding => (0u8, 0),
            ModuleId::Layer(layer) => (1, layer),
            ModuleId::Head => (2, 0),
        };
        hash.update(&[kind]).update(&layer.to_le_bytes()).update(&digest.0);
    }
    hash.finalize().into()
}

/// The digests of what a stage has read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WeightDigests {
    /// Of the embedding, if the stage has it.
    pub embedding: Option<Digest>,
    /// Of its layers, in order.
    pub layers: Vec<Digest>,
    /// Of the head, if the stage has it.
    pub head: Option<Digest>,
}

impl WeightDigests {
    /// Checks what a worker says that it has read.
    ///
    /// # Errors
    /// If there is not exactly one digest of each module of the stage, each of 32 bytes.
    pub fn of_stage(
        said: Option<v1::WeightDigests>,
        layers: LayerRange,
        embedding: bool,
        head: bool,
    ) -> Result<Self, String> {
        let said = said.ok_or("it named no digests of its weights")?;
        let expected = (embedding, layers.len() as usize, head);
        let found = (said.embedding.is_some(), said.layers.len(), said.head.is_some());
        if found != expected {
            return Err(format!(
                "it named digests of other modules (embedding, layers, head: {found:?}) than it was to load: expected \
                 {expected:?}"
            ));
        }
        let digest = |bytes: &[u8]| {
            let bytes: [u8; Digest::BYTES] = bytes.try_into().map_err(|_| {
                format!("a digest of its weights has {} bytes: expected {}", bytes.len(), Digest::BYTES)
            })?;
            Ok::<_, String>(Digest(bytes))
        };
        Ok(WeightDigests {
            embedding: said.embedding.as_deref().map(digest).transpose()?,
            layers: said.layers.iter().map(|bytes| digest(bytes)).collect::<Result<_, _>>()?,
            head: said.head.as_deref().map(digest).transpose()?,
        })
    }

    /// Each module's, of a stage whose first layer is `first`.
    pub fn modules(&self, first: u32) -> impl Iterator<Item = (ModuleId, Digest)> + Clone {
        let embedding = self.embedding.map(|digest| (ModuleId::Embedding, digest));
        let layers = (first..).zip(&self.layers).map(|(layer, digest)| (ModuleId::Layer(layer), *digest));
        let head = self.head.map(|digest| (ModuleId::Head, digest));
        embedding.into_iter().chain(layers).chain(head)
    }
}

impl From<&WeightDigests> for v1::WeightDigests {
    fn from(digests: &WeightDigests) -> Self {
        let bytes = |digest: &Digest| digest.0.to_vec().into();
        v1::WeightDigests {
            embedding: digests.embedding.as_ref().map(bytes),
            layers: digests.layers.iter().map(bytes).collect(),
            head: digests.head.as_ref().map(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: u8) -> Digest {
        Digest([byte; Digest::BYTES])
    }

    #[test]
    fn digests_are_those_of_the_stage_that_was_to_be_loaded() {
        let ours =
            WeightDigests { embedding: Some(digest(1)), layers: vec![digest(2), digest(3)], head: None };
        let said = v1::WeightDigests::from(&ours);
        let of = |said, layers, embedding, head| {
            let range = LayerRange::new(0, layers);
            WeightDigests::of_stage(said, range, embedding, head)
        };
        assert_eq!(of(Some(said.clone()), 2, true, false), Ok(ours));
        let refused = |said, layers, embedding, head| of(said, layers, embedding, head).unwrap_err();
        assert!(refused(None, 2, true, false).contains("no digests"));
        for (layers, embedding, head) in
            [(1, true, false), (3, true, false), (2, false, false), (2, true, true)]
        {
            assert!(refused(Some(said.clone()), layers, embedding, head).contains("other modules"));
        }
        let short = v1::WeightDigests { embedding: Some(vec![1; 31].into()), ..said };
        assert!(refused(Some(short), 2, true, false).contains("31 bytes: expected 32"));
    }

    #[test]
    fn the_digest_of_a_model_depends_on_each_module_and_its_place() {
        let modules =
            [(ModuleId::Embedding, digest(1)), (ModuleId::Layer(0), digest(2)), (ModuleId::Head, digest(3))];
        let whole = root(modules);
        let mut moved = modules;
        (moved[1].1, moved[2].1) = (digest(3), digest(2));
        assert_ne!(root(moved), whole);
        assert_ne!(root(modules[..2].iter().copied()), whole);
        assert_eq!(format!("{:.16}", digest(0xab)), "ab".repeat(8));
        assert_eq!(digest(0xab).to_string(), "ab".repeat(32));
    }
}
