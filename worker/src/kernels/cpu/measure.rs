//! Times of products and other operations.

use std::time::{Duration, Instant};

use strata_proto::{DType, Format};

use super::{
    Cpu,
    linear::{self, Linear, Output, Rows},
    packed::PackedMatrix,
};
use crate::kernels::buffer::Arena;

/// What a measurement takes at most, if two runs are not longer.
const LONG: f64 = 0.02;
const ROUNDS: usize = 5;

/// For what is so little that there is always time for it.
pub(crate) const LITTLE: Duration = Duration::from_secs(60);

/// Seconds of one run of something: the median of some, but what takes longer than `patience` is run once. `run` is
/// told which run it is.
pub(crate) fn seconds(patience: Duration, mut run: impl FnMut(usize)) -> f64 {
    let mut once = |turn| {
        let begun = Instant::now();
        run(turn);
        begun.elapsed().as_secs_f64()
    };
    let first = once(0);
    let most = patience.as_secs_f64() - first;
    if most < first {
        return first.max(1e-9);
    }
    let mut times: Vec<f64> = Vec::new();
    let mut sum = 0.0;
    // Short ones more often: an interruption is long beside them.
    while times.len() < ROUNDS * 20 && (times.len() < ROUNDS || sum < LONG) && sum <= most.min(10.0 * LONG) {
        let seconds = once(1 + times.len());
        sum += seconds;
        times.push(seconds);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2].max(1e-9)
}

/// Seconds of a product of `rows` rows with `(n, k)` matrices, so many of them that together they have `bytes` bytes at
/// least; `None` if there is no memory for them. `patience` is that of [`seconds`].
pub(crate) fn product(
    cpu: &Cpu,
    (n, k): (usize, usize),
    format: Format,
    rows: usize,
    (bytes, patience): (u64, Duration),
) -> Option<f64> {
    let each = PackedMatrix::bytes_for(n, k, format);
    let count = bytes.div_ceil(each.max(1)).max(1);
    let mut arena = Arena::new(each * count).ok()?;
    let weights = (0..count).map(|_| PackedMatrix::zeros(n, k, format, &mut arena).ok());
    let weights = weights.collect::<Option<Vec<_>>>()?;
    let (x, mut out) = (vec![0.5; rows * k], vec![0.0; rows * n]);
    let mut packed = vec![0; rows * linear::packed_words(k)];
    Some(seconds(patience, |turn| {
        cpu.linear(Linear {
            weight: &weights[turn % weights.len()],
            bias: None,
            x: Rows { data: &x, stride: k, count: rows },
            packed: &mut packed,
            out: &mut out,
            output: Output::Store,
        });
        std::hint::black_box(&out);
    }))
}

/// Bytes per second at which weights are read: by a product of one row with more than the caches hold.
pub(crate) fn bytes_per_second(cpu: &Cpu) -> Option<f64> {
    let (n, k) = (8192, 2048);
    let seconds = product(cpu, (n, k), Format::Float(DType::F32), 1, (1, LITTLE))?;
    Some((n * k * 4) as f64 / seconds)
}
