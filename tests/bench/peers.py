"""Strata beside other builds of llama.cpp, on the model and files of compare.py.

usage: python peers.py WORK_DIR [--ik BIN_DIR] [--rpc BIN_DIR] [--rounds N] [--formats bf16,int8,int4]

--ik: programs of ik_llama.cpp (llama-bench, llama-batched-bench), a fork with faster kernels for CPUs.
--rpc: programs of llama.cpp built with -DGGML_RPC=ON (llama-bench, ggml-rpc-server): a pipeline over two servers of one
thread each, beside two workers of ours. Both are to be built with -DGGML_NATIVE=ON. Prints medians of interleaved rounds.
"""
import argparse
import json
import pathlib
import statistics
import subprocess

from ours import Server, serve, two_workers

PORTS = (50711, 50712)


def llama_bench(directory, model, *arguments):
    """Tokens per second of one test of llama-bench."""
    command = [directory / "llama-bench", "-m", model, "-r", "1", "-o", "json", *arguments]
    run = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    # Some builds print other lines before.
    text = run.stdout.decode()
    return json.loads(text[text.index("[\n"):])[0]["avg_ts"]


def batched_bench(directory, model, streams):
    """Tokens per second of so many streams."""
    command = [directory / "llama-batched-bench", "-m", model, "-c", "4096", "-b", "512", "-ub", "512", "-npp", "32",
               "-ntg", "24", "-npl", streams, "-t", "2"]
    run = subprocess.run(list(map(str, command)), capture_output=True, check=True)
    rows = [line.split("|") for line in (run.stdout + run.stderr).decode().splitlines() if line.startswith("|")]
    return float(rows[-1][8])


def rows_of_ik(work, directory, name, rounds):
    server = Server([serve(work / "llama-1.1b", name, "--threads", 2)])
    model = work / f"{name}.gguf"
    found = {}
    for _ in range(rounds):
        prefill = [llama_bench(directory, model, "-p", 512, "-n", 0, "-t", 2, *repack) for repack in ([], ["-rtr", 1])]
        found.setdefault("prefill 512", []).append((server.prefill(), max(prefill)))
        found.setdefault("decode, 1 stream", []).append(
            (server.decode(1), llama_bench(directory, model, "-p", 0, "-n", 24, "-t", 2)))
        for streams in (8, 16):
            found.setdefault(f"decode, {streams} streams", []).append(
                (server.decode(streams), batched_bench(directory, model, streams)))
    server.close()
    return found


def rows_of_rpc(work, directory, name, rounds):
    ours = Server(two_workers(work / "llama-1.1b", name))
    theirs = [subprocess.Popen([directory / "ggml-rpc-server", "-t", "1", "-p", str(port)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL) for port in PORTS]
    remote = ("--rpc", ",".join(f"127.0.0.1:{port}" for port in PORTS), "-ngl", 99, "-t", 1)
    found = {}
    for _ in range(rounds):
        for key, mine, test in (("prefill 512", ours.prefill, ("-p", 512, "-n", 0)),
                                ("decode, 1 stream", lambda: ours.decode(1), ("-p", 0, "-n", 24))):
            found.setdefault(key, []).append((mine(), llama_bench(directory, work / f"{name}.gguf", *remote, *test)))
    ours.close()
    for process in theirs:
        process.kill()
        process.wait()
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--ik", type=pathlib.Path)
    parser.add_argument("--rpc", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", default="bf16,int8,int4")
    arguments = parser.parse_args()
    peers = [("ik_llama.cpp, 2 threads", arguments.ik, rows_of_ik),
             ("llama.cpp over two RPC servers of one thread each", arguments.rpc, rows_of_rpc)]
    for title, directory, measure in peers:
        if directory is None:
            continue
        for name in arguments.formats.split(","):
            print(f"\n| {name} | Strata | {title} | ratio |\n|---|---|---|---|", flush=True)
            for key, pairs in measure(arguments.work, directory, name, arguments.rounds).items():
                ours, theirs = (statistics.median(values) for values in zip(*pairs))
                ratio = statistics.median(a / b for a, b in pairs)
                print(f"| {key} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |", flush=True)


main()
