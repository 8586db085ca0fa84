//! The stage engine: loads the layer range it is told, runs steps, sends activations on.
//!
//! It knows no cluster: a coordinator drives it through [`strata_proto::Worker`], in this process ([`LocalWorker`],
//! made from a [`WorkerConfig`]) or over gRPC ([`grpc`]). Who wants one layer range without a cluster, as the
//! benchmarks do, has [`model`], [`engine`] and [`kernels`].
//!
//! ```
//! use strata_proto::{ModelProfile, Worker, v1::DescribeRequest};
//! use strata_worker::{LocalWorker, Models, WorkerConfig};
//!
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/shakespeare").into();
//! let models = Models::One { name: "shakespeare".into(), directory };
//! let worker = LocalWorker::start(WorkerConfig::new(models)).unwrap();
//! let asked = DescribeRequest { model: "shakespeare".into(), ..DescribeRequest::default() };
//! let described = worker.describe(asked).await.unwrap();
//! assert!(described.devices.iter().any(|device| device.id == "cpu"));
//! let profile = ModelProfile::try_from(described.profile.unwrap()).unwrap();
//! assert_eq!((profile.layers.len(), profile.vocab_size), (6, 2048));
//! # });
//! ```

pub mod device;
pub mod engine;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod grpc;
mod health;
mod incarnation;
mod interrupt;
pub mod kernels;
mod meter;
pub mod model;
mod operators;
mod sampler;
mod service;
mod sparing;
mod stage;
mod transport;
mod verify;
mod weights;

pub use engine::measure;
pub use error::WorkerError;
pub use incarnation::StepHook;
pub use service::{LocalWorker, Models, WorkerConfig};
pub use transport::loopback::Hub;
pub use weights::{
    Checkpoint, HubError, HubId, LISTS, describe_file, hub_cache, is_gguf, is_word, wanted, wanted_gguf,
};
