//! Tensors in host memory as the bytes that links carry, and back. All elements are little-endian.

use candle_core::{CpuStorage, Device, Storage, Tensor};
use half::{bf16, f16};
use strata_proto::DType;

use super::ops::TensorSpec;

/// What a tensor is; `None` if no link can carry it: it is no contiguous matrix of f32, bf16 or f16 in host memory.
pub(crate) fn spec_of(tensor: &Tensor) -> Option<TensorSpec> {
    let (rows, columns) = tensor.dims2().ok()?;
    let dtype = match tensor.dtype() {
        candle_core::DType::F32 => DType::F32,
        candle_core::DType::BF16 => DType::BF16,
        candle_core::DType::F16 => DType::F16,
        _ => return None,
    };
    (tensor.is_contiguous() && tensor.device().is_cpu()).then_some(TensorSpec { dtype, rows, columns })
}

/// candle's name for a format.
pub(crate) fn candle_dtype(dtype: DType) -> candle_core::DType {
    match dtype {
        DType::F32 => candle_core::DType::F32,
        DType::BF16 => candle_core::DType::BF16,
        DType::F16 => candle_core::DType::F16,
    }
}

/// Writes the elements of a tensor that has a [spec](spec_of); of another one, nothing.
pub(crate) fn bytes_of(tensor: &Tensor, out: &mut [u8]) {
    fn put<T: Copy, const N: usize>(out: &mut [u8], values: &[T], bytes: impl Fn(T) -> [u8; N]) {
        out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, x)| *o = bytes(*x));
    }
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        return;
    };
    match storage {
        CpuStorage::F32(v) => put(out, &v[start..end], f32::to_le_bytes),
        CpuStorage::BF16(v) => put(out, &v[start..end], bf16::to_le_bytes),
        CpuStorage::F16(v) => put(out, &v[start..end], f16::to_le_bytes),
        _ => {}
    }
}

/// The tensor whose elements these are.
///
/// # Errors
/// If they are fewer or more than it has.
pub(crate) fn tensor_of(bytes: &[u8], spec: &TensorSpec) -> candle_core::Result<Tensor> {
    let (dims, host) = ((spec.rows, spec.columns), &Device::Cpu);
    let halves = || bytes.as_chunks().0.iter();
    match spec.dtype {
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
