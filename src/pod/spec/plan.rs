//! What comes out: everything that is decided about a pod or a container before anything is made.

use oci_spec::runtime::{Capabilities, Spec};
use slipway_proto::{cri, keeper};
use std::net::IpAddr;
use std::path::PathBuf;

/// A pod, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxPlan {
    /// For the keeper: namespaces, host name, sysctls, cgroup, shared memory.
    pub setup: keeper::SetupSandbox,
    /// The pod lives in the host's network; CNI has nothing to do.
    pub host_network: bool,
    /// For CNI's `portMappings` capability; those with a host port only.
    pub port_mappings: Vec<PortMapping>,
    /// Where the containers' logs go; absolute. `None`: their output is discarded.
    pub log_directory: Option<PathBuf>,
    /// What the pod calls itself: its `hostname`, or the host's.
    pub hostname: String,
    /// Whether containers of this pod may be privileged.
    pub privileged: bool,
    /// What was cut or passed over, for the log.
    pub warnings: Vec<String>,
}

/// A port of the pod that the host forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortMapping {
    /// Transport.
    pub protocol: cri::Protocol,
    /// Port in the pod.
    pub container_port: u16,
    /// Port of the host.
    pub host_port: u16,
    /// Address of the host; `None`: all.
    pub host_ip: Option<IpAddr>,
}

/// A container, checked and translated.
#[derive(Debug, Clone)]
pub struct ContainerPlan {
    /// For the keeper; `overlay` and `seccomp` are left to the caller. `spec` is [`Self::spec`] as JSON.
    pub create: keeper::CreateContainer,
    /// The OCI specification. `linux.seccomp` is absent: see [`Self::seccomp`]. `process.capabilities`,
    /// `process.noNewPrivileges`, `process.apparmorProfile` and the labels say what shall hold.
    pub spec: Spec,
    /// Sources of mounts that are to get `linux.mountLabel`.
    pub relabel: Vec<PathBuf>,
    /// The filter to compile.
    pub seccomp: SeccompChoice,
    /// The container's bounding set, on which a seccomp profile's conditions depend.
    pub bounding: Capabilities,
    /// Number of the signal that asks the container to stop.
    pub stop_signal: i32,
    /// For `ContainerStatus.resources`: what is in force.
    pub resources: cri::LinuxContainerResources,
    /// For `ContainerStatus.mounts`: the mounts that the request named.
    pub mounts: Vec<cri::Mount>,
    /// The log file; `None`: output is discarded.
    pub log_path: Option<PathBuf>,
    /// What was cut or passed over, for the log.
    pub warnings: Vec<String>,
}

/// The seccomp filter of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeccompChoice {
    /// None.
    Unconfined,
    /// The runtime's own profile.
    RuntimeDefault,
    /// A profile of the node's.
    Localhost {
        /// Its file, for messages.
        path: PathBuf,
        /// The file's content.
        json: Vec<u8>,
    },
}
