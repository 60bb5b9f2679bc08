//! The durable metadata: which images there are, and which layers are complete.
//!
//! One redb file holds both, so that an image and its layers appear in one transaction. A layer's
//! directory without its row here was never completed (or is already removed) and is garbage. Values
//! are JSON with a schema version. A row that can't be read is moved to the `set_aside` table and
//! reported.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database as Redb, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::ImageError;

const IMAGES: TableDefinition<&str, &[u8]> = TableDefinition::new("images");
const LAYERS: TableDefinition<&str, &[u8]> = TableDefinition::new("layers");
const SET_ASIDE: TableDefinition<&str, &[u8]> = TableDefinition::new("set_aside");

/// The version of the rows this code writes and the highest it reads.
const SCHEMA: u32 = 1;

/// The file is small; redb's default cache of a gigabyte is not for us.
const CACHE_BYTES: usize = 1 << 20;

/// What is durable of an image; the rest is in its configuration blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) schema: u32,
    /// The configuration's digest.
    pub(crate) id: String,
    pub(crate) tags: Vec<String>,
    pub(crate) digests: Vec<String>,
    /// Digests of the manifests and indexes that led to this image; blobs of ours.
    pub(crate) manifests: Vec<String>,
    /// Base first.
    pub(crate) diff_ids: Vec<String>,
    pub(crate) size_bytes: u64,
}

/// What is durable of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) schema: u32,
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

impl ImageRecord {
    pub(crate) fn new(id: String) -> Self {
        Self {
            schema: SCHEMA,
            id,
            tags: Vec::new(),
            digests: Vec::new(),
            manifests: Vec::new(),
            diff_ids: Vec::new(),
            size_bytes: 0,
        }
    }
}

impl LayerRecord {
    pub(crate) fn new(bytes: u64, inodes: u64) -> Self {
        Self {
            schema: SCHEMA,
            bytes,
            inodes,
        }
    }
}

/// A change, applied as a whole or not at all.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) put_images: Vec<ImageRecord>,
    pub(crate) remove_images: Vec<String>,
    pub(crate) put_layers: Vec<(String, LayerRecord)>,
    pub(crate) remove_layers: Vec<String>,
}

/// What a store held when it was opened.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) images: Vec<ImageRecord>,
    pub(crate) layers: Vec<(String, LayerRecord)>,
    /// Rows that couldn't be read, now or earlier. While there are any, nothing that they might
    /// refer to may be taken for garbage.
    pub(crate) set_aside: usize,
}

/// The open metadata store.
pub(crate) struct Database {
    redb: Redb,
    path: PathBuf,
}

impl Database {
    /// Opens or creates the store and reads all of it.
    pub(crate) fn open(path: &Path) -> Result<(Self, Contents), ImageError> {
        let fail = |action| {
            move |error: redb::Error| ImageError::Database {
                action,
                path: path.to_path_buf(),
                source: Arc::new(error),
            }
        };
        let redb = Redb::builder()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|error| fail("open")(error.into()))?;
        let contents = load(&redb).map_err(fail("read"))?;
        Ok((
            Self {
                redb,
                path: path.to_path_buf(),
            },
            contents,
        ))
    }

    /// Applies a change durably.
    pub(crate) fn apply(&self, change: &Change) -> Result<(), ImageError> {
        self.try_apply(change)
            .map_err(|error| ImageError::Database {
                action: "write",
                path: self.path.clone(),
                source: Arc::new(error),
            })
    }

    fn try_apply(&self, change: &Change) -> Result<(), redb::Error> {
        let transaction = self.redb.begin_write()?;
        {
            let mut images = transaction.open_table(IMAGES)?;
            for record in &change.put_images {
                images.insert(record.id.as_str(), encode(record)?.as_slice())?;
            }
            for id in &change.remove_images {
                images.remove(id.as_str())?;
            }
            let mut layers = transaction.open_table(LAYERS)?;
            for (diff_id, record) in &change.put_layers {
                layers.insert(diff_id.as_str(), encode(record)?.as_slice())?;
            }
            for diff_id in &change.remove_layers {
                layers.remove(diff_id.as_str())?;
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

/// Reads both tables; rows that can't be read are set aside.
fn load(redb: &Redb) -> Result<Contents, redb::Error> {
    let transaction = redb.begin_write()?;
    let mut contents = Contents::default();
    {
        let mut aside = transaction.open_table(SET_ASIDE)?;
        let mut images = transaction.open_table(IMAGES)?;
        let (good, bad) = read_rows::<ImageRecord>(&images)?;
        for (key, value) in bad {
            tracing::error!(
                image = key,
                "image record can't be read and is set aside; pull the image again"
            );
            aside.insert(format!("images/{key}").as_str(), value.as_slice())?;
            images.remove(key.as_str())?;
        }
        contents.images = good.into_iter().map(|(_, record)| record).collect();
        let mut layers = transaction.open_table(LAYERS)?;
        let (good, bad) = read_rows::<LayerRecord>(&layers)?;
        for (key, value) in bad {
            tracing::error!(layer = key, "layer record can't be read and is set aside");
            aside.insert(format!("layers/{key}").as_str(), value.as_slice())?;
            layers.remove(key.as_str())?;
        }
        contents.layers = good;
        contents.set_aside = aside.iter()?.count();
    }
    transaction.commit()?;
    // A read transaction proves that what was just written can be read back.
    redb.begin_read()?.open_table(IMAGES)?;
    Ok(contents)
}

type Rows<T> = (Vec<(String, T)>, Vec<(String, Vec<u8>)>);

fn read_rows<T: DeserializeOwned>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<Rows<T>, redb::Error> {
    #[derive(Deserialize)]
    struct Versioned {
        schema: u32,
    }
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for row in table.iter()? {
        let (key, value) = row?;
        let (key, value) = (key.value().to_owned(), value.value());
        let known = serde_json::from_slice::<Versioned>(value).is_ok_and(|v| v.schema <= SCHEMA);
        match serde_json::from_slice(value) {
            Ok(record) if known => good.push((key, record)),
            _ => bad.push((key, value.to_vec())),
        }
    }
    Ok((good, bad))
}

fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(record).map_err(|error| redb::Error::Io(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_survive_and_strange_rows_are_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        let record = ImageRecord {
            tags: vec!["docker.io/library/x:latest".into()],
            ..ImageRecord::new("sha256:1".into())
        };
        {
            let (database, contents) = Database::open(&path).unwrap();
            assert!(contents.images.is_empty());
            let newer = ImageRecord {
                schema: SCHEMA + 1,
                ..ImageRecord::new("sha256:2".into())
            };
            database
                .apply(&Change {
                    put_images: vec![record.clone(), newer],
                    put_layers: vec![("sha256:3".into(), LayerRecord::new(1, 2))],
                    ..Change::default()
                })
                .unwrap();
        }
        for _ in 0..2 {
            let (_, contents) = Database::open(&path).unwrap();
            assert_eq!(contents.images, std::slice::from_ref(&record));
            assert_eq!(contents.layers.len(), 1);
            assert_eq!(contents.set_aside, 1);
        }
    }

    #[test]
    fn a_second_process_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        let _first = Database::open(&path).unwrap();
        let error = Database::open(&path).err().unwrap();
        assert!(error.chain().contains("open"), "{}", error.chain());
    }
}
