//! Boards and alerts over a real Prometheus that scrapes a live cluster, through a recovery.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    cluster::{PATIENCE, ask, client, greedy, model},
    operators::{free_address, get},
    processes::{Process, free_dir},
};

/// Time from scrape to scrape.
const SCRAPE: &str = "200ms";

fn dashboards() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/dashboards")
}

/// Whether there is a Prometheus; in CI there has to be.
fn is_there(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "{program} is missing: tests/run installs it");
    if !found {
        eprintln!("SKIPPED: there is no {program}; tests/run installs it");
    }
    found
}

/// A Prometheus; killed when dropped.
struct Prometheus {
    child: Child,
    address: String,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    /// Scrapes these addresses, and evaluates our rules.
    fn start(directory: &Path, targets: &[String]) -> Self {
        let rules = dashboards().join("rules.yml");
        let config = format!(
            "global: {{ scrape_interval: {SCRAPE}, evaluation_interval: {SCRAPE} }}\nrule_files: [{rules:?}]\n\
             scrape_configs:\n  - job_name: strata\n    static_configs: [{{ targets: {targets:?} }}]\n"
        );
        let file = directory.join("prometheus.yml");
        fs::write(&file, config).unwrap();
        let address = free_address();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Prometheus { child, address }
    }

    /// What a query yields.
    fn query(&self, query: &str) -> Result<Vec<Value>, String> {
        let escape = |byte: u8| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        };
        let escaped: String = query.bytes().map(escape).collect();
        let answer = get(&self.address, &format!("/api/v1/query?query={escaped}"), "*/*");
        let answer = answer.ok_or("nobody listens")?;
        let body: Value = serde_json::from_str(&answer.body).map_err(|e| e.to_string())?;
        match body["data"]["result"].as_array() {
            Some(result) => Ok(result.clone()),
            None => Err(body["error"].to_string()),
        }
    }

    /// Waits until a query yields something.
    fn until(&self, query: &str) -> Vec<Value> {
        let begun = Instant::now();
        loop {
            let found = self.query(query);
            match found {
                Ok(found) if !found.is_empty() => return found,
                found => assert!(begun.elapsed() < PATIENCE, "{query} yields nothing: {found:?}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Each board with its queries, as Grafana would send them.
fn boards() -> Vec<(String, Vec<String>)> {
    let mut boards = Vec::new();
    for file in fs::read_dir(dashboards()).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let board: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            let panels = board["panels"].as_array().unwrap();
            let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
            let query = |target: &Value| {
                target["expr"].as_str().unwrap().replace("$__rate_interval", "1m").replace("$model", ".*")
            };
            boards.push((board["title"].as_str().unwrap().to_owned(), targets.map(query).collect()));
        }
    }
    boards
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_query_of_every_board_returns_data_through_a_recovery() {
    if !is_there("prometheus") {
        return;
    }
    let (models, admin) = (model(""), free_address());
    let start = |admin: &String| {
        Process::start(&["worker", "--models", models.to_str().unwrap(), "--admin", admin], "listening ")
    };
    let mut targets: Vec<_> = (0..3).map(|_| free_address()).collect();
    let mut workers: Vec<_> = targets.iter().map(start).collect();
    targets.push(admin.clone());
    let directory = free_dir();
    let prometheus = Prometheus::start(directory.path(), &targets);
    let urls = workers.iter().map(|worker| worker.address.as_str()).collect::<Vec<_>>().join(",");
    let arguments =
        ["coordinator", "--worker", &urls, "--model", "shakespeare", "--dtype", "f32", "--port", "0"];
    let more = ["--split", "balanced", "--admin", &admin];
    let coordinator = Process::start(&[&arguments[..], &more].concat(), "ready ");
    let client = client(&coordinator.address).await;
    prometheus.until("strata_ready == 1");

    let mut answers = BTreeSet::new();
    for round in 0..6 {
        answers.insert(ask(&client, greedy(&[5, 6, 7], 30)).await.unwrap().ids);
        // Each round is scraped by itself, so that there is a rate of what is counted.
        prometheus.until(&format!("vllm:generation_tokens_total >= {}", 30 * (round + 1)));
        if round == 2 {
            drop(workers.remove(1));
        }
    }
    assert_eq!(answers.len(), 1);
    prometheus.until("strata_recovery_gap_seconds_count == 1");

    let boards = boards();
    assert_eq!(boards.len(), 3);
    let begun = Instant::now();
    for (board, queries) in &boards {
        for query in queries {
            loop {
                match prometheus.query(query) {
                    Ok(found) if !found.is_empty() => break,
                    found => {
                        assert!(begun.elapsed() < PATIENCE, "{board}: {query} returns nothing: {found:?}")
                    }
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    // What two alerts are about has come to pass by then.
    let rules = fs::read_to_string(dashboards().join("rules.yml")).unwrap();
    let missing =
        rules.lines().find_map(|line| line.trim().strip_prefix("expr: sum by (job, instance, state)"));
    prometheus.until(&format!("sum by (job, instance, state){}", missing.unwrap()));
    drop(coordinator);
    prometheus.until("absent(strata_ready)");
}

#[test]
fn alerts_fire_when_they_should_and_each_is_in_the_manual() {
    if !is_there("promtool") {
        return;
    }
    let tested = Command::new("promtool")
        .args(["test", "rules", "rules_test.yml"])
        .current_dir(dashboards())
        .output()
        .unwrap();
    assert!(tested.status.success(), "{}", String::from_utf8_lossy(&tested.stdout));
    let read = |name: &str| fs::read_to_string(dashboards().join(name)).unwrap();
    let (rules, tests, manual) = (read("rules.yml"), read("rules_test.yml"), read("../OPERATIONS.md"));
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 9, "{alerts:?}");
    for alert in alerts {
        assert!(
            tests.contains(&format!("alertname: {alert}\n        exp_alerts:\n")),
            "{alert} is never seen to fire"
        );
        assert!(
            manual.contains(&format!("### {alert}\n")),
            "OPERATIONS.md does not say what to do about {alert}"
        );
    }
}
