//! What a stage keeps of each sequence between steps, by kind of state, on any processor.

use strata_proto::StateKind;

use crate::model::{Model, ModelError, RangeSpec, architecture::Attention};

/// The paged keys and values of a stage's layers: memory `T` for each layer that has its own.
pub(crate) struct Caches<T> {
    own: Vec<T>,
    /// For each layer of the stage, which of them it reads; none if nothing is kept.
    of_layer: Vec<usize>,
}

impl<T> Caches<T> {
    /// Walks over the states of a stage, which has been checked to hold the owner of each state that it shares;
    /// `allocate` makes the memory of a layer's own keys and values.
    ///
    /// # Errors
    /// Those of `allocate`, and if a layer has a state that is not kept here.
    pub fn new<E: From<ModelError>>(
        model: &Model,
        spec: &RangeSpec,
        mut allocate: impl FnMut(&Attention) -> Result<T, E>,
    ) -> Result<Self, E> {
        let (first, end) = (spec.layers.first as usize, spec.layers.end as usize);
        let (mut own, mut of_layer) = (Vec::new(), Vec::new());
        for layer in first..end {
            for state in model.tower.states(layer) {
                match (state.kind, state.shares) {
                    (StateKind::PagedKv, None) => {
                        of_layer.push(own.len());
                        own.push(allocate(&model.tower.layers[layer].attention)?);
                    }
                    (StateKind::PagedKv, Some(owner)) => of_layer.push(of_layer[owner as usize - first]),
                    (StateKind::Recurrent | StateKind::CrossKv, _) => {
                        return Err(ModelError::Unsupported {
                            processor: "this build",
                            with: "whose layers keep other state than keys and values",
                            instead: "upgrade it",
                        }
                        .into());
                    }
                }
            }
        }
        Ok(Caches { own, of_layer })
    }

    /// Each layer's own, in order.
    pub fn own(&self) -> &[T] {
        &self.own
    }

    /// Each layer's own, in order.
    #[cfg(test)]
    pub fn own_mut(&mut self) -> &mut [T] {
        &mut self.own
    }

    /// What the stage's layer `index` reads; `None` if nothing is kept.
    #[cfg(feature = "cuda")]
    pub fn of(&self, index: usize) -> Option<&T> {
        self.own.get(*self.of_layer.get(index)?)
    }

    /// What the stage's layer `index` reads, and writes if it is its own.
    pub fn of_mut(&mut self, index: usize) -> Option<&mut T> {
        self.own.get_mut(*self.of_layer.get(index)?)
    }
}
