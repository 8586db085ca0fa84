//! `strata classify`, `strata rerank`, `strata embed`, `strata fill-mask`: inputs to an encoder, and what it makes of them.

use std::io::Write;

use serde_json::{Value, json};
use strata_proto::v1::{
    ClassifyRequest, EmbedRequest, FillMaskRequest, Input, RerankRequest, Truncation,
    inference_client::InferenceClient,
};
use tonic::transport::Channel;

use crate::{
    args::{ClassifyArgs, EmbedArgs, FillMaskArgs, InputArgs, RerankArgs},
    client::Server,
    prompt,
    report::misused,
};

/// Largest answer that is taken: vectors of many inputs.
const MAX_ANSWER: usize = 256 << 20;
/// Letters of a document that are shown to a person.
const SHOWN_LETTERS: usize = 60;
/// Elements of a vector that are shown to a person.
const SHOWN: usize = 8;

/// `strata classify`
pub async fn classify(args: ClassifyArgs) -> anyhow::Result<()> {
    let (truncation, deadline_ms) = (truncation(&args.input), args.input.deadline_ms);
    let request = ClassifyRequest {
        model: args.input.model.name.clone(),
        inputs: inputs(&args.input)?,
        truncation,
        deadline_ms,
    };
    let server = Server::connect(&args.input.address).await?;
    let answer = server.wait(client(&server).classify(request)).await?.into_inner();
    let mut out = std::io::stdout().lock();
    for (index, result) in answer.results.iter().enumerate() {
        if args.input.json {
            let classes = result
                .classes
                .iter()
                .map(|c| json!({"index": c.index, "label": c.label, "score": c.score, "logit": c.logit}));
            let mut line = line(index, result.tokens, result.dropped_tokens);
            line["classes"] = classes.collect();
            writeln!(out, "{line}")?;
            continue;
        }
        let classes = result.classes.iter().map(|c| format!("{} {:.4}", c.label, c.score));
        let classes: Vec<_> = classes.collect();
        writeln!(out, "{}{}", classes.join("  "), note(result.dropped_tokens))?;
    }
    Ok(())
}

/// `strata rerank`
pub async fn rerank(args: RerankArgs) -> anyhow::Result<()> {
    let texts = args.texts;
    if texts.len() < 2 {
        return Err(misused("there is nothing to rank: give a QUERY, and DOCUMENTs behind it"));
    }
    if texts.iter().filter(|text| *text == "-").count() > 1 {
        return Err(misused("standard input (-) is read once: give other texts as they are, or as @FILE"));
    }
    let mut texts = texts.into_iter().map(prompt::read).collect::<anyhow::Result<Vec<_>>>()?;
    let documents = texts.split_off(1);
    let request = RerankRequest {
        model: args.model.name.clone(),
        query: texts.remove(0),
        documents: documents.clone(),
        top_n: args.top_n,
        truncation: args.truncate.map_or(Truncation::Unspecified, Into::into) as i32,
        deadline_ms: args.deadline_ms,
        prompt_name: args.prompt_name,
    };
    let server = Server::connect(&args.address).await?;
    let answer = server.wait(client(&server).rerank(request)).await?.into_inner();
    let mut out = std::io::stdout().lock();
    for result in answer.results {
        let index = result.index as usize;
        if args.json {
            let mut line = line(index, result.tokens, result.dropped_tokens);
            line["score"] = json!(result.score);
            line["logit"] = json!(result.logit);
            writeln!(out, "{line}")?;
            continue;
        }
        // The beginning of it, on one line.
        let document = documents.get(index).map_or("", String::as_str);
        let shown: String = document.split_whitespace().collect::<Vec<_>>().join(" ");
        let shown: String = shown.chars().take(SHOWN_LETTERS).collect();
        writeln!(out, "{:.4}  {index}  {shown}{}", result.score, note(result.dropped_tokens))?;
    }
    Ok(())
}

/// `strata embed`
pub async fn embed(args: EmbedArgs) -> anyhow::Result<()> {
    let (truncation, deadline_ms) = (truncation(&args.input), args.input.deadline_ms);
    let request = EmbedRequest {
        model: args.input.model.name.clone(),
        inputs: inputs(&args.input)?,
        truncation,
        deadline_ms,
        prompt_name: args.prompt_name,
    };
    let server = Server::connect(&args.input.address).await?;
    let answer = server.wait(client(&server).embed(request)).await?.into_inner();
    let mut out = std::io::stdout().lock();
    for (index, result) in answer.results.iter().enumerate() {
        if args.input.json {
            let mut line = line(index, result.tokens, result.dropped_tokens);
            line["values"] = json!(result.values);
            writeln!(out, "{line}")?;
            continue;
        }
        let values =
            result.values.iter().take(SHOWN).map(|x| format!("{x:+.4}")).collect::<Vec<_>>().join(" ");
        let more = if result.values.len() > SHOWN { " …" } else { "" };
        let note = note(result.dropped_tokens);
        writeln!(out, "{values}{more}  ({} elements, {} tokens){note}", result.values.len(), result.tokens)?;
    }
    Ok(())
}

/// `strata fill-mask`
pub async fn fill_mask(args: FillMaskArgs) -> anyhow::Result<()> {
    let (truncation, deadline_ms) = (truncation(&args.input), args.input.deadline_ms);
    let request = FillMaskRequest {
        model: args.input.model.name.clone(),
        inputs: inputs(&args.input)?,
        top_k: args.top_k,
        truncation,
        deadline_ms,
    };
    let server = Server::connect(&args.input.address).await?;
    let answer = server.wait(client(&server).fill_mask(request)).await?.into_inner();
    let mut out = std::io::stdout().lock();
    for (index, result) in answer.results.iter().enumerate() {
        if args.input.json {
            let masks = result.masks.iter().map(|mask| {
                let candidates = mask
                    .candidates
                    .iter()
                    .map(|c| json!({"token_id": c.token_id, "text": c.text, "score": c.score}));
                json!({"position": mask.position, "candidates": candidates.collect::<Value>()})
            });
            let mut line = line(index, result.tokens, result.dropped_tokens);
            line["masks"] = masks.collect();
            writeln!(out, "{line}")?;
            continue;
        }
        for mask in &result.masks {
            let candidates = mask.candidates.iter().map(|c| format!("{} {:.4}", c.text.trim(), c.score));
            let candidates = candidates.collect::<Vec<_>>().join("  ");
            writeln!(out, "{index}:{}  {candidates}{}", mask.position, note(result.dropped_tokens))?;
        }
    }
    Ok(())
}

pub fn client(server: &Server) -> InferenceClient<Channel> {
    InferenceClient::new(server.channel.clone()).max_decoding_message_size(MAX_ANSWER)
}

/// Each text with the pair at the same place, or the one input of token ids.
fn inputs(args: &InputArgs) -> anyhow::Result<Vec<Input>> {
    if args.text.is_empty() && !args.pair.is_empty() {
        return Err(misused("--pair: there is no --text that it goes with: give one, or leave --pair out"));
    }
    if args.text.is_empty() && args.token_ids.is_empty() {
        return Err(misused("there is no input: give a --text, or --token-ids"));
    }
    if !args.token_ids.is_empty() {
        if !args.text.is_empty() {
            return Err(misused("--text is given together with --token-ids: give one of them"));
        }
        return Ok(vec![Input { token_ids: args.token_ids.clone(), ..Input::default() }]);
    }
    let (texts, pairs) = (args.text.len(), args.pair.len());
    if pairs > texts {
        return Err(misused(format!(
            "--pair: {pairs} for {texts} of --text: the first goes with the first, and so on; leave the others out"
        )));
    }
    let read = |text: &String| prompt::read(text.clone());
    let input = |(i, text): (usize, &String)| -> anyhow::Result<Input> {
        Ok(Input {
            text: Some(read(text)?),
            pair: args.pair.get(i).map(read).transpose()?,
            token_ids: Vec::new(),
        })
    };
    if args.text.iter().chain(&args.pair).filter(|text| *text == "-").count() > 1 {
        return Err(misused(
            "--text, --pair: standard input (-) is read once: give other texts as they are, or as @FILE",
        ));
    }
    args.text.iter().enumerate().map(input).collect()
}

fn truncation(args: &InputArgs) -> i32 {
    args.truncate.map_or(Truncation::Unspecified, Into::into) as i32
}

pub fn line(index: usize, tokens: u32, dropped: u32) -> Value {
    json!({"index": index, "tokens": tokens, "dropped_tokens": dropped})
}

pub fn note(dropped: u32) -> String {
    if dropped == 0 { String::new() } else { format!("  ({dropped} tokens were left out)") }
}
