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
    pub(crate) config: Vec<u8>,
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
        self.settle(new)?;
        let root =
            trees::open_dir(&self.root).map_err(|e| ImageError::io("open", &self.root, e))?;
        rustix::fs::syncfs(&root).map_err(|e| ImageError::io("sync", &self.root, e.into()))?;
        let _commit = self.commit();
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
                self.assemble(&record, &new.config)?
            } else {
                let digest = Digest::parse(&record.id).map_err(|reason| ImageError::Malformed {
                    what: format!("the record of image {}", record.id),
                    reason,
                })?;
                self.assemble(&record, &self.blobs.get(&digest, MAX_CONFIG)?)?
            };
            images.push((record, Arc::new(image)));
        }
        self.database.apply(&change)?;
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

    /// Lets directories that layers implied take over the attributes they have below.
    fn settle(&self, new: &NewImage) -> Result<(), ImageError> {
        for (at, diff_id) in new.diff_ids.iter().enumerate() {
            let implied = match self.state().layers.get_mut(diff_id) {
                Some(layer) if !layer.durable => std::mem::take(&mut layer.implied),
                _ => continue,
            };
            if implied.is_empty() || at == 0 {
                continue;
            }
            let lower: Vec<PathBuf> = new.diff_ids[..at]
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
