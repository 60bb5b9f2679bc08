//! UpdateContainerResources and UpdatePodSandboxResources.

use std::time::Duration;

use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::*;

tests![
    limits_change_and_stay,
    only_what_is_named_changes,
    less_memory_than_is_in_use,
    all_or_nothing,
    what_cannot_be_updated,
    the_pods_own_resources,
];

const MIB: i64 = 1 << 20;

type Resources = cri::LinuxContainerResources;

fn version_two() -> bool {
    std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

async fn told(container: &Container) -> Result<Resources> {
    let resources = container.status().await?.resources;
    resources.and_then(|r| r.linux).context("no resources")
}

/// Memory limit, quota, period, and weight or shares, in the kernel's words.
fn in_force(container: &Container) -> Result<[String; 4]> {
    let file = |name| container.cgroup_file(name);
    if version_two() {
        let cpu = file("cpu.max")?;
        let (quota, period) = cpu.split_once(' ').context("cpu.max")?;
        let (quota, period) = (quota.to_owned(), period.to_owned());
        return Ok([file("memory.max")?, quota, period, file("cpu.weight")?]);
    }
    Ok([
        file("memory.limit_in_bytes")?,
        file("cpu.cfs_quota_us")?,
        file("cpu.cfs_period_us")?,
        file("cpu.shares")?,
    ])
}

fn words(memory: i64, quota: i64, period: i64, shares: i64) -> [String; 4] {
    let weight = match (version_two(), shares) {
        (false, shares) => shares,
        (true, 512) => 59,
        (true, _) => 100,
    };
    [memory, quota, period, weight].map(|n| n.to_string())
}

async fn limited(pod: &Pod, command: &[&str], start: bool) -> Result<Container> {
    let set = |c: &mut cri::ContainerConfig| {
        let linux = c.linux.get_or_insert_default();
        linux.resources = Some(Resources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 1024,
            memory_limit_in_bytes: 64 * MIB,
            ..Default::default()
        });
    };
    match start {
        true => pod.run(command, set).await,
        false => pod.create(command, set).await,
    }
}

async fn limits_change_and_stay(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let running = limited(&pod, &["sleep", "1000"], true).await?;
    let created = limited(&pod, &["sleep", "1000"], false).await?;
    let change = |memory, quota, period| Resources {
        memory_limit_in_bytes: memory,
        cpu_quota: quota,
        cpu_period: period,
        cpu_shares: 512,
        ..Default::default()
    };
    for container in [&running, &created] {
        assert_eq!(in_force(container)?, words(64 * MIB, 50_000, 100_000, 1024));
        // Up, down, and with a period that only one order of writing can reach.
        for (memory, quota, period) in [
            (128 * MIB, 150_000, 100_000),
            (32 * MIB, 5_000, 10_000),
            (48 * MIB, 20_000, 200_000),
        ] {
            container.update(change(memory, quota, period)).await?;
            assert_eq!(in_force(container)?, words(memory, quota, period, 512));
        }
        // There was no swap, and there is none.
        if version_two() {
            assert_eq!(
                container
                    .cgroup_file("memory.swap.max")
                    .unwrap_or("0".into()),
                "0"
            );
        } else if let Ok(both) = container.cgroup_file("memory.memsw.limit_in_bytes") {
            assert_eq!(both, (48 * MIB).to_string());
        }
    }
    created.start().await?;
    assert_eq!(in_force(&created)?, words(48 * MIB, 20_000, 200_000, 512));
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        daemon.kill(signal).await?;
        daemon.launch().await?;
        for container in [&running, &created] {
            let told = told(container).await?;
            assert_eq!(
                (
                    told.memory_limit_in_bytes,
                    told.cpu_quota,
                    told.cpu_period,
                    told.cpu_shares
                ),
                (48 * MIB, 20_000, 200_000, 512)
            );
            assert_eq!(running.exec_output(&["echo", "well"]).await?, "well");
        }
    }
    // And from there on.
    running.update(change(96 * MIB, 0, 0)).await?;
    assert_eq!(in_force(&running)?, words(96 * MIB, 20_000, 200_000, 512));
    Ok(())
}

async fn only_what_is_named_changes(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let daemon = env.daemon_with(|s| s.set("pod.pids_limit", "77")).await?;
    daemon.pull("test").await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = limited(&pod, &["sleep", "1000"], true).await?;
    let before = told(&container).await?;
    container.update(Resources::default()).await?;
    assert_eq!(told(&container).await?, before);
    let quota = Resources {
        cpu_quota: 30_000,
        ..Default::default()
    };
    container.update(quota).await?;
    assert_eq!(
        in_force(&container)?,
        words(64 * MIB, 30_000, 100_000, 1024)
    );
    let unlimited = Resources {
        cpu_quota: -1,
        cpuset_cpus: "0".into(),
        ..Default::default()
    };
    container.update(unlimited).await?;
    assert_eq!(container.cgroup_file("cpuset.cpus")?, "0");
    assert_eq!(container.exec_output(&["nproc"]).await?, "1");
    let quota = in_force(&container)?[1].clone();
    assert_eq!(quota, if version_two() { "max" } else { "-1" });
    assert_eq!(container.cgroup_file("pids.max")?, "77");
    let after = told(&container).await?;
    assert_eq!((after.cpu_quota, after.cpuset_cpus.as_str()), (-1, "0"));
    assert_eq!(after.memory_limit_in_bytes, before.memory_limit_in_bytes);
    Ok(())
}

async fn less_memory_than_is_in_use(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    // A shell that holds on to its memory.
    let script =
        "x=$(head -c 10000000 /dev/zero | tr '\\0' x); echo full; while :; do sleep 1; done";
    let container = limited(&pod, &["sh", "-c", script], true).await?;
    container.says("full").await?;
    let before = (in_force(&container)?, told(&container).await?);
    let change = Resources {
        memory_limit_in_bytes: 6 * MIB,
        cpu_quota: 10_000,
        ..Default::default()
    };
    let limit = (6 * MIB).to_string();
    refused(
        container.update(change).await,
        Code::FailedPrecondition,
        &[&container.id, &limit],
    );
    assert_eq!((in_force(&container)?, told(&container).await?), before);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let state = container.status().await?.state();
    assert_eq!(
        state,
        cri::ContainerState::ContainerRunning,
        "nobody was killed for it"
    );
    Ok(())
}

async fn all_or_nothing(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = limited(&pod, &["sleep", "1000"], true).await?;
    let before = (in_force(&container)?, told(&container).await?);
    let bad = Resources {
        memory_limit_in_bytes: 128 * MIB,
        cpu_quota: 10_000,
        cpuset_cpus: "4000".into(),
        ..Default::default()
    };
    let refused = container.update(bad).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(refused.message().contains("cpuset.cpus"), "{refused}");
    assert_eq!((in_force(&container)?, told(&container).await?), before);
    Ok(())
}

async fn what_cannot_be_updated(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = limited(&pod, &["sleep", "1000"], true).await?;
    let quota = |cpu_quota| Resources {
        cpu_quota,
        ..Default::default()
    };
    refused(
        container.update(quota(-7)).await,
        Code::InvalidArgument,
        &["cpu_quota", "-7"],
    );
    let swap = Resources {
        memory_swap_limit_in_bytes: MIB,
        ..Default::default()
    };
    refused(
        container.update(swap).await,
        Code::InvalidArgument,
        &["memory_swap_limit_in_bytes"],
    );
    container.stop(0).await?;
    refused(
        container.update(quota(10_000)).await,
        Code::FailedPrecondition,
        &[&container.id, "exited"],
    );
    container.remove().await?;
    refused(
        container.update(quota(10_000)).await,
        Code::NotFound,
        &[&container.id],
    );
    let request = cri::UpdateContainerResourcesRequest {
        container_id: pod.sleeper().await?.id,
        ..Default::default()
    };
    refused(
        daemon.runtime().update_container_resources(request).await,
        Code::InvalidArgument,
        &["linux"],
    );
    Ok(())
}

async fn the_pods_own_resources(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let resize = |id: &str, memory: i64| {
        let request = cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id.to_owned(),
            overhead: None,
            resources: Some(Resources {
                memory_limit_in_bytes: memory,
                cpu_quota: 10_000,
                ..Default::default()
            }),
        };
        let mut client = daemon.runtime();
        async move { client.update_pod_sandbox_resources(request).await.map(drop) }
    };
    resize(&pod.id, 300 * MIB).await?;
    refused(
        resize(&pod.id, -5).await,
        Code::InvalidArgument,
        &["resources.memory_limit_in_bytes"],
    );
    refused(resize("nobody", MIB).await, Code::NotFound, &["nobody"]);
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    pod.sleeper().await?;
    pod.stop().await?;
    refused(
        resize(&pod.id, MIB).await,
        Code::FailedPrecondition,
        &[&pod.id],
    );
    Ok(())
}
