//! The front end and the brain. A [`Coordinator`] is made from a [`CoordinatorConfig`], started over workers, and asked
//! through a [`Session`]; [`front::grpc`] does that for clients.
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//!
//! use strata_coordinator::{Coordinator, CoordinatorConfig, cluster::membership, engine::State};
//! use strata_proto::{
//!     error::{Classify, Kind},
//!     v1::GenerateRequest,
//! };
//!
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! let mut config = CoordinatorConfig::new("llama-3-8b", 2);
//! config.join_timeout = Duration::from_millis(10);
//! // It can be asked from its first moment on, and says what there is to wait for.
//! let coordinator = Coordinator::new(config);
//! assert_eq!(coordinator.watch().borrow().state, State::Standby);
//! let refused = coordinator.session().generate(GenerateRequest::default()).await.unwrap_err();
//! assert_eq!(refused.kind(), Kind::NoCapacity);
//!
//! // Workers come as events; here none does.
//! let members = membership::local(Vec::new());
//! let failed = coordinator.start(members, Arc::new(|notice| println!("{notice:?}"))).await.unwrap_err();
//! assert!(failed.to_string().starts_with("0 of 2 workers answered"));
//! # });
//! ```
//!
//! With workers in the same process, and answers: `deploy/examples`.
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
mod jinja;
mod metrics;
pub mod planner;
pub mod preflight;
mod request;
// For tests/it/drafts.rs, which drives it over real stages.
pub mod scheduler;
#[cfg(test)]
mod simulation;

pub use cluster::RemoteWorker;
pub use config::{ClientLimits, CoordinatorConfig, Deployment, Limits};
pub use coordinator::{AdminError, Applied, Comparison, Coordinator, StartError, discover_members, preview};
pub use engine::EngineError;
pub use front::session::{Generation, Session, SessionError};
pub use request::AdmissionError;
