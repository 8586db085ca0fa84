//! Groups of 32 weights as small integers with a factor and an offset, and the search for these.

use half::f16;
use strata_proto::Quantization;

use super::{
    Cpu,
    isa::{Kernel, LANES, Simd},
};
use crate::kernels::buffer::Element;

/// Weights per group, along the input.
pub const GROUP: usize = 32;

/// A quantized group: its weights are `factor * value + least`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Group {
    /// What the integers are multiplied by.
    pub factor: f16,
    /// What is added: 0 in int8.
    pub least: f16,
    /// Within +-127, or 0..=15.
    pub values: [i8; GROUP],
}

/// Groups that are worth a task.
const GRAIN: usize = 64;

/// Quantizes groups; the same integers and factors on every instruction set.
///
/// Int8 (`Q8_0`): the factor is the largest magnitude / 127; with so many steps, a smaller one gains nothing. Int4
/// (`Q4_1`): 16 steps over all values or a little less, of several such ranges the one with the least squared error once
/// factor and offset are fitted to its integers.
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
                Quantization::Int4 => int4::<S>(x),
            };
        }
    }
}

#[inline(always)]
fn group<S: Simd>(factor: f16, least: f16, rounded: [S::F; 2]) -> Group {
    let mut values = [0; GROUP];
    for (half, out) in rounded.into_iter().zip(values.chunks_exact_mut(LANES)) {
        out.iter_mut().zip(S::store(half)).for_each(|(o, x)| *o = x as i8);
    }
    Group { factor, least, values }
}

/// What to multiply by instead of dividing by `factor`; 0 for what is nothing or too little.
#[inline(always)]
fn inverse(factor: f32) -> f32 {
    let inverse = 1.0 / factor;
    if inverse.is_finite() { inverse } else { 0.0 }
}

#[inline(always)]
fn int8<S: Simd>(x: [S::F; 2]) -> Group {
    let (a, b) = (S::largest(x[0]), S::largest(x[1]));
    let factor = f16::from_f32(if a > b { a } else { b } / 127.0);
    let inverse = S::splat(inverse(Element::to_f32(factor)));
    let low = S::round_within(S::mul(x[0], inverse), -127.0, 127.0);
    let high = S::round_within(S::mul(x[1], inverse), -127.0, 127.0);
    group::<S>(factor, f16::ZERO, [low, high])
}

/// The largest of the values with other signs.
#[inline(always)]
fn largest_negated<S: Simd>(x: [S::F; 2]) -> f32 {
    let zero = S::splat(0.0);
    S::max(S::sub(zero, x[0])).max(S::max(S::sub(zero, x[1])))
}

/// Shares of a group's range that [`int4`] leaves out at each end, in steps of 3 %.
const TRIMS: [f32; 4] = [0.0, 0.03, 0.06, 0.09];

#[inline(always)]
fn int4<S: Simd>(x: [S::F; 2]) -> Group {
    let zero = S::splat(0.0);
    let (most, least) = (S::max(x[0]).max(S::max(x[1])), -largest_negated::<S>(x));
    let range = most - least;
    let total = S::sum(S::add(x[0], x[1]));
    let count = GROUP as f32;
    let mut best = (f32::INFINITY, f16::ZERO, f16::ZERO, [zero; 2]);
    for low in TRIMS {
        for high in TRIMS {
            let from = S::splat(least + range * low);
            let scale = S::splat(inverse(range * (1.0 - low - high) / 15.0));
            let mut q = [zero; 2];
            for h in 0..2 {
                q[h] = S::round_within(S::mul(S::sub(x[h], from), scale), 0.0, 15.0);
            }
            // The line of least squares through the values over their integers.
            let sum = S::sum(S::add(q[0], q[1]));
            let squares = S::sum(S::add(S::mul(q[0], q[0]), S::mul(q[1], q[1])));
            let products = S::sum(S::add(S::mul(q[0], x[0]), S::mul(q[1], x[1])));
            let spread = count * squares - sum * sum;
            let slope = if spread > 0.0 { (count * products - sum * total) / spread } else { 0.0 };
            let (factor, offset) = (f16::from_f32(slope), f16::from_f32((total - slope * sum) / count));
            let (f, o) = (S::splat(Element::to_f32(factor)), S::splat(Element::to_f32(offset)));
            let mut errors = [zero; 2];
            for h in 0..2 {
                let error = S::sub(S::sub(x[h], o), S::mul(q[h], f));
                errors[h] = S::mul(error, error);
            }
            let error = S::sum(S::add(errors[0], errors[1]));
            if error < best.0 {
                best = (error, factor, offset, q);
            }
        }
    }
    group::<S>(best.1, best.2, best.3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::isa::Isa;

    fn one(isa: Isa, quantization: Quantization, values: &[f32; GROUP]) -> Group {
        quantize(&Cpu::on(isa), quantization, &[values])[0]
    }

    fn error(values: &[f32; GROUP], group: Group) -> f32 {
        let (factor, least) = (group.factor.to_f32(), group.least.to_f32());
        let errors = values.iter().zip(group.values).map(|(x, q)| x - f32::from(q) * factor - least);
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
                let groups: Vec<_> = groups.map(|g| (g.factor, g.least, g.values)).collect();
                assert!(groups.iter().all(|g| *g == groups[0]), "the same on every instruction set");
                let (factor, least, values) = groups[0];
                Group { factor, least, values }
            });
            for (x, q) in values.iter().zip(int8.values) {
                assert!((x - f32::from(q) * int8.factor.to_f32()).abs() <= largest / 127.0 * 0.51);
            }
            // Not searched: 16 steps from the least value to the largest.
            let (low, high) = values.iter().fold((0.0f32, 0.0f32), |(l, h), x| (l.min(*x), h.max(*x)));
            let (factor, least) = (f16::from_f32((high - low) / 15.0), f16::from_f32(low));
            let step = |x: f32| ((x - least.to_f32()) / factor.to_f32()).round().clamp(0.0, 15.0) as i8;
            let plain = Group { factor, least, values: values.map(step) };
            assert!(error(&values, int4) <= error(&values, plain));
            assert!(int4.values.iter().all(|q| (0..16).contains(q)));
        }
    }

    #[test]
    fn zeros_and_the_smallest_and_largest_values_stay_finite() {
        for (x, q) in [0.0, 1e-30, 6e4, -6e4].into_iter().flat_map(|x| Quantization::ALL.map(|q| (x, q))) {
            let group = one(Isa::detect(), q, &[x; GROUP]);
            let y = f32::from(group.values[0]) * group.factor.to_f32() + group.least.to_f32();
            assert!((y - x).abs() <= 0.01 * x.abs() + 1e-7, "{x} became {y}");
        }
    }
}
