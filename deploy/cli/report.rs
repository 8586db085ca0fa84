//! Standard error: sentences for people; with `--log-format json` one JSON object per line, and nothing else.

#![allow(clippy::print_stderr, reason = "the one place for it")]

use std::{
    error::Error,
    fmt,
    io::IsTerminal,
    sync::atomic::{AtomicBool, Ordering},
};

use clap::ValueEnum;
use serde_json::{Map, Value, json};
use strata_coordinator::{SessionError, StartError};
use strata_proto::error::{Classify, Kind};
use tonic::Code;
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        format::Writer,
        time::{FormatTime, SystemTime},
    },
};

use crate::call_error::CallError;

/// Exit code of a command that failed by itself.
const FAILED: i32 = 1;
/// Of a command line, or a configuration file, that cannot be understood; clap's.
const USAGE: i32 = 2;
/// Of a call that a server refused, and would refuse again.
const REFUSED: i32 = 3;
/// Of a server that could not be reached, has too much to do, or took too long: it may answer later.
const UNAVAILABLE: i32 = 4;

/// For the end of the help, where they are promised.
pub const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 a wrong command line, 3 refused by the server, 4 no answer from a \
                              server: try again.\nWith --json, an error is one JSON object on standard error: error, code, exit_code.";

/// What standard error is made of.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Lines are JSON.
static JSON_LINES: AtomicBool = AtomicBool::new(false);
/// The error that ends a command is an object of its own: it was asked for JSON.
static JSON_ERROR: AtomicBool = AtomicBool::new(false);

/// Looks for how to report before flags are read, since reading them may fail.
pub fn look_ahead() {
    let given: Vec<_> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let named = given.iter().position(|word| word == "--log-format").and_then(|at| given.get(at + 1));
    let joined = given.iter().find_map(|word| word.strip_prefix("--log-format="));
    let variable = std::env::var("STRATA_LOG_FORMAT").ok();
    let format = joined.or(named.map(String::as_str)).or(variable.as_deref());
    let format = format.and_then(|format| LogFormat::from_str(format, false).ok());
    JSON_LINES.store(matches!(format, Some(LogFormat::Json)), Ordering::Relaxed);
    let json = given.iter().any(|word| word == "--json")
        || std::env::var_os("STRATA_JSON").is_some_and(|value| value == "true");
    JSON_ERROR.store(json, Ordering::Relaxed);
}

/// The command was asked for JSON by the environment or the file.
pub fn errors_as_json() {
    JSON_ERROR.store(true, Ordering::Relaxed);
}

/// Something is wrong with what was asked for on the command line, in the environment or in the file.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Usage {}

/// An error of whoever wrote the command line, which flags alone cannot tell. It names them, so that it can be said
/// where a value comes from.
pub fn misused(text: impl Into<String>) -> anyhow::Error {
    Usage(text.into()).into()
}

/// Starts the log. `json` is whether the command was asked for JSON.
///
/// # Errors
/// If the filter cannot be understood.
pub fn start(filter: &str, format: LogFormat, json: bool) -> anyhow::Result<()> {
    JSON_LINES.store(matches!(format, LogFormat::Json), Ordering::Relaxed);
    JSON_ERROR.store(json, Ordering::Relaxed);
    let levels = EnvFilter::try_new(filter).map_err(|why| {
        misused(format!("--log {filter:?}: expected a level such as info, or target=level: {why}"))
    })?;
    // It would write the head of every request, with whatever token is in it.
    let levels = match "ureq_proto::util=off".parse() {
        Ok(silence) => levels.add_directive(silence),
        Err(_) => levels,
    };
    let builder = tracing_subscriber::fmt().with_env_filter(levels).with_writer(std::io::stderr);
    match format {
        // By itself it would leave colours out only where NO_COLOR says so.
        LogFormat::Text => builder.with_ansi(is_coloured()).init(),
        LogFormat::Json => {
            builder.json().init();
            std::panic::set_hook(Box::new(|panic| {
                eprintln!("{}", line("ERROR", &panic.to_string(), Map::new()))
            }));
        }
    }
    Ok(())
}

fn is_coloured() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Whether bars may be drawn.
pub fn draws() -> bool {
    std::io::stderr().is_terminal() && !JSON_LINES.load(Ordering::Relaxed)
}

/// Tells whoever started the process, whatever the log's level is.
pub fn tell(text: &str) {
    tell_with(text, |_| {});
}

/// The same, with what a program would read in fields: they are in JSON alone.
pub fn tell_with(text: &str, fields: impl FnOnce(&mut Map<String, Value>)) {
    say("INFO", text, text, fields);
}

/// A table, or a word of what it is and its content in fields.
pub fn tell_table(word: &str, table: &str, fields: impl FnOnce(&mut Map<String, Value>)) {
    say("INFO", word, table, fields);
}

/// Tells that something is not as asked for.
pub fn warn(text: &str) {
    say("WARN", text, &format!("warning: {text}"), |_| {});
}

fn say(level: &str, message: &str, text: &str, fields: impl FnOnce(&mut Map<String, Value>)) {
    if JSON_LINES.load(Ordering::Relaxed) {
        let mut more = Map::new();
        fields(&mut more);
        eprintln!("{}", line(level, message, more));
    } else {
        eprintln!("{text}");
    }
}

/// A line as the log's are.
fn line(level: &str, message: &str, more: Map<String, Value>) -> String {
    let mut timestamp = String::new();
    // Writing to a string does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut timestamp));
    let mut fields = Map::from_iter([("message".to_owned(), message.into())]);
    fields.extend(more);
    json!({"timestamp": timestamp, "level": level, "fields": fields, "target": "strata"}).to_string()
}

/// Says why a command failed, and where values come from that it names; its exit code.
pub fn failure(error: &anyhow::Error, note: Option<String>) -> i32 {
    let (exit_code, code) = match error.chain().find_map(|cause| cause.downcast_ref::<CallError>()) {
        Some(call) => (exit_code(call.code), call.name()),
        None if is_misused(error) => (USAGE, "USAGE".to_owned()),
        None => (FAILED, "FAILED".to_owned()),
    };
    let note = note.map_or(String::new(), |note| format!("\nnote: {note}"));
    last_words(&(in_one_line(error) + &note), &code, exit_code);
    exit_code
}

/// Whether what was asked for is wrong: flags, a split that the model cannot have, a prompt that is too long.
fn is_misused(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let planned = match cause.downcast_ref() {
            Some(StartError::Pipeline(error)) => error.kind() == Kind::BadInput,
            Some(StartError::Twice { .. }) => true,
            _ => false,
        };
        let asked = cause.downcast_ref::<SessionError>().is_some_and(|error| error.kind() == Kind::BadInput);
        cause.is::<Usage>() || planned || asked
    })
}

/// Says what is wrong with the command line; its exit code, which is 0 where help was asked for.
pub fn usage(error: &clap::Error, note: Option<String>) -> i32 {
    let json = JSON_LINES.load(Ordering::Relaxed) || JSON_ERROR.load(Ordering::Relaxed);
    if error.exit_code() == 0 || !json {
        // A terminal that is gone hears nothing.
        let _ = error.print();
        if let Some(note) = note {
            eprintln!("note: {note}");
        }
    } else {
        let text = error.render().to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
        let note = note.map_or(String::new(), |note| format!("\nnote: {note}"));
        last_words(&format!("{text}{note}"), "USAGE", USAGE);
    }
    error.exit_code()
}

/// Says what is wrong with the configuration file; its exit code.
pub fn misconfigured(error: &anyhow::Error) -> i32 {
    last_words(&in_one_line(error), "USAGE", USAGE);
    USAGE
}

fn last_words(text: &str, code: &str, exit_code: i32) {
    if JSON_ERROR.load(Ordering::Relaxed) {
        eprintln!("{}", json!({"error": text, "code": code, "exit_code": exit_code}));
    } else {
        let fields = |fields: &mut Map<String, Value>| {
            fields.insert("code".into(), code.into());
            fields.insert("exit_code".into(), exit_code.into());
        };
        say("ERROR", text, &format!("error: {text}"), fields);
    }
}

fn exit_code(code: Code) -> i32 {
    match code {
        Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Aborted => UNAVAILABLE,
        _ => REFUSED,
    }
}

/// The whole chain of causes, those once that an error says itself, too.
pub fn in_one_line(error: &anyhow::Error) -> String {
    error.chain().map(|cause| cause.to_string()).fold(String::new(), |line, cause| match line.as_str() {
        "" => cause,
        said if said.ends_with(&cause) => line,
        said => format!("{said}: {cause}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_several_lines_is_one_line_of_json() {
        let shown = line("ERROR", "panicked at stage.rs:7:\n\"no\" rows", Map::new());
        let read: Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(shown.lines().count(), 1);
        assert_eq!(read["fields"]["message"], "panicked at stage.rs:7:\n\"no\" rows");
        assert!(
            read["level"] == "ERROR" && read["timestamp"].as_str().is_some_and(|t| t.ends_with('Z')),
            "{shown}"
        );
    }

    #[test]
    fn a_code_says_whether_to_try_again() {
        for code in [Code::Unavailable, Code::ResourceExhausted, Code::DeadlineExceeded] {
            assert_eq!(exit_code(code), UNAVAILABLE);
        }
        for code in [Code::InvalidArgument, Code::NotFound, Code::Unimplemented, Code::Internal] {
            assert_eq!(exit_code(code), REFUSED);
        }
    }
}
