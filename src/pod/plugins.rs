//! NRI plugins: what they hear of pods and containers, and what is done about what they wish.
//!
//! Where no plugin wants to hear of something nothing is described, and nothing waits.

mod describe;

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use slipway_config::Config;
use slipway_nri::api::{self, Event};
use slipway_nri::{Created, Nri, NriError, Runtime, Settings, Turn, ValidatorSettings};
use slipway_proto::cri;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::assemble::{self, Assembled};
use super::container::Container;
use super::error::PodError;
use super::names::title;
use super::node::Node;
use super::record::PodRecord;
use super::sandbox::{Pod, Sizes};
use super::state::Stage;

/// How long a plugin's update waits for a container that is being started or resized. Less than a plugin may take
/// to answer: it may ask while it is asked about that container.
const UPDATE_PATIENCE: Duration = Duration::from_secs(1);

/// The plugins as the configuration has them; `None`: there shall be none.
pub(super) fn of(config: &Config) -> Option<Arc<Nri>> {
    let nri = &config.nri;
    nri.enable.then(|| {
        Nri::new(Settings {
            runtime: ("slipway".to_owned(), crate::VERSION.to_owned()),
            socket: nri.connections.then(|| nri.socket_path.clone()),
            plugin_dir: nri.plugin_dir.clone(),
            config_dir: nri.config_dir.clone(),
            registration_timeout: nri.registration_timeout,
            request_timeout: nri.request_timeout,
            validator: ValidatorSettings {
                enable: nri.validate,
                reject_oci_hooks: nri.reject_oci_hooks,
                reject_runtime_default_seccomp: nri.reject_runtime_default_seccomp,
                reject_unconfined_seccomp: nri.reject_unconfined_seccomp,
                reject_custom_seccomp: nri.reject_custom_seccomp,
                reject_namespaces: nri.reject_namespaces,
                reject_sysctls: nri.reject_sysctls,
                required_plugins: nri.required_plugins.clone(),
                tolerate_missing_annotation: nri.tolerate_missing_annotation.clone(),
            },
        })
    })
}

fn failed(what: String) -> impl FnOnce(NriError) -> PodError {
    move |source| PodError::Plugin { what, source }
}

/// What was said to plugins about a container that is being created.
pub(super) struct Announced {
    turn: Turn,
    pod: api::PodSandbox,
    container: api::Container,
}

impl Node {
    /// Starts the plugins that are installed and lets others connect, until `ended`. Called once, when all pods
    /// are known and before any is asked for.
    ///
    /// # Errors
    /// For a directory, a configuration or a socket that can't be used.
    pub async fn start_plugins(self: &Arc<Self>, ended: CancellationToken) -> Result<(), NriError> {
        let Some(nri) = &self.nri else { return Ok(()) };
        let (ends, mut heard) = mpsc::unbounded_channel();
        self.feed.tell_ends(ends);
        let node = Arc::downgrade(self);
        tokio::spawn(async move {
            while let Some(id) = heard.recv().await {
                let Some(node) = node.upgrade() else { return };
                if let Some(container) = node.containers.get(&id) {
                    node.tell_stopped(&container).await;
                }
            }
        });
        nri.start(Arc::new(Face(Arc::downgrade(self))), ended).await
    }

    /// Says goodbye to plugins.
    pub async fn stop_plugins(&self) {
        if let Some(nri) = &self.nri {
            nri.stop().await;
        }
    }

    /// Takes a turn: see [`Nri::turn`].
    pub(super) async fn turn(&self) -> Option<Turn> {
        match &self.nri {
            Some(nri) => Some(nri.turn().await),
            None => None,
        }
    }

    /// Tells of a pod that is about to be ready. The turn is to be held until it is.
    pub(super) async fn tell_run(&self, record: &PodRecord) -> Result<Option<Turn>, PodError> {
        let Some(turn) = self.turn().await else {
            return Ok(None);
        };
        if turn.wants(Event::RunPodSandbox) {
            let pod = describe::pod(record);
            let told = turn.notify(Event::RunPodSandbox, &pod, None).await;
            if let Err(error) = told {
                Self::take_back(&turn, &pod, None).await;
                return Err(failed(format!("run pod sandbox {}", record.id))(error));
            }
        }
        Ok(Some(turn))
    }

    /// Tells that a pod, or a container, is not made after all.
    async fn take_back(turn: &Turn, pod: &api::PodSandbox, container: Option<&api::Container>) {
        let events = match container {
            None => [Event::StopPodSandbox, Event::RemovePodSandbox],
            Some(_) => [Event::StopContainer, Event::RemoveContainer],
        };
        for event in events {
            let told = match container {
                Some(container) if event == Event::StopContainer => {
                    turn.stopped(pod, container).await.map(drop)
                }
                _ => turn.notify(event, pod, container).await,
            };
            if let Err(error) = told {
                tracing::warn!(%error, event = event.as_str_name(), "a plugin fails at the end of what was not made");
            }
        }
    }

    /// Tells that the pod, told of before, is not made after all.
    pub(super) async fn untell_run(&self, turn: Option<&Turn>, record: &PodRecord) {
        if let Some(turn) = turn
            .filter(|turn| turn.wants(Event::RemovePodSandbox) || turn.wants(Event::StopPodSandbox))
        {
            Self::take_back(turn, &describe::pod(record), None).await;
        }
    }

    /// Asks about a container that is to be created, and makes it what plugins want.
    pub(super) async fn tell_create(
        self: &Arc<Self>,
        pod: &Pod,
        id: &str,
        config: &cri::ContainerConfig,
        image: &slipway_image::Image,
        ready: Assembled,
    ) -> Result<(Assembled, Option<Announced>), PodError> {
        let Some(turn) = self.turn().await else {
            return Ok((ready, None));
        };
        let record = pod.record_now();
        let mut said = Announced {
            pod: api::PodSandbox::default(),
            container: api::Container::default(),
            turn,
        };
        if !said.turn.wants(Event::CreateContainer) {
            return Ok((ready, Some(said)));
        }
        said.pod = describe::pod(&record);
        said.container = describe::new_container(&record, id, config, &ready.plan, image);
        let asked = said.turn.create(&said.pod, said.container.clone()).await;
        let adjusted = match asked {
            Ok(Created {
                adjust,
                update,
                evict,
            }) => {
                self.apply(update).await;
                self.evict(evict);
                assemble::adjusted(self, pod, id, config, ready, &adjust)
            }
            Err(error) => Err(failed(format!("create {}", title(config)))(error)),
        };
        match adjusted {
            Ok(ready) => Ok((ready, Some(said))),
            Err(error) => {
                self.untell_create(Some(&said)).await;
                Err(error)
            }
        }
    }

    /// Tells that the container, told of before, is not made after all.
    pub(super) async fn untell_create(&self, said: Option<&Announced>) {
        if let Some(said) = said.filter(|said| !said.container.id.is_empty()) {
            Self::take_back(&said.turn, &said.pod, Some(&said.container)).await;
        }
    }

    /// Tells that the container is created.
    pub(super) async fn tell_created(&self, said: Option<&Announced>, container: &Arc<Container>) {
        if let Some(said) = said {
            self.tell_after(&said.turn, Event::PostCreateContainer, container)
                .await;
        }
    }

    /// Tells of something about a container that plugins can refuse.
    pub(super) async fn tell(
        &self,
        turn: Option<&Turn>,
        event: Event,
        container: &Container,
    ) -> Result<(), PodError> {
        let Some(turn) = turn.filter(|turn| turn.wants(event)) else {
            return Ok(());
        };
        let Some((pod, described)) = self.described(container) else {
            return Ok(());
        };
        let told = turn.notify(event, &pod, Some(&described)).await;
        told.map_err(failed(format!(
            "go on with {}",
            title(&container.record.config)
        )))
    }

    /// Tells of something about a container that has happened: a refusal is only logged.
    pub(super) async fn tell_after(&self, turn: &Turn, event: Event, container: &Container) {
        if let Err(error) = self.tell(Some(turn), event, container).await {
            tracing::warn!(
                container = container.id(),
                event = event.as_str_name(),
                error = error.chain(),
                "an NRI plugin fails at what has happened already"
            );
        }
    }

    /// Tells, once, that a container has ended.
    pub(super) async fn tell_stopped(&self, container: &Container) {
        let Some(nri) = &self.nri else { return };
        let tell = || async {
            let turn = nri.turn().await;
            if !turn.wants(Event::StopContainer) {
                return;
            }
            let Some((pod, described)) = self.described(container) else {
                return;
            };
            match turn.stopped(&pod, &described).await {
                Ok(updates) => self.apply(updates).await,
                Err(error) => {
                    tracing::warn!(container = container.id(), %error, "an NRI plugin fails at a container's end");
                    Vec::new()
                }
            };
        };
        container.end_told.get_or_init(tell).await;
    }

    /// Tells, once, that a pod's containers have all ended.
    pub(super) async fn tell_pod_stopped(&self, pod: &Pod) {
        let Some(nri) = &self.nri else { return };
        let tell = || async {
            for container in self.containers_of_pod(pod) {
                self.tell_stopped(&container).await;
            }
            let turn = nri.turn().await;
            self.tell_of_pod(&turn, Event::StopPodSandbox, pod).await;
        };
        pod.stop_told.get_or_init(tell).await;
    }

    /// Tells of something about a pod that has happened.
    pub(super) async fn tell_of_pod(&self, turn: &Turn, event: Event, pod: &Pod) {
        if !turn.wants(event) {
            return;
        }
        let described = describe::pod(&pod.record_now());
        if let Err(error) = turn.notify(event, &described, None).await {
            tracing::warn!(pod = pod.id(), event = event.as_str_name(), %error, "an NRI plugin fails");
        }
    }

    /// Asks about new limits of a container: what they shall be.
    pub(super) async fn tell_resize(
        self: &Arc<Self>,
        turn: &Turn,
        container: &Container,
        change: cri::LinuxContainerResources,
    ) -> Result<cri::LinuxContainerResources, PodError> {
        if !turn.wants(Event::UpdateContainer) || container.stage() == Stage::Exited {
            return Ok(change);
        }
        let Some((pod, described)) = self.described(container) else {
            return Ok(change);
        };
        let what = format!("the new limits of container {}", container.id());
        let asked = turn
            .update(&pod, &described, describe::resources(&change))
            .await;
        let updated = asked.map_err(failed(format!(
            "change the limits of container {}",
            container.id()
        )))?;
        self.apply(updated.update).await;
        self.evict(updated.evict);
        let limits = slipway_spec::limits_of("linux_resources", &updated.resources);
        let limits = limits.map_err(|source| PodError::Spec { what, source })?;
        Ok(cri::LinuxContainerResources {
            oom_score_adj: change.oom_score_adj,
            ..limits
        })
    }

    /// Asks about new sizes of a pod.
    pub(super) async fn tell_resize_pod(
        &self,
        turn: &Turn,
        pod: &Pod,
        to: &Sizes,
    ) -> Result<(), PodError> {
        if !turn.wants(Event::UpdatePodSandbox) {
            return Ok(());
        }
        let resources =
            |of: &Option<cri::LinuxContainerResources>| of.as_ref().map(describe::resources);
        let described = describe::pod(&pod.record_now());
        let asked = turn.update_pod(
            &described,
            resources(&to.overhead),
            resources(&to.resources),
        );
        asked.await.map_err(failed(format!(
            "change the resources of pod sandbox {}",
            pod.id()
        )))
    }

    /// A container and its pod as plugins see them; `None` when the pod is gone.
    fn described(&self, container: &Container) -> Option<(api::PodSandbox, api::Container)> {
        let pod = self.pods.get(&container.record.pod_id)?;
        let record = pod.record_now();
        Some((
            describe::pod(&record),
            describe::container(&record, container),
        ))
    }

    /// Makes the updates that plugins want, and returns those that could not be made.
    async fn apply(&self, updates: Vec<api::ContainerUpdate>) -> Vec<api::ContainerUpdate> {
        let mut failed = Vec::new();
        for update in updates {
            let Err(error) = self.apply_one(&update).await else {
                continue;
            };
            tracing::warn!(
                container = update.container_id,
                error = error.chain(),
                ignored = update.ignore_failure,
                "an update that an NRI plugin asks for can't be made"
            );
            if !update.ignore_failure {
                failed.push(update);
            }
        }
        failed
    }

    async fn apply_one(&self, update: &api::ContainerUpdate) -> Result<(), PodError> {
        // By its whole id: plugins abbreviate nothing.
        let container = self.containers.get(&update.container_id);
        let container = container.ok_or_else(|| PodError::NoContainer {
            id: update.container_id.clone(),
        })?;
        let resources = update
            .linux
            .as_ref()
            .and_then(|linux| linux.resources.as_ref());
        let Some(resources) = resources else {
            return Ok(());
        };
        let change = slipway_spec::limits_of("update.linux.resources", resources);
        let change = change.map_err(|source| PodError::Spec {
            what: format!("the new limits of container {}", container.id()),
            source,
        })?;
        let turn = tokio::time::timeout(UPDATE_PATIENCE, container.turn.lock()).await;
        let Ok(_turn) = turn else {
            return Err(PodError::WrongState {
                id: container.id().to_owned(),
                state: "being started, resized or removed",
                needs: "its limits can only be changed when it is not",
            });
        };
        self.write_limits(&container, &change).await
    }

    /// Ends the containers that plugins want to be gone, in the background.
    fn evict(self: &Arc<Self>, evictions: Vec<api::ContainerEviction>) {
        for eviction in evictions {
            if self.containers.get(&eviction.container_id).is_none() {
                continue;
            }
            let node = self.clone();
            self.tasks.spawn(async move {
                tracing::info!(
                    container = eviction.container_id,
                    reason = eviction.reason,
                    "an NRI plugin evicts a container"
                );
                if let Err(error) = node.stop_container(&eviction.container_id, 0).await {
                    tracing::warn!(
                        container = eviction.container_id,
                        error = error.chain(),
                        "a container that an NRI plugin evicts can't be stopped"
                    );
                }
            });
        }
    }
}

/// What plugins see of the node.
struct Face(Weak<Node>);

impl Runtime for Face {
    fn inventory(&self) -> BoxFuture<'static, (Vec<api::PodSandbox>, Vec<api::Container>)> {
        let node = self.0.clone();
        // Of each container a file is read.
        let look = move || {
            let Some(node) = node.upgrade() else {
                return Default::default();
            };
            let pods = node.pods.all();
            let pods = pods
                .iter()
                .map(|pod| describe::pod(&pod.record_now()))
                .collect();
            let mut all = node.containers.all();
            all.retain(|container| container.stage() != Stage::Exited);
            let containers = all.iter().filter_map(|container| node.described(container));
            (pods, containers.map(|(_, container)| container).collect())
        };
        async move { tokio::task::spawn_blocking(look).await.unwrap_or_default() }.boxed()
    }

    fn update(
        &self,
        updates: Vec<api::ContainerUpdate>,
    ) -> BoxFuture<'static, Vec<api::ContainerUpdate>> {
        let node = self.0.clone();
        async move {
            match node.upgrade() {
                Some(node) => node.apply(updates).await,
                None => updates,
            }
        }
        .boxed()
    }

    fn evict(&self, evictions: Vec<api::ContainerEviction>) -> BoxFuture<'static, ()> {
        let node = self.0.clone();
        async move {
            if let Some(node) = node.upgrade() {
                node.evict(evictions);
            }
        }
        .boxed()
    }
}
