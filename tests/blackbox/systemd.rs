//! The systemd cgroup driver: pods are slices, containers scopes, and systemd knows of both. Skipped where
//! systemd is not PID 1 on pure cgroup v2.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid as Number;
use tonic::Code;

use crate::harness::*;

tests![
    containers_are_scopes_in_the_pods_slice,
    limits_are_systemds_too,
    new_limits_are_systemds_too,
    refused_limits_are_not_systemds,
    systemds_own_device_policy_can_not_widen,
    the_driver_is_refused_where_it_can_not_work,
    the_kubelets_slice_stays,
    a_slice_with_prefix_and_name,
    the_other_drivers_form_is_refused,
    slices_are_refused_by_the_cgroupfs_driver,
    what_systemd_took_away_still_tells_of_its_oom_kill,
    an_exec_has_its_leaf,
    what_a_dead_keeper_left_is_stopped,
    a_container_that_can_not_be_made_leaves_no_unit,
    keepers_live_in_a_scope_of_their_own,
    keepers_live_with_their_pod,
];

const SOON: Duration = Duration::from_secs(30);

async fn daemon(env: &Env) -> Result<Daemon> {
    if !stage::systemd() {
        return skip("systemd is not PID 1 on pure cgroup v2 here");
    }
    let daemon = env
        .daemon_with(|s| s.set("cgroup.driver", "\"systemd\""))
        .await?;
    daemon.pull("test").await?;
    Ok(daemon)
}

fn slice(env: &Env, name: &str) -> String {
    format!("sltest{}t{}-{name}.slice", std::process::id(), env.number)
}

/// A pod in this slice.
async fn pod_in(daemon: &Daemon, slice: &str) -> Result<Pod> {
    let parent = slice.to_owned();
    daemon
        .pod(|c| c.linux.get_or_insert_default().cgroup_parent = parent)
        .await
}

/// The directory of a container's cgroup, wherever that is.
fn scope_of(container: &Container) -> Result<PathBuf> {
    stage::tree(Path::new("/sys/fs/cgroup"))
        .into_iter()
        .find(|d| {
            d.to_string_lossy()
                .ends_with(&format!("{}.scope", container.id))
        })
        .context("no scope of the container's name")
}

fn first_process(container: &Container) -> Result<Number> {
    let pids = read(scope_of(container)?.join("cgroup.procs"))?;
    let pid = pids.lines().next().context("nobody in the scope")?;
    Ok(Number::from_raw(pid.parse()?))
}

async fn show(unit: &str, property: &str) -> Result<String> {
    let text = systemctl(&["show", unit, "-P", property]).await?;
    Ok(text.trim().to_owned())
}

async fn gone(dir: &Path) -> Result<()> {
    let what = format!("the end of {}", dir.display());
    eventually(&what, SOON, || async { Ok((!dir.exists()).then_some(())) }).await
}

async fn containers_are_scopes_in_the_pods_slice(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let config = daemon
        .runtime()
        .runtime_config(cri::RuntimeConfigRequest {})
        .await?
        .into_inner();
    assert_eq!(
        config.linux.context("linux")?.cgroup_driver(),
        cri::CgroupDriver::Systemd
    );
    let pod = pod_in(&daemon, "").await?;
    let slice = format!("slipway-{}.slice", pod.id);
    let slice_dir = dir(&format!("/slipway.slice/{slice}"));
    assert!(slice_dir.is_dir(), "the slice is there with the pod");
    let container = pod.sleeper().await?;
    let unit = format!("slipway-{}.scope", container.id);
    let scope = scope_of(&container)?;
    assert_eq!(scope, slice_dir.join(&unit));
    let procs = read(scope.join("cgroup.procs"))?;
    assert!(!procs.is_empty(), "nobody is in the scope");
    for (property, value) in [
        ("ActiveState", "active"),
        ("Delegate", "yes"),
        ("Slice", slice.as_str()),
        ("CollectMode", "inactive-or-failed"),
        ("TasksMax", "infinity"),
    ] {
        assert_eq!(show(&unit, property).await?, value, "{property}");
    }
    // No process in an inner node.
    assert_eq!(read(slice_dir.join("cgroup.procs"))?, "");
    container.stop(0).await?;
    gone(&scope).await?;
    container.remove().await?;
    pod.stop().await?;
    gone(&slice_dir).await?;
    pod.remove().await?;
    for unit in [&unit, &slice] {
        assert_ne!(show(unit, "ActiveState").await?, "active", "{unit}");
    }
    Ok(())
}

async fn limits_are_systemds_too(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod_in(&daemon, &slice(&env, "pod")).await?;
    let container = pod
        .create(&["sleep", "1000"], |c| {
            let linux = c.linux.get_or_insert_default();
            let resources = linux.resources.get_or_insert_default();
            resources.memory_limit_in_bytes = 64 << 20;
            resources.cpu_shares = 1024;
            // Whole per cent of a CPU: finer ones systemd cannot keep.
            resources.cpu_quota = 13_000;
            resources.cpu_period = 100_000;
            resources.cpuset_cpus = "0".into();
            let high = ("memory.high".to_owned(), "50331648".to_owned());
            resources.unified.extend([high]);
        })
        .await?;
    container.start().await?;
    let scope = scope_of(&container)?;
    let unit = format!("slipway-{}.scope", container.id);
    for (property, value) in [
        ("MemoryMax", "67108864"),
        ("MemoryHigh", "50331648"),
        ("CPUWeight", "100"),
        ("CPUQuotaPeriodUSec", "100ms"),
        ("AllowedCPUs", "0"),
    ] {
        assert_eq!(show(&unit, property).await?, value, "{property}");
    }
    let stand = || -> Result<()> {
        for (file, value) in [
            ("memory.max", "67108864"),
            ("memory.high", "50331648"),
            ("cpu.weight", "100"),
            ("cpu.max", "13000 100000"),
            ("cpuset.cpus", "0"),
            ("pids.max", "max"),
        ] {
            assert_eq!(read(scope.join(file))?, value, "{file}");
        }
        Ok(())
    };
    stand()?;
    // The device filter is ours, and systemd does not put its own in its place.
    let exec = container.exec(&["sh", "-c", "echo >/dev/null"]).await?;
    assert_eq!(exec.code, 0, "{exec:?}");
    systemctl(&["daemon-reload"]).await?;
    systemctl(&[
        "set-property",
        "--runtime",
        &slice(&env, "pod"),
        "MemoryMax=1G",
    ])
    .await?;
    stand()?;
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

fn in_force(scope: &Path, files: &[(&str, &str)]) -> Result<()> {
    for (file, value) in files {
        assert_eq!(read(scope.join(file))?, *value, "{file}");
    }
    Ok(())
}

async fn new_limits_are_systemds_too(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod_in(&daemon, &slice(&env, "resized")).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            let linux = c.linux.get_or_insert_default();
            let resources = linux.resources.get_or_insert_default();
            resources.memory_limit_in_bytes = 64 << 20;
            resources.cpu_quota = 10_000;
            resources.cpu_period = 100_000;
        })
        .await?;
    let (scope, unit) = (
        scope_of(&container)?,
        format!("slipway-{}.scope", container.id),
    );
    let change = cri::LinuxContainerResources {
        memory_limit_in_bytes: 128 << 20,
        cpu_shares: 512,
        cpu_quota: 12_345,
        cpuset_cpus: "0".into(),
        unified: [
            ("memory.high".to_owned(), "96M".to_owned()),
            ("pids.max".to_owned(), "77".to_owned()),
        ]
        .into(),
        ..Default::default()
    };
    container.update(change).await?;
    let new = [
        ("memory.max", "134217728"),
        ("memory.high", "100663296"),
        ("cpu.weight", "59"),
        ("cpuset.cpus", "0"),
        ("pids.max", "77"),
    ];
    in_force(&scope, &new)?;
    // Exactly what was asked for, although systemd counts in per cent of a CPU.
    in_force(&scope, &[("cpu.max", "12345 100000")])?;
    for (property, value) in [
        ("MemoryMax", "134217728"),
        ("MemoryHigh", "100663296"),
        ("CPUWeight", "59"),
        ("CPUQuotaPerSecUSec", "130ms"),
        ("AllowedCPUs", "0"),
        ("TasksMax", "77"),
    ] {
        assert_eq!(show(&unit, property).await?, value, "{property}");
    }
    let forbidden = async || -> Result<String> {
        let exec = container.exec(&["probe", "writable", "/tmp/kmsg"]).await?;
        Ok(exec.stdout.trim_end().to_owned())
    };
    let node = ["mknod", "/tmp/kmsg", "c", "1", "11"];
    container.exec_output(&node).await?;
    assert_eq!(forbidden().await?, "/tmp/kmsg EPERM");
    // Whatever makes systemd write its own idea of the unit: its files read anew, and a change of the slice.
    systemctl(&["daemon-reload"]).await?;
    let resized = slice(&env, "resized");
    systemctl(&[
        "set-property",
        "--runtime",
        &resized,
        "MemoryMax=1G",
        "CPUWeight=77",
    ])
    .await?;
    in_force(&scope, &new)?;
    // And a change of another limit of this unit makes it write all of them.
    systemctl(&[
        "set-property",
        "--runtime",
        &unit,
        "MemoryLow=1M",
        "CPUWeight=60",
    ])
    .await?;
    in_force(&scope, &new[..2])?;
    in_force(&scope, &[("cpu.max", "13000 100000"), ("cpu.weight", "60")])?;
    assert_eq!(
        forbidden().await?,
        "/tmp/kmsg EPERM",
        "the device filter stays"
    );
    // Down, and without a limit.
    let change = cri::LinuxContainerResources {
        memory_limit_in_bytes: 48 << 20,
        cpu_quota: -1,
        unified: [("memory.high".to_owned(), "max".to_owned())].into(),
        ..Default::default()
    };
    container.update(change).await?;
    systemctl(&["daemon-reload"]).await?;
    in_force(
        &scope,
        &[
            ("memory.max", "50331648"),
            ("memory.high", "max"),
            ("cpu.max", "max 100000"),
        ],
    )?;
    for (property, value) in [
        ("MemoryMax", "50331648"),
        ("MemoryHigh", "infinity"),
        ("CPUQuotaPerSecUSec", "infinity"),
    ] {
        assert_eq!(show(&unit, property).await?, value, "{property}");
    }
    // What systemd was told is gone with the scope.
    pod.stop().await?;
    pod.remove().await?;
    let left = format!("/run/systemd/transient/{unit}.d");
    assert!(!Path::new(&left).exists(), "{left}");
    let left = format!("/run/systemd/system.control/{unit}.d");
    assert!(!Path::new(&left).exists(), "{left}");
    Ok(())
}

async fn refused_limits_are_not_systemds(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod_in(&daemon, &slice(&env, "firm")).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            let linux = c.linux.get_or_insert_default();
            let resources = linux.resources.get_or_insert_default();
            resources.memory_limit_in_bytes = 64 << 20;
        })
        .await?;
    let (scope, unit) = (
        scope_of(&container)?,
        format!("slipway-{}.scope", container.id),
    );
    let change = cri::LinuxContainerResources {
        memory_limit_in_bytes: 128 << 20,
        cpuset_cpus: "4000".into(),
        ..Default::default()
    };
    refused(
        container.update(change).await,
        Code::InvalidArgument,
        &["cpuset.cpus"],
    );
    in_force(&scope, &[("memory.max", "67108864"), ("cpuset.cpus", "")])?;
    assert_eq!(show(&unit, "MemoryMax").await?, "67108864");
    assert_eq!(show(&unit, "AllowedCPUs").await?, "");
    Ok(())
}

/// systemd has no opinion on a container's devices; where an administrator gives it one, that counts beside
/// Slipway's filter and never in its place.
async fn systemds_own_device_policy_can_not_widen(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod_in(&daemon, &slice(&env, "devices")).await?;
    let container = pod.sleeper().await?;
    let unit = format!("slipway-{}.scope", container.id);
    let policy = async || show(&unit, "DevicePolicy").await;
    let node = ["mknod", "/tmp/kmsg", "c", "1", "11"];
    container.exec_output(&node).await?;
    let found = async || -> Result<String> {
        let nodes = ["probe", "writable", "/tmp/kmsg", "/dev/null"];
        Ok(container.exec(&nodes).await?.stdout)
    };
    let ours = "/tmp/kmsg EPERM\n/dev/null OK\n";
    assert_eq!(found().await?, ours);
    assert_eq!(policy().await?, "auto");
    assert_eq!(show(&unit, "DeviceAllow").await?, "");
    let set = async |properties: &[&str]| -> Result<String> {
        systemctl(&[&["set-property", "--runtime", &unit], properties].concat()).await
    };
    set(&["DeviceAllow=/dev/kmsg rw", "DeviceAllow=/dev/null rw"]).await?;
    assert_eq!(found().await?, ours, "systemd allows what Slipway does not");
    systemctl(&["daemon-reload"]).await?;
    assert_eq!(found().await?, ours);
    let change = cri::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    };
    container.update(change).await?;
    assert_eq!(found().await?, ours);
    assert_eq!(policy().await?, "auto");
    // The last thing: systemd 252 does not give back what it took away.
    set(&["DeviceAllow=", "DevicePolicy=strict"]).await?;
    let narrow = "/tmp/kmsg EPERM\n/dev/null EPERM\n";
    assert_eq!(found().await?, narrow, "both are asked");
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

async fn the_driver_is_refused_where_it_can_not_work(env: Env) -> Result<()> {
    let words = match (stage::unified(), stage::systemd()) {
        (true, true) => return skip("it works here"),
        (false, _) => ["cgroup.driver", "pure cgroup v2"],
        (true, false) => ["cgroup.driver", "systemd as PID 1"],
    };
    let started = env
        .daemon_with(|s| s.set("cgroup.driver", "\"systemd\""))
        .await;
    let error = match started {
        Ok(_) => bail!("the daemon starts"),
        Err(error) => format!("{error:#}"),
    };
    for word in words {
        assert!(error.contains(word), "no {word} in: {error}");
    }
    // And the preflight says so before.
    let setup = env.root.join("config.toml").display().to_string();
    let check = tokio::process::Command::new(daemon::BINARY.as_str())
        .args(["check", "-o", "json", "--config", &setup])
        .output()
        .await?;
    let report: serde_json::Value = serde_json::from_slice(&check.stdout)?;
    let findings = report["findings"].as_array().context("findings")?;
    let finding = findings.iter().find(|f| f["id"] == "cgroup-driver");
    assert_eq!(
        finding.context("no such finding")?["status"],
        "fail",
        "{report}"
    );
    Ok(())
}

async fn the_kubelets_slice_stays(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let slice = slice(&env, "kubelet");
    systemctl(&["start", &slice]).await?;
    let pod = pod_in(&daemon, &slice).await?;
    let container = pod.sleeper().await?;
    let scope = scope_of(&container)?;
    assert_eq!(show(&slice, "ControlGroup").await?, {
        let parent = scope.parent().context("a parent")?;
        format!("/{}", parent.strip_prefix("/sys/fs/cgroup")?.display())
    });
    pod.stop().await?;
    pod.remove().await?;
    gone(&scope).await?;
    assert_eq!(show(&slice, "ActiveState").await?, "active");
    systemctl(&["stop", &slice]).await?;
    Ok(())
}

async fn a_slice_with_prefix_and_name(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let slice = slice(&env, "three");
    let pod = pod_in(&daemon, &format!("{slice}:pre:name")).await?;
    let container = pod.sleeper().await?;
    let unit = format!("pre-name-{}.scope", container.id);
    assert_eq!(show(&unit, "Slice").await?, slice);
    pod.stop().await?;
    pod.remove().await?;
    assert_ne!(show(&unit, "ActiveState").await?, "active");
    Ok(())
}

async fn the_other_drivers_form_is_refused(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    for parent in ["/kubepods/burstable/podX", "/"] {
        let mut config = config::pod(&daemon);
        config.linux.get_or_insert_default().cgroup_parent = parent.into();
        let names = [parent, "cgroupDriver to systemd"];
        refused(
            daemon.run_pod(config).await.map(|p| p.id),
            Code::FailedPrecondition,
            &names,
        );
    }
    assert!(!dir("/kubepods").exists());
    Ok(())
}

async fn slices_are_refused_by_the_cgroupfs_driver(env: Env) -> Result<()> {
    if !stage::systemd() {
        return skip("systemd is not PID 1 on pure cgroup v2 here");
    }
    let daemon = env
        .daemon_with(|s| s.set("cgroup.driver", "\"cgroupfs\""))
        .await?;
    let mut config = config::pod(&daemon);
    config.linux.get_or_insert_default().cgroup_parent = slice(&env, "other");
    refused(
        daemon.run_pod(config).await.map(|p| p.id),
        Code::FailedPrecondition,
        &["cgroupDriver to cgroupfs"],
    );
    Ok(())
}

async fn what_systemd_took_away_still_tells_of_its_oom_kill(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod_in(&daemon, &slice(&env, "oom")).await?;
    // Three times: it is a race who looks first.
    for _ in 0..3 {
        let container = pod
            .create(&["probe", "eat", "200"], |c| {
                let linux = c.linux.get_or_insert_default();
                linux
                    .resources
                    .get_or_insert_default()
                    .memory_limit_in_bytes = 20 << 20;
            })
            .await?;
        container.start().await?;
        let status = container.exited().await?;
        let found = (status.exit_code, status.reason.as_str());
        assert_eq!(found, (137, "OOMKilled"));
        let other = pod.sleeper().await?;
        other.stop(0).await?;
        assert_eq!(other.status().await?.reason, "Error");
    }
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

async fn an_exec_has_its_leaf(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod_in(&daemon, &slice(&env, "exec")).await?;
    let container = pod.sleeper().await?;
    let exec = container.exec_output(&["cat", "/proc/self/cgroup"]).await?;
    assert!(exec.contains("0::/exec-"), "{exec}");
    let scope = scope_of(&container)?;
    assert_eq!(read(scope.join("cgroup.subtree_control"))?, "");
    assert_eq!(stage::tree(&scope).len(), 1, "the leaf is gone");
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

async fn what_a_dead_keeper_left_is_stopped(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let slice = slice(&env, "dead");
    let pod = pod_in(&daemon, &slice).await?;
    let container = pod.sleeper().await?;
    let (scope, (keeper, _)) = (scope_of(&container)?, keeper(&container)?);
    kill(Number::from_raw(keeper), Signal::SIGKILL)?;
    container.exited().await?;
    gone(&scope).await?;
    pod.stop().await?;
    pod.remove().await?;
    for unit in [format!("slipway-{}.scope", container.id), slice] {
        assert_ne!(show(&unit, "ActiveState").await?, "active", "{unit}");
    }
    Ok(())
}

async fn a_container_that_can_not_be_made_leaves_no_unit(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let slice = slice(&env, "bad");
    let pod = pod_in(&daemon, &slice).await?;
    let made = pod
        .try_create(|c| {
            let linux = c.linux.get_or_insert_default();
            let resources = linux.resources.get_or_insert_default();
            resources
                .unified
                .extend([("memory.high".to_owned(), "nonsense".to_owned())]);
        })
        .await;
    refused(made, Code::InvalidArgument, &["memory.high"]);
    let path = show(&slice, "ControlGroup").await?;
    let left = stage::tree(&dir(&path));
    assert_eq!(left, [dir(&path)], "only the slice itself");
    pod.stop().await?;
    pod.remove().await?;
    gone(&dir(&path)).await
}

/// The keeper of a container's pod, and its cgroup.
fn keeper(container: &Container) -> Result<(i32, String)> {
    let init = first_process(container)?;
    objects::keeper_of(init.as_raw())
}

async fn keepers_live_in_a_scope_of_their_own(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod_in(&daemon, &slice(&env, "own")).await?;
    let container = pod.sleeper().await?;
    let (pid, cgroup) = keeper(&container)?;
    assert_eq!(cgroup, "/system.slice/slipway-keepers.scope");
    assert_eq!(read(format!("/proc/{pid}/oom_score_adj"))?, "-999");
    // Another daemon finds the scope, and moves nobody.
    daemon.end().await?;
    daemon.launch().await?;
    assert_eq!(keeper(&container)?, (pid, cgroup.clone()));
    let second = pod_in(&daemon, &slice(&env, "own2")).await?;
    assert_eq!(keeper(&second.sleeper().await?)?.1, cgroup);
    for pod in [pod, second] {
        pod.stop().await?;
        pod.remove().await?;
    }
    Ok(())
}

async fn keepers_live_with_their_pod(env: Env) -> Result<()> {
    if !stage::systemd() {
        return skip("systemd is not PID 1 on pure cgroup v2 here");
    }
    let daemon = env
        .daemon_with(|s| {
            s.set("cgroup.driver", "\"systemd\"");
            s.set("cgroup.monitor", "\"pod\"");
        })
        .await?;
    daemon.pull("test").await?;
    let name = slice(&env, "with");
    let pod = pod_in(&daemon, &name).await?;
    let container = pod.sleeper().await?;
    let path = show(&name, "ControlGroup").await?;
    let (pid, cgroup) = keeper(&container)?;
    assert_eq!(cgroup, format!("{path}/slipway-keeper-{}.scope", pod.id));
    assert_eq!(read(format!("/proc/{pid}/oom_score_adj"))?, "-999");
    pod.stop().await?;
    gone(&dir(&path)).await?;
    pod.remove().await?;
    Ok(())
}
