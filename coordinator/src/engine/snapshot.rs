//! What the engine shows of itself.

use std::sync::Arc;

use strata_proto::{
    Plan,
    v1::{self, Fence},
};

/// The engine as it was after the last event.
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
