//! Stages on GPUs, run by the emulator (tests/emulator): the product's own CUDA code, kernels and all, on the processor.
//! A GPU promises no equal bits, so results are compared within what rounding can do.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use strata_coordinator::planner::Split;
use strata_proto::{DType, LinkKind, Quantization, v1::RowOutput};
use strata_worker::device::DeviceSpec;

use crate::{
    cluster::{Cluster, Options, encoder_expectations, expectations, models_with_expectations},
    encoders,
    parity::{Driver, Request},
};

/// Builds the emulator and loads its libraries into this process, in place of NVIDIA's; gives their directory.
pub fn emulator() -> &'static Path {
    static LOADED: OnceLock<PathBuf> = OnceLock::new();
    LOADED.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator/build");
        let built = Command::new(build).arg(&directory).status().unwrap();
        assert!(built.success(), "the emulator could not be built: it needs a C++ compiler");
        for library in ["cuda", "nvrtc", "cublas", "nccl"] {
            let path = directory.join(format!("lib{library}.so"));
            // SAFETY: our own libraries, which do nothing when they are loaded. Who asks for one by name later gets this.
            let library = unsafe { libloading::Library::new(&path) }.unwrap();
            std::mem::forget(library);
        }
        directory
    })
}

fn devices(list: &str) -> Vec<DeviceSpec> {
    list.split(',').map(|d| d.parse().unwrap()).collect()
}

fn options(model: &Path, on: &str) -> Options {
    Options {
        model: model.to_owned(),
        devices: devices(on),
        kv_tokens: Some(4096),
        max_step_tokens: 512,
        ..Options::default()
    }
}

fn decoders() -> Vec<PathBuf> {
    models_with_expectations().into_iter().filter(|d| encoder_expectations(d).is_none()).collect()
}

/// Logits of the last token of every prompt, computed in chunks.
async fn logits(options: &Options, chunks: &[usize]) -> Vec<Vec<f32>> {
    let expected = expectations(&options.model);
    let mut driver = Driver::start(options).await;
    let requests =
        chunks.iter().flat_map(|c| expected.iter().map(|e| Request::new(&e.ids, *c, 0, RowOutput::Logits)));
    let requests = requests.enumerate().map(|(i, r)| Request { arrives: i % 3, ..r });
    driver.run(requests.collect()).await.into_iter().map(|r| r.logits).collect()
}

/// How far logits are apart: the length of their difference, in terms of their own.
fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().all(|x| x.is_finite()));
    let length = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    let apart = length(&mut got.iter().zip(want).map(|(a, b)| a - b));
    apart / length(&mut want.iter().copied())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_decoder_matches_transformers_in_float32() {
    emulator();
    for model in decoders() {
        let expected = expectations(&model);
        let got = logits(&options(&model, "cuda:0"), &[7, usize::MAX]).await;
        for (i, row) in got.iter().enumerate() {
            let want = &expected[i % expected.len()].last_row;
            let worst = row.iter().zip(want).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs()));
            assert!(worst < 1e-3, "{}: logits differ from transformers' by {worst}", model.display());
        }
        // Tokens by the candidates that the GPU finds; so many together that some steps are graphs.
        let mut driver = Driver::start(&options(&model, "cuda:0")).await;
        let ask = |i: usize| {
            let e = &expected[i % expected.len()];
            let request = Request::new(&e.ids, [64, 7][i % 2], e.greedy.len(), RowOutput::Token);
            Request { arrives: i, logprobs: None, ..request }
        };
        for (i, request) in driver.run((0..3).map(ask).collect()).await.iter().enumerate() {
            let got: Vec<u32> = request.sampled.iter().map(|t| t.token_id).collect();
            assert_eq!(got, expected[i % expected.len()].greedy, "{}", model.display());
        }
    }
}

/// Both round the same weights in the same way; what they compute differs in the last bits, and where such a difference
/// meets a rounding of activations, by one of its steps. So this finds wrong kernels, and the kernels' own tests say how
/// exact they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_format_is_close_to_the_cpu() {
    emulator();
    let ways = [
        (DType::BF16, None, 0.02),
        (DType::F16, None, 0.004),
        (DType::F32, Some(Quantization::Int8), 0.04),
        (DType::BF16, Some(Quantization::Int4), 0.05),
    ];
    for model in decoders() {
        // Which experts a token goes through is all or nothing.
        let experts = model.join("config.json");
        let experts = std::fs::read_to_string(experts).unwrap().contains("num_experts_per_tok");
        for (dtype, quantization, most) in ways {
            let way = |on| Options { dtype: Some(dtype), quantization, ..options(&model, on) };
            let want = logits(&way("cpu"), &[usize::MAX]).await;
            let got = logits(&way("cuda:0"), &[usize::MAX]).await;
            for (got, want) in got.iter().zip(&want) {
                let off = difference(got, want);
                let most = if experts { 5.0 * most } else { most };
                assert!(off < most, "{} {dtype} {quantization:?}: {off}", model.display());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_encoder_answers_as_transformers() {
    emulator();
    for model in models_with_expectations() {
        let Some(inputs) = encoder_expectations(&model) else { continue };
        let name = model.file_name().unwrap().to_string_lossy().into_owned();
        let task = strata_worker::model::describe(&model, "m").unwrap().task;
        for on in ["cuda:0", "cuda:0,cpu"] {
            let split = if on == "cuda:0" { Split::Auto } else { Split::Balanced };
            let cluster = Cluster::start(&Options { split, ..options(&model, on) }).await;
            let answers = encoders::ask(&cluster, task, inputs.iter().map(encoders::as_text).collect()).await;
            for (e, (tokens, values)) in inputs.iter().zip(&answers) {
                assert_eq!(*tokens as usize, e.ids.len(), "{name}: {:?}", e.text);
                encoders::near(values, &encoders::expected(&name, task, e), &name);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelines_of_gpus_and_the_cpu_answer_as_one_gpu() {
    emulator();
    let model = crate::cluster::model("shakespeare");
    let expected = expectations(&model);
    let pipelines = [
        ("cuda:0,cuda:1", Some(LinkKind::DeviceCopy)),
        ("cuda:0/0,cuda:0/1", None),
        ("cuda:0,cuda:1", Some(LinkKind::Loopback)),
        ("cuda:0,cuda:1", Some(LinkKind::Tcp)),
        ("cuda:0,cuda:1", Some(LinkKind::Nccl)),
        ("cuda:0,cpu", None),
        ("cpu,cuda:0", None),
        ("cuda:1,cpu,cuda:0", Some(LinkKind::Tcp)),
    ];
    for (on, links) in pipelines {
        let stages = on.split(',').count();
        let counts = if stages == 2 { vec![3, 3] } else { vec![2; stages] };
        let options = Options { split: Split::Counts(counts), links, ..options(&model, on) };
        let mut driver = Driver::start(&options).await;
        let ask = |i: usize| {
            let e = &expected[i % expected.len()];
            let request = Request::new(&e.ids, 16, e.greedy.len(), RowOutput::Token);
            Request { arrives: i, ..request }
        };
        for (i, request) in driver.run((0..4).map(ask).collect()).await.iter().enumerate() {
            let got: Vec<u32> = request.sampled.iter().map(|t| t.token_id).collect();
            assert_eq!(got, expected[i % expected.len()].greedy, "{on} over {links:?}");
        }
    }
}
