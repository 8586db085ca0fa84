"""What the machine is: its GPUs, driver, memory and libraries; and its clocks and power while something runs."""
import contextlib
import ctypes
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess

from servers import Failure

LIBRARIES = ("libcuda.so*", "libnvrtc.so*", "libcublas.so*", "libcublasLt.so*", "libnccl.so*")
CLOCKS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active,memory.used"


def gpus():
    """Names of the GPUs with their compute capability and bytes, by the driver; raises `Failure` if it does not load."""
    errors = []
    for name in ("libcuda.so.1", "libcuda.so"):
        with contextlib.suppress(OSError):
            driver = ctypes.CDLL(name)
            break
        errors.append(name)
    else:
        raise Failure(f"the driver is not there: no {' or '.join(errors)}")
    count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    size, part, version = ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    if (status := driver.cuInit(0)) or (status := driver.cuDeviceGetCount(ctypes.byref(count))):
        raise Failure(f"the driver answers with error {status}")
    driver.cuDriverGetVersion(ctypes.byref(version))
    found = []
    for ordinal in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetName(name, 256, device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        capability = []
        for attribute in (75, 76):
            driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
            capability.append(str(part.value))
        found.append(f"{name.value.decode()} (capability {'.'.join(capability)}, {size.value / 2**30:.1f} GiB, driver for "
                     f"CUDA {version.value // 1000}.{version.value % 1000 // 10})")
    if not found:
        raise Failure("the driver sees no GPU")
    return found


def ask(fields):
    """What nvidia-smi says of the first GPU, by field; empty where it is not there, or says nothing."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().splitlines()
    return dict(zip(fields.split(","), map(str.strip, values[0].split(",")))) if values and not done.returncode else {}


def used():
    """MiB of the first GPU that are in use by anybody; None where nobody can say."""
    with contextlib.suppress(ValueError):
        return float(ask("memory.used").get("memory.used", ""))
    return None


def mebibytes(amount):
    return "unknown" if amount is None else f"{amount:.0f} MiB"


def describe(run):
    """Facts, as rows that nothing is expected of."""
    for fields in ("driver_version,vbios_version,uuid,mig.mode.current,compute_mode,persistence_mode,ecc.mode.current",
                   "memory.total,memory.used,memory.free",
                   "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,pstate",
                   "pcie.link.gen.current,pcie.link.width.current"):
        found = ask(fields)
        run.row("machine: nvidia-smi", "-", ", ".join(f"{k} {v}" for k, v in found.items()) or "says nothing", None)
    memory = {line.split(":")[0]: int(line.split()[1]) // 2**20 for line in pathlib.Path("/proc/meminfo").open()}
    run.row("machine: host", "-",
            f"{os.cpu_count()} cores, {memory['MemTotal']} GiB, {memory['MemAvailable']} GiB free, "
            f"{shutil.disk_usage('/dev/shm').free >> 30} GiB in /dev/shm, {platform.platform()}", None)
    versions = []
    for package in ("torch", "transformers", "triton", "nvidia-nccl-cu13", "nvidia-cublas", "nvidia-cuda-nvrtc"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    tools = [t for t in ("nvcc", "compute-sanitizer", "ncu", "nsys", "cuda-gdb") if shutil.which(t)]
    run.row("machine: software", "-", f"Python {platform.python_version()}, {', '.join(versions) or 'no torch'}; "
            f"{', '.join(tools) or 'no tools'}", None)
    files = [str(f) for folder in run.environment["LD_LIBRARY_PATH"].split(":") if folder
             for pattern in LIBRARIES for f in sorted(pathlib.Path(folder).glob(pattern))]
    run.row("machine: libraries on the path", "-", " ".join(files) or "none", None)


@contextlib.contextmanager
def watched(run):
    """Keeps clocks, power and memory of every second in OUT/clocks.csv, where nvidia-smi is there."""
    child = None
    if shutil.which("nvidia-smi"):
        with (run.out / "clocks.csv").open("w") as file:
            child = subprocess.Popen(["nvidia-smi", "-i", "0", f"--query-gpu={CLOCKS}", "--format=csv", "-lms", "1000"],
                                     stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        if child is not None:
            child.kill()
            child.wait()


class Span:
    """What the clocks were since some moment."""

    def __init__(self, run):
        self.path = run.out / "clocks.csv"
        self.at = self.path.stat().st_size if self.path.exists() else 0

    def __str__(self):
        if not self.path.exists():
            return "clocks unknown"
        found = {1: [], 2: [], 3: [], 4: []}
        for line in self.path.read_bytes()[self.at:].decode(errors="replace").splitlines():
            parts = line.split(",")
            for at, values in found.items():
                with contextlib.suppress(ValueError, IndexError):
                    values.append(float(parts[at].split()[0]))
        if not all(found.values()):
            return "clocks unknown"
        sm, memory, power, heat = found.values()
        return (f"SM {min(sm):.0f} to {max(sm):.0f} MHz, memory {min(memory):.0f} to {max(memory):.0f} MHz, up to "
                f"{max(power):.0f} W and {max(heat):.0f} C")
