//! A model in this process says how alike two texts are: `cargo run --example embed -- MODEL_DIRECTORY TEXT TEXT`.

use std::{path::Path, sync::Arc};

use anyhow::Context;
use strata_coordinator::{Coordinator, CoordinatorConfig, cluster::membership};
use strata_proto::v1::{EmbedRequest, Input};
use strata_worker::{LocalWorker, Models, WorkerConfig};

/// A vector for each text.
pub async fn embed(model: &Path, texts: &[String]) -> anyhow::Result<Vec<Vec<f32>>> {
    let models = Models::One { name: "model".into(), directory: model.to_owned() };
    let worker = LocalWorker::start(WorkerConfig::new(models))?;
    let members = membership::local(vec![("worker".into(), Arc::new(worker))]);
    let coordinator = Coordinator::new(CoordinatorConfig::new("model", 1));
    coordinator.start(members, Arc::new(|_| {})).await?;

    let input = |text: &String| Input { text: Some(text.clone()), ..Input::default() };
    let request = EmbedRequest { inputs: texts.iter().map(input).collect(), ..EmbedRequest::default() };
    let response = coordinator.session().embed(request).await?;
    Ok(response.results.into_iter().map(|embedding| embedding.values).collect())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (model, texts) = args.split_first().context("expected MODEL_DIRECTORY TEXT TEXT")?;
    let vectors = embed(Path::new(model), texts).await?;
    let [a, b] = &vectors[..] else { anyhow::bail!("expected two texts, not {}", vectors.len()) };
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    println!("cosine {:.4}", dot(a, b) / (dot(a, a) * dot(b, b)).sqrt());
    Ok(())
}
