//! Capabilities, no_new_privs, masked and read-only paths, privileged containers: of the first process
//! and of exec sessions alike, and as runc would make them.

use tonic::Code;

use crate::harness::*;

tests![
    default_capabilities,
    capabilities_added_and_dropped,
    all_capabilities_are_what_the_daemon_has,
    ambient_capabilities,
    unknown_capabilities_are_refused,
    capabilities_of_another_user,
    no_new_privs_of_init_and_exec,
    setuid_programs_and_no_new_privs,
    masked_and_readonly_paths,
    privileged_containers,
    privileged_needs_a_privileged_pod,
    the_host_is_not_behind_process_one,
    the_binary_is_not_writable_from_inside,
    as_confined_as_under_runc,
];

/// The default set of containerd and CRI-O: bits of linux/capability.h.
const DEFAULTS: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 7
    | 1 << 8
    | 1 << 10
    | 1 << 13
    | 1 << 18
    | 1 << 27
    | 1 << 29
    | 1 << 31;
const SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

/// Inheritable, permitted, effective, bounding, ambient sets.
fn sets(report: &probe::Report) -> [u64; 5] {
    SETS.map(|set| report.caps(set))
}

/// Expects the same sets of a container's first process and of an exec session in it.
async fn expect(
    daemon: &Daemon,
    wanted: [u64; 5],
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<()> {
    let reports = daemon.pod(|_| {}).await?.probes(change).await?;
    for (report, who) in reports.iter().zip(["init", "exec"]) {
        let hex = |sets: [u64; 5]| sets.map(|s| format!("{s:x}"));
        assert_eq!(hex(sets(report)), hex(wanted), "sets {SETS:?} of {who}");
    }
    Ok(())
}

fn capabilities(add: &[&str], drop: &[&str]) -> Option<cri::Capability> {
    let words = |w: &[&str]| w.iter().map(|w| (*w).to_owned()).collect();
    Some(cri::Capability {
        add_capabilities: words(add),
        drop_capabilities: words(drop),
        ..Default::default()
    })
}

fn own_bounding() -> Result<u64> {
    let status = read("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("CapBnd:"))
        .context("CapBnd")?;
    Ok(u64::from_str_radix(line.trim(), 16)?)
}

async fn default_capabilities(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let d = DEFAULTS & own_bounding()?;
    expect(&daemon, [0, d, d, d, 0], |_| {}).await
}

async fn capabilities_added_and_dropped(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let d = (DEFAULTS | 1 << 12) & !(1 << 13 | 1 << 27) & own_bounding()?;
    let change = |c: &mut cri::ContainerConfig| {
        container_security(c).capabilities =
            capabilities(&["NET_ADMIN"], &["NET_RAW", "CAP_MKNOD"]);
    };
    expect(&daemon, [0, d, d, d, 0], change).await?;
    let change = |c: &mut cri::ContainerConfig| {
        container_security(c).capabilities = capabilities(&[], &["ALL"])
    };
    expect(&daemon, [0; 5], change).await?;
    // ALL is applied first, whatever the order.
    let d = 1 << 10;
    let change = |c: &mut cri::ContainerConfig| {
        container_security(c).capabilities = capabilities(&["net_bind_service"], &["all"]);
    };
    expect(&daemon, [0, d, d, d, 0], change).await
}

async fn all_capabilities_are_what_the_daemon_has(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let all = own_bounding()?;
    let change = |c: &mut cri::ContainerConfig| {
        container_security(c).capabilities = capabilities(&["ALL"], &[])
    };
    expect(&daemon, [0, all, all, all, 0], change).await?;
    let some = all & !(1 << 21);
    let change = |c: &mut cri::ContainerConfig| {
        container_security(c).capabilities = capabilities(&["ALL"], &["SYS_ADMIN"])
    };
    expect(&daemon, [0, some, some, some, 0], change).await
}

async fn ambient_capabilities(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let reports = daemon
        .pod(|_| {})
        .await?
        .probes(|c| {
            let security = container_security(c);
            security.run_as_user = Some(cri::Int64Value { value: 1000 });
            security.capabilities = Some(cri::Capability {
                add_ambient_capabilities: vec!["NET_BIND_SERVICE".into()],
                ..Default::default()
            });
        })
        .await?;
    for (report, who) in reports.iter().zip(["init", "exec"]) {
        let bit = 1 << 10;
        assert_eq!(report.caps("CapAmb"), bit, "{who}");
        assert_eq!(
            report.caps("CapEff"),
            bit,
            "{who}: effective without being root"
        );
    }
    Ok(())
}

async fn unknown_capabilities_are_refused(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let answer = pod
        .try_create(|c| container_security(c).capabilities = capabilities(&["FLY"], &[]))
        .await;
    refused(answer, Code::InvalidArgument, &["FLY"]);
    let answer = pod
        .try_create(|c| container_security(c).capabilities = capabilities(&[], &["SWIM"]))
        .await;
    refused(answer, Code::InvalidArgument, &["SWIM"]);
    Ok(())
}

async fn capabilities_of_another_user(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let bounding = DEFAULTS & own_bounding()?;
    let change = |c: &mut cri::ContainerConfig| {
        container_security(c).run_as_user = Some(cri::Int64Value { value: 1000 })
    };
    // The kernel clears what execve of a plain program by another user than root leaves.
    expect(&daemon, [0, 0, 0, bounding, 0], change).await
}

async fn no_new_privs_of_init_and_exec(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    for (wanted, profile) in [
        (false, cri::security_profile::ProfileType::RuntimeDefault),
        (true, cri::security_profile::ProfileType::RuntimeDefault),
        (false, cri::security_profile::ProfileType::Unconfined),
        (true, cri::security_profile::ProfileType::Unconfined),
    ] {
        for user in [0, 1000] {
            let reports = pod
                .probes(|c| {
                    let security = container_security(c);
                    security.no_new_privs = wanted;
                    security.run_as_user = Some(cri::Int64Value { value: user });
                    security.seccomp = Some(cri::SecurityProfile {
                        profile_type: profile.into(),
                        ..Default::default()
                    });
                })
                .await?;
            let filtered = if profile == cri::security_profile::ProfileType::RuntimeDefault {
                "2"
            } else {
                "0"
            };
            for (report, who) in reports.iter().zip(["init", "exec"]) {
                let about = format!("{who}, user {user}, no_new_privs {wanted}, {profile:?}");
                assert_eq!(
                    report.get("NoNewPrivs"),
                    if wanted { "1" } else { "0" },
                    "{about}"
                );
                assert_eq!(report.get("Seccomp"), filtered, "{about}");
            }
        }
    }
    Ok(())
}

async fn setuid_programs_and_no_new_privs(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    for (no_new_privs, effective) in [(false, 0), (true, 1000)] {
        let container = pod
            .run(&["sleep", "1000"], |c| {
                let security = container_security(c);
                security.run_as_user = Some(cri::Int64Value { value: 1000 });
                security.no_new_privs = no_new_privs;
            })
            .await?;
        let exec = container
            .exec_output(&["/bin/probe-suid", "status"])
            .await?;
        assert_eq!(
            probe::Report::new(&exec).numbers("ids")[1],
            effective,
            "exec, no_new_privs {no_new_privs}"
        );
        let text = pod
            .output(&["/bin/probe-suid", "status"], |c| {
                let security = container_security(c);
                security.run_as_user = Some(cri::Int64Value { value: 1000 });
                security.no_new_privs = no_new_privs;
            })
            .await?;
        assert_eq!(
            probe::Report::new(&text).numbers("ids")[1],
            effective,
            "init, no_new_privs {no_new_privs}"
        );
    }
    Ok(())
}

async fn masked_and_readonly_paths(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l; \
        echo 1 >/proc/sys/vm/drop_caches && echo WRITTEN; echo h >/proc/sysrq-trigger && echo WRITTEN; \
        umount /proc/sys 2>/dev/null && echo UNMOUNTED; mount -o remount,rw /proc/sys 2>/dev/null && echo REMOUNTED; echo done";
    let container = pod
        .run(&["sh", "-c", &format!("{script}; exec sleep 1000")], |_| {})
        .await?;
    container.says("done").await?;
    assert_eq!(container.stdout()?, "0\n0\ndone\n");
    assert_eq!(
        container.exec(&["sh", "-c", script]).await?.stdout,
        "0\n0\ndone\n"
    );
    // What is asked for is what happens: nothing masked when nothing is listed.
    let text = pod
        .output(
            &[
                "sh",
                "-c",
                "grep -c ' /proc/.* ' /proc/self/mountinfo || true",
            ],
            |c| {
                let security = container_security(c);
                security.masked_paths.clear();
                security.readonly_paths.clear();
            },
        )
        .await?;
    assert_eq!(text, "0\n");
    for bad in ["relative", "/a/../../b"] {
        let answer = pod
            .try_create(|c| container_security(c).masked_paths = vec![bad.into()])
            .await;
        refused(answer, Code::InvalidArgument, &[bad]);
    }
    Ok(())
}

async fn privileged_containers(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|c| pod_security(c).privileged = true).await?;
    let all = own_bounding()?;
    let reports = pod
        .probes(|c| {
            let security = container_security(c);
            security.privileged = true;
            // What the kubelet does not send for a privileged container, but might.
            security.seccomp = Some(cri::SecurityProfile::default());
        })
        .await?;
    for (report, who) in reports.iter().zip(["init", "exec"]) {
        assert_eq!(sets(report), [0, all, all, all, 0], "{who}");
        assert_eq!(
            report.get("Seccomp"),
            "0",
            "{who}: privileged means unconfined"
        );
        assert_eq!(report.get("NoNewPrivs"), "0", "{who}");
    }
    let script = "test -c /dev/kmsg && echo kmsg; grep -q ' /sys sysfs rw' /proc/self/mounts && echo sysfs; \
        mount -t tmpfs none /mnt 2>/dev/null || { mkdir /mnt && mount -t tmpfs none /mnt; }; echo $?; \
        grep -c ' /proc/' /proc/self/mounts";
    let text = pod
        .run(&["sh", "-c", script], |c| {
            container_security(c).privileged = true
        })
        .await?;
    text.exited().await?;
    assert_eq!(text.stdout()?, "kmsg\nsysfs\n0\n0\n", "{}", text.stderr()?);
    Ok(())
}

async fn privileged_needs_a_privileged_pod(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let answer = pod
        .try_create(|c| container_security(c).privileged = true)
        .await;
    let status = answer.expect_err("a privileged container in a pod that is not");
    assert!(
        matches!(
            status.code(),
            Code::InvalidArgument | Code::FailedPrecondition
        ),
        "{status}"
    );
    assert!(status.message().contains("privileged"), "{status}");
    Ok(())
}

async fn the_host_is_not_behind_process_one(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon
        .pod(|c| config::pod_namespaces(c).pid = cri::NamespaceMode::Pod.into())
        .await?;
    let secret = env.root.join("secret-of-the-host");
    std::fs::write(&secret, "secret")?;
    // Process 1 is ours, not the container's: neither its root, nor its directory, nor its files may lead out.
    let script = format!(
        "for way in root cwd fd/0 fd/1 fd/3 fd/4 fd/5 exe map_files; do \
           cat /proc/1/$way{0} 2>/dev/null; ls /proc/1/$way/ 2>/dev/null | grep -E '^(work|home|root|boot|var|usr)$' | sed \"s,^,$way: ,\"; \
         done; tr '\\0' '\\n' </proc/1/environ 2>/dev/null; echo done",
        secret.display()
    );
    // Even with the capabilities that would open such a door.
    let container = pod
        .run(&["sh", "-c", &format!("{script}; exec sleep 1000")], |c| {
            container_security(c).capabilities = capabilities(&["SYS_PTRACE"], &[]);
        })
        .await?;
    container.says("done").await?;
    let text = container.stdout()?;
    assert!(
        !text.contains("secret") && !text.contains(": usr") && !text.contains("SLIPWAY"),
        "{text}"
    );
    let text = container.exec_output(&["sh", "-c", &script]).await?;
    assert!(
        !text.contains("secret") && !text.contains(": usr") && !text.contains("SLIPWAY"),
        "{text}"
    );
    Ok(())
}

async fn the_binary_is_not_writable_from_inside(env: Env) -> Result<()> {
    use sha2::Digest as _;
    let daemon = env.daemon().await?;
    let before = sha2::Sha256::digest(std::fs::read(daemon::BINARY.as_str())?);
    let pod = daemon
        .pod(|c| config::pod_namespaces(c).pid = cri::NamespaceMode::Pod.into())
        .await?;
    // CVE-2019-5736: every process that can be seen, and what an exec session was before its execve.
    let script = "for p in /proc/[0-9]*; do probe writable $p/exe; done; echo done";
    let container = pod
        .run(&["sh", "-c", &format!("{script}; exec sleep 1000")], |c| {
            container_security(c).capabilities = capabilities(&["ALL"], &[]);
        })
        .await?;
    container.says("done").await?;
    let text = container.stdout()? + &container.exec_output(&["sh", "-c", script]).await?;
    let one = text
        .lines()
        .find(|l| l.starts_with("/proc/1/exe "))
        .context("process 1")?;
    assert!(!one.ends_with(" OK"), "{one}");
    // The attack itself: a program whose interpreter is /proc/self/exe.
    let exec = container
        .exec(&[
            "sh",
            "-c",
            "printf '#!/proc/self/exe\\n' >/bin/trap; chmod 755 /bin/trap",
        ])
        .await?;
    assert_eq!(exec.code, 0, "{exec:?}");
    let trapped = container.exec_limited(&["/bin/trap"], 5).await;
    if let Ok(answer) = trapped {
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        assert!(
            !text.to_lowercase().contains("slipway"),
            "our binary was run in the container: {text}"
        );
    }
    assert_eq!(
        sha2::Sha256::digest(std::fs::read(daemon::BINARY.as_str())?),
        before,
        "the binary was changed"
    );
    Ok(())
}

async fn as_confined_as_under_runc(env: Env) -> Result<()> {
    if output("runc", &["--version"]).await.is_err() {
        return skip("runc is not installed");
    }
    let daemon = env.daemon().await?;
    for (user, nnp) in [(0, false), (1000, true)] {
        let reports = daemon
            .pod(|_| {})
            .await?
            .probes(|c| {
                let security = container_security(c);
                security.run_as_user = Some(cri::Int64Value { value: user });
                security.no_new_privs = nnp;
            })
            .await?;
        let theirs = runc(&env, user, nnp).await?;
        for (report, who) in reports.iter().zip(["init", "exec"]) {
            for key in [
                "CapInh",
                "CapPrm",
                "CapEff",
                "CapBnd",
                "CapAmb",
                "NoNewPrivs",
                "Seccomp",
                "Seccomp_filters",
                "Groups",
                "SigBlk",
                "umask",
            ] {
                assert_eq!(
                    report.get(key),
                    theirs.get(key),
                    "{key} of {who}, user {user}"
                );
            }
            assert_eq!(
                report.ignored_signals(),
                theirs.ignored_signals(),
                "{who}, user {user}"
            );
            let files = |r: &probe::Report| {
                r.starting("fd.")
                    .iter()
                    .map(|(k, _)| (*k).to_owned())
                    .collect::<Vec<_>>()
            };
            assert_eq!(files(report), files(&theirs), "descriptors of {who}");
        }
    }
    Ok(())
}

/// What the probe reports under runc, with the specification that a container of ours has.
async fn runc(env: &Env, user: i64, nnp: bool) -> Result<probe::Report> {
    let bundle = env.dir(&format!("runc-{user}"))?;
    let root = env.dir("runc-root")?;
    let rootfs = bundle.join("rootfs");
    for dir in ["bin", "proc", "dev", "etc", "tmp"] {
        std::fs::create_dir_all(rootfs.join(dir))?;
    }
    let cache = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("hack/.cache");
    let probe = daemon::names(&cache)
        .into_iter()
        .find(|n| n.starts_with("probe-"))
        .context("the probe")?;
    std::fs::copy(cache.join(probe), rootfs.join("bin/probe"))?;
    let names: Vec<String> = [
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "NET_RAW",
        "SYS_CHROOT",
        "MKNOD",
        "AUDIT_WRITE",
        "SETFCAP",
    ]
    .map(|n| format!("CAP_{n}"))
    .into();
    let gid = if user == 0 { 0 } else { 1000 };
    let spec = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": user, "gid": gid, "additionalGids": [gid]},
            "args": ["/bin/probe", "status"], "env": ["PATH=/bin"], "cwd": "/", "noNewPrivileges": nnp,
            "capabilities": {"bounding": names, "effective": names, "permitted": names},
        },
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}],
        "linux": {
            "cgroupsPath": format!("{}/runc-{user}", env.cgroup),
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                        "syscalls": [{"names": ["reboot"], "action": "SCMP_ACT_ERRNO"}]},
        },
    });
    std::fs::write(bundle.join("config.json"), spec.to_string())?;
    let (root, dir) = (root.display().to_string(), bundle.display().to_string());
    let name = format!("blackbox-{}-{user}", env.number);
    let text = output("runc", &["--root", &root, "run", "--bundle", &dir, &name]).await?;
    Ok(probe::Report::new(&text))
}
