//! CreateContainer: from the kubelet's configuration to an init that waits for the start.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slipway_image::{Image, ImageLease};
use slipway_observe::disk::{Ledger, UPPER, WORK};
use slipway_proto::{cri, keeper};
use slipway_runtime::hooks;

use super::assemble::{self, Assembled};
use super::container::Container;
use super::error::{PodError, chain, file};
use super::events;
use super::leftovers;
use super::lifecycle::not_ready;
use super::names::{container_name, title};
use super::node::{Node, new_id, now};
use super::phases::{Phases, Trace, describe};
use super::record::{self, ContainerRecord, PodRecord};
use super::restore::Checkpoint;
use super::sandbox::{Cell, Pod};
use super::state::{PodStage, Status};

/// What a keeper may take to end a runtime that did not end in time.
pub const AFTER_RUNTIME: Duration = Duration::from_secs(20);
/// Directory beside a container's writable layer that stands for the layers of an image without any.
const EMPTY: &str = "lower";

impl Node {
    /// Creates a container and returns its id. Goes on to its end if the caller gives up; the same request
    /// then gets the finished container.
    ///
    /// # Errors
    /// What is wrong with the request, or which step failed; nothing is left of the container then.
    pub async fn create_container(
        self: &Arc<Self>,
        mut request: cri::CreateContainerRequest,
    ) -> Result<String, PodError> {
        let missing = |what: &str| PodError::Invalid(format!("CreateContainer needs {what}"));
        let pod = self.pod(&request.pod_sandbox_id)?;
        pod.id().clone_into(&mut request.pod_sandbox_id);
        let config = request.config.as_ref().ok_or_else(|| missing("a config"))?;
        let metadata = config
            .metadata
            .as_ref()
            .ok_or_else(|| missing("config.metadata"))?;
        if metadata.name.is_empty() {
            return Err(missing("config.metadata with a name"));
        }
        if config
            .image
            .as_ref()
            .is_none_or(|image| image.image.is_empty())
        {
            return Err(missing("config.image"));
        }
        let name = container_name(pod.id(), &metadata.name, metadata.attempt);
        let make = self.clone().make_container(pod, request.clone());
        self.container_names.make(&name, request, make).await
    }

    async fn make_container(
        self: Arc<Self>,
        pod: Arc<Pod>,
        request: cri::CreateContainerRequest,
    ) -> Result<String, PodError> {
        let phases = Phases::start();
        let _order = pod.shared().await;
        if pod.stage() != PodStage::Ready {
            return Err(not_ready(&pod));
        }
        let mut config = request.config.unwrap_or_default();
        let asked = config.image.clone().unwrap_or_default();
        let (lease, checkpoint) = match self.checkpoint_of(&asked.image)? {
            None => (self.lease(&asked.image)?, None),
            Some(source) => {
                // A large future, which ordinary containers are not to carry along.
                if pod.record.driver.is_some() {
                    return Err(PodError::Unsupported(format!(
                        "containers are restored by the handler \"native\" only, and the pod's is {:?}",
                        pod.record.runtime
                    )));
                }
                let opened = Box::pin(self.open_checkpoint(&asked.image, source));
                let (checkpoint, base) = opened.await?;
                checkpoint.complete(&mut config, base.image());
                (base, Some(checkpoint))
            }
        };
        if let Some(kind) = lease.image().artifact.clone() {
            return Err(PodError::Image {
                action: "run",
                image: asked.image,
                source: slipway_image::ImageError::Artifact { kind },
            });
        }
        // Before anything is made, so that a volume's image that is missing costs nothing.
        let volumes = config
            .mounts
            .iter()
            .filter_map(|mount| mount.image.as_ref());
        let volumes = volumes
            .filter(|image| !image.image.is_empty())
            .map(|image| self.lease(&image.image));
        let volumes = volumes.collect::<Result<Vec<_>, _>>()?;
        let id = new_id()?;
        let ready = self.assemble(&pod, &id, &config, lease.image()).await?;
        let (ready, said) = (self.tell_create(&pod, &id, &config, lease.image(), ready)).await?;
        // Known to the event stream and to a stop of the pod from here on, but to no list.
        let cell = pod.add_cell(&id, &ready.cgroup, Status::created(now(), 0));
        match self
            .build(
                &pod,
                &id,
                config,
                ready,
                (lease, checkpoint),
                volumes,
                cell.clone(),
                phases,
            )
            .await
        {
            Ok(container) => {
                let laps = container.record.phases.clone();
                tracing::info!(
                    pod = pod.id(),
                    container = id,
                    image = container.record.image_name,
                    phases = describe(&laps),
                    "container created"
                );
                self.containers.insert(&id, container.clone());
                cell.announce(&container);
                self.tell_created(said.as_ref(), &container).await;
                drop(said);
                self.traces.add(Trace {
                    method: "CreateContainer",
                    pod_id: pod.id().to_owned(),
                    container_id: id.clone(),
                    ended_at: now(),
                    phases: laps,
                });
                Ok(id)
            }
            Err(error) => {
                // The answer names no id: it is another one each time that the kubelet tries.
                tracing::debug!(
                    pod = pod.id(),
                    container = id,
                    error = error.chain(),
                    "container undone"
                );
                self.undo_container(&pod, &id, &cell).await;
                self.untell_create(said.as_ref()).await;
                Err(error)
            }
        }
    }

    fn lease(&self, image: &str) -> Result<ImageLease, PodError> {
        self.images.lease(image).map_err(|source| PodError::Image {
            action: "use",
            image: image.to_owned(),
            source,
        })
    }

    /// Off the runtime's threads, and with a deadline: a mount's source may be on a dead file system.
    async fn assemble(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        id: &str,
        config: &cri::ContainerConfig,
        image: &Arc<Image>,
    ) -> Result<Assembled, PodError> {
        let timeout = self.config().limits.create_timeout;
        let (node, pod, image) = (self.clone(), pod.clone(), image.clone());
        let (called, own_id, config) = (title(config), id.to_owned(), config.clone());
        let work = tokio::task::spawn_blocking(move || {
            assemble::container(&node, &pod, &own_id, &config, &image)
        });
        match tokio::time::timeout(timeout, work).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(PodError::Lost {
                what: "assembling the container",
            }),
            Err(_) => Err(PodError::Hung {
                container: called,
                timeout,
            }),
        }
    }

    #[allow(clippy::too_many_arguments)] // One call; a struct for it would only name them twice.
    async fn build(
        &self,
        pod: &Arc<Pod>,
        id: &str,
        config: cri::ContainerConfig,
        ready: Assembled,
        (lease, checkpoint): (ImageLease, Option<Checkpoint>),
        volumes: Vec<ImageLease>,
        cell: Arc<Cell>,
        mut phases: Phases,
    ) -> Result<Arc<Container>, PodError> {
        phases.mark("spec");
        let dir = pod.container_dir(id);
        let layers = self.layers_dir().join(id);
        let Assembled {
            mut create,
            mut plan,
            cgroup,
        } = ready;
        let image = lease.image().clone();
        let empty = image.layers.is_empty();
        let ledger = self.ledger.clone();
        make_dirs(&dir, &layers, empty, plan.log_path.as_deref(), ledger).await?;
        phases.mark("prepare");
        let linux = plan.spec.linux().as_ref();
        let selinux_label = linux
            .and_then(|l| l.mount_label().clone())
            .unwrap_or_default();
        create.overlay = Some(keeper::Overlay {
            lower: lower_dirs(&image, &layers),
            upper: layers.join(UPPER).to_string_lossy().into_owned(),
            work: layers.join(WORK).to_string_lossy().into_owned(),
            selinux_label,
        });
        for (volume, lease) in create.image_volumes.iter_mut().zip(&volumes) {
            volume.lower = stacked(lease.image());
        }
        // What the kubelet finds the volume's image by (KEP-5365).
        let images = plan.mounts.iter_mut().filter_map(|m| m.image.as_mut());
        for (image, lease) in images.zip(&volumes) {
            image.image_ref.clone_from(&lease.image().id);
        }
        let hooks = plan.spec.hooks().as_ref();
        let poststart = hooks::patience(hooks.and_then(|h| h.poststart().as_ref()));
        let poststop = hooks::patience(hooks.and_then(|h| h.poststop().as_ref()));
        let mut timeout = self.config().limits.create_timeout;
        if let Some(runtime) = &create.runtime {
            // The keeper ends it in time, and says what the runtime said.
            timeout = Duration::from_millis(runtime.create_timeout_ms) + AFTER_RUNTIME;
        }
        if let Some(checkpoint) = &checkpoint {
            let own = self.config().checkpoint.timeout;
            let patience = u64::try_from(own.as_millis()).unwrap_or(u64::MAX);
            create.restore = Some(checkpoint.move_to(&layers, patience)?);
            timeout = timeout.max(own);
        }
        let made = pod
            .keeper
            .create(create, timeout)
            .await
            .map_err(|source| PodError::Keeper {
                action: "create",
                what: title(&config),
                source,
            })?;
        phases.mark("create");
        let created_at = cell.status.borrow().created_at;
        cell.change(|status| {
            status.pid = if status.finished_at == 0 { made.pid } else { 0 };
            true
        });
        let asked = config.image.clone().unwrap_or_default();
        let mut record = ContainerRecord {
            schema: PodRecord::SCHEMA,
            id: id.to_owned(),
            pod_id: pod.id().to_owned(),
            created_at,
            image_id: image.id.clone(),
            image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
            image_name: image_name(&asked, &image),
            uid: made.uid,
            gid: made.gid,
            groups: made.groups,
            pid: made.pid,
            log_path: plan
                .log_path
                .map(|p| p.to_string_lossy().into_owned())
                .unwrap_or_default(),
            stop_signal: plan.stop_signal,
            cgroup,
            mounts: plan.mounts,
            volume_images: volumes.iter().map(|v| v.image().id.clone()).collect(),
            poststart_ms: milliseconds(poststart),
            poststop_ms: milliseconds(poststop),
            checkpoint: checkpoint.map(|checkpoint| checkpoint.name().to_owned()),
            resources: plan.resources,
            phases: phases.laps().to_vec(),
            config,
        };
        record::write(&dir, &record)?;
        phases.mark("record");
        record.phases = phases.finish();
        Ok(Container::new(
            record,
            dir,
            pod.keeper.clone(),
            cell,
            std::iter::once(lease).chain(volumes).collect(),
        ))
    }

    /// Leaves nothing of a container that could not be made. Every step is tried; what fails is logged.
    async fn undo_container(&self, pod: &Arc<Pod>, id: &str, cell: &Cell) {
        let mut problems = Vec::new();
        if let Err(e) = pod
            .keeper
            .delete(id, self.config().limits.delete_timeout)
            .await
        {
            problems.push(chain(&e));
            problems.extend(
                events::kill_cgroup(cell.cgroup.clone())
                    .await
                    .err()
                    .unwrap_or_default(),
            );
        }
        pod.remove_cell(id);
        let (dir, layers) = (pod.container_dir(id), self.layers_dir().join(id));
        let exit = pod.dir.join("exits").join(format!("{id}.json"));
        let sweep = tokio::task::spawn_blocking(move || {
            let _ = std::fs::remove_file(exit);
            let mut problems = leftovers::remove_tree(&dir);
            problems.extend(leftovers::remove_tree(&layers));
            problems
        });
        problems.extend(sweep.await.unwrap_or_else(|e| vec![e.to_string()]));
        if !problems.is_empty() {
            tracing::error!(
                pod = pod.id(),
                container = id,
                problems = problems.join("; "),
                "a failed container left something behind"
            );
        }
    }
}

/// The name of the image for people: what they wrote, or a tag of it when the kubelet gave only the id.
fn image_name(asked: &cri::ImageSpec, image: &Image) -> String {
    if !asked.user_specified_image.is_empty() {
        return asked.user_specified_image.clone();
    }
    let hex = image.id.strip_prefix("sha256:").unwrap_or(&image.id);
    let by_id = asked.image.starts_with("sha256:") || hex.starts_with(&asked.image);
    match image.repo_tags.first().or(image.repo_digests.first()) {
        Some(name) if by_id => name.clone(),
        _ => asked.image.clone(),
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The image's layers for an overlay, topmost first (images are described base first). The kernel refuses a
/// directory that stands twice: the upper one says all that the other could.
fn stacked(image: &Image) -> Vec<String> {
    let mut seen = std::collections::HashSet::new();
    (image.layers.iter().rev())
        .filter(|layer| seen.insert(&layer.path))
        .map(|layer| layer.path.to_string_lossy().into_owned())
        .collect()
}

/// Those below a container's writable layer. An image without layers is an empty directory.
pub(super) fn lower_dirs(image: &Image, layers: &Path) -> Vec<String> {
    let mut lower = stacked(image);
    if lower.is_empty() {
        lower.push(layers.join(EMPTY).to_string_lossy().into_owned());
    }
    lower
}

/// The writable layer is on a disk, which may make us wait; so this is off the runtime's threads.
async fn make_dirs(
    dir: &Path,
    layers: &Path,
    empty_image: bool,
    log_path: Option<&Path>,
    ledger: Arc<Ledger>,
) -> Result<(), PodError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let (dir, layers) = (dir.to_owned(), layers.to_owned());
    let log_dir = log_path.and_then(Path::parent).map(Path::to_owned);
    let work = move || {
        let mut private = std::fs::DirBuilder::new();
        private.mode(0o700);
        private.create(&dir).map_err(file("create", &dir))?;
        private.create(&layers).map_err(file("create", &layers))?;
        let inner = [WORK, EMPTY].map(|name| layers.join(name));
        for inner in inner.iter().take(if empty_image { 2 } else { 1 }) {
            private.create(inner).map_err(file("create", inner))?;
        }
        // This one is the container's "/": the overlay takes its mode from here.
        let upper = layers.join(UPPER);
        std::fs::DirBuilder::new()
            .mode(0o755)
            .create(&upper)
            .map_err(file("create", &upper))?;
        // While nothing is in there: what is made from now on is on its account.
        if let Err(error) = ledger.open(&layers) {
            let reason = error.to_string();
            tracing::warn!(layer = %layers.display(), reason, "a writable layer has no account and will be walked");
        }
        if let Some(log_dir) = log_dir.filter(|dir| !dir.as_os_str().is_empty()) {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(&log_dir)
                .map_err(file("create the log directory", &log_dir))?;
        }
        Ok(())
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(PodError::Lost {
            what: "making the container's directories",
        }),
    }
}
