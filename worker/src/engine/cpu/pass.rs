//! One step on its way through a stage on the CPU.

use strata_proto::DType;

use super::{
    weights::{Block, NormWeights, Projection},
    workspace::Workspace,
};
use crate::{
    engine::{Caches, StepError},
    kernels::{
        buffer::round_to,
        cpu::{
            Cpu,
            attention::Attention as AttentionCall,
            kv_cache::KvLayer,
            linear::{Linear, Output, Rows},
            moe::Route,
            norm::{Activate, GateMul, HeadNorm, NormRows, SoftCap},
            packed::Table,
            rope::{self, Angles, Rope, RopeAndStore},
        },
        ops::BatchRow,
    },
    model::{
        architecture::{Attention, Ffn, Flow, Head, Input, Moe, Norm, Position, Slot, Tower},
        layer::{Inner, Operations},
    },
};

/// One step. All its inputs have been checked.
pub(super) struct Pass<'a> {
    pub cpu: &'a Cpu,
    pub work: &'a mut Workspace,
    pub cache: &'a mut Caches<KvLayer>,
    pub tower: &'a Tower,
    pub rows: &'a [BatchRow<'a>],
    pub tokens: usize,
    /// Format of the residual stream.
    pub dtype: DType,
}

impl Pass<'_> {
    /// The residual stream of token ids. `tied` holds the embedding's rows if `block` does not.
    pub fn embed(
        &mut self,
        block: &Block,
        tied: Option<&Block>,
        ids: &[u32],
        segments: &[u32],
    ) -> Result<(), StepError> {
        let (width, input, dtype) = (self.tower.width, self.tower.input, self.dtype);
        let Workspace { residual, normed, .. } = &mut *self.work;
        let residual = &mut residual[..ids.len() * width];
        for (id, out) in ids.iter().zip(residual.chunks_exact_mut(width)) {
            match (block.table(Slot::Embedding), tied) {
                (Some(table), _) => table.gather(*id as usize, out),
                (None, Some(head)) => head.product(Slot::Head, 0)?.matrix.gather(*id as usize, out),
                (None, None) => return Err(StepError::Weights),
            }
        }
        if input == Input::TOKENS {
            return Ok(());
        }
        let scale = round_to(dtype, input.scale);
        let other = &mut normed[..width];
        let mut add = |out: &mut [f32], table: Option<&Table>, index: usize| {
            table.ok_or(StepError::Weights)?.gather(index, other);
            out.iter_mut().zip(&*other).for_each(|(x, y)| *x += y);
            Ok::<_, StepError>(())
        };
        let positions = self.rows.iter().flat_map(|r| r.start..r.start + r.count);
        for (i, (out, position)) in residual.chunks_exact_mut(width).zip(positions).enumerate() {
            out.iter_mut().for_each(|x| *x *= scale);
            if input.segments > 0 {
                add(out, block.table(Slot::Segments), segments.get(i).map_or(0, |s| *s as usize))?;
            }
            if let Some(learned) = input.positions {
                add(out, block.table(Slot::Positions), learned.first + position as usize)?;
            }
            out.iter_mut().for_each(|x| *x = round_to(dtype, *x));
        }
        if let Some(norm) = input.norm {
            self.renorm(norm, block, Slot::InputNorm)?;
        }
        Ok(())
    }

    /// Sine and cosine of every token, for each set of frequencies.
    pub fn angles(&mut self) {
        for (rope, (angles, stride)) in self.tower.ropes.iter().zip(&mut self.work.angles) {
            let set = |row: &BatchRow<'_>| {
                let set = &rope.sets[(row.rope_set as usize).min(rope.sets.len() - 1)];
                (&*set.inv_freq, set.factor)
            };
            rope::angles(self.rows, set, angles, *stride);
        }
    }

    /// Final norm and head of the wanted tokens, into `values`.
    pub fn finish(&mut self, block: &Block, outputs: &[u32]) -> Result<(), StepError> {
        let Self { cpu, tower, tokens, .. } = *self;
        let width = tower.width;
        if let Head::Embed(embedding) = &tower.head {
            self.norm_rows(block, 0, 0, tokens)?;
            return self.embed_sequences(embedding, block, outputs);
        }
        if let Some(pool) = tower.head.pooled_classes() {
            self.norm_rows(block, 0, 0, tokens)?;
            self.pool(&[pool], outputs);
            let used = outputs.len() * width;
            self.work.normed[..used].copy_from_slice(&self.work.vectors[..used]);
        } else {
            for (i, token) in outputs.iter().enumerate() {
                self.norm_rows(block, *token as usize, i, 1)?;
            }
        }
        let Workspace { residual, normed, values, packed, .. } = &mut *self.work;
        let mut linear = |slot, x: &[f32], out: &mut [f32]| {
            let Projection { matrix, bias } = block.product(slot, 0)?;
            let x = Rows { data: x, stride: width, count: outputs.len() };
            cpu.linear(Linear {
                weight: matrix,
                bias: bias.as_deref(),
                x,
                packed,
                out,
                output: Output::Store,
            });
            Ok::<_, StepError>(())
        };
        let used = outputs.len() * width;
        let (act, norm) = tower.head.before();
        if let Some(act) = act {
            // Of the residual stream, nothing is needed any more.
            linear(Slot::HeadDense, normed, residual)?;
            cpu.activate(Activate { act, x: &mut residual[..used] });
            normed[..used].copy_from_slice(&residual[..used]);
        }
        if let Some(norm) = norm {
            residual[..used].copy_from_slice(&normed[..used]);
            let NormWeights { weight, bias } = block.norm(Slot::HeadNorm)?;
            let x = Rows { data: residual, stride: width, count: outputs.len() };
            let (bias, output) = (bias.as_deref(), Output::Store);
            cpu.norm(NormRows { norm, x, weight, bias, out: normed, output });
        }
        linear(Slot::Head, normed, values)?;
        if let Head::Lm { softcap: Some(cap) } = tower.head {
            cpu.soft_cap(SoftCap { cap, x: &mut values[..outputs.len() * tower.vocab] });
        }
        Ok(())
    }

    /// Final norm of `count` rows of the residual stream from row `from` on, into `normed` from row `to` on.
    fn norm_rows(&mut self, block: &Block, from: usize, to: usize, count: usize) -> Result<(), StepError> {
        let width = self.tower.width;
        let Workspace { residual, normed, .. } = &mut *self.work;
        let data = &residual[from * width..(from + count) * width];
        let out = &mut normed[to * width..(to + count) * width];
        let Some(norm) = self.tower.norm else {
            out.copy_from_slice(data);
            return Ok(());
        };
        let NormWeights { weight, bias } = block.norm(Slot::FinalNorm)?;
        let x = Rows { data, stride: width, count };
        self.cpu.norm(NormRows { norm, x, weight, bias: bias.as_deref(), out, output: Output::Store });
        Ok(())
    }
}

impl Operations for Pass<'_> {
    type Block = Block;
    type Error = StepError;

    fn enter(&mut self, flow: Flow, block: &Block, slot: Slot) -> Result<(), StepError> {
        if flow.is_bare(slot) {
            let len = self.tokens * self.tower.width;
            self.work.normed[..len].copy_from_slice(&self.work.residual[..len]);
            return Ok(());
        }
        let NormWeights { weight, bias } = block.norm(slot)?;
        let x = Rows { data: &self.work.residual, stride: self.tower.width, count: self.tokens };
        self.cpu.norm(NormRows {
            norm: flow.norm(),
            x,
            weight,
            bias: bias.as_deref(),
            out: &mut self.work.normed,
            output: Output::Store,
        });
        Ok(())
    }

    fn add_normed(&mut self, norm: Norm, block: &Block, slot: Slot) -> Result<(), StepError> {
        let NormWeights { weight, bias } = block.norm(slot)?;
        let Workspace { residual, normed, .. } = &mut *self.work;
        let x = Rows { data: normed, stride: self.tower.width, count: self.tokens };
        let (bias, output) = (bias.as_deref(), Output::AddRounded(self.dtype));
        self.cpu.norm(NormRows { norm, x, weight, bias, out: residual, output });
        Ok(())
    }

    fn renorm(&mut self, norm: Norm, block: &Block, slot: Slot) -> Result<(), StepError> {
        let NormWeights { weight, bias } = block.norm(slot)?;
        let Workspace { residual, normed, .. } = &mut *self.work;
        let len = self.tokens * self.tower.width;
        let x = Rows { data: residual, stride: self.tower.width, count: self.tokens };
        let (bias, output) = (bias.as_deref(), Output::StoreRounded(self.dtype));
        self.cpu.norm(NormRows { norm, x, weight, bias, out: normed, output });
        residual[..len].copy_from_slice(&normed[..len]);
        Ok(())
    }

    fn project(&mut self, flow: Flow, from: Inner<'_>, block: &Block) -> Result<(), StepError> {
        let Workspace { residual, normed, attention, up, packed, .. } = &mut *self.work;
        let (slot, data, stride): (_, &[f32], _) = match from {
            Inner::Attention(a) => (Slot::AttentionOut, attention, a.q_width()),
            Inner::Up(ffn) => (Slot::Down, up, ffn.up_width()),
        };
        let product = block.product(slot, 0)?;
        let (out, output) = match flow {
            Flow::Sandwich(_) => (normed, Output::Store),
            _ => (residual, Output::AddRounded(self.dtype)),
        };
        self.cpu.linear(Linear {
            weight: &product.matrix,
            bias: product.bias.as_deref(),
            x: Rows { data, stride, count: self.tokens },
            packed,
            out,
            output,
        });
        Ok(())
    }

    fn attend(&mut self, attention: &Attention, index: usize, block: &Block) -> Result<(), StepError> {
        let Self { cpu, work, cache, tower, rows, tokens, .. } = self;
        let Workspace { normed, qkv, attention: out, packed, angles, sequence, blocks, .. } = &mut **work;
        let stride = attention.qkv_width();
        let qkv = &mut qkv[..*tokens * stride];
        let product = block.product(Slot::Qkv, 0)?;
        cpu.linear(Linear {
            weight: &product.matrix,
            bias: product.bias.as_deref(),
            x: Rows { data: normed, stride: tower.width, count: *tokens },
            packed,
            out: qkv,
            output: Output::Store,
        });
        if let Some(norm) = attention.qk_norm {
            let query = block.norm(Slot::QueryNorm)?;
            let (key, kv_heads) = match attention.shares {
                None => (block.norm(Slot::KeyNorm)?, attention.kv_heads),
                Some(_) => (query, 0),
            };
            cpu.head_norm(HeadNorm {
                norm,
                qkv,
                stride,
                heads: attention.heads,
                kv_heads,
                weights: [&query.weight, &key.weight],
                biases: [query.bias.as_deref(), key.bias.as_deref()],
            });
        }
        let mut attend = |first: usize, rows: &[BatchRow<'_>], cache: &mut KvLayer| {
            // No other row's: what is turned once must not be turned again.
            let count: usize = rows.iter().map(|row| row.count as usize).sum();
            let qkv = &mut qkv[first * stride..(first + count) * stride];
            let angles = match attention.position {
                Position::None => None,
                Position::Rope(set) => {
                    let (table, stride) = &angles[set];
                    let pairs = tower.ropes[set].pairs();
                    Some(Angles { table: &table[first * stride..], stride: *stride, pairs })
                }
            };
            let heads = attention.heads;
            match (attention.shares, angles) {
                (None, angles) => cpu.rope_and_store(RopeAndStore { qkv, angles, heads, rows }, cache),
                // Keys and values are there already, of this step's tokens too.
                (Some(_), Some(angles)) => {
                    cpu.rope(Rope { queries: qkv, angles, heads, head_dim: attention.head_dim });
                }
                (Some(_), None) => {}
            }
            cpu.attention(AttentionCall {
                q: qkv,
                stride,
                out: &mut out[first * attention.q_width()..],
                cache,
                rows,
                heads: attention.heads,
                scale: attention.scale,
                softcap: attention.softcap,
                mask: attention.mask,
            });
        };
        let Some(sequence) = sequence else {
            attend(0, rows, cache.of_mut(index).ok_or(StepError::Weights)?);
            return Ok(());
        };
        // Nothing is kept: one sequence's keys and values at a time are enough.
        let mut first = 0;
        for row in *rows {
            attend(first, &[BatchRow { blocks, ..*row }], sequence);
            first += row.count as usize;
        }
        Ok(())
    }

    fn up(&mut self, ffn: Ffn, block: &Block) -> Result<(), StepError> {
        let slot = if matches!(ffn, Ffn::Plain(_)) { Slot::Up } else { Slot::GateUp };
        let Workspace { normed, up, packed, .. } = &mut *self.work;
        let product = block.product(slot, 0)?;
        let (mlp, up) = (ffn.mlp(), &mut up[..self.tokens * ffn.up_width()]);
        self.cpu.linear(Linear {
            weight: &product.matrix,
            bias: product.bias.as_deref(),
            x: Rows { data: normed, stride: self.tower.width, count: self.tokens },
            packed,
            out: up,
            output: Output::Store,
        });
        match ffn {
            Ffn::Plain(_) => self.cpu.activate(Activate { act: mlp.act, x: up }),
            _ => self.cpu.gate_mul(GateMul { act: mlp.act, gate_up: up, width: mlp.inner }),
        }
        Ok(())
    }

    // Each expert computes the rows that chose it; what they yield is added up by ascending expert, so a token's bits
    // depend on nobody else's choice.
    fn experts(&mut self, flow: Flow, moe: Moe, block: &Block) -> Result<(), StepError> {
        let (tokens, width, inner) = (self.tokens, self.tower.width, moe.mlp.inner);
        let Workspace { residual, normed, up, packed, experts: Some(scratch), .. } = &mut *self.work else {
            return Err(StepError::Weights);
        };
        let router = block.product(Slot::Router, 0)?;
        self.cpu.linear(Linear {
            weight: &router.matrix,
            bias: router.bias.as_deref(),
            x: Rows { data: normed, stride: width, count: tokens },
            packed,
            out: &mut scratch.logits,
            output: Output::Store,
        });
        let chosen = &mut scratch.chosen[..tokens * moe.active];
        let shares = &mut scratch.shares[..tokens * moe.active];
        Route {
            logits: &mut scratch.logits[..tokens * moe.experts],
            experts: moe.experts,
            normalize: moe.normalize,
            chosen: &mut *chosen,
            shares: &mut *shares,
            active: moe.active,
        }
        .run();
        let sum = &mut scratch.sum[..tokens * width];
        sum.fill(0.0);
        for expert in 0..moe.experts {
            let takers = || (0..chosen.len()).filter(|i| chosen[*i] as usize == expert);
            let mut count = 0;
            for (i, row) in takers().zip(scratch.rows.chunks_exact_mut(width)) {
                row.copy_from_slice(&normed[i / moe.active * width..][..width]);
                count += 1;
            }
            if count == 0 {
                continue;
            }
            let (first, down) = (block.product(Slot::GateUp, expert)?, block.product(Slot::Down, expert)?);
            self.cpu.linear(Linear {
                weight: &first.matrix,
                bias: first.bias.as_deref(),
                x: Rows { data: &scratch.rows, stride: width, count },
                packed,
                out: up,
                output: Output::Store,
            });
            let gate_up = &mut up[..count * 2 * inner];
            self.cpu.gate_mul(GateMul { act: moe.mlp.act, gate_up, width: inner });
            self.cpu.linear(Linear {
                weight: &down.matrix,
                bias: down.bias.as_deref(),
                x: Rows { data: up, stride: 2 * inner, count },
                packed,
                out: &mut scratch.rows,
                output: Output::Store,
            });
            for (i, row) in takers().zip(scratch.rows.chunks_exact(width)) {
                let sum = &mut sum[i / moe.active * width..][..width];
                sum.iter_mut().zip(row).for_each(|(s, x)| *s += shares[i] * x);
            }
        }
        match flow {
            Flow::Sandwich(_) => normed[..sum.len()].copy_from_slice(sum),
            _ => residual.iter_mut().zip(&*sum).for_each(|(x, y)| *x = round_to(self.dtype, *x + y)),
        }
        Ok(())
    }
}
