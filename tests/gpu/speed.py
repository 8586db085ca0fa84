"""Speeds on one GPU, beside what its memory and its matrix units allow, and beside transformers on the same GPU.

The model has a known shape and random weights. A token of one stream reads all weights but the embeddings once: the
bytes of a copy per second (read and written ones both count) say how fast that can be.
"""
import importlib.util
import json
import pathlib
import subprocess
import sys
import threading

from servers import Failure, serve

PROMPT, TOKENS, STREAMS, LONG = 32, 128, 32, 2048
LOAD_SECONDS = 240
# What is asked of each measurement.
ROOFLINE, BATCH, MATRIX, TIMES_INT8, TIMES_INT4, TIMES_TRANSFORMERS = 0.70, 15, 0.50, 1.5, 2.0, 3.0
PEER = pathlib.Path(__file__).parent / "torch_peer.py"


def start_writing(run, shape):
    """Begins to write the model, unless it is there; the directory, and what to wait for."""
    directory = run.work / shape
    unfinished = run.work / f"{shape}.unfinished"
    if directory.exists():
        return directory, None
    subprocess.run(["rm", "-rf", str(unfinished)], check=True)
    return directory, subprocess.Popen([run.strata, "random-model", shape, str(unfinished)], env=run.environment,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure(run, writing):
    """All of it, in the order of how much the figures are wanted."""
    directory, writer = writing
    with run.checking("bench: a model with random weights"):
        if writer is not None:
            if writer.wait(run.within(LOAD_SECONDS)):
                raise Failure(f"random-model ended with {writer.returncode}")
            (run.work / f"{directory.name}.unfinished").rename(directory)
        shape = json.loads((directory / "config.json").read_text())
        measured = rates(run)
        ours = {}
        for form in ("bf16", "int8", "int4"):
            with run.checking(f"bench {form}"):
                ours[form] = one(run, directory, form, shape, measured, ours.get("bf16"))
        if "bf16" in ours:
            with run.checking("bench: transformers"):
                transformers(run, directory, ours["bf16"])


def rates(run):
    """Bytes and operations per second, by torch if it is there."""
    if importlib.util.find_spec("torch") is None:
        return {}
    done = subprocess.run([sys.executable, PEER, "rates"], capture_output=True, text=True, timeout=run.within(60))
    if done.returncode:
        run.say(f"torch measures nothing here: {done.stderr.strip()[-200:]}")
        return {}
    return json.loads(done.stdout)


def operations(shape, tokens):
    """Of a prompt: twice the weights of its layers for each token, the head once, and what attention multiplies."""
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    attention = 2 * width * (width + width // shape["num_attention_heads"] * shape["num_key_value_heads"])
    weights = layers * (attention + 3 * width * shape["intermediate_size"])
    scores = layers * 4 * width * tokens * (tokens + 1) // 2
    return 2 * weights * tokens + scores + 2 * width * shape["vocab_size"]


def one(run, directory, form, shape, measured, bf16):
    """One format; tokens per second by number of streams."""
    quantize = [] if form == "bf16" else ["--quantize", form]
    with fast(run, directory, quantize) as server:
        status = server.json("status")[0]
        device = status["members"][0]["devices"][0]
        copy = measured.get("copy", device["bytes_per_second"])
        best = max(r["flops_per_second"] for r in device["rates"])
        matrix = measured.get("product", best)
        by = measured.get("device", "by strata's own measurement")
        if bf16 is None:
            run.row("bench: a copy, and a product of bf16 matrices", "-",
                    f"{copy / 1e12:.2f} TB/s, {matrix / 1e12:.0f} TFLOP/s ({by}); strata itself measures "
                    f"{device['bytes_per_second'] / 1e12:.2f} TB/s, {best / 1e12:.0f} TFLOP/s", None)
        weights = sum(s["weight_bytes"] for s in status["plan"]["replicas"][0]["stages"])
        read = weights - 2 * shape["vocab_size"] * shape["hidden_size"] * (form == "bf16")
        streams = {}
        for count, requests in ((1, 3), (STREAMS, STREAMS)):
            report = server.bench("--concurrency", count, "--requests", requests, "--prompt-tokens", PROMPT,
                                  "--max-tokens", TOKENS, seconds=120)
            streams[count] = count * 1e3 / report["inter_token_ms"]["p50"]
        share = streams[1] * read / copy
        got = f"{streams[1]:.1f} tokens/s, {share:.1%} of {copy / read:.0f}"
        if bf16 is None:
            run.row(f"bench {form}: one stream, of what a copy's speed allows", f">= {ROOFLINE:.0%}", got,
                    share >= ROOFLINE)
        else:
            times, least = streams[1] / bf16[1], TIMES_INT8 if form == "int8" else TIMES_INT4
            run.row(f"bench {form}: one stream, beside bf16", f">= {least}", f"{times:.2f}; {got}", times >= least)
        ratio = streams[STREAMS] / streams[1]
        run.row(f"bench {form}: {STREAMS} streams, of one", f">= {BATCH}" if bf16 is None else "-",
                f"{ratio:.1f}; {streams[STREAMS]:.0f} tokens/s", ratio >= BATCH if bf16 is None else None)
        # Small shapes have a context of no more than that, and one token is to come.
        long = min(LONG, shape["max_position_embeddings"] - 1)
        report = server.bench("--requests", 4, "--prompt-tokens", long, "--max-tokens", 1)
        first = report["first_token_ms"]["p50"]
        rate = operations(shape, long) / first * 1e3
        run.row(f"bench {form}: a prompt of {long}, of the product's rate",
                f">= {MATRIX:.0%}" if bf16 is None else "-",
                f"{rate / matrix:.1%}; {first:.1f} ms, {long / first * 1e3:.0f} tokens/s, {rate / 1e12:.0f} TFLOP/s",
                rate / matrix >= MATRIX if bf16 is None else None)
        return streams


def fast(run, directory, quantize):
    # A prompt is one step here: its rate is asked for, and nobody else waits.
    return serve(run, directory, "--devices", "cuda:0", "--dtype", "bf16", "--no-prefix-cache",
                 "--max-step-tokens", LONG, "--prefill-chunk", LONG, *quantize)


def transformers(run, directory, ours):
    """`generate` of transformers, as far as it gets in the time that is left."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return run.say("torch or transformers is not here: nothing to compare with")
    command = [sys.executable, str(PEER), "generate", str(directory), "--prompt", str(PROMPT), "--tokens", str(TOKENS)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    best, errors = {}, []

    def read():
        for line in child.stdout:
            found = json.loads(line)
            if "tokens_per_second" in found:
                rate, streams = found["tokens_per_second"], found["streams"]
                run.say(f"transformers, {found['way']}, {streams} streams: {rate:.1f} tokens/s")
                best[streams] = max(best.get(streams, 0), rate)
            elif "error" in found:
                run.say(f"transformers, {found['way']}, {found['streams']} streams: {found['error']}")

    reader = threading.Thread(target=read)
    drain = threading.Thread(target=lambda: errors.append(child.stderr.read()))
    reader.start()
    drain.start()
    try:
        child.wait(run.within(300))
    except subprocess.TimeoutExpired:
        run.say("transformers: stopped, as its time was up")
    finally:
        child.kill()
        child.wait()
        reader.join()
        drain.join()
        run.log("transformers", errors[0])
    for count, rate in ours.items():
        times = rate / best[count] if count in best else 0
        run.row(f"bench bf16: {count} stream{'s' * (count > 1)}, beside transformers' best",
                f">= {TIMES_TRANSFORMERS}", f"{times:.2f}; {rate:.1f} and {best.get(count, 0):.1f} tokens/s",
                times >= TIMES_TRANSFORMERS)
