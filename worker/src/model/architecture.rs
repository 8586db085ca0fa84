//! A model as data: the shared blocks that every family is mapped onto.

use std::sync::Arc;

use strata_proto::{DType, LayerState, StateKind, v1};

pub(crate) use crate::kernels::ops::{Act, AttentionMask, Distances, Norm, Router, Slopes};
use crate::kernels::ops::{BUCKETS, TensorSpec, kv_elements};

/// A stack of layers between an embedding and a head.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tower {
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
    /// Keys and values are kept between steps, so that a sequence may be computed in several.
    pub caches: bool,
    /// A row must be a whole input, for each position sees those behind it too.
    pub whole_input: bool,
    /// What stages hand on beside the residual stream, in this order.
    pub carried: Vec<Carried>,
    /// Before the head; none where each layer ends with a norm.
    pub norm: Option<Norm>,
    /// What the last stage yields.
    pub head: Head,
}

/// A tensor that stages hand on beside the residual stream, a row per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Carried {
    /// Elements of a row.
    pub columns: usize,
    /// Their format; none if it is that of the residual stream.
    pub dtype: Option<DType>,
}

/// How the residual stream begins: the sum of a token's rows of up to three tables.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Input {
    /// Factor on the token's row.
    pub scale: f32,
    /// A learned row per position.
    pub positions: Option<Learned>,
    /// Kinds of segments, a learned row each; 0 for none.
    pub segments: usize,
    /// On the sum.
    pub norm: Option<Norm>,
    /// Width of the tables, where a product makes the residual stream of their sum (ELECTRA).
    pub projected: Option<usize>,
}

impl Input {
    /// Rows of the embedding, as they are.
    pub const TOKENS: Input = Input { scale: 1.0, positions: None, segments: 0, norm: None, projected: None };
}

/// Learned positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Learned {
    /// Rows of the table.
    pub rows: usize,
    /// Row of the first position.
    pub first: usize,
}

/// Rotary frequencies, all scaling resolved. Which set a sequence uses is its own (longrope); the first is the default.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rope {
    /// The sets; as many dimensions turn in each.
    pub sets: Vec<Frequencies>,
    /// Sequences longer than this use the second set.
    pub switch: Option<usize>,
    /// What becomes of queries once they are turned.
    pub sharpening: Option<Sharpening>,
}

/// One set of rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frequencies {
    /// Angle per position of each pair of dimensions.
    pub inv_freq: Arc<[f32]>,
    /// Factor on sine and cosine.
    pub factor: f32,
}

/// Queries far into a sequence are sharpened: one at position `p` is multiplied by `1 + beta ln(1 + floor(p / period))`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sharpening {
    /// How much.
    pub beta: f32,
    /// Positions with equal factors.
    pub period: usize,
    /// The factor of each period of the context.
    pub factors: Arc<[f32]>,
}

impl Rope {
    /// Pairs of dimensions that turn; the dimensions after them do not.
    pub fn pairs(&self) -> usize {
        self.sets.first().map_or(0, |set| set.inv_freq.len())
    }
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layer {
    /// Where the norms sit.
    pub flow: Flow,
    /// Self-attention.
    pub attention: Attention,
    /// Feed-forward block.
    pub ffn: Ffn,
}

/// How norms and residuals surround attention and feed-forward.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Flow {
    /// `x += f(norm(x))` for each (Llama, GPT-2).
    Pre(Norm),
    /// `x += attention(x); x += ffn(norm(x))` (the first layer of ModernBERT, whose input has a norm).
    PreFfn(Norm),
    /// `x = norm(x + f(x))` for each (BERT).
    Post(Norm),
    /// `x += norm(f(norm(x)))` for each (Gemma 2).
    Sandwich(Norm),
    /// `x += norm(f(x))` for each (OLMo 2).
    After(Norm),
    /// `x += factor * f(norm(x))` for each (Granite).
    Scaled(Norm, f32),
    /// `n = norm(x); x += attention(n) + ffn(n)` (Phi).
    ParallelOne(Norm),
    /// `x += attention(norm(x)) + ffn(norm'(x))` (GPT-NeoX).
    ParallelTwo(Norm),
}

impl Flow {
    /// The kind of all its norms.
    pub fn norm(self) -> Norm {
        let (Flow::Pre(norm)
        | Flow::PreFfn(norm)
        | Flow::Post(norm)
        | Flow::Sandwich(norm)
        | Flow::After(norm)
        | Flow::Scaled(norm, _)
        | Flow::ParallelOne(norm)
        | Flow::ParallelTwo(norm)) = self;
        norm
    }

    /// Whether the block whose norm `slot` would be takes the residual stream as it is.
    pub fn is_bare(self, slot: Slot) -> bool {
        match self {
            Flow::Post(_) | Flow::After(_) => true,
            Flow::PreFfn(_) => slot == Slot::AttentionNorm,
            _ => false,
        }
    }

    /// Whether what a block yields is not simply added to the residual stream, and waits beside it.
    pub fn yields_beside(self) -> bool {
        matches!(self, Flow::Sandwich(_) | Flow::After(_) | Flow::Scaled(..))
    }

    /// Whether there is a norm on what a block yields, before it is added.
    fn norms_after(self) -> bool {
        matches!(self, Flow::Sandwich(_) | Flow::After(_))
    }
}

/// Self-attention with grouped key-value heads.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// The earlier layer of the same stage whose keys and values this one reads, having none of its own.
    pub shares: Option<usize>,
    /// Which positions are seen.
    pub mask: AttentionMask,
    /// How positions enter.
    pub position: Position,
    /// On queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Queries, keys and values are cut off at this on both sides, once they are normed and before positions enter.
    pub clip: Option<f32>,
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

    /// Width of queries, keys and values side by side, as far as the layer has its own.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + if self.shares.is_some() { 0 } else { 2 * self.kv_width() }
    }
}

/// A norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct QkNorm {
    /// Which.
    pub norm: Norm,
    /// Of what.
    pub over: NormOver,
    /// Whether positions have entered by then (Hunyuan).
    pub turned: bool,
}

impl QkNorm {
    /// Of every head by itself, before positions enter, with factors that all heads share.
    pub fn of_heads(norm: Norm) -> Self {
        QkNorm { norm, over: NormOver::Head, turned: false }
    }

    /// Factors for so many heads.
    fn factors(self, heads: usize, head_dim: usize) -> usize {
        if self.over == NormOver::Head { head_dim } else { heads * head_dim }
    }
}

/// What a norm of queries or keys is taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormOver {
    /// Each head; all share their factors.
    Head,
    /// Each head, with factors of its own.
    EachHead,
    /// All heads together.
    All,
}

/// How positions enter attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Position {
    /// Not there: they are in the embedding.
    None,
    /// Rotation by [`Tower::ropes`] of this index.
    Rope(usize),
    /// A learned addend of each score, by head and the bucket of the distance.
    Buckets,
    /// Learned vectors for distances, of which the layer makes queries and keys as of tokens: the query meets the key that
    /// stands for its distance from a token's key too, and that key the query which does.
    Distances(Distances),
    /// An addend of each score that falls with the distance.
    Slopes(Slopes),
}

/// A feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Ffn {
    /// `down(act(up(x)))`.
    Plain(Mlp),
    /// `down(act(gate(x)) * up(x))`.
    Gated(Mlp),
    /// A mixture of gated blocks.
    Moe(Moe),
}

impl Ffn {
    /// The block, or each of its experts.
    pub fn mlp(self) -> Mlp {
        let (Ffn::Plain(mlp) | Ffn::Gated(mlp) | Ffn::Moe(Moe { mlp, .. })) = self;
        mlp
    }

    /// Blocks it consists of.
    pub fn experts(self) -> usize {
        if let Ffn::Moe(moe) = self { moe.experts } else { 1 }
    }

    /// Blocks that compute for one token.
    pub fn active(self) -> usize {
        if let Ffn::Moe(moe) = self { moe.active } else { 1 }
    }

    /// Width of its first product.
    pub fn up_width(self) -> usize {
        let factor = if matches!(self, Ffn::Plain(_)) { 1 } else { 2 };
        factor * self.mlp().inner
    }

    /// The expert beside a mixture that every token goes through.
    pub fn shared(self) -> Option<Shared> {
        if let Ffn::Moe(moe) = self { moe.shared } else { None }
    }
}

/// Sizes of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mlp {
    /// Inner width.
    pub inner: usize,
    /// Its activation.
    pub act: Act,
}

/// A mixture of experts: each token goes through the `active` best by the router's scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Moe {
    /// All experts.
    pub experts: usize,
    /// Experts per token.
    pub active: usize,
    /// How logits become scores, and scores a choice.
    pub router: Router,
    /// Whether the chosen experts' shares are made to add up to 1.
    pub normalize: bool,
    /// Factor on the shares.
    pub scale: f32,
    /// One more, for every token.
    pub shared: Option<Shared>,
    /// Each expert.
    pub mlp: Mlp,
}

impl Moe {
    /// Shares by the softmax over all experts, of those chosen made to add up to 1 (Mixtral).
    pub fn new(experts: usize, active: usize, mlp: Mlp) -> Self {
        Moe { experts, active, router: Router::Softmax, normalize: true, scale: 1.0, shared: None, mlp }
    }
}

/// An expert that every token goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shared {
    /// Its inner width.
    pub inner: usize,
    /// Whether it is multiplied by the sigmoid of a logit of its own.
    pub gated: bool,
}

impl Head {
    /// Logits as they are.
    pub const LM: Head = Head::Lm { scale: 1.0, softcap: None };
}

/// What the last stage yields.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Head {
    /// Logits over the vocabulary, for a token to follow.
    Lm {
        /// Factor on the logits.
        scale: f32,
        /// Logits become `cap * tanh(logit / cap)` after that.
        softcap: Option<f32>,
    },
    /// Logits over the vocabulary, for the token at a position: `head(norm(act(dense(x))))`.
    Mlm(Act, Norm),
    /// Logits over classes from one vector: `head(norm(act(dense(x))))`.
    Classify {
        /// Which vector.
        pool: Pool,
        /// Behind the dense product; without one, there is no such product.
        act: Option<Act>,
        /// Before the last product.
        norm: Option<Norm>,
        /// What the classes are called.
        labels: Vec<String>,
        /// How their logits become scores.
        scoring: v1::Scoring,
    },
    /// Logits over classes of each token: `head(norm(act(dense(x))))`.
    Tag {
        /// As in `Classify`.
        act: Option<Act>,
        /// As in `Classify`.
        norm: Option<Norm>,
        /// What the classes are called.
        labels: Vec<String>,
    },
    /// Of each token, logits of an answer that begins and of one that ends there, likewise.
    Span {
        /// As in `Classify`.
        act: Option<Act>,
        /// As in `Classify`.
        norm: Option<Norm>,
    },
    /// One vector per sequence.
    Embed(Embedding),
}

impl Head {
    /// What comes before the last product: an activation, behind a dense product, and a norm.
    pub fn before(&self) -> (Option<Act>, Option<Norm>) {
        match *self {
            Head::Mlm(act, norm) => (Some(act), Some(norm)),
            Head::Classify { act, norm, .. } | Head::Tag { act, norm, .. } | Head::Span { act, norm } => {
                (act, norm)
            }
            Head::Lm { .. } | Head::Embed(_) => (None, None),
        }
    }

    /// How the vector that classes are told from is pooled, where it is not simply that of a token asked for.
    pub fn pooled_classes(&self) -> Option<Pool> {
        match *self {
            Head::Classify { pool, .. } if pool != Pool::First => Some(pool),
            _ => None,
        }
    }
}

/// How a sequence becomes one vector, as sentence-transformers' modules say.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Embedding {
    /// How tokens become one: a vector of the residual stream's width for each way, side by side.
    pub pools: Vec<Pool>,
    /// What that vector goes through, in order.
    pub refinements: Vec<Refinement>,
    /// Elements that are given out: the first ones of the last vector.
    pub dimensions: usize,
}

impl Embedding {
    /// The mean over tokens of a stream of `width`, as it is.
    pub fn mean(width: usize) -> Self {
        Embedding { pools: vec![Pool::Mean], refinements: Vec::new(), dimensions: width }
    }

    /// Widths of the vector, over a residual stream of `width`: once pooled, and behind each refinement.
    pub fn widths(&self, width: usize) -> Vec<usize> {
        let mut widths = vec![self.pools.len() * width];
        for refinement in &self.refinements {
            let last = widths[widths.len() - 1];
            widths.push(match refinement {
                Refinement::Dense { width, .. } => *width,
                Refinement::Norm { .. } | Refinement::Normalize => last,
            });
        }
        widths
    }
}

/// What a pooled vector goes through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Refinement {
    /// `act(dense(x))`.
    Dense {
        /// Elements that it yields.
        width: usize,
        /// None for none.
        act: Option<Act>,
        /// Its number in modules.json, by which its tensors are named.
        module: usize,
    },
    /// A norm.
    Norm {
        /// Its kind.
        norm: Norm,
        /// As for `Dense`.
        module: usize,
    },
    /// Division by its length.
    Normalize,
}

/// How the vectors of a sequence's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pool {
    /// That of the first token.
    First,
    /// That of the last token.
    Last,
    /// Their mean.
    Mean,
    /// The largest of each element.
    Max,
    /// Their sum, divided by the root of their number.
    MeanSqrtLen,
    /// Their mean, each weighted by its position, counted from 1.
    WeightedMean,
}

/// A place for weights. Those of one product may come from one tensor or from the [parts](Slot::parts) of the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Slot {
    /// `(vocab, width)`.
    Embedding,
    /// `(positions, width)`.
    Positions,
    /// `(segments, width)`.
    Segments,
    /// `(width)`, on the sum of the three.
    InputNorm,
    /// `(width, width of the three)`.
    InputProjection,
    /// `(width)`, before attention, or after it in a post-norm layer.
    AttentionNorm,
    /// `(qkv_width, width)`: queries, keys, values; queries alone where keys and values are another layer's.
    Qkv,
    /// `(heads * head_dim, width)`.
    Query,
    /// `(kv_heads * head_dim, width)`.
    Key,
    /// `(kv_heads * head_dim, width)`.
    Value,
    /// `(head_dim)` for all heads of queries, or `(heads * head_dim)`.
    QueryNorm,
    /// The same for keys.
    KeyNorm,
    /// `(buckets, heads)`, added to scores.
    PositionBias,
    /// `(2 * span, width)`: vectors of distances.
    Distances,
    /// `(width)`, on them.
    DistanceNorm,
    /// `(width, heads * head_dim)`.
    AttentionOut,
    /// `(width)`, on what attention yields.
    AttentionPostNorm,
    /// `(width)`, before the feed-forward block, or after it in a post-norm layer.
    FfnNorm,
    /// `(experts, width)`.
    Router,
    /// `(experts)`, added to the scores by which experts are chosen.
    RouterCorrection,
    /// `(1, width)`: whether the shared expert counts.
    SharedRouter,
    /// `(2 * inner, width)`: gate, up of the shared expert.
    SharedGateUp,
    /// `(inner, width)`.
    SharedGate,
    /// `(inner, width)`.
    SharedUp,
    /// `(width, inner)`.
    SharedDown,
    /// `(2 * inner, width)`: gate, up.
    GateUp,
    /// `(inner, width)`.
    Gate,
    /// `(inner, width)`.
    Up,
    /// `(width, inner)`.
    Down,
    /// `(width)`, on what the feed-forward block yields.
    FfnPostNorm,
    /// `(width)`, before the head.
    FinalNorm,
    /// `(width, width)`, before the head proper; one that fills in masks has the tables' width from here on.
    HeadDense,
    /// `(width)`, after [`Slot::HeadDense`].
    HeadNorm,
    /// `(vocab or classes, width)`.
    Head,
    /// Of the [`Refinement`] of this number: `(out, in)`, or `(width)` of a norm.
    Refinement(u8),
}

impl Slot {
    /// The slots whose tensors, one after the other, make up this one's where a file has them apart.
    pub fn parts(self) -> &'static [Slot] {
        match self {
            Slot::Qkv => &[Slot::Query, Slot::Key, Slot::Value],
            Slot::GateUp => &[Slot::Gate, Slot::Up],
            Slot::SharedGateUp => &[Slot::SharedGate, Slot::SharedUp],
            _ => &[],
        }
    }
}

/// Which of a tower's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Site {
    /// With the first stage.
    Input,
    /// With the stage of this layer.
    Layer(usize),
    /// With the last stage.
    Output,
}

/// What lies in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Factors of a norm, and perhaps a bias.
    Norm(usize),
    /// Rows to be looked up: rows, columns.
    Table(usize, usize),
    /// Weights of a product: outputs, inputs.
    Product(usize, usize),
}

impl Shape {
    /// Dimensions of the tensor.
    pub fn dimensions(self) -> Vec<usize> {
        match self {
            Shape::Norm(len) => vec![len],
            Shape::Table(n, k) | Shape::Product(n, k) => vec![n, k],
        }
    }
}

impl Tower {
    /// The slots that `site` fills, in one fixed order, and what lies in them.
    pub fn slots(&self, site: Site) -> Vec<(Slot, Shape)> {
        let width = self.width;
        let norm = Shape::Norm(width);
        let mut slots = Vec::new();
        match site {
            Site::Input => {
                let columns = self.table_width();
                slots.push((Slot::Embedding, Shape::Table(self.vocab, columns)));
                if let Some(learned) = self.input.positions {
                    slots.push((Slot::Positions, Shape::Table(learned.rows, columns)));
                }
                if self.input.segments > 0 {
                    slots.push((Slot::Segments, Shape::Table(self.input.segments, columns)));
                }
                slots.extend(self.input.norm.map(|_| (Slot::InputNorm, Shape::Norm(columns))));
                let projection = (Slot::InputProjection, Shape::Product(width, columns));
                slots.extend(self.input.projected.map(|_| projection));
            }
            Site::Layer(layer) => {
                let Layer { flow, attention, ffn } = &self.layers[layer];
                let bare = matches!(flow, Flow::After(_));
                slots.extend(
                    (!bare && !matches!(flow, Flow::PreFfn(_))).then_some((Slot::AttentionNorm, norm)),
                );
                slots.push((Slot::Qkv, Shape::Product(attention.qkv_width(), width)));
                if let Some(qk) = attention.qk_norm {
                    let factors = |heads| Shape::Norm(qk.factors(heads, attention.head_dim));
                    slots.push((Slot::QueryNorm, factors(attention.heads)));
                    let keys = (Slot::KeyNorm, factors(attention.kv_heads));
                    slots.extend(attention.shares.is_none().then_some(keys));
                }
                if attention.position == Position::Buckets {
                    slots.push((Slot::PositionBias, Shape::Table(BUCKETS, attention.heads)));
                }
                if let Position::Distances(Distances { span, norm: is_normed, .. }) = attention.position {
                    slots.push((Slot::Distances, Shape::Table(2 * span, width)));
                    slots.extend(is_normed.map(|_| (Slot::DistanceNorm, norm)));
                }
                slots.push((Slot::AttentionOut, Shape::Product(width, attention.q_width())));
                slots.extend(flow.norms_after().then_some((Slot::AttentionPostNorm, norm)));
                if !bare && !matches!(flow, Flow::ParallelOne(_)) {
                    slots.push((Slot::FfnNorm, norm));
                }
                if let Ffn::Moe(moe) = ffn {
                    slots.push((Slot::Router, Shape::Product(moe.experts, width)));
                    let corrected = matches!(moe.router, Router::Sigmoid { .. });
                    slots.extend(corrected.then_some((Slot::RouterCorrection, Shape::Norm(moe.experts))));
                }
                if let Some(Shared { inner, gated }) = ffn.shared() {
                    slots.extend(gated.then_some((Slot::SharedRouter, Shape::Product(1, width))));
                    slots.push((Slot::SharedGateUp, Shape::Product(2 * inner, width)));
                    slots.push((Slot::SharedDown, Shape::Product(width, inner)));
                }
                let first = if matches!(ffn, Ffn::Plain(_)) { Slot::Up } else { Slot::GateUp };
                slots.push((first, Shape::Product(ffn.up_width(), width)));
                slots.push((Slot::Down, Shape::Product(width, ffn.mlp().inner)));
                slots.extend(flow.norms_after().then_some((Slot::FfnPostNorm, norm)));
            }
            Site::Output => {
                slots.extend(self.norm.map(|_| (Slot::FinalNorm, norm)));
                let (act, head_norm) = self.head.before();
                let inner = self.head_width();
                slots.extend(act.map(|_| (Slot::HeadDense, Shape::Product(inner, width))));
                slots.extend(head_norm.map(|_| (Slot::HeadNorm, Shape::Norm(inner))));
                match &self.head {
                    Head::Embed(embedding) => {
                        let widths = embedding.widths(width);
                        for (i, refinement) in embedding.refinements.iter().enumerate() {
                            let slot = Slot::Refinement(i as u8);
                            match refinement {
                                Refinement::Dense { .. } => {
                                    slots.push((slot, Shape::Product(widths[i + 1], widths[i])));
                                }
                                Refinement::Norm { .. } => slots.push((slot, Shape::Norm(widths[i]))),
                                Refinement::Normalize => {}
                            }
                        }
                    }
                    _ => slots.push((Slot::Head, Shape::Product(self.outputs(), inner))),
                }
            }
        }
        slots
    }

    /// Blocks of weights in `slot` of `site`: one per expert.
    pub fn copies(&self, site: Site, slot: Slot) -> usize {
        match (site, slot) {
            (Site::Layer(layer), Slot::GateUp | Slot::Down) => self.layers[layer].ffn.experts(),
            _ => 1,
        }
    }

    /// Rows that a part of `slot` has (see [`Slot::parts`]).
    pub fn part_rows(&self, site: Site, part: Slot) -> usize {
        let Site::Layer(layer) = site else { return 0 };
        let Layer { attention, ffn, .. } = &self.layers[layer];
        match part {
            Slot::Query => attention.q_width(),
            Slot::Key | Slot::Value if attention.shares.is_some() => 0,
            Slot::Key | Slot::Value => attention.kv_width(),
            Slot::SharedGate | Slot::SharedUp => ffn.shared().map_or(0, |shared| shared.inner),
            _ => ffn.mlp().inner,
        }
    }

    /// All sites, in order.
    pub fn sites(&self) -> impl Iterator<Item = Site> {
        let layers = (0..self.layers.len()).map(Site::Layer);
        [Site::Input].into_iter().chain(layers).chain([Site::Output])
    }

    /// Width of the input's tables.
    pub fn table_width(&self) -> usize {
        self.input.projected.unwrap_or(self.width)
    }

    /// Width of what the head proper takes: the tables' where it tells tokens apart behind a product.
    pub fn head_width(&self) -> usize {
        if matches!(self.head, Head::Mlm(..)) { self.table_width() } else { self.width }
    }

    /// Values that the head yields per output.
    pub fn outputs(&self) -> usize {
        match &self.head {
            Head::Lm { .. } | Head::Mlm(..) => self.vocab,
            Head::Classify { labels, .. } | Head::Tag { labels, .. } => labels.len(),
            Head::Span { .. } => 2,
            Head::Embed(embedding) => embedding.dimensions,
        }
    }

    /// What a stage hands to the next for a step of so many tokens: the residual stream `(tokens, width)` in `dtype`,
    /// then what is carried beside it.
    pub fn activation(&self, tokens: usize, dtype: DType) -> Vec<TensorSpec> {
        let residual = TensorSpec { dtype, rows: tokens, columns: self.width };
        let carried = self.carried.iter().map(|carried| TensorSpec {
            dtype: carried.dtype.unwrap_or(dtype),
            rows: tokens,
            columns: carried.columns,
        });
        [residual].into_iter().chain(carried).collect()
    }

    /// What a layer keeps of a sequence between steps.
    pub fn states(&self, layer: usize) -> Vec<LayerState> {
        let Attention { kv_heads, head_dim, shares, .. } = self.layers[layer].attention;
        let elements = kv_elements(kv_heads, head_dim) as u64;
        let shares = shares.map(|owner| owner as u32);
        let paged = LayerState { kind: StateKind::PagedKv, elements, shares };
        if self.caches { vec![paged] } else { Vec::new() }
    }
}

/// How a family names its tensors.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    /// Prefixes that files may carry; the first that leads to an embedding is taken.
    pub bases: &'static [&'static str],
    /// Where the tensors under the prefix are. `{}` stands for the layer, `{h}` for the head where each has a norm in a
    /// tensor of its own, `{e}` for the expert; a name with `{e}` is
    /// for layers with experts only, and a feed-forward name without it for the others. Of several for a slot, the first
    /// that the file has is taken.
    pub slots: Vec<(Slot, Source)>,
    /// The same for tensors that have no prefix.
    pub root: Vec<(Slot, Source)>,
    /// Whether the head may be the embedding.
    pub tied: bool,
    /// Endings that stand for another where that is absent.
    pub aliases: &'static [(&'static str, &'static str)],
    /// Endings of tensors that are left alone, or, with a `*` behind them, beginnings; with a `{}` within, beginnings behind the
    /// prefix, where it stands for the number of a layer behind the last one.
    pub ignore: &'static [&'static str],
}

/// Where a tensor is, and how it lies there; [`ending`](Source::ending) (or `.bias`, if there is one) follows the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Output rows by input columns, or a vector.
    Rows(&'static str),
    /// Input rows by output columns (`Conv1D` of GPT-2).
    Columns(&'static str),
    /// Rows of queries, keys and values side by side, for each head of keys those of its queries first (GPT-NeoX, Falcon).
    Heads(&'static str),
    /// Rows of which the even ones of a head turn with the odd ones, not the first half with the second; or a vector per
    /// head, likewise.
    EvenOdd(&'static str),
    /// A vector from which 1 was taken (norms of Gemma).
    PlusOne(&'static str),
    /// Those of all experts, one after the other, in one tensor, of which this is the whole name.
    Experts(&'static str),
    /// A vector of which this is the whole name.
    Bare(&'static str),
    /// The second half of the rows, then the first (GTE's `up_gate_proj`).
    Swapped(&'static str),
    /// Nowhere: the factors of a norm that has none.
    Ones,
}

impl Source {
    /// The name; of what is nowhere, none.
    pub fn name(self) -> &'static str {
        match self {
            Source::Rows(name)
            | Source::Columns(name)
            | Source::Heads(name)
            | Source::EvenOdd(name)
            | Source::PlusOne(name)
            | Source::Experts(name)
            | Source::Bare(name)
            | Source::Swapped(name) => name,
            Source::Ones => "",
        }
    }

    /// Whether it is for layers with experts.
    pub fn is_of_experts(self) -> bool {
        matches!(self, Source::Experts(_)) || self.name().contains("{e}")
    }

    /// What follows the name.
    pub fn ending(self) -> &'static str {
        if matches!(self, Source::Experts(_) | Source::Bare(_)) { "" } else { ".weight" }
    }
}
