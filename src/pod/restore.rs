//! Restoring from checkpoints: CreateContainer whose image is one, and RestorePod.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use slipway_image::{Image, ImageLease};
use slipway_proto::{cri, keeper};

use super::checkpoint::unpack::{self, Description};
use super::checkpoint::{POD_OPTIONS, Staging, blocking};
use super::error::{PodError, file};
use super::names::pod_name;
use super::node::Node;

/// Annotations of images that hold checkpoints: what is used now, and CRI-O's own.
const ANNOTATIONS: [&str; 2] = [
    "org.criu.checkpoint.container.name",
    "io.kubernetes.cri-o.annotations.checkpoint.name",
];
/// Directory beside a container's writable layer with what it is restored from, until it is started.
pub const DIR: &str = "checkpoint";
/// The largest description of a pod's checkpoint, in bytes.
const LARGEST: u64 = 1 << 20;

/// What a checkpoint is in.
pub(super) enum Source {
    /// A file.
    Archive,
    /// An image's layers.
    Image(ImageLease),
}

/// A checkpoint that is ready to become a container.
pub(super) struct Checkpoint {
    /// Its path or image.
    name: String,
    staging: Staging,
    description: Description,
    criu: keeper::Criu,
}

impl Checkpoint {
    /// What it was restored from, for the container's record.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes the configuration one of the container that was: its image, and its command if none is given.
    pub(super) fn complete(&self, config: &mut cri::ContainerConfig, base: &Image) {
        let known = &self.description.config.rootfs_image_name;
        let image = config.image.get_or_insert_default();
        image.image = match known.is_empty() {
            true => base.id.clone(),
            false => known.clone(),
        };
        image.user_specified_image.clear();
        if config.command.is_empty() && config.args.is_empty() {
            let process = self.description.spec.process().as_ref();
            config.command = process.and_then(|p| p.args().clone()).unwrap_or_default();
        }
    }

    /// Puts it beside the container's writable layer.
    pub(super) fn move_to(
        &self,
        layers: &Path,
        timeout_ms: u64,
    ) -> Result<keeper::Restore, PodError> {
        let dir = layers.join(DIR);
        std::fs::rename(self.staging.path(), &dir).map_err(file("move the checkpoint to", &dir))?;
        Ok(keeper::Restore {
            criu: Some(self.criu.clone()),
            dir: dir.to_string_lossy().into_owned(),
            timeout_ms,
        })
    }
}

/// `pod.options`, as it is read.
#[derive(Debug, Deserialize)]
struct PodOptions {
    version: u32,
    #[serde(default)]
    containers: BTreeMap<String, String>,
}

impl Node {
    /// Whether an image's name means a checkpoint: an archive, or an image that holds one, which is leased.
    ///
    /// # Errors
    /// When the image's manifest can't be read.
    pub(super) fn checkpoint_of(&self, image: &str) -> Result<Option<Source>, PodError> {
        if image.starts_with('/') {
            return Ok(Some(Source::Archive));
        }
        let lease = self.checkpoint_image(image)?;
        Ok(lease.map(Source::Image))
    }

    /// Unpacks a checkpoint, looks at what it says, and finds the image below it.
    ///
    /// # Errors
    /// [`PodError::Unsupported`] where nothing is restored; what is wrong with the checkpoint or its image.
    pub(super) async fn open_checkpoint(
        &self,
        image: &str,
        source: Source,
    ) -> Result<(Checkpoint, ImageLease), PodError> {
        self.may_restore()?;
        let criu = self.criu().await?;
        let limit = self.config().checkpoint.restore_limit.bytes();
        let staging = Staging::new(&self.checkpoints_dir())?;
        let name = image.to_owned();
        let (staging, description) = blocking(move || {
            let dir = staging.path();
            match &source {
                Source::Archive => unpack::archive(Path::new(&name), dir, limit)?,
                Source::Image(lease) => {
                    let layers = lease
                        .image()
                        .layers
                        .iter()
                        .rev()
                        .map(|layer| layer.path.as_path());
                    unpack::layers(&name, layers, dir, limit)?;
                }
            }
            let description = unpack::describe(&name, dir)?;
            Ok((staging, description))
        })
        .await?;
        let checkpoint = Checkpoint {
            name: image.to_owned(),
            staging,
            description,
            criu,
        };
        let base = self.base_image(&checkpoint).await?;
        Ok((checkpoint, base))
    }

    fn may_restore(&self) -> Result<(), PodError> {
        match self.config().checkpoint.restore {
            true => Ok(()),
            false => Err(PodError::Unsupported(
                "nothing is restored from checkpoints here: checkpoint.restore is false in the configuration".to_owned(),
            )),
        }
    }

    /// An image that holds a checkpoint. Those have no command; so an ordinary image's manifest is not looked at.
    fn checkpoint_image(&self, name: &str) -> Result<Option<ImageLease>, PodError> {
        let Some(image) = self.images.resolve(name) else {
            return Ok(None);
        };
        let given = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if given(image.config.entrypoint()) || given(image.config.cmd()) {
            return Ok(None);
        }
        let failed = |source| PodError::Image {
            action: "look into",
            image: name.to_owned(),
            source,
        };
        let annotations = self.images.annotations(&image.id).map_err(failed)?;
        match ANNOTATIONS.iter().any(|key| annotations.contains_key(*key)) {
            true => self.images.lease(&image.id).map(Some).map_err(failed),
            false => Ok(None),
        }
    }

    /// The image that a checkpoint's writable layer is over; pulled if it is not here and has a name by which it is
    /// the same everywhere.
    async fn base_image(&self, checkpoint: &Checkpoint) -> Result<ImageLease, PodError> {
        let config = &checkpoint.description.config;
        let (id, name) = (&config.rootfs_image_ref, &config.rootfs_image_name);
        let wanted = if id.is_empty() { name } else { id };
        if let Some(lease) = self.base_lease(wanted) {
            return Ok(lease);
        }
        // An id can't be pulled, but what its name means now may be it.
        let pullable = if id.contains('@') { id } else { name };
        let missing = |reason: String| PodError::NoBaseImage {
            checkpoint: checkpoint.name.clone(),
            image: wanted.clone(),
            reason,
        };
        if pullable.is_empty() {
            return Err(missing("it has no name to be pulled by".to_owned()));
        }
        let patience = self.config().checkpoint.timeout;
        match tokio::time::timeout(patience, Box::pin(self.pull(pullable, None, None))).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => return Err(missing(e.chain())),
            Err(_) => {
                return Err(missing(format!(
                    "pulling {pullable} takes longer than {patience:?}"
                )));
            }
        }
        self.base_lease(wanted)
            .ok_or_else(|| missing(format!("{pullable} is another image now")))
    }

    fn base_lease(&self, name: &str) -> Option<ImageLease> {
        match name.is_empty() {
            true => None,
            false => self.images.lease(name).ok(),
        }
    }

    /// Makes a pod anew with the containers of a checkpoint, all created: StartContainer lets their processes go on.
    ///
    /// # Errors
    /// What is wrong with the request or the checkpoint, or which step failed; nothing is left of the pod then.
    pub async fn restore_pod(
        self: &Arc<Self>,
        request: cri::RestorePodRequest,
    ) -> Result<cri::RestorePodResponse, PodError> {
        let node = self.clone();
        self.complete(
            "RestorePod",
            async move { node.restore_whole(request).await },
        )
        .await
    }

    async fn restore_whole(
        self: Arc<Self>,
        request: cri::RestorePodRequest,
    ) -> Result<cri::RestorePodResponse, PodError> {
        self.may_restore()?;
        self.criu().await?;
        if let Some(name) = request.options.keys().min() {
            return Err(PodError::Invalid(format!(
                "option {name:?} of RestorePod is not known here"
            )));
        }
        let config = request
            .config
            .ok_or_else(|| PodError::Invalid("RestorePod needs a config".to_owned()))?;
        let metadata = config.metadata.clone().unwrap_or_default();
        let name = pod_name(
            &metadata.name,
            &metadata.namespace,
            &metadata.uid,
            metadata.attempt,
        );
        if let Some(pod) = self.pods.all().iter().find(|pod| pod.name() == name) {
            return Err(PodError::NameTaken {
                what: "pod sandbox",
                name,
                id: pod.id().to_owned(),
            });
        }
        let path = PathBuf::from(&request.checkpoint_path);
        let configs = request.container_configs;
        let containers = blocking(move || pair(&path, configs)).await?;
        for container in &containers {
            self.check_image(container)?;
        }
        let run = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: request.runtime_handler,
        };
        let pod_sandbox_id = Box::pin(self.run_pod(run)).await?;
        let mut restored_containers = Vec::new();
        for Paired {
            archive,
            mut config_of,
            ..
        } in containers
        {
            let name = config_of.metadata.clone().unwrap_or_default().name;
            config_of.image.get_or_insert_default().image = archive.to_string_lossy().into_owned();
            let create = cri::CreateContainerRequest {
                pod_sandbox_id: pod_sandbox_id.clone(),
                config: Some(config_of),
                sandbox_config: Some(config.clone()),
            };
            match Box::pin(self.create_container(create)).await {
                Ok(container_id) => {
                    restored_containers.push(cri::RestoredContainer { name, container_id })
                }
                Err(error) => {
                    self.undo_restore(&pod_sandbox_id).await;
                    return Err(error);
                }
            }
        }
        tracing::info!(
            pod = pod_sandbox_id,
            containers = restored_containers.len(),
            path = request.checkpoint_path,
            "pod restored; its containers wait for their start"
        );
        Ok(cri::RestorePodResponse {
            pod_sandbox_id,
            restored_containers,
        })
    }

    /// The image that is asked for, if one is, has to be the one that the container had.
    fn check_image(&self, container: &Paired) -> Result<(), PodError> {
        let asked = container.config_of.image.clone().unwrap_or_default().image;
        if asked.is_empty() || asked == container.base_name {
            return Ok(());
        }
        let id = |name: &str| self.images.resolve(name).map(|image| image.id.clone());
        match (id(&asked), id(&container.base)) {
            (Some(asked), Some(base)) if asked == base => Ok(()),
            _ => Err(PodError::Invalid(format!(
                "container {:?} was checkpointed with image {:?} ({}), not with {asked:?}",
                container
                    .config_of
                    .metadata
                    .clone()
                    .unwrap_or_default()
                    .name,
                container.base_name,
                container.base,
            ))),
        }
    }

    async fn undo_restore(self: &Arc<Self>, pod: &str) {
        let undone = match self.stop_pod(pod).await {
            Ok(()) => self.remove_pod(pod).await,
            Err(e) => Err(e),
        };
        if let Err(error) = undone {
            tracing::error!(
                pod,
                error = error.chain(),
                "a pod that could not be restored is left"
            );
        }
    }
}

/// A configuration and the archive that is for it.
struct Paired {
    config_of: cri::ContainerConfig,
    archive: PathBuf,
    /// The image that it was made of, and that image's name.
    base: String,
    base_name: String,
}

/// Finds the archive for each configuration: all of both.
fn pair(path: &Path, configs: Vec<cri::ContainerConfig>) -> Result<Vec<Paired>, PodError> {
    let invalid = |reason: String| Err(PodError::Invalid(reason));
    if !path.is_absolute() {
        return invalid(format!(
            "the checkpoint's path {path:?} is no absolute path"
        ));
    }
    let options = read_options(path)?;
    let bad = |reason: String| PodError::Checkpoint {
        what: path.display().to_string(),
        reason,
    };
    if options.version != 1 {
        return Err(bad(format!(
            "its version is {}, and only 1 is known",
            options.version
        )));
    }
    let mut asked = BTreeSet::new();
    let mut paired = Vec::new();
    for config in configs {
        let name = config.metadata.clone().unwrap_or_default().name;
        let Some(base) = options.containers.get(&name) else {
            return invalid(format!("the checkpoint has no container {name:?}"));
        };
        if !asked.insert(name.clone()) {
            return invalid(format!("two configurations are for container {name:?}"));
        }
        let one_name = Path::new(base).components().collect::<Vec<_>>();
        if !matches!(one_name.as_slice(), [Component::Normal(_)]) {
            return Err(bad(format!("{base:?} is no name of an archive in it")));
        }
        let archive = path.join(format!("{base}.tar"));
        if !archive.symlink_metadata().is_ok_and(|m| m.is_file()) {
            return Err(bad(format!("the archive {base}.tar is not in it")));
        }
        let dump = unpack::peek(&archive)?;
        paired.push(Paired {
            config_of: config,
            archive,
            base: dump.rootfs_image_ref,
            base_name: dump.rootfs_image_name,
        });
    }
    if let Some(name) = options
        .containers
        .keys()
        .find(|name| !asked.contains(*name))
    {
        return invalid(format!(
            "the checkpoint has container {name:?}, and no configuration is for it"
        ));
    }
    match paired.is_empty() {
        true => Err(bad("it has no containers".to_owned())),
        false => Ok(paired),
    }
}

fn read_options(dir: &Path) -> Result<PodOptions, PodError> {
    let path = dir.join(POD_OPTIONS);
    let mut options = File::options();
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let opened = match options.read(true).custom_flags(flags).open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(PodError::NoCheckpoint { path });
        }
        other => other.map_err(file("open", &path))?,
    };
    let mut text = Vec::new();
    opened
        .take(LARGEST)
        .read_to_end(&mut text)
        .map_err(file("read", &path))?;
    serde_json::from_slice(&text).map_err(|e| PodError::Checkpoint {
        what: dir.display().to_string(),
        reason: format!("{POD_OPTIONS} in it can't be understood: {e}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str) -> cri::ContainerConfig {
        let mut config = cri::ContainerConfig::default();
        config.metadata.get_or_insert_default().name = name.to_owned();
        config
    }

    #[test]
    fn every_archive_needs_its_configuration_and_the_other_way_round() {
        let dir = tempfile::tempdir().unwrap();
        let says = |options: &str, names: &[&str]| {
            std::fs::write(dir.path().join(POD_OPTIONS), options).unwrap();
            let configs = names.iter().map(|name| config(name)).collect();
            pair(dir.path(), configs)
                .err()
                .map(|e| e.to_string())
                .unwrap_or_default()
        };
        assert!(pair(Path::new("pod"), Vec::new()).is_err());
        assert!(matches!(
            pair(dir.path(), Vec::new()),
            Err(PodError::NoCheckpoint { .. })
        ));
        for (options, names, word) in [
            ("{", &["a"][..], "understood"),
            (r#"{"version":2,"containers":{"a":"x"}}"#, &["a"], "version"),
            (r#"{"version":1}"#, &[], "no containers"),
            (
                r#"{"version":1,"containers":{"a":"x"}}"#,
                &["b"],
                "no container",
            ),
            (
                r#"{"version":1,"containers":{"a":"x"}}"#,
                &[],
                "no configuration",
            ),
            (
                r#"{"version":1,"containers":{"a":"../x"}}"#,
                &["a"],
                "no name",
            ),
            (
                r#"{"version":1,"containers":{"a":"/x"}}"#,
                &["a"],
                "no name",
            ),
            (
                r#"{"version":1,"containers":{"a":"x"}}"#,
                &["a"],
                "not in it",
            ),
        ] {
            let said = says(options, names);
            assert!(said.contains(word), "{options} {names:?}: {said}");
        }
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("x.tar")).unwrap();
        assert!(says(r#"{"version":1,"containers":{"a":"x"}}"#, &["a"]).contains("not in it"));
    }
}
