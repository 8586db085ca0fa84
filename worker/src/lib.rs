//! The stage engine: loads the layer range it is told, runs steps, sends activations on.
//!
//! It knows no cluster: a coordinator drives it through [`strata_proto::Worker`], in this process
//! ([`LocalWorker`]) or over gRPC ([`grpc`]).

pub mod device;
mod engine;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod grpc;
mod incarnation;
mod interrupt;
pub mod kernels;
mod kv_cache;
pub mod model;
pub mod sampler;
mod service;
mod stage;
pub mod transport;
pub mod weights;

pub use engine::measure;
pub use error::WorkerError;
pub use interrupt::Interrupt;
pub use service::{LocalWorker, Models, WorkerConfig};
pub use stage::StepHook;
