//! Where a value comes from that was not given on the command line, for those who wonder.

use std::ffi::OsString;

use clap::{
    Arg, ArgAction, ArgMatches, Command, CommandFactory, Error,
    builder::Resettable,
    error::{ContextKind, ContextValue},
    parser::ValueSource,
};

use crate::{args::Cli, report};

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

/// Arguments of which one is given, by command: on the command line it says all, whatever the environment or the file say of the
/// others.
const ALTERNATIVES: [(&str, &[&str]); 5] = [
    ("run", &["text", "prompt"]),
    ("generate", &["text", "prompt", "token_ids", "message"]),
    ("classify", &["text", "token_ids"]),
    ("embed", &["text", "token_ids"]),
    ("fill-mask", &["text", "token_ids"]),
];

/// The command line where one of several alternatives that is given leaves the others without their variables and defaults.
pub fn given_first(mut command: Command, args: &[OsString]) -> Command {
    for (name, alternatives) in
        ALTERNATIVES.into_iter().filter(|(name, _)| args.iter().any(|word| word == name))
    {
        let mut bare = command.clone().ignore_errors(true).mut_subcommand(name, |sub| sub.mut_args(unset));
        // What cannot be understood is said later.
        let Ok(found) = bare.try_get_matches_from_mut(args) else { return command };
        let Some(found) = found.subcommand_matches(name) else { continue };
        let (given, others): (Vec<&str>, Vec<&str>) = alternatives
            .iter()
            .copied()
            .partition(|id| found.value_source(id) == Some(ValueSource::CommandLine));
        if !given.is_empty() {
            command = command
                .mut_subcommand(name, |sub| others.into_iter().fold(sub, |sub, id| sub.mut_arg(id, unset)));
        }
    }
    command
}

/// The command line with a prompt such as "-5 degrees" moved to its end, behind `--`, if it cannot be understood as it
/// is. No flag begins with a dash and neither a letter nor a dash, so a misspelt one never becomes a prompt.
pub fn with_dashed_prompt(command: &Command, given: Vec<OsString>) -> Vec<OsString> {
    let is_text = |word: &OsString| {
        let word = word.to_string_lossy();
        let second = word.strip_prefix('-').and_then(|rest| rest.chars().next());
        second.is_some_and(|c| c != '-' && !c.is_alphabetic())
    };
    let understands = |words: &[OsString]| {
        let outcome = command.clone().try_get_matches_from(words);
        outcome.is_ok_and(|matches| matches.subcommand().is_some())
    };
    let Some(at) = given.iter().position(is_text) else { return given };
    if understands(&given) || given.iter().any(|word| word == "--") {
        return given;
    }
    let mut moved = given.clone();
    let text = moved.remove(at);
    moved.extend(["--".into(), text]);
    if understands(&moved) { moved } else { given }
}

/// An argument without values that are not on the command line.
fn unset(arg: Arg) -> Arg {
    arg.required(false).env(Resettable::Reset).default_value(Resettable::Reset)
}

/// Whether the environment or the file asks the command for JSON.
pub fn asks_for_json(command: &Command, args: &[OsString]) -> bool {
    let sub = command.get_subcommands().find(|sub| args.iter().any(|word| word == sub.get_name()));
    let flag = sub.and_then(|sub| sub.get_arguments().find(|arg| arg.get_long() == Some("json")));
    flag.is_some_and(|flag| match flag.get_env().and_then(std::env::var_os) {
        Some(value) => parse_switch(&value.to_string_lossy()) == Ok(true),
        None => flag.get_default_values().iter().any(|value| value == "true"),
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

/// Where the values of flags come from that `text` names, those on the command line aside.
pub fn of_named(text: &str, matches: &ArgMatches, command: &Command) -> Option<String> {
    let (name, given) = matches.subcommand()?;
    let mut plain = Cli::command();
    // As the one that was parsed with is.
    plain.build();
    let plain = plain.find_subcommand(name)?;
    let words: Vec<_> = text.split(|c: char| !c.is_alphanumeric() && !"-_".contains(c)).collect();
    // A field of a request, or the name of a value, with which an error begins: `sampling.top_p: …`, `split "2,2": …`.
    let subject = text.split([':', ' ']).next().and_then(|field| field.rsplit('.').next());
    let subject = subject.unwrap_or_default().replace('_', "-");
    let origin = |arg: &Arg| {
        let long = arg.get_long()?;
        let flag = format!("--{long}");
        if !words.contains(&flag.as_str()) && subject != long {
            return None;
        }
        let is_of_file = || {
            let own = plain.get_arguments().find(|own| own.get_id() == arg.get_id());
            own.is_some_and(|own| own.get_default_values() != arg.get_default_values())
        };
        match given.value_source(arg.get_id().as_str())? {
            ValueSource::EnvVariable => {
                Some(format!("{flag} comes from the environment variable {}", arg.get_env()?.display()))
            }
            ValueSource::DefaultValue if is_of_file() => {
                Some(format!("{flag} comes from the file of --config"))
            }
            _ => None,
        }
    };
    let origins: Vec<_> = command.find_subcommand(name)?.get_arguments().filter_map(origin).collect();
    (!origins.is_empty()).then(|| origins.join(", "))
}

/// Variables that stand for a switch say what people and other programs write: 1, true, yes, on, or their contrary, and
/// nothing at all is no.
pub fn with_switches(command: Command) -> Command {
    let switch = |arg: Arg| match arg.get_action() {
        ArgAction::SetTrue => arg.value_parser(parse_switch),
        _ => arg,
    };
    command.mut_args(switch).mut_subcommands(|sub| sub.mut_args(switch))
}

fn parse_switch(given: &str) -> Result<bool, String> {
    match given.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "" | "0" | "false" | "no" | "off" => Ok(false),
        _ => Err("expected true or false".into()),
    }
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

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;
    use crate::args::Command as Role;

    #[test]
    fn a_prompt_on_the_command_line_comes_before_those_of_the_file() {
        let file = |arg: Arg| arg.default_value("of the file");
        let prompts = |words: &[&str]| {
            let words: Vec<OsString> =
                [&["strata", "generate"], words].concat().iter().map(Into::into).collect();
            let command = Cli::command().mut_subcommand("generate", |sub| sub.mut_arg("prompt", file));
            let matches = given_first(command, &words).try_get_matches_from(words).unwrap();
            let Role::Generate(args) = Cli::from_arg_matches(&matches).unwrap().command else {
                panic!("another command")
            };
            (args.text, args.prompt, args.token_ids)
        };
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(prompts(&["def"]), (text("def"), None, vec![]));
        assert_eq!(prompts(&["--prompt", "def"]), (None, text("def"), vec![]));
        assert_eq!(prompts(&["--token-ids", "1,2"]), (None, None, vec![1, 2]));
        assert_eq!(prompts(&["a", "--prompt", "b"]), (text("a"), text("b"), vec![]));
    }

    #[test]
    fn a_prompt_that_no_flag_can_be_may_begin_with_a_dash() {
        let moved = |words: &[&str]| {
            let given: Vec<OsString> = words.iter().map(Into::into).collect();
            let moved = with_dashed_prompt(&Cli::command(), given.clone());
            let text: Vec<_> = moved.iter().map(|word| word.to_str().unwrap().to_owned()).collect();
            (moved != given).then(|| text.join(" "))
        };
        let said = moved(&["strata", "run", "m", "-5 degrees", "--max-tokens", "3"]);
        assert_eq!(said.as_deref(), Some("strata run m --max-tokens 3 -- -5 degrees"));
        assert_eq!(moved(&["strata", "generate", "- a"]).as_deref(), Some("strata generate -- - a"));
        for as_it_is in [
            // What could be a flag that is misspelt, or is the value of one.
            &["strata", "run", "m", "--tmep", "3"][..],
            &["strata", "run", "m", "-x y"],
            &["strata", "run", "m", "x", "--temperature", "-1"],
            &["strata", "run", "m", "x", "--seed", "-1"],
            &["strata", "run", "m", "--stop", "- a"],
            &["strata", "run", "m", "--", "-5 degrees"],
            &["strata", "generate", "-"],
        ] {
            assert_eq!(moved(as_it_is), None, "{as_it_is:?}");
        }
    }
}
