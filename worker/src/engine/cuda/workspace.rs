//! Scratch memory of a stage on a GPU, as `model/widths.rs` counts it.

use crate::{
    engine::Limits,
    kernels::cuda::{
        CudaError, Gpu,
        launch::Bytes,
        limits::PARTIALS,
        memory::{self, Arena, Memory, Ptr},
        product::{RowBytes, TASK_BYTES},
    },
    model::{
        ModelError,
        architecture::{Position, Tower},
        widths::{self, Widths},
    },
};

/// Scratch of a stage.
pub(super) struct Scratch {
    /// `(tokens, width)`, like all rows but those said to be otherwise in the plan's format.
    pub residual: Ptr,
    pub normed: Ptr,
    pub qkv: Ptr,
    pub attention: Ptr,
    pub up: Ptr,
    /// Cosines and sines in f32, per set of frequencies; and the sets themselves.
    pub angles: Vec<Ptr>,
    pub frequencies: Vec<(Memory, Memory)>,
    /// Rows as bytes, where weights are quantized.
    pub bytes: RowBytes,
    pub experts: Option<Experts>,
    pub distances: Option<AtDistance>,
    /// `(outputs, values)` in f32.
    pub values: Ptr,
    /// Vectors of sequences, on their way to values.
    pub vectors: Ptr,
    pub partials: Ptr,
    /// Rows that there is room for.
    pub tokens: usize,
    _elsewhere: [Memory; 2],
}

/// Scratch of a mixture of experts.
pub(super) struct Experts {
    pub logits: Ptr,
    pub chosen: Ptr,
    pub shares: Ptr,
    /// `(tokens)`: logits of the shared expert's gates.
    pub gates: Ptr,
    /// Pairs by expert, and tasks of them; as many as there are pairs.
    pub order: Ptr,
    pub tasks: Ptr,
    /// `(pairs, width)`, as many pairs as tokens.
    pub pairs: Ptr,
}

/// Scratch for what stands for distances.
pub(super) struct AtDistance {
    /// `(2 * tokens, width)`.
    pub vectors: Ptr,
    /// `(2 * tokens, qkv)`.
    pub rows: Ptr,
    /// Which vector is that of a query so far behind a key, from minus the context on: as many as positions, twice.
    pub rows_of: Memory,
}

impl Scratch {
    /// Cut from `memory`, as much of it as is left; what does not grow with a step is from elsewhere.
    pub fn new(gpu: &Gpu, tower: &Tower, limits: &Limits, memory: &mut Arena) -> Result<Self, ModelError> {
        let (element, outputs) = (limits.spec.dtype, limits.max_outputs as usize);
        let partials = Memory::new(&gpu.context, PARTIALS)?;
        let meets = limits.spec.quantization.is_some() || Widths::of(tower).experts.is_some();
        let elsewhere = if meets { RowBytes::ELSEWHERE } else { 0 };
        let elsewhere = Memory::new(&gpu.context, elsewhere)?;
        let widths = Widths::of(tower);
        let values = widths.values();
        let Widths { residual, qkv, attention, up, angles, vectors, experts, input, .. } = widths;
        let tokens = widths::padded(limits.max_tokens);
        let mut rows = |width: usize, size: u64| memory.take((tokens * width) as u64 * size);
        let size = element.size();
        let experts = experts.map(|(all, active)| {
            Ok::<_, CudaError>(Experts {
                logits: rows(all, 4)?,
                chosen: rows(active, 4)?,
                shares: rows(active, 4)?,
                gates: rows(1, 4)?,
                order: rows(1, 4)?,
                tasks: rows(1, TASK_BYTES)?,
                pairs: rows(residual, size)?,
            })
        });
        let mut frequencies = Vec::new();
        for rope in &tower.ropes {
            let inv_freq: Vec<f32> = rope.sets.iter().flat_map(|set| set.inv_freq.iter().copied()).collect();
            let factors: Vec<f32> = rope.sets.iter().map(|set| set.factor).collect();
            let upload = |values: &[f32]| {
                let memory = Memory::new(&gpu.context, 4 * values.len() as u64)?;
                memory::upload(&gpu.stream, memory.ptr(), values)?;
                gpu.wait()?;
                Ok::<_, CudaError>(memory)
            };
            frequencies.push((upload(&inv_freq)?, upload(&factors)?));
        }
        let distances = tower.layers.iter().find_map(|layer| match layer.attention.position {
            Position::Distances(distances) => Some((distances, layer.attention.qkv_width())),
            _ => None,
        });
        let distances = distances.map(|(distances, qkv)| {
            let context = tower.context;
            let of = |at: usize| distances.row(at, context) as u32;
            let rows_of: Vec<u32> = (0..2 * context).map(of).collect();
            let memory = Memory::new(&gpu.context, 4 * rows_of.len() as u64)?;
            memory::upload(&gpu.stream, memory.ptr(), &rows_of)?;
            gpu.wait()?;
            let (vectors, rows) = (rows(2 * tower.width, size)?, rows(2 * qkv, size)?);
            Ok::<_, CudaError>(AtDistance { vectors, rows, rows_of: memory })
        });
        let distances = distances.transpose()?;
        let groups = input.div_ceil(32);
        Ok(Scratch {
            residual: rows(residual, size)?,
            normed: rows(residual, size)?,
            qkv: rows(qkv, size)?,
            attention: rows(attention, size)?,
            up: rows(up, size)?,
            angles: angles.iter().map(|width| rows(*width, 4)).collect::<Result<_, _>>()?,
            frequencies,
            bytes: RowBytes::new(
                Bytes { values: rows(groups * 32, 1)?, factors: rows(groups, 4)?, sums: rows(groups, 4)? },
                elsewhere.ptr(),
            ),
            experts: experts.transpose()?,
            distances,
            values: memory.take((outputs * values) as u64 * 4)?,
            vectors: memory.take((outputs * vectors) as u64 * 4)?,
            partials: partials.ptr(),
            tokens,
            _elsewhere: [partials, elsewhere],
        })
    }
}
