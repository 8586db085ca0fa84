//! What a coordinator and its workers must agree on: messages, ids, plans, profiles and error codes.
//!
//! No IO and no tensors. The `.proto` files under `strata/v1` are the documentation of the wire; the types
//! here are the validated forms that the planner and the scheduler compute with.

mod device;
mod dtype;
pub mod error;
mod fence;
mod limits;
mod plan;
mod profile;
pub mod sampling;
mod worker;

pub use device::{Device, DeviceKind, Library, Rate, rate_at};
pub use dtype::{DType, Format, Quantization};
pub use limits::{
    BLOCK_TOKENS, LINK_TOKEN_BYTES, MAX_HEADER_LIST, MAX_MODEL_FILES, MAX_STAGE_MESSAGE, NCCL_ID_BYTES,
    PING_EVERY, PING_TIMEOUT,
};
pub use plan::{Forecast, LayerRange, LinkChoice, LinkKind, MapDevice, Offload, Plan, Replica, StagePlan};
pub use profile::{Experts, FormatBytes, ModelProfile, Module};
pub use worker::{Files, Progress, StageChannel, Worker};

/// Generated messages and services of `strata.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("strata.v1");
}

/// The compiled descriptors of what clients call, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// What clients call: each service, with its methods.
pub const METHODS: &[(&str, &[&str])] = include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// Version of the coordinator-worker protocol that this build speaks.
pub const PROTOCOL: u32 = 1;

/// Port of the client API unless told otherwise, shared by server and clients.
pub const DEFAULT_PORT: u16 = 7717;
