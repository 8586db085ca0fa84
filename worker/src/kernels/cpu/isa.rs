//! Instruction sets: one body per operation, compiled for each, chosen at run time.
//!
//! What an instruction set adds beyond wider registers is behind one trait: fused multiply-add, products of bf16 pairs and
//! of bytes. Elsewhere kernels multiply, then add, in a written order, which the compiler may neither fuse nor reassociate.

use half::{bf16, f16};

use crate::kernels::buffer::Element;

/// Lanes of a register: 16 f32.
pub const LANES: usize = 16;

/// Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits of the sum.
pub(super) const SHIFT: f32 = 12_582_912.0;

/// An operation whose body is compiled once per instruction set.
///
/// `run` and all it calls must be `#[inline(always)]`, or they are compiled for the baseline only.
pub(crate) trait Kernel {
    fn run<S: Simd>(self);
}

/// What kernels need of an instruction set, on 16 lanes at a time.
///
/// Implementations other than [`Portable`] may only run where their processor features are: [`Isa::run`] sees to it.
pub(crate) trait Simd: Copy {
    /// 16 f32.
    type F: Copy;
    /// 16 i32.
    type I: Copy;
    /// Most rows of two registers each that stay in registers beside a weight's two.
    const ROWS: usize;

    fn splat(x: f32) -> Self::F;
    fn load(x: &[f32; LANES]) -> Self::F;
    fn load_bf16(x: &[bf16; LANES]) -> Self::F;
    fn load_f16(x: &[f16; LANES]) -> Self::F;
    fn store(x: Self::F) -> [f32; LANES];
    fn add(a: Self::F, b: Self::F) -> Self::F;
    fn sub(a: Self::F, b: Self::F) -> Self::F;
    fn mul(a: Self::F, b: Self::F) -> Self::F;
    fn div(a: Self::F, b: Self::F) -> Self::F;
    fn abs(x: Self::F) -> Self::F;
    /// `if a < b { x } else { y }`.
    fn select_lt(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// `2^n`, where `n` is an integer within -127..=128 to which 1.5 * 2^23 was added.
    fn exp2_shifted(n: Self::F) -> Self::F;
    /// To the nearest integer, ties to even, then within `low..=high`.
    fn round_within(x: Self::F, low: f32, high: f32) -> Self::F;
    /// `a * b + c`.
    fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `acc + w[1] * x[1] + w[0] * x[0]` of bf16 pairs, `x` the same for all lanes.
    fn dot_bf16(acc: Self::F, w: &[u32; LANES], x: u32) -> Self::F;
    fn splat_i32(x: i32) -> Self::I;
    /// `acc + sum of w[i] * x[i]` of four unsigned and four signed bytes, exactly; `x` the same for all lanes.
    fn dot_bytes(acc: Self::I, w: &[u32; LANES], x: u32) -> Self::I;
    /// The same for the low halves of bytes and `low`, then the high halves and `high`.
    fn dot_nibbles(acc: Self::I, w: &[u32; LANES], low: u32, high: u32) -> Self::I;
    fn to_f32(x: Self::I) -> Self::F;

    /// The largest value; of NaN, nothing is known.
    #[inline(always)]
    fn max(x: Self::F) -> f32 {
        Self::store(x).iter().fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m })
    }

    /// The largest magnitude; of NaN, nothing is known.
    #[inline(always)]
    fn largest(x: Self::F) -> f32 {
        Self::store(x).iter().fold(0.0, |m, x| if x.abs() > m { x.abs() } else { m })
    }

    /// Whether there is no NaN and nothing infinite.
    #[inline(always)]
    fn is_finite(x: Self::F) -> bool {
        Self::store(x).iter().all(|x| x.is_finite())
    }

    /// Rounded to nearest even as signed bytes, which they fit, and their sum.
    #[inline(always)]
    fn to_bytes(x: Self::F) -> ([u8; LANES], i32) {
        let (x, mut bytes, mut sum) = (Self::store(x), [0; LANES], 0);
        for l in 0..LANES {
            bytes[l] = (x[l] + SHIFT).to_bits() as u8;
            sum += i32::from(bytes[l] as i8);
        }
        (bytes, sum)
    }

    /// Asks for the cache line at `at`, which need not be readable.
    fn prefetch<T>(at: *const T);
}

/// Any processor. Multiplies, then adds.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// The operations on arrays that the compiler turns into whatever registers there are.
macro_rules! arrays {
    ($mul_add:expr) => {
        type F = [f32; LANES];
        type I = [i32; LANES];

        #[inline(always)]
        fn splat(x: f32) -> Self::F {
            [x; LANES]
        }
        #[inline(always)]
        fn load(x: &[f32; LANES]) -> Self::F {
            *x
        }
        #[inline(always)]
        fn load_bf16(x: &[bf16; LANES]) -> Self::F {
            x.map(Element::to_f32)
        }
        #[inline(always)]
        fn store(x: Self::F) -> [f32; LANES] {
            x
        }
        #[inline(always)]
        fn add(a: Self::F, b: Self::F) -> Self::F {
            std::array::from_fn(|l| a[l] + b[l])
        }
        #[inline(always)]
        fn sub(a: Self::F, b: Self::F) -> Self::F {
            std::array::from_fn(|l| a[l] - b[l])
        }
        #[inline(always)]
        fn mul(a: Self::F, b: Self::F) -> Self::F {
            std::array::from_fn(|l| a[l] * b[l])
        }
        #[inline(always)]
        fn div(a: Self::F, b: Self::F) -> Self::F {
            std::array::from_fn(|l| a[l] / b[l])
        }
        #[inline(always)]
        fn abs(x: Self::F) -> Self::F {
            std::array::from_fn(|l| x[l].abs())
        }
        #[inline(always)]
        fn select_lt(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
            std::array::from_fn(|l| if a[l] < b[l] { x[l] } else { y[l] })
        }
        #[inline(always)]
        fn exp2_shifted(n: Self::F) -> Self::F {
            std::array::from_fn(|l| {
                f32::from_bits(n[l].to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127) << 23)
            })
        }
        #[inline(always)]
        fn round_within(x: Self::F, low: f32, high: f32) -> Self::F {
            x.map(|x| x.round_ties_even().clamp(low, high))
        }
        #[inline(always)]
        fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            std::array::from_fn(|l| $mul_add(a[l], b[l], c[l]))
        }
        #[inline(always)]
        fn dot_bf16(acc: Self::F, w: &[u32; LANES], x: u32) -> Self::F {
            let (low, high) = (f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000));
            let odd: Self::F =
                std::array::from_fn(|l| $mul_add(f32::from_bits(w[l] & 0xffff_0000), high, acc[l]));
            std::array::from_fn(|l| $mul_add(f32::from_bits(w[l] << 16), low, odd[l]))
        }
        #[inline(always)]
        fn splat_i32(x: i32) -> Self::I {
            [x; LANES]
        }
        #[inline(always)]
        fn to_f32(x: Self::I) -> Self::F {
            x.map(|x| x as f32)
        }
    };
}

impl Simd for Portable {
    const ROWS: usize = 2;

    arrays!(|a: f32, b: f32, c: f32| a * b + c);

    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::F {
        x.map(Element::to_f32)
    }
    #[inline(always)]
    fn dot_bytes(acc: Self::I, w: &[u32; LANES], x: u32) -> Self::I {
        let x = x.to_le_bytes().map(|x| i32::from(x as i8));
        std::array::from_fn(|l| {
            let w = w[l].to_le_bytes().map(i32::from);
            acc[l] + w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3]
        })
    }
    #[inline(always)]
    fn dot_nibbles(acc: Self::I, w: &[u32; LANES], low: u32, high: u32) -> Self::I {
        let acc = Self::dot_bytes(acc, &w.map(|w| w & 0x0f0f_0f0f), low);
        Self::dot_bytes(acc, &w.map(|w| (w >> 4) & 0x0f0f_0f0f), high)
    }
    #[inline(always)]
    fn prefetch<T>(_: *const T) {}
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Level);

impl Isa {
    /// The widest one.
    pub fn detect() -> Isa {
        Isa::available().pop().unwrap_or(Isa(Level::Portable))
    }

    /// All of them, narrowest first.
    pub fn available() -> Vec<Isa> {
        let mut all = vec![Isa(Level::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                all.push(Isa(Level::Avx2));
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512bf16")
            {
                all.push(Isa(Level::Avx512));
            }
        }
        all
    }

    /// Its name, for logs, flags and numerics classes.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    /// [`Simd::ROWS`].
    pub(crate) fn rows(self) -> usize {
        match self.0 {
            Level::Portable => Portable::ROWS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Avx2::ROWS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Avx512::ROWS,
        }
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self.0 {
            Level::Portable => kernel.run::<Portable>(),
            // SAFETY: `available` makes this variant only where the processor has the features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512(kernel) },
        }
    }
}

impl std::str::FromStr for Isa {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let all = Isa::available();
        let names: Vec<_> = all.iter().map(|isa| isa.name()).collect();
        let found = all.iter().find(|isa| isa.name() == s);
        found
            .copied()
            .ok_or_else(|| format!("instruction set {s:?}: this processor has {}", names.join(", ")))
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<K: Kernel>(kernel: K) {
    kernel.run::<Avx2>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn avx512<K: Kernel>(kernel: K) {
    kernel.run::<Avx512>();
}
