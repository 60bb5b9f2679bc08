//! A container's cgroup as a scope of systemd's: asked for by the creator, around itself.
//!
//! systemd gets every limit that it has a property for, with the values that [`crate::limits`] writes
//! afterwards: whatever makes it write its own idea of a unit again (another unit's change in the same
//! slice, a reload of its files) then changes nothing. What it has no property for it leaves alone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use slipway_systemd::{Scope, Systemd, SystemdError, Value, unit_of};

use crate::cgroup::Hierarchies;

/// How long systemd may take for a scope: less than a CreateContainer may (limits.create_timeout), so that what
/// is said names the unit.
const START: Duration = Duration::from_secs(100);
/// Likewise for a slice and limits.sandbox_timeout.
const START_SLICE: Duration = Duration::from_secs(25);
/// Likewise, for the end of a unit without processes.
const STOP: Duration = Duration::from_secs(15);

const INFINITY: u64 = u64::MAX;

/// Why a process could not be put into a scope.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// systemd did not do it.
    #[error(transparent)]
    Systemd(#[from] SystemdError),
    /// A path that is no unit's.
    #[error("cgroup {} is not of a unit of systemd's", .0.display())]
    NoUnit(PathBuf),
    /// The scope is not where its name says.
    #[error(
        "systemd put the container into cgroup {} and not into {}; is there another slice of this name?",
        found.display(),
        expected.display()
    )]
    Elsewhere {
        /// Where the process is.
        found: PathBuf,
        /// Where it should be.
        expected: PathBuf,
    },
    /// The process can't find out where it is.
    #[error("can't read /proc/self/cgroup")]
    Unknown(#[source] io::Error),
}

/// Asks systemd for a container's scope, and goes into it. Runs in the creator.
///
/// # Errors
/// [`ScopeError`].
pub fn enter(
    cgroups: &Hierarchies,
    cgroup: &Path,
    id: &str,
    resources: Option<&LinuxResources>,
) -> Result<(), ScopeError> {
    let properties = resources
        .map(properties)
        .unwrap_or_else(|| properties(&LinuxResources::default()));
    enter_as(cgroup, &format!("slipway container {id}"), &properties)?;
    // Delegate= brings the controllers that systemd knows; hugetlb is not among them.
    cgroups.delegate(cgroup);
    Ok(())
}

/// Asks systemd for the scope of this cgroup with these properties, and goes into it.
///
/// # Errors
/// [`ScopeError`].
pub fn enter_as(
    cgroup: &Path,
    description: &str,
    properties: &[(&str, Value)],
) -> Result<(), ScopeError> {
    let (unit, slice) = names(cgroup)?;
    let scope = Scope {
        unit: &unit,
        slice: &slice,
        description,
        properties,
    };
    let joined = || own_cgroup().is_ok_and(|own| unit_of(&own.to_string_lossy()) == Some(&unit));
    Systemd::here()?.start_scope(&scope, START, &joined)?;
    let found = own_cgroup().map_err(ScopeError::Unknown)?;
    if found != cgroup {
        return Err(ScopeError::Elsewhere {
            found,
            expected: cgroup.to_owned(),
        });
    }
    Ok(())
}

/// Makes a pod's slice; true when it was not there.
///
/// # Errors
/// [`ScopeError`].
pub fn make_slice(cgroups: &Hierarchies, cgroup: &Path) -> Result<bool, ScopeError> {
    let exists = || cgroups.v2_dir(cgroup).is_some_and(|dir| dir.is_dir());
    if exists() {
        return Ok(false);
    }
    let text = cgroup.to_string_lossy();
    let unit = unit_of(&text).ok_or_else(|| ScopeError::NoUnit(cgroup.to_owned()))?;
    Systemd::here()?.start_slice(unit, "slipway pod", START_SLICE, &exists)?;
    Ok(true)
}

/// Ends the unit of a cgroup without processes, if it is one of systemd's: removing the directory alone would
/// leave it to chance whether systemd notices.
///
/// # Errors
/// [`SystemdError`].
pub fn stop(cgroups: &Hierarchies, cgroup: &Path) -> Result<(), SystemdError> {
    let text = cgroup.to_string_lossy();
    let there = || cgroups.v2_dir(cgroup).is_some_and(|dir| dir.is_dir());
    match unit_of(&text) {
        Some(unit) if cgroups.unified() && slipway_systemd::booted() && there() => {
            Systemd::here()?.stop(unit, STOP)
        }
        _ => Ok(()),
    }
}

/// The scope and the slice that a container's cgroup is made of.
fn names(cgroup: &Path) -> Result<(String, String), ScopeError> {
    let no_unit = || ScopeError::NoUnit(cgroup.to_owned());
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let unit = name(cgroup)
        .filter(|n| n.ends_with(".scope"))
        .ok_or_else(no_unit)?;
    let slice = match cgroup.parent() {
        Some(parent) if parent == Path::new("/") => "-.slice".to_owned(),
        Some(parent) => name(parent)
            .filter(|n| n.ends_with(".slice"))
            .ok_or_else(no_unit)?,
        None => return Err(no_unit()),
    };
    Ok((unit, slice))
}

/// Where the calling process is in the v2 hierarchy.
pub fn own_cgroup() -> io::Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::"));
    own.map(PathBuf::from)
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// systemd's names for a container's limits.
fn properties(resources: &LinuxResources) -> Vec<(&'static str, Value)> {
    // Said also where there is no limit: systemd has a default of its own.
    let mut tasks = INFINITY;
    let mut found = Found::default();
    if let Some(pids) = resources.pids() {
        tasks = limit(pids.limit());
    }
    if let Some(memory) = resources.memory() {
        let max = memory.limit().filter(|l| *l != 0);
        if let Some(max) = max {
            found.set("MemoryMax", Value::U64(limit(max)));
        }
        match (memory.swap(), max) {
            // Of memory and swap together in the specification, of swap alone in v2.
            (Some(both), Some(max)) if both > 0 && max > 0 => {
                found.set(
                    "MemorySwapMax",
                    Value::U64((both - max).max(0).unsigned_abs()),
                );
            }
            (Some(-1), _) => found.set("MemorySwapMax", Value::U64(INFINITY)),
            _ => {}
        }
        if let Some(low) = memory.reservation().filter(|r| *r > 0) {
            found.set("MemoryLow", Value::U64(low.unsigned_abs()));
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|s| *s > 0) {
            found.set("CPUWeight", Value::U64(weight(shares)));
        }
        found.quota(cpu.quota(), cpu.period());
        for (name, list) in [
            ("AllowedCPUs", cpu.cpus()),
            ("AllowedMemoryNodes", cpu.mems()),
        ] {
            if let Some(bits) = list.as_ref().and_then(|list| bitmap(list)) {
                found.set(name, Value::Bytes(bits));
            }
        }
    }
    for (key, value) in resources.unified().iter().flatten() {
        let number = || match value.trim() {
            "max" => Some(INFINITY),
            text => text.parse().ok(),
        };
        let name = match key.as_str() {
            "memory.max" => "MemoryMax",
            "memory.high" => "MemoryHigh",
            "memory.low" => "MemoryLow",
            "memory.min" => "MemoryMin",
            "memory.swap.max" => "MemorySwapMax",
            "cpu.weight" => "CPUWeight",
            "io.weight" => "IOWeight",
            "pids.max" => {
                tasks = number().unwrap_or(tasks);
                continue;
            }
            "cpu.max" => {
                let mut parts = value.split_whitespace();
                let quota = parts.next().map(|q| q.parse().unwrap_or(-1));
                found.quota(quota, parts.next().and_then(|p| p.parse().ok()));
                continue;
            }
            "cpuset.cpus" | "cpuset.mems" => {
                let name = match key.as_str() {
                    "cpuset.cpus" => "AllowedCPUs",
                    _ => "AllowedMemoryNodes",
                };
                if let Some(bits) = bitmap(value.trim()) {
                    found.set(name, Value::Bytes(bits));
                }
                continue;
            }
            _ => continue,
        };
        // What is no number the kernel refuses, when it is written.
        if let Some(number) = number() {
            found.set(name, Value::U64(number));
        }
    }
    found.set("TasksMax", Value::U64(tasks));
    found.0
}

#[derive(Default)]
struct Found(Vec<(&'static str, Value)>);

impl Found {
    /// The last one wins, as `unified` is written last.
    fn set(&mut self, name: &'static str, value: Value) {
        self.0.retain(|(n, _)| *n != name);
        self.0.push((name, value));
    }

    fn quota(&mut self, quota: Option<i64>, period: Option<u64>) {
        /// The kernel's.
        const PERIOD: u64 = 100_000;
        /// systemd keeps per cent of a CPU in its files, and cuts what is finer.
        const STEP: u64 = 10_000;
        if let Some(period) = period.filter(|p| *p > 0) {
            self.set("CPUQuotaPeriodUSec", Value::U64(period));
        }
        let Some(quota) = quota.filter(|q| *q != 0) else {
            return;
        };
        let per_second = match u64::try_from(quota) {
            Ok(quota) => {
                let period = u128::from(period.filter(|p| *p > 0).unwrap_or(PERIOD));
                let exact = (u128::from(quota) * 1_000_000).div_ceil(period);
                let exact = u64::try_from(exact).unwrap_or(INFINITY - STEP);
                // Rounded up: should systemd ever write it, the container gets a little more, never less.
                exact.next_multiple_of(STEP)
            }
            Err(_) => INFINITY,
        };
        self.set("CPUQuotaPerSecUSec", Value::U64(per_second));
    }
}

/// A limit where everything not positive is none.
fn limit(value: i64) -> u64 {
    u64::try_from(value)
        .ok()
        .filter(|v| *v > 0)
        .unwrap_or(INFINITY)
}

/// v1's shares as v2's weight: what cgroups-rs writes, too.
fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        shares => (shares - 2) * 9_999 / 262_142 + 1,
    }
}

/// A list such as `0-3,7` as a bitmap, the lowest byte first.
fn bitmap(list: &str) -> Option<Vec<u8>> {
    let mut bits = Vec::new();
    for item in list.split(',') {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last < first || last > 65_535 {
            return None;
        }
        for n in first..=last {
            if bits.len() <= n / 8 {
                bits.resize(n / 8 + 1, 0);
            }
            bits[n / 8] |= 1 << (n % 8);
        }
    }
    Some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{
        LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResourcesBuilder,
    };

    fn value(properties: &[(&'static str, Value)], name: &str) -> Option<Value> {
        let mut all = properties.iter().filter(|(n, _)| *n == name);
        let found = all.next().map(|(_, v)| v.clone());
        assert!(all.next().is_none(), "{name} twice");
        found
    }

    #[test]
    fn limits_become_properties() {
        let resources = LinuxResourcesBuilder::default()
            .memory(
                LinuxMemoryBuilder::default()
                    .limit(64i64 << 20)
                    .swap(96i64 << 20)
                    .build()
                    .unwrap(),
            )
            .pids(LinuxPidsBuilder::default().limit(17).build().unwrap())
            .cpu(
                LinuxCpuBuilder::default()
                    .shares(1024u64)
                    .quota(25_000i64)
                    .period(50_000u64)
                    .cpus("0-1,9")
                    .mems("0")
                    .build()
                    .unwrap(),
            )
            .unified(std::collections::HashMap::from([
                ("memory.high".to_owned(), "50331648".to_owned()),
                ("memory.low".to_owned(), "max".to_owned()),
                ("pids.max".to_owned(), "12".to_owned()),
                ("hugetlb.2MB.max".to_owned(), "0".to_owned()),
            ]))
            .build()
            .unwrap();
        let found = properties(&resources);
        for (name, expected) in [
            ("MemoryMax", Value::U64(64 << 20)),
            ("MemorySwapMax", Value::U64(32 << 20)),
            ("MemoryHigh", Value::U64(48 << 20)),
            ("MemoryLow", Value::U64(INFINITY)),
            ("TasksMax", Value::U64(12)),
            ("CPUWeight", Value::U64(39)),
            ("CPUQuotaPeriodUSec", Value::U64(50_000)),
            ("CPUQuotaPerSecUSec", Value::U64(500_000)),
            ("AllowedCPUs", Value::Bytes(vec![0b11, 0b10])),
            ("AllowedMemoryNodes", Value::Bytes(vec![1])),
        ] {
            assert_eq!(value(&found, name), Some(expected), "{name}");
        }
        assert_eq!(found.len(), 10);
    }

    #[test]
    fn no_limit_is_said_where_systemd_has_a_default() {
        let found = properties(&LinuxResources::default());
        assert_eq!(found, [("TasksMax", Value::U64(INFINITY))]);
        let mut unlimited = LinuxResources::default();
        let cpu = LinuxCpuBuilder::default().quota(-1i64).build().unwrap();
        let memory = LinuxMemoryBuilder::default()
            .limit(-1i64)
            .swap(-1i64)
            .build()
            .unwrap();
        unlimited.set_cpu(Some(cpu)).set_memory(Some(memory));
        let found = properties(&unlimited);
        for name in ["CPUQuotaPerSecUSec", "MemoryMax", "MemorySwapMax"] {
            assert_eq!(value(&found, name), Some(Value::U64(INFINITY)), "{name}");
        }
    }

    #[test]
    fn quotas_are_rounded_up_to_what_systemd_keeps() {
        for (quota, period, per_second) in [
            (1_200, Some(100_000), 20_000),
            (12_500, None, 130_000),
            (250_000, Some(100_000), 2_500_000),
            (1_000, Some(1_000_000), 10_000),
        ] {
            let mut found = Found::default();
            found.quota(Some(quota), period);
            let value = value(&found.0, "CPUQuotaPerSecUSec");
            assert_eq!(value, Some(Value::U64(per_second)));
        }
    }

    #[test]
    fn a_cgroup_is_a_scope_in_a_slice() {
        let of = |path: &str| names(Path::new(path)).ok();
        let pair = |unit: &str, slice: &str| Some((unit.to_owned(), slice.to_owned()));
        assert_eq!(
            of("/a.slice/a-b.slice/c.scope"),
            pair("c.scope", "a-b.slice")
        );
        assert_eq!(of("/c.scope"), pair("c.scope", "-.slice"));
        for path in ["/a/c.scope", "/a.slice/c", "/", "c"] {
            assert_eq!(of(path), None, "{path}");
        }
        assert_eq!(bitmap("3-1"), None);
        assert_eq!(bitmap("x"), None);
    }
}
