//! Names belong to a living operation or to an object, and to nothing else.

use std::time::Duration;

use tonic::Code;

use crate::harness::*;

tests![
    two_pods_of_one_name,
    two_containers_of_one_name,
    a_pod_whose_client_gave_up,
    a_container_whose_client_gave_up,
    a_failed_create_frees_its_name,
    many_clients_ask_for_one_pod,
];

async fn two_pods_of_one_name(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let name = pod.config.metadata.as_ref().unwrap().name.clone();
    let second = daemon.run_pod(pod.config.clone()).await.map(|p| p.id);
    refused(second, Code::AlreadyExists, &[&name, &pod.id]);
    let mut next = pod.config.clone();
    next.metadata.as_mut().unwrap().attempt = 1;
    daemon.run_pod(next).await?;
    pod.stop().await?;
    // Stopped, the pod still has its name; removed, it does not.
    refused(
        daemon.run_pod(pod.config.clone()).await.map(|p| p.id),
        Code::AlreadyExists,
        &[&name],
    );
    pod.remove().await?;
    daemon.run_pod(pod.config.clone()).await?;
    Ok(())
}

async fn two_containers_of_one_name(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let one = pod.create(&["true"], |_| {}).await?;
    let name = one.config.metadata.as_ref().unwrap().name.clone();
    refused(
        pod.create_exactly(one.config.clone()).await.map(|c| c.id),
        Code::AlreadyExists,
        &[&name, &one.id],
    );
    let mut next = one.config.clone();
    next.metadata.as_mut().unwrap().attempt = 1;
    pod.create_exactly(next).await?;
    // Another pod may have the same name.
    let other = daemon.pod(|_| {}).await?;
    other.create_exactly(one.config.clone()).await?;
    one.remove().await?;
    pod.create_exactly(one.config.clone()).await?;
    Ok(())
}

/// A request whose client waits no longer than this.
fn impatient<T>(message: T, patience: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(patience);
    request
}

async fn a_pod_whose_client_gave_up(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    // One that gives up long before the pod is there, and ones that give up about when it is.
    for patience in [1, 3, 6, 10, 15] {
        let config = config::pod(&daemon);
        let message = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            ..Default::default()
        };
        let patience = Duration::from_millis(patience);
        let request = impatient(message, patience);
        let mut runtime = daemon.runtime();
        let answer = tokio::time::timeout(patience, runtime.run_pod_sandbox(request)).await;
        let retry = eventually("an answer to the retry", seconds(10), || async {
            match daemon.run_pod(config.clone()).await {
                Ok(pod) => Ok(Some(Some(pod.id))),
                // The answer was on its way when the client gave up: the pod is there, and its name is its own.
                Err(status) if status.code() == Code::AlreadyExists => Ok(Some(None)),
                Err(status) => Err(status.into()),
            }
        })
        .await?;
        if patience < Duration::from_millis(2) && !matches!(answer, Ok(Ok(_))) {
            assert!(retry.is_some(), "the retry gets what the first call made");
        }
        let request = cri::ListPodSandboxRequest::default();
        let pods = daemon
            .runtime()
            .list_pod_sandbox(request)
            .await?
            .into_inner()
            .items;
        assert_eq!(pods.len(), 1, "one pod, whoever asked how often");
        assert_eq!(pods[0].state(), cri::PodSandboxState::SandboxReady);
        assert_eq!(pods[0].metadata, config.metadata);
        assert!(retry.is_none_or(|id| id == pods[0].id));
        assert_eq!(daemon.pod_dirs().len(), 1);
        daemon.remove_everything().await?;
        // And never is the name stuck.
        daemon.run_pod(config).await?;
        daemon.remove_everything().await?;
    }
    Ok(())
}

async fn a_container_whose_client_gave_up(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let config = config::container(&daemon, &pod.config, &["sleep", "1000"]);
    let message = cri::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(config.clone()),
        sandbox_config: Some(pod.config.clone()),
    };
    let request = impatient(message, Duration::from_millis(1));
    let answer = tokio::time::timeout(
        Duration::from_millis(1),
        daemon.runtime().create_container(request),
    )
    .await;
    assert!(
        !matches!(answer, Ok(Ok(_))),
        "a create within 1 ms: this test needs less patience"
    );
    let container = eventually("the retry's success", seconds(10), || async {
        Ok(pod.create_exactly(config.clone()).await.ok())
    })
    .await?;
    container.start().await?;
    let request = cri::ListContainersRequest::default();
    let all = daemon
        .runtime()
        .list_containers(request)
        .await?
        .into_inner()
        .containers;
    assert_eq!(
        all.iter().map(|c| &c.id).collect::<Vec<_>>(),
        [&container.id]
    );
    Ok(())
}

async fn a_failed_create_frees_its_name(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let good = config::container(&daemon, &pod.config, &["sleep", "1000"]);
    let mut bad = good.clone();
    container_security(&mut bad).run_as_username = "nobody-knows".into();
    for _ in 0..3 {
        refused(
            pod.create_exactly(bad.clone()).await.map(|c| c.id),
            Code::InvalidArgument,
            &["nobody-knows"],
        );
    }
    let container = pod.create_exactly(good).await?;
    container.start().await?;
    Ok(())
}

async fn many_clients_ask_for_one_pod(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let config = config::pod(&daemon);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (daemon, config) = (daemon.clone(), config.clone());
        tasks.spawn(async move { daemon.run_pod(config).await.map(|p| p.id) });
    }
    let mut ids = Vec::new();
    for answer in tasks.join_all().await {
        match answer {
            Ok(id) => ids.push(id),
            Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{status}"),
        }
    }
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert_eq!(daemon.pod_dirs().len(), 1);
    Ok(())
}
