//! A model in this process continues a prompt: `cargo run --example generate -- MODEL_DIRECTORY PROMPT`.

use std::{path::Path, sync::Arc};

use anyhow::Context;
use futures::StreamExt;
use strata_coordinator::{Coordinator, CoordinatorConfig, cluster::membership};
use strata_proto::v1::{GenerateRequest, generate_event::Event};
use strata_worker::{LocalWorker, Models, WorkerConfig};

/// The text that follows `prompt`, of 32 tokens at most.
pub async fn generate(model: &Path, prompt: String) -> anyhow::Result<String> {
    let models = Models::One { name: "model".into(), directory: model.to_owned() };
    let worker = LocalWorker::start(WorkerConfig::new(models))?;
    let members = membership::local(vec![("worker".into(), Arc::new(worker))]);
    let coordinator = Coordinator::new(CoordinatorConfig::new("model", 1));
    coordinator.start(members, Arc::new(|_| {})).await?;

    let request =
        GenerateRequest { prompt: Some(prompt), max_tokens: Some(32), ..GenerateRequest::default() };
    let mut answer = coordinator.session().generate(request).await?;
    let mut text = String::new();
    while let Some(event) = answer.next().await {
        match event? {
            Event::Started(_) => {}
            Event::Tokens(tokens) => text += &tokens.text,
            Event::Finished(finished) => text += &finished.text,
        }
    }
    Ok(text)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (model, prompt) = args.next().zip(args.next()).context("expected MODEL_DIRECTORY PROMPT")?;
    println!("{}", generate(Path::new(&model), prompt).await?);
    Ok(())
}
