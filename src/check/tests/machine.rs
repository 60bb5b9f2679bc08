//! The report of the machine that the tests run on, and what it leaves behind.

use slipway_check::{Output, Status, inspect, run};
use slipway_config::Config;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// One look at a time: what another test's look has under way would count as left behind.
static ALONE: Mutex<()> = Mutex::new(());

/// A configuration whose roots are the test's own.
fn config(dir: &Path) -> Config {
    Config {
        listen: dir.join("run/slipway.sock"),
        run_root: dir.join("run"),
        state_root: dir.join("state"),
        ..Config::default()
    }
}

fn cgroups() -> BTreeSet<PathBuf> {
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten();
    let mut found = BTreeSet::new();
    for hierarchy in hierarchies {
        let own = format!("slipway-check-{}", std::process::id());
        for dir in [
            hierarchy.path().join(&own),
            hierarchy.path().with_file_name(&own),
        ] {
            found.extend(Some(dir).filter(|d| d.exists()));
        }
    }
    found
}

/// Children of this process.
fn children() -> Vec<i32> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(1));
        if parent == Some(&std::process::id().to_string()) {
            all.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse::<i32>().ok()),
            );
        }
    }
    all
}

#[test]
fn this_machine_is_described_and_left_as_it_was() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let report = inspect(&config(dir.path()));
    let ids: BTreeSet<_> = report.findings.iter().map(|f| f.id.as_str()).collect();
    for id in [
        "kernel",
        "system-calls",
        "sealed-binary",
        "seccomp",
        "seccomp-actions",
        "namespaces",
        "user-namespaces",
        "mount-api",
        "recursive-read-only",
        "idmapped-mounts",
        "overlay",
        "cgroup",
        "apparmor",
        "selinux",
        "run-root",
        "state-root",
        "socket",
        "cni",
        "net.ipv4.ip_forward",
        "init",
        "cgroup-driver",
        "open-files",
        "runtime-native",
    ] {
        assert!(ids.contains(id), "{id} is missing in {ids:?}");
    }
    for finding in &report.findings {
        let bad = matches!(finding.status, Status::Warn | Status::Fail);
        assert!(
            !bad || finding.cost.is_some(),
            "what does it cost? {finding:?}"
        );
        assert!(!bad || finding.fix.is_some(), "how to mend it? {finding:?}");
    }
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "files are left"
    );
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(".slipway-check-"), "{mounts}");
    assert_eq!(cgroups(), BTreeSet::new());
    assert_eq!(children(), Vec::<i32>::new());
    // Nothing mounted is in the way.
    dir.close().unwrap();
}

#[test]
fn text_json_and_verdict_agree() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let (table, fit) = run(&config, Output::Table);
    assert!(table.starts_with("STATUS"), "{table}");
    let (json, ok) = run(&config, Output::Json);
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(value["ok"], ok);
    assert_eq!(fit, ok);
    // A socket that can't be: the verdict changes.
    let bad = Config {
        listen: "/proc/self/stat".into(),
        ..config
    };
    let (json, ok) = run(&bad, Output::Json);
    assert!(!ok, "{json}");
}
