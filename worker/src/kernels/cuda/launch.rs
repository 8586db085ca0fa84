//! Our own kernels: their source, how it is compiled, and what is passed to them.

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaModule, DeviceRepr, DriverError, sys, sys::CUfunction_attribute};
use strata_proto::{DType, limits::MAX_LOGPROBS};

use super::{
    CudaError, Doing, Gpu,
    limits::{MAX_ACTIVE, MAX_SPLITS},
    memory::Ptr,
};
use crate::kernels::ops::{BLOCK_TOKENS, GROUP};

/// One translation unit, in this order.
pub(super) const SOURCES: [&str; 8] = [
    include_str!("source/common.cu"),
    include_str!("source/rows.cu"),
    include_str!("source/product.cu"),
    include_str!("source/one_row.cu"),
    include_str!("source/tile.cu"),
    include_str!("source/attention.cu"),
    include_str!("source/moe.cu"),
    include_str!("source/sample.cu"),
];

/// Threads of a block that draws tokens, and the logits that it takes.
pub(crate) const SAMPLE_THREADS: usize = 256;
pub(crate) const SLICE: usize = 2048;

/// What the sources count with, too: macros of theirs.
const SHARED: [(&str, usize); 7] = [
    ("BLOCK_TOKENS", BLOCK_TOKENS),
    ("GROUP", GROUP),
    ("MAX_ACTIVE", MAX_ACTIVE),
    ("MAX_LOGPROBS", MAX_LOGPROBS as usize),
    ("MAX_SPLITS", MAX_SPLITS),
    ("SAMPLE_THREADS", SAMPLE_THREADS),
    ("SLICE", SLICE),
];

/// A format as the sources number it.
pub(crate) fn element_number(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
    }
}

/// What the compiler is told, besides what machine code to make.
pub(super) fn options(element: DType, head_dim: usize) -> Vec<String> {
    let own = [
        "--std=c++17".into(),
        format!("-DELEMENT={}", element_number(element)),
        format!("-DHEAD_DIM={head_dim}"),
    ];
    let shared = SHARED.map(|(name, value)| format!("-D{name}={value}"));
    own.into_iter().chain(shared).collect()
}

/// Declares the kernels by name.
macro_rules! kernels {
    ($($name:ident)*) => {
        /// The kernels of one module.
        pub(crate) struct Kernels {
            /// Format of the rows that they read and write: what the module was compiled for.
            pub element: DType,
            $(pub $name: CudaFunction,)*
            /// By format of the weights (as [`weight_number`] counts), then for 1, 2, 4 and 8 rows.
            pub matvec: [[CudaFunction; 4]; 5],
            /// On the tensor cores, which f32 does without.
            pub tensor: Option<TensorKernels>,
        }

        impl Kernels {
            pub fn load(
                module: &Arc<CudaModule>,
                element: DType,
                head_dim: usize,
                shared: u32,
            ) -> Result<Self, DriverError> {
                let matvec = |format: &str| {
                    let load = |rows: usize| module.load_function(&format!("matvec_{format}_{rows}"));
                    let one = load(1)?;
                    allow_shared(&one, shared - ONE_ROW_STATIC)?;
                    Ok::<_, DriverError>([one, load(2)?, load(4)?, load(8)?])
                };
                Ok(Kernels {
                    element,
                    $($name: module.load_function(stringify!($name))?,)*
                    matvec: [
                        matvec("f32")?, matvec("bf16")?, matvec("f16")?, matvec("int8")?, matvec("int4")?,
                    ],
                    tensor: match element {
                        DType::F32 => None,
                        _ => Some(TensorKernels {
                            tiles: Tiles::load(module, shared)?,
                            attention: TileAttention::load(module, head_dim),
                        }),
                    },
                })
            }
        }
    };
}

kernels! {
    embed norm_rows gather_rows angles norm_heads_together rope_store gate_mul activate_rows bias_rows bias_values soft_cap
    add_scaled pool_rows normalize_values narrow_values widen_rows activate_values take_columns quantize_rows
    dequantize_int8 dequantize_int4 attention_plain attention_combine route group_pairs combine_experts
    sample_scan sample_adjust sample_mass sample_bins sample_ties sample_alternatives
}

/// Kernels for 16-bit formats.
pub(crate) struct TensorKernels {
    pub tiles: Tiles,
    /// Where heads are whole slabs of 16 elements and a GPU's shared memory has room.
    pub attention: Option<TileAttention>,
}

/// Attention on the tensor cores, each without and with a soft cap.
pub(crate) struct TileAttention {
    pub prefill: [CudaFunction; 2],
    pub decode: [CudaFunction; 2],
}

impl TileAttention {
    fn load(module: &Arc<CudaModule>, head_dim: usize) -> Option<Self> {
        let load = |name: &str, rows| {
            let function = module.load_function(name).ok()?;
            allow_shared(&function, attention_bytes(rows, head_dim)).ok()?;
            Some(function)
        };
        Some(TileAttention {
            prefill: [load("attention_prefill", 64)?, load("attention_prefill_capped", 64)?],
            decode: [load("attention_decode", 16)?, load("attention_decode_capped", 16)?],
        })
    }
}

/// Products on the tensor cores: by format of the weights, then for [`Tiles::ROWS`] rows, where a GPU's shared memory
/// has room.
pub(crate) struct Tiles([[Option<CudaFunction>; 3]; 3]);

/// What `tile_*` make of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TileFormat {
    Elements,
    Int8,
    Int4,
}

impl Tiles {
    /// Rows of a tile.
    const ROWS: [usize; 3] = [16, 32, 64];

    fn load(module: &Arc<CudaModule>, shared: u32) -> Result<Self, DriverError> {
        let load = |format, name: &str, rows| {
            let bytes = tile_bytes(format, rows);
            if bytes + STATIC > shared {
                return Ok(None);
            }
            let function = module.load_function(&format!("tile_{name}_{rows}"))?;
            allow_shared(&function, bytes)?;
            Ok(Some(function))
        };
        let all = |format, name| {
            let [a, b, c] = Self::ROWS;
            Ok::<_, DriverError>([load(format, name, a)?, load(format, name, b)?, load(format, name, c)?])
        };
        Ok(Tiles([
            all(TileFormat::Elements, "elements")?,
            all(TileFormat::Int8, "int8")?,
            all(TileFormat::Int4, "int4")?,
        ]))
    }

    /// The smallest for so many rows, or else the largest that there is; and how many it takes.
    pub fn of(&self, format: TileFormat, rows: usize) -> Option<(&CudaFunction, usize)> {
        let there = || {
            let all = self.0[format as usize].iter().zip(Self::ROWS);
            all.filter_map(|(function, rows)| Some((function.as_ref()?, rows)))
        };
        there().find(|(_, most)| *most >= rows).or(there().next_back())
    }
}

/// Static shared memory of `matvec_*_1` and of `tile_*`, at most: what is left is for what a launch asks for.
pub(crate) const ONE_ROW_STATIC: u32 = 6 << 10;
const STATIC: u32 = 256;

/// Bytes of shared memory for the weights that a block of `matvec_*_1` has asked for: its rings in `one_row.cu`.
pub(crate) fn one_row_rings(quantized: bool) -> u32 {
    let (warps, depth, outputs, lanes) = (8, 4, 4, 32);
    warps * depth * outputs * lanes * if quantized { 16 + 4 } else { 16 }
}

/// Outputs of a block of `tile_*`, and its threads.
pub(crate) const TILE_OUTPUTS: usize = 128;
pub(crate) const TILE_THREADS: u32 = 128;

impl TileFormat {
    /// Elements of a row that a block takes at a time.
    pub fn step(self) -> usize {
        if self == TileFormat::Elements { 64 } else { 128 }
    }
}

/// Bytes of shared memory of a block of `tile_*`: the stages of `tile.cu`.
pub(crate) fn tile_bytes(format: TileFormat, rows: usize) -> u32 {
    const ROOM: usize = 98 << 10;
    // Of an output's weights, of its factors, and of a row.
    let (weights, factors, x) = match format {
        TileFormat::Elements => (2 * format.step() + 16, 0, 2 * format.step() + 16),
        TileFormat::Int8 => (format.step() + 32, 8, 2 * format.step() + 64),
        TileFormat::Int4 => (format.step() / 2 + 16, 16, 2 * format.step() + 64),
    };
    let held = TILE_OUTPUTS * weights + rows * x + (TILE_OUTPUTS * factors).max(16);
    // At the end the sums take the place of a stage.
    let stage = held.max(rows * TILE_OUTPUTS * 4);
    ((ROOM / stage).clamp(2, 6) * stage) as u32
}

/// Positions that a block of `attention_prefill` and `attention_decode` takes at a time.
const TILE_KEYS: usize = 64;

/// Bytes of shared memory for attention of so many rows of queries: them, keys and values, 16 bits wide with eight
/// elements between rows; where the rows are 16, the sums of four warps take the place of all that.
pub(crate) fn attention_bytes(rows: usize, head_dim: usize) -> u32 {
    let tiles = (rows + 2 * TILE_KEYS) * (head_dim + 8) * 2;
    let sums = if rows == 16 { 4 * 16 * head_dim * 4 } else { 0 };
    tiles.max(sums) as u32
}

/// Lets a kernel have so many bytes of dynamic shared memory.
fn allow_shared(function: &CudaFunction, bytes: u32) -> Result<(), DriverError> {
    let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(most, bytes as i32)
}

impl SharedExpert {
    /// From a token on, of which row and gate take so many bytes.
    pub fn skip(self, tokens: usize, (row, gate): (u64, u64)) -> Self {
        let from = |ptr: Ptr, bytes| if ptr == Ptr::NULL { ptr } else { ptr.offset(tokens as u64 * bytes) };
        SharedExpert { rows: from(self.rows, row), gates: from(self.gates, gate) }
    }
}

/// Starts a kernel that may overlap with the one before it in the stream: it waits for that one by itself
/// (`wait_for_previous` of `common.cu`), so that its start costs no time of its own.
pub(crate) fn start_following(
    gpu: &Gpu,
    function: &CudaFunction,
    (grid_x, grid_y, grid_z): (u32, u32, u32),
    threads: u32,
    shared: u32,
    arguments: &mut [*mut std::ffi::c_void],
) -> Result<(), CudaError> {
    gpu.context.bind_to_thread().doing("binding a GPU")?;
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: grid_x,
        gridDimY: grid_y,
        gridDimZ: grid_z,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: gpu.stream.cu_stream(),
        attrs: &raw mut attribute,
        // GPUs before Hopper do not know it.
        numAttrs: u32::from(gpu.capability.0 >= 9),
    };
    // SAFETY: as for `launch`; the attribute and the arguments live until the call returns.
    let started = unsafe {
        sys::cuLaunchKernelEx(&config, function.cu_function(), arguments.as_mut_ptr(), std::ptr::null_mut())
    };
    started.result().doing("starting a kernel")
}

/// As [`launch`], of a kernel that begins with `follow` or its two halves: it may overlap with the one before.
macro_rules! follow {
    ($gpu:expr, $function:expr, $grid:expr, $block:expr, $shared:expr; $($arg:expr),+ $(,)?) => {
        // Each argument lives until the call has returned.
        $crate::kernels::cuda::launch::start_following(
            $gpu, &$function, $grid, $block, $shared,
            &mut [$(std::ptr::from_ref(&{ $arg }).cast_mut().cast()),+],
        )
    };
}
pub(crate) use follow;

/// Starts a kernel on a GPU's stream: grid, threads per block, bytes of dynamic shared memory, arguments.
macro_rules! launch {
    ($gpu:expr, $function:expr, $grid:expr, $block:expr, $shared:expr; $($arg:expr),+ $(,)?) => {{
        use cudarc::driver::PushKernelArg;
        let config = cudarc::driver::LaunchConfig {
            grid_dim: $grid,
            block_dim: ($block, 1, 1),
            shared_mem_bytes: $shared,
        };
        let mut builder = $gpu.stream.launch_builder(&$function);
        // An argument must live until the launch.
        $crate::kernels::cuda::launch::launch!(@args builder, config; $($arg),+)
    }};
    (@args $builder:ident, $config:ident; $first:expr $(, $rest:expr)*) => {{
        let argument = $first;
        $builder.arg(&argument);
        $crate::kernels::cuda::launch::launch!(@args $builder, $config; $($rest),*)
    }};
    (@args $builder:ident, $config:ident; ) => {{
        use $crate::kernels::cuda::Doing as _;
        // SAFETY: the arguments are what the kernel's source declares, and point to buffers of this GPU that are large
        // enough for the grid.
        unsafe { $builder.launch($config) }
            .map(|_| ())
            .doing("starting a kernel")
    }};
}
pub(crate) use launch;

/// Defines structures that kernels take by value.
macro_rules! passed {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, Default)]
            #[repr(C)]
            pub(crate) struct $name {
                $(pub $field: $type,)*
            }
            // SAFETY: laid out as C does, like the structure of this name in the sources.
            unsafe impl DeviceRepr for $name {}
        )*
    };
}

passed! {
    /// `Matrix` of `common.cu`.
    RawMatrix { values: Ptr, factors: Ptr, n: i32, k: i32 }
    /// `Bytes` of `common.cu`.
    Bytes { values: Ptr, factors: Ptr, sums: Ptr }
    /// `Tables` of `rows.cu`.
    Tables {
        tokens: RawMatrix, positions: RawMatrix, segments: RawMatrix,
        token_format: i32, position_format: i32, segment_format: i32,
        first_position: i32, scale: f32,
    }
    /// `Norm` of `rows.cu`.
    RawNorm { weight: Ptr, bias: Ptr, epsilon: f32, centred: i32 }
    /// `Places` of `rows.cu`.
    Places { positions: Ptr, row_of: Ptr, first_block: Ptr, tables: Ptr }
    /// `Cache` of `rows.cu`.
    RawCache { keys: Ptr, values: Ptr }
    /// `Heads` of `rows.cu`.
    Heads { heads: i32, kv_heads: i32, pairs: i32, each: i32, query: RawNorm, key: RawNorm, period: i32, beta: f32, clip: f32 }
    /// `Routing` of `moe.cu`.
    Routing {
        correction: Ptr, experts: i32, active: i32, normalize: i32, scale: f32, groups: i32, kept: i32,
    }
    /// `SharedExpert` of `moe.cu`.
    SharedExpert { rows: Ptr, gates: Ptr }
    /// `Product` of `product.cu`.
    RawProduct {
        weight: RawMatrix, bias: Ptr, x: Ptr, norm: RawNorm, bytes: Bytes, out: Ptr,
        x_stride: i32, out_stride: i32, rows: i32, epilogue: i32, act: i32,
        order: Ptr, tasks: Ptr, divide: i32,
        expert_values: u64, expert_factors: u64, expert_bias: u64,
    }
    /// `Meeting` of `tile.cu`.
    Meeting { sums: Ptr, arrived: Ptr }
    /// `Sample` of `sample.cu`.
    RawSample {
        draws: Ptr, drawn: Ptr, bins: Ptr, partial: Ptr, entries: Ptr, logits: Ptr, vocab: i32,
    }
    /// `Attend` of `attention.cu`.
    Attend {
        qkv: Ptr, out: Ptr, cache: RawCache, places: Places,
        row_first: Ptr, row_start: Ptr, row_count: Ptr, rows: Ptr, count: i32,
        heads: i32, kv_heads: i32, scale: f32, softcap: f32, window: i32, splits: i32, partial: Ptr,
        bias: Ptr, distant: Ptr, rows_of: Ptr, first_distant: i32, reach: i32,
        sloped: i32, rounded: f32,
    }
}
