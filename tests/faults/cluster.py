"""A cluster of real processes, the load on it, and what the streams of that load have seen."""
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request

from proxy import Proxy

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "models"
MODEL = "shakespeare"
TOKENS = 200
WORKERS = 5
# Layers of each stage; workers beyond these are spares.
SPLIT = "2,2,2"
# Longest wait for anything.
PATIENCE = 90
# What processes have in their environment: etcd asks for a secret. The shortest leases that it grants make for quick turns.
ENVIRONMENT = {**os.environ, "STRATA_SECRET": "a secret that nobody guesses"}
LEASE = 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A server that can be started again where it was."""

    def __init__(self, binary, arguments, says, prefix=()):
        self.arguments, self.says, self.begins = arguments, says, [*prefix, binary]
        self.start()

    def start(self, arguments=None):
        command = [*self.begins, *(arguments or self.arguments)]
        # What all of them say, one after the other, with their own times.
        with open(os.environ.get("FAULTS_LOG", os.devnull), "a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT)
        self.said = threading.Event()
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process):
        for line in process.stdout:
            if line.startswith(self.says) and process is self.process:
                self.said.set()

    def wait(self):
        if not self.said.wait(PATIENCE):
            raise RuntimeError(f"{self.arguments} said nothing in {PATIENCE} s")

    def signal(self, name):
        self.process.send_signal(name)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def resident(self):
        """Bytes of memory."""
        try:
            pages = int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")


class Worker(Process):
    """One whose links come in through a proxy."""

    def __init__(self, binary, number, etcd, network):
        self.number = number
        host = network.address(number) if network else "127.0.0.1"
        self.address, self.links = f"{host}:{free_port()}", (host, free_port())
        self.proxy = Proxy(self.links, network.host if network else "127.0.0.1")
        self.prefix = network.command(number) if network else []
        # As plans call it.
        self.name = f"worker-{number}" if etcd else self.address
        self.member = ["--etcd", etcd.url, "--name", self.name, "--lease-ttl", str(LEASE)] if etcd else []
        super().__init__(binary, self.command(MODELS), "listening ", self.prefix)

    def command(self, models):
        return ["worker", "--models", str(models), "--listen", self.address, "--threads", "1", *self.member,
                "--link-listen", "%s:%d" % self.links, "--link-advertise", f"{self.proxy.host}:{self.proxy.port}"]

    def start_with(self, models):
        self.start(self.command(models))


class Etcd:
    """Three members, whose data outlives them."""

    def __init__(self, host="127.0.0.1"):
        self.folder = tempfile.TemporaryDirectory()
        names = [f"member-{number}" for number in range(3)]
        clients, peers = ([f"http://{host}:{free_port()}" for _ in names] for _ in range(2))
        self.url = ",".join(clients)
        every = ",".join(f"{name}={peer}" for name, peer in zip(names, peers))
        self.members = [Process("etcd", [
            "--name", name, "--data-dir", f"{self.folder.name}/{name}", "--initial-cluster", every,
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--logger", "zap",
        ], "") for name, client, peer in zip(names, clients, peers)]
        for member in self.members:
            self.wait(member)

    @staticmethod
    def wait(member):
        """Waits until a member answers for all of them: it knows who leads."""
        url = member.arguments[member.arguments.index("--listen-client-urls") + 1]
        begun = time.monotonic()
        while time.monotonic() - begun < PATIENCE:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
                    if json.load(answer)["health"] == "true":
                        return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"etcd is not healthy after {PATIENCE} s")


class Cluster:
    """Three stages, two spares, and two coordinators over all of them: by a list, or by etcd."""

    def __init__(self, binary, etcd, heartbeat_timeout, network=None):
        self.binary, self.etcd, self.network = binary, etcd, network
        self.workers = [Worker(binary, number, etcd, network) for number in range(WORKERS)]
        for worker in self.workers:
            worker.wait()
        urls = ",".join(f"http://{worker.address}" for worker in self.workers)
        found = (["--etcd", etcd.url, "--leader-ttl", str(LEASE)] if etcd else
                 ["--worker", urls, "--join-timeout", "86400"])
        self.coordinators = []
        for _ in range(2):
            port = free_port()
            command = ["coordinator", *found, "--model", MODEL, "--dtype", "f32", "--split", SPLIT,
                       "--port", str(port), "--heartbeat-timeout", str(heartbeat_timeout)]
            self.coordinators.append(Process(binary, command, "ready "))
            self.coordinators[-1].address = f"http://127.0.0.1:{port}"
        self.leader = self.coordinators[0]
        self.healthy()

    def ask(self, coordinator):
        """What a coordinator says of itself; None if it does not answer."""
        command = [self.binary, "status", "--json", "--timeout", "1", "--address", coordinator.address]
        try:
            out = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
            return json.loads(out)
        except (ValueError, subprocess.TimeoutExpired):
            return None

    def operate(self, *arguments, text=None):
        """What an operator asks of the coordinator that leads."""
        command = [self.binary, *arguments, "--address", self.leader.address]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT)
        if done.returncode:
            raise RuntimeError(f"strata {' '.join(arguments)}: {done.stderr.strip()}")

    def answers(self, coordinator):
        """Waits until a coordinator says what it does."""
        begun = time.monotonic()
        while self.ask(coordinator) is None:
            if time.monotonic() - begun > PATIENCE:
                raise RuntimeError(f"a coordinator does not answer after {PATIENCE} s")
            time.sleep(0.1)

    def turn_from(self, coordinator):
        """The next request goes to the other one, unless it does already."""
        if self.leader is coordinator:
            self.leader = next(other for other in self.coordinators if other is not coordinator)

    def stages(self):
        """Workers of the plan that is served, in order; none while nothing is."""
        for coordinator in sorted(self.coordinators, key=lambda c: c is not self.leader):
            said = self.ask(coordinator)
            if said and said.get("ready"):
                self.leader = coordinator
                names = [stage["worker"] for stage in said["plan"]["replicas"][0]["stages"]]
                return [worker for name in names for worker in self.workers if worker.name == name]
        return []

    def healthy(self, without=()):
        """Waits until three stages serve, none of them on `without`; returns them."""
        begun = time.monotonic()
        while time.monotonic() - begun < PATIENCE:
            stages = self.stages()
            if len(stages) == 3 and not set(stages) & set(without):
                return stages
            time.sleep(0.1)
        said = [answer and {key: answer[key] for key in ("state", "reason")} for answer in map(self.ask, self.coordinators)]
        serving, unwanted = [worker.name for worker in self.stages()], [worker.name for worker in without]
        raise RuntimeError(f"not served without {unwanted} after {PATIENCE} s: by {serving}; {said}")

    def resident(self):
        return sum(process.resident() for process in self.workers + self.coordinators)

    def close(self):
        for process in self.workers + self.coordinators + (self.etcd.members if self.etcd else []):
            process.process.send_signal(signal.SIGCONT)
            process.kill()
        if self.network:
            self.network.close()


def damaged_models(folder):
    """A copy of the model with one bit of each tensor changed, so that every stage has one that differs."""
    shutil.copytree(MODELS / MODEL, folder / MODEL)
    weights = folder / MODEL / "model.safetensors"
    data = bytearray(weights.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for name, tensor in json.loads(data[8:begin]).items():
        if name != "__metadata__":
            first, end = tensor["data_offsets"]
            data[begin + (first + end) // 2] ^= 0x40
    weights.write_bytes(data)
    return folder


def generate(binary, address, prompt):
    """The command of one greedy answer, an event a line."""
    ids = ",".join(map(str, prompt))
    return [binary, "generate", "--address", address, "--token-ids", ids, "--max-tokens", str(TOKENS), "--ignore-eos",
            "--temperature", "0", "--json"]


class Load:
    """Clients that come back as soon as they are answered, and compare every token."""

    def __init__(self, cluster, prompts, expected, streams):
        self.cluster, self.prompts, self.expected = cluster, prompts, expected
        # Of all streams: when a token came, and how long after the one before.
        self.gaps, self.errors, self.wrong, self.answers = [], [], [], 0
        self.lock, self.ends = threading.Lock(), threading.Event()
        self.threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(streams)]
        for thread in self.threads:
            thread.start()

    def _client(self, number):
        chance = random.Random(number)
        while not self.ends.is_set():
            which = chance.randrange(len(self.prompts))
            self._answer(which)

    def _answer(self, which):
        asked = self.cluster.leader
        command = generate(self.cluster.binary, asked.address, self.prompts[which])
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        got, last = [], None
        for line in client.stdout:
            event = json.loads(line)
            if event["event"] != "tokens":
                continue
            now = time.monotonic()
            if last is not None:
                with self.lock:
                    self.gaps.append((now, now - last))
            last = now
            if event["index"] != len(got):
                with self.lock:
                    self.wrong.append((now, f"index {event['index']} after {len(got)} tokens"))
            got += event["token_ids"]
        said = client.stderr.read()
        now = time.monotonic()
        with self.lock:
            # Of an answer that broke off, what there is must be right, too.
            if got != self.expected[which][:len(got)]:
                self.wrong.append((now, f"prompt {which}: {got} instead of {self.expected[which]}"))
            if client.wait() == 0:
                self.answers += 1
                if len(got) != TOKENS:
                    self.wrong.append((now, f"prompt {which}: {len(got)} tokens instead of {TOKENS}"))
            elif not self.ends.is_set():
                self.errors.append((now, said.strip(), bool(got)))
        if client.returncode != 0:
            self.cluster.turn_from(asked)
            time.sleep(0.1)

    def flows(self, since):
        """Waits until every stream could have gone on: as many tokens as there are streams have come since."""
        begun = time.monotonic()
        while time.monotonic() - begun < PATIENCE:
            with self.lock:
                if sum(at > since for at, _ in self.gaps[-1000:]) > 4 * len(self.threads):
                    return
            time.sleep(0.05)
        raise RuntimeError(f"no tokens for {PATIENCE} s")

    def longest(self, begun, ended):
        """The longest gap of any stream that ended in a time."""
        with self.lock:
            return max((gap for at, gap in self.gaps if begun < at <= ended), default=0.0)

    def outage(self, begun, ended):
        """The longest time within one in which no stream had a token."""
        with self.lock:
            times = [begun, *sorted(at for at, _ in self.gaps if begun < at <= ended), ended]
        return max(after - before for before, after in zip(times, times[1:]))

    def close(self):
        self.ends.set()
        for thread in self.threads:
            thread.join(PATIENCE)
