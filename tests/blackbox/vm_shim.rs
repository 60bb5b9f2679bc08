//! Pods in virtual machines of their own, by the shim in `integration/vm-shim`, which boots one for each with QEMU. It has what
//! only such shims have: a sandbox API, containers without processes on the host, a network stack and limits of its own.

use std::path::Path;
use std::time::Instant;

use containerd_shim_protos::api::{PauseRequest, ResumeRequest};
use containerd_shim_protos::sandbox_api::SandboxStatusRequest;
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::ttrpc::context::with_timeout;
use containerd_shim_protos::{Client, TaskClient};
use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::*;
use crate::{network, stats, stream};

tests![
    a_machine_for_a_pod,
    everything_of_a_container,
    terminals_and_input,
    network_of_a_machine,
    statistics_and_limits,
    a_restart_of_the_daemon,
    a_machine_that_is_killed,
    a_shim_that_is_killed,
    a_shim_that_stops_answering,
    a_keeper_that_is_killed,
    machines_that_can_not_be,
];

const HANDLER: &str = "vm";
/// Names the shim's program, and these tests are part of a run.
pub const SHIM: &str = "SLIPWAY_TEST_VM_SHIM";
const MIB: i64 = 1 << 20;

/// What `integration/test-vm-shim` says: the shim's program and the directory of a kernel.
fn parts() -> Result<(String, String)> {
    let part = |name: &str| std::env::var(name).ok();
    match (part(SHIM), part("SLIPWAY_TEST_VM_KERNEL")) {
        (Some(shim), Some(kernel)) => Ok((shim, kernel)),
        _ => skip("needs a machine's kernel and shim: integration/test-vm-shim has them"),
    }
}

async fn daemon(env: &Env) -> Result<Daemon> {
    let (shim, kernel) = parts()?;
    let daemon = env
        .daemon_with(|s| {
            for (name, kernel) in [(HANDLER, kernel.as_str()), ("wrong", "/nonexistent")] {
                let options = format!("{{ ConfigPath = {kernel:?} }}");
                for (key, value) in [
                    ("type", "\"shim-v2\""),
                    ("path", &format!("{shim:?}")),
                    ("create_timeout", "\"120s\""),
                    ("options", &options),
                ] {
                    s.set(&format!("runtimes.{name}.{key}"), value);
                }
            }
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

fn in_its_network(daemon: &Daemon) -> cri::PodSandboxConfig {
    let mut config = config::pod(daemon);
    config::own_network(&mut config);
    config
}

async fn pod(daemon: &Daemon) -> Result<Pod> {
    let mut config = in_its_network(daemon);
    config.linux.get_or_insert_default().resources = sizes(160 * MIB, 100_000);
    Ok(daemon.run_pod_under(HANDLER, config).await?)
}

/// Processes whose command line begins with this program and has this word in it.
fn processes(program: &str, word: &str) -> Vec<i32> {
    let all = daemon::names(Path::new("/proc"));
    let all = all.iter().filter_map(|name| name.parse::<i32>().ok());
    all.filter(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command.split(|b| *b == 0);
        let first = words
            .next()
            .unwrap_or_default()
            .ends_with(program.as_bytes());
        first && String::from_utf8_lossy(&command).contains(word)
    })
    .collect()
}

/// The pod's virtual machine: QEMU's process, which is in its sandbox's cgroup.
fn machine(pod: &Pod) -> Result<i32> {
    let own = format!("slipway-sandbox-{}", pod.id);
    let all = processes("qemu-system-x86_64", "");
    let found = all.into_iter().find(|pid| {
        let cgroups = read(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        cgroups.contains(&own)
    });
    found.context("the pod has no machine in its sandbox's cgroup")
}

fn shim(pod: &Pod) -> Result<i32> {
    let (program, _) = parts()?;
    let found = processes(&program, &pod.id);
    found.first().copied().context("the pod has no shim")
}

/// Nothing of a pod's machine and shim is there any more. (The runner looks for mounts, cgroups and directories.)
async fn nothing_left(pod: &Pod) -> Result<()> {
    let socket = format!("/run/slipway-vm-shim-{}", &pod.id[..16]);
    eventually("the end of machine and shim", seconds(10), || async {
        let gone = machine(pod).is_err() && shim(pod).is_err() && !Path::new(&socket).exists();
        Ok(gone.then_some(()))
    })
    .await
}

async fn remove(pod: &Pod) -> Result<()> {
    pod.stop().await?;
    pod.remove().await?;
    nothing_left(pod).await
}

async fn a_machine_for_a_pod(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let mut config = in_its_network(&daemon);
    let linux = config.linux.get_or_insert_default();
    linux.resources = sizes(128 * MIB, 100_000);
    linux.overhead = sizes(64 * MIB, 50_000);
    let pod = daemon.run_pod_under(HANDLER, config).await?;
    let container = pod.sleeper().await?;
    // Another kernel, as large as asked: a processor and a half are two.
    let here = read("/proc/sys/kernel/osrelease")?;
    assert_ne!(container.exec_output(&["uname", "-r"]).await?, here);
    let arguments = container.exec_output(&["cat", "/proc/cmdline"]).await?;
    assert!(arguments.contains("no_timer_check"), "{arguments}");
    assert_eq!(container.exec_output(&["nproc"]).await?, "2");
    let total = container
        .exec_output(&["sh", "-c", "awk '/^MemTotal/ {print $2}' /proc/meminfo"])
        .await?;
    let total: i64 = total.parse()?;
    // What the kernel keeps for itself is not in the total.
    assert!((140 << 10..192 << 10).contains(&total), "{total} KiB");
    assert_eq!(
        container.exec_output(&["hostname"]).await?,
        pod.status().await?.metadata.context("a name")?.name
    );
    // It is in the pod's network, and in the sandbox's cgroup.
    let qemu = machine(&pod)?;
    let of =
        |path: String| std::fs::metadata(path).map(|m| std::os::unix::fs::MetadataExt::ino(&m));
    let pinned = env.root.join("r/pods").join(&pod.id).join("ns/net");
    assert_eq!(
        of(format!("/proc/{qemu}/ns/net"))?,
        of(pinned.display().to_string())?
    );
    remove(&pod).await
}

async fn everything_of_a_container(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let volume = env.dir("volume")?;
    std::fs::write(volume.join("given"), "words\n")?;
    let mount = |path: &str, readonly| cri::Mount {
        host_path: volume.display().to_string(),
        container_path: path.to_owned(),
        readonly,
        ..Default::default()
    };
    let script =
        "echo out; echo err >&2; trap 'echo bye; exit 9' TERM; while :; do sleep 0.1; done";
    let container = pod
        .run(&["sh", "-c", script], |c| {
            c.working_dir = "/made/for/it".into();
            c.mounts = vec![mount("/volume", false), mount("/kept", true)];
            c.envs = vec![cri::KeyValue {
                key: "SAID".into(),
                value: "a b".into(),
            }];
        })
        .await?;
    container.says("out").await?;
    eventually("the other stream", seconds(5), || async {
        Ok((container.stderr()? == "err\n").then_some(()))
    })
    .await?;
    assert_eq!(container.exec_output(&["pwd"]).await?, "/made/for/it");
    assert_eq!(
        container.exec_output(&["sh", "-c", "echo $SAID"]).await?,
        "a b"
    );
    let script =
        "cat /volume/given; echo more >/volume/made; echo no >/kept/made 2>/dev/null || echo kept";
    assert_eq!(
        container.exec_output(&["sh", "-c", script]).await?,
        "words\nkept"
    );
    assert_eq!(read(volume.join("made"))?, "more");
    let exec = container
        .exec(&["sh", "-c", "echo o; echo e >&2; exit 4"])
        .await?;
    assert_eq!(
        (exec.stdout.as_str(), exec.stderr.as_str(), exec.code),
        ("o\n", "e\n", 4)
    );
    // Much output, and none of it lost.
    let exec = container.exec(&["seq", "1", "100000"]).await?;
    assert_eq!(exec.stdout.lines().count(), 100_000);
    assert!(exec.stdout.ends_with("100000\n"));
    let exec = container.exec(&["/no/such/program"]).await?;
    assert_eq!(exec.code, 127, "{exec:?}");
    // What it has started ends with it.
    let began = Instant::now();
    let late = container
        .exec_limited(&["sh", "-c", "sleep 1234 & sleep 1234"], 1)
        .await;
    let late = late.err().context("an exec outlived its limit")?;
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    assert!(began.elapsed() < seconds(10), "{:?}", began.elapsed());
    let left = container.exec(&["pgrep", "-f", "sleep 1234"]).await?;
    assert_eq!(left.stdout, "", "{left:?}");

    // Its own last words within the grace, and none for one that does not listen.
    container.stop(20).await?;
    let status = container.status().await?;
    assert_eq!(status.exit_code, 9, "{status:?}");
    assert_eq!(container.stdout()?, "out\nbye\n");
    container.remove().await?;
    let deaf = pod
        .run(&["sh", "-c", "trap '' TERM; echo deaf; sleep 1000"], |_| {})
        .await?;
    deaf.says("deaf").await?;
    deaf.stop(1).await?;
    assert_eq!(deaf.status().await?.exit_code, 137);

    let user = pod
        .run(&["sh", "-c", "id -u; echo last words; exit 3"], |c| {
            container_security(c).run_as_user = Some(cri::Int64Value { value: 1000 });
        })
        .await?;
    assert_eq!(user.exited().await?.exit_code, 3);
    assert_eq!(user.stdout()?, "1000\nlast words\n");
    let never = pod.create(&["/no/such/program"], |_| {}).await?;
    let failure = never.start().await.err().context("it started")?;
    assert_eq!(failure.code(), Code::FailedPrecondition, "{failure}");
    assert_eq!(never.status().await?.exit_code, 127);
    remove(&pod).await
}

async fn terminals_and_input(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let sleeper = pod.sleeper().await?;
    stream::exec_with_all_streams_of(&sleeper).await?;
    stream::exec_on_a_terminal_of(&sleeper).await?;
    stream::attach_until_the_end_of_input(&pod).await?;
    // With a restart of the daemon.
    stream::attach_to_a_terminal_of(&pod).await?;
    remove(&pod).await
}

async fn network_of_a_machine(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let server = "echo up; while :; do echo heard | nc -l -p 8090; done";
    let server = pod.run(&["sh", "-c", server], |_| {}).await?;
    server.says("up").await?;
    let status = pod.status().await?.network.context("a network")?;
    let address = status.ip;
    let ask = |place: &str| format!("nc {place} 8090 </dev/null");
    // The other containers of the pod, at localhost, too; another pod; and the host.
    let inside = pod.sleeper().await?;
    let other = daemon
        .run_pod_under("native", in_its_network(&daemon))
        .await?;
    let outside = other.sleeper().await?;
    for (client, place) in [
        (&inside, "127.0.0.1"),
        (&inside, &address),
        (&outside, &address),
    ] {
        let heard = eventually(&format!("an answer at {place}"), seconds(10), || async {
            let exec = client.exec(&["sh", "-c", &ask(place)]).await?;
            Ok((exec.code == 0).then_some(exec.stdout))
        })
        .await?;
        assert_eq!(heard, "heard\n", "{place}");
    }
    let told = inside.exec_output(&["ip", "address"]).await?;
    assert!(told.contains(&address), "{told}");
    for more in status.additional_ips {
        assert!(told.contains(&more.ip), "{told}");
    }
    let heard = eventually("an answer for the host", seconds(10), || async {
        let text = network::hear(&format!("{address}:8090")).await;
        Ok(text.ok().filter(|text| !text.is_empty()))
    })
    .await?;
    assert_eq!(heard, "heard\n");
    stream::forward(&pod).await?;
    pod.stop().await?;
    let rules = output("iptables-save", &[]).await?;
    assert!(!rules.contains(&pod.id), "{rules}");
    remove(&pod).await
}

async fn statistics_and_limits(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let limited = |bytes| {
        move |c: &mut cri::ContainerConfig| {
            let linux = c.linux.get_or_insert_default();
            linux
                .resources
                .get_or_insert_default()
                .memory_limit_in_bytes = bytes;
        }
    };
    let idle = pod.run(&["sleep", "1000"], limited(48 * MIB)).await?;
    let busy = pod
        .run(&["sh", "-c", "while :; do :; done"], limited(32 * MIB))
        .await?;
    // CPU time of the one and not of the other: it is counted for each in the machine.
    let cpu = |stats: &cri::ContainerStats| {
        stats::value(stats.cpu.and_then(|c| c.usage_core_nano_seconds))
    };
    let used = eventually("a second of CPU time", seconds(30), || async {
        let used = stats::stats(&busy).await?;
        Ok((cpu(&used) > 1_000_000_000).then_some(used))
    })
    .await?;
    let little = stats::stats(&idle).await?;
    assert!(cpu(&little) < cpu(&used) / 2, "{little:?} {used:?}");
    let memory = used.memory.context("memory")?;
    let bytes = stats::value(memory.usage_bytes);
    assert!((1 << 16..32 << 20).contains(&bytes), "{memory:?}");
    assert!(
        stats::value(memory.available_bytes) < 32 << 20,
        "{memory:?}"
    );
    let cores = eventually("a second sample", seconds(10), || async {
        let cpu = stats::stats(&busy).await?.cpu.context("cpu")?;
        Ok(cpu.usage_nano_cores.filter(|n| n.value > 0))
    })
    .await?;
    assert!(cores.value < 2_000_000_000, "{cores:?}");
    // The pod's are the machine's.
    let request = cri::PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let answer = daemon.runtime().pod_sandbox_stats(request).await?;
    let linux = answer.into_inner().stats.context("statistics")?.linux;
    let linux = linux.context("statistics")?;
    let whole = stats::value(linux.cpu.and_then(|c| c.usage_core_nano_seconds));
    assert!(whole > cpu(&used), "{whole}");
    assert_eq!(linux.containers.len(), 2);
    let interface = linux.network.and_then(|n| n.default_interface);
    assert_eq!(interface.context("an interface")?.name, "eth0");

    // Limits are the guest's kernel's to keep.
    let file = "/sys/fs/cgroup/memory.max";
    let limit = (48 * MIB).to_string();
    assert_eq!(idle.exec_output(&["cat", file]).await?, limit);
    let update = cri::LinuxContainerResources {
        memory_limit_in_bytes: 40 * MIB,
        ..Default::default()
    };
    idle.update(update).await?;
    let limit = (40 * MIB).to_string();
    assert_eq!(idle.exec_output(&["cat", file]).await?, limit);
    let hungry = pod
        .run(&["sh", "-c", "tail /dev/zero; exit 5"], |_| {})
        .await?;
    // The shell outlives what the kernel kills for want of memory; one that is killed itself says so.
    hungry.stop(0).await?;
    let hungry = pod.run(&["tail", "/dev/zero"], limited(16 * MIB)).await?;
    let status = hungry.exited().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled"),
        "{status:?}"
    );
    // What no call of the CRI's does, by a client that others wrote: the numbers stand still with the container.
    let (tasks, sandboxes) = clients(&pod)?;
    let call = || with_timeout(10_000_000_000);
    let paused = |id: &str| {
        let mut request = PauseRequest::new();
        request.id = id.to_owned();
        request
    };
    tasks.pause(call(), &paused(&busy.id))?;
    let before = cpu(&stats::stats(&busy).await?);
    idle.exec_output(&["sleep", "1"]).await?;
    assert_eq!(cpu(&stats::stats(&busy).await?), before);
    let mut request = ResumeRequest::new();
    request.id.clone_from(&busy.id);
    tasks.resume(call(), &request)?;
    eventually("more CPU time", seconds(10), || async {
        Ok((cpu(&stats::stats(&busy).await?) > before).then_some(()))
    })
    .await?;
    let mut request = SandboxStatusRequest::new();
    request.sandbox_id.clone_from(&pod.id);
    let status = sandboxes.sandbox_status(call(), &request)?;
    assert_eq!(
        (status.state.as_str(), status.pid.cast_signed()),
        ("SANDBOX_READY", machine(&pod)?)
    );
    // A shim that hangs holds nobody up for long, and then there are no numbers.
    signal(shim(&pod)?, Signal::SIGSTOP)?;
    let began = Instant::now();
    let nothing = stats::stats(&busy).await?;
    assert!(
        nothing
            .cpu
            .is_none_or(|c| c.usage_core_nano_seconds.is_none()),
        "{nothing:?}"
    );
    stats::stats(&idle).await?;
    assert!(began.elapsed() < seconds(4), "{:?}", began.elapsed());
    signal(shim(&pod)?, Signal::SIGCONT)?;
    remove(&pod).await
}

/// Clients of the pod's shim.
fn clients(pod: &Pod) -> Result<(TaskClient, SandboxClient)> {
    let address = format!("unix:///run/slipway-vm-shim-{}", &pod.id[..16]);
    let connect = || Client::connect(&address);
    Ok((TaskClient::new(connect()?), SandboxClient::new(connect()?)))
}

async fn a_restart_of_the_daemon(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let (sleeper, created) = (
        pod.sleeper().await?,
        pod.create(&["echo", "later"], |_| {}).await?,
    );
    let gate = Gate::new(&env, "gate")?;
    let ends = gate.behind(&pod, "echo unseen; exit 23").await?;
    let qemu = machine(&pod)?;
    daemon.kill(Signal::SIGKILL).await?;
    gate.open()?;
    daemon.launch().await?;
    assert_eq!(machine(&pod)?, qemu);
    assert_eq!(sleeper.exec_output(&["echo", "well"]).await?, "well");
    assert!(stats::stats(&sleeper).await?.cpu.is_some());
    assert_eq!(ends.exited().await?.exit_code, 23);
    assert_eq!(ends.stdout()?, "unseen\n");
    created.start().await?;
    created.exited().await?;
    assert_eq!(created.stdout()?, "later\n");
    remove(&pod).await
}

async fn a_machine_that_is_killed(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let (sleeper, created) = (pod.sleeper().await?, pod.create(&["true"], |_| {}).await?);
    signal(machine(&pod)?, Signal::SIGKILL)?;
    for container in [&sleeper, &created] {
        let status = container.exited().await?;
        assert!([137, 255].contains(&status.exit_code), "{status:?}");
    }
    pod.not_ready().await?;
    assert!(pod.try_create(|_| {}).await.is_err());
    remove(&pod).await
}

async fn a_shim_that_is_killed(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let sleeper = pod.sleeper().await?;
    let qemu = machine(&pod)?;
    signal(shim(&pod)?, Signal::SIGKILL)?;
    let status = sleeper.exited().await?;
    assert_eq!(status.exit_code, 255, "{status:?}");
    assert!(status.message.contains(HANDLER), "{status:?}");
    pod.not_ready().await?;
    // The machine goes with it, before anybody asks for that.
    eventually("the machine's end", seconds(10), || async {
        Ok((!Path::new(&format!("/proc/{qemu}")).exists()).then_some(()))
    })
    .await?;
    remove(&pod).await
}

async fn a_shim_that_stops_answering(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let sleeper = pod.sleeper().await?;
    signal(shim(&pod)?, Signal::SIGSTOP)?;
    let late = sleeper.exec_limited(&["true"], 1).await;
    let late = late.err().context("an exec ended")?;
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    let began = Instant::now();
    remove(&pod).await?;
    assert!(began.elapsed() < seconds(45), "{:?}", began.elapsed());
    Ok(())
}

async fn a_keeper_that_is_killed(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = pod(&daemon).await?;
    let sleeper = pod.sleeper().await?;
    signal(pod.keeper(&env)?, Signal::SIGKILL)?;
    assert_eq!(sleeper.exited().await?.exit_code, 255);
    // The daemon ends machine and shim.
    nothing_left(&pod).await?;
    remove(&pod).await
}

async fn machines_that_can_not_be(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    // What the shim says is told, and nothing is left of what did not come up.
    let mut small = in_its_network(&daemon);
    small.linux.get_or_insert_default().resources = sizes(16 * MIB, 100_000);
    for (handler, config, code, words) in [
        (
            "wrong",
            in_its_network(&daemon),
            Code::Internal,
            "/nonexistent",
        ),
        (HANDLER, small, Code::Internal, "its agent does not speak"),
        (
            HANDLER,
            config::pod(&daemon),
            Code::Internal,
            "host's network",
        ),
    ] {
        let refusal = daemon.run_pod_under(handler, config).await.map(|p| p.id);
        refused(refusal, code, &[handler, words]);
    }
    let left = leaks::settle(&env, leaks::objects).await;
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}
