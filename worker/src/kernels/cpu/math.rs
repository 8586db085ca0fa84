//! Elementary functions of our own: the bits of an answer must depend neither on the host's math library nor on its
//! instruction set. None of them fuses a multiplication with an addition.

use super::isa::{Portable, SHIFT, Simd};

/// A polynomial of `x` by Horner's rule, the highest coefficient first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(x: S::F, coefficients: [f32; N]) -> S::F {
    let mut p = S::splat(coefficients[0]);
    for c in &coefficients[1..] {
        p = S::add(S::mul(p, x), S::splat(*c));
    }
    p
}

/// `e^x` within 2 ulp; 0 below -87.3 and infinite above 88.37, NaN for NaN.
///
/// Range reduction by `n = round(x / ln 2)`, then the polynomial of Cephes' `expf`.
#[inline(always)]
pub(super) fn exp<S: Simd>(x: S::F) -> S::F {
    // Few enough bits that its product with `n` is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = S::add(S::mul(x, S::splat(std::f32::consts::LOG2_E)), S::splat(SHIFT));
    let n = S::sub(shifted, S::splat(SHIFT));
    let r = S::sub(S::sub(x, S::mul(n, S::splat(LN2_HIGH))), S::mul(n, S::splat(LN2_LOW)));
    let p = polynomial::<S, 6>(
        r,
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5],
    );
    let p = S::add(S::add(S::mul(S::mul(p, r), r), r), S::splat(1.0));
    let y = S::mul(p, S::exp2_shifted(shifted));
    let y = S::select_lt(x, S::splat(-87.3), S::splat(0.0), y);
    S::select_lt(S::splat(88.37), x, S::splat(f32::INFINITY), y)
}

/// `e^x` of one value, as the kernels compute it.
pub(crate) fn exp_one(x: f32) -> f32 {
    exp::<Portable>(Portable::splat(x))[0]
}

/// The hyperbolic tangent within 4 ulp. Near zero the polynomial of Cephes' `tanhf`.
#[inline(always)]
pub(super) fn tanh<S: Simd>(x: S::F) -> S::F {
    let (zero, one) = (S::splat(0.0), S::splat(1.0));
    let z = S::mul(x, x);
    let p = polynomial::<S, 5>(
        z,
        [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1],
    );
    let near = S::add(S::mul(S::mul(p, z), x), x);
    let magnitude = S::abs(x);
    let power = exp::<S>(S::mul(S::splat(2.0), magnitude));
    let far = S::sub(one, S::div(S::splat(2.0), S::add(power, one)));
    let far = S::select_lt(x, zero, S::sub(zero, far), far);
    S::select_lt(magnitude, S::splat(0.625), near, far)
}

/// The standard normal distribution function, relative error below 1e-6.
///
/// Half the complementary error function of `-x / sqrt(2)`, by the Chebyshev fit of Numerical Recipes' `erfcc`.
#[inline(always)]
pub(super) fn normal<S: Simd>(x: S::F) -> S::F {
    let (half, one) = (S::splat(0.5), S::splat(1.0));
    let z = S::mul(S::abs(x), S::splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = S::div(one, S::add(one, S::mul(half, z)));
    let p = polynomial::<S, 10>(
        t,
        [
            0.170_872_77,
            -0.822_152_23,
            1.488_515_9,
            -1.135_204,
            0.278_868_07,
            -0.186_288_06,
            0.096_784_18,
            0.374_091_96,
            1.000_023_7,
            -1.265_512_2,
        ],
    );
    let upper = S::mul(S::mul(half, t), exp::<S>(S::sub(p, S::mul(z, z))));
    S::select_lt(x, S::splat(0.0), upper, S::sub(one, upper))
}

/// Sine and cosine of `x` for `0 <= x < 2^24`, within 1e-15 (so that rounding to f32 is nearly always correct).
///
/// Cody-Waite reduction by pi/2 in parts of 27, 27 and 53 bits, whose products with the quotient are exact; kernels of
/// fdlibm's `k_sin.c` and `k_cos.c`.
pub(crate) fn sin_cos(x: f64) -> (f64, f64) {
    const PART1: f64 = 1.570_796_325_802_803;
    const PART2: f64 = 9.920_935_739_593_517e-10;
    const PART3: f64 = 5.721_188_726_109_832e-18;
    let n = (x * std::f64::consts::FRAC_2_PI).round();
    let r = ((x - n * PART1) - n * PART2) - n * PART3;
    let z = r * r;
    let mut s = 1.589_690_995_211_55e-10;
    for c in [
        -2.505_076_025_340_686_3e-8,
        2.755_731_370_707_006_8e-6,
        -1.984_126_982_985_795e-4,
        8.333_333_333_322_49e-3,
        -1.666_666_666_666_663_2e-1,
    ] {
        s = s * z + c;
    }
    let sin = r + r * z * s;
    let mut c = -1.135_964_755_778_819_5e-11;
    for k in [
        2.087_572_321_298_175e-9,
        -2.755_731_435_139_066_3e-7,
        2.480_158_728_947_673e-5,
        -1.388_888_888_887_411e-3,
        4.166_666_666_666_66e-2,
    ] {
        c = c * z + k;
    }
    let cos = (1.0 - 0.5 * z) + z * z * c;
    match n as u64 % 4 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exp(x: f32) -> f32 {
        exp_one(x)
    }

    fn tanh(x: f32) -> f32 {
        super::tanh::<Portable>(Portable::splat(x))[0]
    }

    fn normal(x: f32) -> f32 {
        super::normal::<Portable>(Portable::splat(x))[0]
    }

    #[test]
    fn exp_is_close_to_the_true_value() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let (y, t) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(((y - t) / t).abs() < 2.5e-7, "exp({x}) = {y}, not {t}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(-1e30), exp(f32::NEG_INFINITY), exp(f32::INFINITY)), (0.0, 0.0, f32::INFINITY));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_and_the_normal_distribution_are_close_to_the_true_values() {
        for i in -60_000..60_000 {
            let x = i as f32 * 2.5e-4;
            let (y, t) = (f64::from(tanh(x)), f64::from(x).tanh());
            assert!((y - t).abs() <= 3e-7 * t.abs(), "tanh({x}) = {y}, not {t}");
        }
        assert_eq!((tanh(-1e30), tanh(0.0), tanh(f32::INFINITY)), (-1.0, 0.0, 1.0));
        assert!(tanh(f32::NAN).is_nan() && normal(f32::NAN).is_nan());
        // From tables.
        for (x, t) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746_068_543),
            (-1.0, 0.158_655_253_931_457),
            (-3.0, 1.349_898_031_630_095e-3),
            (-5.0, 2.866_515_718_791_94e-7),
            (2.5, 0.993_790_334_674_224),
            (0.01, 0.503_989_356_314_632),
        ] {
            let y = f64::from(normal(x));
            assert!((y - t).abs() <= 1e-6 * t, "normal({x}) = {y}, not {t}");
        }
        assert_eq!((normal(-1e30), normal(1e30)), (0.0, 1.0));
    }

    #[test]
    fn sine_and_cosine_are_close_to_the_true_value() {
        for i in 0..2_000_000u32 {
            let x = f64::from(i as f32 * 0.731 * (1.0 + (i % 11) as f32));
            let (s, c) = sin_cos(x);
            assert!((s - x.sin()).abs() < 2e-15 && (c - x.cos()).abs() < 2e-15, "{x}");
        }
    }
}
