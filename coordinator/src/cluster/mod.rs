//! The workers: who is there, what they have, and the pipelines over them.

mod blame;
mod call;
pub mod discovery;
mod error;
pub mod etcd;
pub mod leadership;
pub(crate) mod left_out;
mod links;
pub mod membership;
pub mod pipeline;
pub mod records;
pub(crate) mod relocation;
mod remote;
pub(crate) mod standbys;
mod weights;

pub use blame::SilentLinks;
pub use error::PipelineError;
pub use pipeline::History;
pub use remote::RemoteWorker;
pub use weights::{WeightDifference, WeightRecord};
