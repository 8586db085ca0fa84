//! Elementwise operations and norms over rows.

use super::{
    isa::Kernel,
    linear::Rows,
    math::{exp, sum_lanes},
    packed::LANES,
};

/// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row (transformers' `LlamaRMSNorm`, all in f32).
pub struct RmsNorm<'a> {
    /// The rows; as wide as `weight`.
    pub x: Rows<'a>,
    /// One factor per column.
    pub weight: &'a [f32],
    /// Keeps the root away from zero.
    pub eps: f32,
    /// Rows without gaps.
    pub out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run(self) {
        let width = self.weight.len();
        for r in 0..self.x.count {
            let x = &self.x.data[r * self.x.stride..][..width];
            let out = &mut self.out[r * width..][..width];
            let scale = inverse_rms(x, self.eps);
            for ((o, x), w) in out.iter_mut().zip(x).zip(self.weight) {
                *o = x * scale * w;
            }
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for c in chunks {
        for l in 0..LANES {
            sums[l] += c[l] * c[l];
        }
    }
    for (s, t) in sums.iter_mut().zip(tail) {
        *s += t * t;
    }
    1.0 / (sum_lanes(sums) / x.len() as f32 + eps).sqrt()
}

/// Root-mean-square norm of each head of queries and keys, in place (transformers' `q_norm` and `k_norm`).
pub struct HeadNorm<'a> {
    /// Rows of `stride`, each beginning with `(heads, head_dim)` queries, then `(kv_heads, head_dim)` keys.
    pub qkv: &'a mut [f32],
    /// Distance from row to row.
    pub stride: usize,
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// `(head_dim)` factors for queries, and for keys.
    pub weights: [&'a [f32]; 2],
    /// Keeps the root away from zero.
    pub eps: f32,
}

impl Kernel for HeadNorm<'_> {
    #[inline(always)]
    fn run(self) {
        let d = self.weights[0].len();
        for row in self.qkv.chunks_exact_mut(self.stride) {
            let heads = row.chunks_exact_mut(d).take(self.heads + self.kv_heads);
            for (h, head) in heads.enumerate() {
                let scale = inverse_rms(head, self.eps);
                for (x, w) in head.iter_mut().zip(self.weights[usize::from(h >= self.heads)]) {
                    *x = *x * scale * w;
                }
            }
        }
    }
}

/// `gate = silu(gate) * up`, in place; rows are `(gate | up)`, each half `width` wide.
pub struct SiluMul<'a> {
    /// Rows of `2 * width`.
    pub gate_up: &'a mut [f32],
    /// Width of each half.
    pub width: usize,
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run(self) {
        for row in self.gate_up.chunks_exact_mut(2 * self.width) {
            let (gate, up) = row.split_at_mut(self.width);
            for (g, u) in gate.iter_mut().zip(up) {
                *g = *g / (1.0 + exp(-*g)) * *u;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::{Cpu, isa::Isa};

    #[test]
    fn norm_and_gate_give_equal_bits_on_every_instruction_set_and_the_right_values() {
        let width = 53;
        let x: Vec<f32> = (0..2 * width).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let weight: Vec<f32> = (0..width).map(|i| 1.0 + i as f32 * 0.01).collect();
        let run = |isa| {
            let mut out = vec![0.0; 2 * width];
            let rows = Rows { data: &x, stride: width, count: 2 };
            Cpu::on(isa).rms_norm(RmsNorm { x: rows, weight: &weight, eps: 1e-5, out: &mut out });
            let mut gated = x.clone();
            Cpu::on(isa).silu_mul(SiluMul { gate_up: &mut gated, width });
            (out, gated)
        };
        let (out, gated) = run(Isa::available()[0]);
        for isa in Isa::available() {
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&run(isa).0), bits(&out));
            assert_eq!(bits(&run(isa).1), bits(&gated));
        }
        let mean = x[..width].iter().map(|x| f64::from(x * x)).sum::<f64>() / width as f64;
        for i in 0..width {
            let norm = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
            assert!((f64::from(out[i]) - norm).abs() < 1e-5);
            let (g, u) = (f64::from(x[i]), f64::from(x[width + i]));
            assert!((f64::from(gated[i]) - g / (1.0 + (-g).exp()) * u).abs() < 1e-5);
        }
    }
}
