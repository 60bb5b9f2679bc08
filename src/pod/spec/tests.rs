//! Whole containers: what the parts make together.

use crate::{
    ContainerInput, ContainerPlan, HostFacts, MountSource, PodFiles, Propagation, SeccompChoice,
    Sources, SpecError, SpecErrorKind, SpecOptions, container,
};
use oci_spec::runtime::{Capability, LinuxNamespaceType, Mount, Spec};
use slipway_proto::cri;
use slipway_proto::keeper::SetupSandboxResult;
use std::path::{Path, PathBuf};

/// A container in its pod on a host, to be bent by each test.
pub(crate) struct Case {
    pub pod: cri::PodSandboxConfig,
    pub config: cri::ContainerConfig,
    pub image: oci_spec::image::Config,
    pub made: SetupSandboxResult,
    pub files: PodFiles,
    pub sources: Sources,
    pub options: SpecOptions,
    pub host: HostFacts,
}

impl Case {
    pub fn new() -> Self {
        let metadata = cri::PodSandboxMetadata {
            name: "web".into(),
            uid: "u-1".into(),
            namespace: "shop".into(),
            attempt: 0,
        };
        let pod = cri::PodSandboxConfig {
            metadata: Some(metadata),
            log_directory: "/var/log/pods/web".into(),
            ..Default::default()
        };
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: "main".into(),
                attempt: 0,
            }),
            command: vec!["/bin/sh".into()],
            log_path: "main/0.log".into(),
            ..Default::default()
        };
        let path = |name: &str| Some(PathBuf::from(format!("/run/slipway/pods/p/{name}")));
        Self {
            pod,
            config,
            image: oci_spec::image::Config::default(),
            made: SetupSandboxResult {
                network: "/ns/net".into(),
                ipc: "/ns/ipc".into(),
                uts: "/ns/uts".into(),
                pid: "/ns/pid".into(),
                user: "/ns/user".into(),
                made_cgroup: true,
            },
            files: PodFiles {
                resolv_conf: path("resolv.conf"),
                hosts: path("hosts"),
                hostname: path("hostname"),
                shm: path("shm"),
            },
            sources: Sources {
                mounts: vec![],
                devices: vec![],
                all_devices: vec![],
                apparmor: crate::AppArmor::Off,
                seccomp: SeccompChoice::Unconfined,
            },
            options: SpecOptions::default(),
            host: HostFacts {
                capabilities: [Capability::Chown, Capability::Kill, Capability::SysAdmin].into(),
                cgroup_v2: true,
                systemd: false,
                swap_accounting: true,
                hugetlb: true,
                hugepage_sizes: Default::default(),
                kernel: (6, 1),
                recursive_read_only: true,
                selinux: None,
                hostname: "node".into(),
            },
        }
    }

    pub fn plan(&self) -> Result<ContainerPlan, SpecError> {
        container(&ContainerInput {
            selinux_level: None,
            id: "c1",
            pod_id: "p1",
            sandbox_config: &self.pod,
            namespaces: &self.made,
            config: &self.config,
            image: &self.image,
            image_name: "registry.test/app:1",
            container_dir: Path::new("/run/slipway/pods/p1/containers/c1"),
            files: &self.files,
            sources: &self.sources,
            options: &self.options,
            host: &self.host,
        })
    }

    pub fn good(&self) -> ContainerPlan {
        self.plan().expect("a good configuration")
    }

    pub fn bad(&self) -> (SpecErrorKind, String) {
        let error = self.plan().expect_err("a bad configuration");
        (error.kind(), error.field().to_owned())
    }

    pub fn security(&mut self) -> &mut cri::LinuxContainerSecurityContext {
        let linux = self.config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default()
    }

    pub fn pod_security(&mut self) -> &mut cri::LinuxSandboxSecurityContext {
        let linux = self.pod.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default()
    }

    /// Gives the pod a user namespace of so many ids.
    pub fn user_namespace(&mut self, length: u32) -> &mut cri::NamespaceOption {
        let mapping = cri::IdMapping {
            host_id: 65536,
            container_id: 0,
            length,
        };
        let options = self
            .pod_security()
            .namespace_options
            .get_or_insert_default();
        options.userns_options = Some(cri::UserNamespace {
            mode: cri::NamespaceMode::Pod.into(),
            uids: vec![mapping],
            gids: vec![mapping],
        });
        options
    }

    pub fn mount(&mut self, place: &str, source: &str) -> &mut cri::Mount {
        self.sources.mounts.push(MountSource {
            path: source.into(),
            procfs: false,
            propagation: Propagation::Shared,
        });
        self.config.mounts.push(cri::Mount {
            container_path: place.into(),
            host_path: source.into(),
            ..Default::default()
        });
        self.config.mounts.last_mut().expect("just pushed")
    }
}

pub(crate) fn mounts(spec: &Spec) -> Vec<String> {
    let place = |m: &Mount| m.destination().display().to_string();
    spec.mounts().iter().flatten().map(place).collect()
}

pub(crate) fn find<'a>(spec: &'a Spec, place: &str) -> &'a Mount {
    let mut all = spec.mounts().iter().flatten();
    all.find(|m| m.destination() == Path::new(place))
        .expect("mounted")
}

pub(crate) fn options(spec: &Spec, place: &str) -> Vec<String> {
    find(spec, place).options().clone().unwrap_or_default()
}

pub(crate) fn has(spec: &Spec, place: &str, option: &str) -> bool {
    options(spec, place).iter().any(|o| o == option)
}

#[test]
fn a_plain_container() {
    let plan = Case::new().good();
    let spec = &plan.spec;
    assert_eq!(spec.version(), "1.0.2");
    let root = spec.root().clone().expect("root");
    assert_eq!(
        root.path(),
        Path::new("/run/slipway/pods/p1/containers/c1/rootfs")
    );
    assert_eq!(root.readonly(), Some(false));
    let process = spec.process().clone().expect("process");
    assert_eq!(
        process.args().as_deref(),
        Some(["/bin/sh".to_owned()].as_slice())
    );
    assert_eq!(process.no_new_privileges(), Some(false));
    assert_eq!(process.cwd(), Path::new("/"));
    let capabilities = process.capabilities().clone().expect("capabilities");
    assert_eq!(capabilities.bounding().as_ref(), Some(&plan.bounding));
    assert_eq!(plan.bounding, [Capability::Chown, Capability::Kill].into());
    let linux = spec.linux().clone().expect("linux");
    assert_eq!(linux.seccomp(), &None);
    assert_eq!(
        linux.cgroups_path().as_deref(),
        Some(Path::new("/slipway/p1/c1"))
    );
    assert_eq!(linux.rootfs_propagation(), &None);
    assert_eq!(spec.hostname(), &None);
    let standard = [
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/mqueue",
        "/sys",
        "/sys/fs/cgroup",
    ];
    let files = [
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/dev/shm",
    ];
    assert_eq!(
        mounts(spec),
        [standard.as_slice(), files.as_slice()].concat()
    );
    assert!(has(spec, "/sys", "ro") && has(spec, "/sys/fs/cgroup", "ro"));
    assert!(has(spec, "/etc/hosts", "rw"));
    assert_eq!(plan.create.id, "c1");
    assert_eq!(plan.create.log_path, "/var/log/pods/web/main/0.log");
    assert_eq!(plan.create.working_dir, "/");
    assert!(plan.create.env.contains(&b"HOSTNAME=node".to_vec()));
    assert_eq!(plan.stop_signal, 15);
    // Three of the usual fourteen is all that this host has.
    assert_eq!(plan.warnings.len(), 1);
}

#[test]
fn the_json_is_the_specification() {
    let plan = Case::new().good();
    let back: Spec = serde_json::from_slice(&plan.create.spec).expect("JSON");
    assert_eq!(back, plan.spec);
    let json: serde_json::Value = serde_json::from_slice(&plan.create.spec).expect("JSON");
    assert_eq!(json["ociVersion"], "1.0.2");
    assert!(json["linux"].get("seccomp").is_none());
    assert!(json["process"].get("oomScoreAdj").is_none());
    let annotations = &json["annotations"];
    for (key, value) in [
        ("container-type", "container"),
        ("container-name", "main"),
        ("image-name", "registry.test/app:1"),
        ("sandbox-id", "p1"),
        ("sandbox-name", "web"),
        ("sandbox-namespace", "shop"),
    ] {
        assert_eq!(annotations[format!("io.kubernetes.cri.{key}")], value);
    }
}

#[test]
fn annotations_of_the_request_do_not_reach_the_runtime() {
    let mut case = Case::new();
    let evil = ("run.oci.keep_original_groups".to_owned(), "1".to_owned());
    case.config.annotations.extend([evil.clone()]);
    case.pod.annotations.extend([evil.clone()]);
    let annotations = case.good().spec.annotations().clone().expect("annotations");
    assert!(!annotations.contains_key(&evil.0));
}

#[test]
fn privileged() {
    let mut case = Case::new();
    case.security().privileged = true;
    let field = "linux.security_context.privileged".to_owned();
    assert_eq!(case.bad(), (SpecErrorKind::Invalid, field));
    case.pod_security().privileged = true;
    case.security().masked_paths = vec!["/proc/kcore".into()];
    let plan = case.good();
    assert_eq!(plan.bounding, case.host.capabilities);
    assert!(has(&plan.spec, "/sys", "rw") && has(&plan.spec, "/sys/fs/cgroup", "rw"));
    let linux = plan.spec.linux().clone().expect("linux");
    assert_eq!(
        (linux.masked_paths(), linux.readonly_paths()),
        (&None, &None)
    );
    let kinds: Vec<_> = linux
        .namespaces()
        .iter()
        .flatten()
        .map(|n| n.typ())
        .collect();
    assert!(!kinds.contains(&LinuxNamespaceType::Cgroup));
    let rules = linux
        .resources()
        .clone()
        .and_then(|r| r.devices().clone())
        .expect("rules");
    assert_eq!(
        rules.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["a *:* rwm"]
    );
    assert!(rules[0].allow());
}

#[test]
fn the_cgroup_namespace_is_for_v2() {
    let of = |v2| {
        let mut case = Case::new();
        case.host.cgroup_v2 = v2;
        let linux = case.good().spec.linux().clone().expect("linux");
        let kinds: Vec<_> = linux
            .namespaces()
            .iter()
            .flatten()
            .map(|n| n.typ())
            .collect();
        kinds.contains(&LinuxNamespaceType::Cgroup)
    };
    assert!(of(true) && !of(false));
}

#[test]
fn security_settings_arrive() {
    let mut case = Case::new();
    let security = case.security();
    security.no_new_privs = true;
    security.readonly_rootfs = true;
    security.masked_paths = vec!["/bin/ls".into()];
    security.readonly_paths = vec!["/tmp".into()];
    security.run_as_user = Some(cri::Int64Value { value: 1000 });
    security.supplemental_groups = vec![5];
    case.image.set_user(Some("app".into()));
    case.sources.seccomp = SeccompChoice::RuntimeDefault;
    let plan = case.good();
    let process = plan.spec.process().clone().expect("process");
    assert_eq!(process.no_new_privileges(), Some(true));
    assert_eq!(
        plan.spec.root().clone().expect("root").readonly(),
        Some(true)
    );
    let linux = plan.spec.linux().clone().expect("linux");
    assert_eq!(
        linux.masked_paths().as_deref(),
        Some(["/bin/ls".to_owned()].as_slice())
    );
    assert_eq!(
        linux.readonly_paths().as_deref(),
        Some(["/tmp".to_owned()].as_slice())
    );
    // The pod's files are as read-only as what they lie in.
    assert!(has(&plan.spec, "/etc/hosts", "ro") && has(&plan.spec, "/dev/shm", "rw"));
    let user = plan.create.user.expect("user");
    assert_eq!(
        (user.run_as_user, user.image_user.as_str()),
        (Some(1000), "app")
    );
    assert_eq!(user.supplemental_groups, [5]);
    assert_eq!(plan.seccomp, SeccompChoice::RuntimeDefault);
}

#[test]
fn limits_and_cgroups_arrive() {
    let mut case = Case::new();
    case.pod.linux.get_or_insert_default().cgroup_parent = "kubepods-podX.slice".into();
    case.options.pids_limit = 100;
    let limits = cri::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        oom_score_adj: 7,
        ..Default::default()
    };
    case.config.linux.get_or_insert_default().resources = Some(limits.clone());
    let plan = case.good();
    let linux = plan.spec.linux().clone().expect("linux");
    let place = "/kubepods.slice/kubepods-podX.slice/slipway-c1.scope";
    assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new(place)));
    let resources = linux.resources().clone().expect("resources");
    assert_eq!(resources.memory().and_then(|m| m.limit()), Some(64 << 20));
    assert_eq!(resources.pids().map(|p| p.limit()), Some(100));
    assert!(
        resources
            .devices()
            .as_ref()
            .is_some_and(|rules| !rules[0].allow())
    );
    assert_eq!(plan.create.oom_score_adj, 7);
    assert_eq!(plan.resources, limits);
}

#[test]
fn bytes_of_the_environment_survive() {
    let mut case = Case::new();
    case.config.envs = vec![
        cri::KeyValue {
            key: "RAW".into(),
            value: vec![0xff, 0xfe],
        },
        cri::KeyValue {
            key: "TEXT".into(),
            value: b"x".to_vec(),
        },
    ];
    case.pod.hostname = "web-0".into();
    let plan = case.good();
    assert!(plan.create.env.contains(&b"RAW=\xff\xfe".to_vec()));
    assert!(plan.create.env.contains(&b"HOSTNAME=web-0".to_vec()));
    let process = plan.spec.process().clone().expect("process");
    let text = process.env().clone().expect("environment");
    assert!(text.contains(&"TEXT=x".to_owned()) && !text.iter().any(|e| e.starts_with("RAW")));
    assert!(
        !text.iter().any(|e| e.starts_with("HOME")),
        "the creator's to find out"
    );
}

#[test]
fn a_name_is_needed() {
    let mut case = Case::new();
    case.config.metadata = None;
    assert_eq!(
        case.bad(),
        (SpecErrorKind::Invalid, "metadata.name".to_owned())
    );
}

#[test]
fn volumes_of_an_image_are_each_named_once() {
    let mut case = Case::new();
    let declared = ["/data/", "cache", "/data/./sub", "/", "/a/../b", "/data"];
    let declared = declared.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>();
    case.image.set_volumes(Some(declared));
    let plan = case.good();
    assert_eq!(plan.create.volumes, ["/cache", "/data", "/data/sub"]);
    assert!(plan.warnings.iter().any(|w| w.contains("/a/../b")));
    let many = (0..1000).map(|n| format!("/v{n}")).collect::<Vec<_>>();
    case.image.set_volumes(Some(many));
    let wanted = (SpecErrorKind::Invalid, "volumes of the image".to_owned());
    assert_eq!(case.bad(), wanted);
}
