//! A model as data: the shared blocks that every family is mapped onto.

use std::sync::Arc;

/// A decoder: embedding, layers, final norm, head.
#[derive(Debug, Clone, PartialEq)]
pub struct Tower {
    /// Width of the residual stream.
    pub width: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Most positions of a sequence.
    pub context: usize,
    /// What turns an input into the residual stream.
    pub input: Input,
    /// Sets of rotary frequencies that layers refer to.
    pub ropes: Vec<Rope>,
    /// The layers, in order.
    pub layers: Vec<Layer>,
    /// Before the head.
    pub norm: Norm,
    /// What the last stage yields.
    pub head: Head,
}

/// How the residual stream begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Input {
    /// Rows of the embedding.
    Tokens,
}

/// Rotary frequencies, all scaling resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Angle per position of each pair of dimensions.
    pub inv_freq: Arc<[f32]>,
    /// Factor on sine and cosine.
    pub factor: f32,
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Where the norms sit.
    pub flow: Flow,
    /// Self-attention.
    pub attention: Attention,
    /// Feed-forward block.
    pub ffn: Ffn,
}

/// How norms and residuals surround attention and feed-forward.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Flow {
    /// `x += f(norm(x))` for each.
    Pre(Norm),
}

/// Self-attention with grouped key-value heads.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Which positions are seen.
    pub span: Span,
    /// How positions enter.
    pub position: Position,
    /// On every head of queries and keys, before positions enter.
    pub qk_norm: Option<Norm>,
}

impl Attention {
    /// Width of the queries, and of what attention yields.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of queries, keys and values side by side.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
}

/// The positions a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// Its own and all before.
    Causal,
    /// Its own and those before, so many in all.
    Window(usize),
}

/// How positions enter attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// Rotation by [`Tower::ropes`] of this index.
    Rope(usize),
}

/// A feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ffn {
    /// `down(act(gate(x)) * up(x))`.
    Gated(Mlp),
}

/// Sizes of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mlp {
    /// Inner width.
    pub inner: usize,
    /// Its activation.
    pub act: Act,
}

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// `x / (1 + e^-x)`.
    Silu,
}

/// A norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    /// Root mean square, with this epsilon.
    Rms(f32),
}

/// What the last stage yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Logits over the vocabulary.
    Lm,
}

/// A place for a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// `(vocab, width)`.
    Embedding,
    /// `(width)`, before the head.
    FinalNorm,
    /// `(vocab, width)`.
    Head,
    /// `(width)`, before attention.
    AttentionNorm,
    /// `(heads * head_dim, width)`.
    Query,
    /// `(kv_heads * head_dim, width)`.
    Key,
    /// `(kv_heads * head_dim, width)`.
    Value,
    /// `(head_dim)`, on each head of queries.
    QueryNorm,
    /// `(head_dim)`, on each head of keys.
    KeyNorm,
    /// `(width, heads * head_dim)`.
    AttentionOut,
    /// `(width)`, before the feed-forward block.
    FfnNorm,
    /// `(inner, width)`.
    Gate,
    /// `(inner, width)`.
    Up,
    /// `(width, inner)`.
    Down,
}

impl Slot {
    /// Whether each layer has one.
    pub fn is_per_layer(self) -> bool {
        !matches!(self, Slot::Embedding | Slot::FinalNorm | Slot::Head)
    }
}

impl Tower {
    /// Dimensions that the tensor of `slot` (of `layer`) must have: `(rows, columns)`, or one dimension for a norm.
    pub fn shape(&self, slot: Slot, layer: usize) -> Vec<usize> {
        let width = self.width;
        let attention = || &self.layers[layer].attention;
        let Ffn::Gated(mlp) = self.layers[layer.min(self.layers.len() - 1)].ffn;
        match slot {
            Slot::Embedding | Slot::Head => vec![self.vocab, width],
            Slot::FinalNorm | Slot::AttentionNorm | Slot::FfnNorm => vec![width],
            Slot::Query => vec![attention().q_width(), width],
            Slot::Key | Slot::Value => vec![attention().kv_width(), width],
            Slot::QueryNorm | Slot::KeyNorm => vec![attention().head_dim],
            Slot::AttentionOut => vec![width, attention().q_width()],
            Slot::Gate | Slot::Up => vec![mlp.inner, width],
            Slot::Down => vec![width, mlp.inner],
        }
    }
}

/// How a family names its tensors.
#[derive(Debug, Clone)]
pub struct Names {
    /// Prefixes that files may carry; the first that leads to an embedding is taken.
    pub bases: &'static [&'static str],
    /// Where each slot's tensor is.
    pub slots: Vec<(Slot, Source)>,
    /// Slots that share another's tensor if they have none of their own.
    pub ties: Vec<(Slot, Slot)>,
    /// Endings of tensors that are left alone.
    pub ignore: &'static [&'static str],
}

/// Where a slot's tensor is; `.weight` (and `.bias`, if there is one) follow, and `{}` stands for the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Output rows by input columns, or a vector, under the base prefix.
    Rows(&'static str),
    /// The same, without the base prefix.
    Root(&'static str),
}
