//! The last step of a pull or an import: the image becomes durable, then visible.

use std::path::PathBuf;
use std::sync::Arc;

use crate::database::{Change, ImageRecord};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::image::Image;
use crate::layers;
use crate::manifest::MAX_CONFIG;
use crate::state::{Entry, State};
use crate::store::Inner;
use crate::trees;

/// A new version of an image, to be made visible.
pub(crate) struct NewImage {
    pub(crate) id: Digest,
    /// What the id is the digest of: the configuration; an artifact's manifest.
    pub(crate) config: Vec<u8>,
    /// The type of an artifact.
    pub(crate) artifact: Option<String>,
    /// Manifests and indexes on the way to the image, with their bytes.
    pub(crate) manifests: Vec<(Digest, Vec<u8>)>,
    pub(crate) diff_ids: Vec<Digest>,
    pub(crate) size_bytes: u64,
    pub(crate) tags: Vec<String>,
    pub(crate) digests: Vec<String>,
}

impl Inner {
    /// Makes an image durable and visible, with its tags taken from whatever image had them.
    /// Blocks for a sync of the file system. The caller holds its layers.
    pub(crate) fn publish(&self, new: &NewImage) -> Result<Arc<Image>, ImageError> {
        if let Some(image) = self.unchanged(new) {
            return Ok(image);
        }
        self.settle(new)?;
        let root =
            trees::open_dir(&self.root).map_err(|e| ImageError::io("open", &self.root, e))?;
        rustix::fs::syncfs(&root).map_err(|e| ImageError::io("sync", &self.root, e.into()))?;
        let _commit = self.commit();
        let published = self.put(new);
        if published.is_err() {
            let blobs = new.manifests.iter().map(|(digest, _)| digest);
            self.remove_blobs(blobs.chain([&new.id]).cloned());
        }
        published
    }

    /// The image, if it is here exactly as it would be published. Most pulls are of this kind, and
    /// need no sync.
    fn unchanged(&self, new: &NewImage) -> Option<Arc<Image>> {
        let image = {
            let state = self.state();
            let durable = |id| state.layers.get(id).is_some_and(|layer| layer.durable);
            if !new.diff_ids.iter().all(durable) {
                return None;
            }
            let entry = state.images.get(&new.id.to_string())?;
            let (_, records) = plan(&state, new);
            if records.as_slice() != std::slice::from_ref(&entry.record) {
                return None;
            }
            Arc::clone(&entry.image)
        };
        // A blob that was damaged since is made good by the long way.
        let whole = |(digest, bytes): (&Digest, &Vec<u8>)| {
            self.blobs.get(digest, bytes.len() as u64).is_ok()
        };
        new.manifests
            .iter()
            .map(|(digest, bytes)| (digest, bytes))
            .chain([(&new.id, &new.config)])
            .all(whole)
            .then_some(image)
    }

    /// The part of publishing that is done under the lock.
    fn put(&self, new: &NewImage) -> Result<Arc<Image>, ImageError> {
        let what = format!("image {}", new.id);
        self.blobs.put(&new.id, &new.config)?;
        for (digest, bytes) in &new.manifests {
            self.blobs.put(digest, bytes)?;
        }
        self.blobs.sync()?;
        let (change, records) = {
            let state = self.state();
            if let Some(missing) = new
                .diff_ids
                .iter()
                .find(|id| !state.layers.contains_key(*id))
            {
                return Err(ImageError::Lost {
                    what: format!("layer {missing} of {what}"),
                });
            }
            plan(&state, new)
        };
        let mut images = Vec::with_capacity(records.len());
        for record in records {
            let image = if record.id == new.id.to_string() {
                self.assemble(&record, &new.config, &self.state())?
            } else {
                let digest = Digest::parse(&record.id).map_err(|reason| ImageError::Malformed {
                    what: format!("the record of image {}", record.id),
                    reason,
                })?;
                {
                    let config = self.blobs.get(&digest, MAX_CONFIG)?;
                    self.assemble(&record, &config, &self.state())?
                }
            };
            images.push((record, Arc::new(image)));
        }
        if let Err(error) = self.database.apply(&change) {
            // Whether it was written is not known: what isn't visible must not be found later.
            self.database.owe(&self.unpublished(new));
            return Err(error);
        }
        let mut state = self.state();
        for diff_id in &new.diff_ids {
            if let Some(layer) = state.layers.get_mut(diff_id) {
                layer.durable = true;
            }
        }
        for (record, image) in images {
            let leases = state.images.get(&record.id).map_or(0, |entry| entry.leases);
            state.images.insert(
                record.id.clone(),
                Entry {
                    record,
                    image,
                    leases,
                },
            );
        }
        let id = new.id.to_string();
        match state.images.get(&id) {
            Some(entry) => Ok(Arc::clone(&entry.image)),
            None => Err(ImageError::Lost { what }),
        }
    }

    /// What a failed publication may have put into the database.
    fn unpublished(&self, new: &NewImage) -> Change {
        let state = self.state();
        let id = new.id.to_string();
        let durable = |id| state.layers.get(id).is_some_and(|layer| layer.durable);
        Change {
            remove_layers: new
                .diff_ids
                .iter()
                .filter(|id| !durable(id))
                .map(ToString::to_string)
                .collect(),
            remove_images: (!state.images.contains_key(&id))
                .then_some(id)
                .into_iter()
                .collect(),
            ..Change::default()
        }
    }

    /// Lets directories that layers implied take over the attributes they have below.
    fn settle(&self, new: &NewImage) -> Result<(), ImageError> {
        for (at, diff_id) in new.diff_ids.iter().enumerate() {
            let (mut implied, opaque) = match self.state().layers.get_mut(diff_id) {
                Some(layer) if !layer.durable => {
                    (std::mem::take(&mut layer.implied), layer.record.opaque)
                }
                _ => continue,
            };
            if opaque {
                // Only its root is the same directory as below.
                implied.retain(Vec::is_empty);
            }
            if implied.is_empty() || at == 0 {
                continue;
            }
            // Below a layer that hides everything there is nothing to look like.
            let lower: Vec<PathBuf> = self
                .state()
                .seen(&new.diff_ids[..at])
                .iter()
                .rev()
                .map(|id| self.layer_path(id))
                .collect();
            layers::settle(&self.layer_path(diff_id), &implied, &lower)?;
        }
        Ok(())
    }
}

/// The change that publishes an image, and the new records of every image that it touches.
fn plan(state: &State, new: &NewImage) -> (Change, Vec<ImageRecord>) {
    let id = new.id.to_string();
    let mut record = match state.images.get(&id) {
        Some(entry) => entry.record.clone(),
        None => ImageRecord::new(id.clone()),
    };
    let add = |list: &mut Vec<String>, items: &[String]| {
        list.extend_from_slice(items);
        list.sort();
        list.dedup();
    };
    add(&mut record.tags, &new.tags);
    add(&mut record.digests, &new.digests);
    let manifests: Vec<String> = new
        .manifests
        .iter()
        .map(|(digest, _)| digest.to_string())
        .collect();
    add(&mut record.manifests, &manifests);
    record.diff_ids = new.diff_ids.iter().map(ToString::to_string).collect();
    record.size_bytes = new.size_bytes;
    record.artifact.clone_from(&new.artifact);
    let mut records = vec![record];
    for (other, entry) in &state.images {
        if *other != id && entry.record.tags.iter().any(|tag| new.tags.contains(tag)) {
            let mut record = entry.record.clone();
            record.tags.retain(|tag| !new.tags.contains(tag));
            records.push(record);
        }
    }
    let put_layers = new
        .diff_ids
        .iter()
        .filter_map(|diff_id| {
            Some((
                diff_id.to_string(),
                state.layers.get(diff_id)?.record.clone(),
            ))
        })
        .collect();
    let change = Change {
        put_images: records.clone(),
        put_layers,
        ..Change::default()
    };
    (change, records)
}
