//! Rows of the residual stream in a GPU's memory, on their way from stage to stage.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{CpuStorage, Storage, Tensor};
use cudarc::driver::{CudaContext, CudaStream};
use half::{bf16, f16};
use strata_proto::DType;

use super::{
    CudaError, Doing,
    gate::Handle,
    memory::{self, Memory, Pinned, Ptr},
};
use crate::kernels::ops::TensorSpec;

/// Bytes before the rows of a slot: what a link has to say beside them.
pub(crate) const HEAD: u64 = 256;

/// Buffers for activations, each for the longest step, used again and again.
#[derive(Clone)]
pub(crate) struct Slots(Arc<Pool>);

struct Pool {
    context: Arc<CudaContext>,
    /// For copies that a stage's own stream has no part in.
    stream: Handle<Arc<CudaStream>>,
    bytes: u64,
    free: Mutex<Vec<Slot>>,
}

/// Memory of one activation, and host memory to stage it.
struct Slot {
    memory: Memory,
    pinned: Pinned,
}

impl Slots {
    /// So many slots for activations of at most `bytes` bytes.
    pub fn new(context: &Arc<CudaContext>, bytes: u64, count: usize) -> Result<Self, CudaError> {
        let stream = Handle::new(|| context.new_stream()).doing("making a stream")?;
        let pool = Pool { context: context.clone(), stream, bytes, free: Mutex::default() };
        let free = (0..count).map(|_| pool.slot()).collect::<Result<_, _>>()?;
        *pool.free.lock().unwrap_or_else(PoisonError::into_inner) = free;
        Ok(Slots(Arc::new(pool)))
    }

    /// Room for rows of a shape. No memory is allocated for it.
    ///
    /// # Errors
    /// If there is none: links bound how many rows are under way, so that is a defect of ours.
    pub fn rows(&self, shape: TensorSpec) -> Result<DeviceRows, CudaError> {
        let free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let slot = free.ok_or(CudaError::Uncounted { bytes: HEAD + self.0.bytes })?;
        Ok(DeviceRows { slot: Some(slot), shape, home: self.clone() })
    }
}

impl Pool {
    fn slot(&self) -> Result<Slot, CudaError> {
        Ok(Slot {
            memory: Memory::new(&self.context, HEAD + self.bytes)?,
            pinned: Pinned::new(&self.context, (HEAD + self.bytes) as usize)?,
        })
    }
}

/// Rows `(tokens, width)` in the memory of a GPU. All work that wrote them is done.
pub struct DeviceRows {
    slot: Option<Slot>,
    shape: TensorSpec,
    home: Slots,
}

impl fmt::Debug for DeviceRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceRows").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl Drop for DeviceRows {
    fn drop(&mut self) {
        let mut free = self.home.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(self.slot.take());
    }
}

impl DeviceRows {
    /// What they are.
    pub fn shape(&self) -> TensorSpec {
        self.shape
    }

    /// Bytes of the rows.
    pub(crate) fn bytes(&self) -> u64 {
        let TensorSpec { dtype, rows, columns } = self.shape;
        (rows * columns) as u64 * dtype.size()
    }

    /// Where the rows begin.
    pub(crate) fn ptr(&self) -> Ptr {
        self.frame().offset(HEAD)
    }

    /// Where the bytes before them begin.
    pub(crate) fn frame(&self) -> Ptr {
        self.slot.as_ref().map_or(Ptr::NULL, |slot| slot.memory.ptr())
    }

    /// Copies the rows to a place on the GPU of `stream`, in order.
    pub(crate) fn copy_to(&self, stream: &CudaStream, to: Ptr) -> Result<(), CudaError> {
        memory::copy_from(stream, to, &self.home.0.context, self.ptr(), self.bytes())
    }

    /// Host memory for all of a slot, and the rows' home's stream.
    pub(crate) fn staging(&mut self) -> (&mut [u8], Arc<CudaStream>) {
        let stream = self.home.0.stream.clone();
        (self.slot.as_mut().map_or(&mut [], |slot| slot.pinned.as_mut()), stream)
    }

    /// The rows in host memory.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn to_host(mut self) -> Result<Tensor, CudaError> {
        let (from, bytes, TensorSpec { dtype, rows, columns }) = (self.ptr(), self.bytes(), self.shape);
        let (staging, stream) = self.staging();
        let staging = &mut staging[..bytes as usize];
        memory::download(&stream, staging, from)?;
        stream.synchronize().doing("copying from a GPU")?;
        let tensor = tensor_of(staging, dtype, (rows, columns));
        // Of whole elements, which these are, a tensor can always be made.
        Ok(tensor.unwrap_or_else(|_| unreachable!("a slot holds whole elements")))
    }

    /// Takes over rows of host memory.
    pub(crate) fn fill(mut self, tensor: &Tensor) -> Result<Self, CudaError> {
        let (to, bytes) = (self.ptr(), self.bytes());
        let (staging, stream) = self.staging();
        let staging = &mut staging[..bytes as usize];
        bytes_of(tensor, staging);
        memory::upload(&stream, to, staging)?;
        stream.synchronize().doing("copying to a GPU")?;
        Ok(self)
    }
}

fn tensor_of(bytes: &[u8], dtype: DType, dims: (usize, usize)) -> candle_core::Result<Tensor> {
    let host = &candle_core::Device::Cpu;
    let halves = || bytes.as_chunks().0.iter();
    match dtype {
        DType::F32 => {
            let words = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
            Tensor::from_vec(words.collect::<Vec<_>>(), dims, host)
        }
        DType::BF16 => {
            Tensor::from_vec(halves().map(|b| bf16::from_le_bytes(*b)).collect::<Vec<_>>(), dims, host)
        }
        DType::F16 => {
            Tensor::from_vec(halves().map(|b| f16::from_le_bytes(*b)).collect::<Vec<_>>(), dims, host)
        }
    }
}

/// Writes the elements of a contiguous tensor in host memory.
pub(crate) fn bytes_of(tensor: &Tensor, out: &mut [u8]) {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        unreachable!("links deliver contiguous tensors in host memory");
    };
    fn put<T: Copy, const N: usize>(out: &mut [u8], values: &[T], bytes: impl Fn(T) -> [u8; N]) {
        out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, x)| *o = bytes(*x));
    }
    match storage {
        CpuStorage::F32(v) => put(out, &v[start..end], f32::to_le_bytes),
        CpuStorage::BF16(v) => put(out, &v[start..end], bf16::to_le_bytes),
        CpuStorage::F16(v) => put(out, &v[start..end], f16::to_le_bytes),
        _ => unreachable!("links deliver f32, bf16 and f16"),
    }
}
