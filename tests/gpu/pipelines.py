"""Pipelines over every kind of link, layers that spill to the CPU, and the loss of a rank inside a step."""
import concurrent.futures
import json
import signal
import subprocess
import threading
import time

from parity import Decoder
from servers import Failure, coordinate, expectations, one_gpu_twice, serve, worker

# Each prompt is asked for so many times at once.
COPIES = 2
# A fixture's tokens are chosen with a margin, so that in float32 every split gives the same ones.
EXACT = ["--dtype", "f32", "--no-prefix-cache"]
MODELS = ("shakespeare", "llama-bias-f32", "gemma2-softcaps-f32", "qwen3-moe-f32")
# In 16 bits a split may compute a prompt in other chunks, and a near tie may fall otherwise: what parity.py allows.
ERROR_16, AGREEMENT_16 = 0.01, 0.9
LEAVES_WITHIN = 5.0
BEFORE_KILL = 40
# Seconds in which nobody but the link could notice; what a worker logs whose stage leaves a run by itself.
UNSEEN = 8
BROKE = "the run of a stage broke"


def cases(run, gpus, memory, names):
    """Tasks: groups of links that the same workers can have, each with those models that are among `names`."""
    # Parts of one GPU; a GPU and the CPU, either first, which takes layers without need only where it has a cap.
    parts = (f"cuda:0/0={memory}", f"cuda:0/1={memory}")
    groups = [
        ("parts of one GPU", [",".join(parts)], False, ["device-copy", "loopback", "tcp"]),
        ("one GPU, two processes", list(parts), True, ["nccl", "tcp"]),
        ("GPU, then CPU", [f"cuda:0={memory},cpu={memory}"], False, ["loopback", "tcp"]),
        ("CPU, then GPU, two processes", [f"cpu={memory}", f"cuda:0={memory}"], False, ["tcp"]),
    ]
    if gpus > 1:
        two = (f"cuda:0={memory}", f"cuda:1={memory}")
        groups += [
            ("two GPUs", [",".join(two)], False, ["device-copy", "nccl", "loopback", "tcp"]),
            ("two GPUs, two processes", list(two), False, ["nccl", "tcp"]),
        ]
    models = [name for name in MODELS if name in names]
    return [(pipeline, run, models, *group) for group in groups]


def start(run, devices, one_gpu, models=None):
    """Workers, all starting at once."""
    environment = [one_gpu_twice(rank) if one_gpu else None for rank in range(len(devices))]
    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(lambda d, e: worker(run, models or run.models, d, e), devices, environment))


def pipeline(run, models, what, devices, one_gpu, links):
    """Two stages, by each of some links: the tokens of one stage."""
    workers = []
    with run.checking(f"pipeline {what}"):
        workers = start(run, devices, one_gpu)
        for link in links:
            for name in models:
                with run.checking(f"pipeline {what}, {link}: {name}"):
                    linked(run, what, workers, link, name)
            for name in models[:1]:
                with run.checking(f"pipeline {what}, {link}: {name} in bf16"):
                    rounded(run, what, workers, link, name)
    for one in workers:
        one.close()


def linked(run, what, workers, link, name):
    prompts, _ = expectations(run.models / name)
    with coordinate(run, workers, name, "--split", "balanced", "--links", link, *EXACT) as server:
        two_by(link, server)
        answers = server.answers(prompts * COPIES)
        same = [answer == p["greedy_ids"] for answer, p in zip(answers, prompts * COPIES, strict=True)]
        note = ""
        if name == "shakespeare":
            report = server.bench("--requests", 2, "--prompt-tokens", 8, "--max-tokens", 32)[0]
            note = f", {report['inter_token_ms']['p50']:.2f} ms per token"
        run.row(f"pipeline {what}, {link}: {name}", "transformers' tokens in all answers",
                f"in {sum(same)} of {len(same)}{note}", all(same))


def two_by(link, server):
    """Makes sure that there are two stages with this link."""
    found = [stage["link"] for stage in server.stages()]
    if found != [link, None]:
        raise Failure(f"planned {len(found)} stages with links {found[:-1]}, not two by {link}")


def rounded(run, what, workers, link, name):
    """In bf16, where it is the link that must not change anything; followed as parity.py follows."""
    model, options = Decoder(expectations(run.models / name)[0]), ["--dtype", "bf16", "--no-prefix-cache"]
    with coordinate(run, workers[:1], name, "--split", "auto", *options) as server:
        one = model.ask(server)
    with coordinate(run, workers, name, "--split", "balanced", "--links", link, *options) as server:
        two_by(link, server)
        two = model.ask(server)
    error, share = model.error(two, one), model.agreement(two, one)
    run.row(f"pipeline {what}, {link}: {name} in bf16", f"error <= {ERROR_16:.0%}, tokens >= {AGREEMENT_16:.0%}",
            f"{error:.3%}, {share:.1%}", error <= ERROR_16 and share >= AGREEMENT_16)


def offload(run):
    """A cap that holds half of the layers: the rest goes to the CPU, and the plan says what that costs."""
    prompts, _ = expectations(run.models / "shakespeare")
    model, options = run.models / "shakespeare", [*EXACT, "--kv-tokens", 1024, "--max-step-tokens", 128]
    with run.checking("offload"):
        with serve(run, model, "--devices", "cuda:0,cpu", *options) as server:
            whole = server.stages()
        if len(whole) != 1:
            raise Failure(f"without a cap there are {len(whole)} stages")
        stage = whole[0]
        cap = stage["workspace_bytes"] + (stage["weight_bytes"] + stage["kv_bytes"]) * 6 // 10
        with serve(run, model, "--devices", f"cuda:0={cap},cpu", *options) as server:
            plan = server.json("status")[0]["plan"]
            devices = [s["device"] for s in plan["replicas"][0]["stages"]]
            said = [line for line in server.process.log().splitlines() if "are on the CPU" in line]
            answers = server.answers(prompts * COPIES)
        run.row("offload: stages", "on cuda:0 and cpu", ", ".join(devices), set(devices) == {"cuda:0", "cpu"})
        run.row("offload: the plan says so", "a sentence", said[0] if said else "none", said and plan["offload"])
        same = [answer == p["greedy_ids"] for answer, p in zip(answers, prompts * COPIES, strict=True)]
        run.row("offload: shakespeare", "transformers' tokens in all answers", f"in {sum(same)} of {len(same)}",
                all(same))


class Watched:
    """A long answer as it comes: when each token came, and how it ended."""

    def __init__(self, run, address, ids, count):
        command = [run.strata, "generate", "--address", address, "--json", "--ignore-eos", "--max-tokens", str(count),
                   "--token-ids", ",".join(map(str, ids))]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                      env=run.environment)
        self.times, self.indices, self.finished = [], [], False
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        for line in self.child.stdout:
            event = json.loads(line)
            if event["event"] == "tokens":
                self.times.append(time.monotonic())
                self.indices += range(event["index"], event["index"] + len(event["token_ids"]))
            self.finished = self.finished or event["event"] == "finished"

    def until(self, enough, seconds):
        """Waits until something holds."""
        end = time.monotonic() + seconds
        while not enough() and time.monotonic() < end and self.thread.is_alive():
            time.sleep(0.0005)
        return enough()

    def end(self, seconds):
        """What the client says of an answer that broke off."""
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.child.kill()
        self.child.wait()
        return " ".join(self.child.stderr.read().split())[-200:]


def kill(run, memory, tokens):
    """SIGKILL of either rank of an NCCL link while an answer streams, and of one with nobody else to notice."""
    models = run.work / "small"
    with run.checking("kill"):
        if not (models / "llama-1m").exists():
            models.mkdir(exist_ok=True)
            run.call("random-model", "llama-1m", models / "llama-1m")
        for victim, alone in ((1, False), (0, False), (0, True)):
            which = f"kill -9 of the {('first', 'last')[victim]} rank{', the coordinator stopped' if alone else ''}"
            with run.checking(which):
                kill_one(run, memory, tokens, models, victim, alone, which)


def kill_one(run, memory, tokens, models, victim, alone, which):
    workers = start(run, [f"cuda:0/0={memory}", f"cuda:0/1={memory}"], True, models)
    survivor = workers[1 - victim]
    try:
        with coordinate(run, workers, "llama-1m", "--split", "balanced", "--links", "nccl", "--dtype", "f32") as server:
            two_by("nccl", server)
            answer = Watched(run, server.address, [17, 33, 65], tokens)
            if not answer.until(lambda: len(answer.times) >= BEFORE_KILL, run.patience):
                raise Failure(f"no answer to break: {answer.end(1)}")
            if alone:
                kill_unseen(run, server, workers[victim], survivor, which)
            else:
                workers[victim].send(signal.SIGKILL)
            # Tokens that were on their way when the rank was killed may come after it.
            killed, seen = time.monotonic(), len(answer.times)
            goes_on = answer.until(lambda: len(answer.times) > seen + BEFORE_KILL or answer.finished, run.patience)
            said = answer.end(run.patience)
            stages = [f"{s['worker']}/{s['device']}" for s in server.stages()] if server.process.alive() else []
    finally:
        for one in workers:
            one.close()
    came = [killed, *answer.times[seen:]]
    gap = max((b - a for a, b in zip(came, came[1:])), default=0)
    run.row(f"{which}: the other one goes on with the next incarnation", f"after {LEAVES_WITHIN:.0f} s at most",
            f"{gap:.2f} s; now {', '.join(stages) or 'no plan'}" if goes_on else "never",
            goes_on and gap < LEAVES_WITHIN and len(stages) == 1)
    whole = answer.finished and answer.indices == list(range(tokens))
    run.row(f"{which}: the client", f"{tokens} tokens, none missing or twice",
            f"{len(answer.indices)} tokens{'' if answer.finished else f', then {said}'}", whole)


def kill_unseen(run, server, victim, survivor, which):
    """Kills a rank that holds a step back, while nobody tells the other one, which waits for it inside that step."""
    victim.send(signal.SIGSTOP)
    time.sleep(0.1)
    server.process.send(signal.SIGSTOP)
    victim.send(signal.SIGKILL)
    killed, left = time.monotonic(), None
    while left is None and survivor.alive() and time.monotonic() < killed + UNSEEN:
        if BROKE in survivor.log():
            left = time.monotonic() - killed
        time.sleep(0.005)
    server.process.send(signal.SIGCONT)
    got = f"{left:.2f} s" if left else f"nothing in its log for {UNSEEN} s" if survivor.alive() else "its process ended"
    run.row(f"{which}: the link notices", f"within {LEAVES_WITHIN:.0f} s, and its process goes on", got,
            left is not None and left < LEAVES_WITHIN and survivor.alive())
