//! Groups of 32 weights as small integers with a factor and an offset, and the search for these.

use half::f16;
use strata_proto::Quantization;

use super::{
    Cpu,
    isa::{Kernel, LANES, Simd},
};
use crate::kernels::{buffer::Element, ops::GROUP};

/// A quantized group: its weights are `factor * value + least`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Group {
    /// What the integers are multiplied by.
    pub factor: f16,
    /// What is added: 0 in int8.
    pub least: f16,
    /// Within +-127, or 0..=15.
    pub values: [i8; GROUP],
}

/// Groups that are worth a task of their own.
pub(crate) const SHARE: usize = 128;

/// Quantizes groups, at most as many as `out` has room for, on the caller's thread; the same integers and factors on
/// every instruction set.
///
/// Int8 (`Q8_0`): the factor is the largest magnitude / 127; with so many steps, a smaller one gains nothing. Int4
/// (`Q4_1`): 16 steps over all values or a little less, of several such ranges the one with the least squared error
/// once factor and offset are fitted to its integers.
pub(crate) fn quantize(cpu: &Cpu, quantization: Quantization, groups: &[[f32; GROUP]], out: &mut [Group]) {
    cpu.isa.run(Quantize { quantization, groups, out });
}

/// As [`quantize`], but groups that the checkpoint has (`own`, of the same values, or none) stay what they are where
/// the format can hold them.
pub(crate) fn quantize_or_keep(
    cpu: &Cpu,
    quantization: Quantization,
    (groups, own): (&[[f32; GROUP]], &[Option<Group>]),
    out: &mut [Group],
) {
    let kept = |group: &Option<Group>| group.and_then(|group| group.held(quantization));
    if own.is_empty() || own.iter().any(|group| kept(group).is_none()) {
        quantize(cpu, quantization, groups, out);
    }
    for (out, kept) in out.iter_mut().zip(own.iter().map(kept)) {
        *out = kept.unwrap_or(*out);
    }
}

impl Group {
    /// The same weights in the words of a format, if it has them; in int4, an offset that is no f16 is rounded to one.
    ///
    /// Int8 has no offset and leaves -128 out; int4 counts from the least value.
    fn held(&self, quantization: Quantization) -> Option<Group> {
        let &Group { factor, least, values } = self;
        let (low, high) =
            values.iter().fold((i8::MAX, i8::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
        match quantization {
            Quantization::Int8 => (least == f16::ZERO && low > i8::MIN).then_some(*self),
            Quantization::Int4 if low >= 0 && high <= 15 => Some(*self),
            Quantization::Int4 if least == f16::ZERO && i16::from(high) - i16::from(low) <= 15 => {
                // Any lower end will do from which 15 steps reach the highest value. A power of two is exact in all
                // formats, others if they are lucky.
                let offset = |end: i8| Element::to_f32(factor) * f32::from(end);
                let exact = |end: &i8| Element::to_f32(f16::from_f32(offset(*end))) == offset(*end);
                let end = (high.saturating_sub(15)..=low).find(exact).unwrap_or(low);
                let least = f16::from_f32(offset(end));
                least.is_finite().then(|| Group { factor, least, values: values.map(|v| v - end) })
            }
            Quantization::Int4 => None,
        }
    }
}

struct Quantize<'a> {
    quantization: Quantization,
    groups: &'a [[f32; GROUP]],
    out: &'a mut [Group],
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        match self.quantization {
            Quantization::Int8 => {
                for (values, out) in self.groups.iter().zip(self.out) {
                    *out = int8::<S>(values);
                }
            }
            Quantization::Int4 => {
                for (groups, out) in self.groups.chunks(LANES).zip(self.out.chunks_mut(LANES)) {
                    int4::<S>(groups, out);
                }
            }
        }
    }
}

/// What to multiply by instead of dividing by `factor`; 0 for what is nothing or too little.
#[inline(always)]
fn inverse<S: Simd>(factor: S::F) -> S::F {
    let inverse = S::div(S::splat(1.0), factor);
    S::select_lt(S::abs(inverse), S::splat(f32::INFINITY), inverse, S::splat(0.0))
}

#[inline(always)]
fn int8<S: Simd>(values: &[f32; GROUP]) -> Group {
    let (halves, _) = values.as_chunks::<LANES>();
    let x = [S::load(&halves[0]), S::load(&halves[1])];
    let (a, b) = (S::largest(x[0]), S::largest(x[1]));
    let factor = f16::from_f32(if a > b { a } else { b } / 127.0);
    let inverse = inverse::<S>(S::splat(Element::to_f32(factor)));
    let mut values = [0; GROUP];
    for (x, out) in x.into_iter().zip(values.as_chunks_mut::<LANES>().0) {
        let (bytes, _) = S::to_bytes(S::round_within(S::mul(x, inverse), -127.0, 127.0));
        *out = bytes.map(|b| b as i8);
    }
    Group { factor, least: f16::ZERO, values }
}

/// Shares of a group's range that [`int4`] leaves out at each end, in steps of 3 %.
const TRIMS: [f32; 4] = [0.0, 0.03, 0.06, 0.09];

/// Up to 16 groups, one per lane: then sums of a group go from register to register, not from lane to lane.
#[inline(always)]
fn int4<S: Simd>(groups: &[[f32; GROUP]], out: &mut [Group]) {
    let mut x = [[0.0; LANES]; GROUP];
    for (lane, values) in groups.iter().enumerate() {
        for (x, value) in x.iter_mut().zip(values) {
            x[lane] = *value;
        }
    }
    let zero = S::splat(0.0);
    let (mut most, mut negated) = (S::load(&x[0]), S::sub(zero, S::load(&x[0])));
    for x in &x[1..] {
        let (x, minus) = (S::load(x), S::sub(zero, S::load(x)));
        most = S::select_lt(most, x, x, most);
        negated = S::select_lt(negated, minus, minus, negated);
    }
    let least = S::mul(negated, S::splat(-1.0));
    let range = S::sub(most, least);
    let mut sums = [zero; QUARTER];
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = four::<S>(each::<S>(&x, i));
    }
    let total = eight::<S>(sums);
    let mut best: Fit<S> =
        Fit { error: S::splat(f32::INFINITY), factor: zero, offset: zero, from: zero, scale: zero };
    for low in TRIMS {
        for high in TRIMS {
            let from = S::add(least, S::mul(range, S::splat(low)));
            let kept = S::mul(range, S::splat(1.0 - low - high));
            let scale = inverse::<S>(S::div(kept, S::splat(15.0)));
            let new = fit::<S>(&x, total, from, scale);
            best = Fit {
                error: S::select_lt(new.error, best.error, new.error, best.error),
                factor: S::select_lt(new.error, best.error, new.factor, best.factor),
                offset: S::select_lt(new.error, best.error, new.offset, best.offset),
                from: S::select_lt(new.error, best.error, new.from, best.from),
                scale: S::select_lt(new.error, best.error, new.scale, best.scale),
            };
        }
    }
    let (factors, offsets) = (S::store(best.factor), S::store(best.offset));
    let mut bytes = [[0; LANES]; GROUP];
    for (bytes, x) in bytes.iter_mut().zip(&x) {
        (*bytes, _) = S::to_bytes(steps::<S>(S::load(x), best.from, best.scale));
    }
    for (lane, out) in out.iter_mut().enumerate() {
        (out.factor, out.least) = (f16::from_f32(factors[lane]), f16::from_f32(offsets[lane]));
        for (value, bytes) in out.values.iter_mut().zip(&bytes) {
            *value = bytes[lane] as i8;
        }
    }
}

/// Values of a quarter of a group.
const QUARTER: usize = GROUP / 4;

/// How well integers fit their groups, one per lane: the squared error with factor and offset, and how the integers
/// came.
struct Fit<S: Simd> {
    error: S::F,
    factor: S::F,
    offset: S::F,
    from: S::F,
    scale: S::F,
}

/// Values as integers of four bits.
#[inline(always)]
fn steps<S: Simd>(x: S::F, from: S::F, scale: S::F) -> S::F {
    S::round_within(S::mul(S::sub(x, from), scale), 0.0, 15.0)
}

/// The line of least squares through the values of groups over their integers.
#[inline(always)]
fn fit<S: Simd>(x: &[[f32; LANES]; GROUP], total: S::F, from: S::F, scale: S::F) -> Fit<S> {
    let (zero, count) = (S::splat(0.0), S::splat(GROUP as f32));
    let mut q = [[zero; 4]; QUARTER];
    let (mut sums, mut squares, mut products) = ([zero; QUARTER], [zero; QUARTER], [zero; QUARTER]);
    for i in 0..QUARTER {
        let x = each::<S>(x, i);
        let (mut square, mut product) = ([zero; 4], [zero; 4]);
        for h in 0..4 {
            q[i][h] = steps::<S>(x[h], from, scale);
            square[h] = S::mul(q[i][h], q[i][h]);
            product[h] = S::mul(q[i][h], x[h]);
        }
        (sums[i], squares[i], products[i]) = (four::<S>(q[i]), four::<S>(square), four::<S>(product));
    }
    let (sum, squares, products) = (eight::<S>(sums), eight::<S>(squares), eight::<S>(products));
    let spread = S::sub(S::mul(count, squares), S::mul(sum, sum));
    let slope = S::div(S::sub(S::mul(count, products), S::mul(sum, total)), spread);
    let slope = S::select_lt(zero, spread, slope, zero);
    let factor = S::round_f16(slope);
    let offset = S::round_f16(S::div(S::sub(total, S::mul(slope, sum)), count));
    let mut errors = [zero; QUARTER];
    for i in 0..QUARTER {
        let mut squared = each::<S>(x, i);
        for h in 0..4 {
            let error = S::sub(S::sub(squared[h], offset), S::mul(q[i][h], factor));
            squared[h] = S::mul(error, error);
        }
        errors[i] = four::<S>(squared);
    }
    Fit { error: eight::<S>(errors), factor, offset, from, scale }
}

/// Of all lanes' groups, value `i` of each quarter.
#[inline(always)]
fn each<S: Simd>(x: &[[f32; LANES]; GROUP], i: usize) -> [S::F; 4] {
    [S::load(&x[i]), S::load(&x[i + QUARTER]), S::load(&x[i + 2 * QUARTER]), S::load(&x[i + 3 * QUARTER])]
}

/// The first two levels of the tree of a sum over a group: halves onto each other, as in [`Simd::sum`].
#[inline(always)]
fn four<S: Simd>(x: [S::F; 4]) -> S::F {
    S::add(S::add(x[0], x[2]), S::add(x[1], x[3]))
}

/// The other levels.
#[inline(always)]
fn eight<S: Simd>(x: [S::F; QUARTER]) -> S::F {
    let even = S::add(S::add(x[0], x[4]), S::add(x[2], x[6]));
    S::add(even, S::add(S::add(x[1], x[5]), S::add(x[3], x[7])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::isa::Isa;

    fn one(isa: Isa, quantization: Quantization, values: &[f32; GROUP]) -> Group {
        let mut out = [Group::default()];
        quantize(&Cpu::on(isa), quantization, &[*values], &mut out);
        out[0]
    }

    /// Sums as `Simd::sum` has them.
    fn sum(x: &[f32; GROUP]) -> f32 {
        let (mut x, mut half) = (*x, GROUP / 2);
        while half > 0 {
            for i in 0..half {
                x[i] += x[i + half];
            }
            half /= 2;
        }
        x[0]
    }

    /// One group by itself, with no register wider than a number.
    fn plain(quantization: Quantization, x: &[f32; GROUP]) -> Group {
        let inverse = |x: f32| if (1.0 / x).is_finite() { 1.0 / x } else { 0.0 };
        if quantization == Quantization::Int8 {
            let factor = f16::from_f32(x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0);
            let scale = inverse(factor.to_f32());
            let values = x.map(|x| (x * scale).round_ties_even().clamp(-127.0, 127.0) as i8);
            return Group { factor, least: f16::ZERO, values };
        }
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let least = -x.iter().map(|x| 0.0 - x).fold(f32::NEG_INFINITY, f32::max);
        let (range, total, count) = (most - least, sum(x), GROUP as f32);
        let mut best = (f32::INFINITY, Group::default());
        for (low, high) in TRIMS.into_iter().flat_map(|low| TRIMS.map(|high| (low, high))) {
            let (from, scale) = (least + range * low, inverse(range * (1.0 - low - high) / 15.0));
            let q = x.map(|x| ((x - from) * scale).round_ties_even().clamp(0.0, 15.0));
            let product: [f32; GROUP] = std::array::from_fn(|i| q[i] * x[i]);
            let (steps, squares, products) = (sum(&q), sum(&q.map(|q| q * q)), sum(&product));
            let spread = count * squares - steps * steps;
            let slope = if spread > 0.0 { (count * products - steps * total) / spread } else { 0.0 };
            let (factor, least) = (f16::from_f32(slope), f16::from_f32((total - slope * steps) / count));
            let errors: [f32; GROUP] =
                std::array::from_fn(|i| x[i] - least.to_f32() - q[i] * factor.to_f32());
            let error = sum(&errors.map(|e| e * e));
            if error < best.0 {
                best = (error, Group { factor, least, values: q.map(|q| q as i8) });
            }
        }
        best.1
    }

    #[test]
    fn many_groups_at_once_are_bit_for_bit_what_each_is_by_itself() {
        let mut groups: Vec<[f32; GROUP]> = (0..1003)
            .map(|g| {
                let scale = [1.0, 1e-8, 3e-5, 0.02, 900.0, 65000.0][g % 6];
                std::array::from_fn(|i| ((g * 7919 + i * 104_729) as f32 * 0.618).sin().powi(3) * scale)
            })
            .collect();
        groups.extend([0.0, 1e-30, 6e-8, 6e4, -6e4, 65519.0].map(|x| [x; GROUP]));
        groups.extend([1.0, -1.0].map(|x| std::array::from_fn(|i| if i == 7 { x } else { 0.0 })));
        groups.extend([1e-7, 5e4].map(|x| std::array::from_fn(|i| if i % 2 == 0 { x } else { -x })));
        let bits = |g: &Group| (g.factor.to_bits(), g.least.to_bits(), g.values);
        for (isa, q) in Isa::available().into_iter().flat_map(|isa| Quantization::ALL.map(|q| (isa, q))) {
            let mut out = vec![Group::default(); groups.len()];
            quantize(&Cpu::on(isa), q, &groups, &mut out);
            for (group, out) in groups.iter().zip(&out) {
                assert_eq!(bits(out), bits(&plain(q, group)), "{} {q:?} of {group:?}", isa.name());
            }
        }
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
