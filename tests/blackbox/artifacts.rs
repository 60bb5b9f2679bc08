//! OCI artifacts as volumes (KEP-4639).

use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::liar::Liar;
use crate::harness::*;

tests![
    files_of_an_artifact,
    an_artifact_in_a_user_namespace,
    an_artifact_is_an_image_like_any_other,
    an_artifact_is_no_program,
    hostile_artifacts_are_refused,
];

const TEXT: &str = "text/plain";

fn tarball() -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(7);
    header.set_mode(0o600);
    tar.append_data(&mut header, "tree/packed", "packed\n".as_bytes())?;
    Ok(tar.into_inner()?)
}

async fn model() -> Result<Liar> {
    Liar::artifact(&[
        (
            Some("weights.bin"),
            "application/vnd.example.weights",
            vec![b'w'; 200_000],
        ),
        (Some("docs/README.md"), TEXT, b"read me\n".to_vec()),
        (Some("same.md"), TEXT, b"read me\n".to_vec()),
        (
            Some("tree"),
            "application/vnd.oci.image.layer.v1.tar",
            tarball()?,
        ),
        (None, TEXT, b"nameless\n".to_vec()),
    ])
    .await
}

async fn pull(daemon: &Daemon, name: &str) -> Result<String, tonic::Status> {
    let request = cri::PullImageRequest {
        image: Some(spec(name)),
        ..Default::default()
    };
    let pulled = daemon.images().pull_image(request).await?;
    Ok(pulled.into_inner().image_ref)
}

fn spec(name: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: name.to_owned(),
        ..Default::default()
    }
}

fn volume(name: &str) -> cri::Mount {
    cri::Mount {
        container_path: "/volume".into(),
        readonly: true,
        image: Some(spec(name)),
        ..Default::default()
    }
}

async fn looks_right(container: &Container) -> Result<()> {
    let output = async |command: &[&str]| container.exec_output(command).await;
    let list = output(&["sh", "-c", "cd /volume; find . -type f | sort"]).await?;
    let mut names: Vec<_> = list.lines().collect();
    let nameless = names
        .iter()
        .position(|n| n.starts_with("./sha256-"))
        .context(list.clone())?;
    let nameless = names.remove(nameless);
    let expected = [
        "./docs/README.md",
        "./same.md",
        "./tree/packed",
        "./weights.bin",
    ];
    assert_eq!(names, expected);
    let text = output(&[
        "cat",
        "/volume/docs/README.md",
        "/volume/same.md",
        "/volume/tree/packed",
    ])
    .await?;
    assert_eq!(text, "read me\nread me\npacked");
    assert_eq!(
        output(&["cat", &format!("/volume/{nameless}")]).await?,
        "nameless"
    );
    assert_eq!(
        output(&["stat", "-c", "%s %u:%g %a", "/volume/weights.bin"]).await?,
        "200000 0:0 644"
    );
    assert_eq!(
        output(&["stat", "-c", "%u:%g %a", "/volume", "/volume/docs"]).await?,
        "0:0 755\n0:0 755"
    );
    let touched = container.exec(&["touch", "/volume/x"]).await?;
    assert!(
        touched.stderr.contains("Read-only file system"),
        "{touched:?}"
    );
    Ok(())
}

async fn files_of_an_artifact(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let registry = model().await?;
    let id = pull(&daemon, &registry.reference()).await?;
    assert_eq!(
        id, registry.digest,
        "an artifact's configuration says nothing, so it can't be its id"
    );
    let pod = daemon.pod(|_| {}).await?;
    let inner = cri::Mount {
        container_path: "/docs".into(),
        image_sub_path: "docs".into(),
        ..volume(&id)
    };
    let mounts = vec![volume(&registry.reference()), inner];
    let container = pod.run(&["sleep", "1000"], |c| c.mounts = mounts).await?;
    looks_right(&container).await?;
    assert_eq!(
        container.exec_output(&["cat", "/docs/README.md"]).await?,
        "read me"
    );
    let status = container.status().await?;
    for mount in &status.mounts {
        assert_eq!(
            mount.image.clone().unwrap_or_default().image_ref,
            id,
            "{mount:?}"
        );
    }
    assert_eq!(status.mounts.len(), 2);
    Ok(())
}

async fn an_artifact_in_a_user_namespace(env: Env) -> Result<()> {
    let daemon = crate::userns::daemon(&env).await?;
    let registry = model().await?;
    pull(&daemon, &registry.reference()).await?;
    let pod = daemon.pod(crate::userns::mapped).await?;
    let mounts = vec![volume(&registry.reference())];
    let container = pod.run(&["sleep", "1000"], |c| c.mounts = mounts).await?;
    looks_right(&container).await
}

async fn an_artifact_is_an_image_like_any_other(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let registry = model().await?;
    let name = registry.reference();
    let id = pull(&daemon, &name).await?;
    assert_eq!(pull(&daemon, &name).await?, id);
    let find = async || -> Result<Option<cri::Image>> {
        let request = cri::ImageStatusRequest {
            image: Some(spec(&name)),
            verbose: false,
        };
        Ok(daemon
            .images()
            .image_status(request)
            .await?
            .into_inner()
            .image)
    };
    let before = find().await?.context("no status")?;
    assert_eq!((&before.id, &before.repo_tags), (&id, &vec![name.clone()]));
    assert_eq!(
        before.repo_digests,
        [name.replace(":latest", &format!("@{id}"))]
    );
    assert!(before.size > 200_000, "{before:?}");
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| c.mounts = vec![volume(&name)])
        .await?;
    let remove = async || {
        let request = cri::RemoveImageRequest {
            image: Some(spec(&name)),
        };
        daemon.images().remove_image(request).await.map(drop)
    };
    refused(remove().await, Code::FailedPrecondition, &[]);
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    assert_eq!(find().await?, Some(before));
    refused(remove().await, Code::FailedPrecondition, &[]);
    looks_right(&container).await?;
    container.remove().await?;
    remove().await?;
    assert_eq!(find().await?, None);
    let list = daemon
        .images()
        .list_images(cri::ListImagesRequest::default())
        .await?;
    assert!(list.into_inner().images.iter().all(|image| image.id != id));
    Ok(())
}

async fn an_artifact_is_no_program(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let registry = model().await?;
    pull(&daemon, &registry.reference()).await?;
    let pod = daemon.pod(|_| {}).await?;
    let made = pod
        .try_create(|c| c.image = Some(spec(&registry.reference())))
        .await;
    let names = [
        "OCI artifact",
        "application/vnd.example.model",
        "image volume",
    ];
    refused(made, Code::FailedPrecondition, &names);
    Ok(())
}

async fn hostile_artifacts_are_refused(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let encrypted = "application/vnd.oci.image.layer.v1.tar+encrypted";
    let cases: [(&[&str], &str, Code, &str); 6] = [
        (&["../../escape"], TEXT, Code::DataLoss, ".."),
        (&["/etc/passwd"], TEXT, Code::DataLoss, "absolute"),
        (&["a", "a"], TEXT, Code::DataLoss, "two of its files"),
        (&["a/b", "a"], TEXT, Code::DataLoss, "directory"),
        (&["line\nbreak"], TEXT, Code::DataLoss, "control character"),
        (&["a"], encrypted, Code::FailedPrecondition, "encrypted"),
    ];
    for (titles, kind, code, reason) in cases {
        let files: Vec<_> = titles
            .iter()
            .map(|t| (Some(*t), kind, t.as_bytes().to_vec()))
            .collect();
        let registry = Liar::artifact(&files).await?;
        refused(pull(&daemon, &registry.reference()).await, code, &[reason]);
    }
    let list = daemon
        .images()
        .list_images(cri::ListImagesRequest::default())
        .await?;
    assert_eq!(list.into_inner().images, []);
    Ok(())
}
