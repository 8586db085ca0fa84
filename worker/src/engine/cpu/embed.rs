//! From the tokens of sequences to a vector of each, on the CPU.

use super::{
    pass::Pass,
    weights::{Block, NormWeights},
    workspace::Workspace,
};
use crate::{
    engine::StepError,
    kernels::cpu::{
        linear::{Linear, Output, Rows},
        norm::{Activate, NormRows},
    },
    model::architecture::{Embedding, Pool, Refinement, Slot},
};

/// Least length by which a vector is divided (torch's `normalize`).
const MIN_LENGTH: f32 = 1e-12;

impl Pass<'_> {
    /// One vector for the sequence of each of `outputs`, from the tokens in `normed` into `values`. A sequence's tokens
    /// before the output are not pooled.
    pub(super) fn embed_sequences(
        &mut self,
        embedding: &Embedding,
        block: &Block,
        outputs: &[u32],
    ) -> Result<(), StepError> {
        let (tower, cpu, count) = (self.tower, self.cpu, outputs.len());
        let widths = embedding.widths(tower.width);
        self.pool(&embedding.pools, outputs);
        let Workspace { vectors, values, packed, .. } = &mut *self.work;
        for ((i, refinement), widths) in embedding.refinements.iter().enumerate().zip(widths.windows(2)) {
            let (from, to, slot) = (widths[0], widths[1], Slot::Refinement(i as u8));
            let x = Rows { data: &*vectors, stride: from, count };
            match *refinement {
                Refinement::Normalize => {
                    vectors[..count * from].chunks_exact_mut(from).for_each(normalize);
                    continue;
                }
                Refinement::Norm { norm, .. } => {
                    let NormWeights { weight, bias } = block.norm(slot)?;
                    let (bias, output) = (bias.as_deref(), Output::Store);
                    cpu.norm(NormRows { norm, x, weight, bias, out: values, output });
                }
                Refinement::Dense { act, .. } => {
                    let product = block.product(slot, 0)?;
                    cpu.linear(Linear {
                        weight: &product.matrix,
                        bias: product.bias.as_deref(),
                        x,
                        packed,
                        out: values,
                        output: Output::Store,
                    });
                    if let Some(act) = act {
                        cpu.activate(Activate { act, x: &mut values[..count * to] });
                    }
                }
            }
            vectors[..count * to].copy_from_slice(&values[..count * to]);
        }
        let last = widths.last().copied().unwrap_or(tower.width);
        let given = values.chunks_exact_mut(embedding.dimensions).zip(vectors.chunks_exact(last));
        given.take(count).for_each(|(to, from)| to.copy_from_slice(&from[..to.len()]));
        Ok(())
    }

    /// Vectors of every way of pooling side by side, from `normed` into `vectors`.
    pub(super) fn pool(&mut self, pools: &[Pool], outputs: &[u32]) {
        let width = self.tower.width;
        let Workspace { normed, vectors, .. } = &mut *self.work;
        let mut vectors = outputs.iter().zip(vectors.chunks_exact_mut(pools.len() * width)).peekable();
        let mut first = 0;
        for row in self.rows {
            let end = first + row.count as usize;
            while let Some((output, out)) = vectors.next_if(|(output, _)| (**output as usize) < end) {
                let begin = *output as usize;
                let tokens = &normed[begin * width..end * width];
                for (pool, out) in pools.iter().zip(out.chunks_exact_mut(width)) {
                    pool_one(*pool, tokens, begin - first, out);
                }
            }
            first = end;
        }
    }
}

/// One vector of `tokens` `(count, width)`, of which the first is at `position` of its sequence.
fn pool_one(pool: Pool, tokens: &[f32], position: usize, out: &mut [f32]) {
    let width = out.len();
    let mut rows = tokens.chunks_exact(width);
    let count = rows.len() as f32;
    let first = match pool {
        Pool::Last => rows.next_back(),
        _ => rows.next(),
    };
    out.copy_from_slice(first.unwrap_or(&tokens[..width]));
    match pool {
        Pool::First | Pool::Last => {}
        Pool::Mean | Pool::MeanSqrtLen => {
            rows.for_each(|row| out.iter_mut().zip(row).for_each(|(o, x)| *o += x));
            let divisor = if pool == Pool::Mean { count } else { count.sqrt() };
            out.iter_mut().for_each(|o| *o /= divisor);
        }
        Pool::WeightedMean => {
            let weight = |i: usize| (position + i + 1) as f32;
            out.iter_mut().for_each(|o| *o *= weight(0));
            let mut total = weight(0);
            for (i, row) in (1..).zip(rows) {
                out.iter_mut().zip(row).for_each(|(o, x)| *o += weight(i) * x);
                total += weight(i);
            }
            out.iter_mut().for_each(|o| *o /= total);
        }
        Pool::Max => rows.for_each(|row| {
            out.iter_mut().zip(row).for_each(|(o, x)| *o = if *x > *o { *x } else { *o });
        }),
    }
}

/// A vector becomes one of length 1.
fn normalize(vector: &mut [f32]) {
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(MIN_LENGTH);
    vector.iter_mut().for_each(|x| *x /= length);
}
