//! One pull, from a reference to an image that is durable and visible.

use std::sync::{Arc, PoisonError};

use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio::task::JoinSet;

use crate::artifact::{self, Part};
use crate::credentials::Secret;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::image::Image;
use crate::layers::Expected;
use crate::manifest::{self, ConfigFile, Descriptor, Document, MAX_CONFIG, MAX_MANIFEST, Manifest};
use crate::meter::Meter;
use crate::progress::LayerStatus;
use crate::reference::ImageName;
use crate::registry::Repository;
use crate::store::{Hold, Inner, NewImage};
use crate::transfer::{self, CHANNEL, ChannelReader};

/// Indexes within indexes are followed to this depth.
pub(crate) const MAX_DEPTH: usize = 4;

/// Pulls from the first endpoint that has the image: mirrors, then the registry itself.
pub(crate) async fn pull(
    inner: &Arc<Inner>,
    name: &ImageName,
    secret: &Secret,
    meter: &Arc<Meter>,
) -> Result<Arc<Image>, ImageError> {
    let registry = Arc::clone(
        &inner
            .registry
            .read()
            .unwrap_or_else(PoisonError::into_inner),
    );
    let endpoints = registry.endpoints(name);
    let mut result = Err(ImageError::Lost {
        what: format!("the pull of {name}"),
    });
    for endpoint in &endpoints {
        result = match registry.repository(name, endpoint, secret).await {
            Ok(repository) => pull_from(inner, &Arc::new(repository), name, meter).await,
            Err(error) => Err(error),
        };
        match &result {
            Err(error) if endpoint != name.registry() => {
                tracing::info!(
                    mirror = endpoint,
                    error = error.chain(),
                    "mirror can't serve the image"
                );
            }
            _ => break,
        }
    }
    result
}

/// The manifest of an image, and what led to it.
struct Resolved {
    /// What the tag or digest named.
    top: Digest,
    /// Every index and manifest on the way.
    documents: Vec<(Digest, Vec<u8>)>,
    manifest: Manifest,
}

async fn pull_from(
    inner: &Arc<Inner>,
    repository: &Arc<Repository>,
    name: &ImageName,
    meter: &Arc<Meter>,
) -> Result<Arc<Image>, ImageError> {
    let what = format!("image {name}");
    let resolved = resolve(inner, repository, name, &what).await?;
    let manifest = resolved.manifest;
    let (id, config, parts) = match (&manifest.artifact, resolved.documents.last()) {
        (Some(_), Some((digest, bytes))) => {
            let parts = artifact::parts(&manifest, &format!("artifact {name}"))?;
            (digest.clone(), bytes.clone(), parts)
        }
        _ => {
            let config = config(inner, repository, &manifest.config, &what).await?;
            let file = ConfigFile::parse(&config, &what)?;
            file.check_platform(&inner.platform, &what)?;
            let parts = file.parts(&manifest.layers, &what)?;
            (manifest.config.digest.clone(), config, parts)
        }
    };
    meter.begin(parts.iter().map(|part| &part.blob));
    let diff_ids: Vec<Digest> = parts.iter().map(|part| part.layer.clone()).collect();
    let hold = Arc::new(inner.hold(&diff_ids));
    let mut tasks = JoinSet::new();
    for (index, part) in parts.iter().enumerate() {
        let task = LayerTask {
            inner: Arc::clone(inner),
            repository: Arc::clone(repository),
            part: part.clone(),
            meter: Arc::clone(meter),
            index,
            hold: Arc::clone(&hold),
        };
        // Tracked, because an aborted task lets go of its hold some time later.
        tasks.spawn(inner.tasks.track_future(task.run()));
    }
    while let Some(joined) = tasks.join_next().await {
        // The first failure ends the others: dropping the set drops their downloads, and their
        // unpacking threads notice and clean up.
        joined.map_err(|_| ImageError::Lost {
            what: format!("a layer of {what}"),
        })??;
    }
    let sizes = parts.iter().map(|part| part.blob.size);
    let new = NewImage {
        id,
        artifact: manifest.artifact,
        size_bytes: sizes.fold(config.len() as u64, u64::saturating_add),
        config,
        manifests: resolved.documents,
        diff_ids,
        tags: name.tag().map(|_| name.to_string()).into_iter().collect(),
        digests: vec![name.with_digest(&resolved.top)],
    };
    let publisher = Arc::clone(inner);
    inner
        .blocking(what, move || {
            let image = publisher.publish(&new);
            drop(hold);
            image
        })
        .await
}

/// Fetches manifests and indexes until one is this platform's manifest.
async fn resolve(
    inner: &Inner,
    repository: &Repository,
    name: &ImageName,
    what: &str,
) -> Result<Resolved, ImageError> {
    let mut version = match name.digest() {
        Some(digest) => digest.to_string(),
        None => name.tag().unwrap_or("latest").to_owned(),
    };
    let mut expected = name.digest().cloned();
    let mut size = None;
    let mut documents: Vec<(Digest, Vec<u8>)> = Vec::new();
    for _ in 0..MAX_DEPTH {
        let fetched = repository
            .manifest(&version, expected.as_ref(), size, what)
            .await?;
        let document = manifest::parse(&fetched.bytes, fetched.content_type.as_deref(), what)?;
        documents.push((fetched.digest, fetched.bytes));
        match document {
            Document::Manifest(manifest) => {
                return Ok(Resolved {
                    top: documents[0].0.clone(),
                    documents,
                    manifest,
                });
            }
            Document::Index(index) => {
                let entry = index.select(&inner.platform, what)?.descriptor(what)?;
                if entry.size > MAX_MANIFEST {
                    return Err(ImageError::TooLarge {
                        what: what.to_owned(),
                        limit: MAX_MANIFEST,
                    });
                }
                version = entry.digest.to_string();
                expected = Some(entry.digest);
                size = Some(entry.size);
            }
        }
    }
    Err(ImageError::Malformed {
        what: what.to_owned(),
        reason: format!("indexes are nested more than {MAX_DEPTH} deep"),
    })
}

/// The configuration: from the store, when this image or one like it is here already.
async fn config(
    inner: &Arc<Inner>,
    repository: &Repository,
    descriptor: &Descriptor,
    what: &str,
) -> Result<Vec<u8>, ImageError> {
    let (blobs, digest) = (inner.blobs.clone(), descriptor.digest.clone());
    let known = inner
        .blocking(what.to_owned(), move || {
            Ok(blobs.get(&digest, MAX_CONFIG).ok())
        })
        .await?;
    if let Some(known) = known
        && known.len() as u64 == descriptor.size
    {
        return Ok(known);
    }
    let what = format!("the configuration of {what}");
    repository
        .small_blob(&descriptor.digest, descriptor.size, MAX_CONFIG, &what)
        .await
}

/// The way of one layer into the store.
struct LayerTask {
    inner: Arc<Inner>,
    repository: Arc<Repository>,
    part: Part,
    meter: Arc<Meter>,
    index: usize,
    hold: Arc<Hold>,
}

impl LayerTask {
    async fn run(self) -> Result<(), ImageError> {
        let meter = self.meter.layer(self.index);
        // One at a time unpacks a layer; whoever waited finds it done.
        let lock = self.inner.lock_layer(&self.part.layer).await;
        if self.inner.has_layer(&self.part.layer) {
            meter.status(LayerStatus::Present);
            return Ok(());
        }
        let lost = || ImageError::Lost {
            what: format!("layer {}", self.part.blob.digest),
        };
        let turn = self.inner.turns.with_registry(&self.repository.host).await;
        let _turn = turn.ok_or_else(lost)?;
        meter.status(LayerStatus::Downloading);
        let (sink, source) = mpsc::channel(CHANNEL);
        let unpacking = self.spawn_unpack(source, lock);
        let sent = transfer::transfer(
            &self.repository,
            &self.part.blob.digest,
            self.part.blob.size,
            &sink,
            &meter,
        )
        .await;
        drop(sink);
        let unpacked = unpacking.await;
        match (sent, unpacked.map_err(|_| lost())?) {
            // These don't come of a stream that breaks off.
            (_, Err(error @ (ImageError::LayerRefused { .. } | ImageError::LayerIo { .. }))) => {
                return Err(error);
            }
            // A transfer that failed leaves a stream that can't be unpacked; the cause is the transfer.
            (Err(error), _) => return Err(error),
            (Ok(()), unpacked) => unpacked?,
        }
        meter.status(LayerStatus::Done);
        Ok(())
    }

    /// Starts the blocking half. It owns the layer's lock and hold, because it may outlive this
    /// task, when the pull is called off.
    fn spawn_unpack(
        &self,
        source: mpsc::Receiver<bytes::Bytes>,
        lock: OwnedMutexGuard<()>,
    ) -> tokio::task::JoinHandle<Result<(), ImageError>> {
        let expected = Expected {
            blob: Some((self.part.blob.digest.clone(), self.part.blob.size)),
            diff_id: self.part.layer.clone(),
            form: self.part.form.clone(),
        };
        let inner = Arc::clone(&self.inner);
        let (meter, index, hold) = (Arc::clone(&self.meter), self.index, Arc::clone(&self.hold));
        self.inner.tasks.spawn_blocking(move || {
            let written = meter.layer(index).unpacked();
            let result = inner.unpack_layer(ChannelReader::new(source), &expected, written);
            drop(lock);
            drop(hold);
            result
        })
    }
}

impl Inner {
    /// The lock of a layer, whether it exists or not.
    pub(crate) async fn lock_layer(&self, diff_id: &Digest) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self
                .layer_locks
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(diff_id).and_then(std::sync::Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    locks.insert(diff_id.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}
