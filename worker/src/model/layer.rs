//! The order of a layer's operations, which is the same on every processor.

use super::architecture::{Attention, Ffn, Flow, Layer, Moe, Norm, Slot};

/// What a processor does with the residual stream of a step; [`layer`] says in which order.
pub(crate) trait Operations {
    /// The weights of one site.
    type Block;
    /// Why a step cannot be computed.
    type Error;

    /// Makes the input of a block from the residual stream.
    fn enter(&mut self, flow: Flow, block: &Self::Block, slot: Slot) -> Result<(), Self::Error>;

    /// Attention of the stage's layer `index` over that input, before its last product.
    fn attend(&mut self, attention: &Attention, index: usize, block: &Self::Block)
    -> Result<(), Self::Error>;

    /// The inner rows of a feed-forward block from that input.
    fn up(&mut self, ffn: Ffn, block: &Self::Block) -> Result<(), Self::Error>;

    /// A mixture of experts over that input, all of it: what it yields goes where [`project`](Self::project)'s does.
    fn experts(&mut self, flow: Flow, moe: Moe, block: &Self::Block) -> Result<(), Self::Error>;

    /// The last product of a block, added to the residual stream; where a norm follows, kept beside it.
    fn project(&mut self, flow: Flow, from: Inner<'_>, block: &Self::Block) -> Result<(), Self::Error>;

    /// Adds the norm of what is beside the residual stream to it.
    fn add_normed(&mut self, norm: Norm, block: &Self::Block, slot: Slot) -> Result<(), Self::Error>;

    /// Replaces the residual stream by its norm.
    fn renorm(&mut self, norm: Norm, block: &Self::Block, slot: Slot) -> Result<(), Self::Error>;
}

/// What the last product of a block takes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Inner<'a> {
    /// What attention yields.
    Attention(&'a Attention),
    /// The inner rows of a feed-forward block.
    Up(Ffn),
}

/// One layer, the stage's `index`th: what attention and the feed-forward block yield is added to the residual.
pub(crate) fn layer<O: Operations>(
    ops: &mut O,
    index: usize,
    layer: &Layer,
    block: &O::Block,
) -> Result<(), O::Error> {
    let Layer { flow, attention, ffn } = layer;
    let norm = flow.norm();
    ops.enter(*flow, block, Slot::AttentionNorm)?;
    ops.attend(attention, index, block)?;
    if matches!(flow, Flow::ParallelTwo(_)) {
        // Attention has not been added yet.
        ops.enter(*flow, block, Slot::FfnNorm)?;
    }
    ops.project(*flow, Inner::Attention(attention), block)?;
    match flow {
        Flow::Sandwich(_) => ops.add_normed(norm, block, Slot::AttentionPostNorm)?,
        Flow::Post(_) => ops.renorm(norm, block, Slot::AttentionNorm)?,
        _ => {}
    }
    if matches!(flow, Flow::Pre(_) | Flow::PreFfn(_) | Flow::Post(_) | Flow::Sandwich(_)) {
        ops.enter(*flow, block, Slot::FfnNorm)?;
    }
    match ffn {
        Ffn::Moe(moe) => ops.experts(*flow, *moe, block)?,
        Ffn::Plain(_) | Ffn::Gated(_) => {
            ops.up(*ffn, block)?;
            ops.project(*flow, Inner::Up(*ffn), block)?;
        }
    }
    match flow {
        Flow::Sandwich(_) => ops.add_normed(norm, block, Slot::FfnPostNorm),
        Flow::Post(_) => ops.renorm(norm, block, Slot::FfnNorm),
        _ => Ok(()),
    }
}
