//! Taking apart what a shim has made, with its help if it gives any: every process is killed, the shim forgets it or its program
//! clears up, cgroup and mounts go. Nothing here depends on a shim that answers.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use slipway_shim::{Process, Sandbox, ShimError, Task};

use super::{BUNDLE, CONNECT, Running, Shim, enter, sandbox::sandbox_cgroup};
use crate::cgroup::{Hierarchies, pin, send};
use crate::mount_table;
use crate::oci::Removed;
use crate::removal::{self, RemovalError};

/// How long one call to a shim may take here. One that hangs must not hold up a pod's end.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long its program may take to clear up.
const CLEAR: Duration = Duration::from_secs(5);

/// Removes a container, by force. Runs in a job.
///
/// # Errors
/// [`RemovalError`]; never what the shim says, without which it works as well.
pub fn remove(
    shim: &Shim,
    running: Option<&Running>,
    mounts: Option<&OwnedFd>,
    cgroups: &Hierarchies,
    container: &Removed<'_>,
    until: Instant,
) -> Result<(), RemovalError> {
    if let Some(mounts) = mounts {
        // It may be gone; then so is what was mounted there.
        let _ = enter(mounts);
    }
    removal::kill_cgroup(cgroups, container.cgroup, container.init)?;
    if !forget(running, container.id, until) {
        let left = until.saturating_duration_since(Instant::now());
        let _ = shim
            .program
            .delete(container.id, container.dir, left.min(CLEAR).max(PATIENCE));
    }
    // It may have begun anew what it should end.
    removal::kill_cgroup(cgroups, container.cgroup, &[])?;
    removal::remove_cgroup(cgroups, container.cgroup)?;
    if mounts.is_some() {
        unmount_below(container.dir);
    }
    Ok(())
}

/// Has a shim kill and forget a container; false when it does not answer.
fn forget(running: Option<&Running>, id: &str, until: Instant) -> bool {
    let Some(running) = running else { return false };
    let init = Process::init(id);
    let patience = || {
        until
            .saturating_duration_since(Instant::now())
            .min(PATIENCE)
    };
    let done = |result: Result<(), ShimError>| match result {
        Err(e) if e.is_not_found() => Ok(()),
        other => other,
    };
    let asked = running.connect().and_then(|mut task| {
        // One that has ended can't be killed, and shims differ in how they say so.
        match task.kill(init, libc::SIGKILL.cast_unsigned(), true, patience()) {
            Err(e) if e.is_timeout() || e.is_gone() => return Err(e),
            _ => {}
        }
        done(task.wait(init, patience()).map(drop))?;
        done(task.delete(init, patience()).map(drop))
    });
    asked.is_ok()
}

/// A pod, for [`tear_down`].
pub struct Pod<'a> {
    /// Its run directory.
    pub dir: &'a Path,
    /// Its cgroup.
    pub cgroup: Option<&'a Path>,
    /// The shim's mount namespace.
    pub mounts: Option<&'a OwnedFd>,
    /// The job's parent: whatever else it has is a shim's.
    pub keeper: i32,
}

/// Ends a pod's shim, when its containers are gone. Runs in a job.
pub fn tear_down(
    shim: &Shim,
    running: Option<&Running>,
    pod: &Pod<'_>,
    cgroups: &Hierarchies,
    until: Instant,
) -> Vec<RemovalError> {
    let mut problems = Vec::new();
    let home = std::fs::File::open(format!("/proc/{}/ns/mnt", pod.keeper));
    if let Some(mounts) = pod.mounts {
        let _ = enter(mounts);
    }
    let ended = running.is_some_and(|running| end(shim, running, until));
    problems.extend(remove_sandbox_cgroup(shim, pod.cgroup, cgroups));
    if let Some(running) = running {
        if ended {
            leave(running.pid);
        }
        kill_shim(running.pid);
    }
    // A virtual machine that outlives its shim, for one.
    for pid in children(pod.keeper) {
        if pid != std::process::id().cast_signed() {
            kill_shim(pid);
        }
    }
    if !ended {
        let bundle = pod.dir.join(BUNDLE);
        if bundle.exists() {
            let _ = shim.program.delete(&shim.pod, &bundle, CLEAR);
        }
    }
    let _ = std::fs::remove_dir_all(&shim.root);
    // What follows is about the keeper's mounts.
    if let Ok(home) = home {
        let _ = enter(&OwnedFd::from(home));
    }
    problems
}

/// Kills what is in the cgroup of a pod's sandbox, and removes that.
pub fn remove_sandbox_cgroup(
    shim: &Shim,
    cgroup: Option<&Path>,
    cgroups: &Hierarchies,
) -> Vec<RemovalError> {
    let names = [false, true].map(|systemd| sandbox_cgroup(&shim.pod, systemd));
    let removed = names.iter().filter_map(|name| {
        let cgroup = cgroup?.join(name);
        let killed = removal::kill_cgroup(cgroups, &cgroup, &[]);
        killed
            .and_then(|()| removal::remove_cgroup(cgroups, &cgroup))
            .err()
    });
    removed.collect()
}

/// Has the shim end the sandbox and itself; false when it does not answer.
fn end(shim: &Shim, running: &Running, until: Instant) -> bool {
    let patience = || {
        until
            .saturating_duration_since(Instant::now())
            .min(PATIENCE)
            .max(Duration::from_millis(500))
    };
    if running.sandbox_api {
        let asked = Sandbox::connect(&running.address, CONNECT).and_then(|mut sandbox| {
            sandbox.stop(&shim.pod, patience())?;
            sandbox.shutdown(&shim.pod, patience())
        });
        return asked.is_ok();
    }
    let forgotten = forget(Some(running), &shim.pod, until);
    let asked = Task::connect(&running.address, CONNECT);
    let asked = asked.and_then(|mut task| task.shutdown(&shim.pod, true, patience()));
    forgotten && asked.is_ok()
}

/// Waits for a moment for a shim that has said that it ends.
pub fn leave(pid: i32) {
    if let Some(process) = (pid > 1).then(|| pin(pid)).flatten() {
        removal::wait(&process, Instant::now() + PATIENCE);
    }
}

/// Kills a shim.
pub fn kill_shim(pid: i32) {
    if let Some(process) = (pid > 1).then(|| pin(pid)).flatten() {
        send(&process, libc::SIGKILL);
        removal::wait(&process, Instant::now() + removal::KILL_DEADLINE);
    }
}

fn children(pid: i32) -> Vec<i32> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let list = list.unwrap_or_default();
    list.split_whitespace()
        .filter_map(|p| p.parse().ok())
        .collect()
}

/// What is left of containers whose shim is gone: their processes are killed, and the runtime's state is removed by the
/// shim's program. Runs in a job.
pub fn clear(
    shim: &Shim,
    mounts: Option<&OwnedFd>,
    cgroups: &Hierarchies,
    containers: &[(String, PathBuf, PathBuf)],
    pod: (&Path, Option<&Path>),
) {
    if let Some(mounts) = mounts {
        let _ = enter(mounts);
    }
    for (_, _, cgroup) in containers {
        let _ = removal::kill_cgroup(cgroups, cgroup, &[]);
    }
    for (id, dir, _) in containers {
        let _ = shim.program.delete(id, dir, CLEAR);
    }
    remove_sandbox_cgroup(shim, pod.1, cgroups);
    let _ = shim.program.delete(&shim.pod, &pod.0.join(BUNDLE), CLEAR);
}

/// Detaches everything that is mounted below a directory, in this mount namespace.
fn unmount_below(dir: &Path) {
    let table = mount_table::read(Path::new("/proc/self/mountinfo")).unwrap_or_default();
    for mount in table.iter().rev() {
        if mount.place != dir && mount.place.starts_with(dir) {
            let _ = umount2(
                &mount.place,
                MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
            );
        }
    }
}
