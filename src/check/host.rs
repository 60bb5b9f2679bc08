//! The machine around the daemon: its service manager, the cgroup driver, limits on open files.

use crate::finding::Finding;
use nix::sys::resource::{Resource, getrlimit};
use slipway_config::{CgroupDriver, Config};
use std::fs;
use std::path::Path;

/// A hard limit on open files that some hundred pods do not reach.
const OPEN_FILES: u64 = 65_536;

/// Everything about the machine around.
pub(crate) fn check(config: &Config) -> Vec<Finding> {
    // As sd_booted(3) finds out.
    let systemd = Path::new("/run/systemd/system").is_dir();
    let mut findings = vec![init(systemd), driver(config, systemd)];
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

fn driver(config: &Config, systemd: bool) -> Finding {
    let (id, what) = ("cgroup-driver", "cgroup driver");
    match config.cgroup.driver {
        CgroupDriver::Cgroupfs if systemd => {
            Finding::info(id, what, "cgroupfs, on a host of systemd")
                .cost("systemd and Slipway both make cgroups; neither touches the other's")
                .fix(
                    "set the kubelet's cgroupDriver to cgroupfs (a recent one asks Slipway for it)",
                )
        }
        CgroupDriver::Cgroupfs => Finding::ok(id, what, "cgroupfs"),
        CgroupDriver::Systemd => Finding::fail(id, what, "systemd")
            .cost("this version can't ask systemd for cgroups")
            .fix("set cgroup.driver to \"cgroupfs\""),
    }
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
        assert_eq!(driver(&config, false).status, Status::Ok);
        assert_eq!(driver(&config, true).status, Status::Info);
        config.cgroup.driver = CgroupDriver::Systemd;
        assert_eq!(driver(&config, true).status, Status::Fail);
    }
}
