//! UpdateContainerResources and UpdatePodSandboxResources.

use std::sync::Arc;

use slipway_nri::api::Event;
use slipway_proto::cri::LinuxContainerResources;
use slipway_proto::keeper::ErrorKind;

use super::container::Container;
use super::error::PodError;
use super::lifecycle::not_ready;
use super::node::Node;
use super::record;
use super::sandbox::Sizes;
use super::state::{PodStage, Stage};

impl Node {
    /// Changes the limits of a created or running container: those that `change` names, and no others.
    ///
    /// # Errors
    /// For values that can't be, memory in use beyond the new limit, a container that has ended, a keeper that
    /// is too old for it. Nothing is changed then.
    pub async fn resize_container(
        self: &Arc<Self>,
        id: &str,
        change: LinuxContainerResources,
    ) -> Result<(), PodError> {
        let container = self.container(id)?;
        let node = self.clone();
        self.complete("UpdateContainerResources", async move {
            let turn = node.turn().await;
            let change = match &turn {
                Some(turn) => node.tell_resize(turn, &container, change).await?,
                None => change,
            };
            node.resize(&container, &change).await?;
            if let Some(turn) = &turn {
                node.tell_after(turn, Event::PostUpdateContainer, &container)
                    .await;
            }
            Ok(())
        })
        .await
    }

    async fn resize(
        &self,
        container: &Arc<Container>,
        change: &LinuxContainerResources,
    ) -> Result<(), PodError> {
        // One at a time, and none while it is started or removed.
        let _turn = container.turn.lock().await;
        self.write_limits(container, change).await
    }

    /// The same, for who has the container's turn.
    pub(super) async fn write_limits(
        &self,
        container: &Container,
        change: &LinuxContainerResources,
    ) -> Result<(), PodError> {
        let id = container.id();
        let stage = container.stage();
        if stage == Stage::Exited {
            return Err(PodError::WrongState {
                id: id.to_owned(),
                state: stage.as_str(),
                needs: "only a created or running container has limits to change",
            });
        }
        let new =
            slipway_spec::resize(&container.resources(), change, &self.host).map_err(|source| {
                PodError::Spec {
                    what: format!("the new limits of container {id}"),
                    source,
                }
            })?;
        for warning in &new.warnings {
            tracing::warn!(container = id, warning);
        }
        if let Some(pod) = self.pods.get(&container.record.pod_id) {
            let limit = new.effective.memory_limit_in_bytes;
            super::assemble::enough_memory(&self.config(), &pod, id, limit)?;
        }
        let resources = serde_json::to_vec(&new.changes)
            .map_err(|e| PodError::Invalid(format!("the new limits can't be written: {e}")))?;
        let timeout = self.config().limits.start_timeout;
        let updated = container.keeper.update(id, resources, timeout).await;
        updated.map_err(|source| match source.kind() {
            ErrorKind::Unsupported => PodError::Unsupported(format!(
                "the pod of container {id} was started by an older Slipway, whose keeper can't change \
                 limits; restart the pod"
            )),
            _ => PodError::Keeper {
                action: "change the limits of",
                what: format!("container {id}"),
                source,
            },
        })?;
        container.set_resources(new.effective.clone());
        let mut record = container.record.clone();
        record.resources = new.effective;
        record::write(&container.dir, &record)?;
        tracing::info!(container = id, changes = ?new.changes, "limits changed");
        Ok(())
    }

    /// Takes over the resources of a pod as a whole. Its cgroup is the kubelet's, who changes that itself; here
    /// they are checked and kept.
    ///
    /// # Errors
    /// For negative values and for a pod that is not ready.
    pub async fn resize_pod(self: &Arc<Self>, id: &str, to: Sizes) -> Result<(), PodError> {
        let pod = self.pod(id)?;
        for (name, resources) in [("overhead", &to.overhead), ("resources", &to.resources)] {
            sensible(name, resources.as_ref())?;
        }
        let _order = pod.shared().await;
        if pod.stage() != PodStage::Ready {
            return Err(not_ready(&pod));
        }
        let turn = self.turn().await;
        if let Some(turn) = &turn {
            self.tell_resize_pod(turn, &pod, &to).await?;
        }
        record::write(&pod.dir, &pod.resize(to))?;
        if let Some(turn) = &turn {
            self.tell_of_pod(turn, Event::PostUpdatePodSandbox, &pod)
                .await;
        }
        tracing::info!(pod = pod.id(), "resources of the pod taken over");
        Ok(())
    }
}

fn sensible(name: &str, resources: Option<&LinuxContainerResources>) -> Result<(), PodError> {
    let Some(r) = resources else { return Ok(()) };
    let fields = [
        ("cpu_period", r.cpu_period, 0),
        ("cpu_quota", r.cpu_quota, -1),
        ("cpu_shares", r.cpu_shares, 0),
        ("memory_limit_in_bytes", r.memory_limit_in_bytes, -1),
        (
            "memory_swap_limit_in_bytes",
            r.memory_swap_limit_in_bytes,
            -1,
        ),
    ];
    match fields.into_iter().find(|(_, value, least)| value < least) {
        Some((field, value, least)) => Err(PodError::Invalid(format!(
            "{name}.{field}: {value} is not possible; it must be at least {least}"
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_sizes_are_named() {
        let of = |cpu_quota, memory_limit_in_bytes| {
            sensible(
                "overhead",
                Some(&LinuxContainerResources {
                    cpu_quota,
                    memory_limit_in_bytes,
                    ..Default::default()
                }),
            )
        };
        assert!(sensible("overhead", None).is_ok());
        assert!(of(-1, 1).is_ok());
        let error = of(0, -2).unwrap_err().to_string();
        assert!(error.contains("overhead.memory_limit_in_bytes"), "{error}");
    }
}
