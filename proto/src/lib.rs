//! What a coordinator and its workers must agree on: messages, ids, plans, profiles and error codes.
//!
//! No IO and no tensors. The `.proto` files under `strata/v1` are the documentation of the wire; the types
//! here are the validated forms that the planner and the scheduler compute with.

mod device;
mod dtype;
pub mod error;
mod fence;
mod plan;
mod profile;
pub mod sampling;
mod state;
mod worker;

pub use device::{Device, DeviceKind, Library, Rate, rate_at};
pub use dtype::{DType, Format, Quantization};
pub use plan::{Forecast, LayerRange, LinkChoice, LinkKind, MapDevice, Offload, Plan, Replica, StagePlan};
pub use profile::{Experts, FormatBytes, ModelProfile, Module};
pub use state::{LayerState, Stack, StateBytes, StateKind, StateRoom};
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

/// Largest list of headers that servers and clients take, in bytes, as HTTP/2 counts them.
pub const MAX_HEADER_LIST: u32 = 64 << 10;

/// Version of the coordinator-worker protocol that this build speaks.
pub const PROTOCOL: u32 = 1;

/// Token positions in one block of KV memory.
pub const BLOCK_TOKENS: u32 = 16;

/// Port of the client API unless told otherwise, shared by server and clients.
pub const DEFAULT_PORT: u16 = 7717;

/// Largest message of the internal service, in bytes: a step with its token ids, or one row of logits.
pub const MAX_STAGE_MESSAGE: usize = 64 << 20;
