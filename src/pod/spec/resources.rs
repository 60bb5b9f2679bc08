//! Resource limits.

use crate::error::{Result, SpecError, quoted};
use crate::{HostFacts, hugepages};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};
use slipway_proto::cri;
use std::collections::HashMap;
use std::ops::RangeInclusive;

pub(crate) const FIELD: &str = "linux.resources";
/// Less does not hold a process that has only just started.
const LEAST_MEMORY: i64 = 4 << 20;
/// The kernel's bounds (kernel/sched).
const PERIOD: RangeInclusive<i64> = 1_000..=1_000_000;
const LEAST_QUOTA: i64 = 1_000;
const SHARES: RangeInclusive<i64> = 2..=262_144;
const OOM: RangeInclusive<i64> = -1000..=1000;

/// A container's limits.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// For the specification, without devices.
    pub oci: LinuxResources,
    /// What is in force, for the status.
    pub effective: cri::LinuxContainerResources,
    /// For the keeper.
    pub oom_score_adj: i32,
}

/// Checks and translates the limits. 0 and the empty string mean "not set" throughout, as in the CRI.
pub(crate) fn of_container(
    request: Option<&cri::LinuxContainerResources>,
    pids_limit: u64,
    host: &HostFacts,
    warnings: &mut Vec<String>,
) -> Result<Limits> {
    let mut effective = request.cloned().unwrap_or_default();
    let mut oci = LinuxResources::default();
    oci.set_cpu(cpu(&mut effective)?);
    oci.set_memory(memory(&mut effective, host, warnings)?);
    oci.set_hugepage_limits(hugepages::of_container(&mut effective, host)?);
    oci.set_unified(unified(&effective.unified, host)?);
    if pids_limit > 0 {
        let mut pids = LinuxPids::default();
        pids.set_limit(i64::try_from(pids_limit).unwrap_or(i64::MAX));
        oci.set_pids(Some(pids));
    }
    let oom_score_adj = i32::try_from(effective.oom_score_adj)
        .ok()
        .filter(|adj| OOM.contains(&i64::from(*adj)))
        .ok_or_else(|| {
            wrong(
                "oom_score_adj",
                effective.oom_score_adj,
                "between -1000 and 1000",
            )
        })?;
    Ok(Limits {
        oci,
        effective,
        oom_score_adj,
    })
}

pub(crate) fn wrong(field: &str, value: impl std::fmt::Display, allowed: &str) -> SpecError {
    SpecError::invalid(
        format!("{FIELD}.{field}"),
        format!("{value} is not possible; it must be {allowed}"),
    )
}

fn cpu(request: &mut cri::LinuxContainerResources) -> Result<Option<LinuxCpu>> {
    let mut cpu = LinuxCpu::default();
    if request.cpu_period != 0 {
        if !PERIOD.contains(&request.cpu_period) {
            let allowed = "0 (not set), or between 1000 and 1000000 µs";
            return Err(wrong("cpu_period", request.cpu_period, allowed));
        }
        cpu.set_period(Some(request.cpu_period.unsigned_abs()));
    }
    match request.cpu_quota {
        0 => {}
        quota if quota == -1 || quota >= LEAST_QUOTA => drop(cpu.set_quota(Some(quota))),
        quota => {
            let allowed = "0 (not set), -1 (no limit), or at least 1000 µs per period";
            return Err(wrong("cpu_quota", quota, allowed));
        }
    }
    match request.cpu_shares {
        0 => {}
        // The least weight there is; the kernel would say so, too.
        1 => request.cpu_shares = *SHARES.start(),
        shares if SHARES.contains(&shares) => {}
        shares => {
            return Err(wrong(
                "cpu_shares",
                shares,
                "0 (not set), or between 2 and 262144",
            ));
        }
    }
    if request.cpu_shares != 0 {
        cpu.set_shares(Some(request.cpu_shares.unsigned_abs()));
    }
    cpu.set_cpus(set_of("cpuset_cpus", &request.cpuset_cpus)?);
    cpu.set_mems(set_of("cpuset_mems", &request.cpuset_mems)?);
    Ok((cpu != LinuxCpu::default()).then_some(cpu))
}

/// A list such as `0-3,7` (cpuset(7)).
fn set_of(field: &str, list: &str) -> Result<Option<String>> {
    if list.is_empty() {
        return Ok(None);
    }
    let number = |text: &str| -> Option<u32> {
        let digits =
            !text.is_empty() && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten()
    };
    let range = |item: &str| match item.split_once('-') {
        None => number(item).is_some(),
        Some((first, last)) => {
            matches!((number(first), number(last)), (Some(first), Some(last)) if first <= last)
        }
    };
    if list.split(',').all(range) {
        return Ok(Some(list.to_owned()));
    }
    Err(wrong(field, quoted(list), "a list such as 0-3,7"))
}

fn memory(
    request: &mut cri::LinuxContainerResources,
    host: &HostFacts,
    warnings: &mut Vec<String>,
) -> Result<Option<LinuxMemory>> {
    let (limit, swap) = (
        request.memory_limit_in_bytes,
        request.memory_swap_limit_in_bytes,
    );
    if limit != 0 && limit < LEAST_MEMORY {
        let allowed = format!("0 (not set), or at least {LEAST_MEMORY} bytes");
        return Err(wrong("memory_limit_in_bytes", limit, &allowed));
    }
    if swap < -1 || (swap > 0 && swap < limit) {
        let allowed = "0 (no swap), -1 (no limit), or at least the memory limit, which it includes";
        return Err(wrong("memory_swap_limit_in_bytes", swap, allowed));
    }
    if swap > 0 && limit == 0 {
        let what = format!("{swap} without memory_limit_in_bytes, which it includes; set both");
        return Err(SpecError::invalid(
            format!("{FIELD}.memory_swap_limit_in_bytes"),
            what,
        ));
    }
    if limit == 0 {
        return Ok(None);
    }
    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(limit));
    if host.swap_accounting {
        // Without a word about swap there is none, as with the peers.
        memory.set_swap(Some(if swap == 0 { limit } else { swap }));
    } else if swap > limit {
        warnings.push("swap is not accounted on this host, so its limit is not set".to_owned());
        request.memory_swap_limit_in_bytes = 0;
    }
    Ok(Some(memory))
}

/// Files of cgroup v2 by name. Those of cgroup core are not limits: they move and freeze processes.
fn unified(
    files: &HashMap<String, String>,
    host: &HostFacts,
) -> Result<Option<HashMap<String, String>>> {
    if files.is_empty() {
        return Ok(None);
    }
    if !host.cgroup_v2 {
        let what = "needs cgroup v2, and this host has v1; drop it, or boot with \
                    systemd.unified_cgroup_hierarchy=1";
        return Err(SpecError::precondition(format!("{FIELD}.unified"), what));
    }
    let mut names: Vec<_> = files.iter().collect();
    names.sort();
    for (name, value) in names {
        let field = format!("unified[{}]", quoted(name));
        let letter = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let controller = name
            .split_once('.')
            .map(|(controller, file)| (controller, file.is_empty()));
        let good = name.bytes().all(letter) && !name.contains("..");
        match controller {
            Some((controller, false))
                if good && !controller.is_empty() && controller != "cgroup" => {}
            _ => {
                let what = "is not a file of a controller, such as memory.high";
                return Err(SpecError::invalid(format!("{FIELD}.{field}"), what));
            }
        }
        if value.is_empty() || value.chars().any(char::is_control) {
            return Err(wrong(&field, quoted(value), "one line"));
        }
    }
    Ok(Some(files.clone()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::SpecErrorKind::{FailedPrecondition, Invalid};
    use proptest::prelude::*;

    type Request = cri::LinuxContainerResources;

    pub(crate) fn host() -> HostFacts {
        HostFacts {
            capabilities: Default::default(),
            cgroup_v2: true,
            systemd: false,
            swap_accounting: true,
            hugetlb: true,
            hugepage_sizes: ["2MB".to_owned(), "1GB".to_owned()].into(),
            kernel: (6, 1),
            recursive_read_only: true,
            selinux: None,
            hostname: "host".into(),
        }
    }

    pub(crate) fn limits(request: &Request, host: &HostFacts) -> Result<(Limits, Vec<String>)> {
        let mut warnings = Vec::new();
        of_container(Some(request), 0, host, &mut warnings).map(|limits| (limits, warnings))
    }

    #[test]
    fn nothing_is_nothing() {
        let found = of_container(None, 0, &host(), &mut Vec::new()).expect("good");
        assert_eq!(found.oci, LinuxResources::default());
        assert_eq!(
            (found.oom_score_adj, found.effective),
            (0, Request::default())
        );
        let found = of_container(None, 7, &host(), &mut Vec::new()).expect("good");
        assert_eq!(found.oci.pids().map(|p| p.limit()), Some(7));
    }

    #[test]
    fn cpu_is_translated() {
        let request = Request {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 1024,
            cpuset_cpus: "0-3,7".into(),
            cpuset_mems: "0".into(),
            oom_score_adj: -998,
            ..Default::default()
        };
        let (found, _) = limits(&request, &host()).expect("good");
        let cpu = found.oci.cpu().clone().expect("cpu");
        assert_eq!(
            (cpu.period(), cpu.quota(), cpu.shares()),
            (Some(100_000), Some(50_000), Some(1024))
        );
        assert_eq!(
            (cpu.cpus().as_deref(), cpu.mems().as_deref()),
            (Some("0-3,7"), Some("0"))
        );
        assert_eq!(found.oom_score_adj, -998);
        assert_eq!(found.effective, request);
        let unlimited = Request {
            cpu_quota: -1,
            cpu_shares: 1,
            ..Default::default()
        };
        let (found, _) = limits(&unlimited, &host()).expect("good");
        let cpu = found.oci.cpu().clone().expect("cpu");
        assert_eq!((cpu.quota(), cpu.shares()), (Some(-1), Some(2)));
        assert_eq!(found.effective.cpu_shares, 2);
    }

    #[test]
    fn memory_and_swap() {
        let mib = 1 << 20;
        let of = |limit: i64, swap: i64, host: &HostFacts| {
            let request = Request {
                memory_limit_in_bytes: limit * mib,
                memory_swap_limit_in_bytes: if swap == -1 { -1 } else { swap * mib },
                ..Default::default()
            };
            let (found, warnings) = limits(&request, host).expect("good");
            let memory = found.oci.memory().map(|m| (m.limit(), m.swap()));
            (memory, warnings.len())
        };
        let some = |n: i64| Some(n * mib);
        assert_eq!(of(0, 0, &host()), (None, 0));
        assert_eq!(of(64, 0, &host()), (Some((some(64), some(64))), 0));
        assert_eq!(of(64, 64, &host()), (Some((some(64), some(64))), 0));
        assert_eq!(of(64, 128, &host()), (Some((some(64), some(128))), 0));
        assert_eq!(of(64, -1, &host()), (Some((some(64), Some(-1))), 0));
        let without = HostFacts {
            swap_accounting: false,
            ..host()
        };
        assert_eq!(of(64, 64, &without), (Some((some(64), None)), 0));
        assert_eq!(of(64, 128, &without), (Some((some(64), None)), 1));
    }

    #[test]
    fn negative_and_absurd_values_are_named() {
        let cases = [
            (
                Request {
                    cpu_period: -1,
                    ..Default::default()
                },
                "cpu_period",
            ),
            (
                Request {
                    cpu_period: 999,
                    ..Default::default()
                },
                "cpu_period",
            ),
            (
                Request {
                    cpu_period: 1_000_001,
                    ..Default::default()
                },
                "cpu_period",
            ),
            (
                Request {
                    cpu_quota: -2,
                    ..Default::default()
                },
                "cpu_quota",
            ),
            (
                Request {
                    cpu_quota: 999,
                    ..Default::default()
                },
                "cpu_quota",
            ),
            (
                Request {
                    cpu_shares: -1,
                    ..Default::default()
                },
                "cpu_shares",
            ),
            (
                Request {
                    cpu_shares: 262_145,
                    ..Default::default()
                },
                "cpu_shares",
            ),
            (
                Request {
                    memory_limit_in_bytes: -1,
                    ..Default::default()
                },
                "memory_limit_in_bytes",
            ),
            (
                Request {
                    memory_limit_in_bytes: 4095,
                    ..Default::default()
                },
                "memory_limit_in_bytes",
            ),
            (
                Request {
                    memory_swap_limit_in_bytes: -2,
                    ..Default::default()
                },
                "memory_swap_limit_in_bytes",
            ),
            (
                Request {
                    memory_swap_limit_in_bytes: 1 << 30,
                    ..Default::default()
                },
                "memory_swap_limit_in_bytes",
            ),
            (
                Request {
                    memory_limit_in_bytes: 1 << 30,
                    memory_swap_limit_in_bytes: 1 << 29,
                    ..Default::default()
                },
                "memory_swap_limit_in_bytes",
            ),
            (
                Request {
                    oom_score_adj: 1001,
                    ..Default::default()
                },
                "oom_score_adj",
            ),
            (
                Request {
                    oom_score_adj: i64::MIN,
                    ..Default::default()
                },
                "oom_score_adj",
            ),
            (
                Request {
                    cpuset_cpus: "3-1".into(),
                    ..Default::default()
                },
                "cpuset_cpus",
            ),
            (
                Request {
                    cpuset_cpus: "0,".into(),
                    ..Default::default()
                },
                "cpuset_cpus",
            ),
            (
                Request {
                    cpuset_cpus: "0\n1".into(),
                    ..Default::default()
                },
                "cpuset_cpus",
            ),
            (
                Request {
                    cpuset_mems: "-1".into(),
                    ..Default::default()
                },
                "cpuset_mems",
            ),
            (
                Request {
                    cpuset_mems: "999999".into(),
                    ..Default::default()
                },
                "cpuset_mems",
            ),
        ];
        for (request, field) in cases {
            let error = limits(&request, &host()).expect_err(field);
            assert_eq!(
                (error.kind(), error.field()),
                (Invalid, format!("{FIELD}.{field}").as_str())
            );
        }
    }

    #[test]
    fn unified_files() {
        let of = |name: &str, value: &str, host: &HostFacts| {
            let unified = HashMap::from([(name.to_owned(), value.to_owned())]);
            limits(
                &Request {
                    unified,
                    ..Default::default()
                },
                host,
            )
        };
        let (found, _) = of("memory.high", "1073741824", &host()).expect("good");
        assert_eq!(found.oci.unified().as_ref().map(HashMap::len), Some(1));
        for name in ["hugetlb.2MB.max", "io.bfq.weight", "cpu.weight.nice"] {
            assert!(of(name, "1", &host()).is_ok(), "{name}");
        }
        let names = [
            "cgroup.procs",
            "cgroup.freeze",
            "",
            ".",
            "memory",
            "memory.",
            ".max",
            "../memory.max",
            "a/memory.max",
            "memory..max",
            "memory.max\n",
            "memory max.x",
        ];
        for name in names {
            assert_eq!(
                of(name, "1", &host()).expect_err(name).kind(),
                Invalid,
                "{name}"
            );
        }
        for value in ["", "1\n2", "1\0"] {
            assert!(of("memory.max", value, &host()).is_err(), "{value:?}");
        }
        let v1 = HostFacts {
            cgroup_v2: false,
            ..host()
        };
        let error = of("memory.max", "1", &v1).expect_err("v1");
        assert_eq!(error.kind(), FailedPrecondition);
        assert!(error.to_string().contains("cgroup v2"), "{error}");
    }

    proptest! {
        #[test]
        fn numbers_never_panic(n in any::<[i64; 6]>(), list in "[0-9,-]{0,9}", size in "[0-9]{0,21}[KMG]?B?") {
            let request = Request {
                cpu_period: n[0],
                cpu_quota: n[1],
                cpu_shares: n[2],
                memory_limit_in_bytes: n[3],
                memory_swap_limit_in_bytes: n[4],
                oom_score_adj: n[5],
                cpuset_cpus: list,
                hugepage_limits: vec![cri::HugepageLimit { page_size: size, limit: n[0].unsigned_abs() }],
                ..Default::default()
            };
            let _ = limits(&request, &host());
        }
    }
}
