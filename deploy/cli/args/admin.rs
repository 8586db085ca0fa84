//! Flags of what changes a running cluster.

use std::path::PathBuf;

use clap::Args;

use super::{AddressArgs, SecretArgs};

/// A server, and what it wants to see of whoever changes what it does.
#[derive(Debug, Args)]
pub struct AdminArgs {
    #[command(flatten)]
    pub address: AddressArgs,
    #[command(flatten)]
    pub secret: SecretArgs,
}

#[derive(Debug, Args)]
pub struct DrainArgs {
    /// The worker, by its name in `strata status`
    #[arg(env = "STRATA_WORKER_NAME", allow_hyphen_values = true)]
    pub worker: String,
    /// Why, for whoever looks at the status
    #[arg(long, env = "STRATA_REASON", default_value = "", allow_hyphen_values = true)]
    pub reason: String,
    #[command(flatten)]
    pub admin: AdminArgs,
}

#[derive(Debug, Args)]
pub struct UndrainArgs {
    /// The worker, by its name in `strata status`
    #[arg(env = "STRATA_WORKER_NAME", allow_hyphen_values = true)]
    pub worker: String,
    #[command(flatten)]
    pub admin: AdminArgs,
}

#[derive(Debug, Args)]
pub struct RebalanceArgs {
    /// Only show what would change
    #[arg(long, env = "STRATA_DRY_RUN")]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub admin: AdminArgs,
}

#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// TOML file whose keys are flags of a deployment: model, weights (a digest), split, dtype, quantize, kv-tokens,
    /// max-sequences, context, links, replicas, standbys, ignore-tensors (a list); - is standard input
    #[arg(env = "STRATA_FILE")]
    pub file: PathBuf,
    /// Only show what would change
    #[arg(long, env = "STRATA_DRY_RUN")]
    pub dry_run: bool,
    /// Refuse if another version than this one is deployed [default: the one that there is when this is asked]
    #[arg(long, env = "STRATA_OVER", value_name = "VERSION")]
    pub over: Option<u64>,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub admin: AdminArgs,
}
