//! `strata pull`, from a hub on the loopback: what comes, what is refused, and that it is served.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    cluster::{PATIENCE, model},
    door::strata,
    foreign_client::{python, skip},
    hub::{COMMIT, Content, Hub},
    processes::{Process, free_dir},
};

/// `strata pull ARGS` from a hub into a home.
fn command(hub: &str, home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    command.arg("pull").args(args);
    for name in ["HF_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        command.env_remove(name);
    }
    command
        .env("HF_HOME", home)
        .env("HF_ENDPOINT", hub)
        .env("NO_PROXY", "127.0.0.1")
        .env("no_proxy", "127.0.0.1");
    command
}

/// Exit code, standard output, standard error.
fn ended(mut command: Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn folder(home: &Path) -> PathBuf {
    home.join("hub/models--some--one")
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn of(directory: &str) -> Content {
    let mut content = Content::default();
    content.add_all(&model(directory));
    content
}

#[test]
fn what_is_pulled_is_served_by_its_name() {
    let mut content = of("shakespeare");
    for other in ["pytorch_model.bin", "onnx/model.onnx", "README.md"] {
        content.add(other, other.into());
    }
    let (hub, home) = (Hub::start(content), free_dir());
    let pull = |args: &[&str]| {
        let mut pull = command(&hub.address, home.path(), args);
        pull.env("HF_TOKEN", "hf_confidential");
        ended(pull)
    };
    let (code, out, said) = pull(&["some/one", "--log", "trace,ureq_proto=trace"]);
    assert_eq!(code, 0, "{said}");
    let snapshot = folder(home.path()).join("snapshots").join(COMMIT);
    assert_eq!(out.trim(), snapshot.to_str().unwrap());
    assert!(said.contains(&format!("some/one at main is commit {COMMIT}: 6 files, ")), "{said}");
    assert!(said.lines().any(|line| line == "model.safetensors 5.3 MiB"), "{said}");
    assert!(!said.contains("hf_confidential"), "the token is shown");
    let heard = hub.heard();
    assert!(heard.iter().all(|request| request.authorized != request.elsewhere), "{heard:?}");
    assert_eq!(heard.iter().filter(|request| request.elsewhere).count(), 1, "{heard:?}");
    let expected = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&snapshot), expected);
    for name in expected {
        assert!(snapshot.join(name).is_symlink());
        assert_eq!(
            fs::read(snapshot.join(name)).unwrap(),
            fs::read(model("shakespeare").join(name)).unwrap()
        );
    }
    assert_eq!(fs::read_to_string(folder(home.path()).join("refs/main")).unwrap(), COMMIT);

    // What is here does not come again, by whatever name.
    let (code, _, said) = pull(&["some/one@refs/pr/1"]);
    assert!(code == 0 && said.contains("; 0 B to download"), "{said}");
    let heard: Vec<_> = hub.heard().into_iter().map(|request| request.path).collect();
    assert_eq!(heard, ["/api/models/some/one/revision/refs%2Fpr%2F1?blobs=true"]);
    assert_eq!(fs::read_to_string(folder(home.path()).join("refs/refs/pr/1")).unwrap(), COMMIT);

    let environment = [("HF_HOME", home.path().to_str().unwrap()), ("HF_HUB_OFFLINE", "1")];
    let server = ["serve", "some/one", "--port", "0", "--dtype", "f32"];
    let server = Process::start_with(&environment, &server, "ready ");
    let ask = |args: &[&str]| strata(&[args, &["--address", &server.address]].concat());
    let (code, out, said) = ask(&["generate", "ROMEO:\n", "--max-tokens", "48"]);
    assert!(code == 0 && out.starts_with("O, then, I'll be so.\n\nROMEO:\n"), "{out}{said}");
    assert!(ask(&["status"]).1.contains(&format!("commit    {COMMIT}\n")));
}

#[test]
fn what_breaks_off_goes_on_where_it_stopped() {
    let (hub, home) = (Hub::start(of("shakespeare")), free_dir());
    let whole = fs::metadata(model("shakespeare").join("model.safetensors")).unwrap().len();
    let half = usize::try_from(whole / 2).unwrap();
    let unfinished = || {
        let blobs = folder(home.path()).join("blobs");
        let name = names(&blobs).into_iter().find(|name| name.len() == 64 + ".incomplete".len())?;
        Some(fs::metadata(blobs.join(name)).ok()?.len())
    };
    // The process is killed while nothing comes.
    hub.content.lock().unwrap().cut.insert("model.safetensors".into(), (half, true));
    let mut pull = command(&hub.address, home.path(), &["some/one"]);
    let mut pull = pull.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while unfinished() != Some(half as u64) {
        assert!(begun.elapsed() < PATIENCE && pull.try_wait().unwrap().is_none(), "{:?}", unfinished());
        thread::sleep(Duration::from_millis(10));
    }
    pull.kill().unwrap();
    pull.wait().unwrap();
    assert!(!folder(home.path()).join("refs/main").exists(), "half a model has a name");

    // Then the connection is closed once more.
    hub.content.lock().unwrap().cut.insert("model.safetensors".into(), (half + 1000, false));
    let again = || ended(command(&hub.address, home.path(), &["some/one"]));
    let (code, _, said) = again();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("model.safetensors 5.3 MiB, of which 2.6 MiB came now"), "{said}");
    let heard = hub.heard();
    let parts: Vec<_> =
        heard.iter().filter(|request| request.elsewhere).map(|request| request.from).collect();
    assert_eq!(parts, [0, half, half + 1000]);
    let sent: usize = heard.iter().filter(|request| request.elsewhere).map(|request| request.sent).sum();
    assert_eq!(sent as u64, whole, "bytes were sent twice");
    assert_eq!(unfinished(), None);

    // A connection that brings nothing ends it.
    fs::remove_dir_all(folder(home.path())).unwrap();
    hub.content.lock().unwrap().cut.insert("model.safetensors".into(), (0, false));
    let (code, _, said) = again();
    assert!(code == 4 && said.contains("model.safetensors: it broke off after 0 B of 5.3 MiB"), "{said}");
}

#[test]
fn bytes_that_are_not_the_hubs_are_deleted() {
    for (name, at) in [("model.safetensors", 5_000_000), ("config.json", 100)] {
        let mut content = of("shakespeare");
        content.files.get_mut(name).unwrap()[at] ^= 1;
        let (hub, home) = (Hub::start(content), free_dir());
        let (code, out, said) = ended(command(&hub.address, home.path(), &["some/one"]));
        assert!(code == 1 && out.is_empty(), "{said}");
        assert!(
            said.contains(&format!("{name}: what came hashes to ")) && said.contains("it was deleted"),
            "{said}"
        );
        assert!(
            !folder(home.path()).join("refs").exists() && !folder(home.path()).join("snapshots").exists()
        );
        let left = names(&folder(home.path()).join("blobs"));
        assert!(left.iter().all(|name| !name.ends_with(".incomplete")), "{left:?}");
        // The next time, the hub has what it says.
        hub.content.lock().unwrap().files.get_mut(name).unwrap()[at] ^= 1;
        assert_eq!(ended(command(&hub.address, home.path(), &["some/one"])).0, 0);
    }
}

#[test]
fn a_hub_that_refuses_says_what_to_do() {
    let (hub, home) = (Hub::start(of("shakespeare")), free_dir());
    let pull = |token: Option<&str>| {
        let mut pull = command(&hub.address, home.path(), &["some/one@v2"]);
        pull.envs(token.map(|token| ("HF_TOKEN", token)));
        ended(pull)
    };
    for (refusal, token, code, says) in [
        ((401, "GatedRepo"), None, 3, "it is gated: accept its licence at http://127.0.0.1:"),
        ((403, "GatedRepo"), Some("hf_x"), 3, "with the account of the token in HF_TOKEN"),
        ((401, "RepoNotFound"), None, 3, "check the name, and if it is private, that HF_TOKEN is"),
        ((401, ""), Some("hf_x"), 3, "that the token in HF_TOKEN is valid"),
        ((404, "RevisionNotFound"), None, 3, "has the model, but no revision v2"),
        ((404, "RepoNotFound"), None, 3, "has no such model for you (404 Not Found): check the name"),
        ((429, ""), None, 4, "too many requests: try again later"),
        ((503, ""), None, 4, "failed (503 Service Unavailable) at revision v2: try again later"),
    ] {
        hub.content.lock().unwrap().refusal = Some(refusal);
        let (exited, out, said) = pull(token);
        assert!(
            exited == code && out.is_empty() && said.contains("some/one: "),
            "{refusal:?}: {exited} {said}"
        );
        assert!(said.contains(says) && !said.contains("hf_x"), "{refusal:?}: {said}");
    }
}

#[test]
fn what_cannot_be_pulled_is_refused_before_anything_comes() {
    let sibling = |name: &str, bytes: u64| {
        let (git, lfs) = ("a".repeat(40), json!({"sha256": "a".repeat(64), "size": bytes}));
        json!({"rfilename": name, "size": bytes, "blobId": git, "lfs": lfs})
    };
    let config = sibling("config.json", 1);
    for (siblings, args, code, says) in [
        (
            vec![sibling("../../../evil.safetensors", 1)],
            &["some/one"][..],
            1,
            "is no path inside of the model's folder",
        ),
        (vec![sibling("/etc/evil", 1)], &["some/one"], 1, "\"/etc/evil\" is no path inside"),
        (
            vec![config.clone(), sibling("model.safetensors", 1 << 60)],
            &["some/one"],
            1,
            "make room, or set HF_HOME to",
        ),
        (
            vec![config.clone(), sibling("pytorch_model.bin", 1)],
            &["some/one"],
            1,
            "but pytorch_model.bin: pickles",
        ),
        (vec![sibling("a.gguf", 1)], &["some/one"], 1, "choose one by --file: a.gguf"),
        (
            vec![sibling("a.gguf", 1)],
            &["some/one", "--file", "b.gguf"],
            1,
            "there is no b.gguf; its GGUF files are a.gguf",
        ),
        (vec![], &["some/one", "--file", "pytorch_model.bin"], 2, "expected the name of a GGUF file"),
        (vec![], &["some"], 2, "expected OWNER/NAME"),
        (vec![], &["other/one"], 3, "has no such model for you"),
    ] {
        let home = free_dir();
        let hub = Hub::start(Content { siblings, ..Content::default() });
        let (exited, _, said) = ended(command(&hub.address, home.path(), args));
        assert!(exited == code && said.contains(says), "{says}: {exited} {said}");
        assert!(
            hub.heard().iter().all(|request| request.path.starts_with("/api/")),
            "{says}: a file was asked for"
        );
        assert!(
            names(&folder(home.path()).join("blobs")).is_empty() && names(home.path()).len() <= 1,
            "{says}"
        );
    }
    let home = free_dir();
    let mut offline = command("http://127.0.0.1:1", home.path(), &["some/one"]);
    offline.env("HF_HUB_OFFLINE", "1");
    let (code, _, said) = ended(offline);
    assert!(code == 1 && said.contains("HF_HUB_OFFLINE is set: nothing is downloaded"), "{said}");
    let (code, _, said) = ended(command("http://127.0.0.1:1", home.path(), &["some/one"]));
    assert!(code == 4 && said.contains("no answer from http://127.0.0.1:1: "), "{said}");
    let (code, _, said) = ended(command("huggingface", home.path(), &["some/one"]));
    assert!(code == 2 && said.contains("HF_ENDPOINT=\"huggingface\": expected an address"), "{said}");
}

#[test]
fn modules_of_sentence_transformers_and_files_of_gguf_come_too() {
    let mut content = of("bert-sentences-f32");
    content.add("2_Dense/pytorch_model.bin", vec![1]);
    let (hub, home) = (Hub::start(content), free_dir());
    let (code, out, said) = ended(command(&hub.address, home.path(), &["some/one"]));
    assert_eq!(code, 0, "{said}");
    assert_eq!(names(&Path::new(out.trim()).join("2_Dense")), ["config.json", "model.safetensors"]);
    let (code, _, said) = strata(&["check", out.trim()]);
    assert_eq!(code, 0, "{said}");

    let (hub, home) = (Hub::start(of("gguf")), free_dir());
    let (code, out, said) =
        ended(command(&hub.address, home.path(), &["some/one", "--file", "exaone4-f32.gguf"]));
    assert_eq!(code, 0, "{said}");
    assert!(out.trim().ends_with("/exaone4-f32.gguf"), "{out}");
    let (code, _, said) = strata(&["check", out.trim()]);
    assert_eq!(code, 0, "{said}");
}

/// What the hub's own client says, in a cache.
fn hub_client(python: &str, hub: &Hub, home: &Path, args: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/hub.py");
    let mut client = Command::new(python);
    client.arg(script).args(args).env("HF_HOME", home).env("HF_ENDPOINT", &hub.address);
    for (name, value) in [("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1"), ("HF_HUB_DISABLE_XET", "1")] {
        client.env(name, value);
    }
    let (code, out, said) = ended(client);
    assert_eq!(code, 0, "{said}");
    out
}

#[test]
fn a_cache_is_shared_with_the_hubs_own_client() {
    let python = python();
    let has = Command::new(&python).args(["-c", "import huggingface_hub"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        return skip("pull needs huggingface-hub; pip install -r tests/clients/requirements.txt");
    }
    // It finds what was pulled.
    let (hub, home) = (Hub::start(of("llama-bias-f32")), free_dir());
    let (code, out, said) = ended(command(&hub.address, home.path(), &["some/one"]));
    assert_eq!(code, 0, "{said}");
    let found = hub_client(&python, &hub, home.path(), &["find", "some/one"]);
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    assert_eq!(found["warnings"], json!([]), "{found}");
    let files = names(Path::new(out.trim()));
    assert_eq!(found["revisions"], json!([{"commit": COMMIT, "refs": ["main"], "files": files}]));
    assert_eq!(
        (&found["snapshot"], &found["config"]),
        (&json!(out.trim()), &json!(format!("{}/config.json", out.trim())))
    );

    // What it downloads is served by its name, and is not downloaded again.
    let (hub, home) = (Hub::start(of("llama-bias-f32")), free_dir());
    let out = hub_client(&python, &hub, home.path(), &["download", "some/one"]);
    let mut check = Command::new(env!("CARGO_BIN_EXE_strata"));
    check.args(["check", "some/one"]).env("HF_HOME", home.path()).env_remove("HF_HUB_CACHE");
    let (code, _, said) = ended(check);
    assert_eq!(code, 0, "{said}");
    let (code, pulled, said) = ended(command(&hub.address, home.path(), &["some/one"]));
    assert_eq!((code, pulled.trim()), (0, out.trim()), "{said}");
}
