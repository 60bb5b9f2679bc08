//! What may be asked twice, and what is not there.

use tonic::Code;

use crate::harness::*;

tests![
    twice_is_as_good_as_once,
    what_is_not_there,
    empty_ids_are_refused,
    images_twice
];

async fn twice_is_as_good_as_once(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    for _ in 0..2 {
        container.stop(0).await?;
    }
    for _ in 0..2 {
        container.remove().await?;
    }
    for _ in 0..2 {
        pod.stop().await?;
    }
    for _ in 0..2 {
        pod.remove().await?;
    }
    pod.stop().await?;
    Ok(())
}

async fn what_is_not_there(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let pod = Pod {
        daemon: daemon.clone(),
        id: "0123456789abcdef".into(),
        config: config::pod(&daemon),
    };
    let container = Container {
        daemon: daemon.clone(),
        id: "fedcba9876543210".into(),
        config: Default::default(),
        log: Default::default(),
    };
    refused(pod.status().await, Code::NotFound, &[&pod.id]);
    refused(pod.try_create(|_| {}).await, Code::NotFound, &[&pod.id]);
    refused(container.status().await, Code::NotFound, &[&container.id]);
    refused(container.start().await, Code::NotFound, &[&container.id]);
    // Gone is what was wanted.
    pod.stop().await?;
    pod.remove().await?;
    container.remove().await?;
    // As both peers have it: the kubelet takes either for an answer.
    if let Err(status) = container.stop(1).await {
        assert_eq!(status.code(), Code::NotFound, "{status}");
    }
    Ok(())
}

async fn empty_ids_are_refused(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pod(|_| {}).await?;
    let pod = Pod {
        daemon: daemon.clone(),
        id: String::new(),
        config: config::pod(&daemon),
    };
    // With a prefix rule, "" would fit everything there is.
    for answer in [pod.stop().await, pod.remove().await] {
        if let Err(status) = answer {
            assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        }
    }
    let pods = daemon
        .runtime()
        .list_pod_sandbox(cri::ListPodSandboxRequest::default())
        .await?
        .into_inner()
        .items;
    assert_eq!(pods.len(), 1);
    assert_eq!(pods[0].state(), cri::PodSandboxState::SandboxReady);
    Ok(())
}

async fn images_twice(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let first = daemon.pull("test").await?;
    assert_eq!(daemon.pull("test").await?, first);
    let spec = cri::ImageSpec {
        image: image("test"),
        ..Default::default()
    };
    for _ in 0..2 {
        let request = cri::RemoveImageRequest {
            image: Some(spec.clone()),
        };
        daemon.images().remove_image(request).await?;
        let request = cri::ImageStatusRequest {
            image: Some(spec.clone()),
            verbose: false,
        };
        assert_eq!(
            daemon
                .images()
                .image_status(request)
                .await?
                .into_inner()
                .image,
            None
        );
    }
    Ok(())
}
