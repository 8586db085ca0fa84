//! Every kernel against the CPU's, or against a plain loop; run by the emulator (tests/emulator).

mod refusals;

use std::{path::Path, process::Command, sync::OnceLock};

use strata_proto::{DType, Format, Quantization};

use super::{
    Gpu,
    launch::{
        Attend, Bytes, Kernels, Places, RawCache, RawNorm, Routing, SharedExpert, attention_bytes, launch,
    },
    memory::{self, Memory, Ptr},
    product::{Epilogue, Grouped, Linear, Matrix, RowBytes, Rows, TASK_BYTES},
};
use crate::kernels::{
    buffer::{Arena, round_to},
    cpu::{
        Cpu,
        isa::Isa,
        linear::{self, Output},
        packed::{Elements, PackedMatrix},
        quant,
    },
    ops::{Act, BUCKETS, Distances, GROUP, Slopes, bucket, held_format},
};

/// Builds the emulator and loads its libraries into this process, in place of NVIDIA's.
pub(crate) fn emulator() {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let directory = root.join("target/tmp/emulator");
        let built = Command::new(root.join("tests/emulator/build")).arg(&directory).status().unwrap();
        assert!(built.success(), "the emulator could not be built: it needs a C++ compiler");
        for library in ["libcuda.so.1", "libcuda.so", "libnvrtc.so.13", "libcublas.so.13", "libnccl.so.2"] {
            // SAFETY: our own libraries, which do nothing when they are loaded.
            let library = unsafe { libloading::Library::new(directory.join(library)) };
            std::mem::forget(library.unwrap());
        }
    });
}

/// How often this thread has asked the emulator for what CUDA refuses beside a capture.
pub(crate) fn changes() -> u64 {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tmp/emulator/libcuda.so");
    // SAFETY: our own library, which is loaded already; the function has this type.
    unsafe {
        let library = libloading::Library::new(path).unwrap();
        let count: libloading::Symbol<'_, unsafe extern "C" fn() -> u64> =
            library.get(b"emulatorChanges").unwrap();
        count()
    }
}

/// A GPU, and buffers on it for as long as a test needs them.
struct Bench {
    gpu: Gpu,
    held: Vec<Memory>,
}

impl Bench {
    fn new() -> Self {
        emulator();
        Bench { gpu: Gpu::open(0).unwrap(), held: Vec::new() }
    }

    fn bytes(&mut self, bytes: &[u8]) -> Ptr {
        let memory = Memory::new(&self.gpu.context, bytes.len() as u64).unwrap();
        memory::upload(&self.gpu.stream, memory.ptr(), bytes).unwrap();
        self.gpu.wait().unwrap();
        let at = memory.ptr();
        self.held.push(memory);
        at
    }

    fn words(&mut self, words: &[u32]) -> Ptr {
        self.bytes(&words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>())
    }

    fn floats(&mut self, dtype: DType, values: &[f32]) -> Ptr {
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::BF16 => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        };
        self.bytes(&bytes)
    }

    fn read(&self, dtype: DType, at: Ptr, count: usize) -> Vec<f32> {
        let mut bytes = vec![0; count * dtype.size() as usize];
        memory::download(&self.gpu.stream, &mut bytes, at).unwrap();
        self.gpu.wait().unwrap();
        match dtype {
            DType::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            DType::BF16 => {
                bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
            }
            DType::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        }
    }

    /// A matrix in its format, as the engine lays it out.
    fn matrix(&mut self, n: usize, k: usize, format: Format, values: &[f32]) -> Matrix {
        let (values, factors) = match format {
            Format::Float(dtype) => (self.floats(dtype, values), Ptr::NULL),
            Format::Quantized(q) => {
                let mut groups = vec![quant::Group::default(); values.len() / GROUP];
                quant::quantize(&cpu(), q, values.as_chunks().0, &mut groups);
                let (mut integers, mut factors) = (Vec::new(), Vec::new());
                for group in &groups {
                    factors.extend(group.factor.to_le_bytes());
                    match q {
                        Quantization::Int8 => integers.extend(group.values.map(|v| v as u8)),
                        Quantization::Int4 => {
                            factors.extend(group.least.to_le_bytes());
                            for eight in group.values.as_chunks::<8>().0 {
                                integers.extend((0..4).map(|i| eight[i] as u8 | (eight[i + 4] as u8) << 4));
                            }
                        }
                    }
                }
                // Whole words are read.
                factors.resize(factors.len().next_multiple_of(4), 0);
                (self.bytes(&integers), self.bytes(&factors))
            }
        };
        Matrix { format, n, k, values, factors }
    }

    fn scratch(&mut self, rows: usize, k: usize) -> RowBytes {
        let values = self.bytes(&vec![0xff; rows * k]);
        let [factors, sums] =
            [(); 2].map(|()| self.floats(DType::F32, &vec![f32::NAN; rows * k.div_ceil(GROUP)]));
        let mut elsewhere = vec![0xff; (RowBytes::ELSEWHERE - RowBytes::ZEROS) as usize];
        elsewhere.resize(RowBytes::ELSEWHERE as usize, 0);
        let elsewhere = self.bytes(&elsewhere);
        RowBytes::new(Bytes { values, factors, sums }, elsewhere)
    }
}

fn cpu() -> Cpu {
    Cpu::on(Isa::detect())
}

/// Numbers that look random and are not.
fn noise(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((seed * 7919 + i * 104_729 + 1) as f32 * 0.618).sin()).collect()
}

fn rounded(dtype: DType, values: &[f32]) -> Vec<f32> {
    values.iter().map(|x| round_to(dtype, *x)).collect()
}

/// What quantized weights stand for, as elements of a format.
fn stood_for(weight: &[f32], quantization: Quantization, element: DType) -> Vec<f32> {
    let groups = weight.as_chunks::<GROUP>().0;
    let mut quantized = vec![quant::Group::default(); groups.len()];
    quant::quantize(&cpu(), quantization, groups, &mut quantized);
    let of = |group: &quant::Group| -> Vec<f32> {
        let (factor, least) = (group.factor.to_f32(), group.least.to_f32());
        let value = |v: &i8| match quantization {
            Quantization::Int8 => f32::from(*v) * factor,
            Quantization::Int4 => {
                round_to(element, f32::from(*v) * round_to(element, factor) + round_to(element, least))
            }
        };
        group.values.iter().map(value).collect()
    };
    quantized.iter().flat_map(of).collect()
}

/// The product by the CPU's kernels, which have their own tests.
fn reference(
    weight: &[f32],
    n: usize,
    k: usize,
    format: Format,
    x: &[f32],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let cpu = cpu();
    let mut arena = Arena::new(PackedMatrix::bytes_for(n, k, format)).unwrap();
    let mut matrix = PackedMatrix::zeros(n, k, format, &mut arena).unwrap();
    let elements = Elements { first: 0, total: n * k, values: weight, groups: &[], cpu: &cpu };
    matrix.write(&elements, |i| (i / k, i % k)).unwrap();
    let rows = x.len() / k;
    let (mut packed, mut out) = (vec![0; rows * linear::packed_words(k)], vec![0.0; rows * n]);
    cpu.linear(linear::Linear {
        weight: &matrix,
        bias,
        x: linear::Rows { data: x, stride: k, count: rows },
        packed: &mut packed,
        out: &mut out,
        output: Output::Store,
    });
    out
}

fn close(got: &[f32], want: &[f32], most: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= most * largest, "{what}: value {i} is {a}, expected {b}");
    }
}

/// What a result in a format may be off by, in terms of the largest.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-6,
        DType::BF16 => 6e-3,
        DType::F16 => 8e-4,
    }
}

#[test]
fn products_are_the_cpus_for_every_format_and_number_of_rows() {
    let mut b = Bench::new();
    // Few outputs and many, whole tiles and not; inputs that are no multiple of what is read at a time.
    for (element, formats) in [
        (DType::F32, &Format::ALL[..]),
        (DType::BF16, &Format::ALL[..]),
        (DType::F16, &[Format::Float(DType::F16), Format::Quantized(Quantization::Int4)][..]),
    ] {
        let kernels = b.gpu.kernels(element, 64).unwrap();
        for format in formats.iter().copied() {
            for (n, k) in [(70, 96), (131, 544), (134, 896), (33, 19), (300, 640)] {
                let format = held_format(k, format);
                let weight = noise(1, n * k);
                let matrix = b.matrix(n, k, format, &weight);
                let bias = noise(2, n);
                let bias_at = b.floats(DType::F32, &bias);
                for rows in [1, 2, 3, 17, 65] {
                    // The CPU rounds activations as the weights are; these are already.
                    let also = if let Format::Float(dtype) = format { dtype } else { element };
                    let x = rounded(also, &rounded(element, &noise(3, rows * k)));
                    let old = rounded(element, &noise(4, rows * n));
                    let want = match format {
                        // Rows that are not turned into bytes.
                        Format::Quantized(quantization)
                            if (element == DType::F32 && rows > 8)
                                || (element != DType::F32 && rows > 1 && k % 128 == 0) =>
                        {
                            let weight = stood_for(&weight, quantization, element);
                            reference(&weight, n, k, Format::Float(DType::F32), &x, Some(&bias))
                        }
                        format => reference(&weight, n, k, format, &x, Some(&bias)),
                    };
                    let (x_at, bytes) = (b.floats(element, &x), b.scratch(rows, k));
                    let mut run = |epilogue, out_dtype| {
                        let out = b.floats(out_dtype, &old);
                        let call = Linear {
                            weight: &matrix,
                            bias: bias_at,
                            x: Rows::new(x_at, k),
                            norm: RawNorm::default(),
                            rows,
                            out,
                            out_stride: n,
                            epilogue,
                            grouped: None,
                            bytes: &bytes,
                        };
                        b.gpu.linear(&kernels, &call).unwrap();
                        let got = b.read(out_dtype, out, rows * n);
                        b.held.pop();
                        got
                    };
                    let what = format!("{element} rows times {format} ({n}, {k}), {rows} rows");
                    let most = tolerance(element);
                    close(&run(Epilogue::Store, element), &want, most, &what);
                    close(&run(Epilogue::StoreValues, DType::F32), &want, 2e-5, &format!("{what}, values"));
                    let sum: Vec<f32> = want.iter().zip(&old).map(|(a, b)| a + b).collect();
                    close(&run(Epilogue::Add, element), &sum, most, &format!("{what}, added"));
                    let act = |x: f32| x / (1.0 + (-x).exp());
                    let acted: Vec<f32> = want.iter().map(|x| act(*x)).collect();
                    close(&run(Epilogue::Activated(Act::Silu), element), &acted, 2.0 * most, &what);
                    if n % 2 == 0 {
                        let half = n / 2;
                        let gated: Vec<f32> = want
                            .chunks(n)
                            .flat_map(|row| (0..half).map(|i| act(row[i]) * row[i + half]))
                            .collect();
                        let got = run(Epilogue::Gated(Act::Silu), element);
                        let got: Vec<f32> = got.chunks(n).flat_map(|row| row[..half].to_vec()).collect();
                        close(&got, &gated, 3.0 * most, &format!("{what}, gated"));
                    }
                }
                b.held.clear();
            }
        }
    }
}

#[test]
fn many_rows_meet_quantized_weights_as_elements() {
    let mut b = Bench::new();
    let kernels = b.gpu.kernels(DType::F32, 64).unwrap();
    // More weights than become elements at a time.
    let (n, k, rows) = (4160, 4096, 192);
    assert!((n * k * 4) as u64 > RowBytes::ELSEWHERE);
    let x = noise(3, rows * k);
    let x_at = b.floats(DType::F32, &x);
    let bytes = b.scratch(rows, k);
    for quantization in [Quantization::Int8, Quantization::Int4] {
        let int4 = quantization == Quantization::Int4;
        let values: Vec<u8> =
            (0..n * k / if int4 { 2 } else { 1 }).map(|i| (i * 31 + i / 4099) as u8).collect();
        let (factor, least) = (half::f16::from_f32(0.011), half::f16::from_f32(-0.08));
        let factors: Vec<u8> = (0..n * k / GROUP)
            .flat_map(|_| [factor, least].into_iter().take(1 + usize::from(int4)))
            .flat_map(half::f16::to_le_bytes)
            .collect();
        let weight = |o: usize, i: usize| {
            let place = o * k + i;
            match int4 {
                false => f64::from(values[place] as i8) * f64::from(factor),
                true => {
                    let byte = values[place / 8 * 4 + place % 4];
                    f64::from(byte >> (place % 8 / 4 * 4) & 15) * f64::from(factor) + f64::from(least)
                }
            }
        };
        let matrix = Matrix {
            format: Format::Quantized(quantization),
            n,
            k,
            values: b.bytes(&values),
            factors: b.bytes(&factors),
        };
        let out = b.floats(DType::F32, &vec![f32::NAN; rows * n]);
        let call = Linear {
            weight: &matrix,
            bias: Ptr::NULL,
            x: Rows::new(x_at, k),
            norm: RawNorm::default(),
            rows,
            out,
            out_stride: n,
            epilogue: Epilogue::Store,
            grouped: None,
            bytes: &bytes,
        };
        b.gpu.linear(&kernels, &call).unwrap();
        let all = b.read(DType::F32, out, rows * n);
        let places: Vec<_> = (0..300).map(|s| (s * 37 % rows, s * 1013 % n)).collect();
        let got: Vec<f32> = places.iter().map(|(row, o)| all[row * n + o]).collect();
        let sum =
            |row: usize, o: usize| (0..k).map(|i| f64::from(x[row * k + i]) * weight(o, i)).sum::<f64>();
        let want: Vec<f32> = places.iter().map(|(row, o)| sum(*row, *o) as f32).collect();
        close(&got, &want, 2e-5, &format!("{quantization:?}"));
    }
}

#[test]
fn rows_go_through_the_matrix_of_their_expert() {
    let mut b = Bench::new();
    let (n, k) = (64, 96);
    for (element, experts, active) in [(DType::F32, 5, 2), (DType::BF16, 5, 2), (DType::BF16, 70, 3)] {
        let kernels = b.gpu.kernels(element, 64).unwrap();
        let formats = [
            Format::Float(element),
            Format::Quantized(Quantization::Int8),
            Format::Quantized(Quantization::Int4),
        ];
        for (format, tokens) in formats.into_iter().flat_map(|f| [1, 3, 60, 90].map(|t| (f, t))) {
            let weights: Vec<_> = (0..experts).map(|e| noise(10 + e, n * k)).collect();
            let all = b.matrix(experts * n, k, format, &weights.concat());
            let x = rounded(element, &noise(5, tokens * k));
            // Expert 3 gets nobody, and of many experts three get nearly everybody.
            let logit = |token: usize, expert: usize| match expert {
                3 => -9.0,
                0 | 33 | 69 if experts == 70 && token > 4 => 9.0,
                _ => (((token * experts + expert) * 37 + token * 11) % 23) as f32 * 0.3,
            };
            let logits: Vec<f32> = (0..tokens).flat_map(|t| (0..experts).map(move |e| logit(t, e))).collect();
            let pairs = tokens * active;
            let (logits_at, x_at) = (b.floats(DType::F32, &logits), b.floats(element, &x));
            let [chosen, shares, order] = [(); 3].map(|()| b.words(&vec![u32::MAX; pairs]));
            let tasks = b.bytes(&vec![0xff; pairs * TASK_BYTES as usize]);
            let routing = Routing {
                experts: experts as i32,
                active: active as i32,
                normalize: 1,
                scale: 1.0,
                ..Routing::default()
            };
            launch!(b.gpu, kernels.route, (tokens.div_ceil(4) as u32, 1, 1), 128, 0;
                logits_at, chosen, shares, tokens as i32, routing)
            .unwrap();
            let groups = b.gpu.group(&kernels, (chosen, pairs), experts, (order, tasks)).unwrap();
            let out = b.floats(element, &vec![f32::NAN; pairs * n]);
            let bytes = b.scratch(tokens, k);
            let factor_bytes = match format {
                Format::Quantized(Quantization::Int8) => 2,
                Format::Quantized(Quantization::Int4) => 4,
                Format::Float(_) => 0,
            };
            let value_bytes = match format {
                Format::Float(dtype) => n * k * dtype.size() as usize,
                Format::Quantized(Quantization::Int8) => n * k,
                Format::Quantized(Quantization::Int4) => n * k / 2,
            };
            let strides = [value_bytes as u64, (n * k / GROUP * factor_bytes) as u64, 0];
            let call = Linear {
                weight: &Matrix { n, ..all },
                bias: Ptr::NULL,
                x: Rows::new(x_at, k),
                norm: RawNorm::default(),
                rows: pairs,
                out,
                out_stride: n,
                epilogue: Epilogue::Store,
                grouped: Some(Grouped { groups, divide: active, strides }),
                bytes: &bytes,
            };
            b.gpu.linear(&kernels, &call).unwrap();
            let sums = b.floats(element, &vec![f32::NAN; tokens * n]);
            launch!(b.gpu, kernels.combine_experts, (1, tokens as u32, 1), 256, 0;
                sums, out, shares, SharedExpert::default(), active as i32, n as i32, 0i32)
            .unwrap();
            let got = b.read(element, sums, tokens * n);

            let mut want = Vec::new();
            for token in 0..tokens {
                let mut p: Vec<f32> = logits[token * experts..][..experts].to_vec();
                crate::kernels::cpu::moe::softmax(&mut p);
                let mut best: Vec<usize> = (0..experts).collect();
                best.sort_by(|a, b| p[*b].total_cmp(&p[*a]).then(a.cmp(b)));
                let mut best = best[..active].to_vec();
                best.sort_unstable();
                let total: f32 = best.iter().map(|e| p[*e]).sum();
                let mut sum = vec![0.0; n];
                for e in best {
                    let y = reference(&weights[e], n, k, format, &x[token * k..][..k], None);
                    sum.iter_mut().zip(y).for_each(|(s, y)| *s += p[e] / total * y);
                }
                want.extend(sum);
            }
            close(&got, &want, 2.0 * tolerance(element), &format!("{tokens} tokens, {element}, {format}"));
            b.held.clear();
        }
    }
}

#[test]
fn there_are_no_more_tasks_than_experts_can_make() {
    let mut b = Bench::new();
    let kernels = b.gpu.kernels(DType::BF16, 64).unwrap();
    // Pairs, experts, and how many tasks of how many rows: one per pair, of some, and of a tile.
    for (pairs, experts, places, rows) in [(8, 128, 8, 1), (300, 128, 171, 4), (2048, 8, 39, 64)] {
        let chosen: Vec<u32> = (0..pairs).map(|i| (i * i % 7 * 3 % experts) as u32).collect();
        let chosen_at = b.words(&chosen);
        let (order, tasks) =
            (b.words(&vec![u32::MAX; pairs]), b.bytes(&vec![0xff; pairs * TASK_BYTES as usize]));
        let groups = b.gpu.group(&kernels, (chosen_at, pairs), experts, (order, tasks)).unwrap();
        assert_eq!((groups.places, groups.task_rows), (places, rows));
        let read =
            |at, count| -> Vec<u32> { b.read(DType::F32, at, count).iter().map(|x| x.to_bits()).collect() };
        let (order, tasks) = (read(order, pairs), read(tasks, 3 * places));
        let mut computed = vec![0; pairs];
        for [expert, first, count] in tasks.as_chunks().0 {
            assert!(*count as usize <= rows);
            for pair in &order[*first as usize..][..*count as usize] {
                assert_eq!(chosen[*pair as usize], *expert);
                computed[*pair as usize] += 1;
            }
        }
        assert!(computed.iter().all(|times| *times == 1), "each pair is computed once");
        b.held.clear();
    }
}

#[test]
fn the_bytes_of_a_norm_are_those_of_its_rows() {
    let mut b = Bench::new();
    for element in [DType::F32, DType::BF16, DType::F16] {
        let kernels = b.gpu.kernels(element, 64).unwrap();
        for (width, centred) in [(32, 0), (96, 1), (1312, 0)] {
            let rows = 3;
            let x = b.floats(element, &noise(6, 5 * width));
            let [weight, bias] = [7, 8].map(|seed| b.floats(DType::F32, &noise(seed, width)));
            let norm = RawNorm { weight, bias, epsilon: 1e-5, centred };
            // Rows in an order of their own.
            let (out, index) = (b.floats(element, &vec![f32::NAN; rows * width]), b.words(&[4, 0, 2]));
            let written = Rows::new(out, width);
            let [by_norm, by_rows] = [(); 2].map(|()| b.scratch(rows, width));
            let to = by_norm.fill(written, rows, width);
            launch!(b.gpu, kernels.norm_rows, (rows as u32, 1, 1), 256, 0;
                out, x, index, norm, width as i32, 0i32, to)
            .unwrap();
            let from = by_rows.fill(written, rows, width);
            let blocks = (rows * width / GROUP).div_ceil(8) as u32;
            launch!(b.gpu, kernels.quantize_rows, (blocks, 1, 1), 256, 0;
                from, out, width as i32, width as i32, rows as i32)
            .unwrap();
            let parts = |bytes: Bytes| {
                let words = [(bytes.values, GROUP / 4), (bytes.factors, 1), (bytes.sums, 1)];
                words.map(|(at, each)| {
                    let words = b.read(DType::F32, at, rows * width / GROUP * each);
                    words.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                })
            };
            assert_eq!(parts(to), parts(from), "{element}, {width} wide");
            b.held.clear();
        }
    }
}

/// One row of a step: positions before it, and its tokens.
type Row = (usize, usize);

/// What attention depends on, beside its numbers.
#[derive(Debug, Clone, Copy)]
struct Case<'a> {
    element: DType,
    /// Width of a head.
    d: usize,
    heads: usize,
    kv_heads: usize,
    /// 0 for none.
    softcap: f32,
    /// As the kernels have it.
    window: i32,
    rows: &'a [Row],
    added: Added,
}

/// How the distance of query and key enters their score.
#[derive(Debug, Clone, Copy)]
enum Added {
    Nothing,
    Slopes(Slopes),
    /// `(BUCKETS, heads)` of [`bias`].
    Buckets,
    /// Queries, keys and values of [`distant`].
    Distances(Distances),
}

fn bias(heads: usize) -> Vec<f32> {
    noise(80, BUCKETS * heads)
}

/// Rows of queries, keys and values of all heads.
fn distant(case: Case<'_>, distances: Distances) -> Vec<f32> {
    rounded(case.element, &noise(90, 2 * distances.span * (case.heads + 2 * case.kv_heads) * case.d))
}

/// Attention by two loops, in f64.
fn plain_attention(case: Case<'_>, q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f32> {
    let Case { d, heads, kv_heads, softcap, window, rows, added, .. } = case;
    let scale = 1.0 / (d as f32).sqrt();
    let (bias, distant) = (
        bias(heads),
        match added {
            Added::Distances(distances) => distant(case, distances),
            _ => Vec::new(),
        },
    );
    let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let mut out = Vec::new();
    let mut token = 0;
    for (r, (start, count)) in rows.iter().enumerate() {
        for position in *start..start + count {
            for head in 0..heads {
                let q = &q[(token * heads + head) * d..][..d];
                let kv = head / (heads / kv_heads);
                let (from, to) = match window {
                    -1 => (0, start + count),
                    0 => (0, position + 1),
                    w => ((position + 1).saturating_sub(w as usize), position + 1),
                };
                let at = |p: usize| (p * kv_heads + kv) * d;
                let scores: Vec<f64> = (from..to)
                    .map(|p| {
                        let key = &keys[r][at(p)..][..d];
                        let mut product = dot(q, key);
                        if let Added::Distances(distances) = added {
                            let row = &distant[distances.row(position, p) * (heads + 2 * kv_heads) * d..];
                            product += dot(q, &row[(heads + kv) * d..]) + dot(key, &row[head * d..]);
                        }
                        let s = product * scale;
                        let s = if softcap > 0.0 { softcap * (s / softcap).tanh() } else { s };
                        let addend = match added {
                            Added::Slopes(slopes) => slopes.addend(slopes.of(heads, head), position, p),
                            Added::Buckets => bias[bucket(position, p) * heads + head],
                            Added::Nothing | Added::Distances(_) => 0.0,
                        };
                        f64::from(s + addend).exp()
                    })
                    .collect();
                let total: f64 = scores.iter().sum();
                out.extend((0..d).map(|i| {
                    let sum: f64 =
                        (from..to).zip(&scores).map(|(p, w)| w * f64::from(values[r][at(p) + i])).sum();
                    (sum / total) as f32
                }));
            }
            token += 1;
        }
    }
    out
}

#[test]
fn attention_is_that_of_two_loops_for_every_kernel() {
    let mut b = Bench::new();
    for (element, d) in [(DType::F32, 19), (DType::BF16, 64), (DType::F16, 48), (DType::BF16, 128)] {
        let kernels = b.gpu.kernels(element, d).unwrap();
        for (heads, kv_heads, softcap, window) in [
            (4, 4, 0.0, 0),
            (6, 2, 0.0, 0),
            (8, 1, 20.0, 0),
            (4, 2, 0.0, 7),
            (20, 1, 0.0, 100),
            (4, 2, 5.0, -1),
        ] {
            // Decoding at several lengths, chunks in the middle and at the beginning; an encoder's rows begin at 0.
            let rows: &[Row] = match window {
                -1 => &[(0, 33), (0, 1), (0, 90)],
                _ => &[(0, 1), (63, 1), (200, 1), (0, 70), (45, 21), (64, 5)],
            };
            let added = Added::Nothing;
            check_attention(
                &mut b,
                &kernels,
                Case { element, d, heads, kv_heads, softcap, window, rows, added },
            );
            b.held.clear();
        }
    }
}

#[test]
fn what_distances_add_to_scores_is_added_by_two_loops_too() {
    let mut b = Bench::new();
    let distances = |span, farthest| Added::Distances(Distances { span, farthest, norm: None });
    for (element, d) in [(DType::F32, 19), (DType::BF16, 64)] {
        let kernels = b.gpu.kernels(element, d).unwrap();
        for (heads, kv_heads, added) in [
            // A power of two, and not.
            (4, 4, Added::Slopes(Slopes { rounded: None })),
            (6, 2, Added::Slopes(Slopes { rounded: None })),
            (6, 1, Added::Slopes(Slopes { rounded: Some(0.4) })),
            (4, 4, Added::Buckets),
            (3, 3, distances(8, Some(40))),
            // Farther than there are vectors for.
            (4, 2, distances(20, None)),
        ] {
            let (window, rows): (_, &[Row]) = match added {
                Added::Slopes(_) => (0, &[(0, 1), (300, 1), (0, 35), (45, 21)]),
                _ => (-1, &[(0, 33), (0, 1), (0, 70)]),
            };
            let case = Case { element, d, heads, kv_heads, softcap: 0.0, window, rows, added };
            check_attention(&mut b, &kernels, case);
            b.held.clear();
        }
    }
}

fn check_attention(b: &mut Bench, kernels: &Kernels, case: Case<'_>) {
    let Case { element, d, heads, kv_heads, softcap, window, rows, added } = case;
    let tokens: usize = rows.iter().map(|r| r.1).sum();
    let q = rounded(element, &noise(1, tokens * heads * d));
    let length = |r: usize| rows[r].0 + rows[r].1;
    let stored = |seed: usize| -> Vec<Vec<f32>> {
        (0..rows.len()).map(|r| rounded(element, &noise(seed + r, length(r) * kv_heads * d))).collect()
    };
    let (keys, values) = (stored(20), stored(50));
    let scale = 1.0 / (d as f32).sqrt();
    let want = plain_attention(case, &q, &keys, &values);

    // Queries, keys and values side by side; those of earlier steps are in the cache only.
    let width = (heads + 2 * kv_heads) * d;
    let mut qkv = vec![f32::NAN; tokens * width];
    let mut token = 0;
    for (r, (start, count)) in rows.iter().enumerate() {
        for p in *start..start + count {
            let row = &mut qkv[token * width..][..width];
            row[..heads * d].copy_from_slice(&q[token * heads * d..][..heads * d]);
            let kv = p * kv_heads * d..(p + 1) * kv_heads * d;
            row[heads * d..][..kv_heads * d].copy_from_slice(&keys[r][kv.clone()]);
            row[(heads + kv_heads) * d..].copy_from_slice(&values[r][kv]);
            token += 1;
        }
    }
    // Blocks of the rows, in an order that is not theirs; what nobody wrote is NaN.
    let blocks: Vec<usize> = (0..rows.len()).map(|r| length(r).div_ceil(16)).collect();
    let all: usize = blocks.iter().sum();
    let table: Vec<u32> = (0..all).map(|i| ((i * 7 + 3) % all) as u32).collect();
    let unique = {
        let mut t = table.clone();
        t.sort_unstable();
        t.dedup();
        t.len() == all
    };
    let table: Vec<u32> = if unique { table } else { (0..all as u32).rev().collect() };
    let (mut k_store, mut v_store) =
        (vec![f32::NAN; all * 16 * kv_heads * d], vec![f32::NAN; all * 16 * kv_heads * d]);
    let mut first_block = Vec::new();
    let mut at = 0;
    for (r, count) in blocks.iter().enumerate() {
        first_block.push(at as u32);
        for p in 0..length(r) {
            let block = table[at + p / 16] as usize;
            for h in 0..kv_heads {
                let to = ((block * kv_heads + h) * 16 + p % 16) * d;
                k_store[to..to + d].copy_from_slice(&keys[r][(p * kv_heads + h) * d..][..d]);
                v_store[to..to + d].copy_from_slice(&values[r][(p * kv_heads + h) * d..][..d]);
            }
        }
        at += count;
    }
    let per_token = |f: &dyn Fn(usize, usize) -> usize| -> Vec<u32> {
        rows.iter().enumerate().flat_map(|(r, row)| (0..row.1).map(move |i| f(r, i) as u32)).collect()
    };
    let positions = b.words(&per_token(&|r, i| rows[r].0 + i));
    let row_of = b.words(&per_token(&|r, _| r));
    let firsts: Vec<u32> =
        (0..rows.len()).map(|r| rows[..r].iter().map(|r| r.1).sum::<usize>() as u32).collect();
    let cache = match window {
        -1 => RawCache::default(),
        _ => RawCache { keys: b.floats(element, &k_store), values: b.floats(element, &v_store) },
    };
    let partial = b.floats(DType::F32, &vec![f32::NAN; tokens * heads * 5 * (d + 2)]);
    let plain = match added {
        Added::Nothing => Attend::default(),
        Added::Slopes(slopes) => {
            Attend { sloped: 1, rounded: slopes.rounded.unwrap_or(0.0), ..Attend::default() }
        }
        Added::Buckets => Attend { bias: b.floats(DType::F32, &bias(heads)), ..Attend::default() },
        Added::Distances(distances) => {
            let longest = (0..rows.len()).map(length).max().unwrap_or(1);
            // As an engine makes them: from the vector for the farthest key behind on.
            let first = distances.row(0, longest - 1);
            let rows_of: Vec<u32> =
                (0..2 * longest).map(|query| distances.row(query, longest) as u32).collect();
            Attend {
                distant: b.floats(element, &distant(case, distances)[first * width..]),
                rows_of: b.words(&rows_of),
                first_distant: first as i32,
                reach: longest as i32,
                ..Attend::default()
            }
        }
    };
    let call = Attend {
        qkv: b.floats(element, &qkv),
        out: b.floats(element, &vec![f32::NAN; tokens * heads * d]),
        cache,
        places: Places { positions, row_of, first_block: b.words(&first_block), tables: b.words(&table) },
        row_first: b.words(&firsts),
        row_start: b.words(&rows.iter().map(|r| r.0 as u32).collect::<Vec<_>>()),
        row_count: b.words(&rows.iter().map(|r| r.1 as u32).collect::<Vec<_>>()),
        rows: Ptr::NULL,
        count: tokens as i32,
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        scale,
        softcap,
        window,
        splits: 1,
        partial,
        ..plain
    };
    let what = format!("{element}, {heads} heads of {d}, {kv_heads} for keys, window {window}, {added:?}");
    let clear = vec![f32::NAN; tokens * heads * d];
    let combine = |b: &Bench, call: Attend| {
        let blocks = (call.count * call.heads) as u32;
        launch!(b.gpu, kernels.attention_combine, (blocks, 1, 1), 128, 0; call).unwrap();
    };
    for splits in [1, 5] {
        let call = Attend { splits, out: b.floats(element, &clear), ..call };
        let grid = (tokens as u32, heads as u32, splits as u32);
        launch!(b.gpu, kernels.attention_plain, grid, 128, 0; call).unwrap();
        if splits > 1 {
            combine(b, call);
        }
        let got = b.read(element, call.out, tokens * heads * d);
        close(&got, &want, tolerance(element), &format!("plain, {what}, {splits} splits"));
    }
    if !matches!(added, Added::Nothing) {
        return;
    }
    let Some(tiles) = kernels.tensor.as_ref().and_then(|tensor| tensor.attention.as_ref()) else {
        assert!(element == DType::F32 || !d.is_multiple_of(16), "{what}: no tensor cores");
        return;
    };
    let (group, capped) = (heads / kv_heads, usize::from(softcap > 0.0));
    let longest = rows.iter().map(|r| r.1).max().unwrap();
    let all: Vec<u32> = (0..rows.len() as u32).collect();
    let call =
        Attend { out: b.floats(element, &clear), rows: b.words(&all), count: rows.len() as i32, ..call };
    let blocks = ((longest * group).div_ceil(64) * kv_heads * rows.len()) as u32;
    launch!(b.gpu, tiles.prefill[capped], (blocks, 1, 1), 128, attention_bytes(64, d); call).unwrap();
    let got = b.read(element, call.out, tokens * heads * d);
    close(&got, &want, 1.5 * tolerance(element), &format!("prefill, {what}"));
    // Decoding is of rows of one token: of the others, nothing is written.
    let single: Vec<u32> = all.iter().copied().filter(|r| rows[*r as usize].1 == 1).collect();
    let want: Vec<f32> = single
        .iter()
        .flat_map(|r| &want[firsts[*r as usize] as usize * heads * d..][..heads * d])
        .copied()
        .collect();
    for splits in [1, 5] {
        let out = b.floats(element, &clear);
        let call = Attend { splits, out, rows: b.words(&single), count: single.len() as i32, ..call };
        let blocks = (group.div_ceil(16) * kv_heads * single.len()) as u32 * splits as u32;
        launch!(b.gpu, tiles.decode[capped], (blocks, 1, 1), 128, attention_bytes(16, d); call).unwrap();
        if splits > 1 {
            combine(b, call);
        }
        let got = b.read(element, call.out, tokens * heads * d);
        let got: Vec<f32> = single
            .iter()
            .flat_map(|r| &got[firsts[*r as usize] as usize * heads * d..][..heads * d])
            .copied()
            .collect();
        close(&got, &want, 1.5 * tolerance(element), &format!("decode, {what}, {splits} splits"));
    }
}

#[test]
fn attention_of_other_widths_is_that_of_two_loops() {
    let mut b = Bench::new();
    // Widths of heads that models have besides: kernels have them as constants, and tiles of them are laid out
    // otherwise. Each in one format, for compiling takes the emulator longer than all the rest.
    let formats = [(DType::BF16, [80, 256]), (DType::F16, [96, 112])];
    formats.iter().for_each(|(element, widths)| b.gpu.compile(*element, widths).unwrap());
    for (element, d) in formats.into_iter().flat_map(|(element, widths)| widths.map(|d| (element, d))) {
        let kernels = b.gpu.kernels(element, d).unwrap();
        for (softcap, window) in [(0.0, 0), (20.0, 7)] {
            let rows: &[Row] = &[(0, 1), (70, 1), (0, 35), (45, 5)];
            let case =
                Case { element, d, heads: 4, kv_heads: 2, softcap, window, rows, added: Added::Nothing };
            check_attention(&mut b, &kernels, case);
            b.held.clear();
        }
    }
}

#[test]
fn quantized_weights_become_elements_of_every_format() {
    let mut b = Bench::new();
    // Few outputs, and as few rows as that is done for in both.
    let (n, k, rows) = (40, 96, 320);
    for element in [DType::BF16, DType::F16] {
        let kernels = b.gpu.kernels(element, 64).unwrap();
        for quantization in Quantization::ALL {
            let format = Format::Quantized(quantization);
            let (weight, x) = (noise(1, n * k), rounded(element, &noise(3, rows * k)));
            let matrix = b.matrix(n, k, format, &weight);
            let (x_at, bytes) = (b.floats(element, &x), b.scratch(rows, k));
            let out = b.floats(element, &vec![f32::NAN; rows * n]);
            let call = Linear {
                weight: &matrix,
                bias: Ptr::NULL,
                x: Rows::new(x_at, k),
                norm: RawNorm::default(),
                rows,
                out,
                out_stride: n,
                epilogue: Epilogue::Store,
                grouped: None,
                bytes: &bytes,
            };
            b.gpu.linear(&kernels, &call).unwrap();
            let want = reference(&weight, n, k, format, &x, None);
            // Beside the CPU's rows of bytes, weights that are rounded to elements.
            let what = format!("{element}, {quantization:?}");
            close(&b.read(element, out, rows * n), &want, 3.0 * tolerance(DType::BF16), &what);
            b.held.clear();
        }
    }
}
