//! The instruction sets of x86-64.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Element, LANES, SHIFT, Simd};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Simd for Avx2 {
    const ROWS: usize = 2;

    arrays!(|a: f32, b: f32, c: f32| a.mul_add(b, c));

    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::F {
        // SAFETY: reads 32 bytes of 16-bit elements; the features are there (see `Simd`). So in all of this module.
        unsafe {
            let [a, b]: [__m128i; 2] = std::mem::transmute(*x);
            std::mem::transmute([_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)])
        }
    }
    #[inline(always)]
    fn round_f16(x: Self::F) -> Self::F {
        // SAFETY: as above.
        unsafe {
            let [a, b]: [__m256; 2] = std::mem::transmute(x);
            let a = _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a));
            let b = _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(b));
            std::mem::transmute([a, b])
        }
    }
    #[inline(always)]
    fn dot_bytes(acc: Self::I, w: &[u32; LANES], x: u32) -> Self::I {
        // SAFETY: as above.
        unsafe {
            let mut acc: [__m256i; 2] = std::mem::transmute(acc);
            let w: [__m256i; 2] = std::mem::transmute(*w);
            let (x, ones) = (_mm256_set1_epi32(x as i32), _mm256_set1_epi16(1));
            for (acc, w) in acc.iter_mut().zip(w) {
                // In two parts of 7 bits and 1 bit, so that no sum of two products saturates.
                let low = _mm256_maddubs_epi16(_mm256_and_si256(w, _mm256_set1_epi8(0x7f)), x);
                let high = _mm256_maddubs_epi16(_mm256_and_si256(w, _mm256_set1_epi8(-128)), x);
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(low, ones));
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(high, ones));
            }
            std::mem::transmute(acc)
        }
    }
    #[inline(always)]
    fn dot_nibbles(acc: Self::I, w: &[u32; LANES], low: u32, high: u32) -> Self::I {
        // SAFETY: as above.
        unsafe {
            let mut acc: [__m256i; 2] = std::mem::transmute(acc);
            let w: [__m256i; 2] = std::mem::transmute(*w);
            let (low, high) = (_mm256_set1_epi32(low as i32), _mm256_set1_epi32(high as i32));
            let (mask, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
            for (acc, w) in acc.iter_mut().zip(w) {
                let a = _mm256_maddubs_epi16(_mm256_and_si256(w, mask), low);
                let b = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(w), mask), high);
                // At most 4 * 15 * 127: no overflow.
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(_mm256_add_epi16(a, b), ones));
            }
            std::mem::transmute(acc)
        }
    }
    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// AVX-512 with VNNI and BF16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    const ROWS: usize = 12;

    // SAFETY of all: the features are there (see `Simd`), and arrays are as long as a register.

    #[inline(always)]
    fn splat(x: f32) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn load_bf16(x: &[bf16; LANES]) -> Self::F {
        // SAFETY: above.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store(x: Self::F) -> [f32; LANES] {
        // SAFETY: both are 64 bytes without padding.
        unsafe { std::mem::transmute(x) }
    }
    #[inline(always)]
    fn add(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn abs(x: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_abs_ps(x) }
    }
    #[inline(always)]
    fn select_lt(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    fn exp2_shifted(n: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe {
            let bias = _mm512_set1_epi32(127 - SHIFT.to_bits() as i32);
            let exponent = _mm512_add_epi32(_mm512_castps_si512(n), bias);
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn round_within(x: Self::F, low: f32, high: f32) -> Self::F {
        // SAFETY: above.
        unsafe {
            let rounded = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            _mm512_min_ps(_mm512_max_ps(rounded, _mm512_set1_ps(low)), _mm512_set1_ps(high))
        }
    }
    #[inline(always)]
    fn round_f16(x: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn dot_bf16(acc: Self::F, w: &[u32; LANES], x: u32) -> Self::F {
        // SAFETY: above.
        unsafe {
            let w = _mm512_loadu_si512(w.as_ptr().cast());
            let x = _mm512_set1_epi32(x as i32);
            _mm512_dpbf16_ps(
                acc,
                std::mem::transmute::<__m512i, __m512bh>(w),
                std::mem::transmute::<__m512i, __m512bh>(x),
            )
        }
    }
    #[inline(always)]
    fn splat_i32(x: i32) -> Self::I {
        // SAFETY: above.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    fn dot_bytes(acc: Self::I, w: &[u32; LANES], x: u32) -> Self::I {
        // SAFETY: above.
        unsafe {
            let w = _mm512_loadu_si512(w.as_ptr().cast());
            _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x as i32))
        }
    }
    #[inline(always)]
    fn dot_nibbles(acc: Self::I, w: &[u32; LANES], low: u32, high: u32) -> Self::I {
        // SAFETY: above.
        unsafe {
            let (w, mask) = (_mm512_loadu_si512(w.as_ptr().cast()), _mm512_set1_epi8(15));
            let acc = _mm512_dpbusd_epi32(acc, _mm512_and_si512(w, mask), _mm512_set1_epi32(low as i32));
            let w = _mm512_and_si512(_mm512_srli_epi16::<4>(w), mask);
            _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(high as i32))
        }
    }
    #[inline(always)]
    fn to_f32(x: Self::I) -> Self::F {
        // SAFETY: above.
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn max(x: Self::F) -> f32 {
        // SAFETY: above.
        unsafe { _mm512_reduce_max_ps(x) }
    }
    #[inline(always)]
    fn largest(x: Self::F) -> f32 {
        // SAFETY: above.
        unsafe { _mm512_reduce_max_ps(_mm512_abs_ps(x)) }
    }
    #[inline(always)]
    fn sum(x: Self::F) -> f32 {
        // The same tree.
        // SAFETY: above.
        unsafe { _mm512_reduce_add_ps(x) }
    }
    #[inline(always)]
    fn is_finite(x: Self::F) -> bool {
        // What is not finite less itself is NaN.
        // SAFETY: above.
        unsafe { _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(_mm512_sub_ps(x, x), _mm512_setzero_ps()) == 0 }
    }
    #[inline(always)]
    fn to_bytes(x: Self::F) -> ([u8; LANES], i32) {
        // SAFETY: above; 16 bytes either way.
        unsafe {
            let rounded = _mm512_cvtps_epi32(x);
            let bytes = std::mem::transmute::<__m128i, [u8; LANES]>(_mm512_cvtepi32_epi8(rounded));
            (bytes, _mm512_reduce_add_epi32(rounded))
        }
    }
    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
