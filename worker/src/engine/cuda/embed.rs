//! From the tokens of sequences to a vector of each, on a GPU.

use super::{
    pass::{Pass, ROW_THREADS, raw_norm},
    state::Inputs,
    weights::Block,
    workspace::Scratch,
};
use crate::{
    engine::StepError,
    kernels::cuda::{
        launch::{Bytes, follow, launch},
        memory::{self, Ptr},
        product::{Epilogue, Rows, act_number},
    },
    model::architecture::{Embedding, Pool, Refinement, Slot},
};

/// Elements that a block of an elementwise kernel takes.
const BLOCK: usize = 256;

impl Pass<'_> {
    /// One vector for the sequence of each of the step's outputs, from the tokens in `normed` into `values`. A sequence's
    /// tokens before the output are not pooled. Vectors are in f32, and rows of products and norms in the plan's format.
    pub(super) fn embed_sequences(
        &self,
        embedding: &Embedding,
        block: &Block,
        outputs: usize,
    ) -> Result<(), StepError> {
        let Scratch { values, vectors, .. } = self.state.scratch;
        let (gpu, kernels) = (self.gpu, self.kernels()?);
        let widths = embedding.widths(self.tower.width);
        self.pool(&embedding.pools, outputs)?;
        // Counted in 31 bits: `size::check` bounds outputs by the widest vector.
        let grid = |count: usize| (count.div_ceil(BLOCK) as u32, 1, 1);
        for ((i, refinement), widths) in embedding.refinements.iter().enumerate().zip(widths.windows(2)) {
            let (from, to, slot) = (widths[0], widths[1], Slot::Refinement(i as u8));
            if let Refinement::Normalize = refinement {
                launch!(gpu, kernels.normalize_values, (outputs as u32, 1, 1), ROW_THREADS, 0;
                    values, from as i32)?;
                continue;
            }
            let count = outputs * from;
            self.narrow(vectors, values, count)?;
            match *refinement {
                Refinement::Dense { act, .. } => {
                    let (product, x) = (block.product(slot, 0)?, Rows::new(vectors, from));
                    self.product(&product, outputs, x, (values, to), Epilogue::StoreValues)?;
                    if let Some(act) = act {
                        let count = outputs * to;
                        launch!(gpu, kernels.activate_values, grid(count), BLOCK as u32, 0;
                            values, count as u64, act_number(act))?;
                    }
                }
                Refinement::Norm { norm, .. } => {
                    let norm = raw_norm(norm, block.norm(slot)?);
                    follow!(gpu, kernels.norm_rows, (outputs as u32, 1, 1), ROW_THREADS, 0;
                        vectors, vectors, Ptr::NULL, norm, from as i32, 0i32, Bytes::default())?;
                    launch!(gpu, kernels.widen_rows, grid(count), BLOCK as u32, 0;
                        values, vectors, count as u64)?;
                }
                Refinement::Normalize => {}
            }
        }
        let (given, last) = (embedding.dimensions, widths.last().copied().unwrap_or_default());
        if given < last {
            launch!(gpu, kernels.take_columns, (outputs as u32, 1, 1), ROW_THREADS, 0;
                vectors, values, last as i32, given as i32)?;
            memory::copy(&gpu.stream, values, vectors, (outputs * given * 4) as u64)?;
        }
        Ok(())
    }

    /// So many values, in the plan's format.
    pub(super) fn narrow(&self, to: Ptr, values: Ptr, count: usize) -> Result<(), StepError> {
        launch!(self.gpu, self.kernels()?.narrow_values, (count.div_ceil(BLOCK) as u32, 1, 1), BLOCK as u32, 0;
            to, values, count as u64)?;
        Ok(())
    }

    /// Vectors of every way of pooling side by side, from `normed` into `values`.
    pub(super) fn pool(&self, pools: &[Pool], outputs: usize) -> Result<(), StepError> {
        let Scratch { normed, values, .. } = self.state.scratch;
        let Inputs { row_of, row_first, row_count, .. } = self.inputs;
        let width = self.tower.width;
        for (i, pool) in pools.iter().enumerate() {
            let pool = match pool {
                Pool::First => 0,
                Pool::Last => 1,
                Pool::Mean => 2,
                Pool::MeanSqrtLen => 3,
                Pool::WeightedMean => 4,
                Pool::Max => 5,
            };
            launch!(self.gpu, self.kernels()?.pool_rows, (outputs as u32, 1, 1), ROW_THREADS, 0;
                values.offset((4 * i * width) as u64), (pools.len() * width) as i32, normed, self.inputs.outputs,
                row_of, row_first, row_count, width as i32, pool)?;
        }
        Ok(())
    }
}
