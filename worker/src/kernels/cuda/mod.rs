//! GPUs: what there is, memory, kernels of our own (compiled when a stage starts), and cuBLAS for large products.
//!
//! The libraries of CUDA are loaded when they are first needed, so one binary runs with and without GPUs. A `Gpu` belongs
//! to one stage thread; everything it does goes through one stream, in order.

pub(crate) mod launch;
pub(crate) mod memory;
pub(crate) mod product;
pub(crate) mod rows;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use cudarc::{
    cublas,
    driver::{self, CudaContext, CudaStream, DriverError, sys::CUdevice_attribute},
    nvrtc,
};
use strata_proto::DType;

pub use self::rows::DeviceRows;
use self::{
    launch::Kernels,
    memory::{Memory, Ptr},
};

/// What a GPU could not do.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library is not there.
    #[error("{0} was not found: install the NVIDIA driver and CUDA's libraries, or use --devices cpu")]
    NoLibrary(&'static str),
    /// The driver refused, or a kernel failed.
    #[error("{doing}: {source}")]
    Driver {
        /// What was being done.
        doing: &'static str,
        /// The driver's reason.
        source: DriverError,
    },
    /// Kernels that the compiler refused: a defect of ours, or a GPU that is too old.
    #[error("compiling kernels for compute capability {capability}: {log}")]
    Compile {
        /// Of the GPU.
        capability: String,
        /// The compiler's words.
        log: String,
    },
    /// A GPU that is not there.
    #[error("there is no GPU {ordinal}: this machine has {count}")]
    NoGpu {
        /// What was asked for.
        ordinal: usize,
        /// What there is.
        count: usize,
    },
    /// More memory than was planned: a defect of ours.
    #[error("internal error: {bytes} bytes of GPU memory more are used than were counted")]
    Uncounted {
        /// What there is no room for.
        bytes: u64,
    },
    /// cuBLAS refused.
    #[error("cuBLAS: {0:?}")]
    Blas(cublas::sys::cublasStatus_t),
    /// A GPU that is too old.
    #[error("GPU {name} has compute capability {major}.{minor}: expected 8.0 or more; use --devices cpu")]
    TooOld {
        /// What it is called.
        name: String,
        /// Its capability.
        major: i32,
        /// After the point.
        minor: i32,
    },
}

/// Adds what was being done to an error of the driver.
pub(crate) trait Doing<T> {
    fn doing(self, what: &'static str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, what: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Driver { doing: what, source })
    }
}

impl CudaError {
    /// Whether nothing on this GPU will work again in this process (a kernel that read or wrote where it must not, or
    /// hardware that failed), as opposed to one call that was refused.
    pub fn is_sticky(&self) -> bool {
        use driver::sys::cudaError_enum as E;
        let CudaError::Driver { source, .. } = self else { return false };
        matches!(
            source.0,
            E::CUDA_ERROR_ILLEGAL_ADDRESS
                | E::CUDA_ERROR_LAUNCH_FAILED
                | E::CUDA_ERROR_LAUNCH_TIMEOUT
                | E::CUDA_ERROR_ASSERT
                | E::CUDA_ERROR_HARDWARE_STACK_ERROR
                | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | E::CUDA_ERROR_MISALIGNED_ADDRESS
                | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | E::CUDA_ERROR_INVALID_PC
                | E::CUDA_ERROR_ECC_UNCORRECTABLE
        )
    }
}

/// What is known of a GPU before it is used.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuInfo {
    /// What it is called.
    pub name: String,
    /// What it is called nowhere else.
    pub uuid: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes that are free now.
    pub free_bytes: u64,
    /// All bytes.
    pub total_bytes: u64,
    /// The GPUs whose memory it can copy directly, itself included, by uuid.
    pub peers: Vec<String>,
}

/// Whether there is a driver; calling one that is not there would panic.
fn has_driver() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    // SAFETY: loading the library runs its initialisers, which are made for it.
    *THERE.get_or_init(|| unsafe { driver::sys::is_culib_present() })
}

/// Makes sure that all libraries are there which a stage needs.
fn libraries() -> Result<(), CudaError> {
    static MISSING: OnceLock<Option<&str>> = OnceLock::new();
    let missing = MISSING.get_or_init(|| {
        // SAFETY: as in `has_driver`.
        let (compiler, blas) = unsafe { (nvrtc::sys::is_culib_present(), cublas::sys::is_culib_present()) };
        let all = [("libcuda.so.1", has_driver()), ("libnvrtc.so", compiler), ("libcublas.so", blas)];
        all.into_iter().find(|(_, there)| !there).map(|(name, _)| name)
    });
    missing.map_or(Ok(()), |name| Err(CudaError::NoLibrary(name)))
}

/// How many GPUs this machine has; none where there is no driver.
///
/// # Errors
/// If there is a driver, and it does not work.
pub fn count() -> Result<usize, CudaError> {
    if !has_driver() {
        return Ok(0);
    }
    match CudaContext::device_count() {
        Ok(count) => Ok(count as usize),
        Err(DriverError(driver::sys::cudaError_enum::CUDA_ERROR_NO_DEVICE)) => Ok(0),
        Err(e) => Err(e).doing("counting GPUs"),
    }
}

/// What is known of a GPU. Of the others nothing is opened.
///
/// # Errors
/// If there is no such GPU, or it does not work.
pub fn info(ordinal: usize) -> Result<GpuInfo, CudaError> {
    libraries()?;
    let count = count()?;
    if ordinal >= count {
        return Err(CudaError::NoGpu { ordinal, count });
    }
    let context = CudaContext::new(ordinal).doing("opening a GPU")?;
    let (free, total) = context.mem_get_info().doing("asking for free memory")?;
    let mut peers = Vec::new();
    for other in 0..count {
        let device = driver::result::device::get(other as i32).doing("finding a GPU")?;
        if other == ordinal || can_copy(context.cu_device(), device) {
            peers.push(uuid(device)?);
        }
    }
    Ok(GpuInfo {
        name: context.name().doing("asking for a GPU's name")?,
        uuid: uuid(context.cu_device())?,
        capability: context.compute_capability().doing("asking for a GPU's capability")?,
        free_bytes: free as u64,
        total_bytes: total as u64,
        peers,
    })
}

fn uuid(device: driver::sys::CUdevice) -> Result<String, CudaError> {
    let bytes = driver::result::device::get_uuid(device).doing("asking for a GPU's uuid")?.bytes;
    Ok(uuid::Uuid::from_bytes(bytes.map(|b| b as u8)).to_string())
}

/// Whether one GPU can copy from the memory of another without the host.
fn can_copy(to: driver::sys::CUdevice, from: driver::sys::CUdevice) -> bool {
    let mut can = 0;
    // SAFETY: both are devices that the driver gave.
    let asked = unsafe { driver::sys::cuDeviceCanAccessPeer(&mut can, to, from) };
    asked.result().is_ok() && can == 1
}

/// Bytes of a GPU that no stage is given: cuBLAS's workspace, what attention puts together, activations on their way, and
/// what CUDA and NCCL take for themselves when they are first used.
pub const RESERVE: u64 = 1 << 30;

/// Where cuBLAS may work; 32 MiB is what NVIDIA recommends for Hopper.
const BLAS_WORKSPACE: u64 = 32 << 20;

/// A GPU in use by one stage.
pub(crate) struct Gpu {
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    blas: Blas,
    pub multiprocessors: u32,
    pub capability: (i32, i32),
}

impl Gpu {
    /// Opens a GPU, with a stream of its own.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        libraries()?;
        let context = CudaContext::new(ordinal).doing("opening a GPU")?;
        // SAFETY: no buffer of this context is tracked; order comes from using one stream, and from waiting for it.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().doing("asking for a GPU's capability")?;
        if capability.0 < 8 {
            let name = context.name().doing("asking for a GPU's name")?;
            return Err(CudaError::TooOld { name, major: capability.0, minor: capability.1 });
        }
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).doing("asking for multiprocessors")? as u32;
        let stream = context.new_stream().doing("making a stream")?;
        let blas = Blas::new(&context, &stream)?;
        Ok(Gpu { context, stream, blas, multiprocessors, capability })
    }

    /// The kernels for a format and a width of heads, compiled at most once per process.
    pub fn kernels(&self, element: DType, head_dim: usize) -> Result<Kernels, CudaError> {
        type Key = ((i32, i32), DType, usize);
        static COMPILED: Mutex<Option<HashMap<Key, nvrtc::Ptx>>> = Mutex::new(None);
        let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
        let compiled = compiled.get_or_insert_default();
        let key = (self.capability, element, head_dim);
        let ptx = match compiled.get(&key) {
            Some(ptx) => ptx.clone(),
            None => {
                let ptx = launch::compile(self.capability, element, head_dim)?;
                compiled.insert(key, ptx.clone());
                ptx
            }
        };
        let module = self.context.load_module(ptx).doing("loading kernels")?;
        Kernels::load(&module, element, head_dim).doing("finding a kernel")
    }

    /// Waits until all that was asked for is done.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.stream.synchronize().doing("computing")
    }

    /// `out (rows, n) = x (rows, k) * weight^T`, plus what is in `out` if `add`. All by rows, with strides in elements.
    pub fn gemm(&self, call: Gemm) -> Result<(), CudaError> {
        use cublas::sys;
        let kind = |dtype| match dtype {
            DType::F32 => sys::cudaDataType::CUDA_R_32F,
            DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
        };
        let (one, beta) = (1.0f32, if call.add { 1.0f32 } else { 0.0 });
        let (Gemm { element, out_element, n, k, rows, .. }, scalar) =
            (&call, |x: &f32| std::ptr::from_ref(x).cast());
        // SAFETY: the pointers are buffers of this GPU that hold such matrices, which the caller promises; work on them is
        // ordered by the stream that the handle has.
        let done = unsafe {
            cublas::result::gemm_ex(
                self.blas.handle,
                // cuBLAS counts by columns: it sees all three matrices transposed.
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                *n as i32,
                *rows as i32,
                *k as i32,
                scalar(&one),
                call.weight.raw(),
                kind(*element),
                *k as i32,
                call.x.raw(),
                kind(*element),
                call.x_stride as i32,
                scalar(&beta),
                call.out.raw().cast_mut(),
                kind(*out_element),
                call.out_stride as i32,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|e| CudaError::Blas(e.0))
    }
}

/// A product that cuBLAS computes.
pub(crate) struct Gemm {
    /// Format of `x` and `weight`.
    pub element: DType,
    /// Format of `out`.
    pub out_element: DType,
    /// `(n, k)`.
    pub weight: Ptr,
    /// `(rows, k)`.
    pub x: Ptr,
    /// `(rows, n)`.
    pub out: Ptr,
    pub n: usize,
    pub k: usize,
    pub rows: usize,
    pub x_stride: usize,
    pub out_stride: usize,
    pub add: bool,
}

/// A handle of cuBLAS, with memory of its own, so that it allocates none while a step runs.
struct Blas {
    handle: cublas::sys::cublasHandle_t,
    _workspace: Memory,
}

impl Blas {
    fn new(context: &Arc<CudaContext>, stream: &CudaStream) -> Result<Self, CudaError> {
        let workspace = Memory::new(context, BLAS_WORKSPACE)?;
        let failed = |e: cublas::result::CublasError| CudaError::Blas(e.0);
        let handle = cublas::result::create_handle().map_err(failed)?;
        let blas = Blas { handle, _workspace: workspace };
        // SAFETY: the stream outlives the handle (the GPU owns both), and so does the workspace.
        unsafe {
            cublas::result::set_stream(handle, stream.cu_stream().cast()).map_err(failed)?;
            let at: *mut c_void = blas._workspace.ptr().raw().cast_mut();
            cublas::sys::cublasSetWorkspace_v2(handle, at, BLAS_WORKSPACE as usize)
                .result()
                .map_err(failed)?;
        }
        Ok(blas)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made in `new`, used nowhere else.
        let _ = unsafe { cublas::result::destroy_handle(self.handle) };
    }
}
