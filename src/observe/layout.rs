//! Where the cgroup controllers of this host are.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Mount points of the hierarchies, by what they account.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    v1: BTreeMap<String, PathBuf>,
    v2: Option<PathBuf>,
}

impl Layout {
    /// Reads the mount table of this process.
    ///
    /// # Errors
    /// When `/proc/self/mountinfo` can't be read.
    pub fn detect() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string(
            "/proc/self/mountinfo",
        )?))
    }

    fn parse(mountinfo: &str) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some((front, back)) = line.split_once(" - ") else {
                continue;
            };
            let Some(mount) = front.split(' ').nth(4) else {
                continue;
            };
            let mut back = back.split(' ');
            let (kind, options) = (back.next(), back.nth(1).unwrap_or_default());
            // Only the host's own: a bind of a hierarchy elsewhere is not one more hierarchy.
            if !mount.starts_with("/sys/fs/cgroup") {
                continue;
            }
            match kind {
                Some("cgroup2") => found.v2 = Some(mount.into()),
                Some("cgroup") => {
                    for option in options.split(',') {
                        found.v1.insert(option.to_owned(), mount.into());
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// A cgroup's directory in the v1 hierarchy of a controller.
    pub fn v1(&self, controller: &str, cgroup: &Path) -> Option<PathBuf> {
        self.v1.get(controller).map(|mount| inside(mount, cgroup))
    }

    /// A cgroup's directory in the v2 hierarchy, which on a hybrid host has no controllers but tells
    /// pressure.
    pub fn v2(&self, cgroup: &Path) -> Option<PathBuf> {
        self.v2.as_ref().map(|mount| inside(mount, cgroup))
    }

    /// Whether v2 is the only hierarchy.
    pub fn unified(&self) -> bool {
        self.v1.is_empty() && self.v2.is_some()
    }
}

/// A cgroup path (absolute in its hierarchy) below a mount point.
fn inside(mount: &Path, cgroup: &Path) -> PathBuf {
    mount.join(cgroup.strip_prefix("/").unwrap_or(cgroup))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_found_where_they_are_mounted() {
        let hybrid = Layout::parse(
            "\
33 25 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
34 33 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 33 0:30 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
36 33 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
37 33 0:31 / /elsewhere rw,relatime - cgroup2 cgroup2 rw
",
        );
        let pod = Path::new("/pod/c");
        let dir = |text: &str| Some(PathBuf::from(text));
        assert_eq!(
            hybrid.v1("cpuacct", pod),
            dir("/sys/fs/cgroup/cpu,cpuacct/pod/c")
        );
        assert_eq!(hybrid.v1("memory", pod), dir("/sys/fs/cgroup/memory/pod/c"));
        assert_eq!(hybrid.v1("pids", pod), None);
        assert_eq!(hybrid.v2(pod), dir("/sys/fs/cgroup/unified/pod/c"));
        assert!(!hybrid.unified());
        let pure = Layout::parse("30 25 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n");
        assert!(pure.unified());
        assert_eq!(pure.v2(pod), dir("/sys/fs/cgroup/pod/c"));
    }
}
