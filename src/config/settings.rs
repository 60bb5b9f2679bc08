//! The settings and their defaults. What each key means to an operator stands in `keys.rs`.

use crate::Size;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The daemon's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Unix socket on which the CRI is served.
    pub listen: PathBuf,
    /// State that lives until the next boot: sockets, pod and container records, namespaces.
    pub run_root: PathBuf,
    /// Durable state: images, and the writable layers of containers.
    pub state_root: PathBuf,
    /// Name of the entry in `runtimes` for pods that name no handler.
    pub default_runtime: String,
    /// The daemon's own log.
    pub log: Log,
    /// Control groups.
    pub cgroup: Cgroup,
    /// Images and registries.
    pub images: Images,
    /// Pod network.
    pub network: Network,
    /// Streams of exec, attach and port-forward.
    pub stream: Stream,
    /// NRI plugins.
    pub nri: Nri,
    /// Deadlines and bounds.
    pub limits: Limits,
    /// What pods and containers get unless they say otherwise.
    pub pod: Pod,
    /// Checkpoints.
    pub checkpoint: Checkpoint,
    /// Runtime handlers by name. Always holds `native`.
    pub runtimes: BTreeMap<String, Runtime>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "/run/slipway/slipway.sock".into(),
            run_root: "/run/slipway".into(),
            state_root: "/var/lib/slipway".into(),
            default_runtime: "native".to_owned(),
            log: Log::default(),
            cgroup: Cgroup::default(),
            images: Images::default(),
            network: Network::default(),
            stream: Stream::default(),
            nri: Nri::default(),
            limits: Limits::default(),
            pod: Pod::default(),
            checkpoint: Checkpoint::default(),
            runtimes: BTreeMap::from([("native".to_owned(), Runtime::default())]),
        }
    }
}

/// NRI plugins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nri {
    /// Whether plugins take part at all.
    pub enable: bool,
    /// Whether they may connect.
    pub connections: bool,
    /// Where they do.
    pub socket_path: PathBuf,
    /// Directory of plugins that the daemon starts.
    pub plugin_dir: PathBuf,
    /// Directory of their configurations.
    pub config_dir: PathBuf,
    /// How long one may take to register, and to look at all there is.
    #[serde(with = "humantime_serde")]
    pub registration_timeout: Duration,
    /// How long it may take for anything else.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// Whether the built-in validator looks at what plugins change.
    pub validate: bool,
    /// It lets none add OCI hooks.
    pub reject_oci_hooks: bool,
    /// Nor replace the runtime's default seccomp profile,
    pub reject_runtime_default_seccomp: bool,
    /// confine what is to be unconfined,
    pub reject_unconfined_seccomp: bool,
    /// replace a profile of the node's,
    pub reject_custom_seccomp: bool,
    /// change namespaces,
    pub reject_namespaces: bool,
    /// or sysctls.
    pub reject_sysctls: bool,
    /// Plugins without which no container is created.
    pub required_plugins: Vec<String>,
    /// Annotation by which a pod does without them; empty: none can.
    pub tolerate_missing_annotation: String,
}

impl Default for Nri {
    fn default() -> Self {
        Self {
            enable: true,
            connections: true,
            socket_path: "/var/run/nri/nri.sock".into(),
            plugin_dir: "/opt/nri/plugins".into(),
            config_dir: "/etc/nri/conf.d".into(),
            registration_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(2),
            validate: false,
            reject_oci_hooks: false,
            reject_runtime_default_seccomp: false,
            reject_unconfined_seccomp: false,
            reject_custom_seccomp: false,
            reject_namespaces: false,
            reject_sysctls: false,
            required_plugins: Vec::new(),
            tolerate_missing_annotation: String::new(),
        }
    }
}

/// The daemon's own log.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Shape of a line.
    pub format: LogFormat,
    /// The least important events that are written.
    pub level: LogLevel,
}

/// Shape of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Importance of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something will, or would have.
    Warn,
    /// What happens to pods and images.
    #[default]
    Info,
    /// Steps and their durations.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The level's name, as `tracing` filters know it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// Control groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cgroup {
    /// Who makes cgroups.
    pub driver: CgroupDriver,
    /// Where keepers live (cgroup v2): "own", "daemon", "pod", a slice, or a path.
    pub monitor: String,
}

impl Default for Cgroup {
    fn default() -> Self {
        Self {
            driver: CgroupDriver::default(),
            monitor: "own".to_owned(),
        }
    }
}

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// Slipway, in the file system. Also understands systemd's slice names, as nested directories.
    #[default]
    Cgroupfs,
    /// systemd, over D-Bus.
    Systemd,
}

/// Images and registries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Images {
    /// How many layers are downloaded at the same time, over all pulls.
    pub max_parallel_downloads: usize,
    /// A transfer that brings no byte for this long is broken off and resumed.
    #[serde(with = "humantime_serde")]
    pub pull_progress_timeout: Duration,
    /// How long a connection to a registry may take to come up.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// How long a request for one document (manifest, token, configuration) may take in all.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// How often in a row a broken transfer is resumed without getting any further.
    pub retries: u32,
    /// Registries (`host` or `host:port`) that may be spoken to without TLS.
    pub insecure_registries: Vec<String>,
    /// PEM files of further certificate authorities, beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// For a registry, the mirrors that are asked first, in this order.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Images that the kubelet must not remove; a trailing `*` matches any ending, `*word*` a part of the name.
    pub pinned: Vec<String>,
}

impl Default for Images {
    fn default() -> Self {
        Self {
            max_parallel_downloads: 6,
            pull_progress_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(15),
            request_timeout: Duration::from_secs(60),
            retries: 5,
            insecure_registries: Vec::new(),
            ca_files: Vec::new(),
            mirrors: BTreeMap::new(),
            pinned: Vec::new(),
        }
    }
}

/// Pod network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Directory of the CNI configuration; the first file in name order that can be read is used.
    pub conf_dir: PathBuf,
    /// Directories of the CNI plugins, searched in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// Directory of the results that DEL gets back.
    pub cache_dir: PathBuf,
    /// How long one plugin may take.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: "/var/lib/cni/slipway".into(),
            timeout: Duration::from_secs(60),
        }
    }
}

/// Streams of exec, attach and port-forward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stream {
    /// Where the streaming server listens. Port 0: one that is free.
    pub address: SocketAddr,
    /// What the URLs begin with that are handed out, instead of the scheme and the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
    /// PEM file of the server's certificate chain; with `tls_key`, streams are served over TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<PathBuf>,
    /// PEM file of the certificate's key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// How long a stream may carry nothing.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
}

impl Default for Stream {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            base_url: None,
            tls_certificate: None,
            tls_key: None,
            idle_timeout: Duration::from_secs(4 * 3600),
        }
    }
}

/// Deadlines and bounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// How long making a pod's namespaces may take.
    #[serde(with = "humantime_serde")]
    pub sandbox_timeout: Duration,
    /// How long creating a container may take.
    #[serde(with = "humantime_serde")]
    pub create_timeout: Duration,
    /// How long starting a created container may take.
    #[serde(with = "humantime_serde")]
    pub start_timeout: Duration,
    /// How long killing and deleting a container may take before it is bypassed.
    #[serde(with = "humantime_serde")]
    pub delete_timeout: Duration,
    /// How much of each stream of ExecSync is kept.
    pub exec_output: Size,
    /// The longest gRPC message that is accepted or sent.
    pub max_message: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sandbox_timeout: Duration::from_secs(30),
            create_timeout: Duration::from_secs(120),
            start_timeout: Duration::from_secs(30),
            delete_timeout: Duration::from_secs(30),
            exec_output: Size::mib(16),
            // Two streams of ExecSync and what is around them.
            max_message: Size::mib(48),
        }
    }
}

/// What pods and containers get unless they say otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pod {
    /// Sysctls of every pod that has the namespace they belong to; the pod's own win.
    pub default_sysctls: BTreeMap<String, String>,
    /// Capabilities of a container, before it adds and drops its own.
    pub default_capabilities: Vec<String>,
    /// How many processes a container may have; 0: no limit.
    pub pids_limit: u64,
    /// Size of a pod's /dev/shm.
    pub shm_size: Size,
    /// What a bind mount whose source does not exist means.
    pub missing_mount_source: MissingMountSource,
    /// Whether containers are labelled where SELinux is on.
    pub selinux: bool,
    /// The AppArmor profile that RuntimeDefault means.
    pub apparmor_profile: String,
    /// A profile used for RuntimeDefault in place of the built-in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seccomp_profile: Option<PathBuf>,
    /// Directory in which Localhost profiles with a relative name are looked up.
    pub seccomp_dir: PathBuf,
    /// File with the classes of block I/O.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blockio_config_file: Option<PathBuf>,
    /// Directories of the files that describe CDI devices; later ones win.
    pub cdi_dirs: Vec<PathBuf>,
    /// Directories of the files that say which OCI hooks containers get; later ones win.
    pub hooks_dirs: Vec<PathBuf>,
}

impl Default for Pod {
    fn default() -> Self {
        let names = [
            "CHOWN",
            "DAC_OVERRIDE",
            "FSETID",
            "FOWNER",
            "MKNOD",
            "NET_RAW",
            "SETGID",
            "SETUID",
            "SETFCAP",
            "SETPCAP",
            "NET_BIND_SERVICE",
            "SYS_CHROOT",
            "KILL",
            "AUDIT_WRITE",
        ];
        Self {
            default_sysctls: BTreeMap::new(),
            default_capabilities: names.map(str::to_owned).to_vec(),
            pids_limit: 0,
            shm_size: Size::mib(64),
            missing_mount_source: MissingMountSource::Reject,
            selinux: true,
            apparmor_profile: "slipway-default".to_owned(),
            seccomp_profile: None,
            seccomp_dir: "/var/lib/kubelet/seccomp".into(),
            blockio_config_file: None,
            cdi_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            hooks_dirs: vec![
                "/usr/share/containers/oci/hooks.d".into(),
                "/etc/containers/oci/hooks.d".into(),
            ],
        }
    }
}

/// What a bind mount whose source does not exist means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MissingMountSource {
    /// The container is refused.
    #[default]
    Reject,
    /// An empty directory is made.
    Create,
}

/// Checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// The program criu: a path, or a name that is looked up in PATH; empty: no checkpoints.
    pub criu: String,
    /// How long a checkpoint may take whose caller says nothing about it.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Established TCP connections are saved; otherwise the checkpoint has them closed.
    pub tcp_established: bool,
    /// Containers may be restored from checkpoints.
    pub restore: bool,
    /// The most that a checkpoint may hold that is restored.
    pub restore_limit: Size,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            criu: "criu".to_owned(),
            timeout: Duration::from_secs(120),
            tcp_established: false,
            restore: false,
            restore_limit: Size::mib(16 << 10),
        }
    }
}

/// A runtime handler.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// How containers are made.
    #[serde(rename = "type")]
    pub kind: RuntimeKind,
    /// The program, absolute, or a name that is looked up in PATH; without one, the handler's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Directory of the runtime's state; without one, `runtimes/<handler>` below the run root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<PathBuf>,
    /// What the runtime is told beside what Slipway tells it.
    #[serde(default, skip_serializing_if = "RuntimeOptions::is_empty")]
    pub options: RuntimeOptions,
    /// Beginnings of the names of those annotations of pods that their containers' OCI specifications get.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_annotations: Vec<String>,
    /// A profile used for RuntimeDefault, in place of `pod.seccomp_profile`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seccomp_profile: Option<PathBuf>,
    /// Privileged containers get no devices but those that they ask for, and may use no others.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub privileged_without_host_devices: bool,
    /// How long a create may take, in place of `limits.create_timeout`.
    #[serde(
        default,
        with = "humantime_serde",
        skip_serializing_if = "Option::is_none"
    )]
    pub create_timeout: Option<Duration>,
    /// The smallest memory limit that a container may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_memory: Option<Size>,
    /// Directory of the configurations of its pods' networks, in place of `network.conf_dir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_conf_dir: Option<PathBuf>,
    /// Where the pods' supervisors live, in place of `cgroup.monitor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor_cgroup: Option<MonitorCgroup>,
}

impl Runtime {
    /// The program as it is to be looked for.
    pub fn program(&self, handler: &str) -> PathBuf {
        self.path.clone().unwrap_or_else(|| PathBuf::from(handler))
    }
}

/// What a runtime is told beside what Slipway tells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum RuntimeOptions {
    /// Global arguments of a command line (`type = "oci"`).
    Arguments(Vec<String>),
    /// Options of a shim (`type = "shim-v2"`).
    Table(toml::Table),
}

impl RuntimeOptions {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Arguments(arguments) => arguments.is_empty(),
            Self::Table(table) => table.is_empty(),
        }
    }

    /// The arguments, if it is some.
    pub fn arguments(&self) -> &[String] {
        match self {
            Self::Arguments(arguments) => arguments,
            Self::Table(_) => &[],
        }
    }
}

impl RuntimeOptions {
    /// The table as text, if it is one.
    pub fn toml(&self) -> String {
        match self {
            Self::Arguments(_) => String::new(),
            Self::Table(table) => table.to_string(),
        }
    }
}

impl Default for RuntimeOptions {
    fn default() -> Self {
        Self::Arguments(Vec::new())
    }
}

/// Where the supervisors of a handler's pods live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MonitorCgroup {
    /// In their pod's cgroup, which is charged for them.
    Pod,
}

/// How a handler makes containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuntimeKind {
    /// In-process, by libcontainer.
    #[default]
    Native,
    /// By a command-line runtime, as runc is one.
    Oci,
    /// By a shim of containerd's protocol.
    ShimV2,
}

impl RuntimeKind {
    /// The word in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Oci => "oci",
            Self::ShimV2 => "shim-v2",
        }
    }
}
