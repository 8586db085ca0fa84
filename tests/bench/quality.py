"""What quantization costs: logit error and perplexity of the demo model in every format, and in llama.cpp's.

usage: python quality.py            (needs requirements.txt and a Rust toolchain; prints a table in Markdown)

The texts are sonnets, which the model was not trained on, and texts of its own, drawn from its float32. Errors and
divergences are from our own float32, which transformers agrees with; a perplexity counts every token but the first of each
text.
"""
import json
import pathlib
import subprocess
import tempfile

import numpy as np
from tokenizers import Tokenizer

import peer
from ours import STRATA, Server, serve

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


def drawn(count, length):
    """Texts that the model writes at temperature 1."""
    server = Server([serve(MODEL, "bf16", "--dtype", "f32")])
    texts = []
    for seed in range(count):
        command = [STRATA, "generate", "--address", server.address, "--token-ids", "0", "--max-tokens", length,
                   "--temperature", 1, "--seed", seed, "--ignore-eos", "--json"]
        lines = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True).stdout.splitlines()
        texts.append([0] + json.loads(lines[-1])["token_ids"])
    server.close()
    return texts


def log_softmax(logits):
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def perplexity(logs, texts, first):
    """Of texts whose rows begin at `first`."""
    total, count = 0.0, 0
    for ids in texts:
        rows = logs[first:first + len(ids) - 1]
        total -= rows[np.arange(len(rows)), ids[1:]].sum()
        count += len(rows)
        first += len(ids)
    return np.exp(total / count)


def main():
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    sonnets = (HERE / "sonnets.txt").read_text().strip().split("\n\n")
    sonnets = [tokenizer.encode(sonnet).ids[:256] for sonnet in sonnets]
    own = drawn(16, 255)
    texts = sonnets + own
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        strata = ours(texts, scratch)
        llama, bits = theirs(texts, scratch)
    exact = strata["f32"]
    spread = exact - exact.mean(axis=1, keepdims=True)
    true = log_softmax(exact)
    begun = sum(map(len, sonnets))
    print(f"{begun} tokens of sonnets, {sum(map(len, own))} of its own\n")
    print("| | logit error, of their spread | divergence, millinats | same likeliest token | perplexity: sonnets | its own "
          "| bits per weight |")
    print("|---|---|---|---|---|---|---|")
    sizes = ("32", "16", "8.5", "5; 8.5 in the first layer and the head")
    rows = [(f"Strata {name}", logits, size) for (name, logits), size in zip(strata.items(), sizes)]
    rows += [(f"llama.cpp {name}", logits, f"{bits[name]:.2f} in all") for name, logits in llama.items()]
    for name, logits, size in rows:
        logs = log_softmax(logits)
        error = np.sqrt(((logits - exact) ** 2).mean() / (spread ** 2).mean())
        divergence = (np.exp(true) * (true - logs)).sum(axis=1).mean()
        same = (logits.argmax(axis=1) == exact.argmax(axis=1)).mean()
        print(f"| {name} | {error:.2%} | {1e3 * divergence:.3f} | {same:.1%} | {perplexity(logs, sonnets, 0):.3f} "
              f"| {perplexity(logs, own, begun):.3f} | {size} |")

main()
