//! GetContainerEvents.

use cri::ContainerEventType::{
    ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted,
    ContainerStartedEvent as Started, ContainerStoppedEvent as Stopped,
};
use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::*;

tests![
    everybody_sees_the_whole_life_in_order,
    the_newest_container_is_the_first,
    lives_too_short_to_see,
    a_start_that_fails,
    a_keeper_that_dies,
    subscribers_do_not_hold_the_daemon,
];

type Stream = tonic::Streaming<cri::ContainerEventResponse>;

async fn subscribe(daemon: &Daemon) -> Result<Stream> {
    let request = cri::GetEventsRequest {};
    let stream = daemon.runtime().get_container_events(request).await?;
    Ok(stream.into_inner())
}

async fn next(stream: &mut Stream) -> Result<cri::ContainerEventResponse> {
    let next = tokio::time::timeout(seconds(20), stream.message()).await;
    next.context("no event comes")??
        .context("the stream has ended")
}

/// The next events: kind and id.
async fn some(stream: &mut Stream, count: usize) -> Result<Vec<(cri::ContainerEventType, String)>> {
    let mut all = Vec::new();
    for _ in 0..count {
        let event = next(stream).await?;
        all.push((event.container_event_type(), event.container_id));
    }
    Ok(all)
}

async fn everybody_sees_the_whole_life_in_order(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let mut all = [subscribe(&daemon).await?, subscribe(&daemon).await?];
    let pod = daemon.pod(config::own_network).await?;
    let container = pod.sleeper().await?;
    container.stop(0).await?;
    container.remove().await?;
    pod.stop().await?;
    pod.remove().await?;
    let (p, c) = (pod.id.as_str(), container.id.as_str());
    let (ready, gone) = (
        cri::PodSandboxState::SandboxReady,
        cri::PodSandboxState::SandboxNotready,
    );
    use cri::ContainerState::{ContainerCreated, ContainerExited, ContainerRunning};
    let expected = [
        (Created, p, ready, None),
        (Started, p, ready, None),
        (Created, c, ready, Some(ContainerCreated)),
        (Started, c, ready, Some(ContainerRunning)),
        (Stopped, c, ready, Some(ContainerExited)),
        (Deleted, c, ready, None),
        (Stopped, p, gone, None),
        (Deleted, p, gone, None),
    ];
    for stream in &mut all {
        let mut last = 0;
        for (kind, id, pod_state, state) in expected {
            let event = next(stream).await?;
            assert_eq!(
                (event.container_event_type(), event.container_id.as_str()),
                (kind, id)
            );
            assert!(event.created_at >= last, "time goes back");
            last = event.created_at;
            let status = event.pod_sandbox_status.context("no pod")?;
            assert_eq!(status.id, p);
            assert_eq!(status.metadata, pod.config.metadata);
            assert_eq!(status.state(), pod_state, "{kind:?} of {id}");
            let address = status.network.unwrap_or_default().ip;
            assert_eq!(address.is_empty(), pod_state == gone, "{kind:?} of {id}");
            let states: Vec<_> = event
                .containers_statuses
                .iter()
                .map(|s| s.state())
                .collect();
            assert_eq!(states, Vec::from_iter(state), "{kind:?} of {id}");
            if kind == Stopped && id == c {
                assert_eq!(event.containers_statuses[0].exit_code, 137);
            }
        }
    }
    Ok(())
}

async fn the_newest_container_is_the_first(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let mut stream = subscribe(&daemon).await?;
    // Enough that another order, by id say, does not give this one by chance.
    let mut made = Vec::new();
    for _ in 0..5 {
        made.insert(0, pod.run(&["true"], |_| {}).await?.id);
        let mut last = None;
        for _ in 0..3 {
            last = Some(next(&mut stream).await?);
        }
        let told = last.context("no event")?.containers_statuses;
        assert_eq!(Vec::from_iter(told.into_iter().map(|s| s.id)), made);
    }
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: false,
    };
    let told = daemon.runtime().pod_sandbox_status(request).await?;
    let told = told
        .into_inner()
        .containers_statuses
        .into_iter()
        .map(|s| s.id);
    assert_eq!(Vec::from_iter(told), made);
    Ok(())
}

async fn lives_too_short_to_see(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let mut stream = subscribe(&daemon).await?;
    for _ in 0..10 {
        let container = pod.run(&["true"], |_| {}).await?;
        let seen = some(&mut stream, 3).await?;
        let id = container.id;
        let expected = [Created, Started, Stopped].map(|kind| (kind, id.clone()));
        assert_eq!(seen, expected);
    }
    Ok(())
}

async fn a_start_that_fails(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let mut stream = subscribe(&daemon).await?;
    let container = pod.create(&["/no/such/command"], |_| {}).await?;
    assert!(container.start().await.is_err());
    let id = container.id.clone();
    let seen = some(&mut stream, 2).await?;
    assert_eq!(seen, [(Created, id.clone()), (Stopped, id.clone())]);
    container.remove().await?;
    assert_eq!(some(&mut stream, 1).await?, [(Deleted, id)]);
    Ok(())
}

async fn a_keeper_that_dies(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    let mut stream = subscribe(&daemon).await?;
    let status = read(format!("/proc/{}/status", container.pid()?))?;
    let keeper = status.lines().find_map(|l| l.strip_prefix("PPid:"));
    let keeper = keeper.context("PPid")?.trim().parse()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(keeper), Signal::SIGKILL)?;
    let expected = [(Stopped, container.id.clone()), (Stopped, pod.id.clone())];
    assert_eq!(some(&mut stream, 2).await?, expected);
    // Its end has been told.
    pod.stop().await?;
    pod.remove().await?;
    let expected = [(Deleted, container.id), (Deleted, pod.id)];
    assert_eq!(some(&mut stream, 2).await?, expected);
    Ok(())
}

async fn subscribers_do_not_hold_the_daemon(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let mut stream = subscribe(&daemon).await?;
    let begin = std::time::Instant::now();
    daemon.end().await?;
    assert!(begin.elapsed() < seconds(5), "{:?}", begin.elapsed());
    let end = tokio::time::timeout(seconds(5), stream.message()).await?;
    refused(end, Code::Unavailable, &[]);
    Ok(())
}
