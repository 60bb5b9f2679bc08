//! Kernel settings that pods depend on.

use crate::finding::Finding;
use std::fs;

/// Each setting by itself.
pub(crate) fn check() -> Vec<Finding> {
    let read =
        |name: &str| fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))).ok();
    let mut findings: Vec<_> = SETTINGS
        .iter()
        .filter_map(|setting| setting.judge(&read(setting.name)?))
        .collect();
    findings.push(bridge(
        read("net.bridge.bridge-nf-call-iptables").as_deref(),
    ));
    findings
}

struct Setting {
    name: &'static str,
    least: u64,
    cost: &'static str,
    /// A value that will do.
    good: &'static str,
}

const SETTINGS: [Setting; 5] = [
    Setting {
        name: "net.ipv4.ip_forward",
        least: 1,
        cost: "pods with addresses of their own reach nothing beyond this node",
        good: "1",
    },
    Setting {
        name: "fs.inotify.max_user_instances",
        least: 512,
        cost: "with many pods, programs that watch files fail with \"too many open files\"",
        good: "8192",
    },
    Setting {
        name: "fs.inotify.max_user_watches",
        least: 16_384,
        cost: "with many pods, programs that watch files fail with \"no space left on device\"",
        good: "524288",
    },
    Setting {
        name: "kernel.pid_max",
        least: 65_536,
        cost: "the node runs out of process numbers before it runs out of memory",
        good: "4194304",
    },
    Setting {
        name: "fs.file-max",
        least: 262_144,
        cost: "the node runs out of open files before it runs out of memory",
        good: "2097152",
    },
];

impl Setting {
    /// `None` for a value that is no number.
    fn judge(&self, value: &str) -> Option<Finding> {
        let value: u64 = value.trim().parse().ok()?;
        let found = format!("{} = {value}", self.name);
        if value >= self.least {
            return Some(Finding::ok(self.name, "sysctl", found));
        }
        Some(
            Finding::warn(self.name, "sysctl", found)
                .cost(self.cost)
                .fix(format!(
                    "sysctl -w {name}={good}, and put {name} = {good} in a file of /etc/sysctl.d",
                    name = self.name,
                    good = self.good
                )),
        )
    }
}

fn bridge(value: Option<&str>) -> Finding {
    let (id, what) = ("net.bridge.bridge-nf-call-iptables", "sysctl");
    let cost = "with a bridge network, kube-proxy's rules do not see what pods of this node send to each other";
    match value.map(str::trim) {
        Some("0") => Finding::warn(id, what, format!("{id} = 0"))
            .cost(cost)
            .fix(format!("sysctl -w {id}=1")),
        Some(value) => Finding::ok(id, what, format!("{id} = {value}")),
        None => Finding::info(id, what, "the module br_netfilter is not loaded")
            .cost(cost)
            .fix("modprobe br_netfilter, and put br_netfilter in a file of /etc/modules-load.d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn values_are_judged() {
        let setting = &SETTINGS[0];
        assert_eq!(setting.judge("1\n").unwrap().status, Status::Ok);
        let low = setting.judge("0\n").unwrap();
        assert_eq!(low.status, Status::Warn);
        assert!(low.fix.unwrap().contains("net.ipv4.ip_forward=1"));
        assert_eq!(setting.judge("much"), None);
        assert_eq!(bridge(Some("0\n")).status, Status::Warn);
        assert_eq!(bridge(Some("1\n")).status, Status::Ok);
        assert_eq!(bridge(None).status, Status::Info);
    }
}
