//! What a starting daemon finds: pods whose keepers went on without it, dead keepers, half-made things,
//! records it can't read, and the remains of an earlier boot.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::join_all;
use slipway_proto::keeper::ContainerState;
use slipway_runtime::client::{ClientError, Keeper};

use super::container::Container;
use super::error::{PodError, chain, file};
use super::events;
use super::leftovers;
use super::node::Node;
use super::record::{self, ContainerRecord, PodRecord};
use super::sandbox::Pod;
use super::state::{PodStage, Status};

/// What was found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// Pods that are known again.
    pub pods: usize,
    /// Containers likewise.
    pub containers: usize,
    /// Records that were set aside now or earlier.
    pub set_aside: usize,
}

/// What a directory under `pods` or `containers` is.
enum Entry<R> {
    Record(Box<R>),
    SetAside,
    HalfMade,
}

impl Node {
    /// Finds the pods of an earlier daemon and removes what nobody owns. Called once, before serving.
    ///
    /// # Errors
    /// Only when the directories of pods or containers can't be made or listed.
    pub async fn recover(self: &Arc<Self>) -> Result<Recovered, PodError> {
        let (pods, layers) = (self.pods_dir(), self.layers_dir());
        for dir in [&pods, &layers] {
            make_private(dir)?;
        }
        self.keep_accounts();
        for name in names_in(&self.checkpoints_dir()) {
            self.sweep_later(self.checkpoints_dir().join(name));
        }
        // Containers whose layers must stay although nobody here knows them.
        let mut kept = HashSet::new();
        let mut found = Recovered::default();
        let mut valid = Vec::new();
        let mut adoptions = Vec::new();
        for (id, dir) in entries(&pods)? {
            if id.starts_with('.') {
                self.sweep_later(dir);
                continue;
            }
            match look::<PodRecord>(&dir) {
                Entry::Record(record) if record.boot_id != self.boot_id => {
                    tracing::info!(pod = id, "pod of an earlier boot removed");
                    self.sweep_later(dir);
                }
                Entry::Record(record) => {
                    valid.push(id);
                    adoptions.push(self.adopt(*record, dir));
                }
                Entry::SetAside => {
                    found.set_aside += 1;
                    tracing::error!(pod = id, dir = %dir.display(), "the record of this pod can't be read; \
                        it goes on running, unmanaged: mend and rename the record, or stop it and remove the directory");
                    kept.extend(names_in(&dir.join("containers")));
                    valid.push(id);
                }
                Entry::HalfMade => {
                    tracing::info!(pod = id, "half-made pod removed");
                    let keeper = Keeper::at(&id, &dir);
                    if let Err(e) = keeper.teardown(self.config().limits.delete_timeout).await {
                        tracing::error!(
                            pod = id,
                            error = chain(&e),
                            "can't end the keeper of a half-made pod"
                        );
                    }
                    let own_dir = dir.clone();
                    let end = move || leftovers::end_pod(&id, &own_dir);
                    if let Err(error) = tokio::task::spawn_blocking(end).await {
                        tracing::error!(%error, "can't end a half-made pod");
                    }
                    self.sweep_later(dir);
                }
            }
        }
        for adopted in join_all(adoptions).await {
            found.pods += 1;
            found.containers += adopted.containers;
            found.set_aside += adopted.set_aside.len();
            kept.extend(adopted.set_aside);
        }
        for (id, dir) in entries(&layers)? {
            if self.containers.get(&id).is_none() && !kept.contains(&id) {
                self.sweep_later(dir);
            }
        }
        self.collect_networks(valid);
        Ok(found)
    }

    /// Gives back the addresses of pods that are gone, in the background.
    fn collect_networks(self: &Arc<Self>, valid: Vec<String>) {
        let node = self.clone();
        self.tasks.spawn(async move {
            // Before any pod of this daemon can be among them.
            let attached = node.cni.attached().await.unwrap_or_default();
            let runtimes = &node.config().runtimes;
            let others = runtimes.values().filter_map(|r| r.network_conf_dir.clone());
            let others: Vec<_> = others.collect();
            if let Err(e) = node.cni.gc(&valid, &others).await {
                tracing::warn!(
                    error = chain(&e),
                    "can't give back the network of pods that are gone"
                );
                for id in attached.into_iter().filter(|id| !valid.contains(id)) {
                    node.detach_later(id);
                }
            }
        });
    }

    async fn adopt(self: &Arc<Self>, record: PodRecord, dir: PathBuf) -> Adopted {
        let stage = if record.stopped {
            PodStage::Stopped
        } else {
            PodStage::Ready
        };
        if let Some(level) = &record.selinux_level {
            self.levels.restore(&record.id, level);
        }
        let pod = Pod::new(record, &dir, stage, self.feed.clone());
        let mut adopted = Adopted::default();
        let mut half_made = Vec::new();
        for (id, dir) in entries(&pod.containers_dir()).unwrap_or_default() {
            if id.starts_with('.') {
                self.sweep_later(dir);
                continue;
            }
            match look::<ContainerRecord>(&dir) {
                Entry::Record(record) => {
                    self.adopt_container(&pod, *record, dir);
                    adopted.containers += 1;
                }
                Entry::SetAside => {
                    tracing::error!(pod = pod.id(), container = id, dir = %dir.display(),
                        "the record of this container can't be read; it goes on, unmanaged, until its pod is removed");
                    adopted.set_aside.push(id);
                }
                Entry::HalfMade => half_made.push((id, dir)),
            }
        }
        if stage == PodStage::Stopped {
            events::settle(&pod);
        } else {
            let ids = half_made.iter().map(|(id, _)| id.clone()).collect();
            self.ask_keeper(&pod, &adopted.set_aside, ids).await;
        }
        for (id, dir) in half_made {
            tracing::info!(
                pod = pod.id(),
                container = id,
                "half-made container removed"
            );
            self.sweep_later(dir);
        }
        self.pod_names.adopt(&pod.name(), pod.id());
        self.pods.insert(&pod.record.id, pod.clone());
        adopted
    }

    fn adopt_container(self: &Arc<Self>, pod: &Arc<Pod>, record: ContainerRecord, dir: PathBuf) {
        let cell = pod.add_cell(
            &record.id,
            &record.cgroup,
            Status::created(record.created_at, record.pid),
        );
        let images = std::iter::once(&record.image_id).chain(&record.volume_images);
        let leases = images.filter_map(|image| {
            let lease = self.images.lease(image).inspect_err(|e| {
                tracing::warn!(
                    container = record.id,
                    image,
                    error = e.chain(),
                    "an image of a container is gone"
                );
            });
            lease.ok()
        });
        let leases = leases.collect();
        let id = record.id.clone();
        let container = Container::new(record, dir, pod.keeper.clone(), cell.clone(), leases);
        cell.announce(&container);
        self.container_names.adopt(&container.name(), &id);
        self.containers.insert(&id, container);
    }

    /// Learns the truth from the pod's keeper, or from what a dead one left. Ends the `strangers`: what was
    /// still being created.
    async fn ask_keeper(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        unmanaged: &[String],
        mut strangers: BTreeSet<String>,
    ) {
        let asked = async {
            let follow = pod.keeper.subscribe().await?;
            Ok::<_, ClientError>((pod.keeper.snapshot().await?, follow))
        };
        match asked.await {
            Ok((snapshot, follow)) => {
                let told: BTreeMap<String, ContainerState> = snapshot
                    .containers
                    .into_iter()
                    .map(|state| (state.id.clone(), state))
                    .collect();
                for (id, cell) in pod.cells() {
                    let news = told
                        .get(&id)
                        .cloned()
                        .or_else(|| events::exit_file(&pod.dir, &id));
                    cell.change(|status| match &news {
                        Some(news) => status.apply(news),
                        None => {
                            status.lost(super::now(), "the pod's keeper does not know it".into())
                        }
                    });
                }
                let unknown = told.into_keys();
                strangers
                    .extend(unknown.filter(|id| pod.cell(id).is_none() && !unmanaged.contains(id)));
                for id in strangers {
                    let timeout = self.config().limits.delete_timeout;
                    if let Err(e) = pod.keeper.delete(&id, timeout).await {
                        tracing::error!(
                            pod = pod.id(),
                            container = id,
                            error = chain(&e),
                            "can't end a half-made container"
                        );
                    }
                }
                events::follow(pod.clone(), follow);
            }
            Err(error @ ClientError::Timeout { .. }) => {
                tracing::error!(
                    pod = pod.id(),
                    error = chain(&error),
                    "the keeper does not answer; the pod's state is not known until it does"
                );
                events::follow_later(pod.clone());
            }
            Err(error) => {
                tracing::error!(
                    pod = pod.id(),
                    error = chain(&error),
                    "the pod lost its keeper"
                );
                events::keeper_died(pod).await;
            }
        }
    }
}

/// What came of a pod's containers.
#[derive(Default)]
struct Adopted {
    containers: usize,
    set_aside: Vec<String>,
}

fn make_private(dir: &Path) -> Result<(), PodError> {
    use std::os::unix::fs::DirBuilderExt as _;
    use std::os::unix::fs::PermissionsExt;
    // Nobody but root: a container may make a set-uid file in its writable layer, and no user of this host
    // shall reach it. An older version was less strict.
    let mut builder = std::fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .and_then(|()| std::fs::set_permissions(dir, PermissionsExt::from_mode(0o700)))
        .map_err(file("create", dir))
}

fn look<R: serde::de::DeserializeOwned>(dir: &Path) -> Entry<R> {
    match record::read(dir) {
        Ok(Some(record)) => Entry::Record(Box::new(record)),
        Ok(None) if record::is_set_aside(dir) => Entry::SetAside,
        Ok(None) => Entry::HalfMade,
        Err(error) => {
            tracing::error!(
                error = chain(&error),
                "a record can't be read and is set aside"
            );
            if let Err(e) = record::set_aside(dir) {
                tracing::error!(error = chain(&e), "it stays where it is");
            }
            Entry::SetAside
        }
    }
}

/// Names and paths of the directories in a directory. Files among them are nobody's of ours.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>, PodError> {
    let list = std::fs::read_dir(dir).map_err(file("list", dir))?;
    Ok(list
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect())
}

/// The names of the directories in a directory.
pub(super) fn names_in(dir: &Path) -> Vec<String> {
    entries(dir)
        .unwrap_or_default()
        .into_iter()
        .map(|(name, _)| name)
        .collect()
}
