"""How long a start on a GPU takes: with compiled kernels on the disk, without, and with another binary, in turn.

usage: python start.py --strata BINARY [--before BINARY [--emulator-before DIR]] [--rounds N] [--model DIR] [--device cuda:0]

Each start is `strata check`: the worker starts, a model is loaded and prepared, and a step is computed. With the emulator
(LD_LIBRARY_PATH=… from ../emulator), whose compiler keeps what it compiled, every start gets an empty folder for that, so
that it compiles whatever the binary asks it to. An older binary needs the emulator of its own commit: today's refuses what was
not known to be wrong then. Prints medians in seconds and what they say of one another.
"""
import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(binary, arguments, kernels=None, libraries=None):
    """Seconds of one start, and what it said of kernels."""
    with tempfile.TemporaryDirectory() as empty:
        # A driver, too, keeps what it compiles from PTX.
        environment = os.environ | {"EMULATOR_CACHE": empty, "CUDA_CACHE_PATH": empty, "STRATA_LOG": "info"}
        if kernels is not None:
            environment["STRATA_KERNEL_CACHE"] = str(kernels)
        if libraries is not None:
            environment["LD_LIBRARY_PATH"] = str(libraries)
        begun = time.monotonic()
        done = subprocess.run([binary, "check", *arguments], capture_output=True, text=True, env=environment)
        seconds = time.monotonic() - begun
    if done.returncode:
        sys.exit(f"{binary} check {' '.join(arguments)}: {done.stderr[-2000:]}")
    said = re.findall(r"kernels: (\d+) compiled, (\d+) from the cache", done.stderr)
    return seconds, (tuple(map(int, said[-1])) if said else None)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--strata", type=pathlib.Path, default=ROOT / "target" / "release" / "strata")
    parser.add_argument("--before", type=pathlib.Path, help="a binary to compare with")
    parser.add_argument("--emulator-before", type=pathlib.Path, help="the folder of the emulator that it was built with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=str(ROOT / "tests" / "models" / "shakespeare"))
    parser.add_argument("--device", default="cuda:0=64MiB")
    options = parser.parse_args()
    arguments = [options.model, "--devices", options.device]
    times = {"warm": [], "cold": []} | ({"before": []} if options.before else {})
    with tempfile.TemporaryDirectory() as kernels:
        start(options.strata, arguments, kernels)
        for _ in range(options.rounds):
            seconds, said = start(options.strata, arguments, kernels)
            if said is None or said[0] != 0:
                sys.exit(f"a warm start compiled kernels: {said}")
            times["warm"].append(seconds)
            times["cold"].append(start(options.strata, arguments, "")[0])
            if options.before:
                times["before"].append(start(options.before, arguments, libraries=options.emulator_before)[0])
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        print(f"{name:6} {medians[name]:6.2f} s  ({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} starts)")
    for name in list(medians)[1:]:
        print(f"warm is {medians[name] / medians['warm']:.1f} times as fast as {name}")


if __name__ == "__main__":
    main()
