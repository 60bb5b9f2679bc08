//! The configurations that tests start from.

use super::{Daemon, Env, cri, image};

/// A bridge with host-local addresses and port mappings, of the test's own subnet.
pub fn conflist(env: &Env) -> String {
    let data = env.root.join("net.addresses");
    let (high, low) = (env.number / 250, env.number % 250);
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": format!("test{}", env.number),
        "plugins": [
            {
                "type": "bridge", "bridge": format!("slt{}", env.number), "isGateway": true, "ipMasq": true,
                "ipam": {
                    "type": "host-local", "dataDir": data,
                    "ranges": [[{"subnet": format!("10.{}.{low}.0/24", 100 + high)}], [{"subnet": format!("fd00:{}::/64", env.number)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
    .to_string()
}

/// A pod on the node's network; what the kubelet would send.
pub fn pod(daemon: &Daemon) -> cri::PodSandboxConfig {
    let env = daemon.env();
    let name = format!("pod{}", env.fresh());
    let options = cri::NamespaceOption {
        network: cri::NamespaceMode::Node.into(),
        pid: cri::NamespaceMode::Container.into(),
        ..Default::default()
    };
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            uid: format!("uid-{}-{name}", env.number),
            namespace: "blackbox".to_owned(),
            attempt: 0,
            name: name.clone(),
        }),
        hostname: name.clone(),
        log_directory: daemon.logs().join(&name).display().to_string(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: env.cgroup.clone(),
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                seccomp: Some(cri::SecurityProfile::default()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container of the image `test` in that pod, under RuntimeDefault.
pub fn container(
    daemon: &Daemon,
    pod: &cri::PodSandboxConfig,
    command: &[&str],
) -> cri::ContainerConfig {
    let name = format!("c{}", daemon.env().fresh());
    let options = pod
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.clone());
    let paths = |paths: &[&str]| paths.iter().map(|p| (*p).to_owned()).collect();
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: name.clone(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: super::image("test"),
            ..Default::default()
        }),
        command: command.iter().map(|w| (*w).to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(cri::LinuxContainerResources::default()),
            security_context: Some(cri::LinuxContainerSecurityContext {
                namespace_options: options,
                seccomp: Some(cri::SecurityProfile::default()),
                masked_paths: paths(&[
                    "/proc/kcore",
                    "/proc/keys",
                    "/proc/timer_list",
                    "/sys/firmware",
                ]),
                readonly_paths: paths(&[
                    "/proc/bus",
                    "/proc/fs",
                    "/proc/irq",
                    "/proc/sys",
                    "/proc/sysrq-trigger",
                ]),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

/// The security context of a container's configuration.
pub fn container_security(
    config: &mut cri::ContainerConfig,
) -> &mut cri::LinuxContainerSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

/// The security context of a pod's configuration.
pub fn pod_security(config: &mut cri::PodSandboxConfig) -> &mut cri::LinuxSandboxSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

/// The namespace modes of a pod's configuration.
pub fn pod_namespaces(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
    pod_security(config)
        .namespace_options
        .get_or_insert_default()
}

/// Gives a pod a network namespace, and an address from CNI.
pub fn own_network(config: &mut cri::PodSandboxConfig) {
    pod_namespaces(config).network = cri::NamespaceMode::Pod.into();
}

/// One of the test images, by its short name.
pub fn of_image(name: &str) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec {
        image: image(name),
        ..Default::default()
    })
}
