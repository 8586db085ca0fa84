//! What nodes say to each other.

use std::fmt;

use strata_proto::{Files, v1};
use tokio::sync::mpsc;
use tonic::Status;

use super::stage::Activation;

/// A process, or the store that coordinators elect each other by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    Coordinator(usize),
    Worker(usize),
    Store,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Node::Coordinator(at) => write!(f, "c{at}"),
            Node::Worker(at) => write!(f, "w{at}"),
            Node::Store => f.write_str("store"),
        }
    }
}

/// One run of a coordinator's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId {
    pub coordinator: usize,
    pub boot: u64,
}

impl ProcessId {
    pub fn node(self) -> Node {
        Node::Coordinator(self.coordinator)
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{}.{}", self.coordinator, self.boot)
    }
}

/// What a coordinator asks.
#[derive(Debug)]
pub enum Request {
    Describe(v1::DescribeRequest),
    ReadTokenizer,
    Load(v1::LoadRequest),
    Prepare(v1::PrepareRequest),
    Connect(v1::ConnectRequest),
    Run(v1::Open),
    Abort(v1::AbortRequest),
    /// Of the store: to lead when it is its turn, above the term that workers follow, and not while they hear whoever has it.
    Stand {
        followed: u64,
        is_heard: bool,
    },
}

/// What it is told.
#[derive(Debug)]
pub enum Answer {
    Described(Box<v1::Described>),
    Files(Files),
    Loaded(v1::LoadProgress),
    Prepared(v1::Prepared),
    Running {
        stream: u64,
        said: mpsc::Receiver<v1::FromStage>,
    },
    /// It leads by this term, or somebody else does.
    Stands(Option<u64>),
    Done,
}

/// Between two stages.
#[derive(Debug)]
pub enum Signal {
    Hello,
    Welcome,
    Alive,
    Activation(Activation),
    Closed,
}

/// What travels.
#[derive(Debug)]
pub enum Letter {
    Call {
        id: u64,
        by: ProcessId,
        request: Request,
    },
    Answer {
        id: u64,
        answer: Result<Answer, Status>,
    },
    /// To a running stage.
    Order {
        stream: u64,
        order: v1::ToStage,
    },
    Close {
        stream: u64,
    },
    /// Of a running stage.
    Said {
        stream: u64,
        said: v1::FromStage,
    },
    Ended {
        stream: u64,
    },
    /// On the link of this token, with the stream of activations or against it.
    Link {
        token: Vec<u8>,
        downwards: bool,
        signal: Signal,
    },
}
