//! `strata drain`, `undrain`, `rebalance` and `apply`: changing what a cluster serves, and on what, while it does.

use std::io::Write;

use anyhow::Context;
use serde_json::json;
use strata_coordinator::cluster::records::DeploymentRecord;
use strata_proto::{
    Plan, Secret,
    v1::{self, cluster_client::ClusterClient},
};
use tonic::{Extensions, Request, metadata::MetadataMap, transport::Channel};

use crate::{
    args::{AdminArgs, ApplyArgs, DrainArgs, RebalanceArgs, UndrainArgs},
    client::Server,
    report::misused,
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
    fn request<T: strata_proto::Message>(&self, message: T, method: &str) -> Request<T> {
        let mut metadata = MetadataMap::new();
        if let Some(secret) = &self.secret {
            secret.sign(&mut metadata, method, &message);
        }
        Request::from_parts(metadata, Extensions::default(), message)
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
    let compared = Compared::read(answer.now, answer.then, answer.differs, !args.dry_run)?;
    let text = match args.json {
        true => compared.as_json().to_string(),
        false if !answer.differs => "what runs is the best plan over today's members, or as good".to_owned(),
        false => compared.as_text(),
    };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

/// `strata apply`
pub async fn apply(args: ApplyArgs) -> anyhow::Result<()> {
    let shown = args.file.display();
    let text = match args.file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()).context("standard input")?,
        false => std::fs::read_to_string(&args.file).with_context(|| shown.to_string())?,
    };
    let record: DeploymentRecord = toml::from_str(&text)
        .map_err(|error| misused(format!("{shown}: {}", error.to_string().trim_end())))?;
    record.check().map_err(|why| misused(format!("{shown}: {why}")))?;
    let mut operator = Operator::connect(&args.admin).await?;
    let over = match args.over {
        Some(over) => over,
        None => {
            let status = operator.server.wait(operator.client.status(v1::StatusRequest {})).await?;
            status.into_inner().deployment_version
        }
    };
    let message =
        v1::ApplyRequest { deployment: Some(record.into()), over: Some(over), dry_run: args.dry_run };
    let request = operator.request(message, "Apply");
    let answer = operator.server.wait(operator.client.apply(request)).await?.into_inner();
    let compared = Compared::read(answer.now, answer.then, answer.differs, !args.dry_run)?;
    let version = answer.version;
    let text = match args.json {
        true => {
            let mut value = compared.as_json();
            value["version"] = version.into();
            value.to_string()
        }
        false => {
            let changed = match compared.differs {
                true => compared.as_text(),
                false => "the plan stays as it is".to_owned(),
            };
            let done = if args.dry_run { "is deployed, and would be followed" } else { "is served" };
            format!("{changed}\n\nversion {version} {done}")
        }
    };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

/// The plan before and after.
struct Compared {
    now: Plan,
    then: Plan,
    differs: bool,
    /// Whether it was changed, and not only shown.
    done: bool,
}

impl Compared {
    /// What the server says.
    fn read(
        now: Option<v1::Plan>,
        then: Option<v1::Plan>,
        differs: bool,
        done: bool,
    ) -> anyhow::Result<Self> {
        Ok(Compared { now: plan(now)?, then: plan(then)?, differs, done })
    }

    fn as_json(&self) -> serde_json::Value {
        let speed = |plan: &Plan| {
            let [single, full] = plan.speed();
            json!({"single": single, "full": full})
        };
        json!({
            "differs": self.differs,
            "done": self.differs && self.done,
            "tokens_per_second": {"now": speed(&self.now), "then": speed(&self.then)},
            "now": self.now,
            "then": self.then,
        })
    }

    fn as_text(&self) -> String {
        let width = terminal::width(std::io::stdout());
        let [now, then] = [&self.now, &self.then].map(|plan| show::plan_table(plan, width));
        let done = if self.done { "has become" } else { "would become" };
        format!("{now}\n\n{done}\n\n{then}\n\n{}", show::gain(&self.now, &self.then))
    }
}

fn plan(plan: Option<v1::Plan>) -> anyhow::Result<Plan> {
    let plan = plan.context("the server named no plan; is it of another version?")?;
    Plan::try_from(plan).map_err(anyhow::Error::msg)
}
