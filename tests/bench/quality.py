"""What quantization costs: logit error and perplexity of the demo model in every format, and in llama.cpp's.

usage: python quality.py            (needs requirements.txt and a Rust toolchain; prints a table in Markdown)

The texts are sonnets, which the model was not trained on. Errors are against our own float32, which transformers agrees
with; a perplexity counts every token but the first of each text.
"""
import json
import pathlib
import subprocess
import tempfile

import numpy as np
from tokenizers import Tokenizer

import peer

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = ROOT / "tests" / "models" / "shakespeare"


def ours(texts, scratch):
    """Logits by format."""
    (scratch / "ids.json").write_text(json.dumps(texts))
    command = ["cargo", "bench", "--quiet", "-p", "strata-worker", "--bench", "logits", "--", MODEL,
               scratch / "ids.json", scratch]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    rows = sum(map(len, texts))
    return {name: np.fromfile(scratch / f"{name}.bin", "<f4").reshape(rows, -1)
            for name in ("f32", "bf16", "int8", "int4")}


def theirs(texts, scratch):
    """Logits by format, and the bits each has per weight."""
    source = scratch / "bf16.gguf"
    peer.convert(MODEL, source)
    logits, bits = {}, {}
    for name, label in (("bf16", "bf16"), ("int8", "Q8_0"), ("int4", "Q4_K_M")):
        path = scratch / f"{name}.gguf"
        if name != "bf16":
            peer.quantize(source, path, name)
        model = peer.Peer(path, threads=2, context=512)
        logits[label] = np.concatenate([model.logits(ids) for ids in texts])
        model.close()
        bits[label] = peer.bits_per_weight(path)
    return logits, bits


def perplexity(logits, texts):
    total, count, first = 0.0, 0, 0
    for ids in texts:
        rows = logits[first:first + len(ids) - 1].astype(np.float64)
        peak = rows.max(axis=1, keepdims=True)
        norm = peak[:, 0] + np.log(np.exp(rows - peak).sum(axis=1))
        total += (norm - rows[np.arange(len(rows)), ids[1:]]).sum()
        count += len(rows)
        first += len(ids)
    return np.exp(total / count)


def main():
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    sonnets = (HERE / "sonnets.txt").read_text().strip().split("\n\n")
    texts = [tokenizer.encode(sonnet).ids[:256] for sonnet in sonnets]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        strata = ours(texts, scratch)
        llama, bits = theirs(texts, scratch)
    exact = strata["f32"]
    spread = exact - exact.mean(axis=1, keepdims=True)
    print(f"{sum(map(len, texts))} tokens\n")
    print("| | perplexity | logit error, of their spread | same likeliest token | bits per weight |")
    print("|---|---|---|---|---|")
    rows = [(f"Strata {name}", logits, own) for (name, logits), own in zip(strata.items(), ("32", "16", "8.5", "4.5; 8.5 in the head"))]
    rows += [(f"llama.cpp {name}", logits, f"{bits[name]:.2f} in all") for name, logits in llama.items()]
    for name, logits, size in rows:
        error = np.sqrt(((logits - exact) ** 2).mean() / (spread ** 2).mean())
        same = (logits.argmax(axis=1) == exact.argmax(axis=1)).mean()
        print(f"| {name} | {perplexity(logits, texts):.3f} | {error:.2%} | {same:.1%} | {size} |")


main()
