//! Norms, activations and other elementwise operations over rows.

use super::{
    Cpu,
    isa::{Kernel, LANES, Simd},
    linear::{Output, Rows},
    math::{exp, normal, tanh},
    pool::Pool,
};
use crate::kernels::ops::{Act, Norm};

/// Values per task of an elementwise operation.
const PIECE: usize = 4096;

impl Act {
    /// Must not call itself: what does is never inlined, and outside of the kernel nothing is compiled for its
    /// instruction set.
    #[inline(always)]
    fn apply<S: Simd>(self, x: S::F) -> S::F {
        let one = S::splat(1.0);
        match self {
            Act::Silu => times_sigmoid::<S>(x, x),
            Act::Gelu => S::mul(x, normal::<S>(x)),
            Act::GeluTanh => {
                let cube = S::mul(S::mul(S::mul(S::splat(0.044_715), x), x), x);
                let inner = S::mul(S::splat(0.797_884_6), S::add(x, cube));
                S::mul(S::mul(S::splat(0.5), x), S::add(one, tanh::<S>(inner)))
            }
            Act::GeluQuick => times_sigmoid::<S>(x, S::mul(S::splat(1.702), x)),
            Act::Relu => relu::<S>(x),
            Act::Tanh => tanh::<S>(x),
            Act::ReluSquared => {
                let x = relu::<S>(x);
                S::mul(x, x)
            }
            Act::Relu6 => at_most::<S>(relu::<S>(x), 6.0),
            Act::LeakyRelu => S::select_lt(x, S::splat(0.0), S::mul(x, S::splat(0.01)), x),
            Act::Mish => {
                // tanh(ln(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2); from 20 on it is 1.
                let e = exp::<S>(at_most::<S>(x, 20.0));
                let t = S::mul(e, S::add(e, S::splat(2.0)));
                S::mul(x, S::div(t, S::add(t, S::splat(2.0))))
            }
            Act::Sigmoid => times_sigmoid::<S>(one, x),
            Act::GeluClipped => at_most::<S>(S::mul(x, normal::<S>(x)), 10.0),
            Act::Identity => x,
        }
    }
}

/// `max(x, 0)`; a comparison keeps NaN, which a maximum would hide.
#[inline(always)]
fn relu<S: Simd>(x: S::F) -> S::F {
    S::select_lt(x, S::splat(0.0), S::splat(0.0), x)
}

/// `min(x, most)`, which keeps NaN.
#[inline(always)]
fn at_most<S: Simd>(x: S::F, most: f32) -> S::F {
    S::select_lt(S::splat(most), x, S::splat(most), x)
}

/// `x / (1 + e^-z)`.
#[inline(always)]
fn times_sigmoid<S: Simd>(x: S::F, z: S::F) -> S::F {
    S::div(x, S::add(S::splat(1.0), exp::<S>(S::sub(S::splat(0.0), z))))
}

/// Replaces every value of a slice by an expression of it, and of the value of another slice beside it, 16 at a time.
///
/// No function that takes a closure: that would be compiled without the instruction set's features.
macro_rules! map_lanes {
    ($a:ident in $x:expr $(, $b:ident in $y:expr)? => $value:expr) => {
        let (chunks, tail) = $x.as_chunks_mut::<LANES>();
        $(let (others, rest) = $y.as_chunks::<LANES>();)?
        for (_i, x) in chunks.iter_mut().enumerate() {
            let $a = S::load(x);
            $(let $b = S::load(&others[_i]);)?
            *x = S::store($value);
        }
        let $a = load_part::<S>(tail);
        $(let $b = load_part::<S>(rest);)?
        tail.copy_from_slice(&S::store($value)[..tail.len()]);
    };
}

/// Fewer values than lanes, and zeros.
#[inline(always)]
fn load_part<S: Simd>(x: &[f32]) -> S::F {
    let mut lanes = [0.0; LANES];
    lanes[..x.len()].copy_from_slice(x);
    S::load(&lanes)
}

/// A norm, row by row.
pub(crate) struct NormRows<'a> {
    /// Which.
    pub norm: Norm,
    /// The rows; as wide as `weight`.
    pub x: Rows<'a>,
    /// One factor per column.
    pub weight: &'a [f32],
    /// One summand per column.
    pub bias: Option<&'a [f32]>,
    /// Rows without gaps.
    pub out: &'a mut [f32],
    /// What becomes of them.
    pub output: Output,
}

impl NormRows<'_> {
    pub(super) fn run(self, cpu: &Cpu) {
        let NormRows { norm, x, weight, bias, out, output } = self;
        let width = weight.len();
        cpu.pool.pieces(&mut out[..x.count * width], width, Pool::grain(width), |r, out| {
            let x = &x.data[r * x.stride..][..width];
            cpu.isa.run(NormRow { norm, x, weight, bias, out, output });
        });
    }
}

struct NormRow<'a> {
    norm: Norm,
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    out: &'a mut [f32],
    output: Output,
}

impl Kernel for NormRow<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (mean, scale) = moments::<S>(self.norm, self.x);
        let ((outs, out), (xs, x), (weights, weight)) =
            (self.out.as_chunks_mut(), self.x.as_chunks(), self.weight.as_chunks());
        let (biases, bias) = self.bias.map(<[f32]>::as_chunks).unzip();
        for (i, ((o, x), w)) in outs.iter_mut().zip(xs).zip(weights).enumerate() {
            let y = S::mul(S::mul(S::sub(S::load(x), S::splat(mean)), S::splat(scale)), S::load(w));
            self.output.apply_lanes::<S>(o, biases.map_or(y, |b| S::add(y, S::load(&b[i]))));
        }
        for (i, ((o, x), w)) in out.iter_mut().zip(x).zip(weight).enumerate() {
            let y = (x - mean) * scale * w;
            *o = self.output.apply(*o, bias.map_or(y, |b| y + b[i]));
        }
    }
}

/// What is taken from each value of `x`, and by what the rest is multiplied.
#[inline(always)]
fn moments<S: Simd>(norm: Norm, x: &[f32]) -> (f32, f32) {
    let len = x.len() as f32;
    match norm {
        Norm::Rms(eps) => (0.0, 1.0 / (sum::<S, true>(x, 0.0) / len + eps).sqrt()),
        Norm::Layer(eps) => {
            let mean = sum::<S, false>(x, 0.0) / len;
            (mean, 1.0 / (sum::<S, true>(x, mean) / len + eps).sqrt())
        }
    }
}

/// Sum of what is left of each value without `mean`, or of its squares, in 16 lanes and one fixed tree.
#[inline(always)]
fn sum<S: Simd, const SQUARED: bool>(x: &[f32], mean: f32) -> f32 {
    let mut sums = S::splat(0.0);
    let (chunks, tail) = x.as_chunks::<LANES>();
    for c in chunks {
        let d = S::sub(S::load(c), S::splat(mean));
        sums = S::add(sums, if SQUARED { S::mul(d, d) } else { d });
    }
    let mut sums = S::store(sums);
    for (s, t) in sums.iter_mut().zip(tail) {
        let d = t - mean;
        *s += if SQUARED { d * d } else { d };
    }
    S::sum(S::load(&sums))
}

/// Norm of each head of queries and keys, or of all of them together, in place (transformers' `q_norm` and `k_norm`).
pub(crate) struct HeadNorm<'a> {
    /// Which.
    pub norm: Norm,
    /// Rows of `stride`, each beginning with queries, then keys.
    pub qkv: &'a mut [f32],
    /// Distance from row to row.
    pub stride: usize,
    /// Widths of the queries of a row, and of its keys.
    pub widths: [usize; 2],
    /// Of these, what one norm is taken of.
    pub spans: [usize; 2],
    /// Factors for queries, and for keys: for one span, which all share, or for all.
    pub weights: [&'a [f32]; 2],
    /// Summands likewise.
    pub biases: [Option<&'a [f32]>; 2],
}

impl HeadNorm<'_> {
    pub(super) fn run(self, cpu: &Cpu) {
        let HeadNorm { norm, qkv, stride, widths, spans, weights, biases } = self;
        cpu.pool.pieces(qkv, stride, Pool::grain(stride), |_, row| {
            cpu.isa.run(HeadNorm { norm, qkv: row, stride, widths, spans, weights, biases });
        });
    }
}

impl Kernel for HeadNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for row in self.qkv.chunks_exact_mut(self.stride) {
            let (queries, rest) = row.split_at_mut(self.widths[0]);
            for (which, part) in [queries, &mut rest[..self.widths[1]]].into_iter().enumerate() {
                let (span, weights) = (self.spans[which], self.weights[which]);
                for (number, x) in part.chunks_exact_mut(span).enumerate() {
                    let first = number * span % weights.len();
                    let (mean, scale) = moments::<S>(self.norm, x);
                    for (i, (x, w)) in x.iter_mut().zip(&weights[first..]).enumerate() {
                        let y = (*x - mean) * scale * w;
                        *x = self.biases[which].map_or(y, |b| y + b[first + i]);
                    }
                }
            }
        }
    }
}

/// An activation of every value, in place.
pub(crate) struct Activate<'a> {
    /// Which.
    pub act: Act,
    /// The values.
    pub x: &'a mut [f32],
}

impl Activate<'_> {
    pub(super) fn run(self, cpu: &Cpu) {
        cpu.pool.pieces(self.x, PIECE, 1, |_, x| cpu.isa.run(Activate { act: self.act, x }));
    }
}

impl Kernel for Activate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        map_lanes!(x in self.x => self.act.apply::<S>(x));
    }
}

/// `e^x` of every value, in place, on the caller's thread.
pub(super) struct Exp<'a>(pub &'a mut [f32]);

impl Kernel for Exp<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        map_lanes!(x in self.0 => exp::<S>(x));
    }
}

/// `gate = act(gate) * up`, in place; rows are `(gate | up)`, each half `width` wide.
pub(crate) struct GateMul<'a> {
    /// Of the gate.
    pub act: Act,
    /// Rows of `2 * width`.
    pub gate_up: &'a mut [f32],
    /// Width of each half.
    pub width: usize,
}

impl GateMul<'_> {
    pub(super) fn run(self, cpu: &Cpu) {
        cpu.pool.pieces(self.gate_up, 2 * self.width, Pool::grain(2 * self.width), |_, x| {
            cpu.isa.run(GateMul { act: self.act, gate_up: x, width: self.width })
        });
    }
}

impl Kernel for GateMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        for row in self.gate_up.chunks_exact_mut(2 * self.width) {
            let (gate, up) = row.split_at_mut(self.width);
            map_lanes!(g in gate, u in up => S::mul(self.act.apply::<S>(g), u));
        }
    }
}

/// `x = cap * tanh(scale * x / cap)`, in place; without a bound `scale * x`.
pub(crate) struct SoftCap<'a> {
    /// The factor.
    pub scale: f32,
    /// The bound.
    pub cap: Option<f32>,
    /// The values.
    pub x: &'a mut [f32],
}

impl SoftCap<'_> {
    pub(super) fn run(self, cpu: &Cpu) {
        let SoftCap { scale, cap, x } = self;
        cpu.pool.pieces(x, PIECE, 1, |_, x| cpu.isa.run(SoftCap { scale, cap, x }));
    }
}

impl Kernel for SoftCap<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let scale = S::splat(self.scale);
        if self.scale != 1.0 {
            map_lanes!(x in self.x => S::mul(x, scale));
        }
        if let Some(cap) = self.cap {
            let cap = S::splat(cap);
            map_lanes!(x in self.x => S::mul(cap, tanh::<S>(S::div(x, cap))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::{Cpu, isa::Isa};

    const ACTS: [Act; 13] = [
        Act::Silu,
        Act::Gelu,
        Act::GeluTanh,
        Act::GeluQuick,
        Act::Relu,
        Act::Tanh,
        Act::ReluSquared,
        Act::Relu6,
        Act::LeakyRelu,
        Act::Mish,
        Act::Sigmoid,
        Act::GeluClipped,
        Act::Identity,
    ];

    fn true_value(act: Act, x: f64) -> f64 {
        match act {
            Act::Silu => x / (1.0 + (-x).exp()),
            // By the series of the error function, which converges for the values tested.
            Act::Gelu => {
                let z = x * std::f64::consts::FRAC_1_SQRT_2;
                let (mut term, mut erf) = (z, z);
                for n in 1..80 {
                    term *= -z * z / f64::from(n);
                    erf += term / f64::from(2 * n + 1);
                }
                0.5 * x * (1.0 + erf * std::f64::consts::FRAC_2_SQRT_PI)
            }
            Act::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            }
            Act::GeluQuick => x / (1.0 + (-1.702 * x).exp()),
            Act::Relu => x.max(0.0),
            Act::Tanh => x.tanh(),
            Act::ReluSquared => x.max(0.0).powi(2),
            Act::Relu6 => x.clamp(0.0, 6.0),
            Act::LeakyRelu => x.max(0.01 * x),
            Act::Mish => x * x.exp().ln_1p().tanh(),
            Act::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Act::GeluClipped => true_value(Act::Gelu, x).min(10.0),
            Act::Identity => x,
        }
    }

    #[test]
    fn bounds_are_reached_and_nothing_hides_a_nan() {
        for act in ACTS {
            let mut x = [-30.0, 30.0, 90.0, f32::NAN, f32::INFINITY];
            Cpu::on(Isa::detect()).activate(Activate { act, x: &mut x });
            let [low, high, higher, nan, infinite] = x;
            assert!(nan.is_nan() && !infinite.is_nan(), "{act:?} {x:?}");
            let expected = match act {
                Act::Relu6 => [0.0, 6.0, 6.0],
                Act::GeluClipped => [0.0, 10.0, 10.0],
                Act::Mish | Act::Silu | Act::Gelu | Act::GeluTanh | Act::GeluQuick | Act::Relu => {
                    [0.0, 30.0, 90.0]
                }
                Act::ReluSquared => [0.0, 900.0, 8100.0],
                Act::LeakyRelu => [-0.3, 30.0, 90.0],
                Act::Tanh => [-1.0, 1.0, 1.0],
                Act::Sigmoid => [0.0, 1.0, 1.0],
                Act::Identity => [-30.0, 30.0, 90.0],
            };
            let near = |(a, b): (f32, f32)| (a - b).abs() < 1e-5;
            assert!([low, high, higher].into_iter().zip(expected).all(near), "{act:?} {x:?}");
        }
    }

    #[test]
    fn norms_and_activations_give_equal_bits_on_every_instruction_set_and_the_right_values() {
        let width = 53;
        let x: Vec<f32> = (0..2 * width).map(|i| (i as f32 * 0.7).sin() * 3.0 + 0.4).collect();
        let weight: Vec<f32> = (0..width).map(|i| 1.0 + i as f32 * 0.01).collect();
        let bias: Vec<f32> = (0..width).map(|i| i as f32 * 0.02 - 0.5).collect();
        let run = |isa| {
            let mut all = Vec::new();
            for norm in [Norm::Rms(1e-5), Norm::Layer(1e-5)] {
                let mut out = vec![0.0; 2 * width];
                let rows = Rows { data: &x, stride: width, count: 2 };
                let bias = Some(&bias[..]);
                let output = Output::Store;
                Cpu::on(isa).norm(NormRows { norm, x: rows, weight: &weight, bias, out: &mut out, output });
                all.extend(out);
            }
            for act in ACTS {
                let mut gated = x.clone();
                Cpu::on(isa).gate_mul(GateMul { act, gate_up: &mut gated, width });
                all.extend(gated);
            }
            let mut capped = x.clone();
            Cpu::on(isa).soft_cap(SoftCap { scale: 0.5, cap: Some(2.0), x: &mut capped });
            all.extend(capped);
            all
        };
        let all = run(Isa::available()[0]);
        for isa in Isa::available() {
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&run(isa)), bits(&all));
        }
        let row: Vec<f64> = x[..width].iter().map(|x| f64::from(*x)).collect();
        let mean = row.iter().sum::<f64>() / width as f64;
        let square = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
        let near = |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 1e-5, "{a}, not {b}");
        for i in 0..width {
            let (w, b) = (f64::from(weight[i]), f64::from(bias[i]));
            near(all[i], row[i] / (square + 1e-5).sqrt() * w + b);
            near(all[2 * width + i], (row[i] - mean) / (square - mean * mean + 1e-5).sqrt() * w + b);
            for (a, act) in ACTS.into_iter().enumerate() {
                near(all[(4 + 2 * a) * width + i], true_value(act, row[i]) * f64::from(x[width + i]));
            }
            near(all[(4 + 2 * ACTS.len()) * width + i], 2.0 * (row[i] * 0.5 / 2.0).tanh());
        }
    }
}
