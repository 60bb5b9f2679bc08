//! A client of containerd's shim protocol, version 2 (`runtime-v2.md` of containerd): what starts a shim ([`Program`]), the
//! calls to it ([`Client`], [`Task`], [`Sandbox`]), and what it tells by itself ([`events`]).
//!
//! The messages are those of the published crates; the calls go over a connection of our own ([`wire`]). The client of
//! the `ttrpc` crate has two threads, one of which wakes up a hundred times a second for as long as it is
//! connected. What calls from here are a keeper, which has one connection for as long as its pod lives, and processes
//! that it has forked, neither of which may have threads.

#![forbid(unsafe_code)]

mod client;
mod error;
pub mod events;
mod options;
mod program;
mod sandbox;
mod task;
pub mod wire;

pub use client::{Client, connect};
pub use error::ShimError;
pub use options::{Defaults, Options, OptionsError};
pub use program::{Address, Program, Version};
pub use sandbox::{CreateSandbox, Sandbox, send_wait_sandbox};
pub use task::{Create, Exec, Exit, Memory, Metrics, Process, Task, wait_answer};

/// A mount in the protocol's form.
pub use containerd_shim_protos::types::mount::Mount;
