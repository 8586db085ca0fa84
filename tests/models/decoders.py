"""More small decoders for make_fixtures.py: configurations, formats, and how some files are changed once they are written.

Each has unusual but valid values: grouped queries, heads that are not hidden / heads wide, windows that are shorter than
the longest prompt, factors that are not 1.
"""
import json

import torch
from safetensors.torch import load_file, save_file

SMALL = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=12, tie_word_embeddings=False)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
F32, BF16 = torch.float32, torch.bfloat16


def of(model_type, without=(), **changes):
    """The small configuration of a family."""
    return {k: v for k, v in {"model_type": model_type, **SMALL, **changes}.items() if k not in without}


# name: (configuration, storage format, largest shard)
FIXTURES = {
    # What model cards say to add stands beside what transformers 5 wrote.
    "qwen3-yarn-beside-bf16": (of("qwen3", num_attention_heads=2, num_key_value_heads=1), BF16, "1GB"),
    # A range that is not cut to whole dimensions, and a sharpening of its own.
    "llama-yarn-f32": (of("llama", rope_parameters=dict(YARN, truncate=False, mscale=0.7, mscale_all_dim=0.3)),
                       F32, "1GB"),
    # Windows where layer_types lists them only.
    "ministral-windows-f32": (of("mistral", sliding_window=13, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"]), F32, "1GB"),
    # Experts as transformers 5 holds them: all of a layer in one tensor.
    "mixtral-fused-f32": (of("mixtral", num_local_experts=5, num_experts_per_tok=2, intermediate_size=20,
                            num_hidden_layers=2), F32, "1GB"),
    "qwen3-moe-fused-bf16": (of("qwen3_moe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20,
                                norm_topk_prob=True, mlp_only_layers=[1]), BF16, "1GB"),
}


def saved_as(name):
    """How save_pretrained writes it."""
    return dict(save_original_format=False) if "-fused-" in name else {}


def set_fields(path, **fields):
    config = json.loads((path / "config.json").read_text())
    config.update(fields)
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def edit(name, path):
    """Changes a directory before transformers reads it again."""
    if name == "qwen3-yarn-beside-bf16":
        set_fields(path, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64))
