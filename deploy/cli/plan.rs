//! `strata plan`: how a model would be split, without loading it.

use std::{io::Write, sync::Arc};

use strata_coordinator::{engine::Observer, preview};

use crate::{
    args::{DeploymentArgs, HereArgs, PlanArgs},
    roles, show,
};

/// `strata plan`
pub async fn plan(args: PlanArgs) -> anyhow::Result<()> {
    show_plan(&args.here, &args.deployment, args.json).await
}

/// Prints the plan for a model directory.
pub async fn show_plan(here: &HereArgs, deployment: &DeploymentArgs, json: bool) -> anyhow::Result<()> {
    let (config, mut members) = roles::here(here, deployment)?;
    let silent: Observer = Arc::new(|_| {});
    let (_, plan) = preview(&config, &mut members, &silent).await?;
    let text = if json { serde_json::to_string(&plan)? } else { show::plan_table(&plan) };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}
