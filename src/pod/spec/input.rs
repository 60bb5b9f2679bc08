//! What goes in.

use crate::{HostFacts, Sources, SpecOptions};
use slipway_proto::{cri, keeper};
use std::path::PathBuf;

/// All that a container's specification depends on.
#[derive(Debug, Clone, Copy)]
pub struct ContainerInput<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The pod's id.
    pub pod_id: &'a str,
    /// The configuration that the pod was made from.
    pub sandbox_config: &'a cri::PodSandboxConfig,
    /// The pod's namespaces, as its keeper made them.
    pub namespaces: &'a keeper::SetupSandboxResult,
    /// The SELinux level of the pod's containers, where SELinux is on.
    pub selinux_level: Option<&'a str>,
    /// The request.
    pub config: &'a cri::ContainerConfig,
    /// The image's execution parameters.
    pub image: &'a oci_spec::image::Config,
    /// The image as the request named it, for an annotation.
    pub image_name: &'a str,
    /// Directory of the container under the pod's run directory; `root.path` is its `rootfs`.
    pub container_dir: &'a std::path::Path,
    /// Files of the pod that every container gets.
    pub files: &'a PodFiles,
    /// What [`crate::survey`] found on the host for this configuration.
    pub sources: &'a Sources,
    /// The node's settings.
    pub options: &'a SpecOptions,
    /// What the host can do.
    pub host: &'a HostFacts,
}

/// Files of the pod that every container gets, unless a mount of its own covers them.
#[derive(Debug, Clone, Default)]
pub struct PodFiles {
    /// For `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// For `/etc/hosts`.
    pub hosts: Option<PathBuf>,
    /// For `/etc/hostname`.
    pub hostname: Option<PathBuf>,
    /// The pod's shared memory, for `/dev/shm`; not used when the pod has the host's IPC namespace.
    pub shm: Option<PathBuf>,
}
