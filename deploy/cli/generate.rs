//! `strata generate`: a prompt in, a stream of text out.

use std::io::Write;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use strata_proto::v1::{
    FinishReason, Finished, GenerateRequest, Started, TokenLogprobs, Usage, finished::EndedBy,
    generate_event, inference_client::InferenceClient,
};

use crate::{args::GenerateArgs, client::Server, prompt, report::misused};

/// `strata generate`
pub async fn generate(args: GenerateArgs) -> anyhow::Result<()> {
    let json = args.json;
    let prompt = prompt::only(args.text.clone(), args.prompt.clone())?;
    if args.logprobs.is_some() && !json {
        return Err(misused("--logprobs: only --json shows them: add it, or leave --logprobs out"));
    }
    let given = [prompt.is_some(), !args.token_ids.is_empty(), !args.message.is_empty()];
    match given.iter().filter(|given| **given).count() {
        0 => return Err(misused("there is nothing to continue: give a PROMPT, a --message, or --token-ids")),
        1 => {}
        _ => {
            return Err(misused(
                "a --prompt, --message and --token-ids exclude each other: give one of them",
            ));
        }
    }
    args.answer.warn_of_idle_flags();
    let server = Server::connect(&args.address).await?;
    let mut client = InferenceClient::new(server.channel.clone());
    let mut stream = server.wait(client.generate(request(args, prompt))).await?.into_inner();
    let mut out = std::io::stdout().lock();
    let mut started = Started::default();
    let (mut text, mut token_ids, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    while let Some(event) = server.wait(stream.message()).await? {
        match event.event {
            Some(generate_event::Event::Started(event)) => {
                if json {
                    writeln!(out, "{}", started_json(&event))?;
                }
                started = event;
            }
            Some(generate_event::Event::Tokens(tokens)) => {
                let scores: Vec<Value> = tokens.logprobs.iter().map(logprob_json).collect();
                if json {
                    let mut line = json!({"event": "tokens", "index": tokens.index, "text": tokens.text,
                        "token_ids": tokens.token_ids});
                    if !scores.is_empty() {
                        line["logprobs"] = json!(scores);
                    }
                    writeln!(out, "{line}")?;
                } else {
                    write!(out, "{}", tokens.text)?;
                }
                out.flush()?;
                text += &tokens.text;
                token_ids.extend(tokens.token_ids);
                logprobs.extend(scores);
            }
            Some(generate_event::Event::Finished(finished)) => {
                text += &finished.text;
                if json {
                    let usage = finished.usage.unwrap_or_default();
                    let mut line = json!({"event": "finished", "text": text, "token_ids": token_ids,
                        "prompt_token_ids": started.prompt_token_ids,
                        "finish_reason": reason_name(finished.reason()), "ended_by": ended_by(&finished),
                        "usage": usage_json(usage),
                        "model": started.model, "seed": started.seed, "request_id": started.request_id});
                    if !logprobs.is_empty() {
                        line["logprobs"] = json!(logprobs);
                    }
                    writeln!(out, "{line}")?;
                } else {
                    writeln!(out, "{}", finished.text)?;
                }
                out.flush()?;
                return Ok(());
            }
            None => {
                bail!("the server sent an event that this client does not know; are their versions equal?")
            }
        }
    }
    Err(anyhow::anyhow!("the answer broke off"))
        .context("the server closed the stream before it was finished")
}

fn request(args: GenerateArgs, prompt: Option<String>) -> GenerateRequest {
    GenerateRequest {
        model: args.model.name,
        prompt,
        token_ids: args.token_ids,
        messages: args.message,
        max_tokens: args.answer.max_tokens,
        sampling: Some(args.answer.sampling()),
        stop: args.answer.stop,
        stop_token_ids: args.answer.stop_token_ids,
        min_tokens: args.answer.min_tokens,
        ignore_eos: args.answer.ignore_eos,
        logprobs: args.logprobs,
        deadline_ms: args.deadline_ms,
        model_defaults: args.answer.model_defaults,
        tenant: args.tenant,
    }
}

fn started_json(started: &Started) -> Value {
    json!({"event": "started", "request_id": started.request_id, "model": started.model,
        "prompt_token_ids": started.prompt_token_ids, "seed": started.seed})
}

fn logprob_json(scores: &TokenLogprobs) -> Value {
    let top = scores.top.iter().map(|t| json!({"token_id": t.token_id, "logprob": t.logprob}));
    json!({"logprob": scores.logprob, "top": top.collect::<Vec<_>>()})
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
    })
}

/// The stop string or the token that ended an answer; null if it was its length.
fn ended_by(finished: &Finished) -> Value {
    match &finished.ended_by {
        Some(EndedBy::Stop(text)) => json!(text),
        Some(EndedBy::TokenId(id)) => json!(id),
        None => Value::Null,
    }
}

fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Eos => "eos",
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Unspecified => "unknown",
    }
}
