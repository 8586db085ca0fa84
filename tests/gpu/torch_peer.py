"""What torch and transformers reach on this GPU: reads a question per line and answers each with a line, all JSON.

usage: python torch_peer.py cuda|cpu

With cpu everything is small: that tries the script.

Questions, by their `do`:
  rates       bytes per second of a copy (read and written ones both count), and operations per second of a product of
              random bf16 matrices of 8192 x 8192
  products    seconds of torch.mm in bf16, for each of `shapes` (inputs k, outputs n) and each of `rows`
  attention   seconds of scaled_dot_product_attention in bf16, for each of `cases` (streams, queries, keys)
  load        a model of transformers, in bf16 on the GPU
  score       log-probabilities of the `top` likeliest tokens of each of `sequences` (ids), from place `from` on, in
              bf16 and in float32
  generate    tokens per second of greedy decoding
"""
import gc
import json
import statistics
import sys
import time

import torch

DEVICE = sys.argv[1]
ON_GPU = DEVICE == "cuda"
ROUNDS = 5 if ON_GPU else 1
# Of a copy, of a side of the large product, and, so that caches do not hold them, of matrices that take turns.
COPY_BYTES, SIDE, TURNS_BYTES = (4 << 30, 8192, 512 << 20) if ON_GPU else (1 << 26, 256, 1 << 20)
MODEL = None


def seconds(run, least=0.02):
    """The median time of one run, over rounds that take a while."""
    run()
    times, found = 1, []
    while True:
        took = elapsed(run, times)
        if took >= least or times >= 1000:
            break
        times = min(1000, max(2 * times, int(times * least / max(took, 1e-6)) + 1))
    for _ in range(ROUNDS):
        found.append(elapsed(run, times) / times)
    return statistics.median(found)


def elapsed(run, times):
    if not ON_GPU:
        begun = time.monotonic()
        for _ in range(times):
            run()
        return time.monotonic() - begun
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def random(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def wait():
    if ON_GPU:
        torch.cuda.synchronize()


def rates():
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source))
    del source, target
    a, b = random(SIDE, SIDE), random(SIDE, SIDE)
    product = 2 * SIDE**3 / seconds(lambda: torch.mm(a, b))
    name = torch.cuda.get_device_name() if ON_GPU else "cpu"
    return {"device": name, "torch": torch.__version__, "copy": copy, "product": product}


def products(shapes, rows):
    found = []
    for k, n in shapes:
        weights = [random(n, k) for _ in range(max(1, TURNS_BYTES // (2 * n * k)))]
        for count in rows:
            x, turn = random(count, k), 0

            def run():
                nonlocal turn
                turn = (turn + 1) % len(weights)
                torch.mm(x, weights[turn].t())

            found.append({"k": k, "n": n, "rows": count, "seconds": seconds(run, 0.005)})
        del weights
        torch.cuda.empty_cache()
    return {"products": found}


def attention(cases, heads, kv_heads, width):
    found = []
    for streams, queries, keys in cases:
        q = random(streams, heads, queries, width)
        pairs = [(random(streams, kv_heads, keys, width), random(streams, kv_heads, keys, width))
                 for _ in range(max(1, min(64, TURNS_BYTES // (4 * streams * kv_heads * keys * width))))]
        turn = 0

        def run():
            nonlocal turn
            turn = (turn + 1) % len(pairs)
            torch.nn.functional.scaled_dot_product_attention(q, *pairs[turn], is_causal=queries > 1, enable_gqa=True)

        try:
            found.append({"streams": streams, "queries": queries, "keys": keys, "seconds": seconds(run, 0.005)})
        except RuntimeError as error:
            found.append({"streams": streams, "queries": queries, "keys": keys, "error": str(error)[:200]})
        del pairs
        torch.cuda.empty_cache()
    return {"attention": found}


def load(model):
    global MODEL
    import transformers

    transformers.logging.set_verbosity_error()
    MODEL = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(DEVICE).eval()
    return {"transformers": transformers.__version__, "bytes": torch.cuda.memory_allocated() if ON_GPU else 0}


def turn_into(dtype):
    """Layer by layer, so that there is never room for both kinds of all weights."""
    for part in (*MODEL.model.layers, MODEL.model.embed_tokens, MODEL.model.norm, MODEL.lm_head):
        part.to(dtype)
        torch.cuda.empty_cache()


@torch.inference_mode()
def rows_of(sequence, top):
    """Of each place from `from` - 1 on: the likeliest tokens' log-probabilities, and the spread of the logits."""
    ids = torch.tensor([sequence["ids"]], device=DEVICE)
    hidden = MODEL.model(input_ids=ids, use_cache=False).last_hidden_state[0, sequence["from"] - 1:-1]
    logits = MODEL.lm_head(hidden).float()
    best = torch.log_softmax(logits, -1).topk(min(top, logits.shape[-1]), -1)
    places = [dict(zip(map(str, ids), scores)) for ids, scores in zip(best.indices.tolist(), best.values.tolist())]
    return {"places": places, "spread": logits.std(-1).mean().item()}


def score(sequences, top):
    answer = {"bf16": [rows_of(s, top) for s in sequences]}
    # Products of float32 in float32, as reference.
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        turn_into(torch.float32)
        answer["f32"] = [rows_of(s, top) for s in sequences]
    except torch.OutOfMemoryError as error:
        answer["note"] = f"no float32 beside what else is on the GPU: {error}"[:200]
    finally:
        turn_into(torch.bfloat16)
    gc.collect()
    torch.cuda.empty_cache()
    return answer


def generate(streams, prompt, tokens, compiled):
    """Seconds by token after the first: how much longer the longer one of two answers takes."""
    options = {"cache_implementation": "static"} if compiled else {}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 250, (streams, prompt), generator=generator).to(DEVICE)

    def run(count):
        wait()
        begun = time.monotonic()
        with torch.inference_mode():
            out = MODEL.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                                 max_new_tokens=count, min_new_tokens=count, **options)
        wait()
        assert out.shape[1] == prompt + count
        return time.monotonic() - begun

    # The static cache is as long as the answer: with both lengths seen, nothing is prepared any more.
    run(tokens + 1), run(1)
    rates = [streams * tokens / (run(tokens + 1) - run(1)) for _ in range(2)]
    return {"tokens_per_second": rates}


QUESTIONS = {f.__name__: f for f in (rates, products, attention, load, score, generate)}


def main():
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = QUESTIONS[question.pop("do")](**question)
        except Exception as error:  # whoever asked decides what to do without an answer
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(answer), flush=True)


main()
