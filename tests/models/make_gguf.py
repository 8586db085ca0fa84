"""Write gguf/, models of this folder as GGUF files and blocks of every format.

Needs numpy, gguf and sentencepiece. Names of tensors and metadata are those of the gguf package; what llama.cpp's
conversion does to values (rows of queries and keys, norms less one, factors of rotation) is done here. Arguments are names of
models, of all that FILES has unless some are given.
"""
import base64
import io
import json
import math
import pathlib
import sys
import tempfile

import gguf
import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

HERE = pathlib.Path(__file__).resolve().parent
Q = gguf.GGMLQuantizationType
# Model, architecture, format of matrices.
FILES = {
    "llama3-rope-f16": ("llama", Q.F16),
    "mixtral-bf16": ("llama", Q.BF16),
    "qwen3-moe-groups-f16": ("qwen3moe", Q.Q8_0),
    "qwen2-moe-f32": ("qwen2moe", Q.F32),
    "gemma2-groups-bf16": ("gemma2", Q.Q4_0),
    "gemma3-local-bf16": ("gemma3", Q.BF16),
    "phi3-longrope-f32": ("phi3", Q.F32),
    "granitemoe-bf16": ("granitemoe", Q.BF16),
    "olmo3-bf16": ("olmo2", Q.BF16),
    "olmoe-bf16": ("olmoe", Q.BF16),
    "starcoder2-f32": ("starcoder2", Q.F32),
    "cohere-norms-f32": ("command-r", Q.F32),
    "cohere2-bf16": ("cohere2", Q.BF16),
    "glm4-f32": ("glm4", Q.F32),
    "smollm3-f32": ("smollm3", Q.F32),
    "exaone4-f32": ("exaone4", Q.F32),
    "hunyuan-f32": ("hunyuan-dense", Q.F32),
    "seed-oss-bf16": ("seed_oss", Q.BF16),
    "nemotron-f32": ("nemotron", Q.F32),
    "stablelm-bias-bf16": ("stablelm", Q.BF16),
    "shakespeare": ("llama", Q.Q4_1),
    "falcon-40b-f32": ("falcon", Q.F32),
    "gpt2-old-bf16": ("gpt2", Q.BF16),
    "neox-parallel-bf16": ("gptneox", Q.BF16),
    "phi-parallel-f16": ("phi2", Q.F16),
    "glm4-moe-f32": ("glm4moe", Q.F32),
    "ministral3-f32": ("mistral3", Q.F32),
}
# Encoders, all of them in f32.
ENCODERS = {"bert-embed-f32": ("bert", "mean"), "nomic-bert-embed-f32": ("nomic-bert", "mean")}
SUFFIXES = (".weight", ".bias")
TURNED = {"llama", "granite", "granitemoe", "smollm3", "mistral3"}
LESS_ONE = {"gemma2", "gemma3", "nemotron"}


def tensors(directory):
    """Every tensor, as float32; bf16 ones are widened."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:8 + length]).items():
            if name == "__metadata__" or entry["dtype"] not in kinds:
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield name, values.astype(np.float32)


def turned(weight, heads):
    """Rows of queries or keys in llama.cpp's order, which turns neighbours instead of halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_metadata(writer, architecture, config):
    c = config.get
    heads = c("num_attention_heads")
    head_dim = c("head_dim") or c("hidden_size") // heads
    rope = c("rope_parameters") or {"rope_theta": c("rope_theta", 10000.0), **(c("rope_scaling") or {})}
    local = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    writer.add_context_length(c("max_position_embeddings"))
    writer.add_embedding_length(c("hidden_size"))
    writer.add_block_count(c("num_hidden_layers"))
    writer.add_feed_forward_length(c("intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(c("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(c("vocab_size"))
    norm = c("layer_norm_eps") or c("layer_norm_epsilon") or c("norm_epsilon") or c("norm_eps")
    if norm and architecture in ("command-r", "cohere2", "starcoder2", "nemotron", "stablelm", "falcon", "gpt2", "gptneox", "phi2"):
        writer.add_layer_norm_eps(norm)
    else:
        writer.add_layer_norm_rms_eps(c("rms_norm_eps"))
    theta = rope.get("rope_theta", 10000.0)
    if rope.get("rope_type") == "dynamic" and "alpha" in rope:
        theta *= rope["alpha"] ** (head_dim / (head_dim - 2))
    writer.add_rope_freq_base(theta)
    if local:
        writer.add_float32(f"{architecture}.rope.freq_base_swa", local["rope_theta"])
    partial = rope.get("partial_rotary_factor") or c("partial_rotary_factor") or 1.0
    dimensions = int(head_dim * partial)
    writer.add_rope_dimension_count(dimensions)
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    extra = {}
    if kind == "llama3":
        frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
        original, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        factors = []
        for frequency in frequencies:
            length = 2 * math.pi / frequency
            if length < original / high:
                factors.append(1)
            elif length > original / low:
                factors.append(factor)
            else:
                smooth = (original / length - low) / (high - low)
                factors.append(1 / ((1 - smooth) / factor + smooth))
        extra["rope_freqs.weight"] = np.array(factors, np.float32)
    if kind == "longrope":
        original = c("original_max_position_embeddings") or rope["original_max_position_embeddings"]
        scale = c("max_position_embeddings") / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(
            rope.get("attention_factor") or (math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0))
        for which in ("long", "short"):
            extra[f"rope_factors_{which}.weight"] = np.array(rope[f"{which}_factor"], np.float32)
    if c("sliding_window") and architecture in ("gemma2", "gemma3", "phi3", "olmo2", "cohere2", "exaone4", "starcoder2"):
        writer.add_sliding_window(c("sliding_window"))
        if c("layer_types"):
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in c("layer_types")])
    for field, add in [
        ("num_local_experts", writer.add_expert_count), ("num_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("embedding_multiplier", writer.add_embedding_scale), ("attention_multiplier", writer.add_attention_scale),
        ("residual_multiplier", writer.add_residual_scale), ("logits_scaling", writer.add_logit_scale),
        ("query_pre_attn_scalar", lambda width: writer.add_attention_scale(width ** -0.5)),
        ("logit_scale", writer.add_logit_scale), ("use_parallel_residual", writer.add_parallel_residual),
        ("n_routed_experts", writer.add_expert_count), ("n_shared_experts", writer.add_expert_shared_count),
        ("first_k_dense_replace", writer.add_leading_dense_block_count),
        ("routed_scaling_factor", writer.add_expert_weights_scale),
        ("n_group", lambda count: writer.add_uint32(f"{architecture}.expert_group_count", count)),
        ("topk_group", lambda count: writer.add_uint32(f"{architecture}.expert_group_used_count", count)),
    ]:
        if c(field) is not None:
            add(c(field))
    if architecture == "glm4moe":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(c("norm_topk_prob"))
    if architecture == "mistral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_float32("mistral3.attention.temperature_scale", rope["llama_4_scaling_beta"])
    return extra


def write_tokenizer(writer, config, directory):
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    said = json.loads((directory / "tokenizer_config.json").read_text())
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for text, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = text, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[token["id"]], kinds[token["id"]] = token["content"], kind
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for role, add in [("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id)]:
        if said.get(f"{role}_token"):
            add(tokens.index(said[f"{role}_token"]))
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    if isinstance(ends, list) and len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    writer.add_add_bos_token(tokenizer["post_processor"] is not None)
    template = directory / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())


def parts(architecture, name, values, config):
    """What becomes of a tensor: names as transformers has them, and values."""
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if architecture in TURNED and ".self_attn.q_proj." in name:
        values = turned(values, heads)
    if architecture in TURNED and ".self_attn.k_proj." in name:
        values = turned(values, kv_heads)
    if architecture in LESS_ONE and "norm" in name and name.endswith(".weight"):
        values = values + 1
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if architecture == "gpt2":
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        turns = any(part in name for part in (".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        return [(name, values.T if turns else values)]
    if "query_key_value" in name:
        # Heads of keys, each with its queries, become all queries, then all keys, then all values.
        groups = (config.get("num_kv_heads") or heads) if architecture == "falcon" else heads
        each = values.reshape(groups, heads // groups + 2, -1, *values.shape[1:])
        return [(name, np.concatenate([part.reshape(-1, *values.shape[1:]) for part in (each[:, :-2], each[:, -2], each[:, -1])]))]
    if "input_linear" in name:
        gate, up = np.split(values, 2, axis=1)
        layer = name.split(".")[2]
        return [(f"blk.{layer}.ffn_gate_exps.weight", gate), (f"blk.{layer}.ffn_up_exps.weight", up)]
    return [(name, values)]


TEXTS = ["ROMEO:", "Shall I compare thee to a summer's day?", " two  spaces and a tab\tbetween", "line\n\nlines\n", "naïve café 日本",
         "🙂 end", "", " ", "a", "<s> is quoted"]


def write_sentence_piece(writer, config, directory):
    """A tokenizer of SentencePiece, as Llama 2 has one; what it makes of TEXTS."""
    text = (HERE.parent / "bench" / "sonnets.txt").read_text().splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(pieces.get_piece_size())
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_add_bos_token(True)
    expected = [{"text": text, "ids": [pieces.bos_id()] + pieces.encode(text)} for text in TEXTS]
    (HERE / "gguf" / "sentence_piece.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


RULES = "FB01\t66 69\nFF21\t41\n301\t\n"


def write_unigram(writer, config, directory):
    """Unigram of SentencePiece, as XLM-RoBERTa and T5 have it, with a table of characters; what it makes of TEXTS."""
    text = (HERE.parent / "bench" / "sonnets.txt").read_text().splitlines()
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.write(RULES)
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=model, vocab_size=320, model_type="unigram", hard_vocab_limit=False,
            normalization_rule_tsv=rules.name, remove_extra_whitespaces=True, character_coverage=0.98, minloglevel=2)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(pieces.get_piece_size())
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 1 for i in ids]
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_precompiled_charsmap(proto.normalizer_spec.precompiled_charsmap)
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    texts = TEXTS + ["  many   spaces ", "\ufb01rst \uff21 e\u0301"]
    expected = [{"text": text, "ids": [pieces.bos_id()] + pieces.encode(text) + [pieces.eos_id()]} for text in texts]
    (HERE / "gguf" / "unigram.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


def write_word_piece(writer, config, directory):
    """As llama.cpp's conversion marks it: what begins a word, and not what goes on."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    marked = [text if text in special else text[2:] if text.startswith("##") else "\u2581" + text for text, _ in vocabulary]
    ids = {text: i for text, i in vocabulary}
    writer.add_tokenizer_model("bert")
    writer.add_token_list(marked)
    writer.add_token_types([3 if text in special else 1 for text, _ in vocabulary])
    writer.add_token_type_count(config["type_vocab_size"])
    for text, add in [("[CLS]", writer.add_bos_token_id), ("[SEP]", writer.add_eos_token_id), ("[SEP]", writer.add_sep_token_id),
                      ("[UNK]", writer.add_unk_token_id), ("[PAD]", writer.add_pad_token_id), ("[MASK]", writer.add_mask_token_id)]:
        add(ids[text])


def write_encoder(model, target):
    architecture, pooling = ENCODERS[model]
    directory = HERE / model
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType[pooling.upper()])
    if "rope_parameters" in config:
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    write_word_piece(writer, config, directory)
    names = gguf.get_tensor_name_map({n: a for a, n in gguf.MODEL_ARCH_NAMES.items()}[architecture], config["num_hidden_layers"])
    for name, values in tensors(directory):
        if "pooler" not in name and "position_ids" not in name:
            writer.add_tensor(names.get_name(name.removeprefix("bert."), try_suffixes=SUFFIXES), values)
    finish(writer)


def write(model, target, tokenizer=write_tokenizer):
    architecture, kind = FILES[model]
    directory = HERE / model
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] == "gpt2":
        config |= {"hidden_size": config["n_embd"], "intermediate_size": config["n_inner"], "num_attention_heads": config["n_head"],
                   "num_hidden_layers": config["n_layer"], "max_position_embeddings": config["n_positions"]}
    if config["model_type"] == "falcon":
        config |= {"intermediate_size": 4 * config["hidden_size"], "num_key_value_heads": config["num_kv_heads"]}
    if config["model_type"] == "gemma3":
        config = config["text_config"]
    writer = gguf.GGUFWriter(target, architecture)
    extra = write_metadata(writer, architecture, config)
    tokenizer(writer, config, directory)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names, llama = (gguf.get_tensor_name_map(numbers[a], config["num_hidden_layers"]) for a in (architecture, "llama"))
    found, experts = {}, {}
    for name, values in tensors(directory):
        for name, values in parts(architecture, name, values, config):
            if ".experts." in name and name.split(".experts.")[1][0].isdigit():
                module, rest = name.split(".experts.")
                number, which = rest.split(".", 1)
                experts.setdefault(f"{module}.experts.{which}", {})[int(number)] = values
                continue
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            found[name] = values
    for name, each in experts.items():
        found[name] = np.stack([each[number] for number in range(len(each))])
    for name, values in found.items():
        # What some models of an architecture have and llama.cpp's own do not, is called as Llama's.
        new = names.get_name(name, try_suffixes=SUFFIXES) or llama.get_name(name, try_suffixes=SUFFIXES)
        new = name if name.startswith("blk.") else new
        assert new, f"{model}: {name} has no name in {architecture}"
        if values.ndim == 1 or "ffn_gate_inp" in new:
            writer.add_tensor(new, values)
        else:
            # As llama.cpp: what is read row by row keeps eight bits.
            own = Q.Q8_0 if kind in (Q.Q4_0, Q.Q4_1) and new.startswith(("token_embd", "output.")) else kind
            writer.add_tensor(new, gguf.quants.quantize(values, own), raw_dtype=own)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks():
    """Blocks of every format, random but for their factors, and what the gguf package makes of them."""
    generator = np.random.default_rng(0)
    cases = {}
    for kind in (Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K):
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        raw = generator.integers(0, 256, (8, size), dtype=np.uint8)
        # Factors that are numbers: f16s, at these bytes of a block.
        for at in {Q.Q4_1: [0, 2], Q.Q5_1: [0, 2], Q.Q2_K: [80, 82], Q.Q3_K: [108], Q.Q4_K: [0, 2], Q.Q5_K: [0, 2],
                   Q.Q6_K: [208]}.get(kind, [0]):
            raw[:, at:at + 2] = generator.normal(0, 0.01, (8, 1)).astype(np.float16).view(np.uint8)
        values = gguf.quants.dequantize(raw, kind).astype(np.float32)
        assert values.shape == (8, elements)
        encoded = [base64.b64encode(np.ascontiguousarray(a).tobytes()).decode() for a in (raw, values)]
        cases[kind.name] = {"blocks": encoded[0], "values": encoded[1]}
    return cases


def main():
    out = HERE / "gguf"
    out.mkdir(exist_ok=True)
    given = sys.argv[1:] or [*FILES, *ENCODERS]
    for model in given:
        (write_encoder if model in ENCODERS else write)(model, out / f"{model}.gguf")
        print(model, (out / f"{model}.gguf").stat().st_size)
    FILES["llama-linear-bf16"] = ("llama", Q.BF16)
    write("llama-linear-bf16", out / "sentence-piece.gguf", write_sentence_piece)
    write("llama-linear-bf16", out / "unigram.gguf", write_unigram)
    (out / "blocks.json").write_text(json.dumps(blocks(), indent=1) + "\n")


if __name__ == "__main__":
    main()
