//! The devices of a worker: what the user asked for, what they may hold, and how fast they are.

#[cfg(feature = "cuda")]
mod cuda;

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use core_affinity::CoreId;
use strata_proto::{Device, DeviceKind, Format, Rate};

use crate::error::WorkerError;
use crate::kernels::{
    buffer::free_bytes_in,
    cpu::{Cpu, isa::Isa, measure, pool::Pool},
};

/// A device as named on the command line: `cpu`, `cpu:1`, `cpu:0=24MiB`, `cuda:0`; `cuda:0/1=20GiB` is one of several
/// stages on one GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Unique within a worker.
    pub id: String,
    /// Processor kind.
    pub kind: DeviceKind,
    /// Most bytes Strata may use on it, if the user said so.
    pub cap: Option<u64>,
}

impl DeviceSpec {
    /// The number after the colon, as in `cuda:1` and `cuda:1/2`; 0 if there is none.
    pub(crate) fn ordinal(&self) -> usize {
        let number = self.id.split_once(':').map_or("0", |(_, n)| n.split('/').next().unwrap_or(n));
        number.parse().unwrap_or(0)
    }

    /// The host's processor, with an optional cap.
    pub fn cpu(cap: Option<u64>) -> Self {
        DeviceSpec { id: "cpu".into(), kind: DeviceKind::Cpu, cap }
    }
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (id, cap) = match s.split_once('=') {
            Some((id, cap)) => (id, Some(parse_bytes(cap)?)),
            None => (s, None),
        };
        let (kind, number) = id.split_once(':').map_or((id, None), |(k, n)| (k, Some(n)));
        let is_number = |n: &str| !n.is_empty() && n.len() < 6 && n.bytes().all(|b| b.is_ascii_digit());
        // Of a GPU there may be several parts, for several stages.
        let (number, part) = match number.and_then(|n| n.split_once('/')) {
            Some((number, part)) if kind == "cuda" => (Some(number), Some(part)),
            _ => (number, None),
        };
        if !number.into_iter().chain(part).all(is_number) || (kind == "cuda" && number.is_none()) {
            return Err(format!("device {id:?}: expected a number after the colon, as in cpu:0 or cuda:1"));
        }
        match kind {
            "cpu" => Ok(DeviceSpec { id: id.to_owned(), kind: DeviceKind::Cpu, cap }),
            "cuda" if cfg!(not(feature = "cuda")) => Err(no_cuda(id)),
            "cuda" => Ok(DeviceSpec { id: id.to_owned(), kind: DeviceKind::Cuda, cap }),
            _ => Err(format!(
                "device {id:?}: expected cpu, cpu:N or cuda:N, with an optional =BYTES as in cpu:0=24MiB"
            )),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

/// What is wrong with asking this build for a GPU.
pub(crate) fn no_cuda(device: &str) -> String {
    format!(
        "device {device:?}: this build of Strata has no CUDA support; use cpu, or build it with --features cuda"
    )
}

/// Reads `24MiB`, `1.5GiB`, `500MB`, `4096`.
///
/// # Errors
/// If it is no number, has an unknown unit, or is not positive.
pub fn parse_bytes(s: &str) -> Result<u64, String> {
    let units: [(&str, f64); 10] = [
        ("KiB", 1024.0),
        ("MiB", 1024.0 * 1024.0),
        ("GiB", 1024.0 * 1024.0 * 1024.0),
        ("TiB", 1024.0 * 1024.0 * 1024.0 * 1024.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
        ("", 1.0),
    ];
    let digits = s.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &s[digits.len()..];
    let scale = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
    let number = digits.trim().parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0);
    match (number, scale) {
        (Some(number), Some((_, scale))) if number * scale < 9e18 => Ok((number * scale) as u64),
        _ => Err(format!("{s:?} is no size: expected a positive number with a unit such as 24MiB or 1.5GB")),
    }
}

/// Bytes of host memory that are free for use now.
pub fn available_memory() -> u64 {
    memory().0
}

/// Free and total bytes of host memory.
fn memory() -> (u64, u64) {
    sysinfo::System::new().map_or((0, 0), |mut system| {
        system.refresh_memory();
        (system.available_memory(), system.total_memory())
    })
}

/// How a worker's processors compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    /// Instruction set of its kernels.
    pub isa: Isa,
    /// Threads of each CPU device.
    pub threads: usize,
    /// Each thread stays on a core of its own, as long as there are any.
    pub pin: bool,
}

impl Compute {
    /// The widest instruction set; this machine's cores, shared among `devices`.
    pub fn shared_by(devices: usize) -> Self {
        Compute { isa: Isa::detect(), threads: (cores() / devices.max(1)).max(1), pin: false }
    }

    /// The operations, on threads of their own.
    pub fn cpu(self) -> Cpu {
        self.cpu_on(&[])
    }

    /// The operations, on threads that stay on these cores; the first one is the caller's.
    pub fn cpu_on(self, cores: &[CoreId]) -> Cpu {
        Cpu::new(self.isa, Pool::on_cores(self.threads, cores).into())
    }

    /// The cores for the threads of one more device of this process: the next ones of those that it may use, from the
    /// beginning again if there are no more. None unless threads are to be pinned, or where the system cannot do it.
    pub fn take_cores(self) -> Vec<CoreId> {
        static TAKEN: AtomicUsize = AtomicUsize::new(0);
        if !self.pin {
            return Vec::new();
        }
        let all = core_affinity::get_core_ids().unwrap_or_default();
        let first = TAKEN.fetch_add(self.threads, Ordering::Relaxed);
        let next = all.iter().cycle().skip(first % all.len().max(1));
        next.take(self.threads.min(all.len())).copied().collect()
    }
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// What a stage holds now, and a new plan may use again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of weights that stay memory-mapped.
    pub mapped: u64,
}

/// The devices of this machine: all GPUs that this build can use, then the processor.
pub fn all() -> Vec<DeviceSpec> {
    #[cfg(feature = "cuda")]
    let gpus = cuda::specs();
    #[cfg(not(feature = "cuda"))]
    let gpus = Vec::new();
    gpus.into_iter().chain([DeviceSpec::cpu(None)]).collect()
}

/// Directories that a worker may write to.
#[derive(Debug, Clone, Default)]
pub struct Directories {
    /// For weights that stay memory-mapped because they do not fit into memory.
    pub spill: Option<PathBuf>,
    /// For the compiled kernels of GPUs.
    pub kernels: Option<PathBuf>,
}

/// Whether files can be put into a directory, which need not be there yet: nothing is made.
pub fn can_write(directory: &Path) -> bool {
    let there = directory.ancestors().find(|path| path.symlink_metadata().is_ok());
    let rights = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    there.is_some_and(|path| path.is_dir() && rustix::fs::access(path, rights).is_ok())
}

/// What the devices offer. An uncapped CPU offers 90 % of the memory that is free now and held by nothing of ours, and
/// 95 % of what is free on the disk of the directory for what spills; an uncapped GPU, its free memory but for a
/// reserve.
///
/// # Errors
/// If a GPU cannot be used.
pub(crate) fn offers(
    specs: &[DeviceSpec],
    compute: Compute,
    directories: &Directories,
    held: impl Fn(&str) -> Held,
) -> Result<Vec<Device>, WorkerError> {
    let (free, total) = memory();
    let processors = specs.iter().filter(|s| s.kind == DeviceKind::Cpu);
    let uncapped = processors.filter(|s| s.cap.is_none()).count().max(1) as u64;
    let spill = directories.spill.as_deref();
    let on_disk = spill.map_or(0, free_on_disk);
    let Measured { bytes_per_second, rates } = measured(compute);
    let flops_per_second = rates.iter().map(|r| r.flops_per_second).fold(1.0, f64::max);
    let spill_bytes = |spec: &DeviceSpec| match spec.cap {
        None => on_disk / 100 * 95 / uncapped + held(&spec.id).mapped,
        Some(_) => 0,
    };
    let processor = |spec: &DeviceSpec| Device {
        id: spec.id.clone(),
        kind: spec.kind,
        budget_bytes: spec.cap.unwrap_or_else(|| (free / 10 * 9) / uncapped + held(&spec.id).memory),
        total_bytes: total,
        capped: spec.cap.is_some(),
        bytes_per_second,
        flops_per_second,
        numerics: Cpu::numerics(compute.isa),
        rates: rates.clone(),
        stages_at_once: cores().div_ceil(compute.threads) as u32,
        hardware: String::new(),
        peers: Vec::new(),
        links: Vec::new(),
        spill_bytes: spill_bytes(spec),
        spill_directory: spill.map_or(String::new(), |directory| directory.display().to_string()),
        libraries: Vec::new(),
    };
    let offer = |spec: &DeviceSpec| match spec.kind {
        DeviceKind::Cpu => Ok(processor(spec)),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => cuda::offer(spec, specs, directories.kernels.as_deref(), &held),
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => Err(WorkerError::BadMessage(no_cuda(&spec.id))),
    };
    specs.iter().map(offer).collect()
}

/// Bytes that are free in a directory on a disk; none if it cannot be used, or is in memory itself.
fn free_on_disk(directory: &Path) -> u64 {
    #[cfg(target_os = "linux")]
    // By TMPFS_MAGIC of linux/magic.h.
    if rustix::fs::statfs(directory).is_ok_and(|system| system.f_type == 0x0102_1994) {
        return 0;
    }
    free_bytes_in(directory).unwrap_or(0)
}

/// Speeds of this processor, by the kernels that will do the work.
#[derive(Clone)]
struct Measured {
    bytes_per_second: f64,
    rates: Vec<Rate>,
}

/// Rows at which arithmetic is measured.
const ROWS: [usize; 4] = [1, 8, 64, 512];

/// Measures once per process and way to compute, in some hundred milliseconds.
fn measured(compute: Compute) -> Measured {
    static MEASURED: Mutex<Vec<(Compute, Measured)>> = Mutex::new(Vec::new());
    let mut known = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, measured)) = known.iter().find(|(c, _)| *c == compute) {
        return measured.clone();
    }
    let cpu = compute.cpu();
    let rates = Format::ALL.into_iter().flat_map(|format| {
        let cpu = &cpu;
        ROWS.into_iter().filter_map(move |rows| {
            // Little, which stays in the caches: then arithmetic is what takes time.
            let (n, k) = (256, 1024);
            let seconds = measure::product(cpu, (n, k), format, rows, (1, measure::LITTLE))?;
            let flops_per_second = (2 * rows * n * k) as f64 / seconds;
            Some(Rate { format, rows: rows as u32, flops_per_second })
        })
    });
    let measured = Measured {
        // Without 64 MiB nothing will run; any positive rate plans as well as another.
        bytes_per_second: measure::bytes_per_second(&cpu).unwrap_or(1e9),
        rates: rates.collect(),
    };
    known.push((compute, measured.clone()));
    measured
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_devices_take_one_core_after_the_other() {
        let pinned = Compute { threads: 1, pin: true, ..Compute::shared_by(1) };
        let all = core_affinity::get_core_ids().unwrap();
        let taken: Vec<_> = (0..2 * all.len()).flat_map(|_| pinned.take_cores()).collect();
        assert_eq!(taken, all.repeat(2));
        assert_eq!(
            Compute { threads: 1000, ..pinned }.take_cores().len(),
            all.len(),
            "the others go where they like"
        );
        assert_eq!(Compute { pin: false, ..pinned }.take_cores(), []);
        // The helpers, whose cores come after the caller's.
        let core = *all.last().unwrap();
        let cpu = Compute { threads: 2, ..pinned }.cpu_on(&[core, core]);
        let seen = Mutex::new(std::collections::BTreeSet::new());
        let (caller, met) = (std::thread::current().id(), std::sync::Barrier::new(2));
        cpu.each(&mut [(), ()], |()| {
            met.wait();
            if std::thread::current().id() != caller {
                seen.lock().unwrap().extend(core_affinity::get_core_ids().unwrap().iter().map(|c| c.id));
            }
        });
        assert_eq!(seen.into_inner().unwrap().into_iter().collect::<Vec<_>>(), [core.id]);
    }

    #[test]
    fn what_does_not_fit_may_stay_on_the_disk_of_an_uncapped_processor() {
        let directory = tempfile::tempdir().unwrap();
        let free = free_on_disk(directory.path());
        let specs = ["cpu:0", "cpu:1", "cpu:2=1MiB"].map(|spec| spec.parse().unwrap());
        let compute = Compute::shared_by(2);
        let held = |id: &str| Held { memory: 0, mapped: if id == "cpu:1" { 1 << 40 } else { 0 } };
        let offered = |spill: Option<&Path>| -> Vec<u64> {
            let directories = Directories { spill: spill.map(Path::to_owned), kernels: None };
            let offers = offers(&specs, compute, &directories, held).unwrap();
            offers.iter().map(|device| device.spill_bytes).collect()
        };
        let with = offered(Some(directory.path()));
        // Other processes write to the disk as well.
        assert!((with[0] as f64 - free as f64 * 0.475).abs() <= free as f64 * 0.05, "{with:?} of {free}");
        assert!(with[1] >= 1 << 40, "what is mapped already can be used again");
        assert_eq!(with[2], 0, "a cap is a cap");
        assert_eq!(offered(None), [0, 1 << 40, 0]);
        assert_eq!(offered(Some(&directory.path().join("none"))), [0, 1 << 40, 0]);
    }

    #[test]
    fn reads_device_lists() {
        let spec: DeviceSpec = "cpu:1=24MiB".parse().unwrap();
        assert_eq!((spec.id.as_str(), spec.cap), ("cpu:1", Some(24 << 20)));
        assert_eq!("cpu".parse::<DeviceSpec>().unwrap().cap, None);
        for bad in ["gpu:0", "cpu:", "cpu:x", "cpu:0=", "cpu=-1GiB", "cpu=5parsecs", "", "cpu=1e40"] {
            assert!(bad.parse::<DeviceSpec>().is_err(), "{bad:?} was taken");
        }
        match "cuda:1/2=1GiB".parse::<DeviceSpec>() {
            Ok(spec) => {
                assert_eq!((spec.id.as_str(), spec.ordinal(), spec.cap), ("cuda:1/2", 1, Some(1 << 30)))
            }
            Err(error) => {
                assert!(cfg!(not(feature = "cuda")) && error.contains("no CUDA support"), "{error}")
            }
        }
        for bad in ["cuda", "cuda:", "cuda:x", "cuda:0/", "cuda:0/x", "cpu:0/1", "cuda:1234567"] {
            assert!(bad.parse::<DeviceSpec>().is_err(), "{bad:?} was taken");
        }
    }
}
