//! The configuration file: its values become defaults, so that flags and environment come first.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context, bail};
use clap::{Arg, Command, CommandFactory, Id, builder::Resettable};
use toml::{Table, Value};

use crate::{args::Cli, origin::with_switches};

/// The command line with the file's values as defaults, if `--config` or `STRATA_CONFIG` names one.
pub fn with_defaults(args: impl Iterator<Item = OsString>) -> anyhow::Result<Command> {
    let command = with_switches(Cli::command());
    match file(args) {
        None => Ok(command),
        Some(path) => {
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("--config {}", path.display()))?;
            apply(command, &text).with_context(|| format!("--config {}", path.display()))
        }
    }
}

/// The file has to be known before flags are parsed, since it changes what is required.
fn file(mut args: impl Iterator<Item = OsString>) -> Option<PathBuf> {
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy();
        if text == "--config" {
            return args.next().map(Into::into);
        }
        if let Some(path) = text.strip_prefix("--config=") {
            return Some(path.into());
        }
    }
    std::env::var_os("STRATA_CONFIG").map(Into::into)
}

fn apply(mut command: Command, text: &str) -> anyhow::Result<Command> {
    let file: Table = text.parse()?;
    for (name, value) in file {
        match value {
            Value::Table(table) => {
                let Some(sub) = command.find_subcommand(&name) else {
                    let known: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
                    bail!("[{name}] is no command: expected one of {}", known.join(", "));
                };
                let defaults = table.iter().map(|(key, value)| default(sub, key, value));
                let defaults =
                    defaults.collect::<Result<Vec<_>, _>>().with_context(|| format!("[{name}]"))?;
                command = command.mut_subcommand(&name, |sub| {
                    // Clap looks on the command line alone for what a flag needs beside it.
                    let sub = sub.mut_args(|arg| arg.requires(Resettable::Reset));
                    defaults.into_iter().fold(sub, set)
                });
            }
            value => {
                let default = default(&command, &name, &value)?;
                command = set(command, default);
            }
        }
    }
    Ok(command)
}

/// The argument whose long flag (or, for the positional one, whose name) is `key`, and its values from the file.
fn default(command: &Command, key: &str, value: &Value) -> anyhow::Result<(Id, Vec<String>)> {
    if key == "config" {
        bail!("config: a file names no other: give it by --config or STRATA_CONFIG");
    }
    let named = |a: &&Arg| a.get_long() == Some(key) || (a.get_long().is_none() && a.get_id() == key);
    let Some(arg) = command.get_arguments().find(named) else {
        bail!("unknown key {key:?}: expected a long flag without its dashes");
    };
    let plain = |value: &Value| match value {
        Value::String(s) => Ok(s.clone()),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => Ok(value.to_string()),
        _ => bail!("{key}: expected a string, a number, a boolean or a list of them"),
    };
    let values = match value {
        Value::Array(values) => values.iter().map(plain).collect::<Result<_, _>>()?,
        value => vec![plain(value)?],
    };
    Ok((arg.get_id().clone(), values))
}

fn set(command: Command, (id, values): (Id, Vec<String>)) -> Command {
    command.mut_arg(id, |arg| arg.required(false).default_values(values))
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;
    use proptest::{prelude::*, sample::Index};

    use super::*;
    use crate::args::Command as Role;

    fn parse(file: &str, args: &[&str]) -> Cli {
        let matches = apply(Cli::command(), file).unwrap().try_get_matches_from(args).unwrap();
        Cli::from_arg_matches(&matches).unwrap()
    }

    #[test]
    fn flags_come_before_the_file() {
        let file = "log = 'info'\n[serve]\nmodel = '/m'\nport = 4\nlinks = 'tcp'\ndevices = ['cpu:0=1MiB', 'cpu:1=2MiB']";
        let cli = parse(file, &["strata", "serve", "--port", "5"]);
        assert_eq!(cli.log.as_deref(), Some("info"));
        let Role::Serve(serve) = cli.command else { panic!("another command") };
        assert_eq!((serve.listen.port, serve.here.model.to_str()), (5, Some("/m")));
        assert_eq!(serve.here.devices[1].cap, Some(2 << 20));
    }

    #[test]
    fn says_what_it_does_not_know() {
        let error = |file: &str| format!("{:#}", apply(Cli::command(), file).unwrap_err());
        assert!(error("[serv]\nport = 1").contains("[serv] is no command: expected one of run, serve"));
        assert!(error("[serve]\nprot = 1").contains("unknown key \"prot\""));
        assert!(error("config = 'other.toml'").contains("config: a file names no other"));
        assert!(error("[serve]\nport = {a = 1}").contains("port: expected a string"));
    }

    proptest! {
        /// Whatever the file says, it is understood or refused by an error.
        #[test]
        fn any_text_is_read_or_refused(text in "(?s).{0,200}") {
            let _ = apply(Cli::command(), &text);
        }

        /// Values of any kind at any known place: what the file gives is refused here, refused by clap, or read.
        #[test]
        fn any_value_of_any_flag_is_read_or_refused(place in any::<Index>(), value in value()) {
            let cli = Cli::command();
            let places = cli.get_subcommands().flat_map(|sub| {
                let keys = sub.get_arguments().filter(|arg| !arg.is_global_set());
                keys.map(|arg| (sub.get_name(), arg.get_long().unwrap_or(arg.get_id().as_str())))
            });
            let places: Vec<_> = places.collect();
            let (sub, key) = places[place.index(places.len())];
            let file = Table::from_iter([(sub.to_owned(), Table::from_iter([(key.to_owned(), value)]).into())]);
            if let Ok(command) = apply(cli.clone(), &file.to_string()) {
                let matches = command.try_get_matches_from(["strata", sub]);
                let _ = matches.map(|matches| Cli::from_arg_matches(&matches));
            }
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<String>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
                prop::collection::btree_map("[a-z-]{0,6}", inner, 0..3)
                    .prop_map(|map| Value::Table(map.into_iter().collect())),
            ]
        })
    }

    #[test]
    fn what_is_required_may_come_from_the_file() {
        for (file, args) in [
            ("[generate]\nprompt = 'x'", &["strata", "generate"][..]),
            ("[generate]\ntext = 'x'", &["strata", "generate"]),
            ("[tokenize]\ntext = 'x'", &["strata", "tokenize"]),
            ("[detokenize]\ntoken_ids = [1, 2]", &["strata", "detokenize"]),
            ("[embed]\ntext = ['a']\npair = ['b']", &["strata", "embed"]),
            ("[embed]\ntext = ['a']", &["strata", "embed", "--pair", "b"]),
            ("[coordinator]\nworker = ['a:1']\nmodel = 'm'", &["strata", "coordinator"]),
            (
                "[coordinator]\netcd = ['http://a:1']\nmodel = 'm'",
                &["strata", "coordinator", "--cluster", "c"],
            ),
            ("[worker]\nmodels = '/m'", &["strata", "worker"]),
            (
                "[worker]\nlink-listen = '0.0.0.0:1'",
                &["strata", "worker", "--models=/m", "--link-advertise=a:1"],
            ),
            ("[run]\nmodel = '/m'\nprompt = 'x'", &["strata", "run"]),
        ] {
            parse(file, args);
        }
    }

    #[test]
    fn finds_the_file_in_either_spelling() {
        let find = |args: &[&str]| file(args.iter().map(OsString::from));
        assert_eq!(find(&["strata", "--config", "a.toml", "serve"]), Some("a.toml".into()));
        assert_eq!(find(&["strata", "serve", "--config=b.toml"]), Some("b.toml".into()));
    }
}
