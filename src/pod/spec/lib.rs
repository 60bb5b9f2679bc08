//! CRI pod and container configurations, checked and translated to the OCI runtime specification.
//!
//! Pure, but for [`survey`] and [`HostFacts::detect`]: the same input gives the same plan.
//!
//! ```text
//! PodSandboxConfig ─ sandbox ─► SandboxPlan (for the keeper, CNI, the log directory)
//! ContainerConfig ── survey ──► Sources ─┐
//! image config, pod's namespaces ────────┴─ container ─► ContainerPlan (OCI spec, seccomp choice, …)
//! what NRI plugins wish ────────────────── adjust ─────► the same
//! ```
#![forbid(unsafe_code)]

mod adjust;
mod apparmor;
mod capabilities;
mod cgroup;
mod container;
mod devices;
mod error;
mod hidden;
mod host;
mod hugepages;
mod input;
mod logpath;
mod mounts;
mod namespaces;
mod options;
mod paths;
mod plan;
mod process;
mod resize;
mod resources;
mod sandbox;
mod seccomp;
mod selinux;
mod signal;
mod sources;
mod sysctl;
mod userns;

#[cfg(test)]
mod tests;

pub use adjust::{adjust, limits_of};
pub use apparmor::AppArmor;
pub use cgroup::{CgroupDriver, default_cgroups};
pub use container::container;
pub use error::{SpecError, SpecErrorKind};
pub use host::HostFacts;
pub use input::{ContainerInput, PodFiles};
pub use options::SpecOptions;
pub use plan::{ContainerPlan, PortMapping, SandboxPlan, SeccompChoice};
pub use resize::{Resize, resize};
pub use sandbox::sandbox;
pub use selinux::{Labels, NoSelinux, Selinux, check_labels, level_of_pod};
pub use sources::{HostDevice, MountSource, Propagation, Sources, survey};
