//! The workers: who is there, what they have, and the pipelines over them.

mod call;
pub mod discovery;
mod error;
pub mod leadership;
pub(crate) mod left_out;
mod links;
pub mod membership;
pub mod pipeline;
mod remote;
mod weights;

pub use error::PipelineError;
pub use remote::RemoteWorker;
pub use weights::{WeightDifference, WeightRecord};
