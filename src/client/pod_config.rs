//! A pod with one container, from what people type to the CRI's configuration.
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;
use std::str::FromStr;

use slipway_proto::cri::*;

/// What the kubelet hides from a container that isn't privileged; runtimes add nothing by themselves.
const MASKED_PATHS: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// What the kubelet makes read-only in such a container.
const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];
/// A CFS period, in µs.
const CPU_PERIOD: i64 = 100_000;

/// `HOST:CONTAINER[:OPTION,…]`
#[derive(Debug, Clone, PartialEq)]
pub struct Volume(pub Mount);

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Volume, String> {
        let mut parts = text.split(':');
        let (host, container) = match (parts.next(), parts.next()) {
            (Some(host), Some(container)) if !host.is_empty() && container.starts_with('/') => {
                (host, container)
            }
            _ => return Err("write HOST:CONTAINER[:ro], the second an absolute path".to_owned()),
        };
        let host = std::path::absolute(host).map_err(|e| format!("{host}: {e}"))?;
        let mut mount = Mount {
            host_path: host.to_string_lossy().into_owned(),
            container_path: container.to_owned(),
            ..Default::default()
        };
        for option in parts
            .next()
            .into_iter()
            .flat_map(|options| options.split(','))
        {
            match option {
                "rw" => mount.readonly = false,
                "ro" => mount.readonly = true,
                "rro" => (mount.readonly, mount.recursive_read_only) = (true, true),
                "rprivate" => mount.set_propagation(MountPropagation::PropagationPrivate),
                "rslave" => mount.set_propagation(MountPropagation::PropagationHostToContainer),
                "rshared" => mount.set_propagation(MountPropagation::PropagationBidirectional),
                "z" | "Z" => mount.selinux_relabel = true,
                _ => {
                    return Err(format!(
                        "unknown option '{option}': ro, rw, rro, rprivate, rslave, rshared and z are known"
                    ));
                }
            }
        }
        match parts.next() {
            None => Ok(Volume(mount)),
            Some(_) => Err("too many colons".to_owned()),
        }
    }
}

/// `[[HOST_IP:]HOST_PORT:]CONTAINER_PORT[/tcp|udp|sctp]`
#[derive(Debug, Clone, PartialEq)]
pub struct Publish(pub PortMapping);

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Publish, String> {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            other => {
                return Err(format!(
                    "unknown protocol '{other}': tcp, udp and sctp are known"
                ));
            }
        };
        let port = |text: &str| match text.parse::<u16>() {
            Ok(port) if port > 0 => Ok(i32::from(port)),
            _ => Err(format!(
                "'{text}' is not a port: write [[IP:]HOST:]CONTAINER[/tcp|udp|sctp]"
            )),
        };
        let (rest, container) = ports.rsplit_once(':').unwrap_or(("", ports));
        let (ip, host) = rest.rsplit_once(':').unwrap_or(("", rest));
        let ip = ip.trim_start_matches('[').trim_end_matches(']');
        if !ip.is_empty() && ip.parse::<IpAddr>().is_err() {
            return Err(format!("'{ip}' is not an IP address"));
        }
        let container_port = port(container)?;
        Ok(Publish(PortMapping {
            protocol: protocol.into(),
            container_port,
            host_port: if host.is_empty() {
                container_port
            } else {
                port(host)?
            },
            host_ip: ip.to_owned(),
        }))
    }
}

/// `UID[:GID]` or a user's name
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// By number.
    Ids(i64, Option<i64>),
    /// By a name in the image's files.
    Name(String),
}

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<User, String> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let number = |text: &str| text.parse::<u32>().map(i64::from);
        match (number(user), group.map(number)) {
            (Ok(uid), None) => Ok(User::Ids(uid, None)),
            (Ok(uid), Some(Ok(gid))) => Ok(User::Ids(uid, Some(gid))),
            (Err(_), None) if !user.is_empty() => Ok(User::Name(user.to_owned())),
            _ => Err("write UID, UID:GID or a user's name".to_owned()),
        }
    }
}

/// Everything that makes up the pod.
#[derive(Debug, Clone, Default)]
pub struct PodPlan {
    /// Name of the pod and of its container.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Unique id of the pod.
    pub uid: String,
    /// Directory of the pod's logs; empty for none.
    pub log_directory: String,
    /// The container's image, as the runtime knows it.
    pub image: String,
    /// The image as the user wrote it.
    pub user_image: String,
    /// Command line in place of the image's; empty keeps the image's.
    pub command: Vec<String>,
    /// Arguments in place of the image's; empty keeps the image's.
    pub args: Vec<String>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Ports.
    pub ports: Vec<PortMapping>,
    /// Host name; empty for the pod's name.
    pub hostname: String,
    /// The node's network namespace.
    pub host_network: bool,
    /// User.
    pub user: Option<User>,
    /// All of the node.
    pub privileged: bool,
    /// Memory limit in bytes; 0 is none.
    pub memory: i64,
    /// CPU quota in µs per 100 ms; 0 is none.
    pub cpu_quota: i64,
    /// Working directory; empty for the image's.
    pub workdir: String,
    /// Labels of pod and container.
    pub labels: HashMap<String, String>,
    /// Annotations of pod and container.
    pub annotations: HashMap<String, String>,
}

impl PodPlan {
    /// The label that holds the pod's unique id.
    pub const UID_LABEL: &str = "io.kubernetes.pod.uid";

    fn labels(&self, container: bool) -> HashMap<String, String> {
        let mut labels = self.labels.clone();
        let mut add = |key: &str, value: &str| labels.insert(key.to_owned(), value.to_owned());
        add("io.kubernetes.pod.name", &self.name);
        add("io.kubernetes.pod.namespace", &self.namespace);
        add(Self::UID_LABEL, &self.uid);
        if container {
            add("io.kubernetes.container.name", &self.name);
        }
        labels
    }

    fn namespaces(&self) -> NamespaceOption {
        let network = if self.host_network {
            NamespaceMode::Node
        } else {
            NamespaceMode::Pod
        };
        NamespaceOption {
            network: network.into(),
            pid: NamespaceMode::Container.into(),
            ipc: NamespaceMode::Pod.into(),
            ..Default::default()
        }
    }

    fn seccomp(&self) -> SecurityProfile {
        let profile = if self.privileged {
            security_profile::ProfileType::Unconfined
        } else {
            security_profile::ProfileType::RuntimeDefault
        };
        SecurityProfile {
            profile_type: profile.into(),
            ..Default::default()
        }
    }

    /// The container's log within the pod's log directory.
    pub fn log_path(&self) -> String {
        if self.log_directory.is_empty() {
            String::new()
        } else {
            format!("{}/0.log", self.name)
        }
    }

    /// The sandbox's configuration.
    pub fn sandbox(&self) -> PodSandboxConfig {
        let hostname = if self.hostname.is_empty() {
            let cut: String = self.name.chars().take(63).collect();
            cut.trim_end_matches(['-', '.', '_']).to_owned()
        } else {
            self.hostname.clone()
        };
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: self.name.clone(),
                uid: self.uid.clone(),
                namespace: self.namespace.clone(),
                attempt: 0,
            }),
            // The node's own name belongs to the node's network.
            hostname: if self.host_network && self.hostname.is_empty() {
                String::new()
            } else {
                hostname
            },
            log_directory: self.log_directory.clone(),
            port_mappings: self.ports.clone(),
            labels: self.labels(false),
            annotations: self.annotations.clone(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(self.namespaces()),
                    privileged: self.privileged,
                    seccomp: Some(self.seccomp()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// The container's configuration.
    pub fn container(&self) -> ContainerConfig {
        let paths = |paths: &[&str]| match self.privileged {
            true => Vec::new(),
            false => paths.iter().map(|&path| path.to_owned()).collect(),
        };
        let mut security = LinuxContainerSecurityContext {
            privileged: self.privileged,
            namespace_options: Some(self.namespaces()),
            masked_paths: paths(&MASKED_PATHS),
            readonly_paths: paths(&READONLY_PATHS),
            seccomp: Some(self.seccomp()),
            ..Default::default()
        };
        match &self.user {
            None => {}
            Some(User::Ids(uid, gid)) => {
                security.run_as_user = Some(Int64Value { value: *uid });
                security.run_as_group = gid.map(|value| Int64Value { value });
            }
            Some(User::Name(name)) => security.run_as_username.clone_from(name),
        }
        let resources = LinuxContainerResources {
            cpu_period: if self.cpu_quota > 0 { CPU_PERIOD } else { 0 },
            cpu_quota: self.cpu_quota,
            memory_limit_in_bytes: self.memory,
            ..Default::default()
        };
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: self.name.clone(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: self.image.clone(),
                user_specified_image: self.user_image.clone(),
                ..Default::default()
            }),
            command: self.command.clone(),
            args: self.args.clone(),
            working_dir: self.workdir.clone(),
            envs: self
                .env
                .iter()
                .map(|(key, value)| KeyValue {
                    key: key.clone(),
                    value: value.clone().into_bytes(),
                })
                .collect(),
            mounts: self.mounts.clone(),
            labels: self.labels(true),
            annotations: self.annotations.clone(),
            log_path: self.log_path(),
            linux: Some(LinuxContainerConfig {
                resources: Some(resources),
                security_context: Some(security),
            }),
            ..Default::default()
        }
    }
}

/// A name for a pod from its image's: its last part in lower case, letters, digits and dashes only.
pub fn name_from_image(image: &str) -> String {
    let last = Path::new(image)
        .file_name()
        .map_or_else(String::new, |n| n.to_string_lossy().into());
    let stem = last
        .split(['@', ':'])
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase();
    let name: String = stem
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(40)
        .collect();
    let name = name.trim_matches('-');
    if name.is_empty() {
        "pod".to_owned()
    } else {
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn volumes() {
        let Volume(mount) = "/a:/b:ro".parse().unwrap();
        assert_eq!(
            (mount.host_path.as_str(), mount.container_path.as_str()),
            ("/a", "/b")
        );
        assert!(mount.readonly);
        let Volume(mount) = "rel:/b".parse().unwrap();
        assert!(mount.host_path.starts_with('/') && mount.host_path.ends_with("/rel"));
        let Volume(mount) = "/a:/b:rro,rslave".parse().unwrap();
        assert!(mount.recursive_read_only && mount.readonly);
        assert_eq!(
            mount.propagation(),
            MountPropagation::PropagationHostToContainer
        );
        for text in ["", "/a", ":/b", "/a:b", "/a:/b:what", "/a:/b:ro:x"] {
            assert!(text.parse::<Volume>().is_err(), "{text}");
        }
    }

    #[test]
    fn ports() {
        let parts = |text: &str| {
            let Publish(p) = text.parse().unwrap();
            (
                p.host_ip.clone(),
                p.host_port,
                p.container_port,
                p.protocol(),
            )
        };
        assert_eq!(parts("80"), (String::new(), 80, 80, Protocol::Tcp));
        assert_eq!(
            parts("8080:80/udp"),
            (String::new(), 8080, 80, Protocol::Udp)
        );
        assert_eq!(
            parts("127.0.0.1:1:2"),
            ("127.0.0.1".to_owned(), 1, 2, Protocol::Tcp)
        );
        assert_eq!(
            parts("[::1]:1:2/sctp"),
            ("::1".to_owned(), 1, 2, Protocol::Sctp)
        );
        for text in ["", "x", "0", "65536", "1:2/icmp", "nohost:1:2", "1:0"] {
            assert!(text.parse::<Publish>().is_err(), "{text}");
        }
    }

    #[test]
    fn users() {
        assert_eq!("1000".parse(), Ok(User::Ids(1000, None)));
        assert_eq!("1000:0".parse(), Ok(User::Ids(1000, Some(0))));
        assert_eq!("www-data".parse(), Ok(User::Name("www-data".to_owned())));
        for text in ["", "1:x", "x:1", ":1", "x:y"] {
            assert!(text.parse::<User>().is_err(), "{text}");
        }
    }

    #[test]
    fn names() {
        for (image, name) in [
            ("docker.io/library/busybox:1.36", "busybox"),
            ("localhost:5000/My_App@sha256:00", "my-app"),
            ("", "pod"),
            ("a/___", "pod"),
        ] {
            assert_eq!(name_from_image(image), name);
        }
    }

    #[test]
    fn privilege_and_network_reach_both_configurations() {
        let plan = PodPlan {
            name: "web".into(),
            privileged: true,
            host_network: true,
            cpu_quota: 50_000,
            user: Some(User::Ids(7, Some(8))),
            log_directory: "/logs".into(),
            ..Default::default()
        };
        let sandbox = plan.sandbox().linux.unwrap().security_context.unwrap();
        let container = plan.container();
        let linux = container.linux.unwrap();
        let security = linux.security_context.unwrap();
        assert!(sandbox.privileged && security.privileged && security.masked_paths.is_empty());
        assert_eq!(sandbox.namespace_options, security.namespace_options);
        assert_eq!(
            sandbox.namespace_options.unwrap().network(),
            NamespaceMode::Node
        );
        assert_eq!(linux.resources.unwrap().cpu_period, 100_000);
        assert_eq!(security.run_as_group.unwrap().value, 8);
        assert_eq!(container.log_path, "web/0.log");
        let plan = PodPlan {
            privileged: false,
            ..plan
        };
        let security = plan.container().linux.unwrap().security_context.unwrap();
        assert_eq!(security.masked_paths.len(), MASKED_PATHS.len());
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(text in ".{0,24}") {
            let _ = (text.parse::<Volume>(), text.parse::<Publish>(), text.parse::<User>());
            let name = name_from_image(&text);
            prop_assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
        }
    }
}
