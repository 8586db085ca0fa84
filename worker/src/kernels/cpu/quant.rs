//! Groups of 32 weights as small integers with one factor, and the search for the factor.

use half::f16;
use strata_proto::Quantization;

use super::{
    Cpu,
    isa::{Kernel, LANES, Simd},
    math::sum_lanes,
};
use crate::kernels::buffer::Element;

/// Weights per group, along the input.
pub const GROUP: usize = 32;

/// A quantized group.
#[derive(Debug, Clone, Copy, Default)]
pub struct Group {
    /// What the integers are multiplied by.
    pub factor: f16,
    /// Within +-127, or -8..=7.
    pub values: [i8; GROUP],
}

/// Groups that are worth a task.
const GRAIN: usize = 64;

/// Quantizes groups; the same integers and factors on every instruction set.
///
/// Int8 (`Q8_0`): the factor is the largest magnitude / 127; with so many steps, a smaller one gains nothing. Int4
/// (`Q4_0`): of some factors around that which makes -8 of the value of largest magnitude, the one with the least squared
/// error.
pub fn quantize(cpu: &Cpu, quantization: Quantization, groups: &[&[f32; GROUP]]) -> Vec<Group> {
    let mut out = vec![Group::default(); groups.len()];
    cpu.pool.pieces(&mut out, GRAIN, 1, |i, out| {
        let groups = &groups[i * GRAIN..][..out.len()];
        cpu.isa.run(Quantize { quantization, groups, out });
    });
    out
}

struct Quantize<'a> {
    quantization: Quantization,
    groups: &'a [&'a [f32; GROUP]],
    out: &'a mut [Group],
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for (values, out) in self.groups.iter().zip(self.out) {
            let (halves, _) = values.as_chunks::<LANES>();
            let x = [S::load(&halves[0]), S::load(&halves[1])];
            *out = match self.quantization {
                Quantization::Int8 => int8::<S>(x),
                Quantization::Int4 => int4::<S>(x, values),
            };
        }
    }
}

/// Integers within `low..=high` for a factor.
#[inline(always)]
fn rounded<S: Simd>(x: [S::F; 2], factor: f16, low: f32, high: f32) -> [S::F; 2] {
    let factor = Element::to_f32(factor);
    let inverse = S::splat(if factor == 0.0 { 0.0 } else { 1.0 / factor });
    [S::round_within(S::mul(x[0], inverse), low, high), S::round_within(S::mul(x[1], inverse), low, high)]
}

#[inline(always)]
fn group<S: Simd>(factor: f16, rounded: [S::F; 2]) -> Group {
    let mut values = [0; GROUP];
    for (half, out) in rounded.into_iter().zip(values.chunks_exact_mut(LANES)) {
        out.iter_mut().zip(S::store(half)).for_each(|(o, x)| *o = x as i8);
    }
    Group { factor, values }
}

#[inline(always)]
fn int8<S: Simd>(x: [S::F; 2]) -> Group {
    let (a, b) = (S::largest(x[0]), S::largest(x[1]));
    let factor = f16::from_f32(if a > b { a } else { b } / 127.0);
    group::<S>(factor, rounded::<S>(x, factor, -127.0, 127.0))
}

/// Factors that [`int4`] tries: the value of largest magnitude becomes -7, -7.125, ….
const STEPS: usize = 16;

#[inline(always)]
fn int4<S: Simd>(x: [S::F; 2], values: &[f32; GROUP]) -> Group {
    let (a, b) = (S::largest(x[0]), S::largest(x[1]));
    let magnitude = if a > b { a } else { b };
    let sign = if values.contains(&magnitude) { -1.0 } else { 1.0 };
    let mut best = (f32::INFINITY, f16::ZERO);
    for step in 0..STEPS {
        let factor = f16::from_f32(sign * magnitude / (7.0 + 0.125 * step as f32));
        let scale = S::splat(Element::to_f32(factor));
        let [a, b] = rounded::<S>(x, factor, -8.0, 7.0);
        let (a, b) = (S::sub(x[0], S::mul(a, scale)), S::sub(x[1], S::mul(b, scale)));
        let error = sum_lanes(S::store(S::add(S::mul(a, a), S::mul(b, b))));
        if error < best.0 {
            best = (error, factor);
        }
    }
    group::<S>(best.1, rounded::<S>(x, best.1, -8.0, 7.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::isa::Isa;

    fn one(isa: Isa, quantization: Quantization, values: &[f32; GROUP]) -> Group {
        quantize(&Cpu::on(isa), quantization, &[values])[0]
    }

    fn error(values: &[f32; GROUP], group: Group) -> f32 {
        let errors = values.iter().zip(group.values).map(|(x, q)| x - f32::from(q) * group.factor.to_f32());
        errors.map(|d| d * d).sum::<f32>().sqrt()
    }

    #[test]
    fn errors_are_within_half_a_step_and_the_search_makes_them_smaller() {
        for seed in 0..200 {
            let values: [f32; GROUP] =
                std::array::from_fn(|i| ((seed * 7919 + i * 104_729) as f32 * 0.618).sin().powi(3));
            let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let [int8, int4] = Quantization::ALL.map(|q| {
                let groups = Isa::available().into_iter().map(|isa| one(isa, q, &values));
                let groups: Vec<_> = groups.map(|g| (g.factor, g.values)).collect();
                assert!(groups.iter().all(|g| *g == groups[0]), "the same on every instruction set");
                Group { factor: groups[0].0, values: groups[0].1 }
            });
            for (x, q) in values.iter().zip(int8.values) {
                assert!((x - f32::from(q) * int8.factor.to_f32()).abs() <= largest / 127.0 * 0.51);
            }
            // Symmetric and not searched: the largest becomes 7.
            let factor = f16::from_f32(largest / 7.0);
            let plain = Group { factor, values: values.map(|x| (x / factor.to_f32()).round() as i8) };
            assert!(error(&values, int4) <= error(&values, plain));
        }
    }

    #[test]
    fn zeros_and_the_smallest_and_largest_values_stay_finite() {
        for (x, q) in [0.0, 1e-30, 6e4, -6e4].into_iter().flat_map(|x| Quantization::ALL.map(|q| (x, q))) {
            let group = one(Isa::detect(), q, &[x; GROUP]);
            let y = f32::from(group.values[0]) * group.factor.to_f32();
            assert!((y - x).abs() <= 0.01 * x.abs() + 1e-7, "{x} became {y}");
        }
    }
}
