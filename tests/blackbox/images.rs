//! Images from a real registry (Debian's docker-registry), and from files.

use std::path::PathBuf;

use tonic::Code;

use crate::harness::*;

tests![
    by_tag_by_digest_and_without,
    schema_two,
    an_index_is_resolved_for_this_platform,
    no_image_for_this_platform,
    lists_and_status,
    users_of_images,
    one_id_everywhere,
    a_registry_that_wants_a_login,
    wrong_credentials,
    bad_references,
    an_unreachable_registry,
    what_the_registry_does_not_have,
    removed_by_every_name,
    an_image_in_use,
    pulled_by_many_at_once,
    the_file_systems_are_told,
    import_of_an_archive_and_a_layout,
    imports_of_rubbish,
    images_outlive_the_daemon,
    pinned_images_are_told,
];

fn spec(name: &str) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec {
        image: name.into(),
        ..Default::default()
    })
}

async fn pull(
    daemon: &Daemon,
    name: &str,
    auth: Option<cri::AuthConfig>,
) -> Result<String, tonic::Status> {
    let request = cri::PullImageRequest {
        image: spec(name),
        auth,
        ..Default::default()
    };
    Ok(daemon
        .images()
        .pull_image(request)
        .await?
        .into_inner()
        .image_ref)
}

async fn status(daemon: &Daemon, name: &str) -> Result<Option<cri::Image>> {
    let request = cri::ImageStatusRequest {
        image: spec(name),
        verbose: false,
    };
    Ok(daemon
        .images()
        .image_status(request)
        .await?
        .into_inner()
        .image)
}

async fn list(daemon: &Daemon) -> Result<Vec<cri::Image>> {
    Ok(daemon
        .images()
        .list_images(cri::ListImagesRequest::default())
        .await?
        .into_inner()
        .images)
}

async fn by_tag_by_digest_and_without(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let id = pull(&daemon, &image("test"), None).await?;
    let seen = list(&daemon).await?;
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].repo_tags, [image("test")]);
    let by_digest = seen[0].repo_digests[0].clone();
    assert!(
        by_digest.starts_with(&format!("{REGISTRY}/slipway/test@sha256:")),
        "{by_digest}"
    );
    assert_eq!(pull(&daemon, &by_digest, None).await?, id);
    assert_eq!(
        pull(&daemon, &image("test").replace(":latest", ""), None).await?,
        id
    );
    let both = image("test") + by_digest.split_once("test").unwrap().1;
    assert_eq!(pull(&daemon, &both, None).await?, id, "{both}");
    assert_eq!(list(&daemon).await?.len(), 1);
    // By digest alone into an empty store: no tag.
    let request = cri::RemoveImageRequest { image: spec(&id) };
    daemon.images().remove_image(request).await?;
    pull(&daemon, &by_digest, None).await?;
    let seen = list(&daemon).await?;
    assert_eq!(
        (seen[0].repo_tags.len(), seen[0].repo_digests.as_slice()),
        (0, &[by_digest][..])
    );
    Ok(())
}

async fn runs(daemon: &Daemon, name: &str) -> Result<()> {
    daemon.pull(name).await?;
    let pod = daemon.pod(|_| {}).await?;
    let text = pod
        .output(&["cat", "/etc/probe-image"], |c| {
            c.image = spec(&image(name))
        })
        .await?;
    assert_eq!(text, "This is a test image.\n");
    Ok(())
}

async fn schema_two(env: Env) -> Result<()> {
    runs(&env.bare_daemon().await?, "schema2").await
}

async fn an_index_is_resolved_for_this_platform(env: Env) -> Result<()> {
    runs(&env.bare_daemon().await?, "multi").await
}

async fn no_image_for_this_platform(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let status = pull(&daemon, &image("foreign"), None)
        .await
        .expect_err("an image for another platform");
    assert!(
        matches!(
            status.code(),
            Code::NotFound | Code::FailedPrecondition | Code::InvalidArgument
        ),
        "{status}"
    );
    assert!(status.message().contains("linux/"), "{status}");
    assert_eq!(list(&daemon).await?, []);
    Ok(())
}

async fn lists_and_status(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    assert_eq!(list(&daemon).await?, []);
    let id = daemon.pull("test").await?;
    daemon.pull("scratch").await?;
    assert_eq!(list(&daemon).await?.len(), 2);
    let request = cri::ListImagesRequest {
        filter: Some(cri::ImageFilter {
            image: spec(&image("test")),
        }),
    };
    let found = daemon
        .images()
        .list_images(request)
        .await?
        .into_inner()
        .images;
    assert_eq!(
        found.iter().map(|i| i.id.as_str()).collect::<Vec<_>>(),
        [id.as_str()]
    );
    assert_eq!(status(&daemon, &image("nothing")).await?, None);
    let seen = status(&daemon, &image("test"))
        .await?
        .context("the image")?;
    assert!(seen.size > 500_000, "size {}", seen.size);
    let request = cri::ImageStatusRequest {
        image: spec(&image("test")),
        verbose: true,
    };
    let info = daemon
        .images()
        .image_status(request)
        .await?
        .into_inner()
        .info;
    assert!(
        info.values().any(|v| v.contains("FROM_IMAGE=yes")),
        "{info:?}"
    );
    let mut stream = daemon
        .images()
        .stream_images(cri::StreamImagesRequest::default())
        .await;
    if let Ok(stream) = &mut stream {
        let mut count = 0;
        while let Some(batch) = stream.get_mut().message().await? {
            count += batch.images.len();
        }
        assert_eq!(count, 2);
    }
    Ok(())
}

async fn users_of_images(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    for (name, uid, username) in [
        ("user-name", None, "app"),
        ("user-id", Some(1234), ""),
        ("user-group", None, "app"),
        ("test", Some(0), ""),
    ] {
        daemon.pull(name).await?;
        let seen = status(&daemon, &image(name)).await?.context("the image")?;
        // An image without USER runs as root; the peers leave both empty or say 0.
        let told = seen.uid.map(|u| u.value);
        assert!(
            told == uid || (name == "test" && told.is_none()),
            "{name}: {told:?}"
        );
        assert_eq!(seen.username, username, "{name}");
    }
    Ok(())
}

async fn one_id_everywhere(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let answered = daemon.pull("test").await?;
    let listed = list(&daemon).await?.remove(0).id;
    let told = status(&daemon, &image("test"))
        .await?
        .context("the image")?
        .id;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.create(&["true"], |_| {}).await?;
    let of_container = container.status().await?.image_id;
    let all = daemon
        .runtime()
        .list_containers(cri::ListContainersRequest::default())
        .await?
        .into_inner()
        .containers;
    assert_eq!(
        [&answered, &listed, &told, &of_container, &all[0].image_id],
        [&listed; 5]
    );
    assert!(listed.starts_with("sha256:"), "{listed}");
    Ok(())
}

fn login(user: &str, password: &str) -> cri::AuthConfig {
    cri::AuthConfig {
        username: user.into(),
        password: password.into(),
        ..Default::default()
    }
}

async fn a_registry_that_wants_a_login(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let name = format!("{LOGIN_REGISTRY}/slipway/test:latest");
    pull(&daemon, &name, Some(login("slipway", "letmein"))).await?;
    let request = cri::RemoveImageRequest { image: spec(&name) };
    daemon.images().remove_image(request).await?;
    // "slipway:letmein" in base64.
    let encoded = cri::AuthConfig {
        auth: "c2xpcHdheTpsZXRtZWlu".into(),
        ..Default::default()
    };
    pull(&daemon, &name, Some(encoded)).await?;
    let log = std::fs::read_to_string(daemon.log_file())?;
    assert!(
        !log.contains("letmein") && !log.contains("c2xpcHdheTpsZXRtZWlu"),
        "a secret is in the daemon's log"
    );
    Ok(())
}

async fn wrong_credentials(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let name = format!("{LOGIN_REGISTRY}/slipway/test:latest");
    for auth in [
        None,
        Some(login("slipway", "hunter2-is-wrong")),
        Some(login("nobody", "letmein")),
    ] {
        let status = pull(&daemon, &name, auth)
            .await
            .expect_err("no or wrong credentials");
        assert!(
            matches!(
                status.code(),
                Code::Unauthenticated | Code::PermissionDenied
            ),
            "{status:?}"
        );
        assert!(status.message().contains(LOGIN_REGISTRY), "{status}");
        assert!(
            !status.message().contains("hunter2") && !status.message().contains("letmein"),
            "{status}"
        );
    }
    let odd = cri::AuthConfig {
        auth: "not base64 !!".into(),
        ..Default::default()
    };
    let status = pull(&daemon, &name, Some(odd))
        .await
        .expect_err("odd credentials");
    assert!(!status.message().contains("not base64 !!"), "{status}");
    let log = std::fs::read_to_string(daemon.log_file())?;
    assert!(
        !log.contains("hunter2") && !log.contains("not base64 !!"),
        "a secret is in the daemon's log"
    );
    assert_eq!(list(&daemon).await?, []);
    Ok(())
}

async fn bad_references(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    for bad in [
        "",
        " ",
        "example.test/UPPER",
        "a b",
        "x@sha256:short",
        "x@md5:00000000000000000000000000000000",
        "http://host/x",
        "x:tag:tag",
        "/abs",
        "x/../y",
        "127.0.0.1:5000/slipway/test:bad tag",
        "127.0.0.1:5000/slipway/test\n",
    ] {
        let status = pull(&daemon, bad, None).await.expect_err(bad);
        assert_eq!(status.code(), Code::InvalidArgument, "{bad:?}: {status}");
    }
    let none = daemon
        .images()
        .pull_image(cri::PullImageRequest::default())
        .await;
    refused(none, Code::InvalidArgument, &["image"]);
    Ok(())
}

async fn an_unreachable_registry(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let began = std::time::Instant::now();
    let status = pull(&daemon, "127.0.0.1:1/slipway/test:latest", None)
        .await
        .expect_err("nobody listens there");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("127.0.0.1:1"), "{status}");
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
    Ok(())
}

async fn what_the_registry_does_not_have(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let absent = format!("{REGISTRY}/slipway/test@sha256:{}", "1".repeat(64));
    for name in [
        format!("{REGISTRY}/slipway/nothing:latest"),
        format!("{REGISTRY}/slipway/test:no-such-tag"),
        absent,
    ] {
        let status = pull(&daemon, &name, None).await.expect_err(&name);
        assert_eq!(status.code(), Code::NotFound, "{name}: {status}");
        assert!(status.message().contains("slipway/"), "{status}");
    }
    Ok(())
}

async fn removed_by_every_name(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    for way in 0..4 {
        let id = daemon.pull("test").await?;
        let seen = list(&daemon).await?.remove(0);
        let plain = id.trim_start_matches("sha256:");
        let name = [
            &seen.id,
            &seen.repo_tags[0],
            &seen.repo_digests[0],
            &plain[..12].to_owned(),
        ][way]
            .clone();
        daemon
            .images()
            .remove_image(cri::RemoveImageRequest { image: spec(&name) })
            .await?;
        assert_eq!(list(&daemon).await?, [], "removed by {name}");
    }
    let state = env.root.join("state").display().to_string();
    // Off the hot path, in the background.
    eventually("no layer left", seconds(5), || async {
        // It stumbles over what is removed under its feet; then there is something still.
        let layers = output("find", &[&state, "-name", "busybox"]).await;
        Ok(layers.is_ok_and(|l| l.is_empty()).then_some(()))
    })
    .await?;
    // What is left is the store of metadata.
    let left = size_of(&env.root.join("state"));
    assert!(left < 8 << 20, "{left} bytes are left of removed images");
    Ok(())
}

/// Bytes of the files in a directory.
fn size_of(dir: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| match e.file_type() {
            Ok(t) if t.is_dir() => size_of(&e.path()),
            Ok(t) if t.is_file() => e.metadata().map_or(0, |m| m.len()),
            _ => 0,
        })
        .sum()
}

async fn an_image_in_use(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    let request = cri::RemoveImageRequest {
        image: spec(&image("test")),
    };
    // Refused, or done: the container must go on reading its files either way.
    let answer = daemon.images().remove_image(request).await;
    if let Err(status) = &answer {
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    }
    assert_eq!(
        container.exec_output(&["cat", "/etc/layer"]).await?,
        "plain"
    );
    assert_eq!(container.exec(&["probe", "exit", "3"]).await?.code, 3);
    Ok(())
}

async fn pulled_by_many_at_once(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..12 {
        let daemon = daemon.clone();
        tasks.spawn(async move {
            pull(&daemon, &image(["test", "schema2", "multi"][n % 3]), None).await
        });
    }
    for answer in tasks.join_all().await {
        answer?;
    }
    // schema2 and multi have the same configuration, and so the same id: one image with two names.
    let images = list(&daemon).await?;
    let mut tags: Vec<_> = images.iter().flat_map(|i| i.repo_tags.clone()).collect();
    tags.sort();
    assert_eq!(
        (images.len(), tags),
        (2, ["multi", "schema2", "test"].map(image).to_vec())
    );
    runs(&daemon, "test").await
}

async fn the_file_systems_are_told(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let used = async || -> Result<u64> {
        let info = daemon
            .images()
            .image_fs_info(cri::ImageFsInfoRequest {})
            .await?
            .into_inner();
        ensure!(
            !info.container_filesystems.is_empty(),
            "no file system of containers"
        );
        let fs = info
            .image_filesystems
            .first()
            .context("no file system of images")?;
        let place = PathBuf::from(&fs.fs_id.as_ref().context("fs_id")?.mountpoint);
        ensure!(
            env.root.join("state").starts_with(&place) || place.starts_with(&env.root),
            "{}",
            place.display()
        );
        Ok(fs.used_bytes.context("used_bytes")?.value)
    };
    let before = used().await?;
    daemon.pull("big").await?;
    eventually("more bytes used", seconds(20), || async {
        Ok((used().await? >= before + (40 << 20)).then_some(()))
    })
    .await
}

async fn import_of_an_archive_and_a_layout(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let images = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("test-images");
    for (path, name) in [
        ("archives/docker.tar", "example.test/imported:docker"),
        ("archives/oci.tar", "example.test/imported:oci"),
        ("test", "example.test/imported:layout"),
    ] {
        let path = images.join(path).display().to_string();
        let mut args = vec!["image", "import", path.as_str()];
        if !path.contains("docker") {
            args.extend(["--tag", name]);
        }
        let (code, out, err) = daemon.command(&args).await?;
        assert_eq!(code, 0, "{path}: {out}{err}");
        let pod = daemon.pod(|_| {}).await?;
        let text = pod
            .output(&["cat", "/etc/probe-image"], |c| c.image = spec(name))
            .await
            .with_context(|| name.to_owned())?;
        assert_eq!(text, "This is a test image.\n", "{name}");
    }
    Ok(())
}

async fn imports_of_rubbish(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let rubbish = env.root.join("rubbish.tar");
    std::fs::write(&rubbish, vec![b'x'; 5000])?;
    for path in [
        rubbish.display().to_string(),
        "/no/such/file".to_owned(),
        env.dir("empty")?.display().to_string(),
    ] {
        let (code, _, err) = daemon.command(&["image", "import", &path]).await?;
        assert_ne!(code, 0, "{path}");
        assert!(err.contains(&path), "{err}");
    }
    assert_eq!(list(&daemon).await?, []);
    Ok(())
}

async fn images_outlive_the_daemon(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let before = list(&daemon).await?;
    for signal in [
        nix::sys::signal::Signal::SIGTERM,
        nix::sys::signal::Signal::SIGKILL,
    ] {
        daemon.kill(signal).await?;
        daemon.launch().await?;
        assert_eq!(list(&daemon).await?, before, "after {signal}");
    }
    daemon.pod(|_| {}).await?.output(&["true"], |_| {}).await?;
    Ok(())
}

async fn pinned_images_are_told(env: Env) -> Result<()> {
    let daemon = env
        .daemon_with(|s| s.set("images.pinned", &format!("[\"{REGISTRY}/slipway/te*\"]")))
        .await?;
    daemon.pull("test").await?;
    daemon.pull("scratch").await?;
    assert!(
        status(&daemon, &image("test"))
            .await?
            .context("test")?
            .pinned
    );
    assert!(
        !status(&daemon, &image("scratch"))
            .await?
            .context("scratch")?
            .pinned
    );
    Ok(())
}
