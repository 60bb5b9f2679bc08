//! What this process may do: user and capabilities.

use crate::finding::Finding;
use caps::{CapSet, Capability};
use std::collections::HashSet;

const ID: &str = "capabilities";
const WHAT: &str = "capabilities";

/// What the daemon itself can't do without, and for what.
const NEEDED: [(Capability, &str); 12] = [
    (Capability::CAP_SYS_ADMIN, "mounts and namespaces"),
    (Capability::CAP_NET_ADMIN, "pod networks"),
    (Capability::CAP_SETUID, "containers' users"),
    (Capability::CAP_SETGID, "containers' groups"),
    (Capability::CAP_SETPCAP, "dropping capabilities"),
    (Capability::CAP_CHOWN, "owners of images' files"),
    (Capability::CAP_DAC_OVERRIDE, "files of other users"),
    (Capability::CAP_FOWNER, "modes of images' files"),
    (Capability::CAP_MKNOD, "/dev of containers"),
    (Capability::CAP_KILL, "ending containers"),
    (Capability::CAP_SYS_CHROOT, "entering containers"),
    (Capability::CAP_SYS_PTRACE, "exec in containers"),
];

/// Whether this process has user 0.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Whether this process holds a capability in its effective set.
pub(crate) fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

/// Which capabilities the daemon would lack.
pub(crate) fn check() -> Vec<Finding> {
    if !is_root() {
        let found = format!(
            "this is user {}; the daemon runs as root",
            nix::unistd::geteuid()
        );
        return vec![
            Finding::info(ID, WHAT, found)
                .cost("much can't be tried")
                .fix("run slipway check as root, best as the daemon is run"),
        ];
    }
    let Ok(held) = caps::read(None, CapSet::Permitted) else {
        return vec![Finding::info(ID, WHAT, "can't be read")];
    };
    judge(&held, &caps::runtime::thread_all_supported())
}

fn judge(held: &HashSet<Capability>, known: &HashSet<Capability>) -> Vec<Finding> {
    let mut missing: Vec<Capability> = known.difference(held).copied().collect();
    missing.sort_by_key(|c| c.index());
    if missing.is_empty() {
        let found = format!("all {} that the kernel knows", known.len());
        return vec![Finding::ok(ID, WHAT, found)];
    }
    let mut findings = Vec::new();
    let lost: Vec<_> = NEEDED.iter().filter(|(c, _)| missing.contains(c)).collect();
    if !lost.is_empty() {
        let names: Vec<_> = lost.iter().map(|(c, _)| c.to_string()).collect();
        let uses: Vec<_> = lost.iter().map(|(_, purpose)| *purpose).collect();
        findings.push(
            Finding::fail(ID, WHAT, format!("missing: {}", names.join(", ")))
                .cost(format!("the daemon needs them for {}", uses.join(", ")))
                .fix("start it as a full root (systemd: no CapabilityBoundingSet=; container: privileged)"),
        );
    }
    if missing.contains(&Capability::CAP_SYS_RESOURCE) {
        findings.push(
            Finding::warn("cap-sys-resource", WHAT, "missing: CAP_SYS_RESOURCE")
                .cost(
                    "oom_score_adj below the daemon's own, and resource limits above its own, are not set; \
                     guaranteed pods are as likely to be chosen by the OOM killer as others",
                )
                .fix("start the daemon with it, as the systemd unit does on a host of its own"),
        );
    }
    missing.retain(|c| *c != Capability::CAP_SYS_RESOURCE && !NEEDED.iter().any(|(n, _)| n == c));
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(ToString::to_string).collect();
        findings.push(
            Finding::warn(
                "capabilities-to-give",
                WHAT,
                format!("missing: {}", names.join(", ")),
            )
            .cost("no container can have them, not even a privileged one")
            .fix("start the daemon with them"),
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn missing_capabilities_are_judged_by_their_use() {
        let all = caps::all();
        assert_eq!(judge(&all, &all)[0].status, Status::Ok);
        let without = |list: &[Capability]| -> Vec<(String, Status)> {
            let held = all.iter().copied().filter(|c| !list.contains(c)).collect();
            let findings = judge(&held, &all);
            findings.into_iter().map(|f| (f.id, f.status)).collect()
        };
        assert_eq!(
            without(&[Capability::CAP_SYS_RESOURCE]),
            [("cap-sys-resource".to_owned(), Status::Warn)]
        );
        assert_eq!(
            without(&[Capability::CAP_SYS_ADMIN, Capability::CAP_SYS_BOOT]),
            [
                ("capabilities".to_owned(), Status::Fail),
                ("capabilities-to-give".to_owned(), Status::Warn)
            ]
        );
    }
}
