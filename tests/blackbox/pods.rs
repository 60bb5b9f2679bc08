//! Pod sandboxes: their life, status, lists, namespaces, host names.

use tonic::Code;

use crate::harness::config::{own_network, pod_namespaces};
use crate::harness::*;

tests![
    a_pod_lives_and_goes,
    status_has_what_was_asked,
    lists_are_filtered,
    abbreviated_ids_work,
    namespaces_are_the_pods_own,
    namespaces_of_the_node,
    a_shared_pid_namespace_reaps,
    a_target_pid_namespace_is_joined,
    a_debug_container_comes_later_and_leaves_nothing,
    the_host_name_is_set,
    an_unknown_handler_is_refused,
    a_config_without_metadata_is_refused,
    stopping_a_pod_stops_its_containers,
    removing_a_pod_removes_running_containers,
    twenty_pods_at_once,
    version_and_status_tell_about_us,
];

async fn a_pod_lives_and_goes(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let before = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)?
        .as_nanos();
    let pod = daemon.pod(|_| {}).await?;
    let status = pod.status().await?;
    assert_eq!(status.state(), cri::PodSandboxState::SandboxReady);
    let created = u128::try_from(status.created_at)?;
    assert!(
        created >= before && created < before + 60_000_000_000,
        "created_at is {created}"
    );
    assert_eq!(daemon.pod_dirs().len(), 1);
    pod.stop().await?;
    assert_eq!(
        pod.status().await?.state(),
        cri::PodSandboxState::SandboxNotready
    );
    pod.remove().await?;
    refused(pod.status().await, Code::NotFound, &[&pod.id]);
    assert_eq!(daemon.pod_dirs(), Vec::<String>::new());
    Ok(())
}

async fn status_has_what_was_asked(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let pod = daemon
        .pod(|c| {
            c.labels.insert("app".into(), "x".into());
            c.annotations
                .insert("note".into(), "with = and\nnewline".into());
            c.metadata.as_mut().unwrap().attempt = 3;
        })
        .await?;
    let status = pod.status().await?;
    assert_eq!(status.metadata, pod.config.metadata);
    assert_eq!(status.labels, pod.config.labels);
    assert_eq!(status.annotations, pod.config.annotations);
    let options = status.linux.unwrap().namespaces.unwrap().options.unwrap();
    assert_eq!(options.network(), cri::NamespaceMode::Node);
    assert_eq!(options.pid(), cri::NamespaceMode::Container);
    assert_eq!(options.ipc(), cri::NamespaceMode::Pod);
    Ok(())
}

async fn listed(daemon: &Daemon, filter: cri::PodSandboxFilter) -> Result<Vec<String>> {
    let request = cri::ListPodSandboxRequest {
        filter: Some(filter),
    };
    let mut ids: Vec<_> = daemon
        .runtime()
        .list_pod_sandbox(request)
        .await?
        .into_inner()
        .items
        .into_iter()
        .map(|p| p.id)
        .collect();
    ids.sort();
    Ok(ids)
}

async fn lists_are_filtered(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let with = |value: &'static str| {
        move |c: &mut cri::PodSandboxConfig| drop(c.labels.insert("colour".into(), value.into()))
    };
    let (red, blue) = (
        daemon.pod(with("red")).await?,
        daemon.pod(with("blue")).await?,
    );
    blue.stop().await?;
    let mut both = vec![red.id.clone(), blue.id.clone()];
    both.sort();
    assert_eq!(listed(&daemon, Default::default()).await?, both);
    let label = |value: &str| cri::PodSandboxFilter {
        label_selector: [("colour".to_owned(), value.to_owned())].into(),
        ..Default::default()
    };
    assert_eq!(listed(&daemon, label("red")).await?, [red.id.as_str()]);
    assert_eq!(listed(&daemon, label("green")).await?, [""; 0]);
    let state = |state: cri::PodSandboxState| cri::PodSandboxFilter {
        state: Some(cri::PodSandboxStateValue {
            state: state.into(),
        }),
        ..Default::default()
    };
    assert_eq!(
        listed(&daemon, state(cri::PodSandboxState::SandboxReady)).await?,
        [red.id.as_str()]
    );
    assert_eq!(
        listed(&daemon, state(cri::PodSandboxState::SandboxNotready)).await?,
        [blue.id.as_str()]
    );
    let all = cri::PodSandboxFilter {
        id: red.id.clone(),
        ..label("blue")
    };
    assert_eq!(
        listed(&daemon, all).await?,
        [""; 0],
        "all fields must match"
    );
    Ok(())
}

async fn abbreviated_ids_work(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let short = Pod {
        id: pod.id[..12].to_owned(),
        ..pod.clone()
    };
    assert_eq!(short.status().await?.id, pod.id);
    let filter = cri::PodSandboxFilter {
        id: short.id.clone(),
        ..Default::default()
    };
    assert_eq!(listed(&daemon, filter).await?, [pod.id.as_str()]);
    refused(
        Pod {
            id: String::new(),
            ..pod.clone()
        }
        .status()
        .await,
        Code::InvalidArgument,
        &[],
    );
    Ok(())
}

/// Our own namespace of a kind.
fn ours(kind: &str) -> Result<String> {
    Ok(std::fs::read_link(format!("/proc/self/ns/{kind}"))?
        .display()
        .to_string())
}

async fn namespaces_are_the_pods_own(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(own_network).await?;
    let [one, exec] = pod.probes(|_| {}).await?;
    let [two, _] = pod.probes(|_| {}).await?;
    // As with the peers, a cgroup namespace is for cgroup v2 alone.
    let cgroup = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers")
        .exists()
        .then_some("cgroup");
    for kind in ["ipc", "net", "uts", "mnt", "pid"]
        .into_iter()
        .chain(cgroup)
    {
        let key = format!("ns.{kind}");
        assert_ne!(one.get(&key), ours(kind)?, "{kind} is the host's");
        assert_eq!(
            one.get(&key),
            exec.get(&key),
            "exec is in another {kind} namespace"
        );
        let shared = ["ipc", "net", "uts"].contains(&kind);
        assert_eq!(
            one.get(&key) == two.get(&key),
            shared,
            "{kind} of two containers of a pod"
        );
    }
    assert_eq!(one.get("ns.user"), ours("user")?);
    let other = daemon.pod(own_network).await?;
    let [other, _] = other.probes(|_| {}).await?;
    for kind in ["ipc", "net", "uts"] {
        let key = format!("ns.{kind}");
        assert_ne!(one.get(&key), other.get(&key), "{kind} of two pods");
    }
    Ok(())
}

async fn namespaces_of_the_node(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon
        .pod(|c| {
            let modes = pod_namespaces(c);
            modes.ipc = cri::NamespaceMode::Node.into();
            modes.pid = cri::NamespaceMode::Node.into();
        })
        .await?;
    let reports = pod.probes(|_| {}).await?;
    for (report, who) in reports.iter().zip(["init", "exec"]) {
        for kind in ["ipc", "net", "pid", "uts"] {
            assert_eq!(
                report.get(&format!("ns.{kind}")),
                ours(kind)?,
                "{kind} of {who}"
            );
        }
        assert_ne!(report.get("ns.mnt"), ours("mnt")?);
    }
    Ok(())
}

async fn a_shared_pid_namespace_reaps(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon
        .pod(|c| pod_namespaces(c).pid = cri::NamespaceMode::Pod.into())
        .await?;
    let one = pod.sleeper().await?;
    let two = pod
        .run(&["sh", "-c", "(sleep 0.1 &); sleep 1000"], |_| {})
        .await?;
    // Both see each other, and somebody that is neither is process 1.
    let seen = eventually("both in one list", seconds(10), || async {
        let seen = one.exec_output(&["ps", "-o", "pid,args"]).await?;
        let sleeping = seen
            .lines()
            .filter(|l| l.ends_with("sleep 1000") && !l.contains("sh -c"))
            .count();
        Ok((sleeping == 2).then_some(seen))
    })
    .await?;
    let first = seen
        .lines()
        .find(|l| l.split_whitespace().next() == Some("1"))
        .context("process 1")?;
    assert!(!first.contains("sleep"), "process 1 is {first}");
    // The orphan has no parent but process 1, which must not leave it a zombie.
    eventually("the orphan's end", seconds(10), || async {
        let seen = two.exec_output(&["ps", "-o", "pid,stat,args"]).await?;
        Ok((!seen.contains("sleep 0.1") && !seen.contains(" Z ")).then_some(()))
    })
    .await?;
    // The end of one container is not the end of the other.
    one.stop(0).await?;
    assert_eq!(
        two.status().await?.state(),
        cri::ContainerState::ContainerRunning
    );
    Ok(())
}

async fn a_target_pid_namespace_is_joined(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let target = pod.run(&["sleep", "4321"], |_| {}).await?;
    let debug = pod
        .run(&["sleep", "1000"], |c| {
            let modes = container_security(c)
                .namespace_options
                .get_or_insert_default();
            modes.pid = cri::NamespaceMode::Target.into();
            modes.target_id = target.id.clone();
        })
        .await?;
    let seen = debug.exec_output(&["ps", "-o", "pid,args"]).await?;
    assert!(seen.contains("sleep 4321"), "{seen}");
    let answer = pod
        .try_create(|c| {
            let modes = container_security(c)
                .namespace_options
                .get_or_insert_default();
            modes.pid = cri::NamespaceMode::Target.into();
            modes.target_id = "nothing".into();
        })
        .await;
    let status = answer.expect_err("a target that there isn't");
    assert!(
        matches!(
            status.code(),
            Code::NotFound | Code::InvalidArgument | Code::FailedPrecondition
        ),
        "{status}"
    );
    assert!(status.message().contains("nothing"), "{status}");
    Ok(())
}

/// What a kubelet calls for an ephemeral container (`kubectl debug --target`): a pod that has run for a while, another
/// image, the process namespace of one container, a terminal. The others of the pod go on.
async fn a_debug_container_comes_later_and_leaves_nothing(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let target = pod
        .run(
            &["sh", "-c", "echo found >/tmp/secret; exec sleep 4321"],
            |_| {},
        )
        .await?;
    let bystander = pod.sleeper().await?;
    daemon.end().await?;
    daemon.launch().await?;
    let aim = |c: &mut cri::ContainerConfig| {
        let security = container_security(c);
        let modes = security.namespace_options.get_or_insert_default();
        modes.pid = cri::NamespaceMode::Target.into();
        modes.target_id = target.id.clone();
        // As the profile "general" of kubectl debug.
        let capabilities = security.capabilities.get_or_insert_default();
        capabilities.add_capabilities = vec!["SYS_PTRACE".into()];
        (c.stdin, c.stdin_once, c.tty) = (true, true, true);
    };
    let debug = pod.run(&["sh"], aim).await?;
    let seen = debug.exec_output(&["ps", "-o", "args"]).await?;
    assert!(seen.contains("sleep 4321"), "{seen}");
    assert!(!seen.contains("sleep 1000"), "the other's too: {seen}");
    // Whose files, network and memory it may look at.
    let secret = ["cat", "/proc/1/root/tmp/secret"];
    assert_eq!(debug.exec_output(&secret).await?, "found");
    for (namespace, same) in [("pid", true), ("net", true), ("ipc", true), ("mnt", false)] {
        if gvisor() {
            // There these links have a number of their own for each process.
            break;
        }
        let script = "for p in 1 self; do readlink /proc/$p/ns/$0; done";
        let text = debug.exec_output(&["sh", "-c", script, namespace]).await?;
        let (theirs, own) = text.split_once('\n').context("two namespaces")?;
        assert_eq!(theirs == own, same, "{namespace}: {text}");
    }
    // Its end is nobody else's.
    debug.stop(0).await?;
    assert_eq!(debug.status().await?.exit_code, 137);
    debug.remove().await?;
    for container in [&target, &bystander] {
        assert_eq!(container.exec_output(&["echo", "well"]).await?, "well");
    }
    // The end of the target, whose process 1 it is, is its own.
    let debug = pod.run(&["sh"], aim).await?;
    target.stop(0).await?;
    assert_eq!(debug.exited().await?.exit_code, 137);
    assert_eq!(bystander.exec_output(&["echo", "well"]).await?, "well");
    // A target that has ended can't be joined, and says so.
    let status = pod.try_create(aim).await.expect_err("the target has ended");
    assert!(status.message().contains(&target.id), "{status}");
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

async fn the_host_name_is_set(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon
        .pod(|c| {
            own_network(c);
            c.hostname = "a-name-of-its-own".into();
        })
        .await?;
    let text = pod
        .output(
            &[
                "sh",
                "-c",
                "hostname; cat /etc/hostname; grep -q a-name-of-its-own /etc/hosts; echo $?",
            ],
            |_| {},
        )
        .await?;
    assert_eq!(text, "a-name-of-its-own\na-name-of-its-own\n0\n");
    let here = nix::unistd::gethostname()?
        .into_string()
        .unwrap_or_default();
    assert_ne!(here, "a-name-of-its-own");
    let node = daemon.pod(|c| c.hostname = String::new()).await?;
    assert_eq!(node.output(&["hostname"], |_| {}).await?.trim_end(), here);
    assert_eq!(
        nix::unistd::gethostname()?
            .into_string()
            .unwrap_or_default(),
        here
    );
    Ok(())
}

async fn an_unknown_handler_is_refused(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let config = crate::harness::config::pod(&daemon);
    let request = cri::RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: "kata".into(),
    };
    refused(
        daemon.runtime().run_pod_sandbox(request).await,
        Code::InvalidArgument,
        &["kata"],
    );
    // The name is free again.
    daemon.run_pod(config).await?;
    let request = cri::RunPodSandboxRequest {
        config: Some(crate::harness::config::pod(&daemon)),
        runtime_handler: "native".into(),
    };
    let id = daemon
        .runtime()
        .run_pod_sandbox(request)
        .await?
        .into_inner()
        .pod_sandbox_id;
    let pod = Pod {
        daemon: daemon.clone(),
        id,
        config: Default::default(),
    };
    assert_eq!(pod.status().await?.runtime_handler, "native");
    Ok(())
}

async fn a_config_without_metadata_is_refused(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let none = daemon
        .runtime()
        .run_pod_sandbox(cri::RunPodSandboxRequest::default())
        .await;
    refused(none, Code::InvalidArgument, &["config"]);
    let mut config = crate::harness::config::pod(&daemon);
    config.metadata = None;
    refused(
        daemon.run_pod(config).await.map(|p| p.id),
        Code::InvalidArgument,
        &["metadata"],
    );
    for bad in ["with space", "ü", "a/b", "a\nb"] {
        let mut config = crate::harness::config::pod(&daemon);
        own_network(&mut config);
        config.hostname = bad.into();
        refused(
            daemon.run_pod(config).await.map(|p| p.id),
            Code::InvalidArgument,
            &[],
        );
    }
    let mut config = crate::harness::config::pod(&daemon);
    config.log_directory = "relative/../../etc".into();
    refused(
        daemon.run_pod(config).await.map(|p| p.id),
        Code::InvalidArgument,
        &["log"],
    );
    Ok(())
}

async fn stopping_a_pod_stops_its_containers(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let running = pod.sleeper().await?;
    let created = pod.create(&["sleep", "1000"], |_| {}).await?;
    pod.stop().await?;
    let status = running.status().await?;
    assert_eq!(status.state(), cri::ContainerState::ContainerExited);
    assert!(
        status.finished_at >= status.started_at && status.started_at > 0,
        "{status:?}"
    );
    assert_eq!(
        created.status().await?.state(),
        cri::ContainerState::ContainerExited
    );
    running.gone().await?;
    refused(
        pod.try_create(|_| {}).await,
        Code::FailedPrecondition,
        &[&pod.id[..8]],
    );
    Ok(())
}

async fn removing_a_pod_removes_running_containers(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    pod.remove().await?;
    refused(container.status().await, Code::NotFound, &[&container.id]);
    refused(pod.status().await, Code::NotFound, &[&pod.id]);
    Ok(())
}

async fn twenty_pods_at_once(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..20 {
        let daemon = daemon.clone();
        tasks.spawn(async move {
            let pod = daemon.pod(|_| {}).await?;
            let text = pod.output(&["echo", &format!("pod {n}")], |_| {}).await?;
            ensure!(text == format!("pod {n}\n"), "{text}");
            pod.stop().await?;
            pod.remove().await?;
            Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

async fn version_and_status_tell_about_us(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let version = daemon
        .runtime()
        .version(cri::VersionRequest {
            version: "v1".into(),
        })
        .await?
        .into_inner();
    assert_eq!(version.runtime_name, "slipway");
    assert_eq!(version.runtime_api_version, "v1");
    assert_eq!(version.runtime_version, env!("CARGO_PKG_VERSION"));
    let ask = async || {
        daemon
            .runtime()
            .status(cri::StatusRequest { verbose: true })
            .await
            .map(tonic::Response::into_inner)
    };
    // The plugins are looked at once the daemon answers.
    let status = eventually("both conditions", seconds(10), || async {
        let status = ask().await?;
        let conditions = &status.status.as_ref().context("status")?.conditions;
        let holds = |wanted: &str| conditions.iter().any(|c| c.r#type == wanted && c.status);
        Ok((holds("RuntimeReady") && holds("NetworkReady")).then_some(status))
    })
    .await?;
    assert!(
        status.runtime_handlers.iter().any(|h| h.name.is_empty()),
        "the default handler"
    );
    assert!(status.runtime_handlers.iter().any(|h| h.name == "native"));
    assert!(!status.info.is_empty(), "verbose info");
    let config = daemon
        .runtime()
        .runtime_config(cri::RuntimeConfigRequest {})
        .await?
        .into_inner();
    let driver = match env.driver {
        Driver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
        Driver::Systemd => cri::CgroupDriver::Systemd,
    };
    assert_eq!(config.linux.context("linux")?.cgroup_driver(), driver);
    // What later issues bring says so.
    let events = daemon
        .runtime()
        .restore_pod(cri::RestorePodRequest::default())
        .await;
    refused(events, Code::Unimplemented, &[]);
    Ok(())
}
