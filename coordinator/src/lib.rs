//! The front end and the brain: admission, tokenizer, planner, scheduler, pipeline.
//!
//! The coordinator knows no model and no tensors: a model is a [`strata_proto::ModelProfile`] that a worker
//! describes, and a worker is anything with the calls of [`strata_proto::Worker`].

pub mod cluster;
pub mod config;
mod coordinator;
pub mod engine;
pub mod front;
pub mod planner;
pub mod preflight;
mod request;
mod scheduler;

pub use cluster::RemoteWorker;
pub use config::{CoordinatorConfig, Deployment, Limits};
pub use coordinator::{Coordinator, StartError, discover_members, preview};
