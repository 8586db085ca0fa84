//! `strata run`: a model in this process, asked once or line by line.

#![allow(clippy::print_stderr, reason = "what a chat says in a terminal is no log")]

use std::{
    io::{BufRead, IsTerminal, Write},
    sync::Arc,
};

use anyhow::Context;
use futures::StreamExt;
use strata_coordinator::{
    AdmissionError, Coordinator, Generation, Session, SessionError,
    engine::{Notice, Observer},
};
use strata_proto::v1::{ChatMessage, FinishReason, GenerateRequest, Task, generate_event::Event};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use crate::{
    args::{AnswerArgs, RunArgs},
    loading::Loading,
    local, model_dir, prompt, report,
};

const HELP: &str = "/exit or Ctrl-D ends, /clear forgets what was said, Ctrl-C stops an answer";

/// `strata run`
pub async fn run(args: RunArgs) -> anyhow::Result<()> {
    must_generate(&args)?;
    let prompt = prompt::only(args.text.clone(), args.prompt.clone())?;
    args.answer.warn_of_idle_flags();
    let mut model = start(&args).await?;
    match prompt {
        Some(prompt) => model.ask(prompt, None).await.map(drop),
        None => model.talk().await,
    }
}

/// What cannot answer should not be loaded first.
fn must_generate(RunArgs { here, deployment, .. }: &RunArgs) -> anyhow::Result<()> {
    let (name, directory) = model_dir::open(&here.model)?;
    let task = strata_worker::model::describe_ignoring(&directory, &name, &deployment.ignore_tensors)?.task;
    let command = match task {
        Task::Generate | Task::Unspecified => return Ok(()),
        Task::Classify => "classify",
        Task::Embed => "embed",
        Task::FillMask => "fill-mask",
        Task::ClassifyTokens => "tag",
        Task::Answer => "answer",
    };
    Err(report::misused(format!(
        "{name} does not generate text: serve it with `strata serve`, and ask it with `strata {command}`"
    )))
}

/// Loads the model.
async fn start(args: &RunArgs) -> anyhow::Result<Model> {
    let (config, members) = local::here(&args.here, &args.deployment)?;
    let loading = Arc::new(Loading::quiet());
    let observer: Observer = {
        let loading = loading.clone();
        Arc::new(move |notice: Notice| loading.show(notice))
    };
    let coordinator = Coordinator::new(config);
    let started = coordinator.start(members, observer).await;
    loading.finish();
    started?;
    let session = coordinator.session().clone();
    let chat = session.has_chat_template() && !args.complete;
    let mut asked = args.chat.request()?;
    let mut beginning = std::mem::take(&mut asked.messages);
    beginning.extend(args.message.iter().cloned());
    let says_nothing = beginning.is_empty() && asked == GenerateRequest::default();
    if !chat && !says_nothing {
        return Err(report::misused(
            "--message and other flags of a chat: the model has no chat template, or --complete was given; give it a \
             --prompt to continue",
        ));
    }
    Ok(Model { session, chat, said: beginning.clone(), beginning, asked, answer: args.answer.clone() })
}

/// A model that is ready, and what was said so far.
struct Model {
    session: Session,
    /// It has a chat template; what is asked is a message, and the answer is remembered.
    chat: bool,
    /// Messages that every chat begins with.
    beginning: Vec<ChatMessage>,
    said: Vec<ChatMessage>,
    /// What every request of a chat says beside its messages.
    asked: GenerateRequest,
    answer: AnswerArgs,
}

enum Outcome {
    Answered,
    /// By Ctrl-C.
    Stopped,
}

impl Model {
    /// Asks every line of standard input.
    async fn talk(&mut self) -> anyhow::Result<()> {
        let terminal = std::io::stdin().is_terminal();
        // From here on Ctrl-C does not end the process by itself.
        let mut interrupts = signal(SignalKind::interrupt()).context("watching for Ctrl-C")?;
        if terminal {
            eprintln!("{HELP}");
        }
        let mut lines = lines();
        loop {
            if terminal {
                eprint!("> ");
            }
            let line = tokio::select! {
                line = lines.recv() => line,
                _ = interrupts.recv() => None,
            };
            let Some(line) = line.transpose()? else {
                if terminal {
                    eprintln!();
                }
                return Ok(());
            };
            match line.trim() {
                "" => continue,
                "/exit" => return Ok(()),
                "/clear" => {
                    self.said = self.beginning.clone();
                    continue;
                }
                "/help" => {
                    eprintln!("{HELP}");
                    continue;
                }
                _ => {}
            }
            match self.ask(line, Some(&mut interrupts)).await {
                Ok(Outcome::Stopped) if !terminal => return Ok(()),
                Ok(_) => {}
                // Whoever sits there can ask something else.
                Err(error) if terminal && !crate::is_broken_pipe(&error) => {
                    eprintln!("error: {}", report::in_one_line(&error));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks, and writes the answer to standard output as it comes.
    async fn ask(&mut self, prompt: String, mut interrupts: Option<&mut Signal>) -> anyhow::Result<Outcome> {
        let question = says("user", prompt);
        let mut answer = self.begin(&question).await?;
        let mut out = std::io::stdout();
        let mut text = String::new();
        loop {
            let interrupted = async {
                match &mut interrupts {
                    Some(interrupts) => interrupts.recv().await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                event = answer.next() => event.context("the answer broke off")??,
                _ = interrupted => {
                    writeln!(out)?;
                    return Ok(Outcome::Stopped);
                }
            };
            let piece = match &event {
                Event::Started(_) => continue,
                Event::Tokens(tokens) => &tokens.text,
                Event::Finished(finished) => &finished.text,
            };
            write!(out, "{piece}")?;
            out.flush()?;
            text += piece;
            if let Event::Finished(finished) = &event {
                writeln!(out)?;
                if self.chat {
                    self.said.extend([question, says("assistant", text)]);
                }
                let full = finished.reason() == FinishReason::Length && self.answer.max_tokens.is_none();
                if full && interrupts.is_some() && std::io::stdin().is_terminal() {
                    eprintln!("(the context is full)");
                }
                return Ok(Outcome::Answered);
            }
        }
    }

    /// Asks. What was said first is left out, a question and its answer at a time, where all of it is too long.
    async fn begin(&mut self, question: &ChatMessage) -> anyhow::Result<Generation> {
        let mut left_out = 0;
        loop {
            match self.session.generate(self.request(question)).await {
                Ok(answer) => {
                    if left_out > 0 {
                        let what = if left_out == 1 { "exchange was" } else { "exchanges were" };
                        report::tell(&format!("{left_out} earlier {what} left out: the context is full"));
                    }
                    return Ok(answer);
                }
                Err(SessionError::Refused(
                    AdmissionError::NoRoom { .. } | AdmissionError::Field { field: "max_tokens", .. },
                )) if self.said.len() > self.beginning.len() => {
                    let first = self.beginning.len();
                    self.said.drain(first..self.said.len().min(first + 2));
                    left_out += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn request(&self, question: &ChatMessage) -> GenerateRequest {
        let (prompt, messages) = match self.chat {
            true => (None, self.said.iter().chain([question]).cloned().collect()),
            false => (Some(question.content.clone()), Vec::new()),
        };
        GenerateRequest {
            prompt,
            messages,
            max_tokens: self.answer.max_tokens,
            sampling: Some(self.answer.sampling()),
            stop: self.answer.stop.clone(),
            stop_token_ids: self.answer.stop_token_ids.clone(),
            min_tokens: self.answer.min_tokens,
            ignore_eos: self.answer.ignore_eos,
            model_defaults: self.answer.model_defaults,
            ..self.asked.clone()
        }
    }
}

fn says(role: &str, content: String) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content, ..ChatMessage::default() }
}

/// Lines of standard input, without their ends. Reading blocks, so a thread of its own does it.
fn lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, lines) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    lines
}
