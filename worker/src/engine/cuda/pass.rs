//! One step on its way through a stage on a GPU.

use super::{
    state::{Checked, Inputs, State},
    weights::{Block, NormWeights, Projection},
    workspace::{Experts, Scratch},
};
use crate::{
    engine::StepError,
    kernels::{
        buffer::round_to,
        cuda::{
            Gpu,
            launch::{Bytes, Kernels, RawMatrix, RawNorm, Routing, SharedExpert, Tables, follow, launch},
            memory::{self, Ptr},
            product::{Epilogue, Grouped, Linear, Matrix, Rows},
        },
        ops::{BatchRow, GROUP, Norm},
    },
    model::{
        architecture::{Attention, Ffn, Flow, Head, Moe, Router, Slot, Tower},
        layer::{Inner, Operations, layer},
    },
};

/// Threads of a block that walks over one row.
pub(super) const ROW_THREADS: u32 = 256;

/// One step. All its inputs have been checked, and are on the GPU.
pub(super) struct Pass<'a> {
    pub gpu: &'a Gpu,
    pub state: &'a State,
    pub tower: &'a Tower,
    pub tokens: usize,
    pub rows: &'a [BatchRow<'a>],
    pub inputs: Inputs,
    /// The input of the block that is under way.
    normed: Normed,
}

/// The input of a block.
#[derive(Clone, Copy)]
enum Normed {
    /// Rows that are there.
    Rows(Rows),
    /// A norm of the residual stream that has not been taken yet: a product of one row takes it itself.
    Pending(RawNorm),
}

impl<'a> Pass<'a> {
    pub fn new(
        gpu: &'a Gpu,
        state: &'a State,
        tower: &'a Tower,
        tokens: usize,
        rows: &'a [BatchRow<'a>],
        inputs: Inputs,
    ) -> Self {
        let normed = Normed::Rows(Rows::new(state.scratch.normed, tower.width));
        Pass { gpu, state, tower, tokens, rows, inputs, normed }
    }

    /// All kernels of a step.
    pub fn run(gpu: &Gpu, state: &State, step: &Checked<'_>, inputs: Inputs) -> Result<(), StepError> {
        let &Checked { weights, rows, tokens, .. } = step;
        let mut pass = Pass::new(gpu, state, step.tower(), tokens, rows, inputs);
        if let Some(block) = &weights.input {
            pass.embed(block, weights.output.as_ref())?;
        }
        pass.angles()?;
        for (i, block) in weights.layers.iter().enumerate() {
            layer(&mut pass, i, &step.tower().layers[weights.spec.layers.first as usize + i], block)?;
        }
        match &weights.output {
            Some(head) if step.outputs() > 0 => pass.finish(head, step.outputs()),
            _ => Ok(()),
        }
    }

    /// Any of the modules has the kernels that do not care for the width of a head.
    pub(super) fn kernels(&self) -> Result<&Kernels, StepError> {
        self.state.kernels.values().next().ok_or(StepError::Weights)
    }

    /// The residual stream of token ids. `tied` holds the embedding's rows if `block` does not.
    pub fn embed(&mut self, block: &Block, tied: Option<&Block>) -> Result<(), StepError> {
        let Inputs { ids, positions, segments, .. } = self.inputs;
        let input = self.tower.input;
        let tokens = match (block.table(Slot::Embedding), tied) {
            (Some(table), _) => table,
            (None, Some(head)) => head.product(Slot::Head, 0)?.matrix,
            (None, None) => return Err(StepError::Weights),
        };
        let table = |slot| block.table(slot).map_or((RawMatrix::default(), 0), |t| (t.raw(), t.number()));
        let (position_table, position_format) = table(Slot::Positions);
        let (segment_table, segment_format) = table(Slot::Segments);
        let tables = Tables {
            tokens: tokens.raw(),
            positions: position_table,
            segments: segment_table,
            token_format: tokens.number(),
            position_format,
            segment_format,
            first_position: input.positions.map_or(0, |learned| learned.first as i32),
            scale: round_to(self.state.element, input.scale),
        };
        let residual = self.state.scratch.residual;
        launch!(self.gpu, self.kernels()?.embed, (self.tokens as u32, 1, 1), ROW_THREADS, 0;
            residual, tables, ids, positions, segments)?;
        let Some(columns) = input.projected else {
            return input.norm.map_or(Ok(()), |norm| self.renorm(norm, block, Slot::InputNorm));
        };
        let normed = self.state.scratch.normed;
        let rows = match input.norm {
            Some(norm) => {
                let call =
                    NormCall { out: normed, x: residual, width: columns, index: Ptr::NULL, add: false };
                self.norm(raw_norm(norm, block.norm(Slot::InputNorm)?), self.tokens, call)?
            }
            None => {
                let bytes = (self.tokens * columns) as u64 * self.state.element.size();
                memory::copy(&self.gpu.stream, normed, residual, bytes)?;
                Rows::new(normed, columns)
            }
        };
        let product = block.product(Slot::InputProjection, 0)?;
        self.product(&product, self.tokens, rows, (residual, self.tower.width), Epilogue::Store)
    }

    /// Sine and cosine of every token, for each set of frequencies.
    pub fn angles(&mut self) -> Result<(), StepError> {
        let Scratch { angles, frequencies, .. } = &self.state.scratch;
        for ((rope, out), (inv_freq, factors)) in self.tower.ropes.iter().zip(angles).zip(frequencies) {
            let (pairs, sets) = (rope.pairs() as i32, rope.sets.len() as i32);
            launch!(self.gpu, self.kernels()?.angles, (self.tokens as u32, 1, 1), 64, 0;
                *out, inv_freq.ptr(), factors.ptr(), self.inputs.positions, self.inputs.sets, pairs, sets)?;
        }
        Ok(())
    }

    /// A norm of `rows` rows; those that `index` names, if it names any.
    fn norm(&self, norm: RawNorm, rows: usize, call: NormCall) -> Result<Rows, StepError> {
        let NormCall { out, x, width, index, add } = call;
        let written = Rows::new(out, width);
        // The product that follows, if it is one of quantized weights, takes whole groups.
        let to_bytes = self.state.is_quantized && width.is_multiple_of(GROUP) && !add;
        let bytes = match to_bytes {
            true => self.state.scratch.bytes.fill(written, rows, width),
            false => Bytes::default(),
        };
        follow!(self.gpu, self.kernels()?.norm_rows, (rows as u32, 1, 1), ROW_THREADS, 0;
            out, x, index, norm, width as i32, i32::from(add), bytes)?;
        Ok(written)
    }

    /// The input of the block, whose norm is taken now if it has not been yet.
    pub fn input(&mut self) -> Result<Rows, StepError> {
        let rows = match self.normed {
            Normed::Rows(rows) => rows,
            Normed::Pending(norm) => {
                let Scratch { residual, normed, .. } = self.state.scratch;
                let call = NormCall {
                    out: normed,
                    x: residual,
                    width: self.tower.width,
                    index: Ptr::NULL,
                    add: false,
                };
                self.norm(norm, self.tokens, call)?
            }
        };
        self.normed = Normed::Rows(rows);
        Ok(rows)
    }

    /// A product of the block's input.
    fn product_of_input(
        &mut self,
        product: &Projection,
        rows: usize,
        out: (Ptr, usize),
        epilogue: Epilogue,
    ) -> Result<(), StepError> {
        match self.normed {
            Normed::Pending(norm) if self.gpu.norms(self.kernels()?, &product.matrix, rows) => {
                let x = Rows::new(self.state.scratch.residual, self.tower.width);
                self.linear(&Linear { norm, ..self.call(product, rows, x, out, epilogue) })
            }
            _ => {
                let x = self.input()?;
                self.product(product, rows, x, out, epilogue)
            }
        }
    }

    fn linear(&self, call: &Linear<'_>) -> Result<(), StepError> {
        Ok(self.gpu.linear(self.kernels()?, call)?)
    }

    /// A product of rows that all go through one matrix; `out` is given with its rows' distance in elements.
    pub(super) fn product(
        &self,
        product: &Projection,
        rows: usize,
        x: Rows,
        (out, out_stride): (Ptr, usize),
        epilogue: Epilogue,
    ) -> Result<(), StepError> {
        self.linear(&self.call(product, rows, x, (out, out_stride), epilogue))
    }

    fn call<'b>(
        &'b self,
        product: &'b Projection,
        rows: usize,
        x: Rows,
        (out, out_stride): (Ptr, usize),
        epilogue: Epilogue,
    ) -> Linear<'b> {
        Linear {
            weight: &product.matrix,
            bias: product.bias,
            x,
            norm: RawNorm::default(),
            rows,
            out,
            out_stride,
            epilogue,
            grouped: None,
            bytes: &self.state.scratch.bytes,
        }
    }

    /// Final norm and head of the wanted tokens.
    pub fn finish(&mut self, block: &Block, outputs: usize) -> Result<(), StepError> {
        let Scratch { residual, normed, values, .. } = self.state.scratch;
        let (tower, width) = (self.tower, self.tower.width);
        if let Head::Embed(embedding) = &tower.head {
            self.final_norm(block, self.tokens, Ptr::NULL)?;
            return self.embed_sequences(embedding, block, outputs);
        }
        if let (Head::Lm { .. }, Some(norm), 1) = (&tower.head, tower.norm, self.tokens) {
            // The only token is the only output.
            self.normed = Normed::Pending(raw_norm(norm, block.norm(Slot::FinalNorm)?));
        } else if let Some(pool) = tower.head.pooled_classes() {
            self.final_norm(block, self.tokens, Ptr::NULL)?;
            self.pool(&[pool], outputs)?;
            self.narrow(normed, values, outputs * width)?;
            self.normed = Normed::Rows(Rows::new(normed, width));
        } else {
            self.normed = Normed::Rows(self.final_norm(block, outputs, self.inputs.outputs)?);
        }
        let ((act, norm), inner) = (tower.head.before(), tower.head_width());
        let product = |slot, x, out, epilogue, out_stride| {
            let product = block.product(slot, 0)?;
            self.product(&product, outputs, x, (out, out_stride), epilogue)
        };
        // Of the residual stream, nothing is needed any more.
        if let (Some(act), Normed::Rows(x)) = (act, self.normed) {
            product(Slot::HeadDense, x, residual, Epilogue::Activated(act), inner)?;
            self.normed = Normed::Rows(Rows::new(residual, inner));
        }
        if let (Some(norm), Normed::Rows(x)) = (norm, self.normed) {
            let call = NormCall { out: normed, x: x.at, width: inner, index: Ptr::NULL, add: false };
            let norm = raw_norm(norm, block.norm(Slot::HeadNorm)?);
            self.normed = Normed::Rows(self.norm(norm, outputs, call)?);
        }
        let head = block.product(Slot::Head, 0)?;
        self.product_of_input(&head, outputs, (values, tower.outputs()), Epilogue::StoreValues)?;
        let Head::Lm { scale, softcap } = tower.head else { return Ok(()) };
        if scale != 1.0 || softcap.is_some() {
            let count = outputs * tower.vocab;
            launch!(self.gpu, self.kernels()?.soft_cap, (count.div_ceil(256) as u32, 1, 1), 256, 0;
                values, count as u64, scale, softcap.unwrap_or(0.0))?;
        }
        Ok(())
    }

    /// Final norm of `count` rows of the residual stream, those that `index` names if it is not null, into `normed`.
    fn final_norm(&self, block: &Block, count: usize, index: Ptr) -> Result<Rows, StepError> {
        let Scratch { residual, normed, .. } = self.state.scratch;
        match self.tower.norm {
            Some(norm) => {
                let call = NormCall { out: normed, x: residual, width: self.tower.width, index, add: false };
                self.norm(raw_norm(norm, block.norm(Slot::FinalNorm)?), count, call)
            }
            None => {
                launch!(self.gpu, self.kernels()?.gather_rows, (count as u32, 1, 1), ROW_THREADS, 0;
                    normed, residual, index, self.tower.width as i32)?;
                Ok(Rows::new(normed, self.tower.width))
            }
        }
    }
}

/// Mixtures of experts.
impl Pass<'_> {
    fn routing(&self, moe: Moe, block: &Block) -> Result<Routing, StepError> {
        let plain = Routing {
            experts: moe.experts as i32,
            active: moe.active as i32,
            normalize: i32::from(moe.normalize),
            scale: moe.scale,
            ..Routing::default()
        };
        Ok(match moe.router {
            Router::Softmax => plain,
            Router::Sigmoid { groups, kept } => {
                let correction = block.norm(Slot::RouterCorrection)?.weight;
                Routing { correction, groups: groups as i32, kept: kept as i32, ..plain }
            }
        })
    }

    /// What the expert that every token goes through yields, into rows that attention needs no more; and the logits of its
    /// gates.
    fn shared_expert(
        &self,
        moe: Moe,
        block: &Block,
        input: Rows,
        (rows, gates): (Ptr, Ptr),
    ) -> Result<SharedExpert, StepError> {
        let Some(shared) = moe.shared else { return Ok(SharedExpert::default()) };
        let (tokens, up) = (self.tokens, self.state.scratch.up);
        let product =
            |slot, x, out, epilogue| self.product(&block.product(slot, 0)?, tokens, x, out, epilogue);
        let inner = 2 * shared.inner;
        product(Slot::SharedGateUp, input, (up, inner), Epilogue::Gated(moe.mlp.act))?;
        product(Slot::SharedDown, Rows::new(up, inner), (rows, self.tower.width), Epilogue::Store)?;
        if !shared.gated {
            return Ok(SharedExpert { rows, gates: Ptr::NULL });
        }
        product(Slot::SharedRouter, input, (gates, 1), Epilogue::StoreValues)?;
        Ok(SharedExpert { rows, gates })
    }
}

/// What a norm reads and writes.
struct NormCall {
    out: Ptr,
    x: Ptr,
    width: usize,
    index: Ptr,
    add: bool,
}

pub(super) fn raw_norm(norm: Norm, NormWeights { weight, bias }: NormWeights) -> RawNorm {
    let (epsilon, centred) = match norm {
        Norm::Rms(epsilon) => (epsilon, 0),
        Norm::Layer(epsilon) => (epsilon, 1),
    };
    RawNorm { weight, bias, epsilon, centred }
}

impl Operations for Pass<'_> {
    type Block = Block;
    type Error = StepError;

    fn enter(&mut self, flow: Flow, block: &Block, slot: Slot) -> Result<(), StepError> {
        let Scratch { residual, normed, .. } = self.state.scratch;
        if flow.is_bare(slot) {
            let width = self.tower.width;
            let bytes = (self.tokens * width) as u64 * self.state.element.size();
            memory::copy(&self.gpu.stream, normed, residual, bytes)?;
            self.normed = Normed::Rows(Rows::new(normed, width));
            return Ok(());
        }
        self.normed = Normed::Pending(raw_norm(flow.norm(), block.norm(slot)?));
        if matches!(flow, Flow::ParallelOne(_) | Flow::ParallelTwo(_)) {
            // The residual stream changes before all of the block has read its norm.
            self.input()?;
        }
        Ok(())
    }

    fn attend(&mut self, attention: &Attention, index: usize, block: &Block) -> Result<(), StepError> {
        let product = block.product(Slot::Qkv, 0)?;
        let out = (self.state.scratch.qkv, attention.qkv_width());
        self.product_of_input(&product, self.tokens, out, Epilogue::Store)?;
        self.place(attention, index, block)?;
        self.attend_rows(attention, index, block)
    }

    fn up(&mut self, ffn: Ffn, block: &Block) -> Result<(), StepError> {
        let act = ffn.mlp().act;
        let (slot, epilogue) = match ffn {
            Ffn::Plain(_) => (Slot::Up, Epilogue::Activated(act)),
            _ => (Slot::GateUp, Epilogue::Gated(act)),
        };
        let product = block.product(slot, 0)?;
        let out = (self.state.scratch.up, ffn.up_width());
        self.product_of_input(&product, self.tokens, out, epilogue)
    }

    // As many tokens at a time as their pairs of token and expert have room for.
    fn experts(&mut self, flow: Flow, moe: Moe, block: &Block) -> Result<(), StepError> {
        let Scratch { residual, normed, attention, up, ref bytes, tokens: room, ref experts, .. } =
            self.state.scratch;
        let Some(Experts { logits, chosen, shares, gates, order, tasks, pairs }) = experts else {
            return Err(StepError::Weights);
        };
        let (width, size, up_width) = (self.tower.width, self.state.element.size(), Ffn::Moe(moe).up_width());
        let (first, down) = (Stacked::of(block, Slot::GateUp)?, Stacked::of(block, Slot::Down)?);
        let router = block.product(Slot::Router, 0)?;
        let routing = self.routing(moe, block)?;
        let input = self.input()?;
        let shared = self.shared_expert(moe, block, input, (attention, *gates))?;
        let kernels = self.kernels()?;
        let at_once = (room / moe.active).max(1);
        for begin in (0..self.tokens).step_by(at_once) {
            let tokens = at_once.min(self.tokens - begin);
            let count = tokens * moe.active;
            let x = input.skip(begin, size);
            self.product(&router, tokens, x, (*logits, moe.experts), Epilogue::StoreValues)?;
            launch!(self.gpu, kernels.route, (tokens.div_ceil(4) as u32, 1, 1), 128, 0;
                *logits, *chosen, *shares, tokens as i32, routing)?;
            let groups = self.gpu.group(kernels, (*chosen, count), moe.experts, (*order, *tasks))?;
            let grouped = |divide, strides| Some(Grouped { groups, divide, strides });
            self.linear(&Linear {
                weight: &first.matrix,
                bias: first.bias,
                x,
                norm: RawNorm::default(),
                rows: count,
                out: up,
                out_stride: up_width,
                epilogue: Epilogue::Gated(moe.mlp.act),
                grouped: grouped(moe.active, first.strides),
                bytes,
            })?;
            self.linear(&Linear {
                weight: &down.matrix,
                bias: down.bias,
                x: Rows::new(up, up_width),
                norm: RawNorm::default(),
                rows: count,
                out: *pairs,
                out_stride: width,
                epilogue: Epilogue::Store,
                grouped: grouped(1, down.strides),
                bytes,
            })?;
            let beside = flow.yields_beside();
            let out = if beside { normed } else { residual }.offset((begin * width) as u64 * size);
            let shared = shared.skip(begin, (width as u64 * size, 4));
            let grid = (width.div_ceil(256) as u32, tokens as u32, 1);
            launch!(self.gpu, kernels.combine_experts, grid, 256, 0;
                out, *pairs, *shares, shared, moe.active as i32, width as i32, i32::from(!beside))?;
        }
        Ok(())
    }

    fn project(&mut self, flow: Flow, from: Inner<'_>, block: &Block) -> Result<(), StepError> {
        let Scratch { residual, normed, attention, up, .. } = self.state.scratch;
        let (slot, x) = match from {
            Inner::Attention(a) => (Slot::AttentionOut, Rows::new(attention, a.q_width())),
            Inner::Up(ffn) => (Slot::Down, Rows::new(up, ffn.up_width())),
        };
        let (out, epilogue) = match flow.yields_beside() {
            true => (normed, Epilogue::Store),
            false => (residual, Epilogue::Add),
        };
        let product = block.product(slot, 0)?;
        self.product(&product, self.tokens, x, (out, self.tower.width), epilogue)
    }

    fn add_normed(&mut self, norm: Norm, block: &Block, slot: Slot) -> Result<(), StepError> {
        let Scratch { residual, normed, .. } = self.state.scratch;
        let call =
            NormCall { out: residual, x: normed, width: self.tower.width, index: Ptr::NULL, add: true };
        self.norm(raw_norm(norm, block.norm(slot)?), self.tokens, call)?;
        Ok(())
    }

    fn add_scaled(&mut self, factor: f32) -> Result<(), StepError> {
        let Scratch { residual, normed, .. } = self.state.scratch;
        let count = self.tokens * self.tower.width;
        launch!(self.gpu, self.kernels()?.add_scaled, (count.div_ceil(256) as u32, 1, 1), 256, 0;
            residual, normed, count as u64, factor)?;
        Ok(())
    }

    fn renorm(&mut self, norm: Norm, block: &Block, slot: Slot) -> Result<(), StepError> {
        let residual = self.state.scratch.residual;
        let call =
            NormCall { out: residual, x: residual, width: self.tower.width, index: Ptr::NULL, add: false };
        self.norm(raw_norm(norm, block.norm(slot)?), self.tokens, call)?;
        Ok(())
    }
}

/// The experts' matrices of one slot, which lie at equal distances.
struct Stacked {
    matrix: Matrix,
    bias: Ptr,
    strides: [u64; 3],
}

impl Stacked {
    fn of(block: &Block, slot: Slot) -> Result<Self, StepError> {
        let first = block.product(slot, 0)?;
        // With one expert, there is no distance.
        let next = block.product(slot, 1).unwrap_or(first);
        let strides = [
            next.matrix.values.0 - first.matrix.values.0,
            next.matrix.factors.0 - first.matrix.factors.0,
            next.bias.0 - first.bias.0,
        ];
        Ok(Stacked { matrix: first.matrix, bias: first.bias, strides })
    }
}
