//! The weights of a stage on the CPU: packed in the plan's format while they are read, one piece at a time.
//!
//! Matrices are held in the plan's format, rounded to nearest even. Norms and biases stay f32 in every format, exactly
//! as the checkpoint has them: they are small, and nothing is gained by rounding them.
//!
//! All of a stage's weights lie side by side in one arena: in memory, on huge pages, or memory-mapped.

use std::{collections::BTreeMap, ops::ControlFlow, path::Path};

use strata_proto::{Format, WeightDigests};

use crate::{
    engine::StepError,
    kernels::{
        buffer::{Arena, Buffer, OutOfMemory},
        cpu::{
            Cpu,
            packed::{Elements, PackedMatrix, Table, Unrepresentable},
        },
    },
    model::{
        LoadedBytes, Model, ModelError, RangeSpec,
        architecture::{Shape, Site, Slot},
        bytes::{self, held},
        load::{Piece, read_tensors},
        names::{Bound, Layout},
    },
    weights::Checkpoint,
};

/// Weights of a product, `(n, k)`, and their bias.
pub(super) struct Projection {
    pub matrix: PackedMatrix,
    pub bias: Option<Buffer<f32>>,
}

/// Factors of a norm, and its bias.
pub(super) struct NormWeights {
    pub weight: Buffer<f32>,
    pub bias: Option<Buffer<f32>>,
}

/// What fills one slot.
enum Part {
    Norm(NormWeights),
    Table(Table),
    Product(Projection),
}

impl Part {
    fn zeros(shape: Shape, biased: bool, format: Format, arena: &mut Arena) -> Result<Self, OutOfMemory> {
        // A tensor without a bias beside one with a bias, in one slot, adds zero.
        let bias = |n, arena: &mut Arena| biased.then(|| arena.take(n)).transpose();
        Ok(match shape {
            Shape::Norm(n) => Part::Norm(NormWeights { weight: arena.take(n)?, bias: bias(n, arena)? }),
            Shape::Table(n, k) => Part::Table(Table::zeros(n, k, format, arena)?),
            Shape::Product(n, k) => Part::Product(Projection {
                matrix: PackedMatrix::zeros(n, k, format, arena)?,
                bias: bias(n, arena)?,
            }),
        })
    }

    fn bytes(&self) -> u64 {
        let bias = |bias: &Option<Buffer<f32>>| bias.as_ref().map_or(0, Buffer::bytes);
        match self {
            Part::Norm(norm) => norm.weight.bytes() + bias(&norm.bias),
            Part::Table(table) => table.bytes(),
            Part::Product(product) => product.matrix.bytes() + bias(&product.bias),
        }
    }

    fn write(&mut self, piece: &Piece<'_>, elements: &Elements<'_>) -> Result<(), Unrepresentable> {
        let &Piece { is_bias, rows, bound: &Bound { first_row, layout, .. }, .. } = piece;
        let &Elements { first, values, .. } = elements;
        let bias = |bias: &mut Option<Buffer<f32>>| {
            let values = (first..).zip(values);
            bias.iter_mut().for_each(|b| values.clone().for_each(|(i, x)| b[first_row + layout.row(i)] = *x));
            Ok(())
        };
        match self {
            Part::Norm(norm) if is_bias => bias(&mut norm.bias),
            Part::Norm(norm) => {
                let plus = if layout == Layout::PlusOne { 1.0 } else { 0.0 };
                let values = (first..).zip(values);
                values.for_each(|(i, x)| norm.weight[first_row + layout.row(i)] = x + plus);
                Ok(())
            }
            Part::Table(table) => table.write(elements),
            Part::Product(product) if is_bias => bias(&mut product.bias),
            Part::Product(product) => {
                let k = product.matrix.k();
                product.matrix.write(elements, |i| {
                    let (row, column) = layout.place(i, rows, k);
                    (first_row + row, column)
                })
            }
        }
    }
}

/// The weights of one site, by slot and expert.
pub(super) struct Block(BTreeMap<(Slot, usize), Part>);

impl Block {
    fn zeros(model: &Model, site: Site, spec: &RangeSpec, arena: &mut Arena) -> Result<Self, OutOfMemory> {
        let part = |(key, shape): (_, Shape)| {
            let biased = model.has_bias(site, key);
            let mut part = Part::zeros(shape, biased, held(model, site, key.0, spec.format()), arena)?;
            if let (Part::Norm(norm), []) = (&mut part, model.bound(site, key)) {
                norm.weight.fill(1.0);
            }
            Ok((key, part))
        };
        Ok(Block(spec.parts(model, site).map(part).collect::<Result<_, OutOfMemory>>()?))
    }

    fn bytes(&self) -> u64 {
        self.0.values().map(Part::bytes).sum()
    }

    /// The norm in `slot`.
    pub fn norm(&self, slot: Slot) -> Result<&NormWeights, StepError> {
        match self.0.get(&(slot, 0)) {
            Some(Part::Norm(norm)) => Ok(norm),
            _ => Err(StepError::Weights),
        }
    }

    /// The product in `slot`, of `expert` where there are several.
    pub fn product(&self, slot: Slot, expert: usize) -> Result<&Projection, StepError> {
        match self.0.get(&(slot, expert)) {
            Some(Part::Product(product)) => Ok(product),
            _ => Err(StepError::Weights),
        }
    }

    /// The table in `slot`, if it is here.
    pub fn table(&self, slot: Slot) -> Option<&Table> {
        match self.0.get(&(slot, 0)) {
            Some(Part::Table(table)) => Some(table),
            _ => None,
        }
    }
}

/// The weights of a stage, resident.
pub struct Weights {
    pub(super) model: Model,
    pub(super) spec: RangeSpec,
    /// Without the embedding's table if the head is here and the same: then rows are gathered from the packed head.
    pub(super) input: Option<Block>,
    pub(super) layers: Vec<Block>,
    pub(super) output: Option<Block>,
    digests: WeightDigests,
    /// Where all of them lie.
    memory: Arena,
}

impl Weights {
    /// Reads the tensors of a range, and no others, in the order of the files. `progress` is called after each piece
    /// and may stop the load. Beside the weights, three pieces are in memory; of a transposed tensor that is
    /// quantized, all of it; of one that the checkpoint has packed, its stored bytes. `cpu` quantizes, on all its threads.
    pub fn load(
        checkpoint: &Checkpoint,
        model: &Model,
        spec: &RangeSpec,
        cpu: &Cpu,
        progress: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
    ) -> Result<Self, ModelError> {
        Self::load_in(None, checkpoint, model, spec, cpu, progress)
    }

    /// As [`load`](Self::load), but the weights stay memory-mapped in a directory if one is given.
    pub fn load_in(
        spill: Option<&Path>,
        checkpoint: &Checkpoint,
        model: &Model,
        spec: &RangeSpec,
        cpu: &Cpu,
        progress: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
    ) -> Result<Self, ModelError> {
        let mut weights = Self::zeros(model, spec, spill)?;
        let mut buffer = Vec::new();
        let mut put = |piece: &Piece<'_>| {
            let part = weights.block(piece.site).and_then(|block| block.0.get_mut(&piece.key));
            let part = part.ok_or_else(|| piece.misplaced())?;
            let (values, groups) = piece.data.widened(cpu, &mut buffer)?;
            let elements = Elements { first: piece.first, total: piece.total, values, groups, cpu };
            Ok(part.write(piece, &elements)?)
        };
        weights.digests = read_tensors(checkpoint, model, spec, &mut put, progress)?;
        Ok(weights)
    }

    /// What it holds.
    pub fn spec(&self) -> &RangeSpec {
        &self.spec
    }

    /// The model it is a part of.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What was read from the files.
    pub fn digests(&self) -> &WeightDigests {
        &self.digests
    }

    /// All of it, side by side.
    pub(super) fn as_bytes(&self) -> &[u8] {
        // Whoever has `&self` has no buffer of it to write to.
        self.memory.as_bytes()
    }

    /// Bytes of memory it occupies: exactly what the model's profile says.
    pub fn resident_bytes(&self) -> u64 {
        self.input.iter().chain(&self.layers).chain(&self.output).map(Block::bytes).sum()
    }

    fn zeros(model: &Model, spec: &RangeSpec, spill: Option<&Path>) -> Result<Self, ModelError> {
        spec.check(model)?;
        let bytes = bytes::of_weights(model, spec);
        let mut arena = match spill {
            Some(directory) => Arena::mapped(bytes, directory)?,
            None => Arena::new(bytes)?,
        };
        let mut block = |site| Block::zeros(model, site, spec, &mut arena);
        let layers = spec.layers.first as usize..spec.layers.end as usize;
        Ok(Weights {
            model: model.clone(),
            spec: *spec,
            input: spec.embedding.then(|| block(Site::Input)).transpose()?,
            layers: layers.map(|l| block(Site::Layer(l))).collect::<Result<_, _>>()?,
            output: spec.head.then(|| block(Site::Output)).transpose()?,
            digests: WeightDigests::default(),
            memory: arena,
        })
    }

    fn block(&mut self, site: Site) -> Option<&mut Block> {
        match site {
            Site::Input => self.input.as_mut(),
            Site::Layer(layer) => self.layers.get_mut(layer.checked_sub(self.spec.layers.first as usize)?),
            Site::Output => self.output.as_mut(),
        }
    }
}
