//! A worker reads and holds its own layers only; a broken model is one clear line.

use std::{
    io::Write,
    path::Path,
    process::{Command, Output},
    sync::Arc,
};

use half::bf16;
use safetensors::{Dtype, tensor::TensorView};
use strata_coordinator::cluster::{History, RemoteWorker, discovery::discover, pipeline::Pipeline};
use strata_proto::{
    Format, LayerRange, ModelProfile, Worker,
    v1::{self, Fence},
};

use crate::{
    cluster::{Options, model},
    processes::{Process, free_dir},
};

/// Anonymous resident bytes of a process.
pub fn anonymous_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// A Llama of 12 layers and about 400 MB in bf16, with weights nobody looks at.
fn write_large_model(directory: &Path) {
    const HIDDEN: usize = 1024;
    const FFN: usize = 4096;
    const VOCAB: usize = 2048;
    const LAYERS: usize = 12;
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1
    });
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let largest: Vec<u8> = (0..HIDDEN * FFN.max(VOCAB))
        .flat_map(|i| bf16::from_f32((i % 251) as f32 * 1e-3 - 0.125).to_le_bytes())
        .collect();
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: Vec<usize>| {
        let bytes = shape.iter().product::<usize>() * 2;
        tensors.push((name, TensorView::new(Dtype::BF16, shape, &largest[..bytes]).unwrap()));
    };
    add("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]);
    add("model.norm.weight".into(), vec![HIDDEN]);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![FFN, HIDDEN]),
            ("mlp.up_proj", vec![FFN, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FFN]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            add(format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    safetensors::serialize_to_file(tensors, None, &directory.join("model.safetensors")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_third_of_the_layers_costs_a_third_of_the_bytes_and_of_the_memory() {
    let models = free_dir();
    let directory = models.path().join("large");
    std::fs::create_dir(&directory).unwrap();
    write_large_model(&directory);
    let file = std::fs::metadata(directory.join("model.safetensors")).unwrap().len();

    let process = Process::start(&["worker", "--models", models.path().to_str().unwrap()], "listening ");
    let (worker, _, _) = RemoteWorker::lazy(&process.address).unwrap();
    let described = worker
        .describe(v1::DescribeRequest { model: "large".into(), ..v1::DescribeRequest::default() })
        .await
        .unwrap();
    let profile = ModelProfile::try_from(described.profile.unwrap()).unwrap();
    let idle = anonymous_bytes(process.id());

    let spec = v1::StageSpec {
        model: "large".into(),
        fingerprint: profile.fingerprint.clone(),
        device: "cpu".into(),
        layers: Some(v1::LayerRange { first: 4, end: 8 }),
        embedding: false,
        head: false,
        dtype: "bf16".into(),
        quantization: String::new(),
        mapped: false,
    };
    let load = async |spec: v1::StageSpec| {
        let fence = Some(Fence { term: 1, pipeline: 0, incarnation: 1 });
        let mut progress = worker
            .load(v1::LoadRequest { fence, spec: Some(spec), ..v1::LoadRequest::default() })
            .await
            .unwrap();
        let mut last = v1::LoadProgress::default();
        while let Some(update) = progress.recv().await {
            last = update.unwrap();
        }
        last
    };
    let last = load(spec.clone()).await;
    let third = |what: &str, bytes: u64| {
        let share = bytes as f64 / file as f64;
        assert!((0.31..0.36).contains(&share), "{what}: {bytes} of {file} bytes are {share:.3}, not a third");
    };
    third("bytes read", last.bytes_read);
    third("bytes resident by its own count", last.resident_bytes.unwrap());
    third("anonymous memory", anonymous_bytes(process.id()) - idle);
    assert_eq!(
        last.resident_bytes.unwrap(),
        profile.weight_bytes(LayerRange::new(4, 8), Format::Float(strata_proto::DType::BF16))
    );

    // Weights that stay memory-mapped are no anonymous memory, and their device can hold as much as before.
    let mapped = load(v1::StageSpec { mapped: true, ..spec }).await;
    assert_eq!(mapped.resident_bytes, last.resident_bytes);
    let more = anonymous_bytes(process.id()).saturating_sub(idle);
    assert!(more < file / 8, "{more} bytes of anonymous memory beside mapped weights");
}

/// A discovery of too little memory: then the weights stay memory-mapped, and answers are the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_fits_no_memory_is_brought_up_memory_mapped() {
    let options = Options {
        devices: vec![strata_worker::device::DeviceSpec::cpu(None)],
        kv_tokens: Some(512),
        ..Options::default()
    };
    let deployment = options.deployment();
    let mut found = discover(&options.members(), &deployment).await.unwrap();
    let offer = &mut found.offers[0].device;
    assert_eq!(offer.spill_directory, std::env::temp_dir().display().to_string());
    (offer.budget_bytes, offer.spill_bytes) = (8 << 20, 1 << 30);
    let plan = found.plan(&deployment).unwrap();
    let stage = &plan.replicas[0].stages[0];
    assert!(stage.mapped && stage.weight_bytes > 8 << 20, "{stage:?}");
    assert!(plan.warnings[0].contains("memory-mapped"), "{:?}", plan.warnings);
    let fence = Fence { term: 1, pipeline: 0, incarnation: 1 };
    let up = Pipeline::bring_up(
        &found,
        &plan,
        fence,
        Arc::new(|_| {}),
        Arc::new(|_, _| {}),
        &deployment,
        &History::default(),
    )
    .await;
    assert_eq!(up.unwrap().replica(), &plan.replicas[0]);
}

fn serve(model: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    command.args(["serve", "--port", "0"]).arg(model).output().unwrap()
}

/// A copy of the demo model that a test may break.
fn copy_of_demo(to: &Path) {
    for entry in std::fs::read_dir(model("shakespeare")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// What someone does to a model directory.
type Breakage = fn(&Path);

#[test]
fn a_missing_or_broken_model_is_one_clear_line() {
    fn edit(path: &Path, from: &str, to: &str) {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(from));
        std::fs::write(path, text.replace(from, to)).unwrap();
    }
    let cases: [(&str, Breakage, &[&str]); 12] = [
        (
            "another model's tokenizer",
            |d| {
                let config = d.join("config.json");
                edit(&config, "\"eos_token_id\": 1,", "\"eos_token_id\": 1500,");
                edit(&d.join("generation_config.json"), "\"eos_token_id\": 1,", "\"eos_token_id\": 1500,");
            },
            &["special-tokens", "eos_token", "another model's"],
        ),
        (
            "NaN weights",
            |d| {
                let path = d.join("model.safetensors");
                let mut bytes = std::fs::read(&path).unwrap();
                let end = bytes.len();
                bytes[end - 400_000..].fill(0xff);
                std::fs::write(&path, bytes).unwrap();
            },
            &["holds NaN", "download it again"],
        ),
        (
            "infinite weights",
            |d| {
                let path = d.join("model.safetensors");
                let mut bytes = std::fs::read(&path).unwrap();
                let end = bytes.len();
                // Infinity in bfloat16.
                bytes[end - 400_000..].as_chunks_mut().0.fill(0x7f80u16.to_le_bytes());
                std::fs::write(&path, bytes).unwrap();
            },
            &["output", "not finite"],
        ),
        ("missing", |d| std::fs::remove_dir_all(d).unwrap(), &["No such file"]),
        ("no config", |d| std::fs::remove_file(d.join("config.json")).unwrap(), &["config.json"]),
        (
            "no weights",
            |d| std::fs::remove_file(d.join("model.safetensors")).unwrap(),
            &["model.safetensors"],
        ),
        (
            "truncated weights",
            |d| {
                let file = std::fs::OpenOptions::new().write(true).open(d.join("model.safetensors")).unwrap();
                file.set_len(1_000_000).unwrap();
            },
            &[
                "model.safetensors: 1000000 bytes, but its header says",
                "not fully downloaded; download it again",
            ],
        ),
        (
            "garbage",
            |d| {
                let mut file = std::fs::File::create(d.join("model.safetensors")).unwrap();
                file.write_all(&[0xff; 4096]).unwrap();
            },
            &["model.safetensors"],
        ),
        (
            "no heads",
            |d| edit(&d.join("config.json"), "\"num_attention_heads\": 6", "\"num_attention_heads\": 0"),
            &["num_attention_heads"],
        ),
        ("another family", |d| edit(&d.join("config.json"), "\"llama\"", "\"rwkv\""), &["rwkv", "llama"]),
        ("no tokenizer", |d| std::fs::remove_file(d.join("tokenizer.json")).unwrap(), &["tokenizer.json"]),
        (
            "a page for a tokenizer",
            |d| std::fs::write(d.join("tokenizer.json"), "Entry not found").unwrap(),
            &["tokenizer.json is an answer of the hub"],
        ),
    ];
    for (what, break_it, says) in cases {
        let directory = free_dir();
        let path = directory.path().join("demo");
        std::fs::create_dir(&path).unwrap();
        copy_of_demo(&path);
        break_it(&path);
        let output = serve(&path);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{what}: served");
        assert!(output.stdout.is_empty(), "{what}: wrote to standard output");
        let lines: Vec<_> = errors.lines().filter(|l| l.starts_with("error: ")).collect();
        assert_eq!(lines.len(), 1, "{what}: {errors}");
        assert!(says.iter().all(|s| lines[0].contains(s)), "{what}: {} does not say {says:?}", lines[0]);
        // What cannot be skipped must not say how.
        let can_be_skipped = ["another model's tokenizer", "infinite weights"].contains(&what);
        assert_eq!(lines[0].contains("--skip-check"), can_be_skipped, "{what}: {errors}");
        assert!(!lines[0].contains("Describe failed"), "{what}: {errors}");
        assert!(!errors.contains("panicked"), "{what}: {errors}");
    }
}
