"""Compiles the CUDA kernels as a stage does when it starts, with NVIDIA's compiler and without a GPU.

usage: python compile.py [--jobs N]

To machine code, as there. Needs requirements.txt. Every format of activations, several widths of heads, three
generations of GPUs; an error or a warning fails.
"""
import argparse
import concurrent.futures
import ctypes
import os
import pathlib
import re
import sys
import sysconfig
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "worker" / "src" / "kernels" / "cuda"
# Architecture, format of activations, width of heads: every format at the usual widths; once a width that is not even a
# multiple of 2, and the widest; once an older and a younger generation, as what differs by generation is not the width.
COMBINATIONS = [(90, element, head_dim) for element in (0, 1, 2) for head_dim in (64, 128)] \
    + [(90, 0, 19), (90, 1, 256), (80, 1, 128), (100, 1, 128)]


def load():
    """The compiler, with the built-ins that it opens by name."""
    folder = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "lib"
    if not folder.is_dir():
        sys.exit(f"{folder}: no such directory; pip install -r {pathlib.Path(__file__).parent}/requirements.txt")
    ctypes.CDLL(str(folder / "libnvrtc-builtins.so.13.0"), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.13"))


def shared(launch):
    """The macros that the program passes so that both sides count alike, with the values of its constants."""
    texts = [path.read_text() for crate in ("worker", "proto") for path in (ROOT / crate / "src").rglob("*.rs")]
    listed = re.search(r"const SHARED: \[\(&str, usize\); (\d+)\] = \[(.*?)\];", launch, re.DOTALL)
    names = re.findall(r'\("(\w+)", (\w+)', listed[2])
    assert len(names) == int(listed[1]), f"{len(names)} macros were found in launch.rs, which has {listed[1]}"
    for macro, name in names:
        values = {m for text in texts for m in re.findall(rf"const {name}: \w+ = (\d+);", text)}
        assert len(values) == 1, f"{name} is {sorted(values)}: expected one constant of that name"
        yield f"-D{macro}={values.pop()}"


def source():
    """The sources in the order in which the program joins them, and the options that it passes besides."""
    launch = (KERNELS / "launch.rs").read_text()
    listed = re.search(r"const SOURCES: \[&str; (\d+)\] = \[(.*?)\];", launch, re.DOTALL)
    names = re.findall(r'include_str!\("(.*?)"\)', listed[2])
    assert len(names) == int(listed[1]), f"{len(names)} sources were found in launch.rs, which has {listed[1]}"
    return "".join((KERNELS / name).read_text() for name in names), [*re.findall(r'"(--std=.*?)"', launch), *shared(launch)]


def compile_one(nvrtc, text, options):
    """The compiler's result and its words."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"strata.cu", 0, None, None)
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    result = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return result, log.value.decode().strip()


def one(combination):
    """Compiles one combination; seconds, and what is wrong with it."""
    capability, element, head_dim = combination
    text, standard = source()
    options = [f"--gpu-architecture=sm_{capability}", *standard, f"-DELEMENT={element}", f"-DHEAD_DIM={head_dim}"]
    begun = time.monotonic()
    result, log = compile_one(load(), text.encode(), options)
    what = f"error {result}: {log}" if result else log
    return combination, time.monotonic() - begun, what


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    jobs = parser.parse_args().jobs
    load()
    begun, bad = time.monotonic(), 0
    # Processes, as the compiler takes one program at a time.
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        for (capability, element, head_dim), seconds, wrong in pool.map(one, COMBINATIONS):
            if wrong:
                bad += 1
                print(f"sm_{capability} ELEMENT={element} HEAD_DIM={head_dim} ({seconds:.1f} s): {wrong}",
                      file=sys.stderr)
    print(f"{len(COMBINATIONS) - bad} of {len(COMBINATIONS)} combinations compile without a warning, "
          f"in {time.monotonic() - begun:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
