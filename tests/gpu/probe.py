"""The first minutes on a GPU: whether anything runs at all, a cold and a warm start, memory, and one run under memcheck."""
import concurrent.futures
import contextlib
import os
import pathlib
import re
import shutil
import signal
import time

import machine
from servers import Failure, Process, Server, Stop, expectations, serve

MODEL = "shakespeare"
EXACT = ["--dtype", "f32", "--kv-tokens", 4096, "--max-step-tokens", 256]
# MiB that may be missing once all our processes have ended.
LEFT_OVER = 64
SAMPLED = [
    ["--temperature", 0.8],
    ["--temperature", 0.8, "--top-p", 0.95],
    ["--temperature", 1.0, "--top-k", 40, "--top-p", 0.9],
    ["--temperature", 1.2, "--min-p", 0.05, "--repetition-penalty", 1.2, "--frequency-penalty", 0.1],
]
MEMCHECK_SECONDS = 75


def compilations(log):
    """Sets of kernels that a process compiled, and that it had from its cache, as it says; None if it does not."""
    found = re.findall(r"kernels: (\d+) compiled, (\d+) from the cache", log)
    return tuple(map(int, found[-1])) if found else None


def starts(run, device):
    """Cold and warm: when it answers, what it says first, and what is left in the GPU's memory."""
    cache = run.work / "kernels"
    shutil.rmtree(cache, ignore_errors=True)
    prompts, _ = expectations(run.models / MODEL)
    before, seconds = machine.used(), {}
    for which in ("cold", "warm"):
        with run.checking(f"start, {which}"):
            with serve(run, run.models / MODEL, "--devices", device, *EXACT) as server:
                seconds[which], loaded = server.process.seconds, machine.used()
                found = compilations(server.process.log())
                said = "it does not say what it compiled" if found is None else f"{found[0]} compiled, {found[1]} cached"
                run.row(f"start, {which}", "-" if which == "cold" else "0 compiled", f"{seconds[which]:.2f} s; {said}",
                        None if which == "cold" or found is None else found[0] == 0)
                if which == "cold":
                    told(run, server)
                begun = time.monotonic()
                answers = server.answers(prompts)
                took, served = time.monotonic() - begun, machine.used()
                same = [a == p["greedy_ids"] for a, p in zip(answers, prompts, strict=True)]
                run.row(f"start, {which}: {MODEL} in f32", "transformers' tokens",
                        f"in {sum(same)} of {len(same)} answers, {took:.2f} s", all(same))
                if which == "cold":
                    if not any(same):
                        raise Stop("no answer is right")
                    sampled(run, server, prompts[0]["ids"])
            left = machine.used()
            until = time.monotonic() + 5
            while None not in (left, before) and left > before + LEFT_OVER and time.monotonic() < until:
                time.sleep(0.2)
                left = machine.used()
            known = None not in (left, before)
            run.row(f"start, {which}: memory of the GPU in use", f"in the end <= {LEFT_OVER} MiB more" if known else "-",
                    ", ".join(f"{machine.mebibytes(amount)} {when}" for amount, when in
                              ((before, "before"), (loaded, "loaded"), (served, "when it had served"), (left, "in the end"))),
                    left <= before + LEFT_OVER if known else None)
    if "cold" not in seconds:
        raise Stop("no server starts")


def told(run, server):
    """What the server itself says of the GPU."""
    for device in server.json("status")[0]["members"][0]["devices"]:
        libraries = device.pop("libraries", [])
        for one in libraries:
            run.row(f"status: {one['name']}", "-", f"{one['version']}, {one['path']}", None)
        rates = device.pop("rates", [])
        run.row("status: device", "-", ", ".join(f"{k} {v}" for k, v in device.items()), None)
        run.row("status: rates, TFLOP/s", "-",
                ", ".join(f"{r['format']} x {r['rows']}: {r['flops_per_second'] / 1e12:.2f}" for r in rates), None)


def sampled(run, server, ids):
    """A seed gives the same tokens again, and another one others."""
    same, other = 0, 0
    for how in SAMPLED:
        one, two, three = (server.generate(ids, 32, None, *how, "--seed", seed)[0] for seed in (7, 7, 8))
        same, other = same + (one == two), other + (one != three)
    run.row("sampled streams, twice with a seed", "the same tokens, and others with another seed",
            f"the same {same} times, others {other} times, of {len(SAMPLED)}", same == other == len(SAMPLED))


def ours_below(parent, path):
    """Processes of the binary that `parent` has started, or what it has started."""
    children = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # After the name, which is in parentheses: the state, and the parent.
            above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(above, []).append((int(entry.name), (entry / "cmdline").read_bytes().split(b"\0")[0]))
    found, parents = [], [parent]
    while parents:
        below = [child for pid in parents for child in children.get(pid, [])]
        found += [pid for pid, command in below if command == os.fsencode(path)]
        parents = [pid for pid, _ in below]
    return found


def memcheck(run, name, device, *how):
    """A server under compute-sanitizer, from its start to its end in order; short answers to two prompts."""
    what = f"memcheck: {name} {' '.join(map(str, how))}".strip()
    with run.checking(what):
        if shutil.which("compute-sanitizer") is None:
            return run.row(what, "0 errors", "compute-sanitizer is not here", None)
        prompts, _ = expectations(run.models / name)
        tool = ["compute-sanitizer", "--tool", "memcheck", "--target-processes", "all", "--print-limit", "50"]
        begun = time.monotonic()
        arguments = ["serve", run.models / name, "--port", 0, "--devices", device, "--kv-tokens", 2048, "--max-step-tokens",
                     128, "--grace", 2, *how]
        process = Process(run, arguments, under=tool, load=MEMCHECK_SECONDS)
        try:
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                server = Server(run, process)
                list(pool.map(lambda p: server.generate(p["ids"], 8), prompts[:2]))
            for pid in ours_below(process.child.pid, run.strata):
                os.kill(pid, signal.SIGTERM)
            process.child.wait(run.within(30))
            # What the tool says goes to its standard output.
            process.ended.wait(5)
            text = process.log() + "\n".join(process.lines)
        finally:
            process.close()
        counts = re.findall(r"ERROR SUMMARY: (\d+) error", text)
        if not counts:
            raise Failure("the tool gave no summary")
        errors = sum(map(int, counts))
        first = next((line for line in text.splitlines() if line.startswith("=========") and "Invalid" in line), "")
        run.row(what, "0 errors", f"{errors} errors in {time.monotonic() - begun:.0f} s {first}", errors == 0)
