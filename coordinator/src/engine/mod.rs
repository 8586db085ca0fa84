//! What runs requests: one loop that owns the replicas of the model and every request in progress.

mod answer;
mod budget;
mod error;
mod event_loop;
mod messages;
mod replica;
mod snapshot;

pub use error::EngineError;
pub(crate) use event_loop::Engine;
pub use messages::{Asked, EngineHandle, Event, Notice, Observer, Reply, Submission};
pub use snapshot::Snapshot;
