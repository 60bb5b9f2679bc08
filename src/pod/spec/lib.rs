//! CRI pod and container configurations, checked and translated to the OCI runtime specification.
//!
//! Pure, but for [`survey`] and [`HostFacts::detect`]: the same input gives the same plan.
//!
//! ```text
//! PodSandboxConfig ─ sandbox ─► SandboxPlan (for the keeper, CNI, the log directory)
//! ContainerConfig ── survey ──► Sources ─┐
//! image config, pod's namespaces ────────┴─ container ─► ContainerPlan (OCI spec, seccomp choice, …)
//! ```
#![forbid(unsafe_code)]

mod error;
mod host;
mod input;
mod mounts;
mod options;
mod paths;
mod plan;
mod seccomp;
mod sources;

pub use error::{SpecError, SpecErrorKind};
pub use host::HostFacts;
pub use input::{ContainerInput, PodFiles};
pub use options::SpecOptions;
pub use plan::{ContainerPlan, PortMapping, SandboxPlan, SeccompChoice};
pub use sources::{HostDevice, MountSource, Propagation, Sources, survey};

use slipway_proto::cri;

/// Checks a pod's configuration and says what its keeper has to make.
///
/// # Errors
/// [`SpecError`] naming the field.
pub fn sandbox(
    _config: &cri::PodSandboxConfig,
    _id: &str,
    _options: &SpecOptions,
    _host: &HostFacts,
) -> Result<SandboxPlan, SpecError> {
    Err(SpecError::unsupported("config", "not written yet"))
}

/// Checks a container's configuration and translates it.
///
/// # Errors
/// [`SpecError`] naming the field.
pub fn container(_input: &ContainerInput<'_>) -> Result<ContainerPlan, SpecError> {
    Err(SpecError::unsupported("config", "not written yet"))
}
