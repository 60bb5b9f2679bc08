//! A container's cgroup as a scope of systemd's: asked for by the creator, around itself.
//!
//! systemd gets every limit that it has a property for, with the values that [`crate::limits`] writes
//! afterwards, and hears of every change ([`crate::resize`]): whatever makes it write its own idea of a unit
//! again (another unit's change in the same slice, a reload of its files) then changes nothing. What it has
//! no property for it leaves alone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use slipway_systemd::{Scope, Systemd, SystemdError, Value, unit_of};

use crate::cgroup::Hierarchies;
use crate::limits_v2;

/// How long systemd may take for a scope: less than a CreateContainer may (limits.create_timeout), so that what
/// is said names the unit.
const START: Duration = Duration::from_secs(100);
/// Likewise for a slice and limits.sandbox_timeout.
const START_SLICE: Duration = Duration::from_secs(25);
/// Likewise, for new limits, and limits.start_timeout.
const CHANGE: Duration = Duration::from_secs(25);
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
    let dir = cgroups.v2_dir(cgroup).unwrap_or_default();
    let mut files = resources.map_or_else(Vec::new, |r| limits_v2::files(&dir, r));
    // The last one counts, and `unified` is written last.
    let unified = resources.and_then(|r| r.unified().as_ref());
    files.extend(
        unified
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.clone())),
    );
    let properties = properties(&files);
    enter_as(cgroup, &format!("slipway container {id}"), &properties)?;
    // Delegate= brings the controllers that systemd knows; hugetlb is not among them.
    cgroups.delegate(cgroup);
    Ok(())
}

/// Tells systemd of limits that were changed in a cgroup's files, if the cgroup is a scope of its: otherwise it
/// would write the old ones again with its next reload. `files` are names and what the files say. systemd
/// writes its own idea of the new ones before this returns.
///
/// # Errors
/// [`SystemdError`]; systemd has taken over nothing then, unless it gave no answer.
pub fn tell(
    cgroups: &Hierarchies,
    cgroup: &Path,
    files: &[(String, String)],
) -> Result<(), SystemdError> {
    let text = cgroup.to_string_lossy();
    let unit = unit_of(&text).filter(|unit| unit.ends_with(".scope"));
    let (Some(unit), true, true) = (unit, cgroups.unified(), slipway_systemd::booted()) else {
        return Ok(());
    };
    let properties = changed(files);
    if properties.is_empty() {
        return Ok(());
    }
    Systemd::here()?.set_properties(unit, &properties, CHANGE)
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
        // Right also where systemd numbers processes in another PID namespace.
        process: 0,
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

/// systemd's names for all limits of a new container, given as files and their texts.
fn properties(files: &[(String, String)]) -> Vec<(&'static str, Value)> {
    let mut properties = changed(files);
    // Said also where there is no limit: systemd has a default of its own.
    if !properties.iter().any(|(name, _)| *name == "TasksMax") {
        properties.push(("TasksMax", Value::U64(INFINITY)));
    }
    properties
}

/// systemd's names for what these files say. What systemd can't hold is left out, and what is no value of the
/// file's: the kernel refuses that by the file's name, when it is written.
fn changed(files: &[(String, String)]) -> Vec<(&'static str, Value)> {
    let mut found = Found::default();
    for (file, text) in files {
        let text = text.trim();
        // systemd has no limit of nothing at all: the least that it knows.
        let positive = || size(text).map(|n| n.max(1));
        let weight = |text: &str| text.parse().ok().filter(|n| (1..=10_000).contains(n));
        let (name, number) = match file.as_str() {
            "memory.max" => ("MemoryMax", positive()),
            "memory.high" => ("MemoryHigh", positive()),
            "memory.low" => ("MemoryLow", size(text)),
            "memory.min" => ("MemoryMin", size(text)),
            "memory.swap.max" => ("MemorySwapMax", size(text)),
            "pids.max" => ("TasksMax", positive()),
            "cpu.weight" => ("CPUWeight", weight(text)),
            "io.weight" => {
                // Of every device, perhaps followed by those of some.
                let first = text.lines().next().unwrap_or_default();
                ("IOWeight", weight(first.trim_start_matches("default ")))
            }
            "cpu.max" => {
                found.quota(text);
                continue;
            }
            "cpuset.cpus" => {
                found.list("AllowedCPUs", text);
                continue;
            }
            "cpuset.mems" => {
                found.list("AllowedMemoryNodes", text);
                continue;
            }
            _ => continue,
        };
        if let Some(number) = number {
            found.set(name, Value::U64(number));
        }
    }
    found.0
}

#[derive(Default)]
struct Found(Vec<(&'static str, Value)>);

impl Found {
    fn set(&mut self, name: &'static str, value: Value) {
        self.0.retain(|(n, _)| *n != name);
        self.0.push((name, value));
    }

    fn list(&mut self, name: &'static str, list: &str) {
        if let Some(bits) = bitmap(list) {
            self.set(name, Value::Bytes(bits));
        }
    }

    /// What `cpu.max` says: a quota or `max`, and perhaps a period.
    fn quota(&mut self, text: &str) {
        /// The kernel's.
        const PERIOD: u64 = 100_000;
        /// systemd keeps per cent of a CPU in its files, and cuts what is finer.
        const STEP: u64 = 10_000;
        let mut words = text.split_whitespace();
        let quota = words.next().unwrap_or_default();
        let period: Option<u64> = match words.next().map(str::parse) {
            None => None,
            Some(Ok(period)) if period > 0 => Some(period),
            Some(_) => return,
        };
        let per_second = match (quota, quota.parse::<u64>()) {
            ("max", _) => INFINITY,
            (_, Ok(quota)) if quota > 0 => {
                let exact = u128::from(quota) * 1_000_000;
                let exact = exact.div_ceil(u128::from(period.unwrap_or(PERIOD)));
                let exact = u64::try_from(exact)
                    .unwrap_or(INFINITY)
                    .min(INFINITY - STEP);
                // Rounded up: should systemd ever write it, the container gets a little more, never less.
                exact.next_multiple_of(STEP)
            }
            _ => return,
        };
        if let Some(period) = period {
            self.set("CPUQuotaPeriodUSec", Value::U64(period));
        }
        self.set("CPUQuotaPerSecUSec", Value::U64(per_second));
    }
}

/// A number of bytes or processes as the kernel reads it: `max`, or digits with perhaps a letter behind them.
fn size(text: &str) -> Option<u64> {
    if text == "max" {
        return Some(INFINITY);
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
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

    fn value(properties: &[(&'static str, Value)], name: &str) -> Option<Value> {
        let mut all = properties.iter().filter(|(n, _)| *n == name);
        let found = all.next().map(|(_, v)| v.clone());
        assert!(all.next().is_none(), "{name} twice");
        found
    }

    fn files(texts: &[(&str, &str)]) -> Vec<(String, String)> {
        let owned = |(file, text): &(&str, &str)| ((*file).to_owned(), (*text).to_owned());
        texts.iter().map(owned).collect()
    }

    #[test]
    fn limits_become_properties() {
        let found = properties(&files(&[
            ("memory.max", "67108864"),
            ("memory.swap.max", "32M"),
            ("memory.high", "50331648"),
            ("memory.low", "max"),
            ("memory.min", "0"),
            ("pids.max", "17"),
            ("cpu.weight", "100"),
            ("cpu.max", "25000 50000"),
            ("cpuset.cpus", "0-1,9"),
            ("cpuset.mems", "0"),
            ("io.weight", "default 50\n8:0 70"),
            ("hugetlb.2MB.max", "0"),
            // As written last, by a key of `unified`.
            ("pids.max", "12"),
        ]));
        for (name, expected) in [
            ("MemoryMax", Value::U64(64 << 20)),
            ("MemorySwapMax", Value::U64(32 << 20)),
            ("MemoryHigh", Value::U64(48 << 20)),
            ("MemoryLow", Value::U64(INFINITY)),
            ("MemoryMin", Value::U64(0)),
            ("TasksMax", Value::U64(12)),
            ("CPUWeight", Value::U64(100)),
            ("CPUQuotaPeriodUSec", Value::U64(50_000)),
            ("CPUQuotaPerSecUSec", Value::U64(500_000)),
            ("AllowedCPUs", Value::Bytes(vec![0b11, 0b10])),
            ("AllowedMemoryNodes", Value::Bytes(vec![1])),
            ("IOWeight", Value::U64(50)),
        ] {
            assert_eq!(value(&found, name), Some(expected), "{name}");
        }
        assert_eq!(found.len(), 12);
    }

    /// What the kernel will refuse by the file's name, systemd is not to refuse by another.
    #[test]
    fn what_the_kernel_refuses_is_left_to_it() {
        for (file, text) in [
            ("memory.max", "many"),
            ("memory.high", "-4"),
            ("memory.low", "12x"),
            ("memory.max", "99999999999999999999"),
            ("cpu.max", "1 2 3x"),
            ("cpu.max", "0 100000"),
            ("cpu.max", "5 0"),
            ("cpu.max", "-1"),
            ("cpu.weight", "0"),
            ("cpu.weight", "10001"),
            ("io.weight", "default 0"),
            ("pids.max", "-1"),
            ("cpuset.cpus", "3-1"),
            ("memory.max", "ünlimited"),
        ] {
            let found = changed(&files(&[(file, text)]));
            let rate = value(&found, "CPUQuotaPerSecUSec");
            assert!(
                found.is_empty() || rate.is_some() && text == "1 2 3x",
                "{file}: {found:?}"
            );
        }
    }

    #[test]
    fn no_limit_is_said_where_systemd_has_a_default() {
        let found = properties(&[]);
        assert_eq!(found, [("TasksMax", Value::U64(INFINITY))]);
        let unlimited = [
            ("cpu.max", "max 100000"),
            ("memory.max", "max"),
            ("memory.swap.max", "max"),
        ];
        let found = properties(&files(&unlimited));
        for name in ["CPUQuotaPerSecUSec", "MemoryMax", "MemorySwapMax"] {
            assert_eq!(value(&found, name), Some(Value::U64(INFINITY)), "{name}");
        }
        // Nothing at all: systemd's least is one.
        let found = changed(&files(&[("pids.max", "0"), ("memory.high", "0")]));
        for name in ["TasksMax", "MemoryHigh"] {
            assert_eq!(value(&found, name), Some(Value::U64(1)), "{name}");
        }
    }

    #[test]
    fn quotas_are_rounded_up_to_what_systemd_keeps() {
        for (text, per_second) in [
            ("1200 100000", 20_000),
            ("12500", 130_000),
            ("250000 100000", 2_500_000),
            ("1000 1000000", 10_000),
            ("18446744073709551615 1000", INFINITY / 10_000 * 10_000),
        ] {
            let found = changed(&files(&[("cpu.max", text)]));
            let value = value(&found, "CPUQuotaPerSecUSec");
            assert_eq!(value, Some(Value::U64(per_second)), "{text}");
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
