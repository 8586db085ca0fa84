//! `strata tag`, `strata answer`: parts of texts, and what a model says of them.

use std::io::Write;

use serde_json::{Value, json};
use strata_proto::v1::{Aggregation, AnswerRequest, ClassifyTokensRequest, Truncation};

use crate::{
    args::{QuestionArgs, TagArgs},
    client::Server,
    encode::{client, line, note},
    prompt,
    report::misused,
};

/// `strata tag`
pub async fn tag(args: TagArgs) -> anyhow::Result<()> {
    once(&args.texts.iter().map(String::as_str).collect::<Vec<_>>())?;
    let texts = args.texts.into_iter().map(prompt::read).collect::<anyhow::Result<Vec<_>>>()?;
    let request = ClassifyTokensRequest {
        model: args.model.name.clone(),
        texts,
        truncation: args.truncate.map_or(Truncation::Unspecified, Into::into) as i32,
        deadline_ms: args.deadline_ms,
        aggregation: Aggregation::from(args.aggregation) as i32,
        ignore_labels: args.ignore_labels,
    };
    let server = Server::connect(&args.address).await?;
    let answer = server.wait(client(&server).classify_tokens(request)).await?.into_inner();
    let mut out = std::io::stdout().lock();
    for (index, result) in answer.results.iter().enumerate() {
        if args.json {
            let entities = result.entities.iter().map(|e| {
                json!({
                    "label": e.label, "score": e.score, "text": e.text, "index": e.index,
                    "start": e.start, "end": e.end, "start_byte": e.start_byte, "end_byte": e.end_byte,
                })
            });
            let mut line = line(index, result.tokens, result.dropped_tokens);
            line["entities"] = entities.collect::<Value>();
            writeln!(out, "{line}")?;
            continue;
        }
        for e in &result.entities {
            writeln!(out, "{index}:{}-{}  {}  {:.4}  {}", e.start, e.end, e.label, e.score, e.text)?;
        }
        if result.dropped_tokens > 0 {
            writeln!(out, "{index}:{}", note(result.dropped_tokens))?;
        }
    }
    Ok(())
}

/// `strata answer`
pub async fn answer(args: QuestionArgs) -> anyhow::Result<()> {
    once(&[&args.question, &args.context])?;
    let request = AnswerRequest {
        model: args.model.name.clone(),
        question: prompt::read(args.question)?,
        context: prompt::read(args.context)?,
        top_k: args.top_k,
        max_answer_tokens: args.max_answer_tokens,
        handle_impossible_answer: args.handle_impossible_answer,
        max_window_tokens: args.max_window_tokens,
        stride: args.stride,
        deadline_ms: args.deadline_ms,
    };
    let server = Server::connect(&args.address).await?;
    let answer = server.wait(client(&server).answer(request)).await?.into_inner();
    let mut out = std::io::stdout().lock();
    for a in answer.answers {
        if args.json {
            let line = json!({
                "text": a.text, "score": a.score, "start": a.start, "end": a.end, "start_byte": a.start_byte,
                "end_byte": a.end_byte, "start_logit": a.start_logit, "end_logit": a.end_logit,
            });
            writeln!(out, "{line}")?;
            continue;
        }
        let text = if a.text.is_empty() { "(no answer)" } else { &a.text };
        writeln!(out, "{:.4}  {}-{}  {text}", a.score, a.start, a.end)?;
    }
    Ok(())
}

/// Refuses to read standard input twice.
fn once(texts: &[&str]) -> anyhow::Result<()> {
    match texts.iter().filter(|text| **text == "-").count() {
        0 | 1 => Ok(()),
        _ => Err(misused("standard input (-) is read once: give other texts as they are, or as @FILE")),
    }
}
