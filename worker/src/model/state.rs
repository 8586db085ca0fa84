//! What a stage keeps between steps (cache, scratch), and the forward pass of one step.

use super::{
    Model, ModelError,
    blocks::{Act, Attention, Ffn, Flow, Layer, Norm, Position, Span, Tower},
    stage::{LayerWeights, RangeSpec, StageWeights},
    workspace::{self, Workspace},
};
use crate::{
    kernels::cpu::{
        Cpu,
        attention::Attention as AttentionCall,
        linear::{Linear, Output, Rows},
        norm::{HeadNorm, RmsNorm, SiluMul},
        rope::{self, RopeAndStore},
    },
    kv_cache::{BLOCK_TOKENS, BatchRow, KvLayer},
};

/// A step that does not fit the stage. Nothing was computed or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// Too many tokens, or none.
    #[error("a step of {tokens} tokens: expected 1..={limit}")]
    Tokens {
        /// In the step.
        tokens: u64,
        /// What the stage was prepared for.
        limit: u32,
    },
    /// Rows and input disagree.
    #[error("rows hold {rows} tokens, the input holds {input}")]
    Input {
        /// Tokens by the rows.
        rows: u64,
        /// Tokens by the input.
        input: u64,
    },
    /// Token ids where the stage needs the residual stream, or the other way round.
    #[error("this stage takes {expected}")]
    InputKind {
        /// What it takes.
        expected: &'static str,
    },
    /// A token id that the embedding has no row for.
    #[error("token id {id}: expected less than {vocab}")]
    TokenId {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A row without tokens, or past the context.
    #[error("row {row} holds {count} tokens from position {start}: expected at least 1, ending by {context}")]
    Position {
        /// Index of the row.
        row: usize,
        /// Its first position.
        start: u32,
        /// Its tokens.
        count: u32,
        /// Most positions of a sequence.
        context: usize,
    },
    /// A block table too short for its row.
    #[error("row {row} has {blocks} blocks: {needed} are needed")]
    BlockTable {
        /// Index of the row.
        row: usize,
        /// Blocks in its table.
        blocks: usize,
        /// Blocks up to its last token.
        needed: usize,
    },
    /// A block that the cache does not have.
    #[error("row {row} names block {block}: the cache has {limit}")]
    Block {
        /// Index of the row.
        row: usize,
        /// The block.
        block: u32,
        /// Blocks of the cache.
        limit: u32,
    },
    /// Output rows that do not fit.
    #[error("outputs must be ascending indexes of the step's tokens, at most {limit} of them")]
    Outputs {
        /// What the stage was prepared for.
        limit: u32,
    },
    /// Weights of another stage.
    #[error("the weights are not those that this state was made for")]
    Weights,
}

/// What a step begins with.
#[derive(Debug, Clone, Copy)]
pub enum StageInput<'a> {
    /// Ids of all tokens, on the first stage.
    Tokens(&'a [u32]),
    /// The residual stream `(tokens, width)` of the stage before.
    Hidden(&'a [f32]),
}

/// What a step yields.
#[derive(Debug)]
pub enum StageOutput<'a> {
    /// The residual stream `(tokens, width)`, every value rounded to the plan's format.
    Hidden(&'a [f32]),
    /// On the last stage.
    Logits {
        /// `(outputs, vocab)`; the sampler may overwrite it.
        logits: &'a mut [f32],
        /// Scratch for the sampler: at least `vocab` indexes per output.
        order: &'a mut [u32],
    },
}

/// Cache and scratch of a stage, allocated once.
pub struct StageState {
    spec: RangeSpec,
    cpu: Cpu,
    kv_blocks: u32,
    max_tokens: u32,
    max_outputs: u32,
    cache: Vec<KvLayer>,
    work: Workspace,
}

impl StageState {
    /// Memory for `kv_blocks` blocks, and for steps of at most `max_tokens` tokens and, with the head, `max_outputs`
    /// output rows.
    pub fn new(
        model: &Model,
        spec: &RangeSpec,
        kv_blocks: u32,
        max_tokens: u32,
        max_outputs: u32,
    ) -> Result<Self, ModelError> {
        spec.check(model)?;
        let max_outputs = if spec.head { max_outputs } else { 0 };
        let layers = &model.tower.layers[spec.layers.first as usize..spec.layers.end as usize];
        let cache = layers
            .iter()
            .map(|l| KvLayer::new(l.attention.kv_heads, l.attention.head_dim, kv_blocks, spec.dtype))
            .collect::<Result<_, _>>()?;
        Ok(StageState {
            spec: *spec,
            cpu: Cpu::detect(),
            kv_blocks,
            max_tokens,
            max_outputs,
            cache,
            work: Workspace::new(&model.tower, max_tokens, max_outputs)?,
        })
    }

    /// Bytes of cache and scratch that [`new`](Self::new) will allocate.
    pub fn bytes_for(
        model: &Model,
        spec: &RangeSpec,
        kv_blocks: u32,
        max_tokens: u32,
        max_outputs: u32,
    ) -> u64 {
        let layers = &model.tower.layers[spec.layers.first as usize..spec.layers.end as usize];
        let elements =
            |l: &Layer| KvLayer::elements_per_token(l.attention.kv_heads, l.attention.head_dim) as u64;
        let per_token: u64 = layers.iter().map(elements).sum::<u64>() * spec.dtype.size();
        let outputs = if spec.head { u64::from(max_outputs) } else { 0 };
        u64::from(kv_blocks) * BLOCK_TOKENS as u64 * per_token
            + workspace::bytes_per_token(&model.tower) * u64::from(max_tokens)
            + workspace::bytes_per_output(&model.tower) * outputs
    }

    /// Bytes of the cache.
    pub fn kv_bytes(&self) -> u64 {
        self.cache.iter().map(KvLayer::bytes).sum()
    }

    /// Bytes of the scratch memory.
    pub fn workspace_bytes(&self) -> u64 {
        self.work.bytes()
    }

    /// Makes NaN of the whole cache and scratch, for tests of what a step may read.
    #[cfg(test)]
    pub(super) fn poison(&mut self) {
        use crate::kernels::buffer::{Element, with_values};
        for layer in &mut self.cache {
            let (k, v) = layer.parts_mut();
            with_values!(k, k => k.fill(Element::from_f32(f32::NAN)));
            with_values!(v, v => v.fill(Element::from_f32(f32::NAN)));
        }
        let work = &mut self.work;
        for buffer in [&mut work.residual, &mut work.normed, &mut work.qkv, &mut work.attention] {
            buffer.fill(f32::NAN);
        }
        work.gate_up.fill(f32::NAN);
        work.logits.fill(f32::NAN);
    }

    /// Runs one step. `outputs` are the packed tokens whose logits are wanted, ascending; ignored without the head.
    ///
    /// Every index is checked first, so an error leaves the cache as it was.
    pub fn forward(
        &mut self,
        weights: &StageWeights,
        rows: &[BatchRow<'_>],
        input: StageInput<'_>,
        outputs: &[u32],
    ) -> Result<StageOutput<'_>, StepError> {
        if weights.spec != self.spec {
            return Err(StepError::Weights);
        }
        let tower = &weights.model.tower;
        let tokens = self.check_rows(tower, rows)?;
        self.begin(weights, tokens, input)?;
        let outputs = if weights.head.is_some() { outputs } else { &[] };
        let ascending = outputs.is_sorted_by(|a, b| a < b);
        if !ascending
            || outputs.len() > self.max_outputs as usize
            || outputs.last().is_some_and(|o| *o as usize >= tokens)
        {
            return Err(StepError::Outputs { limit: self.max_outputs });
        }
        for (rope, (angles, stride)) in tower.ropes.iter().zip(&mut self.work.angles) {
            rope::angles(rows, &rope.inv_freq, rope.factor, angles, *stride);
        }
        let first = self.spec.layers.first as usize;
        for (i, weights) in weights.layers.iter().enumerate() {
            let layer = &tower.layers[first + i];
            let Flow::Pre(norm) = layer.flow;
            self.norm_all(norm, &weights.attention_norm, tokens);
            self.attend(tower, &layer.attention, i, weights, rows, tokens);
            self.norm_all(norm, &weights.ffn_norm, tokens);
            self.feed_forward(layer, weights, tokens);
        }
        if weights.head.is_none() {
            return Ok(StageOutput::Hidden(&self.work.residual[..tokens * tower.width]));
        }
        Ok(self.finish(weights, outputs))
    }

    /// Checks rows against cache and context; gives the number of tokens.
    fn check_rows(&self, tower: &Tower, rows: &[BatchRow<'_>]) -> Result<usize, StepError> {
        let tokens: u64 = rows.iter().map(|r| u64::from(r.count)).sum();
        if tokens == 0 || tokens > u64::from(self.max_tokens) {
            return Err(StepError::Tokens { tokens, limit: self.max_tokens });
        }
        for (row, BatchRow { start, count, blocks }) in rows.iter().enumerate() {
            let end = *start as usize + *count as usize;
            if *count == 0 || end > tower.context {
                let (start, count, context) = (*start, *count, tower.context);
                return Err(StepError::Position { row, start, count, context });
            }
            let needed = end.div_ceil(BLOCK_TOKENS);
            if blocks.len() < needed {
                return Err(StepError::BlockTable { row, blocks: blocks.len(), needed });
            }
            if let Some(&block) = blocks[..needed].iter().find(|b| **b >= self.kv_blocks) {
                return Err(StepError::Block { row, block, limit: self.kv_blocks });
            }
        }
        Ok(tokens as usize)
    }

    /// Fills the residual stream from the input.
    fn begin(
        &mut self,
        weights: &StageWeights,
        tokens: usize,
        input: StageInput<'_>,
    ) -> Result<(), StepError> {
        let (width, vocab) = (weights.model.tower.width, weights.model.tower.vocab);
        let mismatch = |input: usize| StepError::Input { rows: tokens as u64, input: input as u64 };
        let residual = &mut self.work.residual[..tokens * width];
        match (input, self.spec.embedding) {
            (StageInput::Tokens(ids), true) => {
                if ids.len() != tokens {
                    return Err(mismatch(ids.len()));
                }
                if let Some(&id) = ids.iter().find(|id| **id as usize >= vocab) {
                    return Err(StepError::TokenId { id, vocab });
                }
                for (id, out) in ids.iter().zip(residual.chunks_exact_mut(width)) {
                    match (&weights.embedding, &weights.head) {
                        (Some(table), _) => table.gather(*id as usize, out),
                        (None, Some(head)) => head.projection.matrix.gather(*id as usize, out),
                        (None, None) => return Err(StepError::Weights),
                    }
                }
            }
            (StageInput::Hidden(hidden), false) => {
                if hidden.len() != residual.len() {
                    return Err(mismatch(hidden.len() / width));
                }
                residual.copy_from_slice(hidden);
            }
            (_, true) => return Err(StepError::InputKind { expected: "token ids" }),
            (_, false) => return Err(StepError::InputKind { expected: "the residual stream" }),
        }
        Ok(())
    }

    fn norm_all(&mut self, norm: Norm, weight: &[f32], tokens: usize) {
        let Norm::Rms(eps) = norm;
        let x = Rows { data: &self.work.residual, stride: weight.len(), count: tokens };
        self.cpu.rms_norm(RmsNorm { x, weight, eps, out: &mut self.work.normed });
    }

    /// Attention of layer `index` of this stage, added to the residual stream.
    fn attend(
        &mut self,
        tower: &Tower,
        attention: &Attention,
        index: usize,
        weights: &LayerWeights,
        rows: &[BatchRow<'_>],
        tokens: usize,
    ) {
        let Self { cpu, work, cache, spec, .. } = self;
        let (width, qkv_width) = (tower.width, attention.qkv_width());
        let Position::Rope(set) = attention.position;
        let (angles, angle_stride) = &work.angles[set];
        cpu.linear(Linear {
            weight: &weights.qkv.matrix,
            bias: weights.qkv.bias.as_deref(),
            x: Rows { data: &work.normed, stride: width, count: tokens },
            out: &mut work.qkv,
            output: Output::Store,
        });
        if let (Some(Norm::Rms(eps)), Some([query, key])) = (attention.qk_norm, &weights.qk_norm) {
            cpu.head_norm(HeadNorm {
                qkv: &mut work.qkv[..tokens * qkv_width],
                stride: qkv_width,
                heads: attention.heads,
                kv_heads: attention.kv_heads,
                weights: [query, key],
                eps,
            });
        }
        let rope = RopeAndStore {
            qkv: &mut work.qkv[..tokens * qkv_width],
            angles,
            angle_stride: *angle_stride,
            half: tower.ropes[set].inv_freq.len(),
            heads: attention.heads,
            rows,
        };
        cpu.rope_and_store(rope, &mut cache[index]);
        cpu.attention(AttentionCall {
            q: &work.qkv,
            stride: qkv_width,
            out: &mut work.attention,
            cache: &cache[index],
            rows,
            heads: attention.heads,
            scale: attention.scale,
            window: match attention.span {
                Span::Causal => None,
                Span::Window(window) => Some(window),
            },
        });
        cpu.linear(Linear {
            weight: &weights.attention_out.matrix,
            bias: weights.attention_out.bias.as_deref(),
            x: Rows { data: &work.attention, stride: attention.q_width(), count: tokens },
            out: &mut work.residual,
            output: Output::AddRounded(spec.dtype),
        });
    }

    /// The feed-forward block, added to the residual stream.
    fn feed_forward(&mut self, layer: &Layer, weights: &LayerWeights, tokens: usize) {
        let Self { cpu, work, spec, .. } = self;
        let Ffn::Gated(mlp) = layer.ffn;
        cpu.linear(Linear {
            weight: &weights.gate_up.matrix,
            bias: weights.gate_up.bias.as_deref(),
            x: Rows { data: &work.normed, stride: weights.gate_up.matrix.k(), count: tokens },
            out: &mut work.gate_up,
            output: Output::Store,
        });
        let gate_up = &mut work.gate_up[..tokens * 2 * mlp.inner];
        match mlp.act {
            Act::Silu => cpu.silu_mul(SiluMul { gate_up, width: mlp.inner }),
        }
        cpu.linear(Linear {
            weight: &weights.down.matrix,
            bias: weights.down.bias.as_deref(),
            x: Rows { data: &work.gate_up, stride: 2 * mlp.inner, count: tokens },
            out: &mut work.residual,
            output: Output::AddRounded(spec.dtype),
        });
    }

    /// Final norm and logits of the wanted rows.
    fn finish(&mut self, weights: &StageWeights, outputs: &[u32]) -> StageOutput<'_> {
        let Self { cpu, work, .. } = self;
        let tower = &weights.model.tower;
        let (Norm::Rms(eps), width) = (tower.norm, tower.width);
        let len = outputs.len() * tower.vocab;
        if let Some(head) = &weights.head {
            for (token, out) in outputs.iter().zip(work.normed.chunks_exact_mut(width)) {
                let data = &work.residual[*token as usize * width..];
                let x = Rows { data, stride: width, count: 1 };
                cpu.rms_norm(RmsNorm { x, weight: &head.norm, eps, out });
            }
            cpu.linear(Linear {
                weight: &head.projection.matrix,
                bias: head.projection.bias.as_deref(),
                x: Rows { data: &work.normed, stride: width, count: outputs.len() },
                out: &mut work.logits,
                output: Output::Store,
            });
        }
        StageOutput::Logits { logits: &mut work.logits[..len], order: &mut work.order[..len] }
    }
}
