//! What goes in and out of the engine.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use strata_proto::{
    Plan,
    error::{Classify, Kind},
    v1::{self, Fence, generate_event},
};
use tokio::sync::{mpsc, watch};

use crate::{
    cluster::{
        PipelineError,
        membership::MemberEvent,
        pipeline::{LoadUpdate, Pipeline, PipelineEvent},
    },
    preflight::Finding,
    request::{Permit, encode::CheckedInput, generate::Checked},
    scheduler::SequenceId,
};

/// Why an accepted or waiting request ended without an answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// The scheduler has no room.
    #[error("{message}")]
    Refused {
        /// What was wrong.
        message: String,
        /// What it means to the caller.
        kind: Kind,
    },
    /// The caller's deadline passed.
    #[error("the deadline passed after {tokens} tokens")]
    Deadline {
        /// Tokens generated until then.
        tokens: u32,
    },
    /// No pipeline came back in time.
    #[error("no pipeline is serving: {0}; try again later")]
    NoPipeline(String),
    /// The batch of this request failed again and again, even alone.
    #[error("this request failed in the model three times and was given up; the server's log has the reason")]
    Poisoned,
    /// A defect of ours.
    #[error("internal error; the server's log has the reason")]
    Internal,
    /// The coordinator is going down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl Classify for EngineError {
    fn kind(&self) -> Kind {
        match self {
            EngineError::Refused { kind, .. } => *kind,
            EngineError::Deadline { .. } => Kind::Deadline,
            EngineError::NoPipeline(_) | EngineError::ShuttingDown => Kind::NoCapacity,
            EngineError::Poisoned | EngineError::Internal => Kind::Internal,
        }
    }
}

/// One message of an answer. The channel's memory is bounded by the context length, so a client that does not
/// read cannot hold up the engine.
#[derive(Debug)]
pub enum Reply {
    /// The request is in; cancel it by this id.
    Accepted(SequenceId),
    /// Something to send on.
    Event(generate_event::Event),
    /// What the model's head yields of an input: a vector, or the logits of classes. The last message.
    Vector(Vec<f32>),
    /// Candidates for each mask of an input. The last message.
    Guesses(Vec<Vec<v1::Alternative>>),
    /// The answer is over without a finish.
    Failed(EngineError),
}

/// What is asked of the engine.
#[derive(Debug)]
pub enum Asked {
    /// To continue a prompt.
    Generate(Box<Checked>),
    /// To encode an input, until a deadline from arrival.
    Encode(CheckedInput, Option<Duration>),
}

/// A checked request on its way to the engine.
#[derive(Debug)]
pub struct Submission {
    /// The request.
    pub request: Asked,
    /// When it arrived.
    pub arrived: Instant,
    /// Where its answer goes.
    pub reply: mpsc::UnboundedSender<Reply>,
    /// Its place at the gate.
    pub permit: Permit,
}

/// Everything the engine reacts to.
#[derive(Debug)]
pub enum Event {
    /// A new request.
    Submit(Box<Submission>),
    /// A client went away.
    Cancel(SequenceId),
    /// A pipeline of this generation has news.
    Pipeline(u64, PipelineEvent),
    /// The pipeline of this generation is about to be loaded.
    Planned(u64, Arc<Plan>),
    /// The attempt to bring the pipeline of this generation up ended.
    BroughtUp(u64, Box<Result<Pipeline, PipelineError>>),
    /// Membership changed.
    Member(MemberEvent),
}

/// What the engine shows of itself.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// A pipeline is up.
    pub ready: bool,
    /// Why not.
    pub reason: String,
    /// The live plan, or the last one.
    pub plan: Option<Arc<Plan>>,
    /// The live incarnation, or the last one.
    pub fence: Fence,
    /// Positions that the largest cache of a pipeline holds; 0 while there is none.
    pub capacity: u64,
    /// Counters and gauges, of all pipelines together.
    pub load: v1::Load,
    /// Names of the members.
    pub members: Vec<String>,
}

/// Told about what happens while a deployment comes up.
pub type Observer = Arc<dyn Fn(Notice) + Send + Sync>;

/// Something a person waiting for the server wants to see.
#[derive(Debug)]
pub enum Notice {
    /// Still waiting for workers: how many of how many have joined.
    Waiting(usize, usize),
    /// This plan is about to be loaded.
    Planned(Arc<Plan>),
    /// A stage reads its weights.
    Loading(LoadUpdate),
    /// What the checks before serving found.
    Checked(Vec<Finding>),
}

/// Way to a running engine.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    /// Where events go. Unbounded: requests are bounded by the gate, stage messages by the steps in flight.
    pub events: mpsc::UnboundedSender<Event>,
    /// What the engine shows of itself.
    pub snapshot: watch::Receiver<Snapshot>,
}
