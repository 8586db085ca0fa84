//! From flags to a configuration, and to workers of this process.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use strata_coordinator::{
    ClientLimits, CoordinatorConfig, Deployment, Limits,
    cluster::membership::{self, MemberEvent},
    config::{MAX_STEP_ROWS, PREFILL_CHUNK},
    planner::Split,
};
use strata_proto::{DeviceKind, Worker};
use strata_worker::{
    Hub, LocalWorker, Models, WorkerConfig,
    device::{self, DeviceSpec, Directories, available_memory},
};
use tokio::sync::mpsc;

use crate::{
    VERSION,
    args::{DeploymentArgs, HereArgs},
    model_dir,
    report::{self, misused},
};

/// How long local workers have to join: they are there already.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(10);

/// A configuration and workers of this process for a model directory.
pub fn here(
    args: &HereArgs,
    deployment: &DeploymentArgs,
) -> anyhow::Result<(CoordinatorConfig, mpsc::UnboundedReceiver<MemberEvent>)> {
    let (name, directory) = model_dir::open(&args.model)?;
    let (device_lists, split) = match (args.workers, args.devices.is_empty()) {
        (Some(_), false) => return Err(misused("give --workers or --devices, not both")),
        (None, false) => (vec![args.devices.clone()], Split::Auto),
        (None, true) => (vec![device::all()], Split::Auto),
        // Without a cap, so that weights which do not fit may stay memory-mapped.
        (Some(1), true) => (vec![vec![DeviceSpec::cpu(None)]], Split::Balanced),
        (Some(workers), true) => {
            let share = available_memory() / 10 * 9 / u64::from(workers);
            (vec![vec![DeviceSpec::cpu(Some(share))]; workers as usize], Split::Balanced)
        }
    };
    let compute = args.compute.resolve(device_lists.iter().map(|devices| processors(devices)).sum());
    let device_lists: Vec<_> = device_lists
        .into_iter()
        .map(|devices| capped(devices, &args.max_memory))
        .collect::<Result<_, _>>()?;
    let all = || device_lists.iter().flatten();
    let directories =
        Directories { spill: args.spill.resolve(all())?, kernels: args.kernel_cache.resolve(all()) };
    let hub = Arc::<Hub>::default();
    let mut workers: Vec<(String, Arc<dyn Worker>)> = Vec::new();
    for (index, devices) in device_lists.into_iter().enumerate() {
        let worker = LocalWorker::start(WorkerConfig {
            models: Models::One { name: name.clone(), directory: directory.clone() },
            devices,
            compute,
            link_address: SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 0),
            link_advertise: None,
            hub: hub.clone(),
            step_hook: None,
            directories: directories.clone(),
            verify_every: None,
        })?;
        workers.push((format!("worker-{index}"), Arc::new(worker)));
    }
    let config = coordinator_config(deployment, name, split, Some(workers.len()), LOCAL_TIMEOUT);
    Ok((config, membership::local(workers)))
}

/// What a coordinator is told by the flags of a deployment.
pub fn coordinator_config(
    args: &DeploymentArgs,
    model: String,
    split: Split,
    expected_members: Option<usize>,
    join_timeout: Duration,
) -> CoordinatorConfig {
    warn_of_idle_bounds(args);
    CoordinatorConfig {
        deployment: Deployment {
            model,
            ignore_tensors: args.ignore_tensors.clone(),
            weights: None,
            split: args.split.clone().unwrap_or(split),
            dtype: args.dtype.0,
            quantization: args.quantize.0,
            kv_tokens: args.kv_tokens,
            max_sequences: args.max_sequences,
            context: args.context,
            replicas: args.replicas,
            standbys: args.standbys,
            links: args.links.0,
            max_step_tokens: args.max_step_tokens,
            // A row has a token at least.
            max_step_rows: args.max_step_rows.min(args.max_step_tokens),
            heartbeat_timeout: Duration::from_secs(args.heartbeat_timeout),
        },
        limits: Limits {
            prefill_chunk: args.prefill_chunk,
            inter_token: Duration::from_millis(args.inter_token_ms),
            prefix_cache: !args.no_prefix_cache,
            max_requests: args.max_requests as usize,
        },
        clients: ClientLimits::default(),
        expected_members,
        join_timeout,
        skip_checks: args.skip_check.clone(),
        names: Vec::new(),
        version: VERSION.into(),
        secret: None,
    }
}

/// CPU devices among these, which share the cores.
pub fn processors(devices: &[DeviceSpec]) -> usize {
    devices.iter().filter(|d| d.kind == DeviceKind::Cpu).count()
}

/// Devices, each named once, with the caps of `--max-memory`.
///
/// # Errors
/// If one is named twice, or a cap has no size or no device.
pub fn capped(mut devices: Vec<DeviceSpec>, caps: &[DeviceSpec]) -> anyhow::Result<Vec<DeviceSpec>> {
    let twice =
        devices.iter().enumerate().find(|(at, d)| devices[..*at].iter().any(|other| other.id == d.id));
    if let Some((_, device)) = twice {
        return Err(misused(format!("--devices {} is given twice: expected each device once", device.id)));
    }
    for cap in caps {
        let Some(bytes) = cap.cap else {
            return Err(misused(format!("--max-memory {0}: expected a size, as in {0}=24GiB", cap.id)));
        };
        let Some(device) = devices.iter_mut().find(|d| d.id == cap.id) else {
            let have: Vec<_> = devices.iter().map(|d| d.id.as_str()).collect();
            let why = format!("--max-memory {}: no such device; there are {}", cap.id, have.join(", "));
            return Err(misused(why));
        };
        device.cap = Some(bytes);
    }
    Ok(devices)
}

/// Warns of bounds that a step's tokens bound already. Defaults are not what somebody asked for.
fn warn_of_idle_bounds(args: &DeploymentArgs) {
    let most = args.max_step_tokens;
    for (flag, value, default) in [
        ("--max-step-rows", args.max_step_rows, MAX_STEP_ROWS),
        ("--prefill-chunk", args.prefill_chunk, PREFILL_CHUNK),
    ] {
        if value > most && value != default {
            report::warn(&format!(
                "{flag} {value} is never reached: a step has at most {most} (--max-step-tokens)"
            ));
        }
    }
}
