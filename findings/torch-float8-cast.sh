#!/usr/bin/env bash
# Turning a number into float8_e4m3fn or float8_e8m0fnu gives other bytes in torch than in ml_dtypes (JAX, TensorStore, ONNX).
# torch makes 448 of everything above the largest e4m3fn, of infinity too, while its e5m2 keeps infinity; ml_dtypes makes NaN of
# it. In e8m0, the format of MX scales, torch drops the sign and makes the smallest scale of zero; ml_dtypes makes NaN of both. So
# a checkpoint that was quantized with one cannot be checked byte by byte with the other, and an overflow does not show.
#
# Guess before it was run: both saturate finite numbers, infinity becomes NaN, and a scale of -2 is refused or NaN in both.
# Seen: torch 2.15.0 [500, inf] -> [448, 448] and [-2, 0] -> [2, 2^-127]; ml_dtypes 0.6.0 NaN four times. Within range both agree.
#
# Needs Python 3 with venv, the package index, and 6 GB below the temporary folder. Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 ml_dtypes==0.6.0 numpy
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import sys

import ml_dtypes
import numpy
import torch


def both(name, values):
    one = torch.tensor(values).to(getattr(torch, name)).float().tolist()
    other = numpy.array(values, numpy.float32).astype(getattr(ml_dtypes, name)).astype(numpy.float32).tolist()
    print(f"{name} {values}: torch {one}, ml_dtypes {other}")
    return str(one), str(other)


for package in ("torch", "ml_dtypes"):
    print(package, importlib.metadata.version(package))
nothing = str([float("nan")] * 2)
as_seen = [
    both("float8_e4m3fn", [1.1, 447.0]) == (str([1.125, 448.0]),) * 2,
    both("float8_e4m3fn", [500.0, float("inf")]) == (str([448.0, 448.0]), nothing),
    both("float8_e5m2", [500.0, float("inf")]) == (str([512.0, float("inf")]),) * 2,
    both("float8_e8m0fnu", [0.7, 3.0]) == (str([0.5, 4.0]),) * 2,
    both("float8_e8m0fnu", [-2.0, 0.0]) == (str([2.0, 2.0**-127]), nothing),
]
sys.exit(not all(as_seen))
PY
