//! The node's settings, as far as specifications depend on them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::HostFacts;
use crate::cgroup::{CgroupDriver, Rules};

/// The node's settings, as far as specifications depend on them. The daemon fills them from its
/// configuration.
#[derive(Debug, Clone)]
pub struct SpecOptions {
    /// Directory under which `pods/<pod id>` lies.
    pub run_root: PathBuf,
    /// Who makes cgroups.
    pub cgroup_driver: CgroupDriver,
    /// Sysctls of every pod that has the namespace they belong to.
    pub default_sysctls: BTreeMap<String, String>,
    /// Capabilities of a container before it adds and drops its own.
    pub default_capabilities: Vec<String>,
    /// How many processes a container may have; 0: no limit.
    pub pids_limit: u64,
    /// Size of a pod's /dev/shm in bytes.
    pub shm_bytes: u64,
    /// Whether a directory is made where a bind mount's source is missing; otherwise the container is
    /// refused.
    pub create_missing_sources: bool,
    /// The AppArmor profile that RuntimeDefault means, and saying nothing.
    pub apparmor_profile: String,
    /// Replaces the built-in profile for RuntimeDefault.
    pub seccomp_profile: Option<PathBuf>,
    /// Where Localhost profiles with a relative name are looked up.
    pub seccomp_dir: PathBuf,
    /// Whether a privileged container has only the devices that it asks for.
    pub privileged_without_host_devices: bool,
    /// Beginnings of the names of those annotations of the pod that containers get.
    pub allowed_annotations: Vec<String>,
}

impl Default for SpecOptions {
    fn default() -> Self {
        let names = [
            "CHOWN",
            "DAC_OVERRIDE",
            "FSETID",
            "FOWNER",
            "MKNOD",
            "NET_RAW",
            "SETGID",
            "SETUID",
            "SETFCAP",
            "SETPCAP",
            "NET_BIND_SERVICE",
            "SYS_CHROOT",
            "KILL",
            "AUDIT_WRITE",
        ];
        Self {
            run_root: "/run/slipway".into(),
            cgroup_driver: CgroupDriver::default(),
            default_sysctls: BTreeMap::new(),
            default_capabilities: names.map(str::to_owned).to_vec(),
            pids_limit: 0,
            shm_bytes: 64 << 20,
            create_missing_sources: false,
            apparmor_profile: "slipway-default".to_owned(),
            seccomp_profile: None,
            seccomp_dir: "/var/lib/kubelet/seccomp".into(),
            privileged_without_host_devices: false,
            allowed_annotations: Vec::new(),
        }
    }
}

impl SpecOptions {
    pub(crate) fn cgroups(&self, host: &HostFacts) -> Rules {
        Rules {
            driver: self.cgroup_driver,
            systemd: host.systemd,
        }
    }
}
