//! What this runtime can do (features.md), on this machine where that depends on it.

use std::collections::BTreeSet;
use std::fs;

use libcontainer::syscall::linux::MountOption;
use slipway_runtime::cgroup::Hierarchies;

use crate::record::OCI_VERSION;
use crate::{OciError, Result, bundle, print};

/// Options that hold for whole trees, in libcontainer's words; `idmap` and `ridmap` are ours.
const RECURSIVE: [&str; 20] = [
    "idmap",
    "ratime",
    "rdev",
    "rdiratime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "rrelatime",
    "rro",
    "rrw",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
];

/// Prints the features.
///
/// # Errors
/// When cgroups can't be looked at.
pub fn print_features() -> Result<()> {
    let cgroups = Hierarchies::detect().map_err(OciError::file("read", "/proc/self/mountinfo"))?;
    let text = serde_json::to_string_pretty(&features(&cgroups));
    let text = text.map_err(|e| OciError::system("write JSON")(std::io::Error::from(e)))?;
    print(&format!("{text}\n"))
}

fn features(cgroups: &Hierarchies) -> serde_json::Value {
    let mut options: BTreeSet<String> = MountOption::known_options().into_iter().collect();
    options.extend(RECURSIVE.map(str::to_owned));
    let names = |path: &str| -> Vec<String> {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    };
    let actions = names("/proc/sys/kernel/seccomp/actions_avail");
    let actions: Vec<&str> = [
        ("kill_thread", "SCMP_ACT_KILL"),
        ("kill_process", "SCMP_ACT_KILL_PROCESS"),
        ("kill_thread", "SCMP_ACT_KILL_THREAD"),
        ("trap", "SCMP_ACT_TRAP"),
        ("errno", "SCMP_ACT_ERRNO"),
        ("trace", "SCMP_ACT_TRACE"),
        ("log", "SCMP_ACT_LOG"),
        ("user_notif", "SCMP_ACT_NOTIFY"),
        ("allow", "SCMP_ACT_ALLOW"),
    ]
    .into_iter()
    .filter_map(|(kernel, name)| actions.iter().any(|a| a == kernel).then_some(name))
    .collect();
    let systemd = cgroups.unified() && slipway_systemd::booted();
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": options,
        "linux": {
            "namespaces": namespaces(),
            "capabilities": capabilities(),
            "cgroup": {
                "v1": !cgroups.unified() && !cgroups.is_empty(),
                "v2": cgroups.unified(),
                "systemd": systemd,
                "systemdUser": false,
                "rdma": false,
            },
            "seccomp": {
                "enabled": !actions.is_empty(),
                "actions": actions,
                "operators": [
                    "SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT",
                    "SCMP_CMP_MASKED_EQ",
                ],
                "archs": archs(),
            },
            "apparmor": {"enabled": bundle::apparmor()},
            "selinux": {"enabled": bundle::selinux()},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
        "annotations": {
            "slipway.version": env!("CARGO_PKG_VERSION"),
        },
    })
}

/// Those that this kernel has.
fn namespaces() -> Vec<&'static str> {
    [
        ("cgroup", "cgroup"),
        ("ipc", "ipc"),
        ("mnt", "mount"),
        ("net", "network"),
        ("pid", "pid"),
        ("time", "time"),
        ("user", "user"),
        ("uts", "uts"),
    ]
    .into_iter()
    .filter_map(|(file, name)| {
        let there = fs::symlink_metadata(format!("/proc/self/ns/{file}")).is_ok();
        there.then_some(name)
    })
    .collect()
}

/// Those that both the specification and this kernel know.
fn capabilities() -> Vec<String> {
    let last = fs::read_to_string("/proc/sys/kernel/cap_last_cap");
    let last: u8 = last.ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0);
    let known = slipway_runtime::confine::capabilities();
    let known = known.into_iter().filter(|(number, _)| *number <= last);
    known.map(|(_, name)| name).collect()
}

fn archs() -> &'static [&'static str] {
    match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_of_the_specifications_form() {
        let features = features(&Hierarchies::detect().unwrap());
        let parsed: oci_spec::runtime::Features = serde_json::from_value(features).unwrap();
        let linux = parsed.linux().clone().unwrap();
        assert!(
            linux
                .capabilities()
                .as_ref()
                .unwrap()
                .contains(&"CAP_SYS_ADMIN".to_owned())
        );
        assert!(linux.namespaces().as_ref().unwrap().len() >= 7);
        let options = parsed.mount_options().clone().unwrap();
        assert!(options.contains(&"rro".to_owned()) && options.contains(&"bind".to_owned()));
    }
}
