//! What a coordinator and its workers must agree on: messages ([`v1`]), a [`Plan`] over [`Device`]s, a
//! [`ModelProfile`], the calls of a [`Worker`], and the [`error::Kind`]s.
//!
//! No tensors, and no IO but what both do with a connection that comes to their [`port`]. The `.proto` files under
//! `strata/v1` are the documentation of the wire; the types here are the validated forms that the planner and the
//! scheduler compute with.
//!
//! ```
//! use strata_proto::{DType, Device, LayerRange, error::{Classify, Kind, status}, v1};
//!
//! // What comes over the wire is checked once, where it comes in.
//! let device = v1::Device { id: "cpu".into(), kind: v1::DeviceKind::Cpu as i32, ..v1::Device::default() };
//! assert!(Device::try_from(v1::Device { bytes_per_second: f64::NAN, ..device }).is_err());
//! assert_eq!("bf16".parse(), Ok(DType::BF16));
//! assert_eq!(LayerRange::new(0, 12).to_string(), "0..12");
//!
//! // An error says what it means to the caller; one place makes a gRPC code of that.
//! struct TooLong;
//! impl std::fmt::Display for TooLong {
//!     fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
//!         f.write_str("prompt: 9 tokens are too many: at most 8")
//!     }
//! }
//! impl Classify for TooLong {
//!     fn kind(&self) -> Kind {
//!         Kind::BadInput
//!     }
//! }
//! assert_eq!(status(&TooLong).code(), tonic::Code::InvalidArgument);
//! ```

mod address;
mod device;
mod digest;
mod dtype;
pub mod error;
mod fence;
mod json;
mod layers;
mod lead;
pub mod limits;
mod plan;
pub mod port;
mod profile;
mod secret;
mod state;
mod worker;

pub use address::http_url;
pub use device::{Device, DeviceKind, Library, Rate, rate_at};
pub use digest::{Digest, ModuleId, WeightDigests, root};
pub use dtype::{DType, Format, Quantization};
pub use json::json;
pub use layers::LayerRange;
pub use lead::Lead;
pub use limits::{
    BLOCK_TOKENS, CLIENT_PING_EVERY, CLIENT_PING_TIMEOUT, LINK_TOKEN_BYTES, MAX_HEADER_LIST, MAX_MODEL_FILES,
    MAX_STAGE_MESSAGE, NCCL_ID_BYTES, PING_EVERY, PING_TIMEOUT,
};
pub use plan::{Forecast, LinkChoice, LinkKind, MapDevice, Offload, Plan, Replica, StagePlan};
pub use profile::{Experts, FormatBytes, ModelProfile, Module};
pub use prost::Message;
pub use secret::{BadSecret, Secret};
pub use state::{LayerState, Stack, StateBytes, StateKind, StateRoom};
pub use worker::{Files, Progress, Side, StageChannel, Worker};

/// Generated messages and services of `strata.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("strata.v1");
}

/// The compiled descriptors of what clients call, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// What clients call: each service, with its methods.
pub const METHODS: &[(&str, &[&str])] = include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// What a coordinator calls on a worker: the service, with its methods.
pub const STAGE_METHODS: &[(&str, &[&str])] = include!(concat!(env!("OUT_DIR"), "/stage_methods.rs"));

/// Version of the coordinator-worker protocol that this build speaks.
pub const PROTOCOL: u32 = 1;

/// Port of the client API unless told otherwise, shared by server and clients.
pub const DEFAULT_PORT: u16 = 7717;
