//! Pods in virtual machines of their own, by the shim in `integration/vm-shim`, which boots one for each with QEMU. It has what
//! only such shims have: a sandbox API, containers without processes on the host, a network stack and limits of its own.

use crate::harness::*;

tests![a_machine_for_a_pod];

const HANDLER: &str = "vm";
const MIB: i64 = 1 << 20;

/// What `integration/test-vm-shim` says: the shim's program and the directory of a kernel.
fn parts() -> Result<(String, String)> {
    let part = |name: &str| std::env::var(name).ok();
    match (part("SLIPWAY_TEST_VM_SHIM"), part("SLIPWAY_TEST_VM_KERNEL")) {
        (Some(shim), Some(kernel)) => Ok((shim, kernel)),
        _ => skip("needs a machine's kernel and shim: integration/test-vm-shim has them"),
    }
}

async fn daemon(env: &Env) -> Result<Daemon> {
    let (shim, kernel) = parts()?;
    let daemon = env
        .daemon_with(|s| {
            s.set("runtimes.vm.type", "\"shim-v2\"");
            s.set("runtimes.vm.path", &format!("{shim:?}"));
            s.set("runtimes.vm.create_timeout", "\"120s\"");
            s.set("runtimes.vm.options", &format!("{{ ConfigPath = {kernel:?} }}"));
        })
        .await?;
    daemon.pull("test").await?;
    Ok(daemon)
}

fn sizes(memory: i64, cpu_quota: i64) -> Option<cri::LinuxContainerResources> {
    Some(cri::LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_period: 100_000,
        cpu_quota,
        ..Default::default()
    })
}

async fn pod(daemon: &Daemon) -> Result<Pod> {
    let mut config = config::pod(daemon);
    config::own_network(&mut config);
    let linux = config.linux.get_or_insert_default();
    linux.resources = sizes(128 * MIB, 100_000);
    linux.overhead = sizes(64 * MIB, 50_000);
    Ok(daemon.run_pod_under(HANDLER, config).await?)
}

async fn a_machine_for_a_pod(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let container = pod
        .run(&["sh", "-c", "echo out; echo err >&2; exec sleep 1000"], |_| {})
        .await?;
    container.says("out").await?;
    println!("{}", container.exec_output(&["sh", "-c", "uname -a; cat /proc/cmdline /proc/meminfo; ip a; ip r; mount; nproc; id"]).await?);
    Ok(())
}
