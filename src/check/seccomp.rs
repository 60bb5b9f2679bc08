//! Seccomp: the actions that profiles name, and the RuntimeDefault filter loaded for real.

use crate::attempt::apart;
use crate::finding::Finding;
use crate::sys;
use oci_spec::runtime::Capabilities;
use slipway_seccomp::{ProfileCache, Source};
use std::io;
use std::time::{Duration, Instant};

const ACTIONS: [(&str, u32); 7] = [
    ("kill_process", libc::SECCOMP_RET_KILL_PROCESS),
    ("kill_thread", libc::SECCOMP_RET_KILL_THREAD),
    ("trap", libc::SECCOMP_RET_TRAP),
    ("errno", libc::SECCOMP_RET_ERRNO),
    ("trace", libc::SECCOMP_RET_TRACE),
    ("log", libc::SECCOMP_RET_LOG),
    ("allow", libc::SECCOMP_RET_ALLOW),
];

/// Actions and filter.
pub(crate) fn check() -> Vec<Finding> {
    vec![filter(), actions()]
}

fn filter() -> Finding {
    let (id, what) = ("seccomp", "seccomp filter");
    match apart(load_default) {
        Ok(Loaded {
            instructions,
            took,
            mode: Some(2),
        }) => Finding::ok(
            id,
            what,
            format!(
                "RuntimeDefault loads: {instructions} instructions in {} µs",
                took.as_micros()
            ),
        ),
        Ok(_) => Finding::fail(id, what, "a filter that was loaded is not in force")
            .cost("containers would run without RuntimeDefault")
            .fix("use a kernel with CONFIG_SECCOMP_FILTER"),
        Err(e) => Finding::fail(id, what, format!("RuntimeDefault can't be loaded: {e}"))
            .cost("no container starts but those with an unconfined profile")
            .fix("use a kernel with CONFIG_SECCOMP_FILTER; look for a seccomp filter around this process"),
    }
}

struct Loaded {
    instructions: usize,
    took: Duration,
    mode: Option<u32>,
}

/// In a thread of its own: a filter belongs to a thread, and there is no way back.
fn load_default() -> io::Result<Loaded> {
    let filter = ProfileCache::new()
        .get(Source::RuntimeDefault, &Capabilities::new())
        .map_err(io::Error::other)?;
    rustix::thread::set_no_new_privs(true)?;
    let start = Instant::now();
    slipway_seccomp::load(&filter)?;
    let took = start.elapsed();
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    Ok(Loaded {
        instructions: filter.instructions.len(),
        took,
        mode: mode(&status),
    })
}

/// The seccomp mode in `/proc/<pid>/status`: 2 is a filter.
fn mode(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|l| l.strip_prefix("Seccomp:"))?;
    line.trim().parse().ok()
}

fn actions() -> Finding {
    let (id, what) = ("seccomp-actions", "seccomp actions");
    let (there, missing): (Vec<_>, Vec<_>) = ACTIONS
        .iter()
        .partition(|(_, action)| sys::seccomp_action(*action).is_ok());
    let names = |list: &[&(&str, u32)]| {
        let names: Vec<_> = list.iter().map(|(name, _)| *name).collect();
        names.join(", ")
    };
    if missing.is_empty() {
        return Finding::ok(id, what, names(&there));
    }
    Finding::warn(id, what, format!("missing: {}", names(&missing)))
        .cost("Localhost profiles that use them fail")
        .fix("use Linux 4.14 or later with CONFIG_SECCOMP_FILTER")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_read() {
        assert_eq!(
            mode("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"),
            Some(2)
        );
        assert_eq!(mode("Name:\tx\n"), None);
        assert_eq!(mode("Seccomp:\tno\n"), None);
    }

    #[test]
    fn the_filter_stays_with_its_thread() {
        let before = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let _ = filter();
        let after = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert_eq!(mode(&before), mode(&after));
    }
}
