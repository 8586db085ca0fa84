//! Real processes: the binary in its roles, its output, its exit codes.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use strata_proto::v1::generate_event;

use crate::cluster::{PATIENCE, ask, client, expectations, greedy, model, status};

/// A directory that goes away with the test.
pub fn free_dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A child process, killed when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A `strata` server process; killed when dropped.
pub struct Process {
    child: Killed,
    pub address: String,
}

/// One that has not said yet that it is there; killed when dropped.
pub struct Starting {
    child: Killed,
    line: mpsc::Receiver<String>,
    command: String,
    says: &'static str,
}

impl Starting {
    /// Starts `strata ARGS`, which is to print a line that begins with `says`; the rest of it is its address.
    pub fn new(environment: &[(&str, &str)], args: &[&str], says: &'static str) -> Starting {
        let mut child = Command::new(env!("CARGO_BIN_EXE_strata"))
            .args(args)
            .env("STRATA_KERNEL_CACHE", "")
            // There is one default, and tests run side by side.
            .env("STRATA_ADMIN", "off")
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let (sender, line) = mpsc::channel();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            let mut line = String::new();
            let _ = out.read_line(&mut line);
            let _ = sender.send(line);
            // Keeps the pipe open and empty.
            let _ = out.read_to_string(&mut String::new());
        });
        Starting { child: Killed(child), line, command: format!("{args:?}"), says }
    }

    /// Waits for that line.
    pub fn ready(self) -> Process {
        let Starting { child, line, command, says } = self;
        let line = line.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{command} said nothing"));
        let address = line.trim().strip_prefix(says).unwrap_or_else(|| panic!("{command} said {line:?}"));
        Process { address: address.to_owned(), child }
    }
}

impl Process {
    /// Starts `strata ARGS` and waits for the line that begins with `says`, whose rest is its address.
    pub fn start(args: &[&str], says: &'static str) -> Process {
        Self::start_with(&[], args, says)
    }

    /// The same, with more in its environment.
    pub fn start_with(environment: &[(&str, &str)], args: &[&str], says: &'static str) -> Process {
        Starting::new(environment, args, says).ready()
    }

    pub fn id(&self) -> u32 {
        self.child.0.id()
    }

    pub fn signal(&self, signal: &str) {
        self::signal(self.id(), signal);
    }

    /// How it ended, once it has.
    pub fn exited(&mut self) -> std::process::ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.0.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the process does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Sends a signal, as `-TERM`, to a process of the test's own.
pub fn signal(process: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &process.to_string()]).status().unwrap().success());
}

/// Runs `strata ARGS` to its end; its standard output, if it succeeded.
pub fn run(args: &[&str]) -> Result<String, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_strata")).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// So many workers, each a process, for the models of the tests.
pub fn workers(count: usize) -> Vec<Process> {
    let models = model("");
    let start = |_| Process::start(&["worker", "--models", models.to_str().unwrap()], "listening ");
    (0..count).map(start).collect()
}

fn coordinator(workers: &[Process]) -> Process {
    let urls: Vec<_> = workers.iter().map(|w| w.address.clone()).collect();
    let urls = urls.join(",");
    let args = ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    Process::start(&[&args[..], &["--split", "balanced"]].concat(), "ready ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_and_three_workers_answer_as_one_process_does() {
    let workers = workers(3);
    let coordinator = coordinator(&workers);
    let client = client(&coordinator.address).await;
    let expected = expectations(&model("shakespeare"));
    let answers = futures::future::join_all(expected.iter().map(|e| ask(&client, greedy(&e.ids, 48)))).await;
    for (answer, e) in answers.into_iter().zip(&expected) {
        assert_eq!(answer.unwrap().ids, e.greedy);
    }
    let stages = &status(&coordinator.address).await.plan.unwrap().replicas[0].stages;
    assert_eq!(stages.len(), 3);
    assert!(stages[..2].iter().all(|s| s.link == "tcp"), "processes can only be linked by TCP: {stages:?}");
}

/// FAULTS 1 and 2: the first, a middle and the last stage.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_mid_answer_costs_a_pause_and_no_error() {
    const TOKENS: u32 = 200;
    for victim in 0..3 {
        let mut workers = workers(3);
        let coordinator = coordinator(&workers);
        let client = client(&coordinator.address).await;
        let prompts: Vec<_> = expectations(&model("shakespeare")).into_iter().map(|e| e.ids).collect();
        let mut undisturbed = Vec::new();
        for ids in &prompts {
            undisturbed.push(ask(&client, greedy(ids, TOKENS)).await.unwrap().ids);
        }
        let seen = Arc::new(AtomicU32::new(0));
        let answers: Vec<_> = (0..10)
            .map(|i| {
                let (mut client, ids, seen) = (client.clone(), prompts[i % 5].clone(), seen.clone());
                tokio::spawn(async move {
                    let mut stream = client.generate(greedy(&ids, TOKENS)).await?.into_inner();
                    let mut got = Vec::new();
                    while let Some(event) = stream.message().await? {
                        if let Some(generate_event::Event::Tokens(tokens)) = event.event {
                            assert_eq!(tokens.index as usize, got.len(), "an index is missing or repeated");
                            seen.fetch_add(1, Ordering::Relaxed);
                            got.extend(tokens.token_ids);
                        }
                    }
                    Ok::<_, tonic::Status>(got)
                })
            })
            .collect();
        while seen.load(Ordering::Relaxed) < 100 {
            tokio::task::yield_now().await;
        }
        workers.remove(victim).signal("-KILL");
        let at_kill = seen.load(Ordering::Relaxed);
        assert!(at_kill < 10 * TOKENS, "the answers were over before worker {victim} was killed");
        for (i, answer) in answers.into_iter().enumerate() {
            let got = answer.await.unwrap().unwrap();
            assert_eq!(got, undisturbed[i % 5], "an answer changed when worker {victim} was killed");
        }
        let status = status(&coordinator.address).await;
        assert!(status.ready && status.fence.unwrap().incarnation >= 2);
        assert_eq!(status.plan.unwrap().replicas[0].stages.len(), 2);
    }
}

/// A rolling update: the coordinator plans without a worker before it ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_told_to_end_hands_its_layers_over_first() {
    let mut workers = workers(3);
    let coordinator = coordinator(&workers);
    let client = client(&coordinator.address).await;
    let ids = expectations(&model("shakespeare")).remove(0).ids;
    let undisturbed = ask(&client, greedy(&ids, 200)).await.unwrap().ids;

    let mut stream = client.clone().generate(greedy(&ids, 200)).await.unwrap().into_inner();
    let mut got = Vec::new();
    while let Some(event) = stream.message().await.unwrap() {
        let Some(generate_event::Event::Tokens(tokens)) = event.event else { continue };
        assert_eq!(tokens.index as usize, got.len(), "an index is missing or repeated");
        if got.is_empty() {
            workers[1].signal("-TERM");
        }
        got.extend(tokens.token_ids);
    }
    assert_eq!(got, undisturbed, "an answer changed when a worker was told to end");
    assert!(workers[1].exited().success());
    let status = status(&coordinator.address).await;
    let stages = &status.plan.unwrap().replicas[0].stages;
    let left = [&workers[0], &workers[2]].map(|w| w.address.trim_start_matches("http://"));
    assert_eq!(stages.iter().map(|s| s.worker.as_str()).collect::<Vec<_>>(), left);
}

/// FAULTS 10: readiness goes, the answer waits, and all comes back by itself when a worker joins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_capacity_it_is_not_ready_and_recovers_when_a_worker_joins() {
    let models = model("");
    let start = |listen: &str| {
        Process::start(&["worker", "--models", models.to_str().unwrap(), "--listen", listen], "listening ")
    };
    let only = start("127.0.0.1:0");
    let listen = only.address.trim_start_matches("http://").to_owned();
    let workers = [only];
    let coordinator = coordinator(&workers);
    let ids = expectations(&model("shakespeare")).remove(0).ids;
    let client = client(&coordinator.address).await;
    let undisturbed = ask(&client, greedy(&ids, 250)).await.unwrap().ids;

    let mut stream = client.clone().generate(greedy(&ids, 250)).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    drop(workers);
    let wait_until_ready_is = async |ready: bool| {
        let begun = Instant::now();
        while status(&coordinator.address).await.ready != ready {
            assert!(begun.elapsed() < PATIENCE, "readiness does not become {ready}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    wait_until_ready_is(false).await;
    let channel = tonic::transport::Channel::from_shared(coordinator.address.clone()).unwrap().connect_lazy();
    let request = tonic_health::pb::HealthCheckRequest { service: "strata.v1.Inference".into() };
    let health = tonic_health::pb::health_client::HealthClient::new(channel).check(request).await.unwrap();
    assert_eq!(
        health.into_inner().status(),
        tonic_health::pb::health_check_response::ServingStatus::NotServing
    );

    let _back = start(&listen);
    wait_until_ready_is(true).await;
    let mut got = Vec::new();
    while let Some(event) = stream.message().await.unwrap() {
        if let Some(generate_event::Event::Tokens(tokens)) = event.event {
            got.extend(tokens.token_ids);
        }
    }
    assert_eq!(got, undisturbed, "an answer changed when its only worker was replaced");
}

#[test]
fn serve_and_its_clients_speak_as_documented() {
    let demo = model("shakespeare");
    let demo = demo.to_str().unwrap();
    let mut server =
        Process::start(&["serve", demo, "--workers", "3", "--port", "0", "--dtype", "f32"], "ready ");
    assert!(server.address.starts_with("http://127.0.0.1:"));
    let address = server.address.clone();
    let generate = |extra: &[&str]| run(&[&["generate", "--address", &address], extra].concat());

    let text = generate(&["--prompt", "ROMEO:\n", "--max-tokens", "48"]).unwrap();
    assert!(text.starts_with("O, then, I'll be so.\n\nROMEO:\n"), "{text:?}");
    let out =
        generate(&["--token-ids", "0,842,28,201", "--max-tokens", "3", "--json", "--logprobs", "2"]).unwrap();
    let lines: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let last = lines.last().unwrap();
    assert_eq!(last["token_ids"], serde_json::json!([49, 14, 536]));
    assert_eq!(last["prompt_token_ids"], serde_json::json!([0, 842, 28, 201]));
    assert_eq!(last["finish_reason"], "length");
    assert_eq!(
        last["usage"],
        serde_json::json!({"prompt_tokens": 4, "completion_tokens": 3, "cached_tokens": 0})
    );
    assert_eq!(last["logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(lines.len(), 5, "started, three tokens, finished: {out}");

    let refused = generate(&["--prompt", "x", "--temperature", "nan"]).unwrap_err();
    assert!(refused.contains("sampling.temperature: NaN is out of bounds"), "{refused}");
    let status: Value =
        serde_json::from_str(&run(&["status", "--address", &address, "--json"]).unwrap()).unwrap();
    assert_eq!((&status["ready"], &status["model"]), (&Value::Bool(true), &"shakespeare".into()));
    assert_eq!(status["plan"]["replicas"][0]["stages"].as_array().unwrap().len(), 3);
    let shown = run(&["status", "--address", &address]).unwrap();
    assert!(shown.contains("shakespeare ready"), "{shown}");
    let version = run(&["--version"]).unwrap();
    let version = version.trim().strip_prefix("strata ").unwrap();
    assert_eq!(status["version"], version);
    assert!(shown.contains(&format!("version   {version}\n")), "{shown}");
    let (number, commit) = version.split_once(' ').unwrap_or((version, "(0000000)"));
    let commit = commit.strip_prefix('(').unwrap().strip_suffix(')').unwrap();
    assert_eq!(number, env!("CARGO_PKG_VERSION"));
    assert!(commit.len() >= 7 && commit.chars().all(|c| c.is_ascii_hexdigit()), "{version}");

    assert_eq!(generate(&["ROMEO:\n", "--max-tokens", "48"]).unwrap(), text, "a prompt has its place, too");
    let ids = run(&["tokenize", "--address", &address, "ROMEO:\n"]).unwrap();
    assert_eq!(ids, "0,842,28,201\n");
    assert_eq!(run(&["tokenize", "--address", &address, "--plain", "ROMEO:\n"]).unwrap(), "842,28,201\n");
    assert_eq!(run(&["detokenize", "--address", &address, ids.trim()]).unwrap(), "ROMEO:\n\n");
    let secret = run(&["status", "--address", "https://localhost:7717"]).unwrap_err();
    assert!(secret.contains("--address https://localhost:7717: Strata has no TLS yet"), "{secret}");

    server.signal("-TERM");
    assert!(server.exited().success());
    let gone = generate(&["--prompt", "x"]).unwrap_err();
    assert!(gone.contains("no server answers at"), "{gone}");
}

#[test]
fn a_random_model_is_written_served_and_measured() {
    let directory = tempfile::tempdir().unwrap();
    let random = directory.path().join("random");
    let random = random.to_str().unwrap();
    assert_eq!(run(&["random-model", "llama-1m", random]).unwrap().trim(), random);
    assert!(run(&["random-model", "llama-1m", random]).unwrap_err().contains("exists already"));
    assert!(run(&["check", random, "--quantize", "int8"]).unwrap().contains("output          ok"));

    let server = Process::start(&["serve", random, "--port", "0", "--quantize", "int4"], "ready ");
    let bench = |extra: &[&str]| run(&[&["bench", "--address", &server.address], extra].concat());
    let out =
        bench(&["--concurrency", "1,3", "--prompt-tokens", "5", "--max-tokens", "4", "--json"]).unwrap();
    let reports: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (report, (concurrency, requests)) in reports.iter().zip([(1, 4), (3, 12)]) {
        assert_eq!((&report["concurrency"], &report["requests"]), (&concurrency.into(), &requests.into()));
        assert_eq!(report["generated_tokens"], 4 * requests);
        for key in ["tokens_per_second", "requests_per_second", "seconds"] {
            assert!(report[key].as_f64().unwrap() > 0.0, "{key}: {report}");
        }
        let of = |key: &str, p: &str| report[key][p].as_f64().unwrap();
        for key in ["first_token_ms", "inter_token_ms"] {
            assert!(of(key, "p50") > 0.0 && of(key, "p99") >= of(key, "p50"), "{report}");
        }
    }
    assert_eq!(reports.len(), 2);
    assert!(bench(&["--requests", "1"]).unwrap().contains("tokens/s"));
    assert!(bench(&["--prompt-tokens", "5000"]).unwrap_err().contains("5000"), "says what was too long");
    assert!(bench(&["--concurrency", "0"]).unwrap_err().contains("0 is not in"));
}

#[test]
fn shells_learn_the_commands() {
    for (shell, says) in
        [("bash", "complete -F _strata"), ("zsh", "#compdef strata"), ("fish", "complete -c strata")]
    {
        let text = run(&["completions", shell]).unwrap();
        assert!(text.contains(says) && text.contains("fill-mask"), "{shell}: {text}");
    }
    assert!(run(&["completions", "cmd"]).unwrap_err().contains("possible values: bash"));
}

#[test]
fn plans_are_shown_before_anything_loads() {
    let demo = model("shakespeare");
    let demo = demo.to_str().unwrap();
    let plan = |extra: &[&str]| run(&[&["plan", demo], extra].concat());
    let json = |extra: &[&str]| -> Value { serde_json::from_str(&plan(extra).unwrap()).unwrap() };

    // Two devices of 24 MiB hold the demo model whole: auto takes one.
    let capped = ["--json", "--devices", "cpu:0=24MiB,cpu:1=24MiB"];
    let one = json(&capped);
    assert_eq!(one["replicas"][0]["stages"].as_array().unwrap().len(), 1);
    assert_eq!(one["hf_device_map"]["model.layers.0"], "cpu");
    let two = json(&[&capped[..], &["--split", "balanced", "--kv-tokens", "256"]].concat());
    let stages = two["replicas"][0]["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 2);
    for key in ["worker", "device", "layers", "weight_bytes", "kv_bytes", "workspace_bytes", "predicted_ms"] {
        assert!(!stages[0][key].is_null(), "a stage has no {key}");
    }
    assert_eq!((&stages[0]["layers"][0], &stages[1]["layers"][1]), (&0.into(), &6.into()));
    assert_eq!(two["replicas"][0]["kv_capacity_tokens"], 256);
    assert_eq!(two["hf_device_map"]["model.embed_tokens"], "cpu:0");
    assert_eq!(two["hf_device_map"]["lm_head"], "cpu:1");

    let counts = json(&["--json", "--workers", "3", "--split", "1,2,3", "--links", "tcp"]);
    let layers: Vec<_> =
        counts["replicas"][0]["stages"].as_array().unwrap().iter().map(|s| &s["layers"]).collect();
    assert_eq!(serde_json::json!(layers), serde_json::json!([[0, 1], [1, 3], [3, 6]]));
    assert!(plan(&["--workers", "3"]).unwrap().contains("█"), "the table has no bars");

    let capped = json(&["--json", "--devices", "cpu:0,cpu:1", "--max-memory", "cpu:0=24MiB,cpu:1=30MiB"]);
    assert_eq!(capped["replicas"][0]["stages"][0]["budget_bytes"], 24 << 20);
    assert!(plan(&["--max-memory", "cpu:9=1GiB"]).unwrap_err().contains("no such device; there are cpu"));

    // Machines nobody has here; a context and a number of sequences of one's own.
    let gpus = json(&["--json", "--device", "2x10MiB@3.3TB/s", "--context", "128", "--max-sequences", "4"]);
    let devices: Vec<_> =
        gpus["replicas"][0]["stages"].as_array().unwrap().iter().map(|s| &s["device"]).collect();
    assert_eq!(serde_json::json!(devices), serde_json::json!(["cuda:0", "cuda:1"]));
    assert_eq!(gpus["replicas"][0]["kv_capacity_tokens"], 512);
    assert_eq!(gpus["hf_device_map"]["lm_head"], 1, "CUDA devices are integers");
    let map = gpus["hf_device_map"].to_string();
    assert_eq!(
        json(&["--json", "--device", "2x1GiB", "--split", &map])["hf_device_map"],
        gpus["hf_device_map"]
    );

    // What would fit is named, and then fits.
    let refused = plan(&["--device", "2x10750KiB", "--max-sequences", "2", "--dtype", "f32"]).unwrap_err();
    assert!(refused.contains("it would fit with --dtype bf16"), "{refused}");
    let refused = plan(&["--device", "2x8500KiB", "--kv-tokens", "16"]).unwrap_err();
    assert!(refused.contains("it would fit with --quantize int8"), "{refused}");
    let int8 = json(&["--json", "--device", "2x8500KiB", "--kv-tokens", "16", "--quantize", "int8"]);
    assert_eq!((&int8["dtype"], &int8["quantization"]), (&"bf16".into(), &"int8".into()));
    let stage = &int8["replicas"][0]["stages"][0];
    assert_eq!(stage["weight_bytes"], stage["footprint"]["int8"]);
    assert!(plan(&["--quantize", "nf4"]).unwrap_err().contains("expected int8 or int4, or none"));
    assert_eq!(json(&["--json", "--dtype", "half", "--quantize", "none"])["dtype"], "f16");

    let small = plan(&["--devices", "cpu:0=1MiB,cpu:1=1MiB"]).unwrap_err();
    assert!(small.starts_with("error: ") && small.contains("MiB"), "{small}");
    assert!(plan(&["--split", "9,9"]).unwrap_err().contains("6"), "says how many layers there are");
    assert!(plan(&["--split", "sideways"]).unwrap_err().contains("expected"));
    let no_gpu = plan(&["--devices", "cuda:99"]).unwrap_err();
    let why = if cfg!(feature = "cuda") { "cuda:99" } else { "no CUDA support" };
    assert!(no_gpu.contains(why), "{no_gpu}");
}
