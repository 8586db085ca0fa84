"""Pipelines over every kind of link, layers that spill to the CPU, and the loss of a rank inside a step."""
import concurrent.futures
import json
import statistics
import subprocess
import threading
import time

from servers import Failure, coordinate, expectations, one_gpu_twice, serve, worker

# Each prompt is asked for so many times at once.
COPIES = 2
# A fixture's tokens are chosen with a margin, so that in float32 every split gives the same ones.
EXACT = ["--dtype", "f32", "--no-prefix-cache"]
MODELS = ("shakespeare", "llama-bias-f32", "gemma2-softcaps-f32", "qwen3-moe-f32")
# In 16 bits a split may compute a prompt in other chunks, and a near tie may fall otherwise.
AGREEMENT_16 = 0.9
LEAVES_WITHIN = 5.0
BEFORE_KILL = 40


def cases(run, gpus, memory):
    """Tasks: groups of links that the same workers can have."""
    # Parts of one GPU; two GPUs; a GPU and the CPU, either first.
    parts = (f"cuda:0/0={memory}", f"cuda:0/1={memory}")
    groups = [
        ("parts of one GPU", [",".join(parts)], False, ["device-copy", "loopback", "tcp"]),
        ("one GPU, two processes", list(parts), True, ["nccl", "tcp"]),
        ("GPU, then CPU", [f"cuda:0={memory},cpu"], False, ["loopback", "tcp"]),
        ("CPU, then GPU, two processes", ["cpu", f"cuda:0={memory}"], False, ["tcp"]),
    ]
    if gpus > 1:
        two = (f"cuda:0={memory}", f"cuda:1={memory}")
        groups += [
            ("two GPUs", [",".join(two)], False, ["device-copy", "nccl", "loopback", "tcp"]),
            ("two GPUs, two processes", list(two), False, ["nccl", "tcp"]),
        ]
    return [(pipeline, run, *group) for group in groups]


def start(run, devices, one_gpu, models=None):
    """Workers, all starting at once."""
    environment = [one_gpu_twice(rank) if one_gpu else None for rank in range(len(devices))]
    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(lambda d, e: worker(run, models or run.models, d, e), devices, environment))


def pipeline(run, what, devices, one_gpu, links):
    """Two stages, by each of some links: the tokens of one stage."""
    workers = []
    with run.checking(f"pipeline {what}"):
        workers = start(run, devices, one_gpu)
        for link in links:
            for name in MODELS:
                with run.checking(f"pipeline {what}, {link}: {name}"):
                    linked(run, what, workers, link, name)
            with run.checking(f"pipeline {what}, {link}: shakespeare in bf16"):
                rounded(run, what, workers, link)
    for one in workers:
        one.close()


def linked(run, what, workers, link, name):
    prompts, _ = expectations(run.models / name)
    with coordinate(run, workers, name, "--split", "balanced", "--links", link, *EXACT) as server:
        stages = server.stages()
        found = [s["link"] for s in stages[:-1]]
        if found != [link]:
            raise Failure(f"planned {len(stages)} stages with links {found}, not two by {link}")
        answers = server.answers(prompts * COPIES)
        same = [answer == p["greedy_ids"] for answer, p in zip(answers, prompts * COPIES, strict=True)]
        note = ""
        if name == "shakespeare":
            report = server.bench("--requests", 2, "--prompt-tokens", 8, "--max-tokens", 32)
            note = f", {report['inter_token_ms']['p50']:.2f} ms per token"
        run.row(f"pipeline {what}, {link}: {name}", "transformers' tokens in all answers",
                f"in {sum(same)} of {len(same)}{note}", all(same))


def rounded(run, what, workers, link):
    """In bf16, where it is the link that must not change anything."""
    prompts, _ = expectations(run.models / "shakespeare")
    options = ["--dtype", "bf16", "--no-prefix-cache"]
    with coordinate(run, workers[:1], "shakespeare", "--split", "auto", *options) as server:
        one = server.answers(prompts)
    with coordinate(run, workers, "shakespeare", "--split", "balanced", "--links", link, *options) as server:
        two = server.answers(prompts)
    share = statistics.mean(a == b for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    run.row(f"pipeline {what}, {link}: shakespeare in bf16", f"tokens of one stage >= {AGREEMENT_16:.0%}",
            f"{share:.1%}", share >= AGREEMENT_16)


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
    """SIGKILL of either rank of an NCCL link while an answer streams: the other one leaves the broken run."""
    models = run.work / "small"
    with run.checking("kill"):
        if not (models / "llama-1m").exists():
            models.mkdir(exist_ok=True)
            run.call("random-model", "llama-1m", models / "llama-1m")
        for victim, which in ((1, "last"), (0, "first")):
            with run.checking(f"kill -9 of the {which} rank"):
                kill_one(run, memory, tokens, models, victim, which)


def kill_one(run, memory, tokens, models, victim, which):
    workers = start(run, [f"cuda:0/0={memory}", f"cuda:0/1={memory}"], True, models)
    survivor = workers[1 - victim]
    try:
        with coordinate(run, workers, "llama-1m", "--split", "balanced", "--links", "nccl", "--dtype", "f32") as server:
            if [s["link"] for s in server.stages()] != ["nccl", None]:
                raise Failure(f"planned {server.stages()}")
            answer = Watched(run, server.address, [17, 33, 65], tokens)
            if not answer.until(lambda: len(answer.times) >= BEFORE_KILL, run.within(60)):
                raise Failure(f"no answer to break: {answer.end(1)}")
            workers[victim].kill()
            killed, seen = time.monotonic(), len(answer.times)
            left = []

            def leaves():
                # What it logs once its stage has left the run.
                while time.monotonic() < killed + 30 and survivor.alive():
                    if "the run of a stage broke" in survivor.log():
                        return left.append(time.monotonic() - killed)
                    time.sleep(0.005)

            watching = threading.Thread(target=leaves)
            watching.start()
            goes_on = answer.until(lambda: len(answer.times) > seen + BEFORE_KILL or answer.finished, run.within(60))
            said = answer.end(run.within(60))
            watching.join()
            stages = [f"{s['worker']}/{s['device']}" for s in server.stages()] if server.process.alive() else []
    finally:
        for one in workers:
            one.close()
    # Tokens that were on their way when the rank was killed may have come after it.
    gaps = [b - a for a, b in zip(answer.times[seen - 1:], answer.times[seen:])]
    gap = f"{max(gaps):.2f} s" if gaps and goes_on else "never again"
    run.row(f"kill -9 of the {which} rank: the other one leaves the run", f"within {LEAVES_WITHIN:.0f} s",
            f"{left[0]:.2f} s by its log" if left else "nothing in its log",
            None if not left and goes_on else bool(left) and left[0] < LEAVES_WITHIN)
    run.row(f"kill -9 of the {which} rank: it lives and takes the next generation", f"tokens within {LEAVES_WITHIN:.0f} s",
            f"{gap}; now {', '.join(stages) or 'no plan'}",
            goes_on and bool(gaps) and max(gaps) < LEAVES_WITHIN and len(stages) == 1)
    whole = answer.finished and answer.indices == list(range(tokens))
    run.row(f"kill -9 of the {which} rank: the client", f"{tokens} tokens, none missing or twice",
            f"{len(answer.indices)} tokens{'' if answer.finished else f', then {said}'}", whole)
