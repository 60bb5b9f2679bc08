//! The machine around the daemon: its service manager, the cgroup driver, limits on open files.

use crate::finding::Finding;
use crate::sys::Sleeper;
use nix::sys::resource::{Resource, getrlimit};
use slipway_config::{CgroupDriver, Config};
use slipway_systemd::{Scope, Systemd, SystemdError, Value};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// A hard limit on open files that some hundred pods do not reach.
const OPEN_FILES: u64 = 65_536;
/// How long systemd may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// The first PID namespace, whose number is the kernel's own (PROC_PID_INIT_INO).
const FIRST_NAMESPACE: &str = "pid:[4026531836]";
/// The first that knows every property that scopes are made with.
const LEAST_SYSTEMD: u32 = 244;
/// Where kubeadm, and most who install a kubelet by hand, put its configuration.
const KUBELET: &str = "/var/lib/kubelet/config.yaml";

/// Everything about the machine around.
pub(crate) fn check(config: &Config, privileged: bool) -> Vec<Finding> {
    // As sd_booted(3) finds out.
    let systemd = Path::new("/run/systemd/system").is_dir();
    let cgroup_v2 = slipway_spec::HostFacts::detect().cgroup_v2;
    let mut findings = vec![
        init(systemd),
        driver(config, systemd, cgroup_v2, privileged),
    ];
    findings.extend(
        fs::read_to_string(KUBELET)
            .ok()
            .and_then(|text| kubelet(config, &text)),
    );
    findings.extend(open_files());
    findings
}

fn init(systemd: bool) -> Finding {
    let name = fs::read_to_string("/proc/1/comm").unwrap_or_default();
    let found = match (systemd, name.trim()) {
        (true, _) => "systemd".to_owned(),
        (false, "") => "not systemd".to_owned(),
        (false, name) => format!("{name}, not systemd"),
    };
    Finding::info("init", "PID 1", found)
}

fn driver(config: &Config, systemd: bool, cgroup_v2: bool, privileged: bool) -> Finding {
    let (id, what) = ("cgroup-driver", "cgroup driver");
    match config.cgroup.driver {
        CgroupDriver::Cgroupfs if systemd => {
            let finding = Finding::info(id, what, "cgroupfs, on a host of systemd").cost(
                "systemd and Slipway both make cgroups; slices as cgroup parents are refused",
            );
            if cgroup_v2 {
                finding.fix("set cgroup.driver to \"systemd\", and the kubelet's cgroupDriver")
            } else {
                finding.fix(
                    "set the kubelet's cgroupDriver to cgroupfs (a recent one asks Slipway for it)",
                )
            }
        }
        CgroupDriver::Cgroupfs => Finding::ok(id, what, "cgroupfs"),
        CgroupDriver::Systemd if !cgroup_v2 => Finding::fail(
            id,
            what,
            "systemd, but cgroup v2 is not alone here",
        )
        .cost("the daemon does not start")
        .fix("set cgroup.driver to \"cgroupfs\", or boot with systemd.unified_cgroup_hierarchy=1"),
        CgroupDriver::Systemd => match asked(privileged) {
            Ok((version, made)) => judged(&version, made),
            Err(e) => Finding::fail(id, what, format!("systemd, but: {e}"))
                .cost("no pod can be made")
                .fix("see systemctl status, or set cgroup.driver to \"cgroupfs\""),
        },
    }
}

/// systemd's version, from its own mouth, and what units it makes for us, as far as that was tried: who may
/// ask for a version need not be let make anything.
fn asked(privileged: bool) -> Result<(String, &'static str), SystemdError> {
    let systemd = Systemd::here()?;
    let version = systemd.version(PATIENCE)?;
    let made = match privileged {
        true => trial(&systemd)?,
        false => "(making units: not tried without root)",
    };
    Ok((version, made))
}

/// Has systemd make a unit as one of a pod's, and end it.
fn trial(systemd: &Systemd) -> Result<&'static str, SystemdError> {
    let name = |end: &str| format!("slipwaycheck{}.{end}", std::process::id());
    // A process of ours can be named to systemd only where it counts processes as we do.
    let same = fs::read_link("/proc/self/ns/pid").is_ok_and(|l| l.as_os_str() == FIRST_NAMESPACE);
    let sleeper = same.then(|| Sleeper::start(0, None).ok()).flatten();
    let Some(sleeper) = sleeper else {
        let slice = name("slice");
        let exists = || Path::new("/sys/fs/cgroup").join(&slice).is_dir();
        systemd.start_slice(&slice, "slipway check", PATIENCE, &exists)?;
        systemd.stop(&slice, PATIENCE)?;
        return Ok("and makes slices");
    };
    let unit = name("scope");
    let cgroup = format!("/proc/{}/cgroup", sleeper.pid());
    let joined = || fs::read_to_string(&cgroup).is_ok_and(|text| text.trim_end().ends_with(&unit));
    let scope = Scope {
        unit: &unit,
        slice: "system.slice",
        process: sleeper.pid().unsigned_abs(),
        description: "slipway check",
        properties: &[("TasksMax", Value::U64(u64::MAX))],
    };
    let started = systemd.start_scope(&scope, PATIENCE, &joined);
    // It ends with its process at the latest.
    let stopped = systemd.stop(&unit, PATIENCE);
    started.and(stopped)?;
    Ok("and makes scopes")
}

fn judged(version: &str, made: &str) -> Finding {
    let (id, what) = ("cgroup-driver", "cgroup driver");
    let digits = version.split(|c: char| !c.is_ascii_digit());
    let number: u32 = digits.clone().find_map(|n| n.parse().ok()).unwrap_or(0);
    let found = format!("systemd {version}, which answers {made}");
    if number < LEAST_SYSTEMD {
        return Finding::fail(id, what, format!("systemd {version}"))
            .cost(
                "it does not know AllowedCPUs=, and refuses the scopes of containers with a cpuset",
            )
            .fix(format!(
                "systemd {LEAST_SYSTEMD} or later, or cgroup.driver \"cgroupfs\""
            ));
    }
    Finding::ok(id, what, found)
}

/// Whether the kubelet's configuration, where kubeadm puts it, names the other driver.
fn kubelet(config: &Config, text: &str) -> Option<Finding> {
    let (id, what) = ("kubelet-cgroup-driver", "kubelet's cgroupDriver");
    let ours = match config.cgroup.driver {
        CgroupDriver::Cgroupfs => "cgroupfs",
        CgroupDriver::Systemd => "systemd",
    };
    let value = text.lines().find_map(|l| l.strip_prefix("cgroupDriver:"))?;
    let theirs = value.trim().trim_matches(['"', '\'']);
    Some(if theirs == ours {
        Finding::ok(id, what, theirs)
    } else {
        Finding::warn(
            id,
            what,
            format!("{theirs} in {KUBELET}, but Slipway's is {ours}"),
        )
        .cost(
            "pods are refused, unless the kubelet asks Slipway for its driver (1.31 and later do)",
        )
        .fix(format!(
            "set cgroupDriver: {ours} there, or cgroup.driver to {theirs:?} here"
        ))
    })
}

fn open_files() -> Option<Finding> {
    let (id, what) = ("open-files", "open files");
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let found = format!("{soft}, at most {hard}, as this process was started");
    Some(if hard < OPEN_FILES {
        Finding::warn(id, what, found)
            .cost("the daemon runs out of descriptors, and containers inherit the limit")
            .fix("start the daemon with a higher limit (systemd: LimitNOFILE=1048576)")
    } else {
        Finding::ok(id, what, found)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn the_driver_is_judged() {
        let mut config = Config::default();
        assert_eq!(driver(&config, false, true, false).status, Status::Ok);
        assert_eq!(driver(&config, true, true, false).status, Status::Info);
        config.cgroup.driver = CgroupDriver::Systemd;
        assert_eq!(driver(&config, true, false, false).status, Status::Fail);
        assert_eq!(judged("252.38-1~deb12u1", "").status, Status::Ok);
        assert_eq!(judged("v257", "").status, Status::Ok);
        assert_eq!(judged("239", "").status, Status::Fail);
    }

    #[test]
    fn the_kubelets_driver_is_compared() {
        let mut config = Config::default();
        let text = "kind: KubeletConfiguration\ncgroupDriver: systemd\n";
        let status = |config: &Config, text| kubelet(config, text).map(|f| f.status);
        assert_eq!(status(&config, text), Some(Status::Warn));
        assert_eq!(
            status(&config, "cgroupDriver: \"cgroupfs\""),
            Some(Status::Ok)
        );
        assert_eq!(status(&config, "kind: x"), None);
        config.cgroup.driver = CgroupDriver::Systemd;
        assert_eq!(status(&config, text), Some(Status::Ok));
    }
}
