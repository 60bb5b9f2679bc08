//! What a container uses, as the kernel tells: cgroup files (v1, hybrid, v2), the interfaces of a network
//! namespace, a writable layer, the processes in a cgroup; and the metrics that are made of these.
//!
//! Everything here reads and nothing changes anything, but for the projects that new layers get. What has disappeared while it was looked at is absent
//! from the answer: a container may end at any time, and that is no failure of a statistic.
//!
//! ```text
//! Layout ── where the controllers are ─► cgroup::Sampler  the few files that every stats call reads
//!                                        cgroup::detail   the rest, for metrics
//! network::read ── one thread that visits the namespaces
//! disk::Ledger ─── asks for the project of a writable layer, or walks it off the caller's path, and remembers
//! quota::Projects  gives layers projects, where the file system counts what each uses
//! Rate ─────────── nanocores from two samples
//! metrics ──────── names, help, labels and values, as cAdvisor has them
//! ```
#![deny(unsafe_code)]

pub mod cgroup;
pub mod disk;
mod file;
mod layout;
pub mod metrics;
pub mod network;
pub mod process;
mod psi;
pub mod quota;
mod rate;

pub use layout::Layout;
pub use psi::{Pressure, Stall};
pub use rate::Rate;

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}
