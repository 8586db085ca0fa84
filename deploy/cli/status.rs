//! `strata status`: what a server is doing, once or for as long as somebody watches.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    time::Duration,
};

use serde_json::json;
use strata_proto::{
    Device, LayerRange, Plan,
    v1::{CoordinatorState, StatusRequest, StatusResponse, cluster_client::ClusterClient},
};
use tokio::time::MissedTickBehavior;

use crate::{
    args::StatusArgs,
    call_error::CallError,
    client::{Server, unavailable},
    report, show,
    signals::Signals,
    terminal,
};

/// How often a server is asked by `--watch`.
const WATCH_EVERY: Duration = Duration::from_millis(500);

/// `strata status`
pub async fn status(args: StatusArgs) -> anyhow::Result<()> {
    if args.watch {
        return watch(&args).await;
    }
    let status = ask(&args).await?;
    let text = if args.json { as_json(&status)? } else { as_text(&status)? };
    writeln!(std::io::stdout(), "{text}")?;
    // For whatever restarts or routes by it.
    match status.ready {
        true => Ok(()),
        false => Err(unavailable(format!("the server is not ready: {}", status.reason))),
    }
}

async fn ask(args: &StatusArgs) -> anyhow::Result<StatusResponse> {
    let server = Server::connect(&args.address).await?;
    let mut client = ClusterClient::new(server.channel.clone());
    Ok(server.wait(client.status(StatusRequest {})).await?.into_inner())
}

/// Repaints a terminal; elsewhere, writes a line whenever something has changed. Ends by Ctrl-C.
async fn watch(args: &StatusArgs) -> anyhow::Result<()> {
    let mut signals = Signals::new();
    let mut every = tokio::time::interval(WATCH_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut out = std::io::stdout();
    let repaint = out.is_terminal() && !args.json;
    let mut last = String::new();
    loop {
        let asked = async {
            every.tick().await;
            ask(args).await
        };
        let asked = tokio::select! {
            asked = asked => asked,
            () = signals.next() => return Ok(()),
        };
        let text = match asked {
            Ok(status) if args.json => as_json(&status)?,
            Ok(status) if repaint => as_text(&status)?,
            Ok(status) => headline(&status),
            // The server may come back.
            Err(error) if !error.is::<CallError>() => return Err(error),
            Err(error) if args.json => {
                json!({"ready": false, "reason": report::in_one_line(&error)}).to_string()
            }
            Err(error) => report::in_one_line(&error),
        };
        if repaint {
            // From the top, each line to its end, then what is below.
            let lines: String = text.lines().map(|line| format!("{line}\x1b[K\n")).collect();
            write!(out, "\x1b[H{lines}\x1b[J")?;
            out.flush()?;
        } else if text != last {
            writeln!(out, "{text}")?;
            last = text;
        }
    }
}

/// What it is doing, in a line.
fn headline(status: &StatusResponse) -> String {
    let state = match (status.ready, status.state()) {
        (true, _) => {
            return format!("{} ready, incarnation {}", status.model, status.fence.unwrap_or_default());
        }
        (false, CoordinatorState::Serving) => "not ready",
        (false, state) => state_name(state),
    };
    format!("{} {state}: {}", status.model, status.reason)
}

fn state_name(state: CoordinatorState) -> &'static str {
    match state {
        CoordinatorState::Standby => "standby",
        CoordinatorState::Starting => "starting",
        CoordinatorState::Serving => "serving",
        CoordinatorState::Draining => "draining",
        CoordinatorState::Unspecified => "unknown",
    }
}

fn plan(status: &StatusResponse) -> anyhow::Result<Option<Plan>> {
    status.plan.clone().map(Plan::try_from).transpose().map_err(anyhow::Error::msg)
}

fn as_text(status: &StatusResponse) -> anyhow::Result<String> {
    let load = status.load.unwrap_or_default();
    let mut out = format!(
        "{}\n\
         version   {}\n\
         requests  {} running, {} waiting; {} steps in flight\n\
         cache     {} of {} tokens\n\
         prefixes  {} of {} tokens were in the cache\n\
         so far    {} prompt tokens, {} generated, {} steps, {} preemptions\n",
        headline(status),
        status.version,
        load.running,
        load.waiting,
        load.steps_in_flight,
        load.kv_tokens_used,
        load.kv_tokens_total,
        load.prefix_hits,
        load.prefix_queries,
        load.prompt_tokens,
        load.generated_tokens,
        load.steps,
        load.preemptions,
    );
    let ended = status.requests.iter().flat_map(|requests| &requests.ended);
    let mut ended: Vec<_> = ended.map(|(how, count)| format!("{count} {how}")).collect();
    ended.sort();
    if !ended.is_empty() {
        out += &format!("ended     {}\n", ended.join(", "));
    }
    for stage in &status.loading {
        let layers = stage.layers.unwrap_or_default();
        let (read, total) = (show::bytes(stage.bytes_read), show::bytes(stage.bytes_total));
        let place = format!("{}/{}", stage.worker, stage.device);
        out += &format!("loading   layers {}..{} on {place}: {read} of {total}\n", layers.first, layers.end);
    }
    if status.deployment_version > 0 {
        out += &format!("deployed  version {}\n", status.deployment_version);
    }
    if !status.commit.is_empty() {
        out += &format!("commit    {}\n", status.commit);
    }
    if !status.weights.is_empty() {
        out += &format!("weights   {}\n", status.weights);
    }
    if status.names.len() > 1 {
        out += &format!("names     {}\n", status.names.join(", "));
    }
    for member in &status.members {
        let devices: Vec<_> =
            member.devices.iter().map(|d| format!("{} {}", d.id, show::bytes(d.budget_bytes))).collect();
        let live = if member.live { devices.join(", ") } else { "does not answer".to_owned() };
        let said = match member.reason.as_str() {
            "" => live,
            reason if member.live => format!("{live}; left out: {reason}"),
            reason => format!("left out: {reason}"),
        };
        out += &format!("worker    {}: {said}\n", member.worker);
        // GPUs of one worker are used by the same ones.
        let libraries = member.devices.iter().find(|d| !d.libraries.is_empty());
        for library in libraries.iter().flat_map(|d| &d.libraries) {
            out += &format!("library   {} {}: {}\n", library.name, library.version, library.path);
        }
    }
    for standby in &status.standbys {
        let (place, layers) =
            (format!("{}/{}", standby.worker, standby.device), standby.layers.unwrap_or_default());
        out += &format!("standby   layers {}..{} on {place}\n", layers.first, layers.end);
    }
    let width = terminal::width(std::io::stdout());
    out += &plan(status)?.map_or(String::new(), |plan| show::plan_table(&plan, width));
    Ok(out.trim_end().to_owned())
}

fn as_json(status: &StatusResponse) -> anyhow::Result<String> {
    let load = status.load.unwrap_or_default();
    let fence = status.fence.unwrap_or_default();
    let members = status.members.iter().map(|m| {
        let devices: Result<Vec<_>, _> = m.devices.iter().cloned().map(Device::try_from).collect();
        let devices = devices.map_err(anyhow::Error::msg)?;
        Ok(json!({"worker": m.worker, "live": m.live, "reason": m.reason, "drained": m.drained, "devices": devices}))
    });
    let loading = status.loading.iter().map(|stage| {
        let layers = stage.layers.unwrap_or_default();
        json!({
            "pipeline": stage.pipeline,
            "stage": stage.stage,
            "worker": stage.worker,
            "device": stage.device,
            "layers": LayerRange::new(layers.first, layers.end),
            "bytes_read": stage.bytes_read,
            "bytes_total": stage.bytes_total,
        })
    });
    let standbys = status.standbys.iter().map(|standby| {
        let layers = standby.layers.unwrap_or_default();
        json!({
            "worker": standby.worker,
            "device": standby.device,
            "layers": LayerRange::new(layers.first, layers.end),
        })
    });
    let requests = status.requests.clone().unwrap_or_default();
    let value = json!({
        "version": status.version,
        "model": status.model,
        "names": status.names,
        "weights": status.weights,
        "state": state_name(status.state()),
        "ready": status.ready,
        "reason": status.reason,
        "loading": loading.collect::<Vec<_>>(),
        "requests": {
            "begun": requests.begun,
            "in_progress": requests.in_progress,
            "ended": requests.ended.into_iter().collect::<BTreeMap<_, _>>(),
        },
        "fence": {"term": fence.term, "pipeline": fence.pipeline, "incarnation": fence.incarnation},
        "load": {
            "running": load.running,
            "waiting": load.waiting,
            "kv_tokens_used": load.kv_tokens_used,
            "kv_tokens_total": load.kv_tokens_total,
            "steps_in_flight": load.steps_in_flight,
            "prefix_queries": load.prefix_queries,
            "prefix_hits": load.prefix_hits,
            "prompt_tokens": load.prompt_tokens,
            "generated_tokens": load.generated_tokens,
            "preemptions": load.preemptions,
            "steps": load.steps,
        },
        "deployment_version": status.deployment_version,
        "standbys": standbys.collect::<Vec<_>>(),
        "members": members.collect::<anyhow::Result<Vec<_>>>()?,
        "plan": plan(status)?,
    });
    Ok(value.to_string())
}
