"""Make what tests of quantized checkpoints need: packed.json and the directories packed-*.

usage: python make_packed.py [OUT_DIR [NAME…]]   (needs requirements.txt and compressed-tensors 0.20; OUT_DIR defaults to this directory)

packed.json holds matrices as GPTQModel, AutoAWQ, compressed-tensors, transformers' FP8 and gpt-oss store them, and their values in f32.
Codes are packed by compressed-tensors where it is its format, else by the loops here; all were compared with what auto-gptq 0.7.1
packs, and autoawq 0.2.9 and compressed-tensors unpack. The directories hold small models: what expected.json says was computed by
transformers from a copy whose weights are the same values in f32.
"""
import json
import pathlib
import shutil
import sys
import tempfile

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import make_fixtures

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
E4M3 = torch.float8_e4m3fn
NAMES = {torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8", torch.float16: "F16",
         torch.bfloat16: "BF16", torch.float32: "F32", E4M3: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0"}


def words(codes, bits, order=None):
    """Codes (rows, columns) packed along columns into words of 32 bits, the first in the lowest bits."""
    per = 32 // bits
    out = torch.zeros(codes.shape[0], codes.shape[1] // per, dtype=torch.int64)
    for i in range(per):
        out |= codes[:, (order[i] if order else i)::per].to(torch.int64) << bits * i
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


def by_groups(w, bits, size, symmetric, dtype, columns=None):
    """Codes (n, k), scales and zeros (n, groups), the group of each column, and the values."""
    n, k = w.shape
    size = k if size == -1 else size
    index = torch.arange(k) // size if columns is None else columns
    groups, most = int(index.max()) + 1, 2 ** bits - 1
    scales, zeros = torch.zeros(n, groups, dtype=dtype), torch.zeros(n, groups, dtype=torch.int64)
    for g in range(groups):
        part = w[:, index == g].float()
        if symmetric:
            scales[:, g] = (2 * part.abs().amax(1) / most).to(dtype)
            zeros[:, g] = 2 ** (bits - 1)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = ((high - low) / most).to(dtype)
            # Version 1 of GPTQ has no zero below 1.
            zeros[:, g] = (-low / scales[:, g].float()).round().clamp(1, most)
    s, z = scales.float()[:, index], zeros[:, index]
    codes = ((w.float() / s).round() + z).clamp(0, most).to(torch.int64)
    return codes, scales, zeros, index, s * (codes - z).float()


def gptq(w, bits=4, size=32, symmetric=False, version=1, dtype=torch.float16, acted=False, listed=True):
    n, k = w.shape
    columns = None
    if acted:
        columns = (torch.randperm(k) // size)
    codes, scales, zeros, index, values = by_groups(w, bits, size, symmetric, dtype, columns)
    stored = {".qweight": words(codes, bits).T.contiguous(), ".scales": scales.T.contiguous(),
              ".qzeros": words(zeros.T.contiguous() - (1 if version == 1 else 0), bits)}
    if listed:
        stored[".g_idx"] = index.to(torch.int32)
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": acted,
              "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return stored, values, config


def awq(w, size=32):
    codes, scales, zeros, _, values = by_groups(w, 4, size, False, torch.float16)
    stored = {".qweight": words(codes.T.contiguous(), 4, AWQ_ORDER), ".scales": scales.T.contiguous(),
              ".qzeros": words(zeros.T.contiguous(), 4, AWQ_ORDER)}
    return stored, values, {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}


def compressed(weights, form):
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme},
            "ignore": ["lm_head"], "quantization_status": "compressed"}


def packed(w, bits=4, size=32, symmetric=True, dtype=torch.bfloat16):
    codes, scales, zeros, _, values = by_groups(w, bits, size, symmetric, dtype)
    half = 2 ** (bits - 1)
    stored = {".weight_packed": pack_to_int32((codes - half).to(torch.int8), bits), ".weight_scale": scales,
              ".weight_shape": torch.tensor(w.shape)}
    if not symmetric:
        stored[".weight_zero_point"] = pack_to_int32((zeros - half).to(torch.int8), bits, packed_dim=0).contiguous()
    strategy = "channel" if size == -1 else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
               "group_size": None if size == -1 else size}
    return stored, values, compressed(weights, "pack-quantized")


def whole(w, symmetric=True, strategy="channel"):
    """Integers of eight bits."""
    rows = w if strategy == "channel" else w.reshape(1, -1)
    codes, scales, zeros, _, values = by_groups(rows, 8, -1, symmetric, torch.bfloat16)
    stored = {".weight": (codes - 128).to(torch.int8).reshape(w.shape), ".weight_scale": scales}
    if not symmetric:
        stored[".weight_zero_point"] = (zeros - 128).to(torch.int8)
    if strategy == "tensor":
        stored = {name: t.reshape(1) if t.numel() == 1 else t for name, t in stored.items()}
    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return stored, values.reshape(w.shape), compressed(weights, "int-quantized")


def blocks(w, block):
    """E4M3 codes, the scale of each block, and the values."""
    n, k = w.shape
    rows, columns = torch.arange(n) // block[0], torch.arange(k) // block[1]
    scales = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            scales[i, j] = w[rows == i][:, columns == j].abs().max() / 448
    return scales, lambda scales: (w / scales.float()[rows][:, columns]).to(E4M3), lambda s: s.float()[rows][:, columns]


def floats(w, strategy, block=None):
    size = {"tensor": tuple(w.shape), "channel": (1, w.shape[1]), "block": block}[strategy]
    scales, codes, each = blocks(w, size)
    scales = scales.to(torch.bfloat16)
    codes = codes(scales)
    stored = {".weight": codes, ".weight_scale": scales.reshape(1) if strategy == "tensor" else scales}
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "block_structure": block}
    return stored, codes.float() * each(scales), compressed(weights, "float-quantized")


def mxfp4(w):
    n, k = w.shape
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    exponents = (w.reshape(n, -1, 32).abs().amax(-1) / 4).log2().floor()
    scales = (2.0 ** exponents).repeat_interleave(32, 1)
    rounded = grid[((w / scales).abs()[..., None] - grid).abs().argmin(-1)] * w.sign()
    stored = {".weight_packed": pack_fp4_to_uint8(rounded), ".weight_scale": (exponents + 127).to(torch.uint8)}
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    return stored, rounded * scales, compressed(weights, "mxfp4-pack-quantized")


def mxfp4_blocks(w):
    """Experts (experts, outputs, inputs) as gpt-oss has them; the values are those that transformers makes of the blocks."""
    stored, _, _ = mxfp4(w.reshape(-1, w.shape[2]))
    shape = (*w.shape[:2], w.shape[2] // 32)
    return unpacked(stored[".weight_packed"].reshape(*shape, 16), stored[".weight_scale"].reshape(shape))


def unpacked(blocks, scales):
    # Turned around for gpt-oss, whose products have inputs first.
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"]}
    return {"_blocks": blocks, "_scales": scales}, values, config


def fp8(w, block=(32, 32), exponents=False):
    scales, codes, each = blocks(w, block or tuple(w.shape))
    if exponents:
        scales = (2.0 ** scales.log2().ceil()).to(torch.float8_e8m0fnu)
    codes = codes(scales)
    stored = {".weight": codes, ".weight_scale_inv": scales if block else scales.reshape(())}
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    return stored, codes.float() * each(scales), config


def cases():
    torch.manual_seed(14)
    def w(n=16, k=64):
        return torch.randn(n, k) * 0.1
    yield "GPTQ, version 1, asymmetric", gptq(w())
    yield "GPTQ, version 2, asymmetric", gptq(w(), version=2, listed=False)
    yield "GPTQ, symmetric, one group of 8 bits", gptq(w(), bits=8, size=-1, symmetric=True)
    yield "GPTQ, groups in the order of activations", gptq(w(), size=16, acted=True)
    yield "GPTQ, 2 bits, bf16", gptq(w(), bits=2, symmetric=True, dtype=torch.bfloat16)
    yield "AWQ", awq(w())
    yield "AWQ, one group", awq(w(), size=-1)
    yield "packed, symmetric", packed(w())
    yield "packed, asymmetric, rows of no whole word", packed(w(12, 36), size=12, symmetric=False, dtype=torch.float16)
    yield "packed, 8 bits, a row each", packed(w(10, 33), bits=8, size=-1)
    yield "integers, a row each", whole(w(10, 33))
    yield "integers, whole groups", whole(w())
    yield "integers, asymmetric, a row each", whole(w(), symmetric=False)
    yield "integers, asymmetric, one tensor", whole(w(), symmetric=False, strategy="tensor")
    yield "FP8, one tensor", floats(w(), "tensor")
    yield "FP8, a row each", floats(w(10, 33), "channel")
    yield "FP8, blocks", floats(w(20, 50), "block", (16, 32))
    yield "MXFP4", mxfp4(w())
    yield "transformers' FP8", fp8(w(20, 50), (16, 32))
    yield "transformers' FP8, one scale", fp8(w(), None)
    yield "transformers' FP8, powers of two", fp8(w(), (8, 16), True)
    experts = [fp8(w(20, 50), (16, 32)) for _ in range(3)]
    stored = {name: torch.stack([one[0][name].view(torch.uint8) for one in experts]).view(E4M3) if name == ".weight"
              else torch.stack([one[0][name] for one in experts]) for name in (".weight", ".weight_scale_inv")}
    yield "transformers' FP8, experts", (stored, torch.stack([one[1] for one in experts]), experts[0][2])
    yield "gpt-oss' MXFP4", mxfp4_blocks(torch.randn(3, 10, 96) * 0.1)
    # All but those scales by which the largest code is no f32 any more.
    yield "gpt-oss' MXFP4, any bytes", unpacked(torch.randint(256, (2, 9, 14, 16), dtype=torch.uint8),
                                                torch.arange(252, dtype=torch.uint8)[torch.randperm(252)].reshape(2, 9, 14))


def as_hex(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


def make_cases(out):
    rows = []
    for name, (stored, values, config) in cases():
        tensors = {f"m{ending}": {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data": as_hex(t)}
                   for ending, t in stored.items()}
        rows.append({"name": name, "quantization_config": config, "tensors": tensors,
                     "shape": list(values.shape), "values": as_hex(values.float())})
    (out / "packed.json").write_text(json.dumps(rows, indent=0) + "\n")


GROUPS = dict(vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
ROPE = dict(rope_type="default", rope_theta=10000.0)

# name: (configuration, storage format of what is not quantized, how weights are)
FIXTURES = {
    # Groups in the order of activations, biases.
    "packed-gptq-f16": (dict(GROUPS, model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True, num_hidden_layers=3),
                        torch.float16, lambda w: gptq(w, acted=w.shape[0] == 32)),
    "packed-awq-f16": (dict(GROUPS, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, num_hidden_layers=3),
                       torch.float16, awq),
    # Heads whose rows are in another order; symmetric, so that int4 rounds nothing.
    "packed-int4-bf16": (dict(GROUPS, model_type="gpt_neox", num_hidden_layers=3,
                              rope_parameters=dict(ROPE, partial_rotary_factor=0.5)), torch.bfloat16, packed),
    "packed-fp8-bf16": (dict(GROUPS, model_type="qwen3_moe", num_key_value_heads=1, head_dim=32, num_experts=4,
                             num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True,
                             tie_word_embeddings=False), torch.bfloat16, fp8),
    # Experts alone, all of a layer together, and a dense layer.
    "packed-mxfp4-bf16": (dict(GROUPS, model_type="qwen3_moe", num_key_value_heads=2, head_dim=16, num_experts=5,
                               num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, num_hidden_layers=3,
                               mlp_only_layers=[1], tie_word_embeddings=False), torch.bfloat16, mxfp4_blocks),
}


def is_quantized(name, tensor, quantize):
    if quantize is mxfp4_blocks:
        return tensor.dim() == 3
    skipped = ("embed", "lm_head", "norm", "mlp.gate.weight")
    return tensor.dim() == 2 and "layers." in name and not any(part in name for part in skipped)


def make_model(name, path):
    settings, dtype, quantize = FIXTURES[name]
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    make_fixtures.make_tokenizer(path)
    for seed in range(100):
        fused = quantize is mxfp4_blocks
        make_fixtures.make_model(settings, seed).to(dtype).save_pretrained(path, save_original_format=not fused)
        stored, same = {}, {}
        for tensor, value in load_file(path / "model.safetensors").items():
            stored[tensor] = value
            same[tensor] = value.float()
            if is_quantized(tensor, value, quantize):
                torch.manual_seed(seed)
                parts, same[tensor], config = quantize(value.float())
                del stored[tensor]
                stored |= {tensor.removesuffix(".weight") + ending: part for ending, part in parts.items()}
        with tempfile.TemporaryDirectory() as copy:
            copy = pathlib.Path(copy)
            shutil.copytree(path, copy, dirs_exist_ok=True)
            save_file({tensor: value.contiguous() for tensor, value in same.items()}, copy / "model.safetensors",
                      metadata={"format": "pt"})
            rows = make_fixtures.prompts(copy)
        if rows:
            break
    assert rows, f"{name}: no model with clear margins"
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    make_fixtures.more.set_fields(path, quantization_config=config)
    versions = {m.__name__: m.__version__ for m in (make_fixtures.transformers, torch)}
    (path / "expected.json").write_text(json.dumps({"versions": versions, "prompts": rows}) + "\n")
    print(name, f"model seed {seed}", "margins", [row["min_top2_gap"] for row in rows])


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
    only = sys.argv[2:]
    if not only or "packed.json" in only:
        make_cases(out)
    for name in FIXTURES:
        if not only or name in only:
            make_model(name, out / name)
