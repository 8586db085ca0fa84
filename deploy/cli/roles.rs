//! The servers: everything in one process, a coordinator, a worker.

use std::{
    io::Write,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use strata_coordinator::{
    Coordinator, CoordinatorConfig, Deployment, Limits,
    cluster::membership::{self, MemberEvent},
    config::{MAX_STEP_ROWS, PREFILL_CHUNK},
    engine::{Notice, Observer},
    front::grpc,
    planner::Split,
};
use strata_proto::{DeviceKind, MAX_HEADER_LIST, PING_EVERY, PING_TIMEOUT, Worker};
use strata_worker::{
    Hub, LocalWorker, Models, WorkerConfig,
    device::{self, DeviceSpec, Directories, available_memory},
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tonic::transport::Server;

use crate::{
    VERSION,
    args::{CoordinatorArgs, DeploymentArgs, DryRunArgs, HereArgs, ListenArgs, ServeArgs, WorkerArgs},
    etcd,
    loading::Loading,
    model_dir, plan, report,
    signals::{Signals, stopping, until_terminated},
};

/// What a server says that is told to stop while it starts.
const STOPPED_EARLY: &str = "stopped before the model was served";
/// How long local workers have to join: they are there already.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(10);

/// `strata serve`
pub async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    warn_of_idle_json(&args.dry_run);
    check_names(&args.listen.name)?;
    if args.dry_run.dry_run {
        let (config, members) = here(&args.here, &args.deployment)?;
        return plan::preview_plan(&config, members, args.dry_run.json).await;
    }
    let mut signals = Signals::new();
    // A port that is taken should be known before a model is loaded.
    let listener = listen(&args.listen).await?;
    // Opening devices blocks.
    let started = tokio::task::spawn_blocking(move || here(&args.here, &args.deployment));
    let (mut config, members) = tokio::select! {
        started = started => started.context("starting the workers")??,
        () = signals.next() => bail!(STOPPED_EARLY),
    };
    config.names = args.listen.name;
    answer(config, members, (listener, args.listen.grace), signals).await
}

/// `strata coordinator`
pub async fn coordinator(args: CoordinatorArgs) -> anyhow::Result<()> {
    warn_of_idle_json(&args.dry_run);
    let members = membership::fixed(&args.workers).map_err(|why| anyhow!("--worker: {why}"))?;
    check_names(&args.listen.name)?;
    let timeout = Duration::from_secs(args.join_timeout);
    let mut config =
        coordinator_config(&args.deployment, args.model, Split::Auto, args.workers.len(), timeout);
    if args.dry_run.dry_run {
        return plan::preview_plan(&config, members, args.dry_run.json).await;
    }
    let signals = Signals::new();
    let listener = listen(&args.listen).await?;
    config.names = args.listen.name;
    answer(config, members, (listener, args.listen.grace), signals).await
}

/// `strata worker`
pub async fn worker(args: WorkerArgs) -> anyhow::Result<()> {
    if !args.models.is_dir() {
        bail!("--models {}: no such directory", args.models.display());
    }
    let etcd = etcd::of(&args.etcd)?;
    let signals = Signals::new();
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("--listen {}", args.listen))?;
    let address = listener.local_addr()?;
    let devices = if args.devices.is_empty() { device::all() } else { args.devices };
    let devices = capped(devices, &args.max_memory)?;
    let compute = args.compute.resolve(processors(&devices));
    let directories =
        Directories { spill: args.spill.resolve(&devices)?, kernels: args.kernel_cache.resolve(&devices) };
    let worker = LocalWorker::start(WorkerConfig {
        models: Models::Under(args.models),
        devices,
        compute,
        link_address: args.link_listen.unwrap_or(SocketAddr::new(address.ip(), 0)),
        hub: Arc::default(),
        step_hook: None,
        directories,
    })?;
    let worker = Arc::new(worker);
    let service: Arc<dyn Worker> = worker.clone();
    say(&format!("listening http://{address}"))?;
    let incoming =
        tokio_stream::StreamExt::map(tokio_stream::wrappers::TcpListenerStream::new(listener), |stream| {
            stream.and_then(|s| s.set_nodelay(true).map(|()| s))
        });
    let registration = match &etcd {
        Some(etcd) => Some(etcd::register(etcd, &worker, address, &args.member).await?),
        None => None,
    };
    let (out, refused) = watch::channel(None);
    // The coordinators of what runs here plan without this worker; their calls are answered until they have.
    let drained = |stop| async move {
        let Some(mut registration) = registration else {
            stopping(stop).await;
            return worker.drain().await;
        };
        tokio::select! {
            () = stopping(stop) => {}
            error = registration.refused() => {
                out.send_replace(Some(error));
                return;
            }
        }
        tokio::join!(registration.end(), worker.drain());
    };
    let serve = |stop| async move {
        let served = Server::builder()
            // A coordinator that goes away without a word is noticed, and its incarnation's memory freed.
            .http2_keepalive_interval(Some(PING_EVERY))
            .http2_keepalive_timeout(Some(PING_TIMEOUT))
            .http2_max_header_list_size(MAX_HEADER_LIST)
            .add_service(strata_worker::grpc::service(service))
            .serve_with_incoming_shutdown(incoming, drained(stop))
            .await
            .context("serving the coordinator");
        match refused.borrow().as_ref() {
            Some(why) => Err(anyhow!("{why}")),
            None => served,
        }
    };
    until_terminated(serve, Duration::from_secs(args.grace), signals).await
}

fn check_names(names: &[String]) -> anyhow::Result<()> {
    match names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
        Some((_, name)) => bail!("--name {name} is given twice: expected each name once"),
        None => Ok(()),
    }
}

fn warn_of_idle_json(args: &DryRunArgs) {
    // Not refused: STRATA_JSON may be there for clients.
    if args.json && !args.dry_run {
        report::warn(
            "--json: only the plan of --dry-run is printed as JSON; for the log there is --log-format json",
        );
    }
}

/// A configuration and workers of this process for a model directory.
pub fn here(
    args: &HereArgs,
    deployment: &DeploymentArgs,
) -> anyhow::Result<(CoordinatorConfig, mpsc::UnboundedReceiver<MemberEvent>)> {
    let (name, directory) = model_dir::open(&args.model)?;
    let (device_lists, split) = match (args.workers, args.devices.is_empty()) {
        (Some(_), false) => bail!("give --workers or --devices, not both"),
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
            hub: hub.clone(),
            step_hook: None,
            directories: directories.clone(),
        })?;
        workers.push((format!("worker-{index}"), Arc::new(worker)));
    }
    let config = coordinator_config(deployment, name, split, workers.len(), LOCAL_TIMEOUT);
    Ok((config, membership::local(workers)))
}

/// CPU devices among these, which share the cores.
fn processors(devices: &[DeviceSpec]) -> usize {
    devices.iter().filter(|d| d.kind == DeviceKind::Cpu).count()
}

/// Devices with the caps of `--max-memory`.
fn capped(mut devices: Vec<DeviceSpec>, caps: &[DeviceSpec]) -> anyhow::Result<Vec<DeviceSpec>> {
    for cap in caps {
        let Some(bytes) = cap.cap else {
            bail!("--max-memory {}: expected a size, as in {}=24GiB", cap.id, cap.id)
        };
        let Some(device) = devices.iter_mut().find(|d| d.id == cap.id) else {
            let have: Vec<_> = devices.iter().map(|d| d.id.as_str()).collect();
            bail!("--max-memory {}: no such device; there are {}", cap.id, have.join(", "));
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

fn coordinator_config(
    args: &DeploymentArgs,
    model: String,
    split: Split,
    expected_members: usize,
    join_timeout: Duration,
) -> CoordinatorConfig {
    warn_of_idle_bounds(args);
    CoordinatorConfig {
        deployment: Deployment {
            model,
            split: args.split.clone().unwrap_or(split),
            dtype: args.dtype.0,
            quantization: args.quantize.0,
            kv_tokens: args.kv_tokens,
            max_sequences: args.max_sequences,
            context: args.context,
            links: args.links.0,
            max_step_tokens: args.max_step_tokens,
            // A row has a token at least.
            max_step_rows: args.max_step_rows.min(args.max_step_tokens),
        },
        limits: Limits {
            prefill_chunk: args.prefill_chunk,
            inter_token: Duration::from_millis(args.inter_token_ms),
            prefix_cache: !args.no_prefix_cache,
            max_requests: args.max_requests as usize,
        },
        expected_members,
        join_timeout,
        skip_checks: args.skip_check.clone(),
        names: Vec::new(),
        version: VERSION.into(),
    }
}

async fn listen(args: &ListenArgs) -> anyhow::Result<TcpListener> {
    let address = (args.host.as_str(), args.port);
    TcpListener::bind(address).await.with_context(|| format!("listening on {}:{}", args.host, args.port))
}

/// Brings the deployment up, says `ready`, and answers until told to stop; status and health are answered from the
/// beginning on.
async fn answer(
    config: CoordinatorConfig,
    members: mpsc::UnboundedReceiver<MemberEvent>,
    (listener, grace): (TcpListener, u64),
    mut signals: Signals,
) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    let coordinator = Coordinator::new(config);
    let (stop, stopped) = watch::channel(false);
    let serving = grpc::serve(coordinator.clone(), listener, stopping(stopped));
    let mut serving =
        tokio::spawn(async { serving.await.map_err(|e| anyhow::anyhow!("serving clients: {e}")) });
    let loading = Arc::new(Loading::default());
    let observer: Observer = {
        let loading = loading.clone();
        Arc::new(move |notice: Notice| loading.show(notice))
    };
    tokio::select! {
        started = coordinator.start(members, observer) => started?,
        ended = &mut serving => return ended?,
        () = signals.next() => bail!(STOPPED_EARLY),
    }
    loading.finish();
    say(&format!("ready http://{address}"))?;
    tokio::select! {
        ended = &mut serving => return ended?,
        () = signals.next() => {}
    }
    stop.send_replace(true);
    let in_progress = || match coordinator.session().in_progress() {
        0 => None,
        1 => Some("1 request".to_owned()),
        count => Some(format!("{count} requests")),
    };
    if let Some(requests) = in_progress() {
        tracing::warn!("waiting for {requests} to end, {grace} s at most; a second signal ends at once");
    }
    tokio::select! {
        ended = &mut serving => ended?,
        () = signals.next() => match in_progress() {
            // Connections alone are left, on which nobody waits for an answer.
            None => Ok(()),
            Some(requests) => bail!("ended at once, as asked, without an answer to {requests}"),
        },
        () = tokio::time::sleep(Duration::from_secs(grace)) => {
            if let Some(requests) = in_progress() {
                tracing::warn!("the {grace} s of --grace are over; ended without an answer to {requests}");
            }
            Ok(())
        }
    }
}

/// One line of standard output, at once.
fn say(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
