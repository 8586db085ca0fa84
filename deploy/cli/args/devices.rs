//! Flags of this machine's devices, and of devices that nobody has here.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use strata_proto::DeviceKind;
use strata_worker::{
    device::{self, Compute, DeviceSpec, parse_bytes},
    kernels::cpu::isa::Isa,
};

use crate::report;

/// How this machine's processors compute.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Devices")]
pub struct ComputeArgs {
    /// Threads of each CPU device [default: the cores, shared among the devices]
    #[arg(long, env = "STRATA_THREADS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Keep each thread on a core of its own: for machines that do nothing else
    #[arg(long, env = "STRATA_PIN_THREADS")]
    pub pin_threads: bool,
    /// Instruction set of the kernels: portable, avx2 or avx512 [default: the widest there is]
    #[arg(long, env = "STRATA_ISA")]
    pub isa: Option<Isa>,
}

/// Threads for each core that nobody can want.
const TOO_MANY_THREADS: usize = 4;

impl ComputeArgs {
    /// What was asked for, for a process with so many CPU devices. Warns of what makes no sense.
    pub fn resolve(&self, devices: usize) -> Compute {
        let default = Compute::shared_by(devices);
        let cores = device::cores();
        if devices == 0 && (self.threads.is_some() || self.pin_threads || self.isa.is_some()) {
            report::warn("--threads, --pin-threads and --isa: none of these devices is a CPU");
        } else if let Some(threads) = self.threads.filter(|n| *n as usize > TOO_MANY_THREADS * cores) {
            report::warn(&format!(
                "--threads {threads}: this machine has {cores} cores, and threads that wait for each other make every step \
                 slower"
            ));
        }
        Compute {
            isa: self.isa.unwrap_or(default.isa),
            threads: self.threads.map_or(default.threads, |n| n as usize),
            pin: self.pin_threads,
        }
    }
}

/// Where weights go that fit into no memory.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Devices")]
pub struct SpillArgs {
    /// Directory on a disk, where weights stay memory-mapped that do not fit into memory; empty: nowhere
    /// [default: /var/tmp]
    #[arg(long, env = "STRATA_SPILL_DIR")]
    pub spill_dir: Option<String>,
}

impl SpillArgs {
    /// The directory, if there is to be one. Warns if none of `devices` would use it.
    pub fn resolve<'a>(
        &self,
        devices: impl IntoIterator<Item = &'a DeviceSpec>,
    ) -> anyhow::Result<Option<PathBuf>> {
        let mut devices = devices.into_iter();
        match self.spill_dir.as_deref() {
            Some("") => Ok(None),
            Some(named) if !Path::new(named).is_dir() => bail!("--spill-dir {named}: no such directory"),
            directory => {
                let used = devices.any(|device| device.kind == DeviceKind::Cpu && device.cap.is_none());
                if let Some(named) = directory.filter(|_| !used) {
                    report::warn(&format!(
                        "--spill-dir {named} is not used: no device is a CPU without a byte cap"
                    ));
                }
                Ok(Some(directory.unwrap_or("/var/tmp").into()))
            }
        }
    }
}

/// Where compiled kernels are kept.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Devices")]
pub struct KernelCacheArgs {
    /// Directory that keeps the compiled kernels of GPUs for the next start; empty: nowhere [default: strata/kernels in
    /// the user's cache directory, if there is one]
    #[arg(long, env = "STRATA_KERNEL_CACHE")]
    pub kernel_cache: Option<String>,
}

impl KernelCacheArgs {
    /// The directory, if there is to be one. Warns if it is of no use, as `devices` have no GPU.
    pub fn resolve<'a>(&self, devices: impl IntoIterator<Item = &'a DeviceSpec>) -> Option<PathBuf> {
        let gpus = devices.into_iter().any(|device| device.kind != DeviceKind::Cpu);
        match self.kernel_cache.as_deref() {
            Some("") => None,
            Some(named) if !gpus => {
                report::warn(&format!("--kernel-cache {named} is not used: none of the devices is a GPU"));
                None
            }
            Some(named) => Some(named.into()),
            // A user without a home, as in a container, has no such directory, and need not be told.
            None => {
                user_cache().map(|cache| cache.join("strata/kernels")).filter(|path| device::can_write(path))
            }
        }
    }
}

/// The user's cache directory, by the XDG Base Directory Specification.
fn user_cache() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))
}

/// A model and devices of this machine.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Devices")]
pub struct HereArgs {
    /// Model directory in Hugging Face layout, or OWNER/NAME, OWNER/NAME@REVISION in the hub's cache
    #[arg(env = "STRATA_MODEL_DIR", help_heading = None)]
    pub model: PathBuf,
    /// Workers in this process that share 90 % of the free host memory; the split is then balanced
    #[arg(long, env = "STRATA_WORKERS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: Option<u32>,
    /// Devices of one worker, with optional byte caps: cuda:0,cuda:1=20GiB,cpu. Several stages on one GPU are cuda:0/0,
    /// cuda:0/1. The split is then auto [default: all GPUs, then the CPU]
    #[arg(long, env = "STRATA_DEVICES", value_delimiter = ',')]
    pub devices: Vec<DeviceSpec>,
    /// Byte caps by device, of each worker: cpu=64GiB
    #[arg(long, env = "STRATA_MAX_MEMORY", value_delimiter = ',')]
    pub max_memory: Vec<DeviceSpec>,
    #[command(flatten)]
    pub compute: ComputeArgs,
    #[command(flatten)]
    pub spill: SpillArgs,
    #[command(flatten)]
    pub kernel_cache: KernelCacheArgs,
}

/// So many equal devices.
#[derive(Debug, Clone, PartialEq)]
pub struct ImaginedDevices {
    /// How many.
    pub count: u32,
    /// Bytes of each.
    pub bytes: u64,
    /// Memory bandwidth of each, in bytes per second.
    pub bytes_per_second: f64,
    /// Arithmetic rate of each, in operations per second.
    pub flops_per_second: f64,
}

/// Bytes or operations per second that no device stays below; less is a unit that was left out.
const LEAST_RATE: f64 = 1e6;

impl std::str::FromStr for ImaginedDevices {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut parts = s.split('@');
        let size = parts.next().unwrap_or_default();
        let (count, size) = match size.split_once('x') {
            Some((count, size)) => (count.parse().ok().filter(|n| (1..=1024).contains(n)), size),
            None => (Some(1), size),
        };
        let count = count.ok_or_else(|| format!("{s:?}: expected a count from 1 to 1024 before the x"))?;
        // An unnamed rate is that of a recent data-centre GPU, so that splits compare sensibly.
        let mut rate = |unit: &str, default: f64| match parts.next() {
            None => Ok(default),
            Some(text) => {
                let number = text.strip_suffix("/s").unwrap_or(text).replace(unit, "B");
                match parse_bytes(&number)? as f64 {
                    rate if rate >= LEAST_RATE => Ok(rate),
                    rate => Err(format!("{text:?} is {rate} {unit}/s: expected a unit, as in 3.3T{unit}/s")),
                }
            }
        };
        let (bytes_per_second, flops_per_second) = (rate("B", 2e12)?, rate("FLOP", 4e14)?);
        match parts.next() {
            None => {
                Ok(ImaginedDevices { count, bytes: parse_bytes(size)?, bytes_per_second, flops_per_second })
            }
            Some(more) => {
                Err(format!("{s:?}: {more:?} is too much: expected [COUNTx]SIZE[@BANDWIDTH[@RATE]]"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_imagined_devices() {
        let read = |s: &str| s.parse::<ImaginedDevices>();
        let two = read("2x80GiB@3.3TB/s@900TFLOP/s").unwrap();
        assert_eq!((two.count, two.bytes), (2, 80 << 30));
        assert_eq!((two.bytes_per_second, two.flops_per_second), (3.3e12, 9e14));
        assert_eq!(read("24GiB").unwrap().count, 1);
        let unit = read("80GiB@3.3").unwrap_err();
        assert_eq!(unit, "\"3.3\" is 3 B/s: expected a unit, as in 3.3TB/s");
        assert!(read("80GiB@3.3TB/s@900").unwrap_err().contains("as in 3.3TFLOP/s"));
        for bad in ["0x8GiB", "x8GiB", "2x", "8GiB@fast", "8GiB@1TB/s@1TFLOP/s@1", ""] {
            assert!(read(bad).is_err(), "{bad:?} was taken");
        }
    }
}
