//! What the system call filter lets a container and an exec session in it do.

use tonic::Code;

use crate::harness::*;

tests![
    runtime_default_refuses_what_it_should,
    conditions_follow_capabilities,
    unconfined_is_unconfined,
    an_unset_profile_is_not_a_surprise,
    localhost_profiles,
    bad_localhost_profiles,
];

/// The probe's attempts, made by a first process and by an exec session.
async fn attempts(
    daemon: &Daemon,
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<[probe::Report; 2]> {
    let pod = daemon.pod(config::own_network).await?;
    let container = pod
        .run(
            &["sh", "-c", "probe syscalls; echo done; exec sleep 1000"],
            |c| {
                // Where there is AppArmor its default profile refuses some of this, too, and with EACCES.
                let unconfined = cri::security_profile::ProfileType::Unconfined;
                container_security(c).apparmor = profile(unconfined, "");
                change(c);
            },
        )
        .await?;
    container.says("done").await?;
    let init = container.stdout()?;
    let exec = container.exec_output(&["/bin/probe", "syscalls"]).await?;
    Ok([probe::Report::new(&init), probe::Report::new(&exec)])
}

fn profile(kind: cri::security_profile::ProfileType, path: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: path.into(),
    })
}

fn add(names: &[&str]) -> Option<cri::Capability> {
    let add_capabilities = names.iter().map(|n| (*n).to_owned()).collect();
    Some(cri::Capability {
        add_capabilities,
        ..Default::default()
    })
}

async fn runtime_default_refuses_what_it_should(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    for (report, who) in attempts(&daemon, |_| {})
        .await?
        .iter()
        .zip(["init", "exec"])
    {
        // S1: a mask that was taken for the value let this one through.
        for refused in [
            "clone.newuser",
            "clone.newns",
            "clone.newnet",
            "clone.newpid",
            "clone.newcgroup",
            "unshare.newuser",
            "unshare.newns",
            "setns",
            "mount",
            "umount",
            "pivot_root",
            "open_tree",
            "fsopen",
            "keyctl",
            "add_key",
            "bpf",
            "perf_event_open",
            "userfaultfd",
            "init_module",
            "delete_module",
            "kexec_load",
            "reboot",
            "settimeofday",
            "swapoff",
            "syslog",
            "quotactl",
            "acct",
            "open_by_handle_at",
            "personality.odd",
            "socket.vsock",
            "sethostname",
        ] {
            assert_eq!(report.get(refused), "EPERM", "{refused} by {who}");
        }
        // glibc falls back to clone only on ENOSYS.
        for absent in ["clone3", "clone3.newuser"] {
            assert_eq!(report.get(absent), "ENOSYS", "{absent} by {who}");
        }
        for allowed in [
            "getpid",
            "clone",
            "personality.get",
            "chroot",
            "mknod",
            "chown",
            "setuid0",
            "socket.packet",
            "socket.inet",
            "ptrace",
        ] {
            assert_eq!(report.get(allowed), "OK", "{allowed} by {who}");
        }
    }
    Ok(())
}

async fn conditions_follow_capabilities(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let change =
        |c: &mut cri::ContainerConfig| container_security(c).capabilities = add(&["SYS_ADMIN"]);
    for (report, who) in attempts(&daemon, change)
        .await?
        .iter()
        .zip(["init", "exec"])
    {
        for allowed in [
            "clone.newuser",
            "clone.newns",
            "clone3",
            "unshare.newns",
            "mount",
            "umount",
        ] {
            assert_eq!(
                report.get(allowed),
                "OK",
                "{allowed} by {who} with CAP_SYS_ADMIN"
            );
        }
        for refused in ["kexec_load", "init_module", "reboot", "keyctl"] {
            assert_eq!(
                report.get(refused),
                "EPERM",
                "{refused} by {who} with CAP_SYS_ADMIN"
            );
        }
    }
    let change = |c: &mut cri::ContainerConfig| {
        container_security(c).capabilities = Some(cri::Capability {
            drop_capabilities: vec!["ALL".into()],
            ..Default::default()
        });
    };
    for (report, who) in attempts(&daemon, change)
        .await?
        .iter()
        .zip(["init", "exec"])
    {
        // chroot is in the table only with its capability.
        assert_eq!(report.get("chroot"), "EPERM", "{who}");
        assert_eq!(report.get("clone.newuser"), "EPERM", "{who}");
    }
    Ok(())
}

async fn unconfined_is_unconfined(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let unconfined = cri::security_profile::ProfileType::Unconfined;
    let change =
        |c: &mut cri::ContainerConfig| container_security(c).seccomp = profile(unconfined, "");
    for (report, who) in attempts(&daemon, change)
        .await?
        .iter()
        .zip(["init", "exec"])
    {
        assert_eq!(report.get("clone3"), "OK", "{who}");
        assert_eq!(report.get("clone.newuser"), "OK", "{who}");
        // What is refused now is refused for the lack of a capability.
        assert_eq!(report.get("mount"), "EPERM", "{who}");
    }
    Ok(())
}

async fn an_unset_profile_is_not_a_surprise(env: Env) -> Result<()> {
    // The CRI: an unset profile means unconfined; containerd and CRI-O differ. Whatever it is, init and
    // exec have the same.
    let daemon = env.daemon().await?;
    let [init, exec] = daemon
        .pod(|_| {})
        .await?
        .probes(|c| container_security(c).seccomp = None)
        .await?;
    assert_eq!(init.get("Seccomp"), exec.get("Seccomp"));
    Ok(())
}

async fn localhost_profiles(env: Env) -> Result<()> {
    let dir = env.dir("profiles")?;
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["chown", "fchownat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 262144, "op": "SCMP_CMP_EQ"}]}]}"#;
    std::fs::write(dir.join("own.json"), text)?;
    let daemon = env
        .daemon_with(|s| s.set("pod.seccomp_dir", &format!("{dir:?}")))
        .await?;
    daemon.pull("test").await?;
    let localhost = cri::security_profile::ProfileType::Localhost;
    for path in [
        dir.join("own.json").display().to_string(),
        "own.json".to_owned(),
    ] {
        let change = |c: &mut cri::ContainerConfig| {
            container_security(c).seccomp = profile(localhost, &path)
        };
        for (report, who) in attempts(&daemon, change)
            .await?
            .iter()
            .zip(["init", "exec"])
        {
            assert_eq!(report.get("chown"), "ENOSYS", "{who}");
            assert_eq!(report.get("personality.odd"), "EPERM", "{who}");
            assert_eq!(report.get("personality.get"), "OK", "{who}");
            assert_eq!(report.get("clone3"), "OK", "{who}");
        }
    }
    Ok(())
}

async fn bad_localhost_profiles(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let localhost = cri::security_profile::ProfileType::Localhost;
    let bad = env.root.join("bad.json");
    std::fs::write(&bad, "no profile")?;
    for (path, code) in [
        ("/no/such/profile.json".to_owned(), None),
        (bad.display().to_string(), Some(Code::InvalidArgument)),
        ("../../etc/passwd".to_owned(), Some(Code::InvalidArgument)),
        (String::new(), Some(Code::InvalidArgument)),
    ] {
        let status = pod
            .try_create(|c| container_security(c).seccomp = profile(localhost, &path))
            .await
            .expect_err(&path);
        let allowed = [
            Code::InvalidArgument,
            Code::NotFound,
            Code::FailedPrecondition,
        ];
        assert!(
            code.map_or(allowed.contains(&status.code()), |c| c == status.code()),
            "{path}: {status:?}"
        );
        assert!(status.message().contains(&path), "{status}");
    }
    Ok(())
}
