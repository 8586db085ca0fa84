//! `strata drain`, `strata undrain`, `strata rebalance`: changing what a cluster runs on while it serves.

use std::io::Write;

use anyhow::Context;
use serde_json::json;
use strata_proto::{
    Plan, Secret,
    v1::{self, cluster_client::ClusterClient},
};
use tonic::{Request, transport::Channel};

use crate::{
    args::{AdminArgs, DrainArgs, RebalanceArgs, UndrainArgs},
    client::Server,
    secret, show, terminal,
};

/// An operator's way to a server.
struct Operator {
    server: Server,
    client: ClusterClient<Channel>,
    secret: Option<Secret>,
}

impl Operator {
    async fn connect(args: &AdminArgs) -> anyhow::Result<Self> {
        let secret = secret::read(&args.secret)?;
        let server = Server::connect(&args.address).await?;
        let client = ClusterClient::new(server.channel.clone());
        Ok(Operator { server, client, secret })
    }

    /// A call of `method`, with what it has to prove.
    fn request<T>(&self, message: T, method: &str) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(secret) = &self.secret {
            secret.sign(request.metadata_mut(), method, None);
        }
        request
    }
}

/// `strata drain`
pub async fn drain(args: DrainArgs) -> anyhow::Result<()> {
    let mut operator = Operator::connect(&args.admin).await?;
    let message = v1::DrainRequest { worker: args.worker.clone(), reason: args.reason };
    let request = operator.request(message, "Drain");
    operator.server.wait(operator.client.drain(request)).await?;
    writeln!(std::io::stdout(), "nothing is left on {}, and nothing is planned over it", args.worker)?;
    Ok(())
}

/// `strata undrain`
pub async fn undrain(args: UndrainArgs) -> anyhow::Result<()> {
    let mut operator = Operator::connect(&args.admin).await?;
    let request = operator.request(v1::UndrainRequest { worker: args.worker.clone() }, "Undrain");
    operator.server.wait(operator.client.undrain(request)).await?;
    writeln!(std::io::stdout(), "{} is planned over again", args.worker)?;
    Ok(())
}

/// `strata rebalance`
pub async fn rebalance(args: RebalanceArgs) -> anyhow::Result<()> {
    let mut operator = Operator::connect(&args.admin).await?;
    let request = operator.request(v1::RebalanceRequest { dry_run: args.dry_run }, "Rebalance");
    let answer = operator.server.wait(operator.client.rebalance(request)).await?.into_inner();
    let (now, then) = (plan(answer.now)?, plan(answer.then)?);
    let text = match args.json {
        true => {
            let speed = |plan: &Plan| {
                let [single, full] = show::speed(plan);
                json!({"single": single, "full": full})
            };
            json!({
                "differs": answer.differs,
                "done": answer.differs && !args.dry_run,
                "tokens_per_second": {"now": speed(&now), "then": speed(&then)},
                "now": now,
                "then": then,
            })
            .to_string()
        }
        false if !answer.differs => "what runs is the best plan over today's members".to_owned(),
        false => {
            let width = terminal::width(std::io::stdout());
            let done = if args.dry_run { "would become" } else { "has become" };
            format!(
                "{}\n\n{done}\n\n{}\n\n{}",
                show::plan_table(&now, width),
                show::plan_table(&then, width),
                show::gain(&now, &then)
            )
        }
    };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

fn plan(plan: Option<v1::Plan>) -> anyhow::Result<Plan> {
    let plan = plan.context("the server named no plan; is it of another version?")?;
    Plan::try_from(plan).map_err(anyhow::Error::msg)
}
