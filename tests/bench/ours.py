"""Servers of ours, started for a measurement.

A library for the scripts beside it; needs target/release/strata.
"""
import json
import pathlib
import platform
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
STRATA = ROOT / "target" / "release" / "strata"


class Server:
    """Processes that together serve a model; the last one answers. `{0}` in a command is the address of the first.
    `build` is whose they are; who asks is always today's."""

    def __init__(self, commands, build=STRATA):
        self.processes = []
        for command in commands:
            command = [str(part).format(*[p.address for p in self.processes]) for part in command]
            process = subprocess.Popen([str(build), *command], stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True)
            self.processes.append(process)
            for line in process.stdout:
                if line.startswith(("ready ", "listening ")):
                    process.address = line.split()[1]
                    break
            else:
                raise RuntimeError(f"{command} did not start")
        self.address = self.processes[-1].address

    def bench(self, *arguments):
        """The report of `strata bench`."""
        command = [str(STRATA), "bench", "--json", "--address", self.address, *map(str, arguments)]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    def prefill(self, tokens=512):
        """Tokens per second of one prompt."""
        report = self.bench("--prompt-tokens", tokens, "--max-tokens", 1, "--requests", 2)
        return tokens * 1e3 / report["first_token_ms"]["p50"]

    def decode(self, streams):
        """Tokens per second of so many streams together."""
        report = self.bench("--concurrency", streams, "--requests", streams, "--max-tokens", 48)
        return streams * 1e3 / report["inter_token_ms"]["p50"]

    def clients(self, count=8):
        """Tokens per second of clients that come back as soon as they are answered."""
        return self.bench("--concurrency", count, "--requests", 3 * count)["tokens_per_second"]

    def coordinate(self):
        """Of the process that answers, for 64 streams: its share of one core, microseconds per token; tokens per second."""
        before = self.processor_seconds()
        report = self.bench("--concurrency", 64, "--requests", 64, "--max-tokens", 64)
        # A request of 64 tokens is made before the clock starts.
        used = (self.processor_seconds() - before) * 64 / 65
        return used / report["seconds"], used * 1e6 / report["generated_tokens"], report["tokens_per_second"]

    def processor_seconds(self):
        """What the process that answers has used so far, counted in nanoseconds where /proc/PID/stat has hundredths."""
        tasks = pathlib.Path(f"/proc/{self.processes[-1].pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()


def serve(model, quantization="bf16", *more):
    """The command of a server with one worker in its process."""
    quantize = [] if quantization == "bf16" else ["--quantize", quantization]
    return ["serve", model, "--port", 0, *quantize, *more]


def one_worker(model, threads):
    """The commands of a coordinator and a worker, in int8."""
    return [["worker", "--models", model.parent, "--threads", threads],
            ["coordinator", "--worker", "{0}", "--model", model.name, "--port", 0, "--quantize", "int8"]]


def two_workers(model, quantization="bf16"):
    """The commands of a server over two workers of one thread each, linked by TCP."""
    worker = ["worker", "--models", model.parent, "--threads", 1]
    quantize = [] if quantization == "bf16" else ["--quantize", quantization]
    return [worker, worker, ["coordinator", "--worker", "{0}", "--worker", "{1}", "--model", model.name,
                             "--split", "balanced", "--links", "tcp", "--port", 0, *quantize]]


def processor():
    """The name of this machine's."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
