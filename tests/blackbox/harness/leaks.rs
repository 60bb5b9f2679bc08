//! What a test may have left behind: mounts, namespaces, cgroups, processes, directories, addresses.

use std::path::Path;
use std::time::Duration;

use super::daemon::{MARK, names};
use super::{Env, seconds, stage};

/// Everything that is left, one line each.
pub fn find(env: &Env) -> Vec<String> {
    let mut left = objects(env);
    left.extend(
        processes(env)
            .into_iter()
            .map(|(pid, what)| format!("process {pid} ({what})")),
    );
    left.extend(
        sockets(&env.root)
            .into_iter()
            .map(|s| format!("a process that listens at {s}")),
    );
    left
}

/// What is left of pods and containers, while the daemon may still run.
pub fn objects(env: &Env) -> Vec<String> {
    let mut left = Vec::new();
    // The run root itself is a mount of the daemon's, which it leaves for the next one.
    let run_root = env.root.join("r").display().to_string();
    left.extend(
        mounts(&env.root)
            .into_iter()
            .filter(|m| *m != run_root)
            .map(|m| format!("mount {m}")),
    );
    for top in stage::cgroup_dirs(&env.cgroup) {
        let below = stage::tree(&top).into_iter().filter(|d| *d != top);
        left.extend(below.map(|d| format!("cgroup {}", d.display())));
    }
    for dir in ["r/pods", "state/containers", "net.cache"] {
        let found = names(&env.root.join(dir)).into_iter();
        left.extend(
            found
                .filter(|n| n != "lock" && n != ".lock")
                .map(|n| format!("directory entry {dir}/{n}")),
        );
    }
    for handler in names(&env.root.join("r/runtimes")) {
        let state = format!("r/runtimes/{handler}");
        let found = names(&env.root.join(&state)).into_iter();
        // crun keeps what it has of each user's there.
        left.extend(found.map(|n| format!("directory entry {state}/{n}")));
    }
    let addresses = env.root.join(format!("net.addresses/test{}", env.number));
    let addresses = names(&addresses)
        .into_iter()
        .filter(|n| n != "lock" && !n.starts_with("last_reserved_ip"));
    left.extend(addresses.map(|n| format!("address {n}")));
    left
}

/// What is left of this once what was going on has had time to end.
pub async fn settle(env: &Env, find: fn(&Env) -> Vec<String>) -> Vec<String> {
    let until = tokio::time::Instant::now() + seconds(5);
    loop {
        let left = find(env);
        if left.is_empty() || tokio::time::Instant::now() > until {
            return left;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Makes an end of everything that is left, so that other tests don't meet it.
pub async fn wipe(env: &Env) {
    use nix::sys::signal::{Signal, kill};
    env.stop_slice().await;
    for _ in 0..50 {
        let mut all: Vec<i32> = processes(env).into_iter().map(|(pid, _)| pid).collect();
        for dir in stage::cgroup_dirs(&env.cgroup)
            .iter()
            .flat_map(|d| stage::tree(d))
        {
            let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            all.extend(
                text.lines()
                    .filter_map(|l| l.parse::<i32>().ok())
                    .filter(|p| *p > 1),
            );
            // What is frozen does not die (v1; the file is there for nothing else).
            std::fs::write(dir.join("freezer.state"), "THAWED").ok();
            std::fs::remove_dir(dir).ok();
        }
        if all.is_empty() && stage::cgroup_dirs(&env.cgroup).is_empty() {
            break;
        }
        for pid in all {
            kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for mount in mounts(&env.root).iter().rev() {
        nix::mount::umount2(Path::new(mount), nix::mount::MntFlags::MNT_DETACH).ok();
    }
}

/// Mount points below a directory, in the order they were made.
pub fn mounts(root: &Path) -> Vec<String> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = text.lines().filter_map(|l| l.split(' ').nth(4));
    points
        .filter(|p| Path::new(p).starts_with(root))
        .map(str::to_owned)
        .collect()
}

/// Processes that carry the mark of the test in their environment.
fn processes(env: &Env) -> Vec<(i32, String)> {
    let mark = format!("{MARK}={}", env.number);
    let mut found = Vec::new();
    for name in names(Path::new("/proc")) {
        let Ok(pid) = name.parse::<i32>() else {
            continue;
        };
        let Ok(environment) = std::fs::read(format!("/proc/{pid}/environ")) else {
            continue;
        };
        if environment.split(|b| *b == 0).any(|v| v == mark.as_bytes()) {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            found.push((pid, String::from_utf8_lossy(&command).replace('\0', " ")));
        }
    }
    found
}

/// Unix sockets that are bound below a directory and still open somewhere.
fn sockets(root: &Path) -> Vec<String> {
    let text = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let paths = text.lines().filter_map(|l| l.split_whitespace().nth(7));
    let mut all: Vec<String> = paths
        .filter(|p| Path::new(p).starts_with(root))
        .map(str::to_owned)
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}
