//! Changing the limits of a cgroup that is in use: all that is named, or nothing.
//!
//! Every file is written here, not by `cgroups-rs`: that knows no way back, and writes quota and period in an
//! order that fails where one of them must go first. What v2's files are to say is known to [`limits_v2`].

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use slipway_proto::keeper::ErrorKind;
use slipway_systemd::SystemdError;

use crate::cgroup::{Hierarchies, inside};
use crate::oci::CommandError;
use crate::{block_io, limits_v2, scope};

/// Why limits could not be changed; nothing was.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// More is in use than the new limit allows.
    #[error(
        "a memory limit of {limit} bytes is below what is in use{}; nothing was changed",
        usage.map(|usage| format!(", {usage} bytes")).unwrap_or_default()
    )]
    InUse {
        /// The new limit.
        limit: i64,
        /// What is in use, where it was asked.
        usage: Option<i64>,
    },
    /// The host has no such limit.
    #[error("this host has no {file} in cgroup {}; see slipway check", cgroup.display())]
    Missing {
        /// The file that is not there.
        file: String,
        /// The cgroup.
        cgroup: PathBuf,
    },
    /// The kernel refused a value.
    #[error("can't write {value:?} to {}; nothing was changed", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The value.
        value: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// systemd did not take the new limits over, and would have written the old ones again some day.
    #[error("{0}; nothing was changed")]
    Systemd(SystemdError),
    /// The container's runtime did not take them over.
    #[error("{0}; nothing was changed")]
    Runtime(CommandError),
}

impl ResizeError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InUse { .. } => ErrorKind::WrongState,
            Self::Missing { .. } | Self::Write { .. } => ErrorKind::Invalid,
            Self::Systemd(SystemdError::Timeout { .. }) => ErrorKind::TimedOut,
            Self::Systemd(_) => ErrorKind::Internal,
            Self::Runtime(error) => error.kind(),
        }
    }
}

type Result<T> = std::result::Result<T, ResizeError>;

/// Changes the limits of a cgroup. Who else keeps them is told by `tell`, once the kernel has taken them.
///
/// # Errors
/// [`ResizeError`]; everything is as it was before.
pub fn update(
    cgroups: &Hierarchies,
    cgroup: &Path,
    resources: &LinuxResources,
    tell: impl FnOnce() -> std::result::Result<(), CommandError>,
) -> Result<()> {
    let mut change = Change {
        cgroups,
        cgroup,
        before: Vec::new(),
        told: false,
    };
    let done = change.all(resources).and_then(|()| change.settle());
    let done = done.and_then(|()| tell().map_err(ResizeError::Runtime));
    if done.is_err() {
        for (file, value) in change.before.iter().rev() {
            let _ = fs::write(file, value);
        }
        // Where systemd has heard of the new ones, it hears of the old ones.
        if change.told {
            let _ = scope::tell(cgroups, cgroup, &change.texts());
        }
    }
    done
}

/// A change under way.
struct Change<'a> {
    cgroups: &'a Hierarchies,
    cgroup: &'a Path,
    /// What was written so far, and what was there before.
    before: Vec<(PathBuf, String)>,
    /// systemd may know the new limits.
    told: bool,
}

impl Change<'_> {
    /// Makes the new limits systemd's as well, where the cgroup is its.
    fn settle(&mut self) -> Result<()> {
        let new = self.texts();
        if !new.is_empty() {
            self.told = true;
            scope::tell(self.cgroups, self.cgroup, &new).map_err(ResizeError::Systemd)?;
        }
        // It writes what it makes of them, and has whole per cent of a CPU only.
        for ((file, _), (_, value)) in self.before.iter().zip(&new) {
            if self.read(file).is_some_and(|now| now.trim() != value) {
                fs::write(file, value).map_err(|source| ResizeError::Write {
                    file: file.clone(),
                    value: value.clone(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// The files that were written, by name, and what they say now.
    fn texts(&self) -> Vec<(String, String)> {
        let text = |file: &PathBuf| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let text = self.read(file).unwrap_or_default();
            (name.into_owned(), text.trim().to_owned())
        };
        self.before.iter().map(|(file, _)| text(file)).collect()
    }

    fn all(&mut self, resources: &LinuxResources) -> Result<()> {
        match self.cgroups.v2_dir(self.cgroup) {
            Some(dir) if self.cgroups.unified() => self.all_v2(&dir, resources)?,
            _ => self.all_v1(resources)?,
        }
        // In order: which of two bad ones is told of must not change from one try to the next.
        let unified = resources.unified().iter().flatten();
        for (key, value) in unified.collect::<BTreeMap<_, _>>() {
            self.write(key, value)?;
        }
        Ok(())
    }

    fn all_v2(&mut self, dir: &Path, resources: &LinuxResources) -> Result<()> {
        if let Some(limit) = resources.memory().and_then(|memory| memory.limit()) {
            self.room(limit)?;
        }
        for (file, value) in limits_v2::files(dir, resources) {
            self.write(&file, &value)?;
        }
        self.weight(resources, block_io::WEIGHT_V2)
    }

    fn all_v1(&mut self, resources: &LinuxResources) -> Result<()> {
        // Memory first: it is the limit that the kernel refuses for what is in use.
        if let Some(memory) = resources.memory() {
            self.memory(memory)?;
        }
        if let Some(cpu) = resources.cpu() {
            self.cpu(cpu)?;
        }
        for limit in resources.hugepage_limits().iter().flatten() {
            self.hugepages(limit)?;
        }
        if let Some(pids) = resources.pids() {
            let limit = Some(pids.limit()).filter(|n| *n > 0);
            self.write(
                "pids.max",
                &limit.map_or("max".to_owned(), |n| n.to_string()),
            )?;
        }
        self.weight(resources, block_io::WEIGHT_V1)
    }

    /// The share of block devices, in whichever of two files the kernel has.
    fn weight(&mut self, resources: &LinuxResources, files: [&str; 2]) -> Result<()> {
        let weight = resources.block_io().as_ref().and_then(|io| io.weight());
        let Some(weight) = weight.filter(|weight| *weight > 0) else {
            return Ok(());
        };
        let file = files.iter().find(|file| self.find(file).is_some());
        let file = file.unwrap_or(&files[1]);
        self.write(file, &block_io::weight(file, weight).to_string())
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<()> {
        let (limit, swap) = (memory.limit(), memory.swap());
        if let Some(soft) = memory.reservation() {
            self.write("memory.soft_limit_in_bytes", &soft.to_string())?;
        }
        let both = self.find("memory.memsw.limit_in_bytes");
        let (Some(both), Some(swap)) = (both, swap) else {
            return limit.map_or(Ok(()), |limit| self.memory_alone(limit));
        };
        // Memory alone may never exceed memory and swap together: whichever makes room goes first.
        let now = self.read(&both).and_then(|text| text.trim().parse().ok());
        let grows = swap == -1 || now.is_some_and(|now: i64| swap > now);
        if grows {
            self.write_file(&both, &swap.to_string())?;
        }
        if let Some(limit) = limit {
            self.memory_alone(limit)?;
        }
        if !grows {
            let written = self.write_file(&both, &swap.to_string());
            return written.map_err(|e| busy(e, swap));
        }
        Ok(())
    }

    /// The kernel reclaims what it can, and says EBUSY when that is not enough.
    fn memory_alone(&mut self, limit: i64) -> Result<()> {
        let written = self.write("memory.limit_in_bytes", &limit.to_string());
        written.map_err(|e| busy(e, limit))
    }

    /// v2 would rather kill than refuse, so the use is looked at before, as runc does.
    fn room(&self, limit: i64) -> Result<()> {
        let usage = self
            .find("memory.current")
            .and_then(|file| self.read(&file))
            .and_then(|text| text.trim().parse::<i64>().ok());
        match usage {
            Some(usage) if limit > 0 && usage > limit => Err(ResizeError::InUse {
                limit,
                usage: Some(usage),
            }),
            _ => Ok(()),
        }
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<()> {
        if let Some(cpus) = cpu.cpus() {
            self.write("cpuset.cpus", cpus)?;
        }
        if let Some(mems) = cpu.mems() {
            self.write("cpuset.mems", mems)?;
        }
        if let Some(shares) = cpu.shares() {
            self.write("cpu.shares", &shares.to_string())?;
        }
        if let Some(period) = cpu.realtime_period() {
            self.write("cpu.rt_period_us", &period.to_string())?;
        }
        if let Some(runtime) = cpu.realtime_runtime() {
            self.write("cpu.rt_runtime_us", &runtime.to_string())?;
        }
        let quota = cpu.quota().map(|q| q.to_string());
        let period = cpu.period().map(|p| p.to_string());
        let quota = quota.as_deref().map(|q| ("cpu.cfs_quota_us", q));
        let period = period.as_deref().map(|p| ("cpu.cfs_period_us", p));
        // The share of a CPU that the two make together must fit into the parent's at every step, so one order
        // may be refused where the other is not.
        let written = self.before.len();
        let first = self.each([quota, period]);
        if first.is_err() {
            self.undo(written);
            return self.each([period, quota]);
        }
        first
    }

    fn each(&mut self, files: [Option<(&str, &str)>; 2]) -> Result<()> {
        let mut files = files.into_iter().flatten();
        files.try_for_each(|(file, value)| self.write(file, value))
    }

    fn undo(&mut self, from: usize) {
        for (file, value) in self.before.drain(from..).rev() {
            let _ = fs::write(file, value);
        }
    }

    fn hugepages(&mut self, limit: &LinuxHugepageLimit) -> Result<()> {
        let file = format!("hugetlb.{}.limit_in_bytes", limit.page_size());
        self.write(&file, &limit.limit().to_string())
    }

    /// A file of the cgroup, in whichever hierarchy has it.
    fn find(&self, name: &str) -> Option<PathBuf> {
        let mounts = self.cgroups.mount_points();
        mounts
            .map(|mount| inside(mount, self.cgroup).join(name))
            .find(|file| file.exists())
    }

    fn read(&self, file: &Path) -> Option<String> {
        fs::read_to_string(file).ok()
    }

    fn write(&mut self, name: &str, value: &str) -> Result<()> {
        // A name is one of ours, or was checked by the daemon; it never leaves the cgroup all the same.
        let file = Some(name).filter(|name| !name.contains('/'));
        let file = file.and_then(|name| self.find(name));
        let file = file.ok_or_else(|| ResizeError::Missing {
            file: name.to_owned(),
            cgroup: self.cgroup.to_owned(),
        })?;
        self.write_file(&file, value)
    }

    fn write_file(&mut self, file: &Path, value: &str) -> Result<()> {
        let before = self.read(file);
        fs::write(file, value).map_err(|source| ResizeError::Write {
            file: file.to_owned(),
            value: value.to_owned(),
            source,
        })?;
        self.before
            .extend(before.map(|before| (file.to_owned(), before)));
        Ok(())
    }
}

fn busy(error: ResizeError, limit: i64) -> ResizeError {
    match error {
        ResizeError::Write { source, .. } if source.raw_os_error() == Some(libc::EBUSY) => {
            ResizeError::InUse { limit, usage: None }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};

    const MIB: i64 = 1 << 20;

    /// A cgroup that goes with the test.
    struct Temporary(Hierarchies, PathBuf);

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = self.0.remove(&self.1);
        }
    }

    impl Temporary {
        fn new(name: &str) -> Option<Self> {
            let host = Hierarchies::detect().unwrap();
            if !nix::unistd::geteuid().is_root() || host.is_empty() {
                println!("SKIPPED: needs root and a cgroup file system");
                return None;
            }
            let cgroup = PathBuf::from(format!("/slipway-resize-{name}-{}", std::process::id()));
            host.ensure(&cgroup).unwrap();
            Some(Self(host, cgroup))
        }

        fn read(&self, v1: &str, v2: &str) -> String {
            let name = if self.0.unified() { v2 } else { v1 };
            let change = Change {
                cgroups: &self.0,
                cgroup: &self.1,
                before: Vec::new(),
                told: false,
            };
            let file = change.find(name).unwrap();
            change.read(&file).unwrap().trim().to_owned()
        }

        fn memory(&self) -> String {
            self.read("memory.limit_in_bytes", "memory.max")
        }
    }

    fn limits(memory: Option<i64>, cpus: Option<&str>, quota: Option<i64>) -> LinuxResources {
        let mut resources = LinuxResourcesBuilder::default();
        if let Some(limit) = memory {
            let memory = LinuxMemoryBuilder::default()
                .limit(limit)
                .swap(limit)
                .build();
            resources = resources.memory(memory.unwrap());
        }
        let mut cpu = LinuxCpuBuilder::default();
        if let Some(cpus) = cpus {
            cpu = cpu.cpus(cpus);
        }
        if let Some(quota) = quota {
            cpu = cpu.quota(quota).period(100_000u64);
        }
        resources.cpu(cpu.build().unwrap()).build().unwrap()
    }

    #[test]
    fn memory_goes_up_and_down() {
        let Some(at) = Temporary::new("updown") else {
            return;
        };
        for limit in [64 * MIB, 128 * MIB, 32 * MIB, 256 * MIB] {
            update(
                &at.0,
                &at.1,
                &limits(Some(limit), None, Some(limit / 1024)),
                || Ok(()),
            )
            .unwrap();
            assert_eq!(at.memory(), limit.to_string());
            let quota = at.read("cpu.cfs_quota_us", "cpu.max");
            assert!(quota.starts_with(&(limit / 1024).to_string()), "{quota}");
        }
    }

    #[test]
    fn what_was_changed_before_a_refusal_is_changed_back() {
        let Some(at) = Temporary::new("back") else {
            return;
        };
        update(
            &at.0,
            &at.1,
            &limits(Some(64 * MIB), None, Some(50_000)),
            || Ok(()),
        )
        .unwrap();
        let bad = limits(Some(128 * MIB), Some("5000"), Some(20_000));
        let error = update(&at.0, &at.1, &bad, || Ok(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains("cpuset.cpus"), "{error}");
        assert_eq!(at.memory(), (64 * MIB).to_string());
        let mut file = LinuxResources::default();
        file.set_unified(Some(
            [("../cgroup.procs".to_owned(), "1".to_owned())].into(),
        ));
        let error = update(&at.0, &at.1, &file, || Ok(())).unwrap_err();
        assert!(matches!(error, ResizeError::Missing { .. }), "{error}");
    }
}
