//! GPUs: what there is, memory, kernels of our own (compiled when a stage starts), and cuBLAS for large products.
//!
//! The libraries of CUDA are loaded when they are first needed, so one binary runs with and without GPUs. A `Gpu`
//! belongs to one stage thread; everything it does goes through one stream, in order.

pub(crate) mod activations;
mod compile;
mod disk;
pub(crate) mod gate;
pub(crate) mod launch;
mod library;
pub(crate) mod limits;
pub(crate) mod measure;
pub(crate) mod memory;
pub(crate) mod product;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::HashMap,
    ffi::c_void,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::{
    cublas,
    driver::{self, CudaContext, CudaModule, CudaStream, DriverError, sys::CUdevice_attribute},
    nvrtc::Ptx,
};
use strata_proto::{DType, Library};

pub(crate) use self::activations::DeviceTensors;
pub(crate) use self::{compile::counts, library::path_of};
use self::{
    gate::Handle,
    launch::Kernels,
    library::{Cuda, cuda, cuda_version, has_driver},
    limits::BLAS_WORKSPACE,
    memory::{Memory, Ptr},
};

/// What a GPU could not do.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library is not there, or of another installation than the others.
    #[error("{0}")]
    Library(String),
    /// The driver refused, or a kernel failed.
    #[error("{doing}: {source}")]
    Driver {
        /// What was being done.
        doing: &'static str,
        /// The driver's reason.
        source: DriverError,
    },
    /// The driver does not take what the compiler makes.
    #[error(
        "the driver, for CUDA {driver}, does not take kernels from {compiler}: {source}; install a driver for that version of \
         CUDA or a newer one, or put a libnvrtc of CUDA {driver} or an older one first in LD_LIBRARY_PATH"
    )]
    Kernels {
        /// The driver's version of CUDA.
        driver: String,
        /// The compiler, with version and path.
        compiler: String,
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
    #[error(
        "there is no GPU {ordinal}: this machine has {count}, counted from cuda:0; name one of those, or the device cpu"
    )]
    NoGpu {
        /// What was asked for.
        ordinal: usize,
        /// What there is.
        count: usize,
    },
    /// Less memory is free than is needed.
    #[error(
        "out of GPU memory: {bytes} bytes were asked for, {free} of {total} are free; end what else uses this GPU, or let \
         Strata have less of it, with a cap as in cuda:0=20GiB or a shorter --context"
    )]
    Memory {
        /// Asked for at once.
        bytes: u64,
        /// Free then.
        free: u64,
        /// All of the GPU's.
        total: u64,
    },
    /// More memory than was planned: a defect of ours.
    #[error("internal error: {bytes} bytes of GPU memory more are used than were counted")]
    Uncounted {
        /// What there is no room for.
        bytes: u64,
    },
    /// cuBLAS refused.
    #[error("cuBLAS: {0}")]
    Blas(String),
    /// A GPU that is too old.
    #[error("GPU {name} has compute capability {major}.{minor}: expected 8.0 or more; use the device cpu")]
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
        self.map_err(|source| CudaError::of_driver(what, source))
    }
}

impl CudaError {
    /// What the driver refused. Every error of the driver becomes one here, whoever asked it for something.
    pub(crate) fn of_driver(doing: &'static str, source: DriverError) -> Self {
        CudaError::Driver { doing, source }.survived()
    }

    /// The error, unless the GPU is lost to this process, which then ends: only a new process gets it back, and this
    /// one's memory would only be in the way. The coordinator sees the worker go.
    pub(crate) fn survived(self) -> Self {
        if self.is_sticky() {
            tracing::error!(error = %self, "the GPU failed in a way that this process cannot recover from; it ends");
            std::process::exit(70);
        }
        self
    }

    /// Whether nothing on this GPU will work again in this process (a kernel that read or wrote where it must not, or
    /// hardware that failed), as opposed to one call that was refused.
    pub fn is_sticky(&self) -> bool {
        use driver::sys::cudaError_enum as E;
        let CudaError::Driver { source, .. } = self else { return false };
        matches!(
            source.0,
            // Of these, cuda.h says that the process must be terminated and relaunched.
            E::CUDA_ERROR_CONTAINED
                | E::CUDA_ERROR_ILLEGAL_ADDRESS
                | E::CUDA_ERROR_LAUNCH_TIMEOUT
                | E::CUDA_ERROR_ASSERT
                | E::CUDA_ERROR_HARDWARE_STACK_ERROR
                | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | E::CUDA_ERROR_MISALIGNED_ADDRESS
                | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | E::CUDA_ERROR_INVALID_PC
                | E::CUDA_ERROR_LAUNCH_FAILED
                | E::CUDA_ERROR_TENSOR_MEMORY_LEAK
                | E::CUDA_ERROR_MPS_CLIENT_TERMINATED
                | E::CUDA_ERROR_EXTERNAL_DEVICE
                // Of these, that hardware failed while it worked.
                | E::CUDA_ERROR_ECC_UNCORRECTABLE
                | E::CUDA_ERROR_NVLINK_UNCORRECTABLE
        )
    }
}

/// What is known of a GPU before it is used.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GpuInfo {
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

/// How many GPUs this machine has; none where there is no driver.
///
/// # Errors
/// If there is a driver, and it does not work.
pub(crate) fn count() -> Result<usize, CudaError> {
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
pub(crate) fn info(ordinal: usize) -> Result<GpuInfo, CudaError> {
    cuda()?;
    let context = context(ordinal)?;
    let (free, total) = context.mem_get_info().doing("asking for free memory")?;
    let mut peers = Vec::new();
    for other in 0..count()? {
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

/// The libraries of CUDA that GPUs are used by.
///
/// # Errors
/// If one is missing that every stage needs.
pub(crate) fn libraries() -> Result<&'static [Library], CudaError> {
    Ok(cuda()?.libraries())
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

/// The context of a GPU: one per process, from its first use to the process's end, so that none is made or destroyed
/// while others compute. Each can copy from the memory of those that are open by then, where the hardware can.
pub(crate) fn context(ordinal: usize) -> Result<Arc<CudaContext>, CudaError> {
    static OPEN: Mutex<Vec<Arc<CudaContext>>> = Mutex::new(Vec::new());
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(context) = open.iter().find(|context| context.ordinal() == ordinal) {
        return Ok(context.clone());
    }
    let count = count()?;
    if ordinal >= count {
        return Err(CudaError::NoGpu { ordinal, count });
    }
    let _turn = gate::changing();
    let context = CudaContext::new(ordinal).doing("opening a GPU")?;
    // SAFETY: no buffer of this context is tracked; order comes from using one stream, and from waiting for it. With
    // tracking, the first stream would also wait for all that the GPU does.
    unsafe { context.disable_event_tracking() };
    for other in &*open {
        for (own, other) in [(&context, other), (other, &context)] {
            memory::reach(own, other)?;
        }
    }
    open.push(context.clone());
    Ok(context)
}

/// A GPU in use by one stage.
pub(crate) struct Gpu {
    // Dropped in this order: what uses a stream before the stream.
    blas: Blas,
    pub stream: Handle<Arc<CudaStream>>,
    pub context: Arc<CudaContext>,
    pub multiprocessors: u32,
    /// Most bytes of shared memory for a block.
    shared: u32,
    pub capability: (i32, i32),
    cuda: &'static Cuda,
    /// Where compiled kernels are kept.
    kernel_cache: Option<PathBuf>,
}

impl Gpu {
    /// Opens a GPU, with a stream of its own.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let cuda = cuda()?;
        let context = context(ordinal)?;
        let capability = context.compute_capability().doing("asking for a GPU's capability")?;
        if capability.0 < 8 {
            let name = context.name().doing("asking for a GPU's name")?;
            return Err(CudaError::TooOld { name, major: capability.0, minor: capability.1 });
        }
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).doing("asking for multiprocessors")? as u32;
        let most = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared = context.attribute(most).doing("asking for shared memory")? as u32;
        let stream = Handle::new(|| context.new_stream()).doing("making a stream")?;
        let blas = Blas::new(cuda, &context, &stream)?;
        Ok(Gpu { blas, stream, context, multiprocessors, shared, capability, cuda, kernel_cache: None })
    }

    /// The same, which keeps compiled kernels in a directory, if there is one.
    pub fn keeping_kernels_in(mut self, directory: Option<PathBuf>) -> Self {
        self.kernel_cache = directory;
        self
    }

    /// The kernels for a format and a width of heads, compiled at most once per process.
    pub fn kernels(&self, element: DType, head_dim: usize) -> Result<Kernels, CudaError> {
        let module = self.module(element, head_dim)?;
        let _turn = gate::changing();
        Kernels::load(&module, element, head_dim, self.shared).doing("finding a kernel")
    }

    /// Makes the kernels for several widths of heads ready, those that have to be compiled at once.
    pub fn compile(&self, element: DType, head_dims: &[usize]) -> Result<(), CudaError> {
        let (cuda, capability, directory) = (self.cuda, self.capability, self.kernel_cache.as_deref());
        let one = |head_dim| compile::kernels(cuda, capability, element, head_dim, directory).map(|_| ());
        std::thread::scope(|scope| {
            let others = head_dims.iter().skip(1).map(|head_dim| scope.spawn(|| one(*head_dim)));
            let others: Vec<_> = others.collect();
            let first = head_dims.first().map_or(Ok(()), |head_dim| one(*head_dim));
            let joined = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            others.into_iter().map(joined).fold(first, Result::and)
        })
    }

    /// A module, loaded once per GPU: it stays until the process ends, so that none is unloaded while others compute.
    fn module(&self, element: DType, head_dim: usize) -> Result<Arc<CudaModule>, CudaError> {
        use driver::sys::cudaError_enum as E;
        type Key = (usize, DType, usize);
        static LOADED: Mutex<Option<HashMap<Key, Arc<CudaModule>>>> = Mutex::new(None);
        let directory = self.kernel_cache.as_deref();
        let image = compile::kernels(self.cuda, self.capability, element, head_dim, directory)?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        let key = (self.context.ordinal(), element, head_dim);
        if let Some(module) = loaded.get(&key) {
            return Ok(module.clone());
        }
        let _turn = gate::changing();
        let module =
            self.context.load_module(Ptx::from_binary(image.to_vec())).map_err(|source| match source.0 {
                E::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
                | E::CUDA_ERROR_NO_BINARY_FOR_GPU
                | E::CUDA_ERROR_INVALID_IMAGE
                | E::CUDA_ERROR_INVALID_PTX => CudaError::Kernels {
                    driver: cuda_version(self.cuda.driver),
                    compiler: self.cuda.named("NVRTC"),
                    source,
                },
                _ => CudaError::of_driver("loading kernels", source),
            })?;
        loaded.insert(key, module.clone());
        Ok(module)
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
        // SAFETY: the pointers are buffers of this GPU that hold such matrices, which the caller promises; work on them
        // is ordered by the stream that the handle has.
        let done = unsafe {
            (self.cuda.blas.gemm)(
                self.blas.handle.handle,
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
        self.cuda.blas.check(done)
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
    handle: Handle<BlasHandle>,
    _workspace: Memory,
}

struct BlasHandle {
    calls: &'static library::BlasCalls,
    handle: cublas::sys::cublasHandle_t,
}

impl Drop for BlasHandle {
    fn drop(&mut self) {
        // SAFETY: made in `Blas::new`, used nowhere else.
        unsafe { (self.calls.destroy)(self.handle) };
    }
}

impl Blas {
    fn new(cuda: &'static Cuda, context: &Arc<CudaContext>, stream: &CudaStream) -> Result<Self, CudaError> {
        let workspace = Memory::new(context, BLAS_WORKSPACE)?;
        let calls = &cuda.blas;
        context.bind_to_thread().doing("binding a GPU")?;
        let handle = Handle::new(|| {
            let mut handle = std::ptr::null_mut();
            // SAFETY: the pointer is of a handle, which is used only if it was made.
            calls.check(unsafe { (calls.create)(&mut handle) })?;
            Ok::<_, CudaError>(BlasHandle { calls, handle })
        })?;
        let blas = Blas { handle, _workspace: workspace };
        let handle = blas.handle.handle;
        // SAFETY: the stream outlives the handle (the GPU owns both), and so does the workspace.
        unsafe {
            calls.check((calls.set_stream)(handle, stream.cu_stream().cast()))?;
            let at: *mut c_void = blas._workspace.ptr().raw().cast_mut();
            calls.check((calls.set_workspace)(handle, at, BLAS_WORKSPACE as usize))?;
        }
        Ok(blas)
    }
}
