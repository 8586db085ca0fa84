//! Configurations and tensors that do not fit each other are refused by name.

use std::collections::BTreeMap;

use serde_json::json;

use super::*;

/// A one-layer model: width 8, 2 heads, 1 key-value head, inner width 12, vocabulary 10, own head.
fn config() -> Value {
    json!({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 12, "vocab_size": 10, "num_hidden_layers": 1, "max_position_embeddings": 32,
        "hidden_act": "silu", "rms_norm_eps": 1e-5})
}

fn shapes() -> BTreeMap<String, Vec<usize>> {
    let layer = "model.layers.0";
    [
        ("model.embed_tokens.weight".to_owned(), vec![10, 8]),
        (format!("{layer}.input_layernorm.weight"), vec![8]),
        (format!("{layer}.self_attn.q_proj.weight"), vec![8, 8]),
        (format!("{layer}.self_attn.k_proj.weight"), vec![4, 8]),
        (format!("{layer}.self_attn.v_proj.weight"), vec![4, 8]),
        (format!("{layer}.self_attn.o_proj.weight"), vec![8, 8]),
        (format!("{layer}.post_attention_layernorm.weight"), vec![8]),
        (format!("{layer}.mlp.gate_proj.weight"), vec![12, 8]),
        (format!("{layer}.mlp.up_proj.weight"), vec![12, 8]),
        (format!("{layer}.mlp.down_proj.weight"), vec![8, 12]),
        ("model.norm.weight".to_owned(), vec![8]),
        ("lm_head.weight".to_owned(), vec![10, 8]),
    ]
    .into()
}

fn open_as(
    config: &Value,
    tensors: &BTreeMap<String, Vec<usize>>,
    dtype: impl Fn(&str) -> &'static str,
) -> Result<(Checkpoint, Model), ModelError> {
    Model::open_dir(directory(config, tensors, dtype).path())
}

fn directory(
    config: &Value,
    tensors: &BTreeMap<String, Vec<usize>>,
    dtype: impl Fn(&str) -> &'static str,
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape) in tensors {
        let begin = data.len();
        let size = if dtype(name) == "F32" { 4 } else { 1 };
        data.resize(begin + shape.iter().product::<usize>() * size, 0u8);
        let entry = json!({"dtype": dtype(name), "shape": shape, "data_offsets": [begin, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn open(config: &Value, tensors: &BTreeMap<String, Vec<usize>>) -> Result<(Checkpoint, Model), ModelError> {
    open_as(config, tensors, |_| "F32")
}

#[test]
fn biases_prefixes_and_ties_follow_the_file() {
    let (_, model) = open(&config(), &shapes()).unwrap();
    assert!(!model.is_tied());
    assert!(model.bound(Site::Layer(0), (Slot::Qkv, 0)).iter().all(|b| b.bias.is_none()));

    let mut tensors = shapes();
    tensors.insert("model.layers.0.self_attn.k_proj.bias".to_owned(), vec![4]);
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), vec![2]);
    let (checkpoint, model) = open(&config(), &tensors).unwrap();
    assert!(model.bound(Site::Layer(0), (Slot::Qkv, 0))[1].bias.is_some());
    let profile = model.profile(&checkpoint, "m");
    let spec = spec(&model, 0, 1, Way::new(DType::BF16));
    let weights = load(&checkpoint, &model, &spec);
    assert_eq!(weights.resident_bytes(), profile.weight_bytes(spec.layers, spec.format()));

    let mut tied = config();
    tied["tie_word_embeddings"] = json!(true);
    let mut tensors = shapes();
    // Present beside the embedding: transformers keeps both, and so do we.
    assert!(!open(&tied, &tensors).unwrap().1.is_tied());
    tensors.remove("lm_head.weight");
    assert!(open(&tied, &tensors).unwrap().1.is_tied());
    let bare = tensors.into_iter().map(|(n, s)| (n.replace("model.", ""), s)).collect();
    assert!(open(&tied, &bare).unwrap().1.is_tied());
}

#[test]
fn missing_misshapen_and_unclaimed_tensors_are_named() {
    for name in shapes().keys() {
        let mut tensors = shapes();
        tensors.remove(name);
        let e = open(&config(), &tensors).err().unwrap();
        assert!(e.to_string().contains(&format!("{name:?} is missing")), "{e}");
        let mut tensors = shapes();
        tensors.insert(name.clone(), vec![3, 3]);
        let e = open(&config(), &tensors).err().unwrap();
        assert!(matches!(&e, ModelError::Shape { tensor, .. } if tensor == name), "{e}");
        let e = open_as(&config(), &shapes(), |n| if n == name { "U8" } else { "F32" }).err().unwrap();
        assert!(matches!(&e, ModelError::Format(tensor) if tensor == name), "{e}");
    }
    for name in ["model.layers.1.mlp.up_proj.weight", "score.weight", "model.norm.bias"] {
        let mut tensors = shapes();
        tensors.insert(name.to_owned(), vec![8]);
        let e = open(&config(), &tensors).err().unwrap();
        assert!(matches!(&e, ModelError::UnclaimedTensors(tensors) if tensors == &[name]), "{e}");
    }
}

#[test]
fn what_is_known_to_be_left_over_is_left_alone_and_the_rest_by_pattern() {
    let with = |names: &[&str]| {
        let mut tensors = shapes();
        tensors.extend(names.iter().map(|name| ((*name).to_owned(), vec![3])));
        tensors
    };
    open(&config(), &with(&["model.layers.0.self_attn.rotary_emb.inv_freq", "model.position_ids"])).unwrap();
    let names = ["model.mtp.0.a", "model.mtp.0.b", "model.mtp.1.a", "x.1", "x.2", "x.3", "x.4"];
    let e = open(&config(), &with(&names)).err().unwrap().to_string();
    assert!(e.contains("tensors \"model.mtp.0.a\", \"model.mtp.0.b\", \"model.mtp.1.a\", \"x.1\", \"x.2\" and 2 more belong"), "{e}");
    assert!(e.contains("--ignore-tensors GLOB"), "{e}");
    let e = open(&config(), &with(&["x.1"])).err().unwrap().to_string();
    assert!(e.contains("tensor \"x.1\" belongs to nothing") && !e.contains("more"), "{e}");
    let dir = directory(&config(), &with(&names), |_| "F32");
    let ignoring = |patterns: &[&str]| {
        let patterns: Vec<String> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        Model::open_dir_ignoring(dir.path(), &patterns).map(|(_, model)| model)
    };
    let plain = open(&config(), &shapes()).unwrap().1;
    for patterns in [&["model.mtp.*", "x.?"][..], &["*"]] {
        // What is needed is taken, whatever is ignored.
        assert_eq!(ignoring(patterns).unwrap().bound, plain.bound);
    }
    let e = ignoring(&["model.mtp.*", "x.1", "y*"]).err().unwrap();
    assert!(matches!(&e, ModelError::UnclaimedTensors(left) if left == &["x.2", "x.3", "x.4"]), "{e}");
}

#[test]
fn layers_behind_the_last_are_left_alone_where_they_only_guess() {
    let add = |number: usize, model: &str| {
        let copy = super::mutations::directory(&models().join(model));
        let path = copy.path().join("model.safetensors");
        let file = fs::read(&path).unwrap();
        let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&file[8..end]).unwrap();
        let data = file.len() - end;
        let entry = json!({"dtype": "F32", "shape": [1], "data_offsets": [data, data + 4]});
        header[format!("model.layers.{number}.shared_head.norm.weight")] = entry;
        let header = header.to_string();
        let size = (header.len() as u64).to_le_bytes();
        fs::write(path, [&size[..], header.as_bytes(), &file[end..], &[0; 4]].concat()).unwrap();
        Model::open_dir(copy.path()).map(|(_, model)| model.tower.layers.len())
    };
    let layers = Model::open_dir(&models().join("glm4-moe-f32")).unwrap().1.tower.layers.len();
    for number in [layers, layers + 1, 92] {
        assert_eq!(add(number, "glm4-moe-f32").unwrap(), layers);
    }
    for (number, model) in [(layers - 1, "glm4-moe-f32"), (92, "glm4-f32")] {
        let e = add(number, model).err().unwrap();
        assert!(matches!(&e, ModelError::UnclaimedTensors(left) if left.len() == 1), "{e}");
    }
}

#[test]
fn absurd_configurations_are_refused_with_what_was_expected() {
    for (field, value, expected) in [
        ("model_type", json!("t5"), "model_type is \"t5\": expected a supported family (bert"),
        ("model_type", Value::Null, "model_type is absent"),
        ("hidden_size", json!(0), "an integer in 1..="),
        ("hidden_size", json!(-8), "hidden_size is -8"),
        ("hidden_size", json!(7), "a multiple of the number of heads"),
        ("hidden_size", json!("8"), "hidden_size is \"8\""),
        ("hidden_size", json!(1u64 << 60), "an integer in"),
        ("num_attention_heads", json!(0), "num_attention_heads is 0"),
        ("num_key_value_heads", json!(3), "num_key_value_heads is 3"),
        ("num_hidden_layers", json!(0), "1..=10000"),
        ("num_hidden_layers", json!(10_001), "1..=10000"),
        ("intermediate_size", json!(1.5), "intermediate_size is 1.5"),
        ("head_dim", json!(3), "even"),
        ("head_dim", json!(0), "head_dim is 0"),
        ("hidden_act", json!("xielu"), "hidden_act is \"xielu\": expected silu, gelu"),
        ("rms_norm_eps", json!(0), "rms_norm_eps is 0"),
        ("rms_norm_eps", json!(1e300), "positive finite"),
        ("vocab_size", Value::Null, "vocab_size is absent"),
        ("max_position_embeddings", json!(0), "max_position_embeddings is 0"),
        ("eos_token_id", json!("</s>"), "a token id or a list"),
        ("tie_word_embeddings", json!(1), "true or false"),
        ("torch_dtype", json!("float8"), "float32, bfloat16 or float16"),
        (
            "quantization_config",
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
            "quant_method is \"bitsandbytes\": expected gptq, awq, compressed-tensors, fp8 or mxfp4",
        ),
        ("quantization_config", json!({}), "take the original checkpoint, and --quantize"),
        ("rope_scaling", json!({"type": "ntk", "factor": 2}), "default, linear, dynamic, llama3"),
    ] {
        let mut config = config();
        config[field] = value;
        let e = open(&config, &shapes()).err().unwrap_or_else(|| panic!("{field} was accepted")).to_string();
        assert!(e.contains("config.json") && e.contains(expected), "{e}");
    }
    let e = open(&json!([]), &shapes()).err().unwrap().to_string();
    assert!(e.contains("expected an object"), "{e}");
}

/// The window of each layer that a configuration gives, or why there is none.
fn windows(changes: &[(&str, Value)]) -> Result<Vec<Option<usize>>, String> {
    let mut config = config();
    config["num_hidden_layers"] = json!(3);
    for (field, value) in changes {
        config[*field] = value.clone();
    }
    let mut tensors = shapes();
    for layer in 1..3 {
        let copies = shapes().into_iter().filter(|(name, _)| name.contains("layers.0"));
        tensors.extend(
            copies.map(|(name, shape)| (name.replace("layers.0", &format!("layers.{layer}")), shape)),
        );
    }
    if config["model_type"] == "qwen3" {
        for layer in 0..3 {
            for norm in ["q_norm", "k_norm"] {
                tensors.insert(format!("model.layers.{layer}.self_attn.{norm}.weight"), vec![4]);
            }
        }
    }
    let (_, model) = open(&config, &tensors).map_err(|e| e.to_string())?;
    let window = |l: &architecture::Layer| match l.attention.mask {
        architecture::AttentionMask::Full | architecture::AttentionMask::Causal => None,
        architecture::AttentionMask::Near(_) => None,
        architecture::AttentionMask::Window(w) => Some(w),
    };
    Ok(model.tower.layers.iter().map(window).collect())
}

#[test]
fn windows_are_read_as_transformers_reads_them() {
    let mistral = ("model_type", json!("mistral"));
    let read = |value: Value| windows(&[mistral.clone(), ("sliding_window", value)]).unwrap()[0];
    assert_eq!(read(json!(7)), Some(7));
    assert_eq!(read(Value::Null), None, "null is no window");
    assert_eq!(read(json!(0)), None, "nor is 0, as transformers writes one that is off");
    assert_eq!(
        windows(std::slice::from_ref(&mistral)).unwrap()[0],
        Some(4096),
        "absent is transformers' default"
    );
    assert!(windows(&[mistral, ("sliding_window", json!(-1))]).unwrap_err().contains("sliding_window is -1"));

    for family in ["qwen2", "qwen3"] {
        let with = |changes: &[(&str, Value)]| {
            let base = [("model_type", json!(family)), ("sliding_window", json!(9)), ("head_dim", json!(4))];
            windows(&[&base[..], changes].concat())
        };
        let on = || ("use_sliding_window", json!(true));
        let types = |list: &[&str]| ("layer_types", json!(list));
        let mixed = ["sliding_attention", "full_attention", "sliding_attention"];
        assert_eq!(with(&[]).unwrap(), [None; 3], "a window counts only if it is used");
        assert_eq!(with(&[types(&mixed)]).unwrap(), [None; 3]);
        assert_eq!(with(&[on(), ("max_window_layers", json!(1))]).unwrap(), [None, Some(9), Some(9)]);
        assert_eq!(with(&[on()]).unwrap(), [None; 3], "windows begin at layer 28 unless told otherwise");
        assert_eq!(with(&[on(), types(&mixed)]).unwrap(), [Some(9), None, Some(9)]);
        for bad in [types(&mixed[..2]), types(&["x", "x", "x"]), ("layer_types", json!(3))] {
            assert!(with(&[on(), bad]).unwrap_err().contains("layer_types"));
        }
    }
    let qwen3 = windows(&[("model_type", json!("qwen3")), ("head_dim", json!(4))]);
    assert!(qwen3.is_ok(), "{qwen3:?}");
}

#[test]
fn a_decoder_inside_of_a_model_that_sees_is_found_under_every_prefix() {
    let inner = config();
    let outer = json!({"model_type": "llava", "text_config": inner, "torch_dtype": "float16", "vision_config": {},
        "eos_token_id": 7});
    for prefix in ["language_model.model.", "model.language_model.", "model.text_model.", "model."] {
        let head = if prefix == "language_model.model." { "language_model.lm_head" } else { "lm_head" };
        let name = |name: String| match name.strip_prefix("model.") {
            Some(rest) => format!("{prefix}{rest}"),
            None => name.replace("lm_head", head),
        };
        let mut tensors: BTreeMap<_, _> = shapes().into_iter().map(|(n, shape)| (name(n), shape)).collect();
        tensors.insert("vision_tower.patches.weight".to_owned(), vec![3]);
        tensors.insert("model.multi_modal_projector.bias".to_owned(), vec![3]);
        let (checkpoint, model) = open(&outer, &tensors).unwrap();
        assert_eq!((model.family.as_str(), model.dtype), ("llama", DType::F16), "{prefix}");
        assert_eq!(model.special.eos, [7]);
        let plain = open(&config(), &shapes()).unwrap().1;
        assert_eq!(model.tower, plain.tower, "{prefix}");
        assert!(model.profile(&checkpoint, "m").layers[0].names[0].ends_with("layers.0"));
        tensors.insert("audio_tower.weight".to_owned(), vec![3]);
        let e = open(&outer, &tensors).err().unwrap();
        assert!(matches!(&e, ModelError::UnclaimedTensors(names) if names == &["audio_tower.weight"]), "{e}");
    }
    let mut silent = outer.clone();
    silent["text_config"] = json!({"model_type": "llama"});
    let e = open(&silent, &shapes()).err().unwrap().to_string();
    assert!(e.contains("expected [32000, 4096]"), "transformers' defaults: {e}");
    for (field, value, expected) in [
        ("hidden_size", json!(0), "text_config.hidden_size"),
        (
            "quantization_config",
            json!({"quant_method": "hqq"}),
            "quantization_config.quant_method is \"hqq\"",
        ),
    ] {
        let mut damaged = outer.clone();
        damaged["text_config"][field] = value;
        let e = open(&damaged, &shapes()).err().unwrap().to_string();
        assert!(e.contains(expected), "{e}");
    }
}

#[test]
fn fields_that_nobody_needs_refuse_nothing() {
    for (field, value) in [
        ("dtype", json!("auto")),
        ("torch_dtype", Value::Null),
        ("rope_scaling", json!({})),
        ("rope_scaling", Value::Null),
        ("partial_rotary_factor", json!(0.3)),
        ("hidden_act", json!("gelu_python")),
        ("pad_token_id", Value::Null),
        ("quantization_config", Value::Null),
        ("pretraining_tp", json!("many")),
    ] {
        let mut config = config();
        config[field] = value;
        let (_, model) = open(&config, &shapes()).unwrap_or_else(|e| panic!("{field}: {e}"));
        assert_eq!(model.dtype, DType::F32);
    }
}

#[test]
fn special_tokens_may_be_numbers_lists_or_negative() {
    let mut config = config();
    config["eos_token_id"] = json!([5, 7, 5]);
    config["pad_token_id"] = json!(-1);
    config["bos_token_id"] = json!(1);
    let special = open(&config, &shapes()).unwrap().1.special;
    assert_eq!(special, SpecialTokens { bos: vec![1], eos: vec![5, 7], pad: vec![] });
}

#[test]
fn where_no_file_says_what_ends_a_text_the_class_does() {
    let mut config = config();
    config.as_object_mut().unwrap().shift_remove("eos_token_id");
    let eos = |config: &Value| open(config, &shapes()).unwrap().1.special.eos;
    assert_eq!(eos(&config), [2], "LlamaConfig's");
    config["eos_token_id"] = Value::Null;
    assert!(eos(&config).is_empty(), "that there is none is said, too");
}

/// A configuration as transformers 4 wrote it.
fn to_version_4(config: &mut Value) {
    let fields = config.as_object_mut().unwrap();
    if let Some(dtype) = fields.shift_remove("dtype") {
        fields.insert("torch_dtype".into(), dtype);
    }
    let family = fields["model_type"].as_str().unwrap().to_owned();
    // Mixtral's has this name in both.
    if family == "qwen3_moe"
        && let Some(experts) = fields.shift_remove("num_local_experts")
    {
        fields.insert("num_experts".into(), experts);
    }
    // Of these, version 4 had other words for which layers slide.
    if ["gemma2", "gemma3_text", "qwen2", "qwen3"].contains(&family.as_str()) {
        fields.shift_remove("layer_types");
    }
    if family == "gemma3_text" {
        fields.insert("sliding_window_pattern".into(), json!(3));
    }
    let Some(mut rope) = fields.shift_remove("rope_parameters") else { return };
    if let Some(local) = rope.get("sliding_attention") {
        fields.insert("rope_local_base_freq".into(), local["rope_theta"].clone());
        rope = rope["full_attention"].clone();
    }
    let rope = rope.as_object_mut().unwrap();
    let neox = family == "gpt_neox";
    for (new, old) in [
        ("rope_theta", if neox { "rotary_emb_base" } else { "rope_theta" }),
        ("partial_rotary_factor", if neox { "rotary_pct" } else { "partial_rotary_factor" }),
    ] {
        if let Some(value) = rope.shift_remove(new) {
            fields.insert(old.into(), value);
        }
    }
    if let Some(kind) = rope.shift_remove("rope_type").filter(|kind| kind != "default") {
        rope.insert("type".into(), kind);
        fields.insert("rope_scaling".into(), Value::Object(rope.clone()));
    }
}

#[test]
fn both_generations_of_configuration_describe_the_same_model() {
    let mut checked = 0;
    for entry in fs::read_dir(models()).unwrap() {
        let dir = entry.unwrap().path();
        let Ok(text) = fs::read_to_string(dir.join("config.json")) else { continue };
        let mut config: Value = serde_json::from_str(&text).unwrap();
        if !config["transformers_version"].as_str().is_some_and(|v| v.starts_with('5')) {
            continue;
        }
        let old = super::mutations::directory(&dir);
        if config["model_type"] == "olmo3" {
            // In version 4, layers of both kinds had one base.
            continue;
        }
        to_version_4(&mut config);
        fs::write(old.path().join("config.json"), config.to_string()).unwrap();
        let (_, new) = Model::open_dir(&dir).unwrap();
        let (_, old) = Model::open_dir(old.path()).unwrap();
        assert_eq!(new.tower, old.tower, "{}", dir.display());
        assert_eq!(new.dtype, old.dtype, "{}", dir.display());
        checked += 1;
    }
    assert!(checked >= 20, "{checked}");
}
