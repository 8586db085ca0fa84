//! Aligned anonymous memory for weights, cache and workspace, with sizes that a plan can predict.

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut},
};

use half::{bf16, f16};
use strata_proto::DType;

/// Bytes of one cache line, the alignment and the granularity of every buffer.
pub const LINE: usize = 64;

/// Memory could not be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("out of memory: {bytes} bytes could not be allocated")]
pub struct OutOfMemory {
    /// What was asked for.
    pub bytes: u64,
}

mod sealed {
    /// Types without padding for which any bit pattern, zero included, is a value.
    pub trait Plain: Copy + Send + Sync + 'static {}
    impl Plain for f32 {}
    impl Plain for u32 {}
    impl Plain for half::bf16 {}
    impl Plain for half::f16 {}
}
use sealed::Plain;

/// A storage format of weights and cache; conversion to f32 is exact, from f32 rounds to nearest even.
pub trait Element: Plain {
    /// Its name outside.
    const DTYPE: DType;
    /// Rounds to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
    /// Widens exactly; written so that a loop over it vectorises on every instruction set.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // No branch and no subnormal operand. Normal numbers get the bias of f32; a subnormal m * 2^-24 is
        // (1 + m / 1024) * 2^-14 - 2^-14; and only an exponent field of ones carries into bit 15.
        let bits = u32::from(self.to_bits());
        let shifted = (bits & 0x7fff) << 13;
        let normal = shifted + (112 << 23);
        let subnormal = (f32::from_bits(shifted | (113 << 23)) - f32::from_bits(113 << 23)).to_bits();
        let is_subnormal = 0u32.wrapping_sub(((bits & 0x7c00).wrapping_sub(1)) >> 31);
        let special = 0u32.wrapping_sub(((bits & 0x7c00) + 0x0400) >> 15) & 0x7f80_0000;
        let magnitude = (subnormal & is_subnormal) | (normal & !is_subnormal) | special;
        f32::from_bits(magnitude | ((bits & 0x8000) << 16))
    }
}

/// Rounds `x` to `dtype` and widens it again.
#[inline(always)]
pub fn round_to(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::BF16 => <bf16 as Element>::to_f32(bf16::from_f32(x)),
        DType::F16 => <f16 as Element>::to_f32(f16::from_f32(x)),
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// A fixed number of elements in zeroed anonymous memory, aligned to [`LINE`] bytes.
pub struct Buffer<T> {
    lines: Vec<Line>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// Bytes that `len` elements occupy.
    pub fn bytes_for(len: usize) -> u64 {
        (len as u64).saturating_mul(size_of::<T>() as u64).div_ceil(LINE as u64).saturating_mul(LINE as u64)
    }

    /// `len` zeros. Every page is touched now, so that a later step cannot run out of memory.
    pub fn zeros(len: usize) -> Result<Self, OutOfMemory> {
        let bytes = Self::bytes_for(len);
        let count = usize::try_from(bytes / LINE as u64).map_err(|_| OutOfMemory { bytes })?;
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).map_err(|_| OutOfMemory { bytes })?;
        lines.resize(count, Line([0; LINE]));
        Ok(Buffer { lines, len, element: PhantomData })
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> u64 {
        (self.lines.len() * LINE) as u64
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `lines` owns at least `len * size_of::<T>()` initialised bytes, aligned to 64, and a `Plain` type
        // accepts any bit pattern.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// A buffer in one of the storage formats.
pub enum Values {
    /// IEEE binary32.
    F32(Buffer<f32>),
    /// bfloat16.
    BF16(Buffer<bf16>),
    /// IEEE binary16.
    F16(Buffer<f16>),
}

/// Runs one expression for whichever format a [`Values`] holds.
macro_rules! with_values {
    ($values:expr, $v:ident => $body:expr) => {
        match $values {
            $crate::kernels::buffer::Values::F32($v) => $body,
            $crate::kernels::buffer::Values::BF16($v) => $body,
            $crate::kernels::buffer::Values::F16($v) => $body,
        }
    };
}
pub(crate) use with_values;

impl Values {
    /// Bytes that `len` elements occupy.
    pub fn bytes_for(len: usize, dtype: DType) -> u64 {
        match dtype {
            DType::F32 => Buffer::<f32>::bytes_for(len),
            DType::BF16 => Buffer::<bf16>::bytes_for(len),
            DType::F16 => Buffer::<f16>::bytes_for(len),
        }
    }

    /// `len` zeros.
    pub fn zeros(len: usize, dtype: DType) -> Result<Self, OutOfMemory> {
        Ok(match dtype {
            DType::F32 => Values::F32(Buffer::zeros(len)?),
            DType::BF16 => Values::BF16(Buffer::zeros(len)?),
            DType::F16 => Values::F16(Buffer::zeros(len)?),
        })
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> u64 {
        with_values!(self, v => v.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_f16_is_exact_for_every_bit_pattern() {
        for bits in 0..=u16::MAX {
            let h = f16::from_bits(bits);
            let (ours, theirs) = (Element::to_f32(h), h.to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#x}");
        }
    }

    #[test]
    fn buffers_are_aligned_and_count_whole_lines() {
        let b = Buffer::<f32>::zeros(17).unwrap();
        assert_eq!((b.len(), b.bytes(), b.as_ptr() as usize % LINE), (17, 128, 0));
        assert!(Buffer::<f32>::zeros(usize::MAX / 8).is_err());
        assert!(Buffer::<f32>::zeros(usize::MAX).is_err());
    }
}
