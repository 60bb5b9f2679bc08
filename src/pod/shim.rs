//! Pods whose containers a shim makes, or a runtime in a sandbox that they share: what it is told of the pod, and its end when
//! the keeper can't see to that.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Deserialize;
use slipway_config::{Config, RuntimeKind};
use slipway_proto::{cri, keeper};
use slipway_runtime::cgroup;
use slipway_runtime::removal;
use slipway_shim::{Address, Version};

use super::leftovers;
use super::record::PodRecord;

/// The call that starts the shim, or makes the sandbox; `None` for pods of other runtimes. `sandbox` is the pod's host name, and whether systemd
/// makes its cgroups.
pub fn start(
    record: &PodRecord,
    sandbox: (String, bool),
    config: &Config,
) -> Option<keeper::StartSandbox> {
    let driver = record.driver.as_ref()?;
    if driver.settings.kind != RuntimeKind::ShimV2 && !driver.pod_sandbox {
        return None;
    }
    let (hostname, systemd) = sandbox;
    Some(keeper::StartSandbox {
        runtime: Some(driver.for_keeper(&record.runtime, config)),
        annotations: annotations(record, &driver.settings.allowed_annotations),
        hostname,
        systemd,
    })
}

/// What the pod is and how large it may become, in the words of containerd and of CRI-O, and those of its annotations that
/// the handler lets through.
fn annotations(record: &PodRecord, allowed: &[String]) -> HashMap<String, String> {
    let metadata = record.config.metadata.clone().unwrap_or_default();
    let mut all = HashMap::new();
    for (key, value) in &record.config.annotations {
        if allowed
            .iter()
            .any(|beginning| key.starts_with(beginning.as_str()))
        {
            all.insert(key.clone(), value.clone());
        }
    }
    let mut add =
        |key: &str, value: &str| all.insert(format!("io.kubernetes.{key}"), value.to_owned());
    add("cri.sandbox-id", &record.id);
    add("cri.sandbox-name", &metadata.name);
    add("cri.sandbox-namespace", &metadata.namespace);
    add("cri.sandbox-uid", &metadata.uid);
    add("cri.sandbox-log-directory", &record.config.log_directory);
    add("cri.runtime-handler", &record.handler);
    add("cri-o.SandboxID", &record.id);
    add("cri-o.SandboxName", &metadata.name);
    add("cri-o.KubeName", &metadata.name);
    add("cri-o.Namespace", &metadata.namespace);
    add("cri-o.RuntimeHandler", &record.handler);
    let linux = record.config.linux.clone().unwrap_or_default();
    for (key, value) in sizes(&linux.resources.unwrap_or_default()) {
        add(&format!("cri.sandbox-{key}"), &value.to_string());
    }
    for (key, value) in sizes(&linux.overhead.unwrap_or_default()) {
        add(&format!("cri.sandbox-overhead-{key}"), &value.to_string());
    }
    all
}

/// Sizes for a virtual machine: what all of the pod's containers need. A kubelet that says nothing has zeros here.
fn sizes(resources: &cri::LinuxContainerResources) -> [(&'static str, i64); 4] {
    [
        ("cpu-period", resources.cpu_period),
        ("cpu-quota", resources.cpu_quota),
        ("cpu-shares", resources.cpu_shares),
        ("memory", resources.memory_limit_in_bytes),
    ]
}

/// What a keeper has written down of its pod's shim.
#[derive(Deserialize)]
struct Shim {
    pid: i32,
    address: String,
    /// Of the task API.
    #[serde(default)]
    version: u32,
    root: PathBuf,
    cgroup: String,
}

fn written(dir: &Path) -> Option<Shim> {
    let text = std::fs::read_to_string(dir.join(slipway_runtime::SHIM_RECORD));
    serde_json::from_str(&text.ok()?).ok()
}

/// Where the shim of a pod listens, whose run directory this is, if it has one.
pub fn address(dir: &Path) -> Option<Address> {
    let shim = written(dir)?;
    Some(Address {
        socket: shim.address,
        version: Version::of(shim.version)?,
    })
}

/// The cgroup of a pod's sandbox, whose run directory this is, if it has one.
pub fn sandbox_cgroup(dir: &Path) -> Option<String> {
    Some(written(dir)?.cgroup)
}

/// Ends the shim of a pod whose keeper is dead or does not obey, with all that it has started. Blocks for up to a few
/// seconds. A pod without one is no error.
pub fn end(id: &str, dir: &Path) {
    let Some(shim) = written(dir) else {
        return;
    };
    // The number may be another process's by now.
    let command = std::fs::read(format!("/proc/{}/cmdline", shim.pid)).unwrap_or_default();
    let own = command.split(|b| *b == 0).any(|word| word == id.as_bytes());
    if own && shim.pid > 1 {
        tracing::warn!(pod = id, pid = shim.pid, "the pod's shim is killed");
        let doomed: Vec<_> = slipway_runtime::descendants(shim.pid)
            .into_iter()
            .filter_map(cgroup::pin)
            .collect();
        for process in &doomed {
            cgroup::send(process, libc::SIGKILL);
        }
        let until = Instant::now() + removal::KILL_DEADLINE;
        for process in &doomed {
            removal::wait(process, until);
        }
    }
    if let Err(problems) = leftovers::kill_cgroup(&shim.cgroup) {
        tracing::error!(
            pod = id,
            problems = problems.join("; "),
            "can't remove the cgroup of the pod's sandbox"
        );
    }
    if let Some(socket) = shim.address.strip_prefix("unix:///") {
        let _ = std::fs::remove_file(Path::new("/").join(socket));
    }
    // Its last component is the pod's id.
    if shim.root.file_name().is_some_and(|name| name == id) {
        let _ = std::fs::remove_dir_all(&shim.root);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::record::Namespaces;

    #[test]
    fn a_shim_is_told_who_and_how_large_the_pod_is() {
        let linux = cri::LinuxPodSandboxConfig {
            resources: Some(cri::LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 200_000,
                cpu_shares: 2048,
                memory_limit_in_bytes: 1 << 30,
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "web".into(),
                namespace: "shop".into(),
                uid: "u".into(),
                attempt: 0,
            }),
            linux: Some(linux),
            ..Default::default()
        };
        config
            .annotations
            .insert("org.example.a".into(), "1".into());
        config
            .annotations
            .insert("com.example.b".into(), "2".into());
        let record = PodRecord {
            schema: PodRecord::SCHEMA,
            id: "p1".into(),
            boot_id: String::new(),
            created_at: 0,
            runtime: "vm".into(),
            handler: "vm".into(),
            driver: None,
            config,
            namespaces: Namespaces::default(),
            cgroup: String::new(),
            made_cgroup: false,
            selinux_level: None,
            ips: Vec::new(),
            stopped: false,
            phases: Vec::new(),
        };
        let all = annotations(&record, &["org.example.".to_owned()]);
        for (key, value) in [
            ("io.kubernetes.cri.sandbox-id", "p1"),
            ("io.kubernetes.cri-o.SandboxID", "p1"),
            ("io.kubernetes.cri.sandbox-name", "web"),
            ("io.kubernetes.cri.sandbox-namespace", "shop"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "200000"),
            ("io.kubernetes.cri.sandbox-memory", "1073741824"),
            ("org.example.a", "1"),
        ] {
            assert_eq!(all.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert!(!all.contains_key("com.example.b"));
        assert!(start(&record, (String::new(), false), &Config::default()).is_none());
    }

    #[test]
    fn a_pod_without_a_shim_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        end("p1", dir.path());
        std::fs::write(dir.path().join(slipway_runtime::SHIM_RECORD), "{").unwrap();
        end("p1", dir.path());
        // A number that is another's: this process does not have the pod's id among its arguments.
        let record = serde_json::json!({"pid": std::process::id(), "address": "unix:///nonexistent/s",
            "root": "/nonexistent/p1", "cgroup": "/"});
        std::fs::write(
            dir.path().join(slipway_runtime::SHIM_RECORD),
            record.to_string(),
        )
        .unwrap();
        end("p1-other", dir.path());
    }
}
