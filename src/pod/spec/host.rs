//! What this host can do.

use crate::Selinux;
use oci_spec::runtime::{Capabilities, Capability};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::str::FromStr;

/// What this host can do, as far as specifications depend on it. Detected once, by the daemon.
#[derive(Debug, Clone, PartialEq)]
pub struct HostFacts {
    /// What the daemon may give: its permitted and bounding sets' intersection.
    pub capabilities: Capabilities,
    /// The unified hierarchy alone; false on v1 and hybrid hosts.
    pub cgroup_v2: bool,
    /// systemd is PID 1.
    pub systemd: bool,
    /// Swap is accounted, so it can be limited.
    pub swap_accounting: bool,
    /// The hugetlb controller is there.
    pub hugetlb: bool,
    /// Sizes of huge pages, as cgroup files name them: `2MB`, `1GB`.
    pub hugepage_sizes: BTreeSet<String>,
    /// Major and minor version.
    pub kernel: (u32, u32),
    /// Mounts can be made read-only recursively (Linux 5.12).
    pub recursive_read_only: bool,
    /// SELinux, where it is on with a policy for containers, unless it is not to be used.
    pub selinux: Option<Selinux>,
    /// The host's name.
    pub hostname: String,
}

const CGROUP2_MAGIC: u64 = 0x6367_7270;

impl HostFacts {
    /// Looks at the machine. What can't be read counts as missing.
    pub fn detect() -> Self {
        let uname = rustix::system::uname();
        let kernel = parse_release(&uname.release().to_string_lossy());
        let cgroup_v2 = rustix::fs::statfs("/sys/fs/cgroup")
            .is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(CGROUP2_MAGIC));
        Self {
            capabilities: own_capabilities(),
            cgroup_v2,
            systemd: slipway_systemd::booted(),
            swap_accounting: swap_accounting(cgroup_v2),
            hugetlb: if cgroup_v2 {
                read("/sys/fs/cgroup/cgroup.controllers")
                    .split_whitespace()
                    .any(|c| c == "hugetlb")
            } else {
                Path::new("/sys/fs/cgroup/hugetlb/cgroup.procs").exists()
            },
            hugepage_sizes: hugepage_sizes(Path::new("/sys/kernel/mm/hugepages")),
            kernel,
            recursive_read_only: kernel >= (5, 12),
            selinux: Selinux::detect().ok(),
            hostname: uname.nodename().to_string_lossy().into_owned(),
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn parse_release(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn own_capabilities() -> Capabilities {
    let set = |which| caps::read(None, which).unwrap_or_default();
    let (bounding, permitted) = (set(caps::CapSet::Bounding), set(caps::CapSet::Permitted));
    let names = bounding.intersection(&permitted).map(ToString::to_string);
    names
        .filter_map(|name| Capability::from_str(name.strip_prefix("CAP_")?).ok())
        .collect()
}

fn swap_accounting(cgroup_v2: bool) -> bool {
    if !cgroup_v2 {
        return Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists();
    }
    // The root has no limits; any cgroup below it shows whether there are any.
    let own = read("/proc/self/cgroup");
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap_or_default()
        .to_owned();
    let limit = |dir: &Path| dir.join("memory.swap.max").exists();
    let root = Path::new("/sys/fs/cgroup");
    let entries = || fs::read_dir(root).into_iter().flatten().flatten();
    let below = || entries().filter(|e| e.path().join("memory.max").exists());
    // Where no cgroup can tell (none yet has the memory controller), the kernel has it if it has swap at all.
    limit(&root.join(own))
        || below().any(|entry| limit(&entry.path()))
        || (below().next().is_none() && Path::new("/proc/swaps").exists())
}

fn hugepage_sizes(dir: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return BTreeSet::new();
    };
    let name = |entry: fs::DirEntry| {
        let name = entry.file_name();
        let kilobytes: u64 = name
            .to_str()?
            .strip_prefix("hugepages-")?
            .strip_suffix("kB")?
            .parse()
            .ok()?;
        Some(hugepage_name(kilobytes))
    };
    entries.flatten().filter_map(name).collect()
}

/// How cgroup files name a size.
pub(crate) fn hugepage_name(kilobytes: u64) -> String {
    match kilobytes {
        k if k >= 1 << 20 => format!("{}GB", k >> 20),
        k if k >= 1 << 10 => format!("{}MB", k >> 10),
        k => format!("{k}KB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        assert_eq!(parse_release("6.18.0-rc1+"), (6, 18));
        assert_eq!(parse_release("5.10"), (5, 10));
        assert_eq!(parse_release("6-x"), (6, 0));
        assert_eq!(parse_release(""), (0, 0));
    }

    #[test]
    fn sizes_have_the_kernels_names() {
        assert_eq!(hugepage_name(2048), "2MB");
        assert_eq!(hugepage_name(1 << 20), "1GB");
        assert_eq!(hugepage_name(64), "64KB");
    }

    #[test]
    fn this_machine_is_described() {
        let facts = HostFacts::detect();
        assert!(facts.kernel >= (3, 10), "{:?}", facts.kernel);
        assert_eq!(facts.recursive_read_only, facts.kernel >= (5, 12));
        assert!(!facts.hostname.is_empty());
        // What the kernel says of this very process, read another way.
        let status = fs::read_to_string("/proc/self/status").expect("proc");
        let bits = |name: &str| {
            let line = status
                .lines()
                .find_map(|l| l.strip_prefix(name))
                .expect("line");
            u64::from_str_radix(line.trim(), 16).expect("hex")
        };
        let both = bits("CapBnd:") & bits("CapPrm:");
        assert_eq!(facts.capabilities.len() as u32, both.count_ones());
    }
}
