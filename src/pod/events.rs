//! What keepers tell: every change of a container's state, and, by falling silent, their own death.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use slipway_proto::keeper::{ContainerState, Phase};
use slipway_runtime::client::{ClientError, Events};

use super::leftovers;
use super::node::now;
use super::sandbox::Pod;
use super::state::{PodStage, Stage};

/// Between two attempts to follow a keeper that answers but closes its stream.
const BACKOFF: Duration = Duration::from_millis(100);

/// Follows a pod's keeper until the pod is stopped or the keeper is dead.
pub fn follow(pod: Arc<Pod>, mut events: Events) {
    tokio::spawn(async move {
        loop {
            while let Some(news) = events.next().await {
                take(&pod, &news);
            }
            if pod.stage() == PodStage::Stopped {
                return;
            }
            events = match pod.keeper.hello().await {
                Ok(_) => match pod.keeper.subscribe().await {
                    Ok(events) => events,
                    Err(_) => break,
                },
                Err(_) => break,
            };
            tokio::time::sleep(BACKOFF).await;
        }
        keeper_died(&pod).await;
    });
}

/// Like [`follow`], for a keeper that does not answer now: it may later.
pub fn follow_later(pod: Arc<Pod>) {
    tokio::spawn(async move {
        loop {
            // Hello has a deadline of its own, so this does not spin.
            match pod.keeper.hello().await {
                Ok(_) => break,
                Err(ClientError::Timeout { .. }) if pod.stage() != PodStage::Stopped => {}
                Err(_) => return keeper_died(&pod).await,
            }
        }
        match pod.keeper.subscribe().await {
            Ok(events) => follow(pod, events),
            Err(_) => keeper_died(&pod).await,
        }
    });
}

/// Takes over what a keeper says of a container.
pub fn take(pod: &Pod, news: &ContainerState) {
    let Some(cell) = pod.cell(&news.id) else {
        return;
    };
    let changed = cell.change(|status| status.apply(news));
    if changed && news.phase() == Phase::Exited {
        let status = cell.status.borrow().clone();
        tracing::info!(
            pod = pod.id(),
            container = news.id,
            exit_code = status.exit_code,
            reason = status.reason(),
            message = status.message,
            "container exited"
        );
    }
}

/// Settles the state of everything that the dead keeper held.
pub async fn keeper_died(pod: &Arc<Pod>) {
    let unexpected = pod.stage() == PodStage::Ready;
    pod.advance(PodStage::NotReady);
    if unexpected {
        tracing::error!(
            pod = pod.id(),
            "the keeper of the pod died; what is left of the pod is killed"
        );
    }
    // Whoever still runs runs without anybody to drain its output or to see its end.
    for (id, cell) in pod.cells() {
        if let Err(problems) = kill_cgroup(cell.cgroup.clone()).await {
            tracing::error!(
                pod = pod.id(),
                container = id,
                problems = problems.join("; "),
                "can't kill what is left"
            );
        }
    }
    if pod.record.driver.is_some() {
        let (id, dir) = (pod.id().to_owned(), pod.dir.clone());
        let end = move || super::shim::end(&id, &dir);
        if let Err(error) = tokio::task::spawn_blocking(end).await {
            tracing::error!(pod = pod.id(), %error, "can't end the pod's shim");
        }
    }
    let init = pod.record.namespaces.pid.clone();
    if !init.is_empty() {
        let kill = move || leftovers::kill_pid_namespace(Path::new(&init));
        if let Err(error) = tokio::task::spawn_blocking(kill).await {
            tracing::error!(pod = pod.id(), %error, "can't kill the pod's init");
        }
    }
    settle(pod);
    pod.ended();
}

/// Gives every container of a dead keeper an end: from its exit file, or as lost.
pub fn settle(pod: &Pod) {
    for (id, cell) in pod.cells() {
        if cell.status.borrow().stage == Stage::Exited {
            continue;
        }
        let end = exit_file(&pod.dir, &id);
        cell.change(|status| match &end {
            Some(end) => status.apply(end),
            None => status.lost(
                now(),
                "the pod's keeper died, so nobody saw the end of this container".to_owned(),
            ),
        });
    }
}

/// Kills what is in a cgroup and removes it, off the runtime's threads.
///
/// # Errors
/// What could not be removed.
pub async fn kill_cgroup(cgroup: String) -> Result<(), Vec<String>> {
    match tokio::task::spawn_blocking(move || leftovers::kill_cgroup(&cgroup)).await {
        Ok(result) => result,
        Err(e) => Err(vec![e.to_string()]),
    }
}

/// What a keeper left about a container's end.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ExitFile {
    id: String,
    exit_code: i32,
    started_at: i64,
    finished_at: i64,
    oom_killed: bool,
    cannot_run: bool,
    message: String,
}

/// The end of a container as its keeper wrote it down; `None` when it did not, or not legibly.
pub fn exit_file(pod_dir: &Path, id: &str) -> Option<ContainerState> {
    let path = pod_dir.join("exits").join(format!("{id}.json"));
    let text = std::fs::read(&path).ok()?;
    let end: ExitFile = serde_json::from_slice(&text)
        .inspect_err(|error| {
            tracing::error!(path = %path.display(), %error, "an exit file can't be read");
        })
        .ok()?;
    (end.id == id).then_some(ContainerState {
        id: end.id,
        phase: Phase::Exited as i32,
        started_at: end.started_at,
        finished_at: end.finished_at,
        exit_code: end.exit_code,
        oom_killed: end.oom_killed,
        cannot_run: end.cannot_run,
        message: end.message,
        ..ContainerState::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_files_are_read_and_bad_ones_ignored() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("exits")).unwrap();
        let write = |text: &str| std::fs::write(dir.path().join("exits/c1.json"), text).unwrap();
        assert!(exit_file(dir.path(), "c1").is_none());
        for bad in ["", "{", "[]", "{\"id\":\"other\"}"] {
            write(bad);
            assert!(exit_file(dir.path(), "c1").is_none(), "{bad}");
        }
        write(r#"{"id":"c1","exit_code":3,"finished_at":9,"later":{"x":1}}"#);
        let end = exit_file(dir.path(), "c1").unwrap();
        assert_eq!(
            (end.exit_code, end.finished_at, end.phase()),
            (3, 9, Phase::Exited)
        );
    }
}
