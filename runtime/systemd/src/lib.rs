//! Cgroups by asking systemd for them: transient scopes and slices.
//!
//! On a host whose PID 1 is systemd the cgroup tree is systemd's, and a manager that makes cgroups beside
//! it must expect them to be rearranged. Who asks gets a *scope* (a unit around processes that exist
//! already) that is delegated: systemd leaves alone what is below it.
//!
//! Everything here blocks, has a deadline, and starts no thread: it is called by short-lived forks of the
//! keeper, which go on to call libcontainer, and that must never happen in a threaded process.
#![forbid(unsafe_code)]

mod connection;
mod error;
mod message;
mod names;
mod systemd;

pub use error::SystemdError;
pub use message::Value;
pub use names::{expand_slice, is_slice, unit_of};
pub use systemd::{Scope, Systemd, booted};
