//! What runs requests: one loop that owns the replicas of the model and every request in progress.

mod answer;
mod budget;
mod change;
mod claims;
mod error;
mod event_loop;
mod messages;
mod replica;
mod replies;
mod series;
mod snapshot;

pub(crate) use change::Change;
pub use change::ChangeError;
pub(crate) use claims::Claims;
pub use error::EngineError;
pub(crate) use event_loop::{Ended, Engine, Running, Start};
pub(crate) use messages::{Asked, Event, Submission};
pub use messages::{Notice, Observer};
pub(crate) use replies::{Replies, Reply, Unread, replies};
pub(crate) use series::{OfStage, Series};
pub(crate) use snapshot::counters;
pub use snapshot::{Loading, Snapshot, State};
