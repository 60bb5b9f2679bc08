//! New limits for a container that has some.

use oci_spec::runtime::LinuxResources;
use slipway_proto::cri::{HugepageLimit, LinuxContainerResources};

use crate::HostFacts;
use crate::error::Result;
use crate::resources;

/// New limits.
#[derive(Debug, Clone, PartialEq)]
pub struct Resize {
    /// What is to be written: only what the request named, and what that depends on.
    pub changes: LinuxResources,
    /// All limits that are in force afterwards.
    pub effective: LinuxContainerResources,
    /// What was passed over, for the log.
    pub warnings: Vec<String>,
}

/// Checks new limits against the old ones. What the request leaves at 0 or empty stays as it is. A limit of
/// swap that is not named stays, too, unless the new memory limit leaves no room for it, or there was no
/// swap before: then there is none. The OOM score is not a limit; it stays.
///
/// # Errors
/// [`crate::SpecError`], naming the field.
pub fn resize(
    old: &LinuxContainerResources,
    request: &LinuxContainerResources,
    host: &HostFacts,
) -> Result<Resize> {
    let mut warnings = Vec::new();
    let limits = resources::of_container(Some(&merge(old, request)), 0, host, &mut warnings)?;
    let mut changes = LinuxResources::default();
    let cpu = request.cpu_period != 0 || request.cpu_quota != 0 || request.cpu_shares != 0;
    if cpu || !request.cpuset_cpus.is_empty() || !request.cpuset_mems.is_empty() {
        changes.set_cpu(limits.oci.cpu().clone());
    }
    if request.memory_limit_in_bytes != 0 || request.memory_swap_limit_in_bytes != 0 {
        changes.set_memory(*limits.oci.memory());
    }
    if !request.hugepage_limits.is_empty() {
        changes.set_hugepage_limits(limits.oci.hugepage_limits().clone());
    }
    let named = limits.oci.unified().iter().flatten();
    let named: std::collections::HashMap<_, _> = named
        .filter(|(key, _)| request.unified.contains_key(*key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    changes.set_unified((!named.is_empty()).then_some(named));
    Ok(Resize {
        changes,
        effective: limits.effective,
        warnings,
    })
}

pub(crate) fn merge(
    old: &LinuxContainerResources,
    request: &LinuxContainerResources,
) -> LinuxContainerResources {
    let mut new = old.clone();
    let (limit, swap) = (
        request.memory_limit_in_bytes,
        request.memory_swap_limit_in_bytes,
    );
    let had_none = old.memory_swap_limit_in_bytes == old.memory_limit_in_bytes;
    let no_room = new.memory_swap_limit_in_bytes > 0 && new.memory_swap_limit_in_bytes < limit;
    if limit != 0 && swap == 0 && (had_none || no_room) {
        new.memory_swap_limit_in_bytes = 0;
    }
    for (mine, theirs) in [
        (&mut new.cpu_period, request.cpu_period),
        (&mut new.cpu_quota, request.cpu_quota),
        (&mut new.cpu_shares, request.cpu_shares),
        (&mut new.memory_limit_in_bytes, limit),
        (&mut new.memory_swap_limit_in_bytes, swap),
    ] {
        if theirs != 0 {
            *mine = theirs;
        }
    }
    for (mine, theirs) in [
        (&mut new.cpuset_cpus, &request.cpuset_cpus),
        (&mut new.cpuset_mems, &request.cpuset_mems),
    ] {
        if !theirs.is_empty() {
            mine.clone_from(theirs);
        }
    }
    let renamed = |limit: &HugepageLimit| {
        let same = |other: &HugepageLimit| other.page_size == limit.page_size;
        request.hugepage_limits.iter().any(same)
    };
    new.hugepage_limits.retain(|limit| !renamed(limit));
    new.hugepage_limits
        .extend(request.hugepage_limits.iter().cloned());
    let keys = request.unified.iter();
    new.unified
        .extend(keys.map(|(key, value)| (key.clone(), value.clone())));
    new
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::tests::host;

    type Request = LinuxContainerResources;

    const MIB: i64 = 1 << 20;

    fn old() -> Request {
        Request {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 * MIB,
            cpuset_cpus: "0-1".into(),
            oom_score_adj: -5,
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit: 0,
            }],
            ..Default::default()
        }
    }

    #[test]
    fn only_what_is_named_changes() {
        let nothing = resize(&old(), &Request::default(), &host()).expect("good");
        assert_eq!(nothing.changes, LinuxResources::default());
        assert_eq!(nothing.effective, old());
        let request = Request {
            cpu_quota: 20_000,
            oom_score_adj: 900,
            ..Default::default()
        };
        let new = resize(&old(), &request, &host()).expect("good");
        let cpu = new.changes.cpu().clone().expect("cpu");
        assert_eq!((cpu.quota(), cpu.period()), (Some(20_000), Some(100_000)));
        assert!(new.changes.memory().is_none() && new.changes.hugepage_limits().is_none());
        let expected = Request {
            cpu_quota: 20_000,
            ..old()
        };
        assert_eq!(new.effective, expected);
    }

    #[test]
    fn swap_follows_the_memory_limit_where_it_must() {
        let after = |limit: i64, swap: i64, new_limit: i64, new_swap: i64| {
            let before = Request {
                memory_limit_in_bytes: limit * MIB,
                memory_swap_limit_in_bytes: swap * MIB,
                ..Default::default()
            };
            let request = Request {
                memory_limit_in_bytes: new_limit * MIB,
                memory_swap_limit_in_bytes: new_swap * MIB,
                ..Default::default()
            };
            let new = resize(&before, &request, &host()).expect("good");
            let memory = new.changes.memory().expect("memory");
            let mib = |n: Option<i64>| n.expect("set") / MIB;
            (mib(memory.limit()), mib(memory.swap()))
        };
        assert_eq!(after(64, 0, 128, 0), (128, 128), "none before, none after");
        assert_eq!(after(64, 64, 32, 0), (32, 32), "none before, none after");
        assert_eq!(after(64, 128, 96, 0), (96, 128), "it stays");
        assert_eq!(after(64, 128, 256, 0), (256, 256), "no room for it");
        assert_eq!(after(64, 128, 0, 200), (64, 200), "swap alone");
        assert_eq!(after(0, 0, 64, 128), (64, 128));
    }

    #[test]
    fn huge_pages_and_files_are_merged_by_name() {
        let request = Request {
            hugepage_limits: vec![HugepageLimit {
                page_size: "1GB".into(),
                limit: 1 << 30,
            }],
            unified: [("memory.high".to_owned(), "1000000".to_owned())].into(),
            ..Default::default()
        };
        let before = Request {
            unified: [("memory.low".to_owned(), "5".to_owned())].into(),
            ..old()
        };
        let new = resize(&before, &request, &host()).expect("good");
        assert_eq!(new.effective.hugepage_limits.len(), 2);
        assert_eq!(new.effective.unified.len(), 2);
        let written = new.changes.unified().clone().expect("files");
        assert_eq!(written.keys().collect::<Vec<_>>(), ["memory.high"]);
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let request = Request {
            memory_limit_in_bytes: -7,
            ..Default::default()
        };
        let error = resize(&old(), &request, &host()).expect_err("negative");
        assert!(error.field().contains("memory_limit_in_bytes"));
        let request = Request {
            memory_swap_limit_in_bytes: MIB,
            ..Default::default()
        };
        assert!(
            resize(&old(), &request, &host()).is_err(),
            "less than the memory limit"
        );
    }
}
