//! StopContainer and StopPodSandbox: signals, grace, and who waits for whom.

use std::time::{Duration, Instant};

use tonic::Code;

use crate::harness::*;

tests![
    the_default_signal_is_term,
    the_images_signal,
    the_configs_signal_wins,
    grace_runs_out,
    no_grace_is_sigkill,
    a_second_stop_shortens_the_first,
    a_second_stop_does_not_lengthen_the_first,
    a_container_that_ends_at_once_stops_at_once,
    stopping_what_has_stopped,
    a_created_container_stops,
    list_and_status_do_not_wait_for_a_stop,
    children_go_with_process_one,
    a_frozen_container_stops,
    negative_grace,
    the_signal_stands_in_the_status,
];

/// A container that says which signals come, and ends with the number of the first that it does not ignore.
async fn waiter(
    daemon: &Daemon,
    ignored: &[&str],
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<Container> {
    let command = [&["probe", "wait"], ignored].concat();
    let container = daemon.pod(|_| {}).await?.run(&command, change).await?;
    container.says("ready").await?;
    Ok(container)
}

async fn the_default_signal_is_term(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = waiter(&daemon, &[], |_| {}).await?;
    container.stop(20).await?;
    let status = container.status().await?;
    assert_eq!(
        (status.state(), status.exit_code),
        (cri::ContainerState::ContainerExited, 15)
    );
    assert_eq!(container.stdout()?, "ready\nsignal 15\n");
    Ok(())
}

async fn the_images_signal(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("stop-usr1").await?;
    let container = waiter(&daemon, &[], |c| {
        c.image.as_mut().unwrap().image = image("stop-usr1")
    })
    .await?;
    container.stop(20).await?;
    assert_eq!(container.stdout()?, "ready\nsignal 10\n");
    Ok(())
}

async fn the_configs_signal_wins(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("stop-usr1").await?;
    let change = |c: &mut cri::ContainerConfig| {
        c.image.as_mut().unwrap().image = image("stop-usr1");
        c.stop_signal = cri::Signal::Sigint.into();
    };
    let container = waiter(&daemon, &[], change).await?;
    container.stop(20).await?;
    assert_eq!(container.stdout()?, "ready\nsignal 2\n");
    Ok(())
}

async fn the_signal_stands_in_the_status(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .create(&["true"], |c| c.stop_signal = cri::Signal::Sigquit.into())
        .await?;
    assert_eq!(
        container.status().await?.stop_signal(),
        cri::Signal::Sigquit
    );
    let container = pod.create(&["true"], |_| {}).await?;
    assert_eq!(
        container.status().await?.stop_signal(),
        cri::Signal::Sigterm
    );
    Ok(())
}

async fn grace_runs_out(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = waiter(&daemon, &["15"], |_| {}).await?;
    let began = Instant::now();
    container.stop(2).await?;
    let took = began.elapsed();
    assert!(
        took >= Duration::from_millis(1900) && took < seconds(6),
        "{took:?}"
    );
    let status = container.status().await?;
    assert_eq!(status.exit_code, 137);
    assert_eq!(container.stdout()?, "ready\nsignal 15\n");
    Ok(())
}

async fn no_grace_is_sigkill(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = waiter(&daemon, &[], |_| {}).await?;
    container.stop(0).await?;
    assert_eq!(container.status().await?.exit_code, 137);
    assert_eq!(container.stdout()?, "ready\n");
    Ok(())
}

async fn a_second_stop_shortens_the_first(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = waiter(&daemon, &["15"], |_| {}).await?;
    let began = Instant::now();
    let first = tokio::spawn({
        let container = container.clone();
        async move { container.stop(50).await }
    });
    container.says("signal 15").await?;
    container.stop(1).await?;
    first.await??;
    let took = began.elapsed();
    assert!(took < seconds(10), "{took:?}");
    assert_eq!(container.status().await?.exit_code, 137);
    assert_eq!(
        container.stdout()?.matches("signal 15").count(),
        1,
        "the signal is sent once"
    );
    Ok(())
}

async fn a_second_stop_does_not_lengthen_the_first(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = waiter(&daemon, &["15"], |_| {}).await?;
    let began = Instant::now();
    let first = tokio::spawn({
        let container = container.clone();
        async move { container.stop(2).await }
    });
    container.says("signal 15").await?;
    container.stop(50).await?;
    first.await??;
    assert!(began.elapsed() < seconds(10), "{:?}", began.elapsed());
    Ok(())
}

async fn a_container_that_ends_at_once_stops_at_once(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = waiter(&daemon, &[], |_| {}).await?;
    let began = Instant::now();
    container.stop(30).await?;
    assert!(began.elapsed() < seconds(3), "{:?}", began.elapsed());
    Ok(())
}

async fn stopping_what_has_stopped(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["probe", "exit", "9"]).await?;
    container.exited().await?;
    container.stop(10).await?;
    container.stop(0).await?;
    assert_eq!(
        container.status().await?.exit_code,
        9,
        "a late stop must not change how it ended"
    );
    Ok(())
}

async fn a_created_container_stops(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.create(&["sleep", "1000"], |_| {}).await?;
    container.stop(5).await?;
    assert_eq!(
        container.status().await?.state(),
        cri::ContainerState::ContainerExited
    );
    container.gone().await?;
    Ok(())
}

async fn list_and_status_do_not_wait_for_a_stop(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = waiter(&daemon, &["15"], |_| {}).await?;
    let grace = seconds(4).as_secs().cast_signed();
    let stop = tokio::spawn({
        let container = container.clone();
        async move { container.stop(grace).await }
    });
    container.says("signal 15").await?;
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(
            container.status().await?.state(),
            cri::ContainerState::ContainerRunning
        );
        daemon
            .runtime()
            .list_containers(cri::ListContainersRequest::default())
            .await?;
        daemon
            .runtime()
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await?;
    }
    assert!(began.elapsed() < seconds(1), "{:?}", began.elapsed());
    assert_eq!(container.exec(&["true"]).await?.code, 0, "and execs go on");
    assert!(!stop.is_finished());
    stop.await??;
    Ok(())
}

async fn children_go_with_process_one(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    // In the pod's PID namespace, and in the node's, nothing but us ends what process one leaves behind.
    for mode in [
        cri::NamespaceMode::Container,
        cri::NamespaceMode::Pod,
        cri::NamespaceMode::Node,
    ] {
        let pod = daemon
            .pod(|c| config::pod_namespaces(c).pid = mode.into())
            .await?;
        let container = pod.run(&["sh", "-c", "trap '' TERM; setsid sleep 2001 & setsid sleep 2002 & echo up; wait; sleep 2003"], |_| {}).await?;
        container.says("up").await?;
        container.stop(1).await?;
        container
            .gone()
            .await
            .with_context(|| format!("{mode:?}"))?;
        let container = pod
            .run(&["sh", "-c", "setsid sleep 2001 & echo up; exit 4"], |_| {})
            .await?;
        assert_eq!(container.exited().await?.exit_code, 4);
        container.remove().await?;
        container
            .gone()
            .await
            .with_context(|| format!("{mode:?}, after process one had ended"))?;
    }
    Ok(())
}

async fn a_frozen_container_stops(env: Env) -> Result<()> {
    not_in_gvisor("its processes are in no cgroup that could be frozen")?;
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let dirs = container.cgroup_dirs();
    let (file, word) = match dirs.iter().find(|d| d.join("freezer.state").exists()) {
        Some(dir) => (dir.join("freezer.state"), "FROZEN"),
        None => match dirs.iter().find(|d| d.join("cgroup.freeze").exists()) {
            Some(dir) => (dir.join("cgroup.freeze"), "1"),
            None => return skip("no freezer among the cgroup controllers"),
        },
    };
    std::fs::write(&file, word)?;
    let stopped = tokio::time::timeout(seconds(40), container.stop(1)).await;
    stopped.context("a frozen container can't be stopped")??;
    assert_eq!(container.status().await?.exit_code, 137);
    Ok(())
}

async fn negative_grace(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = waiter(&daemon, &[], |_| {}).await?;
    // Refused, or taken as none; never a wait without end.
    match tokio::time::timeout(seconds(10), container.stop(-1))
        .await
        .context("waits for ever")?
    {
        Ok(()) => assert_eq!(
            container.status().await?.state(),
            cri::ContainerState::ContainerExited
        ),
        Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{status}"),
    }
    Ok(())
}
