//! The daemon ends, by its own will or not; pods go on, and the next daemon finds them.

use std::time::Duration;

use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::*;

tests![
    pods_go_on_over_a_restart,
    exits_that_nobody_saw,
    logs_go_on,
    names_are_still_taken,
    pods_on_a_network_are_found_and_taken_down,
    a_keeper_that_died,
    a_keeper_that_hangs,
    an_unreadable_record_is_set_aside,
    a_create_that_was_cut_off,
    fifty_pods_are_found_again,
    two_daemons_of_one_root,
];

const BOTH: [Signal; 2] = [Signal::SIGTERM, Signal::SIGKILL];

async fn pods_go_on_over_a_restart(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon
        .pod(|c| drop(c.labels.insert("k".into(), "v".into())))
        .await?;
    let running = pod.sleeper().await?;
    let created = pod.create(&["echo", "later"], |_| {}).await?;
    let ended = pod.run(&["probe", "exit", "7"], |_| {}).await?;
    ended.exited().await?;
    let before = (
        pod.status().await?,
        running.status().await?,
        created.status().await?,
        ended.status().await?,
    );
    let process = running.pid()?;
    for signal in BOTH {
        let status = daemon.kill(signal).await?;
        assert_eq!(status.success(), signal == Signal::SIGTERM, "{status}");
        assert_eq!(
            running.pid()?,
            process,
            "the container's process is another one"
        );
        daemon.launch().await?;
        let after = (
            pod.status().await?,
            running.status().await?,
            created.status().await?,
            ended.status().await?,
        );
        assert_eq!(after, before, "after {signal}");
        assert_eq!(running.exec_output(&["echo", "well"]).await?, "well");
    }
    created.start().await?;
    created.exited().await?;
    assert_eq!(created.stdout()?, "later\n");
    running.stop(0).await?;
    assert_eq!(running.status().await?.exit_code, 137);
    Ok(())
}

async fn exits_that_nobody_saw(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    for signal in BOTH {
        let gate = Gate::new(&env, &format!("gate-{signal}"))?;
        let container = gate.behind(&pod, "exit 23").await?;
        daemon.kill(signal).await?;
        gate.open()?;
        eventually("the end of its process", seconds(10), || async {
            Ok(container.processes().is_empty().then_some(()))
        })
        .await?;
        daemon.launch().await?;
        let status = container.status().await?;
        assert_eq!(
            status.state(),
            cri::ContainerState::ContainerExited,
            "after {signal}"
        );
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (23, "Error"),
            "after {signal}"
        );
        assert!(status.finished_at > status.started_at);
    }
    Ok(())
}

async fn logs_go_on(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon
        .run(&[
            "sh",
            "-c",
            "i=0; while [ $i -lt 60 ]; do echo $i; i=$((i+1)); sleep 0.05; done",
        ])
        .await?;
    for signal in BOTH {
        daemon.kill(signal).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        daemon.launch().await?;
    }
    container.exited().await?;
    let wanted: String = (0..60).map(|n| format!("{n}\n")).collect();
    assert_eq!(container.stdout()?, wanted);
    container.reopen_log().await?;
    Ok(())
}

async fn names_are_still_taken(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    refused(
        daemon.run_pod(pod.config.clone()).await.map(|p| p.id),
        Code::AlreadyExists,
        &[&pod.id],
    );
    refused(
        pod.create_exactly(container.config.clone())
            .await
            .map(|c| c.id),
        Code::AlreadyExists,
        &[&container.id],
    );
    Ok(())
}

async fn pods_on_a_network_are_found_and_taken_down(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(config::own_network).await?;
    let before = pod.status().await?.network;
    let container = pod.sleeper().await?;
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    assert_eq!(pod.status().await?.network, before);
    let look: &[&str] = match gvisor() {
        // It gives nobody raw sockets by itself.
        true => &["ip", "address"],
        false => &["ping", "-c", "1", "-W", "5", "127.0.0.1"],
    };
    container.exec_output(look).await?;
    // Its addresses and namespaces go as ever: the search for leaks at the end of the test sees to that.
    Ok(())
}

/// The keeper of a container's pod: the parent of its first process.
pub fn keeper(container: &Container) -> Result<nix::unistd::Pid> {
    let status = read(format!("/proc/{}/status", container.pid()?))?;
    let parent = status
        .lines()
        .find_map(|l| l.strip_prefix("PPid:"))
        .context("PPid")?;
    Ok(nix::unistd::Pid::from_raw(parent.trim().parse()?))
}

async fn a_keeper_that_hangs(env: Env) -> Result<()> {
    let daemon = env
        .daemon_with(|s| s.set("limits.delete_timeout", "\"1s\""))
        .await?;
    daemon.pull("test").await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    let keeper = keeper(&container)?;
    nix::sys::signal::kill(keeper, Signal::SIGSTOP)?;
    pod.stop().await?;
    pod.remove().await?;
    container.gone().await?;
    assert!(
        !std::path::Path::new(&format!("/proc/{keeper}")).exists(),
        "the keeper is still there"
    );
    Ok(())
}

async fn a_keeper_that_died(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    let other = daemon.run(&["sleep", "1000"]).await?;
    nix::sys::signal::kill(keeper(&container)?, Signal::SIGKILL)?;
    eventually("the pod to be not ready", seconds(10), || async {
        Ok((pod.status().await?.state() == cri::PodSandboxState::SandboxNotready).then_some(()))
    })
    .await?;
    eventually("the container to be exited", seconds(10), || async {
        Ok(
            (container.status().await?.state() == cri::ContainerState::ContainerExited)
                .then_some(()),
        )
    })
    .await?;
    assert_eq!(
        other.status().await?.state(),
        cri::ContainerState::ContainerRunning,
        "another pod's"
    );
    pod.stop().await?;
    pod.remove().await?;
    container.gone().await?;
    // And once more while no daemon looks.
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    let keeper = keeper(&container)?;
    daemon.kill(Signal::SIGKILL).await?;
    nix::sys::signal::kill(keeper, Signal::SIGKILL)?;
    daemon.launch().await?;
    assert_eq!(
        pod.status().await?.state(),
        cri::PodSandboxState::SandboxNotready
    );
    assert_eq!(
        container.status().await?.state(),
        cri::ContainerState::ContainerExited
    );
    pod.remove().await?;
    container.gone().await?;
    Ok(())
}

async fn an_unreadable_record_is_set_aside(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let bad = daemon.pod(|_| {}).await?;
    let good = daemon.pod(|_| {}).await?;
    let container = good.sleeper().await?;
    bad.stop().await?;
    daemon.kill(Signal::SIGTERM).await?;
    let record = env.root.join("r/pods").join(&bad.id).join("record.json");
    std::fs::write(&record, "{\"schema\": 1, torn")?;
    daemon.launch().await?;
    assert_eq!(
        good.status().await?.state(),
        cri::PodSandboxState::SandboxReady
    );
    assert_eq!(
        container.status().await?.state(),
        cri::ContainerState::ContainerRunning
    );
    daemon.logged(0, &[&bad.id]).await?;
    // Its bytes are still somewhere, for whoever wants to know.
    let place = env.root.join("r/pods").join(&bad.id).display().to_string();
    let kept = output("grep", &["-rl", "torn", &place]).await?;
    assert!(!kept.trim().is_empty());
    refused(bad.status().await, Code::NotFound, &[&bad.id]);
    // Who has looked at it takes it away.
    std::fs::remove_dir_all(env.root.join("r/pods").join(&bad.id)).ok();
    Ok(())
}

async fn a_create_that_was_cut_off(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let config = config::pod(&daemon);
    for patience in [2, 5, 10, 20] {
        let task = tokio::spawn({
            let (daemon, config) = (daemon.clone(), config.clone());
            async move {
                let pod = daemon.run_pod(config).await?;
                pod.sleeper().await
            }
        });
        tokio::time::sleep(Duration::from_millis(patience)).await;
        daemon.kill(Signal::SIGKILL).await?;
        task.await?.ok();
        daemon.launch().await?;
        // Whatever stage it was at: what there is, can be used or removed, and the name is free then.
        daemon.remove_everything().await?;
        let pod = daemon
            .run_pod(config.clone())
            .await
            .with_context(|| format!("after {patience} ms"))?;
        pod.output(&["true"], |_| {}).await?;
        pod.stop().await?;
        pod.remove().await?;
        assert_eq!(
            daemon.pod_dirs(),
            Vec::<String>::new(),
            "after {patience} ms"
        );
    }
    Ok(())
}

async fn fifty_pods_are_found_again(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let daemon = daemon.clone();
        tasks.spawn(async move { daemon.run(&["sleep", "1000"]).await });
    }
    for container in tasks.join_all().await {
        container?;
    }
    daemon.kill(Signal::SIGKILL).await?;
    let began = std::time::Instant::now();
    daemon.launch().await?;
    let all = daemon
        .runtime()
        .list_containers(cri::ListContainersRequest::default())
        .await?
        .into_inner()
        .containers;
    assert_eq!(all.len(), 50);
    assert!(
        all.iter()
            .all(|c| c.state() == cri::ContainerState::ContainerRunning)
    );
    assert!(began.elapsed() < seconds(10), "{:?}", began.elapsed());
    Ok(())
}

async fn two_daemons_of_one_root(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let config = env.root.join("config.toml").display().to_string();
    let (code, out, err) = daemon.command(&["serve", "--config", &config]).await?;
    assert_ne!(code, 0, "a second daemon of the same root: {out}{err}");
    assert!(
        format!("{out}{err}").contains(&env.root.display().to_string()),
        "{out}{err}"
    );
    assert_eq!(
        container.exec_output(&["echo", "well"]).await?,
        "well",
        "the first one goes on"
    );
    Ok(())
}
