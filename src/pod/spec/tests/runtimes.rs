//! What a plan means to runtimes that others wrote: runc and crun run containers from it, and the
//! container says what it got. Needs root, a static busybox, and one of the two.
#![allow(clippy::expect_used)]

use oci_spec::runtime::{Capability, Spec};
use slipway_proto::cri::{self, NamespaceMode};
use slipway_proto::keeper::SetupSandboxResult;
use slipway_spec::{ContainerInput, ContainerPlan, HostFacts, PodFiles, SpecOptions};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

const BUSYBOX: &str = "/bin/busybox";

fn runtimes() -> Vec<&'static str> {
    // crun gives up on hybrid hosts whose v2 hierarchy has controllers.
    let unified = fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers");
    let hybrid = unified.is_ok_and(|controllers| !controllers.trim().is_empty());
    if hybrid {
        println!("SKIPPED: crun, which can't run on a hybrid host");
    }
    let works = |name: &&str| {
        !(hybrid && *name == "crun") && Command::new(name).arg("--version").output().is_ok()
    };
    let found: Vec<_> = ["runc", "crun"].into_iter().filter(works).collect();
    let root = fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
    if found.is_empty() || !root || !Path::new(BUSYBOX).exists() {
        println!("SKIPPED: needs root, {BUSYBOX}, and runc or crun");
        return Vec::new();
    }
    found
}

/// A pod in the host's network and IPC namespaces, so that it needs no keeper.
fn pod(privileged: bool) -> cri::PodSandboxConfig {
    let node = NamespaceMode::Node.into();
    let options = cri::NamespaceOption {
        network: node,
        ipc: node,
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    };
    let security = cri::LinuxSandboxSecurityContext {
        privileged,
        namespace_options: Some(options),
        ..Default::default()
    };
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "p".into(),
            ..Default::default()
        }),
        hostname: "web-0".into(),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(security),
            cgroup_parent: format!("/slipway-spec-test-{}", std::process::id()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn request(script: &str) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: "c".into(),
            attempt: 0,
        }),
        command: vec!["/bin/sh".into(), "-c".into()],
        args: vec![script.into()],
        ..Default::default()
    }
}

/// The bundle's directory is removed with everything in it, whatever happens.
struct Bundle {
    dir: tempfile::TempDir,
    plan: ContainerPlan,
    name: String,
    cgroup: String,
}

impl Bundle {
    fn new(pod: &cri::PodSandboxConfig, config: &cri::ContainerConfig) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let bin = dir.path().join("rootfs/bin");
        for sub in ["rootfs/bin", "rootfs/etc", "rootfs/tmp"] {
            fs::create_dir_all(dir.path().join(sub)).expect("directory");
        }
        fs::copy(BUSYBOX, bin.join("busybox")).expect("copy");
        fs::set_permissions(bin.join("busybox"), fs::Permissions::from_mode(0o755)).expect("mode");
        for applet in [
            "sh", "cat", "grep", "touch", "pwd", "ls", "env", "id", "hostname",
        ] {
            symlink("busybox", bin.join(applet)).expect("link");
        }
        let hosts = dir.path().join("hosts");
        fs::write(&hosts, "127.0.0.1 from-the-pod\n").expect("file");
        let options = SpecOptions::default();
        let host = HostFacts::detect();
        let sources = slipway_spec::survey(config, &options).expect("sources");
        let name = dir
            .path()
            .file_name()
            .map(|n| n.to_string_lossy().replace('.', ""))
            .expect("name");
        let plan = slipway_spec::container(&ContainerInput {
            selinux_level: None,
            id: &name,
            pod_id: "p",
            sandbox_config: pod,
            namespaces: &SetupSandboxResult::default(),
            config,
            image: &oci_spec::image::Config::default(),
            image_name: "test",
            container_dir: dir.path(),
            files: &PodFiles {
                hosts: Some(hosts),
                ..Default::default()
            },
            sources: &sources,
            options: &options,
            host: &host,
        });
        let plan = plan.expect("a plan");
        let cgroup = pod.linux.clone().unwrap_or_default().cgroup_parent;
        Self {
            dir,
            plan,
            name,
            cgroup,
        }
    }

    /// What the container writes.
    fn run(&self, runtime: &str) -> String {
        let mut spec: Spec = serde_json::from_slice(&self.plan.create.spec).expect("JSON");
        // What is libcontainer's own word for rshared.
        if let Some(linux) = spec.linux_mut().as_mut() {
            let words = linux
                .rootfs_propagation()
                .as_ref()
                .map(|word| format!("r{word}"));
            linux.set_rootfs_propagation(words);
        }
        let text = serde_json::to_vec(&spec).expect("JSON");
        fs::write(self.dir.path().join("config.json"), text).expect("file");
        let state = self.dir.path().join("state");
        let output = Command::new("timeout")
            .args(["--kill-after=5", "60", runtime])
            .arg("--root")
            .arg(&state)
            .args(["run", "--bundle"])
            .arg(self.dir.path())
            .arg(&self.name)
            .output()
            .expect("runs");
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{runtime}: {}\n{out}\n{err}",
            output.status
        );
        out
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        for entry in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::remove_dir(entry.path().join(&self.cgroup[1..]));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.cgroup[1..]));
    }
}

fn value<'a>(out: &'a str, key: &str) -> &'a str {
    let line = out.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap_or_else(|| panic!("{key} is missing in\n{out}"))
        .trim()
}

#[test]
fn a_confined_container() {
    let source = tempfile::tempdir().expect("directory");
    fs::write(source.path().join("flag"), "here").expect("file");
    let mut config = request(
        "grep -E '^(CapBnd|CapEff|NoNewPrivs):' /proc/self/status
        echo pwd=$(pwd) raw=$RAW host=$HOSTNAME home=${HOME-unset} path=$PATH
        echo kcore=$(cat /proc/kcore | grep -c .)
        touch /root.txt 2>&1; touch /sys/x 2>&1
        touch /data/x 2>&1; echo flag=$(cat /data/flag); cat /etc/hosts
        echo mounts; grep -E ' (/data|/sys|/proc/sys|/dev/shm|/etc/hosts) ' /proc/self/mountinfo
        ls -l /dev/fuse /dev/null
        grep -E 'memory|pids|0::' /proc/self/cgroup",
    );
    config.working_dir = "/tmp".into();
    config.envs = vec![cri::KeyValue {
        key: "RAW".into(),
        value: b"v=1".to_vec(),
    }];
    config.mounts = vec![cri::Mount {
        container_path: "/data".into(),
        host_path: source.path().to_string_lossy().into_owned(),
        readonly: true,
        ..Default::default()
    }];
    if Path::new("/dev/fuse").exists() {
        config.devices = vec![cri::Device {
            host_path: "/dev/fuse".into(),
            container_path: "/dev/fuse".into(),
            permissions: "rw".into(),
        }];
    }
    let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    config.linux = Some(cri::LinuxContainerConfig {
        security_context: Some(cri::LinuxContainerSecurityContext {
            no_new_privs: true,
            readonly_rootfs: true,
            capabilities: Some(cri::Capability {
                add_capabilities: list(&["NET_ADMIN"]),
                drop_capabilities: list(&["ALL"]),
                ..Default::default()
            }),
            masked_paths: list(&["/proc/kcore"]),
            readonly_paths: list(&["/proc/sys"]),
            ..Default::default()
        }),
        resources: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            cpu_shares: 512,
            ..Default::default()
        }),
    });
    for runtime in runtimes() {
        let bundle = Bundle::new(&pod(false), &config);
        let out = bundle.run(runtime);
        assert_eq!(bundle.plan.bounding, [Capability::NetAdmin].into());
        assert_eq!(value(&out, "CapBnd:"), "0000000000001000");
        assert_eq!(value(&out, "CapEff:"), "0000000000001000");
        assert_eq!(value(&out, "NoNewPrivs:"), "1");
        let environment = value(&out, "pwd=");
        assert!(environment.starts_with("/tmp raw=v=1 host=web-0 "), "{out}");
        assert!(environment.contains("path=/usr/local/sbin:"), "{out}");
        assert_eq!(value(&out, "kcore="), "0");
        for place in ["/root.txt", "/sys/x", "/data/x"] {
            let refused = out
                .lines()
                .any(|l| l.contains(place) && l.contains("Read-only"));
            assert!(refused, "{place} could be written\n{out}");
        }
        let mounted = |place: &str, options: &str| {
            let line = out
                .lines()
                .find(|line| line.contains(&format!(" {place} ")));
            let line = line.unwrap_or_else(|| panic!("{place} is not mounted\n{out}"));
            assert!(line.contains(options), "{line}");
        };
        mounted("/proc/sys", " ro,");
        mounted("/data", " ro,");
        mounted("/dev/shm", " rw,nosuid,nodev,noexec,");
        mounted("/etc/hosts", " ro,nosuid,nodev,noexec,");
        assert_eq!(value(&out, "flag="), "here");
        assert!(out.contains("from-the-pod"), "{out}");
        if Path::new("/dev/fuse").exists() {
            assert!(
                out.lines()
                    .any(|l| l.starts_with('c') && l.contains("/dev/fuse")),
                "{out}"
            );
        }
        let cgroup = bundle
            .plan
            .spec
            .linux()
            .clone()
            .and_then(|l| l.cgroups_path().clone());
        let cgroup = cgroup.expect("cgroup").to_string_lossy().into_owned();
        // With a cgroup namespace of its own the container sees itself at the root.
        let seen = out.contains(&cgroup) || out.contains("0::/\n");
        assert!(seen, "{cgroup} is not in\n{out}");
    }
}

#[test]
fn a_privileged_container() {
    let mut config = request(
        "grep CapBnd: /proc/self/status
        grep -E ' (/sys|/) ' /proc/self/mountinfo
        ls /dev | grep -c .
        touch /tmp/written && echo written",
    );
    config.linux = Some(cri::LinuxContainerConfig {
        security_context: Some(cri::LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        }),
        ..Default::default()
    });
    for runtime in runtimes() {
        let bundle = Bundle::new(&pod(true), &config);
        let out = bundle.run(runtime);
        let status = fs::read_to_string("/proc/self/status").expect("proc");
        let own = |key: &str| u64::from_str_radix(value(&status, key), 16).expect("hex");
        let bounding = u64::from_str_radix(value(&out, "CapBnd:"), 16).expect("hex");
        assert_eq!(bounding, own("CapBnd:") & own("CapPrm:"));
        let sysfs = out.lines().find(|l| l.contains(" /sys ")).expect("sysfs");
        assert!(sysfs.contains(" rw,"), "{sysfs}");
        assert!(out.lines().any(|l| l == "written"), "{out}");
    }
}
