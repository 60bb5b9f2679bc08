//! Pods in gVisor (`runsc`): the containers of a pod share a sandbox with a kernel and a network of its own, of which the host
//! sees one process. (What is as under other handlers is tested by running those tests with `SLIPWAY_TEST_HANDLER=runsc`.)

use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::*;

tests![
    containers_of_a_pod_share_a_network,
    a_sandbox_that_is_killed,
    a_sandbox_that_stops_answering,
    a_sandbox_without_memory,
    a_sandbox_that_can_not_be_made,
    beside_a_native_pod_over_a_restart,
    a_container_that_shares_processes,
    capabilities_that_it_does_not_know,
    it_says_what_is_different,
    statistics_of_containers,
    checkpoints_are_refused_by_name,
];

const HANDLER: &str = "runsc";

fn describe(setup: &mut Setup) {
    setup.set("runtimes.runsc.type", "\"oci\"");
}

async fn daemon(env: &Env) -> Result<Daemon> {
    daemon_with(env, |_| {}).await
}

async fn daemon_with(env: &Env, change: impl FnOnce(&mut Setup)) -> Result<Daemon> {
    if !Path::new("/usr/bin/runsc").exists() {
        return skip("needs /usr/bin/runsc");
    }
    let daemon = env
        .daemon_with(|s| {
            describe(s);
            change(s);
        })
        .await?;
    daemon.pull("test").await?;
    Ok(daemon)
}

/// Processes of the runtime that have this word as their name, and a pod's or container's id among their arguments.
fn processes(name: &str, id: &str) -> Vec<i32> {
    let all = daemon::names(Path::new("/proc"));
    let all = all.iter().filter_map(|name| name.parse::<i32>().ok());
    all.filter(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command);
        command.starts_with(name) && command.contains(id)
    })
    .collect()
}

/// The sandbox of a pod.
fn sandbox(pod: &Pod) -> Result<i32> {
    // Its threads trace processes that have its name, too; the first one is the sandbox.
    let found = processes("runsc-sandbox", &pod.id).into_iter().min();
    found.context("the pod has no sandbox")
}

/// Nothing of a pod is left on the host.
async fn nothing_left(pod: &Pod) -> Result<()> {
    eventually("the end of the sandbox", seconds(10), || async {
        let left = [
            processes("runsc", &pod.id),
            processes("runsc-gofer", &pod.id),
        ];
        Ok(left.concat().is_empty().then_some(()))
    })
    .await
}

async fn checkpoints_are_refused_by_name(env: Env) -> Result<()> {
    let criu = crate::checkpoint::script(&env, "exit 1")?;
    let daemon = daemon_with(&env, |s| s.set("checkpoint.criu", &format!("{criu:?}"))).await?;
    crate::checkpoint::is_refused(&daemon, HANDLER, "sandbox").await
}

async fn containers_of_a_pod_share_a_network(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let mut config = config::pod(&daemon);
    config::own_network(&mut config);
    let pod = daemon.run_pod_under(HANDLER, config).await?;
    let server = "echo up; while :; do echo heard | nc -l -p 8080; done";
    let server = pod.run(&["sh", "-c", server], |_| {}).await?;
    server.says("up").await?;
    let client = pod.sleeper().await?;
    // One sandbox has them both.
    sandbox(&pod)?;
    let address = pod.status().await?.network.context("a network")?.ip;
    for place in ["127.0.0.1", &address] {
        let ask = format!("nc {place} 8080 </dev/null");
        let heard = eventually(&format!("an answer at {place}"), seconds(10), || async {
            let exec = client.exec(&["sh", "-c", &ask]).await?;
            Ok((exec.code == 0).then_some(exec.stdout))
        })
        .await?;
        assert_eq!(heard, "heard\n", "{place}");
    }
    // The address has moved into the sandbox, and is reached from the host.
    let told = client.exec_output(&["ip", "address"]).await?;
    assert!(told.contains(&address), "{told}");
    let heard = eventually("an answer for the host", seconds(10), || async {
        let text = crate::network::hear(&format!("{address}:8080")).await;
        Ok(text.ok().filter(|text| !text.is_empty()))
    })
    .await?;
    assert_eq!(heard, "heard\n");
    // One container's end is not the other's.
    server.remove().await?;
    assert_eq!(client.exec_output(&["echo", "well"]).await?, "well");
    pod.stop().await?;
    let rules = output("iptables-save", &[]).await?;
    assert!(!rules.contains(&pod.id), "{rules}");
    pod.remove().await?;
    nothing_left(&pod).await
}

async fn a_sandbox_that_is_killed(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod_under(HANDLER).await?;
    let (sleeper, created) = (pod.sleeper().await?, pod.create(&["true"], |_| {}).await?);
    let bystander = daemon.pod_under(HANDLER).await?;
    let other = bystander.sleeper().await?;
    signal(sandbox(&pod)?, Signal::SIGKILL)?;
    for container in [&sleeper, &created] {
        let status = container.exited().await?;
        assert_eq!(status.exit_code, 137, "{status:?}");
        assert!(
            status.message.contains(HANDLER) && status.message.contains("signal 9"),
            "{status:?}"
        );
    }
    pod.not_ready().await?;
    assert!(pod.try_create(|_| {}).await.is_err());
    pod.stop().await?;
    pod.remove().await?;
    nothing_left(&pod).await?;
    assert_eq!(other.exec_output(&["echo", "well"]).await?, "well");
    Ok(())
}

async fn a_sandbox_that_stops_answering(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod_under(HANDLER).await?;
    let (first, second) = (pod.sleeper().await?, pod.sleeper().await?);
    signal(sandbox(&pod)?, Signal::SIGSTOP)?;
    let began = Instant::now();
    let late = first.exec_limited(&["true"], 1).await;
    let late = late.err().context("an exec ended")?;
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    assert!(began.elapsed() < seconds(10), "{:?}", began.elapsed());
    // A container that can't be ended by itself is ended with all that share its sandbox.
    first.stop(0).await?;
    let status = first.status().await?;
    assert_eq!(status.exit_code, 137, "{status:?}");
    assert_eq!(second.exited().await?.exit_code, 137);
    assert!(began.elapsed() < seconds(60), "{:?}", began.elapsed());
    pod.not_ready().await?;
    pod.stop().await?;
    pod.remove().await?;
    nothing_left(&pod).await?;
    // And at once with its pod.
    let pod = daemon.pod_under(HANDLER).await?;
    pod.sleeper().await?;
    signal(sandbox(&pod)?, Signal::SIGSTOP)?;
    let began = Instant::now();
    pod.stop().await?;
    pod.remove().await?;
    assert!(began.elapsed() < seconds(60), "{:?}", began.elapsed());
    nothing_left(&pod).await
}

/// The directory of a pod's sandbox in the hierarchy that accounts for memory, and the file of its limit.
fn memory_limit(env: &Env, pod: &Pod) -> Result<PathBuf> {
    let tops = stage::cgroup_dirs(&env.cgroup);
    let dirs = tops.iter().flat_map(|top| stage::tree(top));
    let own = dirs.filter(|dir| {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        name.contains("slipway-sandbox-") && name.contains(&pod.id)
    });
    let files = own.flat_map(|dir| ["memory.max", "memory.limit_in_bytes"].map(|f| dir.join(f)));
    let found = files.into_iter().find(|file| file.exists());
    found.context("the sandbox has no limit of memory")
}

async fn a_sandbox_without_memory(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod_under(HANDLER).await?;
    let (sleeper, eater) = (
        pod.sleeper().await?,
        pod.create(&["probe", "eat", "1000"], |_| {}).await?,
    );
    // As the kubelet limits pods, one level higher.
    std::fs::write(memory_limit(&env, &pod)?, (192u64 << 20).to_string())?;
    // Whether the start is answered is a matter of time.
    eater.start().await.ok();
    for container in [&eater, &sleeper] {
        let status = container.exited().await?;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (137, "OOMKilled"),
            "{status:?}"
        );
        assert!(status.message.contains("memory"), "{status:?}");
    }
    pod.not_ready().await?;
    pod.stop().await?;
    pod.remove().await?;
    nothing_left(&pod).await
}

async fn a_sandbox_that_can_not_be_made(env: Env) -> Result<()> {
    let daemon = daemon_with(&env, |s| {
        s.set("runtimes.runsc.options", "[\"--platform=nosuch\"]");
    })
    .await?;
    let mut config = config::pod(&daemon);
    config::own_network(&mut config);
    let failure = daemon.run_pod_under(HANDLER, config).await.map(|p| p.id);
    refused(failure, Code::Internal, &["runsc", "create", "nosuch"]);
    // Nothing is left, as the runner finds.
    Ok(())
}

async fn beside_a_native_pod_over_a_restart(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let (native, own) = (
        daemon.pod_under("native").await?,
        daemon.pod_under(HANDLER).await?,
    );
    let kernel = |container: Container| async move {
        container.exec_output(&["cat", "/proc/version"]).await
    };
    let (in_native, in_own) = (native.sleeper().await?, own.sleeper().await?);
    let here = kernel(in_native.clone()).await?;
    assert_ne!(here, kernel(in_own.clone()).await?);
    let created = own.create(&["echo", "later"], |_| {}).await?;
    let script = "trap 'echo terminated; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let polite = own.run(&["sh", "-c", script], |_| {}).await?;
    polite.says("up").await?;
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    assert_eq!(own.status().await?.runtime_handler, HANDLER);
    assert_eq!(in_own.exec_output(&["echo", "well"]).await?, "well");
    assert_eq!(in_native.exec_output(&["echo", "well"]).await?, "well");
    polite.stop(10).await?;
    assert_eq!(polite.status().await?.exit_code, 5);
    assert!(polite.stdout()?.ends_with("terminated\n"));
    created.start().await?;
    created.exited().await?;
    assert_eq!(created.stdout()?, "later\n");
    own.stop().await?;
    own.remove().await?;
    nothing_left(&own).await
}

async fn a_container_that_shares_processes(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let mut config = config::pod(&daemon);
    config::pod_namespaces(&mut config).pid = cri::NamespaceMode::Pod.into();
    let pod = daemon.run_pod_under(HANDLER, config).await?;
    let script = "sleep 3001 & echo up; exec sleep 3002";
    let one = pod.run(&["sh", "-c", script], |_| {}).await?;
    one.says("up").await?;
    let other = pod.sleeper().await?;
    let seen = other.exec_output(&["ps", "-o", "args"]).await?;
    assert!(
        seen.contains("sleep 3001") && seen.contains("sleep 3002"),
        "{seen}"
    );
    // All of it ends with its first process, though that is nobody's process 1.
    one.stop(0).await?;
    assert_eq!(one.status().await?.exit_code, 137);
    let seen = other.exec_output(&["ps", "-o", "args"]).await?;
    assert!(!seen.contains("sleep 300"), "{seen}");
    Ok(())
}

async fn capabilities_that_it_does_not_know(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let mut config = config::pod(&daemon);
    config::pod_security(&mut config).privileged = true;
    let pod = daemon.run_pod_under(HANDLER, config).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            container_security(c).privileged = true;
        })
        .await?;
    // CAP_SYS_ADMIN is there; CAP_BPF, which there is nothing for in there, is no reason to refuse it all.
    let text = container
        .exec_output(&["grep", "CapEff", "/proc/self/status"])
        .await?;
    let bits = text.split_whitespace().last().context("a mask")?;
    let bits = u64::from_str_radix(bits, 16)?;
    assert!(bits & (1 << 21) != 0 && bits & (1 << 39) == 0, "{text}");
    Ok(())
}

async fn it_says_what_is_different(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    daemon.pod_under(HANDLER).await?;
    let request = cri::StatusRequest { verbose: true };
    let status = daemon.runtime().status(request).await?.into_inner();
    let all: serde_json::Value =
        serde_json::from_str(status.info.get("runtimes").context("info of runtimes")?)?;
    let own = &all[HANDLER];
    assert_eq!(own["usable"], true, "{own}");
    assert_eq!(own["pod_sandbox"], true, "{own}");
    let notes = own["notes"].to_string();
    assert!(notes.contains("share one sandbox"), "{notes}");
    let features = status
        .runtime_handlers
        .iter()
        .find(|handler| handler.name == HANDLER)
        .and_then(|handler| handler.features)
        .context("features")?;
    assert!(!features.user_namespaces);
    let mut mapped = config::pod(&daemon);
    crate::userns::mapped(&mut mapped);
    refused(
        daemon.run_pod_under(HANDLER, mapped).await.map(|p| p.id),
        Code::FailedPrecondition,
        &[HANDLER, "user namespaces", "hostUsers"],
    );
    if own["features"].is_null() {
        assert!(notes.contains("no features command"), "{notes}");
    }
    let config = env.root.join("config.toml").display().to_string();
    let (_, out, _) = daemon
        .command(&["check", "--config", &config, "--output", "json"])
        .await?;
    let found: serde_json::Value = serde_json::from_str(&out)?;
    let findings = found["findings"].as_array().context("findings")?;
    let finding = findings.iter().find(|f| f["id"] == "runtime-runsc");
    let finding = finding.context("a finding of the handler")?;
    let words = finding["found"].as_str().context("words")?;
    assert_eq!(finding["status"], "ok", "{finding}");
    assert!(words.contains("share one sandbox"), "{finding}");
    Ok(())
}

/// CPU time in nanoseconds and memory in bytes that a container is said to use.
async fn used(container: &Container) -> Result<(u64, u64)> {
    let request = cri::ContainerStatsRequest {
        container_id: container.id.clone(),
    };
    let answer = container.daemon.runtime().container_stats(request).await?;
    let stats = answer.into_inner().stats.context("statistics")?;
    let cpu = stats.cpu.and_then(|c| c.usage_core_nano_seconds);
    let memory = stats.memory.and_then(|m| m.working_set_bytes);
    Ok((
        cpu.context("CPU time")?.value,
        memory.context("memory")?.value,
    ))
}

async fn statistics_of_containers(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod_under(HANDLER).await?;
    let idle = pod.sleeper().await?;
    let (cpu, memory) = used(&idle).await?;
    assert!(cpu > 0 && memory > 1 << 20, "{cpu} {memory}");
    println!("one idle container: {} KiB", memory >> 10);
    // Work that ends, so that the runtime need not answer beside it.
    let script = "i=0; while [ $i -lt 500000 ]; do i=$((i+1)); done; echo done; exec sleep 1000";
    let busy = pod.run(&["sh", "-c", script], |_| {}).await?;
    eventually("the end of the work", seconds(60), || async {
        Ok((busy.stdout()? == "done\n").then_some(()))
    })
    .await?;
    let look = async |container: &Container| {
        eventually("statistics", seconds(10), || async {
            Ok(used(container).await.ok())
        })
        .await
    };
    // It is seen where it was done.
    let (busy_cpu, busy_memory) = look(&busy).await?;
    let (idle_cpu, idle_memory) = look(&idle).await?;
    assert!(
        busy_cpu > 100_000_000 && idle_cpu < busy_cpu / 2,
        "{idle_cpu} and {busy_cpu}"
    );
    assert!(
        idle_memory > 0 && idle_memory < busy_memory * 2 && busy_memory < idle_memory * 2,
        "{idle_memory} {busy_memory}: gVisor tells no difference"
    );
    Ok(())
}
