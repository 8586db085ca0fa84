//! Our own kernels: their source, how it is compiled, and what is passed to them.

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaModule, DeviceRepr, DriverError, sys::CUfunction_attribute};
use strata_proto::DType;

use super::memory::Ptr;

/// One translation unit, in this order.
pub(super) const SOURCES: [&str; 6] = [
    include_str!("source/common.cu"),
    include_str!("source/rows.cu"),
    include_str!("source/product.cu"),
    include_str!("source/attention.cu"),
    include_str!("source/moe.cu"),
    include_str!("source/sample.cu"),
];

/// Most candidates per row that a GPU finds.
pub(crate) const MAX_CANDIDATES: usize = 64;
/// Most experts per token.
pub(crate) const MAX_ACTIVE: usize = 32;

/// A format as the sources number it.
pub(crate) fn element_number(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
    }
}

/// What the compiler is told, besides what machine code to make.
pub(super) fn options(element: DType, head_dim: usize) -> [String; 3] {
    ["--std=c++17".into(), format!("-DELEMENT={}", element_number(element)), format!("-DHEAD_DIM={head_dim}")]
}

/// Declares the kernels by name.
macro_rules! kernels {
    ($($name:ident)*) => {
        /// The kernels of one module.
        pub(crate) struct Kernels {
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
            ) -> Result<Self, DriverError> {
                let matvec = |format: &str| {
                    let load = |rows: usize| module.load_function(&format!("matvec_{format}_{rows}"));
                    Ok::<_, DriverError>([load(1)?, load(2)?, load(4)?, load(8)?])
                };
                Ok(Kernels {
                    $($name: module.load_function(stringify!($name))?,)*
                    matvec: [
                        matvec("f32")?, matvec("bf16")?, matvec("f16")?, matvec("int8")?, matvec("int4")?,
                    ],
                    tensor: match element {
                        DType::F32 => None,
                        _ => Some(TensorKernels {
                            tile_dense: module.load_function("tile_dense")?,
                            prefill: attention(module, "attention_prefill", attention_bytes(64, head_dim)),
                            decode: attention(module, "attention_decode", attention_bytes(16, head_dim)),
                        }),
                    },
                })
            }
        }
    };
}

kernels! {
    embed norm_rows gather_rows angles rope_store gate_mul activate_rows bias_rows bias_values soft_cap pool_rows quantize_rows
    tile_int8 tile_int4 attention_plain attention_combine route group_pairs combine_experts top_candidates
}

/// Kernels for 16-bit formats.
pub(crate) struct TensorKernels {
    pub tile_dense: CudaFunction,
    /// Attention, where heads are whole slabs of 16 elements.
    pub prefill: Option<CudaFunction>,
    pub decode: Option<CudaFunction>,
}

/// Positions that a block of `attention_prefill` and `attention_decode` takes at a time.
const TILE_KEYS: usize = 64;

/// Bytes of shared memory for attention of so many rows of queries: them, keys and values, 16 bits wide with eight elements
/// between rows; where the rows are 16, the sums of four warps take the place of all that.
pub(crate) fn attention_bytes(rows: usize, head_dim: usize) -> u32 {
    let tiles = (rows + 2 * TILE_KEYS) * (head_dim + 8) * 2;
    let sums = if rows == 16 { 4 * 16 * head_dim * 4 } else { 0 };
    tiles.max(sums) as u32
}

/// A kernel of attention, if the width of the heads and the GPU's shared memory allow it.
fn attention(module: &Arc<CudaModule>, name: &str, bytes: u32) -> Option<CudaFunction> {
    let function = module.load_function(name).ok()?;
    let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(most, bytes as i32).ok()?;
    Some(function)
}

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
    (@args $builder:ident, $config:ident; ) => {
        // SAFETY: the arguments are what the kernel's source declares, and point to buffers of this GPU that are large
        // enough for the grid.
        unsafe { $builder.launch($config) }
            .map(|_| ())
            .map_err(|source| $crate::kernels::cuda::CudaError::Driver { doing: "starting a kernel", source })
    };
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
    Heads { heads: i32, kv_heads: i32, pairs: i32, query: RawNorm, key: RawNorm }
    /// `Product` of `product.cu`.
    RawProduct {
        weight: RawMatrix, bias: Ptr, x: Ptr, bytes: Bytes, out: Ptr,
        x_stride: i32, out_stride: i32, rows: i32, epilogue: i32, act: i32,
        order: Ptr, tasks: Ptr, divide: i32,
        expert_values: u64, expert_factors: u64, expert_bias: u64,
    }
    /// `Attend` of `attention.cu`.
    Attend {
        qkv: Ptr, out: Ptr, cache: RawCache, places: Places,
        row_first: Ptr, row_start: Ptr, row_count: Ptr, rows: Ptr,
        heads: i32, kv_heads: i32, scale: f32, softcap: f32, window: i32, splits: i32, partial: Ptr,
    }
}
