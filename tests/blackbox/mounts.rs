//! Bind mounts: read-only, recursively, propagation, sources that are not plain.

use std::path::Path;

use nix::mount::MsFlags;
use tonic::Code;

use crate::harness::*;

tests![
    files_and_directories,
    read_only,
    read_only_with_submounts,
    recursive_read_only_needs_its_conditions,
    private_propagation,
    host_to_container_propagation,
    bidirectional_propagation,
    the_hosts_cgroups,
    bidirectional_needs_a_shared_source,
    a_symlink_as_source,
    a_missing_source,
    a_missing_source_that_is_made,
    destinations_do_not_leave_the_root,
    later_mounts_lie_on_earlier_ones,
    bad_paths_are_refused,
    a_mount_over_dev,
    the_hosts_cgroups_in_a_volume,
    links_that_lead_nowhere,
    an_image_whose_dev_is_a_link,
    a_working_directory_in_a_volume,
];

fn bind(host: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        ..Default::default()
    }
}

async fn files_and_directories(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let dir = env.dir("volume")?;
    std::fs::write(dir.join("file"), "from the host\n")?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "cat /data/sub/file /single/file.txt && echo written >/data/sub/new";
    let mounts = vec![
        bind(&dir, "/data/sub"),
        bind(&dir.join("file"), "/single/file.txt"),
    ];
    assert_eq!(
        pod.output(&["sh", "-c", script], |c| c.mounts = mounts)
            .await?,
        "from the host\nfrom the host\n"
    );
    assert_eq!(read(dir.join("new"))?, "written");
    Ok(())
}

async fn read_only(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let dir = env.dir("volume")?;
    let mount = cri::Mount {
        readonly: true,
        ..bind(&dir, "/data")
    };
    let container = daemon
        .pod(|_| {})
        .await?
        .run(&["sleep", "1000"], |c| c.mounts = vec![mount])
        .await?;
    let exec = container.exec(&["touch", "/data/file"]).await?;
    assert!(
        exec.code != 0 && exec.stderr.contains("Read-only"),
        "{exec:?}"
    );
    assert_eq!(daemon::names(&dir), Vec::<String>::new());
    Ok(())
}

async fn read_only_with_submounts(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let dir = env.dir("volume")?;
    let below = Tmpfs::new(dir.join("below"), MsFlags::MS_PRIVATE)?;
    let pod = daemon.pod(|_| {}).await?;
    let plain = cri::Mount {
        readonly: true,
        ..bind(&dir, "/data")
    };
    let container = pod
        .run(&["sleep", "1000"], |c| c.mounts = vec![plain.clone()])
        .await?;
    // In gVisor, what is mounted below a source is a part of it.
    let touched = container.exec(&["touch", "/data/below/plain"]).await?.code;
    assert_eq!(touched == 0, !gvisor(), "readonly is not recursive");
    assert_ne!(container.exec(&["touch", "/data/plain"]).await?.code, 0);
    let recursive = cri::Mount {
        recursive_read_only: true,
        ..plain
    };
    let container = pod
        .run(&["sleep", "1000"], |c| c.mounts = vec![recursive])
        .await?;
    for file in ["/data/rro", "/data/below/rro"] {
        let exec = container.exec(&["touch", file]).await?;
        assert!(
            exec.code != 0 && exec.stderr.contains("Read-only"),
            "{file}: {exec:?}"
        );
    }
    assert!(
        container
            .status()
            .await?
            .mounts
            .iter()
            .any(|m| m.recursive_read_only)
    );
    let status = daemon
        .runtime()
        .status(cri::StatusRequest::default())
        .await?
        .into_inner();
    assert!(
        status
            .runtime_handlers
            .iter()
            .all(|h| h.features.is_some_and(|f| f.recursive_read_only_mounts))
    );
    drop(below);
    Ok(())
}

async fn recursive_read_only_needs_its_conditions(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let dir = env.dir("volume")?;
    let pod = daemon.pod(|_| {}).await?;
    let writable = cri::Mount {
        recursive_read_only: true,
        ..bind(&dir, "/data")
    };
    refused(
        pod.try_create(|c| c.mounts = vec![writable.clone()]).await,
        Code::InvalidArgument,
        &["mounts[0]"],
    );
    let slave = cri::Mount {
        readonly: true,
        propagation: cri::MountPropagation::PropagationHostToContainer.into(),
        ..writable
    };
    refused(
        pod.try_create(|c| c.mounts = vec![slave]).await,
        Code::InvalidArgument,
        &["mounts[0]"],
    );
    Ok(())
}

/// Mounts on one side and looks on the other: (host's seen by the container, container's seen by the host).
async fn propagates(env: &Env, propagation: cri::MountPropagation) -> Result<(bool, bool)> {
    let daemon = env.daemon().await?;
    let shared = Tmpfs::new(env.root.join("shared"), MsFlags::MS_SHARED)?;
    for name in ["from-host", "from-container", "before"] {
        std::fs::create_dir(shared.0.join(name))?;
    }
    let before = Tmpfs::new(shared.0.join("before"), MsFlags::MS_SHARED)?;
    std::fs::write(before.0.join("seen"), "")?;
    let pod = daemon.pod(|c| pod_security(c).privileged = true).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            container_security(c).privileged = true;
            c.mounts = vec![cri::Mount {
                propagation: propagation.into(),
                ..bind(&shared.0, "/data")
            }];
        })
        .await?;
    // What was mounted before is there in any case.
    container.exec_output(&["ls", "/data/before/seen"]).await?;
    let host = Tmpfs::new(shared.0.join("from-host"), MsFlags::MS_SHARED)?;
    std::fs::write(host.0.join("seen"), "")?;
    let in_container = container.exec(&["ls", "/data/from-host/seen"]).await?.code == 0;
    container
        .exec_output(&["mount", "-t", "tmpfs", "none", "/data/from-container"])
        .await?;
    container
        .exec_output(&["touch", "/data/from-container/seen"])
        .await?;
    let on_host = shared.0.join("from-container/seen").exists();
    container
        .exec_output(&["umount", "/data/from-container"])
        .await?;
    pod.stop().await?;
    pod.remove().await?;
    drop((host, before, shared));
    Ok((in_container, on_host))
}

async fn private_propagation(env: Env) -> Result<()> {
    assert_eq!(
        propagates(&env, cri::MountPropagation::PropagationPrivate).await?,
        (false, false)
    );
    Ok(())
}

async fn host_to_container_propagation(env: Env) -> Result<()> {
    assert_eq!(
        propagates(&env, cri::MountPropagation::PropagationHostToContainer).await?,
        (true, false)
    );
    Ok(())
}

async fn bidirectional_propagation(env: Env) -> Result<()> {
    not_in_gvisor("it shares no mounts with the host")?;
    let host = || -> Vec<String> {
        let mounts = leaks::mounts(std::path::Path::new("/"));
        mounts
            .into_iter()
            .filter(|m| !m.starts_with("/run/"))
            .collect()
    };
    let before = host();
    assert_eq!(
        propagates(&env, cri::MountPropagation::PropagationBidirectional).await?,
        (true, true)
    );
    // While a container is made its mounts are shared with the host's; what is done to them then must not be.
    assert_eq!(host(), before, "the host's own mounts");
    Ok(())
}

/// What agents that watch a node mount: they must find its cgroups there, not the container's own.
async fn the_hosts_cgroups(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let top = std::path::Path::new("/sys/fs/cgroup");
    let hierarchy = daemon::names(top).into_iter().find(|n| n == "unified");
    let below = hierarchy.map_or_else(String::new, |h| format!("/{h}"));
    for (source, seen) in [("/sys", "/host/fs/cgroup"), ("/sys/fs/cgroup", "/host")] {
        let container = pod
            .run(&["sleep", "1000"], |c| {
                c.mounts = vec![cri::Mount {
                    readonly: true,
                    ..bind(std::path::Path::new(source), "/host")
                }];
            })
            .await?;
        let name = match env.driver {
            Driver::Cgroupfs => container.id.clone(),
            Driver::Systemd => format!("slipway-{}.scope", container.id),
        };
        let own = format!("{seen}{below}{}/{name}", env.cgroup);
        container
            .exec_output(&["ls", &format!("{own}/cgroup.procs")])
            .await?;
        // And its own view is what it is without that.
        container.exec_output(&["ls", "/sys/fs/cgroup"]).await?;
    }
    Ok(())
}

async fn bidirectional_needs_a_shared_source(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let private = Tmpfs::new(env.root.join("private"), MsFlags::MS_PRIVATE)?;
    let pod = daemon.pod(|c| pod_security(c).privileged = true).await?;
    let answer = pod
        .try_create(|c| {
            container_security(c).privileged = true;
            c.mounts = vec![cri::Mount {
                propagation: cri::MountPropagation::PropagationBidirectional.into(),
                ..bind(&private.0, "/data")
            }];
        })
        .await;
    let status = answer.expect_err("a bidirectional mount of what is private");
    assert!(
        matches!(
            status.code(),
            Code::InvalidArgument | Code::FailedPrecondition
        ),
        "{status}"
    );
    assert!(
        status.message().contains(&private.0.display().to_string()),
        "{status}"
    );
    Ok(())
}

async fn a_symlink_as_source(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let dir = env.dir("real/deep")?;
    std::fs::write(dir.join("file"), "there\n")?;
    let link = env.root.join("link");
    std::os::unix::fs::symlink(&dir, &link)?;
    let pod = daemon.pod(|_| {}).await?;
    let text = pod
        .output(&["cat", "/data/file"], |c| {
            c.mounts = vec![bind(&link, "/data")]
        })
        .await?;
    assert_eq!(text, "there\n");
    Ok(())
}

async fn a_missing_source(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let missing = env.root.join("not/there");
    let answer = pod
        .try_create(|c| c.mounts = vec![bind(&missing, "/data")])
        .await;
    let status = answer.expect_err("a missing source");
    assert!(
        matches!(
            status.code(),
            Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition
        ),
        "{status}"
    );
    assert!(
        status.message().contains(&missing.display().to_string()),
        "{status}"
    );
    assert!(!missing.exists());
    assert_eq!(
        daemon::names(&env.root.join("state/containers")),
        Vec::<String>::new()
    );
    Ok(())
}

async fn a_missing_source_that_is_made(env: Env) -> Result<()> {
    let daemon = env
        .daemon_with(|s| s.set("pod.missing_mount_source", "\"create\""))
        .await?;
    daemon.pull("test").await?;
    let pod = daemon.pod(|_| {}).await?;
    let missing = env.root.join("not/there");
    pod.output(&["touch", "/data/file"], |c| {
        c.mounts = vec![bind(&missing, "/data")]
    })
    .await?;
    assert!(missing.join("file").exists());
    Ok(())
}

async fn destinations_do_not_leave_the_root(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    daemon.pull("oddities").await?;
    let pod = daemon.pod(|_| {}).await?;
    let dir = env.dir("volume")?;
    std::fs::write(dir.join("file"), "volume\n")?;
    // A link in the image that points to an absolute path: inside the image, that is.
    let passwd = read("/etc/passwd")?;
    let container = pod
        .run(
            &[
                "sh",
                "-c",
                "cat /absolute-link/file /etc/passwd/file 2>&1; exec sleep 1000",
            ],
            |c| {
                c.image.as_mut().unwrap().image = image("oddities");
                c.mounts = vec![bind(&dir.join("file"), "/absolute-link")];
            },
        )
        .await?;
    assert_eq!(
        container.exec_output(&["cat", "/etc/passwd"]).await?,
        "volume"
    );
    assert_eq!(read("/etc/passwd")?, passwd);
    let answer = pod
        .try_create(|c| c.mounts = vec![bind(&dir, "/a/../../../out")])
        .await;
    refused(answer, Code::InvalidArgument, &["/a/../../../out"]);
    Ok(())
}

async fn later_mounts_lie_on_earlier_ones(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let (outer, inner) = (env.dir("outer")?, env.dir("inner")?);
    std::fs::create_dir(outer.join("in"))?;
    std::fs::write(inner.join("file"), "inner\n")?;
    let pod = daemon.pod(|_| {}).await?;
    // Whichever order they are listed in.
    for mounts in [
        vec![bind(&outer, "/a"), bind(&inner, "/a/in")],
        vec![bind(&inner, "/a/in"), bind(&outer, "/a")],
    ] {
        assert_eq!(
            pod.output(&["cat", "/a/in/file"], |c| c.mounts = mounts)
                .await?,
            "inner\n"
        );
    }
    Ok(())
}

async fn bad_paths_are_refused(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let dir = env.dir("volume")?;
    for (host, container) in [
        (dir.display().to_string(), ""),
        (String::new(), "/data"),
        ("relative".to_owned(), "/data"),
        (format!("{}/../../etc", dir.display()), "/data\n/x"),
    ] {
        let mount = cri::Mount {
            host_path: host.clone(),
            container_path: container.into(),
            ..Default::default()
        };
        let answer = pod.try_create(|c| c.mounts = vec![mount]).await;
        assert_eq!(
            answer.expect_err(&host).code(),
            Code::InvalidArgument,
            "{host:?} at {container:?}"
        );
    }
    let mapped = cri::Mount {
        uid_mappings: vec![cri::IdMapping {
            host_id: 1,
            container_id: 0,
            length: 1,
        }],
        ..bind(&dir, "/data")
    };
    let status = pod
        .try_create(|c| c.mounts = vec![mapped])
        .await
        .expect_err("an idmapped mount");
    assert!(
        matches!(
            status.code(),
            Code::Unimplemented | Code::InvalidArgument | Code::FailedPrecondition
        ),
        "{status}"
    );
    // One that hangs would be a test of its own; at least nothing waits here.
    tokio::time::timeout(seconds(5), pod.status()).await??;
    Ok(())
}

/// What CSI drivers and device plugins do with the host's; with another, so that the host's stays as it is.
async fn a_mount_over_dev(env: Env) -> Result<()> {
    native_only("it wants the usual devices in what is mounted there")?;
    let daemon = env.daemon().await?;
    let dir = env.dir("dev")?;
    std::fs::write(dir.join("mine"), "my own\n")?;
    let log = env.root.join("termination-log");
    std::fs::write(&log, "")?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "cat /dev/mine; ls /dev | tr '\\n' ' '; echo; ls -d /dev/pts/ptmx; \
                  mount | grep -q ' on /dev/shm ' && echo shm; echo ended >/dev/termination-log";
    let mounts = vec![bind(&dir, "/dev"), bind(&log, "/dev/termination-log")];
    let text = pod
        .output(&["sh", "-c", script], |c| c.mounts = mounts)
        .await?;
    let expected = "my own\nmine mqueue pts shm termination-log \n/dev/pts/ptmx\nshm\n";
    assert_eq!(text, expected);
    assert_eq!(read(&log)?, "ended");
    // Nothing was made there but what the mounts needed.
    for made in ["null", "fd", "ptmx", "console"] {
        assert!(!dir.join(made).exists(), "{made}");
    }
    // Read-only.
    let mounts = vec![cri::Mount {
        readonly: true,
        ..bind(&dir, "/dev")
    }];
    let container = pod
        .run(
            &["sh", "-c", "tty; touch /dev/x 2>/dev/null || echo refused"],
            |c| {
                c.mounts = mounts;
            },
        )
        .await?;
    assert!(container.exited().await?.exit_code == 0);
    assert!(container.stdout()?.contains("refused"));
    Ok(())
}

async fn the_hosts_cgroups_in_a_volume(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let host = std::fs::read_dir("/sys/fs/cgroup")?.count();
    for (source, place, seen) in [
        ("/sys/fs/cgroup", "/host/cgroup", "/host/cgroup"),
        ("/sys", "/host/sys", "/host/sys/fs/cgroup"),
        ("/sys", "/sys", "/sys/fs/cgroup"),
        ("/", "/host", "/host/sys/fs/cgroup"),
    ] {
        let mount = bind(Path::new(source), place);
        let text = pod
            .output(&["sh", "-c", &format!("ls -A {seen} | wc -l")], |c| {
                c.mounts = vec![mount];
            })
            .await
            .with_context(|| format!("{source} on {place}"))?;
        let count: usize = text.trim().parse()?;
        assert!(
            count >= host.min(5),
            "{source} on {place}: {count} of {host}"
        );
    }
    Ok(())
}

async fn links_that_lead_nowhere(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("links-to-nothing").await?;
    let dir = env.dir("volume")?;
    std::fs::write(dir.join("file"), "there\n")?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "cat /data/file /missing/data/file; test -s /etc/resolv.conf && echo resolves";
    let text = pod
        .output(&["sh", "-c", script], |c| {
            c.image = config::of_image("links-to-nothing");
            c.mounts = vec![bind(&dir, "/data")];
        })
        .await?;
    assert_eq!(text, "there\nthere\nresolves\n");
    Ok(())
}

/// libcontainer would make links and nodes in what it points to: on the host.
async fn an_image_whose_dev_is_a_link(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let names = || -> Result<Vec<_>> {
        let entries = std::fs::read_dir("/tmp")?.flatten();
        let made = ["fd", "stdin", "stdout", "stderr", "ptmx", "null", "kcore"];
        Ok(entries
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|name| made.contains(&name.as_str()))
            .collect())
    };
    let before = names()?;
    for (name, place) in [
        ("bad-dev", "/dev"),
        ("bad-proc", "/proc"),
        ("bad-sys", "/sys"),
    ] {
        daemon.pull(name).await?;
        let status = pod
            .create(&["true"], |c| c.image = config::of_image(name))
            .await
            .map(|c| c.id)
            .expect_err("a root that leads astray");
        let text = format!("{status:#}");
        assert!(
            text.contains(place) && text.contains("symbolic link"),
            "{text}"
        );
    }
    assert_eq!(names()?, before);
    Ok(())
}

async fn a_working_directory_in_a_volume(env: Env) -> Result<()> {
    if youki() {
        return skip("youki makes no working directory, and what is mounted over ours hides it");
    }
    let daemon = env.daemon().await?;
    let dir = env.dir("volume")?;
    let pod = daemon.pod(|_| {}).await?;
    let text = pod
        .output(&["pwd"], |c| {
            c.mounts = vec![bind(&dir, "/workspace")];
            c.working_dir = "/workspace/src/deep".into();
        })
        .await?;
    assert_eq!(text, "/workspace/src/deep\n");
    assert!(dir.join("src/deep").is_dir());
    Ok(())
}
