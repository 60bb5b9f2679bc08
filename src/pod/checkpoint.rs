//! CheckpointContainer and CheckpointPod: what runs is frozen, dumped by criu, and goes on; what was dumped
//! becomes an archive. A caller who gives up ends it: the keeper thaws, and nothing is left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::Spec;
use serde::Serialize;
use slipway_observe::disk::UPPER;
use slipway_proto::{cri, keeper};
use slipway_runtime::checkpoint::IMAGES;

use super::container::Container;
use super::create::lower_dirs;
use super::error::{PodError, file};
use super::leftovers;
use super::lifecycle::not_ready;
use super::node::{Node, new_id, now};
use super::sandbox::Pod;
use super::state::{PodStage, Stage};

pub mod archive;
mod tool;
pub mod unpack;

pub use tool::Tool;

/// Longest time that a caller can ask for.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Description of a pod's checkpoint: which archive is which container's. The peers' name.
pub(super) const POD_OPTIONS: &str = "pod.options";
/// The configuration of the pod.
const POD_DUMP: &str = "pod.dump";

/// `pod.options`.
#[derive(Debug, Serialize)]
struct PodOptions {
    version: u32,
    /// Name of a container to the name of its archive without its ending.
    containers: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

/// A directory for what becomes an archive; removed when this goes.
pub(super) struct Staging(PathBuf);

impl Staging {
    pub(super) fn new(root: &Path) -> Result<Self, PodError> {
        std::fs::create_dir_all(root).map_err(file("create", root))?;
        let dir = root.join(new_id()?);
        archive::private_dir(&dir)?;
        Ok(Self(dir))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let problems = leftovers::remove_tree(&self.0);
        if !problems.is_empty() {
            tracing::error!(
                problems = problems.join("; "),
                "a checkpoint left something behind"
            );
        }
    }
}

impl Node {
    /// Where checkpoints are gathered before they are archives.
    pub fn checkpoints_dir(&self) -> PathBuf {
        self.config().state_root.join("checkpoints")
    }

    /// Writes a checkpoint of a running container to `location`. The container goes on running; `timeout` in
    /// seconds, 0: as configured.
    ///
    /// # Errors
    /// Without criu, unless the container runs, when something in it can't be dumped, when the file exists or
    /// can't be written, when time is over.
    pub async fn checkpoint_container(
        self: &Arc<Self>,
        id: &str,
        location: &str,
        timeout: i64,
    ) -> Result<(), PodError> {
        let criu = self.criu().await?;
        let container = self.container(id)?;
        let location = PathBuf::from(location);
        archive::check_target(&location)?;
        let timeout = match u64::try_from(timeout) {
            Ok(0) => self.config().checkpoint.timeout,
            Ok(seconds) => Duration::from_secs(seconds).min(LONGEST),
            Err(_) => {
                let message = format!("a timeout of {timeout} seconds is none");
                return Err(PodError::Invalid(message));
            }
        };
        let pod = self.pod(&container.record.pod_id)?;
        let staging = Staging::new(&self.checkpoints_dir())?;
        let dir = staging.0.join(container.id());
        self.dump(
            &pod,
            std::slice::from_ref(&container),
            &staging,
            criu,
            timeout,
        )
        .await?;
        let target = location.clone();
        // The staging directory stays until the archive is written, even if the caller goes.
        blocking(move || {
            let written = archive::write(&dir, &target);
            drop(staging);
            written
        })
        .await?;
        tracing::info!(
            pod = pod.id(),
            container = container.id(),
            location = %location.display(),
            "container checkpointed"
        );
        Ok(())
    }

    /// Writes one consistent checkpoint of a pod's containers into the directory `path`, which is made unless it
    /// is there and empty: an archive for each, `pod.options` and `pod.dump`. `ids`: all that run, when empty.
    ///
    /// # Errors
    /// As [`Node::checkpoint_container`]; options that are unknown.
    pub async fn checkpoint_pod(
        self: &Arc<Self>,
        request: cri::CheckpointPodRequest,
    ) -> Result<(), PodError> {
        let criu = self.criu().await?;
        let pod = self.pod(&request.pod_sandbox_id)?;
        if let Some(name) = request.options.keys().min() {
            return Err(PodError::Invalid(format!(
                "option {name:?} of CheckpointPod is not known here"
            )));
        }
        if pod.stage() != PodStage::Ready {
            return Err(not_ready(&pod));
        }
        let path = PathBuf::from(&request.output_path);
        check_directory(&path)?;
        let containers = self.chosen(&pod, &request.container_ids)?;
        let mut archives = BTreeMap::new();
        for container in &containers {
            let name = container.metadata().name;
            if archives.insert(name.clone(), container.clone()).is_some() {
                return Err(PodError::Invalid(format!(
                    "two running containers of pod sandbox {} are called {name:?}; name the one by its id",
                    pod.id()
                )));
            }
        }
        let staging = Staging::new(&self.checkpoints_dir())?;
        let timeout = self.config().checkpoint.timeout;
        self.dump(&pod, &containers, &staging, criu, timeout)
            .await?;
        let options = PodOptions {
            version: 1,
            containers: (archives.iter())
                .map(|(name, c)| (name.clone(), c.id().to_owned()))
                .collect(),
            annotations: BTreeMap::from([(
                "org.criu.checkpoint.engine.name".to_owned(),
                "slipway".to_owned(),
            )]),
        };
        let config = sandbox_json(&pod.record.config);
        let out = path.clone();
        blocking(move || write_pod(&staging.0, &out, &options, &config)).await?;
        tracing::info!(
            pod = pod.id(),
            containers = containers.len(),
            path = %path.display(),
            "pod checkpointed"
        );
        Ok(())
    }

    fn chosen(&self, pod: &Pod, ids: &[String]) -> Result<Vec<Arc<Container>>, PodError> {
        let mut chosen: Vec<Arc<Container>> = Vec::new();
        if ids.is_empty() {
            chosen = self.containers_of_pod(pod);
            chosen.retain(|container| container.stage() == Stage::Running);
        }
        for id in ids {
            let container = self.container(id)?;
            if container.record.pod_id != pod.id() {
                return Err(PodError::Invalid(format!(
                    "container {id} is not of pod sandbox {}",
                    pod.id()
                )));
            }
            if !chosen.iter().any(|c| c.id() == container.id()) {
                chosen.push(container);
            }
        }
        if chosen.is_empty() {
            return Err(PodError::NothingRuns {
                id: pod.id().to_owned(),
            });
        }
        Ok(chosen)
    }

    /// Fills a directory of each container's id below the staging directory.
    async fn dump(
        &self,
        pod: &Pod,
        containers: &[Arc<Container>],
        staging: &Staging,
        criu: keeper::Criu,
        timeout: Duration,
    ) -> Result<(), PodError> {
        let what = match containers {
            [one] => format!("container {}", one.id()),
            _ => format!("pod sandbox {}", pod.id()),
        };
        let mut ordered: Vec<_> = containers.to_vec();
        ordered.sort_by(|a, b| a.id().cmp(b.id()));
        let mut turns = Vec::new();
        let mut targets = Vec::new();
        for container in &ordered {
            turns.push(container.turn.lock().await);
            let stage = container.stage();
            if stage != Stage::Running {
                return Err(PodError::WrongState {
                    id: container.id().to_owned(),
                    state: stage.as_str(),
                    needs: "only a running container can be checkpointed",
                });
            }
            let dir = staging.0.join(container.id());
            archive::private_dir(&dir)?;
            targets.push(keeper::CheckpointTarget {
                id: container.id().to_owned(),
                dir: dir.to_string_lossy().into_owned(),
                overlay: Some(self.overlay_of(container)),
            });
        }
        let call = keeper::Checkpoint {
            criu: Some(criu),
            containers: targets,
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        };
        pod.keeper
            .checkpoint(call)
            .await
            .map_err(|source| PodError::Keeper {
                action: "checkpoint",
                what,
                source,
            })?;
        for container in &ordered {
            let container = container.clone();
            let dir = staging.0.join(container.id());
            let (pod_config, handler) = (pod.record.config.clone(), pod.record.runtime.clone());
            blocking(move || describe(&container, &pod_config, &handler, &dir)).await?;
        }
        Ok(())
    }

    fn overlay_of(&self, container: &Container) -> keeper::Overlay {
        let layers = self.layers_dir().join(container.id());
        let image = self.images.resolve(&container.record.image_id);
        keeper::Overlay {
            lower: image.map_or_else(Vec::new, |image| lower_dirs(&image, &layers)),
            upper: layers.join(UPPER).to_string_lossy().into_owned(),
            work: String::new(),
            // Only read, never mounted.
            selinux_label: String::new(),
        }
    }
}

/// Runs what reads and writes files off the runtime's threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PodError> + Send + 'static,
) -> Result<T, PodError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(PodError::Lost {
            what: "writing or reading the checkpoint",
        }),
    }
}

fn check_directory(path: &Path) -> Result<(), PodError> {
    let refuse = |reason: &str| {
        Err(PodError::Invalid(format!(
            "the checkpoint's output path {path:?} {reason}"
        )))
    };
    if !path.is_absolute() {
        return refuse("is no absolute path");
    }
    match std::fs::read_dir(path) {
        Ok(mut entries) => match entries.next() {
            Some(_) => refuse("is not empty"),
            None => Ok(()),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            match path.parent().is_some_and(Path::is_dir) {
                true => Ok(()),
                false => refuse("is in a directory that does not exist"),
            }
        }
        Err(_) => refuse("is no directory that can be read"),
    }
}

/// All or nothing; what says that it is a checkpoint comes last.
fn write_pod(
    staging: &Path,
    path: &Path,
    options: &PodOptions,
    config: &serde_json::Value,
) -> Result<(), PodError> {
    let made = match archive::private_dir(path) {
        Ok(()) => true,
        Err(_) if path.is_dir() => false,
        Err(e) => return Err(e),
    };
    let write = || {
        for id in options.containers.values() {
            archive::write(&staging.join(id), &path.join(format!("{id}.tar")))?;
        }
        write_json(&path.join(POD_DUMP), config)?;
        write_json(&path.join(POD_OPTIONS), options)
    };
    write().inspect_err(|_| {
        for id in options.containers.values() {
            let _ = std::fs::remove_file(path.join(format!("{id}.tar")));
        }
        for name in [POD_DUMP, POD_OPTIONS] {
            let _ = std::fs::remove_file(path.join(name));
        }
        if made {
            let _ = std::fs::remove_dir(path);
        }
    })
}

/// What the peers' tools look for in a pod's description.
fn sandbox_json(config: &cri::PodSandboxConfig) -> serde_json::Value {
    let metadata = config.metadata.clone().unwrap_or_default();
    serde_json::json!({
        "metadata": {
            "name": metadata.name,
            "namespace": metadata.namespace,
            "uid": metadata.uid,
            "attempt": metadata.attempt,
        },
        "hostname": config.hostname,
        "labels": config.labels,
        "annotations": config.annotations,
        "cgroupParent": config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default(),
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), PodError> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let text = serde_json::to_vec_pretty(value).map_err(std::io::Error::other);
    let mut options = std::fs::File::options();
    let options = options.write(true).create_new(true).mode(0o600);
    text.and_then(|text| options.open(path)?.write_all(&text))
        .map_err(file("write", path))
}

/// Adds what the archive says of the container: names, specification, mounts, log.
fn describe(
    container: &Container,
    pod: &cri::PodSandboxConfig,
    handler: &str,
    dir: &Path,
) -> Result<(), PodError> {
    let record = &container.record;
    let time = |ns: i64| chrono::DateTime::from_timestamp_nanos(ns).to_rfc3339();
    let config = archive::ContainerConfig {
        id: record.id.clone(),
        name: container.name(),
        rootfs_image: record.image_name.clone(),
        rootfs_image_ref: record.image_ref.clone(),
        rootfs_image_name: record.image_name.clone(),
        runtime: handler.to_owned(),
        created_time: time(record.created_at),
        checkpointed_time: time(now()),
        restored_time: time(match record.checkpoint {
            Some(_) => record.created_at,
            None => 0,
        }),
        restored: record.checkpoint.is_some(),
    };
    write_json(&dir.join(archive::CONFIG), &config)?;
    let path = container.dir.join(slipway_runtime::SPEC_FILE);
    let text = std::fs::read(&path).map_err(file("read", &path))?;
    let mut spec: Spec = serde_json::from_slice(&text).map_err(|e| PodError::Record {
        path: path.clone(),
        reason: e.to_string(),
    })?;
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    annotations.extend(peers_annotations(container, pod));
    spec.set_annotations(Some(annotations));
    write_json(&dir.join(archive::SPEC), &spec)?;
    let binds: Vec<archive::Bind> = record.mounts.iter().filter_map(bind).collect();
    if !binds.is_empty() {
        write_json(&dir.join(archive::BINDS), &binds)?;
    }
    let log = Path::new(&record.log_path);
    if log.is_file() {
        std::fs::copy(log, dir.join(archive::LOG)).map_err(file("copy the log", log))?;
    }
    let images = dir.join(IMAGES);
    match images.join("inventory.img").is_file() {
        true => Ok(()),
        false => Err(file("find criu's images in", images)(
            std::io::ErrorKind::NotFound.into(),
        )),
    }
}

fn bind(mount: &cri::Mount) -> Option<archive::Bind> {
    use std::os::unix::fs::PermissionsExt as _;
    let metadata = std::fs::metadata(&mount.host_path).ok()?;
    Some(archive::Bind {
        source: mount.host_path.clone(),
        destination: mount.container_path.clone(),
        file_type: if metadata.is_dir() {
            "directory"
        } else {
            "file"
        }
        .to_owned(),
        permissions: metadata.permissions().mode() & 0o7777,
    })
}

/// By these `checkpointctl` and CRI-O know whose checkpoint it is.
fn peers_annotations(container: &Container, pod: &cri::PodSandboxConfig) -> Vec<(String, String)> {
    let metadata = container.metadata();
    let owner = pod.metadata.clone().unwrap_or_default();
    let named = serde_json::json!({ "name": metadata.name, "attempt": metadata.attempt });
    let config = &container.record.config;
    [
        ("io.container.manager", "cri-o".to_owned()),
        ("io.kubernetes.cri-o.Metadata", named.to_string()),
        (
            "io.kubernetes.cri-o.Annotations",
            serde_json::json!(config.annotations).to_string(),
        ),
        (
            "io.kubernetes.cri-o.Labels",
            serde_json::json!(config.labels).to_string(),
        ),
        (
            "io.kubernetes.cri-o.LogPath",
            container.record.log_path.clone(),
        ),
        ("io.kubernetes.pod.name", owner.name),
        ("io.kubernetes.pod.namespace", owner.namespace),
        ("io.kubernetes.pod.uid", owner.uid),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .to_vec()
}
