//! Devices as the planner sees them.

use serde::Serialize;

use crate::{Format, LinkKind, error::quoted, v1};

/// What kind of processor a device is. Rates are compared per kind, so that noise cannot change a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The host's processor and memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// A device of a worker, with what it offers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Device {
    /// Unique within its worker: `cpu`, `cpu:1`, `cuda:0`.
    pub id: String,
    /// Processor kind.
    pub kind: DeviceKind,
    /// Bytes that weights, cache and workspace of one stage may take together.
    pub budget_bytes: u64,
    /// Physical bytes.
    pub total_bytes: u64,
    /// The user set the budget, so this device ranks as a GPU does.
    pub capped: bool,
    /// Memory bandwidth in bytes per second.
    pub bytes_per_second: f64,
    /// Arithmetic rate in floating-point operations per second.
    pub flops_per_second: f64,
    /// Numerics class of its kernels.
    pub numerics: String,
    /// Measured arithmetic rates by format and rows; empty where only one is known.
    pub rates: Vec<Rate>,
    /// Stages that its host can compute at once, each with a device's threads, without one waiting for another's cores;
    /// 0 if it shares no cores.
    pub stages_at_once: u32,
    /// A GPU's UUID, the same in every process that sees it; empty for a processor.
    pub hardware: String,
    /// Hardware whose memory this device can copy to directly, its own included.
    pub peers: Vec<String>,
    /// Kinds of link that need more than processes and a network, and that this device's worker has it for.
    pub links: Vec<LinkKind>,
    /// Bytes of weights that may stay memory-mapped where they do not fit into memory; 0 on any device but a CPU that
    /// nobody capped.
    pub spill_bytes: u64,
    /// Directory that they would be in.
    pub spill_directory: String,
    /// What a GPU is used by; none of a processor.
    pub libraries: Vec<Library>,
}

/// A library that is used, and not part of Strata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Library {
    /// What it is called: `driver`, `NVRTC`, `cuBLAS`, `cuBLASLt`, `NCCL`.
    pub name: String,
    /// As it says itself; of the driver, the version of CUDA that it is made for.
    pub version: String,
    /// The file that it was loaded from.
    pub path: String,
}

/// How fast products are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// Format of the weights.
    pub format: Format,
    /// Rows of activations.
    pub rows: u32,
    /// Floating-point operations per second.
    pub flops_per_second: f64,
}

impl Device {
    /// Whether one process can copy from this GPU's memory to that of `other` directly.
    pub fn copies_to(&self, other: &Device) -> bool {
        let reached = self.hardware == other.hardware || self.peers.contains(&other.hardware);
        !self.hardware.is_empty() && !other.hardware.is_empty() && reached
    }

    /// Operations per second of products with weights in `format` and `rows` rows: between measurements, along the
    /// logarithm of the rows.
    pub fn flops(&self, format: Format, rows: f64) -> f64 {
        let of_format = self.rates.iter().filter(|r| r.format == format);
        let mut known: Vec<_> = of_format.map(|r| (f64::from(r.rows), r.flops_per_second)).collect();
        known.sort_by(|a, b| a.0.total_cmp(&b.0));
        rate_at(&known, rows).unwrap_or(self.flops_per_second)
    }
}

/// The rate at `rows` between `known` ones, pairs of rows and rate by ascending rows: along the logarithm of the rows,
/// and the outermost ones beyond. `None` if none is known.
pub fn rate_at(known: &[(f64, f64)], rows: f64) -> Option<f64> {
    let log = |rows: f64| rows.max(1.0).ln();
    match known.iter().position(|(known, _)| *known >= rows) {
        Some(0) => Some(known[0].1),
        Some(next) => {
            let ((a, low), (b, high)) = (known[next - 1], known[next]);
            let share = if log(b) > log(a) { (log(rows) - log(a)) / (log(b) - log(a)) } else { 1.0 };
            Some(low + (high - low) * share)
        }
        None => known.last().map(|(_, rate)| *rate),
    }
}

impl From<Device> for v1::Device {
    fn from(d: Device) -> Self {
        v1::Device {
            id: d.id,
            kind: match d.kind {
                DeviceKind::Cpu => v1::DeviceKind::Cpu,
                DeviceKind::Cuda => v1::DeviceKind::Cuda,
            } as i32,
            budget_bytes: d.budget_bytes,
            total_bytes: d.total_bytes,
            capped: d.capped,
            bytes_per_second: d.bytes_per_second,
            flops_per_second: d.flops_per_second,
            numerics: d.numerics,
            rates: d
                .rates
                .iter()
                .map(|r| v1::Rate {
                    format: r.format.to_string(),
                    rows: r.rows,
                    flops_per_second: r.flops_per_second,
                })
                .collect(),
            stages_at_once: d.stages_at_once,
            hardware: d.hardware,
            peers: d.peers,
            links: d.links.iter().map(|kind| kind.name().to_owned()).collect(),
            spill_bytes: d.spill_bytes,
            spill_directory: d.spill_directory,
            libraries: d
                .libraries
                .into_iter()
                .map(|Library { name, version, path }| v1::Library { name, version, path })
                .collect(),
        }
    }
}

impl TryFrom<v1::Device> for Device {
    type Error = String;

    fn try_from(d: v1::Device) -> Result<Self, String> {
        let kind = match d.kind() {
            v1::DeviceKind::Cpu => DeviceKind::Cpu,
            v1::DeviceKind::Cuda => DeviceKind::Cuda,
            v1::DeviceKind::Unspecified => return Err(format!("device {} has no kind", quoted(&d.id))),
        };
        let rate = |name: &str, v: f64| {
            if v.is_finite() && v > 0.0 {
                Ok(v)
            } else {
                Err(format!("device {} reports {name} {v}: expected a positive number", quoted(&d.id)))
            }
        };
        Ok(Device {
            kind,
            budget_bytes: d.budget_bytes,
            total_bytes: d.total_bytes,
            capped: d.capped,
            bytes_per_second: rate("bytes_per_second", d.bytes_per_second)?,
            flops_per_second: rate("flops_per_second", d.flops_per_second)?,
            numerics: d.numerics.clone(),
            rates: d
                .rates
                .iter()
                .map(|r| {
                    let flops_per_second = rate("a rate", r.flops_per_second)?;
                    Ok(Rate { format: r.format.parse()?, rows: r.rows, flops_per_second })
                })
                .collect::<Result<_, String>>()?,
            stages_at_once: d.stages_at_once,
            id: d.id,
            hardware: d.hardware,
            peers: d.peers,
            // One that this build does not know, it cannot choose.
            links: d.links.iter().filter_map(|kind| kind.parse().ok()).collect(),
            spill_bytes: d.spill_bytes,
            spill_directory: d.spill_directory,
            libraries: d
                .libraries
                .into_iter()
                .map(|v1::Library { name, version, path }| Library { name, version, path })
                .collect(),
        })
    }
}
