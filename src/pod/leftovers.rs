//! What is left of a pod or container whose keeper is gone or stuck: processes, cgroups, mounts. Found
//! through the kernel, not through anybody's memory, and removed without anybody's help.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use slipway_runtime::cgroup::{self, Hierarchies};
use slipway_runtime::mount_table;
use slipway_runtime::removal;

/// Kills every process in the cgroup (absolute path in each hierarchy) and below, then removes it. Blocks
/// for up to a few seconds. One that is not there is no error.
///
/// # Errors
/// Every hierarchy in which it could not be removed.
pub fn kill_cgroup(cgroup: &str) -> Result<(), Vec<String>> {
    let Some(relative) = plain(cgroup) else {
        return Ok(());
    };
    let failed = |e: &dyn std::fmt::Display| vec![format!("cgroup {cgroup}: {e}")];
    let cgroups = Hierarchies::detect().map_err(|e| failed(&e))?;
    let path = Path::new("/").join(relative);
    removal::kill_cgroup(&cgroups, &path, &[]).map_err(|e| failed(&e))?;
    removal::remove_cgroup(&cgroups, &path).map_err(|e| failed(&e))
}

/// Ends what a pod without a record, or with a keeper that does not obey, may have left: the keeper, the
/// init of its PID namespace, and the cgroup that pods have who name no parent. Blocks for up to a few
/// seconds.
pub fn end_pod(id: &str, dir: &Path) {
    kill_keeper(id, dir);
    super::shim::end(id, dir);
    kill_pid_namespace(&dir.join("ns/pid"));
    for cgroup in slipway_spec::default_cgroups(id) {
        remove_pod_cgroup(&cgroup, true);
    }
}

/// Kills a pod's keeper without asking it.
pub fn kill_keeper(id: &str, dir: &Path) {
    let pid = std::fs::read_to_string(dir.join(slipway_runtime::PID_FILE));
    let Some(pid) = pid.ok().and_then(|text| text.trim().parse::<i32>().ok()) else {
        return;
    };
    let Some(process) = cgroup::pin(pid) else {
        return;
    };
    // The number may be another process's by now. The kernel cuts names off at 15 bytes.
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = name.trim_end();
    if name.starts_with("slipway:") && format!("slipway:{id}").starts_with(name) {
        tracing::warn!(pod = id, pid, "the keeper is killed");
        cgroup::send(&process, libc::SIGKILL);
        removal::wait(&process, Instant::now() + removal::KILL_DEADLINE);
    }
}

/// The path below a hierarchy's root; `None` for the root itself, where every process of the machine is,
/// and for paths that climb.
fn plain(cgroup: &str) -> Option<&str> {
    let relative = cgroup.trim_start_matches('/');
    let part = |part: &str| !part.is_empty() && part != "." && part != "..";
    (!relative.is_empty() && relative.split('/').all(part)).then_some(relative)
}

/// Kills every process in the PID namespace that is pinned at `path`: the init of a pod whose keeper died,
/// and with it everything else in there.
pub fn kill_pid_namespace(path: &Path) {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let (Some(theirs), Some(ours)) = (identity(path), identity(Path::new("/proc/self/ns/pid")))
    else {
        return;
    };
    // A path that was unmounted is a plain file, and our own namespace is never a pod's.
    if theirs == ours || theirs.0 != ours.0 {
        return;
    }
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let Some(pid) = pid
            && identity(&entry.path().join("ns/pid")) == Some(theirs)
        {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Detaches everything mounted below `dir`, deepest first, but not `dir` itself.
///
/// # Errors
/// Every mount point that could not be detached.
pub fn unmount_below(dir: &Path) -> Result<(), Vec<String>> {
    let mut problems = Vec::new();
    for mount in mounts().into_iter().rev() {
        if mount != dir
            && mount.starts_with(dir)
            && let Err(e) = umount2(&mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        {
            problems.push(format!("mount {}: {e}", mount.display()));
        }
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems)
    }
}

/// Whether a file system is mounted at exactly this (canonical) path.
pub fn is_mount_point(path: &Path) -> bool {
    mounts().iter().any(|m| m == path)
}

/// Removes a pod's cgroup (absolute path in each hierarchy) in which nobody is. One in use, or not there, is
/// left, as is, but for what was added to it, one that the kubelet made (`made` is false).
pub fn remove_pod_cgroup(cgroup: &str, made: bool) {
    if let (Some(relative), Ok(cgroups)) = (plain(cgroup), Hierarchies::detect()) {
        removal::remove_pod_cgroup(&cgroups, &Path::new("/").join(relative), made);
    }
}

/// Removes a directory with everything in it; what is mounted in there is detached first. One that is not
/// there is no error.
pub fn remove_tree(dir: &Path) -> Vec<String> {
    let gone = |result: io::Result<()>| match result {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    };
    // A mount in there must never be emptied, and it makes the removal fail; so it is looked for first.
    let mut problems = unmount_below(dir).err().unwrap_or_default();
    if problems.is_empty()
        && let Err(e) = gone(std::fs::remove_dir_all(dir))
    {
        problems.push(format!("{}: {e}", dir.display()));
    }
    problems
}

/// Mount points of this process's mount namespace, in mounting order.
fn mounts() -> Vec<PathBuf> {
    let table = mount_table::read(Path::new("/proc/self/mountinfo")).unwrap_or_default();
    table.into_iter().map(|mount| mount.place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_told_from_directories() {
        assert!(is_mount_point(Path::new("/proc")));
        assert!(!is_mount_point(Path::new("/proc/self")));
    }

    #[test]
    fn our_own_pid_namespace_is_left_alone() {
        kill_pid_namespace(Path::new("/proc/self/ns/pid"));
        kill_pid_namespace(Path::new("/proc/self/ns/net"));
        kill_pid_namespace(Path::new("/proc/self/stat"));
        kill_pid_namespace(Path::new("/nowhere"));
    }

    #[test]
    fn the_root_cgroup_and_climbing_paths_are_left_alone() {
        for path in ["", "/", "//", "/a/../..", "/a//b/.."] {
            kill_cgroup(path).unwrap();
        }
        kill_cgroup("/slipway-test-that-is-not-there").unwrap();
    }
}
