//! Pods whose containers a shim of containerd's protocol makes: `containerd-shim-runc-v2`, which others wrote, and programs
//! that only pretend to be one.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::*;

tests![
    everything_of_a_container,
    commands_that_cannot_run,
    containers_of_a_pod_share_one_shim,
    a_restart_of_the_daemon,
    a_shim_that_is_killed,
    a_shim_that_stops_answering,
    a_keeper_that_is_killed,
    programs_that_are_no_shims,
    options_of_a_shim,
    a_shim_with_the_sandbox_api,
    user_namespaces_are_refused_by_name,
    checkpoints_are_refused_by_name,
];

const HANDLER: &str = "shim-runc";
const PROGRAM: &str = "/usr/bin/containerd-shim-runc-v2";

fn describe(setup: &mut Setup, name: &str, path: &str) {
    setup.set(&format!("runtimes.{name}.type"), "\"shim-v2\"");
    setup.set(&format!("runtimes.{name}.path"), &format!("{path:?}"));
}

fn needs_the_shim() -> Result<()> {
    if stage::systemd() {
        return skip(stage::NO_PROCESS_IDS);
    }
    let runc = ["/usr/sbin/runc", "/usr/bin/runc"];
    if !Path::new(PROGRAM).exists() || !runc.iter().any(|p| Path::new(p).exists()) {
        return skip(format!("needs {PROGRAM} and runc"));
    }
    Ok(())
}

async fn daemon(env: &Env) -> Result<Daemon> {
    needs_the_shim()?;
    let daemon = env
        .daemon_with(|s| describe(s, HANDLER, "io.containerd.runc.v2"))
        .await?;
    daemon.pull("test").await?;
    Ok(daemon)
}

/// Process ids of the shims that serve a pod.
fn shims(pod: &Pod) -> Vec<i32> {
    let found = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = found.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    ids.filter(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command.split(|b| *b == 0);
        let shim = words
            .next()
            .is_some_and(|w| w.ends_with(b"containerd-shim-runc-v2"));
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        shim && words.any(|w| w == pod.id.as_bytes()) && !state.contains(") Z ")
    })
    .collect()
}

fn only_shim(pod: &Pod) -> Result<i32> {
    match shims(pod).as_slice() {
        [one] => Ok(*one),
        others => bail!("the pod has shims {others:?}"),
    }
}

/// Nothing of a pod is left: no shim, no process, no socket. (The runner looks for the rest.)
async fn nothing_left(pod: &Pod, containers: &[&Container]) -> Result<()> {
    eventually("the end of the shim", seconds(10), || async {
        Ok(shims(pod).is_empty().then_some(()))
    })
    .await?;
    for container in containers {
        container.gone().await?;
    }
    Ok(())
}

async fn everything_of_a_container(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod_under(HANDLER).await?;
    assert_eq!(pod.status().await?.runtime_handler, HANDLER);
    let script = "echo out; echo err >&2; exec sleep 1000";
    let container = pod
        .run(&["sh", "-c", script], |c| {
            let linux = c.linux.get_or_insert_default();
            linux
                .resources
                .get_or_insert_default()
                .memory_limit_in_bytes = 64 << 20;
            c.working_dir = "/made/for/it".into();
            container_security(c).run_as_user = Some(cri::Int64Value { value: 1000 });
        })
        .await?;
    container.says("out").await?;
    assert_eq!(container.stderr()?, "err\n");
    assert_eq!(container.exec_output(&["pwd"]).await?, "/made/for/it");
    assert_eq!(container.exec_output(&["id", "-u"]).await?, "1000");
    let exec = container
        .exec(&["sh", "-c", "echo o; echo e >&2; exit 9"])
        .await?;
    assert_eq!(
        (exec.stdout.as_str(), exec.stderr.as_str(), exec.code),
        ("o\n", "e\n", 9)
    );
    // Much output, and none of it lost.
    let exec = container
        .exec(&["sh", "-c", "seq 1 100000 | md5sum; seq 1 100000"])
        .await?;
    let (sum, text) = exec.stdout.split_once('\n').context("two parts")?;
    assert_eq!(text.lines().count(), 100_000);
    assert!(text.ends_with("100000\n") && sum.len() > 32);
    // What it has started ends with it.
    let began = Instant::now();
    let late = container
        .exec_limited(&["sh", "-c", "sleep 1234 & sleep 1234"], 1)
        .await;
    let late = late.err().context("an exec outlived its limit")?;
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    assert!(began.elapsed() < seconds(10), "{:?}", began.elapsed());
    eventually("the end of what it started", seconds(5), || async {
        let processes = container.exec_output(&["ps"]).await?;
        Ok((!processes.contains("sleep 1234")).then_some(()))
    })
    .await?;
    let update = cri::LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        ..Default::default()
    };
    container.update(update).await?;
    let file = match stage::unified() {
        true => "memory.max",
        false => "memory.limit_in_bytes",
    };
    assert_eq!(container.cgroup_file(file)?, (96 << 20).to_string());
    container.stop(1).await?;
    let status = container.status().await?;
    assert_eq!(status.exit_code, 137, "{status:?}");
    container.remove().await?;

    for code in [0, 3] {
        let script = format!("echo last words; exit {code}");
        let ends = pod.run(&["sh", "-c", &script], |_| {}).await?;
        assert_eq!(ends.exited().await?.exit_code, code);
        assert_eq!(ends.stdout()?, "last words\n");
        ends.remove().await?;
    }
    let never = pod.create(&["true"], |_| {}).await?;
    pod.stop().await?;
    never.gone().await?;
    pod.remove().await?;
    nothing_left(&pod, &[]).await
}

async fn commands_that_cannot_run(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod_under(HANDLER).await?;
    for (command, code) in [
        ("/no/such/program", 127),
        ("no-such-program", 127),
        ("/etc/passwd", 126),
    ] {
        let container = pod.create(&[command], |_| {}).await?;
        let failure = container.start().await.err().context("it started")?;
        assert_eq!(failure.code(), Code::FailedPrecondition, "{failure}");
        let status = container.status().await?;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (code, "ContainerCannotRun"),
            "{status:?}"
        );
        container.remove().await?;
    }
    let running = pod.sleeper().await?;
    let exec = running.exec(&["/no/such/program"]).await?;
    assert_eq!(exec.code, 127, "{exec:?}");
    assert!(exec.stderr.contains("/no/such/program"), "{exec:?}");
    let never = pod.create(&["/no/such/program"], |_| {}).await?;
    never.stop(10).await?;
    never.remove().await?;
    Ok(())
}

async fn containers_of_a_pod_share_one_shim(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let mut pods = Vec::new();
    for _ in 0..2 {
        let mut config = config::pod(&daemon);
        config::own_network(&mut config);
        pods.push(daemon.run_pod_under(HANDLER, config).await?);
    }
    let (other, pod) = (pods.remove(0), pods.remove(0));
    let (first, second) = tokio::try_join!(pod.sleeper(), pod.sleeper())?;
    let shim = only_shim(&pod)?;
    assert_ne!(shim, only_shim(&other)?);
    assert_ne!(first.pid()?, second.pid()?);
    // It sees nothing of other pods, whose networks would live as long as it.
    let mounts = read(format!("/proc/{shim}/mountinfo"))?;
    assert!(
        mounts.contains(&pod.id) && !mounts.contains(&other.id),
        "{mounts}"
    );
    // What it mounts, nobody else sees.
    let here = read("/proc/self/mountinfo")?;
    assert!(
        !here.contains(&format!("containers/{}/rootfs", first.id)),
        "{here}"
    );
    // They are in the pod's network, which was there before the shim.
    for container in [&first, &second] {
        let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/net"));
        assert_ne!(of(container.pid()?)?, of(std::process::id().cast_signed())?);
        assert_eq!(of(container.pid()?)?, of(first.pid()?)?);
    }
    first.remove().await?;
    assert_eq!(second.exec_output(&["echo", "well"]).await?, "well");
    other.stop().await?;
    other.remove().await?;
    nothing_left(&other, &[]).await?;
    assert_eq!(only_shim(&pod)?, shim);
    Ok(())
}

async fn a_restart_of_the_daemon(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod_under(HANDLER).await?;
    let (sleeper, created) = (
        pod.sleeper().await?,
        pod.create(&["echo", "later"], |_| {}).await?,
    );
    let gate = Gate::new(&env, "gate")?;
    let ends = gate.behind(&pod, "echo unseen; exit 23").await?;
    let pid = sleeper.pid()?;
    daemon.kill(Signal::SIGKILL).await?;
    gate.open()?;
    daemon.launch().await?;
    assert_eq!(sleeper.pid()?, pid);
    assert_eq!(sleeper.exec_output(&["echo", "well"]).await?, "well");
    let status = ends.exited().await?;
    assert_eq!(
        (status.exit_code, ends.stdout()?),
        (23, "unseen\n".to_owned())
    );
    created.start().await?;
    created.exited().await?;
    assert_eq!(created.stdout()?, "later\n");
    pod.stop().await?;
    pod.remove().await?;
    nothing_left(&pod, &[]).await
}

async fn a_shim_that_is_killed(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod_under(HANDLER).await?;
    let (sleeper, created) = (pod.sleeper().await?, pod.create(&["true"], |_| {}).await?);
    let bystander = daemon.pod_under(HANDLER).await?;
    let other = bystander.sleeper().await?;
    signal(only_shim(&pod)?, Signal::SIGKILL)?;
    for container in [&sleeper, &created] {
        let status = container.exited().await?;
        assert_eq!(status.exit_code, 255, "{status:?}");
        assert!(status.message.contains(HANDLER), "{status:?}");
        container.gone().await?;
    }
    pod.not_ready().await?;
    assert!(pod.try_create(|_| {}).await.is_err());
    pod.stop().await?;
    pod.remove().await?;
    nothing_left(&pod, &[&sleeper]).await?;
    assert_eq!(other.exec_output(&["echo", "well"]).await?, "well");
    Ok(())
}

async fn a_shim_that_stops_answering(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod_under(HANDLER).await?;
    let sleeper = pod.sleeper().await?;
    let created = pod.create(&["true"], |_| {}).await?;
    signal(only_shim(&pod)?, Signal::SIGSTOP)?;
    let began = Instant::now();
    let late = sleeper.exec_limited(&["true"], 1).await;
    let late = late.err().context("an exec ended")?;
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    let started = created.start().await;
    refused(started, Code::DeadlineExceeded, &["Start", "25s"]);
    assert!(began.elapsed() < seconds(45), "{:?}", began.elapsed());
    // An end of which it never tells is one all the same.
    signal(sleeper.pid()?, Signal::SIGKILL)?;
    let status = eventually("the end", seconds(70), || async {
        let status = sleeper.status().await?;
        let ended = status.state() == cri::ContainerState::ContainerExited;
        Ok(ended.then_some(status))
    })
    .await?;
    assert_eq!(status.exit_code, 255, "{status:?}");
    assert!(status.message.contains(HANDLER), "{status:?}");
    let began = Instant::now();
    pod.stop().await?;
    pod.remove().await?;
    assert!(began.elapsed() < seconds(45), "{:?}", began.elapsed());
    nothing_left(&pod, &[&sleeper, &created]).await
}

async fn a_keeper_that_is_killed(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let (live, dead) = (
        daemon.pod_under(HANDLER).await?,
        daemon.pod_under(HANDLER).await?,
    );
    let mut containers = Vec::new();
    for (pod, daemon_runs) in [(&live, true), (&dead, false)] {
        let sleeper = pod.sleeper().await?;
        let keeper = pod.keeper(&env)?;
        if !daemon_runs {
            daemon.kill(Signal::SIGKILL).await?;
        }
        signal(keeper, Signal::SIGKILL)?;
        containers.push(sleeper);
    }
    daemon.launch().await?;
    for (pod, container) in [&live, &dead].into_iter().zip(&containers) {
        assert_eq!(container.exited().await?.exit_code, 255);
        nothing_left(pod, &[container]).await?;
        pod.stop().await?;
        pod.remove().await?;
    }
    Ok(())
}

/// A program that `start` is asked of. Not made by this process, whose children may hold it open for writing.
async fn fake(env: &Env, name: &str, script: &str) -> Result<PathBuf> {
    let (draft, path) = (env.root.join(format!("{name}.draft")), env.root.join(name));
    std::fs::write(&draft, format!("#!/bin/sh\n{script}\n"))?;
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755))?;
    output(
        "cp",
        &[&draft.display().to_string(), &path.display().to_string()],
    )
    .await?;
    Ok(path)
}

async fn checkpoints_are_refused_by_name(env: Env) -> Result<()> {
    needs_the_shim()?;
    let criu = crate::checkpoint::script(&env, "exit 1")?;
    let daemon = env
        .daemon_with(|s| {
            describe(s, HANDLER, "io.containerd.runc.v2");
            s.set("checkpoint.criu", &format!("{criu:?}"));
        })
        .await?;
    daemon.pull("test").await?;
    crate::checkpoint::is_refused(&daemon, HANDLER, "shim").await
}

async fn programs_that_are_no_shims(env: Env) -> Result<()> {
    let version = "case \"$*\" in -v) echo fake; exit;; *delete) exit 1;; esac";
    let mut all = Vec::new();
    for (name, script, code, words) in [
        ("garbage", "echo certainly", Code::Internal, "certainly"),
        ("silent", "true", Code::Internal, "no address"),
        (
            "nobody",
            "echo unix:///nonexistent/socket",
            Code::Internal,
            "/nonexistent/socket",
        ),
        (
            "grpc",
            "echo '{\"version\":3,\"address\":\"unix:///a\",\"protocol\":\"grpc\"}'",
            Code::Internal,
            "grpc",
        ),
        (
            "fails",
            "echo out of luck >&2; exit 4",
            Code::Internal,
            "out of luck",
        ),
        ("crashes", "kill -SEGV $$", Code::Internal, "signal 11"),
        (
            "hangs",
            "echo stuck >&2; sleep 1000 & sleep 1000",
            Code::DeadlineExceeded,
            "stuck",
        ),
    ] {
        let path = fake(&env, name, &format!("{version}; {script}")).await?;
        all.push((name, path.display().to_string(), code, words));
    }
    let nowhere = env.root.join("nowhere").display().to_string();
    let daemon = env
        .daemon_with(|s| {
            for (name, path, ..) in &all {
                describe(s, name, path);
                s.set(&format!("runtimes.{name}.create_timeout"), "\"2s\"");
            }
            describe(s, "absent", &nowhere);
        })
        .await?;
    daemon.pull("test").await?;
    for (name, _, code, words) in &all {
        let began = Instant::now();
        refused(
            daemon.pod_under(name).await.map(|p| p.id),
            *code,
            &[name, words],
        );
        assert!(
            began.elapsed() < seconds(20),
            "{name}: {:?}",
            began.elapsed()
        );
    }
    let refusal = daemon.pod_under("absent").await.map(|p| p.id);
    refused(
        refusal,
        Code::FailedPrecondition,
        &["absent", &nowhere, "slipway check"],
    );
    // The others work, and nothing is left.
    let container = daemon
        .pod_under("native")
        .await?
        .run(&["true"], |_| {})
        .await?;
    assert_eq!(container.exited().await?.exit_code, 0);
    Ok(())
}

async fn options_of_a_shim(env: Env) -> Result<()> {
    needs_the_shim()?;
    let env_root = env.root.join("of-runc").display().to_string();
    let daemon = env
        .daemon_with(|s| {
            describe(s, "tuned", PROGRAM);
            s.set(
                "runtimes.tuned.options",
                &format!("{{ Root = {env_root:?} }}"),
            );
            describe(s, "wrong", PROGRAM);
            s.set("runtimes.wrong.options", "{ Nonsense = 1 }");
        })
        .await?;
    daemon.pull("test").await?;
    let pod = daemon.pod_under("tuned").await?;
    let container = pod.sleeper().await?;
    assert!(
        Path::new(&env_root)
            .join("slipway")
            .join(&container.id)
            .is_dir()
    );
    refused(
        daemon.pod_under("wrong").await.map(|p| p.id),
        Code::InvalidArgument,
        &["wrong", "Nonsense", "BinaryName"],
    );
    let began = Instant::now();
    pod.stop().await?;
    assert!(began.elapsed() < Duration::from_secs(30));
    Ok(())
}

/// What only shims of virtual machines have, at a stand-in for one.
async fn a_shim_with_the_sandbox_api(env: Env) -> Result<()> {
    let at = env.dir("fake")?;
    let exe = std::env::current_exe()?;
    let script = format!(
        "{}={} exec {} \"$@\"",
        fake_shim::VARIABLE,
        at.display(),
        exe.display()
    );
    let path = fake(&env, "vm", &script).await?;
    let daemon = env
        .daemon_with(|s| {
            describe(s, "vm", &path.display().to_string());
            s.set("runtimes.vm.allowed_annotations", "[\"org.example.\"]");
        })
        .await?;
    daemon.pull("test").await?;
    let mut config = config::pod(&daemon);
    config::own_network(&mut config);
    for key in ["org.example.one", "com.example.two"] {
        config.annotations.insert(key.into(), "yes".into());
    }
    let size = |memory, cpu_quota| {
        Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            cpu_period: 100_000,
            cpu_quota,
            cpu_shares: 512,
            ..Default::default()
        })
    };
    let linux = config.linux.get_or_insert_default();
    (linux.resources, linux.overhead) = (size(256 << 20, 50_000), size(160 << 20, 25_000));
    let pod = daemon.run_pod_under("vm", config).await?;
    let log = || -> Result<Vec<String>> {
        Ok(read(at.join("log"))?.lines().map(str::to_owned).collect())
    };
    // The network was there, with its interface, before the sandbox.
    let made = log()?;
    assert_eq!(made.len(), 3, "{made:?}");
    assert_eq!(
        (made[0].as_str(), made[2].as_str()),
        ("start sandbox", "StartSandbox")
    );
    let links = made[1]
        .strip_prefix("CreateSandbox ")
        .context("the network")?;
    assert!(links.split(',').any(|l| l == "eth0"), "{links}");
    let annotations: serde_json::Value = serde_json::from_str(&read(at.join("annotations"))?)?;
    for (key, value) in [
        ("io.kubernetes.cri.container-type", "sandbox"),
        ("io.kubernetes.cri-o.ContainerType", "sandbox"),
        ("io.kubernetes.cri.sandbox-id", pod.id.as_str()),
        ("io.kubernetes.cri-o.SandboxID", pod.id.as_str()),
        ("io.kubernetes.cri.sandbox-namespace", "blackbox"),
        ("io.kubernetes.cri.sandbox-memory", "268435456"),
        ("io.kubernetes.cri.sandbox-cpu-quota", "50000"),
        ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
        ("io.kubernetes.cri.sandbox-cpu-shares", "512"),
        ("io.kubernetes.cri.sandbox-overhead-memory", "167772160"),
        ("org.example.one", "yes"),
    ] {
        assert_eq!(annotations[key], value, "{key} in {annotations}");
    }
    assert!(annotations["com.example.two"].is_null());

    // Containers without a process on the host, as far as the keeper can tell.
    let sleeper = pod.create(&["sleep", "1000"], |_| {}).await?;
    sleeper.start().await?;
    let ends = pod
        .create(&["sh", "-c", "echo in the guest; exit 3"], |_| {})
        .await?;
    ends.start().await?;
    assert_eq!(ends.exited().await?.exit_code, 3);
    assert_eq!(ends.stdout()?, "in the guest\n");
    let exec = sleeper
        .exec(&["sh", "-c", "echo guest too; exit 4"])
        .await?;
    assert_eq!((exec.stdout.as_str(), exec.code), ("guest too\n", 4));
    let late = sleeper.exec_limited(&["sleep", "1000"], 1).await;
    assert_eq!(
        late.err().context("it ended")?.code(),
        Code::DeadlineExceeded
    );
    // What they use is what the shim tells.
    let used = crate::stats::stats(&sleeper).await?;
    let (cpu, memory) = (used.cpu.context("cpu")?, used.memory.context("memory")?);
    let value = crate::stats::value;
    assert_eq!(value(cpu.usage_core_nano_seconds), 1_234_000);
    assert_eq!(
        [
            memory.usage_bytes,
            memory.working_set_bytes,
            memory.available_bytes
        ]
        .map(value),
        [5000, 4000, 5000]
    );
    // A command that is not there is found when it is to be started.
    let never = pod.create(&["/no/such/program"], |_| {}).await?;
    let failure = never.start().await.err().context("it started")?;
    assert_eq!(failure.code(), Code::FailedPrecondition, "{failure}");
    let status = never.status().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (127, "ContainerCannotRun"),
        "{status:?}"
    );
    never.remove().await?;
    // Their limits are the shim's alone.
    let update = cri::LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        ..Default::default()
    };
    sleeper.update(update).await?;
    assert!(
        log()?
            .iter()
            .any(|l| l.starts_with("Update ") && l.contains("100663296")),
        "{:?}",
        log()?
    );
    // A signal goes to the container, and not to the machine whose process id the shim gave for it.
    sleeper.stop(5).await?;
    assert_eq!(sleeper.status().await?.exit_code, 143);
    let again = pod.create(&["sleep", "1000"], |_| {}).await?;
    again.start().await?;
    assert_eq!(again.exec(&["true"]).await?.code, 0);
    pod.stop().await?;
    let ended = log()?;
    let last: Vec<&str> = ended.iter().rev().take(2).map(String::as_str).collect();
    assert_eq!(last, ["ShutdownSandbox", "StopSandbox"], "{ended:?}");
    pod.remove().await?;
    Ok(())
}

async fn user_namespaces_are_refused_by_name(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let request = cri::StatusRequest::default();
    let status = daemon.runtime().status(request).await?;
    let handlers = status.into_inner().runtime_handlers;
    let told = handlers.iter().find(|h| h.name == HANDLER);
    let features = told.and_then(|told| told.features).context("in Status")?;
    assert!(!features.user_namespaces && features.recursive_read_only_mounts);
    let mut config = config::pod(&daemon);
    crate::userns::mapped(&mut config);
    refused(
        daemon.run_pod_under(HANDLER, config).await.map(|p| p.id),
        Code::FailedPrecondition,
        &[HANDLER, "user namespaces", "hostUsers"],
    );
    Ok(())
}
