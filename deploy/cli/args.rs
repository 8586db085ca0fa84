//! Flags, read raw. Every one has an environment variable and a place in the configuration file.

mod admin;
mod clients;
mod deployment;
mod devices;
mod etcd;
mod examples;
mod servers;
mod tools;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

pub use admin::*;
pub use clients::*;
pub use deployment::*;
pub use devices::*;
pub use etcd::*;
pub use servers::*;
pub use tools::*;

use crate::report::LogFormat;

/// Serves one transformer model across many devices.
#[derive(Debug, Parser)]
#[command(name = "strata", version = crate::VERSION, after_help = crate::report::EXIT_CODES)]
pub struct Cli {
    /// What to log on standard error: error, warn, info, debug, or target=level pairs [default: warn; for run, error]
    #[arg(long, global = true, env = "STRATA_LOG", help_heading = "Log and configuration")]
    pub log: Option<String>,
    /// What standard error is made of: sentences, or one JSON object per line
    #[arg(long, global = true, env = "STRATA_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text, help_heading = "Log and configuration")]
    pub log_format: LogFormat,
    /// TOML file with one table per command, e.g. `[serve]`, whose keys are long flag names
    #[arg(long, global = true, env = "STRATA_CONFIG", help_heading = "Log and configuration")]
    pub config: Option<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Ask a model in this process: one answer, or a chat in the terminal
    #[command(after_help = examples::RUN)]
    Run(RunArgs),
    /// Serve a model: a coordinator and its workers in one process
    #[command(after_help = examples::SERVE)]
    Serve(ServeArgs),
    /// Run a coordinator over workers that are processes of their own
    #[command(after_help = examples::COORDINATOR)]
    Coordinator(CoordinatorArgs),
    /// Run a worker that a coordinator drives
    #[command(after_help = examples::WORKER)]
    Worker(WorkerArgs),
    /// Show how a model would be split, without loading it
    #[command(after_help = examples::PLAN)]
    Plan(PlanArgs),
    /// Load a model, check that it and its tokenizer belong together, and report
    #[command(after_help = examples::CHECK)]
    Check(CheckArgs),
    /// Download a model of the Hugging Face hub into the hub's cache, where it is served by its name
    #[command(after_help = examples::PULL)]
    Pull(PullArgs),
    /// Show digests of a model's weights, and compare two copies
    #[command(after_help = examples::VERIFY)]
    Verify(VerifyArgs),
    /// Continue a prompt
    #[command(after_help = examples::GENERATE)]
    Generate(GenerateArgs),
    /// Score texts by a classifier's classes
    #[command(after_help = examples::CLASSIFY)]
    Classify(ClassifyArgs),
    /// Order documents by how well they answer a query
    #[command(after_help = examples::RERANK)]
    Rerank(RerankArgs),
    /// Turn texts into vectors
    #[command(after_help = examples::EMBED)]
    Embed(EmbedArgs),
    /// Classify the tokens of texts, or what they make up
    #[command(after_help = examples::TAG)]
    Tag(TagArgs),
    /// Find the parts of a text that answer a question
    #[command(after_help = examples::ANSWER)]
    Answer(QuestionArgs),
    /// Guess the tokens behind the masks of texts
    #[command(after_help = examples::FILL_MASK)]
    FillMask(FillMaskArgs),
    /// Turn a text into token ids, as the served model reads it
    #[command(after_help = examples::TOKENIZE)]
    Tokenize(TokenizeArgs),
    /// Turn token ids into text
    #[command(after_help = examples::DETOKENIZE)]
    Detokenize(DetokenizeArgs),
    /// Show what a server is doing
    #[command(after_help = examples::STATUS)]
    Status(StatusArgs),
    /// Run nothing on a worker any more: what it computes moves to others, and nothing is planned over it
    #[command(after_help = examples::DRAIN)]
    Drain(DrainArgs),
    /// Plan over a worker again that was drained
    #[command(after_help = examples::UNDRAIN)]
    Undrain(UndrainArgs),
    /// Change to the best plan over today's workers, or show what that would gain
    #[command(after_help = examples::REBALANCE)]
    Rebalance(RebalanceArgs),
    /// Deploy what a file says: another split, cache, or number of copies of the model, while answers go on
    #[command(after_help = examples::APPLY)]
    Apply(ApplyArgs),
    /// Measure throughput and latency of a running server
    #[command(after_help = examples::BENCH)]
    Bench(BenchArgs),
    /// Write a model of a named shape with random weights, to measure with
    #[command(after_help = examples::RANDOM_MODEL)]
    RandomModel(RandomModelArgs),
    /// Measure every kernel of a device by itself, at the shapes of a model
    #[command(after_help = examples::KERNELS)]
    Kernels(KernelsArgs),
    /// Print what makes a shell complete commands and flags
    #[command(after_help = examples::COMPLETIONS)]
    Completions(CompletionsArgs),
}

impl Command {
    /// Whether the answer is to be JSON, and with it the error that there may be instead.
    pub fn is_json(&self) -> bool {
        match self {
            Command::Serve(args) => args.dry_run.json,
            Command::Coordinator(args) => args.dry_run.json,
            Command::Plan(args) => args.json,
            Command::Check(args) => args.json,
            Command::Verify(args) => args.json,
            Command::Generate(args) => args.json,
            Command::Rerank(args) => args.json,
            Command::Tag(args) => args.json,
            Command::Answer(args) => args.json,
            Command::Classify(ClassifyArgs { input })
            | Command::Embed(EmbedArgs { input, .. })
            | Command::FillMask(FillMaskArgs { input, .. }) => input.json,
            Command::Tokenize(args) => args.json,
            Command::Detokenize(args) => args.json,
            Command::Status(args) => args.json,
            Command::Rebalance(args) => args.json,
            Command::Apply(args) => args.json,
            Command::Bench(args) => args.json,
            Command::Kernels(args) => args.json,
            Command::Run(_)
            | Command::Worker(_)
            | Command::Pull(_)
            | Command::Drain(_)
            | Command::Undrain(_)
            | Command::RandomModel(_)
            | Command::Completions(_) => false,
        }
    }
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
