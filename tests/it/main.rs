//! Whole-system tests: real workers, real coordinators, real ports; in one process or in many.

mod bounds;
mod chats;
mod circles;
mod cluster;
mod dashboards;
mod deployment;
mod door;
mod drafts;
mod encoders;
mod etcd;
mod examples;
mod faults;
mod foreign_client;
#[cfg(feature = "cuda")]
mod gguf;
mod gpu;
mod hub;
mod kernels;
mod leaders;
mod lifecycle;
mod loading;
mod map;
mod operators;
mod parity;
mod parts;
mod processes;
mod proxy;
mod pull;
mod random_models;
mod replicas;
mod run;
mod secrets;
mod serving;
mod session;
mod silence;
#[cfg(feature = "cuda")]
mod start;
mod usage;
mod weights;
