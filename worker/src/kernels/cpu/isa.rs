//! Instruction sets: one body per operation, compiled for each, chosen at run time.
//!
//! What an instruction set adds beyond wider registers is behind one trait: fused multiply-add, products of bf16 pairs
//! and of bytes. Elsewhere kernels multiply, then add, in a written order, which the compiler may neither fuse nor
//! reassociate.

use half::{bf16, f16};

use crate::kernels::buffer::Element;

/// Lanes of a register: 16 f32.
pub(crate) const LANES: usize = 16;

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
    /// To the nearest f16, ties to even, widened again.
    fn round_f16(x: Self::F) -> Self::F;
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

    /// The sum of all lanes, by one fixed tree: halves onto each other.
    #[inline(always)]
    fn sum(x: Self::F) -> f32 {
        let mut x = Self::store(x);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                x[i] += x[i + half];
            }
            half /= 2;
        }
        x[0]
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

#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

impl Simd for Portable {
    const ROWS: usize = 2;

    arrays!(|a: f32, b: f32, c: f32| a * b + c);

    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self::F {
        x.map(Element::to_f32)
    }
    #[inline(always)]
    fn round_f16(x: Self::F) -> Self::F {
        x.map(|x| Element::to_f32(f16::from_f32(x)))
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

/// Stored elements, 16 at a time.
pub(crate) trait Lanes: Element {
    /// As f32, exactly.
    fn widen<S: Simd>(x: &[Self; LANES]) -> S::F;
}

impl Lanes for f32 {
    #[inline(always)]
    fn widen<S: Simd>(x: &[f32; LANES]) -> S::F {
        S::load(x)
    }
}

impl Lanes for bf16 {
    #[inline(always)]
    fn widen<S: Simd>(x: &[bf16; LANES]) -> S::F {
        S::load_bf16(x)
    }
}

impl Lanes for f16 {
    #[inline(always)]
    fn widen<S: Simd>(x: &[f16; LANES]) -> S::F {
        S::load_f16(x)
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

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests {
    use object::{Object, ObjectSymbol};

    /// What a kernel calls and the compiler does not inline, a function that calls itself above all, is compiled for the
    /// oldest processor, and each instruction of a newer one becomes a call: answers stay the same, and take longer.
    #[test]
    fn no_instruction_of_a_kernel_has_become_a_call() {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let program = object::File::parse(&*program).unwrap();
        let names: Vec<_> = program.symbols().filter_map(|symbol| symbol.name().ok()).collect();
        assert!(names.iter().any(|name| name.contains("strata_worker")), "the test's program has symbols");
        // Nothing but these kernels has instructions of AVX-512's foundation.
        let called: Vec<_> =
            names.iter().filter(|name| name.contains("avx512f") && name.contains("_mm512_")).collect();
        assert!(called.is_empty(), "{called:?}");
    }
}
