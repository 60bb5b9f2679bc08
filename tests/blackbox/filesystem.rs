//! The root file system: its layers, what is writable, /dev, /dev/shm, /proc, /sys.

use crate::harness::*;

tests![
    layers_are_as_they_were_made,
    containers_do_not_share_what_they_write,
    a_read_only_root,
    volumes_of_the_image,
    shared_memory_is_the_pods,
    devices_that_are_always_there,
    system_mounts_are_as_expected,
];

async fn layers_are_as_they_were_made(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("oddities").await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            c.image.as_mut().unwrap().image = image("oddities")
        })
        .await?;
    let sh = async |script: &str| container.exec_output(&["sh", "-c", script]).await;
    assert_eq!(sh("ls /gone").await?, "", "a whiteout");
    assert_eq!(sh("ls -d /gone-dir 2>&1 | grep -c 'No such'").await?, "1");
    assert_eq!(sh("ls /opaque").await?, "above", "an opaque directory");
    assert_eq!(
        sh("cat /replaced /stays /dir-to-file").await?,
        "new\nas it is\nnow a file"
    );
    assert_eq!(
        sh("ls -a / /opaque /gone | grep -c '\\.wh\\.' || true").await?,
        "0"
    );
    assert_eq!(
        sh("stat -c %h /hard/one; test /hard/one -ef /hard/two && echo same").await?,
        "2\nsame"
    );
    assert_eq!(
        sh("stat -c '%a %u:%g' /setuid /owned").await?,
        "6755 0:0\n640 1000:50"
    );
    assert_eq!(
        sh("stat -c '%F %t:%T' /null; stat -c %F /pipe").await?,
        "character special file 1:3\nfifo"
    );
    assert_eq!(
        sh("cat /long/*/*; cat /umlaut-*; readlink /absolute-link").await?,
        "long\nutf-8\n/etc/passwd"
    );
    assert_eq!(sh("stat -c %Y /stays").await?, "0", "the time of change");
    // A file's capability: looked at from the host, in the layer that it is in.
    let layers = output(
        "find",
        &[
            &env.root.join("state").display().to_string(),
            "-name",
            "capable",
            "-type",
            "f",
        ],
    )
    .await?;
    let file = layers
        .lines()
        .next()
        .context("the file with a capability is in no layer")?;
    let mut value = [0u8; 64];
    let length = rustix::fs::getxattr(file, "security.capability", &mut value[..])?;
    assert_eq!(
        &value[..length.min(8)],
        [1, 0, 0, 2, 0, 0x20, 0, 0],
        "cap_net_raw, permitted and effective"
    );
    Ok(())
}

async fn containers_do_not_share_what_they_write(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let one = pod.sleeper().await?;
    let two = pod.sleeper().await?;
    one.exec_output(&[
        "sh",
        "-c",
        "echo changed >/etc/layer; rm /etc/group; mkdir /new",
    ])
    .await?;
    assert_eq!(
        two.exec_output(&[
            "sh",
            "-c",
            "cat /etc/layer; ls /etc/group; ls -d /new 2>/dev/null || true"
        ])
        .await?,
        "plain\n/etc/group"
    );
    let three = pod.sleeper().await?;
    assert_eq!(
        three.exec_output(&["cat", "/etc/layer"]).await?,
        "plain",
        "the image was changed"
    );
    Ok(())
}

async fn a_read_only_root(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let dir = env.dir("volume")?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            container_security(c).readonly_rootfs = true;
            c.mounts = vec![cri::Mount {
                host_path: dir.display().to_string(),
                container_path: "/data".into(),
                ..Default::default()
            }];
        })
        .await?;
    for file in ["/file", "/tmp/file", "/etc/passwd"] {
        let exec = container
            .exec(&["sh", "-c", &format!("echo x >>{file}")])
            .await?;
        assert!(
            exec.code != 0 && exec.stderr.contains("Read-only"),
            "{file}: {exec:?}"
        );
    }
    container
        .exec_output(&["touch", "/data/file", "/dev/shm/file"])
        .await?;
    Ok(())
}

/// What the image calls a volume is there and can be written to, as under containerd, also in a read-only root.
async fn volumes_of_the_image(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    daemon.pull("volumes").await?;
    let pod = daemon.pod(|_| {}).await?;
    let dir = env.dir("volume")?;
    for readonly_rootfs in [false, true] {
        let container = pod
            .run(&["sleep", "1000"], |c| {
                c.image = config::of_image("volumes");
                c.metadata.get_or_insert_default().attempt = u32::from(readonly_rootfs);
                container_security(c).readonly_rootfs = readonly_rootfs;
                c.mounts = vec![cri::Mount {
                    host_path: dir.display().to_string(),
                    container_path: "/data/store/inner".into(),
                    ..Default::default()
                }];
            })
            .await?;
        let script = "set -e; echo 1 >/data/store/x; echo 2 >/cache/x; grep -q ^root /mail/group; echo 3 >>/mail/group; \
                      echo 4 >/data/store/inner/x; cat /data/store/x /cache/x; tail -n1 /etc/group; \
                      test ! -e /proc/made; touch /outside 2>/dev/null && echo open || echo sealed";
        let root = if readonly_rootfs { "sealed" } else { "open" };
        let said = container.exec_output(&["sh", "-c", script]).await?;
        assert_eq!(said, format!("1\n2\n3\n{root}"));
        assert_eq!(std::fs::read_to_string(dir.join("x"))?, "4\n");
    }
    // Nothing of it was in the image.
    let fresh = pod
        .run(&["sleep", "1000"], |c| {
            c.image = config::of_image("volumes");
            c.metadata.get_or_insert_default().attempt = 2;
        })
        .await?;
    assert_eq!(fresh.exec_output(&["ls", "/data/store"]).await?, "");
    Ok(())
}

async fn shared_memory_is_the_pods(env: Env) -> Result<()> {
    let daemon = env
        .daemon_with(|s| s.set("pod.shm_size", "\"32MiB\""))
        .await?;
    daemon.pull("test").await?;
    let pod = daemon.pod(|_| {}).await?;
    let (one, two) = (pod.sleeper().await?, pod.sleeper().await?);
    one.exec_output(&["sh", "-c", "echo shared >/dev/shm/x"])
        .await?;
    assert_eq!(two.exec_output(&["cat", "/dev/shm/x"]).await?, "shared");
    assert_eq!(
        one.exec_output(&["sh", "-c", "df -k /dev/shm | tail -1 | awk '{print $2}'"])
            .await?,
        "32768"
    );
    assert_eq!(
        one.exec_output(&["stat", "-c", "%a", "/dev/shm"]).await?,
        "1777"
    );
    let other = daemon.pod(|_| {}).await?.sleeper().await?;
    assert_ne!(
        other.exec(&["cat", "/dev/shm/x"]).await?.code,
        0,
        "another pod's shared memory"
    );
    let node = daemon
        .pod(|c| config::pod_namespaces(c).ipc = cri::NamespaceMode::Node.into())
        .await?
        .sleeper()
        .await?;
    let mark = format!("/dev/shm/blackbox-{}", env.number);
    std::fs::write(&mark, "node\n")?;
    let seen = node.exec(&["cat", &mark]).await;
    std::fs::remove_file(&mark)?;
    assert_eq!(
        seen?.stdout, "node\n",
        "with the node's IPC comes the node's shared memory"
    );
    Ok(())
}

async fn devices_that_are_always_there(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let text = container
        .exec_output(&[
            "sh",
            "-c",
            "cd /dev; stat -c '%n %t:%T %a' null zero full random urandom tty",
        ])
        .await?;
    let wanted = [
        "null 1:3 666",
        "zero 1:5 666",
        "full 1:7 666",
        "random 1:8 666",
        "urandom 1:9 666",
        "tty 5:0 666",
    ];
    assert_eq!(text.lines().collect::<Vec<_>>(), wanted);
    let text = container.exec_output(&["sh", "-c", "cd /dev; for l in fd stdin stdout stderr ptmx; do readlink $l; done; ls -d pts mqueue shm"]).await?;
    assert_eq!(
        text,
        "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\nmqueue\npts\nshm"
    );
    container
        .exec_output(&[
            "sh",
            "-c",
            "echo x >/dev/null; head -c 4 /dev/urandom | wc -c",
        ])
        .await?;
    Ok(())
}

async fn system_mounts_are_as_expected(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(config::own_network).await?;
    let text = pod.output(&["cat", "/proc/self/mounts"], |_| {}).await?;
    let options = |point: &str| -> Result<Vec<String>> {
        let line = text
            .lines()
            .find(|l| l.split(' ').nth(1) == Some(point))
            .with_context(|| format!("{point} is not mounted: {text}"))?;
        Ok(line
            .split(' ')
            .nth(3)
            .unwrap_or_default()
            .split(',')
            .map(str::to_owned)
            .collect())
    };
    for (point, wanted) in [
        ("/proc", &["rw", "nosuid", "nodev", "noexec"][..]),
        ("/sys", &["ro", "nosuid", "nodev", "noexec"]),
        ("/dev", &["rw", "nosuid"]),
        ("/dev/pts", &["rw", "nosuid", "noexec"]),
        ("/dev/mqueue", &["rw", "nosuid", "nodev", "noexec"]),
        ("/dev/shm", &["rw", "nosuid", "nodev", "noexec"]),
    ] {
        let options = options(point)?;
        assert!(
            wanted.iter().all(|w| options.iter().any(|o| o == w)),
            "{point}: {options:?}"
        );
    }
    assert!(
        text.lines().any(|l| l.contains(" /sys/fs/cgroup")),
        "cgroups are not mounted"
    );
    let write = pod
        .run(&["sh", "-c", "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/escape 2>/dev/null && echo $d; done; echo done"], |_| {})
        .await?;
    write.exited().await?;
    let written = write.stdout()?;
    // Others leave the container's own tmpfs writable that v1's hierarchies are on.
    let written = match handler() != "native" && !stage::unified() {
        true => written.trim_start_matches("/sys/fs/cgroup\n"),
        false => &written,
    };
    assert_eq!(written, "done\n", "cgroups are writable");
    Ok(())
}
