//! What is to be said of each key: its meaning, and whether a running daemon can take a new value.

use crate::Config;
use toml::Value;

/// A key of the configuration.
pub(crate) struct Key {
    /// Dotted name.
    pub path: &'static str,
    /// For the operator.
    pub doc: &'static str,
    /// Whether SIGHUP applies it.
    pub reloads: bool,
    /// What could stand there, when the default is nothing.
    pub example: Option<&'static str>,
}

const fn fixed(path: &'static str, doc: &'static str) -> Key {
    Key {
        path,
        doc,
        reloads: false,
        example: None,
    }
}

const fn live(path: &'static str, doc: &'static str) -> Key {
    Key {
        path,
        doc,
        reloads: true,
        example: None,
    }
}

impl Key {
    const fn such_as(self, example: &'static str) -> Self {
        Self {
            example: Some(example),
            ..self
        }
    }
}

/// Every key, in the order of the documented file: the top level first, then table by table.
pub(crate) const KEYS: &[Key] = &[
    fixed("listen", "Unix socket on which the CRI is served."),
    fixed(
        "run_root",
        "State that lives until the next boot: sockets, pod and container records, namespaces.",
    ),
    fixed(
        "state_root",
        "Durable state: images, and the writable layers of containers.",
    ),
    live(
        "default_runtime",
        "Entry of [runtimes] for pods that name no handler.",
    ),
    fixed("log.format", "\"text\" or \"json\"."),
    live(
        "log.level",
        "\"error\", \"warn\", \"info\", \"debug\" or \"trace\".",
    ),
    fixed(
        "cgroup.driver",
        "Who makes cgroups; must match the kubelet's cgroupDriver.\n\
         \"cgroupfs\": Slipway itself. \"systemd\": scopes and slices of systemd's, where it is PID 1 on pure\n\
         cgroup v2; what a node with systemd should have.",
    ),
    fixed(
        "cgroup.monitor",
        "Where the pods' supervisors live (pure cgroup v2; elsewhere, where the daemon is): \"own\", a cgroup of\n\
         their own; \"pod\", their pod's, which is charged for them; \"daemon\", the daemon's; or a slice of\n\
         systemd's (\"name.slice\"), or a cgroup (\"/path\", where systemd is not PID 1).",
    ),
    fixed(
        "images.max_parallel_downloads",
        "Layers downloaded at the same time, over all pulls.",
    ),
    live(
        "images.pull_progress_timeout",
        "A transfer that brings no byte for this long is broken off and resumed.",
    ),
    live(
        "images.connect_timeout",
        "How long a connection to a registry may take to come up.",
    ),
    live(
        "images.request_timeout",
        "How long a request for one document (manifest, token, configuration) may take.",
    ),
    live(
        "images.retries",
        "How often in a row a broken transfer is resumed without getting any further.",
    ),
    live(
        "images.insecure_registries",
        "Registries (host or host:port) that may be spoken to without TLS.",
    )
    .such_as("[\"registry.local:5000\"]"),
    live(
        "images.ca_files",
        "PEM files of further certificate authorities, beside the system's.",
    )
    .such_as("[\"/etc/slipway/ca.pem\"]"),
    live(
        "images.mirrors",
        "For a registry, the mirrors that are asked first, in this order.",
    )
    .such_as("{ \"docker.io\" = [\"mirror.local:5000\"] }"),
    fixed(
        "images.pinned",
        "Images that the kubelet must not remove; a trailing * matches any ending, *word* a part of the name.",
    )
    .such_as("[\"registry.local/base/*\"]"),
    fixed(
        "network.conf_dir",
        "CNI configuration: the first usable file in name order. The directory is watched.",
    ),
    fixed(
        "network.bin_dirs",
        "Where CNI plugins are looked up, in this order.",
    ),
    fixed(
        "network.cache_dir",
        "Results of CNI ADD, which DEL gets back.",
    ),
    fixed(
        "network.timeout",
        "How long one CNI plugin may take before it is killed.",
    ),
    fixed(
        "stream.address",
        "Where exec, attach and port-forward are streamed. Port 0: one that is free.",
    ),
    fixed(
        "stream.base_url",
        "What the URLs begin with that are handed out, where that is not the address.",
    )
    .such_as("\"https://node-1.local:10010\""),
    fixed(
        "stream.tls_certificate",
        "PEM file of a certificate chain: with tls_key, streams go over TLS. Read again when it changes.",
    )
    .such_as("\"/etc/slipway/stream.pem\""),
    fixed("stream.tls_key", "PEM file of its key.").such_as("\"/etc/slipway/stream.key\""),
    fixed(
        "stream.idle_timeout",
        "How long a stream may carry nothing.",
    ),
    fixed("nri.enable", "Whether NRI plugins take part."),
    fixed(
        "nri.connections",
        "Whether plugins may connect; false: only those in plugin_dir take part.",
    ),
    fixed("nri.socket_path", "Where they connect."),
    fixed(
        "nri.plugin_dir",
        "Plugins (NN-name) that the daemon starts. There need not be such a directory.",
    ),
    fixed(
        "nri.config_dir",
        "Their configurations: NN-name.conf, or name.conf.",
    ),
    fixed(
        "nri.registration_timeout",
        "How long a plugin may take to register, and to look at all pods and containers.",
    ),
    fixed(
        "nri.request_timeout",
        "How long it may take for anything else. One that takes longer is closed, and pods go on without it.",
    ),
    fixed(
        "nri.validate",
        "Whether the built-in validator looks at what plugins make of a container. The keys below are for it.",
    ),
    fixed("nri.reject_oci_hooks", "Plugins may not add OCI hooks."),
    fixed(
        "nri.reject_runtime_default_seccomp",
        "They may not replace the seccomp profile RuntimeDefault.",
    ),
    fixed(
        "nri.reject_unconfined_seccomp",
        "They may not give a seccomp profile to a container that asks for none.",
    ),
    fixed(
        "nri.reject_custom_seccomp",
        "They may not replace a Localhost seccomp profile.",
    ),
    fixed("nri.reject_namespaces", "They may not change namespaces."),
    fixed("nri.reject_sysctls", "They may not change sysctls."),
    fixed(
        "nri.required_plugins",
        "Names of plugins without which no container is created.",
    )
    .such_as("[\"device-injector\"]"),
    fixed(
        "nri.tolerate_missing_annotation",
        "Annotation (\"true\") by which a pod does without them; empty: none can.",
    ),
    live(
        "limits.sandbox_timeout",
        "How long making a pod's namespaces may take.",
    ),
    live(
        "limits.create_timeout",
        "How long creating a container may take.",
    ),
    live(
        "limits.start_timeout",
        "How long starting a created container may take.",
    ),
    live(
        "limits.delete_timeout",
        "How long killing and deleting a container may take before it is bypassed.",
    ),
    live(
        "limits.exec_output",
        "How much of each stream of ExecSync is kept.",
    ),
    fixed(
        "limits.max_message",
        "The longest gRPC message that is accepted or sent.",
    ),
    live(
        "pod.default_sysctls",
        "Sysctls of every pod that has the namespace they belong to; the pod's own win.",
    )
    .such_as("{ \"net.ipv4.ip_unprivileged_port_start\" = \"0\" }"),
    live(
        "pod.default_capabilities",
        "Capabilities of a container, before it adds and drops its own.",
    ),
    live(
        "pod.pids_limit",
        "How many processes and threads a container may have; 0: no limit.",
    ),
    live("pod.shm_size", "Size of a pod's /dev/shm."),
    live(
        "pod.missing_mount_source",
        "A bind mount whose source does not exist: \"reject\" the container, or \"create\" a directory.",
    ),
    fixed(
        "pod.selinux",
        "Whether containers are labelled where SELinux is on with a policy that knows them.",
    ),
    live(
        "pod.apparmor_profile",
        "AppArmor profile that RuntimeDefault means, and saying nothing. The daemon loads \"slipway-default\" itself.",
    ),
    live(
        "pod.seccomp_profile",
        "Profile (JSON) used for RuntimeDefault in place of the built-in one.",
    )
    .such_as("\"/etc/slipway/seccomp.json\""),
    live(
        "pod.seccomp_dir",
        "Where Localhost seccomp profiles with a relative name are looked up.",
    ),
    live(
        "pod.blockio_config_file",
        "File (YAML, as CRI-O and containerd have it) with the classes of block I/O that pods and NRI plugins may name.\n\
         Without one, containers that name a class are refused. It is read for each of them.",
    )
    .such_as("\"/etc/slipway/blockio.yaml\""),
    live(
        "pod.cdi_dirs",
        "Where the files that describe CDI devices are; later directories win. Changed files are seen at once.",
    ),
    live(
        "pod.hooks_dirs",
        "Where the files (*.json, schema 1.0.0) are that say which OCI hooks containers get; of two with one name the\n\
         one in the later directory counts. Changed files are seen at once. [] for no hooks.",
    ),
    live(
        "checkpoint.criu",
        "The program criu, which makes checkpoints: a path, or a name in PATH; empty: no checkpoints.",
    ),
    live(
        "checkpoint.timeout",
        "How long a checkpoint may take whose caller says nothing about it.",
    ),
    live(
        "checkpoint.tcp_established",
        "Save established TCP connections; otherwise a checkpoint has them closed.",
    ),
    live(
        "checkpoint.restore",
        "Restore containers from checkpoints: archives on this node, and images. A checkpoint can do what its\n\
         processes could; read docs/checkpoint.md on whose to trust.",
    ),
    live(
        "checkpoint.restore_limit",
        "The largest checkpoint that is restored, unpacked.",
    ),
    live(
        "runtimes",
        "Runtime handlers by name, for RuntimeClass. Each is described in one file. docs/handlers.md has more.\n\
         type: \"native\" (in-process), \"oci\" (a command-line runtime) or \"shim-v2\" (a shim of containerd's protocol).\n\
         path: the program, absolute or in PATH; default: the handler's name. root: directory of its state; default:\n\
         runtimes/NAME below run_root. options: global arguments (oci), or a table (shim-v2).\n\
         allowed_annotations: beginnings of names of pods' annotations that containers' OCI specifications get.\n\
         seccomp_profile: in place of pod.seccomp_profile. create_timeout: in place of limits.create_timeout.\n\
         minimum_memory: containers with a smaller limit are refused. monitor_cgroup: \"pod\", in place of cgroup.monitor.\n\
         network_conf_dir: in place of network.conf_dir, read for each pod.\n\
         With privileged_without_host_devices, privileged containers get only the devices that they ask for.",
    )
    .such_as("crun = { type = \"oci\", path = \"crun\" }"),
];

/// What differs between two configurations, by what has to happen for it to take effect.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// Keys whose new value a running daemon takes over.
    pub reloadable: Vec<&'static str>,
    /// Keys whose new value waits for a restart (which leaves pods running).
    pub restart: Vec<&'static str>,
}

impl Changes {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.reloadable.is_empty() && self.restart.is_empty()
    }
}

/// Compares two configurations key by key.
pub fn diff_reloadable(old: &Config, new: &Config) -> Changes {
    let (old, new) = (Value::try_from(old).ok(), Value::try_from(new).ok());
    let mut changes = Changes::default();
    for key in KEYS {
        if value(old.as_ref(), key.path) != value(new.as_ref(), key.path) {
            let list = if key.reloads {
                &mut changes.reloadable
            } else {
                &mut changes.restart
            };
            list.push(key.path);
        }
    }
    changes
}

impl Config {
    /// `self` with the values of `new` for every key that can be applied to a running daemon; the
    /// others stay as they are until a restart.
    pub fn reloaded(&self, new: &Self) -> Self {
        Self {
            listen: self.listen.clone(),
            run_root: self.run_root.clone(),
            state_root: self.state_root.clone(),
            log: crate::Log {
                format: self.log.format,
                ..new.log.clone()
            },
            cgroup: self.cgroup.clone(),
            images: crate::Images {
                max_parallel_downloads: self.images.max_parallel_downloads,
                pinned: self.images.pinned.clone(),
                ..new.images.clone()
            },
            network: self.network.clone(),
            stream: self.stream.clone(),
            nri: self.nri.clone(),
            limits: crate::Limits {
                max_message: self.limits.max_message,
                ..new.limits.clone()
            },
            pod: crate::Pod {
                selinux: self.pod.selinux,
                ..new.pod.clone()
            },
            ..new.clone()
        }
    }
}

/// The value at a dotted path.
pub(crate) fn value<'a>(root: Option<&'a Value>, path: &str) -> Option<&'a Value> {
    path.split('.')
        .try_fold(root?, |value, step| value.as_table()?.get(step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LogFormat, LogLevel, Size};
    use std::collections::BTreeSet;
    use std::time::Duration;

    /// Paths of all values; a table that holds names of the operator's own is one value.
    fn leaves(prefix: &str, value: &Value, out: &mut BTreeSet<String>) {
        let whole = ["images.mirrors", "pod.default_sysctls", "runtimes"];
        match value.as_table() {
            Some(table) if !whole.contains(&prefix) => {
                for (name, value) in table {
                    let path = if prefix.is_empty() {
                        name.clone()
                    } else {
                        format!("{prefix}.{name}")
                    };
                    leaves(&path, value, out);
                }
            }
            _ => drop(out.insert(prefix.to_owned())),
        }
    }

    fn everything_changed() -> Config {
        let text = r#"
            listen = "/a"
            run_root = "/b"
            state_root = "/c"
            default_runtime = "d"
            log = { format = "json", level = "trace" }
            cgroup = { driver = "systemd", monitor = "pod" }
            [images]
            max_parallel_downloads = 1
            pull_progress_timeout = "1s"
            connect_timeout = "1s"
            request_timeout = "1s"
            retries = 1
            insecure_registries = ["a"]
            ca_files = ["/a"]
            mirrors = { a = ["b"] }
            pinned = ["a"]
            [network]
            conf_dir = "/a"
            bin_dirs = ["/a"]
            cache_dir = "/a"
            timeout = "1s"
            [stream]
            address = "127.0.0.2:1"
            base_url = "http://a"
            tls_certificate = "/a"
            tls_key = "/a"
            idle_timeout = "1s"
            [nri]
            enable = false
            connections = false
            socket_path = "/a"
            plugin_dir = "/a"
            config_dir = "/a"
            registration_timeout = "1s"
            request_timeout = "1s"
            validate = true
            reject_oci_hooks = true
            reject_runtime_default_seccomp = true
            reject_unconfined_seccomp = true
            reject_custom_seccomp = true
            reject_namespaces = true
            reject_sysctls = true
            required_plugins = ["a"]
            tolerate_missing_annotation = "a"
            [limits]
            sandbox_timeout = "1s"
            create_timeout = "1s"
            start_timeout = "1s"
            delete_timeout = "1s"
            exec_output = 1
            max_message = 1
            [pod]
            default_sysctls = { a = "b" }
            default_capabilities = []
            pids_limit = 1
            shm_size = 1
            missing_mount_source = "create"
            selinux = false
            apparmor_profile = "mine"
            seccomp_profile = "/a"
            seccomp_dir = "/a"
            blockio_config_file = "/a"
            cdi_dirs = ["/a"]
            hooks_dirs = ["/a"]
            [checkpoint]
            criu = "/a"
            timeout = "1s"
            tcp_established = true
            restore = true
            restore_limit = 1
            [runtimes.d]
            type = "native"
        "#;
        toml::from_str(text).expect("parses")
    }

    #[test]
    fn every_key_is_in_the_table() {
        let mut found = BTreeSet::new();
        leaves(
            "",
            &Value::try_from(everything_changed()).expect("serializes"),
            &mut found,
        );
        let table: BTreeSet<String> = KEYS.iter().map(|key| key.path.to_owned()).collect();
        assert_eq!(found, table);
        assert_eq!(KEYS.len(), table.len(), "a key stands there twice");
    }

    #[test]
    fn changes_are_told_apart() {
        let old = Config::default();
        assert!(diff_reloadable(&old, &old).is_empty());
        let mut new = old.clone();
        new.log = crate::Log {
            format: LogFormat::Json,
            level: LogLevel::Debug,
        };
        new.images.pinned = vec!["x".into()];
        new.network.timeout = Duration::from_secs(1);
        new.pod
            .default_sysctls
            .insert("net.core.somaxconn".into(), "1".into());
        new.limits.max_message = Size::mib(1);
        new.run_root = "/x".into();
        let changes = diff_reloadable(&old, &new);
        assert_eq!(changes.reloadable, ["log.level", "pod.default_sysctls"]);
        let restart = [
            "run_root",
            "log.format",
            "images.pinned",
            "network.timeout",
            "limits.max_message",
        ];
        assert_eq!(changes.restart, restart);
    }

    #[test]
    fn reloading_takes_just_what_is_reloadable() {
        let (old, new) = (Config::default(), everything_changed());
        let all = diff_reloadable(&old, &new);
        assert_eq!(all.reloadable.len() + all.restart.len(), KEYS.len());
        let reloaded = old.reloaded(&new);
        assert_eq!(diff_reloadable(&old, &reloaded).reloadable, all.reloadable);
        assert!(diff_reloadable(&old, &reloaded).restart.is_empty());
        assert_eq!(diff_reloadable(&reloaded, &new).restart, all.restart);
    }
}
