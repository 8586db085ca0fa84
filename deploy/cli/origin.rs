//! Where a value comes from that was not given on the command line, for those who wonder.

use clap::{
    Arg, Command, Error,
    builder::Resettable,
    error::{ContextKind, ContextValue},
};

use crate::report;

/// Kubernetes describes a Service named `strata` to every container by variables, of which one is ours by name:
/// `STRATA_PORT=tcp://10.0.0.1:7717`. It is ignored with a word.
pub fn without_foreign_variables(command: Command) -> Command {
    let foreign = |arg: &Arg| {
        let value = arg.get_env().and_then(std::env::var_os);
        value.and_then(|value| value.into_string().ok()).filter(|value| is_of_kubernetes(arg, value))
    };
    let given: Vec<_> = std::env::args_os().collect();
    let mut told = false;
    command.mut_subcommands(|sub| {
        // Others do not read it.
        if !given.iter().any(|word| word == sub.get_name()) {
            return sub;
        }
        sub.mut_args(|arg| {
            let Some(value) = foreign(&arg) else { return arg };
            if !std::mem::replace(&mut told, true) {
                let name = arg.get_env().unwrap_or_default().display();
                report::tell(&format!(
                    "{name}={value} is ignored: Kubernetes sets it for a Service of that name"
                ));
            }
            arg.env(Resettable::Reset)
        })
    })
}

fn is_of_kubernetes(arg: &Arg, value: &str) -> bool {
    arg.get_long() == Some("port")
        && ["tcp://", "udp://", "sctp://"].iter().any(|kind| value.starts_with(kind))
}

/// Prints what is wrong with the command line, and where the value comes from if it is not on it; ends the process.
pub fn exit(error: &Error, command: &Command) -> ! {
    let note = origin(error, command).map(|origin| format!("the value comes from {origin}"));
    crate::end(report::usage(error, note))
}

fn origin(error: &Error, command: &Command) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let (shown, value) = (text(ContextKind::InvalidArg)?, text(ContextKind::InvalidValue)?);
    let given: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let sub = command.get_subcommands().find(|sub| given.iter().any(|arg| arg == sub.get_name()))?;
    let arg = sub.get_arguments().chain(command.get_arguments()).find(|arg| arg.to_string() == shown)?;
    // `--port 1`, `--port=1`, or a value in its place.
    let flag = arg.get_long().map(|long| format!("--{long}"));
    let is_given = given.iter().any(|word| match &flag {
        Some(flag) => word == flag || word.strip_prefix(flag).is_some_and(|rest| rest.starts_with('=')),
        None => word == value,
    });
    if is_given {
        return None;
    }
    let variable = arg.get_env()?.to_string_lossy().into_owned();
    match std::env::var(&variable) {
        Ok(set) if set.contains(value) => Some(format!("the environment variable {variable}")),
        _ => arg.get_default_values().iter().any(|v| v == value).then(|| "the file of --config".to_owned()),
    }
}
