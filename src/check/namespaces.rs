//! Namespaces: those of every pod, and user namespaces.

use crate::attempt::apart;
use crate::finding::Finding;
use crate::mounts::COST;
use crate::sys::Sleeper;
use nix::sched::{CloneFlags, unshare};
use std::fs;

/// Pod namespaces and user namespaces.
pub(crate) fn check(privileged: bool) -> Vec<Finding> {
    vec![of_pods(privileged), of_users()]
}

fn of_pods(privileged: bool) -> Finding {
    let (id, what) = ("namespaces", "pod namespaces");
    if !privileged {
        return Finding::not_probed(id, what);
    }
    let kinds = [
        ("mount", CloneFlags::CLONE_NEWNS),
        ("network", CloneFlags::CLONE_NEWNET),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ];
    let mut missing = Vec::new();
    for (name, flag) in kinds {
        if let Err(e) = apart(move || Ok(unshare(flag)?)) {
            missing.push(format!("{name}: {e}"));
        }
    }
    if let Err(e) = Sleeper::start(libc::CLONE_NEWPID, None) {
        missing.push(format!("pid: {e}"));
    }
    if missing.is_empty() {
        return Finding::ok(id, what, "mount, network, ipc, uts, cgroup, pid");
    }
    Finding::fail(id, what, format!("can't be made: {}", missing.join("; ")))
        .cost("pods that need them do not start")
        .fix("use a kernel with CONFIG_NAMESPACES and all below it; raise the sysctls user.max_*_namespaces")
}

fn of_users() -> Finding {
    let (id, what) = ("user-namespaces", "user namespaces");
    let text = |path: &str| fs::read_to_string(path).ok();
    let number = |path: &str| text(path).and_then(|t| t.trim().parse::<u64>().ok());
    let most = number("/proc/sys/user/max_user_namespaces");
    let unprivileged = number("/proc/sys/kernel/unprivileged_userns_clone");
    let restricted = number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns");
    let mut notes = Vec::new();
    if let Some(most) = most {
        notes.push(format!("at most {most}"));
    }
    if unprivileged == Some(0) {
        notes.push("not for unprivileged users".to_owned());
    }
    if restricted == Some(1) {
        notes.push("restricted by AppArmor for unprivileged users".to_owned());
    }
    let notes = notes.join(", ");
    match Sleeper::start(libc::CLONE_NEWUSER, None) {
        Ok(_) => Finding::ok(id, what, format!("can be made ({notes})")),
        Err(e) => {
            let fix = if most == Some(0) {
                "sysctl -w user.max_user_namespaces=65536"
            } else {
                "use a kernel with CONFIG_USER_NS; run slipway check as root"
            };
            // Few clusters use them.
            Finding::info(id, what, format!("can't be made: {e} ({notes})"))
                .cost(COST)
                .fix(fix)
        }
    }
}
