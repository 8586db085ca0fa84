//! Architectures of llama.cpp's as families: what their metadata and tensors say, in the words of `config.json`.

use serde_json::{Map, Value, json};

use super::{super::WeightsError, metadata::Metadata};

/// What a file's tensors say that its metadata do not.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Whether there is a head of its own.
    pub head: bool,
    /// Layers that have no experts.
    pub dense: Vec<usize>,
    /// Whether queries and keys have norms.
    pub norms_queries: bool,
    /// Whether attention has a norm beside the one of the feed-forward block: Falcon's.
    pub norms_attention: bool,
    /// Rows of the table of segments: BERT's.
    pub segments: Option<usize>,
    /// Classes that a head tells.
    pub classes: Option<usize>,
    /// Whether that head has a dense layer before.
    pub dense_head: bool,
    /// Rows of the first feed-forward block's way up.
    pub inner: Option<usize>,
    /// By how much each pair of dimensions is slowed: Llama 3's, which the metadata do not describe.
    pub slowed: Option<Vec<f32>>,
    /// The same for short and for long sequences: Phi 3's.
    pub short_and_long: Option<[Vec<f32>; 2]>,
}

/// A field of `config.json`, and the entry that it is made of.
pub(super) type Field = (&'static str, &'static str);

/// What an architecture has that is no field of its own.
type More = fn(&Metadata, &Tensors, &mut Map<String, Value>) -> Result<(), WeightsError>;

/// An architecture of llama.cpp's that is a family here.
pub(super) struct Architecture {
    /// Its name there.
    pub name: &'static str,
    /// `model_type` of `config.json`.
    pub family: &'static str,
    /// The rows of queries and keys lie as they turn: even ones with odd ones, as llama.cpp's conversion turns Llama's.
    pub turned: bool,
    pub fields: &'static [Field],
    /// What else there is.
    pub more: More,
}

/// What every architecture has.
pub(super) const COMMON: &[Field] = &[
    ("hidden_size", "embedding_length"),
    ("num_hidden_layers", "block_count"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("max_position_embeddings", "context_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
];
const EXPERTS: [Field; 3] = [
    ("num_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
];

/// How experts are chosen, in llama.cpp's numbers: by sigmoids.
const SIGMOIDS: u64 = 2;

const fn plain(name: &'static str, family: &'static str, fields: &'static [Field]) -> Architecture {
    Architecture { name, family, turned: false, fields, more: |_, _, _| Ok(()) }
}

/// Every architecture that is read, by name.
pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { more: encodes, ..plain("bert", "bert", ENCODERS) },
    plain("chatglm", "glm", &[]),
    Architecture {
        more: |_, tensors, config| {
            config.insert("use_qk_norm".into(), tensors.norms_queries.into());
            Ok(())
        },
        ..plain(
            "command-r",
            "cohere",
            &[("layer_norm_eps", "attention.layer_norm_epsilon"), ("logit_scale", "logit_scale")],
        )
    },
    Architecture {
        more: |metadata, _, config| window(metadata, config, Some(4)),
        ..plain(
            "cohere2",
            "cohere2",
            &[("layer_norm_eps", "attention.layer_norm_epsilon"), ("logit_scale", "logit_scale")],
        )
    },
    Architecture {
        more: |metadata, _, config| window(metadata, config, Some(4)),
        ..plain("exaone4", "exaone4", &[])
    },
    Architecture {
        more: |metadata, _, config| {
            // The largest one counts a head's share of the width.
            scores_by_head(metadata, config, 46)?;
            window(metadata, config, Some(2))
        },
        ..plain(
            "gemma2",
            "gemma2",
            &[
                ("attn_logit_softcapping", "attn_logit_softcapping"),
                ("final_logit_softcapping", "final_logit_softcapping"),
            ],
        )
    },
    Architecture {
        more: |metadata, _, config| {
            scores_by_head(metadata, config, 62)?;
            turn_apart(metadata, config, 10_000.0.into())?;
            window(metadata, config, Some(6))
        },
        ..plain("gemma3", "gemma3_text", &[("final_logit_softcapping", "final_logit_softcapping")])
    },
    Architecture {
        more: |metadata, tensors, config| {
            config.insert("num_kv_heads".into(), config["num_key_value_heads"].clone());
            config.insert("ffn_hidden_size".into(), tensors.inner.into());
            // Where there is but one head of keys, all kinds of it are the same.
            let several = metadata.integer("attention.head_count_kv")?.is_some_and(|heads| heads > 1);
            config.insert("new_decoder_architecture".into(), (several || tensors.norms_attention).into());
            config.insert("num_ln_in_parallel_attn".into(), (1 + u8::from(tensors.norms_attention)).into());
            Ok(())
        },
        ..plain("falcon", "falcon", &[("layer_norm_epsilon", "attention.layer_norm_epsilon")])
    },
    plain("gemma", "gemma", &[]),
    plain("glm4", "glm4", &[]),
    Architecture {
        more: |metadata, tensors, config| {
            match metadata.integer("expert_gating_func")? {
                None | Some(SIGMOIDS) => {}
                Some(_) => return Err(metadata.own_wrong("expert_gating_func", "expected 2, sigmoids")),
            }
            let normalize = metadata.own_flag("expert_weights_norm")?.unwrap_or(true);
            config.insert("norm_topk_prob".into(), normalize.into());
            config.insert("use_qk_norm".into(), tensors.norms_queries.into());
            // Those that guess tokens ahead are counted, too.
            let ahead = metadata.integer("nextn_predict_layers")?.unwrap_or(0);
            let layers = metadata.integer("block_count")?.unwrap_or(0).saturating_sub(ahead);
            config.insert("num_hidden_layers".into(), layers.into());
            Ok(())
        },
        ..plain(
            "glm4moe",
            "glm4_moe",
            &[
                ("n_routed_experts", "expert_count"),
                EXPERTS[1],
                EXPERTS[2],
                ("n_shared_experts", "expert_shared_count"),
                ("n_group", "expert_group_count"),
                ("topk_group", "expert_group_used_count"),
                ("first_k_dense_replace", "leading_dense_block_count"),
                ("routed_scaling_factor", "expert_weights_scale"),
            ],
        )
    },
    Architecture {
        more: |_, tensors, config| {
            config.insert("n_inner".into(), tensors.inner.into());
            Ok(())
        },
        ..plain(
            "gpt2",
            "gpt2",
            &[
                ("n_embd", "embedding_length"),
                ("n_layer", "block_count"),
                ("n_head", "attention.head_count"),
                ("n_positions", "context_length"),
                ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
            ],
        )
    },
    Architecture {
        more: |metadata, _, config| {
            let parallel = metadata.own_flag("use_parallel_residual")?.unwrap_or(true);
            config.insert("use_parallel_residual".into(), parallel.into());
            Ok(())
        },
        ..plain("gptneox", "gpt_neox", &[("layer_norm_eps", "attention.layer_norm_epsilon")])
    },
    Architecture { turned: true, ..plain("granite", "granite", GRANITE) },
    Architecture {
        turned: true,
        more: |metadata, _, config| {
            insert(metadata, config, &[("num_local_experts", "expert_count"), EXPERTS[1]])?;
            match metadata.integer("expert_shared_feed_forward_length")? {
                None | Some(0) => Ok(()),
                Some(_) => Err(metadata.own_wrong(
                    "expert_shared_feed_forward_length",
                    "expected 0, as there is no such family",
                )),
            }
        },
        ..plain("granitemoe", "granitemoe", GRANITE)
    },
    plain("hunyuan-dense", "hunyuan_v1_dense", &[]),
    Architecture {
        turned: true,
        more: |metadata, _, config| {
            if metadata.integer("expert_count")?.is_some_and(|count| count > 0) {
                config.insert("model_type".into(), "mixtral".into());
                insert(metadata, config, &[("num_local_experts", "expert_count"), EXPERTS[1]])?;
            }
            Ok(())
        },
        ..plain("llama", "llama", &[])
    },
    Architecture {
        turned: true,
        more: |metadata, _, config| {
            window(metadata, config, None)?;
            let Some(sharpening) = metadata.number("attention.temperature_scale")? else { return Ok(()) };
            config.insert("model_type".into(), "ministral3".into());
            let rope = &mut config["rope_parameters"];
            rope["llama_4_scaling_beta"] = sharpening.into();
            if let Some(all) = metadata.number("rope.scaling.yarn_log_multiplier")?.filter(|all| *all != 0.0)
            {
                rope["mscale"] = 1.0.into();
                rope["mscale_all_dim"] = all.into();
            }
            Ok(())
        },
        ..plain("mistral3", "mistral", &[])
    },
    Architecture { more: encodes, ..plain("nomic-bert", "nomic_bert", ENCODERS) },
    plain("nemotron", "nemotron", &[("norm_eps", "attention.layer_norm_epsilon")]),
    Architecture {
        more: |metadata, _, config| {
            if metadata.integer("attention.sliding_window")?.is_some_and(|window| window > 0) {
                config.insert("model_type".into(), "olmo3".into());
                window(metadata, config, Some(4))?;
                // Only what sees all is stretched.
                let theta = config["rope_parameters"]["rope_theta"].clone();
                turn_apart(metadata, config, theta)?;
            }
            Ok(())
        },
        ..plain("olmo2", "olmo2", &[])
    },
    plain("olmoe", "olmoe", &EXPERTS),
    Architecture {
        more: |_, tensors, config| {
            config.insert("intermediate_size".into(), tensors.inner.into());
            Ok(())
        },
        ..plain("phi2", "phi", &[("layer_norm_eps", "attention.layer_norm_epsilon")])
    },
    Architecture {
        more: |metadata, tensors, config| {
            window(metadata, config, None)?;
            let Some([short, long]) = &tensors.short_and_long else { return Ok(()) };
            let original = metadata.integer("rope.scaling.original_context_length")?;
            config.insert("original_max_position_embeddings".into(), original.into());
            let rope = &mut config["rope_parameters"];
            rope["rope_type"] = "longrope".into();
            rope["short_factor"] = json!(short);
            rope["long_factor"] = json!(long);
            if let Some(factor) = metadata.number("rope.scaling.attn_factor")? {
                rope["attention_factor"] = json!(factor);
            }
            Ok(())
        },
        ..plain("phi3", "phi3", &[])
    },
    plain("qwen2", "qwen2", &[]),
    // Of texts alone, all three positions of a token are the same one.
    plain("qwen2vl", "qwen2", &[]),
    Architecture {
        more: |metadata, tensors, config| {
            insert(metadata, config, &EXPERTS)?;
            config.insert("mlp_only_layers".into(), json!(tensors.dense));
            insert(
                metadata,
                config,
                &[("shared_expert_intermediate_size", "expert_shared_feed_forward_length")],
            )
        },
        ..plain("qwen2moe", "qwen2_moe", &[])
    },
    plain("qwen3", "qwen3", &[]),
    plain("qwen3vl", "qwen3", &[]),
    Architecture {
        more: |_, tensors, config| {
            config.insert("mlp_only_layers".into(), json!(tensors.dense));
            config.insert("norm_topk_prob".into(), true.into());
            Ok(())
        },
        ..plain("qwen3moe", "qwen3_moe", &EXPERTS)
    },
    plain("seed_oss", "seed_oss", &[]),
    Architecture { turned: true, ..plain("smollm3", "smollm3", &[]) },
    Architecture {
        more: |metadata, _, config| {
            let parallel = metadata.own_flag("use_parallel_residual")?.unwrap_or(true);
            config.insert("use_parallel_residual".into(), parallel.into());
            Ok(())
        },
        ..plain("stablelm", "stablelm", &[("layer_norm_eps", "attention.layer_norm_epsilon")])
    },
    Architecture {
        more: |metadata, _, config| window(metadata, config, None),
        ..plain("starcoder2", "starcoder2", &[("norm_epsilon", "attention.layer_norm_epsilon")])
    },
];

const ENCODERS: &[Field] = &[("layer_norm_eps", "attention.layer_norm_epsilon")];

/// What an encoder is for: to tell classes, or to embed. RoBERTas are BERTs whose rows of positions before the first one are left
/// out.
fn encodes(
    metadata: &Metadata,
    tensors: &Tensors,
    config: &mut Map<String, Value>,
) -> Result<(), WeightsError> {
    config.insert("type_vocab_size".into(), tensors.segments.unwrap_or(1).into());
    let kind = if tensors.classes.is_some() { "ForSequenceClassification" } else { "Model" };
    config.insert("architectures".into(), json!([kind]));
    if let Some(classes) = tensors.classes {
        if !tensors.dense_head {
            let lost = "expected a file that embeds, as llama.cpp's conversion loses the pooler from which BERT tells classes: take \
                        the model in safetensors";
            return Err(metadata.wrong("general.architecture", lost));
        }
        let names = metadata.texts(&format!("{}.classifier.output_labels", metadata.architecture))?;
        let names = names.filter(|names| names.len() == classes);
        let name = |class: usize| names.map_or(format!("LABEL_{class}"), |names| names[class].clone());
        let labels: Map<_, _> =
            (0..classes.min(MAX_CLASSES)).map(|class| (class.to_string(), name(class).into())).collect();
        config.insert("id2label".into(), labels.into());
    }
    Ok(())
}

/// Most classes that are named.
const MAX_CLASSES: usize = 1 << 16;

const GRANITE: &[Field] = &[
    ("embedding_multiplier", "embedding_scale"),
    ("attention_multiplier", "attention.scale"),
    ("residual_multiplier", "residual_scale"),
    ("logits_scaling", "logit_scale"),
];

/// The architecture of a file.
///
/// # Errors
/// If it is none that is read.
pub(super) fn architecture(metadata: &Metadata) -> Result<&'static Architecture, WeightsError> {
    let found = ARCHITECTURES.iter().find(|a| a.name == metadata.architecture);
    found.ok_or_else(|| {
        let names: Vec<_> = ARCHITECTURES.iter().map(|a| a.name).collect();
        let expected = format!("{} is not read: expected one of {}", metadata.architecture, names.join(", "));
        metadata.wrong("general.architecture", &expected)
    })
}

/// Fields as their entries have them; those that are not there are left out.
pub(super) fn insert(
    metadata: &Metadata,
    config: &mut Map<String, Value>,
    fields: &[Field],
) -> Result<(), WeightsError> {
    for (field, key) in fields {
        let integer = metadata.integer(key).ok().flatten().map(Value::from);
        let value = match integer {
            Some(value) => Some(value),
            // What is written as a number may be meant as one; the error is the number's if it is neither.
            None => match metadata.number(key) {
                Ok(number) => number.map(Value::from),
                Err(_) => metadata.integer(key)?.map(Value::from),
            },
        };
        if let Some(value) = value {
            config.insert((*field).to_owned(), value);
        }
    }
    Ok(())
}

/// A window, if there is one, and which layers have it: those that the file lists, else of every `period` all but the last.
fn window(
    metadata: &Metadata,
    config: &mut Map<String, Value>,
    period: Option<u64>,
) -> Result<(), WeightsError> {
    const PATTERN: &str = "attention.sliding_window_pattern";
    let window = metadata.integer("attention.sliding_window")?.filter(|window| *window > 0);
    config.insert("sliding_window".into(), window.into());
    let layers = config.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0).min(1 << 14);
    let listed = metadata.list(PATTERN)?;
    if listed.is_some_and(|listed| listed.len() as u64 != layers) {
        return Err(metadata.own_wrong(PATTERN, &format!("expected one for each of {layers} layers")));
    }
    let period = match listed {
        None => metadata.integer(PATTERN)?.filter(|period| *period > 0).or(period),
        Some(_) => period,
    };
    if let Some(period) = period.filter(|_| window.is_some()) {
        let slides = |layer: u64| match listed {
            Some(listed) => listed[layer as usize] != 0,
            None => !(layer + 1).is_multiple_of(period),
        };
        let kind = |layer| if slides(layer) { "sliding_attention" } else { "full_attention" };
        config.insert("layer_types".into(), (0..layers).map(kind).collect());
    }
    Ok(())
}

/// Gives layers with a window a base of their own, `default` where the file has none, and no scaling.
fn turn_apart(
    metadata: &Metadata,
    config: &mut Map<String, Value>,
    default: Value,
) -> Result<(), WeightsError> {
    let all = config.remove("rope_parameters").unwrap_or_default();
    let theta = metadata.number("rope.freq_base_swa")?.map_or(default, Value::from);
    let near = json!({"rope_type": "default", "rope_theta": theta});
    config.insert("rope_parameters".into(), json!({"full_attention": all, "sliding_attention": near}));
    Ok(())
}

/// Gemma's scores are scaled by the width of a head, but for the model of so many layers, where it is a head's share of all;
/// or as the file says.
fn scores_by_head(
    metadata: &Metadata,
    config: &mut Map<String, Value>,
    largest: u64,
) -> Result<(), WeightsError> {
    let integer = |key| Ok::<_, WeightsError>(metadata.integer(key)?.unwrap_or(0));
    let width =
        match (metadata.number("attention.scale")?.filter(|scale| *scale > 0.0), integer("block_count")?) {
            (Some(scale), _) => Value::from(scale.powi(-2)),
            (None, layers) if layers == largest => {
                integer("embedding_length")?.checked_div(integer("attention.head_count")?).into()
            }
            _ => metadata.integer("attention.key_length")?.into(),
        };
    config.insert("query_pre_attn_scalar".into(), width);
    Ok(())
}
