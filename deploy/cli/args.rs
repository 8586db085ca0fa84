//! Flags, read raw. Every one has an environment variable and a place in the configuration file.

mod clients;
mod deployment;
mod devices;
mod servers;
mod tools;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

pub use clients::*;
pub use deployment::*;
pub use devices::*;
pub use servers::*;
pub use tools::*;

/// Serves one transformer model across many devices.
#[derive(Debug, Parser)]
#[command(name = "strata", version = crate::VERSION)]
pub struct Cli {
    /// What to log on standard error: error, warn, info, debug, or target=level pairs [default: warn; for run, error]
    #[arg(long, global = true, env = "STRATA_LOG")]
    pub log: Option<String>,
    /// How to log
    #[arg(long, global = true, env = "STRATA_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// TOML file with one table per command, e.g. `[serve]`, whose keys are long flag names
    #[arg(long, global = true, env = "STRATA_CONFIG")]
    pub config: Option<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Ask a model in this process: one answer, or a chat in the terminal
    Run(RunArgs),
    /// Serve a model: a coordinator and its workers in one process
    Serve(ServeArgs),
    /// Run a coordinator over workers that are processes of their own
    Coordinator(CoordinatorArgs),
    /// Run a worker that a coordinator drives
    Worker(WorkerArgs),
    /// Show how a model would be split, without loading it
    Plan(PlanArgs),
    /// Load a model, check that it and its tokenizer belong together, and report
    Check(CheckArgs),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Score texts by a classifier's classes
    Classify(ClassifyArgs),
    /// Turn texts into vectors
    Embed(EmbedArgs),
    /// Guess the tokens behind the masks of texts
    FillMask(FillMaskArgs),
    /// Turn a text into token ids, as the served model reads it
    Tokenize(TokenizeArgs),
    /// Turn token ids into text
    Detokenize(DetokenizeArgs),
    /// Show what a server is doing
    Status(StatusArgs),
    /// Measure throughput and latency of a running server
    Bench(BenchArgs),
    /// Write a model of a named shape with random weights, to measure with
    RandomModel(RandomModelArgs),
    /// Measure every kernel of a device by itself, at the shapes of a model
    Kernels(KernelsArgs),
    /// Print what makes a shell complete commands and flags
    Completions(CompletionsArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_command_line_is_sound_and_every_flag_has_a_variable() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        let subcommands = command.get_subcommands().filter(|c| c.get_name() != "help");
        for argument in subcommands.flat_map(clap::Command::get_arguments) {
            let standard = ["help", "version"].contains(&argument.get_id().as_str());
            assert!(
                standard || argument.get_env().is_some(),
                "{} has no environment variable",
                argument.get_id()
            );
        }
    }
}
