//! Groups of 32 weights as small integers with one factor, and the search for the factor.

use half::f16;

use crate::kernels::buffer::Element;

/// Weights per group, along the input.
pub const GROUP: usize = 32;

/// `values` as signed bytes within +-127, and their factor (`Q8_0`).
///
/// The factor is the largest magnitude / 127: with so many steps, a smaller one gains nothing.
pub fn int8(values: &[f32; GROUP]) -> (f16, [i8; GROUP]) {
    let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let factor = f16::from_f32(largest / 127.0);
    let inverse = inverse(factor);
    (factor, values.map(|x| (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8))
}

/// `values` as integers within -8..=7, and their factor (`Q4_0`).
///
/// Of some factors around that which makes -8 of the value of largest magnitude, the one with the least squared error.
pub fn int4(values: &[f32; GROUP]) -> (f16, [i8; GROUP]) {
    let largest = values.iter().fold(0.0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    let quantize = |factor: f16| {
        let inverse = inverse(factor);
        values.map(|x| (x * inverse).round_ties_even().clamp(-8.0, 7.0))
    };
    let error = |factor: f16| {
        let (scale, quantized) = (Element::to_f32(factor), quantize(factor));
        let mut sums = [0.0f32; 8];
        for (x, q) in values.as_chunks::<8>().0.iter().zip(quantized.as_chunks::<8>().0) {
            for l in 0..8 {
                let d = x[l] - q[l] * scale;
                sums[l] += d * d;
            }
        }
        sums.iter().sum::<f32>()
    };
    let mut best = (f32::INFINITY, f16::ZERO);
    for step in 0..STEPS {
        let part = largest / -(7.0 + 0.125 * step as f32);
        for factor in [f16::from_f32(part), f16::from_f32(-part)] {
            let error = error(factor);
            if error < best.0 {
                best = (error, factor);
            }
        }
    }
    (best.1, quantize(best.1).map(|q| q as i8))
}

/// Factors that [`int4`] tries, of each sign.
const STEPS: usize = 16;

/// `1 / factor`; 0 for 0.
fn inverse(factor: f16) -> f32 {
    let factor = Element::to_f32(factor);
    if factor == 0.0 { 0.0 } else { 1.0 / factor }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(values: &[f32; GROUP], (factor, quantized): (f16, [i8; GROUP])) -> f32 {
        let errors = values.iter().zip(quantized).map(|(x, q)| x - f32::from(q) * factor.to_f32());
        errors.map(|d| d * d).sum::<f32>().sqrt()
    }

    #[test]
    fn errors_are_within_half_a_step_and_the_search_makes_them_smaller() {
        for seed in 0..200 {
            let values: [f32; GROUP] =
                std::array::from_fn(|i| ((seed * 7919 + i * 104_729) as f32 * 0.618).sin().powi(3));
            let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let (factor, quantized) = int8(&values);
            for (x, q) in values.iter().zip(quantized) {
                assert!((x - f32::from(q) * factor.to_f32()).abs() <= largest / 127.0 * 0.51);
            }
            // Symmetric and not searched: the largest becomes 7.
            let plain = f16::from_f32(largest / 7.0);
            let plain = (plain, values.map(|x| (x / plain.to_f32()).round() as i8));
            assert!(error(&values, int4(&values)) <= error(&values, plain));
        }
    }

    #[test]
    fn zeros_and_the_smallest_and_largest_values_stay_finite() {
        for x in [0.0, 1e-30, 6e4, -6e4] {
            for (factor, quantized) in [int8(&[x; GROUP]), int4(&[x; GROUP])] {
                let y = f32::from(quantized[0]) * factor.to_f32();
                assert!((y - x).abs() <= 0.01 * x.abs() + 1e-7, "{x} became {y}");
            }
        }
    }
}
