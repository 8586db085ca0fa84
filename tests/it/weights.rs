//! Weights are what they claim: damaged copies are refused by name, and told apart by `strata verify`.

use std::{fs, os::unix::fs::FileExt, path::Path, time::Duration};

use serde_json::Value;
use strata_proto::v1::{self, generate_event};

use crate::{
    cluster::{PATIENCE, ask, client, expectations, greedy, model, status},
    leaders::answers_exactly,
    processes::{Process, free_dir, run},
};

const TENSOR: &str = "model.layers.5.mlp.up_proj.weight";

/// A directory with a copy of the demo model.
fn copy() -> tempfile::TempDir {
    let models = free_dir();
    let directory = models.path().join("shakespeare");
    fs::create_dir(&directory).unwrap();
    for entry in fs::read_dir(model("shakespeare")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, directory.join(path.file_name().unwrap())).unwrap();
    }
    models
}

/// Flips one bit in the last layer, where the fingerprint does not look: a quarter into a tensor. Doing so again mends it.
fn flip_a_bit(models: &Path) {
    let path = models.join("shakespeare/model.safetensors");
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    let mut size = [0; 8];
    file.read_exact_at(&mut size, 0).unwrap();
    let size = u64::from_le_bytes(size);
    let mut header = vec![0; size as usize];
    file.read_exact_at(&mut header, 8).unwrap();
    let header: Value = serde_json::from_slice(&header).unwrap();
    let offsets = &header[TENSOR]["data_offsets"];
    let [begin, end] = [0, 1].map(|i| offsets[i].as_u64().unwrap());
    let mut byte = [0];
    let at = 8 + size + begin + (end - begin) / 4;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

async fn wait_for(
    address: &str,
    what: &str,
    holds: impl Fn(&v1::StatusResponse) -> bool,
) -> v1::StatusResponse {
    let wait = async {
        loop {
            let status = status(address).await;
            if holds(&status) {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what} does not come"))
}

/// Four or five workers of which the first three hold the stages, and a coordinator over them.
fn cluster(models: &[&Path]) -> (Vec<Process>, Process) {
    let start =
        |models: &&Path| Process::start(&["worker", "--models", models.to_str().unwrap()], "listening ");
    let workers: Vec<_> = models.iter().map(start).collect();
    let urls: Vec<_> = workers.iter().map(|w| w.address.clone()).collect();
    let urls = urls.join(",");
    let args = ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    let coordinator = Process::start(&[&args[..], &["--split", "2,2,2"]].concat(), "ready ");
    (workers, coordinator)
}

fn name(worker: &Process) -> String {
    worker.address.trim_start_matches("http://").to_owned()
}

fn serves(status: &v1::StatusResponse, worker: &str) -> bool {
    status.plan.as_ref().unwrap().replicas[0].stages.iter().any(|stage| stage.worker == worker)
}

/// An answer of 200 tokens, in the midst of which something happens.
async fn disturbed(address: &str, disturb: impl AsyncFnOnce()) {
    let client = client(address).await;
    let expected = expectations(&model("shakespeare")).remove(0);
    let undisturbed = ask(&client, greedy(&expected.ids, 200)).await.unwrap().ids;
    let mut stream = client.clone().generate(greedy(&expected.ids, 200)).await.unwrap().into_inner();
    let mut got = Vec::new();
    let mut disturb = Some(disturb);
    while let Some(event) = stream.message().await.unwrap() {
        let Some(generate_event::Event::Tokens(tokens)) = event.event else { continue };
        assert_eq!(tokens.index as usize, got.len(), "an index is missing or repeated");
        got.extend(tokens.token_ids);
        if let Some(disturb) = disturb.take() {
            disturb().await;
        }
    }
    assert_eq!(got, undisturbed, "an answer changed");
}

/// The only spare is to take layers over when a stage is lost, and one bit of them is not what it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spare_with_a_damaged_copy_is_refused_by_name_until_it_is_mended() {
    let damaged = copy();
    flip_a_bit(damaged.path());
    let (good, damaged) = (model(""), damaged.path());
    let (mut workers, coordinator) = cluster(&[&good, &good, &good, damaged]);
    let (address, spare) = (&coordinator.address, name(&workers[3]));
    let before = status(address).await;
    assert_eq!(before.weights.len(), 64, "every part was loaded");
    assert!(!serves(&before, &spare), "the spare is none: {before:?}");
    disturbed(address, async || {
        workers.remove(2).signal("-KILL");
        let says = |s: &v1::StatusResponse| s.reason.contains("its copy of the model is not that of");
        let refused = wait_for(address, "the refusal", says).await.reason;
        assert!(refused.contains(&spare) && refused.contains("layer 5"), "{refused}");
        flip_a_bit(damaged);
    })
    .await;
    let after = wait_for(address, "readiness", |s| s.ready).await;
    assert_eq!(after.weights, before.weights);
    assert!(serves(&after, &spare), "its mended copy is not used: {after:?}");
}

/// Of two spares, the first one is damaged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_good_spare_serves_in_the_place_of_a_damaged_one() {
    let damaged = copy();
    flip_a_bit(damaged.path());
    let good = model("");
    let (mut workers, coordinator) = cluster(&[&good, &good, &good, damaged.path(), &good]);
    let (address, bad, spare) = (&coordinator.address, name(&workers[3]), name(&workers[4]));
    disturbed(address, async || workers.remove(2).signal("-KILL")).await;
    let after = wait_for(address, "readiness", |s| s.ready).await;
    assert!(serves(&after, &spare) && !serves(&after, &bad), "{after:?}");
    let refused = &after.members.iter().find(|member| member.worker == bad).unwrap().reason;
    assert!(refused.contains("its copy of the model is not that of"), "{refused:?}");
}

#[test]
fn verify_names_the_tensor_in_which_two_copies_differ() {
    let (good, damaged) = (model("shakespeare"), copy());
    let other = damaged.path().join("shakespeare");
    let [good, other] = [&good, &other].map(|path| path.to_str().unwrap());
    let same = run(&["verify", good, "--against", other]).unwrap();
    // The whole, embedding, six layers, head.
    assert_eq!(same.lines().count(), 9, "{same}");
    assert!(same.lines().all(|line| line.split_whitespace().last().unwrap().len() == 64), "{same}");
    let report = damaged.path().join("digests.json");
    fs::write(&report, run(&["verify", good, "--json"]).unwrap()).unwrap();

    flip_a_bit(damaged.path());
    for against in [good, report.to_str().unwrap()] {
        let refused = run(&["verify", other, "--against", against]).unwrap_err();
        assert!(refused.contains("the weights are not those of"), "{refused}");
    }
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_strata"))
        .args(["verify", other, "--against", report.to_str().unwrap(), "--json"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let differences = found["differences"].as_array().unwrap();
    assert_eq!((differences.len(), &differences[0]["tensor"]), (1, &Value::from(TENSOR)), "{found}");
    assert_eq!(differences[0]["module"], "layer 5");
    assert!(run(&["verify", report.to_str().unwrap()]).unwrap_err().contains("give the directory"));
}

/// Adds a tensor that no model has a use for.
fn add_a_tensor(models: &Path, name: &str) {
    let path = models.join("shakespeare/model.safetensors");
    let file = fs::read(&path).unwrap();
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..end]).unwrap();
    let data = file.len() - end;
    header[name] = serde_json::json!({"dtype": "F32", "shape": [2], "data_offsets": [data, data + 8]});
    let header = header.to_string();
    let size = (header.len() as u64).to_le_bytes();
    fs::write(path, [&size[..], header.as_bytes(), &file[end..], &[0; 8]].concat()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tensors_without_a_use_are_named_and_left_out_on_demand() {
    let models = copy();
    add_a_tensor(models.path(), "mtp.norm.weight");
    let directory = models.path().join("shakespeare");
    let directory = directory.to_str().unwrap();
    for command in ["check", "verify"] {
        let refused = run(&[command, directory]).unwrap_err();
        let says = "tensor \"mtp.norm.weight\" belongs to nothing in the model";
        assert!(refused.contains(says) && refused.contains("--ignore-tensors"), "{refused}");
        run(&[command, directory, "--ignore-tensors", "other.*,mtp.*"]).unwrap();
    }
    // Workers are told with the model.
    let args = ["worker", "--models", models.path().to_str().unwrap()];
    let workers = [0, 1].map(|_| Process::start(&args, "listening "));
    let urls = workers.each_ref().map(|worker| worker.address.as_str()).join(",");
    let args =
        ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--split", "3,3"];
    let refused = run(&args).unwrap_err();
    assert!(refused.contains("mtp.norm.weight") && refused.contains("--ignore-tensors"), "{refused}");
    let args = [&args[..], &["--port", "0", "--ignore-tensors", "mtp.*"]].concat();
    let coordinator = Process::start(&args, "ready ");
    let there = status(&coordinator.address).await;
    assert!(workers.iter().all(|worker| serves(&there, &name(worker))), "{there:?}");
    answers_exactly(&coordinator.address).await;
}

#[test]
fn patterns_of_names_have_a_bound() {
    let given = |patterns: usize, bytes: usize| {
        let pattern = vec!["*".repeat(bytes); patterns].join(",");
        run(&["check", model("shakespeare").to_str().unwrap(), "--ignore-tensors", &pattern])
    };
    given(64, 256).unwrap();
    for (patterns, bytes, says) in [(65, 1, "65 patterns: expected 64"), (1, 257, "257 bytes: expected 256")]
    {
        let refused = given(patterns, bytes).unwrap_err();
        assert!(refused.contains(says), "{refused}");
    }
}

/// A coordinator over one worker.
fn coordinator(worker: &Process) -> Process {
    let args = ["coordinator", "--worker", &worker.address, "--model", "shakespeare", "--dtype", "f32"];
    Process::start(&[&args[..], &["--port", "0"]].concat(), "ready ")
}

/// Changes a bit of what a process holds of the norm behind the first layer's attention; how many copies of it there were.
fn flip_a_bit_in_memory(process: u32) -> usize {
    let path = model("shakespeare").join("model.safetensors");
    let tensors = fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&tensors).unwrap();
    let norm = tensors.tensor("model.layers.0.post_attention_layernorm.weight").unwrap();
    // Norms are held in f32, whose upper half a bf16 is.
    let held: Vec<u8> = norm.data().chunks(2).flat_map(|bf16| [0, 0, bf16[0], bf16[1]]).collect();
    let memory = fs::File::options().read(true).write(true).open(format!("/proc/{process}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let writable = maps.lines().filter(|line| line.contains(" rw-p "));
    let mut flipped = 0;
    for line in writable {
        let (first, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let [first, end] = [first, end].map(|number| u64::from_str_radix(number, 16).unwrap());
        let mut bytes = vec![0; (end - first) as usize];
        // Some of what is mapped cannot be read.
        if memory.read_exact_at(&mut bytes, first).is_err() {
            continue;
        }
        // Buffers begin on a cache line.
        for at in (0..bytes.len().saturating_sub(held.len())).step_by(64) {
            if bytes[at..].starts_with(&held) {
                memory.write_all_at(&[bytes[at + 3] ^ 0x40], first + at as u64 + 3).unwrap();
                flipped += 1;
            }
        }
    }
    flipped
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_that_change_in_memory_are_read_anew() {
    let models = model("");
    let args = ["worker", "--models", models.to_str().unwrap(), "--verify-every", "1"];
    let worker = Process::start(&args, "listening ");
    let coordinator = coordinator(&worker);
    answers_exactly(&coordinator.address).await;
    let before = status(&coordinator.address).await.fence;
    // Longer than it takes to compare all of them once: nothing is found where nothing has changed.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(status(&coordinator.address).await.fence, before);
    assert_eq!(flip_a_bit_in_memory(worker.id()), 1);
    wait_for(&coordinator.address, "another pipeline", |status| status.ready && status.fence != before).await;
    answers_exactly(&coordinator.address).await;
}
