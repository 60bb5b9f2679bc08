//! Restoring containers and pods from checkpoints. Nearly all of it needs a criu that works on this kernel
//! (`SLIPWAY_TEST_CRIU` names one, or else that of PATH).

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};
use tonic::{Code, Status};

use crate::checkpoint::{COUNTER, checkpoint, count, counter, criu, files, script};
use crate::harness::*;
use crate::stream::{RESIZE, STDIN, STDOUT, attach};

tests![
    it_goes_on_in_another_pod,
    it_ends_as_any_other,
    its_pod_is_the_new_one,
    it_reads_its_input_and_its_variables,
    it_has_a_terminal,
    terminals_are_compared,
    it_may_never_be_started,
    the_daemon_restarts_before_and_after,
    a_pod_comes_back,
    what_other_runtimes_made,
    a_pod_that_cannot_come_back,
    an_image_is_a_checkpoint,
    nothing_more_than_the_configuration_gives,
    users_are_compared,
    what_cannot_be_restored,
    checkpoints_that_are_none,
    nothing_is_restored_unasked,
    its_image_is_gone,
    criu_hangs,
    criu_and_the_keeper_are_killed,
];

/// What is different in a configuration.
type Change<'a> = &'a (dyn Fn(&mut cri::ContainerConfig) + Sync);

pub async fn daemon_with(env: &Env, criu: &str) -> Result<Daemon> {
    let daemon = env
        .daemon_with(|s| {
            s.set("checkpoint.criu", &format!("{criu:?}"));
            s.set("checkpoint.restore", "true");
        })
        .await?;
    daemon.pull("test").await?;
    Ok(daemon)
}

async fn daemon(env: &Env) -> Result<Daemon> {
    daemon_with(env, &criu()?).await
}

/// Restores a checkpoint; the rest of the configuration is `change`'s.
pub async fn created(
    pod: &Pod,
    image: &Path,
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<Container, Status> {
    let mut config = config::container(&pod.daemon, &pod.config, &[]);
    config.image.get_or_insert_default().image = image.display().to_string();
    change(&mut config);
    pod.create_exactly(config).await
}

/// A checkpoint of a command that says "ready".
async fn saved(
    daemon: &Daemon,
    script: &str,
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<PathBuf> {
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.run(&["sh", "-c", script], change).await?;
    container.says("ready").await?;
    let path = daemon
        .env()
        .root
        .join(format!("{}.tar", &container.id[..12]));
    checkpoint(&container, &path, 0).await?;
    pod.stop().await?;
    pod.remove().await?;
    Ok(path)
}

fn state(status: &cri::ContainerStatus) -> cri::ContainerState {
    status.state()
}

async fn it_goes_on_in_another_pod(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let first = counter(&daemon).await?;
    first.exec(&["sh", "-c", "echo changed > /etc/passwd.new; mkdir -m 711 /dir; ln -s x /dir/link; mknod /dir/fifo p"]).await?;
    let path = env.root.join("c.tar");
    checkpoint(&first, &path, 0).await?;
    let reached = count(&first)?;
    // The one that was saved goes on meanwhile, and it may be restored as often as one likes.
    let pod = daemon.pod(|_| {}).await?;
    for _ in 0..2 {
        let again = created(&pod, &path, |_| {}).await?;
        let status = again.status().await?;
        assert_eq!(state(&status), cri::ContainerState::ContainerCreated);
        assert_eq!(
            status.image.clone().unwrap_or_default().image,
            image("test")
        );
        assert!(again.processes().is_empty(), "{:?}", again.processes());
        assert_eq!(again.stdout()?, "");
        again.start().await?;
        let status = again.status().await?;
        assert_eq!(state(&status), cri::ContainerState::ContainerRunning);
        assert!(status.started_at > 0);
        again.says(&(reached + 3).to_string()).await?;
        let text = again.stdout()?;
        let begun: u64 = text.lines().next().unwrap_or_default().parse()?;
        ensure!(
            begun > 1 && begun <= reached + 1,
            "it began with {begun}, after {reached}"
        );
        assert_eq!(again.exec_output(&["cat", "/made"]).await?, "new");
        assert_eq!(
            again.exec_output(&["cat", "/etc/passwd.new"]).await?,
            "changed"
        );
        assert_eq!(
            again.exec_output(&["stat", "-c", "%a", "/dir"]).await?,
            "711"
        );
        assert_eq!(again.exec_output(&["readlink", "/dir/link"]).await?, "x");
        assert_eq!(again.exec(&["test", "-p", "/dir/fifo"]).await?.code, 0);
        assert_eq!(again.exec(&["test", "-e", "/etc/group"]).await?.code, 1);
        // Its processes are where a container's are, confined as they were.
        let init = init(&again).await?;
        let (keeper, _) = objects::keeper_of(init)?;
        assert!(read(format!("/proc/{keeper}/comm"))?.len() > 1);
        assert!(read(format!("/proc/{init}/status"))?.contains("Seccomp:\t2"));
        let mut client = daemon.runtime();
        let request = cri::ContainerStatsRequest {
            container_id: again.id.clone(),
        };
        let stats = client
            .container_stats(request)
            .await?
            .into_inner()
            .stats
            .context("stats")?;
        ensure!(
            stats
                .memory
                .and_then(|m| m.working_set_bytes)
                .is_some_and(|b| b.value > 0)
        );
        // What it was restored from is not kept.
        let kept = env
            .root
            .join("state/containers")
            .join(&again.id)
            .join("checkpoint");
        eventually("the end of the checkpoint's files", seconds(10), || async {
            Ok((!kept.exists()).then_some(()))
        })
        .await?;
        again.stop(0).await?;
        assert_eq!(again.exited().await?.exit_code, 137);
        again.gone().await?;
        again.remove().await?;
    }
    assert_eq!(first.stdout()?.lines().filter(|l| *l == "1").count(), 1);
    first.says(&(reached + 10).to_string()).await
}

async fn it_ends_as_any_other(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let script = "trap 'echo asked; exit 5' TERM; echo ready; while [ ! -e /go ]; do sleep 0.05; done; echo gone; exit 7";
    let path = saved(&daemon, script, |_| {}).await?;
    let pod = daemon.pod(|_| {}).await?;
    let asked = created(&pod, &path, |_| {}).await?;
    asked.start().await?;
    asked.stop(20).await?;
    assert_eq!(asked.exited().await?.exit_code, 5);
    assert_eq!(asked.stdout()?, "asked\n");
    let ends = created(&pod, &path, |_| {}).await?;
    ends.start().await?;
    ends.exec(&["touch", "/go"]).await?;
    let status = ends.exited().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
    assert_eq!(ends.stdout()?, "gone\n");
    let again = created(&pod, &path, |_| {}).await?;
    again.start().await?;
    refused(again.start().await, Code::FailedPrecondition, &["running"]);
    // A checkpoint of what came from one.
    let second = env.root.join("second.tar");
    checkpoint(&again, &second, 0).await?;
    let text = files(std::fs::File::open(&second)?)?;
    let dump: serde_json::Value = serde_json::from_slice(&text[Path::new("config.dump")])?;
    assert_eq!(dump["restored"], true);
    let third = created(&pod, &second, |_| {}).await?;
    third.start().await?;
    third.exec(&["touch", "/go"]).await?;
    assert_eq!(third.exited().await?.exit_code, 7);
    Ok(())
}

/// The process id that `crictl inspect` shows.
async fn init(container: &Container) -> Result<i32> {
    let request = cri::ContainerStatusRequest {
        container_id: container.id.clone(),
        verbose: true,
    };
    let mut client = container.daemon.runtime();
    let info = client.container_status(request).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("info")?)?;
    Ok(i32::try_from(info["pid"].as_i64().context("pid")?)?)
}

async fn its_pod_is_the_new_one(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let path = saved(&daemon, "echo ready; while :; do sleep 1; done", |_| {}).await?;
    let pod = daemon
        .pod(|c| {
            config::own_network(c);
            c.hostname = "another".to_owned();
        })
        .await?;
    let other = pod.sleeper().await?;
    let container = created(&pod, &path, |_| {}).await;
    // The one that was saved had the host's network.
    let container = container.context("created")?;
    container.start().await?;
    let (mine, theirs) = (init(&container).await?, init(&other).await?);
    for namespace in ["net", "ipc", "uts"] {
        let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        assert_eq!(of(mine)?, of(theirs)?, "{namespace}");
    }
    for namespace in ["pid", "mnt"] {
        let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        assert_ne!(of(mine)?, of(theirs)?, "{namespace}");
        assert_ne!(
            of(mine)?,
            of(std::process::id().cast_signed())?,
            "{namespace}"
        );
    }
    assert_eq!(container.exec_output(&["hostname"]).await?, "another");
    assert_eq!(other.exec_output(&["hostname"]).await?, "another");
    let cgroup = |pid: i32| read(format!("/proc/{pid}/cgroup"));
    for line in cgroup(mine)?.lines() {
        ensure!(
            line.contains(&container.id) || line.ends_with(":/"),
            "{line}"
        );
    }
    assert_eq!(
        cgroup(mine)?.lines().count(),
        cgroup(theirs)?.lines().count()
    );
    let mounts = read(format!("/proc/{mine}/mountinfo"))?;
    let places = |text: &str| {
        let mut all: Vec<String> = text
            .lines()
            .filter_map(|l| l.split(' ').nth(4))
            .map(str::to_owned)
            .collect();
        all.sort();
        all
    };
    assert_eq!(
        places(&mounts),
        places(&read(format!("/proc/{theirs}/mountinfo"))?)
    );
    Ok(())
}

async fn it_reads_its_input_and_its_variables(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let script = "V=inner; echo ready; read line; echo \"$OUTER $V $line end\"; sleep 1000";
    let change = |c: &mut cri::ContainerConfig| {
        c.stdin = true;
        let outer = cri::KeyValue {
            key: "OUTER".into(),
            value: "outer".into(),
        };
        c.envs.push(outer);
    };
    let path = saved(&daemon, script, change).await?;
    let pod = daemon.pod(|_| {}).await?;
    // Without anybody to write, it reads the end.
    let container = created(&pod, &path, |_| {}).await?;
    container.start().await?;
    container.says("outer inner  end").await
}

/// Answers to each line, and to an interrupt.
const TALKER: &str = "trap 'echo interrupted' INT; V=kept; echo ready
    while :; do
        read line || continue
        [ \"$line\" != end ] || exit 3
        echo \"got $line $V\"; stty size
    done";

fn on_terminal(c: &mut cri::ContainerConfig) {
    (c.stdin, c.tty) = (true, true);
}

async fn it_has_a_terminal(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(|_| {}).await?;
    let first = pod.run(&["sh", "-c", TALKER], on_terminal).await?;
    first.says("ready").await?;
    let mut client = attach(&first, true).await?;
    client.send(RESIZE, br#"{"Width":70,"Height":20}"#).await?;
    client.send(STDIN, b"before\n").await?;
    client.until(STDOUT, "got before kept\r\n20 70\r\n").await?;
    let path = env.root.join("c.tar");
    // Somebody is attached meanwhile, and remains so.
    checkpoint(&first, &path, 0).await?;
    client.send(STDIN, b"after\n").await?;
    client.until(STDOUT, "got after kept\r\n20 70\r\n").await?;
    let other = daemon.pod(|_| {}).await?;
    for restart in [false, true] {
        let again = created(&other, &path, on_terminal).await?;
        again.start().await?;
        if restart {
            daemon.kill(Signal::SIGKILL).await?;
            daemon.launch().await?;
        }
        let mut client = attach(&again, true).await?;
        // Its size is what it was, until it is changed.
        client.send(STDIN, b"here\n").await?;
        client.until(STDOUT, "got here kept\r\n20 70\r\n").await?;
        client.send(RESIZE, br#"{"Width":99,"Height":33}"#).await?;
        client.send(STDIN, b"resized\n").await?;
        client.until(STDOUT, "33 99\r\n").await?;
        // It is the controlling terminal of its processes.
        client.send(STDIN, b"\x03").await?;
        client.until(STDOUT, "interrupted\r\n").await?;
        let init = init(&again).await?;
        for stream in 0..3 {
            let target = std::fs::read_link(format!("/proc/{init}/fd/{stream}"))?;
            assert_eq!(target, Path::new("/dev/pts/0"));
        }
        let console = [
            "sh",
            "-c",
            "stat -c %t:%T /dev/console; echo console > /dev/console",
        ];
        assert_eq!(again.exec_output(&console).await?, "88:0");
        client.until(STDOUT, "console\r\n").await?;
        // A checkpoint of what came from one.
        let second = env.root.join(format!("second-{restart}.tar"));
        checkpoint(&again, &second, 0).await?;
        client.send(STDIN, b"end\n").await?;
        assert_eq!(again.exited().await?.exit_code, 3);
        let text = again.stdout()?;
        for line in ["got here kept", "33 99", "interrupted", "console"] {
            ensure!(text.contains(&format!("{line}\r\n")), "{line}: {text:?}");
        }
        assert!(!text.contains("before"), "{text:?}");
        let third = created(&other, &second, on_terminal).await?;
        third.start().await?;
        third.stop(0).await?;
        assert_eq!(third.exited().await?.exit_code, 137);
    }
    let mut client = attach(&first, true).await?;
    client.send(STDIN, b"end\n").await?;
    assert_eq!(first.exited().await?.exit_code, 3);
    Ok(())
}

async fn terminals_are_compared(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "echo ready; sleep 1000";
    let plain = saved(&daemon, script, |_| {}).await?;
    let terminal = saved(&daemon, script, on_terminal).await?;
    let answer = created(&pod, &plain, on_terminal).await.map(|c| c.id);
    refused(answer, Code::InvalidArgument, &["had no terminal", "tty"]);
    let answer = created(&pod, &terminal, |_| {}).await.map(|c| c.id);
    refused(answer, Code::InvalidArgument, &["had a terminal", "tty"]);
    // One that nothing has open any more has been taken down.
    let script = "echo ready; exec sleep 1000 </dev/null >/dev/null 2>&1";
    let container = pod.run(&["sh", "-c", script], on_terminal).await?;
    container.says("ready").await?;
    eventually("a process without a terminal", seconds(10), || async {
        let comm = read(format!("/proc/{}/comm", container.pid()?))?;
        Ok((comm.trim() == "sleep").then_some(()))
    })
    .await?;
    let path = env.root.join("closed.tar");
    checkpoint(&container, &path, 0).await?;
    let answer = created(&pod, &path, on_terminal).await.map(|c| c.id);
    refused(answer, Code::InvalidArgument, &["still open"]);
    Ok(())
}

async fn it_may_never_be_started(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let path = saved(&daemon, "echo ready; sleep 1000", |_| {}).await?;
    let pod = daemon.pod(|_| {}).await?;
    let stopped = created(&pod, &path, |_| {}).await?;
    stopped.stop(10).await?;
    assert_eq!(stopped.exited().await?.exit_code, 137);
    refused(stopped.start().await, Code::FailedPrecondition, &["exited"]);
    let removed = created(&pod, &path, |_| {}).await?;
    removed.remove().await?;
    let left = created(&pod, &path, |_| {}).await?;
    let new = cri::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    };
    left.update(new).await?;
    left.start().await?;
    let limit = left
        .cgroup_file("memory.limit_in_bytes")
        .or_else(|_| left.cgroup_file("memory.max"))?;
    assert_eq!(limit.trim(), (64 << 20).to_string());
    created(&pod, &path, |_| {}).await?;
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

async fn the_daemon_restarts_before_and_after(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let first = counter(&daemon).await?;
    let path = env.root.join("c.tar");
    checkpoint(&first, &path, 0).await?;
    let reached = count(&first)?;
    let pod = daemon.pod(|_| {}).await?;
    let container = created(&pod, &path, |_| {}).await?;
    let never = created(&pod, &path, |_| {}).await?;
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    let status = container.status().await?;
    assert_eq!(state(&status), cri::ContainerState::ContainerCreated);
    container.start().await?;
    container.says(&(reached + 3).to_string()).await?;
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    container
        .says(&(count(&container)? + 5).to_string())
        .await?;
    assert_eq!(container.exec_output(&["cat", "/made"]).await?, "new");
    never.stop(0).await?;
    container.stop(0).await?;
    assert_eq!(container.exited().await?.exit_code, 137);
    Ok(())
}

/// A pod with two counters, and its checkpoint.
async fn saved_pod(
    daemon: &Daemon,
) -> Result<(cri::PodSandboxConfig, Vec<cri::ContainerConfig>, PathBuf)> {
    let pod = daemon.pod(|_| {}).await?;
    let mut configs = Vec::new();
    for name in ["first", "second"] {
        let container = pod
            .run(COUNTER, |c| {
                c.metadata.get_or_insert_default().name = name.to_owned();
                c.log_path = format!("{name}.log");
            })
            .await?;
        container.says("3").await?;
        configs.push(container.config);
    }
    let path = daemon.env().root.join("pod");
    let request = cri::CheckpointPodRequest {
        pod_sandbox_id: pod.id.clone(),
        output_path: path.display().to_string(),
        ..Default::default()
    };
    daemon.runtime().checkpoint_pod(request).await?;
    pod.stop().await?;
    pod.remove().await?;
    Ok((pod.config, configs, path))
}

async fn a_pod_comes_back(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let (config, mut configs, path) = saved_pod(&daemon).await?;
    configs.reverse();
    for container in &mut configs {
        container.log_path = format!("again-{}", container.log_path);
    }
    let request = cri::RestorePodRequest {
        checkpoint_path: path.display().to_string(),
        config: Some(config.clone()),
        container_configs: configs.clone(),
        ..Default::default()
    };
    let answer = daemon
        .runtime()
        .restore_pod(request.clone())
        .await?
        .into_inner();
    let pod = Pod {
        daemon: daemon.clone(),
        id: answer.pod_sandbox_id.clone(),
        config: config.clone(),
    };
    assert_eq!(
        pod.status().await?.state(),
        cri::PodSandboxState::SandboxReady
    );
    let names: Vec<_> = answer
        .restored_containers
        .iter()
        .map(|c| c.name.clone())
        .collect();
    assert_eq!(names, ["second", "first"]);
    for (restored, config) in answer.restored_containers.iter().zip(configs) {
        let container = Container {
            daemon: daemon.clone(),
            id: restored.container_id.clone(),
            log: PathBuf::from(&pod.config.log_directory).join(&config.log_path),
            config,
        };
        let status = container.status().await?;
        assert_eq!(state(&status), cri::ContainerState::ContainerCreated);
        assert_eq!(status.metadata.unwrap_or_default().name, restored.name);
        container.start().await?;
        let first = eventually("its first line", seconds(20), || async {
            Ok(container.stdout()?.lines().next().map(str::to_owned))
        })
        .await?;
        let first: u64 = first.parse()?;
        ensure!(first > 1, "it began anew");
        container.says(&(first + 3).to_string()).await?;
    }
    // The name is taken.
    let again = daemon.runtime().restore_pod(request).await;
    refused(again, Code::AlreadyExists, &[&answer.pod_sandbox_id]);
    assert_eq!(
        pod.status().await?.state(),
        cri::PodSandboxState::SandboxReady
    );
    Ok(())
}

async fn what_other_runtimes_made(env: Env) -> Result<()> {
    let all = crate::handlers::runtimes()?;
    let criu = criu()?;
    let daemon = env
        .daemon_with(|s| {
            s.set("checkpoint.criu", &format!("{criu:?}"));
            s.set("checkpoint.restore", "true");
            for name in &all {
                crate::handlers::describe(s, name, name);
            }
        })
        .await?;
    daemon.pull("test").await?;
    for handler in all {
        let volume = env.dir(&format!("volume-{handler}"))?;
        // Their filters are not ours.
        let change = |name: &'static str| {
            let mount = cri::Mount {
                container_path: "/data".to_owned(),
                host_path: volume.display().to_string(),
                ..Default::default()
            };
            move |c: &mut cri::ContainerConfig| {
                c.metadata.get_or_insert_default().name = name.to_owned();
                c.log_path = format!("{name}.log");
                c.mounts.push(mount);
                config::container_security(c).seccomp = Some(cri::SecurityProfile {
                    profile_type: cri::security_profile::ProfileType::Unconfined as i32,
                    ..Default::default()
                });
            }
        };
        let pod = daemon.pod_under(handler).await?;
        let plain = pod.run(COUNTER, change("plain")).await?;
        let talker = pod
            .run(&["sh", "-c", TALKER], |c| {
                change("talker")(c);
                on_terminal(c);
            })
            .await?;
        plain.says("3").await?;
        talker.says("ready").await?;
        let path = env.root.join(format!("pod-{handler}"));
        let request = cri::CheckpointPodRequest {
            pod_sandbox_id: pod.id.clone(),
            output_path: path.display().to_string(),
            ..Default::default()
        };
        daemon.runtime().checkpoint_pod(request).await?;
        // They go on, and their runtime still knows them.
        let reached = count(&plain)?;
        plain.says(&(reached + 3).to_string()).await?;
        let mut client = attach(&talker, true).await?;
        client.send(STDIN, b"here\n").await?;
        client.until(STDOUT, "got here kept\r\n").await?;
        assert_eq!(plain.exec_output(&["cat", "/made"]).await?, "new");
        let v1 = plain.cgroup_file("freezer.state").is_ok();
        let mut request = cri::RestorePodRequest {
            checkpoint_path: path.display().to_string(),
            config: Some(pod.config.clone()),
            container_configs: vec![plain.config.clone(), talker.config.clone()],
            runtime_handler: handler.to_owned(),
            ..Default::default()
        };
        pod.stop().await?;
        assert_eq!(plain.exited().await?.exit_code, 137);
        pod.remove().await?;
        let answer = daemon.runtime().restore_pod(request.clone()).await;
        refused(answer, Code::Unimplemented, &["native", handler]);
        assert!(daemon.pod_dirs().is_empty());
        request.runtime_handler = "native".to_owned();
        if v1 {
            // They leave the file system open, if below another, that v1's hierarchies are mounted in.
            let answer = daemon.runtime().restore_pod(request).await;
            refused(answer, Code::InvalidArgument, &["/sys/fs/cgroup is not ro"]);
            continue;
        }
        let answer = daemon.runtime().restore_pod(request).await?.into_inner();
        let pod = Pod {
            daemon: daemon.clone(),
            id: answer.pod_sandbox_id,
            config: pod.config.clone(),
        };
        let mut again = Vec::new();
        for (restored, first) in answer.restored_containers.iter().zip([&plain, &talker]) {
            let container = Container {
                id: restored.container_id.clone(),
                ..first.clone()
            };
            container.start().await?;
            again.push(container);
        }
        // The log of the first one goes on.
        again[0].says(&(count(&again[0])? + 3).to_string()).await?;
        let text = again[0].stdout()?;
        assert_eq!(text.lines().filter(|line| *line == "1").count(), 1);
        assert_eq!(again[0].exec_output(&["cat", "/made"]).await?, "new");
        let mut client = attach(&again[1], true).await?;
        client.send(STDIN, b"there\n").await?;
        client.until(STDOUT, "got there kept\r\n").await?;
        pod.stop().await?;
        pod.remove().await?;
    }
    Ok(())
}

async fn a_pod_that_cannot_come_back(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let (config, configs, path) = saved_pod(&daemon).await?;
    let good = cri::RestorePodRequest {
        checkpoint_path: path.display().to_string(),
        config: Some(config),
        container_configs: configs,
        ..Default::default()
    };
    let changed = |change: &dyn Fn(&mut cri::RestorePodRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };
    for (request, code, word) in [
        (
            changed(&|r| r.config = None),
            Code::InvalidArgument,
            "config",
        ),
        (
            changed(&|r| r.checkpoint_path = "pod".into()),
            Code::InvalidArgument,
            "absolute",
        ),
        (
            changed(&|r| r.checkpoint_path = "/nonexistent".into()),
            Code::NotFound,
            "/nonexistent",
        ),
        (
            changed(&|r| drop(r.container_configs.pop())),
            Code::InvalidArgument,
            "second",
        ),
        (
            changed(&|r| r.container_configs[0].metadata.as_mut().unwrap().name = "x".into()),
            Code::InvalidArgument,
            "x",
        ),
        (
            changed(&|r| drop(r.options.insert("lazy".into(), "true".into()))),
            Code::InvalidArgument,
            "lazy",
        ),
        (
            changed(&|r| r.container_configs[1].image.as_mut().unwrap().image = "other".into()),
            Code::InvalidArgument,
            "other",
        ),
        // Found wrong only when the pod and the first container are there.
        (
            changed(&|r| {
                config::container_security(&mut r.container_configs[1]).run_as_user =
                    Some(cri::Int64Value { value: 1000 })
            }),
            Code::InvalidArgument,
            "user 0",
        ),
    ] {
        refused(daemon.runtime().restore_pod(request).await, code, &[word]);
        let request = cri::ListPodSandboxRequest::default();
        let pods = daemon
            .runtime()
            .list_pod_sandbox(request)
            .await?
            .into_inner()
            .items;
        assert!(pods.is_empty(), "{word}: {pods:?}");
        assert!(daemon.pod_dirs().is_empty(), "{word}");
    }
    // The second archive is cut.
    let options: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path.join("pod.options"))?)?;
    let archive = path.join(format!(
        "{}.tar",
        options["containers"]["second"].as_str().context("name")?
    ));
    let whole = std::fs::read(&archive)?;
    std::fs::write(&archive, &whole[..whole.len() / 2])?;
    refused(
        daemon.runtime().restore_pod(good.clone()).await,
        Code::InvalidArgument,
        &["can't be restored"],
    );
    assert!(daemon.pod_dirs().is_empty());
    std::fs::write(&archive, &whole)?;
    daemon.runtime().restore_pod(good).await?;
    Ok(())
}

/// An OCI layout whose one layer has what the archive has.
fn layout(archive: &Path, dir: &Path, annotation: &str) -> Result<()> {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs)?;
    let put = |bytes: &[u8]| -> Result<String> {
        let digest: String = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        std::fs::write(blobs.join(&digest), bytes)?;
        Ok(format!("sha256:{digest}"))
    };
    let layer = std::fs::read(archive)?;
    let diff = put(&layer)?;
    let architecture = if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    };
    let config = serde_json::json!({
        "architecture": architecture, "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff]},
    })
    .to_string();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": put(config.as_bytes())?, "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": diff, "size": layer.len()}],
        "annotations": {annotation: "counter"},
    })
    .to_string();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": put(manifest.as_bytes())?, "size": manifest.len(),
        }],
    });
    std::fs::write(dir.join("index.json"), index.to_string())?;
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

async fn an_image_is_a_checkpoint(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let first = counter(&daemon).await?;
    let path = env.root.join("c.tar");
    checkpoint(&first, &path, 0).await?;
    let reached = count(&first)?;
    let pod = daemon.pod(|_| {}).await?;
    for (n, annotation) in [
        "org.criu.checkpoint.container.name",
        "io.kubernetes.cri-o.annotations.checkpoint.name",
    ]
    .iter()
    .enumerate()
    {
        let dir = env.dir(&format!("layout-{n}"))?;
        layout(&path, &dir, annotation)?;
        let name = format!("example.test/checkpoint:{n}");
        let (code, _, err) = daemon
            .command(&[
                "image",
                "import",
                &dir.display().to_string(),
                "--tag",
                &name,
            ])
            .await?;
        assert_eq!(code, 0, "{err}");
        let container = created(&pod, Path::new(&name), |_| {}).await?;
        assert_eq!(
            container.status().await?.image.unwrap_or_default().image,
            image("test")
        );
        container.start().await?;
        container.says(&(reached + 3).to_string()).await?;
        assert!(!container.stdout()?.lines().any(|l| l == "1"));
    }
    Ok(())
}

async fn nothing_more_than_the_configuration_gives(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "echo ready; sleep 1000";
    let volume = env.dir("volume")?;
    let mount = |c: &mut cri::ContainerConfig, readonly: bool| {
        c.mounts.push(cri::Mount {
            container_path: "/data".to_owned(),
            host_path: volume.display().to_string(),
            readonly,
            ..Default::default()
        });
    };
    let unconfined = |c: &mut cri::ContainerConfig| {
        let profile = cri::security_profile::ProfileType::Unconfined as i32;
        let profile = cri::SecurityProfile {
            profile_type: profile,
            ..Default::default()
        };
        config::container_security(c).seccomp = Some(profile);
    };
    let with_caps = |c: &mut cri::ContainerConfig| {
        let add = cri::Capability {
            add_capabilities: vec!["SYS_ADMIN".to_owned()],
            ..Default::default()
        };
        config::container_security(c).capabilities = Some(add);
    };
    let as_user = |c: &mut cri::ContainerConfig| {
        config::container_security(c).run_as_user = Some(cri::Int64Value { value: 1000 });
    };
    let plain = saved(&daemon, script, |_| {}).await?;
    let capable = saved(&daemon, script, with_caps).await?;
    let free = saved(&daemon, script, unconfined).await?;
    let writable = saved(&daemon, script, |c| mount(c, false)).await?;

    // Each as it was.
    for (path, change) in [
        (&plain, &(|_: &mut cri::ContainerConfig| {}) as Change<'_>),
        (&capable, &with_caps),
        (&free, &unconfined),
        (&writable, &|c| mount(c, false)),
    ] {
        let container = created(&pod, path, change).await?;
        container.start().await?;
        container.exec(&["true"]).await?;
        container.stop(0).await?;
        container.remove().await?;
    }
    for (path, change, word) in [
        (
            &capable,
            &(|_: &mut cri::ContainerConfig| {}) as Change<'_>,
            "CAP_SYS_ADMIN",
        ),
        (&free, &|_| {}, "seccomp"),
        (&plain, &as_user, "user 0"),
        (
            &plain,
            &|c| config::container_security(c).no_new_privs = true,
            "privileges",
        ),
        (
            &plain,
            &|c| config::container_security(c).readonly_rootfs = true,
            "is not ro",
        ),
        (
            &plain,
            &|c| {
                config::container_security(c)
                    .masked_paths
                    .push("/proc/uptime".into())
            },
            "/proc/uptime",
        ),
        (&plain, &|c| mount(c, false), "/data"),
        (&writable, &|c| mount(c, true), "/data"),
        (&writable, &|_| {}, "/data"),
    ] {
        let answer = created(&pod, path, change).await.map(|c| c.id);
        refused(answer, Code::InvalidArgument, &[word]);
    }
    Ok(())
}

/// criu reads the limits of other users' processes, which needs this capability.
fn needs_sys_resource() -> Result<()> {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let status = read("/proc/self/status")?;
    let held = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .context("CapEff")?;
    match u64::from_str_radix(held.trim(), 16)? & CAP_SYS_RESOURCE {
        0 => skip("criu can't dump processes of other users without CAP_SYS_RESOURCE"),
        _ => Ok(()),
    }
}

async fn users_are_compared(env: Env) -> Result<()> {
    needs_sys_resource()?;
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(|_| {}).await?;
    let as_user = |id: i64| {
        move |c: &mut cri::ContainerConfig| {
            config::container_security(c).run_as_user = Some(cri::Int64Value { value: id });
        }
    };
    let path = saved(&daemon, "echo ready; sleep 1000", as_user(1000)).await?;
    // A root that may become anybody may have become this one.
    for id in [1000, 0] {
        let container = created(&pod, &path, as_user(id)).await?;
        container.start().await?;
        let status = read(format!("/proc/{}/status", container.pid()?))?;
        assert!(status.contains("Uid:\t1000\t1000"), "{status}");
    }
    let answer = created(&pod, &path, as_user(1001)).await.map(|c| c.id);
    refused(answer, Code::InvalidArgument, &["user 1000"]);
    // A terminal is its user's.
    let change = |c: &mut cri::ContainerConfig| {
        as_user(1000)(c);
        on_terminal(c);
    };
    let path = saved(&daemon, TALKER, change).await?;
    let container = created(&pod, &path, change).await?;
    container.start().await?;
    let mut client = attach(&container, true).await?;
    client.send(STDIN, b"here\n").await?;
    client.until(STDOUT, "got here kept\r\n").await?;
    let owner = ["stat", "-c", "%u", "/dev/pts/0", "/dev/console"];
    assert_eq!(container.exec_output(&owner).await?, "1000\n1000");
    Ok(())
}

async fn what_cannot_be_restored(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let path = saved(&daemon, "echo ready; sleep 1000", |_| {}).await?;
    let pod = daemon.pod(|_| {}).await?;
    let shared = daemon
        .pod(|c| config::pod_namespaces(c).pid = cri::NamespaceMode::Pod as i32)
        .await?;
    let answer = created(&shared, &path, |_| {}).await.map(|c| c.id);
    refused(answer, Code::InvalidArgument, &["PID namespace"]);
    let among = shared
        .run(&["sh", "-c", "echo ready; sleep 1000"], |_| {})
        .await?;
    among.says("ready").await?;
    let archive = env.root.join("shared.tar");
    checkpoint(&among, &archive, 0).await?;
    let answer = created(&pod, &archive, |_| {}).await.map(|c| c.id);
    refused(answer, Code::InvalidArgument, &["PID namespace"]);
    Ok(())
}

/// The archive with some members changed.
fn changed(
    path: &Path,
    to: &Path,
    change: impl FnOnce(&mut BTreeMap<PathBuf, Vec<u8>>),
) -> Result<()> {
    let mut members = files(std::fs::File::open(path)?)?;
    members.retain(|name, _| !name.as_os_str().is_empty() && name != Path::new("checkpoint"));
    change(&mut members);
    let mut builder = tar::Builder::new(std::fs::File::create(to)?);
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        builder.append_data(&mut header, name, content.as_slice())?;
    }
    builder.into_inner()?.flush()?;
    Ok(())
}

async fn checkpoints_that_are_none(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let path = saved(&daemon, "echo ready; sleep 1000", |_| {}).await?;
    let pod = daemon.pod(|_| {}).await?;
    let gone = created(&pod, Path::new("/nonexistent/c.tar"), |_| {})
        .await
        .map(|c| c.id);
    refused(gone, Code::NotFound, &["/nonexistent/c.tar"]);
    let bad = env.root.join("bad.tar");
    let owned = |header: &mut tar::Header| {
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
    };
    let escape = move |members: &mut BTreeMap<PathBuf, Vec<u8>>| {
        let mut inner = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        owned(&mut header);
        inner.append_link(&mut header, "out", "/").unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        owned(&mut header);
        inner
            .append_data(&mut header, "out/slipway-escaped", &b"x"[..])
            .unwrap();
        members.insert("rootfs-diff.tar".into(), inner.into_inner().unwrap());
    };
    let put = |name: &'static str, content: &'static [u8]| {
        move |members: &mut BTreeMap<PathBuf, Vec<u8>>| {
            drop(members.insert(name.into(), content.to_vec()))
        }
    };
    type Spoil = Box<dyn FnOnce(&mut BTreeMap<PathBuf, Vec<u8>>) + Send>;
    let cases: Vec<(&str, Spoil)> = vec![
        ("config.dump", Box::new(put("config.dump", b"{"))),
        ("spec.dump", Box::new(put("spec.dump", b"5"))),
        ("deleted.files", Box::new(put("deleted.files", b"{}"))),
        (
            "leads upwards",
            Box::new(put("deleted.files", b"[\"/../../etc\"]")),
        ),
        (
            "inventory.img",
            Box::new(put("checkpoint/inventory.img", b"xxxxxxxxxxxx")),
        ),
        ("binfmt", Box::new(put("checkpoint/binfmt-misc.img", b"x"))),
        ("damaged", Box::new(put("rootfs-diff.tar", &[7; 1000]))),
        ("out/slipway-escaped", Box::new(escape)),
        (
            "pstree.img",
            Box::new(|m| drop(m.remove(Path::new("checkpoint/pstree.img")))),
        ),
        (
            "seccomp",
            Box::new(|m| drop(m.remove(Path::new("checkpoint/seccomp.img")))),
        ),
    ];
    for (word, change) in cases {
        changed(&path, &bad, change)?;
        let answer = created(&pod, &bad, |_| {}).await.map(|c| c.id);
        let Err(status) = &answer else {
            bail!("{word}: created")
        };
        ensure!(status.message().contains(word), "{word}: {status}");
        ensure!(
            matches!(status.code(), Code::InvalidArgument | Code::Internal),
            "{word}: {status}"
        );
    }
    assert!(!Path::new("/slipway-escaped").exists());
    // criu itself finds this wrong, at the start.
    changed(&path, &bad, |members| {
        members.remove(Path::new("checkpoint/mm-1.img")).unwrap();
    })?;
    let container = created(&pod, &bad, |_| {}).await?;
    refused(container.start().await, Code::FailedPrecondition, &["criu"]);
    let status = container.exited().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (128, "ContainerCannotRun")
    );
    container.gone().await?;
    let list = std::fs::read_dir(env.root.join("state/checkpoints"))?.count();
    assert_eq!(list, 0);
    Ok(())
}

async fn nothing_is_restored_unasked(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let answer = created(&pod, Path::new("/nonexistent/c.tar"), |_| {})
        .await
        .map(|c| c.id);
    refused(answer, Code::Unimplemented, &["checkpoint.restore"]);
    let answer = daemon
        .runtime()
        .restore_pod(cri::RestorePodRequest::default())
        .await;
    refused(answer, Code::Unimplemented, &["checkpoint.restore"]);
    Ok(())
}

async fn its_image_is_gone(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let path = saved(&daemon, "echo ready; sleep 1000", |_| {}).await?;
    let remove = cri::RemoveImageRequest {
        image: Some(cri::ImageSpec {
            image: image("test"),
            ..Default::default()
        }),
    };
    daemon.images().remove_image(remove.clone()).await?;
    let pod = daemon.pod(|_| {}).await?;
    // It is pulled by its digest.
    let container = created(&pod, &path, |_| {}).await?;
    container.start().await?;
    container.exec(&["true"]).await?;
    pod.stop().await?;
    pod.remove().await?;
    daemon.images().remove_image(remove).await?;
    let nowhere = env.root.join("nowhere.tar");
    changed(&path, &nowhere, |members| {
        let config = members.get_mut(Path::new("config.dump")).unwrap();
        let mut dump: serde_json::Value = serde_json::from_slice(config).unwrap();
        dump["rootfsImageRef"] = format!("127.0.0.1:1/none@sha256:{}", "0".repeat(64)).into();
        *config = dump.to_string().into_bytes();
    })?;
    let pod = daemon.pod(|_| {}).await?;
    let answer = created(&pod, &nowhere, |_| {}).await.map(|c| c.id);
    refused(
        answer,
        Code::FailedPrecondition,
        &["127.0.0.1:1/none", "pull or import"],
    );
    Ok(())
}

async fn criu_hangs(env: Env) -> Result<()> {
    let real = criu()?;
    let path = script(&env, &format!("exec {real} \"$@\""))?;
    let daemon = env
        .daemon_with(|s| {
            s.set("checkpoint.criu", &format!("{path:?}"));
            s.set("checkpoint.restore", "true");
            s.set("checkpoint.timeout", "\"15s\"");
        })
        .await?;
    daemon.pull("test").await?;
    let archive = saved(&daemon, "echo ready; sleep 1000", |_| {}).await?;
    let pod = daemon.pod(|_| {}).await?;
    let late = created(&pod, &archive, |_| {}).await?;
    script(&env, "exec sleep 1000")?;
    refused(late.start().await, Code::DeadlineExceeded, &["in time"]);
    assert_eq!(late.exited().await?.exit_code, 128);
    late.gone().await?;
    // A stop ends it at once.
    let stopped = created(&pod, &archive, |_| {}).await?;
    let start = tokio::spawn({
        let stopped = stopped.clone();
        async move { stopped.start().await }
    });
    eventually("criu in the container's cgroup", seconds(10), || async {
        Ok((!stopped.processes().is_empty()).then_some(()))
    })
    .await?;
    stopped.stop(0).await?;
    assert!(start.await?.is_err());
    stopped.gone().await?;
    stopped.remove().await.map_err(Into::into)
}

async fn criu_and_the_keeper_are_killed(env: Env) -> Result<()> {
    let real = criu()?;
    let path = script(&env, &format!("exec {real} \"$@\""))?;
    let daemon = daemon_with(&env, &path).await?;
    let archive = saved(&daemon, "echo ready; sleep 1000", |_| {}).await?;
    // As if half of the processes were made: they do not go with criu.
    script(&env, "setsid sleep 1000 & exec sleep 1000")?;
    let busy = |container: &Container| {
        let container = container.clone();
        async move {
            eventually("criu and a process of its", seconds(10), || async {
                Ok((container.processes().len() > 2).then_some(()))
            })
            .await
        }
    };
    let begin = |container: &Container| {
        let container = container.clone();
        tokio::spawn(async move { container.start().await })
    };
    let sleeps = |container: &Container| -> Vec<i32> {
        let mut pids = container.processes();
        pids.retain(|pid| {
            read(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "sleep")
        });
        pids
    };
    let pod = daemon.pod(|_| {}).await?;
    let container = created(&pod, &archive, |_| {}).await?;
    let start = begin(&container);
    busy(&container).await?;
    for pid in sleeps(&container).into_iter().take(1) {
        // criu is the older one.
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    }
    drop(start);
    container.stop(0).await?;
    container.gone().await?;

    let container = created(&pod, &archive, |_| {}).await?;
    let start = begin(&container);
    busy(&container).await?;
    // A daemon that dies lets the keeper go on.
    daemon.kill(Signal::SIGKILL).await?;
    assert!(start.await?.is_err());
    daemon.launch().await?;
    container.stop(0).await?;
    container.gone().await?;

    let pod = daemon.pod(|_| {}).await?;
    let container = created(&pod, &archive, |_| {}).await?;
    let start = begin(&container);
    busy(&container).await?;
    let init = container.processes();
    let keeper = init
        .iter()
        .filter_map(|pid| objects::keeper_of(*pid).ok())
        .map(|(parent, _)| parent)
        .find(|parent| !init.contains(parent))
        .context("the keeper")?;
    kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
    assert!(start.await?.is_err());
    container.gone().await
}
