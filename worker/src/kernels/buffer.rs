//! Aligned memory for weights, cache and workspace, with sizes that a plan can predict.

use std::{
    io,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    path::Path,
    sync::Arc,
};

use half::{bf16, f16};
use memmap2::MmapMut;
use strata_proto::DType;

/// Bytes of one cache line, the alignment and the granularity of every buffer.
pub(crate) const LINE: usize = 64;
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// Memory could not be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("out of memory: {bytes} bytes could not be allocated")]
pub struct OutOfMemory {
    /// What was asked for.
    pub bytes: u64,
}

/// A file to map weights from could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    /// The file system is too full.
    #[error(
        "{directory} has {free} bytes free, but weights that stay memory-mapped need {bytes}: free some, or name \
             another directory by --spill-dir"
    )]
    Full {
        /// Where the file was to be.
        directory: String,
        /// What was asked for.
        bytes: u64,
        /// What there is.
        free: u64,
    },
    /// The system refused.
    #[error("{bytes} bytes of weights cannot be memory-mapped in {directory}: {source}")]
    Io {
        /// Where the file was to be.
        directory: String,
        /// What was asked for.
        bytes: u64,
        /// Why not.
        source: io::Error,
    },
}

/// Bytes that a process may still write to the file system of `directory`.
///
/// # Errors
/// If there is no such directory, or nothing can be created in it.
pub(crate) fn free_bytes_in(directory: &Path) -> io::Result<u64> {
    rustix::fs::access(directory, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)?;
    let system = rustix::fs::statvfs(directory)?;
    Ok(system.f_bavail.saturating_mul(system.f_frsize))
}

mod sealed {
    /// Types without padding for which any bit pattern, zero included, is a value.
    pub trait Plain: Copy + Send + Sync + 'static {}
    impl Plain for f32 {}
    impl Plain for u8 {}
    impl Plain for u16 {}
    impl Plain for u32 {}
    impl Plain for half::bf16 {}
    impl Plain for half::f16 {}
    impl<T: Plain, const N: usize> Plain for [T; N] {}
}
pub(crate) use sealed::Plain;

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
        // To nearest, ties to even, and no branch; NaN stays one.
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
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
pub(crate) fn round_to(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::BF16 => <bf16 as Element>::to_f32(<bf16 as Element>::from_f32(x)),
        DType::F16 => <f16 as Element>::to_f32(f16::from_f32(x)),
    }
}

/// Zeroed memory that buffers are cut from: anonymous and on huge pages where the system has them, which a core reads
/// half again as fast; or a file that nobody else sees.
struct Region {
    map: MmapMut,
    /// From the start of the map to the first byte in use, which lies on a huge page's boundary.
    offset: usize,
}

impl Region {
    /// `bytes` of memory. Every page is touched now, so that a later step cannot run out of memory.
    fn new(bytes: u64) -> Result<Self, OutOfMemory> {
        let error = OutOfMemory { bytes };
        let len = usize::try_from(bytes).ok().and_then(|b| b.checked_add(HUGE_PAGE)).ok_or(error)?;
        let mut map = MmapMut::map_anon(len).map_err(|_| error)?;
        let offset = map.as_ptr().align_offset(HUGE_PAGE);
        // Whole ones only, so that no more memory is taken than was counted. A system without them refuses; then there
        // are small ones.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, offset, bytes as usize / HUGE_PAGE * HUGE_PAGE);
        for page in map[offset..].iter_mut().step_by(PAGE).take(bytes.div_ceil(PAGE as u64) as usize) {
            // SAFETY: a reference is valid; volatile, so that the compiler cannot tell that nothing changes.
            unsafe { std::ptr::write_volatile(page, 0) };
        }
        Ok(Region { map, offset })
    }

    /// `bytes` of a temporary file in `directory`. The system writes its pages out and reads them back as it needs, so
    /// that there may be more of them than memory; none is touched now.
    fn mapped(bytes: u64, directory: &Path) -> Result<Self, SpillError> {
        let place = directory.display().to_string();
        let refused = |source: io::Error| SpillError::Io { directory: place.clone(), bytes, source };
        let free = free_bytes_in(directory).map_err(refused)?;
        if free < bytes {
            return Err(SpillError::Full { directory: place, bytes, free });
        }
        // It has no name, so that it goes with the last map of it, whatever becomes of this process.
        let file = tempfile::tempfile_in(directory).map_err(refused)?;
        let bytes = bytes.max(1);
        file.set_len(bytes).map_err(refused)?;
        // A page that finds no room on the disk later would end the process.
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(refused(error.into())),
        }
        // SAFETY: the file has no name, and nobody else has a descriptor of it: nobody can change or shorten it.
        let map = unsafe { MmapMut::map_mut(&file) }.map_err(refused)?;
        Ok(Region { map, offset: 0 })
    }
}

/// Memory for many buffers, side by side in one region.
pub struct Arena {
    region: Arc<Region>,
    used: usize,
    bytes: usize,
}

impl Arena {
    /// An arena for buffers that occupy `bytes` together.
    pub fn new(bytes: u64) -> Result<Self, OutOfMemory> {
        let region = Arc::new(Region::new(bytes)?);
        Ok(Arena { region, used: 0, bytes: bytes as usize })
    }

    /// An arena whose `bytes` lie in a temporary file in `directory`, and in memory as far as there is room.
    ///
    /// # Errors
    /// If the file cannot be had.
    pub fn mapped(bytes: u64, directory: &Path) -> Result<Self, SpillError> {
        let region = Arc::new(Region::mapped(bytes, directory)?);
        Ok(Arena { region, used: 0, bytes: bytes as usize })
    }

    /// What its buffers hold, side by side. None of them may be written to meanwhile.
    pub fn as_bytes(&self) -> &[u8] {
        &self.region.map[self.region.offset..][..self.bytes]
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// If less is left than they occupy.
    pub fn take<T: Plain>(&mut self, len: usize) -> Result<Buffer<T>, OutOfMemory> {
        let bytes = Buffer::<T>::bytes_for(len);
        if bytes > (self.bytes - self.used) as u64 {
            return Err(OutOfMemory { bytes });
        }
        let start = self.region.offset + self.used;
        self.used += bytes as usize;
        Ok(Buffer { region: self.region.clone(), start, len, element: PhantomData })
    }
}

/// A fixed number of elements, aligned to a cache line, zero at first.
pub struct Buffer<T> {
    region: Arc<Region>,
    /// Byte of the region's map at which it starts. No other buffer has the bytes from here on.
    start: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// Bytes that `len` elements occupy.
    pub fn bytes_for(len: usize) -> u64 {
        (len as u64).saturating_mul(size_of::<T>() as u64).div_ceil(LINE as u64).saturating_mul(LINE as u64)
    }

    /// `len` zeros in memory of their own.
    pub fn zeros(len: usize) -> Result<Self, OutOfMemory> {
        Arena::new(Self::bytes_for(len))?.take(len)
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> u64 {
        Self::bytes_for(self.len)
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the arena gave these bytes of its region, initialised and aligned to 64, to this buffer alone, and a
        // `Plain` type accepts any bit pattern.
        unsafe { std::slice::from_raw_parts(self.region.map.as_ptr().add(self.start).cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the map is writable, and `&mut self` makes the access to these bytes exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.region.map.as_ptr().add(self.start).cast_mut().cast(),
                self.len,
            )
        }
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

    /// `len` zeros in memory of their own.
    pub fn zeros(len: usize, dtype: DType) -> Result<Self, OutOfMemory> {
        Values::take(len, dtype, &mut Arena::new(Values::bytes_for(len, dtype))?)
    }

    /// `len` zeros from `arena`.
    pub fn take(len: usize, dtype: DType, arena: &mut Arena) -> Result<Self, OutOfMemory> {
        Ok(match dtype {
            DType::F32 => Values::F32(arena.take(len)?),
            DType::BF16 => Values::BF16(arena.take(len)?),
            DType::F16 => Values::F16(arena.take(len)?),
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
    fn mapped_buffers_are_as_any_other_and_leave_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let mut arena = Arena::mapped(256, directory.path()).unwrap();
        let (mut a, b) = (arena.take::<f32>(20).unwrap(), arena.take::<f32>(17).unwrap());
        assert!(a.iter().chain(b.iter()).all(|x| *x == 0.0));
        a[19] = 2.0;
        assert_eq!((a[19], b[0], b.as_ptr() as usize % LINE), (2.0, 0.0, 0));
        assert!(arena.take::<f32>(1).is_err());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "the file has no name");
        let full = Arena::mapped(1 << 60, directory.path()).err().unwrap().to_string();
        assert!(full.contains("need 1152921504606846976") && full.contains("--spill-dir"), "{full}");
        let nowhere = Arena::mapped(1, &directory.path().join("none")).err().unwrap().to_string();
        assert!(nowhere.contains("1 bytes of weights cannot be memory-mapped in"), "{nowhere}");
    }

    #[test]
    fn buffers_are_aligned_and_count_whole_lines() {
        let b = Buffer::<f32>::zeros(17).unwrap();
        assert_eq!((b.len(), b.bytes(), b.as_ptr() as usize % LINE), (17, 128, 0));
        assert!(Buffer::<f32>::zeros(usize::MAX / 8).is_err());
        assert!(Buffer::<f32>::zeros(usize::MAX).is_err());
    }
}
