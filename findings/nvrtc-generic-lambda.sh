#!/usr/bin/env bash
# NVRTC takes a lambda inside a kernel, but not the same one with an `auto` parameter: what is generic counts as a host
# function, which its mode has none of. nvcc's documentation only restricts lambdas that are annotated `__device__`.
#
# Guess before it was run: both compile, since neither is annotated and both are called where they stand.
# Seen: nvidia-cuda-nvrtc 13.0.88 compiles the plain one (0), and refuses the generic one with NVRTC_ERROR_COMPILATION (6),
# "A function without execution space annotations ... host functions are not allowed in JIT mode".
#
# Needs Python 3 with venv and the package index; no GPU. Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nvidia-cuda-nvrtc==13.0.88
"$folder/venv/bin/python" - <<'PY'
import ctypes, pathlib, sys, sysconfig

libraries = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "lib"
ctypes.CDLL(str(libraries / "libnvrtc-builtins.so.13.0"), ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(str(libraries / "libnvrtc.so.13"))


def compiled(parameter):
    source = ('extern "C" __global__ void twice(float* x) {'
              f" auto two = [&]({parameter} value) {{ return 2.0f * value; }};"
              " x[threadIdx.x] = two(x[threadIdx.x]); }")
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"twice.cu", 0, None, None)
    options = [b"--gpu-architecture=compute_90", b"--std=c++17"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return result, " ".join(log.value.decode().split())


major, minor = ctypes.c_int(), ctypes.c_int()
nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
plain, generic = compiled("float"), compiled("auto")
print(f"NVRTC {major.value}.{minor.value}: plain {plain[0]}, generic {generic[0]}: {generic[1][:160]}")
sys.exit(not (plain[0] == 0 and generic[0] == 6 and "host functions are not allowed in JIT mode" in generic[1]))
PY
