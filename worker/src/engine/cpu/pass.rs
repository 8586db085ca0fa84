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
            attention::{Addends, Attention as AttentionCall, Distant},
            kv_cache::KvLayer,
            linear::{Linear, Output, Rows},
            moe::Route,
            norm::{Activate, GateMul, HeadNorm, NormRows, SoftCap},
            packed::Table,
            rope::{self, Angles, Rope, RopeAndStore, Sharpen},
        },
        ops::{BLOCK_TOKENS, BatchRow, bucket},
    },
    model::{
        architecture::{
            Act, Attention, Distances, Ffn, Flow, Head, Input, Moe, Norm, NormOver, Position, QkNorm, Router,
            Slot, Tower,
        },
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
        let (width, input, dtype) = (self.tower.table_width(), self.tower.input, self.dtype);
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
            self.renorm_rows((norm, width), block, Slot::InputNorm)?;
        }
        if input.projected.is_some() { self.project_input(width, block) } else { Ok(()) }
    }

    /// The residual stream of rows of another width, in its place.
    fn project_input(&mut self, columns: usize, block: &Block) -> Result<(), StepError> {
        let Workspace { residual, normed, packed, .. } = &mut *self.work;
        let len = self.tokens * columns;
        normed[..len].copy_from_slice(&residual[..len]);
        let product = block.product(Slot::InputProjection, 0)?;
        self.cpu.linear(Linear {
            weight: &product.matrix,
            bias: product.bias.as_deref(),
            x: Rows { data: normed, stride: columns, count: self.tokens },
            packed,
            out: residual,
            output: Output::Store,
        });
        let rows = &mut residual[..self.tokens * self.tower.width];
        rows.iter_mut().for_each(|x| *x = round_to(self.dtype, *x));
        Ok(())
    }

    /// A norm of rows of the residual stream that are so wide, in their place.
    fn renorm_rows(
        &mut self,
        (norm, width): (Norm, usize),
        block: &Block,
        slot: Slot,
    ) -> Result<(), StepError> {
        let NormWeights { weight, bias } = block.norm(slot)?;
        let Workspace { residual, normed, .. } = &mut *self.work;
        let len = self.tokens * width;
        let x = Rows { data: residual, stride: width, count: self.tokens };
        let (bias, output) = (bias.as_deref(), Output::StoreRounded(self.dtype));
        self.cpu.norm(NormRows { norm, x, weight, bias, out: normed, output });
        residual[..len].copy_from_slice(&normed[..len]);
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
            let x = Rows { data: x, stride: matrix.k(), count: outputs.len() };
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
        let width = tower.head_width();
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
        if let Head::Lm { scale, softcap: cap } = tower.head {
            cpu.soft_cap(SoftCap { scale, cap, x: &mut values[..outputs.len() * tower.vocab] });
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

    fn add_scaled(&mut self, factor: f32) -> Result<(), StepError> {
        let Workspace { residual, normed, .. } = &mut *self.work;
        let rows = residual.iter_mut().zip(&normed[..self.tokens * self.tower.width]);
        rows.for_each(|(x, y)| *x = round_to(self.dtype, *x + factor * y));
        Ok(())
    }

    fn renorm(&mut self, norm: Norm, block: &Block, slot: Slot) -> Result<(), StepError> {
        self.renorm_rows((norm, self.tower.width), block, slot)
    }

    fn project(&mut self, flow: Flow, from: Inner<'_>, block: &Block) -> Result<(), StepError> {
        let Workspace { residual, normed, attention, up, packed, .. } = &mut *self.work;
        let (slot, data, stride): (_, &[f32], _) = match from {
            Inner::Attention(a) => (Slot::AttentionOut, attention, a.q_width()),
            Inner::Up(ffn) => (Slot::Down, up, ffn.up_width()),
        };
        let product = block.product(slot, 0)?;
        let (out, output) = match flow.yields_beside() {
            true => (normed, Output::Store),
            false => (residual, Output::AddRounded(self.dtype)),
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
        let Workspace {
            normed,
            qkv,
            attention: out,
            packed,
            angles,
            addends,
            distances,
            sequence,
            blocks,
            ..
        } = &mut **work;
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
        let norms = attention.qk_norm.map(|norm| qk_norms(norm, attention, block)).transpose()?;
        let norm_heads = |qkv: &mut [f32], turned: bool| {
            let Some(norms) = norms.as_ref().filter(|norms| norms.turned == turned) else { return };
            cpu.head_norm(HeadNorm {
                norm: norms.norm,
                qkv,
                stride,
                widths: norms.widths,
                spans: norms.spans,
                weights: norms.weights.map(|norm| &*norm.weight),
                biases: norms.weights.map(|norm| norm.bias.as_deref()),
            });
        };
        norm_heads(qkv, false);
        if let Some(most) = attention.clip {
            qkv.iter_mut().for_each(|x| *x = x.clamp(-most, most));
        }
        let (mut by_bucket, mut distant, mut slopes) = (None, None, None);
        match attention.position {
            Position::Buckets => by_bucket = Some(by_distance(rows, attention.heads, block, addends)?),
            Position::Distances(kind) => {
                let scratch = (&mut **packed, &mut **distances, &mut **addends);
                distant = Some(at_distances(cpu, rows, (attention, kind), block, scratch)?);
            }
            Position::Slopes(of) => slopes = Some(of),
            Position::None | Position::Rope(_) => {}
        }
        let mut attend = |first: usize, rows: &[BatchRow<'_>], cache: &mut KvLayer| {
            // No other row's: what is turned once must not be turned again.
            let count: usize = rows.iter().map(|row| row.count as usize).sum();
            let qkv = &mut qkv[first * stride..(first + count) * stride];
            let mut angles = match attention.position {
                Position::None | Position::Buckets | Position::Distances(_) | Position::Slopes(_) => None,
                Position::Rope(set) => {
                    let (table, stride) = &angles[set];
                    let pairs = tower.ropes[set].pairs();
                    Some(Angles { table: &table[first * stride..], stride: *stride, pairs })
                }
            };
            let (heads, head_dim) = (attention.heads, attention.head_dim);
            if let (Some(angles), Some(norms)) = (angles, norms.as_ref().filter(|norms| norms.turned)) {
                let heads = norms.widths.iter().sum::<usize>() / head_dim;
                cpu.rope(Rope { qkv, stride, angles, heads, head_dim });
            }
            if norms.as_ref().is_some_and(|norms| norms.turned) {
                norm_heads(qkv, true);
                angles = None;
            }
            match (attention.shares, angles) {
                (None, angles) => cpu.rope_and_store(RopeAndStore { qkv, angles, heads, rows }, cache),
                // Keys and values are there already, of this step's tokens too.
                (Some(_), Some(angles)) => {
                    cpu.rope(Rope { qkv, stride, angles, heads, head_dim });
                }
                (Some(_), None) => {}
            }
            if let Position::Rope(set) = attention.position
                && let Some(sharpening) = &tower.ropes[set].sharpening
            {
                let factors = (sharpening.period, &*sharpening.factors);
                Sharpen { qkv, stride, width: attention.q_width(), factors, rows }.run();
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
                addends: by_bucket,
                distant,
                slopes,
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
        let sum = &mut scratch.sum[..tokens * width];
        match moe.shared {
            None => sum.fill(0.0),
            Some(shared) => {
                let mut product = |slot, x, out: &mut [f32]| {
                    let Projection { matrix, bias } = block.product(slot, 0)?;
                    let (bias, output) = (bias.as_deref(), Output::Store);
                    self.cpu.linear(Linear { weight: matrix, bias, x, packed, out, output });
                    Ok::<_, StepError>(())
                };
                let x = Rows { data: normed, stride: width, count: tokens };
                product(Slot::SharedGateUp, x, up)?;
                let gate_up = &mut up[..tokens * 2 * shared.inner];
                self.cpu.gate_mul(GateMul { act: moe.mlp.act, gate_up, width: shared.inner });
                product(Slot::SharedDown, Rows { data: up, stride: 2 * shared.inner, count: tokens }, sum)?;
                if shared.gated {
                    product(Slot::SharedRouter, x, &mut scratch.logits)?;
                    let gates = &mut scratch.logits[..tokens];
                    self.cpu.activate(Activate { act: Act::Sigmoid, x: gates });
                    let rows = sum.chunks_exact_mut(width).zip(gates);
                    rows.for_each(|(row, gate)| row.iter_mut().for_each(|x| *x *= *gate));
                }
            }
        }
        let correction = match moe.router {
            Router::Softmax => None,
            Router::Sigmoid { .. } => Some(&*block.norm(Slot::RouterCorrection)?.weight),
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
            router: moe.router,
            correction,
            normalize: moe.normalize,
            scale: moe.scale,
            chosen: &mut *chosen,
            shares: &mut *shares,
            active: moe.active,
        }
        .run();
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
        match flow.yields_beside() {
            true => normed[..sum.len()].copy_from_slice(sum),
            false => residual.iter_mut().zip(&*sum).for_each(|(x, y)| *x = round_to(self.dtype, *x + y)),
        }
        Ok(())
    }
}

/// What is added to the scores of each head by the distance of query and key, as far as the longest row needs it.
fn by_distance<'a>(
    rows: &[BatchRow<'_>],
    heads: usize,
    block: &Block,
    to: &'a mut [f32],
) -> Result<Addends<'a>, StepError> {
    let table = block.table(Slot::PositionBias).ok_or(StepError::Weights)?;
    let longest = rows.iter().map(|row| row.count as usize).max().unwrap_or(0);
    let reach = longest.next_multiple_of(BLOCK_TOKENS);
    let (values, of_bucket) = to.split_at_mut(2 * reach * heads);
    let of_bucket = &mut of_bucket[..heads];
    for distance in 0..2 * reach {
        // From a query at `reach` to a key that far away.
        table.gather(bucket(reach, distance), of_bucket);
        let columns = values.iter_mut().skip(distance).step_by(2 * reach);
        columns.zip(&*of_bucket).for_each(|(to, from)| *to = *from);
    }
    Ok(Addends { table: values, reach })
}

/// Queries and keys that the layer makes of the vectors for distances, as far as the longest row needs them. The scratch is for
/// inputs of products, for rows, and for what is spread out by distance.
fn at_distances<'a>(
    cpu: &Cpu,
    rows: &[BatchRow<'_>],
    (attention, distances): (&Attention, Distances),
    block: &Block,
    (packed, scratch, to): (&mut [u32], &mut [f32], &'a mut [f32]),
) -> Result<Distant<'a>, StepError> {
    let table = block.table(Slot::Distances).ok_or(StepError::Weights)?;
    let product = block.product(Slot::Qkv, 0)?;
    let (width, stride) = (product.matrix.k(), attention.qkv_width());
    let longest = rows.iter().map(|row| row.count as usize).max().unwrap_or(1);
    let reach = longest.next_multiple_of(BLOCK_TOKENS);
    let (first, last) = (distances.row(0, longest - 1), distances.row(longest - 1, 0));
    let (vectors, made) = scratch.split_at_mut(2 * reach * width);
    for (row, out) in (first..=last).zip(made.chunks_exact_mut(width)) {
        table.gather(row, out);
    }
    let count = last + 1 - first;
    match distances.norm {
        None => vectors[..count * width].copy_from_slice(&made[..count * width]),
        Some(norm) => {
            let NormWeights { weight, bias } = block.norm(Slot::DistanceNorm)?;
            let x = Rows { data: made, stride: width, count };
            let bias = bias.as_deref();
            cpu.norm(NormRows { norm, x, weight, bias, out: &mut *vectors, output: Output::Store });
        }
    }
    // No more rows at a time than a step may have tokens.
    for (x, out) in vectors[..count * width].chunks(reach * width).zip(made.chunks_mut(reach * stride)) {
        cpu.linear(Linear {
            weight: &product.matrix,
            bias: product.bias.as_deref(),
            x: Rows { data: x, stride: width, count: x.len() / width },
            packed,
            out,
            output: Output::Store,
        });
    }
    let row_of = |query, key| distances.row(query, key).clamp(first, last) - first;
    Ok(Distant::spread(cpu, (&*made, stride), row_of, (attention.q_width(), reach), to))
}

/// Norms of queries and keys, and how much each is taken of.
struct QkNorms<'a> {
    norm: Norm,
    turned: bool,
    widths: [usize; 2],
    spans: [usize; 2],
    weights: [&'a NormWeights; 2],
}

fn qk_norms<'a>(qk: QkNorm, attention: &Attention, block: &'a Block) -> Result<QkNorms<'a>, StepError> {
    let query = block.norm(Slot::QueryNorm)?;
    let (key, keys) = match attention.shares {
        None => (block.norm(Slot::KeyNorm)?, attention.kv_width()),
        Some(_) => (query, 0),
    };
    let widths = [attention.q_width(), keys];
    let spans = match qk.over {
        NormOver::Head | NormOver::EachHead => [attention.head_dim; 2],
        NormOver::All => widths.map(|width| width.max(1)),
    };
    Ok(QkNorms { norm: qk.norm, turned: qk.turned, widths, spans, weights: [query, key] })
}
