//! `strata run`: a model in one process, asked as a person or a script would.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use crate::{cluster::model, processes::free_dir};

/// Runs `strata run ARGS` with this standard input.
fn run_with(environment: &[(&str, &str)], input: &str, args: &[&str]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_strata"))
        .arg("run")
        .args(args)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // One that refuses reads nothing.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

/// What it answers; nothing else may be said.
fn answer(input: &str, args: &[&str]) -> String {
    let demo = model("shakespeare");
    let demo = [demo.to_str().unwrap(), "--dtype", "f32"];
    let output = run_with(&[], input, &[&demo[..], args].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{args:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn refusal(args: &[&str]) -> String {
    let output = run_with(&[], "", args);
    assert!(!output.status.success() && output.stdout.is_empty(), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn one_prompt_is_answered_and_nothing_else_is_said() {
    let continued = "O, then, I'll be so.\n";
    let few = ["--complete", "--max-tokens", "9"];
    let directory = free_dir();
    let file = directory.path().join("prompt");
    std::fs::write(&file, "ROMEO:\n").unwrap();
    let at_file = format!("@{}", file.display());
    for (input, prompt) in [
        ("", &["--prompt", "ROMEO:\n", "--workers", "3"][..]),
        ("", &["ROMEO:\n"]),
        ("ROMEO:\n", &["-"]),
        ("", &["--prompt", &at_file]),
    ] {
        let text = answer(input, &[&few, prompt].concat());
        assert!(text.trim_end() == continued.trim_end(), "{prompt:?}: {text:?}");
    }
    // The model's template makes a chat of it; a seed makes draws repeatable.
    let drawn = ["--temperature", "1", "--seed", "7", "--max-tokens", "12"];
    let chat = answer("", &[&drawn[..], &["Who is there?"]].concat());
    assert_eq!(chat, answer("", &[&drawn[..], &["--prompt", "Who is there?"]].concat()));
    let by_hand = "<|bos|>USER:\nWho is there?\n\nASSISTANT:\n".trim_start_matches("<|bos|>");
    assert_eq!(chat, answer("", &[&drawn[..], &["--complete", by_hand]].concat()));
}

#[test]
fn without_a_prompt_lines_are_a_chat_that_remembers() {
    let few = ["--max-tokens", "8", "--temperature", "1", "--seed", "7"];
    let two = answer("Who is there?\n\nSpeak!\n/exit\nnever asked\n", &few);
    let first = answer("Who is there?", &few);
    assert!(first.len() > 8, "{first:?}");
    let rest = two.strip_prefix(&first).unwrap_or_else(|| panic!("{two:?} does not begin with {first:?}"));
    let remembered = [&few[..], &["--message", "user=Who is there?", "--message"]].concat();
    let said = format!("assistant={}", first.strip_suffix('\n').unwrap());
    assert_eq!(rest, answer("Speak!\n", &[&remembered[..], &[&said]].concat()));
    let cleared = answer("Who is there?\n/clear\nWho is there?\n", &few);
    assert_eq!(cleared, first.repeat(2));
    // What was said first is left out, with a word, when all of it is more than the context.
    let demo = model("shakespeare");
    let full = [demo.to_str().unwrap(), "--max-tokens", "200", "--ignore-eos"];
    let long = run_with(&[], &"Who is there?\n".repeat(3), &full);
    let once = run_with(&[], "Who is there?", &full);
    assert!(long.status.success() && long.stdout == once.stdout.repeat(3), "{long:?}");
    let said = String::from_utf8(long.stderr).unwrap();
    assert_eq!(said, "1 earlier exchange was left out: the context is full\n".repeat(2));
    // A completion is not remembered.
    let complete = [&few[..], &["--complete"]].concat();
    assert_eq!(answer("ROMEO:\nROMEO:\n", &complete), answer("ROMEO:", &complete).repeat(2));
    assert_eq!(answer("", &few), "");
}

#[test]
fn what_cannot_be_run_is_refused_in_one_line() {
    let demo = model("shakespeare");
    let demo = demo.to_str().unwrap();
    let old = model("gpt2-old-bf16");
    let encoder = model("bert-embed-f32");
    for (args, says) in [
        (&["/nowhere", "x"][..], "error: model /nowhere: No such file"),
        (
            &[encoder.to_str().unwrap(), "x"],
            "does not generate text: serve it with `strata serve`, and ask it with `strata embed`",
        ),
        (&[demo, "@/nowhere"], "prompt @/nowhere"),
        (&[demo, "x", "--prompt", "y"], "there are two prompts"),
        (&[demo, "x", "--temperature", "-1"], "sampling.temperature: -1 is out of bounds"),
        (&[old.to_str().unwrap(), "x", "--message", "system=y"], "no chat template"),
    ] {
        let said = refusal(args);
        assert!(said.starts_with("error: ") && said.lines().count() == 1, "{args:?}: {said}");
        assert!(said.contains(says), "{args:?}: {said}");
    }
    // From the environment, a prompt comes once.
    let output = run_with(&[("STRATA_PROMPT", "ROMEO:\n")], "", &[demo, "--complete", "--max-tokens", "2"]);
    assert!(output.status.success(), "{output:?}");
    // Logs are there for whoever asks.
    let output = run_with(&[], "", &[demo, "x", "--max-tokens", "2", "--log", "info"]);
    assert!(output.status.success() && !output.stderr.is_empty(), "{output:?}");
}

#[test]
fn errors_say_where_a_value_comes_from_and_kubernetes_is_ignored_with_a_word() {
    let demo = model("shakespeare");
    let demo = demo.to_str().unwrap();
    let strata = |environment: &[(&str, &str)], args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
        let output = command.args(args).envs(environment.iter().copied()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = strata(&[("STRATA_WORKERS", "many")], &["plan", demo]);
    assert_eq!(code, Some(2));
    assert!(said.contains("note: the value comes from the environment variable STRATA_WORKERS"), "{said}");
    let (_, said) = strata(&[("STRATA_WORKERS", "many")], &["plan", demo, "--workers", "few"]);
    assert!(said.contains("few") && !said.contains("note:"), "{said}");
    let directory = free_dir();
    let file = directory.path().join("strata.toml");
    std::fs::write(&file, "[plan]\nworkers = 'some'\n").unwrap();
    let (_, said) = strata(&[], &["--config", file.to_str().unwrap(), "plan", demo]);
    assert!(said.contains("note: the value comes from the file of --config"), "{said}");

    let service = ("STRATA_PORT", "tcp://10.0.0.1:7717");
    let (code, said) = strata(&[service], &["serve", demo, "--dry-run"]);
    assert_eq!(code, Some(0), "{said}");
    let word = "STRATA_PORT=tcp://10.0.0.1:7717 is ignored: Kubernetes sets it";
    assert_eq!(said.matches(word).count(), 1, "{said}");
    assert!(strata(&[service], &["plan", demo]).1.is_empty(), "said where no port is wanted");

    // What is no model is told once, by whoever reads it first.
    let (code, said) = strata(&[], &["check", "someone/some-model"]);
    assert_eq!(code, Some(1));
    assert!(said.lines().count() == 1 && said.contains("strata pull someone/some-model"), "{said}");
}
