//! A container's limits in the files of cgroup v2, one write each, so that what the kernel refuses is named by
//! file and value, and a controller that nobody handed down by its own name.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use crate::limits::LimitError;

/// The kernel's own default, and the one to be written beside a quota without a period.
const PERIOD: u64 = 100_000;

/// Writes the limits that have a file in v2, and takes them out of `resources`.
///
/// # Errors
/// [`LimitError`].
pub fn apply(dir: &Path, resources: &mut LinuxResources) -> Result<(), LimitError> {
    for (file, value) in &files(dir, resources) {
        set(dir, file, value)?;
    }
    resources
        .set_cpu(None)
        .set_memory(None)
        .set_pids(None)
        .set_hugepage_limits(None);
    Ok(())
}

/// The files that say these limits in v2, and what they say, in the order in which they are to be written.
pub fn files(dir: &Path, resources: &LinuxResources) -> Vec<(String, String)> {
    let mut files = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpu_files(dir, cpu, &mut files);
    }
    if let Some(memory) = resources.memory() {
        memory_files(memory, &mut files);
    }
    if let Some(pids) = resources.pids() {
        let limit = Some(pids.limit()).filter(|n| *n > 0);
        files.push(("pids.max".to_owned(), limit_text(limit)));
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        hugepage_files(dir, limit, &mut files);
    }
    files
}

/// Writes one file of a cgroup.
///
/// # Errors
/// [`LimitError`]: a file that is not there tells of a missing controller, or is no file of this kernel's.
pub fn set(dir: &Path, file: &str, value: &str) -> Result<(), LimitError> {
    // Never created: cgroupfs answers an attempt with "permission denied", which tells nobody anything.
    let written = File::options()
        .write(true)
        .open(dir.join(file))
        .and_then(|mut f| f.write_all(value.as_bytes()));
    match written {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(missing(dir, file)),
        Err(source) => Err(LimitError::Write {
            file: dir.join(file),
            value: value.to_owned(),
            source,
        }),
    }
}

fn missing(dir: &Path, file: &str) -> LimitError {
    let controller = file.split('.').next().unwrap_or(file);
    let given = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    // v1 has no such list: who has the directory has the controller.
    let v1 = !dir.join("cgroup.controllers").exists();
    if v1 || given.split_whitespace().any(|c| c == controller) {
        return LimitError::Unified {
            key: file.to_owned(),
            reason: "is no file that this kernel has for a cgroup",
        };
    }
    LimitError::NoController {
        file: file.to_owned(),
        controller: controller.to_owned(),
        parent: dir.parent().unwrap_or(dir).to_owned(),
    }
}

fn cpu_files(dir: &Path, cpu: &LinuxCpu, files: &mut Vec<(String, String)>) {
    let mut put = |file: &str, value: String| files.push((file.to_owned(), value));
    if let Some(shares) = cpu.shares().filter(|s| *s > 0) {
        put("cpu.weight", weight(shares).to_string());
    }
    if cpu.quota().is_some() || cpu.period().is_some() {
        // One file holds both: what is not named stays.
        let now = fs::read_to_string(dir.join("cpu.max")).unwrap_or_default();
        let mut now = now.split_whitespace().map(str::to_owned);
        let (quota, period) = (now.next(), now.next());
        let wanted = cpu.quota().map(|q| limit_text(Some(q).filter(|q| *q > 0)));
        let quota = wanted.or(quota).unwrap_or_else(|| limit_text(None));
        let period = cpu.period().map(|p| p.to_string()).or(period);
        let period = period.unwrap_or_else(|| PERIOD.to_string());
        put("cpu.max", format!("{quota} {period}"));
    }
    if let Some(burst) = cpu.burst() {
        put("cpu.max.burst", burst.to_string());
    }
    if let Some(idle) = cpu.idle() {
        put("cpu.idle", idle.to_string());
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list {
            put(file, list.clone());
        }
    }
}

fn memory_files(memory: &LinuxMemory, files: &mut Vec<(String, String)>) {
    let mut put = |file: &str, value: String| files.push((file.to_owned(), value));
    if let Some(swap) = memory.swap() {
        // What the specification counts with the memory, v2 counts alone.
        let alone = match (swap, memory.limit()) {
            (0.., Some(limit)) if limit >= 0 => Some(swap.saturating_sub(limit).max(0)),
            _ => None,
        };
        put("memory.swap.max", limit_text(alone));
    }
    if let Some(limit) = memory.limit() {
        put("memory.max", limit_text(Some(limit).filter(|n| *n >= 0)));
    }
    if let Some(low) = memory.reservation() {
        put("memory.low", limit_text(Some(low).filter(|n| *n >= 0)));
    }
}

fn hugepage_files(dir: &Path, limit: &LinuxHugepageLimit, files: &mut Vec<(String, String)>) {
    let (size, value) = (limit.page_size(), limit.limit().to_string());
    files.push((format!("hugetlb.{size}.max"), value.clone()));
    // Reservations have a limit of their own, which fails the mmap and not, later, the access by SIGBUS.
    let reserved = format!("hugetlb.{size}.rsvd.max");
    if dir.join(&reserved).exists() {
        files.push((reserved, value));
    }
}

fn limit_text(limit: Option<i64>) -> String {
    limit.map_or_else(|| "max".to_owned(), |n| n.to_string())
}

/// `cpu.weight` (1 to 10000) for v1's shares (2 to 262144): the curve of runc and crun, which gives the
/// default of 1024 the default weight of 100. A straight line would give it 39, less than a cgroup without shares.
fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            // Positive, and at most 10000. The nudge keeps 1024 from becoming 101 by rounding.
            (10f64.powf(exponent) - 1e-9).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder};

    #[test]
    fn shares_become_weights_as_in_runc() {
        for (shares, expected) in [
            (2, 1),
            (100, 17),
            (512, 59),
            (1024, 100),
            (2048, 174),
            (262_144, 10_000),
        ] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }

    #[test]
    fn quotas_and_limits_in_words_of_v2() {
        let dir = tempfile::tempdir().unwrap();
        let cpu = |quota: Option<i64>, period: Option<u64>| {
            let mut cpu = LinuxCpuBuilder::default().build().unwrap();
            cpu.set_quota(quota).set_period(period);
            let mut files = Vec::new();
            cpu_files(dir.path(), &cpu, &mut files);
            files.pop().map(|(_, value)| value)
        };
        assert_eq!(cpu(None, None), None);
        assert_eq!(cpu(Some(5000), None).as_deref(), Some("5000 100000"));
        assert_eq!(cpu(Some(-1), Some(50_000)).as_deref(), Some("max 50000"));
        assert_eq!(cpu(None, Some(50_000)).as_deref(), Some("max 50000"));
        // Where there are some already, half of them stay.
        fs::write(dir.path().join("cpu.max"), "5000 90000\n").unwrap();
        assert_eq!(cpu(None, Some(50_000)).as_deref(), Some("5000 50000"));
        assert_eq!(cpu(Some(7000), None).as_deref(), Some("7000 90000"));
        assert_eq!(cpu(Some(-1), None).as_deref(), Some("max 90000"));
        let memory = |limit: i64, swap: i64| {
            let memory = LinuxMemoryBuilder::default()
                .limit(limit)
                .swap(swap)
                .build()
                .unwrap();
            let mut files = Vec::new();
            memory_files(&memory, &mut files);
            files.into_iter().map(|(_, v)| v).collect::<Vec<_>>()
        };
        assert_eq!(memory(64, 64), ["0", "64"]);
        assert_eq!(memory(64, 100), ["36", "64"]);
        assert_eq!(memory(64, -1), ["max", "64"]);
        assert_eq!(memory(-1, -1), ["max", "max"]);
    }
}
