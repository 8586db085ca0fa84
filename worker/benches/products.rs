//! The matrix products of a Llama of 1.1 B parameters, and nothing else, in every format.
//!
//! `cargo bench -p strata-worker --bench products [-- FORMAT… ROWS… threads=N isa=NAME]` prints medians: tokens per
//! second, and the bytes and operations that makes.

use std::{sync::Arc, time::Instant};

use strata_proto::Format;
use strata_worker::{
    device::Compute,
    kernels::{
        buffer::Arena,
        cpu::{
            Cpu,
            isa::Isa,
            linear::{Linear, Output, Rows, packed_words},
            packed::PackedMatrix,
            pool::Pool,
        },
    },
};

const LAYERS: usize = 22;
/// Outputs and inputs: queries, keys and values; their output; gate and up; down.
const LAYER: [(usize, usize); 4] = [(2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632)];
const HEAD: (usize, usize) = (32000, 2048);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let named = |key: &str| arguments.iter().find_map(|a| a.strip_prefix(key)?.strip_prefix('='));
    let default = Compute::shared_by(1);
    let threads = named("threads").map_or(default.threads, |n| n.parse().expect("threads=NUMBER"));
    let isa: Isa = named("isa").map_or(default.isa, |name| name.parse().expect("isa=NAME"));
    let formats: Vec<Format> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    let rows: Vec<usize> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    let formats = if formats.is_empty() { Format::ALL.to_vec() } else { formats };
    let rows = if rows.is_empty() { vec![1, 4, 8, 16, 32, 512] } else { rows };
    let cpu = Cpu::new(isa, Arc::new(Pool::new(threads)));
    println!("{} with {threads} threads", isa.name());
    for format in formats {
        let sizes: Vec<_> = std::iter::repeat_n(LAYER, LAYERS).flatten().chain([HEAD]).collect();
        let bytes: u64 = sizes.iter().map(|(n, k)| PackedMatrix::bytes_for(*n, *k, format)).sum();
        let mut arena = Arena::new(bytes).expect("memory");
        let matrices: Vec<_> = sizes
            .iter()
            .map(|(n, k)| PackedMatrix::zeros(*n, *k, format, &mut arena).expect("memory"))
            .collect();
        for rows in &rows {
            measure(&cpu, format, &matrices, *rows, bytes);
        }
    }
}

fn measure(cpu: &Cpu, format: Format, matrices: &[PackedMatrix], rows: usize, bytes: u64) {
    let x: Vec<f32> = (0..rows * 5632).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut out = vec![0.0; rows * 32000];
    let mut packed = vec![0; rows * packed_words(5632)];
    let mut once = || {
        let begun = Instant::now();
        for weight in matrices {
            let x = Rows { data: &x, stride: weight.k(), count: rows };
            cpu.linear(Linear {
                weight,
                bias: None,
                x,
                packed: &mut packed,
                out: &mut out,
                output: Output::Store,
            });
        }
        begun.elapsed().as_secs_f64()
    };
    let mut times: Vec<f64> = (0..if rows > 64 { 3 } else { 9 }).map(|_| once()).collect();
    times.sort_by(f64::total_cmp);
    let seconds = times[times.len() / 2];
    let operations: usize = matrices.iter().map(|m| 2 * m.n() * m.k() * rows).sum();
    println!(
        "{:5} {rows:4} rows: {:8.1} tokens/s  {:6.1} GB/s  {:7.1} GFLOP/s",
        format.to_string(),
        rows as f64 / seconds,
        bytes as f64 / seconds / 1e9,
        operations as f64 / seconds / 1e9
    );
}
