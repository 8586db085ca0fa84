//! `strata`: one binary for every role of a cluster and for its clients.

// Or a log in JSON would have lines that are none: `report` is for that.
#![deny(clippy::print_stderr)]

mod admin;
mod args;
mod bench;
mod call_error;
mod check;
mod client;
mod config_file;
mod encode;
mod etcd;
mod generate;
mod kernels;
mod loading;
mod local;
mod model_dir;
mod open_files;
mod operators;
mod origin;
mod parts;
mod plan;
mod prompt;
mod pull;
mod random_model;
mod report;
mod roles;
mod run;
mod secret;
mod show;
mod signals;
mod status;
mod terminal;
mod tokenize;
mod verify;

use std::io::Write;

use clap::{CommandFactory, FromArgMatches};

use args::{Cli, Command};

/// With the commit it was built from, where that is known.
const VERSION: &str = env!("STRATA_VERSION");

fn main() -> ! {
    report::look_ahead();
    let code = match command() {
        Ok(()) => 0,
        Err(Failure { error, .. }) if is_broken_pipe(&error) => 0,
        Err(Failure { error, note }) => report::failure(&error, note),
    };
    end(code)
}

/// Ends the process, without what libraries do then: CUDA's would take its state apart while stage threads still use
/// it, which ended one in a dozen servers with a segmentation fault (driver 580.159).
fn end(code: i32) -> ! {
    unsafe extern "C" {
        safe fn _exit(code: i32) -> !;
    }
    // Whoever read it may be gone.
    let _ = std::io::stdout().flush();
    _exit(code)
}

/// Why a command failed.
struct Failure {
    error: anyhow::Error,
    /// Where values come from that the error names.
    note: Option<String>,
}

fn command() -> Result<(), Failure> {
    let given: Vec<_> = std::env::args_os().collect();
    let command = config_file::with_defaults(given.iter().cloned());
    let command = command.unwrap_or_else(|e| end(report::misconfigured(&e)));
    if origin::asks_for_json(&command, &given) {
        report::errors_as_json();
    }
    let command = origin::without_foreign_variables(command);
    let given = origin::with_dashed_prompt(&command, given);
    let mut command = origin::given_first(command, &given);
    let matches = command.try_get_matches_from_mut(given).unwrap_or_else(|e| origin::exit(&e, &command));
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let failure = |error: anyhow::Error| {
        let note = origin::of_named(&report::in_one_line(&error), &matches, &command);
        Failure { error, note }
    };
    run(cli).map_err(failure)
}

fn run(cli: Cli) -> anyhow::Result<()> {
    // An answer on a terminal should have nothing in between.
    let quiet = if matches!(cli.command, Command::Run(_)) { "error" } else { "warn" };
    report::start(cli.log.as_deref().unwrap_or(quiet), cli.log_format, cli.command.is_json())?;
    // Compute has threads of its own; the network needs few.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => run::run(args).await,
            Command::Serve(args) => roles::serve(args).await,
            Command::Coordinator(args) => roles::coordinator(args).await,
            Command::Worker(args) => roles::worker(args).await,
            Command::Plan(args) => plan::plan(args).await,
            Command::Check(args) => check::check(args).await,
            Command::Pull(args) => pull::pull(&args),
            Command::Verify(args) => verify::verify(&args),
            Command::Generate(args) => generate::generate(args).await,
            Command::Classify(args) => encode::classify(args).await,
            Command::Rerank(args) => encode::rerank(args).await,
            Command::Tag(args) => parts::tag(args).await,
            Command::Answer(args) => parts::answer(args).await,
            Command::Embed(args) => encode::embed(args).await,
            Command::FillMask(args) => encode::fill_mask(args).await,
            Command::Tokenize(args) => tokenize::tokenize(args).await,
            Command::Detokenize(args) => tokenize::detokenize(args).await,
            Command::Status(args) => status::status(args).await,
            Command::Drain(args) => admin::drain(args).await,
            Command::Undrain(args) => admin::undrain(args).await,
            Command::Rebalance(args) => admin::rebalance(args).await,
            Command::Apply(args) => admin::apply(args).await,
            Command::Bench(args) => bench::bench(args).await,
            Command::RandomModel(args) => random_model::write(&args),
            Command::Kernels(args) => kernels::kernels(&args),
            Command::Completions(args) => completions(&args),
        }
    });
    // Stage threads and blocked connections end with the process.
    runtime.shutdown_background();
    outcome
}

/// `strata completions`
fn completions(args: &args::CompletionsArgs) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "strata", &mut text);
    Ok(std::io::stdout().write_all(&text)?)
}

/// Whoever read our standard output has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io =
        |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref::<std::io::Error>().map(|e| e.kind());
    error.chain().any(|cause| io(cause) == Some(std::io::ErrorKind::BrokenPipe))
}
