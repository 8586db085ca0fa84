//! A client of another make: Python's grpcio, which knows only what reflection tells it.

use std::{io::Write, path::Path, process::Command};

use serde_json::Value;

use crate::cluster::{Cluster, Options};

/// The Python whose packages tests use.
pub fn python() -> String {
    std::env::var("STRATA_TEST_PYTHON").unwrap_or_else(|_| "python3".into())
}

/// Skips a test out loud, as something is not installed; in CI, that is a failure.
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "in CI nothing is skipped: {why}");
    // Written past the capture of the test harness, so that a skip is seen.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}, and set STRATA_TEST_PYTHON; tests/run does both");
}

/// A Python that has grpcio.
fn python_with_grpcio() -> Option<String> {
    let python = python();
    let has = Command::new(&python).args(["-c", "import grpc, grpc_reflection, grpc_health"]).output();
    if has.is_ok_and(|o| o.status.success()) {
        return Some(python);
    }
    skip("foreign_client needs grpcio; pip install -r tests/clients/requirements.txt");
    None
}

fn reflect(python: &str, address: &str, extra: &[&str]) -> Vec<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/reflect.py");
    let address = address.trim_start_matches("http://");
    let output = Command::new(python).arg(script).arg(address).args(extra).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpcio_finds_health_and_streams_by_reflection_alone() {
    let Some(python) = python_with_grpcio() else { return };
    let cluster = Cluster::start(&Options { workers: 2, ..Options::default() }).await;
    let address = cluster.address.clone();
    let run = |extra: &'static [&'static str]| {
        let (python, address) = (python.clone(), address.clone());
        tokio::task::spawn_blocking(move || reflect(&python, &address, extra))
    };
    let lines = run(&["--prompt", "ROMEO:\n", "--max-tokens", "12"]).await.unwrap();
    let services = [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "strata.v1.Cluster",
        "strata.v1.Inference",
    ];
    assert_eq!(lines[0]["services"], serde_json::json!(services), "reflection lists what is served");
    let text: String = lines.iter().filter_map(|l| l["tokens"]["text"].as_str()).collect();
    assert!(text.starts_with("O, then"), "{lines:?}");
    assert_eq!(lines.last().unwrap()["finished"]["reason"], "FINISH_REASON_LENGTH");

    run(&["--prompt", "ROMEO:\n", "--max-tokens", "240", "--hang-up", "3"]).await.unwrap();
    cluster.wait_idle().await;
}
