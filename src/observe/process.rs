//! The processes in a container's cgroup.

use std::fs;
use std::path::Path;

use crate::Layout;

/// Descriptors of one process beyond these are not looked at: a metric must not cost more than what it
/// measures.
const MOST_DESCRIPTORS: usize = 1 << 16;
/// Nested cgroups deeper than this hold nobody that a metric needs.
const DEEPEST: usize = 8;

/// What the processes of a container hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Processes {
    /// How many there are.
    pub count: u64,
    /// Open file descriptors of all.
    pub descriptors: u64,
    /// Those of them that are sockets.
    pub sockets: u64,
    /// Soft limit of open files of the first process; `None` when it has gone, [`u64::MAX`] for no limit.
    pub open_files_limit: Option<u64>,
}

/// Looks at the processes in a cgroup; `init` is the container's first one.
pub fn look(layout: &Layout, cgroup: &Path, init: i32) -> Processes {
    let mut pids = Vec::new();
    // On v1 everybody is in the cgroup itself; on v2 each exec session has a leaf below it.
    let dir = match layout.unified() {
        true => layout.v2(cgroup),
        false => layout
            .v1("pids", cgroup)
            .or_else(|| layout.v1("memory", cgroup)),
    };
    if let Some(dir) = dir {
        collect(&dir, DEEPEST, &mut pids);
    }
    let mut found = Processes {
        count: pids.len() as u64,
        ..Processes::default()
    };
    for pid in &pids {
        let (descriptors, sockets) = descriptors(*pid);
        found.descriptors += descriptors;
        found.sockets += sockets;
    }
    if pids.contains(&init) {
        let limits = fs::read_to_string(format!("/proc/{init}/limits"));
        found.open_files_limit = limits.ok().as_deref().and_then(open_files);
    }
    found
}

fn collect(dir: &Path, depth: usize, pids: &mut Vec<i32>) {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    // 0 is a process of a PID namespace that we don't see.
    pids.extend(
        text.lines()
            .filter_map(|l| l.parse::<i32>().ok())
            .filter(|p| *p > 0),
    );
    if depth == 0 {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth - 1, pids);
        }
    }
}

fn descriptors(pid: i32) -> (u64, u64) {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    let (mut all, mut sockets) = (0, 0);
    for entry in entries
        .into_iter()
        .flatten()
        .flatten()
        .take(MOST_DESCRIPTORS)
    {
        all += 1;
        if fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")) {
            sockets += 1;
        }
    }
    (all, sockets)
}

/// The soft limit in the line `Max open files  1024  1048576  files` of /proc/<pid>/limits.
fn open_files(limits: &str) -> Option<u64> {
    let rest = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    match rest.split_ascii_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_descriptors_and_limits() {
        let pid = std::process::id().cast_signed();
        let (before, sockets) = descriptors(pid);
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let (after, more) = descriptors(pid);
        assert!(before > 0 && after >= before && more >= sockets);
        assert!(open_files(&fs::read_to_string("/proc/self/limits").unwrap()).is_some());
        assert_eq!(
            open_files("Max open files            unlimited  unlimited files"),
            Some(u64::MAX)
        );
        assert_eq!(open_files("Max cpu time 1 2 seconds"), None);
    }
}
