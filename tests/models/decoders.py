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
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


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
    # One layer of two turns nothing.
    "smollm3-f32": (of("smollm3", num_hidden_layers=4, intermediate_size=32, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True,
                       sliding_window=15, layer_types=["full_attention", "sliding_attention"] * 2), F32, "1GB"),
    # A factor on everything that may have one.
    "granite-f32": (of("granite", embedding_multiplier=3.5, attention_multiplier=0.4, residual_multiplier=0.6,
                       logits_scaling=1.7, attention_bias=True, mlp_bias=True), F32, "1GB"),
    "granitemoe-bf16": (of("granitemoe", embedding_multiplier=2.5, attention_multiplier=0.4, residual_multiplier=0.7,
                           logits_scaling=0.6, num_local_experts=5, num_experts_per_tok=2, intermediate_size=20,
                           without=["head_dim"]), BF16, "1GB"),
    # Norms of what blocks yield, and of all heads together.
    "olmo2-f32": (of("olmo2", without=["head_dim"]), F32, "1GB"),
    # The same, with windows, and yarn where there is none.
    "olmo3-bf16": (of("olmo3", num_hidden_layers=4, sliding_window=14, without=["head_dim"], rope_parameters=dict(
        full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=500.0))), BF16, "1GB"),
    "olmoe-bf16": (of("olmoe", num_experts=6, num_experts_per_tok=3, intermediate_size=20, without=["head_dim"]),
                   BF16, "1GB"),
    # Layers without a window turn nothing.
    "exaone4-f32": (of("exaone4", num_hidden_layers=4, sliding_window=12, sliding_window_pattern=2), F32, "1GB"),
    # Norms of heads once they are turned, by a base that is stretched for good.
    "hunyuan-f32": (of("hunyuan_v1_dense", rope_parameters=dict(rope_type="dynamic", alpha=50.0, factor=1.0,
                                                                rope_theta=10000.0)), F32, "1GB"),
    "seed-oss-bf16": (of("seed_oss", attention_bias=True, attention_out_bias=False), BF16, "1GB"),
    # Yarn, and queries that are sharpened every 16 positions.
    "ministral3-f32": (of("ministral3", rope_parameters=dict(
        YARN, original_max_position_embeddings=16, factor=16.0, mscale=1.0, mscale_all_dim=1.0,
        llama_4_scaling_beta=0.3)), F32, "1GB"),
    # Even dimensions turn with odd ones, half of each head.
    "glm-bf16": (of("glm"), BF16, "1GB"),
    "glm4-f32": (of("glm4"), F32, "1GB"),
    # One norm for both blocks, a factor on logits, factors of its own for each head.
    "cohere-norms-f32": (of("cohere", logit_scale=0.4, use_qk_norm=True, without=["head_dim"]), F32, "1GB"),
    "cohere2-bf16": (of("cohere2", num_hidden_layers=4, logit_scale=0.4, sliding_window=11, tie_word_embeddings=True,
                        layer_types=["sliding_attention", "sliding_attention", "full_attention",
                                     "sliding_attention"]), BF16, "1GB"),
    "starcoder2-f32": (of("starcoder2", sliding_window=17, without=["head_dim"]), F32, "1GB"),
    "stablelm-norms-f32": (of("stablelm", qk_layernorm=True, use_parallel_residual=True, num_attention_heads=2,
                              num_key_value_heads=1, without=["head_dim"]), F32, "1GB"),
    "stablelm-bias-bf16": (of("stablelm", use_qkv_bias=True, num_attention_heads=2, without=["head_dim"]), BF16, "1GB"),
    # One head of keys, one norm.
    "falcon-7b-bf16": (of("falcon", hidden_size=48, tie_word_embeddings=True,
                          without=["head_dim", "num_key_value_heads", "intermediate_size"]), BF16, "1GB"),
    # Several heads of keys, a norm for each block.
    "falcon-40b-f32": (of("falcon", new_decoder_architecture=True, num_kv_heads=2, bias=True, num_hidden_layers=2,
                          tie_word_embeddings=True, without=["head_dim", "num_key_value_heads", "intermediate_size"]),
                       F32, "1GB"),
    # One block after the other, as many heads of keys as of queries.
    "falcon-rw-f32": (of("falcon", multi_query=False, parallel_attn=False, bias=True, hidden_size=40,
                         ffn_hidden_size=56, tie_word_embeddings=True,
                         without=["head_dim", "num_key_value_heads", "intermediate_size"]), F32, "1GB"),
    "nemotron-f32": (of("nemotron", mlp_bias=True), F32, "1GB"),
    # An expert for all tokens, with a gate.
    "qwen2-moe-f32": (of("qwen2_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, num_hidden_layers=2,
                         shared_expert_intermediate_size=20, intermediate_size=24, decoder_sparse_step=2,
                         without=["head_dim"]), F32, "1GB"),
    # Sigmoids, corrections and groups; a dense layer first; an expert for all tokens.
    "glm4-moe-f32": (of("glm4_moe", n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3,
                        moe_intermediate_size=8, n_shared_experts=2, routed_scaling_factor=1.8, num_hidden_layers=2,
                        first_k_dense_replace=1, use_qk_norm=True, intermediate_size=40), F32, "1GB"),
    # Whole groups of 32: all products can be int8 or int4, and those of many rows run on tensor cores.
    "glm4-moe-groups-bf16": (of("glm4_moe", hidden_size=64, n_routed_experts=4, n_group=2, topk_group=1,
                                num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, head_dim=16,
                                num_hidden_layers=2, intermediate_size=64), BF16, "1GB"),
}

TEXT = dict(SMALL, bos_token_id=0, eos_token_id=1, pad_token_id=2, max_position_embeddings=256)
HEADLESS = {k: v for k, v in TEXT.items() if k != "head_dim"}
SEES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
# Decoders of text inside of models that see, whose weights lie beside theirs.
FIXTURES |= {
    "gemma3-sees-bf16": (dict(
        model_type="gemma3", mm_tokens_per_image=4, vision_config=dict(SEES, model_type="siglip_vision_model"),
        text_config=dict(TEXT, model_type="gemma3_text", sliding_window=13, query_pre_attn_scalar=16,
                         tie_word_embeddings=True,
                         layer_types=["sliding_attention", "full_attention", "sliding_attention"])), BF16, "1GB"),
    "mistral3-sees-bf16": (dict(
        model_type="mistral3", vision_config=dict(SEES, model_type="pixtral", head_dim=8),
        text_config=dict(TEXT, model_type="mistral", sliding_window=None)), BF16, "1GB"),
    "qwen2-5-vl-sees-bf16": (dict(
        model_type="qwen2_5_vl", vision_config=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2,
                                                    out_hidden_size=32, fullatt_block_indexes=[0]),
        text_config=dict(HEADLESS, model_type="qwen2_5_vl_text",
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                              mrope_section=[1, 1, 2]))), BF16, "1GB"),
    "smolvlm-sees-bf16": (dict(
        model_type="smolvlm", scale_factor=2, image_token_id=319, vision_config=dict(SEES, model_type="smolvlm_vision"),
        text_config=dict(TEXT, model_type="llama")), BF16, "1GB"),
}
# Those that came later, behind the others: a fixture's seeds go by its place.
FIXTURES |= {
    # Factors less one, scaled embeddings, and an activation by the name that the first files have.
    "gemma-f32": (of("gemma", hidden_act="gelu", num_key_value_heads=1), F32, "1GB"),
    "idefics3-sees-f32": (dict(
        model_type="idefics3", scale_factor=2, image_token_id=319, vision_config=dict(SEES, model_type="idefics3_vision"),
        text_config=dict(TEXT, model_type="llama", num_key_value_heads=1)), F32, "1GB"),
    "internvl-sees-bf16": (dict(
        model_type="internvl", image_token_id=319, vision_config=dict(SEES, model_type="internvl_vision", image_size=[16, 16],
                                                                      patch_size=[8, 8]),
        text_config=dict(HEADLESS, model_type="qwen2")), BF16, "1GB"),
    "llava-sees-f16": (dict(
        model_type="llava", image_token_id=319, vision_config=dict(SEES, model_type="clip_vision_model"),
        text_config=dict(TEXT, model_type="llama", tie_word_embeddings=False)), F16, "1GB"),
    "qwen2-vl-sees-f32": (dict(
        model_type="qwen2_vl", vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=1),
        text_config=dict(HEADLESS, model_type="qwen2_vl_text", tie_word_embeddings=True,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]))), F32, "1GB"),
    "qwen3-vl-sees-bf16": (dict(
        model_type="qwen3_vl", vision_config=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32,
                                                  num_position_embeddings=16, deepstack_visual_indexes=[0]),
        text_config=dict(TEXT, model_type="qwen3_vl_text",
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2],
                                              mrope_interleaved=True))), BF16, "1GB"),
    # Scores that fall with the distance, by slopes of six heads: no power of two.
    "bloom-f32": (dict(model_type="bloom", vocab_size=320, hidden_size=48, n_layer=3, n_head=6, seq_length=256,
                       tie_word_embeddings=False), F32, "1GB"),
    "bloom-tiles-bf16": (dict(model_type="bloom", vocab_size=320, hidden_size=64, n_layer=2, n_head=4, seq_length=256,
                              tie_word_embeddings=False), BF16, "1GB"),
    # As the RW ones are published: the same, rounded, one block after the other.
    "falcon-alibi-bf16": (of("falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True, num_attention_heads=6,
                             hidden_size=48, without=["head_dim", "num_key_value_heads", "intermediate_size"]), BF16, "1GB"),
    # The same beside one head of keys.
    "falcon-alibi-one-f32": (of("falcon", alibi=True, multi_query=True, parallel_attn=True, hidden_size=32,
                                without=["head_dim", "num_key_value_heads", "intermediate_size"]), F32, "1GB"),
    # A scale of its own, and bounds on queries, keys and values.
    "mpt-clip-f32": (dict(model_type="mpt", vocab_size=320, d_model=48, n_heads=6, n_layers=3, max_seq_len=256,
                          attn_config=dict(clip_qkv=0.9, softmax_scale=0.5)), F32, "1GB"),
    "mpt-bf16": (dict(model_type="mpt", vocab_size=320, d_model=64, n_heads=4, n_layers=2, max_seq_len=256), BF16, "1GB"),
    # Norms without factors, and bounds on queries, keys and values; those of OLMoE are normed before.
    "olmo-clip-f32": (of("olmo", clip_qkv=0.8, without=["head_dim"]), F32, "1GB"),
    "olmo-bf16": (of("olmo", hidden_size=64, attention_bias=True, without=["head_dim"]), BF16, "1GB"),
    "olmoe-clip-f32": (of("olmoe", clip_qkv=0.7, num_experts=5, num_experts_per_tok=2, intermediate_size=20, num_hidden_layers=2,
                          without=["head_dim"]), F32, "1GB"),
    # As Phi-4: fused products, grouped, and nothing else; as its mini: tied, three quarters of each head turn, by one set or another.
    "phi4-bf16": (of("phi3", original_max_position_embeddings=256, without=["head_dim"]), BF16, "1GB"),
    "phi4-mini-f32": (of("phi3", hidden_size=64, num_attention_heads=4, tie_word_embeddings=True, without=["head_dim"],
                         original_max_position_embeddings=64,
                         rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75,
                                              short_factor=[1.0] * 6, long_factor=[1.0, 1.2, 1.7, 2.6, 4.0, 7.0])), F32, "1GB"),
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
