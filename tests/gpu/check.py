"""Checks everything that needs a GPU, with a binary that was built elsewhere.

usage: python check.py --strata PATH --out DIR [--only parity,pipeline,offload,kill,bench] [--budget SECONDS]

Needs Python, and for the figures beside transformers torch and transformers. Prints a table, writes it to
OUT/results.txt with the ends of all logs in OUT/logs.txt, and exits with 1 if a check failed.
"""
import argparse
import concurrent.futures
import ctypes
import os
import pathlib
import platform
import shutil
import sys
import time

import parity
import pipelines
import speed
from servers import Run

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ("parity", "pipeline", "offload", "kill", "bench")


def gpus():
    """Names of the GPUs, by the driver; none where there is none."""
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            driver = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return []
    count, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for ordinal in range(count.value):
        driver.cuDeviceGetName(name, 256, ordinal)
        names.append(name.value.decode())
    return names


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--strata", type=pathlib.Path, default=ROOT / "target" / "release" / "strata")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/strata-gpu"),
                        help="for models with random weights, which are kept; 16 GB for bench")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--models", help="of tests/models, for parity and pipeline; all that these take otherwise")
    parser.add_argument("--formats", default=",".join(parity.FORMATS))
    parser.add_argument("--device", default="cuda:0", help="for parity; cpu tries the script where there is no GPU")
    parser.add_argument("--memory", default="2GiB", help="of a GPU, for each stage of the small models")
    parser.add_argument("--shape", default="llama-8b", help="for bench, as `strata random-model` knows it")
    parser.add_argument("--answer", type=int, default=1500, help="tokens of the answers that kill breaks")
    parser.add_argument("--at-once", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--patience", type=float, default=60, help="seconds for an answer")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only: expected some of {','.join(PARTS)}")
    models = ROOT / "tests" / "models"
    names = sorted(p.parent.name for p in models.glob("*/expected.json"))
    if arguments.models:
        names = arguments.models.split(",")
    shutil.rmtree(arguments.work / "logs", ignore_errors=True)
    run = Run(arguments.strata.resolve(), models, arguments.out, arguments.work, arguments.budget,
              arguments.patience)
    os.environ["LD_LIBRARY_PATH"] = run.environment["LD_LIBRARY_PATH"]
    found = gpus()
    begun = time.monotonic()
    try:
        run.say(f"{', '.join(found) or 'no GPU'}; {os.cpu_count()} cores, {platform.platform()}; "
                f"{run.call('--version').strip()}, parts {arguments.only}\n")
        run.say("| check | expected | got | |\n|---|---|---|---|")
        writing = speed.start_writing(run, arguments.shape) if "bench" in parts else None
        tasks = []
        if "kill" in parts:
            tasks.append((pipelines.kill, run, arguments.memory, arguments.answer))
        if "offload" in parts:
            tasks.append((pipelines.offload, run))
        if "pipeline" in parts:
            tasks += pipelines.cases(run, len(found), arguments.memory, names)
        if "parity" in parts:
            formats = arguments.formats.split(",")
            tasks += [(parity.check, run, name, formats, arguments.device, arguments.memory) for name in names]
        with concurrent.futures.ThreadPoolExecutor(arguments.at_once) as pool:
            for done in [pool.submit(*task) for task in tasks]:
                done.result()
        run.close()
        if writing is not None:
            speed.measure(run, writing)
    finally:
        run.close()
    failed, passed = run.rows.count(False), run.rows.count(True)
    run.say(f"\n{passed} checks passed, {failed} failed, in {time.monotonic() - begun:.0f} s")
    sys.exit(bool(failed or not passed))


if __name__ == "__main__":
    main()
