//! What a family may have and is not served with is refused by the field that says so.

use serde_json::json;

use super::sentences::refused_of;

#[test]
fn what_a_family_is_not_served_with_is_refused_by_field() {
    let deberta = "deberta-v2-classify-f32";
    for (name, field, value, expected) in [
        (deberta, "relative_attention", json!(false), "true: models without are not served"),
        (deberta, "share_att_key", json!(false), "true: models without are not served"),
        (deberta, "conv_kernel_size", json!(3), "models with a convolution behind their first layer"),
        (deberta, "pos_att_type", json!(["c2p"]), "both c2p and p2c"),
        (deberta, "pos_att_type", json!("p2c"), "both c2p and p2c"),
        (deberta, "pos_att_type", json!([]), "both c2p and p2c"),
        (deberta, "norm_rel_ebd", json!("batch_norm"), "layer_norm or none"),
        (deberta, "position_buckets", json!(3), "at least 4, or -1"),
        (deberta, "position_buckets", json!(1 << 20), "an integer in 1..="),
        (deberta, "embedding_size", json!(20), "an integer in 36..=36"),
        (deberta, "pooler_hidden_size", json!(20), "an integer in 36..=36"),
        ("deberta-v2-mlm-bf16", "max_relative_positions", json!(1 << 17), "at most 65536"),
        ("bloom-f32", "apply_residual_connection_post_layernorm", json!(true), "false"),
        ("bloom-f32", "n_embed", json!(50), "a multiple of the number of heads (6)"),
        ("mpt-bf16", "logit_scale", json!("inv_sqrt_d_model"), "null"),
        ("mpt-bf16", "attn_config", json!("flash"), "an object"),
        ("mpt-bf16", "attn_config.alibi", json!(false), "true"),
        ("mpt-bf16", "attn_config.alibi_bias_max", json!(16), "8, which is what transformers takes it for"),
        ("mpt-bf16", "attn_config.prefix_lm", json!(true), "false"),
        ("mpt-bf16", "attn_config.qk_ln", json!(true), "false"),
        ("mpt-bf16", "attn_config.clip_qkv", json!(-1), "a positive finite number"),
        ("olmo-bf16", "clip_qkv", json!("none"), "a positive finite number"),
    ] {
        let said = refused_of(name, "config.json", |config| match field.split_once('.') {
            Some((object, field)) => config[object][field] = value.clone(),
            None => config[field] = value.clone(),
        });
        assert!(said.contains(&format!("{field} is ")) && said.contains(expected), "{said}");
    }
}
