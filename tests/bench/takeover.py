"""How long an answer pauses when the only stage is lost: with a cold spare, and with a standby that holds the weights.

usage: python takeover.py WORK_DIR [--shape llama-1.1b] [--rounds N]

Needs Python alone and target/release/strata. A random model of the shape is written to WORK_DIR unless it is there. Beside the pause, there
is what reading and packing the stage took when it was loaded first.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import threading
import time

BINARY = str(pathlib.Path(__file__).resolve().parents[2] / "target" / "release" / "strata")
SKIPPED = "output,token-ids,family,special-tokens,chat-template,round-trip"
TOKENS = 60


class Server:
    def __init__(self, arguments, says):
        self.process = subprocess.Popen([BINARY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # When each line of the log came.
        self.log = []
        threading.Thread(target=self._read, daemon=True).start()
        line = self.process.stdout.readline()
        if not line.startswith(says):
            raise RuntimeError(f"{arguments}: {[line for _, line in self.log]}")
        self.url = line.split()[1]

    def _read(self):
        for line in self.process.stderr:
            self.log.append((time.monotonic(), line.strip()))

    def first(self, part):
        return next(at for at, line in self.log if part in line)


def status(url):
    out = subprocess.run([BINARY, "status", "--json", "--address", url], capture_output=True, text=True)
    return json.loads(out.stdout)


def measure(models, name, layers, standbys):
    """Seconds of the first load, and from the loss to the next token."""
    servers = []
    try:
        for _ in range(2):
            servers.append(Server(["worker", "--models", str(models), "--max-memory", "cpu=6GiB"], "listening "))
        workers = [worker.url for worker in servers]
        servers.append(Server([
            "coordinator", "--worker", ",".join(workers), "--model", name, "--split", str(layers), "--port", "0", "--context", "512",
            "--kv-tokens", "2048", "--standbys", str(standbys), "--skip-check", SKIPPED,
        ], "ready "))
        coordinator = servers[-1]
        loading = coordinator.first(" loaded ") - coordinator.first("replica 0")
        while standbys and not status(coordinator.url)["standbys"]:
            time.sleep(0.2)
        client = subprocess.Popen([
            BINARY, "generate", "--address", coordinator.url, "--token-ids", "1,5,9,13", "--max-tokens", str(TOKENS), "--ignore-eos",
            "--json",
        ], stdout=subprocess.PIPE, text=True)
        times, killed = [], None
        for line in client.stdout:
            if json.loads(line)["event"] != "tokens":
                continue
            times.append(time.monotonic())
            if len(times) == TOKENS // 3:
                stage = status(coordinator.url)["plan"]["replicas"][0]["stages"][0]["worker"]
                killed = time.monotonic()
                servers[[url.endswith(stage) for url in workers].index(True)].process.kill()
        if client.wait() != 0 or len(times) != TOKENS:
            raise RuntimeError(f"{len(times)} of {TOKENS} tokens came")
        return loading, max(after - max(before, killed) for before, after in zip(times, times[1:]) if after > killed)
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path, metavar="WORK_DIR")
    parser.add_argument("--shape", default="llama-1.1b")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = arguments.work / arguments.shape
    if not (model / "config.json").exists():
        subprocess.run([BINARY, "random-model", arguments.shape, str(model)], check=True)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    rounds = [{standbys: measure(arguments.work, arguments.shape, layers, standbys) for standbys in (0, 1)}
              for _ in range(arguments.rounds)]
    cold, warm = ([found[standbys] for found in rounds] for standbys in (0, 1))
    load, pause = (statistics.median(column) for column in zip(*cold))
    print(f"first load {load:.2f} s; cold spare {pause:.2f} s, {pause / load:.2f} of that; "
          f"standby {statistics.median(pause for _, pause in warm):.2f} s (medians of {len(rounds)})")


if __name__ == "__main__":
    main()
