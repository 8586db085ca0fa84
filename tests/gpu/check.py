"""Checks everything that needs a GPU, with a binary that was built elsewhere, in three calls.

usage: python check.py probe|speed|faults --strata PATH --out DIR [--budget SECONDS]

`probe` says whether anything works: the machine, a cold and a warm start, memory, small models, one run under memcheck.
`speed` measures kernels and a large model. `faults` breaks pipelines, and checks links, offload and the other models.

Needs Python, and for what is compared with them torch and transformers. Every row of the table is printed and in
OUT/results.txt as soon as it is known; OUT/logs.txt has the logs. Exits with 1 if a check failed or was not reached.
"""
import argparse
import concurrent.futures
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import machine
import parity
import pipelines
import probe
import speed
from servers import Failure, Run, Stop

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Seconds: of a call as a whole; its last ones are for writing down what is known.
BUDGETS, CLOSING = {"probe": 150, "speed": 330, "faults": 240}, 8
# For probe: a Llama, one with bounds on its scores, and mixtures of experts.
FIRST = {"shakespeare": "f32,bf16,int4", "llama3-rope-f16": "f32,bf16,int4", "gemma2-softcaps-f32": "f32,bf16,int4"}
MIXTURES, OF_MIXTURES = ("mixtral", "moe"), "int8,f32"
PARTS = {"faults": ("kill", "pipeline", "offload", "parity")}


def room():
    """A folder in memory if the large model fits there beside what reads it."""
    memory = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return pathlib.Path("/dev/shm/strata-gpu" if memory >= 24 << 30 else "/tmp/strata-gpu")


def is_mixture(name):
    return any(part in name for part in MIXTURES)


def together(tasks, at_once):
    """All tasks, some at once; each says itself what it found."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for done in [pool.submit(*task) for task in tasks]:
            done.result()


def probing(run, arguments, names):
    probe.starts(run, arguments.device)
    formats = {name: OF_MIXTURES for name in names if is_mixture(name)}
    formats = FIRST | formats if not arguments.models else {n: formats.get(n, FIRST["shakespeare"]) for n in names}
    if arguments.formats:
        formats = dict.fromkeys(formats, arguments.formats)
    # Mixtures whose kernels are those of large ones come first, and what is slow.
    tried = sorted((n for n in formats if is_mixture(n)), key=lambda n: "groups" not in n)[:1]
    tasks = [(probe.memcheck, run, name, arguments.device, "--quantize", "int8") for name in tried]
    tasks += [(probe.memcheck, run, probe.MODEL, arguments.device, "--dtype", "bf16")]
    if arguments.device == "cpu":
        tasks = []
    checks = [(parity.check, run, name, formats[name].split(","), arguments.device, arguments.memory)
              for name in sorted(formats, key=is_mixture)]
    together([*checks[:1], *tasks, *checks[1:]], arguments.at_once)


def breaking(run, arguments, names, gpus):
    parts = arguments.only.split(",") if arguments.only else PARTS["faults"]
    if "kill" in parts:
        pipelines.kill(run, arguments.memory, arguments.answer)
    tasks = []
    if "pipeline" in parts:
        tasks += pipelines.cases(run, gpus, arguments.memory, names)
    if "offload" in parts:
        tasks.append((pipelines.offload, run))
    if "parity" in parts:
        formats = (arguments.formats or ",".join(parity.FORMATS)).split(",")
        tasks += [(parity.check, run, name, formats, arguments.device, arguments.memory)
                  for name in sorted(names, key=lambda n: (not is_mixture(n), n in FIRST))]
    together(tasks, arguments.at_once)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("call", choices=BUDGETS)
    parser.add_argument("--strata", type=pathlib.Path, default=ROOT / "target" / "release" / "strata")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, default=room(),
                        help="for models with random weights (16 GB for speed) and compiled kernels, which are kept")
    parser.add_argument("--only", help=f"some of {','.join(PARTS['faults'])}, of faults")
    parser.add_argument("--models", help="of tests/models; all that a call takes otherwise")
    parser.add_argument("--formats", help=f"of parity: some of {','.join(parity.FORMATS)}")
    parser.add_argument("--device", default="cuda:0", help="cpu tries the script where there is no GPU")
    parser.add_argument("--memory", default="2GiB", help="of a GPU, for each stage of the small models")
    parser.add_argument("--shape", default="llama-8b", help="for speed, as `strata random-model` knows it")
    parser.add_argument("--answer", type=int, default=1500, help="tokens of the answers that a kill breaks")
    parser.add_argument("--at-once", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--load", type=float, default=60, help="seconds for a server to compile and load")
    parser.add_argument("--patience", type=float, default=30, help="seconds for an answer")
    parser.add_argument("--budget", type=float, help=f"seconds for everything; {BUDGETS}")
    arguments = parser.parse_args()
    models = ROOT / "tests" / "models"
    names = sorted(p.parent.name for p in models.glob("*/expected.json"))
    for flag, given, known in (("only", arguments.only, PARTS["faults"]), ("models", arguments.models, names),
                               ("formats", arguments.formats, parity.FORMATS)):
        if given and (wrong := [name for name in given.split(",") if name not in known]):
            sys.exit(f"check.py: --{flag} {','.join(wrong)}: expected some of {','.join(known)}")
    try:
        subprocess.run([arguments.strata.resolve(), "--version"], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        sys.exit(f"check.py: --strata {arguments.strata}: {reason}; expected the binary that "
                 "`cargo build --release --features cuda` makes")
    if arguments.models:
        names = arguments.models.split(",")
    shutil.rmtree(arguments.work / "logs", ignore_errors=True)
    budget = arguments.budget or BUDGETS[arguments.call]
    run = Run(arguments.strata.resolve(), models, arguments.out, arguments.work, budget - CLOSING, arguments.load,
              arguments.patience)
    os.environ["LD_LIBRARY_PATH"] = run.environment["LD_LIBRARY_PATH"]
    begun = time.monotonic()

    def end(why):
        run.say(f"\nEnded after {time.monotonic() - begun:.0f} s with something still running: {why}.")
        run.close()
        os._exit(1)

    def asked(number, _):
        # Not here: what this thread was doing may hold what ending needs.
        threading.Thread(target=end, args=(signal.Signals(number).name,)).start()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Under nohup, one is not to be heard.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, asked)
    watch = threading.Timer(budget - 2, end, ("the time is spent",))
    watch.daemon = True
    watch.start()
    try:
        run.say(f"check.py {arguments.call}, {run.call('--version').strip()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        run.say("| check | expected | got | |\n|---|---|---|---|")
        gpus = [] if arguments.device == "cpu" else machine.gpus()
        run.row("machine: GPUs", "-", "; ".join(gpus) or "none", None)
        if arguments.call == "probe":
            machine.describe(run)
            probing(run, arguments, names)
        elif arguments.call == "speed":
            speed.measure(run, arguments.shape, arguments.device)
        else:
            breaking(run, arguments, names, len(gpus))
    except Failure as failure:
        run.row(arguments.call, "goes on", f"ended early: {failure}", False)
    finally:
        run.close()
        failed, passed = run.rows.count(False), run.rows.count(True)
        run.say(f"\n{passed} checks passed, {failed} failed, {run.missed} not reached, in {time.monotonic() - begun:.0f} s")
    sys.exit(bool(failed or run.missed or not passed))


if __name__ == "__main__":
    main()
