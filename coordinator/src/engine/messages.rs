//! What goes in and out of the engine.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use strata_proto::{
    Plan,
    v1::{self, generate_event},
};
use tokio::sync::mpsc;

use super::error::EngineError;
use crate::{
    cluster::{
        PipelineError,
        discovery::Planned,
        membership::MemberEvent,
        pipeline::{LoadUpdate, Pipeline, PipelineEvent},
    },
    preflight::Finding,
    request::{encode::CheckedInput, generate::Checked},
    scheduler::SequenceId,
};

/// One message of an answer. The channel's memory is bounded by the context length, so a client that does not
/// read cannot hold up the engine.
#[derive(Debug)]
pub(crate) enum Reply {
    /// The request is in; cancel it by this id.
    Accepted(SequenceId),
    /// Its first tokens went to a pipeline at this time.
    Begun(Instant),
    /// Something to send on.
    Event(generate_event::Event),
    /// What the model's head yields of an input: a vector, or the logits of classes. The last message.
    Vector(Vec<f32>),
    /// Candidates for each mask of an input. The last message.
    Guesses(Vec<Vec<v1::Alternative>>),
    /// The answer is over without a finish.
    Failed(EngineError),
}

impl Reply {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        match self {
            Reply::Accepted(_) | Reply::Begun(_) => false,
            Reply::Event(event) => matches!(event, generate_event::Event::Finished(_)),
            Reply::Vector(_) | Reply::Guesses(_) | Reply::Failed(_) => true,
        }
    }
}

/// What is asked of the engine.
#[derive(Debug)]
pub(crate) enum Asked {
    /// To continue a prompt.
    Generate(Box<Checked>),
    /// To encode an input, until a deadline from arrival.
    Encode(CheckedInput, Option<Duration>),
}

/// A checked request on its way to the engine.
#[derive(Debug)]
pub(crate) struct Submission {
    /// The request.
    pub request: Asked,
    /// Which of its tenant's connections it came by.
    pub connection: u64,
    /// When it arrived.
    pub arrived: Instant,
    /// Where its answer goes.
    pub reply: mpsc::UnboundedSender<Reply>,
}

/// Everything the engine reacts to.
#[derive(Debug)]
pub(crate) enum Event {
    /// A new request.
    Submit(Box<Submission>),
    /// A client went away.
    Cancel(SequenceId),
    /// A pipeline of this incarnation has news.
    Pipeline(u64, PipelineEvent),
    /// The pipeline of this incarnation is about to be loaded.
    Planned(u64, Planned),
    /// It loads.
    Loading(u64, LoadUpdate),
    /// The attempt to bring the pipeline of this incarnation up ended.
    BroughtUp(u64, Box<Result<Pipeline, PipelineError>>),
    /// Membership changed.
    Member(MemberEvent),
    /// The coordinator leads no more, for this reason.
    Depose(String),
}

/// Told about what happens while a deployment comes up.
pub type Observer = Arc<dyn Fn(Notice) + Send + Sync>;

/// Something a person waiting for the server wants to see.
#[derive(Debug)]
pub enum Notice {
    /// It stands by, for this reason.
    StandingBy(String),
    /// Still waiting for workers: how many of how many have joined.
    Waiting(usize, usize),
    /// This plan is about to be loaded.
    Planned(Arc<Plan>),
    /// A stage reads its weights.
    Loading(LoadUpdate),
    /// What the checks before serving found.
    Checked(Vec<Finding>),
}
