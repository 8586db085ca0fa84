//! What GPUs offer: memory, neighbours, and speeds, measured by the kernels that will do the work.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use strata_proto::{DType, Device, DeviceKind, Format, Rate};

use super::{DeviceSpec, Held};
use crate::{
    error::WorkerError,
    kernels::cuda::{
        self, CudaError, Gpu, GpuInfo,
        limits::RESERVE,
        measure::{self, Pool, Product, Room},
        product::Epilogue,
    },
    transport::{self, nccl},
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
    let libraries = cuda::libraries().map_err(failed)?;
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
        links: transport::of_gpus(),
        spill_bytes: 0,
        spill_directory: String::new(),
        libraries: libraries.iter().cloned().chain(nccl::description()).collect(),
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
/// Outputs and inputs of the matrices.
const N: usize = 8192;
const K: usize = 4096;
/// A measurement that takes longer is the last of its format: with more rows it would take longer still.
const SLOW: f64 = 0.02;

/// No run takes longer.
const SLOWEST: Duration = Duration::from_secs(60);

/// Measures once per process and GPU, in some tens of milliseconds.
fn measured(ordinal: usize, kernel_cache: Option<&Path>) -> Result<Measured, CudaError> {
    static MEASURED: Mutex<Vec<(usize, Measured)>> = Mutex::new(Vec::new());
    let mut known = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, measured)) = known.iter().find(|(o, _)| *o == ordinal) {
        return Ok(measured.clone());
    }
    let gpu = Gpu::open(ordinal)?.keeping_kernels_in(kernel_cache.map(Path::to_owned));
    let mut pool = Pool::new(&gpu, (N * K * 4) as u64)?;
    let longest = ROWS[ROWS.len() - 1];
    let room = Room::new(&gpu, longest * K, longest * N)?;
    let kernels = gpu.kernels(DType::BF16, 128)?;
    let mut rates = Vec::new();
    for format in Format::ALL {
        pool.fill(&gpu, format)?;
        for rows in ROWS {
            let (shape, epilogue) = ((N, K), Epilogue::Store);
            let product = Product { format, shape, rows, epilogue, makes_bytes: true, patience: SLOWEST };
            // Stages of this format have rows of it too, which are cuBLAS's, in 16 bits from two on; with fewer, only
            // what is read of the weights counts, and kernels for one format of rows will do.
            let seconds = match format {
                Format::Float(element) if rows > if element == DType::F32 { 8 } else { 1 } => {
                    measure::gemm(&gpu, element, (&pool, &room), (shape, rows))?
                }
                _ => measure::product(&gpu, &kernels, (&pool, &room), product)?,
            };
            let flops_per_second = (2 * rows * N * K) as f64 / seconds;
            rates.push(Rate { format, rows: rows as u32, flops_per_second });
            if seconds > SLOW {
                break;
            }
        }
    }
    let measured = Measured { bytes_per_second: pool.copy(&gpu)?, rates };
    known.push((ordinal, measured.clone()));
    Ok(measured)
}
