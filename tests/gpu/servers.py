"""Processes of the binary under test, what they are asked, and what the checks found.

A library for check.py and what is beside it; needs nothing but Python.
"""
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback

# Of one log, and of all: what is brought back is small.
LOG_BYTES, LOGS_BYTES = 400_000, 12_000_000
# What ends a check, and not the run.
UNFIT = (subprocess.SubprocessError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError)


class Failure(Exception):
    """Something did not do what it should; the reason."""


class Spent(Failure):
    """The time of the whole run is over."""


class Stop(Failure):
    """What all that follows stands on does not hold."""


class Run:
    """One run of the checks: the binary, the time that is left, the processes, and the table of what was found.

    `load` is how many seconds a server may take to compile and to load, `patience` how many an answer may take.
    """

    def __init__(self, strata, models, out, work, budget, load, patience):
        self.strata, self.models, self.out, self.work = strata, models, out, work
        self.deadline, self.load, self.patience = time.monotonic() + budget, load, patience
        self.rows, self.missed, self.lock, self.processes = [], 0, threading.Lock(), []
        self.started = itertools.count()
        out.mkdir(parents=True, exist_ok=True)
        (work / "logs").mkdir(parents=True)
        for before in (*out.glob("*.json"), *out.glob("*.csv")):
            before.unlink()
        (out / "logs.txt").write_text("")
        (out / "results.txt").write_text("")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("STRATA_")}
        self.environment |= {"STRATA_LOG": "info", "NO_COLOR": "1", "STRATA_KERNEL_CACHE": str(work / "kernels"),
                             "LD_LIBRARY_PATH": library_path()}

    def within(self, seconds):
        """So many seconds, or what is left of the whole run's."""
        left = self.deadline - time.monotonic()
        if left <= 1:
            raise Spent("the time is spent")
        return min(seconds, left)

    def say(self, line):
        """A line for people, kept in the results."""
        with self.lock:
            print(line, flush=True)
            with (self.out / "results.txt").open("a") as file:
                file.write(line + "\n")

    def row(self, check, expected, got, ok):
        """A row of the table. `ok` is None for a figure that nothing is expected of."""
        with self.lock:
            self.rows.append(ok)
        verdict = {None: "-", True: "ok", False: "FAILED"}[ok if ok is None else bool(ok)]
        self.say(f"| {check} | {expected} | {got} | {verdict} |")

    @contextlib.contextmanager
    def checking(self, what):
        """Turns what goes wrong inside into a failed row."""
        try:
            yield
        except Stop:
            raise
        except (Failure, *UNFIT) as error:
            if time.monotonic() > self.deadline - 1:
                self.missed += 1
                return self.say(f"| {what} | an answer | the time was spent before | not reached |")
            reason = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
            self.row(what, "an answer", " ".join(reason.split())[:600], False)
            if not isinstance(error, Failure):
                self.log(what, traceback.format_exc())

    def log(self, title, text):
        """Keeps a log: of a long one the beginning and the end."""
        with self.lock, (self.out / "logs.txt").open("a") as file:
            keep = min(LOG_BYTES, max(4000, LOGS_BYTES - file.tell()))
            if len(text) > keep:
                text = f"{text[:keep // 4]}\n[...]\n{text[-3 * keep // 4:]}"
            file.write(f"==== {title}\n{text}\n")

    def call(self, *arguments, seconds=None):
        """Standard output of a command of the binary, for which there is the run's patience unless told otherwise."""
        command = [self.strata, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment,
                              timeout=self.within(seconds or self.patience))
        if done.returncode:
            self.log(" ".join(map(str, arguments)), done.stderr)
            raise Failure(f"{' '.join(map(str, arguments))[:80]}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def close(self):
        """Ends every process that is still there; none is started any more."""
        self.deadline = 0
        for process in list(self.processes):
            process.close()
        # Clients, and what watches the GPU.
        for child in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


class Process:
    """A server of the binary; `address` is what it says on standard output, `seconds` is how long that took.

    `under` is a command that runs it, such as a debugger.
    """

    def __init__(self, run, arguments, environment=None, under=(), load=None):
        begun = time.monotonic()
        run.within(1)
        self.run, self.title = run, " ".join(map(str, arguments))
        self.path = run.work / "logs" / f"{next(run.started)}-{arguments[0]}.txt"
        # What it says on standard output, and whether that has ended.
        self.address, self.lines, self.ended, said = None, [], threading.Event(), threading.Event()
        with self.path.open("w") as log:
            self.child = subprocess.Popen([*under, run.strata, *map(str, arguments)], stdout=subprocess.PIPE,
                                          stderr=log, text=True, env=run.environment | (environment or {}))
        with run.lock:
            run.processes.append(self)

        def read():
            for line in self.child.stdout:
                self.lines.append(line.rstrip("\n"))
                if line.startswith(("ready ", "listening ")):
                    self.address = line.split()[1]
                    said.set()
            said.set()
            self.ended.set()

        threading.Thread(target=read, daemon=True).start()
        if not said.wait(run.within(load or run.load)) or self.address is None:
            waited, log = time.monotonic() - begun, self.log()
            self.close()
            raise Failure(f"{self.title} did not start in {waited:.0f} s: {log.strip()[-400:]}")
        self.seconds = time.monotonic() - begun

    def log(self):
        """What it has said on standard error."""
        return self.path.read_text(errors="replace")

    def alive(self):
        return self.child.poll() is None

    def send(self, signal):
        self.child.send_signal(signal)

    def close(self):
        """Ends it and keeps its log."""
        with self.run.lock:
            if self not in self.run.processes:
                return
            self.run.processes.remove(self)
        if self.alive():
            self.child.kill()
        try:
            status = self.child.wait(5)
        except subprocess.TimeoutExpired:
            status = "does not die"
        self.run.log(f"{self.title} (status {status})", "\n".join([self.log(), *self.lines]))


class Server:
    """Something at an address that answers clients."""

    def __init__(self, run, process):
        self.run, self.process, self.address = run, process, process.address

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.close()

    def json(self, command, *arguments, seconds=None):
        """The objects that a client prints."""
        out = self.run.call(command, "--address", self.address, "--json", *arguments, seconds=seconds)
        return [json.loads(line) for line in out.splitlines()]

    def generate(self, ids, count, logprobs=None, *more):
        """Greedy tokens, and by token a map from ids to log-probabilities if they are asked for; `more` may sample."""
        extra = [*more] if logprobs is None else ["--logprobs", logprobs, *more]
        last = self.json("generate", "--token-ids", ",".join(map(str, ids)), "--max-tokens", count, "--ignore-eos",
                         *extra)[-1]
        tops = [{t["token_id"]: t["logprob"] for t in scores["top"]} for scores in last.get("logprobs", [])]
        return last["token_ids"], tops

    def answers(self, prompts, count=None):
        """Greedy tokens for prompts of expected.json, all asked for at once."""
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            ask = lambda p: self.generate(p["ids"], count or len(p["greedy_ids"]))[0]
            return list(pool.map(ask, prompts))

    def stages(self):
        """The stages of the first replica of the live plan."""
        return self.json("status")[0]["plan"]["replicas"][0]["stages"]

    def bench(self, *arguments, seconds=None):
        """The reports of `strata bench`, one for each number of streams."""
        return self.json("bench", *arguments, seconds=seconds)


def worker(run, models, devices, environment=None, *more):
    """A worker that coordinators can use one after the other."""
    return Process(run, ["worker", "--models", models, "--devices", devices, *more], environment)


def coordinate(run, workers, model, *more):
    """A server over workers."""
    named = [part for worker in workers for part in ("--worker", worker.address)]
    return Server(run, Process(run, ["coordinator", *named, "--model", model, "--port", 0, *more]))


def serve(run, model, *more, **how):
    """A server in one process."""
    return Server(run, Process(run, ["serve", model, "--port", 0, *more], **how))


def children():
    """Processes that this one started and that have not ended."""
    found = []
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state and parent.
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.append(int(status.parent.name))
    return found


def library_path():
    """Folders with NVIDIA's libraries: those of the environment, those that came with Python packages, the toolkit's."""
    folders = [f for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    for packages in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        folders += [str(f) for f in sorted(pathlib.Path(packages or ".").glob("nvidia/*/lib"))]
    folders += [f for f in ("/usr/local/cuda/lib64",) if os.path.isdir(f)]
    return ":".join(dict.fromkeys(folders))


def one_gpu_twice(rank):
    """The environment in which NCCL links two processes that share a GPU: it takes them for two machines."""
    return {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1",
            "NCCL_MNNVL_ENABLE": "0", "NCCL_NVLS_ENABLE": "0", "NCCL_DEBUG": "WARN", "NCCL_DEBUG_FILE": "/dev/stderr"}


def expectations(directory):
    """Prompts of a decoder, inputs of an encoder: what transformers made of them."""
    expected = json.loads((directory / "expected.json").read_text())
    return expected.get("prompts"), expected.get("inputs")
