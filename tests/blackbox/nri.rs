//! NRI plugins: what they hear, what they change, and what happens when they don't behave.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use prost::Message as _;
use slipway_proto::nri as api;
use tokio::io::AsyncWriteExt as _;
use tonic::Code;

use crate::harness::plugin::{Plugin, Reply, answer};
use crate::harness::*;

tests![
    the_life_of_a_pod,
    an_exit_is_told_once,
    plugins_of_older_versions,
    adjustments_take_effect,
    tuning_takes_effect,
    interfaces_move_in,
    cdi_devices_are_injected,
    what_cannot_be_adjusted,
    hooks_run,
    plugins_in_conflict,
    a_plugin_that_refuses,
    a_plugin_that_hangs,
    a_plugin_that_crashes,
    a_plugin_that_breaks_the_protocol,
    a_plugin_that_joins_late,
    updates_and_evictions,
    validators,
    installed_plugins_over_a_restart,
    without_nri,
];

fn nothing(_: &str, _: &[u8]) -> Reply {
    Reply::Answer(Vec::new())
}

/// Adjusts every container so.
fn adjusting(adjust: api::ContainerAdjustment) -> impl Fn(&str, &[u8]) -> Reply + Send + Sync {
    move |method: &str, _: &[u8]| match method {
        "CreateContainer" => answer(&api::CreateContainerResponse {
            adjust: Some(adjust.clone()),
            ..Default::default()
        }),
        _ => Reply::Answer(Vec::new()),
    }
}

fn linux(linux: api::LinuxContainerAdjustment) -> api::ContainerAdjustment {
    api::ContainerAdjustment {
        linux: Some(linux),
        ..Default::default()
    }
}

fn variable(key: &str, value: &str) -> api::KeyValue {
    api::KeyValue {
        key: key.to_owned(),
        value: value.to_owned(),
    }
}

async fn the_life_of_a_pod(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let plugin = Plugin::join(&daemon, "10-life", nothing).await?;
    let configured: api::ConfigureRequest = plugin.message("Configure").await?;
    assert_eq!(configured.runtime_name, "slipway");
    assert_eq!(
        (configured.registration_timeout, configured.request_timeout),
        (5000, 2000)
    );
    let pod = daemon
        .pod(|c| drop(c.annotations.insert("k".into(), "v".into())))
        .await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            drop(c.labels.insert("l".into(), "x".into()))
        })
        .await?;
    container.stop(0).await?;
    container.remove().await?;
    pod.stop().await?;
    pod.stop().await?;
    pod.remove().await?;
    let expected = [
        "RunPodSandbox",
        "CreateContainer",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "StopContainer",
        "RemoveContainer",
        "StopPodSandbox",
        "RemovePodSandbox",
    ];
    // All subscribers of CreateContainer validate, too.
    let mut methods = plugin.methods();
    methods.retain(|m| m != "ValidateContainerAdjustment");
    assert_eq!(methods, expected);
    let told: api::RunPodSandboxRequest = plugin.message("RunPodSandbox").await?;
    let told = told.pod.context("no pod")?;
    let metadata = pod.config.metadata.clone().unwrap();
    assert_eq!(
        (&told.id, &told.name, &told.uid, &told.namespace),
        (&pod.id, &metadata.name, &metadata.uid, &metadata.namespace)
    );
    assert_eq!(told.annotations.get("k").map(String::as_str), Some("v"));
    let told: api::CreateContainerRequest = plugin.message("CreateContainer").await?;
    let told = told.container.context("no container")?;
    assert_eq!((&told.id, &told.pod_sandbox_id), (&container.id, &pod.id));
    assert_eq!(told.args, ["sleep", "1000"]);
    assert!(
        told.env.iter().any(|e| e.starts_with("PATH=")),
        "{:?}",
        told.env
    );
    assert!(told.mounts.iter().any(|m| m.destination == "/proc"));
    assert_eq!(told.labels.get("l").map(String::as_str), Some("x"));
    let told: api::PostStartContainerRequest = plugin.message("PostStartContainer").await?;
    let told = told.container.context("no container")?;
    assert_eq!(told.state(), api::ContainerState::ContainerRunning);
    assert!(told.pid > 0 && told.started_at > 0);
    assert_eq!(told.args, ["sleep", "1000"]);
    let told: api::StopContainerRequest = plugin.message("StopContainer").await?;
    let told = told.container.context("no container")?;
    assert_eq!(told.state(), api::ContainerState::ContainerStopped);
    assert_eq!(told.exit_code, 137);
    Ok(())
}

async fn an_exit_is_told_once(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let plugin = Plugin::join(&daemon, "10-exit", nothing).await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.run(&["probe", "exit", "3"], |_| {}).await?;
    // Nobody stops it.
    let told: api::StopContainerRequest = plugin.message("StopContainer").await?;
    assert_eq!(told.container.context("no container")?.exit_code, 3);
    container.stop(0).await?;
    container.remove().await?;
    let stops = plugin
        .methods()
        .iter()
        .filter(|m| *m == "StopContainer")
        .count();
    assert_eq!(stops, 1);
    Ok(())
}

async fn plugins_of_older_versions(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let old = |method: &str, _: &[u8]| match method {
        "Configure" | "Synchronize" | "CreateContainer" | "StopContainer" | "StateChange" => {
            Reply::Answer(Vec::new())
        }
        "ValidateContainerAdjustment" => Reply::Answer(Vec::new()),
        _ => Reply::Unknown,
    };
    let plugin = Plugin::join(&daemon, "10-old", old).await?;
    for _ in 0..2 {
        let pod = daemon.pod(|_| {}).await?;
        pod.sleeper().await?;
        pod.stop().await?;
    }
    let methods = plugin.methods();
    let count = |name: &str| methods.iter().filter(|m| *m == name).count();
    // RunPodSandbox, PostCreate, Start, PostStart, StopPodSandbox, of two pods.
    assert_eq!(count("StateChange"), 10, "{methods:?}");
    assert_eq!(count("RunPodSandbox"), 1, "it is tried once");
    let told: api::StateChangeEvent = plugin.message("StateChange").await?;
    assert_eq!(told.event(), api::Event::RunPodSandbox);
    assert!(told.pod.is_some() && told.container.is_none());
    Ok(())
}

async fn adjustments_take_effect(env: Env) -> Result<()> {
    native_only("what newer specifications have, older runtimes pass over")?;
    let daemon = env.daemon().await?;
    let shared = env.dir("shared")?;
    std::fs::write(shared.join("file"), "from the host\n")?;
    let adjust = api::ContainerAdjustment {
        annotations: [("plugin.test/a".to_owned(), "1".to_owned())].into(),
        env: vec![
            variable("ADDED", "yes"),
            variable("-GONE", ""),
            variable("OLD", "new"),
        ],
        mounts: vec![api::Mount {
            destination: "/shared".into(),
            r#type: "bind".into(),
            source: shared.display().to_string(),
            options: vec!["rbind".into(), "ro".into()],
        }],
        rlimits: vec![api::PosixRlimit {
            r#type: "RLIMIT_NOFILE".into(),
            hard: 512,
            soft: 256,
        }],
        linux: Some(api::LinuxContainerAdjustment {
            devices: vec![api::LinuxDevice {
                path: "/dev/plugged".into(),
                r#type: "c".into(),
                major: 1,
                minor: 7,
                file_mode: Some(api::OptionalFileMode { value: 0o640 }),
                ..Default::default()
            }],
            oom_score_adj: Some(api::OptionalInt { value: 777 }),
            resources: Some(api::LinuxResources {
                pids: Some(api::LinuxPids { limit: 99 }),
                memory: Some(api::LinuxMemory {
                    limit: Some(api::OptionalInt64 { value: 64 << 20 }),
                    ..Default::default()
                }),
                cpu: Some(api::LinuxCpu {
                    shares: Some(api::OptionalUInt64 { value: 512 }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            io_priority: Some(api::LinuxIoPriority {
                class: api::IoPrioClass::IoprioClassBe.into(),
                priority: 6,
            }),
            scheduler: Some(api::LinuxScheduler {
                policy: api::LinuxSchedulerPolicy::SchedBatch.into(),
                nice: 5,
                ..Default::default()
            }),
            sysctl: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let plugin = Plugin::join(&daemon, "10-adjust", adjusting(adjust)).await?;
    let pod = daemon.pod(|_| {}).await?;
    let set = |c: &mut cri::ContainerConfig| {
        for (key, value) in [("GONE", "x"), ("OLD", "old")] {
            c.envs.push(cri::KeyValue {
                key: key.into(),
                value: value.into(),
            });
        }
    };
    let container = pod.run(&["sleep", "1000"], set).await?;
    let env_of = container.exec_output(&["env"]).await?;
    assert!(
        env_of.contains("ADDED=yes") && env_of.contains("OLD=new"),
        "{env_of}"
    );
    assert!(!env_of.contains("GONE"), "{env_of}");
    assert_eq!(
        container.exec_output(&["cat", "/shared/file"]).await?,
        "from the host"
    );
    let written = container
        .exec(&["sh", "-c", "echo x > /shared/file"])
        .await?;
    assert_ne!(written.code, 0, "the mount is read-only");
    assert_eq!(
        container
            .exec_output(&["sh", "-c", "ulimit -n; ulimit -Hn"])
            .await?,
        "256\n512"
    );
    assert_eq!(
        container
            .exec_output(&["sh", "-c", "test -c /dev/plugged && echo device"])
            .await?,
        "device"
    );
    // /dev/full says so to those who may write.
    let full = container
        .exec(&["sh", "-c", "echo x > /dev/plugged"])
        .await?;
    assert!(full.stderr.contains("No space left"), "{}", full.stderr);
    let pid = container.pid()?;
    assert_eq!(read(format!("/proc/{pid}/oom_score_adj"))?, "777");
    let stat = read(format!("/proc/{pid}/stat"))?;
    let after_name: Vec<_> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    // Field 19 is the nice value and 41 the policy; these begin at field 3. 3 is SCHED_BATCH.
    assert_eq!((after_name[16], after_name[38]), ("5", "3"), "{stat}");
    // An exec has them, too.
    let exec = container
        .exec_output(&["sh", "-c", "cut -d' ' -f 19,41 /proc/self/stat"])
        .await?;
    assert_eq!(exec, "5 3");
    let shm = container
        .exec_output(&["cat", "/proc/sys/kernel/shm_rmid_forced"])
        .await?;
    assert_eq!(shm, "1");
    assert_eq!(container.cgroup_file("pids.max")?, "99");
    let limits = container
        .status()
        .await?
        .resources
        .and_then(|r| r.linux)
        .context("no limits")?;
    assert_eq!(
        (limits.memory_limit_in_bytes, limits.cpu_shares),
        (64 << 20, 512)
    );
    let memory = container
        .cgroup_file("memory.limit_in_bytes")
        .or_else(|_| container.cgroup_file("memory.max"))?;
    assert_eq!(memory, (64 << 20).to_string());
    // What was adjusted is what is told from then on.
    let told: api::PostStartContainerRequest = plugin.message("PostStartContainer").await?;
    let told = told.container.context("no container")?;
    assert!(told.env.contains(&"ADDED=yes".to_owned()), "{:?}", told.env);
    assert_eq!(
        told.annotations.get("plugin.test/a").map(String::as_str),
        Some("1")
    );
    assert!(told.mounts.iter().any(|m| m.destination == "/shared"));
    Ok(())
}

async fn tuning_takes_effect(env: Env) -> Result<()> {
    native_only("what newer specifications have, older runtimes pass over")?;
    let daemon = env.daemon().await?;
    let adjust = linux(api::LinuxContainerAdjustment {
        resources: Some(api::LinuxResources {
            memory: Some(api::LinuxMemory {
                reservation: Some(api::OptionalInt64 { value: 32 << 20 }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        io_priority: Some(api::LinuxIoPriority {
            class: api::IoPrioClass::IoprioClassBe.into(),
            priority: 6,
        }),
        memory_policy: Some(api::LinuxMemoryPolicy {
            mode: api::MpolMode::MpolBind.into(),
            nodes: "0".into(),
            flags: Vec::new(),
        }),
        namespaces: vec![api::LinuxNamespace {
            r#type: "-ipc".into(),
            ..Default::default()
        }],
        seccomp_policy: Some(api::LinuxSeccomp {
            default_action: "SCMP_ACT_ALLOW".into(),
            syscalls: vec![api::LinuxSyscall {
                names: vec!["mkdir".into(), "mkdirat".into()],
                action: "SCMP_ACT_ERRNO".into(),
                // ENOSPC: nothing else would say so.
                errno_ret: Some(api::OptionalUInt32 { value: 28 }),
                args: Vec::new(),
            }],
            ..Default::default()
        }),
        ..Default::default()
    });
    let _plugin = Plugin::join(&daemon, "10-tune", adjusting(adjust)).await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let low = container
        .cgroup_file("memory.soft_limit_in_bytes")
        .or_else(|_| container.cgroup_file("memory.low"))?;
    assert_eq!(low, (32 << 20).to_string());
    let pid = container.pid()?;
    let ipc = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/ipc"));
    assert_eq!(ipc(pid)?, ipc(daemon.pid()?.as_raw())?);
    let made = container.exec(&["mkdir", "/x"]).await?;
    assert!(made.stderr.contains("No space left"), "{}", made.stderr);
    let shown = output("ionice", &["-p", &pid.to_string()]).await?;
    assert_eq!(shown.trim(), "best-effort: prio 6");
    // A kernel without NUMA has no such file, and would have refused the policy.
    let maps = read(format!("/proc/{pid}/numa_maps"))?;
    assert!(maps.contains("bind:0"), "{maps}");
    Ok(())
}

async fn interfaces_move_in(env: Env) -> Result<()> {
    native_only("what newer specifications have, older runtimes pass over")?;
    let daemon = env.daemon().await?;
    let name = format!("nri{}", env.number);
    let peer = format!("{name}p");
    output(
        "ip",
        &["link", "add", &name, "type", "veth", "peer", "name", &peer],
    )
    .await?;
    let adjust = linux(api::LinuxContainerAdjustment {
        net_devices: [(
            name.clone(),
            api::LinuxNetDevice {
                name: "data0".into(),
            },
        )]
        .into(),
        ..Default::default()
    });
    let _plugin = Plugin::join(&daemon, "10-net", adjusting(adjust)).await?;
    // There it is already.
    let host = daemon.pod(|_| {}).await?;
    let refusal = host.try_create(|_| {}).await;
    refused(
        refusal,
        Code::InvalidArgument,
        &["net_devices", "host's network"],
    );
    let pod = daemon.pod(config::own_network).await?;
    let container = pod.run(&["sleep", "1000"], |_| {}).await?;
    let inside = container.exec_output(&["ls", "/sys/class/net"]).await?;
    assert!(inside.contains("data0"), "{inside}");
    assert!(!std::path::Path::new("/sys/class/net").join(&name).exists());
    Ok(())
}

async fn cdi_devices_are_injected(env: Env) -> Result<()> {
    let dir = env.dir("cdi")?;
    let file = r#"{"cdiVersion":"0.6.0","kind":"vendor.com/gpu","devices":[{"name":"0","containerEdits":{
        "env":["GPU=0"],"deviceNodes":[{"path":"/dev/gpu0","hostPath":"/dev/null"}]}}]}"#;
    std::fs::write(dir.join("gpu.json"), file)?;
    let daemon = env
        .daemon_with(|s| s.set("pod.cdi_dirs", &format!("[{dir:?}]")))
        .await?;
    daemon.pull("test").await?;
    let device = api::CdiDevice {
        name: "vendor.com/gpu=0".into(),
    };
    let adjust = api::ContainerAdjustment {
        cdi_devices: vec![device],
        ..Default::default()
    };
    let _plugin = Plugin::join(&daemon, "10-cdi", adjusting(adjust)).await?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "echo $GPU; stat -c %t:%T /dev/gpu0";
    let text = pod.output(&["sh", "-c", script], |_| {}).await?;
    assert_eq!(text, "0\n1:3\n");
    Ok(())
}

async fn what_cannot_be_adjusted(env: Env) -> Result<()> {
    type Linux = api::LinuxContainerAdjustment;
    let hook = |path: &str| api::Hook {
        path: path.into(),
        ..Default::default()
    };
    let text = |value: &str| {
        Some(api::OptionalString {
            value: value.into(),
        })
    };
    let cases: Vec<(api::ContainerAdjustment, Code, &str)> = vec![
        (
            api::ContainerAdjustment {
                cdi_devices: vec![api::CdiDevice {
                    name: "vendor.com/gpu=0".into(),
                }],
                ..Default::default()
            },
            Code::FailedPrecondition,
            "vendor.com/gpu=0",
        ),
        (
            api::ContainerAdjustment {
                hooks: Some(api::Hooks {
                    poststop: vec![hook("bin/true")],
                    ..Default::default()
                }),
                ..Default::default()
            },
            Code::InvalidArgument,
            "poststop",
        ),
        (
            api::ContainerAdjustment {
                mounts: vec![api::Mount {
                    destination: "/proc/1".into(),
                    r#type: "bind".into(),
                    source: "/".into(),
                    ..Default::default()
                }],
                ..Default::default()
            },
            Code::InvalidArgument,
            "mounts",
        ),
        (
            api::ContainerAdjustment {
                env: vec![variable("A=B", "x")],
                ..Default::default()
            },
            Code::InvalidArgument,
            "env",
        ),
        (
            linux(Linux {
                cgroups_path: "/elsewhere".into(),
                ..Default::default()
            }),
            Code::Unimplemented,
            "cgroups_path",
        ),
        (
            linux(Linux {
                sysctl: [("kernel.panic".to_owned(), "1".to_owned())].into(),
                ..Default::default()
            }),
            Code::InvalidArgument,
            "kernel.panic",
        ),
        (
            linux(Linux {
                namespaces: vec![api::LinuxNamespace {
                    r#type: "-mount".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            Code::Unimplemented,
            "namespaces",
        ),
        (
            linux(Linux {
                resources: Some(api::LinuxResources {
                    blockio_class: text("fast"),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            Code::FailedPrecondition,
            "pod.blockio_config_file",
        ),
        (
            linux(Linux {
                rdt: Some(api::LinuxRdt {
                    clos_id: text("gold"),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            Code::Unimplemented,
            "rdt",
        ),
        (
            linux(Linux {
                seccomp_policy: Some(api::LinuxSeccomp {
                    default_action: "SCMP_ACT_NONSENSE".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            Code::InvalidArgument,
            "NRI plugin",
        ),
    ];
    let daemon = env.daemon().await?;
    let current = Arc::new(std::sync::Mutex::new(api::ContainerAdjustment::default()));
    let wish = current.clone();
    let plugin = Plugin::join(
        &daemon,
        "10-wish",
        move |method: &str, _: &[u8]| match method {
            "CreateContainer" => answer(&api::CreateContainerResponse {
                adjust: Some(wish.lock().unwrap().clone()),
                ..Default::default()
            }),
            _ => Reply::Answer(Vec::new()),
        },
    )
    .await?;
    let pod = daemon.pod(|_| {}).await?;
    let count = cases.len();
    for (adjust, code, name) in cases {
        *current.lock().unwrap() = adjust;
        refused(pod.try_create(|_| {}).await, code, &[name]);
    }
    // Each was taken back.
    let methods = plugin.methods();
    assert_eq!(
        methods.iter().filter(|m| *m == "RemoveContainer").count(),
        count,
        "{methods:?}"
    );
    *current.lock().unwrap() = api::ContainerAdjustment::default();
    pod.sleeper().await?;
    Ok(())
}

async fn hooks_run(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let place = env.dir("hook")?;
    let script = place.join("hook");
    // It runs in the host's tree and gets the container's state.
    let text = format!(
        "#!/bin/sh\ncat > {0}/state\necho \"$1 $WORD\" > {0}/said\n",
        place.display()
    );
    std::fs::write(&script, text)?;
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let hook = api::Hook {
        path: script.display().to_string(),
        args: vec!["hook".into(), "argument".into()],
        env: vec!["WORD=word".into(), "PATH=/usr/bin:/bin".into()],
        timeout: Some(api::OptionalInt { value: 10 }),
    };
    let later = |name: &str| api::Hook {
        path: "/bin/sh".into(),
        args: ["sh", "-c", &format!("cat >{}/{name}", place.display())]
            .map(String::from)
            .to_vec(),
        env: vec!["PATH=/usr/bin:/bin".into()],
        timeout: None,
    };
    let adjust = api::ContainerAdjustment {
        hooks: Some(api::Hooks {
            create_runtime: vec![hook],
            poststart: vec![later("poststart")],
            poststop: vec![later("poststop")],
            ..Default::default()
        }),
        ..Default::default()
    };
    let _plugin = Plugin::join(&daemon, "10-hook", adjusting(adjust)).await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    assert_eq!(read(place.join("said"))?, "argument word");
    let state: serde_json::Value = serde_json::from_str(&read(place.join("state"))?)?;
    assert_eq!(state["id"], container.id);
    assert!(read(place.join("poststart"))?.contains("\"running\""));
    assert!(!place.join("poststop").exists());
    container.remove().await?;
    assert!(read(place.join("poststop"))?.contains("\"stopped\""));
    Ok(())
}

async fn plugins_in_conflict(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let set = |value: &str| api::ContainerAdjustment {
        env: vec![variable("BOTH", value)],
        ..Default::default()
    };
    let first = Plugin::join(&daemon, "10-first", adjusting(set("1"))).await?;
    let second = Plugin::join(&daemon, "20-second", adjusting(set("2"))).await?;
    let pod = daemon.pod(|_| {}).await?;
    let names = ["10-first", "20-second", "BOTH"];
    refused(
        pod.try_create(|_| {}).await,
        Code::FailedPrecondition,
        &names,
    );
    drop(second);
    daemon.logged(0, &["is gone", "20-second"]).await?;
    // Who says that it removes the other's may. It is asked later although it came first.
    let adjust = api::ContainerAdjustment {
        env: vec![variable("-BOTH", ""), variable("BOTH", "3")],
        ..Default::default()
    };
    let _third = Plugin::join(&daemon, "30-third", adjusting(adjust)).await?;
    let container = pod.run(&["sleep", "1000"], |_| {}).await?;
    let told = container.exec_output(&["env"]).await?;
    assert!(told.contains("BOTH=3"), "{told}");
    drop(first);
    Ok(())
}

async fn a_plugin_that_refuses(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let refuse = Arc::new(std::sync::Mutex::new("RunPodSandbox"));
    let now = refuse.clone();
    let plugin = Plugin::join(&daemon, "10-no", move |method: &str, _: &[u8]| {
        if *now.lock().unwrap() == method {
            Reply::Fail("not on my watch")
        } else {
            Reply::Answer(Vec::new())
        }
    })
    .await?;
    let config = config::pod(&daemon);
    let names = ["10-no", "RunPodSandbox", "not on my watch"];
    let answer = daemon
        .run_pod(config.clone())
        .await
        .map(|pod| pod.id.clone());
    refused(answer, Code::FailedPrecondition, &names);
    assert!(daemon.pod_dirs().is_empty());
    *refuse.lock().unwrap() = "CreateContainer";
    let pod = daemon.run_pod(config).await?;
    let names = ["10-no", "CreateContainer", "not on my watch"];
    refused(
        pod.try_create(|_| {}).await,
        Code::FailedPrecondition,
        &names,
    );
    *refuse.lock().unwrap() = "StartContainer";
    let container = pod.create(&["sleep", "1000"], |_| {}).await?;
    refused(
        container.start().await,
        Code::FailedPrecondition,
        &["10-no", "StartContainer"],
    );
    assert_eq!(
        container.status().await?.state(),
        cri::ContainerState::ContainerExited
    );
    // What has happened can't be refused.
    *refuse.lock().unwrap() = "PostStartContainer";
    let container = pod.sleeper().await?;
    *refuse.lock().unwrap() = "StopContainer";
    container.stop(0).await?;
    *refuse.lock().unwrap() = "RemovePodSandbox";
    pod.remove().await?;
    assert!(!plugin.is_closed(), "it goes on taking part");
    Ok(())
}

async fn a_plugin_that_hangs(env: Env) -> Result<()> {
    let daemon = env
        .daemon_with(|s| s.set("nri.request_timeout", "\"500ms\""))
        .await?;
    daemon.pull("test").await?;
    let hung = Plugin::join(&daemon, "10-hung", |method: &str, _: &[u8]| match method {
        "CreateContainer" => Reply::Hang,
        _ => Reply::Answer(Vec::new()),
    })
    .await?;
    let well = Plugin::join(&daemon, "20-well", nothing).await?;
    let pod = daemon.pod(|_| {}).await?;
    let began = Instant::now();
    pod.sleeper().await?;
    assert!(
        began.elapsed() >= Duration::from_millis(500),
        "it was waited for"
    );
    daemon
        .logged(0, &["is closed", "10-hung", "CreateContainer"])
        .await?;
    eventually(
        "the plugin's connection to be closed",
        seconds(5),
        || async { Ok(hung.is_closed().then_some(())) },
    )
    .await?;
    // Nobody waits for it any more.
    assert!(!hung.methods().contains(&"StartContainer".to_owned()));
    assert!(well.methods().contains(&"PostStartContainer".to_owned()));
    pod.sleeper().await?;
    let waited = hung
        .methods()
        .iter()
        .filter(|m| *m == "CreateContainer")
        .count();
    assert_eq!(waited, 1);
    Ok(())
}

async fn a_plugin_that_crashes(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let _crash = Plugin::join(&daemon, "10-crash", |method: &str, _: &[u8]| match method {
        "StartContainer" => Reply::Crash,
        _ => Reply::Answer(Vec::new()),
    })
    .await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    daemon.logged(0, &["is gone", "10-crash"]).await?;
    assert_eq!(
        container.status().await?.state(),
        cri::ContainerState::ContainerRunning
    );
    // The same one may come back.
    let again = Plugin::connect(&env.root.join("nri.sock"), "10-crash", nothing).await?;
    let shown: api::SynchronizeRequest = again.message("Synchronize").await?;
    assert_eq!(shown.containers.len(), 1);
    Ok(())
}

async fn a_plugin_that_breaks_the_protocol(env: Env) -> Result<()> {
    let daemon = env
        .daemon_with(|s| s.set("nri.registration_timeout", "\"500ms\""))
        .await?;
    daemon.pull("test").await?;
    let socket = env.root.join("nri.sock");
    let mode = std::fs::metadata(&socket)?;
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
        0o600
    );
    let giant = [[0, 0, 0, 1], [0xff; 4]].concat();
    let data = [
        &[0, 0, 0, 2, 0, 0, 0, 10][..],
        &[0, 0, 0, 0, 0, 0, 0, 1, 3, 0],
    ]
    .concat();
    let half = vec![0, 0, 0, 2, 0, 0, 0, 100, 1, 2, 3];
    let silent = Vec::new();
    for (what, text) in [
        ("giant", giant),
        ("data", data),
        ("half", half),
        ("silent", silent),
    ] {
        let mut connection = tokio::net::UnixStream::connect(&socket).await?;
        connection.write_all(&text).await?;
        let closed = async {
            use tokio::io::AsyncReadExt as _;
            connection.read_to_end(&mut Vec::new()).await
        };
        let closed = tokio::time::timeout(seconds(5), closed).await;
        closed
            .with_context(|| format!("{what}: the connection stays"))?
            .ok();
    }
    // A name that can't be is refused, and so is a second registration.
    let bad = Plugin::connect(&socket, "xx-bad", nothing).await?;
    eventually("the end of the badly named", seconds(5), || async {
        Ok(bad.is_closed().then_some(()))
    })
    .await?;
    let twice = Plugin::join(&daemon, "10-twice", nothing).await?;
    let (status, _) = twice
        .call("RegisterPlugin", &api::RegisterPluginRequest::default())
        .await?;
    assert!(!status.is_empty());
    let (status, _) = twice.call("Nonsense", &api::Empty {}).await?;
    assert!(!status.is_empty());
    // Events that there are not.
    let strange = Plugin::connect(
        &socket,
        "10-strange",
        |method: &str, _: &[u8]| match method {
            "Configure" => answer(&api::ConfigureResponse { events: 1 << 30 }),
            _ => Reply::Answer(Vec::new()),
        },
    )
    .await?;
    daemon
        .logged(0, &["does not take part", "10-strange", "events"])
        .await?;
    drop(strange);
    daemon.run(&["sleep", "1000"]).await?;
    Ok(())
}

async fn a_plugin_that_joins_late(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let running = pod.sleeper().await?;
    let created = pod.create(&["sleep", "1000"], |_| {}).await?;
    let ended = pod.run(&["true"], |_| {}).await?;
    ended.exited().await?;
    // Slower than any other request may be.
    let late = Plugin::connect(
        &env.root.join("nri.sock"),
        "10-late",
        |method: &str, _: &[u8]| match method {
            "Synchronize" => Reply::Later(Duration::from_secs(3), Vec::new()),
            _ => Reply::Answer(Vec::new()),
        },
    )
    .await?;
    let shown: api::SynchronizeRequest = late.message("Synchronize").await?;
    let ids: Vec<_> = shown.containers.iter().map(|c| c.id.as_str()).collect();
    assert!(ids.contains(&running.id.as_str()) && ids.contains(&created.id.as_str()));
    assert_eq!(ids.len(), 2, "what has ended is no plugin's business");
    let pods: Vec<_> = shown.pods.iter().map(|p| p.id.as_str()).collect();
    assert_eq!(pods, [pod.id.as_str()]);
    let state = |id: &str| {
        shown
            .containers
            .iter()
            .find(|c| c.id == id)
            .unwrap()
            .state()
    };
    assert_eq!(state(&running.id), api::ContainerState::ContainerRunning);
    assert_eq!(state(&created.id), api::ContainerState::ContainerCreated);
    // Meanwhile others are made; none is lost.
    let made = futures_util::future::join_all((0..3).map(|_| pod.sleeper())).await;
    let told: Vec<String> = late
        .all::<api::CreateContainerRequest>("CreateContainer")?
        .into_iter()
        .filter_map(|request| Some(request.container?.id))
        .collect();
    for container in made {
        let id = container?.id.clone();
        assert!(told.contains(&id), "{id} is lost");
    }
    Ok(())
}

async fn updates_and_evictions(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let limit = |id: &str, bytes: i64| api::ContainerUpdate {
        container_id: id.to_owned(),
        linux: Some(api::LinuxContainerUpdate {
            resources: Some(api::LinuxResources {
                memory: Some(api::LinuxMemory {
                    limit: Some(api::OptionalInt64 { value: bytes }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }),
        ignore_failure: false,
    };
    let plugin = Plugin::join(
        &daemon,
        "10-update",
        move |method: &str, message: &[u8]| match method {
            // A quarter less than was asked for.
            "UpdateContainer" => {
                let request = api::UpdateContainerRequest::decode(message).unwrap();
                let asked = request
                    .linux_resources
                    .unwrap()
                    .memory
                    .unwrap()
                    .limit
                    .unwrap();
                let id = request.container.unwrap().id;
                answer(&api::UpdateContainerResponse {
                    update: vec![limit(&id, asked.value / 4 * 3)],
                    ..Default::default()
                })
            }
            _ => Reply::Answer(Vec::new()),
        },
    )
    .await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let other = daemon.run(&["sleep", "1000"]).await?;
    let in_force = |container: &Container| {
        container
            .cgroup_file("memory.limit_in_bytes")
            .or_else(|_| container.cgroup_file("memory.max"))
    };
    let request = cri::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 128 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    daemon.runtime().update_container_resources(request).await?;
    assert_eq!(in_force(&container)?, (96 << 20).to_string());
    plugin.heard_of("PostUpdateContainer").await?;
    // Of its own accord: one that can, one that is not there, one that can't.
    let mut bad = limit(&container.id, 64 << 20);
    bad.linux.as_mut().unwrap().resources.as_mut().unwrap().pids =
        Some(api::LinuxPids { limit: 5 });
    let request = api::UpdateContainersRequest {
        update: vec![limit(&other.id, 80 << 20), limit("nobody", 80 << 20), bad],
        evict: Vec::new(),
    };
    let (status, message) = plugin.call("UpdateContainers", &request).await?;
    assert!(status.is_empty());
    let failed = api::UpdateContainersResponse::decode(message.as_slice())?.failed;
    let failed: Vec<_> = failed.iter().map(|u| u.container_id.as_str()).collect();
    assert_eq!(failed, ["nobody", container.id.as_str()]);
    assert_eq!(in_force(&other)?, (80 << 20).to_string());
    assert_eq!(in_force(&container)?, (96 << 20).to_string());
    let request = api::UpdateContainersRequest {
        update: Vec::new(),
        evict: vec![api::ContainerEviction {
            container_id: other.id.clone(),
            reason: "room is needed".into(),
        }],
    };
    plugin.call("UpdateContainers", &request).await?;
    other.exited().await?;
    daemon.logged(0, &["evicts", "room is needed"]).await?;
    Ok(())
}

async fn validators(env: Env) -> Result<()> {
    let daemon = env
        .daemon_with(|s| {
            s.set("nri.validate", "true");
            s.set("nri.required_plugins", "[\"needed\"]");
            s.set("nri.tolerate_missing_annotation", "\"tolerate.test\"");
            s.set("nri.reject_namespaces", "true");
        })
        .await?;
    daemon.pull("test").await?;
    // Without any plugin, too.
    let pod = daemon.pod(|_| {}).await?;
    let names = ["default validator", "needed"];
    refused(
        pod.try_create(|_| {}).await,
        Code::FailedPrecondition,
        &names,
    );
    let tolerant = daemon
        .pod(|c| drop(c.annotations.insert("tolerate.test".into(), "true".into())))
        .await?;
    tolerant.sleeper().await?;
    let needed = Plugin::join(&daemon, "10-needed", nothing).await?;
    pod.sleeper().await?;
    let adjust = linux(api::LinuxContainerAdjustment {
        namespaces: vec![api::LinuxNamespace {
            r#type: "-ipc".into(),
            ..Default::default()
        }],
        ..Default::default()
    });
    let spoiler = Plugin::join(&daemon, "20-spoiler", adjusting(adjust)).await?;
    refused(
        pod.try_create(|_| {}).await,
        Code::FailedPrecondition,
        &["20-spoiler", "ipc"],
    );
    drop(spoiler);
    daemon.logged(0, &["is gone", "20-spoiler"]).await?;
    let _judge = Plugin::join(
        &daemon,
        "30-judge",
        |method: &str, message: &[u8]| match method {
            "ValidateContainerAdjustment" => {
                let request = api::ValidateContainerAdjustmentRequest::decode(message).unwrap();
                let seen: Vec<_> = request.plugins.iter().map(|p| p.name.as_str()).collect();
                answer(&api::ValidateContainerAdjustmentResponse {
                    reject: seen == ["needed", "judge"],
                    reason: "because".into(),
                })
            }
            _ => Reply::Answer(Vec::new()),
        },
    )
    .await?;
    refused(
        pod.try_create(|_| {}).await,
        Code::FailedPrecondition,
        &["30-judge", "because"],
    );
    drop(needed);
    Ok(())
}

async fn installed_plugins_over_a_restart(env: Env) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let (plugins, configs) = (env.dir("nri.d")?, env.dir("nri.conf.d")?);
    let own = std::env::current_exe()?;
    let executable = |name: &str, text: String| -> Result<()> {
        let path = plugins.join(name);
        std::fs::write(&path, text)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
        Ok(())
    };
    executable("10-own", format!("#!/bin/sh\nexec {} <&3\n", own.display()))?;
    // One that ends at once does nobody harm.
    executable("20-broken", "#!/bin/sh\nexit 1\n".to_owned())?;
    std::fs::write(configs.join("10-own.conf"), "well configured\n")?;
    let daemon = env.daemon().await?;
    daemon
        .logged(0, &["does not take part", "20-broken"])
        .await?;
    let pod = daemon.pod(|_| {}).await?;
    let installed = |container: Container| async move {
        let told = container.exec_output(&["env"]).await?;
        assert!(told.contains("INSTALLED=10-own well configured"), "{told}");
        Ok::<_, anyhow::Error>(container)
    };
    let first = installed(pod.sleeper().await?).await?;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        daemon.kill(signal).await?;
        daemon.launch().await?;
        installed(pod.sleeper().await?).await?;
        // One that connects is shown what an earlier daemon made, as it was made.
        let late = Plugin::connect(&env.root.join("nri.sock"), "50-late", nothing).await?;
        let shown: api::SynchronizeRequest = late.message("Synchronize").await?;
        let seen = shown
            .containers
            .iter()
            .find(|c| c.id == first.id)
            .context("lost")?;
        assert!(
            seen.env
                .contains(&"INSTALLED=10-own well configured".to_owned()),
            "{:?}",
            seen.env
        );
        assert_eq!(seen.state(), api::ContainerState::ContainerRunning);
    }
    Ok(())
}

async fn without_nri(env: Env) -> Result<()> {
    let daemon = env.daemon_with(|s| s.set("nri.enable", "false")).await?;
    daemon.pull("test").await?;
    assert!(!env.root.join("nri.sock").exists());
    daemon.run(&["sleep", "1000"]).await?;
    daemon.remove_everything().await?;
    daemon.end().await?;
    // What is there and is no socket stays, and is named.
    std::fs::write(env.root.join("nri.sock"), "precious")?;
    let started = env.daemon_with(|_| {}).await.err().context("it starts")?;
    let said = format!("{started:#}");
    assert!(
        said.contains("nri.sock") && said.contains("nri.socket_path"),
        "{said}"
    );
    assert_eq!(read(env.root.join("nri.sock"))?, "precious");
    std::fs::remove_file(env.root.join("nri.sock"))?;
    Ok(())
}
