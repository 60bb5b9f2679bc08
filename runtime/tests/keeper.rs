//! Zygote, keeper and creator for real: pods made of namespaces and cgroups on this host, from a root file
//! system that holds Debian's static busybox.
//!
//! No libtest harness: the zygote executes this very binary again, so `main` has to see its argument first.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::Capability;
use slipway_proto::keeper::{
    Attach, ContainerState, CreateContainer, ErrorKind, Exec, Overlay, Phase, SetupSandbox, User,
};
use slipway_runtime::client::{ClientError, Events, Keeper, Keepers};
use slipway_runtime::descriptor::Descriptor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LONG: Duration = Duration::from_secs(30);

fn main() {
    if std::env::args().nth(1).as_deref() == Some(slipway_runtime::zygote::ZYGOTE_COMMAND) {
        slipway_runtime::zygote::main();
    }
    if !nix::unistd::geteuid().is_root() || !Path::new("/bin/busybox").exists() {
        println!("SKIPPED: keeper tests need root and /bin/busybox (Debian: busybox-static)");
        return;
    }
    // Mounts of this test are nobody else's, and go with its processes.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    nix::mount::mount(
        None::<&str>,
        "/",
        None::<&str>,
        nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .unwrap();
    let keepers = Keepers::launch().unwrap();
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (mut passed, mut failed) = (0, 0);
    macro_rules! run {
        ($($test:ident),* $(,)?) => {$(
            let name = stringify!($test);
            if filter.as_deref().is_none_or(|f| name.contains(f)) {
                let pod = runtime.block_on(Pod::start(&keepers));
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    runtime.block_on(async {
                        tokio::time::timeout(Duration::from_secs(60), $test(&pod)).await.expect("in time");
                    });
                }));
                runtime.block_on(pod.end());
                println!("test {name} ... {}", if result.is_ok() { passed += 1; "ok" } else { failed += 1; "FAILED" });
            }
        )*};
    }
    run!(
        a_container_runs_and_its_output_is_logged,
        an_exec_is_confined_as_the_init,
        a_timed_out_exec_leaves_nothing,
        a_background_child_does_not_hold_an_exec,
        commands_that_cannot_run,
        a_shared_pid_namespace_has_an_init_that_leads_nowhere,
        the_pod_ends_with_its_init,
        death_by_a_real_time_signal,
        a_container_on_a_terminal,
        standard_input_stays_open,
        a_slow_reader_holds_nobody,
        an_exec_on_a_terminal,
        logs_are_reopened_without_loss,
        oom_is_told,
        deleting_a_running_container_leaves_nothing,
        a_bad_user_leaves_nothing,
    );
    println!(
        "test result: {}. {passed} passed; {failed} failed",
        if failed == 0 { "ok" } else { "FAILED" }
    );
    std::process::exit(i32::from(failed > 0));
}

/// A pod with a keeper of its own, below a temporary directory and a cgroup of its own.
struct Pod {
    keeper: Keeper,
    root: tempfile::TempDir,
    cgroup: String,
    namespaces: HashMap<&'static str, String>,
    keeper_pid: i32,
}

/// What a test changes about a container.
struct Options {
    args: Vec<String>,
    user: User,
    process: serde_json::Value,
    resources: serde_json::Value,
    seccomp: Vec<u8>,
    pid_namespace: Option<String>,
}

impl Options {
    fn shell(script: &str) -> Self {
        Self {
            args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            user: User::default(),
            process: serde_json::json!({}),
            resources: serde_json::json!({}),
            seccomp: Vec::new(),
            pid_namespace: None,
        }
    }
}

impl Pod {
    async fn start(keepers: &Keepers) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let root = tempfile::tempdir().unwrap();
        std::fs::set_permissions(root.path(), PermissionsExt::from_mode(0o755)).unwrap();
        // As the daemon has it: the run root is a mount, on itself or a file system of its own.
        let (source, kind, flags) = match n % 2 {
            0 => (root.path(), None, nix::mount::MsFlags::MS_BIND),
            _ => (
                Path::new("tmpfs"),
                Some("tmpfs"),
                nix::mount::MsFlags::empty(),
            ),
        };
        nix::mount::mount(Some(source), root.path(), kind, flags, Some("mode=755")).unwrap();
        make_layer(&root.path().join("layer"));
        let id = format!("pod{n}");
        let dir = root.path().join("pods").join(&id);
        std::fs::create_dir_all(&dir).unwrap();
        let keeper = keepers.spawn(&id, &dir, None).await.unwrap();
        let cgroup = format!("/slipway-keeper-test-{}/{id}", std::process::id());
        let made = keeper
            .setup_sandbox(
                SetupSandbox {
                    new_network: true,
                    new_ipc: true,
                    new_uts: true,
                    new_pid: true,
                    hostname: "test-host".into(),
                    sysctls: [("net.ipv4.ip_unprivileged_port_start".into(), "7".into())].into(),
                    cgroup: cgroup.clone(),
                    ns_dir: dir.join("ns").to_string_lossy().into_owned(),
                    shm_bytes: 1 << 20,
                    shm_dir: dir.join("shm").to_string_lossy().into_owned(),
                    ..SetupSandbox::default()
                },
                LONG,
            )
            .await
            .unwrap();
        assert!(made.made_cgroup);
        let namespaces = [
            ("network", made.network),
            ("ipc", made.ipc),
            ("uts", made.uts),
            ("pid", made.pid),
        ];
        let keeper_pid = keeper.hello().await.unwrap().pid;
        Self {
            keeper,
            root,
            cgroup,
            namespaces: namespaces.into(),
            keeper_pid,
        }
    }

    fn dir(&self) -> PathBuf {
        self.root.path().join("pods").join(self.keeper.pod_id())
    }

    /// Process id of its init, as this process sees it.
    fn init(&self) -> i32 {
        let children = format!("/proc/{0}/task/{0}/children", self.keeper_pid);
        let children = std::fs::read_to_string(children).unwrap();
        let is_init = |pid: &&str| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name == "slipway-init\n")
        };
        let pid = children.split_whitespace().find(is_init);
        pid.expect("the pod's init").parse().unwrap()
    }

    fn log(&self, id: &str) -> PathBuf {
        self.root.path().join(format!("{id}.log"))
    }

    fn create_request(&self, id: &str, options: Options) -> CreateContainer {
        let dir = self.dir().join("containers").join(id);
        // A volatile overlay's directories serve one container only.
        let layer = tempfile::tempdir_in(self.root.path()).unwrap().keep();
        let (upper, work) = (layer.join("upper"), layer.join("work"));
        for d in [&dir, &upper, &work] {
            std::fs::create_dir_all(d).unwrap();
        }
        let caps = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"];
        let mut process = serde_json::json!({
            "args": options.args, "cwd": "/made/dir", "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": false,
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 256, "hard": 512}],
        });
        for (key, value) in options.process.as_object().unwrap() {
            process[key] = value.clone();
        }
        let mut namespaces = vec![serde_json::json!({"type": "mount"})];
        for kind in ["network", "ipc", "uts"] {
            namespaces.push(serde_json::json!({"type": kind, "path": self.namespaces[kind]}));
        }
        namespaces.push(match options.pid_namespace {
            Some(path) => serde_json::json!({"type": "pid", "path": path}),
            None => serde_json::json!({"type": "pid"}),
        });
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": process,
            "root": {"path": "rootfs"},
            "hostname": "",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "bind", "source": self.dir().join("shm"), "options": ["rbind", "rw"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            ],
            "linux": {
                "cgroupsPath": format!("{}/{id}", self.cgroup),
                "namespaces": namespaces,
                "resources": options.resources,
                "maskedPaths": ["/proc/keys"],
                "readonlyPaths": ["/proc/sys"],
            },
        });
        CreateContainer {
            id: id.into(),
            dir: dir.to_string_lossy().into_owned(),
            spec: serde_json::to_vec(&spec).unwrap(),
            overlay: Some(Overlay {
                selinux_label: String::new(),
                lower: vec![
                    self.root
                        .path()
                        .join("layer")
                        .to_string_lossy()
                        .into_owned(),
                ],
                upper: upper.to_string_lossy().into_owned(),
                work: work.to_string_lossy().into_owned(),
            }),
            user: Some(options.user),
            env: vec![b"PATH=/bin".to_vec(), b"RAW=\xff\xfe".to_vec()],
            seccomp: options.seccomp,
            log_path: self.log(id).to_string_lossy().into_owned(),
            working_dir: "/made/dir".into(),
            ..CreateContainer::default()
        }
    }

    /// Creates and starts a container.
    async fn run(&self, id: &str, options: Options) {
        self.keeper
            .create(self.create_request(id, options), LONG)
            .await
            .unwrap();
        self.keeper.start(id, LONG).await.unwrap();
    }

    async fn exited(&self, id: &str) -> ContainerState {
        let mut events = self.keeper.subscribe().await.unwrap();
        wait_for_exit(&mut events, id).await
    }

    fn log_text(&self, id: &str) -> String {
        let text = std::fs::read_to_string(self.log(id)).unwrap();
        text.lines()
            .map(|l| l.splitn(4, ' ').nth(3).unwrap_or_default().to_owned() + "\n")
            .collect()
    }

    async fn exec(&self, id: &str, script: &str) -> String {
        let args = ["/bin/sh", "-c", script]
            .map(|a| a.as_bytes().to_vec())
            .to_vec();
        let output = self
            .keeper
            .exec_sync(id, args, None, 1 << 20)
            .await
            .unwrap();
        assert_eq!(
            output.exit_code,
            0,
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Tears the pod down and checks that nothing is left of it.
    async fn end(self) {
        self.keeper.teardown(LONG).await.unwrap();
        let host = slipway_runtime::cgroup::Hierarchies::detect().unwrap();
        let cgroup = Path::new(&self.cgroup);
        assert!(host.pids(cgroup).is_empty());
        let _ = host.remove(cgroup.parent().unwrap());
        // The keeper's socket pins the mount until the keeper has ended.
        nix::mount::umount2(self.root.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = self.root.path().to_string_lossy().into_owned();
        assert!(!mounts.contains(&root), "a mount is left: {mounts}");
        let deadline = Instant::now() + Duration::from_secs(5);
        while Path::new(&format!("/proc/{}", self.keeper_pid)).exists() {
            assert!(Instant::now() < deadline, "the keeper lives on");
            tokio::task::yield_now().await;
        }
    }
}

async fn wait_for_exit(events: &mut Events, id: &str) -> ContainerState {
    loop {
        let state = events.next().await.expect("the keeper lives");
        if state.id == id && state.phase() == Phase::Exited {
            return state;
        }
    }
}

fn make_layer(layer: &Path) {
    for dir in ["bin", "etc", "proc", "dev", "sys", "tmp"] {
        std::fs::create_dir_all(layer.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", layer.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "sleep", "cat", "id", "ls", "echo", "dd", "grep", "setsid", "hostname", "unshare",
        "find", "head", "tty", "stty",
    ] {
        symlink("busybox", layer.join("bin").join(applet)).unwrap();
    }
    std::fs::write(
        layer.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(layer.join("etc/group"), "root:x:0:\nextra:x:5000:web\n").unwrap();
    std::fs::write(layer.join("bin/not-executable"), "#!/bin/sh\n").unwrap();
}

async fn a_container_runs_and_its_output_is_logged(pod: &Pod) {
    let script = "echo out; echo err >&2; hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                  pwd; echo $RAW; ulimit -n; cat $(find /sys/fs/cgroup -name cgroup.procs | head -n 1); \
                  echo x > /sys/fs/cgroup/x; echo shared > /dev/shm/x; exit 3";
    pod.run("c", Options::shell(script)).await;
    let state = pod.exited("c").await;
    assert_eq!(state.exit_code, 3);
    assert!(state.created_at > 0 && state.created_at <= state.started_at);
    assert!(state.started_at <= state.finished_at && !state.oom_killed && !state.cannot_run);
    let raw = std::fs::read(pod.log("c")).unwrap();
    let text = String::from_utf8_lossy(&raw).into_owned();
    assert!(text.contains(" stderr F err\n"), "{text}");
    assert_eq!(
        std::fs::read_to_string(pod.dir().join("shm/x")).unwrap(),
        "shared\n"
    );
    for line in ["out", "test-host", "7", "/made/dir", "256", "1"] {
        assert!(
            text.contains(&format!(" stdout F {line}\n")),
            "{line} in {text}"
        );
    }
    assert!(text.contains("Read-only file system"), "{text}");
    assert!(
        raw.windows(3).any(|w| w == b"\xff\xfe\n"),
        "raw bytes pass through"
    );
    let exit: serde_json::Value =
        serde_json::from_slice(&std::fs::read(pod.dir().join("exits/c.json")).unwrap()).unwrap();
    assert_eq!(exit["exit_code"], 3);
}

async fn an_exec_is_confined_as_the_init(pod: &Pod) {
    let profile = slipway_seccomp::default_profile(
        &[Capability::Chown, Capability::Kill].into(),
        slipway_seccomp::native_arch(),
        slipway_seccomp::running_kernel(),
    );
    let filter =
        slipway_seccomp::compile(&profile, &slipway_seccomp::CompileOptions::default()).unwrap();
    let probe = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)' /proc/self/status; \
                 pwd; id; ulimit -n; echo $HOME; unshare -U true 2>&1; \
                 for n in net ipc uts pid mnt; do ls -l /proc/self/ns/$n | grep -o '[0-9]*\\]'; done; \
                 echo fds; ls /proc/self/fd; echo hi > /dev/stdout";
    for (id, nnp) in [("plain", false), ("nnp", true)] {
        let mut options = Options::shell(&format!("{probe}; sleep 1000"));
        options.seccomp = filter.to_bytes();
        options.user = User {
            run_as_username: "web".into(),
            supplemental_groups: vec![77],
            ..User::default()
        };
        options.process = serde_json::json!({"noNewPrivileges": nnp});
        let mut events = pod.keeper.subscribe().await.unwrap();
        pod.run(id, options).await;
        // The init has said all of it; a log is read as it grows, so its end tells.
        while !pod.log_text(id).ends_with("hi\n") {
            tokio::task::yield_now().await;
        }
        let exec = pod.exec(id, probe).await;
        pod.keeper.signal(id, libc::SIGKILL, false).await.unwrap();
        assert_eq!(wait_for_exit(&mut events, id).await.exit_code, 137);
        let init = pod.log_text(id);
        assert_eq!(init, exec, "init and exec session differ");
        for part in [
            "Uid:\t1000\t1000\t1000\t1000",
            "Groups:\t77 1000 5000",
            "Seccomp:\t2",
            "CapEff:\t0000000000000000",
            "CapBnd:\t00000000000000e1",
            "CapAmb:\t0000000000000000",
            "/made/dir",
            "uid=1000(web)",
            "256\n",
            "/home/web",
            "Operation not permitted",
            "fds\n0\n1\n2\n3\nhi\n",
            &format!("NoNewPrivs:\t{}", u8::from(nnp)),
        ] {
            assert!(exec.contains(part), "{part:?} in {exec}");
        }
    }
}

async fn a_timed_out_exec_leaves_nothing(pod: &Pod) {
    pod.run("c", Options::shell("sleep 1000")).await;
    let script = "(setsid sleep 4321 &); sleep 4321 & (sleep 4321 &); sleep 4321";
    let args = ["/bin/sh", "-c", script]
        .map(|a| a.as_bytes().to_vec())
        .to_vec();
    let output = pod
        .keeper
        .exec_sync("c", args, Some(Duration::from_millis(500)), 1 << 20)
        .await
        .unwrap();
    assert!(output.timed_out);
    let left = pod.exec("c", "for p in /proc/[0-9]*; do cat $p/cmdline 2>/dev/null; echo; done | grep 432[1] || true").await;
    assert!(left.trim().is_empty(), "left over: {left}");
    // Its cgroup goes with what was in it, at the latest before a later exec.
    let host = slipway_runtime::cgroup::Hierarchies::detect().unwrap();
    let Some(cgroup) = host.v2_dir(&Path::new(&pod.cgroup).join("c")) else {
        return;
    };
    let leaves = || {
        let entries = std::fs::read_dir(&cgroup).unwrap().flatten();
        entries.filter(|e| e.file_name().to_string_lossy().starts_with("exec-"))
    };
    while leaves().count() > 0 {
        pod.exec("c", "true").await;
    }
}

async fn a_background_child_does_not_hold_an_exec(pod: &Pod) {
    pod.run("c", Options::shell("sleep 1000")).await;
    assert_eq!(
        pod.exec("c", "echo started; sleep 1000 &").await,
        "started\n"
    );
    let big = pod.keeper.exec_sync(
        "c",
        ["/bin/dd", "if=/dev/zero", "bs=1M", "count=5"]
            .map(|a| a.as_bytes().to_vec())
            .to_vec(),
        None,
        1 << 20,
    );
    let big = big.await.unwrap();
    assert_eq!((big.stdout.len(), big.exit_code), (1 << 20, 0));
}

async fn commands_that_cannot_run(pod: &Pod) {
    for (id, command, code) in [
        ("none", "no-such-command", 127),
        ("abs", "/bin/missing", 127),
        ("perm", "/bin/not-executable", 126),
    ] {
        let mut options = Options::shell("");
        options.args = vec![command.into()];
        pod.keeper
            .create(pod.create_request(id, options), LONG)
            .await
            .unwrap();
        let error = pod.keeper.start(id, LONG).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::CannotRun);
        assert!(error.to_string().contains(command), "{error}");
        let state = pod.exited(id).await;
        assert_eq!(
            (state.exit_code, state.cannot_run),
            (code, true),
            "{command}"
        );
        let error = pod.keeper.start(id, LONG).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WrongState);
    }
    pod.run("c", Options::shell("sleep 1000")).await;
    for (command, code) in [("no-such-command", 127), ("/bin/not-executable", 126)] {
        let output = pod
            .keeper
            .exec_sync("c", vec![command.into()], None, 1024)
            .await
            .unwrap();
        assert_eq!(output.exit_code, code);
        assert!(String::from_utf8_lossy(&output.stderr).contains(command));
    }
    let error = pod
        .keeper
        .exec_sync("none", vec!["x".into()], None, 1024)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongState);
    let error = pod
        .keeper
        .exec_sync("unknown", vec!["x".into()], None, 1024)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

async fn a_shared_pid_namespace_has_an_init_that_leads_nowhere(pod: &Pod) {
    let mut options = Options::shell(
        "cat /proc/1/comm; ls /proc/1/root/ /proc/1/fd /proc/1/cwd/; echo done; sleep 1000",
    );
    options.pid_namespace = Some(pod.namespaces["pid"].clone());
    let all = ["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_DAC_OVERRIDE"];
    options.process =
        serde_json::json!({"capabilities": {"bounding": all, "effective": all, "permitted": all}});
    let mut events = pod.keeper.subscribe().await.unwrap();
    pod.run("c", options).await;
    while !pod.log_text("c").ends_with("done\n") {
        tokio::task::yield_now().await;
    }
    // An orphan goes to the pod's init, which reaps it.
    pod.exec("c", "(sleep 0.01 &)").await;
    pod.keeper.signal("c", libc::SIGTERM, true).await.unwrap();
    wait_for_exit(&mut events, "c").await;
    let text = pod.log_text("c");
    let init = Path::new("/proc").join(pod.init().to_string());
    let status = std::fs::read_to_string(init.join("status")).unwrap();
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapPrm:\t0000000000000000"] {
        assert!(status.contains(line), "{line:?} is not in {status}");
    }
    for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
        let inode = |path: PathBuf| std::fs::metadata(path).unwrap().ino();
        let pinned = inode(pod.namespaces[kind].clone().into());
        assert_eq!(inode(init.join("ns").join(file)), pinned, "{kind}");
    }
    assert!(text.starts_with("slipway-init\n"), "{text}");
    assert!(text.ends_with("done\n"), "{text}");
    for leak in ["home", "work", "boot", "var", "socket", "pipe"] {
        assert!(!text.contains(leak), "PID 1 leads to {leak}: {text}");
    }
}

async fn the_pod_ends_with_its_init(pod: &Pod) {
    let mut options = Options::shell("sleep 1000");
    options.pid_namespace = Some(pod.namespaces["pid"].clone());
    let mut events = pod.keeper.subscribe().await.unwrap();
    pod.run("c", options).await;
    let init = nix::unistd::Pid::from_raw(pod.init());
    nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(wait_for_exit(&mut events, "c").await.exit_code, 137);
    while events.next().await.is_some() {}
    assert!(pod.dir().join("exits/c.json").exists());
    let error = pod.keeper.hello().await.unwrap_err();
    assert!(matches!(error, ClientError::Gone { .. }), "{error}");
}

async fn death_by_a_real_time_signal(pod: &Pod) {
    pod.run("c", Options::shell("sleep 1000")).await;
    let args = ["/bin/sh", "-c", "kill -40 $$"].map(|a| a.as_bytes().to_vec());
    let exec = pod
        .keeper
        .exec_sync("c", args.to_vec(), None, 1024)
        .await
        .unwrap();
    assert_eq!(exec.exit_code, 128 + 40);
}

/// Reads along with a container: its output, and what its input is written to.
async fn attach(pod: &Pod, id: &str) -> (Descriptor, Option<OwnedFd>) {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let ((out_read, stdout), (_err_read, stderr)) = (pipe(), pipe());
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let call = Attach {
        container_id: id.into(),
        stdout: true,
        stderr: false,
    };
    let keeper = &pod.keeper;
    keeper
        .attach(call, stdout.as_fd(), stderr.as_fd(), theirs.as_fd())
        .await
        .unwrap();
    let input = slipway_runtime::terminal::receive(&ours).ok();
    (Descriptor::new(out_read).unwrap(), input)
}

/// Reads until the text has come.
async fn read_until(from: &mut Descriptor, wanted: &str) -> String {
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains(wanted) {
        let n = from.read_buf(&mut text).await.unwrap();
        assert!(n > 0, "the end before {wanted:?}: {text:?}");
    }
    String::from_utf8_lossy(&text).into_owned()
}

async fn a_container_on_a_terminal(pod: &Pod) {
    let script = "tty; ls -l /dev/console; read a; echo got $a; cat; echo over";
    let mut request = pod.create_request("c", Options::shell(script));
    request.tty = true;
    pod.keeper.create(request, LONG).await.unwrap();
    let (mut output, input) = attach(pod, "c").await;
    pod.keeper.start("c", LONG).await.unwrap();
    let text = read_until(&mut output, "/dev/console\r\n").await;
    assert!(text.starts_with("/dev/pts/0\r\n"), "{text}");
    let terminal = input.expect("the terminal");
    slipway_runtime::terminal::resize(&terminal, 111, 22).unwrap();
    rustix::io::write(&terminal, b"words\n").unwrap();
    // What is typed comes back, and what is printed comes once.
    let text = read_until(&mut output, "got words\r\n").await;
    assert!(text.contains("words\r\ngot words\r\n"), "{text}");
    let exec = pod.exec("c", "stty size </dev/console").await;
    assert_eq!(exec, "22 111\n");
    // Somebody who comes later, and the log, see what comes then; and the last one to leave closes nothing.
    drop((output, terminal));
    let (mut output, input) = attach(pod, "c").await;
    let terminal = input.expect("the terminal");
    rustix::io::write(&terminal, b"more\n\x04").unwrap();
    read_until(&mut output, "over\r\n").await;
    assert_eq!(pod.exited("c").await.exit_code, 0);
    assert_eq!(output.read_buf(&mut Vec::new()).await.unwrap(), 0);
    assert!(pod.log_text("c").contains("got words\n"));
}

async fn standard_input_stays_open(pod: &Pod) {
    let mut request = pod.create_request("c", Options::shell("cat; echo ended"));
    request.stdin = true;
    pod.keeper.create(request, LONG).await.unwrap();
    pod.keeper.start("c", LONG).await.unwrap();
    for words in ["first\n", "second\n"] {
        let (mut output, input) = attach(pod, "c").await;
        rustix::io::write(input.expect("its input"), words.as_bytes()).unwrap();
        assert_eq!(read_until(&mut output, words).await, words);
    }
    pod.keeper.close_stdin("c").await.unwrap();
    assert_eq!(pod.exited("c").await.exit_code, 0);
    assert_eq!(pod.log_text("c"), "first\nsecond\nended\n");
    // Without being asked for it has none.
    pod.run("d", Options::shell("cat; echo none")).await;
    pod.exited("d").await;
    assert_eq!(pod.log_text("d"), "none\n");
}

async fn a_slow_reader_holds_nobody(pod: &Pod) {
    let script = "read a; dd if=/dev/zero bs=1M count=3 2>/dev/null; echo; echo done; read b";
    let mut request = pod.create_request("c", Options::shell(script));
    request.stdin = true;
    pod.keeper.create(request, LONG).await.unwrap();
    let (mut output, input) = attach(pod, "c").await;
    let input = input.expect("its input");
    pod.keeper.start("c", LONG).await.unwrap();
    rustix::io::write(&input, b"go\n").unwrap();
    while !pod.log_text("c").ends_with("done\n") {
        tokio::task::yield_now().await;
    }
    rustix::io::write(&input, b"go\n").unwrap();
    pod.exited("c").await;
    let mut all = Vec::new();
    output.read_to_end(&mut all).await.unwrap();
    assert!(all.len() < 3 << 20, "{} bytes", all.len());
}

async fn an_exec_on_a_terminal(pod: &Pod) {
    pod.run("c", Options::shell("sleep 1000")).await;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let script = "tty; echo $TERM; read a; echo got $a; exit 5";
    let exec = Exec {
        container_id: "c".into(),
        args: ["/bin/sh", "-c", script]
            .map(|a| a.as_bytes().to_vec())
            .to_vec(),
        timeout_ms: 0,
        tty: true,
    };
    let keeper = pod.keeper.clone();
    let call = tokio::spawn(async move { keeper.exec(exec, &[theirs.as_fd()]).await });
    let receive = move || slipway_runtime::terminal::receive(&ours).unwrap();
    let master = tokio::task::spawn_blocking(receive).await.unwrap();
    let mut terminal = Descriptor::new(master).unwrap();
    let text = read_until(&mut terminal, "xterm\r\n").await;
    assert_eq!(text, "/dev/pts/0\r\nxterm\r\n");
    terminal.write_all(b"words\n").await.unwrap();
    read_until(&mut terminal, "got words\r\n").await;
    assert_eq!(call.await.unwrap().unwrap().exit_code, 5);
}

async fn logs_are_reopened_without_loss(pod: &Pod) {
    let script = "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done";
    let mut events = pod.keeper.subscribe().await.unwrap();
    pod.keeper
        .create(pod.create_request("c", Options::shell(script)), LONG)
        .await
        .unwrap();
    pod.keeper.reopen_log("c").await.unwrap();
    pod.keeper.start("c", LONG).await.unwrap();
    let mut parts = Vec::new();
    for n in 0..20 {
        let to = self_rotated(pod, n);
        if std::fs::rename(pod.log("c"), &to).is_ok() {
            parts.push(to);
        }
        pod.keeper.reopen_log("c").await.unwrap();
        assert!(pod.log("c").exists());
    }
    wait_for_exit(&mut events, "c").await;
    pod.keeper.reopen_log("c").await.unwrap();
    parts.push(pod.log("c"));
    let text: String = parts
        .iter()
        .map(|p| std::fs::read_to_string(p).unwrap())
        .collect();
    let numbers: Vec<String> = text
        .lines()
        .map(|l| l.rsplit(' ').next().unwrap().to_owned())
        .collect();
    let expected: Vec<String> = (0..20000).map(|n| n.to_string()).collect();
    assert_eq!(numbers, expected);
}

fn self_rotated(pod: &Pod, n: usize) -> PathBuf {
    pod.root.path().join(format!("c.log.{n}"))
}

async fn oom_is_told(pod: &Pod) {
    let mut options = Options::shell("dd if=/dev/zero of=/dev/null bs=64M");
    options.args = ["/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=64M"]
        .map(str::to_owned)
        .to_vec();
    let limit = 16 << 20;
    options.resources = serde_json::json!({"memory": {"limit": limit, "swap": limit}});
    pod.run("c", options).await;
    let state = pod.exited("c").await;
    assert_eq!((state.exit_code, state.oom_killed), (137, true));
}

async fn deleting_a_running_container_leaves_nothing(pod: &Pod) {
    pod.run("c", Options::shell("sleep 1000 & sleep 1000"))
        .await;
    let host = slipway_runtime::cgroup::Hierarchies::detect().unwrap();
    let cgroup = PathBuf::from(&pod.cgroup).join("c");
    let mut pids = host.pids(&cgroup);
    while pids.len() < 2 {
        tokio::task::yield_now().await;
        pids = host.pids(&cgroup);
    }
    pod.keeper.delete("c", LONG).await.unwrap();
    pod.keeper.delete("c", LONG).await.unwrap();
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
    assert!(host.pids(&cgroup).is_empty());
    assert!(pod.keeper.snapshot().await.unwrap().containers.is_empty());
    // The name is free again.
    pod.run("c", Options::shell("exit 0")).await;
    assert_eq!(pod.exited("c").await.exit_code, 0);
}

async fn a_bad_user_leaves_nothing(pod: &Pod) {
    let mut options = Options::shell("true");
    options.user = User {
        run_as_username: "nobody-here".into(),
        ..User::default()
    };
    let error = pod
        .keeper
        .create(pod.create_request("c", options), LONG)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("nobody-here"), "{error}");
    assert!(pod.keeper.snapshot().await.unwrap().containers.is_empty());
    pod.run("c", Options::shell("exit 0")).await;
    assert_eq!(pod.exited("c").await.exit_code, 0);
}
