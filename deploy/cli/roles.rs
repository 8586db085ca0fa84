//! The servers: everything in one process, a coordinator, a worker.

use std::{io::Write, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use strata_coordinator::{
    Coordinator, CoordinatorConfig,
    cluster::{
        etcd::{Election, members},
        membership::{self, Caller, Claimant, Source},
    },
    engine::{Notice, Observer},
    front::grpc,
    planner::Split,
};
use strata_worker::{
    HubId, LocalWorker, Models, WorkerConfig,
    device::{self, Directories},
};
use tokio::{net::TcpListener, sync::watch};
use uuid::Uuid;

use crate::{
    args::{AdminAddress, CoordinatorArgs, DryRunArgs, ListenArgs, SecretArgs, ServeArgs, WorkerArgs},
    etcd,
    loading::Loading,
    local::{capped, coordinator_config, here, processors},
    model_dir, open_files, operators, plan,
    report::{self, misused},
    secret,
    signals::{Signals, finish, stopping},
};

/// What a server says that is told to stop while it starts.
const STOPPED_EARLY: &str = "stopped before the model was served";

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
    let admin = operators::listen(args.listen.admin.as_ref()).await?;
    // Opening devices blocks.
    let started = tokio::task::spawn_blocking(move || here(&args.here, &args.deployment));
    let (mut config, members) = tokio::select! {
        started = started => started.context("starting the workers")??,
        () = signals.next() => bail!(STOPPED_EARLY),
    };
    config.clients = args.listen.limits();
    config.names = args.listen.name;
    answer(config, members, Ports { clients: listener, admin, grace: args.listen.grace }, signals).await
}

/// `strata coordinator`
pub async fn coordinator(args: CoordinatorArgs) -> anyhow::Result<()> {
    warn_of_idle_json(&args.dry_run);
    let in_cache = HubId::parse(&args.model).is_some();
    if let Some(how) = model_dir::download(&args.model, "MODELS").filter(|_| !in_cache) {
        return Err(misused(format!(
            "--model {}: expected the name of a directory under each worker's --models, or OWNER/NAME[@REVISION] where that is \
             the hub's cache; {how}",
            args.model
        )));
    }
    match (args.workers.is_empty(), args.etcd.etcd.is_empty()) {
        (true, true) => {
            return Err(misused("--worker: give the URL of every worker, or --etcd where they are found"));
        }
        (false, false) => return Err(misused("--worker, --etcd: expected one of them, not both")),
        _ => {}
    }
    let caller = caller(&args.listen, &args.secret)?;
    let secret = caller.secret.clone();
    let etcd = etcd::of(&args.etcd, secret.as_ref())?;
    let (source, lead) = match &etcd {
        None => {
            let listed = membership::fixed(&args.workers, &caller);
            let (source, claimant) = listed.map_err(|why| misused(format!("--worker: {why}")))?;
            (source, Lead::Claimed(claimant))
        }
        // Who only looks does not stand for election.
        Some(etcd) if args.dry_run.dry_run => (Source::from(members(etcd)), Lead::None),
        Some(etcd) => {
            let (source, election) = etcd::stand(etcd, caller.name, args.leader_ttl);
            (source, Lead::Elected(election))
        }
    };
    check_names(&args.listen.name)?;
    let timeout = Duration::from_secs(args.join_timeout);
    let expected = etcd.is_none().then_some(args.workers.len());
    let mut config = coordinator_config(&args.deployment, args.model, Split::Auto, expected, timeout);
    if args.dry_run.dry_run {
        return plan::preview_plan(&config, source, args.dry_run.json).await;
    }
    let signals = Signals::new();
    let listener = listen(&args.listen).await?;
    let admin = operators::listen(args.listen.admin.as_ref()).await?;
    config.clients = args.listen.limits();
    config.names = args.listen.name;
    config.secret = secret;
    let ports = Ports { clients: listener, admin, grace: args.listen.grace };
    let answered = answer(config, source, ports, signals).await;
    // The next one leads at once.
    match lead {
        Lead::None => {}
        Lead::Claimed(claimant) => claimant.resign().await,
        Lead::Elected(election) => election.resign().await,
    }
    answered
}

/// By what a coordinator leads, if it does.
enum Lead {
    None,
    Claimed(Claimant),
    Elected(Election),
}

/// `strata worker`
pub async fn worker(args: WorkerArgs) -> anyhow::Result<()> {
    if !args.models.is_dir() {
        let shown = args.models.display();
        match args.models.to_str().and_then(|given| model_dir::download(given, "MODELS")) {
            Some(how) => bail!(
                "--models {shown}: no such directory; expected one whose subdirectories are models; {how}"
            ),
            None => {
                bail!("--models {shown}: no such directory; expected one whose subdirectories are models")
            }
        }
    }
    let secret = secret::read(&args.secret)?;
    let etcd = etcd::of(&args.etcd, secret.as_ref())?;
    let mut signals = Signals::new();
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("--listen {}", args.listen))?;
    let address = listener.local_addr()?;
    // Several workers of a machine are the rule: there is no usual place.
    let admin = operators::listen(Some(args.admin.as_ref().unwrap_or(&AdminAddress::Off))).await?;
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
        link_advertise: args.link_advertise,
        hub: Arc::default(),
        step_hook: None,
        directories,
        verify_every: args.verify_every.map(Duration::from_secs),
    })?;
    let worker = Arc::new(worker);
    if let Some(admin) = admin {
        operators::serve(admin, worker.clone())?;
    }
    let (stop, stopped) = watch::channel(false);
    let draining = stopping(stopped.clone());
    // The coordinators of what runs here plan without this worker; their calls are answered until they have.
    let drained = {
        let worker = worker.clone();
        async move {
            stopping(stopped).await;
            worker.drain().await;
        }
    };
    secret::warn_of_none(secret.as_ref(), address.ip());
    say(&format!("listening http://{address}"))?;
    let serving = strata_worker::grpc::serve(worker.clone(), secret, listener, draining, drained);
    let serving = tokio::spawn(serving);
    let mut serving = pin!(async { serving.await?.context("serving the coordinator") });
    let mut entry = etcd::register(etcd.as_ref(), &worker, address, &args.member).await?;
    tokio::select! {
        ended = &mut serving => return ended,
        why = entry.refused() => return Err(why.into()),
        () = signals.next() => {}
    }
    stop.send_replace(true);
    let serving = async { tokio::join!(serving, entry.end()).0 };
    let left = || {
        let busy = worker.occupied().join(", ");
        (!busy.is_empty()).then(|| format!("its coordinator's pipeline over {busy}"))
    };
    finish(serving, &mut signals, args.grace, left).await
}

fn check_names(names: &[String]) -> anyhow::Result<()> {
    match names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
        Some((_, name)) => Err(misused(format!("--name {name} is given twice: expected each name once"))),
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

/// A coordinator as its workers know it: by where it is, and a part that no other one has.
fn caller(args: &ListenArgs, secret: &SecretArgs) -> anyhow::Result<Caller> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| args.host.clone());
    let own = Uuid::new_v4().simple().to_string();
    let name = format!("{}:{} ({})", host.trim(), args.port, &own[..8]);
    Ok(Caller { name, secret: secret::read(secret)? })
}

async fn listen(args: &ListenArgs) -> anyhow::Result<TcpListener> {
    let address = (args.host.as_str(), args.port);
    TcpListener::bind(address).await.with_context(|| format!("listening on {}:{}", args.host, args.port))
}

/// Where a coordinator answers.
struct Ports {
    clients: TcpListener,
    admin: Option<TcpListener>,
    /// Seconds that answers may take to finish.
    grace: u64,
}

/// Brings the deployment up, says `ready`, and answers until told to stop; status and health are answered from the
/// beginning on.
async fn answer(
    config: CoordinatorConfig,
    members: impl Into<Source>,
    ports: Ports,
    mut signals: Signals,
) -> anyhow::Result<()> {
    let Ports { clients, admin, grace } = ports;
    let address = clients.local_addr()?;
    open_files::raise(config.clients.connections as u64);
    let coordinator = Coordinator::new(config);
    if let Some(admin) = admin {
        operators::serve(admin, Arc::new(coordinator.clone()))?;
    }
    let (stop, stopped) = watch::channel(false);
    let serving = grpc::serve(coordinator.clone(), clients, stopping(stopped));
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
    finish(async { serving.await? }, &mut signals, grace, in_progress).await
}

/// One line of standard output, at once.
fn say(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
