//! Devices: the listed ones and no others.

use tonic::Code;

use crate::harness::*;

tests![
    a_listed_device,
    devices_that_are_not_listed,
    permissions_of_a_device,
    a_directory_of_devices,
    bad_devices_are_refused,
    a_privileged_container_has_all,
    devices_in_a_volume
];

fn device(host: &str, container: &str, permissions: &str) -> cri::Device {
    cri::Device {
        host_path: host.into(),
        container_path: container.into(),
        permissions: permissions.into(),
    }
}

/// A device node of the test's own: another name of one that everybody has. On a file system that has devices.
fn node(env: &Env, name: &str, minor: u64) -> Result<String> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let dir = env.dir("devices")?;
    let path = dir.join(name);
    mknod(
        &path,
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o660),
        makedev(1, minor),
    )
    .context("mknod")?;
    Ok(path.display().to_string())
}

async fn a_listed_device(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    // kmsg: 1:11, which no container has by itself.
    let kmsg = node(&env, "kmsg", 11)?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            c.devices = vec![device(&kmsg, "/dev/the-log", "rwm")]
        })
        .await?;
    assert_eq!(
        container
            .exec_output(&["stat", "-c", "%F %t:%T", "/dev/the-log"])
            .await?,
        "character special file 1:b"
    );
    // 0xb = 11. Opening it for writing is for root, and the cgroup lets it.
    let exec = container
        .exec(&["probe", "writable", "/dev/the-log"])
        .await?;
    assert_eq!(exec.stdout.trim_end(), "/dev/the-log OK");
    Ok(())
}

async fn devices_that_are_not_listed(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    // CAP_MKNOD makes the node; opening it is another matter.
    container
        .exec_output(&["mknod", "/tmp/kmsg", "c", "1", "11"])
        .await?;
    let exec = container.exec(&["probe", "writable", "/tmp/kmsg"]).await?;
    assert_eq!(exec.stdout.trim_end(), "/tmp/kmsg EPERM");
    container
        .exec_output(&["mknod", "/tmp/null", "c", "1", "3"])
        .await?;
    assert_eq!(
        container
            .exec(&["probe", "writable", "/tmp/null"])
            .await?
            .stdout
            .trim_end(),
        "/tmp/null OK"
    );
    Ok(())
}

async fn permissions_of_a_device(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let kmsg = node(&env, "kmsg", 11)?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            c.devices = vec![device(&kmsg, "/dev/the-log", "r")]
        })
        .await?;
    assert_eq!(
        container
            .exec(&["probe", "writable", "/dev/the-log"])
            .await?
            .stdout
            .trim_end(),
        "/dev/the-log EPERM"
    );
    Ok(())
}

async fn a_directory_of_devices(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    node(&env, "one", 3)?;
    node(&env, "two", 5)?;
    let dir = env.dir("devices")?.display().to_string();
    let text = pod
        .output(&["sh", "-c", "cd /dev/many; stat -c '%n %t:%T' *"], |c| {
            c.devices = vec![device(&dir, "/dev/many", "rw")]
        })
        .await?;
    assert_eq!(text, "one 1:3\ntwo 1:5\n");
    Ok(())
}

async fn bad_devices_are_refused(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    for (bad, names) in [
        (
            device("/dev/no-such-device", "/dev/x", "rwm"),
            "/dev/no-such-device",
        ),
        (device("/dev/null", "/dev/x", "rwx"), "rwx"),
        (device("/etc/passwd", "/dev/x", "r"), "/etc/passwd"),
        (device("/dev/null", "relative", "r"), "relative"),
        (device("/dev/null", "/dev/../../x", "r"), "/dev/../../x"),
    ] {
        let status = pod
            .try_create(|c| c.devices = vec![bad.clone()])
            .await
            .expect_err(names);
        assert!(
            matches!(
                status.code(),
                Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition
            ),
            "{status}"
        );
        assert!(status.message().contains(names), "{status}");
    }
    Ok(())
}

async fn a_privileged_container_has_all(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|c| pod_security(c).privileged = true).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            container_security(c).privileged = true
        })
        .await?;
    let exec = container
        .exec_output(&[
            "sh",
            "-c",
            "mknod /tmp/kmsg c 1 11; probe writable /tmp/kmsg /dev/kmsg",
        ])
        .await?;
    assert_eq!(exec, "/tmp/kmsg OK\n/dev/kmsg OK");
    Ok(())
}

/// Device plugins mount directories of the host's /dev; the nodes in there are not made once more.
async fn devices_in_a_volume(env: Env) -> Result<()> {
    let found = output(
        "find",
        &[
            "/dev",
            "-mindepth",
            "2",
            "-type",
            "c",
            "-not",
            "-path",
            "/dev/pts/*",
        ],
    )
    .await?;
    let Some(node) = found.lines().next() else {
        return skip("the host has no device in a directory below /dev");
    };
    let dir = std::path::Path::new(node).parent().context("a directory")?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|c| pod_security(c).privileged = true).await?;
    let text = pod
        .output(&["ls", node], |c| {
            container_security(c).privileged = true;
            c.mounts = vec![cri::Mount {
                host_path: dir.display().to_string(),
                container_path: dir.display().to_string(),
                ..Default::default()
            }];
        })
        .await?;
    assert_eq!(text.trim(), node);
    Ok(())
}
