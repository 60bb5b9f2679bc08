//! Writing a container's limits into its cgroup, before its first process is there.
//!
//! On v2 [`limits_v2`] writes them; those of v1 go through `cgroups-rs`. Device rules are written here: the crate
//! reads "any number" as 0. So are the limits of block devices ([`block_io`]): it knows no bfq. `unified` keys are files of v2 and are written as they are, after all others.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use cgroups_rs::manager::{FsManager, Manager};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};

use crate::block_io;
use crate::cgroup::Hierarchies;
use crate::confine::chain;
use crate::device_filter::{self, Rule};
use crate::limits_v2;

/// Why limits could not be set.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// A limit was refused.
    #[error(
        "can't set the resource limits of cgroup {}: {reason}; see whether the controller is \
         available and the value fits the parent's limits (slipway check)",
        cgroup.display()
    )]
    Refused {
        /// The cgroup.
        cgroup: PathBuf,
        /// The cause, in words.
        reason: String,
    },
    /// A file of the cgroup could not be written.
    #[error("can't write {value:?} to {}", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The value.
        value: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A limit of a controller that the cgroup does not have.
    #[error(
        "can't set {file}: cgroup {0} does not hand the controller {controller} down; write +{controller} to its \
         cgroup.subtree_control (no process may be in it itself), or drop the limit",
        parent.display()
    )]
    NoController {
        /// The file.
        file: String,
        /// The controller.
        controller: String,
        /// The cgroup that would have to hand it down.
        parent: PathBuf,
    },
    /// A `unified` key that can't be one.
    #[error("resource {key:?} {reason}")]
    Unified {
        /// The key.
        key: String,
        /// What is wrong.
        reason: &'static str,
    },
}

/// What every container may use, besides making any node (`m` without `r` and `w` opens nothing): null,
/// zero, full, random, urandom, tty, ptmx and the pseudo terminals.
const DEFAULT_DEVICES: [&str; 10] = [
    "c *:* m",
    "b *:* m",
    "c 1:3 rwm",
    "c 1:5 rwm",
    "c 1:7 rwm",
    "c 1:8 rwm",
    "c 1:9 rwm",
    "c 5:0 rwm",
    "c 5:2 rwm",
    "c 136:* rwm",
];

/// Sets the limits of an existing cgroup.
///
/// # Errors
/// [`LimitError`].
pub fn apply(
    cgroups: &Hierarchies,
    cgroup: &Path,
    resources: &LinuxResources,
) -> Result<(), LimitError> {
    let refused = |reason: String| LimitError::Refused {
        cgroup: cgroup.to_owned(),
        reason,
    };
    let mut numbers = resources.clone();
    numbers
        .set_devices(None)
        .set_unified(None)
        .set_block_io(None);
    let v2 = cgroups.v2_dir(cgroup).filter(|_| cgroups.unified());
    if let Some(dir) = &v2 {
        limits_v2::apply(dir, &mut numbers)?;
    }
    if numbers != LinuxResources::default() {
        let base = cgroup.strip_prefix("/").unwrap_or(cgroup).to_string_lossy();
        FsManager::new(&base)
            .and_then(|mut manager| manager.set(&numbers))
            .map_err(|e| refused(chain(&e)))?;
    }
    if let Some(io) = resources.block_io() {
        let (dir, v2) = cgroups
            .block_io_dir(cgroup)
            .ok_or_else(|| refused("this host has no cgroups for block devices".to_owned()))?;
        for (file, value) in block_io::files(&dir, v2, io) {
            limits_v2::set(&dir, &file, &value)?;
        }
    }
    if let Some(unified) = resources.unified() {
        let dir = v2.ok_or_else(|| {
            refused("unified resources need a host with pure cgroup v2".to_owned())
        })?;
        // In order: which of two bad ones is told of must not change from one try to the next.
        for (key, value) in unified.iter().collect::<BTreeMap<_, _>>() {
            if key.contains('/') || !key.contains('.') {
                let reason = "is no file of a cgroup, such as memory.high";
                return Err(LimitError::Unified {
                    key: key.clone(),
                    reason,
                });
            }
            limits_v2::set(&dir, key, value)?;
        }
    }
    if cgroups.unified() {
        filter_devices(cgroups, cgroup, resources)
            .map_err(|e| refused(format!("can't attach the device filter: {e}")))?;
    }
    if let Some(dir) = cgroups.devices_dir(cgroup) {
        let given = resources
            .devices()
            .iter()
            .flatten()
            .map(|rule| (rule.allow(), device_rule(rule)));
        let given: Vec<_> = given.collect();
        // Written last, as runc does it, but for those that the container's own rules have already.
        let defaults = DEFAULT_DEVICES.map(|rule| (true, rule.to_owned()));
        let defaults: Vec<_> = defaults
            .into_iter()
            .filter(|d| !given.contains(d))
            .collect();
        for (allow, rule) in given.iter().chain(&defaults) {
            let file = if *allow {
                "devices.allow"
            } else {
                "devices.deny"
            };
            write(&dir.join(file), rule)?;
        }
    }
    Ok(())
}

/// The v2 counterpart of the v1 device rules.
fn filter_devices(
    cgroups: &Hierarchies,
    cgroup: &Path,
    resources: &LinuxResources,
) -> io::Result<()> {
    let rules: Vec<Rule> = resources
        .devices()
        .iter()
        .flatten()
        .map(Rule::new)
        .collect();
    let open = rules
        .iter()
        .rev()
        .find(|r| r.is_total())
        .is_some_and(Rule::allows);
    let narrowed = rules.last().is_some_and(|r| !r.is_total());
    if open && !narrowed {
        // Everything is allowed (a privileged container): no filter is the same, and faster.
        return Ok(());
    }
    let rules: Vec<Rule> = rules
        .into_iter()
        .chain(DEFAULT_DEVICES.iter().filter_map(|d| Rule::allowing(d)))
        .collect();
    match cgroups.open_v2(cgroup)? {
        Some(dir) => device_filter::attach(dir.as_fd(), &rules),
        None => Ok(()),
    }
}

fn write(file: &Path, value: &str) -> Result<(), LimitError> {
    fs::write(file, value).map_err(|source| LimitError::Write {
        file: file.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// A rule as `devices.allow` reads it.
fn device_rule(rule: &LinuxDeviceCgroup) -> String {
    let kind = rule.typ().unwrap_or_default().as_str().to_owned();
    let any = |number: Option<i64>| match number {
        Some(n) if n >= 0 => n.to_string(),
        _ => "*".to_owned(),
    };
    let access = rule
        .access()
        .clone()
        .filter(|a| !a.is_empty())
        .unwrap_or_else(|| "rwm".into());
    format!(
        "{kind} {}:{} {access}",
        any(rule.major()),
        any(rule.minor())
    )
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{
        LinuxCpuBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxMemoryBuilder,
        LinuxPidsBuilder, LinuxResourcesBuilder,
    };

    use super::*;

    #[test]
    fn device_rules_keep_their_wildcards() {
        let all = LinuxDeviceCgroupBuilder::default()
            .allow(false)
            .build()
            .unwrap();
        assert_eq!(device_rule(&all), "a *:* rwm");
        let disk = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(LinuxDeviceType::B)
            .major(8)
            .minor(-1)
            .access("r")
            .build()
            .unwrap();
        assert_eq!(device_rule(&disk), "b 8:* r");
    }

    #[test]
    fn limits_reach_the_kernel() {
        let host = Hierarchies::detect().unwrap();
        if !nix::unistd::geteuid().is_root() || host.is_empty() {
            println!("SKIPPED: needs root and a cgroup file system");
            return;
        }
        let cgroup = PathBuf::from(format!("/slipway-limits-{}", std::process::id()));
        host.ensure(&cgroup).unwrap();
        let resources = LinuxResourcesBuilder::default()
            .memory(
                LinuxMemoryBuilder::default()
                    .limit(64i64 << 20)
                    .build()
                    .unwrap(),
            )
            .pids(LinuxPidsBuilder::default().limit(17).build().unwrap())
            .cpu(
                LinuxCpuBuilder::default()
                    .shares(512u64)
                    .quota(50_000i64)
                    .period(100_000u64)
                    .build()
                    .unwrap(),
            )
            .build()
            .unwrap();
        let applied = apply(&host, &cgroup, &resources);
        let read = |controller: &str, v1: &str, v2: &str| {
            let path = if host.unified() {
                host.v2_dir(&cgroup).unwrap().join(v2)
            } else {
                Path::new("/sys/fs/cgroup")
                    .join(controller)
                    .join(&cgroup.to_str().unwrap()[1..])
                    .join(v1)
            };
            fs::read_to_string(path).unwrap().trim().to_owned()
        };
        let memory = read("memory", "memory.limit_in_bytes", "memory.max");
        let pids = read("pids", "pids.max", "pids.max");
        let quota = read("cpu", "cpu.cfs_quota_us", "cpu.max");
        host.remove(&cgroup).unwrap();
        applied.unwrap();
        assert_eq!((memory.as_str(), pids.as_str()), ("67108864", "17"));
        assert!(quota.starts_with("50000"));
    }
}
