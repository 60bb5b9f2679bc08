//! Runtime handlers: what each needs of the machine, as found by the other probes.

use crate::finding::{Finding, Status};
use slipway_config::{Config, RuntimeKind};

/// What the native runtime can't do without.
const NATIVE: [&str; 13] = [
    "kernel",
    "system-calls",
    "sealed-binary",
    "seccomp",
    "namespaces",
    "mount-api",
    "overlay",
    "cgroup",
    "cgroup-controllers",
    "cgroup-make",
    "cgroup-kill",
    "capabilities",
    "cgroup-driver",
];

/// One finding per configured handler.
pub(crate) fn check(config: &Config, findings: &[Finding]) -> Vec<Finding> {
    let entries = config.runtimes.iter();
    entries
        .map(|(name, runtime)| {
            let default = if *name == config.default_runtime {
                ", the default"
            } else {
                ""
            };
            match runtime.kind {
                RuntimeKind::Native => native(name, default, findings),
            }
        })
        .collect()
}

fn native(name: &str, default: &str, findings: &[Finding]) -> Finding {
    let (id, what) = (format!("runtime-{name}"), format!("runtime {name}"));
    let kind = format!("native: in-process by libcontainer{default}");
    let needed = || findings.iter().filter(|f| NATIVE.contains(&f.id.as_str()));
    let failed: Vec<_> = needed()
        .filter(|f| f.status == Status::Fail)
        .map(|f| f.what.as_str())
        .collect();
    if !failed.is_empty() {
        return Finding::fail(&id, &what, format!("{kind}; lacks: {}", failed.join(", ")))
            .cost("no pod with this handler runs")
            .fix("see there");
    }
    if crate::privileges::is_root() {
        Finding::ok(&id, &what, kind)
    } else {
        Finding::info(
            &id,
            &what,
            format!("{kind}; not all it needs could be tried"),
        )
        .fix("run slipway check as root")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_lacks_what_failed() {
        let config = Config::default();
        let good = [
            Finding::ok("overlay", "overlay", "x"),
            Finding::fail("cni", "CNI", "x"),
        ];
        assert_ne!(check(&config, &good)[0].status, Status::Fail);
        let bad = [Finding::fail("overlay", "overlay mounts", "x")];
        let finding = &check(&config, &bad)[0];
        assert_eq!(finding.status, Status::Fail);
        assert!(finding.found.contains("lacks: overlay mounts"));
        assert_eq!(finding.id, "runtime-native");
    }
}
