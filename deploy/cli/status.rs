//! `strata status`: what a server is doing.

use std::io::Write;

use serde_json::json;
use strata_proto::{
    Device, Plan,
    v1::{StatusRequest, StatusResponse, cluster_client::ClusterClient},
};

use crate::{args::StatusArgs, client::Server, show, terminal};

/// `strata status`
pub async fn status(args: StatusArgs) -> anyhow::Result<()> {
    let server = Server::connect(&args.address).await?;
    let mut client = ClusterClient::new(server.channel.clone());
    let status = server.wait(client.status(StatusRequest {})).await?.into_inner();
    let plan = status.plan.clone().map(Plan::try_from).transpose().map_err(anyhow::Error::msg)?;
    let text = if args.json { as_json(&status, plan.as_ref())? } else { as_text(&status, plan.as_ref()) };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

fn as_text(status: &StatusResponse, plan: Option<&Plan>) -> String {
    let load = status.load.unwrap_or_default();
    let state = if status.ready { "ready".to_owned() } else { format!("not ready: {}", status.reason) };
    let fence = status.fence.unwrap_or_default();
    let mut out = format!(
        "{} {state}, incarnation {fence}\n\
         version   {}\n\
         requests  {} running, {} waiting; {} steps in flight\n\
         cache     {} of {} tokens\n\
         prefixes  {} of {} tokens were in the cache\n\
         so far    {} prompt tokens, {} generated, {} steps, {} preemptions\n",
        status.model,
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
    if status.names.len() > 1 {
        out += &format!("names     {}\n", status.names.join(", "));
    }
    for member in &status.members {
        let devices: Vec<_> =
            member.devices.iter().map(|d| format!("{} {}", d.id, show::bytes(d.budget_bytes))).collect();
        let live = if member.live { devices.join(", ") } else { "does not answer".to_owned() };
        out += &format!("worker    {}: {live}\n", member.worker);
        // GPUs of one worker are used by the same ones.
        let libraries = member.devices.iter().find(|d| !d.libraries.is_empty());
        for library in libraries.iter().flat_map(|d| &d.libraries) {
            out += &format!("library   {} {}: {}\n", library.name, library.version, library.path);
        }
    }
    out + &plan.map_or(String::new(), |plan| show::plan_table(plan, terminal::width(std::io::stdout())))
}

fn as_json(status: &StatusResponse, plan: Option<&Plan>) -> anyhow::Result<String> {
    let load = status.load.unwrap_or_default();
    let fence = status.fence.unwrap_or_default();
    let members = status.members.iter().map(|m| {
        let devices: Result<Vec<_>, _> = m.devices.iter().cloned().map(Device::try_from).collect();
        Ok(json!({"worker": m.worker, "live": m.live, "devices": devices.map_err(anyhow::Error::msg)?}))
    });
    let value = json!({
        "version": status.version,
        "model": status.model,
        "names": status.names,
        "ready": status.ready,
        "reason": status.reason,
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
        "members": members.collect::<anyhow::Result<Vec<_>>>()?,
        "plan": plan,
    });
    Ok(value.to_string())
}
