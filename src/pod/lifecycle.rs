//! StartContainer, StopContainer, RemoveContainer.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use slipway_nri::api::Event;
use slipway_proto::keeper::ErrorKind;
use slipway_runtime::client::ClientError;
use slipway_runtime::hooks;

use super::container::Container;
use super::error::{PodError, chain, file};
use super::events;
use super::feed::Kind;
use super::leftovers;
use super::names::title;
use super::node::{Node, now};
use super::phases::{Phases, Trace, describe};
use super::restore;
use super::sandbox::Pod;
use super::state::{PodStage, Stage};

/// SIGKILL on every architecture.
const KILL: i32 = 9;
/// How long a killed container gets before the next harder means.
const AFTER_KILL: Duration = Duration::from_secs(5);
/// The keeper's event of an end may trail its answer by this at most.
const EVENT_LAG: Duration = Duration::from_secs(2);
/// How much longer than a restore may take its keeper is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest grace period: no timer needs to go further.
const LONGEST_GRACE: Duration = Duration::from_secs(u32::MAX as u64);

impl Node {
    /// Lets a created container's command run.
    ///
    /// # Errors
    /// Unless the container is created and its pod ready; when the command can't be executed, which leaves
    /// the container exited.
    pub async fn start_container(self: &Arc<Self>, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        let node = self.clone();
        self.complete(
            "StartContainer",
            async move { node.start(&container).await },
        )
        .await
    }

    async fn start(&self, container: &Arc<Container>) -> Result<(), PodError> {
        let mut phases = Phases::start();
        let _turn = container.turn.lock().await;
        let pod = self.pod(&container.record.pod_id)?;
        if pod.stage() != PodStage::Ready {
            return Err(not_ready(&pod));
        }
        let stage = container.stage();
        if stage != Stage::Created {
            return Err(PodError::WrongState {
                id: container.id().to_owned(),
                state: stage.as_str(),
                needs: "only a created container can be started",
            });
        }
        let turn = self.turn().await;
        if let Err(error) = self
            .tell(turn.as_ref(), Event::StartContainer, container)
            .await
        {
            // As after any other start that failed, it has exited.
            if let Err(error) = self.kill(&pod, container).await {
                tracing::error!(
                    container = container.id(),
                    error = error.chain(),
                    "can't end it"
                );
            }
            return Err(error);
        }
        let limits = self.config().limits.clone();
        let mut timeout = limits.start_timeout + container.poststart();
        if container.record.checkpoint.is_some() {
            // The keeper gives up when that is over; this is for one that does not.
            timeout = timeout.max(self.config().checkpoint.timeout + PATIENCE);
        }
        let result = container.keeper.start(container.id(), timeout).await;
        phases.mark("start");
        match result {
            Ok(()) => {
                container.update(|status| status.running(now()));
                if container.record.checkpoint.is_some() {
                    self.sweep_later(self.layers_dir().join(container.id()).join(restore::DIR));
                }
                if let Some(turn) = &turn {
                    self.tell_after(turn, Event::PostStartContainer, container)
                        .await;
                }
                let laps = phases.finish();
                tracing::info!(
                    pod = pod.id(),
                    container = container.id(),
                    phases = describe(&laps),
                    "container started"
                );
                self.traces.add(Trace {
                    method: "StartContainer",
                    pod_id: pod.id().to_owned(),
                    container_id: container.id().to_owned(),
                    ended_at: now(),
                    phases: laps,
                });
                Ok(())
            }
            Err(source) => {
                self.settle_failed_start(container, &source, limits.delete_timeout)
                    .await;
                Err(PodError::Keeper {
                    action: "start",
                    // The same after each restart: the kubelet tells events apart by their text.
                    what: title(&container.record.config),
                    source,
                })
            }
        }
    }

    /// After a start that failed the container has exited, one way or the other.
    async fn settle_failed_start(
        &self,
        container: &Container,
        error: &ClientError,
        patience: Duration,
    ) {
        if error.kind() == ErrorKind::CannotRun && container.exited_within(EVENT_LAG).await {
            return;
        }
        // It may yet begin to run, which nobody would expect of a start that failed.
        if let Err(e) = container.keeper.signal(container.id(), KILL, true).await {
            tracing::warn!(
                container = container.id(),
                error = chain(&e),
                "can't kill what failed to start"
            );
        }
        if !container.exited_within(AFTER_KILL.min(patience)).await {
            container.update(|status| status.start_failed(now(), chain(error)));
        }
    }

    /// Stops a container: its stop signal, and SIGKILL after `grace` seconds. Unknown and exited ones are
    /// fine. Each caller's own grace period counts, so the shortest one decides.
    ///
    /// # Errors
    /// When a process survives everything.
    pub async fn stop_container(self: &Arc<Self>, id: &str, grace: i64) -> Result<(), PodError> {
        let Some(container) = self.find_container(id)? else {
            return Ok(());
        };
        let node = self.clone();
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0)).min(LONGEST_GRACE);
        if container.stage() == Stage::Exited {
            return Ok(());
        }
        self.complete("StopContainer", async move {
            node.stop(&container, grace).await?;
            node.tell_stopped(&container).await;
            Ok(())
        })
        .await
    }

    async fn stop(&self, container: &Arc<Container>, grace: Duration) -> Result<(), PodError> {
        let pod = self.pod(&container.record.pod_id)?;
        // A created container has no command yet that could understand a signal.
        if container.stage() == Stage::Running && !grace.is_zero() {
            if container.first_to_stop() {
                let signal = container.record.stop_signal;
                if let Err(e) = container.keeper.signal(container.id(), signal, false).await {
                    tracing::warn!(
                        container = container.id(),
                        signal,
                        error = chain(&e),
                        "can't send the stop signal; killing at once"
                    );
                    return self.kill(&pod, container).await;
                }
            }
            if container.exited_within(grace).await {
                tracing::info!(
                    pod = pod.id(),
                    container = container.id(),
                    "container stopped"
                );
                return Ok(());
            }
            tracing::info!(
                pod = pod.id(),
                container = container.id(),
                ?grace,
                "the grace period is over; killing"
            );
        }
        self.kill(&pod, container).await
    }

    /// Ends a container by ever harder means: SIGKILL, the keeper's delete, its cgroup.
    pub(super) async fn kill(
        &self,
        pod: &Arc<Pod>,
        container: &Arc<Container>,
    ) -> Result<(), PodError> {
        if container.stage() == Stage::Exited {
            return Ok(());
        }
        let id = container.id();
        match container.keeper.signal(id, KILL, true).await {
            Ok(()) => {
                if container.exited_within(AFTER_KILL).await {
                    return Ok(());
                }
                tracing::warn!(
                    pod = pod.id(),
                    container = id,
                    "SIGKILL did not end it; deleting"
                );
            }
            Err(e) => {
                tracing::warn!(
                    pod = pod.id(),
                    container = id,
                    error = chain(&e),
                    "can't have it killed; deleting"
                );
            }
        }
        let deleted = container
            .keeper
            .delete(id, self.delete_timeout(container))
            .await;
        match &deleted {
            Ok(()) if container.exited_within(EVENT_LAG).await => return Ok(()),
            Err(e) => tracing::warn!(
                pod = pod.id(),
                container = id,
                error = chain(e),
                "the keeper can't delete it; killing its cgroup"
            ),
            Ok(()) => {}
        }
        let killed = events::kill_cgroup(container.record.cgroup.clone()).await;
        if container.exited_within(EVENT_LAG).await {
            return Ok(());
        }
        match killed {
            // Nothing of it is left, whoever saw it end or not.
            Ok(()) => {
                if let Some(end) = events::exit_file(&pod.dir, id) {
                    container.update(|status| status.apply(&end));
                }
                container
                    .update(|s| s.lost(now(), "killed; its keeper did not see the end".into()));
                Ok(())
            }
            Err(_) => Err(PodError::Unkillable {
                id: id.to_owned(),
                waited: AFTER_KILL,
                cgroup: container.record.cgroup.clone(),
            }),
        }
    }

    /// Removes a container, by force if it runs. Unknown ones are fine.
    ///
    /// # Errors
    /// What could not be removed; another call tries again.
    pub async fn remove_container(self: &Arc<Self>, id: &str) -> Result<(), PodError> {
        let Some(container) = self.find_container(id)? else {
            return Ok(());
        };
        let Some(pod) = self.pods.get(&container.record.pod_id) else {
            return Ok(());
        };
        let node = self.clone();
        self.complete("RemoveContainer", async move {
            node.discard(&pod, &container).await
        })
        .await
    }

    /// Removes a container and everything of it.
    pub(super) async fn discard(
        &self,
        pod: &Arc<Pod>,
        container: &Arc<Container>,
    ) -> Result<(), PodError> {
        let id = container.id();
        // Before the turn: a start that hangs is ended by this.
        self.kill(pod, container).await?;
        let _turn = container.turn.lock().await;
        if self.containers.get(id).is_none() {
            return Ok(());
        }
        self.kill(pod, container).await?;
        if pod.stage() != PodStage::Stopped {
            match container
                .keeper
                .delete(id, self.delete_timeout(container))
                .await
            {
                Ok(()) => {}
                Err(e) => {
                    if !matches!(e, ClientError::Gone { .. }) {
                        tracing::warn!(
                            pod = pod.id(),
                            container = id,
                            error = chain(&e),
                            "the keeper can't delete it; removing its cgroup"
                        );
                    }
                    events::kill_cgroup(container.record.cgroup.clone())
                        .await
                        .map_err(|problems| PodError::Incomplete {
                            what: format!("container {id}"),
                            problems,
                        })?;
                }
            }
        }
        self.poststop(container).await;
        if let Some(driver) = pod.record.driver.clone() {
            let id = id.to_owned();
            let _ = tokio::task::spawn_blocking(move || driver.forget(&id)).await;
        }
        self.tell_stopped(container).await;
        let turn = self.turn().await;
        if let Some(turn) = &turn {
            let tell = || self.tell_after(turn, Event::RemoveContainer, container);
            container.removal_told.get_or_init(tell).await;
        }
        let record_trash = pod.containers_dir().join(format!(".removed-{id}"));
        rename_if_there(&container.dir, &record_trash)?;
        let layers = self.layers_dir();
        let layers_trash = layers.join(format!(".removed-{id}"));
        rename_if_there(&layers.join(id), &layers_trash)?;
        let _ = std::fs::remove_file(pod.dir.join("exits").join(format!("{id}.json")));
        self.containers.remove(id);
        pod.remove_cell(id);
        container.release_images();
        self.ledger.forget(id);
        self.container_names.release(&container.name(), id);
        self.sweep_later(record_trash);
        self.sweep_later(layers_trash);
        pod.happened(Kind::Deleted, id);
        tracing::info!(pod = pod.id(), container = id, "container removed");
        Ok(())
    }

    /// How long the keeper may take to delete a container.
    fn delete_timeout(&self, container: &Container) -> Duration {
        self.config().limits.delete_timeout + container.poststop()
    }

    /// Runs the hooks that come after a container's end, unless its keeper has done so.
    async fn poststop(&self, container: &Arc<Container>) {
        if container.poststop().is_zero() {
            return;
        }
        let dir = container.dir.clone();
        let run = tokio::task::spawn_blocking(move || hooks::run_poststop(&dir));
        for warning in run.await.unwrap_or_else(|e| vec![e.to_string()]) {
            tracing::warn!(container = container.id(), warning);
        }
    }

    /// Removes a directory that nobody knows any more, off everybody's path. What fails is tried again at
    /// the next start.
    pub(super) fn sweep_later(&self, dir: PathBuf) {
        self.tasks.spawn_blocking(move || {
            let problems = leftovers::remove_tree(&dir);
            if !problems.is_empty() {
                tracing::error!(
                    problems = problems.join("; "),
                    "can't remove what was discarded"
                );
            }
        });
    }
}

/// The error for a call that needs a ready pod.
pub(super) fn not_ready(pod: &Pod) -> PodError {
    PodError::PodNotReady {
        id: pod.id().to_owned(),
        state: pod.stage().as_str(),
    }
}

/// Renames a directory unless it is gone already.
pub(super) fn rename_if_there(
    from: &std::path::Path,
    to: &std::path::Path,
) -> Result<(), PodError> {
    match std::fs::rename(from, to) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(file("remove", from)(e)),
        _ => Ok(()),
    }
}
