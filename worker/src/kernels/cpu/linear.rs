//! Matrix product over packed weights: `out = x W^T + bias`, optionally added to the residual.
//!
//! Each output is one chain `acc = acc + x[i] * w[i]` over ascending `i`, whatever the number of rows; bias, then the
//! residual, are added after it.

use strata_proto::DType;

use super::{
    isa::Kernel,
    packed::{LANES, PackedMatrix},
};
use crate::kernels::buffer::{Element, round_to, with_values};

/// Activations `(count, width)` whose rows lie `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The first row starts here.
    pub data: &'a [f32],
    /// Distance from row to row.
    pub stride: usize,
    /// Rows.
    pub count: usize,
}

/// What becomes of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// It replaces what was there.
    Store,
    /// It replaces what was there, rounded to this format.
    StoreRounded(DType),
    /// It is added to the residual stream, rounded to this format.
    AddRounded(DType),
}

impl Output {
    /// What `old` becomes, given the product `y`.
    #[inline(always)]
    pub(super) fn apply(self, old: f32, y: f32) -> f32 {
        match self {
            Output::Store => y,
            Output::StoreRounded(dtype) => round_to(dtype, y),
            Output::AddRounded(dtype) => round_to(dtype, old + y),
        }
    }
}

/// One product: `x (rows, k)`, weight `(n, k)`, out `(rows, n)`.
pub struct Linear<'a> {
    /// The weights.
    pub weight: &'a PackedMatrix,
    /// One value per output.
    pub bias: Option<&'a [f32]>,
    /// The activations.
    pub x: Rows<'a>,
    /// Rows of `n`, without gaps.
    pub out: &'a mut [f32],
    /// What becomes of the product.
    pub output: Output,
}

/// Rows that share one pass over the weights: their activations stay in the second-level cache.
const ROW_BLOCK: usize = 64;
/// Rows of a tile that are widened at once where widening is costly.
const WIDENED: usize = 32;

pub(super) struct LinearKernel<'a> {
    pub call: Linear<'a>,
    pub row_group: usize,
}

impl Kernel for LinearKernel<'_> {
    #[inline(always)]
    fn run(self) {
        let LinearKernel { mut call, row_group } = self;
        let weight = call.weight;
        with_values!(weight.values(), w => {
            for first in (0..call.x.count).step_by(ROW_BLOCK) {
                let end = call.x.count.min(first + ROW_BLOCK);
                let tiles = w.chunks_exact(weight.k() * LANES);
                for (t, tile) in tiles.enumerate() {
                    let tile = tile.as_chunks().0;
                    let mut row = first;
                    while row < end {
                        row += match end - row {
                            8.. if row_group >= 8 => one_tile::<_, 8>(&mut call, tile, t, row),
                            4.. if row_group >= 4 => one_tile::<_, 4>(&mut call, tile, t, row),
                            2.. => one_tile::<_, 2>(&mut call, tile, t, row),
                            _ => one_tile::<_, 1>(&mut call, tile, t, row),
                        };
                    }
                }
            }
        });
    }
}

/// Rows `row..row + R` against tile `t`; gives back `R`.
#[inline(always)]
fn one_tile<T: Element, const R: usize>(
    call: &mut Linear<'_>,
    tile: &[[T; LANES]],
    t: usize,
    row: usize,
) -> usize {
    let x: [&[f32]; R] = std::array::from_fn(|r| &call.x.data[(row + r) * call.x.stride..]);
    let acc = dot::<T, R>(x, tile);
    let n = call.weight.n();
    let column = t * LANES;
    let width = (n - column).min(LANES);
    let bias = call.bias.map(|b| &b[column..column + width]);
    for (r, acc) in acc.iter().enumerate() {
        let out = &mut call.out[(row + r) * n + column..][..width];
        for (i, (o, a)) in out.iter_mut().zip(acc).enumerate() {
            let y = bias.map_or(*a, |b| *a + b[i]);
            *o = call.output.apply(*o, y);
        }
    }
    R
}

/// `R` rows of at least `k` activations against one tile `[k][16]`.
#[inline(always)]
pub(super) fn dot<T: Element, const R: usize>(x: [&[f32]; R], tile: &[[T; LANES]]) -> [[f32; LANES]; R] {
    let x = x.map(|x| &x[..tile.len()]);
    let mut acc = [[0.0; LANES]; R];
    if T::DTYPE == DType::F16 {
        // Widening f16 takes many operations: the compiler vectorises them in a long loop only.
        let mut wide = [[0.0; LANES]; WIDENED];
        for (b, block) in tile.chunks(WIDENED).enumerate() {
            for (o, w) in wide.as_flattened_mut().iter_mut().zip(block.as_flattened()) {
                *o = w.to_f32();
            }
            for (i, w) in wide[..block.len()].iter().enumerate() {
                for r in 0..R {
                    let a = x[r][b * WIDENED + i];
                    for l in 0..LANES {
                        acc[r][l] += a * w[l];
                    }
                }
            }
        }
        return acc;
    }
    // The same loops again: behind a call of their own, the accumulators would leave the registers.
    for (i, w) in tile.iter().enumerate() {
        let w = w.map(T::to_f32);
        for r in 0..R {
            let a = x[r][i];
            for l in 0..LANES {
                acc[r][l] += a * w[l];
            }
        }
    }
    acc
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::{Cpu, isa::Isa};

    fn values(seed: u32, len: usize) -> Vec<f32> {
        let mut s = seed;
        (0..len)
            .map(|_| {
                s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (s >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn matrix(n: usize, k: usize, dtype: DType) -> PackedMatrix {
        let mut w = PackedMatrix::zeros(n, k, dtype).unwrap();
        let data: Vec<u8> = values(7, n * k).iter().flat_map(|x| x.to_le_bytes()).collect();
        w.write(0, &data, DType::F32, |i| (i / k, i % k)).unwrap();
        w
    }

    #[test]
    fn any_number_of_rows_and_any_instruction_set_equal_single_rows_on_the_baseline() {
        let baseline = Cpu::on(Isa::available()[0]);
        for dtype in DType::ALL {
            for (n, k) in [(16, 32), (33, 37), (50, 95), (7, 1)] {
                let w = matrix(n, k, dtype);
                let bias = values(3, n);
                // A stride longer than the row, with NaN between the rows.
                let stride = k + 3;
                let mut x = vec![f32::NAN; 33 * stride];
                for (r, row) in values(5, 33 * k).chunks(k).enumerate() {
                    x[r * stride..][..k].copy_from_slice(row);
                }
                for output in [Output::Store, Output::AddRounded(dtype)] {
                    let run = |cpu: Cpu, first: usize, count: usize| {
                        let mut out = values(9, 33 * n)[first * n..(first + count) * n].to_vec();
                        cpu.linear(Linear {
                            weight: &w,
                            bias: Some(&bias),
                            x: Rows { data: &x[first * stride..], stride, count },
                            out: &mut out,
                            output,
                        });
                        out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                    };
                    let singles: Vec<u32> = (0..33).flat_map(|r| run(baseline, r, 1)).collect();
                    for isa in Isa::available() {
                        for m in 1..=33 {
                            assert_eq!(
                                run(Cpu::on(isa), 0, m),
                                singles[..m * n],
                                "{} m={m} n={n}",
                                isa.name()
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn products_match_a_plain_double_precision_sum() {
        let (m, n, k) = (5, 21, 300);
        let w = matrix(n, k, DType::F32);
        let (x, plain) = (values(5, m * k), values(7, n * k));
        let mut out = vec![0.0; m * n];
        let call = Linear {
            weight: &w,
            bias: None,
            x: Rows { data: &x, stride: k, count: m },
            out: &mut out,
            output: Output::Store,
        };
        Cpu::detect().linear(call);
        for r in 0..m {
            for c in 0..n {
                let sum: f64 = (0..k).map(|i| f64::from(x[r * k + i]) * f64::from(plain[c * k + i])).sum();
                assert!((f64::from(out[r * n + c]) - sum).abs() < 1e-4);
            }
        }
    }
}
