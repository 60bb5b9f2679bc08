//! Taking containers apart: every process gone, then the cgroup, then libcontainer's state. Used by
//! keepers (in a job), and by the daemon for what a dead keeper has left.

use std::fs;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::cgroup::{Hierarchies, pin, send};
use crate::placement::LEAF;
use crate::scope;

/// How long SIGKILL may take to work; a process in an uninterruptible wait survives it.
pub const KILL_DEADLINE: Duration = Duration::from_secs(8);

/// Why something could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemovalError {
    /// Processes survive SIGKILL.
    #[error(
        "processes {pids:?} in cgroup {} survive SIGKILL: look for a hung mount or device (state D)",
        cgroup.display()
    )]
    Unkillable {
        /// The cgroup.
        cgroup: PathBuf,
        /// Who is left.
        pids: Vec<i32>,
    },
    /// The cgroup stays.
    #[error("can't remove cgroup {}", cgroup.display())]
    Cgroup {
        /// The cgroup.
        cgroup: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A directory stays.
    #[error("can't remove {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Kills every process of a cgroup and waits until they are gone; `also` are processes to be killed and
/// waited for that may be outside it.
///
/// # Errors
/// [`RemovalError::Unkillable`].
pub fn kill_cgroup(
    cgroups: &Hierarchies,
    cgroup: &Path,
    also: &[OwnedFd],
) -> Result<(), RemovalError> {
    let deadline = Instant::now() + KILL_DEADLINE;
    for process in also {
        send(process, libc::SIGKILL);
    }
    // Before the first wait: this also thaws what is frozen.
    cgroups.signal_all(cgroup, libc::SIGKILL);
    for process in also {
        wait(process, deadline);
    }
    loop {
        let pids = cgroups.pids(cgroup);
        if pids.is_empty() {
            settle(cgroups, cgroup, deadline);
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(RemovalError::Unkillable {
                cgroup: cgroup.to_owned(),
                pids,
            });
        }
        let pinned: Vec<OwnedFd> = pids.iter().filter_map(|pid| pin(*pid)).collect();
        cgroups.signal_all(cgroup, libc::SIGKILL);
        for process in &pinned {
            wait(process, deadline);
        }
    }
}

/// Waits until nothing dies in a cgroup any more: on v2 processes are not listed while they do, and it can't be removed
/// yet. With much memory to give back that takes its time.
fn settle(cgroups: &Hierarchies, cgroup: &Path, deadline: Instant) {
    let Some(dir) = cgroups.v2_dir(cgroup) else {
        return;
    };
    let Ok(mut events) = fs::File::open(dir.join("cgroup.events")) else {
        return;
    };
    loop {
        let mut text = String::new();
        let read = events
            .rewind()
            .and_then(|()| events.read_to_string(&mut text));
        let left = deadline.saturating_duration_since(Instant::now());
        if read.is_err() || !text.contains("populated 1") || left.is_zero() {
            return;
        }
        let Ok(timeout) = rustix::event::Timespec::try_from(left) else {
            return;
        };
        let _ = poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout));
    }
}

/// Waits until a process has ended, or the deadline.
pub fn wait(process: &OwnedFd, deadline: Instant) {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(timeout) = rustix::event::Timespec::try_from(left) else {
            return;
        };
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            _ => return,
        }
    }
}

/// Removes a cgroup in which nobody is any more, with all below it: the unit, where it is one of systemd's,
/// and the directories.
///
/// # Errors
/// [`RemovalError::Cgroup`].
pub fn remove_cgroup(cgroups: &Hierarchies, cgroup: &Path) -> Result<(), RemovalError> {
    // A systemd that does not answer now finds the empty cgroup when it does, and forgets the unit.
    let _ = scope::stop(cgroups, cgroup);
    cgroups
        .remove(cgroup)
        .map_err(|source| RemovalError::Cgroup {
            cgroup: cgroup.to_owned(),
            source,
        })
}

/// Removes a pod's cgroup after its containers' are gone, as [`Hierarchies::remove_empty`] does it: if it was
/// made for the pod, and nobody is in it. A slice is stopped by systemd.
pub fn remove_pod_cgroup(cgroups: &Hierarchies, cgroup: &Path, made: bool) {
    // The keeper's own leaf, if it lived here; it has left it, or is dead.
    if let Some(leaf) = cgroups.v2_dir(&cgroup.join(LEAF)) {
        let _ = fs::remove_dir(leaf);
    }
    // To stop a slice is to stop all that is in it.
    if made && cgroups.pids(cgroup).is_empty() {
        let _ = scope::stop(cgroups, cgroup);
    }
    cgroups.remove_empty(cgroup, made);
}

/// Removes a container: processes, cgroup, libcontainer's state directory.
///
/// # Errors
/// [`RemovalError`].
pub fn remove_container(
    cgroups: &Hierarchies,
    cgroup: &Path,
    init: &[OwnedFd],
    state_dir: &Path,
) -> Result<(), RemovalError> {
    kill_cgroup(cgroups, cgroup, init)?;
    remove_cgroup(cgroups, cgroup)?;
    match fs::remove_dir_all(state_dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RemovalError::Directory {
            path: state_dir.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}
