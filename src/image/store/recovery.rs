//! The start: memory and disk are made to agree, and what a dead process left is swept.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::database::{Change, Contents, ImageRecord};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::image::Image;
use crate::manifest::MAX_CONFIG;
use crate::state::{Entry, Layer, State};
use crate::store::Inner;
use crate::trees;

impl Inner {
    /// Makes memory and disk agree at the start.
    pub(super) fn recover(&self, contents: Contents) -> Result<(), ImageError> {
        let mut change = Change::default();
        let mut state = self.state();
        for (text, record) in contents.layers {
            match Digest::parse(&text) {
                Ok(diff_id) if self.layer_path(&diff_id).is_dir() => {
                    let layer = Layer {
                        record,
                        durable: true,
                        implied: Vec::new(),
                    };
                    state.layers.insert(diff_id, layer);
                }
                _ => {
                    tracing::error!(layer = text, "the directory of a layer is gone");
                    change.remove_layers.push(text);
                }
            }
        }
        for record in contents.images {
            match self.load(&record, &state) {
                Ok(image) => {
                    let entry = Entry {
                        image: Arc::new(image),
                        record,
                        leases: 0,
                    };
                    state.images.insert(entry.record.id.clone(), entry);
                }
                Err(error) => {
                    tracing::error!(
                        image = record.id,
                        error = error.chain(),
                        "an image is damaged and forgotten; pull it again"
                    );
                    change.remove_images.push(record.id);
                }
            }
        }
        // What an unreadable record refers to must not be swept.
        let careful = contents.set_aside;
        if !careful {
            for diff_id in state.orphans() {
                state.layers.remove(&diff_id);
                change.remove_layers.push(diff_id.to_string());
            }
        }
        let known: HashSet<Digest> = state.layers.keys().cloned().collect();
        let blobs = state.blobs();
        drop(state);
        if let Err(error) = self.database.apply(&change) {
            // On a full disk, perhaps. What is swept below is gone all the same, and the records
            // that say otherwise are told from whole ones at every start.
            tracing::warn!(
                error = error.chain(),
                "can't forget what is gone; the next change will"
            );
            self.database.owe(&change);
        }
        for path in list(&self.root.join("staging"))? {
            trees::discard(&path, &self.trash())
                .map_err(|e| ImageError::io("discard", &path, e))?;
        }
        if careful {
            tracing::warn!(
                "image records were set aside, so unused layers and blobs are kept until these images are pulled again and images.redb.unreadable-* is removed"
            );
            return Ok(());
        }
        for algorithm in ["sha256", "sha512"] {
            for path in list(&self.root.join("layers").join(algorithm))? {
                let name = path
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default();
                if !Digest::parse(&format!("{algorithm}:{name}"))
                    .is_ok_and(|id| known.contains(&id))
                {
                    trees::discard(&path, &self.trash())
                        .map_err(|e| ImageError::io("discard", &path, e))?;
                }
            }
        }
        self.blobs.sweep(&blobs)
    }

    /// Reads an image's configuration and checks that its layers are there.
    fn load(&self, record: &ImageRecord, state: &State) -> Result<Image, ImageError> {
        let malformed = |reason: String| ImageError::Malformed {
            what: format!("the record of image {}", record.id),
            reason,
        };
        let id = Digest::parse(&record.id).map_err(malformed)?;
        let config = self.blobs.get(&id, MAX_CONFIG)?;
        for text in &record.diff_ids {
            let diff_id = Digest::parse(text).map_err(malformed)?;
            if !state.layers.contains_key(&diff_id) {
                return Err(malformed(format!("its layer {diff_id} is gone")));
            }
        }
        self.assemble(record, &config, state)
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let read = || {
        fs::read_dir(dir)?
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()
    };
    read().map_err(|error| ImageError::io("list", dir, error))
}
