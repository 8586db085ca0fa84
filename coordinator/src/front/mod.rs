//! What clients see: [`session`], and adapters from a protocol to it, a folder for each protocol.

pub mod grpc;
pub mod session;
