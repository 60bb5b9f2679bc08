//! Control groups: which hierarchies, which controllers, and whether cgroups can be made, entered and
//! killed.

use crate::finding::Finding;
use crate::mountinfo::{self, Mount};
use crate::sys::Sleeper;
use slipway_spec::HostFacts;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the hierarchies are.
const TOP: &str = "/sys/fs/cgroup";
/// How long a dead process may take to leave its cgroup.
const LINGER: Duration = Duration::from_secs(2);

/// Everything about control groups.
pub(crate) fn check(privileged: bool) -> Vec<Finding> {
    let layout = Layout::new(&mountinfo::mounts(), |v2| {
        words(&fs::read_to_string(v2.join("cgroup.controllers")).unwrap_or_default())
    });
    let mut findings = vec![version(&layout)];
    if layout.version() == Version::None {
        return findings;
    }
    findings.push(controllers(&layout));
    findings.push(making(&layout, privileged));
    if let Some(v2) = &layout.v2 {
        findings.push(birth_and_death(v2, privileged));
    }
    findings.push(swap());
    findings
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    None,
    V1,
    Hybrid,
    Unified,
}

/// The hierarchies of this machine.
#[derive(Debug, Default)]
struct Layout {
    v1: Vec<PathBuf>,
    v1_controllers: BTreeSet<String>,
    v2: Option<PathBuf>,
    v2_controllers: BTreeSet<String>,
}

impl Layout {
    fn new(mounts: &[Mount], v2_controllers: impl Fn(&Path) -> BTreeSet<String>) -> Self {
        let mut layout = Self::default();
        // A hierarchy bound to another place is not one more.
        for mount in mounts.iter().filter(|m| m.point.starts_with(TOP)) {
            match mount.kind.as_str() {
                "cgroup2" => {
                    layout.v2_controllers = v2_controllers(&mount.point);
                    layout.v2 = Some(mount.point.clone());
                }
                "cgroup" => {
                    layout.v1.push(mount.point.clone());
                    let known = |o: &&String| !o.contains('=') && *o != "rw" && *o != "ro";
                    let options = mount.super_options.iter().filter(known);
                    layout.v1_controllers.extend(options.cloned());
                }
                _ => {}
            }
        }
        layout
    }

    fn version(&self) -> Version {
        match (self.v1.is_empty(), &self.v2) {
            (true, None) => Version::None,
            (true, Some(_)) => Version::Unified,
            (false, None) => Version::V1,
            (false, Some(_)) => Version::Hybrid,
        }
    }

    /// Whether limits of a controller are in force: on a hybrid host those of v1. `io` is v1's `blkio`.
    fn has(&self, name: &str) -> bool {
        match self.version() {
            Version::Unified => self.v2_controllers.contains(name),
            _ if name == "io" => self.v1_controllers.contains("blkio"),
            _ => self.v1_controllers.contains(name),
        }
    }
}

fn words(text: &str) -> BTreeSet<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn version(layout: &Layout) -> Finding {
    let (id, what) = ("cgroup", "cgroup version");
    match layout.version() {
        Version::Unified => Finding::ok(id, what, "v2"),
        Version::Hybrid => Finding::ok(id, what, "v1 with v2 beside it (hybrid)"),
        Version::V1 => Finding::info(id, what, "v1 alone")
            .cost("processes are killed one by one, again until no new one turns up")
            .fix("boot with systemd.unified_cgroup_hierarchy=1"),
        Version::None => Finding::fail(id, what, format!("nothing is mounted below {TOP}"))
            .cost("no container can be made")
            .fix("mount -t cgroup2 cgroup2 /sys/fs/cgroup"),
    }
}

fn controllers(layout: &Layout) -> Finding {
    let (id, what) = ("cgroup-controllers", "cgroup controllers");
    // What is lost without each, and whether pods can be run so.
    let all = [
        ("cpu", "CPU requests and limits", true),
        ("memory", "memory limits and OOM notices", true),
        ("pids", "limits on processes", true),
        ("cpuset", "CPU pinning", false),
        ("io", "block I/O weights and limits", false),
        ("hugetlb", "limits on huge pages", false),
        (
            "devices",
            "device rules: a container can open any device",
            true,
        ),
    ];
    let wanted = all
        .iter()
        // v2 has no such controller; device rules are programs there.
        .filter(|(name, ..)| *name != "devices" || layout.version() != Version::Unified);
    let (there, missing): (Vec<_>, Vec<_>) = wanted.partition(|(name, ..)| layout.has(name));
    let names = |list: &[&(&str, &str, bool)]| {
        let names: Vec<_> = list.iter().map(|(name, ..)| *name).collect();
        names.join(", ")
    };
    let mut found = names(&there);
    if let Some(v2) = layout
        .v2
        .as_ref()
        .filter(|_| layout.version() == Version::Unified)
    {
        let text = fs::read_to_string(v2.join("cgroup.subtree_control")).unwrap_or_default();
        let enabled = words(&text);
        let waiting: Vec<_> = there
            .iter()
            .filter(|(name, ..)| !enabled.contains(*name))
            .map(|(name, ..)| *name)
            .collect();
        if !waiting.is_empty() {
            found = format!(
                "{found}; handed on with the first pod: {}",
                waiting.join(", ")
            );
        }
    }
    if missing.is_empty() {
        return Finding::ok(id, what, found);
    }
    let costs: Vec<_> = missing.iter().map(|(_, cost, _)| *cost).collect();
    let found = format!("missing: {}; there: {found}", names(&missing));
    let finding = if missing.iter().any(|(_, _, needed)| *needed) {
        Finding::fail(id, what, found)
    } else {
        Finding::warn(id, what, found)
    };
    let name = missing.first().map_or("", |(name, ..)| name);
    let fix = match layout.version() {
        Version::Unified => {
            "use a kernel with these controllers, and no cgroup_disable= on its command line; \
             in a container: have them delegated (cgroup.subtree_control of the cgroups above)"
                .to_owned()
        }
        _ => format!(
            "mount each in a directory of its own: mkdir {TOP}/{name} && mount -t cgroup -o {name} cgroup {TOP}/{name}"
        ),
    };
    finding
        .cost(format!("not in force: {}", costs.join("; ")))
        .fix(fix)
}

/// A cgroup of our own, removed when dropped.
struct Own(PathBuf);

impl Own {
    fn make(hierarchy: &Path) -> io::Result<Self> {
        let dir = hierarchy.join(format!("slipway-check-{}", std::process::id()));
        fs::create_dir(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let start = Instant::now();
        // A process that was reaped may still be on its way out, and v1 tells nobody when it is.
        while fs::remove_dir(&self.0).is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy)
            && start.elapsed() < LINGER
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn making(layout: &Layout, privileged: bool) -> Finding {
    let (id, what) = ("cgroup-make", "making cgroups");
    if !privileged {
        return Finding::not_probed(id, what);
    }
    let all = layout.v1.iter().chain(&layout.v2);
    let problems: Vec<_> = all
        .clone()
        .filter_map(|dir| {
            let error = Own::make(dir).err()?;
            Some(format!("{}: {error}", dir.display()))
        })
        .collect();
    if problems.is_empty() {
        let found = format!("in every hierarchy ({})", all.count());
        return Finding::ok(id, what, found);
    }
    Finding::fail(id, what, format!("refused: {}", problems.join("; ")))
        .cost("no container can be made")
        .fix("mount the hierarchies read-write: mount -o remount,rw and the directory")
}

fn birth_and_death(v2: &Path, privileged: bool) -> Finding {
    let (id, what) = ("cgroup-kill", "birth and death in v2");
    if !privileged {
        return Finding::not_probed(id, what);
    }
    let fix = "use Linux 5.14 or later";
    match born_and_killed(v2) {
        Ok(true) => Finding::ok(id, what, "CLONE_INTO_CGROUP, cgroup.kill"),
        Ok(false) => Finding::warn(id, what, "no cgroup.kill")
            .cost("processes are killed one by one, again until no new one turns up")
            .fix(fix),
        Err(e) => Finding::fail(id, what, format!("no CLONE_INTO_CGROUP: {e}"))
            .cost("no container can be made, and no exec session")
            .fix(fix),
    }
}

/// Whether a process that was born into a cgroup dies with it.
fn born_and_killed(v2: &Path) -> io::Result<bool> {
    let own = Own::make(v2)?;
    let dir = File::open(&own.0)?;
    let sleeper = Sleeper::start(0, Some(dir.as_fd()))?;
    let members = fs::read_to_string(own.0.join("cgroup.procs"))?;
    if members.trim() != sleeper.pid().to_string() {
        return Err(io::Error::other("the process is not where it was born"));
    }
    let killed = fs::write(own.0.join("cgroup.kill"), "1").is_ok();
    Ok(killed && sleeper.ends_within(2000))
}

fn swap() -> Finding {
    let (id, what) = ("swap-accounting", "swap accounting");
    if HostFacts::detect().swap_accounting {
        return Finding::ok(id, what, "on");
    }
    Finding::info(id, what, "off")
        .cost("limits on memory and swap together are left out")
        .fix("a kernel with CONFIG_MEMCG and CONFIG_SWAP, booted with swapaccount=1 (v1)")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &[u8] = b"\
33 25 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
34 33 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 33 0:30 / /sys/fs/cgroup/blkio rw,relatime shared:9 - cgroup cgroup rw,blkio
36 33 0:32 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
37 33 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
38 33 0:31 / /elsewhere rw,relatime - cgroup2 cgroup2 rw
";

    fn layout(table: &[u8], controllers: &str) -> Layout {
        Layout::new(&mountinfo::parse(table), |_| words(controllers))
    }

    #[test]
    fn a_hybrid_host_is_read() {
        let hybrid = layout(HYBRID, "hugetlb\n");
        assert_eq!(hybrid.version(), Version::Hybrid);
        assert_eq!(hybrid.v1.len(), 3);
        assert!(hybrid.has("cpu") && hybrid.has("io"));
        assert!(
            !hybrid.has("hugetlb"),
            "what only v2 has limits nothing here"
        );
        assert!(!hybrid.has("memory") && !hybrid.has("name=systemd") && !hybrid.has("rw"));
        let finding = controllers(&hybrid);
        assert_eq!(finding.status, crate::Status::Fail);
        let found = finding.found;
        assert!(
            found.starts_with("missing: memory, pids, cpuset, hugetlb, devices;"),
            "{found}"
        );
    }

    #[test]
    fn a_unified_host_is_read() {
        let table = b"30 25 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";
        let pure = layout(table, "cpuset cpu io memory hugetlb pids rdma misc\n");
        assert_eq!(pure.version(), Version::Unified);
        assert_eq!(controllers(&pure).status, crate::Status::Ok);
        let poor = layout(table, "cpu memory pids");
        assert_eq!(controllers(&poor).status, crate::Status::Warn);
        let none = layout(b"", "");
        assert_eq!(version(&none).status, crate::Status::Fail);
    }

    #[test]
    fn our_cgroups_are_removed() {
        let layout = layout(&fs::read("/proc/self/mountinfo").unwrap(), "");
        let Some(v2) = layout.v2.filter(|_| crate::privileges::is_root()) else {
            return println!("SKIPPED: needs root and cgroup v2");
        };
        if let Err(e) = born_and_killed(&v2) {
            println!("SKIPPED: {e}");
        }
        assert!(
            !v2.join(format!("slipway-check-{}", std::process::id()))
                .exists()
        );
    }
}
