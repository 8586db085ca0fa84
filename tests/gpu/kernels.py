"""Kernels by themselves: what `strata kernels` measures, and torch's own products and attention at the same shapes."""
import json
import math
import subprocess
import threading

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
# Streams, queries of each, keys of each.
ATTENTION = [(1, 1, 2048), (1, 1, 8192), (32, 1, 512), (32, 1, 2048), (1, 2048, 2048), (1, 8192, 8192)]
SECONDS = 40


def ours(run, shape, device):
    """What `strata kernels` reports, line by line as it comes: shown, and as it is in OUT/kernels.json.

    Gives the microseconds of products in bf16, by name and rows, and the best rate of a product in bf16.
    """
    found, best, measured = {}, 0.0, 0
    with run.checking("kernels: strata"):
        command = [run.strata, "kernels", shape, "--json", "--device", device, "--seconds", str(SECONDS)]
        errors = run.work / "logs" / "kernels.txt"
        with errors.open("w") as log, (run.out / "kernels.json").open("w") as kept:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=run.environment)
            # It ends by itself, unless a kernel does not.
            watch = threading.Timer(run.within(SECONDS + 40), child.kill)
            watch.start()
            run.say("\nstrata kernels\n")
            for line in child.stdout:
                kept.write(line)
                one = json.loads(line)
                measured += "kernel" in one
                run.say(f"    {shown(one)}")
                best = max(best, one.get("flops_per_second", {}).get("bf16", 0))
                if one.get("format") == "bf16":
                    best = max(best, one["teraflops_per_second"] * 1e12)
                    found[one["kernel"].removeprefix("product "), one["rows"]] = one["microseconds"]
            status = child.wait()
            watch.cancel()
        run.say("\n| check | expected | got | |\n|---|---|---|---|")
        run.log("kernels", errors.read_text(errors="replace"))
        run.row("kernels: strata", "a report", f"{measured} kernels, ended with {status}", status == 0 and measured > 0)
    return found, best


def shown(found):
    """A line of the report for people: one that names no kernel is about the device, or what was left."""
    if "kernel" not in found:
        return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items())
    share = "-" if found["share"] is None else f"{found['share']:7.1%} of {found['bound']}"
    context = "" if found.get("context") is None else f"at {found['context']}"
    return (f"{found['kernel']:22} {found['format']:6} {found['shape']!s:>14} x {found['rows']:<5} {context:9} "
            f"{found['microseconds']:10.1f} us {found['gigabytes_per_second']:8.1f} GB/s "
            f"{found['teraflops_per_second']:8.2f} TFLOP/s {share}")


def shapes(config):
    """Inputs and outputs of a layer's products, and the head's, by name."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    return {"qkv": (width, width + 2 * kv), "attention out": (width, width), "gate and up": (width, 2 * inner),
            "down": (inner, width), "head": (width, config["vocab_size"])}


def rates(run, peer):
    """Bytes and operations per second, by torch; empty without it."""
    with run.checking("kernels: torch's copy and product"):
        if not peer.there():
            return {}
        found = peer.ask("rates", 60)
        run.row("torch: a copy, and a product of bf16 matrices", "-",
                f"{found['copy'] / 1e12:.3f} TB/s, {found['product'] / 1e12:.0f} TFLOP/s; {found['device']}, torch "
                f"{found['torch']}", None)
        return found
    return {}


def torchs(run, peer, config, ours):
    """Torch's products and attention at the same shapes, beside our products."""
    if not peer.there():
        return
    with run.checking("kernels: torch's products"):
        named = shapes(config)
        found = peer.ask("products", 60, shapes=list(named.values()), rows=ROWS)["products"]
        (run.out / "torch.json").write_text(json.dumps(found))
        run.say(f"\ntorch.mm in bf16, microseconds (TB/s of weights, TFLOP/s); ours\n\n| product | {' | '.join(map(str, ROWS))} |\n"
                f"|---|{'---|' * len(ROWS)}")
        for name, (k, n) in named.items():
            cells = [f"{1e6 * f['seconds']:.1f} ({2e-12 * k * n / f['seconds']:.2f}, "
                     f"{2e-12 * k * n * f['rows'] / f['seconds']:.0f}); {ours.get((name, f['rows']), math.nan):.1f}"
                     for f in found if (f["k"], f["n"]) == (k, n)]
            run.say(f"| {name} {k} x {n} | {' | '.join(cells)} |")
        run.say("\n| check | expected | got | |\n|---|---|---|---|")
    with run.checking("kernels: torch's attention"):
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        width = config["hidden_size"] // heads
        cases = [case for case in ATTENTION if case[2] <= config["max_position_embeddings"]]
        for f in peer.ask("attention", 40, cases=cases, heads=heads, kv_heads=kv_heads, width=width)["attention"]:
            streams, queries, keys = f["streams"], f["queries"], f["keys"]
            what = f"torch: attention, {streams} x {queries} queries, {keys} keys"
            if "error" in f:
                run.row(what, "-", f["error"], None)
                continue
            read = 4 * streams * keys * kv_heads * width
            work = 4 * streams * heads * width * (keys * queries / (2 if queries > 1 else 1))
            run.row(what, "-", f"{1e6 * f['seconds']:.1f} us, {read / f['seconds'] / 1e12:.2f} TB/s, "
                    f"{work / f['seconds'] / 1e12:.0f} TFLOP/s", None)
