//! The image store: what is present, in memory and on disk, and how it changes.
//!
//! | path below the root | content |
//! | --- | --- |
//! | `images.redb` | which images there are and which layers are complete |
//! | `blobs/<algorithm>/<hex>` | manifests, indexes and configurations |
//! | `layers/<algorithm>/<hex>` | one unpacked layer per diff ID |
//! | `staging/` | layers that are arriving |
//! | `trash/` | what is being removed |
//!
//! A layer's directory appears by one rename, when everything about it is verified. It counts only
//! once its row is in the database, which is written after the file system was synced, together with
//! the image's row. So whatever instruction the process dies at, the next start finds either a whole
//! image or garbage that it can tell as such.
//!
//! Locks, in order: `commit` (blocking threads only; held over the disk operations of a change),
//! then `state` (no I/O under it).

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak, mpsc};

use tokio_util::task::TaskTracker;

use crate::blobs::Blobs;
use crate::config::{Platform, StoreConfig};
use crate::database::{Change, Database, ImageRecord, LayerRecord};
use crate::digest::Digest;
use crate::error::{ErrorKind, ImageError};
use crate::image::{FsInfo, Image, LayerRef};
use crate::inflight::Inflight;
use crate::layers::{self, Prepared};
use crate::manifest::{self, ConfigFile, MAX_MANIFEST};
use crate::reference::ImageName;
use crate::registry::Registry;
use crate::state::{Layer, State};
use crate::trees;
use crate::turns::Turns;

mod publish;
mod recovery;

pub(crate) use publish::NewImage;

/// The images of this node. Clones are handles of the same store.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) root: PathBuf,
    pub(crate) platform: Platform,
    pinned: Vec<String>,
    pub(crate) blobs: Blobs,
    database: Database,
    commit: Mutex<()>,
    state: Mutex<State>,
    pub(crate) registry: RwLock<Arc<Registry>>,
    pub(crate) turns: Turns,
    pub(crate) inflight: Mutex<Inflight>,
    pub(crate) layer_locks: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    /// Pulls and their blocking parts.
    pub(crate) tasks: TaskTracker,
    collector: mpsc::Sender<Garbage>,
}

/// Messages to the collector thread.
enum Garbage {
    /// Layers may have lost their last user.
    Layers,
    /// The trash has been filled.
    Trash,
    /// Answer when everything before this is done.
    Report(tokio::sync::oneshot::Sender<()>),
}

/// Keeps an image's layers while it is held; a container holds one. Removing the image fails as long.
pub struct ImageLease {
    inner: Arc<Inner>,
    image: Arc<Image>,
}

impl ImageStore {
    /// Opens the store, makes it if need be, and sweeps what dead pulls left behind. Blocks for disk
    /// operations; garbage is removed in the background.
    ///
    /// # Errors
    /// When directories can't be made, the metadata can't be read or is open in another process, or
    /// a certificate authority's file can't be read.
    pub fn open(config: StoreConfig) -> Result<Self, ImageError> {
        let root = config.root;
        for name in [
            "",
            "layers/sha256",
            "layers/sha512",
            "staging",
            "trash",
            "blobs",
        ] {
            let path = root.join(name);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(if name.is_empty() { 0o711 } else { 0o700 })
                .create(&path)
                .map_err(|error| ImageError::io("create", &path, error))?;
        }
        let registry = Registry::new(config.registry, config.pull_progress_timeout)?;
        let (database, contents) = Database::open(&root.join("images.redb"))?;
        let blobs = Blobs::open(&root.join("blobs"))?;
        let (collector, garbage) = mpsc::channel();
        let inner = Arc::new(Inner {
            platform: config.platform,
            pinned: normalise_patterns(config.pinned),
            blobs,
            database,
            commit: Mutex::new(()),
            state: Mutex::new(State::default()),
            registry: RwLock::new(Arc::new(registry)),
            turns: Turns::new(config.max_parallel_downloads),
            inflight: Mutex::new(Inflight::default()),
            layer_locks: Mutex::new(HashMap::new()),
            tasks: TaskTracker::new(),
            collector,
            root,
        });
        inner.recover(contents)?;
        let weak = Arc::downgrade(&inner);
        std::thread::Builder::new()
            .name("image-gc".to_owned())
            .spawn(move || collect(&weak, &garbage))
            .map_err(|error| ImageError::io("start the collector of", &inner.root, error))?;
        inner.notify(Garbage::Trash);
        Ok(Self { inner })
    }

    /// Every image, sorted by id. A snapshot of memory; never waits for a pull or for the disk.
    pub fn list(&self) -> Vec<Arc<Image>> {
        let state = self.inner.state();
        state
            .images
            .values()
            .map(|entry| Arc::clone(&entry.image))
            .collect()
    }

    /// The image of this name or id: a full id with or without `sha256:`, a tag, a reference by
    /// digest, a short name (`busybox` is `docker.io/library/busybox:latest`), or the beginning of
    /// one id only, of three digits or more.
    pub fn resolve(&self, name_or_id: &str) -> Option<Arc<Image>> {
        let state = self.inner.state();
        let id = state.find(name_or_id)?;
        Some(Arc::clone(&state.images[id].image))
    }

    /// Removes the image with all its tags, and the layers that no other image uses. An image that
    /// is absent counts as removed. When this returns, the image is invisible; its files are removed
    /// in the background.
    ///
    /// # Errors
    /// [`ImageError::InUse`] while a lease is held; I/O errors.
    pub async fn remove(&self, name_or_id: &str) -> Result<(), ImageError> {
        let inner = Arc::clone(&self.inner);
        let name = name_or_id.to_owned();
        self.inner
            .blocking(format!("removal of image {name_or_id}"), move || {
                inner.remove(&name)
            })
            .await
    }

    /// Takes a lease on the image.
    ///
    /// # Errors
    /// [`ImageError::NotFound`].
    pub fn lease(&self, image_id: &str) -> Result<ImageLease, ImageError> {
        let mut state = self.inner.state();
        let id = state.find(image_id).map(str::to_owned);
        let entry =
            id.and_then(|id| state.images.get_mut(&id))
                .ok_or_else(|| ImageError::NotFound {
                    name: image_id.to_owned(),
                })?;
        entry.leases += 1;
        Ok(ImageLease {
            inner: Arc::clone(&self.inner),
            image: Arc::clone(&entry.image),
        })
    }

    /// What the manifests and indexes that led to an image say of it, read anew; empty for an image that is gone.
    ///
    /// # Errors
    /// When a document can't be read any more.
    pub fn annotations(&self, image_id: &str) -> Result<BTreeMap<String, String>, ImageError> {
        let documents = {
            let state = self.inner.state();
            let entry = state.images.get(image_id);
            entry.map_or_else(Vec::new, |entry| entry.record.manifests.clone())
        };
        let mut found = BTreeMap::new();
        for text in documents {
            if let Ok(digest) = Digest::parse(&text) {
                let document = self.inner.blobs.get(&digest, MAX_MANIFEST)?;
                found.extend(manifest::annotations(&document));
            }
        }
        Ok(found)
    }

    /// The space that layers take, from sums that were kept while unpacking.
    pub fn fs_info(&self) -> FsInfo {
        let state = self.inner.state();
        let sum = |of: fn(&LayerRecord) -> u64| {
            state.layers.values().map(|layer| of(&layer.record)).sum()
        };
        FsInfo {
            mountpoint: self.inner.root.clone(),
            used_bytes: sum(|record| record.bytes),
            inodes_used: sum(|record| record.inodes),
        }
    }

    /// Uses other registry settings from the next pull on; pulls in progress keep theirs.
    ///
    /// # Errors
    /// When a certificate authority's file can't be read; the old settings stay.
    pub fn set_registry(
        &self,
        config: crate::RegistryConfig,
        pull_progress_timeout: std::time::Duration,
    ) -> Result<(), ImageError> {
        let registry = Arc::new(Registry::new(config, pull_progress_timeout)?);
        *self
            .inner
            .registry
            .write()
            .unwrap_or_else(PoisonError::into_inner) = registry;
        Ok(())
    }

    /// Waits until no pull is in progress and all garbage is removed. For an orderly shutdown, after
    /// the pulls were dropped.
    pub async fn idle(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        self.inner.tasks.reopen();
        let (done, waiting) = tokio::sync::oneshot::channel();
        self.inner.notify(Garbage::Report(done));
        // An error means that the collector is gone, and with it the store.
        let _ = waiting.await;
    }
}

impl ImageLease {
    /// The image as it was when the lease was taken.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }
}

impl std::fmt::Debug for ImageLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ImageLease").field(&self.image.id).finish()
    }
}

impl std::fmt::Debug for ImageStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ImageStore").field(&self.inner.root).finish()
    }
}

impl Drop for ImageLease {
    fn drop(&mut self) {
        if let Some(entry) = self.inner.state().images.get_mut(&self.image.id) {
            entry.leases = entry.leases.saturating_sub(1);
        }
    }
}

impl Inner {
    /// Runs blocking work, which [`ImageStore::idle`] waits for even when nobody else does any more;
    /// a panic in it becomes an error.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        what: String,
        work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        match self.tasks.spawn_blocking(work).await {
            Ok(result) => result,
            Err(_) => Err(ImageError::Lost { what }),
        }
    }

    /// A panic under one of these locks can't leave anything half done, so poison is ignored.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit(&self) -> MutexGuard<'_, ()> {
        self.commit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, garbage: Garbage) {
        // Fails only when the thread is gone, which a next start makes good.
        let _ = self.collector.send(garbage);
    }

    /// Where a layer is, or will be.
    pub(crate) fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.root
            .join("layers")
            .join(diff_id.algorithm().name())
            .join(diff_id.hex())
    }

    fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// Moves a layer's directory out of the way; its removal follows in the background.
    fn discard_layer(&self, diff_id: &Digest) {
        let path = self.layer_path(diff_id);
        if let Err(error) = trees::discard(&path, &self.trash()) {
            tracing::warn!(path = %path.display(), %error, "can't discard a layer; the next start will");
        }
    }

    /// Puts an image together from its record and its configuration; its layers are in `state`.
    fn assemble(
        &self,
        record: &ImageRecord,
        config: &[u8],
        state: &State,
    ) -> Result<Image, ImageError> {
        let file = match record.artifact {
            // That is its manifest, which says nothing of how to run it.
            Some(_) => ConfigFile::default(),
            None => {
                ConfigFile::parse(config, &format!("the configuration of image {}", record.id))?
            }
        };
        let config = file.config.unwrap_or_default();
        let diff_ids: Vec<Digest> = record
            .diff_ids
            .iter()
            .filter_map(|text| Digest::parse(text).ok())
            .collect();
        let layers = state
            .seen(&diff_ids)
            .iter()
            .map(|diff_id| LayerRef {
                path: self.layer_path(diff_id),
                diff_id: diff_id.to_string(),
            })
            .collect();
        Ok(Image {
            id: record.id.clone(),
            repo_tags: record.tags.clone(),
            repo_digests: record.digests.clone(),
            size_bytes: record.size_bytes,
            user: config.user().clone().filter(|user| !user.is_empty()),
            config,
            architecture: file.architecture,
            os: file.os,
            variant: file.variant,
            created: file.created,
            artifact: record.artifact.clone(),
            layers,
            pinned: self.is_pinned(record),
        })
    }

    fn is_pinned(&self, record: &ImageRecord) -> bool {
        self.pinned.iter().any(|pattern| {
            record
                .tags
                .iter()
                .chain(&record.digests)
                .any(|name| is_match(pattern, name))
        })
    }

    fn remove(&self, name: &str) -> Result<(), ImageError> {
        let _commit = self.commit();
        let (entry, orphans) = {
            let mut state = self.state();
            let Some(id) = state.find(name).map(str::to_owned) else {
                return Ok(());
            };
            match state.images.remove(&id) {
                None => return Ok(()),
                Some(entry) if entry.leases > 0 => {
                    let users = entry.leases;
                    state.images.insert(id.clone(), entry);
                    return Err(ImageError::InUse { id, users });
                }
                Some(entry) => {
                    let orphans: Vec<_> = state
                        .orphans()
                        .into_iter()
                        .filter_map(|diff_id| state.layers.remove_entry(&diff_id))
                        .collect();
                    (entry, orphans)
                }
            }
        };
        let change = Change {
            remove_images: vec![entry.record.id.clone()],
            remove_layers: orphans
                .iter()
                .map(|(diff_id, _)| diff_id.to_string())
                .collect(),
            ..Change::default()
        };
        let discard = || {
            for (diff_id, _) in &orphans {
                self.discard_layer(diff_id);
            }
        };
        match self.database.apply(&change) {
            Ok(()) => discard(),
            // Not even a removal fits on the disk. The layers make room for it: a start tells a
            // record without layers from an image.
            Err(error) if error.kind() == ErrorKind::ResourceExhausted => {
                discard();
                trees::empty(&self.trash());
                if let Err(error) = self.database.apply(&change) {
                    tracing::warn!(
                        image = entry.record.id,
                        error = error.chain(),
                        "the removal of an image can't be recorded yet; the next change will"
                    );
                    self.database.owe(&change);
                }
            }
            Err(error) => {
                let mut state = self.state();
                state.layers.extend(orphans);
                state.images.insert(entry.record.id.clone(), entry);
                return Err(error);
            }
        }
        let blobs = std::iter::once(&entry.record.id).chain(&entry.record.manifests);
        self.remove_blobs(blobs.filter_map(|text| Digest::parse(text).ok()));
        self.notify(Garbage::Trash);
        tracing::info!(
            image = entry.record.id,
            layers = orphans.len(),
            "image removed"
        );
        Ok(())
    }

    /// Removes those of the blobs that no image needs.
    fn remove_blobs(&self, blobs: impl Iterator<Item = Digest>) {
        let needed = self.state().blobs();
        for digest in blobs.filter(|digest| !needed.contains(digest)) {
            self.blobs.remove(&digest);
        }
    }

    /// Whether the layer is complete and in its place.
    pub(crate) fn has_layer(&self, diff_id: &Digest) -> bool {
        self.state().layers.contains_key(diff_id)
    }

    /// Unpacks a layer and puts it in place. The caller holds the layer's lock and a hold on it.
    pub(crate) fn unpack_layer(
        &self,
        stream: impl std::io::Read,
        expected: &layers::Expected,
        written: &AtomicU64,
    ) -> Result<(), ImageError> {
        let prepared = layers::prepare(stream, expected, &self.root.join("staging"), written)?;
        self.place_layer(&expected.diff_id, prepared)
    }

    fn place_layer(&self, diff_id: &Digest, prepared: Prepared) -> Result<(), ImageError> {
        let _commit = self.commit();
        if self.has_layer(diff_id) {
            return Ok(());
        }
        if self.database.owes_layer(&diff_id.to_string()) {
            // Its old row would call it durable before it is.
            self.database.apply(&Change::default())?;
        }
        let path = self.layer_path(diff_id);
        // Whatever stands here without being known is garbage that could not be discarded.
        if path.symlink_metadata().is_ok() {
            self.discard_layer(diff_id);
        }
        let unpacked = prepared.place(&path)?;
        let layer = Layer {
            record: LayerRecord {
                opaque: unpacked.opaque,
                ..LayerRecord::new(unpacked.bytes, unpacked.inodes)
            },
            durable: false,
            implied: unpacked.implied,
        };
        self.state().layers.insert(diff_id.clone(), layer);
        Ok(())
    }

    /// Keeps layers from being collected, present or not, until the hold is dropped.
    pub(crate) fn hold(self: &Arc<Self>, diff_ids: &[Digest]) -> Hold {
        let mut state = self.state();
        for diff_id in diff_ids {
            *state.holds.entry(diff_id.clone()).or_default() += 1;
        }
        Hold {
            inner: Arc::clone(self),
            diff_ids: diff_ids.to_vec(),
        }
    }

    /// Removes layers that nothing needs.
    fn collect_layers(&self) {
        let _commit = self.commit();
        let orphans: Vec<_> = {
            let mut state = self.state();
            state
                .orphans()
                .into_iter()
                .filter_map(|diff_id| state.layers.remove_entry(&diff_id))
                .collect()
        };
        let change = Change {
            remove_layers: orphans
                .iter()
                .filter(|(_, layer)| layer.durable)
                .map(|(diff_id, _)| diff_id.to_string())
                .collect(),
            ..Change::default()
        };
        if let Err(error) = self.database.apply(&change) {
            // Keeping the files would not help: on a full disk it's them that are in the way.
            tracing::warn!(
                error = error.chain(),
                "can't forget unused layers yet; the next change will"
            );
            self.database.owe(&change);
        }
        for (diff_id, _) in &orphans {
            self.discard_layer(diff_id);
        }
    }
}

/// Layers that must stay while this is alive.
pub(crate) struct Hold {
    inner: Arc<Inner>,
    diff_ids: Vec<Digest>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        for diff_id in &self.diff_ids {
            if let Some(count) = state.holds.get_mut(diff_id) {
                *count -= 1;
                if *count == 0 {
                    state.holds.remove(diff_id);
                }
            }
        }
        let orphaned = !state.orphans().is_empty();
        drop(state);
        if orphaned {
            self.inner.notify(Garbage::Layers);
        }
    }
}

/// The collector thread: removes files off everybody's path.
fn collect(inner: &Weak<Inner>, garbage: &mpsc::Receiver<Garbage>) {
    while let Ok(message) = garbage.recv() {
        let Some(inner) = inner.upgrade() else {
            return;
        };
        match message {
            Garbage::Layers => {
                inner.collect_layers();
                trees::empty(&inner.trash());
            }
            Garbage::Trash => trees::empty(&inner.trash()),
            // Nobody waiting any more is fine.
            Garbage::Report(done) => drop(done.send(())),
        }
    }
}

/// Patterns name images as people write them; matching is by normalised names.
/// Whether a name is what a pattern means: all of it, its beginning (`start*`), or a part of it (`*word*`).
fn is_match(pattern: &str, name: &str) -> bool {
    let Some(start) = pattern.strip_suffix('*') else {
        return name == pattern;
    };
    match start.strip_prefix('*') {
        Some(word) => name.contains(word),
        None => name.starts_with(start),
    }
}

fn normalise_patterns(patterns: Vec<String>) -> Vec<String> {
    patterns
        .into_iter()
        .map(|pattern| {
            if pattern.ends_with('*') {
                return pattern;
            }
            ImageName::parse(&pattern).map_or(pattern, |name| name.to_string())
        })
        .collect()
}
