//! Slipway's daemon: pods and containers for the kubelet.
//!
//! ```text
//! cri (gRPC in and out) ─► pod (life cycle, records, recovery) ─► slipway-runtime's client ─► keepers
//!                              ├─► slipway-image    what containers are made of
//!                              ├─► slipway-network  CNI, DNS files
//!                              └─► slipway-spec, slipway-seccomp  what confines them
//! ```
#![deny(unsafe_code)]

pub mod admin;
mod apparmor;
pub mod cri;
mod grpc;
pub mod logging;
mod memory;
pub mod pod;
mod run_root;
pub mod serve;

/// Slipway's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
