//! Products with a matrix, by whichever way is fastest for their rows and format.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, Ordering},
};

use cudarc::driver::CudaFunction;
use strata_proto::{DType, Format, Quantization};

use super::{
    CudaError, Gemm, Gpu,
    launch::{
        Bytes, Kernels, Meeting, ONE_ROW_STATIC, RawMatrix, RawNorm, RawProduct, TILE_OUTPUTS, TILE_THREADS,
        TileFormat, element_number, follow, launch, one_row_rings, tile_bytes,
    },
    limits::UNPACKED,
    memory::Ptr,
};
use crate::kernels::ops::{Act, GROUP};

/// Most rows of one launch of `matvec_*`, which reads each weight once for them.
const MATVEC_ROWS: usize = 8;
/// Threads of a block of `matvec_*`: a warp per two outputs.
const MATVEC_THREADS: u32 = 256;
/// Blocks of `matvec_*_1` on a multiprocessor at a time, and warps of each: they take turns at the outputs.
const ONE_ROW_BLOCKS: u32 = 2;
const ONE_ROW_WARPS: usize = 8;
/// Threads of a block of `dequantize_*`, and how often each turns eight weights.
const DEQUANTIZE_THREADS: usize = 256;
const DEQUANTIZE_TURNS: usize = 4;
/// Most rows of a block of `tile_*`.
const TILE_ROWS: usize = 64;
/// Blocks of `tile_*` for a multiprocessor.
const TILE_BLOCKS: u32 = 2;

/// Most rows by which a product of weights in a format is one of `matvec_*`, rather than one on the tensor cores, where
/// there are any for it. Measured on an H200 (tests/gpu/results): tensor cores take as long for eight rows as for two;
/// f32 has none.
fn few_rows(format: Format) -> usize {
    match format {
        Format::Float(DType::F32) => 8,
        _ => 1,
    }
}

/// Rows from which on quantized weights are turned into elements for cuBLAS. Measured as above; in f32, where nothing
/// else takes more rows at a time than `matvec_*`.
fn unpack_from(element: DType, quantization: Quantization) -> usize {
    match (element, quantization) {
        (DType::F32, _) => MATVEC_ROWS + 1,
        (_, Quantization::Int8) => 192,
        (_, Quantization::Int4) => 320,
    }
}

/// A matrix `(n, k)` by rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    pub format: Format,
    pub n: usize,
    pub k: usize,
    pub values: Ptr,
    /// Of quantized formats.
    pub factors: Ptr,
}

impl Matrix {
    /// As kernels take it.
    pub fn raw(&self) -> RawMatrix {
        RawMatrix { values: self.values, factors: self.factors, n: self.n as i32, k: self.k as i32 }
    }

    /// Its format as the sources number it.
    pub fn number(&self) -> i32 {
        match self.format {
            Format::Float(dtype) => element_number(dtype),
            Format::Quantized(Quantization::Int8) => 3,
            Format::Quantized(Quantization::Int4) => 4,
        }
    }
}

/// What becomes of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// They are `out`.
    Store,
    /// They are added to `out`.
    Add,
    /// They are `out`, in f32.
    StoreValues,
    /// The first half of the outputs are gates of the others; `out` gets half as many.
    Gated(Act),
    /// `out` gets the activation of them.
    Activated(Act),
}

impl Epilogue {
    /// As the sources number it.
    fn number(self) -> i32 {
        match self {
            Epilogue::Store => 0,
            Epilogue::Add => 1,
            Epilogue::StoreValues => 2,
            Epilogue::Gated(_) => 3,
            Epilogue::Activated(_) => 4,
        }
    }

    fn act(self) -> Option<Act> {
        match self {
            Epilogue::Gated(act) | Epilogue::Activated(act) => Some(act),
            _ => None,
        }
    }
}

/// An activation as the sources number it.
pub(crate) fn act_number(act: Act) -> i32 {
    match act {
        Act::Silu => 0,
        Act::Gelu => 1,
        Act::GeluTanh => 2,
        Act::GeluQuick => 3,
        Act::Relu => 4,
        Act::Tanh => 5,
        Act::ReluSquared => 6,
        Act::Relu6 => 7,
        Act::LeakyRelu => 8,
        Act::Mish => 9,
        Act::Sigmoid => 10,
        Act::GeluClipped => 11,
        Act::Identity => 12,
    }
}

/// Rows that go through several matrices of one shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grouped {
    pub groups: Groups,
    /// Row `r` of these reads row `r / divide` of `x`.
    pub divide: usize,
    /// Bytes from matrix to matrix: of values, factors, bias.
    pub strides: [u64; 3],
}

/// Rows by the matrix that they go through, and a list of tasks of one matrix each; made by [`Gpu::group`]. Only the
/// GPU knows how many rows a matrix gets, so the list has as many places as there can be tasks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups {
    order: Ptr,
    tasks: Ptr,
    /// Most rows of a task, and places in the list.
    pub(super) task_rows: usize,
    pub(super) places: usize,
    /// Rows that a matrix gets, on average.
    rows_each: usize,
}

/// Bytes of a task in a list.
pub(crate) const TASK_BYTES: u64 = 12;

/// Rows that somebody wrote: where they are, and how many elements lie from one to the next. What is written to the
/// same place later are other rows: each writer makes a value of its own, and whoever reads the rows is given that
/// value.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub at: Ptr,
    pub stride: usize,
    /// Another number for all that was ever written.
    id: u64,
}

impl Rows {
    /// Rows that are written now.
    pub fn new(at: Ptr, stride: usize) -> Self {
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        Rows { at, stride, id: WRITTEN.fetch_add(1, Ordering::Relaxed) }
    }

    /// Those after the first `rows` of them; `size` is an element's bytes.
    pub fn skip(self, rows: usize, size: u64) -> Self {
        match rows {
            0 => self,
            _ => Rows::new(self.at.offset((rows * self.stride) as u64 * size), self.stride),
        }
    }
}

/// Room for rows as bytes, which products with quantized weights read. It holds those of one writing at a time, and
/// knows which.
pub(crate) struct RowBytes {
    room: Bytes,
    held: Cell<Option<Held>>,
    /// Room for weights as elements, for products of many rows; or for the sums of blocks that share outputs, and then
    /// for how many of those have come.
    elsewhere: Ptr,
}

/// What a room of bytes holds: the first `rows` rows of a writing, `k` elements of each.
#[derive(Debug, Clone, Copy)]
struct Held {
    id: u64,
    rows: usize,
    k: usize,
}

impl RowBytes {
    /// Bytes of room for what is not rows; the last [`RowBytes::ZEROS`] of them are zero.
    pub const ELSEWHERE: u64 = UNPACKED + Self::ZEROS;
    /// A word for each block of a launch of `tile_*` that can share outputs.
    pub const ZEROS: u64 = 16 << 10;

    pub fn new(room: Bytes, elsewhere: Ptr) -> Self {
        RowBytes { room, held: Cell::new(None), elsewhere }
    }

    fn meeting(&self) -> Meeting {
        Meeting { sums: self.elsewhere, arrived: self.elsewhere.offset(UNPACKED) }
    }

    /// The room, for a kernel that fills it with the first `rows` rows of `x`, `k` elements of each.
    pub fn fill(&self, x: Rows, rows: usize, k: usize) -> Bytes {
        self.held.set(Some(Held { id: x.id, rows, k }));
        self.room
    }

    /// Whether it holds these.
    fn holds(&self, x: Rows, rows: usize, k: usize) -> bool {
        self.held.get().is_some_and(|held| held.id == x.id && held.rows >= rows && held.k == k)
    }
}

/// `out (rows, n) = x (rows, k) * weight^T + bias`.
pub(crate) struct Linear<'a> {
    pub weight: &'a Matrix,
    /// `(n)` in f32, or null.
    pub bias: Ptr,
    pub x: Rows,
    /// Of `x`, if it has not been taken yet; only where [`Gpu::norms`] says so.
    pub norm: RawNorm,
    pub rows: usize,
    pub out: Ptr,
    pub out_stride: usize,
    pub epilogue: Epilogue,
    pub grouped: Option<Grouped>,
    /// Where rows of `x` become bytes, if they are not yet and the weights are quantized.
    pub bytes: &'a RowBytes,
}

impl Gpu {
    /// Whether a product of one row takes a norm of the row itself.
    pub fn norms(&self, kernels: &Kernels, weight: &Matrix, rows: usize) -> bool {
        rows == 1 && self.holds_row(kernels, weight)
    }

    /// Whether shared memory holds a row, and weights are read in packs of 16 bytes.
    fn holds_row(&self, kernels: &Kernels, weight: &Matrix) -> bool {
        let packs = match weight.format {
            Format::Float(dtype) => weight.k.is_multiple_of(16 / dtype.size() as usize),
            Format::Quantized(_) => true,
        };
        packs && Self::one_row_bytes(kernels, weight) <= self.shared - ONE_ROW_STATIC
    }

    /// Bytes of shared memory for a row, and for weights on their way to it.
    fn one_row_bytes(kernels: &Kernels, weight: &Matrix) -> u32 {
        let bytes = match weight.format {
            Format::Float(_) => weight.k as u64 * kernels.element.size(),
            Format::Quantized(_) => (weight.k + 8 * weight.k / GROUP) as u64,
        };
        let rings = one_row_rings(matches!(weight.format, Format::Quantized(_)));
        u32::try_from(bytes.next_multiple_of(16) + u64::from(rings)).unwrap_or(u32::MAX)
    }

    /// Computes a product; `x` is in the format of the kernels, and so is `out` unless it is values.
    pub fn linear(&self, kernels: &Kernels, call: &Linear<'_>) -> Result<(), CudaError> {
        let Linear { weight, rows, grouped, .. } = call;
        let rows_each = grouped.map_or(*rows, |g| g.groups.rows_each);
        if rows_each <= 1 && self.holds_row(kernels, weight) {
            return self.one_row(kernels, call);
        }
        if let (Format::Quantized(quantization), None) = (weight.format, grouped)
            && *rows >= unpack_from(kernels.element, quantization)
        {
            return self.unpacked(kernels, call);
        }
        let few = rows_each <= few_rows(weight.format);
        match (weight.format, &kernels.tensor) {
            (Format::Float(held), _) if !few && held == kernels.element && grouped.is_none() => {
                return self.around(kernels, call, |add| {
                    self.gemm(Self::gemm_of(kernels, call, weight.values, add))
                });
            }
            (format, Some(tensor)) if !few => {
                let tile = Self::tile_format(format, kernels.element, call);
                if let Some((tile, rows)) =
                    tile.and_then(|format| Some((format, tensor.tiles.of(format, rows_each)?)))
                {
                    return self.tile(tile, rows, call);
                }
            }
            _ => (),
        }
        if matches!(weight.format, Format::Quantized(_)) {
            self.to_bytes(kernels, call)?;
        }
        self.matvec(kernels, call, rows_each)
    }

    /// Sorts `rows` rows by the matrix that each goes through, of `matrices`; `chosen` has their numbers. `order` has
    /// room for a word and `tasks` for a task of each row.
    pub fn group(
        &self,
        kernels: &Kernels,
        (chosen, rows): (Ptr, usize),
        matrices: usize,
        (order, tasks): (Ptr, Ptr),
    ) -> Result<Groups, CudaError> {
        let rows_each = rows.div_ceil(matrices);
        let task_rows = if rows_each <= MATVEC_ROWS { rows_each.next_power_of_two() } else { TILE_ROWS };
        // In the last task of each matrix that gets any rows, all but one may be missing.
        let places = (rows + (task_rows - 1) * matrices.min(rows)) / task_rows;
        launch!(self, kernels.group_pairs, (1, 1, 1), 256, 4 * matrices as u32;
            order, tasks, chosen, rows as i32, matrices as i32, task_rows as i32, places as i32)?;
        Ok(Groups { order, tasks, task_rows, places, rows_each })
    }

    /// What comes before and after a product of cuBLAS: bias and activation. `gemm` is told whether to add to the
    /// output.
    fn around(
        &self,
        kernels: &Kernels,
        call: &Linear<'_>,
        gemm: impl FnOnce(bool) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let mut add = call.epilogue == Epilogue::Add;
        if call.bias != Ptr::NULL {
            self.bias(kernels, call, add)?;
            add = true;
        }
        gemm(add)?;
        self.activation(kernels, call)
    }

    /// A product of cuBLAS with weights in the format of `x`.
    fn gemm_of(kernels: &Kernels, call: &Linear<'_>, weight: Ptr, add: bool) -> Gemm {
        let element = kernels.element;
        Gemm {
            element,
            out_element: if call.epilogue == Epilogue::StoreValues { DType::F32 } else { element },
            weight,
            x: call.x.at,
            out: call.out,
            n: call.weight.n,
            k: call.weight.k,
            rows: call.rows,
            x_stride: call.x.stride,
            out_stride: call.out_stride,
            add,
        }
    }

    /// A product of many rows with quantized weights: some outputs' weights at a time become elements, for cuBLAS.
    fn unpacked(&self, kernels: &Kernels, call: &Linear<'_>) -> Result<(), CudaError> {
        let Matrix { n, k, format, .. } = *call.weight;
        let size = kernels.element.size();
        let turns = ((n * k) as u64 * size).div_ceil(UNPACKED) as usize;
        // Turns of one length, of whole tiles.
        let each = n.div_ceil(turns).next_multiple_of(64).min(n);
        let each = if (each * k) as u64 * size > UNPACKED { n / turns } else { each };
        let function = match format {
            Format::Quantized(Quantization::Int4) => &kernels.dequantize_int4,
            _ => &kernels.dequantize_int8,
        };
        self.around(kernels, call, |add| {
            for first in (0..n).step_by(each) {
                let count = each.min(n - first);
                let blocks = (count * k / 8).div_ceil(DEQUANTIZE_THREADS * DEQUANTIZE_TURNS) as u32;
                follow!(self, function, (blocks, 1, 1), DEQUANTIZE_THREADS as u32, 0;
                    call.bytes.elsewhere, call.weight.raw(), first as i32, count as i32)?;
                let gemm = Self::gemm_of(kernels, call, call.bytes.elsewhere, add);
                let out = call.out.offset(first as u64 * gemm.out_element.size());
                self.gemm(Gemm { n: count, out, ..gemm })?;
            }
            Ok(())
        })
    }

    fn raw(&self, call: &Linear<'_>, epilogue: Epilogue) -> RawProduct {
        let grouped = call.grouped;
        let [expert_values, expert_factors, expert_bias] = grouped.map_or([0; 3], |g| g.strides);
        RawProduct {
            weight: call.weight.raw(),
            bias: call.bias,
            x: call.x.at,
            norm: call.norm,
            bytes: call.bytes.room,
            out: call.out,
            x_stride: call.x.stride as i32,
            out_stride: call.out_stride as i32,
            rows: call.rows as i32,
            epilogue: epilogue.number(),
            act: call.epilogue.act().map_or(0, act_number),
            order: grouped.map_or(Ptr::NULL, |g| g.groups.order),
            tasks: grouped.map_or(Ptr::NULL, |g| g.groups.tasks),
            divide: grouped.map_or(1, |g| g.divide as i32),
            expert_values,
            expert_factors,
            expert_bias,
        }
    }

    /// Of a grid, the blocks for rows: tiles, or tasks and the tiles of each.
    fn row_blocks(call: &Linear<'_>, tile: usize) -> (u32, u32) {
        match call.grouped {
            None => (call.rows.div_ceil(tile) as u32, 1),
            Some(Grouped { groups, .. }) => (groups.places as u32, groups.task_rows.div_ceil(tile) as u32),
        }
    }

    /// Products of one row each, which lies in shared memory.
    fn one_row(&self, kernels: &Kernels, call: &Linear<'_>) -> Result<(), CudaError> {
        let function = &kernels.matvec[call.weight.number() as usize][0];
        let (y, z) = Self::row_blocks(call, 1);
        // Warps share out k if there is work for them; the others have outputs of their own, two pairs each.
        let each = 32
            * match call.weight.format {
                Format::Float(dtype) => 16 / dtype.size() as usize,
                Format::Quantized(Quantization::Int8) => 16,
                Format::Quantized(Quantization::Int4) => 32,
            };
        let pieces = call.weight.k.div_ceil(each);
        let share = 1 << pieces.clamp(1, ONE_ROW_WARPS).ilog2();
        let pairs = call.weight.n.div_ceil(2);
        let blocks = pairs.div_ceil(2 * ONE_ROW_WARPS / share) as u32;
        let blocks = blocks.min(ONE_ROW_BLOCKS * self.multiprocessors);
        let shared = Self::one_row_bytes(kernels, call.weight);
        follow!(self, function, (blocks, y, z), MATVEC_THREADS, shared; self.raw(call, call.epilogue))
    }

    fn matvec(&self, kernels: &Kernels, call: &Linear<'_>, rows_each: usize) -> Result<(), CudaError> {
        let step = rows_each.clamp(2, MATVEC_ROWS).next_power_of_two();
        let function = &kernels.matvec[call.weight.number() as usize][step.ilog2() as usize];
        let blocks = call.weight.n.div_ceil(2).div_ceil((MATVEC_THREADS / 32) as usize) as u32;
        let (y, z) = Self::row_blocks(call, step);
        follow!(self, function, (blocks, y, z), MATVEC_THREADS, 0; self.raw(call, call.epilogue))
    }

    /// What `tile_*` make of weights, if they take these and such rows.
    fn tile_format(held: Format, element: DType, call: &Linear<'_>) -> Option<TileFormat> {
        let (format, whole) = match held {
            Format::Float(held) if held == element => (TileFormat::Elements, 8),
            Format::Float(_) => return None,
            Format::Quantized(Quantization::Int8) => (TileFormat::Int8, TileFormat::Int8.step()),
            Format::Quantized(Quantization::Int4) => (TileFormat::Int4, TileFormat::Int4.step()),
        };
        (call.weight.k.is_multiple_of(whole) && call.x.stride.is_multiple_of(8)).then_some(format)
    }

    fn tile(
        &self,
        format: TileFormat,
        (function, rows): (&CudaFunction, usize),
        call: &Linear<'_>,
    ) -> Result<(), CudaError> {
        let (y, z) = Self::row_blocks(call, rows);
        // Tiles and the steps of each are shared out evenly. As many blocks as the room for their sums is for.
        let units = (call.weight.n.div_ceil(TILE_OUTPUTS) * call.weight.k.div_ceil(format.step())) as u32;
        let blocks = (TILE_BLOCKS * self.multiprocessors / (y * z)).clamp(1, units);
        let shared = tile_bytes(format, rows);
        follow!(self, function, (blocks, y, z), TILE_THREADS, shared;
            self.raw(call, call.epilogue), call.bytes.meeting())
    }

    /// Turns the rows that a product reads into bytes, if they are not yet.
    fn to_bytes(&self, kernels: &Kernels, call: &Linear<'_>) -> Result<(), CudaError> {
        let rows = call.rows / call.grouped.map_or(1, |g| g.divide);
        let (x, k) = (call.x, call.weight.k);
        if call.bytes.holds(x, rows, k) {
            return Ok(());
        }
        let bytes = call.bytes.fill(x, rows, k);
        let blocks = (rows * (k / 32)).div_ceil(8) as u32;
        let function = &kernels.quantize_rows;
        follow!(self, function, (blocks, 1, 1), 256, 0;
            bytes, x.at, x.stride as i32, k as i32, rows as i32)
    }

    /// Puts the bias of a product into its output, before the product is added.
    fn bias(&self, kernels: &Kernels, call: &Linear<'_>, add: bool) -> Result<(), CudaError> {
        let function = match call.epilogue {
            Epilogue::StoreValues => &kernels.bias_values,
            _ => &kernels.bias_rows,
        };
        let n = call.weight.n;
        let grid = (n.div_ceil(256) as u32, call.rows as u32, 1);
        launch!(self, function, grid, 256, 0; call.out, call.bias, n as i32, i32::from(add))
    }

    /// The activation that a product ends with, where it was not part of it.
    fn activation(&self, kernels: &Kernels, call: &Linear<'_>) -> Result<(), CudaError> {
        let n = call.weight.n;
        match call.epilogue {
            Epilogue::Gated(act) => {
                let blocks = (n / 2).div_ceil(16 / kernels.element.size() as usize).div_ceil(256);
                let grid = ((blocks * call.rows) as u32, 1, 1);
                follow!(self, kernels.gate_mul, grid, 256, 0;
                    call.out, (n / 2) as i32, act_number(act), blocks as i32)
            }
            Epilogue::Activated(act) => self.activate(kernels, call.out, call.rows * n, act),
            _ => Ok(()),
        }
    }

    /// An activation, in place.
    pub fn activate(&self, kernels: &Kernels, x: Ptr, count: usize, act: Act) -> Result<(), CudaError> {
        let blocks = count.div_ceil(256) as u32;
        launch!(self, kernels.activate_rows, (blocks, 1, 1), 256, 0; x, count as u64, act_number(act))
    }
}
