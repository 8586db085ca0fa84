"""Processes of the binary under test, what they are asked, and what the checks found.

A library for check.py and what is beside it; needs nothing but Python.
"""
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sysconfig
import threading
import time

# A server compiles its kernels before it answers.
START_SECONDS = 120
LOG_BYTES = 12_000


class Failure(Exception):
    """Something did not do what it should; the reason."""


class Run:
    """One run of the checks: the binary, the time that is left, the processes, and the table of what was found."""

    def __init__(self, strata, models, out, work, budget, patience):
        self.strata, self.models, self.out, self.work = strata, models, out, work
        self.deadline, self.patience = time.monotonic() + budget, patience
        self.rows, self.lock, self.processes = [], threading.Lock(), []
        self.started = itertools.count()
        out.mkdir(parents=True, exist_ok=True)
        (work / "logs").mkdir(parents=True)
        (out / "logs.txt").write_text("")
        (out / "results.txt").write_text("")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("STRATA_")}
        self.environment |= {"STRATA_LOG": "info", "LD_LIBRARY_PATH": library_path()}

    def within(self, seconds):
        """So many seconds, or what is left of the whole run's."""
        left = self.deadline - time.monotonic()
        if left <= 1:
            raise Failure("the budget of time is spent")
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
        except (Failure, subprocess.SubprocessError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            reason = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
            self.row(what, "an answer", " ".join(reason.split())[:600], False)

    def log(self, title, text):
        """Keeps the end of a log."""
        with self.lock, (self.out / "logs.txt").open("a") as file:
            file.write(f"==== {title}\n{text[-LOG_BYTES:]}\n")

    def call(self, *arguments, seconds=None):
        """Standard output of a command of the binary, for which there is the run's patience unless told otherwise."""
        command = [self.strata, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment,
                              timeout=self.within(seconds or self.patience))
        if done.returncode:
            raise Failure(f"{' '.join(map(str, arguments))[:80]}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def close(self):
        """Ends every process that is still there."""
        for process in list(self.processes):
            process.close()


class Process:
    """A server of the binary; `address` is what it says on standard output."""

    def __init__(self, run, arguments, environment=None):
        self.run, self.title = run, " ".join(map(str, arguments))
        self.path = run.work / "logs" / f"{next(run.started)}-{arguments[0]}.txt"
        self.address, said = None, threading.Event()
        with self.path.open("w") as log:
            self.child = subprocess.Popen([run.strata, *map(str, arguments)], stdout=subprocess.PIPE, stderr=log,
                                          text=True, env=run.environment | (environment or {}))
        with run.lock:
            run.processes.append(self)

        def read():
            for line in self.child.stdout:
                if line.startswith(("ready ", "listening ")):
                    self.address = line.split()[1]
                    said.set()
            said.set()

        threading.Thread(target=read, daemon=True).start()
        if not said.wait(run.within(START_SECONDS)) or self.address is None:
            log = self.log()
            self.close()
            raise Failure(f"{self.title} did not start: {log.strip()[-400:]}")

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
        status = self.child.wait()
        self.run.log(f"{self.title} (status {status})", self.log())


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

    def generate(self, ids, count, logprobs=None):
        """Greedy tokens, and by token a map from ids to log-probabilities if they are asked for."""
        extra = [] if logprobs is None else ["--logprobs", logprobs]
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
        """The report of `strata bench`."""
        return self.json("bench", *arguments, seconds=seconds)[-1]


def worker(run, models, devices, environment=None, *more):
    """A worker that coordinators can use one after the other."""
    return Process(run, ["worker", "--models", models, "--devices", devices, *more], environment)


def coordinate(run, workers, model, *more):
    """A server over workers."""
    named = [part for worker in workers for part in ("--worker", worker.address)]
    return Server(run, Process(run, ["coordinator", *named, "--model", model, "--port", 0, *more]))


def serve(run, model, *more):
    """A server in one process."""
    return Server(run, Process(run, ["serve", model, "--port", 0, *more]))


def library_path():
    """Folders with NVIDIA's libraries: those of the environment, those that came with Python packages, the toolkit's."""
    packages = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [f for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    folders += [str(f) for f in sorted(packages.glob("*/lib"))]
    folders += [f for f in ("/usr/local/cuda/lib64",) if os.path.isdir(f)]
    return ":".join(folders)


def one_gpu_twice(rank):
    """The environment in which NCCL links two processes that share a GPU: it takes them for two machines."""
    return {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1",
            "NCCL_MNNVL_ENABLE": "0", "NCCL_NVLS_ENABLE": "0", "NCCL_DEBUG": "WARN", "NCCL_DEBUG_FILE": "/dev/stderr"}


def expectations(directory):
    """Prompts of a decoder, inputs of an encoder: what transformers made of them."""
    expected = json.loads((directory / "expected.json").read_text())
    return expected.get("prompts"), expected.get("inputs")
