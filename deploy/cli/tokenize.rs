//! `strata tokenize`, `strata detokenize`: texts to ids and back, as a server's model reads them.

use std::io::Write;

use serde_json::json;
use strata_proto::v1::{DetokenizeRequest, TokenizeRequest, inference_client::InferenceClient};

use crate::{
    args::{DetokenizeArgs, TokenizeArgs},
    client::{connect, refusal},
    prompt,
};

/// `strata tokenize`
pub async fn tokenize(args: TokenizeArgs) -> anyhow::Result<()> {
    let request = TokenizeRequest { model: String::new(), text: prompt::read(args.text)?, plain: args.plain };
    let mut client = InferenceClient::new(connect(&args.address.address).await?);
    let ids = client.tokenize(request).await.map_err(|s| refusal(&s))?.into_inner().token_ids;
    let text = if args.json { json!({"token_ids": ids}).to_string() } else { listed(&ids) };
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// `strata detokenize`
pub async fn detokenize(args: DetokenizeArgs) -> anyhow::Result<()> {
    let request = DetokenizeRequest {
        model: String::new(),
        token_ids: args.token_ids,
        keep_special: args.keep_special,
    };
    let mut client = InferenceClient::new(connect(&args.address.address).await?);
    let text = client.detokenize(request).await.map_err(|s| refusal(&s))?.into_inner().text;
    let text = if args.json { json!({"text": text}).to_string() } else { text };
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// As `--token-ids` takes them.
fn listed(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}
