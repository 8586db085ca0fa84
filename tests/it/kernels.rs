//! `strata kernels`: every kernel of a device is measured, whatever the figures are.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::cluster::model;

/// What `strata kernels` says of the demo model on a device, one object per line.
fn measured(device: &str, environment: &[(&str, &str)]) -> Vec<Value> {
    let all = ["--device", device, "--rows", "1,40", "--seconds", "3600"];
    measured_of(&[&[model("shakespeare").to_str().unwrap()], &all[..]].concat(), environment)
}

fn measured_of(arguments: &[&str], environment: &[(&str, &str)]) -> Vec<Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_strata"))
        .arg("kernels")
        .args(arguments)
        .args(["--threads", "1", "--json"])
        .env("STRATA_KERNEL_CACHE", "")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn check(lines: &[Value]) {
    let positive = |value: &Value| value.as_f64().is_some_and(|x| x.is_finite() && x > 0.0);
    let (limits, rest) = lines.split_first().unwrap();
    assert!(positive(&limits["bytes_per_second"]), "{limits}");
    assert!(["bf16", "int8", "int4"].iter().all(|f| positive(&limits["flops_per_second"][f])), "{limits}");
    let (left, kernels) = rest.split_last().unwrap();
    assert_eq!(left["not_measured"], 0);
    for line in kernels {
        for figure in ["microseconds", "gigabytes_per_second", "teraflops_per_second"] {
            assert!(positive(&line[figure]), "{figure} of {line}");
        }
        let has_share =
            ["product", "attention"].iter().any(|of| line["kernel"].as_str().unwrap().starts_with(of));
        let share = line["share"].as_f64();
        assert_eq!(share.is_some(), has_share, "{line}");
        assert!(share.is_none_or(|share| share > 0.0 && share <= 1.0), "{line}");
    }
    let has = |kernel: &str, format: &str, rows: u64| {
        kernels
            .iter()
            .any(|line| line["kernel"] == kernel && line["format"] == format && line["rows"] == rows)
    };
    for product in ["qkv", "attention out", "gate and up", "down", "head"] {
        for (format, rows) in
            [("bf16", 1), ("bf16", 40), ("int8", 1), ("int8", 40), ("int4", 1), ("int4", 40)]
        {
            assert!(has(&format!("product {product}"), format, rows), "{product} {format} {rows}");
        }
    }
    for other in ["attention decode", "norm", "rope and store", "likeliest token", "top-p draw"] {
        assert!([1, 32].iter().all(|rows| has(other, "bf16", *rows)), "{other}");
    }
    assert!(kernels.iter().any(|line| line["kernel"] == "attention prefill" && line["context"] == 0));
}

#[test]
fn every_kernel_of_a_cpu_is_measured() {
    check(&measured("cpu", &[]));
}

#[cfg(feature = "cuda")]
#[test]
fn every_kernel_of_a_gpu_is_measured() {
    check(&measured("cuda:0", &[("LD_LIBRARY_PATH", crate::gpu::emulator().to_str().unwrap())]));
}

#[test]
fn little_time_is_for_what_is_most_valuable_and_is_kept_to() {
    let begun = Instant::now();
    let lines = measured_of(&["llama-160m", "--device", "cpu", "--seconds", "1"], &[]);
    let (left, kernels) = lines[1..].split_last().unwrap();
    assert!(!kernels.is_empty() && left["not_measured"].as_u64().unwrap() > 0, "{lines:?}");
    assert_eq!(kernels[0]["kernel"], "product qkv");
    // Besides that second: the start, and the last kernel's matrices.
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn weights_of_an_odd_width_are_what_they_are_held_as_and_an_encoders_attention_is_left() {
    let directory = crate::processes::free_dir();
    let config = std::fs::read_to_string(model("bert-embed-f32").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["intermediate_size"] = 50.into();
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    let path = directory.path().to_str().unwrap();
    let lines = measured_of(&[path, "--device", "cpu", "--rows", "1", "--seconds", "3600"], &[]);
    let mut formats: Vec<_> = lines.iter().filter(|line| line["kernel"] == "product down").collect();
    formats.sort_by_key(|line| line["format"].to_string());
    let formats: Vec<_> = formats.iter().map(|line| line["format"].as_str().unwrap()).collect();
    assert_eq!(formats, ["bf16", "f32"], "50 inputs are no whole groups");
    assert_eq!(lines.last().unwrap()["never_measured"][0], "attention of an encoder");
}

#[test]
fn a_full_disk_is_said_once() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_strata"))
        .arg("kernels")
        .arg(model("shakespeare"))
        .args(["--device", "cpu", "--rows", "1", "--threads", "1", "--json"])
        .env("STRATA_KERNEL_CACHE", "")
        .stdout(full)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    let said =
        r#"{"error":"standard output: No space left on device (os error 28)","code":"FAILED","exit_code":1}"#;
    assert_eq!(error, format!("{said}\n"));
}

#[test]
fn a_model_of_no_shape_is_refused() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_strata")).args(["kernels", "no-such-model"]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("expected a directory with a config.json"), "{error}");
}
