//! Limits of resources: in the cgroup's files, and in effect.

use tonic::Code;

use crate::harness::*;

tests![
    limits_stand_in_the_cgroup,
    the_pids_limit,
    running_out_of_memory,
    running_out_of_memory_in_an_exec,
    out_of_memory_of_a_child_only,
    the_cpuset,
    bad_values_are_refused,
    the_cgroup_is_below_the_pods_parent,
    slices_are_directories,
    unified_is_refused_where_there_is_none,
    classes_of_block_io,
];

fn resources(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerResources {
    config
        .linux
        .get_or_insert_default()
        .resources
        .get_or_insert_default()
}

fn version_two() -> bool {
    std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

async fn limits_stand_in_the_cgroup(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            let r = resources(c);
            r.cpu_period = 100_000;
            r.cpu_quota = 25_000;
            r.cpu_shares = 512;
            r.memory_limit_in_bytes = 64 << 20;
            r.memory_swap_limit_in_bytes = 64 << 20;
        })
        .await?;
    let expected: &[(&str, &str)] = if version_two() {
        &[
            ("cpu.max", "25000 100000"),
            ("cpu.weight", "59"),
            ("memory.max", "67108864"),
        ]
    } else {
        &[
            ("cpu.cfs_quota_us", "25000"),
            ("cpu.cfs_period_us", "100000"),
            ("cpu.shares", "512"),
            ("memory.limit_in_bytes", "67108864"),
        ]
    };
    for (file, value) in expected {
        assert_eq!(container.cgroup_file(file)?, *value, "{file}");
    }
    // Its process is in every hierarchy's cgroup of the container.
    let pid = container.pid()?;
    for dir in container.cgroup_dirs() {
        if youki() && dir.starts_with("/sys/fs/cgroup/systemd") {
            // It puts nobody into hierarchies without controllers.
            continue;
        }
        let procs = read(dir.join("cgroup.procs"))?;
        assert!(
            procs.lines().any(|l| l == pid.to_string()),
            "{} has {procs:?}",
            dir.display()
        );
    }
    let told = container.status().await?.resources.unwrap().linux.unwrap();
    assert_eq!(
        (told.cpu_quota, told.cpu_shares, told.memory_limit_in_bytes),
        (25_000, 512, 64 << 20)
    );
    Ok(())
}

async fn the_pids_limit(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let daemon = env.daemon_with(|s| s.set("pod.pids_limit", "20")).await?;
    daemon.pull("test").await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.run(&["sleep", "1000"], |_| {}).await?;
    assert_eq!(container.cgroup_file("pids.max")?, "20");
    let exec = container
        .exec(&[
            "sh",
            "-c",
            "i=0; while [ $i -lt 40 ]; do sleep 50 & i=$((i+1)); done; echo $i",
        ])
        .await?;
    assert!(
        exec.stderr.contains("fork"),
        "forty processes where twenty may be: {exec:?}"
    );
    assert!(container.processes().len() <= 20);
    Ok(())
}

async fn running_out_of_memory(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let limit = |c: &mut cri::ContainerConfig| resources(c).memory_limit_in_bytes = 20 << 20;
    let container = pod.run(&["probe", "eat", "200"], limit).await?;
    let status = container.exited().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    // It may end with another code when the kernel took only a child of it ...
    let container = pod
        .run(&["sh", "-c", "probe eat 200; exit 3"], limit)
        .await?;
    let status = container.exited().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "OOMKilled"));
    // ... and what happened to an exec session is not what ended it.
    let container = pod.run(&["sleep", "1000"], limit).await?;
    assert_eq!(container.exec(&["probe", "eat", "200"]).await?.code, 137);
    container.stop(0).await?;
    assert_eq!(container.status().await?.reason, "Error");
    // Killed, but not for that.
    let container = pod.run(&["sleep", "1000"], limit).await?;
    container.stop(0).await?;
    assert_eq!(container.status().await?.reason, "Error");
    Ok(())
}

async fn running_out_of_memory_in_an_exec(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            resources(c).memory_limit_in_bytes = 20 << 20
        })
        .await?;
    let exec = container.exec(&["probe", "eat", "200"]).await?;
    assert_eq!(exec.code, 137, "{exec:?}");
    assert!(!exec.stdout.contains("eaten"));
    assert_eq!(
        container.status().await?.state(),
        cri::ContainerState::ContainerRunning
    );
    Ok(())
}

async fn out_of_memory_of_a_child_only(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    // The child is killed, the first process goes on, and ends well: the container completed.
    let container = pod
        .run(
            &["sh", "-c", "probe eat 200; echo \"child $?\"; exit 0"],
            |c| resources(c).memory_limit_in_bytes = 20 << 20,
        )
        .await?;
    let status = container.exited().await?;
    assert_eq!(container.stdout()?, "child 137\n");
    assert_eq!(status.exit_code, 0);
    Ok(())
}

async fn the_cpuset(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            resources(c).cpuset_cpus = "0".into();
            resources(c).cpuset_mems = "0".into();
        })
        .await?;
    assert_eq!(container.cgroup_file("cpuset.cpus")?, "0");
    for pid in ["1", "self"] {
        let text = container
            .exec_output(&["grep", "Cpus_allowed_list", &format!("/proc/{pid}/status")])
            .await?;
        assert_eq!(text.split_whitespace().nth(1), Some("0"), "{pid}: {text}");
    }
    Ok(())
}

async fn bad_values_are_refused(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let cases: [Change<cri::LinuxContainerResources>; 9] = [
        ("memory", |r| r.memory_limit_in_bytes = -5),
        ("cpu_period", |r| r.cpu_period = -1),
        ("cpu_period", |r| (r.cpu_period, r.cpu_quota) = (10, 1000)),
        ("cpu_shares", |r| r.cpu_shares = -1),
        ("oom_score_adj", |r| r.oom_score_adj = 5000),
        ("cpuset", |r| r.cpuset_cpus = "zero".into()),
        ("cpuset", |r| r.cpuset_cpus = "0\n1".into()),
        ("swap", |r| {
            (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (64 << 20, 1 << 20)
        }),
        ("hugepage", |r| {
            r.hugepage_limits = vec![cri::HugepageLimit {
                page_size: "3parsec".into(),
                limit: 1,
            }]
        }),
    ];
    for (names, change) in cases {
        let status = pod
            .try_create(|c| change(resources(c)))
            .await
            .expect_err(names);
        assert_eq!(status.code(), Code::InvalidArgument, "{names}: {status}");
        assert!(
            status.message().to_lowercase().contains(names),
            "{names}: {status}"
        );
    }
    if gvisor() {
        // It has no use for these, of a container.
        return Ok(());
    }
    // Absurd, but of the right kind: the kernel says no, or the CPU is not there. The answer names it.
    let status = pod
        .try_create(|c| resources(c).cpuset_cpus = "4000-5000".into())
        .await
        .expect_err("absent CPUs");
    assert!(
        matches!(
            status.code(),
            Code::InvalidArgument | Code::FailedPrecondition
        ) || handler() != "native",
        "{status}"
    );
    assert!(status.message().contains("cpuset"), "{status}");
    let status = pod
        .try_create(|c| resources(c).memory_limit_in_bytes = 1)
        .await;
    if let Ok(id) = status {
        bail!("a container with one byte of memory was made: {id}");
    }
    Ok(())
}

async fn the_cgroup_is_below_the_pods_parent(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let parent = env.below("kubepods/burstable/podx");
    let pod = daemon
        .pod(|c| c.linux.get_or_insert_default().cgroup_parent = parent.clone())
        .await?;
    let container = pod.sleeper().await?;
    let dirs = container.cgroup_dirs();
    assert!(!dirs.is_empty());
    for dir in &dirs {
        assert!(
            dir.to_string_lossy().contains(&format!("{parent}/")),
            "{}",
            dir.display()
        );
    }
    pod.stop().await?;
    pod.remove().await?;
    // The parents are the kubelet's, which made them; here nobody did, so the test takes them away.
    match env.driver {
        Driver::Systemd => {
            for slice in ["kubepods/burstable", "kubepods"] {
                env.remove_below(slice).await?;
            }
        }
        // On a hybrid host they are in more hierarchies than one.
        Driver::Cgroupfs => {
            let tops = stage::cgroup_dirs(&env.cgroup);
            for dir in tops.iter().flat_map(|top| stage::tree(top)) {
                if dir.to_string_lossy().contains("kubepods") {
                    std::fs::remove_dir(dir).ok();
                }
            }
        }
    }
    let end = match env.driver {
        Driver::Cgroupfs => "",
        Driver::Systemd => ".slice",
    };
    for bad in ["relative/../../x", "/a/../../b", "/a\nb"] {
        let mut config = config::pod(&daemon);
        config.linux.as_mut().unwrap().cgroup_parent = format!("{bad}{end}");
        refused(
            daemon.run_pod(config).await.map(|p| p.id),
            Code::InvalidArgument,
            &[],
        );
    }
    Ok(())
}

async fn slices_are_directories(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    if stage::systemd() {
        return skip("slices are systemd's here, and refused");
    }
    let daemon = env.daemon().await?;
    // What a kubelet with the systemd driver sends; with ours it is nested directories.
    let slice = format!("slt{}-burstable-pod1.slice", env.number);
    let pod = daemon
        .pod(|c| c.linux.get_or_insert_default().cgroup_parent = slice.clone())
        .await?;
    let container = pod.sleeper().await?;
    let text = read(format!("/proc/{}/cgroup", first_process(&container)?))?;
    let wanted = format!(
        "/slt{n}.slice/slt{n}-burstable.slice/{slice}/",
        n = env.number
    );
    let line = text
        .lines()
        .find(|l| l.contains(&container.id))
        .context("no cgroup of the container's name")?;
    assert!(line.contains(&wanted), "{line} has not {wanted}");
    pod.stop().await?;
    pod.remove().await?;
    let top = format!("slt{}.slice", env.number);
    for dir in stage::cgroup_dirs(&top).iter().flat_map(|d| stage::tree(d)) {
        std::fs::remove_dir(dir).ok();
    }
    assert_eq!(
        stage::cgroup_dirs(&top),
        Vec::<std::path::PathBuf>::new(),
        "cgroups are left"
    );
    Ok(())
}

/// A container's process when its cgroup is not below the test's own: found by its cgroup's name.
fn first_process(container: &Container) -> Result<i32> {
    for name in daemon::names(std::path::Path::new("/proc")) {
        let Ok(pid) = name.parse() else { continue };
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if text.contains(&container.id) {
            return Ok(pid);
        }
    }
    bail!("no process is in a cgroup named after {}", container.id)
}

async fn unified_is_refused_where_there_is_none(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let unified = |key: &str, value: &str| [(key.to_owned(), value.to_owned())].into();
    for key in [
        "../../../etc/passwd",
        "memory.high/../x",
        "",
        "cgroup.procs",
    ] {
        let status = pod
            .try_create(|c| resources(c).unified = unified(key, "1"))
            .await
            .expect_err(key);
        let expected = if version_two() {
            Code::InvalidArgument
        } else {
            Code::FailedPrecondition
        };
        assert_eq!(status.code(), expected, "{key}: {status}");
    }
    if version_two() {
        let container = pod
            .run(&["sleep", "1000"], |c| {
                resources(c).unified = unified("memory.high", "50331648")
            })
            .await?;
        assert_eq!(container.cgroup_file("memory.high")?, "50331648");
    } else {
        let status = pod
            .try_create(|c| resources(c).unified = unified("memory.high", "50331648"))
            .await
            .expect_err("v1");
        assert!(
            matches!(
                status.code(),
                Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented
            ),
            "{status}"
        );
        assert!(
            status.message().contains("unified") || status.message().contains("memory.high"),
            "{status}"
        );
    }
    tokio::time::timeout(seconds(5), pod.status()).await??;
    Ok(())
}

/// A disk of this host and its number, as files of cgroups have it.
fn a_disk() -> Option<(String, String)> {
    let disks = std::fs::read_dir("/sys/block").ok()?.flatten();
    disks.into_iter().find_map(|disk| {
        let name = disk.file_name().into_string().ok()?;
        let path = format!("/dev/{name}");
        let number = std::fs::read_to_string(disk.path().join("dev")).ok()?;
        std::path::Path::new(&path)
            .exists()
            .then(|| (path, number.trim().to_owned()))
    })
}

async fn classes_of_block_io(env: Env) -> Result<()> {
    not_in_gvisor(ONE_PROCESS)?;
    let Some((disk, number)) = a_disk() else {
        return skip("needs a block device");
    };
    let file = env.dir("classes")?.join("blockio.yaml");
    let shown = file.display().to_string();
    let daemon = env
        .daemon_with(|s| s.set("pod.blockio_config_file", &format!("{shown:?}")))
        .await?;
    daemon.pull("test").await?;
    let classes = format!(
        "Classes:\n  slow:\n  - Devices: [{disk}]\n    ThrottleReadBps: 2M\n    ThrottleWriteIOPS: 70\n  \
         none: []\n  bad:\n  - ThrottleReadBps: 2M\n"
    );
    std::fs::write(&file, classes)?;
    let pod = daemon
        .pod(|p| {
            let class = |name: &str, class: &str| {
                (
                    format!("blockio.resources.beta.kubernetes.io/{name}"),
                    class.to_owned(),
                )
            };
            p.annotations
                .extend([class("pod", "none"), class("container.slow", "slow")]);
        })
        .await?;
    let named = |name: &'static str| {
        move |c: &mut cri::ContainerConfig| c.metadata.get_or_insert_default().name = name.into()
    };
    // By the pod's annotation for it.
    let slow = pod.run(&["sleep", "1000"], named("slow")).await?;
    if version_two() {
        let limits = slow.cgroup_file("io.max")?;
        let words: Vec<&str> = limits.split_whitespace().collect();
        for word in [number.as_str(), "rbps=2000000", "wiops=70"] {
            assert!(words.contains(&word), "{limits:?} has no {word}");
        }
    } else {
        let read = slow.cgroup_file("blkio.throttle.read_bps_device")?;
        assert_eq!(read, format!("{number} 2000000"));
        let write = slow.cgroup_file("blkio.throttle.write_iops_device")?;
        assert_eq!(write, format!("{number} 70"));
    }
    // By the pod's for all, and by its own, which comes first.
    let other = pod.run(&["sleep", "1000"], named("other")).await?;
    let limits = if version_two() {
        "io.max"
    } else {
        "blkio.throttle.read_bps_device"
    };
    assert_eq!(other.cgroup_file(limits)?, "");
    for (class, word) in [("bad", "without Devices"), ("fast", "bad, none, slow")] {
        let answer = pod
            .try_create(|c| {
                let key = "io.kubernetes.cri.blockio-class".to_owned();
                c.annotations.insert(key, class.to_owned());
            })
            .await;
        refused(answer, Code::FailedPrecondition, &[word, shown.as_str()]);
    }
    Ok(())
}
