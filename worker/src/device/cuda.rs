//! What GPUs offer: memory, neighbours, and speeds, measured by the kernels that will do the work.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use strata_proto::{DType, Device, DeviceKind, Format, Rate};

use super::{DeviceSpec, Held};
use crate::{
    error::WorkerError,
    kernels::{
        cpu::packed::PackedMatrix,
        cuda::{
            self, CudaError, Gemm, Gpu, GpuInfo, RESERVE,
            launch::Bytes,
            memory::{self, Memory, Ptr},
            product::{Epilogue, Linear, Matrix, RowBytes, Rows},
        },
    },
    transport::nccl,
};

/// The GPUs of this machine as devices.
pub(super) fn specs() -> Vec<DeviceSpec> {
    let count = cuda::count().unwrap_or_else(|error| {
        tracing::warn!(%error, "the GPUs of this machine cannot be used");
        0
    });
    let spec = |n| DeviceSpec { id: format!("cuda:{n}"), kind: DeviceKind::Cuda, cap: None };
    (0..count).map(spec).collect()
}

/// What a GPU offers. An uncapped one offers what is free now, less a reserve; parts of one GPU share it.
pub(super) fn offer(
    spec: &DeviceSpec,
    specs: &[DeviceSpec],
    kernel_cache: Option<&Path>,
    held: impl Fn(&str) -> Held,
) -> Result<Device, WorkerError> {
    let failed = |e: CudaError| WorkerError::WrongState(format!("device {}: {e}", spec.id));
    let GpuInfo { uuid, capability, free_bytes, total_bytes, peers, .. } =
        cuda::info(spec.ordinal()).map_err(failed)?;
    let Measured { bytes_per_second, rates } = measured(spec.ordinal(), kernel_cache).map_err(failed)?;
    let shares = specs.iter().filter(|s| s.kind == DeviceKind::Cuda && s.ordinal() == spec.ordinal());
    let uncapped = shares.filter(|s| s.cap.is_none()).count().max(1) as u64;
    let free = free_bytes.saturating_sub(RESERVE) / uncapped + held(&spec.id).memory;
    Ok(Device {
        id: spec.id.clone(),
        kind: DeviceKind::Cuda,
        budget_bytes: spec.cap.unwrap_or(free),
        total_bytes,
        capped: spec.cap.is_some(),
        bytes_per_second,
        flops_per_second: rates.iter().map(|r| r.flops_per_second).fold(1.0, f64::max),
        numerics: format!("cuda-1-sm{}{}", capability.0, capability.1),
        rates,
        stages_at_once: 0,
        hardware: uuid,
        peers,
        nccl: nccl::is_there(),
        spill_bytes: 0,
        spill_directory: String::new(),
        libraries: cuda::libraries().map_err(failed)?,
    })
}

/// Speeds of a GPU.
#[derive(Clone)]
struct Measured {
    bytes_per_second: f64,
    rates: Vec<Rate>,
}

/// Rows at which arithmetic is measured.
const ROWS: [usize; 4] = [1, 8, 64, 512];
/// Outputs and inputs of the matrix: more than caches hold.
const N: usize = 8192;
const K: usize = 4096;
/// A measurement that takes longer is the last of its format: with more rows it would take longer still.
const SLOW: Duration = Duration::from_millis(20);

/// Measures once per process and GPU, in some tens of milliseconds.
fn measured(ordinal: usize, kernel_cache: Option<&Path>) -> Result<Measured, CudaError> {
    static MEASURED: Mutex<Vec<(usize, Measured)>> = Mutex::new(Vec::new());
    let mut known = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, measured)) = known.iter().find(|(o, _)| *o == ordinal) {
        return Ok(measured.clone());
    }
    let gpu = Gpu::open(ordinal)?.keeping_kernels_in(kernel_cache.map(Path::to_owned));
    let bytes = (N * K * 4) as u64;
    let (weight, x) = (Memory::new(&gpu.context, bytes)?, Memory::new(&gpu.context, bytes)?);
    let copy = seconds(&gpu, || memory::copy(&gpu.stream, x.ptr(), weight.ptr(), bytes))?;
    let mut rates = Vec::new();
    let kernels = gpu.kernels(DType::BF16, 128)?;
    for format in Format::ALL {
        let format = PackedMatrix::held(K, format);
        let matrix = Matrix { format, n: N, k: K, values: weight.ptr(), factors: weight.ptr() };
        for rows in ROWS {
            // Rows, what they are as bytes, and what comes out, one after the other.
            let [at_bytes, at_factors, at_sums, at_out] =
                [4, 5, 6, 7].map(|part: u64| x.ptr().offset(part * bytes / 8));
            let bytes = RowBytes::new(Bytes { values: at_bytes, factors: at_factors, sums: at_sums });
            let product = || match format {
                // Stages of this format have rows of it too.
                Format::Float(element) if rows > 8 => gpu.gemm(Gemm {
                    element,
                    out_element: element,
                    weight: weight.ptr(),
                    x: x.ptr(),
                    out: at_out,
                    n: N,
                    k: K,
                    rows,
                    x_stride: K,
                    out_stride: N,
                    add: false,
                }),
                _ => {
                    let call = Linear {
                        weight: &matrix,
                        bias: Ptr::NULL,
                        // Written anew each time: to turn them into bytes is part of the product.
                        x: Rows::new(x.ptr(), K),
                        rows,
                        out: at_out,
                        out_stride: N,
                        epilogue: Epilogue::Store,
                        grouped: None,
                        bytes: &bytes,
                    };
                    gpu.linear(&kernels, DType::BF16, &call)
                }
            };
            let seconds = seconds(&gpu, product)?;
            let flops_per_second = (2 * rows * N * K) as f64 / seconds;
            rates.push(Rate { format, rows: rows as u32, flops_per_second });
            if seconds > SLOW.as_secs_f64() {
                break;
            }
        }
    }
    // A copy reads and writes every byte.
    let measured = Measured { bytes_per_second: 2.0 * bytes as f64 / copy, rates };
    known.push((ordinal, measured.clone()));
    Ok(measured)
}

/// The least time of some runs of something, each long enough that starting it does not count.
fn seconds(gpu: &Gpu, mut run: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let mut least = f64::INFINITY;
    let mut times = 1;
    // The first run also loads what is loaded lazily.
    for round in 0..4 {
        let begun = Instant::now();
        for _ in 0..times {
            run()?;
        }
        gpu.wait()?;
        let seconds = begun.elapsed().as_secs_f64() / f64::from(times);
        least = least.min(seconds);
        if round == 0 && seconds > SLOW.as_secs_f64() {
            break;
        }
        times = 10;
    }
    Ok(least.max(1e-9))
}
