//! Stages on GPUs, run by the emulator (tests/emulator): the product's own CUDA code, kernels and all, on the
//! processor. A GPU promises no equal bits, so results are compared within what rounding can do.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use strata_coordinator::planner::Split;
use strata_proto::{
    DType, LinkKind, Quantization,
    v1::{self, RowOutput, generate_event},
};
use strata_worker::device::DeviceSpec;

use crate::{
    cluster::{
        Cluster, Expected, Options, ask, client, encoder_expectations, expectations, greedy,
        models_with_expectations, status,
    },
    encoders,
    parity::{Driver, Request},
    parts,
    processes::Process,
};

/// Builds the emulator and loads its libraries into this process, in place of NVIDIA's; gives their directory.
pub fn emulator() -> &'static Path {
    static LOADED: OnceLock<PathBuf> = OnceLock::new();
    LOADED.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator/build");
        let built = Command::new(build).arg(&directory).status().unwrap();
        assert!(built.success(), "the emulator could not be built: it needs a C++ compiler");
        for library in ["libcuda.so.1", "libcuda.so", "libnvrtc.so.13", "libcublas.so.13", "libnccl.so.2"] {
            let path = directory.join(library);
            // SAFETY: our own libraries, which do nothing when they are loaded. Who asks for one by name later gets
            // this.
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

/// Tokens of an answer that are computed: an emulated GPU is slow.
fn tokens(e: &Expected) -> usize {
    e.greedy.len().min(16)
}

/// Logits of the last token of some prompts, computed in chunks.
async fn logits(options: &Options, prompts: usize, chunks: &[usize]) -> Vec<Vec<f32>> {
    let mut expected = expectations(&options.model);
    expected.truncate(prompts);
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
        let got = logits(&options(&model, "cuda:0"), usize::MAX, &[7, usize::MAX]).await;
        for (i, row) in got.iter().enumerate() {
            let want = &expected[i % expected.len()].last_row;
            let worst = row.iter().zip(want).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs()));
            assert!(worst < 1e-3, "{}: logits differ from transformers' by {worst}", model.display());
        }
        // Tokens by the candidates that the GPU finds; so many together that some steps are graphs.
        let mut driver = Driver::start(&options(&model, "cuda:0")).await;
        let ask = |i: usize| {
            let e = &expected[i % expected.len()];
            let request = Request::new(&e.ids, [64, 7][i % 2], tokens(e), RowOutput::Token);
            Request { arrives: i, logprobs: None, ..request }
        };
        for (i, request) in driver.run((0..3).map(ask).collect()).await.iter().enumerate() {
            let got: Vec<u32> = request.sampled.iter().map(|t| t.token_id).collect();
            let e = &expected[i % expected.len()];
            assert_eq!(got, e.greedy[..tokens(e)], "{}", model.display());
        }
    }
}

/// Tokens that the GPU draws from its own logits, alone and together: those of the processor, whose logits differ in
/// the last bits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sampled_answers_are_the_processors() {
    emulator();
    let model = crate::cluster::model("shakespeare");
    let base = v1::Sampling { temperature: Some(0.9), seed: Some(7), ..v1::Sampling::default() };
    let requests: Vec<_> = [
        base.clone(),
        v1::Sampling { top_p: Some(0.9), ..base.clone() },
        v1::Sampling { top_k: Some(100), min_p: Some(0.02), ..base.clone() },
        v1::Sampling { repetition_penalty: Some(1.3), frequency_penalty: Some(0.3), ..base.clone() },
        v1::Sampling { top_k: Some(40), top_p: Some(0.95), presence_penalty: Some(0.5), ..base.clone() },
        v1::Sampling { logit_bias: [(5, 4.0), (9, -100.0)].into_iter().collect(), ..base },
    ]
    .into_iter()
    .enumerate()
    .map(|(i, sampling)| v1::GenerateRequest {
        prompt: Some("ROMEO:\n".into()),
        max_tokens: Some(16),
        sampling: Some(sampling),
        logprobs: (i % 2 == 1).then_some(3),
        ..v1::GenerateRequest::default()
    })
    .collect();
    let mut answers = Vec::new();
    for on in ["cpu", "cuda:0"] {
        let cluster = Cluster::start(&options(&model, on)).await;
        let client = cluster.client().await;
        let asked = futures::future::join_all(requests.iter().map(|r| ask(&client, r.clone()))).await;
        answers.push(asked.into_iter().map(Result::unwrap).collect::<Vec<_>>());
        cluster.wait_idle().await;
    }
    for ((want, got), request) in answers[0].iter().zip(&answers[1]).zip(&requests) {
        assert_eq!(got.ids, want.ids, "{request:?}");
        assert_eq!(got.logprobs.len(), want.logprobs.len());
        for (got, want) in got.logprobs.iter().zip(&want.logprobs) {
            assert!((got.logprob - want.logprob).abs() < 1e-4, "{got:?}, expected {want:?}");
            let tokens = |l: &v1::TokenLogprobs| l.top.iter().map(|a| a.token_id).collect::<Vec<_>>();
            assert_eq!(tokens(got), tokens(want));
        }
    }
}

/// Both round the same weights in the same way; what they compute differs in the last bits, and where such a difference
/// meets a rounding of activations, by one of its steps. So this finds wrong kernels, and the kernels' own tests say
/// how exact they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_format_is_close_to_the_cpu() {
    emulator();
    let ways = [
        (DType::BF16, None, 0.04),
        (DType::F16, None, 0.005),
        (DType::F32, Some(Quantization::Int8), 0.04),
        (DType::BF16, Some(Quantization::Int4), 0.05),
    ];
    for model in decoders() {
        // The next test holds those to more, but for one prompt in which an expert may be another.
        if WHOLE_GROUPS.iter().any(|name| model.ends_with(name)) {
            continue;
        }
        // Which experts a token goes through is all or nothing.
        let experts = model.join("config.json");
        let experts = std::fs::read_to_string(experts).unwrap().contains("num_experts_per_tok");
        for (dtype, quantization, most) in ways {
            let way = |on| Options { dtype: Some(dtype), quantization, ..options(&model, on) };
            let want = logits(&way("cpu"), 2, &[usize::MAX]).await;
            let got = logits(&way("cuda:0"), 2, &[usize::MAX]).await;
            let mut far = false;
            for (got, want) in got.iter().zip(&want) {
                let off = difference(got, want);
                let most = if experts { 5.0 * most } else { most };
                far |= off >= most;
            }
            if far {
                // Some change much by what the format does to them: so much may lie between the devices.
                let plain = Options { dtype: Some(DType::F32), ..options(&model, "cpu") };
                let plain = logits(&plain, 2, &[usize::MAX]).await;
                for ((got, want), plain) in got.iter().zip(&want).zip(&plain) {
                    let (off, done) = (difference(got, want), difference(want, plain));
                    assert!(off < done, "{} {dtype} {quantization:?}: {off}, {done}", model.display());
                }
            }
        }
    }
}

/// Models in which every product is of whole groups and every head of whole slabs, so that all that is quantized or on
/// the tensor cores is met: norms that yield bytes, mixtures of experts, a norm behind each block, both branches side
/// by side.
const WHOLE_GROUPS: [&str; 4] =
    ["mixtral-groups-bf16", "qwen3-moe-groups-f16", "gemma2-groups-bf16", "phi-groups-f32"];

/// In float32 the answer is transformers'. In another format, what rounding does to the model is taken from the CPU, as
/// tests/gpu/parity.py says: twice that may lie between the two devices, and between the GPU and transformers. Int4
/// weights are the same integers on both, and activations eight bits at least, so that the devices may be as far apart
/// as in int8. Which experts a token goes through is all or nothing, so one prompt of four may be off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_of_whole_groups_are_within_what_each_format_does_to_them() {
    emulator();
    const FLOOR: f32 = 2e-3;
    let (int8, int4) = (Some(Quantization::Int8), Some(Quantization::Int4));
    for name in WHOLE_GROUPS {
        let model = crate::cluster::model(name);
        let expected = expectations(&model);
        let want: Vec<_> = expected.iter().map(|e| e.last_row.clone()).collect();
        let rows = async |on: &str, dtype, quantization| {
            // Steps with so little room that the pairs of token and expert take several turns.
            let options = Options { max_step_tokens: 48, ..options(&model, on) };
            let mut driver = Driver::start(&Options { dtype: Some(dtype), quantization, ..options }).await;
            let mut rows = Vec::new();
            for e in &expected {
                let request = Request::new(&e.ids, 40, 0, RowOutput::Logits);
                rows.push(driver.run(vec![request]).await.remove(0).logits);
            }
            rows
        };
        let apart = |got: &[Vec<f32>], want: &[Vec<f32>]| {
            let mut each: Vec<f32> = got.iter().zip(want).map(|(got, want)| difference(got, want)).collect();
            each.sort_by(f32::total_cmp);
            each[each.len() - 2]
        };
        let off = apart(&rows("cuda:0", DType::F32, None).await, &want);
        assert!(off < 1e-4, "{name} in f32: {off} from transformers");
        let mut in_int8 = 0.0;
        for (dtype, quantization) in [
            (DType::BF16, None),
            (DType::F16, None),
            (DType::F32, int8),
            (DType::BF16, int8),
            (DType::BF16, int4),
            (DType::F16, int4),
        ] {
            let gpu = rows("cuda:0", dtype, quantization).await;
            let cpu = rows("cpu", dtype, quantization).await;
            let cost = apart(&cpu, &want);
            if quantization == int8 {
                in_int8 = cost;
            }
            let between = if quantization == int4 { in_int8 } else { cost };
            let what = format!("{name} {dtype} {quantization:?}");
            let off = apart(&gpu, &cpu);
            assert!(off < 2.0 * between + FLOOR, "{what}: {off} from the CPU, which rounds by {between}");
            let off = apart(&gpu, &want);
            assert!(off < 2.0 * cost + FLOOR, "{what}: {off} from transformers, the CPU {cost}");
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
        if parts::finds_parts(task) {
            continue;
        }
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
async fn entities_and_answers_are_those_of_transformers() {
    emulator();
    for (name, on) in
        [("roberta-tags-bf16", "cuda:0"), ("modernbert-tags-f32", "cuda:0,cpu"), ("bert-spans-f32", "cuda:0")]
    {
        let split = if on == "cuda:0" { Split::Auto } else { Split::Balanced };
        let cluster = Cluster::start(&Options { split, ..options(&crate::cluster::model(name), on) }).await;
        parts::check(&cluster, name).await;
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
            let request = Request::new(&e.ids, 16, tokens(e), RowOutput::Token);
            Request { arrives: i, ..request }
        };
        for (i, request) in driver.run((0..3).map(ask).collect()).await.iter().enumerate() {
            let got: Vec<u32> = request.sampled.iter().map(|t| t.token_id).collect();
            let e = &expected[i % expected.len()];
            assert_eq!(got, e.greedy[..tokens(e)], "{on} over {links:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_step_goes_through_every_link_and_is_replayed() {
    emulator();
    let expected = expectations(&crate::cluster::model("shakespeare"));
    for links in [LinkKind::DeviceCopy, LinkKind::Nccl, LinkKind::Tcp] {
        let calls = Arc::new(AtomicU32::new(0));
        let hook: strata_worker::StepHook = {
            let calls = calls.clone();
            Arc::new(move |meta| match calls.fetch_add(1, Ordering::Relaxed) {
                11 => panic!("injected panic in step {}", meta.step),
                30 => Err("injected failure".into()),
                _ => Ok(()),
            })
        };
        let model = crate::cluster::model("shakespeare");
        let options = Options {
            split: Split::Balanced,
            links: Some(links),
            hook: Some(hook),
            ..options(&model, "cuda:0,cuda:1")
        };
        let cluster = Cluster::start(&options).await;
        let client = cluster.client().await;
        for e in &expected[..2] {
            let answer = ask(&client, greedy(&e.ids, 12)).await.unwrap();
            assert_eq!(answer.ids, e.greedy[..12], "over {links}");
        }
        assert!(calls.load(Ordering::Relaxed) > 31, "too few steps to have met the faults");
        cluster.wait_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_gpu_holds_is_computed_by_the_processor_and_the_plan_says_what_that_costs() {
    emulator();
    let model = crate::cluster::model("shakespeare");
    let options = Options { split: Split::Auto, ..options(&model, "cuda:0=14MiB,cpu") };
    let cluster = Cluster::start(&options).await;
    let client = cluster.client().await;
    let e = &expectations(&model)[0];
    assert_eq!(ask(&client, greedy(&e.ids, 24)).await.unwrap().ids, e.greedy[..24]);
    let plan = status(&cluster.address).await.plan.unwrap();
    let devices: Vec<_> = plan.replicas[0].stages.iter().map(|s| s.device.as_str()).collect();
    assert!(devices.contains(&"cpu") && devices.contains(&"cuda:0"), "{devices:?}");
    let offload = plan.offload.expect("layers are on the processor");
    assert!(offload.layers > 0 && offload.tokens_per_second > 0.0);
    cluster.wait_idle().await;
}

/// Workers of one GPU each, which NCCL links: it takes them for different machines.
fn ranks(count: usize) -> Vec<Process> {
    let libraries = emulator().to_str().unwrap();
    let models = crate::cluster::model("");
    let args = ["worker", "--models", models.to_str().unwrap(), "--devices", "cuda:0=64MiB"];
    let start = |rank| {
        let host = format!("rank{rank}");
        let environment = [("LD_LIBRARY_PATH", libraries), ("EMULATOR_GPUS", "1"), ("NCCL_HOSTID", &host)];
        Process::start_with(&environment, &args, "listening ")
    };
    (0..count).map(start).collect()
}

/// The peer of a rank that was killed hangs in NCCL, as the emulator has it, until it is told to abort.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_killed_inside_a_step_leaves_the_others_free_to_go_on() {
    const TOKENS: u32 = 40;
    let mut workers = ranks(3);
    let urls: Vec<_> = workers.iter().map(|w| w.address.clone()).collect();
    let urls = urls.join(",");
    let args = ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    let options = ["--split", "balanced", "--links", "nccl", "--kv-tokens", "2048"];
    let coordinator = Process::start(&[&args[..], &options].concat(), "ready ");
    let stages = status(&coordinator.address).await.plan.unwrap().replicas[0].stages.clone();
    assert_eq!(stages.len(), 3);
    assert!(stages[..2].iter().all(|s| s.link == "nccl"), "{stages:?}");

    let client = client(&coordinator.address).await;
    let e = &expectations(&crate::cluster::model("shakespeare"))[0];
    let mut stream = client.clone().generate(greedy(&e.ids, TOKENS)).await.unwrap().into_inner();
    let mut got = Vec::new();
    while let Some(event) = stream.message().await.unwrap() {
        if let Some(generate_event::Event::Tokens(tokens)) = event.event {
            assert_eq!(tokens.index as usize, got.len(), "an index is missing or repeated");
            got.push(tokens.token_ids[0]);
            if got.len() == 5 {
                workers[1].signal("-KILL");
            }
        }
    }
    assert_eq!(got, e.greedy[..TOKENS as usize]);
    let stages = status(&coordinator.address).await.plan.unwrap().replicas[0].stages.clone();
    assert_eq!(stages.len(), 2, "the others went on");
    workers.remove(1);
}
