//! Whole-system tests: real workers, real coordinators, real ports; in one process or in many.

mod cluster;
mod encoders;
mod faults;
mod foreign_client;
mod loading;
mod parity;
mod processes;
mod replicas;
mod serving;
