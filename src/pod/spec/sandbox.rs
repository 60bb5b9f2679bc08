//! Pods.

use crate::cgroup::{CgroupDriver, PodCgroup};
use crate::error::{Result, SpecError, quoted};
use crate::{HostFacts, PortMapping, SandboxPlan, SpecOptions, logpath, namespaces, sysctl};
use oci_spec::runtime::LinuxIdMapping;
use slipway_proto::cri::{self, NamespaceMode};
use slipway_proto::keeper;
use std::net::IpAddr;

/// HOST_NAME_MAX.
const LONGEST_HOSTNAME: usize = 64;

/// Checks a pod's configuration and says what its keeper has to make.
///
/// # Errors
/// [`SpecError`] naming the field.
pub fn sandbox(
    config: &cri::PodSandboxConfig,
    id: &str,
    options: &SpecOptions,
    host: &HostFacts,
) -> Result<SandboxPlan> {
    let name = config.metadata.as_ref().map(|m| m.name.as_str());
    if name.is_none_or(str::is_empty) {
        return Err(SpecError::invalid(
            "metadata.name",
            "a pod must have a name",
        ));
    }
    let own = namespaces::of_pod(config)?;
    let [network, ipc] = [own.network, own.ipc].map(|mode| mode == NamespaceMode::Pod);
    let linux = config.linux.clone().unwrap_or_default();
    let dir = options.run_root.join("pods").join(id);
    let text = |path: std::path::PathBuf| path.to_string_lossy().into_owned();
    let hostname = hostname(&config.hostname)?;
    let setup = keeper::SetupSandbox {
        new_network: network,
        new_ipc: ipc,
        // The host name goes with the network.
        new_uts: network,
        new_pid: own.pid == NamespaceMode::Pod,
        hostname: if network {
            hostname.to_owned()
        } else {
            String::new()
        },
        sysctls: sysctl::collect(&linux.sysctls, &options.default_sysctls, network, ipc)?,
        cgroup: PodCgroup::new(&linux.cgroup_parent, id, options.cgroups(host))?.path,
        systemd: options.cgroup_driver == CgroupDriver::Systemd,
        ns_dir: text(dir.join("ns")),
        // The daemon's to decide.
        keeper_in_slice: false,
        shm_bytes: if ipc { options.shm_bytes } else { 0 },
        shm_dir: if ipc {
            text(dir.join("shm"))
        } else {
            String::new()
        },
        users: own.users.map(|ids| keeper::UserNamespace {
            uids: Some(range(&ids.uids)),
            gids: Some(range(&ids.gids)),
        }),
    };
    Ok(SandboxPlan {
        setup,
        host_network: !network,
        port_mappings: port_mappings(&config.port_mappings, network)?,
        log_directory: logpath::directory(&config.log_directory)?,
        hostname: if hostname.is_empty() {
            &host.hostname
        } else {
            hostname
        }
        .to_owned(),
        privileged: is_privileged(config),
        warnings: Vec::new(),
    })
}

fn range(ids: &LinuxIdMapping) -> keeper::IdRange {
    keeper::IdRange {
        container: ids.container_id(),
        host: ids.host_id(),
        length: ids.size(),
    }
}

/// Whether the pod may have privileged containers.
pub(crate) fn is_privileged(config: &cri::PodSandboxConfig) -> bool {
    let security = config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref());
    security.is_some_and(|s| s.privileged)
}

fn hostname(name: &str) -> Result<&str> {
    let good = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if !good {
        let what = format!(
            "{} has characters other than letters, digits, - _ and .",
            quoted(name)
        );
        return Err(SpecError::invalid("hostname", what));
    }
    if name.len() > LONGEST_HOSTNAME {
        let what = format!("{} is longer than {LONGEST_HOSTNAME} bytes", quoted(name));
        return Err(SpecError::invalid("hostname", what));
    }
    Ok(name)
}

fn port_mappings(requests: &[cri::PortMapping], own_network: bool) -> Result<Vec<PortMapping>> {
    let mut all = Vec::new();
    for (i, request) in requests.iter().enumerate() {
        let field = |name: &str| format!("port_mappings[{i}].{name}");
        let port = |name: &str, value: i32| {
            u16::try_from(value).map_err(|_| {
                SpecError::invalid(
                    field(name),
                    format!("{value} is not a port; it must be 0 to 65535"),
                )
            })
        };
        let Ok(protocol) = cri::Protocol::try_from(request.protocol) else {
            let what = format!("there is no protocol {}", request.protocol);
            return Err(SpecError::invalid(field("protocol"), what));
        };
        let container_port = port("container_port", request.container_port)?;
        let host_port = port("host_port", request.host_port)?;
        let host_ip = match request.host_ip.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| {
                SpecError::invalid(
                    field("host_ip"),
                    format!("{} is not an address", quoted(text)),
                )
            })?),
        };
        if host_port == 0 || !own_network {
            continue;
        }
        if container_port == 0 {
            let what = "must be a port for the host's to lead to";
            return Err(SpecError::invalid(field("container_port"), what));
        }
        all.push(PortMapping {
            protocol,
            container_port,
            host_port,
            host_ip,
        });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecErrorKind::Invalid;
    use std::collections::HashMap;

    fn config() -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "pod".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn with(modes: [NamespaceMode; 3]) -> cri::PodSandboxConfig {
        let [network, ipc, pid] = modes.map(i32::from);
        let options = cri::NamespaceOption {
            network,
            ipc,
            pid,
            ..Default::default()
        };
        let security = cri::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        };
        let linux = cri::LinuxPodSandboxConfig {
            security_context: Some(security),
            ..Default::default()
        };
        cri::PodSandboxConfig {
            linux: Some(linux),
            ..config()
        }
    }

    fn plan(config: &cri::PodSandboxConfig) -> Result<SandboxPlan> {
        let host = HostFacts {
            hostname: "node".into(),
            ..HostFacts::detect()
        };
        sandbox(config, "abc", &SpecOptions::default(), &host)
    }

    #[test]
    fn a_plain_pod() {
        let found = plan(&config()).expect("good");
        let setup = &found.setup;
        assert!(setup.new_network && setup.new_ipc && setup.new_uts && setup.new_pid);
        assert_eq!(setup.cgroup, "/slipway/abc");
        assert_eq!(setup.ns_dir, "/run/slipway/pods/abc/ns");
        assert_eq!(setup.shm_dir, "/run/slipway/pods/abc/shm");
        assert_eq!((setup.shm_bytes, setup.hostname.as_str()), (64 << 20, ""));
        assert_eq!(
            (found.hostname.as_str(), found.log_directory),
            ("node", None)
        );
        assert!(!found.host_network && !found.privileged);
    }

    #[test]
    fn a_pod_in_the_hosts_namespaces() {
        let mut config = with([NamespaceMode::Node; 3]);
        config.hostname = "name".into();
        config.port_mappings = vec![cri::PortMapping {
            container_port: 80,
            host_port: 80,
            ..Default::default()
        }];
        let found = plan(&config).expect("good");
        let setup = &found.setup;
        assert!(!setup.new_network && !setup.new_ipc && !setup.new_uts && !setup.new_pid);
        assert_eq!(
            (
                setup.hostname.as_str(),
                setup.shm_dir.as_str(),
                setup.shm_bytes
            ),
            ("", "", 0)
        );
        assert!(found.host_network && found.port_mappings.is_empty());
        assert_eq!(found.hostname, "name");
        let own_pid = with([
            NamespaceMode::Pod,
            NamespaceMode::Pod,
            NamespaceMode::Container,
        ]);
        assert!(!plan(&own_pid).expect("good").setup.new_pid);
    }

    #[test]
    fn ports() {
        let port = |container_port, host_port, host_ip: &str| cri::PortMapping {
            container_port,
            host_port,
            host_ip: host_ip.into(),
            protocol: cri::Protocol::Udp.into(),
        };
        let of = |ports| {
            plan(&cri::PodSandboxConfig {
                port_mappings: ports,
                ..config()
            })
        };
        let found = of(vec![port(80, 0, ""), port(53, 5353, "::1"), port(1, 2, "")]).expect("good");
        let ip = Some("::1".parse().expect("address"));
        let protocol = cri::Protocol::Udp;
        let expected = [
            PortMapping {
                protocol,
                container_port: 53,
                host_port: 5353,
                host_ip: ip,
            },
            PortMapping {
                protocol,
                container_port: 1,
                host_port: 2,
                host_ip: None,
            },
        ];
        assert_eq!(found.port_mappings, expected);
        let bad = [
            (port(-1, 0, ""), "container_port"),
            (port(65_536, 0, ""), "container_port"),
            (port(0, 80, ""), "container_port"),
            (port(80, -1, ""), "host_port"),
            (port(80, 70_000, ""), "host_port"),
            (port(80, 80, "1.2.3"), "host_ip"),
            (
                cri::PortMapping {
                    protocol: 9,
                    ..port(80, 80, "")
                },
                "protocol",
            ),
        ];
        for (port, field) in bad {
            let error = of(vec![port]).expect_err(field);
            assert_eq!(error.field(), format!("port_mappings[0].{field}"));
        }
    }

    #[test]
    fn bad_fields_are_named() {
        let linux = |linux| cri::PodSandboxConfig {
            linux: Some(linux),
            ..config()
        };
        let sysctls = HashMap::from([("vm.swappiness".to_owned(), "1".to_owned())]);
        let cases = [
            (cri::PodSandboxConfig::default(), "metadata.name"),
            (
                cri::PodSandboxConfig {
                    hostname: "a b".into(),
                    ..config()
                },
                "hostname",
            ),
            (
                cri::PodSandboxConfig {
                    hostname: "a\n".into(),
                    ..config()
                },
                "hostname",
            ),
            (
                cri::PodSandboxConfig {
                    hostname: "x".repeat(65),
                    ..config()
                },
                "hostname",
            ),
            (
                cri::PodSandboxConfig {
                    log_directory: "log".into(),
                    ..config()
                },
                "log_directory",
            ),
            (
                cri::PodSandboxConfig {
                    log_directory: "/a/../b".into(),
                    ..config()
                },
                "log_directory",
            ),
            (
                linux(cri::LinuxPodSandboxConfig {
                    cgroup_parent: "/../x".into(),
                    ..Default::default()
                }),
                "linux.cgroup_parent",
            ),
            (
                linux(cri::LinuxPodSandboxConfig {
                    sysctls,
                    ..Default::default()
                }),
                "linux.sysctls[\"vm.swappiness\"]",
            ),
        ];
        for (config, field) in cases {
            let error = plan(&config).expect_err(field);
            assert_eq!((error.kind(), error.field()), (Invalid, field));
        }
    }

    #[test]
    fn the_keeper_is_told_of_a_user_namespace() {
        let mut config = with([NamespaceMode::Pod; 3]);
        assert_eq!(plan(&config).expect("good").setup.users, None);
        let mapping = cri::IdMapping {
            host_id: 65536,
            container_id: 0,
            length: 1000,
        };
        let security = config
            .linux
            .as_mut()
            .and_then(|l| l.security_context.as_mut());
        let options = security
            .and_then(|s| s.namespace_options.as_mut())
            .expect("options");
        options.userns_options = Some(cri::UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![mapping],
            gids: vec![mapping],
        });
        let plan = plan(&config).expect("good");
        let users = plan.setup.users.expect("a user namespace");
        let expected = keeper::IdRange {
            container: 0,
            host: 65536,
            length: 1000,
        };
        assert_eq!((users.uids, users.gids), (Some(expected), Some(expected)));
    }
}
