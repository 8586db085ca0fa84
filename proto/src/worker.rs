//! The calls a coordinator makes on a worker, whether it is in this process or behind gRPC.

use std::collections::BTreeMap;

use tokio::sync::mpsc;
use tonic::{Status, async_trait};

use crate::v1;

/// File name to content, for the small files that travel with a model.
pub type Files = BTreeMap<String, Vec<u8>>;

/// Progress of a load; the last message has `resident_bytes`. Ends after it, or after an error.
pub type Progress = mpsc::Receiver<Result<v1::LoadProgress, Status>>;

/// A side of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where its activations come from.
    Upstream,
    /// Where they go.
    Downstream,
}

/// A running stage: a pair of message channels. Dropping `to` ends the incarnation.
#[derive(Debug)]
pub struct StageChannel {
    /// Steps, in order.
    pub to: mpsc::Sender<v1::ToStage>,
    /// What the stage says. Closes when the stage's run is over.
    pub from: mpsc::Receiver<v1::FromStage>,
}

/// A worker as the coordinator sees it. `strata.v1.Stage` in `stage.proto` documents each call.
#[async_trait]
pub trait Worker: Send + Sync {
    /// Devices, and the profile of the named model.
    async fn describe(&self, request: v1::DescribeRequest) -> Result<v1::Described, Status>;
    /// The model's tokenizer files.
    async fn read_tokenizer(&self, request: v1::ReadTokenizerRequest) -> Result<Files, Status>;
    /// Makes weights resident.
    async fn load(&self, request: v1::LoadRequest) -> Result<Progress, Status>;
    /// Allocates cache and workspace.
    async fn prepare(&self, request: v1::PrepareRequest) -> Result<v1::Prepared, Status>;
    /// Brings links up.
    async fn connect(&self, request: v1::ConnectRequest) -> Result<(), Status>;
    /// Starts running steps.
    async fn run(&self, open: v1::Open) -> Result<StageChannel, Status>;
    /// Ends an incarnation.
    async fn abort(&self, request: v1::AbortRequest) -> Result<(), Status>;
}
