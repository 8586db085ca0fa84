"""Make the small fixtures: seeded random models of every family and style of checkpoint, with transformers' own outputs.

usage: python make_fixtures.py [OUT_DIR [NAME…]]        (needs requirements.txt; OUT_DIR defaults to this directory)

Expected outputs are float32 logits and greedy continuations of the model as it was reloaded from disk, so that the
storage format's rounding counts. Seeds of models and prompts are searched until every greedy choice has a clear
margin between the best two logits. The first prompt of each model is BOS alone.
"""
import json
import pathlib
import random
import shutil
import sys

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

import decoders as more

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
CONTEXT, VOCAB, MARGIN, NEW_TOKENS, LENGTHS, LARGEST = 256, 320, 0.02, 24, (1, 5, 20, 90), 700_000
TEXT = [
    "A stage holds a few layers, and the next stage holds the layers after them.",
    "The coordinator counts every byte before a single one is loaded.",
    "When a worker dies, another takes its layers, and the answer goes on.",
]
COMMON = dict(max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1, pad_token_id=2, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)

# name: (configuration, storage format, largest shard)
FIXTURES = {
    # Odd sizes, grouped queries, head_dim that is not hidden / heads, biases everywhere, a list of eos ids.
    "llama-bias-f32": (dict(
        vocab_size=330, hidden_size=36, intermediate_size=54, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
        eos_token_id=[1, 5]), torch.float32, "1GB"),
    # Tied, one key-value head, linear rope scaling in version 5's style, several shards with an index.
    "llama-linear-bf16": (dict(
        vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)), torch.bfloat16, "60KB"),
    # llama3 rope scaling, no grouping, configuration in version 4's style.
    "llama3-rope-f16": (dict(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, tie_word_embeddings=False,
        rope_parameters=dict(rope_theta=500000.0, **LLAMA3)), torch.float16, "1GB"),
    # As old files are: no head_dim, `type` instead of `rope_type`, no base prefix, left-over rotary tensors.
    "llama-v4-legacy": (dict(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)), torch.float32, "1GB"),
    # A window that is shorter than the longest prompt and no multiple of a cache block.
    "mistral-window-bf16": (dict(
        model_type="mistral", vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, sliding_window=21, tie_word_embeddings=False),
        torch.bfloat16, "1GB"),
    # Biases on queries, keys and values alone; windows from the third layer on; tied.
    "qwen2-windows-f32": (dict(
        model_type="qwen2", vocab_size=320, hidden_size=40, intermediate_size=72, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=18, max_window_layers=2,
        tie_word_embeddings=True), torch.float32, "1GB"),
    # Norms on queries and keys, head_dim that is not hidden / heads.
    "qwen3-norms-bf16": (dict(
        model_type="qwen3", vocab_size=320, hidden_size=48, intermediate_size=72, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=20, tie_word_embeddings=False), torch.bfloat16, "1GB"),
    # Experts in every layer, and a window.
    "mixtral-bf16": (dict(
        model_type="mixtral", vocab_size=320, hidden_size=40, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, num_local_experts=5, num_experts_per_tok=2,
        sliding_window=19, tie_word_embeddings=False), torch.bfloat16, "60KB"),
    # A dense layer between layers of experts, whose shares add up to 1; the experts are narrower than the dense block.
    "qwen3-moe-f32": (dict(
        model_type="qwen3_moe", vocab_size=320, hidden_size=32, intermediate_size=56, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, num_experts=6, num_experts_per_tok=3,
        moe_intermediate_size=20, norm_topk_prob=True, mlp_only_layers=[2], tie_word_embeddings=False),
        torch.float32, "1GB"),
    # Windows on every second layer, bounds low enough to matter, a scale that is not that of head_dim.
    "gemma2-softcaps-f32": (dict(
        model_type="gemma2", vocab_size=320, hidden_size=40, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, sliding_window=17, query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0, final_logit_softcapping=8.0), torch.float32, "1GB"),
    # Every third layer global, with scaled rotation; local layers turn by another base.
    "gemma3-local-bf16": (dict(
        model_type="gemma3_text", vocab_size=320, hidden_size=48, intermediate_size=72, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, sliding_window=13, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1000000.0),
                             sliding_attention=dict(rope_type="default", rope_theta=10000.0))),
        torch.bfloat16, "1GB"),
    # As phi-2: parallel, a part of each head turns, biases everywhere, the head's too.
    "phi-parallel-f16": (dict(
        model_type="phi", vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)),
        torch.float16, "1GB"),
    # Layer norms on the heads of queries and keys; grouped.
    "phi-norms-f32": (dict(
        model_type="phi", vocab_size=320, hidden_size=40, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, qk_layernorm=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.4)), torch.float32, "1GB"),
    # Fused products; prompts and answers cross the length at which the rotation changes; a part of each head turns.
    "phi3-longrope-f32": (dict(
        model_type="phi3", vocab_size=320, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, original_max_position_embeddings=32,
        rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.67,
                             short_factor=[1.0, 1.05, 1.1, 1.4], long_factor=[1.0, 1.9, 3.4, 7.5])),
        torch.float32, "1GB"),
    # Scores scaled by layer, an inner width that is not four times the outer; tied.
    "gpt2-scaled-f32": (dict(
        model_type="gpt2", vocab_size=320, hidden_size=40, n_inner=72, num_hidden_layers=4, num_attention_heads=4,
        scale_attn_by_inverse_layer_idx=True), torch.float32, "1GB"),
    # As old files are: no prefix, masks beside the weights; scores not scaled at all.
    "gpt2-old-bf16": (dict(
        model_type="gpt2", vocab_size=320, hidden_size=40, num_hidden_layers=5, num_attention_heads=4, n_inner=64,
        scale_attn_weights=False), torch.bfloat16, "1GB"),
    "neox-parallel-bf16": (dict(
        model_type="gpt_neox", vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=4,
        num_attention_heads=4, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.34)),
        torch.bfloat16, "1GB"),
    # No biases in attention, another base, and one block after the other.
    "neox-sequential-f32": (dict(
        model_type="gpt_neox", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new",
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=1.0)), torch.float32, "1GB"),
    # Whole groups of 32 in every product, experts' too: all of them can be int8 or int4. Whole slabs of 16 in every head.
    "mixtral-groups-bf16": (dict(
        model_type="mixtral", vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False), torch.bfloat16, "1GB"),
    # The same, with more and narrower experts, norms on heads, and a dense layer.
    "qwen3-moe-groups-f16": (dict(
        model_type="qwen3_moe", vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, head_dim=32, num_experts=8, num_experts_per_tok=3,
        moe_intermediate_size=64, norm_topk_prob=True, mlp_only_layers=[1], tie_word_embeddings=False),
        torch.float16, "1GB"),
    # Norms on both sides.
    "gemma2-groups-bf16": (dict(
        model_type="gemma2", vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=17, query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0, final_logit_softcapping=8.0), torch.bfloat16, "1GB"),
    # Both branches side by side, biases everywhere.
    "phi-groups-f32": (dict(
        model_type="phi", vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)),
        torch.float32, "1GB"),
}


def make_tokenizer(out):
    """A byte-level BPE tokenizer that puts <|bos|> in front."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert tok.get_vocab_size() == VOCAB
    tok.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
                            model_max_length=CONTEXT, clean_up_tokenization_spaces=False).save_pretrained(out)


def make_model(settings, seed):
    torch.manual_seed(seed)
    sees = "vision_config" in settings
    settings = dict(settings) if sees else {"model_type": "llama", **COMMON, **settings}
    if not sees and not hasattr(AutoConfig.for_model(settings["model_type"]), "rms_norm_eps"):
        del settings["rms_norm_eps"]
    config = AutoConfig.for_model(**settings)
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Large enough that every layer moves the logits; norms stay near one, of which Gemma's files leave out the one.
            norm = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
            one = 0 if config.model_type.startswith(("gemma", "nemotron")) else 1
            p.copy_(one + 0.2 * torch.randn_like(p) if norm else torch.randn_like(p) * p.shape[-1] ** -0.5
                    if p.dim() > 1 else 0.2 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(0.3 * torch.randn_like(buffer))
        if one:
            model.get_output_embeddings().weight.mul_(3)
    return model


@torch.no_grad()
def expect(model, ids):
    """Last row of logits, greedy continuation, and the smallest distance between the two best logits on the way."""
    inputs = torch.tensor([ids])
    out = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=NEW_TOKENS,
                         output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(out.logits)[:, 0].float()
    two = logits.topk(2, -1).values
    return logits[0], out.sequences[0, len(ids):].tolist(), (two[:, 0] - two[:, 1]).min().item()


def prompts(path):
    """Prompts with a clear margin and what follows them, or None if the model gives none for some length."""
    sees = hasattr(AutoConfig.from_pretrained(path), "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    # Falcon's eager attention adds its slopes twice.
    how = "sdpa" if getattr(AutoConfig.from_pretrained(path), "alibi", False) else "eager"
    model = auto.from_pretrained(path, dtype=torch.float32, attn_implementation=how).eval()
    model.generation_config.eos_token_id = None
    rows = []
    for length in LENGTHS:
        for seed in range(400 if length > 1 else 1):
            rng = random.Random(1000 * length + seed)
            ids = [0] + [rng.randrange(3, VOCAB) for _ in range(length - 1)]
            row, greedy, gap = expect(model, ids)
            if gap >= MARGIN and len(set(greedy)) > 3:
                break
        else:
            return None
        rows.append({"ids": ids, "last_row": [float(f"{x:.6g}") for x in row.tolist()], "greedy_ids": greedy,
                     "min_top2_gap": round(gap, 4)})
    return rows


def to_version_4(path, legacy):
    """Rewrite config.json as transformers 4 wrote it."""
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if legacy:
        rope["type"] = rope.pop("rope_type")
        config.pop("head_dim", None)
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def without_prefix(path, base, layers, extra):
    """Drop the base prefix from tensor names and add a tensor to every layer that old files carry."""
    tensors = {name.removeprefix(base): t for name, t in load_file(path / "model.safetensors").items()}
    for layer in range(layers):
        tensors[extra[0].format(layer)] = extra[1].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def main(out, only):
    for number, (name, (settings, dtype, shard)) in enumerate((FIXTURES | more.FIXTURES).items()):
        if only and name not in only:
            continue
        path = out / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        make_tokenizer(path)
        for seed in range(1000 * number, 1000 * number + 100):
            saved = more.saved_as(name)
            make_model(settings, seed).to(dtype).save_pretrained(path, max_shard_size=shard, **saved)
            more.edit(name, path)
            if rows := prompts(path):
                break
        assert rows, f"{name}: no model with clear margins"
        for row in rows:
            greedy = row["greedy_ids"]
            assert row["min_top2_gap"] >= MARGIN and len(greedy) == NEW_TOKENS and len(set(greedy)) > 1
        if name == "llama3-rope-f16":
            to_version_4(path, legacy=False)
        if name == "llama-v4-legacy":
            to_version_4(path, legacy=True)
            without_prefix(path, "model.", settings["num_hidden_layers"],
                           ("layers.{}.self_attn.rotary_emb.inv_freq", torch.ones(4)))
        if name == "gpt2-old-bf16":
            without_prefix(path, "transformer.", settings["num_hidden_layers"],
                           ("h.{}.attn.bias", torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()))
        versions = {m.__name__: m.__version__ for m in (transformers, torch, tokenizers)}
        (path / "expected.json").write_text(json.dumps({"versions": versions, "prompts": rows}) + "\n")
        size = sum(f.stat().st_size for f in path.iterdir())
        assert size < LARGEST, f"{name}: {size} bytes"
        print(name, f"{size} bytes, model seed {seed},", "margins", [row["min_top2_gap"] for row in rows])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent), sys.argv[2:])
