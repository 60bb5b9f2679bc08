//! The command line and the daemon's own behaviour.

use nix::sys::signal::Signal;

use crate::harness::*;

tests![
    run_prints_and_returns_the_code,
    run_removes_its_pod,
    lists_read_like_crictls,
    reload_applies_what_can_change,
    a_bad_reload_changes_nothing,
    bad_configurations_stop_the_start,
    check_speaks_json,
    the_log_can_be_json,
    config_and_version,
];

async fn run_prints_and_returns_the_code(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let logs = env.dir("run-logs")?.display().to_string();
    let name = image("test");
    let args = [
        "run",
        "--host-network",
        "--log-dir",
        &logs,
        &name,
        "sh",
        "-c",
        "echo out; echo err >&2; exit 5",
    ];
    let (code, out, err) = daemon.command(&args).await?;
    assert_eq!((code, out.as_str()), (5, "out\n"), "{err}");
    assert!(err.contains("err\n"), "{err}");
    Ok(())
}

async fn run_removes_its_pod(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let logs = env.dir("run-logs")?.display().to_string();
    let name = image("test");
    let (code, _, err) = daemon
        .command(&["run", "--timings", "--log-dir", &logs, &name, "true"])
        .await?;
    assert_eq!(code, 0, "{err}");
    let (code, _, err) = daemon
        .command(&["run", "--log-dir", &logs, &name, "/no/such/program"])
        .await?;
    assert_ne!(code, 0);
    assert!(err.contains("/no/such/program"), "{err}");
    let pods = daemon
        .runtime()
        .list_pod_sandbox(cri::ListPodSandboxRequest::default())
        .await?
        .into_inner()
        .items;
    assert_eq!(pods, []);
    Ok(())
}

async fn lists_read_like_crictls(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon
        .run(&["sh", "-c", "echo a line; exec sleep 1000"])
        .await?;
    container.says("a line").await?;
    let (code, out, err) = daemon.command(&["ps"]).await?;
    assert_eq!(code, 0, "{err}");
    assert!(
        out.starts_with("CONTAINER") && out.contains(&container.id[..13]),
        "{out}"
    );
    let (_, out, _) = daemon.command(&["pods"]).await?;
    assert!(out.starts_with("POD ID") && out.contains("Ready"), "{out}");
    let (_, out, _) = daemon.command(&["images"]).await?;
    assert!(
        out.starts_with("IMAGE") && out.contains("slipway/test"),
        "{out}"
    );
    let (code, out, err) = daemon.command(&["logs", &container.id[..12]]).await?;
    assert_eq!((code, out.as_str()), (0, "a line\n"), "{err}");
    let (code, out, err) = daemon
        .command(&["exec", &container.id[..12], "sh", "-c", "echo in; exit 4"])
        .await?;
    assert_eq!((code, out.as_str()), (4, "in\n"), "{err}");
    let (code, out, err) = daemon.command(&["ps", "-o", "json"]).await?;
    assert_eq!(code, 0, "{err}");
    let value: serde_json::Value = serde_json::from_str(&out)?;
    assert_eq!(value["containers"][0]["id"], container.id);
    let (code, out, err) = daemon.command(&["inspect", &container.id[..12]]).await?;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains(&container.id), "{out}");
    let (code, _, err) = daemon
        .command(&["stop", "--timeout", "0", &container.id[..12]])
        .await?;
    if code != 0 {
        // The flag's name may be another; the command itself must work.
        let (code, _, more) = daemon.command(&["stop", &container.id[..12]]).await?;
        assert_eq!(code, 0, "{err}{more}");
    }
    assert_eq!(
        container.status().await?.state(),
        cri::ContainerState::ContainerExited
    );
    let (code, _, err) = daemon.command(&["rm", &container.id[..12]]).await?;
    assert_eq!(code, 0, "{err}");
    assert!(container.status().await.is_err());
    Ok(())
}

fn edit(env: &Env, from: &str, to: &str) -> Result<()> {
    let path = env.root.join("config.toml");
    let text = std::fs::read_to_string(&path)?;
    ensure!(text.contains(from), "{from} is not in {text}");
    std::fs::write(path, text.replace(from, to))?;
    Ok(())
}

async fn reload_applies_what_can_change(env: Env) -> Result<()> {
    let daemon = env.daemon_with(|s| s.set("pod.pids_limit", "50")).await?;
    daemon.pull("test").await?;
    let pod = daemon.pod(|_| {}).await?;
    assert_eq!(pod.sleeper().await?.cgroup_file("pids.max")?, "50");
    edit(&env, "pod.pids_limit = 50", "pod.pids_limit = 60")?;
    let skip = std::fs::metadata(daemon.log_file())?.len();
    daemon.signal(Signal::SIGHUP)?;
    daemon
        .logged(usize::try_from(skip)?, &["pod.pids_limit"])
        .await?;
    let after = eventually("the new limit", seconds(10), || async {
        let limit = pod.sleeper().await?.cgroup_file("pids.max")?;
        Ok((limit != "50").then_some(limit))
    })
    .await?;
    assert_eq!(after, "60");
    Ok(())
}

async fn a_bad_reload_changes_nothing(env: Env) -> Result<()> {
    let daemon = env.daemon_with(|s| s.set("pod.pids_limit", "50")).await?;
    daemon.pull("test").await?;
    edit(&env, "pod.pids_limit = 50", "pod.pids_limit = \"many\"")?;
    let skip = std::fs::metadata(daemon.log_file())?.len();
    daemon.signal(Signal::SIGHUP)?;
    daemon
        .logged(usize::try_from(skip)?, &["pids_limit", "config.toml"])
        .await?;
    assert_eq!(
        daemon
            .pod(|_| {})
            .await?
            .sleeper()
            .await?
            .cgroup_file("pids.max")?,
        "50"
    );
    Ok(())
}

async fn bad_configurations_stop_the_start(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let path = env.root.join("bad.toml");
    for (text, names) in [
        ("listne = \"/x\"", "listne"),
        ("[log]\nlevel = \"loud\"", "level"),
        ("= =", "bad.toml"),
    ] {
        std::fs::write(&path, text)?;
        let config = path.display().to_string();
        for command in [
            &["serve", "--config", config.as_str()][..],
            &["config", "check", "--config", config.as_str()],
        ] {
            let (code, out, err) = daemon.command(command).await?;
            assert_ne!(code, 0, "{command:?}: {out}");
            assert!(
                format!("{out}{err}").contains(names),
                "{command:?}: {out}{err}"
            );
        }
    }
    Ok(())
}

async fn check_speaks_json(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let config = env.root.join("config.toml").display().to_string();
    let (_, out, err) = daemon
        .command(&["check", "--config", &config, "--output", "json"])
        .await?;
    let value: serde_json::Value =
        serde_json::from_str(&out).with_context(|| format!("{out}{err}"))?;
    assert!(value.is_object() || value.is_array());
    let (_, out, err) = daemon.command(&["check", "--config", &config]).await?;
    for word in ["overlay", "cgroup"] {
        assert!(
            out.to_lowercase().contains(word),
            "{word} is not in {out}{err}"
        );
    }
    Ok(())
}

async fn the_log_can_be_json(env: Env) -> Result<()> {
    let daemon = env.daemon_with(|s| s.set("log.format", "\"json\"")).await?;
    daemon.pull("test").await?;
    let container = daemon.run(&["true"]).await?;
    container.exited().await?;
    daemon.logged(0, &[&container.id]).await?;
    let text = std::fs::read_to_string(daemon.log_file())?;
    for line in text.lines() {
        serde_json::from_str::<serde_json::Value>(line).with_context(|| line.to_owned())?;
    }
    Ok(())
}

async fn config_and_version(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let (code, out, _) = daemon.command(&["config", "default"]).await?;
    assert_eq!(code, 0);
    assert!(out.contains("run_root"), "{out}");
    let (code, out, _) = daemon.command(&["version"]).await?;
    assert_eq!(code, 0);
    assert!(out.contains(env!("CARGO_PKG_VERSION")), "{out}");
    Ok(())
}
