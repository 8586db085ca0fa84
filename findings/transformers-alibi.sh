#!/usr/bin/env bash
# ALiBi in transformers, twice otherwise than its configuration says. A Falcon with `alibi: true` gives other logits under eager
# attention than under sdpa, which is its default: eager adds the biases twice, once in the mask and once to the scores. And an MPT's
# `attn_config.alibi_bias_max`, which says how steep the slopes are, is read, kept, and changes nothing.
#
# Guess before it was run: eager and sdpa agree within rounding, as they do for a Falcon without ALiBi; another alibi_bias_max gives
# other logits.
# Seen: transformers 5.24.0 with torch 2.15.0, as said (0.04 beside 7e-7; 0).
#
# Needs Python 3 with venv, the package index, and 6 GB below the temporary folder, since transformers needs torch. Fails if any of
# this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import sys

import torch
from transformers import FalconConfig, FalconForCausalLM, MptConfig, MptForCausalLM

IDS = torch.arange(1, 13)[None]


def logits(cls, config, implementation):
    """Of a model whose weights depend on nothing but its shape."""
    model = cls._from_config(config, attn_implementation=implementation).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
        return model(IDS).logits


def falcon(alibi):
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=alibi,
                          multi_query=False, parallel_attn=False)
    eager, sdpa = (logits(FalconForCausalLM, config, implementation) for implementation in ("eager", "sdpa"))
    return (eager - sdpa).abs().max().item()


def mpt(bias_max):
    attention = dict(alibi=True, alibi_bias_max=bias_max)
    config = MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, attn_config=attention)
    assert config.attn_config.alibi_bias_max == bias_max
    return logits(MptForCausalLM, config, "eager")


print(*(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")))
with_alibi, without = falcon(True), falcon(False)
print(f"Falcon, eager against sdpa: {with_alibi:.2g} with ALiBi, {without:.2g} without")
steeper = (mpt(8) - mpt(16)).abs().max().item()
print(f"MPT, alibi_bias_max 8 against 16: {steeper:.2g}")
if not (with_alibi > 1e-3 and without < 1e-4 and steeper == 0):
    sys.exit("this has changed")
PY
