//! `strata plan`: how a model would be split, without loading it.

use std::{io::Write, sync::Arc};

use strata_coordinator::{
    CoordinatorConfig,
    cluster::membership::Source,
    discover_members,
    engine::Observer,
    planner::{IMAGINED, Offer, Split},
    preview,
};
use strata_proto::{Device, DeviceKind, Plan};

use crate::{
    args::{ImaginedDevices, PlanArgs},
    loading::Loading,
    local, show, terminal,
};

/// `strata plan`
pub async fn plan(args: PlanArgs) -> anyhow::Result<()> {
    let (mut config, members) = local::here(&args.here, &args.deployment)?;
    if args.imagined.is_empty() {
        return preview_plan(&config, members, args.json).await;
    }
    // The default for devices of one's own list is what GPUs get.
    config.deployment.split = args.deployment.split.clone().unwrap_or(Split::Auto);
    let silent: Observer = Arc::new(|_| {});
    let found = discover_members(&config, members, &silent).await?;
    print(&found.plan_over(&offers(&args.imagined), &config.deployment)?, args.json)
}

/// Prints the plan that a server of this configuration would follow; loads nothing.
pub async fn preview_plan(
    config: &CoordinatorConfig,
    members: impl Into<Source>,
    json: bool,
) -> anyhow::Result<()> {
    let loading = Loading::default();
    let observer: Observer = Arc::new(move |notice| loading.show(notice));
    let (_, plan) = preview(config, members, &observer).await?;
    print(&plan, json)
}

fn print(plan: &Plan, json: bool) -> anyhow::Result<()> {
    let text = if json {
        serde_json::to_string(plan)?
    } else {
        let width = terminal::width(std::io::stdout());
        format!("{}\n\n{}", show::plan_table(plan, width), show::footprint_table(plan))
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
