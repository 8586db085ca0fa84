//! Memory of a GPU, and host memory that it can copy from and to by itself.

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::{CudaContext, CudaStream, DeviceRepr, result, sys};

use super::{CudaError, Doing, gate};
use crate::kernels::buffer::LINE;

/// A place in a GPU's memory; whoever made the memory keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub(crate) struct Ptr(pub u64);

// SAFETY: one number, which kernels take as a pointer.
unsafe impl DeviceRepr for Ptr {}

impl Ptr {
    /// Nothing.
    pub const NULL: Ptr = Ptr(0);

    /// So many bytes further.
    pub fn offset(self, bytes: u64) -> Ptr {
        Ptr(self.0 + bytes)
    }

    /// As C has it.
    pub fn raw(self) -> *const c_void {
        self.0 as *const c_void
    }
}

/// Memory of a GPU, zero at first.
pub(crate) struct Memory {
    at: Ptr,
    bytes: u64,
    context: Arc<CudaContext>,
}

impl Memory {
    pub fn new(context: &Arc<CudaContext>, bytes: u64) -> Result<Self, CudaError> {
        let bytes = bytes.max(1);
        let _turn = gate::changing();
        context.bind_to_thread().doing("binding a GPU")?;
        // A stream of its own, so that nothing is waited for but this.
        let stream = context.new_stream().doing("making a stream")?;
        // SAFETY: the pointer is freed when this is dropped, and not before; nothing reads it before it is zeroed.
        unsafe {
            let at = result::malloc_sync(bytes as usize).or_else(|error| match error.0 {
                sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => {
                    let (free, total) = context.mem_get_info().doing("asking for free memory")?;
                    Err(CudaError::Memory { bytes, free: free as u64, total: total as u64 })
                }
                _ => Err(error).doing("allocating GPU memory"),
            })?;
            let memory = Memory { at: Ptr(at), bytes, context: context.clone() };
            zero(&stream, memory.at, bytes)?;
            stream.synchronize().doing("zeroing GPU memory")?;
            Ok(memory)
        }
    }

    pub fn ptr(&self) -> Ptr {
        self.at
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _turn = gate::changing();
        // SAFETY: made by `new`; the driver waits for work that uses it.
        let freed = self.context.bind_to_thread().and_then(|()| unsafe { result::free_sync(self.at.0) });
        // It waited for that work, so it may be the first to hear that the work failed; else there is nothing to be
        // done.
        let _ = freed.doing("freeing GPU memory");
    }
}

/// Memory that is handed out piece by piece.
pub(crate) struct Arena {
    memory: Memory,
    used: u64,
}

impl Arena {
    pub fn new(context: &Arc<CudaContext>, bytes: u64) -> Result<Self, CudaError> {
        // At least something, of whole lines.
        let bytes = bytes.max(1).next_multiple_of(LINE as u64);
        Ok(Arena { memory: Memory::new(context, bytes)?, used: 0 })
    }

    /// So many bytes, which begin on a line.
    ///
    /// # Errors
    /// If less is left: what is taken was counted before, so that is a defect of ours.
    pub fn take(&mut self, bytes: u64) -> Result<Ptr, CudaError> {
        let (at, bytes) = (self.memory.ptr().offset(self.used), bytes.next_multiple_of(LINE as u64));
        if bytes > self.memory.bytes() - self.used {
            return Err(CudaError::Uncounted { bytes });
        }
        self.used += bytes;
        Ok(at)
    }
}

impl Arena {
    /// Copies its bytes from `first` on to host memory, in order; `to` must not be read before the stream has come so far.
    pub fn read(&self, stream: &CudaStream, first: u64, to: &mut [u8]) -> Result<(), CudaError> {
        if first.saturating_add(to.len() as u64) > self.memory.bytes() {
            return Err(CudaError::Uncounted { bytes: to.len() as u64 });
        }
        stream.context().bind_to_thread().doing("binding a GPU")?;
        // SAFETY: there are as many bytes.
        unsafe { result::memcpy_dtoh_async(to, self.memory.ptr().offset(first).0, stream.cu_stream()) }
            .doing("copying from a GPU")
    }
}

/// Host memory that a GPU reads and writes without the processor's help.
pub(crate) struct Pinned {
    at: *mut u8,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: plain memory that this value owns alone.
unsafe impl Send for Pinned {}

impl Pinned {
    pub fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, CudaError> {
        let bytes = bytes.max(1);
        let _turn = gate::changing();
        context.bind_to_thread().doing("binding a GPU")?;
        // SAFETY: freed when this is dropped; zeroed before anybody reads it.
        unsafe {
            let at = result::malloc_host(bytes, 0).doing("pinning host memory")?.cast::<u8>();
            at.write_bytes(0, bytes);
            Ok(Pinned { at, bytes, context: context.clone() })
        }
    }

    /// Its content as elements. The GPU must not be writing it.
    pub fn as_mut<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: owned, initialised, aligned to a page, and any bits are such elements; `&mut self` makes it
        // exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.bytes / size_of::<T>()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _turn = gate::changing();
        // SAFETY: made by `new`.
        let _ = self.context.bind_to_thread().and_then(|()| unsafe { result::free_host(self.at.cast()) });
    }
}

/// What pinned memory may hold: any bits are a value.
pub(crate) trait Element: Copy {}
impl Element for u8 {}
impl Element for u32 {}
impl Element for f32 {}

/// Copies host memory to the GPU, in order; `from` must stay as it is until the stream has come so far.
pub(crate) fn upload<T: Element>(stream: &CudaStream, to: Ptr, from: &[T]) -> Result<(), CudaError> {
    stream.context().bind_to_thread().doing("binding a GPU")?;
    // SAFETY: the caller's buffer holds as many bytes, and `from` lives on, which it promises.
    unsafe { result::memcpy_htod_async(to.0, from, stream.cu_stream()) }.doing("copying to a GPU")
}

#[cfg(test)]
thread_local! {
    /// Bytes that this thread has asked a GPU for.
    pub(crate) static DOWNLOADED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Copies from the GPU to host memory, in order; `to` must not be read before the stream has come so far.
pub(crate) fn download<T: Element>(stream: &CudaStream, to: &mut [T], from: Ptr) -> Result<(), CudaError> {
    stream.context().bind_to_thread().doing("binding a GPU")?;
    #[cfg(test)]
    DOWNLOADED.set(DOWNLOADED.get() + size_of_val(to) as u64);
    // SAFETY: as in `upload`.
    unsafe { result::memcpy_dtoh_async(to, from.0, stream.cu_stream()) }.doing("copying from a GPU")
}

/// Zeroes memory, in order.
pub(crate) fn zero(stream: &CudaStream, at: Ptr, bytes: u64) -> Result<(), CudaError> {
    stream.context().bind_to_thread().doing("binding a GPU")?;
    // SAFETY: there are as many bytes, which the caller promises.
    unsafe { result::memset_d8_async(at.0, 0, bytes as usize, stream.cu_stream()) }
        .doing("zeroing GPU memory")
}

/// Lets one GPU copy from the memory of another by itself, if the hardware can; otherwise the driver copies by the
/// host.
pub(super) fn reach(own: &CudaContext, other: &CudaContext) -> Result<(), CudaError> {
    if !super::can_copy(own.cu_device(), other.cu_device()) {
        return Ok(());
    }
    own.bind_to_thread().doing("binding a GPU")?;
    // SAFETY: both contexts live.
    match unsafe { sys::cuCtxEnablePeerAccess(other.cu_ctx(), 0) }.result() {
        Ok(()) => Ok(()),
        Err(e) if e.0 == sys::cudaError_enum::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
        Err(error) => {
            let error = CudaError::of_driver("reaching another GPU's memory", error);
            let (from, to) = (other.ordinal(), own.ordinal());
            tracing::warn!(%error, from, to, "copies between these GPUs go by the host");
            Ok(())
        }
    }
}

/// Copies from another GPU (or this one), in order, without the host where the hardware can.
pub(crate) fn copy_from(
    stream: &CudaStream,
    to: Ptr,
    other: &CudaContext,
    from: Ptr,
    bytes: u64,
) -> Result<(), CudaError> {
    let own = stream.context();
    if own.ordinal() == other.ordinal() {
        return copy(stream, to, from, bytes);
    }
    own.bind_to_thread().doing("binding a GPU")?;
    // SAFETY: both contexts live; both places hold as many bytes, which the caller promises.
    unsafe {
        let (own, other) = (own.cu_ctx(), other.cu_ctx());
        result::memcpy_peer_async(own, to.0, other, from.0, bytes as usize, stream.cu_stream())
    }
    .doing("copying from another GPU")
}

/// Copies within a GPU, in order.
pub(crate) fn copy(stream: &CudaStream, to: Ptr, from: Ptr, bytes: u64) -> Result<(), CudaError> {
    stream.context().bind_to_thread().doing("binding a GPU")?;
    // SAFETY: both places hold as many bytes, which the caller promises.
    unsafe { result::memcpy_dtod_async(to.0, from.0, bytes as usize, stream.cu_stream()) }
        .doing("copying on a GPU")
}
