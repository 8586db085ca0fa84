//! `strata plan`: how a model would be split, without loading it.

use std::{io::Write, sync::Arc};

use strata_coordinator::{
    discover_members,
    engine::Observer,
    planner::{IMAGINED, Offer, Split},
    preview,
};
use strata_proto::{Device, DeviceKind};

use crate::{
    args::{DeploymentArgs, HereArgs, ImaginedDevices, PlanArgs},
    roles, show,
};

/// `strata plan`
pub async fn plan(args: PlanArgs) -> anyhow::Result<()> {
    show_plan(&args.here, &args.deployment, &args.imagined, args.json).await
}

/// Prints the plan for a model directory, over this machine's devices or imagined ones.
pub async fn show_plan(
    here: &HereArgs,
    deployment: &DeploymentArgs,
    imagined: &[ImaginedDevices],
    json: bool,
) -> anyhow::Result<()> {
    let (mut config, mut members) = roles::here(here, deployment)?;
    let silent: Observer = Arc::new(|_| {});
    let plan = if imagined.is_empty() {
        preview(&config, &mut members, &silent).await?.1
    } else {
        // The default for devices of one's own list is what GPUs get.
        config.deployment.split = deployment.split.clone().unwrap_or(Split::Auto);
        let found = discover_members(&config, &mut members, &silent).await?;
        found.plan_over(&offers(imagined), &config.deployment)?
    };
    let text = if json {
        serde_json::to_string(&plan)?
    } else {
        format!("{}\n\n{}", show::plan_table(&plan), show::footprint_table(&plan))
    };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

fn offers(imagined: &[ImaginedDevices]) -> Vec<Offer> {
    let each = imagined.iter().flat_map(|d| std::iter::repeat_n(d, d.count as usize)).enumerate();
    let offer = |(number, d): (usize, &ImaginedDevices)| Offer {
        worker: IMAGINED.into(),
        host: IMAGINED.into(),
        device: Device {
            id: format!("cuda:{number}"),
            kind: DeviceKind::Cuda,
            budget_bytes: d.bytes,
            total_bytes: d.bytes,
            capped: true,
            bytes_per_second: d.bytes_per_second,
            flops_per_second: d.flops_per_second,
            numerics: IMAGINED.into(),
            rates: Vec::new(),
            stages_at_once: 0,
            hardware: String::new(),
            peers: Vec::new(),
            links: Vec::new(),
            spill_bytes: 0,
            spill_directory: String::new(),
            libraries: Vec::new(),
        },
    };
    each.map(offer).collect()
}
