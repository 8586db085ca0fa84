"""Convert models of this folder by llama.cpp's own converter, to hold our reading of GGUF files against its writing.

usage: python convert_gguf.py LLAMA_CPP OUT [DIR…]     (needs what convert_hf_to_gguf.py needs, and requirements.txt)

LLAMA_CPP is a checkout of llama.cpp (the source distribution of llama-cpp-python on PyPI has one in vendor/). Without DIR, small
models are made in OUT/models that have nothing which the converter, or metadata, do not know: then
`STRATA_TEST_GGUF=OUT STRATA_TEST_GGUF_MODELS=OUT/models cargo test -p strata-worker --lib gguf_file_answers -- --nocapture`
compares logits and greedy answers. Ours are not among the tokenizers that the converter knows by name, so that it is told one.
"""
import json
import pathlib
import shutil
import sys

import torch

import make_fixtures
from decoders import of

NARROW = ["head_dim"]
FALCON = ["head_dim", "num_key_value_heads", "intermediate_size"]


def rope(partial=None, **more):
    return dict(rope_type="default", rope_theta=10000.0, **({} if partial is None else {"partial_rotary_factor": partial}), **more)


# name: (configuration, fields of config.json as older versions of transformers have them, which the converter reads)
MODELS = {
    "cohere": (of("cohere", logit_scale=0.4, use_qk_norm=True, tie_word_embeddings=True, without=NARROW), {}),
    "cohere2": (of("cohere2", num_hidden_layers=8, logit_scale=0.4, sliding_window=11, tie_word_embeddings=True), dict(rotary_pct=1.0)),
    "falcon-7b": (of("falcon", hidden_size=48, tie_word_embeddings=True, without=FALCON), dict(num_kv_heads=1)),
    "falcon-40b": (of("falcon", hidden_size=64, new_decoder_architecture=True, num_kv_heads=2, without=FALCON), {}),
    "gemma": (of("gemma", tie_word_embeddings=True), {}),
    "gemma2": (of("gemma2", tie_word_embeddings=True, num_hidden_layers=4, sliding_window=13, query_pre_attn_scalar=12), {}),
    "gemma3": (of("gemma3_text", tie_word_embeddings=True, num_hidden_layers=7, sliding_window=13, query_pre_attn_scalar=12), {}),
    "glm": (of("glm", head_dim=8), dict(seq_length=256)),
    "glm4": (of("glm4", without=NARROW), {}),
    "glm4-moe": (of("glm4_moe", n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8,
                    n_shared_experts=1, num_hidden_layers=2, intermediate_size=40), {}),
    "gpt2": (dict(model_type="gpt2", vocab_size=320, hidden_size=40, n_inner=72, num_hidden_layers=3, num_attention_heads=4),
             dict(n_ctx=256)),
    "granite": (of("granite", embedding_multiplier=3.5, attention_multiplier=0.4, residual_multiplier=0.6, logits_scaling=1.7,
                   without=NARROW), {}),
    "granitemoe": (of("granitemoe", num_local_experts=5, num_experts_per_tok=2, intermediate_size=20, without=NARROW), {}),
    "mistral": (of("mistral", sliding_window=None), {}),
    "mixtral": (of("mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=None), {}),
    "nemotron": (of("nemotron", mlp_bias=True, without=NARROW), {}),
    "neox": (dict(model_type="gpt_neox", vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                  num_attention_heads=4, rope_parameters=rope(0.34)), dict(rotary_pct=0.34)),
    "neox-sequential": (dict(model_type="gpt_neox", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                             num_attention_heads=4, use_parallel_residual=False, rope_parameters=rope(1.0)), dict(rotary_pct=1.0)),
    "phi3": (of("phi3", original_max_position_embeddings=256, without=NARROW), {}),
    "qwen2-moe": (of("qwen2_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, num_hidden_layers=2,
                     shared_expert_intermediate_size=20, without=NARROW), {}),
    "qwen3-moe": (of("qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, num_hidden_layers=2,
                     norm_topk_prob=True), {}),
    "qwen3-yarn": (of("qwen3", rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0,
                                                    original_max_position_embeddings=64)), {}),
    "stablelm": (of("stablelm", use_parallel_residual=False, num_attention_heads=2, without=NARROW), {}),
    "starcoder2": (of("starcoder2", sliding_window=None, without=NARROW), {}),
}


def make(name, seed, path):
    settings, fields = MODELS[name]
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    make_fixtures.make_tokenizer(path)
    make_fixtures.make_model(settings, seed).to(torch.float32).save_pretrained(path)
    make_fixtures.more.set_fields(path, **fields)
    generator = torch.Generator().manual_seed(seed)
    prompts = [[0] + torch.randint(3, 320, (count,), generator=generator).tolist() for count in (4, 90)]
    # Of the answers, only the length counts.
    rows = [{"ids": ids, "greedy_ids": [0] * 12} for ids in prompts]
    (path / "expected.json").write_text(json.dumps({"prompts": rows}))


def converter(llama_cpp):
    """Converts a directory to a file, in f32."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import conversion
    import gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    load = conversion.ModelBase.load_hparams

    def with_own_fields(directory, *args, **more):
        # transformers drops those that are of older versions.
        own = json.loads((pathlib.Path(directory) / "config.json").read_text())
        return {**load(directory, *args, **more), **{k: v for k, v in own.items() if k not in ("text_config", "dtype")}}

    conversion.ModelBase.load_hparams = staticmethod(with_own_fields)

    def convert(directory, target):
        fields = conversion.ModelBase.load_hparams(directory, False)
        model = conversion.get_model_class(conversion.get_model_architecture(fields, conversion.ModelType.TEXT))
        byte_level = type("ByteLevel", (model,), {"model_arch": model.model_arch, "set_vocab": lambda self: self._set_vocab_gpt2()})
        for kind in (model, byte_level):
            try:
                with torch.inference_mode():
                    return kind(directory, gguf.LlamaFileType.ALL_F32, target, eager=True).write()
            except FileNotFoundError as missing:
                # A family whose own models have SentencePiece's file.
                print(directory.name, missing)
            except (KeyError, ValueError) as odd:
                print(directory.name, type(odd).__name__, odd)
        target.unlink(missing_ok=True)
        print(directory.name, "was not converted")

    return convert


def main():
    llama_cpp, out = map(pathlib.Path, sys.argv[1:3])
    directories = [pathlib.Path(given) for given in sys.argv[3:]]
    if not directories:
        for seed, name in enumerate(MODELS):
            make(name, seed, out / "models" / name)
            directories.append(out / "models" / name)
    convert = converter(llama_cpp.resolve())
    for directory in directories:
        convert(directory, out / f"{directory.name}.gguf")


if __name__ == "__main__":
    main()
