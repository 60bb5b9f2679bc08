//! What only pure cgroup v2 has. Skipped elsewhere; `hack/vm test v2::` runs these on any host.
//!
//! Device filters, freezing and `cgroup.kill` have tests that run everywhere (`devices`, `stop`), and mean the
//! v2 ways on such a host.

use std::path::{Path, PathBuf};

use tonic::Code;

use crate::harness::*;

tests![
    memory_limits_of_every_kind,
    swap_is_used_within_its_limit,
    one_process_out_of_memory_ends_the_group,
    an_exec_out_of_memory_ends_the_group,
    the_pod_runs_out_of_memory,
    processor_time,
    processors,
    a_slow_disk,
    huge_pages,
    the_device_filter_holds_while_limits_change,
    processes_are_counted_with_those_of_execs,
    the_container_sees_its_own_cgroup,
    a_subtree_of_the_containers_own,
    no_process_is_in_an_inner_node,
    the_pods_cgroup_comes_and_goes_with_it,
    the_kubelets_cgroup_stays,
    the_keeper_lives_with_its_pod,
    a_frozen_container_holds_nobody_up,
    what_the_kernel_refuses,
    a_parent_that_cannot_hand_controllers_down,
    a_parent_that_may_have_no_children,
];
tests![alone: a_hundred_pods_leave_no_cgroup];

const MIB: i64 = 1 << 20;
const TOP: &str = "/sys/fs/cgroup";

fn needs_v2() -> Result<()> {
    if Path::new(TOP).join("cgroup.controllers").exists() {
        return Ok(());
    }
    skip("this host is not pure cgroup v2; hack/vm test runs a machine that is")
}

fn needs_controller(name: &str) -> Result<()> {
    let all = read(Path::new(TOP).join("cgroup.controllers"))?;
    if all.split(' ').any(|c| c == name) {
        return Ok(());
    }
    skip(format!("no {name} controller"))
}

/// The cgroups below the test's own.
fn below(env: &Env) -> Vec<PathBuf> {
    let top = dir(&env.cgroup);
    stage::tree(&top)
        .into_iter()
        .filter(|d| *d != top)
        .collect()
}

fn resources(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerResources {
    config
        .linux
        .get_or_insert_default()
        .resources
        .get_or_insert_default()
}

fn unified(config: &mut cri::ContainerConfig, files: &[(&str, &str)]) {
    let files = files
        .iter()
        .map(|(file, value)| ((*file).to_owned(), (*value).to_owned()));
    resources(config).unified.extend(files);
}

/// A number in a file of lines `key number`.
fn counter(text: &str, key: &str) -> Result<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key));
    let number = line.with_context(|| format!("no {key} in {text:?}"))?;
    Ok(number.trim().parse()?)
}

/// A pod below a parent of this name, which is in the test's own cgroup.
async fn pod_below(daemon: &Daemon, parent: &str) -> Result<Pod> {
    let parent = daemon.env().below(parent);
    daemon
        .pod(|c| c.linux.get_or_insert_default().cgroup_parent = parent)
        .await
}

async fn memory_limits_of_every_kind(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            resources(c).memory_limit_in_bytes = 64 * MIB;
            resources(c).memory_swap_limit_in_bytes = 96 * MIB;
            let files = [
                ("memory.high", "50331648"),
                ("memory.min", "1048576"),
                ("memory.low", "2097152"),
            ];
            unified(c, &files);
        })
        .await?;
    for (file, value) in [
        ("memory.max", "67108864"),
        // v2 counts swap alone, the CRI with the memory.
        ("memory.swap.max", "33554432"),
        ("memory.high", "50331648"),
        ("memory.min", "1048576"),
        ("memory.low", "2097152"),
        ("memory.oom.group", "0"),
    ] {
        assert_eq!(container.cgroup_file(file)?, value, "{file}");
    }
    // What the kubelet reads of it.
    assert_ne!(container.cgroup_file("memory.current")?, "0");
    for file in ["memory.pressure", "cpu.pressure", "io.pressure"] {
        let text = container.cgroup_file(file)?;
        assert!(text.starts_with("some avg10="), "{file}: {text}");
    }
    let without = pod
        .run(&["sleep", "1000"], |c| {
            resources(c).memory_limit_in_bytes = 64 * MIB
        })
        .await?;
    assert_eq!(without.cgroup_file("memory.swap.max")?, "0");
    let endless = pod
        .run(&["sleep", "1000"], |c| {
            resources(c).memory_limit_in_bytes = 64 * MIB;
            resources(c).memory_swap_limit_in_bytes = -1;
        })
        .await?;
    assert_eq!(endless.cgroup_file("memory.swap.max")?, "max");
    // A `unified` key has the last word.
    let both = pod
        .run(&["sleep", "1000"], |c| {
            resources(c).memory_limit_in_bytes = 64 * MIB;
            unified(c, &[("memory.max", "33554432")]);
        })
        .await?;
    assert_eq!(both.cgroup_file("memory.max")?, "33554432");
    Ok(())
}

async fn swap_is_used_within_its_limit(env: Env) -> Result<()> {
    needs_v2()?;
    if read("/proc/swaps")?.lines().count() < 2 {
        return skip("this machine has no swap");
    }
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let eat = async |swap: i64| -> Result<cri::ContainerStatus> {
        let container = pod
            .run(&["probe", "eat", "48"], |c| {
                resources(c).memory_limit_in_bytes = 32 * MIB;
                resources(c).memory_swap_limit_in_bytes = swap;
            })
            .await?;
        container.exited().await
    };
    let status = eat(96 * MIB).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    let status = eat(0).await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    Ok(())
}

async fn one_process_out_of_memory_ends_the_group(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    // The shell itself needs next to nothing; it dies because its child does.
    let container = pod
        .run(
            &["sh", "-c", "probe eat 200; echo survived; sleep 1000"],
            |c| {
                resources(c).memory_limit_in_bytes = 20 * MIB;
                unified(c, &[("memory.oom.group", "1")]);
            },
        )
        .await?;
    let status = container.exited().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    assert_eq!(container.stdout()?, "");
    Ok(())
}

async fn an_exec_out_of_memory_ends_the_group(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            resources(c).memory_limit_in_bytes = 20 * MIB;
            unified(c, &[("memory.oom.group", "1")]);
        })
        .await?;
    // An exec has a cgroup of its own, but not a limit of its own.
    let exec = container.exec(&["probe", "eat", "200"]).await?;
    assert_eq!(exec.code, 137, "{exec:?}");
    let status = container.exited().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    Ok(())
}

async fn the_pod_runs_out_of_memory(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = pod_below(&daemon, "limited").await?;
    // The kubelet sets the pod's limits, in the pod's cgroup.
    let cgroup = env.below("limited");
    let limited = dir(&cgroup);
    if env.driver == Driver::Systemd {
        // In the way that it does it there: what is only written, systemd writes over.
        let slice = cgroup.rsplit('/').next().context("a slice")?;
        let limits = ["MemoryMax=32M", "MemorySwapMax=0"];
        systemctl(&[&["set-property", "--runtime", slice], &limits[..]].concat()).await?;
    } else {
        std::fs::write(limited.join("memory.max"), "33554432")?;
        std::fs::write(limited.join("memory.swap.max"), "0")?;
    }
    let bystander = pod.sleeper().await?;
    let glutton = pod.run(&["probe", "eat", "200"], |_| {}).await?;
    let status = glutton.exited().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    assert_eq!(
        bystander.status().await?.state(),
        cri::ContainerState::ContainerRunning
    );
    assert!(counter(&read(limited.join("memory.events"))?, "oom_kill ")? >= 1);
    Ok(())
}

async fn processor_time(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sh", "-c", "while :; do :; done"], |c| {
            let r = resources(c);
            (r.cpu_period, r.cpu_quota, r.cpu_shares) = (50_000, 5_000, 1024);
        })
        .await?;
    assert_eq!(container.cgroup_file("cpu.max")?, "5000 50000");
    // The default of v1 is the default of v2.
    assert_eq!(container.cgroup_file("cpu.weight")?, "100");
    eventually("throttling", seconds(5), || async {
        let stat = container.cgroup_file("cpu.stat")?;
        Ok((counter(&stat, "nr_throttled ")? > 2).then_some(()))
    })
    .await?;
    for (shares, quota, weight, max) in [
        (2, -1, "1", "max 100000"),
        (262_144, 0, "10000", "max 100000"),
        (0, 20_000, "100", "20000 100000"),
    ] {
        let container = pod
            .create(&["true"], |c| {
                resources(c).cpu_shares = shares;
                resources(c).cpu_quota = quota;
            })
            .await?;
        assert_eq!(container.cgroup_file("cpu.weight")?, weight, "{shares}");
        assert_eq!(container.cgroup_file("cpu.max")?, max, "{quota}");
    }
    Ok(())
}

async fn processors(env: Env) -> Result<()> {
    needs_v2()?;
    needs_controller("cpuset")?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            resources(c).cpuset_cpus = "0".into();
            resources(c).cpuset_mems = "0".into();
        })
        .await?;
    assert_eq!(container.cgroup_file("cpuset.cpus.effective")?, "0");
    assert_eq!(container.cgroup_file("cpuset.mems.effective")?, "0");
    Ok(())
}

async fn a_slow_disk(env: Env) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    needs_v2()?;
    needs_controller("io")?;
    let scratch = tempfile::tempdir()?;
    let device = std::fs::metadata(scratch.path())?.dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    if !Path::new(&format!("/sys/dev/block/{major}:{minor}")).exists() {
        return skip("TMPDIR is on no disk");
    }
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let limit = format!("{major}:{minor} wbps=1048576");
    let began = std::time::Instant::now();
    let dd = [
        "dd",
        "if=/dev/zero",
        "of=/data/x",
        "bs=64k",
        "count=64",
        "conv=fsync",
    ];
    let container = pod
        .run(&dd, |c| {
            unified(c, &[("io.max", &limit)]);
            c.mounts = vec![cri::Mount {
                container_path: "/data".into(),
                host_path: scratch.path().display().to_string(),
                ..Default::default()
            }];
        })
        .await?;
    let set = container.cgroup_file("io.max")?;
    assert!(
        set.starts_with(&format!("{major}:{minor} ")) && set.contains("wbps=1048576"),
        "{set}"
    );
    assert_eq!(container.exited().await?.exit_code, 0);
    let took = began.elapsed();
    assert!(
        took >= std::time::Duration::from_secs(2),
        "4 MiB were written in {took:?} at 1 MiB/s"
    );
    if container.cgroup_file("io.weight").is_ok() {
        let container = pod
            .create(&["true"], |c| unified(c, &[("io.weight", "default 50")]))
            .await?;
        assert_eq!(container.cgroup_file("io.weight")?, "default 50");
    }
    Ok(())
}

async fn huge_pages(env: Env) -> Result<()> {
    needs_v2()?;
    needs_controller("hugetlb")?;
    let pages =
        read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or_default();
    if pages.parse().unwrap_or(0) < 8 {
        return skip("fewer than 8 huge pages of 2 MiB are free");
    }
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            resources(c).hugepage_limits = vec![cri::HugepageLimit {
                page_size: "2MB".into(),
                limit: 4 << 20,
            }]
        })
        .await?;
    assert_eq!(container.cgroup_file("hugetlb.2MB.max")?, "4194304");
    assert_eq!(container.cgroup_file("hugetlb.2MB.rsvd.max")?, "4194304");
    assert_eq!(container.exec_output(&["probe", "huge", "4"]).await?, "OK");
    // Refused when it is asked for, not killed when it is touched.
    assert_eq!(
        container.exec_output(&["probe", "huge", "6"]).await?,
        "ENOMEM"
    );
    Ok(())
}

/// A container that opens devices all the time never sees one that it must not have, and never misses one that
/// it has, whatever is done to its cgroup.
async fn the_device_filter_holds_while_limits_change(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let kmsg = env.dir("devices")?.join("kmsg");
    nix::sys::stat::mknod(
        &kmsg,
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::from_bits_truncate(0o660),
        nix::sys::stat::makedev(1, 11),
    )
    .context("mknod")?;
    // Whom no filter hinders may open it.
    if let Err(error) = std::fs::File::open("/dev/loop-control") {
        return skip(format!("/dev/loop-control can't be opened here: {error}"));
    }
    // 1:11 may be written to; 10:237, made by the container itself, may not be opened at all.
    let script = "mknod /tmp/loop c 10 237; echo began; while [ ! -e /tmp/end ]; do \
         (: >/dev/null) 2>/dev/null || echo lost null; \
         (: >/dev/the-log) 2>/dev/null || echo lost the log; \
         (: <>/dev/the-log) 2>/dev/null && echo may read; \
         (: </tmp/loop) 2>/dev/null && echo may open; \
         n=$((n + 1)); done; echo $((n > 0))";
    let container = pod
        .run(&["sh", "-c", script], |c| {
            c.devices = vec![cri::Device {
                host_path: kmsg.display().to_string(),
                container_path: "/dev/the-log".into(),
                permissions: "w".into(),
            }];
            resources(c).memory_limit_in_bytes = 64 * MIB;
        })
        .await?;
    container.says("began").await?;
    for round in 1..=10 {
        let change = cri::LinuxContainerResources {
            memory_limit_in_bytes: (64 + round) * MIB,
            cpu_quota: 50_000 + round * 1000,
            cpu_period: 100_000,
            ..Default::default()
        };
        container.update(change).await?;
        if env.driver == Driver::Systemd && round % 5 == 0 {
            systemctl(&["daemon-reload"]).await?;
        }
    }
    container.exec_output(&["touch", "/tmp/end"]).await?;
    assert_eq!(container.exited().await?.exit_code, 0);
    assert_eq!(container.stdout()?, "began\n1\n");
    Ok(())
}

async fn processes_are_counted_with_those_of_execs(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| unified(c, &[("pids.max", "5")]))
        .await?;
    let script = "for i in 1 2 3 4 5 6 7 8; do sleep 50 & done";
    let exec = container.exec(&["sh", "-c", script]).await?;
    assert!(exec.stderr.contains("fork"), "{exec:?}");
    assert_eq!(container.cgroup_file("pids.max")?, "5");
    assert!(counter(&container.cgroup_file("pids.events")?, "max ")? >= 1);
    Ok(())
}

async fn the_container_sees_its_own_cgroup(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "cat /proc/self/cgroup /sys/fs/cgroup/memory.max; echo end; exec sleep 1000";
    let container = pod
        .run(&["sh", "-c", script], |c| {
            resources(c).memory_limit_in_bytes = 64 * MIB
        })
        .await?;
    container.says("end").await?;
    assert_eq!(container.stdout()?, "0::/\n67108864\nend\n");
    let exec = container.exec_output(&["cat", "/proc/self/cgroup"]).await?;
    assert!(exec.starts_with("0::/exec-"), "{exec}");
    let other = pod.sleeper().await?;
    let namespace = async |c: &Container| c.exec_output(&["readlink", "/proc/1/ns/cgroup"]).await;
    assert_ne!(namespace(&container).await?, namespace(&other).await?);
    Ok(())
}

async fn a_subtree_of_the_containers_own(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|c| pod_security(c).privileged = true).await?;
    // As systemd or another container engine does it in a container: its processes go into a leaf, and then
    // the controllers are handed down. A privileged container sees the host's cgroups, and its place in them.
    let script = "cd /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup) && mkdir inner && echo 0 >inner/cgroup.procs && \
                  echo '+memory +pids' >cgroup.subtree_control && echo 7 >inner/pids.max && echo made; exec sleep 1000";
    let container = pod
        .run(&["sh", "-c", script], |c| {
            container_security(c).privileged = true;
            resources(c).memory_limit_in_bytes = 64 * MIB;
        })
        .await?;
    container.says("made").await?;
    let own = container.cgroup_dirs().remove(0);
    assert_eq!(read(own.join("cgroup.subtree_control"))?, "memory pids");
    // The container's cgroup may hold no process now. An exec is born in a leaf, and still limited.
    assert_eq!(container.exec_output(&["echo", "hi"]).await?, "hi");
    assert_eq!(container.exec(&["probe", "eat", "200"]).await?.code, 137);
    assert_eq!(read(own.join("cgroup.procs"))?, "");
    container.stop(0).await?;
    container.remove().await?;
    assert!(!own.exists(), "{} is left", own.display());
    Ok(())
}

async fn no_process_is_in_an_inner_node(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = pod_below(&daemon, "a/b/pod").await?;
    let container = pod.sleeper().await?;
    pod.sleeper().await?;
    let exec = tokio::spawn({
        let container = container.clone();
        async move { container.exec(&["sleep", "2"]).await }
    });
    let own = container.cgroup_dirs().remove(0);
    // It is made before anybody is in it.
    eventually("the exec in its cgroup", seconds(5), || async {
        let mut others = stage::tree(&own).into_iter().filter(|dir| *dir != own);
        let busy =
            |dir: std::path::PathBuf| read(dir.join("cgroup.procs")).is_ok_and(|p| !p.is_empty());
        Ok(others.any(busy).then_some(()))
    })
    .await?;
    let (mut inner, mut busy) = (0, 0);
    for cgroup in below(&env) {
        let controllers = read(cgroup.join("cgroup.subtree_control"))?;
        let processes = read(cgroup.join("cgroup.procs"))?;
        inner += usize::from(!controllers.is_empty());
        busy += usize::from(!processes.is_empty());
        assert!(
            controllers.is_empty() || processes.is_empty(),
            "{} hands {controllers:?} down and holds {processes:?}",
            cgroup.display()
        );
    }
    // a, b, pod; two containers and one exec.
    assert_eq!((inner, busy), (3, 3));
    assert_eq!(exec.await??.code, 0);
    assert_eq!(stage::tree(&own).len(), 1, "the exec's cgroup is left");
    pod.stop().await?;
    pod.remove().await?;
    for parent in ["a/b", "a"] {
        env.remove_below(parent).await?;
    }
    Ok(())
}

async fn the_pods_cgroup_comes_and_goes_with_it(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let own = dir(&env.below("pod"));
    let pod = pod_below(&daemon, "pod").await?;
    assert!(own.is_dir());
    let container = pod.sleeper().await?;
    container.stop(0).await?;
    assert!(own.is_dir());
    pod.stop().await?;
    pod.remove().await?;
    assert!(!own.exists(), "{} is left", own.display());
    Ok(())
}

async fn the_kubelets_cgroup_stays(env: Env) -> Result<()> {
    needs_v2()?;
    if env.driver == Driver::Systemd {
        return skip("the kubelet's is a slice here: see systemd::the_kubelets_slice_stays");
    }
    let daemon = env.daemon().await?;
    let own = dir(&env.below("pod"));
    std::fs::create_dir_all(&own)?;
    // The limits are the kubelet's, and are not touched.
    let enable = "+memory +pids";
    std::fs::write(
        dir(&env.cgroup)
            .parent()
            .context("top")?
            .join("cgroup.subtree_control"),
        enable,
    )?;
    std::fs::write(dir(&env.cgroup).join("cgroup.subtree_control"), enable)?;
    std::fs::write(own.join("pids.max"), "123")?;
    let pod = pod_below(&daemon, "pod").await?;
    let container = pod.sleeper().await?;
    assert_eq!(container.cgroup_dirs().len(), 1);
    assert_eq!(read(own.join("pids.max"))?, "123");
    pod.stop().await?;
    pod.remove().await?;
    assert_eq!(below(&env), std::slice::from_ref(&own));
    std::fs::remove_dir(&own)?;
    Ok(())
}

async fn the_keeper_lives_with_its_pod(env: Env) -> Result<()> {
    needs_v2()?;
    if env.driver == Driver::Systemd {
        return skip("the keeper has a scope here: see systemd::keepers_live_with_their_pod");
    }
    let daemon = env
        .daemon_with(|s| s.set("cgroup.monitor", "\"pod\""))
        .await?;
    daemon.pull("test").await?;
    let pod = pod_below(&daemon, "pod").await?;
    let own = dir(&env.below("pod"));
    let leaf = own.join("slipway-keeper");
    let bystander = pod.sleeper().await?;
    let (pid, cgroup) = bystander.keeper()?;
    assert_eq!(dir(&cgroup), leaf);
    assert_eq!(read(format!("/proc/{pid}/oom_score_adj"))?, "-999");
    // What it uses is the pod's.
    assert_ne!(read(leaf.join("memory.current"))?, "0");
    assert!(counter(&read(leaf.join("cpu.stat"))?, "usage_usec ")? > 0);
    std::fs::write(own.join("memory.max"), "33554432")?;
    std::fs::write(own.join("memory.swap.max"), "0")?;
    for _ in 0..2 {
        let glutton = pod.run(&["probe", "eat", "200"], |_| {}).await?;
        let status = glutton.exited().await?;
        let found = (status.exit_code, status.reason.as_str());
        assert_eq!(found, (137, "OOMKilled"));
    }
    // Neither it nor whoever keeps to his place was struck.
    assert_eq!(bystander.keeper()?, (pid, cgroup.clone()));
    assert_eq!(bystander.exec_output(&["echo", "well"]).await?, "well");
    // Another daemon moves nobody.
    daemon.end().await?;
    daemon.launch().await?;
    assert_eq!(bystander.keeper()?, (pid, cgroup));
    pod.stop().await?;
    pod.remove().await?;
    assert!(!own.exists(), "{} is left", own.display());
    Ok(())
}

async fn a_frozen_container_holds_nobody_up(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    let own = container.cgroup_dirs().remove(0);
    let freeze = async |word: &str| -> Result<()> {
        std::fs::write(own.join("cgroup.freeze"), word)?;
        eventually(&format!("frozen {word}"), seconds(5), || async {
            let events = read(own.join("cgroup.events"))?;
            Ok(events.contains(&format!("frozen {word}")).then_some(()))
        })
        .await
    };
    freeze("1").await?;
    // An exec is born frozen. Its time runs all the same.
    let exec = tokio::time::timeout(seconds(30), container.exec_limited(&["true"], 2)).await;
    let exec = exec.context("an exec in a frozen container has no end")?;
    refused(exec, Code::DeadlineExceeded, &[]);
    assert_eq!(stage::tree(&own).len(), 1, "the exec's cgroup is left");
    // The pod goes on, and so does the container when it is thawed.
    let other = pod.sleeper().await?;
    assert_eq!(other.exec_output(&["echo", "well"]).await?, "well");
    freeze("0").await?;
    assert_eq!(container.exec_output(&["echo", "back"]).await?, "back");
    // Stopped while it is frozen, and while somebody waits for an exec without a limit.
    freeze("1").await?;
    let exec = tokio::spawn({
        let container = container.clone();
        async move { container.exec_limited(&["true"], 0).await }
    });
    eventually("the exec's cgroup", seconds(5), || async {
        Ok((stage::tree(&own).len() > 1).then_some(()))
    })
    .await?;
    let stopped = tokio::time::timeout(seconds(30), container.stop(1)).await;
    stopped.context("a frozen container can't be stopped")??;
    assert_eq!(container.status().await?.exit_code, 137);
    let exec = tokio::time::timeout(seconds(10), exec).await;
    let exec = exec.context("an exec outlives its container")??;
    assert!(!exec.is_ok_and(|e| e.exit_code == 0), "it never ran");
    container.remove().await?;
    assert!(!own.exists(), "{} is left", own.display());
    Ok(())
}

async fn what_the_kernel_refuses(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    for (file, value, names) in [
        ("memory.max", "many", "memory.max"),
        ("memory.high", "-4", "memory.high"),
        ("cpu.max", "1 2 3", "cpu.max"),
        ("cpu.weight", "0", "cpu.weight"),
        ("pids.max", "-1", "pids.max"),
        ("io.max", "254:253 wbps=1", "io.max"),
        ("memory.no_such_file", "1", "memory.no_such_file"),
        ("nosuch.max", "1", "controller nosuch"),
        // A file that is there, but only to be read.
        ("memory.current", "1", "memory.current"),
    ] {
        let status = pod
            .try_create(|c| unified(c, &[(file, value)]))
            .await
            .expect_err(file);
        assert_eq!(status.code(), Code::InvalidArgument, "{file}: {status}");
        assert!(status.message().contains(names), "{file}: {status}");
        assert_eq!(below(&env), Vec::<PathBuf>::new(), "after {file}={value}");
    }
    // The pod is as good as before.
    pod.sleeper().await?;
    Ok(())
}

async fn a_parent_that_cannot_hand_controllers_down(env: Env) -> Result<()> {
    needs_v2()?;
    if env.driver == Driver::Systemd {
        return skip("systemd puts no process into a slice, and hands its controllers down itself");
    }
    let daemon = env.daemon().await?;
    let busy = dir(&env.cgroup).join("busy");
    std::fs::create_dir_all(&busy)?;
    let mut process = tokio::process::Command::new("sleep")
        .arg("1000")
        .kill_on_drop(true)
        .spawn()?;
    let pid = process.id().context("a process")?;
    std::fs::write(busy.join("cgroup.procs"), pid.to_string())?;
    let pod = pod_below(&daemon, "busy").await?;
    let status = pod
        .try_create(|c| resources(c).memory_limit_in_bytes = 64 * MIB)
        .await
        .expect_err("a limit without its controller");
    for word in ["memory", "busy", "cgroup.subtree_control"] {
        assert!(status.message().contains(word), "{word}: {status}");
    }
    assert_eq!(below(&env), std::slice::from_ref(&busy));
    // Without limits it needs none, and runs.
    pod.sleeper().await?;
    pod.stop().await?;
    pod.remove().await?;
    process.kill().await?;
    std::fs::remove_dir(&busy)?;
    Ok(())
}

async fn a_parent_that_may_have_no_children(env: Env) -> Result<()> {
    needs_v2()?;
    let daemon = env.daemon().await?;
    let pod = pod_below(&daemon, "full").await?;
    let full = dir(&env.below("full"));
    std::fs::write(full.join("cgroup.max.descendants"), "0")?;
    let status = pod.try_create(|_| {}).await.expect_err("no child may be");
    if env.driver == Driver::Systemd {
        // It is systemd that can't, and keeps the cause in its journal.
        assert!(
            status.message().contains("journalctl -u slipway-"),
            "{status}"
        );
        assert_eq!(below(&env), std::slice::from_ref(&full));
        std::fs::write(full.join("cgroup.max.descendants"), "max")?;
        pod.sleeper().await?;
        return Ok(());
    }
    assert!(status.message().contains("/full/"), "{status}");
    assert!(
        status.message().contains("cgroup.max.descendants"),
        "{status}"
    );
    assert_eq!(below(&env), std::slice::from_ref(&full));
    // Nor may a pod be made there.
    let mut config = config::pod(&daemon);
    config.linux.get_or_insert_default().cgroup_parent = env.below("full/pod");
    let status = daemon.run_pod(config).await.map(|p| p.id);
    let status = status.expect_err("no child may be");
    assert!(status.message().contains("/full/pod"), "{status}");
    std::fs::write(full.join("cgroup.max.descendants"), "max")?;
    pod.sleeper().await?;
    Ok(())
}

/// All there at once, each in a pod's cgroup of its own as a kubelet makes it, and then none.
async fn a_hundred_pods_leave_no_cgroup(env: Env) -> Result<()> {
    const PODS: usize = 100;
    const AT_ONCE: usize = 10;
    needs_v2()?;
    let daemon = env.daemon().await?;
    daemon.pull("test").await?;
    let mut pods = Vec::new();
    for first in (0..PODS).step_by(AT_ONCE) {
        let mut tasks = tokio::task::JoinSet::new();
        for n in first..first + AT_ONCE {
            let daemon = daemon.clone();
            tasks.spawn(async move {
                let pod = pod_below(&daemon, &format!("p{n}")).await?;
                pod.sleeper().await?;
                anyhow::Ok(pod)
            });
        }
        while let Some(pod) = tasks.join_next().await {
            pods.push(pod??);
        }
    }
    // At least a pod's and a container's.
    let there = below(&env).len();
    assert!(there >= 2 * PODS, "{there} cgroups of {PODS} pods");
    while !pods.is_empty() {
        let mut tasks = tokio::task::JoinSet::new();
        for pod in pods.split_off(pods.len().saturating_sub(AT_ONCE)) {
            tasks.spawn(async move {
                pod.stop().await?;
                pod.remove().await
            });
        }
        while let Some(gone) = tasks.join_next().await {
            gone??;
        }
    }
    // When the last call has returned, not some time later.
    assert_eq!(below(&env), Vec::<PathBuf>::new());
    Ok(())
}
