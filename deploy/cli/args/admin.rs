//! Flags of what changes a running cluster.

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
