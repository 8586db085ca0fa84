//! The front end and the brain: what is let in, what runs it, and the workers it runs on.
//!
//! In the order in which they may use one another: `front`, `engine`, [`cluster`], `request`, and the two pure ones,
//! [`scheduler`] and [`planner`]. ARCHITECTURE.md has a line for each file.
//!
//! The coordinator knows no model and no tensors: a model is a [`strata_proto::ModelProfile`] that a worker
//! describes, and a worker is anything with the calls of [`strata_proto::Worker`].

pub mod cluster;
pub mod config;
mod coordinator;
pub mod engine;
pub mod front;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod planner;
pub mod preflight;
mod request;
pub mod scheduler;

pub use cluster::RemoteWorker;
pub use config::{CoordinatorConfig, Deployment, Limits};
pub use coordinator::{Coordinator, StartError, discover_members, preview};
pub use engine::EngineError;
pub use front::session::{Generation, Session, SessionError};
pub use request::AdmissionError;
