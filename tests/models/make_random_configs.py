"""Make random_configs.json: models of every family with configurations drawn at random, and what transformers makes of them:
decoders answer prompts, encoders classify.

usage: python make_random_configs.py [--each 10] [--only FAMILY,…] [OUT]        (needs requirements.txt)

With --only, the file keeps what it has of other families.

The file holds no weights: `weight` makes each from its tensor's name, and so does the test that reads the file. All are exact in
bfloat16. Configurations are written as transformers 5 does or as 4 did, with fields left out or null where that changes no
tensor's shape, so that defaults count. One that transformers refuses is drawn again; prompts are searched until every greedy
choice is clear.
"""
import argparse
import json
import pathlib
import random
import re
import tempfile

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
CONTEXT, MARGIN, NEW_TOKENS, LONGEST = 256, 0.01, 8, 100
GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


# Families: what is drawn for each. `d` draws.

def dims(d, own_heads=True, grouped=True, even=8):
    """Sizes that any decoder has; heads that are not hidden / heads wide where there may be such."""
    heads = d([1, 2, 3, 4, 6])
    head = d([8, 12, 16, 20, 24]) // even * even or even
    kv = d([n for n in (1, 2, 3, heads) if heads % n == 0]) if grouped else heads
    sizes = dict(vocab_size=d([64, 71, 96, 130]), num_hidden_layers=d([1, 2, 3, 4]), num_attention_heads=heads,
                 intermediate_size=d([12, 20, 36, 48, 72]), hidden_size=heads * head, tie_word_embeddings=d([True, False]),
                 max_position_embeddings=CONTEXT)
    if grouped:
        sizes.update(num_key_value_heads=kv)
    if own_heads:
        sizes.update(head_dim=head, hidden_size=d([16, 24, 36, 40, 64]))
    return sizes


def turns(d, partial=None):
    """How heads turn, as transformers 5 writes it."""
    base = dict(rope_theta=d([500.0, 10000.0, 1e6]))
    kind = d(["default", "default", "linear", "llama3", "yarn", "dynamic"])
    if partial:
        base.update(partial_rotary_factor=d(partial))
    more = {
        "default": {},
        "linear": dict(factor=d([2.0, 3.5])),
        "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=d([32, 64])),
        "yarn": dict(factor=d([2.0, 8.0]), original_max_position_embeddings=d([32, 64]), **d(
            [{}, dict(truncate=False), dict(mscale=0.7, mscale_all_dim=0.3), dict(attention_factor=1.3),
             dict(beta_fast=16.0, beta_slow=2.0)])),
        "dynamic": dict(factor=d([2.0, 4.0])),
    }[kind]
    return dict(rope_parameters=dict(rope_type=kind, **base, **more))


def windows(d, layers):
    """A window, and the layers that have it."""
    kinds = ["sliding_attention", "full_attention"]
    return dict(sliding_window=d([3, 11, 16, 40]), layer_types=[d(kinds) for _ in range(layers)])


def llama(d):
    return dict(dims(d), **turns(d), attention_bias=d([True, False]), mlp_bias=d([True, False]))


def mistral(d):
    return dict(dims(d), **turns(d), sliding_window=d([None, 5, 16, 33]))


def ministral(d):
    sizes = dims(d)
    return dict(sizes, **turns(d), **windows(d, sizes["num_hidden_layers"]))


def ministral3(d):
    yarn = dict(rope_type="yarn", rope_theta=10000.0, factor=d([4.0, 16.0]), original_max_position_embeddings=16, mscale=1.0,
                mscale_all_dim=1.0, llama_4_scaling_beta=d([0.1, 0.5]))
    return dict(dims(d), rope_parameters=yarn)


def mixtral(d):
    return dict(dims(d), **turns(d), num_local_experts=d([2, 5]), num_experts_per_tok=d([1, 2]), sliding_window=d([None, 9]))


def qwen2(d):
    sizes = dims(d, own_heads=False)
    return dict(sizes, **turns(d), use_sliding_window=d([True, False]), sliding_window=d([7, 16]),
                max_window_layers=d([0, 1, 2]))


def qwen3(d):
    sizes = dims(d)
    return dict(sizes, **turns(d), attention_bias=d([True, False]), use_sliding_window=d([True, False]),
                sliding_window=d([7, 16]), max_window_layers=d([0, 1, 2]))


def experts(d):
    return dict(num_experts=d([3, 6]), num_experts_per_tok=d([1, 2, 3]), moe_intermediate_size=d([8, 20]),
                norm_topk_prob=d([True, False]))


def qwen2_moe(d):
    return dict(dims(d, own_heads=False), **turns(d), **experts(d), shared_expert_intermediate_size=d([12, 20]),
                decoder_sparse_step=d([1, 2]), mlp_only_layers=d([[], [0]]), qkv_bias=d([True, False]))


def qwen3_moe(d):
    return dict(dims(d), **turns(d), **experts(d), decoder_sparse_step=d([1, 2]), mlp_only_layers=d([[], [0]]),
                attention_bias=d([True, False]))


def gemma(d):
    return dict(dims(d), **turns(d), hidden_act=d(["gelu_pytorch_tanh", "gelu", "silu"]), attention_bias=d([True, False]))


def gemma2(d):
    sizes = dims(d)
    return dict(sizes, **windows(d, sizes["num_hidden_layers"]), query_pre_attn_scalar=d([8, 20, 64]),
                attn_logit_softcapping=d([None, 2.0, 50.0]), final_logit_softcapping=d([None, 8.0, 30.0]),
                attention_bias=d([True, False]))


def gemma3_text(d):
    sizes = dims(d)
    full = d([dict(rope_type="default"), dict(rope_type="linear", factor=8.0)])
    return dict(sizes, **windows(d, sizes["num_hidden_layers"]), query_pre_attn_scalar=d([8, 20, 64]),
                rope_parameters=dict(full_attention=dict(full, rope_theta=d([1e4, 1e6])),
                                     sliding_attention=dict(rope_type="default", rope_theta=d([500.0, 1e4]))))


def phi(d):
    return dict(dims(d, own_heads=False), qk_layernorm=d([True, False]),
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=d([0.25, 0.5, 1.0])))


def phi3(d):
    return dict(dims(d, own_heads=False), sliding_window=d([None, 6, 16]), original_max_position_embeddings=CONTEXT,
                rope_parameters=dict(rope_type="default", rope_theta=d([500.0, 10000.0])))


def gpt2(d):
    sizes = dims(d, own_heads=False, grouped=False)
    return dict(sizes, n_inner=sizes.pop("intermediate_size"), scale_attn_by_inverse_layer_idx=d([True, False]),
                scale_attn_weights=d([True, False]), activation_function=d(["gelu_new", "relu", "gelu", "silu"]))


def gpt_neox(d):
    return dict(dims(d, own_heads=False, grouped=False), use_parallel_residual=d([True, False]),
                attention_bias=d([True, False]), hidden_act=d(["gelu", "gelu_new", "relu"]), **turns(d, [0.25, 0.5, 1.0]))


def smollm3(d):
    sizes = dims(d, own_heads=False)
    layers = sizes["num_hidden_layers"]
    return dict(sizes, **turns(d), no_rope_layers=[d([0, 1]) for _ in range(layers)], use_sliding_window=d([True, False]),
                **windows(d, layers))


def factors(d):
    return dict(embedding_multiplier=d([1.0, 3.5]), attention_multiplier=d([0.2, 0.4]), residual_multiplier=d([0.6, 1.0]),
                logits_scaling=d([0.7, 1.7]))


def granite(d):
    return dict(dims(d, own_heads=False), **turns(d), **factors(d), attention_bias=d([True, False]), mlp_bias=d([True, False]))


def granitemoe(d):
    return dict(dims(d, own_heads=False), **turns(d), **factors(d), num_local_experts=d([2, 5]), num_experts_per_tok=d([1, 2]))


def olmo2(d):
    return dict(dims(d, own_heads=False), **turns(d))


def olmo3(d):
    sizes = dims(d, own_heads=False)
    return dict(sizes, **windows(d, sizes["num_hidden_layers"]), rope_theta=d([500.0, 1e5]))


def olmoe(d):
    return dict(dims(d, own_heads=False), **turns(d), num_experts=d([3, 6]), num_experts_per_tok=d([1, 3]),
                norm_topk_prob=d([True, False]), clip_qkv=d([None, 0.8]))


def exaone4(d):
    sizes = dims(d)
    return dict(sizes, **turns(d), **windows(d, sizes["num_hidden_layers"]))


def hunyuan(d):
    alpha = dict(rope_type="dynamic", alpha=d([10.0, 1000.0]), factor=1.0, rope_theta=10000.0)
    return dict(dims(d), rope_parameters=d([alpha, dict(rope_type="default", rope_theta=10000.0)]))


def seed_oss(d):
    return dict(dims(d), **turns(d), attention_bias=d([True, False]), attention_out_bias=d([True, False]),
                mlp_bias=d([True, False]))


def glm(d):
    return dict(dims(d), attention_bias=d([True, False]),
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=d([0.5, 1.0])))


def glm4_moe(d):
    groups = d([1, 2])
    return dict(dims(d), n_routed_experts=d([4, 8]), n_group=groups, topk_group=d([1, groups]), num_experts_per_tok=d([1, 2]),
                moe_intermediate_size=d([8, 16]), n_shared_experts=d([1, 2]), routed_scaling_factor=d([1.0, 1.8]),
                first_k_dense_replace=d([0, 1]), use_qk_norm=d([True, False]), norm_topk_prob=d([True, False]),
                attention_bias=d([True, False]))


def cohere(d):
    return dict(dims(d, own_heads=False), logit_scale=d([0.0625, 0.5]), use_qk_norm=d([True, False]), **turns(d),
                attention_bias=d([True, False]))


def cohere2(d):
    sizes = dims(d)
    return dict(sizes, logit_scale=d([0.0625, 0.5]), attention_bias=d([True, False]),
                **windows(d, sizes["num_hidden_layers"]))


def starcoder2(d):
    return dict(dims(d, own_heads=False), **turns(d), sliding_window=d([None, 5, 16]), use_bias=d([True, False]))


def stablelm(d):
    return dict(dims(d, own_heads=False), qk_layernorm=d([True, False]), use_parallel_residual=d([True, False]),
                use_qkv_bias=d([True, False]),
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=d([0.25, 0.5])))


def falcon(d):
    sizes = dims(d, own_heads=False, grouped=False)
    del sizes["intermediate_size"]
    new = d([True, False])
    more = dict(num_kv_heads=1) if new else dict(multi_query=d([True, False]), parallel_attn=d([True, False]))
    return dict(sizes, new_decoder_architecture=new, bias=d([True, False]), ffn_hidden_size=d([36, 64]), alibi=d([True, False]),
                **more)


def bloom(d):
    sizes = dims(d, own_heads=False, grouped=False)
    return dict(vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"], n_head=sizes["num_attention_heads"],
                n_layer=sizes["num_hidden_layers"], tie_word_embeddings=sizes["tie_word_embeddings"], seq_length=CONTEXT)


def mpt(d):
    sizes = dims(d, own_heads=False, grouped=False)
    return dict(vocab_size=sizes["vocab_size"], d_model=sizes["hidden_size"], n_heads=sizes["num_attention_heads"],
                n_layers=sizes["num_hidden_layers"], max_seq_len=CONTEXT,
                attn_config=dict(clip_qkv=d([None, 0.7]), softmax_scale=d([None, 0.4])))


def olmo(d):
    return dict(dims(d, own_heads=False), **turns(d), attention_bias=d([True, False]), clip_qkv=d([None, 0.6, 1.0]))


def nemotron(d):
    return dict(dims(d), mlp_bias=d([True, False]), attention_bias=d([True, False]), hidden_act=d(["relu2", "silu"]),
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=d([0.5, 1.0])))


FAMILIES = dict(
    bloom=bloom, cohere=cohere, cohere2=cohere2, exaone4=exaone4, falcon=falcon, gemma=gemma, gemma2=gemma2,
    gemma3_text=gemma3_text, glm=glm, glm4=glm, glm4_moe=glm4_moe, gpt2=gpt2, gpt_neox=gpt_neox, granite=granite,
    granitemoe=granitemoe, hunyuan_v1_dense=hunyuan, llama=llama, ministral=ministral, ministral3=ministral3, mistral=mistral,
    mixtral=mixtral, mpt=mpt, nemotron=nemotron, olmo=olmo, olmo2=olmo2, olmo3=olmo3, olmoe=olmoe, phi=phi, phi3=phi3,
    qwen2=qwen2, qwen2_moe=qwen2_moe, qwen3=qwen3, qwen3_moe=qwen3_moe, seed_oss=seed_oss, smollm3=smollm3, stablelm=stablelm,
    starcoder2=starcoder2)

# Tokens of the tokenizers that the test puts beside encoders.
ENCODER_VOCAB = 300


def encoder(d):
    """What any encoder of BERT's kind has."""
    heads = d([1, 2, 3, 4])
    return dict(vocab_size=ENCODER_VOCAB, num_hidden_layers=d([1, 2, 3]), num_attention_heads=heads,
                hidden_size=heads * d([8, 12, 16]), intermediate_size=d([20, 36, 48]), max_position_embeddings=CONTEXT,
                num_labels=d([1, 2, 3]))


def bert(d):
    return dict(encoder(d), hidden_act=d(["gelu", "gelu_new", "relu", "silu"]), type_vocab_size=d([1, 2]))


def electra(d):
    sizes = bert(d)
    return dict(sizes, embedding_size=d([sizes["hidden_size"], 12, 40]))


def distilbert(d):
    sizes = encoder(d)
    return dict(vocab_size=ENCODER_VOCAB, dim=sizes["hidden_size"], n_layers=sizes["num_hidden_layers"],
                n_heads=sizes["num_attention_heads"], hidden_dim=sizes["intermediate_size"], max_position_embeddings=CONTEXT,
                activation=d(["gelu", "relu"]), num_labels=sizes["num_labels"])


def modernbert(d):
    return dict(encoder(d), local_attention=d([6, 14, 128]), global_attn_every_n_layers=d([1, 2, 3]),
                classifier_pooling=d(["cls", "mean"]), classifier_bias=d([True, False]), norm_bias=d([True, False]),
                attention_bias=d([True, False]), mlp_bias=d([True, False]), hidden_activation=d(["gelu", "silu"]),
                classifier_activation=d(["gelu", "silu"]))


def rotary(d):
    return dict(encoder(d), type_vocab_size=d([1, 2]))


def deberta(d):
    sizes = dict(encoder(d), hidden_act=d(["gelu", "gelu_new", "relu"]), type_vocab_size=d([0, 0, 2]), relative_attention=True,
                 share_att_key=True, pos_att_type=d(["p2c|c2p", ["c2p", "p2c"]]), position_biased_input=d([False, False, True]),
                 norm_rel_ebd=d(["layer_norm", "layer_norm", "none"]), pooler_hidden_act=d(["gelu", "tanh"]),
                 max_relative_positions=d([-1, 40, 300]))
    return sizes | d([{}, dict(position_buckets=-1), dict(position_buckets=8), dict(position_buckets=32)])


def mpnet(d):
    return dict(encoder(d), hidden_act=d(["gelu", "gelu_new", "relu", "silu"]), relative_attention_num_buckets=32)


ENCODERS = {"bert": bert, "camembert": bert, "deberta-v2": deberta, "distilbert": distilbert, "electra": electra, "gte": rotary,
            "jina_embeddings_v3": rotary, "modernbert": modernbert, "mpnet": mpnet, "nomic_bert": rotary, "roberta": bert,
            "xlm-roberta": bert}


# Weights.

def fnv(text):
    """FNV-1a of 64 bits."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 & MASK
    return value


def weight(name, shape, scale, offset):
    """Values of a tensor: offset + scale * u with u in [-1, 1) in steps of 2**-7, around an offset of 2**-4. `scale` is a power
    of two. u of element i are the first bits of splitmix64's output i + 1 for the name's hash as its seed."""
    count = int(np.prod(shape))
    z = np.uint64(fnv(name)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    bits = 5 if offset else 8
    u = (z >> np.uint64(64 - bits)).astype(np.float32) / np.float32(1 << bits - 1) - np.float32(1)
    return torch.from_numpy(np.float32(offset) + np.float32(scale) * u).reshape(shape)


def kind(name, tensor):
    """Scale and offset of a tensor: norms stay near what they begin with, products keep the size of what they are given."""
    if tensor.dim() < 2:
        return 0.125, float(bool((tensor == 1).all()))
    inner = tensor.shape[-1]
    return float(2.0 ** round(np.log2((3 / inner) ** 0.5))), 0.0


def auto(family):
    """The class of a family's models."""
    return AutoModelForCausalLM if family in FAMILIES else AutoModelForSequenceClassification


def drawn(family, number):
    """A source of chance, and a model; the next try where transformers refuses one."""
    for attempt in range(50):
        rng = random.Random(f"{family} {number} {attempt}")
        settings = (FAMILIES | ENCODERS)[family](lambda options: options[rng.randrange(len(options))])
        try:
            config = AutoConfig.for_model(family, bos_token_id=0, eos_token_id=1, pad_token_id=2, **settings)
            torch.manual_seed(0)
            yield rng, auto(family).from_config(config)
        except Exception as error:
            print(family, number, "drawn again:", type(error).__name__, str(error)[:100])


@torch.no_grad()
def answered(model, ids):
    """Last row of logits, greedy continuation, and the smallest distance between the two best logits on the way."""
    inputs = torch.tensor([ids])
    out = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=NEW_TOKENS,
                         output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(out.logits)[:, 0].float()
    two = logits.topk(2, -1).values
    return logits[0], out.sequences[0, len(ids):].tolist(), (two[:, 0] - two[:, 1]).min().item()


def prompts(model, rng, vocab):
    """A short and a long prompt with what follows, or None."""
    found = []
    for low, high in ((1, 12), (40, LONGEST)):
        for _ in range(60):
            ids = [rng.randrange(3, vocab) for _ in range(rng.randint(low, high))]
            row, greedy, gap = answered(model, ids)
            if gap >= MARGIN and len(set(greedy)) > 1 and bool(row.isfinite().all()):
                break
        else:
            return None
        found.append({"ids": ids, "greedy_ids": greedy, "last_row": [float(f"{x:.6g}") for x in row.tolist()]})
    return found


@torch.no_grad()
def classified(model, rng):
    """Inputs and their logits."""
    found = []
    for low, high in ((1, 12), (40, LONGEST)):
        ids = [rng.randrange(5, ENCODER_VOCAB) for _ in range(rng.randint(low, high))]
        inputs = torch.tensor([ids])
        logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0]
        found.append({"ids": ids, "greedy_ids": [], "last_row": [float(f"{x:.6g}") for x in logits.tolist()]})
    return found


def shapes(config, folder):
    """The tensors that a model of this config.json has; none if transformers refuses it."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        with torch.device("meta"):
            model = auto(config["model_type"]).from_config(AutoConfig.from_pretrained(folder))
        return {name: tensor.shape for name, tensor in model.state_dict().items()}
    except Exception:
        return None


def as_version_4(config):
    """config.json as transformers 4 wrote it, where it could."""
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rope:
        return config
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    old.update(rope_theta=rope.pop("rope_theta"), torch_dtype=config["dtype"], transformers_version="4.44.0")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope.pop("rope_type") != "default":
        old["rope_scaling"] = config["rope_parameters"] | {}
        del old["rope_scaling"]["rope_theta"]
    if config["model_type"] == "gpt_neox":
        old["rotary_emb_base"] = old.pop("rope_theta")
        old["rotary_pct"] = old.pop("partial_rotary_factor", 0.25)
    return old


def rewritten(config, rng, folder):
    """The configuration, spelled as it may be, with fewer fields, and with some that are null."""
    wanted = shapes(config, folder)
    old = as_version_4(config) if rng.random() < 0.4 else config
    if shapes(old, folder) == wanted:
        config = old
    for key in rng.sample(sorted(config), len(config)):
        chance = rng.random()
        # More experts for a token than there are is nonsense that transformers computes where no layer has any.
        # Heads that are one or no dimension wide are, too. Nobody knows what an encoder without `architectures` is for.
        kept = {"model_type", "num_experts_per_tok", "num_attention_heads", "n_head", "n_heads"}
        if config["model_type"] in ENCODERS:
            kept |= {"architectures"}
        if config["model_type"] == "deberta-v2":
            # Of models without them, none is served.
            kept |= {"relative_attention", "share_att_key", "pos_att_type"}
        if key in kept or chance > 0.35:
            continue
        less = {k: v for k, v in config.items() if k != key}
        if chance < 0.04:
            less[key] = None
        if shapes(less, folder) == wanted:
            config = less
    return config


def case(family, number, folder):
    for rng, model in drawn(family, number):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[rng.randrange(3)]
        model.to(dtype).save_pretrained(folder)
        files = sorted(folder.glob("*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        plan = {name: (list(tensor.shape), *kind(name, tensor)) for name, tensor in tensors.items()}
        for file in [*files, *folder.glob("*.index.json")]:
            file.unlink()
        tensors = {name: weight(name, *of).to(dtype) for name, of in plan.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = rewritten(json.loads((folder / "config.json").read_text()), rng, folder)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").unlink(missing_ok=True)
        try:
            # Falcon's eager attention adds its slopes twice.
            how = "sdpa" if config.get("alibi") else "eager"
            loaded, info = auto(family).from_pretrained(
                folder, dtype=torch.float32, attn_implementation=how, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
            loaded.eval()
            if family in FAMILIES:
                loaded.generation_config.eos_token_id = None
                rows = prompts(loaded, rng, loaded.config.vocab_size)
            else:
                rows = classified(loaded, rng)
        except Exception as error:
            print(family, number, "drawn again:", type(error).__name__, str(error)[:200])
            continue
        if rows:
            return {"family": family, "number": number, "config": config, "dtype": str(dtype).removeprefix("torch."), "tensors": compact(plan),
                    "prompts": rows}
        print(family, number, "drawn again: no clear prompts")
    raise SystemExit(f"{family} {number}: nothing to be had")


def compact(plan):
    """Tensors by pattern, where `{}` stands for every number in the name: shape, scale, offset, and the numbers."""
    patterns = {}
    for name, (shape, scale, offset) in plan.items():
        pattern, numbers = re.sub(r"\d+(?=\.)", "{}", name), [int(n) for n in re.findall(r"\d+(?=\.)", name)]
        key = (pattern, tuple(shape), scale, offset)
        patterns.setdefault(key, []).append(numbers)
    return [[pattern, list(shape), scale, offset, numbers] for (pattern, shape, scale, offset), numbers in patterns.items()]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=pathlib.Path(__file__).parent / "random_configs.json")
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--only", type=lambda names: names.split(","), default=sorted(FAMILIES | ENCODERS))
    arguments = parser.parse_args()
    lines, kept = [], {}
    if set(arguments.only) < set(FAMILIES | ENCODERS):
        for line in arguments.out.read_text().splitlines()[1:-1]:
            kept.setdefault(json.loads(line.rstrip(","))["family"], []).append(line.rstrip(","))
    for family in sorted(FAMILIES | ENCODERS):
        if family not in arguments.only:
            lines += kept[family]
            continue
        for number in range(arguments.each):
            with tempfile.TemporaryDirectory() as folder:
                lines.append(json.dumps(case(family, number, pathlib.Path(folder)), separators=(",", ":")))
    versions = {m.__name__: m.__version__ for m in (transformers, torch)}
    arguments.out.write_text(f'{{"versions":{json.dumps(versions)},"models":[\n' + ",\n".join(lines) + "\n]}\n")
    print(arguments.out, arguments.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
