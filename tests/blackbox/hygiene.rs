//! What must not get into a container: descriptors, limits, signals, the daemon's standing.

use crate::harness::*;

tests![
    no_descriptor_leaks,
    standard_streams_belong_to_the_user,
    limits_and_signals_are_clean,
    oom_score_is_as_asked_or_as_near_as_may_be,
    mounts_of_the_host_are_not_seen,
    the_session_is_the_containers,
];

async fn no_descriptor_leaks(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    // With other containers about, whose pipes could be inherited.
    let pod = daemon
        .pod(|c| config::pod_namespaces(c).pid = cri::NamespaceMode::Pod.into())
        .await?;
    let _other = pod.sleeper().await?;
    for (report, who) in pod.probes(|_| {}).await?.iter().zip(["init", "exec"]) {
        let open: Vec<_> = report
            .starting("fd.")
            .iter()
            .map(|(k, _)| (*k).to_owned())
            .collect();
        assert_eq!(
            open,
            ["fd.0", "fd.1", "fd.2"],
            "{who}: {:?}",
            report.starting("fd.")
        );
        for (name, target) in report.starting("fd.") {
            let fine = target.starts_with("pipe:[")
                || target == "/dev/null"
                || target.starts_with("socket:[");
            assert!(fine, "{who}: {name} is {target}");
        }
    }
    // Process 1 of the pod is ours: it must not hold a door to the host either.
    let container = pod.sleeper().await?;
    let text = container
        .exec_output(&[
            "sh",
            "-c",
            "ls -l /proc/1/fd 2>/dev/null | sed -n 's/.* -> //p'",
        ])
        .await?;
    for target in text.lines() {
        let fine = target.starts_with("pipe:[")
            || target == "/dev/null"
            || target.starts_with("socket:[")
            || target.starts_with("anon_inode:");
        assert!(fine, "process 1 holds {target}");
    }
    Ok(())
}

async fn standard_streams_belong_to_the_user(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let script =
        "echo out >/dev/stdout && echo err >/dev/stderr && echo fd >/proc/self/fd/1; echo done";
    let container = pod
        .run(&["sh", "-c", &format!("{script}; exec sleep 1000")], |c| {
            container_security(c).run_as_user = Some(cri::Int64Value { value: 1000 });
        })
        .await?;
    container.says("done").await?;
    assert_eq!(
        container.stdout()?,
        "out\nfd\ndone\n",
        "{}",
        container.stderr()?
    );
    assert_eq!(container.stderr()?, "err\n");
    let exec = container.exec(&["sh", "-c", script]).await?;
    assert_eq!(
        (exec.stdout.as_str(), exec.stderr.as_str(), exec.code),
        ("out\nfd\ndone\n", "err\n", 0)
    );
    Ok(())
}

async fn limits_and_signals_are_clean(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    for (report, who) in daemon
        .pod(|_| {})
        .await?
        .probes(|_| {})
        .await?
        .iter()
        .zip(["init", "exec"])
    {
        assert_eq!(report.get("SigBlk"), "0000000000000000", "{who}");
        assert_eq!(
            report.ignored_signals(),
            0,
            "{who}: {}",
            report.get("SigIgn")
        );
        assert_eq!(report.get("umask"), "0022", "{who}");
        assert!(
            report.numbers("rlimit.nofile")[0] >= 1024,
            "{who}: {}",
            report.get("rlimit.nofile")
        );
    }
    Ok(())
}

async fn oom_score_is_as_asked_or_as_near_as_may_be(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let with = |score: i64| {
        move |c: &mut cri::ContainerConfig| {
            c.linux
                .get_or_insert_default()
                .resources
                .get_or_insert_default()
                .oom_score_adj = score;
        }
    };
    for score in [1000, 500] {
        for (report, who) in pod.probes(with(score)).await?.iter().zip(["init", "exec"]) {
            assert_eq!(report.get("oom_score_adj"), score.to_string(), "{who}");
        }
    }
    // Lower than the daemon's own needs CAP_SYS_RESOURCE; without it the container runs all the same.
    let own: i64 = read("/proc/self/oom_score_adj")?.parse()?;
    let status = read("/proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .context("CapEff")?;
    let may = u64::from_str_radix(effective.trim(), 16)? & 1 << 24 != 0;
    let [init, exec] = pod.probes(with(-998)).await?;
    let expected = if may { -998 } else { own.max(-998) };
    assert_eq!(init.get("oom_score_adj"), expected.to_string());
    assert_eq!(exec.get("oom_score_adj"), expected.to_string());
    Ok(())
}

async fn mounts_of_the_host_are_not_seen(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let other = pod.sleeper().await?;
    let text = pod.output(&["cat", "/proc/self/mountinfo"], |_| {}).await?;
    let points: Vec<&str> = text.lines().filter_map(|l| l.split(' ').nth(4)).collect();
    for point in &points {
        let known = ["/proc", "/sys", "/dev", "/etc/"]
            .iter()
            .any(|p| point.starts_with(p));
        assert!(
            *point == "/" || known,
            "{point} is mounted in the container"
        );
    }
    assert!(
        !text.contains(&other.id),
        "another container's files are mounted: {text}"
    );
    // And the host does not see the container's.
    let here = read("/proc/self/mountinfo")?;
    assert!(
        !here.contains(&other.id),
        "the container's mounts are the host's as well"
    );
    Ok(())
}

async fn the_session_is_the_containers(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon
        .run(&[
            "sh",
            "-c",
            "cut -d' ' -f1,5,6,7 /proc/self/stat; exec sleep 1000",
        ])
        .await?;
    // Session and process group begin in the container, with no terminal.
    let exec = container
        .exec_output(&["sh", "-c", "cut -d' ' -f6,7 /proc/$$/stat; echo $$"])
        .await?;
    let words: Vec<&str> = exec.split_whitespace().collect();
    // crun's is in that of the runtime's own process, which is gone.
    if handler() != "crun" {
        assert_ne!(words[0], "0", "exec is in a session of the host: {exec}");
    }
    assert_eq!(words[1], "0", "exec has a terminal: {exec}");
    Ok(())
}
