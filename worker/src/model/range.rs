//! Which part of a model a stage holds.

use strata_proto::{DType, Format, LayerRange, Quantization};

use super::{
    Model, ModelError,
    architecture::{Attention, Shape, Site, Slot},
};

/// Which part of a model a stage holds, and in which format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeSpec {
    /// Its layers.
    pub layers: LayerRange,
    /// With the embedding: exactly if it holds the first layer.
    pub embedding: bool,
    /// With final norm and head: exactly if it holds the last layer.
    pub head: bool,
    /// Format of residual stream and cache, and of matrices that are not quantized.
    pub dtype: DType,
    /// What matrices are turned into.
    pub quantization: Option<Quantization>,
}

impl RangeSpec {
    /// The format that weights are held in.
    pub fn format(&self) -> Format {
        Format::of(self.dtype, self.quantization)
    }

    /// The sites that it holds, in order.
    pub(crate) fn sites(&self, model: &Model) -> impl Iterator<Item = Site> {
        let layers = self.layers.first as usize..self.layers.end as usize;
        let (input, output) = (self.embedding, self.head);
        model.tower.sites().filter(move |site| match site {
            Site::Input => input,
            Site::Layer(layer) => layers.contains(layer),
            Site::Output => output,
        })
    }

    /// What `site` holds on this stage, by slot and expert: no embedding where the head is here and the same tensor.
    pub(crate) fn parts(
        &self,
        model: &Model,
        site: Site,
    ) -> impl Iterator<Item = ((Slot, usize), Shape)> + use<> {
        let without = (self.head && model.is_tied()).then_some(Slot::Embedding);
        let parts: Vec<_> = parts(model, site).filter(|((slot, _), _)| Some(*slot) != without).collect();
        parts.into_iter()
    }

    pub(crate) fn check(&self, model: &Model) -> Result<(), ModelError> {
        let (LayerRange { first, end }, layers) = (self.layers, model.tower.layers.len());
        let within = first < end && end as usize <= layers;
        if !within || self.embedding != (first == 0) || self.head != (end as usize == layers) {
            let RangeSpec { layers: range, embedding, head, .. } = *self;
            return Err(ModelError::Range { range, embedding, head, layers });
        }
        for layer in first as usize..end as usize {
            let attention = &model.tower.layers[layer].attention;
            let Some(owner) = attention.shares else { continue };
            let fits = |other: &Attention| {
                let shape = |a: &Attention| (a.kv_heads, a.head_dim);
                other.shares.is_none() && shape(other) == shape(attention)
            };
            let is_here = (first as usize..layer).contains(&owner);
            if !is_here || !model.tower.caches || !fits(&model.tower.layers[owner].attention) {
                return Err(ModelError::SharedCache { range: self.layers, layer, owner });
            }
        }
        Ok(())
    }
}

/// Everything that the slots of `site` hold, by slot and expert.
pub(super) fn parts(model: &Model, site: Site) -> impl Iterator<Item = ((Slot, usize), Shape)> {
    let slots = model.tower.slots(site).into_iter();
    slots.flat_map(move |(slot, shape)| {
        (0..model.tower.copies(site, slot)).map(move |expert| ((slot, expert), shape))
    })
}
