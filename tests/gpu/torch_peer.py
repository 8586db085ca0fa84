"""What torch and transformers reach on this GPU: one JSON object per line.

usage: python torch_peer.py rates
       python torch_peer.py generate MODEL_DIR --streams 1,32 --prompt 32 --tokens 128

`rates`: bytes per second of a copy (read and written ones both count), and operations per second of a product of random
bf16 matrices. `generate`: tokens per second of transformers' greedy decoding in bf16, of one way to run it after the
other, the quickest to prepare first; whoever reads this may stop when time is up.
"""
import argparse
import json
import time

import torch

ROUNDS = 5


def say(**fields):
    print(json.dumps(fields), flush=True)


def seconds(run, times):
    """The median time of one of so many runs after each other."""
    run()
    found = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / times)
    return sorted(found)[ROUNDS // 2]


def copy():
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 5)


def product():
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: torch.mm(a, b), 10)


def rates():
    say(device=torch.cuda.get_device_name(), torch=torch.__version__, copy=copy(), product=product())


def generate(arguments):
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).to("cuda").eval()
    say(transformers=transformers.__version__, loaded=True)
    generator = torch.Generator().manual_seed(0)
    ways = {
        "dynamic cache": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "static cache, compiled": {"cache_implementation": "static"},
    }
    for name, options in ways.items():
        for streams in arguments.streams:
            ids = torch.randint(10, 250, (streams, arguments.prompt), generator=generator).to("cuda")

            def run(tokens):
                torch.cuda.synchronize()
                begun = time.monotonic()
                with torch.inference_mode():
                    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                                         max_new_tokens=tokens, min_new_tokens=tokens, **options)
                torch.cuda.synchronize()
                assert out.shape[1] == arguments.prompt + tokens
                return time.monotonic() - begun

            try:
                # The static cache is as long as the answer: with both lengths seen, nothing is prepared any more.
                run(arguments.tokens + 1), run(1)
                took = min(run(arguments.tokens + 1) for _ in range(2)) - min(run(1) for _ in range(2))
                say(way=name, streams=streams, tokens_per_second=streams * arguments.tokens / took)
            except Exception as error:
                say(way=name, streams=streams, error=f"{type(error).__name__}: {error}"[:300])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("rates", "generate"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("--streams", type=lambda s: [int(n) for n in s.split(",")], default=[1, 32])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    rates() if arguments.what == "rates" else generate(arguments)


main()
