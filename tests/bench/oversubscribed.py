"""What is left of the speed when there are more threads than cores, or other programs keep the cores busy.

usage: python oversubscribed.py WORK_DIR [--rounds N]

Needs what compare.py needs, which makes the model in WORK_DIR. Prints medians in tokens/s, in int8.
"""
import argparse
import pathlib
import statistics
import subprocess

import peer
from ours import Server, serve

CORES = 2


def measure(ours, theirs, rounds):
    """Medians of decode with 1 and 8 streams, and of prefill, of ours and theirs."""
    found = []
    for _ in range(rounds):
        found.append((ours.decode(1), ours.decode(8), ours.prefill(),
                      theirs.decode(1, steps=12), theirs.decode(8, steps=8), theirs.prefill()))
    return [statistics.median(values) for values in zip(*found)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print("| | Strata: decode 1 | decode 8 | prefill 512 | llama.cpp Q8_0: decode 1 | decode 8 | prefill 512 |")
    print("|---|---|---|---|---|---|---|")
    for busy in (0, CORES):
        others = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(busy)]
        for threads in (CORES, 4 * CORES):
            ours = Server([serve(arguments.work / "llama-1.1b", "int8", "--threads", threads)])
            theirs = peer.Peer(arguments.work / "int8.gguf", threads)
            row = " | ".join(f"{rate:.1f}" for rate in measure(ours, theirs, arguments.rounds))
            print(f"| {threads} threads, {busy} busy programs | {row} |", flush=True)
            ours.close()
            theirs.close()
        for process in others:
            process.kill()


main()
