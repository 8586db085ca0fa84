"""Today's build beside an earlier one, in turns, on a random model and this machine.

usage: python before.py BEFORE WORK_DIR [--rounds N] [--shape llama-160m] [--formats bf16,int8]

Needs Python alone, target/release/strata, and BEFORE, the binary of the earlier build. What is printed are medians over rounds and
the median of the rounds' ratios, today's by the earlier one's.
"""
import argparse
import pathlib
import statistics
import subprocess

from ours import STRATA, Server, one_worker, serve, two_workers

WHAT = {
    "prefill 512, tokens/s": lambda server: server.prefill(),
    "decode, 1 stream, tokens/s": lambda server: server.decode(1),
    "decode, 8 streams, tokens/s": lambda server: server.decode(8),
    "8 clients, tokens/s": lambda server: server.clients(),
}


def side_by_side(title, commands, before, rounds, measures):
    """Rows of a table: what both builds reach."""
    servers = [Server(commands, STRATA), Server(commands, before)]
    found = {name: [] for name in measures}
    for round_ in range(rounds):
        for name, measure in measures.items():
            # Who is first changes, as the first one may find a cooler processor.
            turns = servers if round_ % 2 == 0 else servers[::-1]
            values = [measure(server) for server in turns]
            found[name].append(values if turns is servers else values[::-1])
    for server in servers:
        server.close()
    for name, pairs in found.items():
        now, then = (statistics.median(values) for values in zip(*pairs))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {title}: {name} | {now:.1f} | {then:.1f} | {ratio:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="llama-160m")
    parser.add_argument("--formats", default="bf16,int8")
    arguments = parser.parse_args()
    before, rounds = arguments.before.resolve(), arguments.rounds
    arguments.work.mkdir(parents=True, exist_ok=True)
    for shape in (arguments.shape, "llama-1m"):
        if not (arguments.work / shape).exists():
            subprocess.run([str(STRATA), "random-model", shape, str(arguments.work / shape)], check=True)
    versions = [subprocess.run([str(build), "--version"], capture_output=True, text=True, check=True).stdout.strip()
                for build in (STRATA, before)]
    print(f"| {rounds} rounds | {versions[0]} | {versions[1]} | ratio |\n|---|---|---|---|")
    model, small = arguments.work / arguments.shape, arguments.work / "llama-1m"
    for form in arguments.formats.split(","):
        side_by_side(f"{model.name} in {form}", [serve(model, form, "--threads", 2)], before, rounds, WHAT)
    side_by_side(f"coordinator, {model.name}", one_worker(model, 2), before, rounds,
                 {"us per token at 64 streams": lambda server: server.coordinate()[1]})
    side_by_side("llama-1m, two workers over TCP", two_workers(small), before, rounds,
                 {"us per token": lambda server: 1e6 / server.decode(1)})


if __name__ == "__main__":
    main()
