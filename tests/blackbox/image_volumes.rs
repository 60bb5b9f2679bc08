//! Images as volumes (KEP-4639).

use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::*;

tests![
    the_files_of_an_image,
    a_directory_of_an_image,
    bad_image_volumes_are_refused,
    an_image_that_is_a_volume_stays,
    image_volumes_outlive_the_daemon,
];

fn volume(name: &str) -> cri::Mount {
    cri::Mount {
        container_path: "/volume".into(),
        readonly: true,
        image: config::of_image(name),
        ..Default::default()
    }
}

async fn remove(daemon: &Daemon, name: &str) -> Result<(), tonic::Status> {
    let request = cri::RemoveImageRequest {
        image: config::of_image(name),
    };
    daemon.images().remove_image(request).await.map(drop)
}

async fn the_files_of_an_image(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let id = daemon.pull("schema2").await?;
    let pod = daemon.pod(|_| {}).await?;
    for readonly_rootfs in [false, true] {
        let container = pod
            .run(&["sleep", "1000"], |c| {
                c.metadata.get_or_insert_default().attempt = u32::from(readonly_rootfs);
                container_security(c).readonly_rootfs = readonly_rootfs;
                let by_id = cri::Mount {
                    container_path: "/again".into(),
                    image: Some(cri::ImageSpec {
                        image: id.clone(),
                        ..Default::default()
                    }),
                    ..volume("schema2")
                };
                c.mounts = vec![volume("schema2"), by_id];
            })
            .await;
        // A read-only root has no place for a mount that the image does not know.
        let container = container?;
        for place in ["/volume", "/again"] {
            let file = format!("{place}/etc/probe-image");
            assert_eq!(
                container.exec_output(&["cat", &file]).await?,
                "This is a test image."
            );
            let touched = container.exec(&["touch", &format!("{place}/x")]).await?;
            assert!(
                touched.stderr.contains("Read-only file system"),
                "{touched:?}"
            );
            // Not noexec.
            let probe = format!("{place}/bin/probe");
            assert_eq!(container.exec(&[&probe, "exit", "5"]).await?.code, 5);
        }
        let status = container.status().await?;
        for mount in &status.mounts {
            let image = mount.image.clone().unwrap_or_default();
            assert_eq!(image.image_ref, id, "{mount:?}");
        }
        assert_eq!(status.mounts.len(), 2);
        container.remove().await?;
    }
    assert!(
        leaks::mounts(&env.root.join("r"))
            .iter()
            .all(|m| !m.contains("/images/"))
    );
    Ok(())
}

async fn a_directory_of_an_image(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let of = |sub_path: &str| cri::Mount {
        image_sub_path: sub_path.into(),
        ..volume("test")
    };
    let text = pod
        .output(&["cat", "/volume/probe-image"], |c| {
            c.mounts = vec![of("etc")]
        })
        .await?;
    assert_eq!(text, "This is a test image.\n");
    for (sub_path, reason) in [
        ("no/such", "does not exist in image"),
        ("etc/passwd", "is not a directory in image"),
    ] {
        let made = pod.try_create(|c| c.mounts = vec![of(sub_path)]).await;
        let names = ["image_sub_path", sub_path, "/volume", reason];
        refused(made, Code::InvalidArgument, &names);
    }
    Ok(())
}

async fn bad_image_volumes_are_refused(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let attempt = async |change: fn(&mut cri::Mount)| {
        let mut mount = volume("test");
        change(&mut mount);
        pod.try_create(|c| c.mounts = vec![mount]).await
    };
    refused(
        attempt(|m| m.readonly = false).await,
        Code::InvalidArgument,
        &["readonly"],
    );
    let made = attempt(|m| m.image_sub_path = "../etc".into()).await;
    refused(made, Code::InvalidArgument, &["image_sub_path", ".."]);
    let made = attempt(|m| m.host_path = "/etc".into()).await;
    refused(made, Code::InvalidArgument, &["host_path"]);
    let made = attempt(|m| m.image = config::of_image("never-pulled")).await;
    refused(made, Code::NotFound, &["never-pulled"]);
    Ok(())
}

async fn an_image_that_is_a_volume_stays(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    daemon.pull("schema2").await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| c.mounts = vec![volume("schema2")])
        .await?;
    refused(
        remove(&daemon, "schema2").await,
        Code::FailedPrecondition,
        &[],
    );
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    refused(
        remove(&daemon, "schema2").await,
        Code::FailedPrecondition,
        &[],
    );
    assert_eq!(
        container
            .exec_output(&["cat", "/volume/etc/probe-image"])
            .await?,
        "This is a test image."
    );
    container.remove().await?;
    remove(&daemon, "schema2").await?;
    Ok(())
}

async fn image_volumes_outlive_the_daemon(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let created = pod
        .create(&["cat", "/volume/etc/probe-image"], |c| {
            c.mounts = vec![volume("test")]
        })
        .await?;
    let before = created.status().await?;
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    assert_eq!(created.status().await?, before);
    created.start().await?;
    assert_eq!(created.exited().await?.exit_code, 0);
    assert_eq!(created.stdout()?, "This is a test image.\n");
    Ok(())
}
