//! Runtime handlers: what each needs of the machine, as found by the other probes.

use crate::finding::{Finding, Status};
use crate::runtime::{ask_runtime, ask_shim, find_program, shim_program};
use slipway_config::{Config, Runtime, RuntimeKind};

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
                RuntimeKind::Oci | RuntimeKind::ShimV2 => others(name, default, runtime, findings),
            }
        })
        .collect()
}

/// What a runtime of others needs of the machine, beside its program: what the keeper makes for its pods.
const OTHERS: [&str; 6] = [
    "kernel",
    "system-calls",
    "sealed-binary",
    "namespaces",
    "mount-api",
    "overlay",
];

fn others(name: &str, default: &str, runtime: &Runtime, findings: &[Finding]) -> Finding {
    let word = runtime.kind.as_str();
    let (id, what) = (format!("runtime-{name}"), format!("runtime {name}"));
    let cost = "no pod with this handler runs";
    let program = runtime.program(name);
    let asked = match runtime.kind {
        RuntimeKind::ShimV2 => {
            find_program(&shim_program(&program)).and_then(|path| Ok((ask_shim(&path)?, path)))
        }
        _ => find_program(&program).and_then(|path| Ok((ask_runtime(&path)?, path))),
    };
    let (facts, path) = match asked {
        Ok(found) => found,
        Err(reason) => {
            let fix = format!("install it, or set runtimes.{name}.path");
            return Finding::warn(&id, &what, format!("{word}{default}: {reason}"))
                .cost(cost)
                .fix(fix);
        }
    };
    let mut kind = format!("{word}{default}: {} ({})", path.display(), facts.version);
    for note in &facts.notes {
        kind.push_str("; ");
        kind.push_str(note);
    }
    let mut lacking = findings
        .iter()
        .filter(|f| OTHERS.contains(&f.id.as_str()) && f.status == Status::Fail);
    match lacking.next() {
        Some(first) => Finding::fail(&id, &what, format!("{kind}; lacks: {}", first.what))
            .cost(cost)
            .fix("see there"),
        None => Finding::ok(&id, &what, kind),
    }
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
    fn a_runtime_that_is_missing_is_told() {
        let mut config = Config::default();
        let runtime = Runtime {
            kind: RuntimeKind::Oci,
            path: Some("/nonexistent/crun".into()),
            ..Runtime::default()
        };
        config.runtimes.insert("crun".into(), runtime);
        let finding = &check(&config, &[])[0];
        assert_eq!(
            (finding.id.as_str(), finding.status),
            ("runtime-crun", Status::Warn)
        );
        assert!(
            finding.found.contains("/nonexistent/crun"),
            "{}",
            finding.found
        );
        assert!(
            finding
                .fix
                .as_deref()
                .is_some_and(|fix| fix.contains("runtimes.crun.path"))
        );
    }

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
