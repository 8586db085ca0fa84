//! What is said of a command line: flags that have no effect, values that are wrong, and where they come from.

use std::process::Command;

use serde_json::Value;

use crate::{
    cluster::model,
    door::{shakespeare, strata},
    processes::{Process, free_dir},
};

#[test]
fn nothing_that_is_given_is_ignored_in_silence() {
    let demo = shakespeare();
    let nobody = ["--address", "127.0.0.1:1"];
    for (args, code, says) in [
        (&["embed", "--text", "a", "--pair", "b", "--pair", "c"][..], 2, "--pair: 2 for 1 of --text"),
        (&["generate", "x", "--logprobs", "2"], 2, "--logprobs: only --json shows them"),
        (&["generate", "x", "--top-k", "5"], 4, "warning: --top-k: without --temperature"),
        (
            &["generate", "x", "--temperature", "0", "--top-p", "0.5", "--seed", "1"],
            4,
            "warning: --top-p, --seed: ",
        ),
        (&["bench", "--requests", "2", "--concurrency", "1,8"], 2, "--requests 2: 8 at once"),
        (
            &["bench", "--prompt-tokens", "4", "--shared-prefix", "8"],
            2,
            "--shared-prefix 8: a prompt has 4 tokens",
        ),
        (&["bench", "--top-k", "8"], 4, "warning: --top-k and --top-p choose nothing"),
        (&["status", "--timeout", "0"], 2, "0 is not in 1.."),
    ] {
        let (exited, _, said) = match args.contains(&"--timeout") {
            true => strata(args),
            false => strata(&[args, &nobody].concat()),
        };
        assert!(exited == code && said.contains(says), "{args:?} ended with {exited}: {said}");
    }
    for (args, code, says) in [
        (&["--threads", "1000"][..], 0, "warning: --threads 1000: this machine has "),
        (&["--threads", "0"], 2, "0 is not in 1.."),
        (
            &["--spill-dir", "/tmp", "--max-memory", "cpu=1GiB"],
            0,
            "--spill-dir /tmp is not used: no device is",
        ),
        (&["--prefill-chunk", "500", "--max-step-tokens", "100"], 0, "--prefill-chunk 500 is never reached"),
        (&["--kernel-cache", "/tmp"], 0, "--kernel-cache /tmp is not used: none of the devices is a GPU"),
        (&["--device", "80GiB@3.3"], 2, "3 B/s: expected a unit, as in 3.3TB/s"),
    ] {
        let devices: &[&str] = if args.contains(&"--device") { &[] } else { &["--devices", "cpu"] };
        let (exited, _, said) = strata(&[&["plan", &demo], devices, args].concat());
        assert!(exited == code && said.contains(says), "{args:?} ended with {exited}: {said}");
    }
    let encoder = model("bert-embed-f32");
    for (args, says) in [
        (&[&demo, "--context", "999999"][..], "warning: a context of 999999 is more than the model's"),
        (
            &[&demo, "--devices", "cpu", "--links", "tcp"],
            "warning: nothing is linked by tcp: there is one stage",
        ),
        (&[encoder.to_str().unwrap(), "--kv-tokens", "100"], "warning: the size of a cache was given"),
    ] {
        let (code, out, said) = strata(&[&["plan"], args].concat());
        assert!(code == 0 && out.contains(says), "{args:?}: {out}{said}");
    }
    let directory = free_dir();
    let file = directory.path().join("strata.toml");
    std::fs::write(&file, "[plan]\nworker = 3\n").unwrap();
    let (code, _, said) = strata(&["--config", file.to_str().unwrap(), "plan", &demo]);
    assert!(code == 2 && said.contains("[plan]: unknown key \"worker\""), "{said}");
}

#[test]
fn the_command_line_comes_before_the_environment_and_usage_errors_are_json_for_both() {
    let nowhere = ["generate", "--address", "http://127.0.0.1:1"];
    let run = |environment: &[(&str, &str)], args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
        let output = command.args(nowhere).args(args).envs(environment.iter().copied()).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let prompt = [("STRATA_PROMPT", "abc")];
    for args in [&["def"][..], &["--prompt", "def"], &["--token-ids", "1"], &["--message", "user=x"], &[]] {
        let (code, said) = run(&prompt, args);
        assert!(code == 4 && said.contains("no server answers"), "{args:?}: {said}");
    }
    assert_eq!(run(&prompt, &["a", "--prompt", "b"]).0, 2, "two prompts");

    let wrong = ["x", "--max-tokens", "some"];
    let directory = free_dir();
    let file = directory.path().join("strata.toml");
    std::fs::write(&file, "[generate]\njson = true\n").unwrap();
    for environment in [("STRATA_JSON", "true"), ("STRATA_CONFIG", file.to_str().unwrap())] {
        let (code, said) = run(&[environment], &wrong);
        let error: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((code, &error["code"]), (2, &"USAGE".into()));
    }
    assert!(run(&[("STRATA_JSON", "false")], &wrong).1.starts_with("error: "));
    let (code, said) = run(&[], &["generate", "x", "--logprobs", "1"]);
    assert!(code == 2 && !said.contains("note: "), "nothing comes from a file: {said}");
}

#[test]
fn what_is_applied_is_within_what_its_flags_take() {
    let directory = free_dir();
    let file = directory.path().join("deployment.toml");
    for (line, says) in [
        ("replicas = 0", "replicas: 0: expected 1 to 64"),
        ("standbys = 4000000000", "standbys: 4000000000: expected 0 to 64"),
        ("context = 1", "context: 1: expected 2 to "),
        ("color = 'red'", "unknown field `color`"),
    ] {
        std::fs::write(&file, format!("model = 'm'\n{line}\n")).unwrap();
        let (code, _, said) = strata(&["apply", file.to_str().unwrap(), "--address", "127.0.0.1:1"]);
        assert!(code == 2 && said.contains(says), "{line}: {said}");
    }
}

#[test]
fn names_are_given_once_and_texts_of_encoders_may_be_files() {
    let twice = strata(&["serve", &shakespeare(), "--name", "a,b,a"]);
    assert!(twice.0 == 2 && twice.2.contains("--name a is given twice"), "{}", twice.2);
    let blank = strata(&["serve", &shakespeare(), "--name", " "]);
    assert!(blank.0 == 2 && blank.2.contains("expected a name"), "{}", blank.2);
    let embed = |text: &[&str]| strata(&[&["embed", "--address", "http://127.0.0.1:1"], text].concat());
    let missing = embed(&["--text", "@/nowhere"]);
    assert!(missing.0 == 1 && missing.2.contains("prompt @/nowhere: reading the file"), "{}", missing.2);
    let both = embed(&["--text", "-", "--pair", "-"]);
    assert!(both.0 == 2 && both.2.contains("standard input (-) is read once"), "{}", both.2);
}

#[test]
fn what_was_asked_for_wrongly_is_told_from_what_failed_and_its_origin_is_said() {
    let demo = shakespeare();
    let directory = free_dir();
    let file = directory.path().join("strata.toml");
    std::fs::write(&file, "[embed]\ntext = ['a']\npair = ['b', 'c']\n[generate]\nprompt = 'x'\n").unwrap();
    let file = file.to_str().unwrap();
    let run = |environment: &[(&str, &str)], args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
        let output = command.args(args).envs(environment.iter().copied()).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let nobody = ("STRATA_ADDRESS", "127.0.0.1:1");
    for (environment, args, code, says) in [
        (
            &[nobody][..],
            &["embed", "--config", file][..],
            2,
            "\nnote: --pair comes from the file of --config, --text",
        ),
        (
            &[("STRATA_PAIR", "b")],
            &["embed", "--token-ids", "1"],
            2,
            "comes from the environment variable STRATA_PAIR",
        ),
        (
            &[("STRATA_ADDRESS", "https://a")],
            &["status"],
            2,
            "\nnote: --address comes from the environment variable",
        ),
        (&[nobody], &["status"], 4, "\nnote: --address comes from the environment variable STRATA_ADDRESS"),
        (&[nobody], &["generate", "--config", file], 4, "no server answers"),
        (&[nobody], &["generate"], 2, "there is nothing to continue: give a PROMPT"),
        (
            &[("STRATA_SPLIT", "9,9")],
            &["plan", &demo],
            2,
            "\nnote: --split comes from the environment variable STRATA_SPLIT",
        ),
        (&[("STRATA_JSON", "1"), nobody], &["status"], 4, "{\"error\":"),
        (&[("STRATA_JSON", ""), nobody], &["status"], 4, "error: "),
        (&[("STRATA_JSON", "perhaps"), nobody], &["status"], 2, "expected true or false"),
        (&[nobody], &["embed"], 2, "there is no input: give a --text"),
        (&[], &["status", "--log", "a=b=c"], 2, "--log \"a=b=c\": expected a level"),
        (&[], &["plan", &demo, "--devices", "cpu", "--workers", "2"], 2, "--workers or --devices, not both"),
        (&[], &["plan", &demo, "--devices", "cpu,cpu"], 2, "--devices cpu is given twice"),
        (
            &[("STRATA_MAX_MEMORY", "cpu:9=1GiB")],
            &["plan", &demo],
            2,
            "\nnote: --max-memory comes from the environment",
        ),
        (&[], &["plan", &demo, "--split", "9,9"], 2, "add up to the model's 6"),
        (&[], &["plan", "/nowhere"], 1, "No such file"),
        (&[], &["plan", &demo, "--devices", "cpu=1MiB"], 1, "MiB"),
    ] {
        let (exited, said) = run(environment, args);
        assert!(exited == code && said.contains(says), "{args:?} ended with {exited}: {said}");
    }
}

#[test]
fn a_model_of_the_hub_is_known_whoever_is_given_it() {
    let page = "https://huggingface.co/Qwen/Qwen3-0.6B";
    let (code, _, said) = strata(&["coordinator", "--worker", "127.0.0.1:1", "--model", page]);
    let says = "`hf download Qwen/Qwen3-0.6B --local-dir MODELS/Qwen3-0.6B`, and give --models MODELS to workers and --model \
                Qwen3-0.6B to the coordinator";
    assert!(
        code == 2 && said.contains("--model https://huggingface.co/Qwen/Qwen3-0.6B: ") && said.contains(says),
        "{said}"
    );
    let (code, _, said) = strata(&["worker", "--models", "Qwen/Qwen3-0.6B"]);
    assert!(
        code == 1 && said.contains("--models Qwen/Qwen3-0.6B: no such directory") && said.contains(says),
        "{said}"
    );
}

#[test]
fn a_model_in_the_hubs_cache_is_served_by_its_name_without_the_hub() {
    let home = tempfile::tempdir().unwrap();
    let (commit, model) =
        ("0123456789abcdef0123456789abcdef01234567", home.path().join("hub/models--some--one"));
    for directory in ["refs", "blobs", "snapshots/0123456789abcdef0123456789abcdef01234567"] {
        std::fs::create_dir_all(model.join(directory)).unwrap();
    }
    std::fs::write(model.join("refs/main"), commit).unwrap();
    // Its files are links to blobs, as the hub's clients make them.
    for (number, file) in std::fs::read_dir(shakespeare()).unwrap().flatten().enumerate() {
        std::fs::copy(file.path(), model.join(format!("blobs/{number}"))).unwrap();
        let link = model.join("snapshots").join(commit).join(file.file_name());
        std::os::unix::fs::symlink(format!("../../blobs/{number}"), link).unwrap();
    }
    let environment = [("HF_HOME", home.path().to_str().unwrap())];
    let server = ["serve", "some/one@main", "--port", "0", "--dtype", "f32"];
    let server = Process::start_with(&environment, &server, "ready ");
    let ask = |args: &[&str]| strata(&[args, &["--address", &server.address]].concat());
    let (code, out, said) = ask(&["generate", "ROMEO:\n", "--max-tokens", "2", "--model", "some/one"]);
    assert!(code == 0 && !out.is_empty(), "{said}");
    let status = ask(&["status"]).1;
    assert!(status.contains(&format!("commit    {commit}\n")), "{status}");
    let other =
        Command::new(env!("CARGO_BIN_EXE_strata")).args(["check", "some/one@v2"]).envs(environment).output();
    let said = String::from_utf8(other.unwrap().stderr).unwrap();
    assert!(said.contains("its revision v2 is not: there is main, 0123456789abcdef"), "{said}");
}

#[test]
fn a_prompt_may_begin_with_a_dash_but_a_misspelt_flag_is_none() {
    let demo = shakespeare();
    let run = |args: &[&str]| strata(&[&["run", &demo], args, &["--max-tokens", "2"]].concat());
    let (code, out, said) = run(&["-5 degrees"]);
    assert_eq!((code, said.as_str()), (0, ""));
    assert_eq!(out, run(&["--prompt", "-5 degrees"]).1);
    let (code, _, said) = run(&["--tmep", "0.7"]);
    assert!(code == 2 && said.contains("unexpected argument '--tmep'"), "{said}");
    let (code, _, said) = run(&["-please continue"]);
    assert!(code == 2 && said.contains("tip: to pass '-p' as a value, use '-- -p'"), "{said}");
}

#[test]
fn what_is_too_long_says_which_limit_it_meets() {
    let demo = shakespeare();
    let long = "ROMEO:\n".repeat(20);
    for (flags, says) in [
        (
            &["--context", "16"][..],
            "leave no room for an answer: --context allows 16 tokens, less than the model",
        ),
        (
            &["--kv-tokens", "16"],
            "leave no room for an answer: the cache holds 16 tokens, as --kv-tokens asked for",
        ),
        (&["--max-tokens", "999"], "the model takes 256 tokens at most; ask for at most "),
    ] {
        let (code, _, said) = strata(&[&["run", &demo, "--prompt", &long], flags].concat());
        assert!(code == 2 && said.contains(says), "{flags:?}: {code} {said}");
    }
}
