//! What goes in and out of the engine.

use std::{sync::Arc, time::Duration};

use strata_proto::Plan;
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};

use super::{
    change::{Change, ChangeReply},
    replies::ReplySender,
    snapshot::Snapshot,
};
use crate::{
    cluster::{
        PipelineError,
        discovery::Planned,
        membership::MemberEvent,
        pipeline::{LoadUpdate, Pipeline, PipelineEvent},
        relocation::Target,
        standbys::Standby,
    },
    preflight::Finding,
    request::{encode::CheckedInput, generate::Checked},
    scheduler::SequenceId,
};

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
    pub reply: ReplySender,
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
    /// What runs is to run otherwise; whoever asked is told when it does.
    Change(Change, Option<ChangeReply>),
    /// What the change of this number comes to, once the weights that it needs are where they can be.
    Prepared(u64, Box<Result<Target, PipelineError>>),
    /// The attempt to have standbys ended: those that there are, and which loads failed.
    StoodBy(Vec<Standby>, Vec<PipelineError>),
    /// It shows itself there from now on, and says when it does.
    Show(watch::Sender<Snapshot>, oneshot::Sender<()>),
    /// It ends when nothing is in progress any more.
    Retire,
    /// Devices that another engine had are free.
    Freed,
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
    /// Still waiting for workers: how many have joined, and of how many, if that is known.
    Waiting(usize, Option<usize>),
    /// This plan is about to be loaded.
    Planned(Arc<Plan>),
    /// A stage reads its weights.
    Loading(LoadUpdate),
    /// What the checks before serving found.
    Checked(Vec<Finding>),
}
