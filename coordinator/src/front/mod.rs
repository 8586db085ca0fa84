//! What clients see: adapters from a protocol to requests and back, a folder for each protocol.

pub mod grpc;
