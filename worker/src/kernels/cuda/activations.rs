//! Activations in a GPU's memory, on their way from stage to stage: all tensors of one in one slot, one after the
//! other.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::Tensor;
use cudarc::driver::{CudaContext, CudaStream};

use super::{
    CudaError, Doing,
    gate::Handle,
    memory::{self, Memory, Pinned, Ptr},
};
use crate::kernels::{
    ops::TensorSpec,
    tensor::{bytes_of, tensor_of},
};

/// Bytes before the tensors of a slot: what a link has to say beside them.
pub(crate) const HEAD: u64 = 256;
/// Where a tensor may begin in a slot: what the widest loads of kernels need, and more.
const ALIGNMENT: usize = 256;

/// Bytes of all tensors in a slot, those between them included.
pub(crate) fn room_for(specs: &[TensorSpec]) -> u64 {
    specs.iter().map(|spec| spec.bytes().next_multiple_of(ALIGNMENT) as u64).sum()
}

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
    /// So many slots for activations as long as `longest`, or shorter.
    pub fn new(context: &Arc<CudaContext>, longest: &[TensorSpec], count: usize) -> Result<Self, CudaError> {
        let bytes = room_for(longest);
        let stream = Handle::new(|| context.new_stream()).doing("making a stream")?;
        let pool = Pool { context: context.clone(), stream, bytes, free: Mutex::default() };
        let free = (0..count).map(|_| pool.slot()).collect::<Result<_, _>>()?;
        *pool.free.lock().unwrap_or_else(PoisonError::into_inner) = free;
        Ok(Slots(Arc::new(pool)))
    }

    /// Room for the tensors of an activation. No memory is allocated for it.
    ///
    /// # Errors
    /// If there is none: links bound how many activations are under way, and how long each is, so that is a defect of
    /// ours.
    pub fn tensors(&self, specs: Vec<TensorSpec>) -> Result<DeviceTensors, CudaError> {
        let (bytes, most) = (room_for(&specs), self.0.bytes);
        let mut free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = if bytes <= most { free.pop() } else { None };
        let slot = slot.ok_or(CudaError::Uncounted { bytes: HEAD + bytes })?;
        Ok(DeviceTensors { slot: Some(slot), specs, home: self.clone() })
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

/// The tensors of an activation in the memory of a GPU. All work that wrote them is done.
pub struct DeviceTensors {
    slot: Option<Slot>,
    specs: Vec<TensorSpec>,
    home: Slots,
}

impl fmt::Debug for DeviceTensors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceTensors").field("specs", &self.specs).finish_non_exhaustive()
    }
}

impl Drop for DeviceTensors {
    fn drop(&mut self) {
        let mut free = self.home.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(self.slot.take());
    }
}

impl DeviceTensors {
    /// What they are, in order.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// Bytes of all of them, those between them included.
    pub(crate) fn bytes(&self) -> u64 {
        room_for(&self.specs)
    }

    /// Where the slot begins, with the bytes before the tensors.
    pub(crate) fn frame(&self) -> Ptr {
        self.slot.as_ref().map_or(Ptr::NULL, |slot| slot.memory.ptr())
    }

    /// Where the tensors begin, one after the other, in bytes from the end of the head.
    fn offsets(&self) -> impl Iterator<Item = (usize, &TensorSpec)> {
        self.specs.iter().scan(0, |at, spec| {
            let next = *at + spec.bytes().next_multiple_of(ALIGNMENT);
            Some((std::mem::replace(at, next), spec))
        })
    }

    /// Where the first of them begins: the residual stream.
    pub(crate) fn first(&self) -> Ptr {
        self.frame().offset(HEAD)
    }

    /// Copies the first of them to a place on the GPU of `stream`, in order.
    pub(crate) fn copy_first_to(&self, stream: &CudaStream, to: Ptr) -> Result<(), CudaError> {
        let bytes = self.specs.first().map_or(0, TensorSpec::bytes);
        memory::copy_from(stream, to, &self.home.0.context, self.first(), bytes as u64)
    }

    /// Host memory for all of a slot, and the tensors' home's stream.
    pub(crate) fn staging(&mut self) -> (&mut [u8], Arc<CudaStream>) {
        let stream = self.home.0.stream.clone();
        (self.slot.as_mut().map_or(&mut [], |slot| slot.pinned.as_mut()), stream)
    }

    /// The tensors in host memory.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn into_host(mut self) -> Result<Vec<Tensor>, CudaError> {
        let (from, bytes) = (self.first(), self.bytes() as usize);
        let places: Vec<_> = self.offsets().map(|(at, spec)| (at, *spec)).collect();
        let (staging, stream) = self.staging();
        let staging = &mut staging[..bytes];
        memory::download(&stream, staging, from)?;
        stream.synchronize().doing("copying from a GPU")?;
        let tensor = |(at, spec): (usize, TensorSpec)| tensor_of(&staging[at..][..spec.bytes()], &spec);
        let tensors = places.into_iter().map(tensor).collect::<candle_core::Result<_>>();
        // Of whole elements, which these are, a tensor can always be made.
        Ok(tensors.unwrap_or_else(|_| unreachable!("a slot holds whole elements")))
    }

    /// Takes over tensors of host memory, which are as its specs say.
    pub(crate) fn fill(mut self, tensors: &[Tensor]) -> Result<Self, CudaError> {
        let (to, bytes) = (self.first(), self.bytes() as usize);
        let places: Vec<_> = self.offsets().map(|(at, spec)| at..at + spec.bytes()).collect();
        let (staging, stream) = self.staging();
        let staging = &mut staging[..bytes];
        for (tensor, place) in tensors.iter().zip(places) {
            bytes_of(tensor, &mut staging[place]);
        }
        memory::upload(&stream, to, staging)?;
        stream.synchronize().doing("copying to a GPU")?;
        Ok(self)
    }
}
