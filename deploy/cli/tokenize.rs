//! `strata tokenize`, `strata detokenize`: texts to ids and back, as a server's model reads them.

use std::io::Write;

use serde_json::json;
use strata_proto::v1::{DetokenizeRequest, TokenizeRequest, inference_client::InferenceClient};

use crate::{
    args::{DetokenizeArgs, TokenizeArgs},
    client::Server,
    prompt,
    report::misused,
};

/// `strata tokenize`
pub async fn tokenize(args: TokenizeArgs) -> anyhow::Result<()> {
    let request =
        TokenizeRequest { model: args.model.name, text: prompt::read(args.text)?, plain: args.plain };
    let server = Server::connect(&args.address).await?;
    let mut client = InferenceClient::new(server.channel.clone());
    let ids = server.wait(client.tokenize(request)).await?.into_inner().token_ids;
    let text = if args.json { json!({"token_ids": ids}).to_string() } else { listed(&ids) };
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// `strata detokenize`
pub async fn detokenize(args: DetokenizeArgs) -> anyhow::Result<()> {
    let request = DetokenizeRequest {
        model: args.model.name,
        token_ids: ids(args.token_ids)?,
        keep_special: args.keep_special,
    };
    let server = Server::connect(&args.address).await?;
    let mut client = InferenceClient::new(server.channel.clone());
    let text = server.wait(client.detokenize(request)).await?.into_inner().text;
    let text = if args.json { json!({"text": text}).to_string() } else { text };
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// Ids as they are given: by themselves, in a file, or on standard input.
fn ids(given: Vec<String>) -> anyhow::Result<Vec<u32>> {
    let mut ids = Vec::new();
    for given in given {
        let text = prompt::read(given)?;
        for word in text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty()) {
            let id = word.parse().map_err(|_| {
                misused(format!(
                    "token ids: {word:?} is none; expected numbers, separated by commas or spaces"
                ))
            })?;
            ids.push(id);
        }
    }
    Ok(ids)
}

/// As `--token-ids` takes them.
fn listed(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}
