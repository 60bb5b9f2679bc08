//! Where a pod's and a container's cgroups are, on pure v2, hybrid and v1 hosts, and what is done to them
//! beside what libcontainer does (it makes a container's cgroup and writes its limits).

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The cgroup file systems of this host.
#[derive(Debug, Clone, Default)]
pub struct Hierarchies {
    /// Mount points of the v1 hierarchies, controllers and named ones.
    v1: Vec<V1>,
    /// Mount point of the v2 hierarchy: the only one, or beside v1 (hybrid).
    v2: Option<PathBuf>,
}

#[derive(Debug, Clone)]
struct V1 {
    mount: PathBuf,
    cpuset: bool,
    memory: bool,
    devices: bool,
    freezer: bool,
    blkio: bool,
}

impl Hierarchies {
    /// Reads the mount table of this process.
    ///
    /// # Errors
    /// When `/proc/self/mountinfo` can't be read.
    pub fn detect() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/self/mountinfo")?))
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
            let mount = PathBuf::from(mount);
            // Only the host's own: a bind of a hierarchy elsewhere is not one more hierarchy.
            if !mount.starts_with("/sys/fs/cgroup") {
                continue;
            }
            match kind {
                Some("cgroup2") => found.v2 = Some(mount),
                Some("cgroup") => {
                    let has = |name: &str| options.split(',').any(|o| o == name);
                    found.v1.retain(|v| v.mount != mount);
                    found.v1.push(V1 {
                        cpuset: has("cpuset"),
                        memory: has("memory"),
                        devices: has("devices"),
                        freezer: has("freezer"),
                        blkio: has("blkio"),
                        mount,
                    });
                }
                _ => {}
            }
        }
        found
    }

    /// Whether v2 is the only hierarchy.
    pub fn unified(&self) -> bool {
        self.v1.is_empty() && self.v2.is_some()
    }

    /// Where the v2 hierarchy of a hybrid host is mounted; `None` where it is the only one, or there is none.
    pub fn hidden_v2(&self) -> Option<&Path> {
        self.v2.as_deref().filter(|_| !self.v1.is_empty())
    }

    /// Whether there is no hierarchy at all.
    pub fn is_empty(&self) -> bool {
        self.v1.is_empty() && self.v2.is_none()
    }

    /// Mount points of all hierarchies.
    pub fn mount_points(&self) -> impl Iterator<Item = &Path> {
        self.v1
            .iter()
            .map(|v| &v.mount)
            .chain(&self.v2)
            .map(PathBuf::as_path)
    }

    /// A cgroup's directory in the v2 hierarchy.
    pub fn v2_dir(&self, cgroup: &Path) -> Option<PathBuf> {
        self.v2.as_ref().map(|m| inside(m, cgroup))
    }

    /// A cgroup's directory in the v1 hierarchy that has the devices controller.
    pub fn devices_dir(&self, cgroup: &Path) -> Option<PathBuf> {
        self.v1
            .iter()
            .find(|v| v.devices)
            .map(|v| inside(&v.mount, cgroup))
    }

    /// A cgroup's directory with the limits of block devices, and whether it is a v2 one; `None` where nobody has that
    /// controller.
    pub fn block_io_dir(&self, cgroup: &Path) -> Option<(PathBuf, bool)> {
        let v1 = self.v1.iter().find(|v| v.blkio);
        let v1 = v1.map(|v| (inside(&v.mount, cgroup), false));
        v1.or_else(|| self.v2_dir(cgroup).map(|dir| (dir, true)))
    }

    /// The directory by which a cgroup is frozen, and whether it is a v2 one; `None` without a freezer.
    pub fn freezer_dir(&self, cgroup: &Path) -> Option<(PathBuf, bool)> {
        let v1 = self.v1.iter().find(|v| v.freezer);
        let v1 = v1.map(|v| (inside(&v.mount, cgroup), false));
        v1.or_else(|| self.v2_dir(cgroup).map(|dir| (dir, true)))
    }

    /// The directories of a cgroup, one in each hierarchy.
    fn dirs<'a>(&'a self, cgroup: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
        self.mount_points().map(|m| inside(m, cgroup))
    }

    /// Makes a cgroup in every hierarchy; true when it was in none. A kubelet on a hybrid host makes it in
    /// the v1 hierarchies only: it is the kubelet's all the same.
    ///
    /// # Errors
    /// What the cgroup file system says.
    pub fn ensure(&self, cgroup: &Path) -> io::Result<bool> {
        let mut made = true;
        for dir in self.dirs(cgroup) {
            match dir.is_dir() {
                true => made = false,
                false => fs::create_dir_all(&dir).map_err(|e| not_made(&dir, &e))?,
            }
        }
        for v1 in self.v1.iter().filter(|v| v.cpuset) {
            inherit_cpuset(&v1.mount, cgroup)?;
        }
        if let (true, Some(v2)) = (self.unified(), &self.v2) {
            delegate(v2, cgroup)?;
        }
        Ok(made)
    }

    /// Gives an existing v2 cgroup every controller that those above it have.
    pub fn delegate(&self, cgroup: &Path) {
        if let (true, Some(v2)) = (self.unified(), &self.v2) {
            let _ = delegate(v2, cgroup);
        }
    }

    /// Moves the calling process into a cgroup, in the v1 hierarchies only (in v2 a process is born where
    /// it belongs). Through `tasks`, not `cgroup.procs`: a single-threaded process that moves itself needs
    /// no lock against forks, and so does not wait for an RCU grace period.
    ///
    /// # Errors
    /// What the cgroup file system says; hierarchies in which the cgroup does not exist are skipped.
    pub fn join_v1(&self, cgroup: &Path) -> io::Result<()> {
        for v1 in &self.v1 {
            match fs::write(inside(&v1.mount, cgroup).join("tasks"), "0") {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Opens a cgroup in the v2 hierarchy for `CLONE_INTO_CGROUP`; `None` without v2.
    ///
    /// # Errors
    /// What the cgroup file system says.
    pub fn open_v2(&self, cgroup: &Path) -> io::Result<Option<OwnedFd>> {
        self.v2_dir(cgroup)
            .map(|dir| Ok(fs::File::open(dir)?.into()))
            .transpose()
    }

    /// Makes a child cgroup in the v2 hierarchy and opens it for `CLONE_INTO_CGROUP`; `None` without v2.
    /// It has no controllers of its own: limits are its parent's, and it can be killed whole.
    ///
    /// # Errors
    /// What the cgroup file system says.
    pub fn make_leaf(&self, cgroup: &Path, name: &str) -> io::Result<Option<(PathBuf, OwnedFd)>> {
        let Some(v2) = &self.v2 else { return Ok(None) };
        let dir = inside(v2, cgroup).join(name);
        // Not its parents: a container that ended just now has no cgroup any more, and gets none.
        fs::create_dir(&dir)?;
        let fd = fs::File::open(&dir)?.into();
        Ok(Some((dir, fd)))
    }

    /// Every process in a cgroup and below it.
    pub fn pids(&self, cgroup: &Path) -> Vec<i32> {
        let mut pids = Vec::new();
        for dir in self.dirs(cgroup) {
            collect_pids(&dir, &mut pids);
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Sends a signal to every process in a cgroup and below it, again until no new one turns up.
    pub fn signal_all(&self, cgroup: &Path, signal: i32) {
        let mut killed = false;
        if signal == libc::SIGKILL
            && let Some(v2) = &self.v2
        {
            let done = fs::write(inside(v2, cgroup).join("cgroup.kill"), "1");
            // On a hybrid host this reaches only what was born there; the loop below gets the rest.
            killed = self.unified() && done.is_ok();
        }
        if !killed {
            self.signal_each(cgroup, signal);
        }
        if signal == libc::SIGKILL {
            // In a frozen v1 cgroup the signal only waits.
            for v1 in self.v1.iter().filter(|v| v.freezer) {
                thaw(&inside(&v1.mount, cgroup));
            }
        }
    }

    fn signal_each(&self, cgroup: &Path, signal: i32) {
        let mut seen = HashSet::new();
        // Bounded: a fork bomb must not hold the caller for ever; whoever needs all gone calls again.
        for _ in 0..32 {
            let mut fresh = self.pids(cgroup);
            fresh.retain(|pid| seen.insert(*pid));
            if fresh.is_empty() {
                return;
            }
            // Some at a time: each takes a descriptor.
            for some in fresh.chunks(256) {
                let pinned: Vec<_> = some.iter().map(|pid| (pid, pin(*pid))).collect();
                // Still a member after it was pinned: a recycled pid is not signalled.
                let members: HashSet<i32> = self.pids(cgroup).into_iter().collect();
                for (_, process) in pinned.iter().filter(|(pid, _)| members.contains(*pid)) {
                    process.iter().for_each(|process| send(process, signal));
                }
            }
        }
    }

    /// How many processes the kernel's OOM killer has ended in a cgroup.
    pub fn oom_kills(&self, cgroup: &Path) -> u64 {
        self.known_oom_kills(cgroup).unwrap_or(0)
    }

    /// As [`Hierarchies::oom_kills`]; `None` when no hierarchy can tell, as of a cgroup that is gone.
    pub fn known_oom_kills(&self, cgroup: &Path) -> Option<u64> {
        let read = |path: PathBuf| -> Option<u64> {
            let text = fs::read_to_string(path).ok()?;
            text.lines()
                .find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok())
        };
        let v1 = self.v1.iter().filter(|v| v.memory);
        v1.filter_map(|v| read(inside(&v.mount, cgroup).join("memory.oom_control")))
            .chain(
                self.v2
                    .iter()
                    .filter_map(|m| read(inside(m, cgroup).join("memory.events"))),
            )
            .max()
    }

    /// Removes a pod's cgroup after its containers' are gone; while other pods or processes are in it, it
    /// stays. One that somebody else made (`made` is false) loses only what [`Hierarchies::ensure`] added:
    /// on a hybrid host, its directory in the v2 hierarchy.
    pub fn remove_empty(&self, cgroup: &Path, made: bool) {
        let added = self.v2_dir(cgroup).filter(|_| !self.unified() && !made);
        for dir in self.dirs(cgroup).filter(|_| made).chain(added) {
            let _ = fs::remove_dir(dir);
        }
    }

    /// Removes a cgroup with all below it, in every hierarchy; what is not there is no error.
    ///
    /// # Errors
    /// `EBUSY` while processes are left in it.
    pub fn remove(&self, cgroup: &Path) -> io::Result<()> {
        let mut first = None;
        for dir in self.dirs(cgroup) {
            if let Err(e) = remove_tree(&dir)
                && first.is_none()
            {
                first = Some(io::Error::new(e.kind(), format!("{}: {e}", dir.display())));
            }
        }
        first.map_or(Ok(()), Err)
    }
}

/// A cgroup path (absolute in its hierarchy) below a mount point.
pub(crate) fn inside(mount: &Path, cgroup: &Path) -> PathBuf {
    mount.join(cgroup.strip_prefix("/").unwrap_or(cgroup))
}

/// A descriptor for a process; `None` when it has gone.
pub fn pin(pid: i32) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

/// Why a directory could not be made. A limit on the number or depth of cgroups says "try again", which would
/// not help anybody.
fn not_made(dir: &Path, error: &io::Error) -> io::Error {
    let hint = match error.raw_os_error() {
        Some(libc::EAGAIN) => {
            "; cgroup.max.descendants or cgroup.max.depth of a cgroup above it forbids it"
        }
        _ => "",
    };
    io::Error::new(error.kind(), format!("{}: {error}{hint}", dir.display()))
}

/// Sends a signal through a pidfd; a process that has gone is no error.
pub fn send(pidfd: &OwnedFd, signal: i32) {
    use std::os::fd::AsRawFd;
    // SAFETY: the call takes a descriptor and integers, and no siginfo.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
}

fn thaw(dir: &Path) {
    let _ = fs::write(dir.join("freezer.state"), "THAWED");
    for child in children(dir) {
        thaw(&child);
    }
}

fn collect_pids(dir: &Path, pids: &mut Vec<i32>) {
    if let Ok(text) = fs::read_to_string(dir.join("cgroup.procs")) {
        pids.extend(
            text.lines()
                .filter_map(|l| l.parse::<i32>().ok())
                .filter(|p| *p > 0),
        );
    }
    for child in children(dir) {
        collect_pids(&child, pids);
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // EBUSY is also what a cgroup with children says.
        Err(_) => {
            for child in children(dir) {
                remove_tree(&child)?;
            }
            match fs::remove_dir(dir) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            }
        }
        Ok(()) => Ok(()),
    }
}

/// Gives every cgroup above this one the controllers that its own parent has to give (v2). What can't be
/// delegated is left out: a limit that needs it fails by name.
fn delegate(mount: &Path, cgroup: &Path) -> io::Result<()> {
    let words = |dir: &Path, file: &str| -> io::Result<Vec<String>> {
        let text = fs::read_to_string(dir.join(file))?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    };
    // What has come down to the last one went through all.
    let own = inside(mount, cgroup);
    if let Some(parent) = own.parent().filter(|parent| parent.starts_with(mount))
        && let Ok(given) = words(parent, "cgroup.subtree_control")
    {
        let all = words(mount, "cgroup.controllers")?;
        if all.iter().all(|controller| given.contains(controller)) {
            return Ok(());
        }
    }
    let mut dir = mount.to_owned();
    let parts: Vec<_> = cgroup
        .strip_prefix("/")
        .unwrap_or(cgroup)
        .components()
        .collect();
    for part in parts {
        let words = |file: &str| words(&dir, file);
        let given = words("cgroup.subtree_control")?;
        let missing: Vec<String> = words("cgroup.controllers")?
            .into_iter()
            .filter(|c| !given.contains(c))
            .collect();
        // In a cgroup that holds processes the kernel refuses the controllers of whole processes (memory, io),
        // but takes those of threads (cpu, pids), and thereby makes it a threaded domain: no process could be
        // born below it any more. The root alone may hold processes.
        if !missing.is_empty() && (dir == mount || words("cgroup.procs")?.is_empty()) {
            for controller in missing {
                let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        }
        dir.push(part);
    }
    Ok(())
}

/// A new v1 cpuset has no CPUs and no memory nodes, and no task can enter it: it gets its parent's.
fn inherit_cpuset(mount: &Path, cgroup: &Path) -> io::Result<()> {
    let mut dir = mount.to_owned();
    for part in cgroup.strip_prefix("/").unwrap_or(cgroup).components() {
        let parent = dir.clone();
        dir.push(part);
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if fs::read_to_string(dir.join(file))?.trim().is_empty() {
                fs::write(dir.join(file), fs::read_to_string(parent.join(file))?)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
33 25 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
34 33 0:29 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
35 33 0:30 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
36 33 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
37 33 0:31 / /elsewhere rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn the_layout_is_read_from_the_mount_table() {
        let hybrid = Hierarchies::parse(HYBRID);
        assert!(!hybrid.unified());
        assert_eq!(hybrid.v1.len(), 2);
        assert!(hybrid.v1[0].cpuset && hybrid.v1[1].memory);
        assert_eq!(
            hybrid.v2.as_deref(),
            Some(Path::new("/sys/fs/cgroup/unified"))
        );
        let pure = "30 25 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";
        assert!(Hierarchies::parse(pure).unified());
        assert_eq!(
            Hierarchies::parse(pure)
                .dirs(Path::new("/pod/c"))
                .collect::<Vec<_>>(),
            [PathBuf::from("/sys/fs/cgroup/pod/c")]
        );
    }

    #[test]
    fn a_cgroup_comes_and_goes_in_every_hierarchy() {
        let host = Hierarchies::detect().unwrap();
        if host.dirs(Path::new("/")).next().is_none() || !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: needs root and a cgroup file system");
            return;
        }
        let cgroup = PathBuf::from(format!("/slipway-unit-{}/inner", std::process::id()));
        let top = cgroup.parent().unwrap();
        assert!(host.ensure(&cgroup).unwrap());
        assert!(!host.ensure(&cgroup).unwrap());
        assert!(host.pids(&cgroup).is_empty());
        assert_eq!(host.oom_kills(&cgroup), 0);
        host.remove(top).unwrap();
        host.remove(top).unwrap();
        assert!(host.dirs(top).all(|d| !d.exists()));
    }
}
