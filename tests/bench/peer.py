"""llama.cpp on a model that `strata random-model` wrote: conversion, and the times of a few loads.

A library for compare.py; needs requirements.txt (llama-cpp-python is built for this machine: see README.md).
"""
import ctypes
import json
import pathlib
import statistics
import time

import gguf
import llama_cpp
import numpy as np

# Ours, theirs.
FORMATS = {
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def silent(level, text, data):
    pass


llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def interleave(weight, heads):
    """Rows of queries or keys in llama.cpp's order, which turns neighbours instead of halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def convert(model, out):
    """Writes the model of a directory in Hugging Face layout as a GGUF file in bf16."""
    model = pathlib.Path(model)
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FORMATS["bf16"])
    # Token ids go in and logits come out: the words do not matter, but there must be some.
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"word{i}" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([1] * config["vocab_size"])
    data = np.memmap(model / "model.safetensors", mode="r")
    length = int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8:8 + length]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", name
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        weight = np.asarray(data[begin:end]).view(np.uint16).reshape(entry["shape"])
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                key = "num_attention_heads" if "q_proj" in part else "num_key_value_heads"
                weight = interleave(weight, config[key])
            target = f"blk.{layer}.{NAMES[part]}.weight"
        else:
            target = f"{NAMES[stem]}.weight"
        if weight.ndim == 1:
            writer.add_tensor(target, (weight.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(weight).view(np.uint8)
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source, out, name):
    """Writes a GGUF file in another of FORMATS."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FORMATS[name]
    parameters.nthread = 2
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source} to {name}: code {code}")


def bits_per_weight(path):
    """Of all tensors of a GGUF file together."""
    tensors = gguf.GGUFReader(path).tensors
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


class Peer:
    """llama.cpp with a model."""

    def __init__(self, path, threads, sequences=16, context=4096):
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def close(self):
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def clear(self):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def step(self, tokens):
        """One batch of (sequence, position, id, whether logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (sequence, position, token, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        code = llama_cpp.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode: code {code}")
        # Waits for the result.
        llama_cpp.llama_get_logits(self.context)

    def logits(self, ids):
        """float32 (ids, vocabulary) of a sequence."""
        self.clear()
        self.step([(0, i, token, True) for i, token in enumerate(ids)])
        flat = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(flat, shape=(len(ids), self.vocab)).copy()

    def prefill(self, tokens=512):
        """Tokens per second of a prompt."""
        self.clear()
        begun = time.perf_counter()
        self.step([(0, i, 10 + i * 7 % 240, i + 1 == tokens) for i in range(tokens)])
        return tokens / (time.perf_counter() - begun)

    def decode(self, streams, prompt=32, steps=24):
        """Tokens per second of so many streams together, after their prompts: streams / median of the steps."""
        self.clear()
        for s in range(streams):
            self.step([(s, i, 10 + (i * 7 + s) % 240, i + 1 == prompt) for i in range(prompt)])
        times = []
        for i in range(steps):
            begun = time.perf_counter()
            self.step([(s, prompt + i, 10 + (i * 11 + s) % 240, True) for s in range(streams)])
            times.append(time.perf_counter() - begun)
        return streams / statistics.median(times)

    def serve(self, clients=8, prompt=32, generated=32, rounds=2):
        """Tokens per second of clients that come back as soon as they are answered, were there an ideal server: all
        prompts in one batch, then all answers in step, and no time for anything else."""
        begun = time.perf_counter()
        for _ in range(rounds):
            self.clear()
            self.step([(s, i, 10 + (i * 7 + s) % 240, i + 1 == prompt)
                       for s in range(clients) for i in range(prompt)])
            for i in range(generated - 1):
                self.step([(s, prompt + i, 10 + (i * 11 + s) % 240, True) for s in range(clients)])
        return rounds * clients * generated / (time.perf_counter() - begun)
