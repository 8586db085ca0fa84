//! The front end and the brain: admission, tokenizer, planner, scheduler, pipeline.
//!
//! The coordinator knows no model and no tensors: a model is a [`strata_proto::ModelProfile`] that a worker
//! describes, and a worker is anything with the calls of [`strata_proto::Worker`].

mod answer;
pub mod config;
mod coordinator;
mod engine;
pub mod front;
mod lane;
mod links;
pub mod membership;
pub mod messages;
mod pace;
pub mod pipeline;
pub mod planner;
pub mod preflight;
mod remote;
mod request;
pub mod scheduler;
pub mod survey;

pub use config::{CoordinatorConfig, Deployment, Limits};
pub use coordinator::{Coordinator, StartError, preview, survey_members};
pub use remote::RemoteWorker;
