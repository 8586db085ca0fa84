"""Every model of tests/models in every format, on a GPU beside this binary's CPU path.

Every answer is followed along one path, transformers' greedy ids in float32: where a token differs, the next is asked
for with transformers' token in its place. So all formats and devices are compared in the same contexts.

What may differ: in float32 nothing but the last bits. In another format, two devices that round independently are apart
by √2 times what either is from the exact values. What rounding does to a model is taken from the CPU: its own error in
that format against float32. Twice that, and a floor for models that round to next to nothing, is allowed. Both devices
hold the same quantized weights and differ by what they make of activations, which is eight bits at least: so int4 is
allowed what int8 is. Where a token's experts are chosen, rounding may choose another one of two that are nearly even,
and all that follows in that answer is another computation: models with experts are compared by the median place.
"""
import concurrent.futures
import json
import math
import statistics
import threading

from servers import coordinate, expectations, worker

FORMATS = {
    "f32": ["--dtype", "f32"],
    "bf16": ["--dtype", "bf16"],
    "f16": ["--dtype", "f16"],
    "int8": ["--dtype", "bf16", "--quantize", "int8"],
    "int4": ["--dtype", "bf16", "--quantize", "int4"],
}
CANDIDATES = 20
# Of logits, or log-probabilities, against transformers in float32.
TOLERANCE = 1e-3
# Relative errors.
EXACT = 1e-4
FLOOR = 1e-3
# A GPU takes another token only where the CPU's two best are nearly even, or where an expert's share was.
AGREEMENT = {"f32": 1.0, "bf16": 0.9, "f16": 0.9, "int8": 0.9, "int4": 0.85}

LOCAL = threading.local()


def spread(row):
    """Of logits."""
    return statistics.pstdev(row)


def log_softmax(row):
    most = max(row)
    total = most + math.log(sum(math.exp(x - most) for x in row))
    return [x - total for x in row]


def norm(values):
    return math.sqrt(sum(x * x for x in values))


class Decoder:
    """What is asked of a decoder, and how answers are compared: by position, a token and the likeliest ones' scores."""

    def __init__(self, prompts, of_logits=None, experts=False):
        self.prompts, self.experts = prompts, experts
        self.spread = of_logits or statistics.mean(spread(p["last_row"]) for p in prompts)

    def ask(self, server):
        with concurrent.futures.ThreadPoolExecutor(len(self.prompts)) as pool:
            return [place for places in pool.map(lambda p: self.follow(server, p), self.prompts) for place in places]

    @staticmethod
    def follow(server, prompt):
        found, path = [], prompt["greedy_ids"]
        while len(found) < len(path):
            ids, tops = server.generate(prompt["ids"] + path[:len(found)], len(path) - len(found), CANDIDATES)
            for token, top in zip(ids, tops, strict=True):
                found.append((token, top))
                if token != path[len(found) - 1]:
                    break
        return found

    def error(self, got, want, exact=False):
        """Root mean square over the tokens that are among the likeliest of both, of the spread of the logits; with
        experts, unless `exact`, that of the median place."""
        places = []
        for (_, a), (_, b) in zip(got, want, strict=True):
            both = a.keys() & b.keys()
            if len(both) < CANDIDATES // 4:
                return math.inf
            places.append([(a[t] - b[t]) ** 2 for t in both])
        if self.experts and not exact:
            square = statistics.median(map(statistics.mean, places))
        else:
            square = statistics.mean(x for place in places for x in place)
        return math.sqrt(square) / self.spread

    def agreement(self, got, want):
        return statistics.mean(a == b for (a, _), (b, _) in zip(got, want, strict=True))

    def beside_transformers(self, got):
        """Largest difference of a log-probability at the end of a prompt; whether all tokens are the same."""
        worst, at = 0.0, 0
        for prompt in self.prompts:
            logs = log_softmax(prompt["last_row"])
            worst = max([worst, *(abs(x - logs[token]) for token, x in got[at][1].items())])
            at += len(prompt["greedy_ids"])
        path = [token for p in self.prompts for token in p["greedy_ids"]]
        return worst, path == [token for token, _ in got]


class Encoder:
    """The same for an encoder: vectors, logits of classes, or the likeliest tokens behind masks."""

    def __init__(self, inputs, directory):
        self.inputs = inputs
        name = json.loads((directory / "config.json").read_text())["architectures"][0]
        self.task = "fill-mask" if "masked" in inputs[0] else "classify" if "Classification" in name else "embed"
        self.spread = statistics.mean(spread(row) for i in inputs for row in i["values"])

    def ask(self, server):
        found = []
        for one in self.inputs:
            pair = ["--pair", one["pair"]] if one["pair"] is not None else []
            top = ["--top-k", CANDIDATES] if self.task == "fill-mask" else []
            answer = server.json(self.task, "--text", one["text"], *pair, *top)[0]
            if self.task == "embed":
                found.append(answer["values"])
            elif self.task == "classify":
                found.append([c["logit"] for c in sorted(answer["classes"], key=lambda c: c["index"])])
            else:
                found += [{c["token_id"]: math.log(c["score"]) for c in mask["candidates"]} for mask in answer["masks"]]
        return found

    def error(self, got, want, exact=False):
        if self.task == "fill-mask":
            squares = [(a[t] - b[t]) ** 2 for a, b in zip(got, want, strict=True) for t in a.keys() & b.keys()]
            return math.sqrt(statistics.mean(squares)) / self.spread if squares else math.inf
        apart = norm([x - y for a, b in zip(got, want, strict=True) for x, y in zip(a, b, strict=True)])
        return apart / norm([y for b in want for y in b])

    def beside_transformers(self, got):
        rows = [row for one in self.inputs for row in one["values"]]
        worst = 0.0
        for a, row in zip(got, rows, strict=True):
            if self.task == "fill-mask":
                logs = log_softmax(row)
                worst = max([worst, *(abs(x - logs[token]) for token, x in a.items())])
            else:
                worst = max([worst, *(abs(x - y) for x, y in zip(a, row, strict=True))])
        return worst, True


def here(run, name, start):
    """This thread's worker of that name, started anew if it has died."""
    workers = LOCAL.__dict__.setdefault("workers", {})
    if name not in workers or not workers[name].alive():
        if name in workers:
            workers[name].close()
        workers[name] = start()
    return workers[name]


def check(run, name, formats, device, memory):
    """One model; two workers per thread serve all that the thread checks."""
    directory = run.models / name
    prompts, inputs = expectations(directory)
    config = json.loads((directory / "config.json").read_text())
    experts = any(config.get(key) for key in ("num_local_experts", "num_experts"))
    model = Decoder(prompts, experts=experts) if prompts else Encoder(inputs, directory)

    def ask(where, form):
        # Without a GPU, another instruction set stands in for it: it rounds differently, too.
        spec, other = (f"{device}={memory}", []) if device != "cpu" else ("cpu", ["--isa", "portable"])
        start = ((lambda: worker(run, run.models, spec, None, *other)) if where == "gpu" else
                 (lambda: worker(run, run.models, "cpu", None, "--threads", 1)))
        with coordinate(run, [here(run, where, start)], name, "--no-prefix-cache", *FORMATS[form]) as server:
            return model.ask(server)

    cpu = {}

    def by_cpu(form):
        if form not in cpu:
            cpu[form] = ask("cpu", form)
        return cpu[form]

    for form in formats:
        with run.checking(f"parity {name} {form}"):
            gpu, rounded = ask("gpu", form), "int8" if form == "int4" else form
            error = model.error(gpu, by_cpu(form), exact=form == "f32")
            allowed = EXACT if form == "f32" else 2 * model.error(by_cpu(rounded), by_cpu("f32")) + FLOOR
            expected, got, ok = f"error <= {allowed:.2%}", f"{error:.4%}", error <= allowed
            if prompts:
                agree = model.agreement(gpu, by_cpu(form))
                expected += f", tokens >= {AGREEMENT[form]:.0%}"
                got += f", {agree:.1%}"
                ok = ok and agree >= AGREEMENT[form]
            if form == "f32":
                worst, same = model.beside_transformers(gpu)
                expected += f", transformers within {TOLERANCE}"
                got += f", {worst:.1e}{'' if same else ' and other tokens'}"
                ok = ok and worst < TOLERANCE and same
            run.row(f"parity {name} {form}", expected, got, ok)
