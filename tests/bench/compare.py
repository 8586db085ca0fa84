"""Strata and llama.cpp side by side on one random model of 1.1 B parameters, on this machine.

usage: python compare.py WORK_DIR [--rounds N] [--formats bf16,int8,int4] [--out DIR]

Needs requirements.txt and target/release/strata. WORK_DIR takes about 7 GB and is kept for the next time. Every round
measures one thing after the other, ours beside theirs; what is printed, and written to OUT as Markdown and SVG, are medians
over rounds and medians of the rounds' ratios.

Ours are measured through the server and its gRPC API, theirs by calls of the library: whatever a server costs is on our
side only. Theirs for `8 clients` is what an ideal server would reach (see peer.py).
"""
import argparse
import os
import pathlib
import statistics
import subprocess

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

import peer
from ours import STRATA, Server, one_worker, processor, serve, two_workers

THEIRS = {"bf16": "bf16", "int8": "Q8_0", "int4": "Q4_K_M"}
STREAMS = (1, 8, 16)
SWEEP = (1, 2, 4, 8, 16)
THREADS = 2


def prepare(work):
    """The model in our format and theirs."""
    work.mkdir(parents=True, exist_ok=True)
    model = work / "llama-1.1b"
    if not model.exists():
        subprocess.run([str(STRATA), "random-model", "llama-1.1b", str(model)], check=True)
    source = work / "bf16.gguf"
    if not source.exists():
        peer.convert(model, source)
    for name in ("int8", "int4"):
        if not (work / f"{name}.gguf").exists():
            peer.quantize(source, work / f"{name}.gguf", name)
    return model


def compare(work, model, name, rounds):
    """By measurement, the rounds' pairs of ours and theirs, in tokens per second."""
    server = Server([serve(model, name, "--threads", THREADS)])
    llama = peer.Peer(work / f"{name}.gguf", THREADS)
    pairs = {}
    for _ in range(rounds):
        pairs.setdefault("prefill 512", []).append((server.prefill(), llama.prefill()))
        for streams in STREAMS:
            key = f"decode, {streams} stream{'s' * (streams > 1)}"
            pairs.setdefault(key, []).append((server.decode(streams), llama.decode(streams)))
        pairs.setdefault("8 clients", []).append((server.clients(), llama.serve()))
    sweep = [(server.clients(count), llama.serve(count, rounds=1)) for count in SWEEP] if name == "int8" else []
    llama.close()
    server.close()
    return pairs, sweep


def pipeline(model, name, rounds):
    """By measurement, pairs of two workers of one core each over TCP, and of one worker."""
    split = Server(two_workers(model, name))
    both = Server([serve(model, name, "--threads", THREADS)])
    one = Server([serve(model, name, "--threads", 1)])
    pairs = {}
    for _ in range(rounds):
        pairs.setdefault("decode, 16 streams: of one worker with both cores", []).append(
            (split.decode(16), both.decode(16)))
        pairs.setdefault("prefill 512: of one worker with both cores", []).append((split.prefill(), both.prefill()))
        pairs.setdefault("decode, 1 stream: of one worker with one core", []).append(
            (split.decode(1), one.decode(1)))
    for server in (split, both, one):
        server.close()
    return pairs


def coordinator(model, rounds):
    """Share of one core, and microseconds per token, that a coordinator takes for 64 streams; tokens per second."""
    server = Server(one_worker(model, THREADS))
    found = [server.coordinate() for _ in range(rounds)]
    server.close()
    return [statistics.median(values) for values in zip(*found)]


def hop(work, rounds):
    """Microseconds of a token of a model whose products cost next to nothing: with one stage, and with two over TCP."""
    model = work / "llama-1m"
    if not model.exists():
        subprocess.run([str(STRATA), "random-model", "llama-1m", str(model)], check=True)
    one = Server([["worker", "--models", model.parent, "--threads", 1],
                  ["coordinator", "--worker", "{0}", "--model", model.name, "--port", 0]])
    two = Server(two_workers(model))
    times = []
    for _ in range(rounds):
        times.append([s.bench("--requests", 8, "--max-tokens", 128)["inter_token_ms"]["p50"] * 1e3 for s in (one, two)])
    one.close()
    two.close()
    return [statistics.median(values) for values in zip(*times)]


def medians(pairs):
    return (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs),
            statistics.median(a / b for a, b in pairs))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = prepare(arguments.work)
    lines = [f"{os.cpu_count()} cores of {processor()}, {THREADS} threads; llama.cpp as of llama-cpp-python "
             f"{peer.llama_cpp.__version__}; medians of {arguments.rounds} interleaved rounds, tokens/s.", ""]
    ratios, sweep = {}, []
    for name in arguments.formats.split(","):
        pairs, points = compare(arguments.work, model, name, arguments.rounds)
        sweep = sweep or points
        lines += [f"| {name} | Strata | llama.cpp {THEIRS[name]} | ratio |", "|---|---|---|---|"]
        for key, values in pairs.items():
            ours, theirs, ratio = medians(values)
            ratios.setdefault(key, {})[name] = ratio
            lines.append(f"| {key} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |")
            print(lines[-1], flush=True)
        lines.append("")
    for name in arguments.formats.split(","):
        lines += [f"| {name}, two workers of one core each over TCP | two | one | ratio |", "|---|---|---|---|"]
        for key, values in pipeline(model, name, arguments.rounds).items():
            ours, theirs, ratio = medians(values)
            lines.append(f"| {key} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |")
            print(lines[-1], flush=True)
        lines.append("")
    share, micros, rate = coordinator(model, arguments.rounds)
    alone, linked = hop(arguments.work, arguments.rounds)
    lines += ["| outside the model | |", "|---|---|",
              f"| coordinator, int8, 64 streams at {rate:.0f} tokens/s | {100 * share:.1f} % of a core, "
              f"{micros:.0f} µs per token |",
              f"| a token of llama-1m, all in all | {alone:.0f} µs with one stage, {linked:.0f} µs with two over TCP |"]
    print("\n".join(lines[-2:]), flush=True)
    if sweep:
        lines += ["", "| int8, clients at once | " + " | ".join(map(str, SWEEP)) + " |",
                  "|---|" + "---|" * len(SWEEP),
                  "| Strata | " + " | ".join(f"{a:.1f}" for a, _ in sweep) + " |",
                  "| llama.cpp Q8_0 | " + " | ".join(f"{b:.1f}" for _, b in sweep) + " |"]
    (arguments.out / "compare.md").write_text("\n".join(lines) + "\n")

    plt.rcParams["svg.hashsalt"] = "strata"
    figure, (bars, curve) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, name in enumerate(arguments.formats.split(",")):
        bars.bar([x + 0.27 * i for x in range(len(ratios))], [r.get(name, 0) for r in ratios.values()], 0.25,
                 label=f"{name} / {THEIRS[name]}")
    bars.axhline(1, color="black", linewidth=0.8)
    bars.set_xticks([x + 0.27 for x in range(len(ratios))], ratios, rotation=20)
    bars.set_ylabel("Strata / llama.cpp")
    bars.legend()
    if sweep:
        curve.plot(SWEEP, [a for a, _ in sweep], "o-", label="Strata int8")
        curve.plot(SWEEP, [b for _, b in sweep], "o-", label="llama.cpp Q8_0")
        curve.set_xscale("log", base=2)
        curve.set_xticks(SWEEP, SWEEP)
        curve.set_xlabel("clients at once, 32 tokens in, 32 out")
        curve.set_ylabel("tokens/s")
        curve.legend()
    figure.savefig(arguments.out / "compare.svg", metadata={"Date": None})


main()
