//! A container's states, exit codes, reasons and times.

use tonic::Code;

use crate::harness::*;

tests![
    from_created_to_removed,
    exit_codes_and_reasons,
    ended_by_a_signal,
    commands_that_cannot_run,
    a_started_container_does_not_start_again,
    a_removed_container_is_gone,
    files_of_a_container_go_with_it,
    a_hundred_containers_come_and_go,
];

async fn from_created_to_removed(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .create(&["sh", "-c", "echo ran; exit 0"], |_| {})
        .await?;
    assert_eq!(
        container.status().await?.state(),
        cri::ContainerState::ContainerCreated
    );
    assert_eq!(
        container.lines()?,
        [],
        "it must not run before StartContainer"
    );
    container.start().await?;
    let status = container.exited().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    assert!(
        status.created_at > 0
            && status.started_at >= status.created_at
            && status.finished_at >= status.started_at
    );
    assert_eq!(container.stdout()?, "ran\n");
    container.remove().await?;
    refused(container.status().await, Code::NotFound, &[&container.id]);
    assert!(container.log.exists(), "the log is the kubelet's");
    Ok(())
}

async fn exit_codes_and_reasons(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    for (code, reason) in [
        (0, "Completed"),
        (1, "Error"),
        (42, "Error"),
        (127, "Error"),
        (255, "Error"),
    ] {
        let container = pod
            .run(&["probe", "exit", &code.to_string()], |_| {})
            .await?;
        let status = container.exited().await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason));
    }
    Ok(())
}

async fn ended_by_a_signal(env: Env) -> Result<()> {
    not_in_gvisor("the host does not see its processes, and so sends them no signals")?;
    let daemon = env.daemon().await?;
    // Process 1 of a PID namespace only dies of a signal from outside.
    let container = daemon.run(&["sleep", "1000"]).await?;
    let pid = container.pid()?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    let status = container.exited().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    Ok(())
}

async fn commands_that_cannot_run(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let cases: &[(&str, &[i32])] = &[
        ("/no/such/program", &[127, 128]),
        ("no-such-program", &[127, 128]),
        ("/bin/not-executable", &[126]),
        ("/bin/bad-format", &[126]),
        ("/bin/bad-interpreter", &[126, 127, 128]),
        ("/etc", &[126]),
        ("/bin/loop", &[126, 127, 128]),
    ];
    // What only the kernel can refuse, others than we find when the container is started already.
    let by_kernel = |command: &str| command.starts_with("/bin/bad-");
    let cases = cases
        .iter()
        .filter(|(c, _)| handler() == "native" || !by_kernel(c));
    for (command, codes) in cases {
        let container = pod.create(&[command], |_| {}).await?;
        let status = container.start().await.expect_err(command);
        assert!(status.message().contains(command), "{status}");
        let status = container.status().await?;
        assert_eq!(
            status.state(),
            cri::ContainerState::ContainerExited,
            "{command}"
        );
        assert!(
            codes.contains(&status.exit_code),
            "{command}: exit code {}",
            status.exit_code
        );
        assert_eq!(status.reason, "ContainerCannotRun", "{command}");
        assert!(
            status.message.contains(command),
            "{command}: {}",
            status.message
        );
        assert!(status.finished_at > 0);
        container.remove().await?;
    }
    if ["crun", "youki"].contains(&handler()) {
        // crun looks with root's privileges, and the kernel without: when the container is started already. youki looks for
        // a mode that lets everybody execute it, and refuses what only root may.
        return Ok(());
    }
    // root's own program may be run by root only.
    let container = pod.run(&["probe-root", "exit", "5"], |_| {}).await?;
    assert_eq!(container.exited().await?.exit_code, 5);
    let container = pod
        .create(&["/bin/probe-root"], |c| {
            let security = container_security(c);
            security.run_as_user = Some(cri::Int64Value { value: 1000 });
            // CAP_DAC_OVERRIDE would let it, until the execve itself takes it away.
            security.capabilities = Some(cri::Capability {
                drop_capabilities: vec!["ALL".into()],
                ..Default::default()
            });
        })
        .await?;
    container
        .start()
        .await
        .expect_err("a program of root's, run by another");
    assert_eq!(container.status().await?.exit_code, 126);
    Ok(())
}

async fn a_started_container_does_not_start_again(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    refused(
        container.start().await,
        Code::FailedPrecondition,
        &[&container.id[..8]],
    );
    container.stop(0).await?;
    refused(
        container.start().await,
        Code::FailedPrecondition,
        &[&container.id[..8]],
    );
    Ok(())
}

async fn a_removed_container_is_gone(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    let pid = container.pid()?;
    container.remove().await?;
    assert!(
        !std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "removed by force, it still runs"
    );
    refused(container.start().await, Code::NotFound, &[&container.id]);
    refused(
        container.exec_limited(&["true"], 1).await,
        Code::NotFound,
        &[&container.id],
    );
    refused(
        container.reopen_log().await,
        Code::NotFound,
        &[&container.id],
    );
    eventually("the cgroup's end", seconds(5), || async {
        Ok(container.cgroup_dirs().is_empty().then_some(()))
    })
    .await
}

async fn files_of_a_container_go_with_it(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(
            &[
                "sh",
                "-c",
                "mkdir -p /a/b && echo x >/a/b/c && chmod 0 /a && sleep 1000",
            ],
            |_| {},
        )
        .await?;
    let dir = env.root.join("state/containers").join(&container.id);
    assert!(dir.is_dir(), "{}", dir.display());
    container.remove().await?;
    eventually("the end of its files", seconds(5), || async {
        Ok((!dir.exists()).then_some(()))
    })
    .await
}

async fn a_hundred_containers_come_and_go(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..100 {
        let pod = pod.clone();
        tasks.spawn(async move {
            let container = pod
                .run(&["probe", "exit", &(n % 7).to_string()], |_| {})
                .await?;
            let status = container.exited().await?;
            ensure!(status.exit_code == n % 7, "{n}: {}", status.exit_code);
            container.remove().await?;
            Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    let all = daemon
        .runtime()
        .list_containers(cri::ListContainersRequest::default())
        .await?
        .into_inner();
    assert_eq!(all.containers, []);
    Ok(())
}
