//! StopPodSandbox and RemovePodSandbox.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use slipway_nri::api::Event;

use super::error::{PodError, chain};
use super::events;
use super::feed::Kind;
use super::leftovers;
use super::lifecycle::rename_if_there;
use super::node::Node;
use super::record;
use super::recovery::names_in;
use super::sandbox::Pod;
use super::state::{PodStage, Stage};

impl Node {
    /// Ends every process of a pod and gives its network back. Unknown and stopped pods are fine.
    ///
    /// # Errors
    /// What could not be ended; another call tries again.
    pub async fn stop_pod(self: &Arc<Self>, id: &str) -> Result<(), PodError> {
        let Some(pod) = self.find_pod(id)? else {
            return Ok(());
        };
        let node = self.clone();
        self.complete("StopPodSandbox", async move { node.take_down(&pod).await })
            .await
    }

    /// Removes a pod with its containers, by force if they run. Unknown pods are fine.
    ///
    /// # Errors
    /// What could not be removed; another call tries again.
    pub async fn remove_pod(self: &Arc<Self>, id: &str) -> Result<(), PodError> {
        let Some(pod) = self.find_pod(id)? else {
            return Ok(());
        };
        let node = self.clone();
        self.complete(
            "RemovePodSandbox",
            async move { node.clear_away(&pod).await },
        )
        .await
    }

    async fn take_down(&self, pod: &Arc<Pod>) -> Result<(), PodError> {
        // From here on nothing new begins in the pod.
        pod.advance(PodStage::NotReady);
        // What is being created is ended, too, so that the exclusive part needs no patience.
        self.end_everything(pod, true).await?;
        let _alone = pod.exclusive().await;
        if pod.stage() == PodStage::Stopped {
            return Ok(());
        }
        self.end_everything(pod, false).await?;
        // Its network and namespaces are still there to be looked at.
        self.tell_pod_stopped(pod).await;
        self.give_addresses_back(&pod.record).await;
        self.cni
            .del(pod.id(), None)
            .await
            .map_err(|source| PodError::Network {
                action: "give back",
                id: pod.id().to_owned(),
                source,
            })?;
        self.end_keeper(pod).await?;
        events::settle(pod);
        let mut stopped = pod.record_now();
        stopped.stopped = true;
        record::write(&pod.dir, &stopped)?;
        pod.advance(PodStage::Stopped);
        pod.ended();
        tracing::info!(pod = pod.id(), "pod sandbox stopped");
        Ok(())
    }

    /// Ends all containers side by side; `creators`: also those that are still being made.
    async fn end_everything(&self, pod: &Arc<Pod>, creators: bool) -> Result<(), PodError> {
        let alive = pod
            .cells()
            .into_iter()
            .filter(|(_, cell)| cell.status.borrow().stage != Stage::Exited);
        let ends = alive.map(|(id, _)| async move {
            match self.containers.get(&id) {
                Some(container) => self.kill(pod, &container).await,
                None if creators => {
                    let timeout = self.config().limits.delete_timeout;
                    if let Err(e) = pod.keeper.delete(&id, timeout).await {
                        tracing::warn!(
                            pod = pod.id(),
                            container = id,
                            error = chain(&e),
                            "can't end the creation of a container"
                        );
                    }
                    Ok(())
                }
                None => Ok(()),
            }
        });
        join_all(ends).await.into_iter().collect()
    }

    /// Ends the keeper with all namespaces; bypasses it when it does not obey.
    async fn end_keeper(&self, pod: &Arc<Pod>) -> Result<(), PodError> {
        let containers = self.containers_of(pod.id());
        let hooks: Duration = containers.iter().map(|c| c.poststop()).sum();
        let teardown = pod
            .keeper
            .teardown(self.config().limits.delete_timeout + hooks);
        let obeyed = teardown.await;
        if let Err(e) = &obeyed {
            tracing::error!(
                pod = pod.id(),
                error = chain(e),
                "the keeper can't take its pod down"
            );
        }
        let (id, dir, cgroup) = (
            pod.id().to_owned(),
            pod.dir.clone(),
            pod.record.cgroup.clone(),
        );
        let made_cgroup = pod.record.made_cgroup;
        let init = pod.record.namespaces.pid.clone();
        let sweep = tokio::task::spawn_blocking(move || {
            if obeyed.is_err() {
                leftovers::kill_keeper(&id, &dir);
                super::shim::end(&id, &dir);
            }
            // Nothing, if the keeper obeyed: then the namespace is gone.
            if !init.is_empty() {
                leftovers::kill_pid_namespace(Path::new(&init));
            }
            leftovers::remove_pod_cgroup(&cgroup, made_cgroup);
            leftovers::unmount_below(&dir).err().unwrap_or_default()
        });
        let problems = sweep.await.unwrap_or_else(|e| vec![e.to_string()]);
        if problems.is_empty() {
            return Ok(());
        }
        Err(PodError::Incomplete {
            what: format!("pod sandbox {}", pod.id()),
            problems,
        })
    }

    async fn clear_away(&self, pod: &Arc<Pod>) -> Result<(), PodError> {
        if pod.stage() != PodStage::Stopped {
            self.take_down(pod).await?;
        }
        let _alone = pod.exclusive().await;
        if self.pods.get(pod.id()).is_none() {
            return Ok(());
        }
        for container in self.containers_of(pod.id()) {
            self.discard(pod, &container).await?;
        }
        // Of containers whose records were set aside nobody knows more than their directory.
        for id in names_in(&pod.containers_dir()) {
            let layers = self.layers_dir();
            let trash = layers.join(format!(".removed-{id}"));
            rename_if_there(&layers.join(&id), &trash)?;
            self.sweep_later(trash);
            if let Some(driver) = pod.record.driver.clone() {
                let _ = tokio::task::spawn_blocking(move || driver.forget(&id)).await;
            }
        }
        let turn = self.turn().await;
        if let Some(turn) = &turn {
            self.tell_of_pod(turn, Event::RemovePodSandbox, pod).await;
        }
        // By rename: a daemon that dies here leaves no half pod that looks like a whole one.
        let trash = self.pods_dir().join(format!(".removed-{}", pod.id()));
        rename_if_there(&pod.dir, &trash)?;
        self.pods.remove(pod.id());
        self.levels.release(pod.id());
        self.pod_names.release(&pod.name(), pod.id());
        pod.happened(Kind::Deleted, pod.id());
        self.sweep_later(trash);
        tracing::info!(pod = pod.id(), "pod sandbox removed");
        Ok(())
    }
}
