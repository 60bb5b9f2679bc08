//! Namespace modes of pods and containers.

use crate::error::{Result, SpecError};
use crate::userns::{self, IdMaps};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Kind};
use slipway_proto::cri::{self, NamespaceMode as Mode};
use slipway_proto::keeper::SetupSandboxResult;

/// What a pod has of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PodNamespaces {
    /// `Pod` or `Node`.
    pub network: Mode,
    /// `Pod` or `Node`.
    pub ipc: Mode,
    /// `Pod`, `Container` or `Node`.
    pub pid: Mode,
    /// Ids of its user namespace, if it has one.
    pub users: Option<IdMaps>,
}

const POD: &str = "linux.security_context.namespace_options";

fn mode(field: &str, value: i32) -> Result<Mode> {
    Mode::try_from(value)
        .map_err(|_| SpecError::invalid(field, format!("there is no namespace mode {value}")))
}

/// What a pod has of its own; absent options mean POD throughout, as the CRI's zero values do.
pub(crate) fn of_pod(config: &cri::PodSandboxConfig) -> Result<PodNamespaces> {
    let options = options_of_pod(config).cloned().unwrap_or_default();
    let shared = |what: &str, value: i32| {
        let field = format!("{POD}.{what}");
        match mode(&field, value)? {
            mode @ (Mode::Pod | Mode::Node) => Ok(mode),
            other => {
                let what = format!(
                    "{} makes no sense here; use POD or NODE",
                    other.as_str_name()
                );
                Err(SpecError::invalid(field, what))
            }
        }
    };
    let pid = mode(&format!("{POD}.pid"), options.pid)?;
    if pid == Mode::Target {
        let what = "TARGET is for a container; a pod has POD, CONTAINER or NODE";
        return Err(SpecError::invalid(format!("{POD}.pid"), what));
    }
    let own = PodNamespaces {
        network: shared("network", options.network)?,
        ipc: shared("ipc", options.ipc)?,
        pid,
        users: users(options.userns_options.as_ref())?,
    };
    // proc and mqueue can be mounted by the owner of their namespaces alone, which the pod then is not.
    for (name, mode) in [("pid", own.pid), ("ipc", own.ipc)] {
        if own.users.is_some() && mode == Mode::Node {
            let what = "NODE does not go with a user namespace, which the API server refuses, too; use POD, or \
                        no user namespace (hostUsers: true)";
            return Err(SpecError::invalid(format!("{POD}.{name}"), what));
        }
    }
    Ok(own)
}

fn options_of_pod(config: &cri::PodSandboxConfig) -> Option<&cri::NamespaceOption> {
    config
        .linux
        .as_ref()?
        .security_context
        .as_ref()?
        .namespace_options
        .as_ref()
}

fn users(options: Option<&cri::UserNamespace>) -> Result<Option<IdMaps>> {
    userns::of_options(&format!("{POD}.userns_options"), options)
}

/// A container's namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ContainerNamespaces {
    /// For the specification.
    pub list: Vec<LinuxNamespace>,
    /// The container whose PID namespace is joined, or empty.
    pub pid_target: String,
}

/// A container's namespaces: the pod's, as its keeper made them, and its own.
///
/// Without options of its own a container has its pod's modes; POD means what the pod has. A container
/// never gets a namespace of the host's that its pod doesn't have.
pub(crate) fn of_container(
    security: Option<&cri::LinuxContainerSecurityContext>,
    pod: PodNamespaces,
    made: &SetupSandboxResult,
    own_cgroup: bool,
) -> Result<ContainerNamespaces> {
    let options = security.and_then(|s| s.namespace_options.as_ref());
    let mut pid = pod.pid;
    let mut pid_target = String::new();
    if let Some(options) = options {
        if let Some(asked) = &options.userns_options
            && users(Some(asked))? != pod.users
        {
            let what =
                "the user namespace is not that of the pod; all containers of a pod have the pod's";
            return Err(SpecError::invalid(format!("{POD}.userns_options"), what));
        }
        like_the_pod("network", options.network, pod.network)?;
        like_the_pod("ipc", options.ipc, pod.ipc)?;
        let field = format!("{POD}.pid");
        match mode(&field, options.pid)? {
            Mode::Pod if pod.pid == Mode::Container => {
                let what = "POD, but this pod's containers share no PID namespace; make the pod with \
                            pid mode POD, or use CONTAINER";
                return Err(SpecError::precondition(field, what));
            }
            Mode::Pod => {}
            Mode::Container => pid = Mode::Container,
            Mode::Node if pod.pid == Mode::Node => {}
            Mode::Node => {
                let what = "NODE, but the pod was not made with pid mode NODE";
                return Err(SpecError::invalid(field, what));
            }
            Mode::Target if options.target_id.is_empty() => {
                let what = "must name the container whose PID namespace is joined";
                return Err(SpecError::invalid(format!("{POD}.target_id"), what));
            }
            Mode::Target => {
                // A new one, should the keeper not come to join the target's.
                pid = Mode::Container;
                pid_target.clone_from(&options.target_id);
            }
        }
    }
    let mut list = vec![new(Kind::Mount)];
    let joined = |kind, shared, path: &str, what| {
        if shared == Mode::Node {
            return Ok(None);
        }
        if path.is_empty() {
            // Never the host's instead.
            let what = format!("the pod's {what} namespace is gone; make the pod anew");
            return Err(SpecError::precondition("pod_sandbox_id", what));
        }
        let mut namespace = new(kind);
        namespace.set_path(Some(path.into()));
        Ok(Some(namespace))
    };
    if pod.users.is_some() {
        list.extend(joined(Kind::User, Mode::Pod, &made.user, "user")?);
    }
    list.extend(joined(
        Kind::Network,
        pod.network,
        &made.network,
        "network",
    )?);
    list.extend(joined(Kind::Ipc, pod.ipc, &made.ipc, "IPC")?);
    // The host name goes with the network.
    list.extend(joined(Kind::Uts, pod.network, &made.uts, "UTS")?);
    match pid {
        Mode::Container => list.push(new(Kind::Pid)),
        _ => list.extend(joined(Kind::Pid, pid, &made.pid, "PID")?),
    }
    if own_cgroup {
        list.push(new(Kind::Cgroup));
    }
    Ok(ContainerNamespaces { list, pid_target })
}

fn like_the_pod(what: &str, value: i32, pod: Mode) -> Result<()> {
    let field = format!("{POD}.{what}");
    match mode(&field, value)? {
        Mode::Pod => Ok(()),
        Mode::Node if pod == Mode::Node => Ok(()),
        Mode::Node => {
            let what = format!("NODE, but the pod was not made with {what} mode NODE");
            Err(SpecError::invalid(field, what))
        }
        other => {
            let what = format!(
                "{} makes no sense here; use POD or NODE",
                other.as_str_name()
            );
            Err(SpecError::invalid(field, what))
        }
    }
}

fn new(kind: Kind) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind).set_path(None);
    namespace
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecErrorKind::{FailedPrecondition, Invalid};

    fn options(network: Mode, ipc: Mode, pid: Mode) -> cri::NamespaceOption {
        cri::NamespaceOption {
            network: network.into(),
            ipc: ipc.into(),
            pid: pid.into(),
            ..Default::default()
        }
    }

    fn pod(options: Option<cri::NamespaceOption>) -> Result<PodNamespaces> {
        let security_context = cri::LinuxSandboxSecurityContext {
            namespace_options: options,
            ..Default::default()
        };
        of_pod(&cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(security_context),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    fn made() -> SetupSandboxResult {
        SetupSandboxResult {
            network: "/ns/net".into(),
            ipc: "/ns/ipc".into(),
            uts: "/ns/uts".into(),
            pid: "/ns/pid".into(),
            user: "/ns/user".into(),
            made_cgroup: false,
        }
    }

    fn container(
        own: Option<cri::NamespaceOption>,
        of_pod: cri::NamespaceOption,
    ) -> Result<(Vec<String>, String)> {
        let security = cri::LinuxContainerSecurityContext {
            namespace_options: own,
            ..Default::default()
        };
        let found = of_container(Some(&security), pod(Some(of_pod))?, &made(), false)?;
        let name = |n: &LinuxNamespace| match n.path() {
            Some(path) => path.display().to_string(),
            None => n.typ().to_string(),
        };
        Ok((found.list.iter().map(name).collect(), found.pid_target))
    }

    #[test]
    fn pods() {
        let modes = |p: PodNamespaces| (p.network, p.ipc, p.pid);
        let all = (Mode::Pod, Mode::Pod, Mode::Pod);
        assert_eq!(
            of_pod(&cri::PodSandboxConfig::default()).map(modes),
            Ok(all)
        );
        assert_eq!(pod(None).map(modes), Ok(all));
        let mixed = pod(Some(options(Mode::Node, Mode::Pod, Mode::Container)));
        assert_eq!(
            mixed.map(modes),
            Ok((Mode::Node, Mode::Pod, Mode::Container))
        );
        for bad in [
            options(Mode::Container, Mode::Pod, Mode::Pod),
            options(Mode::Target, Mode::Pod, Mode::Pod),
            options(Mode::Pod, Mode::Container, Mode::Pod),
            options(Mode::Pod, Mode::Pod, Mode::Target),
            cri::NamespaceOption {
                network: 7,
                ..Default::default()
            },
            cri::NamespaceOption {
                pid: -1,
                ..Default::default()
            },
        ] {
            assert_eq!(
                pod(Some(bad.clone())).expect_err("bad").kind(),
                Invalid,
                "{bad:?}"
            );
        }
    }

    #[test]
    fn user_namespaces() {
        let maps = |host_id| {
            let mapping = cri::IdMapping {
                host_id,
                container_id: 0,
                length: 65536,
            };
            Some(cri::UserNamespace {
                mode: Mode::Pod.into(),
                uids: vec![mapping],
                gids: vec![mapping],
            })
        };
        let with = |host_id, modes: [Mode; 3]| cri::NamespaceOption {
            userns_options: maps(host_id),
            ..options(modes[0], modes[1], modes[2])
        };
        let all = [Mode::Pod; 3];
        assert!(pod(Some(with(65536, all))).expect("good").users.is_some());
        // The host's network is none of the container's to configure, but the rest works.
        let network = [Mode::Node, Mode::Pod, Mode::Container];
        assert!(pod(Some(with(65536, network))).is_ok());
        for (modes, field) in [
            ([Mode::Pod, Mode::Pod, Mode::Node], "pid"),
            ([Mode::Pod, Mode::Node, Mode::Pod], "ipc"),
        ] {
            let error = pod(Some(with(65536, modes))).expect_err(field);
            assert_eq!(error.field(), format!("{POD}.{field}"));
        }
        let joined = |own: Option<cri::NamespaceOption>| container(own, with(65536, all));
        let list = vec![
            "mnt", "/ns/user", "/ns/net", "/ns/ipc", "/ns/uts", "/ns/pid",
        ];
        for own in [
            None,
            Some(options(all[0], all[1], all[2])),
            Some(with(65536, all)),
        ] {
            assert_eq!(joined(own).expect("good").0, list);
        }
        let other = joined(Some(with(131_072, all))).expect_err("another one");
        assert_eq!(other.kind(), Invalid);
        let node = cri::NamespaceOption {
            userns_options: Some(cri::UserNamespace {
                mode: Mode::Node.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            joined(Some(node.clone())).expect_err("the host's").kind(),
            Invalid
        );
        let plain = options(all[0], all[1], all[2]);
        assert!(container(Some(node), plain.clone()).is_ok());
        let error = container(Some(with(65536, all)), plain).expect_err("the pod has none");
        assert_eq!(error.kind(), Invalid);
    }

    #[test]
    fn containers() {
        use Mode::{Container, Node, Pod};
        let (net, ipc, uts, pid) = ("/ns/net", "/ns/ipc", "/ns/uts", "/ns/pid");
        let own_pid = vec!["mnt", net, ipc, uts, "pid"];
        let shared = vec!["mnt", net, ipc, uts, pid];
        let cases = [
            (None, options(Pod, Pod, Container), own_pid.clone()),
            (None, options(Pod, Pod, Pod), shared.clone()),
            (Some(options(Pod, Pod, Pod)), options(Pod, Pod, Pod), shared),
            (
                Some(options(Pod, Pod, Container)),
                options(Pod, Pod, Pod),
                own_pid.clone(),
            ),
            (
                Some(options(Pod, Pod, Container)),
                options(Pod, Pod, Container),
                own_pid,
            ),
            (
                Some(options(Pod, Pod, Node)),
                options(Pod, Pod, Node),
                vec!["mnt", net, ipc, uts],
            ),
            (
                Some(options(Pod, Pod, Pod)),
                options(Pod, Pod, Node),
                vec!["mnt", net, ipc, uts],
            ),
            (
                Some(options(Node, Node, Container)),
                options(Node, Node, Container),
                vec!["mnt", "pid"],
            ),
            (
                Some(options(Pod, Pod, Container)),
                options(Node, Node, Container),
                vec!["mnt", "pid"],
            ),
            (None, options(Node, Pod, Pod), vec!["mnt", ipc, pid]),
        ];
        for (own, of_pod, expected) in cases {
            let (found, target) = container(own.clone(), of_pod.clone()).expect("good");
            assert_eq!(found, expected, "{own:?} in {of_pod:?}");
            assert_eq!(target, "");
        }
    }

    #[test]
    fn a_target_is_joined_by_the_keeper() {
        let own = cri::NamespaceOption {
            target_id: "abc".into(),
            ..options(Mode::Pod, Mode::Pod, Mode::Target)
        };
        let pod = options(Mode::Pod, Mode::Pod, Mode::Container);
        let (found, target) = container(Some(own.clone()), pod.clone()).expect("good");
        assert_eq!((found[4].as_str(), target.as_str()), ("pid", "abc"));
        let nobody = cri::NamespaceOption {
            target_id: String::new(),
            ..own
        };
        assert_eq!(
            container(Some(nobody), pod).expect_err("no target").kind(),
            Invalid
        );
    }

    #[test]
    fn wrong_combinations() {
        use Mode::{Container, Node, Pod, Target};
        let cases = [
            (
                options(Pod, Pod, Pod),
                options(Pod, Pod, Container),
                FailedPrecondition,
            ),
            (options(Pod, Pod, Node), options(Pod, Pod, Pod), Invalid),
            (
                options(Pod, Pod, Node),
                options(Pod, Pod, Container),
                Invalid,
            ),
            (options(Node, Pod, Pod), options(Pod, Pod, Pod), Invalid),
            (options(Pod, Node, Pod), options(Pod, Pod, Pod), Invalid),
            (
                options(Container, Pod, Pod),
                options(Pod, Pod, Pod),
                Invalid,
            ),
            (options(Pod, Target, Pod), options(Pod, Pod, Pod), Invalid),
        ];
        for (own, of_pod, kind) in cases {
            let error = container(Some(own.clone()), of_pod.clone()).expect_err("wrong");
            assert_eq!(error.kind(), kind, "{own:?} in {of_pod:?}");
        }
    }

    #[test]
    fn a_lost_namespace_is_not_the_hosts() {
        let all = PodNamespaces {
            network: Mode::Pod,
            ipc: Mode::Pod,
            pid: Mode::Pod,
            users: None,
        };
        for lost in 0..4 {
            let mut made = made();
            *[
                &mut made.network,
                &mut made.ipc,
                &mut made.uts,
                &mut made.pid,
            ][lost] = String::new();
            let error = of_container(None, all, &made, false).expect_err("lost");
            assert_eq!(error.kind(), FailedPrecondition);
        }
    }

    #[test]
    fn a_cgroup_namespace_where_wanted() {
        let all = PodNamespaces {
            network: Mode::Pod,
            ipc: Mode::Pod,
            pid: Mode::Pod,
            users: None,
        };
        let kinds = |own| {
            let found = of_container(None, all, &made(), own).expect("good");
            found.list.iter().any(|n| n.typ() == Kind::Cgroup)
        };
        assert!(kinds(true) && !kinds(false));
    }
}
