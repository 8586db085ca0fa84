"""Speeds of a Llama of 8 B parameters with random weights on one GPU: beside what its memory and its matrix units allow,
and beside transformers on the same GPU.

A token of one stream reads all weights but the embedding once, in whatever format they are: the bytes of a copy per
second (read and written ones both count) say how fast that can be. Rates are tokens per second of wall time while the
middle half of all tokens came, so that beginnings and ends are not in them; each is measured twice.
"""
import json
import shutil
import statistics
import subprocess
import time

import kernels
import machine
from logits import Logits
from peer import Peer
from servers import Failure, Stop, serve

PROMPT, TOKENS, STREAMS, LONG = 32, 256, 32, 2048
# What is asked of each measurement.
ROOFLINE, BATCH, MATRIX, TIMES_TRANSFORMERS = 0.75, 25, 0.60, 3.0
TIMES_BF16 = {"int8": 1.6, "int4": 2.0}
FORMS = ("bf16", "int8", "int4")
SAMPLED = {
    "top-p": ["--temperature", 0.8, "--top-p", 0.95],
    "top-p and top-k": ["--temperature", 0.8, "--top-p", 0.95, "--top-k", 50],
}
LOAD_SECONDS = 100


class Writer:
    """Writes the model, unless it is there, while something else is done."""

    def __init__(self, run, shape):
        self.run, self.directory, self.child = run, run.work / shape, None
        self.unfinished = run.work / f"{shape}.unfinished"
        if not self.directory.exists():
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.child = subprocess.Popen([run.strata, "random-model", shape, self.unfinished], env=run.environment,
                                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            run.processes.append(self)

    def config(self):
        """Waits until it is there."""
        if self.child is not None:
            begun = time.monotonic()
            _, errors = self.child.communicate(timeout=self.run.within(LOAD_SECONDS))
            if self.child.returncode:
                raise Stop(f"random-model: {errors.strip()[-300:]}")
            self.unfinished.rename(self.directory)
            self.run.row("speed: waited for the model to be written", "-", f"{time.monotonic() - begun:.1f} s", None)
        return json.loads((self.directory / "config.json").read_text())

    def close(self):
        if self in self.run.processes:
            self.run.processes.remove(self)
            self.child.kill()
            self.child.wait()


def measure(run, shape, device):
    """All of it, in the order of how much the figures are wanted."""
    writer, peer = Writer(run, shape), Peer(run, device)
    with machine.watched(run):
        # Nothing but this uses the GPU: torch is still being imported, and the model is written by the CPU.
        ours, best = kernels.ours(run, shape, device)
        measured = {"ours": best} | kernels.rates(run, peer)
        config = writer.config()
        kernels.torchs(run, peer, config, ours)
        speeds(run, peer, writer.directory, device, config, measured)


def speeds(run, peer, directory, device, config, measured):
    ours, logits = {}, Logits(config)
    for form in FORMS:
        with run.checking(f"speed {form}"):
            # Torch loads while the first server does.
            loads = form == "bf16" and peer.there()
            if loads:
                peer.begin("load", model=str(directory))
            before = machine.used()
            with fast(run, directory, device, form) as server:
                run.row(f"speed {form}: start", "-",
                        f"{server.process.seconds:.1f} s; {machine.mebibytes(before)} of the GPU in use before, "
                        f"{machine.mebibytes(machine.used())} now", None)
                if loads:
                    with run.checking("speed: torch loads the model"):
                        peer.end(LOAD_SECONDS)
                    with run.checking("logits bf16"):
                        logits.ask_bf16(server)
                        logits.beside_torch(run, peer)
                elif form == "bf16":
                    logits.ask_bf16(server)
                one = Format(run, server, form, config, measured, ours.get("bf16", {}))
                ours[form] = one.found
                one.decoding()
                with run.checking(f"speed {form}: prompts"):
                    one.prompts()
                if form != "bf16":
                    with run.checking(f"logits {form}"):
                        logits.beside_bf16(run, server, form)
                with run.checking(f"speed {form}: long contexts"):
                    one.contexts()
                if form == "bf16":
                    with run.checking(f"speed {form}: sampled streams"):
                        one.sampled()
            run.row(f"speed {form}: end", "-", f"{machine.mebibytes(machine.used())} of the GPU in use", None)
    if peer.there() and ours.get("bf16"):
        beside_transformers(run, peer, ours["bf16"])


def fast(run, directory, device, form):
    # A prompt is one step here: its rate is asked for, and nobody else waits.
    quantize = [] if form == "bf16" else ["--quantize", form]
    return serve(run, directory, "--devices", device, "--dtype", "bf16", "--no-prefix-cache", "--max-step-tokens", LONG,
                 "--prefill-chunk", LONG, *quantize, load=LOAD_SECONDS)


def operations(shape, tokens):
    """Of a prompt: twice the weights of its layers for each token, the head once, and what attention multiplies."""
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    attention = 2 * width * (width + width // shape["num_attention_heads"] * shape["num_key_value_heads"])
    weights = layers * (attention + 3 * width * shape["intermediate_size"])
    scores = layers * 4 * width * tokens * (tokens + 1) // 2
    return 2 * weights * tokens + scores + 2 * width * shape["vocab_size"]


class Format:
    """A server in one format, and the rates that it reached, by number of streams."""

    def __init__(self, run, server, form, shape, measured, bf16):
        self.run, self.server, self.form, self.shape, self.bf16, self.found = run, server, form, shape, bf16, {}
        status = server.json("status")[0]
        device = status["members"][0]["devices"][0]
        best = max(r["flops_per_second"] for r in device["rates"])
        self.copy = measured.get("copy", device["bytes_per_second"])
        # The fastest product that is known of this GPU, whosever it is.
        self.matrix = max(best, measured["ours"], measured.get("product", 0))
        if form == "bf16":
            run.row("strata: a copy, and its best product", "-",
                    f"{device['bytes_per_second'] / 1e12:.3f} TB/s, {max(best, measured['ours']) / 1e12:.0f} TFLOP/s; what "
                    f"follows is beside {self.copy / 1e12:.3f} TB/s, {self.matrix / 1e12:.0f} TFLOP/s", None)
        weights = sum(s["weight_bytes"] for s in status["plan"]["replicas"][0]["stages"])
        # No token reads the embedding, which is held in 16 bits, or in 8 with a factor of 16 bits for 32 values.
        embedding = shape["vocab_size"] * shape["hidden_size"]
        self.read = weights - (2 * embedding if form == "bf16" else embedding * 17 // 16)
        head = shape["hidden_size"] // shape["num_attention_heads"]
        self.kv = 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head
        self.span = machine.Span(run)

    def rate(self, streams, prompt, tokens, *sampling):
        """Steady tokens per second of two rounds: their mean, and how to write it."""
        reports = self.server.bench("--concurrency", f"{streams},{streams}", "--requests", streams, "--prompt-tokens", prompt,
                                    "--max-tokens", tokens, *sampling, seconds=60)
        rates = [r["steady_tokens_per_second"] for r in reports]
        if min(rates) <= 0:
            raise Failure(f"rates of {rates} tokens per second")
        mean = statistics.mean(rates)
        first, gap = (statistics.median(r[k]["p50"] for r in reports) for k in ("first_token_ms", "inter_token_ms"))
        return mean, (f"{mean:.1f} tokens/s (rounds {', '.join(f'{r:.1f}' for r in rates)}; first token {first:.1f} ms, then "
                      f"{gap:.2f} ms)")

    def decoding(self):
        """One stream beside what the memory allows, many beside one."""
        run, form = self.run, self.form
        one, said = self.rate(1, PROMPT, TOKENS)
        self.found[1] = one
        # In the middle of the answer so many tokens are in the cache.
        most = self.copy / (self.read + self.kv * (PROMPT + TOKENS // 2))
        got = f"{one / most:.1%} of {most:.1f}; {said}"
        if form == "bf16":
            run.row(f"speed {form}: one stream, of what a copy's speed allows", f">= {ROOFLINE:.0%}", got,
                    one / most >= ROOFLINE)
        else:
            times = one / self.bf16.get(1, float("inf"))
            run.row(f"speed {form}: one stream, beside bf16", f">= {TIMES_BF16[form]}", f"{times:.2f}; {got}",
                    times >= TIMES_BF16[form])
        many, said = self.rate(STREAMS, PROMPT, TOKENS)
        self.found[STREAMS] = many
        if form == "bf16":
            run.row(f"speed {form}: {STREAMS} streams, beside one", f">= {BATCH}", f"{many / one:.1f}; {said}",
                    many / one >= BATCH)
        else:
            times = many / self.bf16.get(STREAMS, float("inf"))
            run.row(f"speed {form}: {STREAMS} streams, beside bf16", ">= 1", f"{times:.2f}; {said}", times >= 1)
        run.row(f"speed {form}: the GPU meanwhile", "-", str(self.span), None)

    def prompts(self):
        """Prompts of 2048 and of the whole context."""
        context = self.shape["max_position_embeddings"]
        for length in (min(LONG, context - 1), context - 1)[:1 + (context > LONG)]:
            reports = self.server.bench("--concurrency", "1,1", "--requests", 3, "--prompt-tokens", length,
                                        "--max-tokens", 1, seconds=60)
            rounds = [r["first_token_ms"]["p50"] for r in reports]
            first = statistics.mean(rounds)
            rate = operations(self.shape, length) / first * 1e3
            asked = length <= LONG
            self.run.row(f"speed {self.form}: a prompt of {length}, of the best product's rate",
                         f">= {MATRIX:.0%}" if asked else "-",
                         f"{rate / self.matrix:.1%}; {first:.1f} ms (rounds {', '.join(f'{r:.1f}' for r in rounds)}), "
                         f"{length / first * 1e3:.0f} tokens/s, {rate / 1e12:.0f} TFLOP/s",
                         rate / self.matrix >= MATRIX if asked else None)

    def contexts(self):
        """Many streams at 2048 tokens, one at the end of the context."""
        context = self.shape["max_position_embeddings"]
        tokens = min(TOKENS, context // 8)
        for streams, prompt in ((STREAMS, min(LONG, context - tokens - 1)), (1, context - tokens - 1)):
            rate, said = self.rate(streams, prompt, tokens)
            most = streams * self.copy / (self.read + streams * self.kv * (prompt + tokens // 2))
            self.run.row(f"speed {self.form}: {streams} stream{'s' * (streams > 1)} at {prompt} tokens", "-",
                         f"{rate / most:.1%} of what a copy's speed allows; {said}", None)

    def sampled(self):
        """Streams whose tokens are drawn, beside greedy ones."""
        for streams in (1, STREAMS):
            for name, sampling in SAMPLED.items():
                rate, said = self.rate(streams, PROMPT, TOKENS // 2, *sampling)
                self.run.row(f"speed {self.form}: {streams} stream{'s' * (streams > 1)}, temperature and {name}", "-",
                             f"{rate / self.found[streams]:.2f} of greedy; {said}", None)


def beside_transformers(run, peer, ours):
    """`generate` of transformers: as it is, of which we are asked a multiple; and compiled, which is only told."""
    for way, compiled in (("eager", False), ("compiled, static cache", True)):
        for streams, rate in ours.items():
            what = f"speed bf16: {streams} stream{'s' * (streams > 1)}, beside transformers ({way})"
            with run.checking(what):
                rates = peer.ask("generate", 120, streams=streams, prompt=PROMPT, tokens=64 if not compiled else 128,
                                 compiled=compiled)["tokens_per_second"]
                times = rate / max(rates)
                run.row(what, "-" if compiled else f">= {TIMES_TRANSFORMERS}",
                        f"{times:.2f}; {', '.join(f'{r:.1f}' for r in rates)} tokens/s there, {rate:.1f} here",
                        None if compiled else times >= TIMES_TRANSFORMERS)
