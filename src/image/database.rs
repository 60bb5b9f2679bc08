//! The durable metadata: which images there are, and which layers are complete.
//!
//! One redb file holds both, so that an image and its layers appear in one transaction. A layer's
//! directory without its row here was never completed (or is already removed) and is garbage. Values
//! are JSON with a schema version. A row that can't be read is moved to the `set_aside` table and
//! reported; it is forgotten when its image or layer is there again. A file that can't be read is
//! renamed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{
    Database as Redb, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition,
    TableHandle,
};
use rustix::fs::{CWD, FallocateFlags, RenameFlags};
use rustix::io::Errno;
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
/// Disk space that the file gets at once.
const RESERVE: u64 = 4 << 20;
/// Between the file's name and a number: a file that could not be read.
const UNREADABLE: &str = ".unreadable-";

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
    /// The type of an artifact, whose id is its manifest's digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) artifact: Option<String>,
}

/// What is durable of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) schema: u32,
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Whether it hides everything below it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) opaque: bool,
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
            artifact: None,
        }
    }
}

impl LayerRecord {
    pub(crate) fn new(bytes: u64, inodes: u64) -> Self {
        Self {
            schema: SCHEMA,
            bytes,
            inodes,
            opaque: false,
        }
    }
}

/// A change, applied as a whole or not at all. Applying it twice is like applying it once.
#[derive(Debug, Default, Clone)]
pub(crate) struct Change {
    pub(crate) put_images: Vec<ImageRecord>,
    pub(crate) remove_images: Vec<String>,
    pub(crate) put_layers: Vec<(String, LayerRecord)>,
    pub(crate) remove_layers: Vec<String>,
}

impl Change {
    fn is_empty(&self) -> bool {
        self.put_images.is_empty()
            && self.remove_images.is_empty()
            && self.put_layers.is_empty()
            && self.remove_layers.is_empty()
    }
}

/// What a store held when it was opened.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) images: Vec<ImageRecord>,
    pub(crate) layers: Vec<(String, LayerRecord)>,
    /// Whether something could not be read, now or earlier: rows, or a whole file. While it is kept,
    /// nothing that it might refer to may be taken for garbage.
    pub(crate) set_aside: bool,
}

/// The open metadata store.
pub(crate) struct Database {
    path: PathBuf,
    open: Opener,
    access: Mutex<Access>,
}

type Opener = Box<dyn Fn(&Path) -> Result<Redb, redb::Error> + Send + Sync>;

struct Access {
    /// After a failed write or sync redb refuses everything until the file is opened again; so the
    /// handle is dropped then, and who comes next opens another one.
    redb: Option<Redb>,
    /// Removals that are done, but could not be written. They go with the next change.
    owed: Change,
}

impl Database {
    /// Opens or creates the store and reads all of it. Writes nothing that isn't necessary, so that
    /// a full disk is no reason not to start. A file that can't be read is set aside.
    pub(crate) fn open(path: &Path) -> Result<(Self, Contents), ImageError> {
        Self::open_with(path, Box::new(open_file))
    }

    fn open_with(path: &Path, open: Opener) -> Result<(Self, Contents), ImageError> {
        let fail = |action: &'static str| {
            move |error: redb::Error| ImageError::Database {
                action,
                path: path.to_path_buf(),
                source: Arc::new(error),
            }
        };
        let (redb, mut contents) = match open_and_load(path, &open) {
            Ok(opened) => opened,
            Err(redb::Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                create(path).map_err(fail("create"))?;
                open_and_load(path, &open).map_err(fail("open"))?
            }
            Err(error) if is_damage(&error) => {
                let aside = set_file_aside(path)?;
                tracing::error!(
                    path = %aside.display(),
                    error = %error,
                    "the image metadata can't be read and is set aside; pull the images again, or stop the daemon and put a good copy in place"
                );
                create(path).map_err(fail("create"))?;
                open_and_load(path, &open).map_err(fail("open"))?
            }
            Err(error) => return Err(fail("open")(error)),
        };
        if !files_aside(path)?.is_empty() {
            contents.set_aside = true;
        }
        let access = Mutex::new(Access {
            redb,
            owed: Change::default(),
        });
        let path = path.to_path_buf();
        Ok((Self { path, open, access }, contents))
    }

    /// Applies a change durably, and what is owed with it. A failure of the storage is given a second
    /// try with a fresh handle.
    pub(crate) fn apply(&self, change: &Change) -> Result<(), ImageError> {
        let mut access = self.access();
        let change = access.with_owed(change);
        if change.is_empty() {
            return Ok(());
        }
        let mut first = None;
        for _ in 0..2 {
            match self.write(&mut access, &change) {
                Ok(()) => {
                    access.owed = Change::default();
                    return Ok(());
                }
                Err(error) => {
                    access.redb = None;
                    // The first error is the cause.
                    first.get_or_insert(error);
                }
            }
        }
        Err(ImageError::Database {
            action: "write",
            path: self.path.clone(),
            source: Arc::new(first.unwrap_or(redb::Error::DatabaseClosed)),
        })
    }

    /// Takes note of removals that could not be written, but are done nevertheless.
    pub(crate) fn owe(&self, removals: &Change) {
        let mut access = self.access();
        access.owed = access.with_owed(removals);
    }

    /// Whether the row of a layer that is gone may still be there.
    pub(crate) fn owes_layer(&self, diff_id: &str) -> bool {
        let access = self.access();
        access.owed.remove_layers.iter().any(|owed| owed == diff_id)
    }

    fn write(&self, access: &mut Access, change: &Change) -> Result<(), redb::Error> {
        let redb = match &mut access.redb {
            Some(redb) => redb,
            none => none.insert((self.open)(&self.path)?),
        };
        write(redb, change)
    }

    fn access(&self) -> MutexGuard<'_, Access> {
        self.access.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Access {
    /// The change together with the removals that are owed; what it puts is no longer to be removed.
    fn with_owed(&self, change: &Change) -> Change {
        let mut all = change.clone();
        for id in &self.owed.remove_images {
            if !all.remove_images.contains(id) && !all.put_images.iter().any(|put| put.id == *id) {
                all.remove_images.push(id.clone());
            }
        }
        for id in &self.owed.remove_layers {
            if !all.remove_layers.contains(id) && !all.put_layers.iter().any(|(put, _)| put == id) {
                all.remove_layers.push(id.clone());
            }
        }
        all
    }
}

fn write(redb: &Redb, change: &Change) -> Result<(), redb::Error> {
    let transaction = redb.begin_write()?;
    {
        let mut aside = transaction.open_table(SET_ASIDE)?;
        let mut images = transaction.open_table(IMAGES)?;
        for record in &change.put_images {
            images.insert(record.id.as_str(), encode(record)?.as_slice())?;
            // What couldn't be read is here again.
            aside.remove(format!("images/{}", record.id).as_str())?;
        }
        for id in &change.remove_images {
            images.remove(id.as_str())?;
        }
        let mut layers = transaction.open_table(LAYERS)?;
        for (diff_id, record) in &change.put_layers {
            layers.insert(diff_id.as_str(), encode(record)?.as_slice())?;
            aside.remove(format!("layers/{diff_id}").as_str())?;
        }
        for diff_id in &change.remove_layers {
            layers.remove(diff_id.as_str())?;
        }
    }
    transaction.commit()?;
    Ok(())
}

fn builder() -> redb::Builder {
    let mut builder = Redb::builder();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// Opens an existing file, and makes sure of the disk space it will need.
fn open_file(path: &Path) -> Result<Redb, redb::Error> {
    // Damage that redb doesn't expect makes it panic.
    let opened = std::panic::catch_unwind(|| builder().open(path));
    let redb = opened.map_err(|_| redb::Error::Corrupted("it makes redb panic".to_owned()))??;
    reserve(path);
    Ok(redb)
}

/// Allocates blocks for the file ahead of need, so that a removal can be written when the disk is
/// full. Best effort: not every file system can.
fn reserve(path: &Path) {
    let reserved = || -> io::Result<()> {
        let file = fs::OpenOptions::new().write(true).open(path)?;
        let length = file.metadata()?.len().max(RESERVE);
        rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, length)?;
        Ok(())
    };
    if let Err(error) = reserved() {
        tracing::debug!(path = %path.display(), %error, "no space can be reserved for image metadata");
    }
}

/// Makes an empty store: under another name first, because a file that redb did not finish can't be
/// opened any more.
fn create(path: &Path) -> Result<(), redb::Error> {
    let new = path.with_extension("redb.new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let redb = builder().create(&new)?;
    write(&redb, &Change::default())?;
    redb.close()?;
    reserve(&new);
    fs::File::open(&new)?.sync_all()?;
    fs::rename(&new, path)?;
    if let Some(dir) = path.parent() {
        fs::File::open(dir)?.sync_all()?;
    }
    Ok(())
}

/// Whether an error says that the file is no store, or a broken one; another attempt would fail, too.
fn is_damage(error: &redb::Error) -> bool {
    match error {
        redb::Error::Corrupted(_)
        | redb::Error::UpgradeRequired(_)
        | redb::Error::RepairAborted
        | redb::Error::TableTypeMismatch { .. }
        | redb::Error::TypeDefinitionChanged { .. }
        | redb::Error::TableIsMultimap(_) => true,
        redb::Error::Io(error) => matches!(
            error.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
        ),
        _ => false,
    }
}

/// Renames an unreadable file to `<name>.unreadable-<n>`.
fn set_file_aside(path: &Path) -> Result<PathBuf, ImageError> {
    for n in 1.. {
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!("{UNREADABLE}{n}"));
        let aside = PathBuf::from(aside);
        match rustix::fs::renameat_with(CWD, path, CWD, &aside, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(aside),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(ImageError::io("set aside", path, error.into())),
        }
    }
    Ok(path.to_path_buf())
}

/// The files that were set aside and are still there.
fn files_aside(path: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(Vec::new());
    };
    let start = format!("{}{UNREADABLE}", name.display());
    let list = || {
        fs::read_dir(dir)?
            .map(|entry| Ok(entry?.path()))
            .filter(|path: &io::Result<PathBuf>| {
                path.as_ref().map_or(true, |path| {
                    path.file_name()
                        .is_some_and(|name| name.to_string_lossy().starts_with(&start))
                })
            })
            .collect::<io::Result<Vec<_>>>()
    };
    list().map_err(|error| ImageError::io("list", dir, error))
}

/// Opens the file and reads all of it; rows that can't be read are set aside. There's no handle when
/// setting them aside has failed.
fn open_and_load(path: &Path, open: &Opener) -> Result<(Option<Redb>, Contents), redb::Error> {
    let redb = open(path)?;
    let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| load(&redb)));
    let (mut contents, bad) =
        read.map_err(|_| redb::Error::Corrupted("it makes redb panic".to_owned()))??;
    if bad.is_empty() {
        return Ok((Some(redb), contents));
    }
    contents.set_aside = true;
    match set_rows_aside(&redb, &bad) {
        Ok(()) => Ok((Some(redb), contents)),
        Err(error) => {
            tracing::warn!(%error, "image records can't be set aside; the next start tries again");
            Ok((None, contents))
        }
    }
}

/// A row that can't be read: its table, key and value.
struct Bad {
    table: TableDefinition<'static, &'static str, &'static [u8]>,
    key: String,
    value: Vec<u8>,
}

/// Reads all tables; only reads.
fn load(redb: &Redb) -> Result<(Contents, Vec<Bad>), redb::Error> {
    let transaction = redb.begin_read()?;
    let mut all_bad = Vec::new();
    let mut note = |table, bad: Vec<(String, Vec<u8>)>| {
        all_bad.extend(
            bad.into_iter()
                .map(|(key, value)| Bad { table, key, value }),
        );
    };
    let images = match existing(transaction.open_table(IMAGES))? {
        None => Vec::new(),
        Some(table) => {
            let (good, bad) = read_rows::<ImageRecord>(&table)?;
            for (key, _) in &bad {
                tracing::error!(
                    image = key,
                    "image record can't be read and is set aside; pull the image again"
                );
            }
            note(IMAGES, bad);
            good.into_iter().map(|(_, record)| record).collect()
        }
    };
    let layers = match existing(transaction.open_table(LAYERS))? {
        None => Vec::new(),
        Some(table) => {
            let (good, bad) = read_rows::<LayerRecord>(&table)?;
            for (key, _) in &bad {
                tracing::error!(layer = key, "layer record can't be read and is set aside");
            }
            note(LAYERS, bad);
            good
        }
    };
    let set_aside = match existing(transaction.open_table(SET_ASIDE))? {
        None => false,
        Some(table) => !table.is_empty()?,
    };
    let contents = Contents {
        images,
        layers,
        set_aside,
    };
    Ok((contents, all_bad))
}

/// A table that was not made yet is an empty one; the first change makes it.
fn existing<T>(opened: Result<T, redb::TableError>) -> Result<Option<T>, redb::Error> {
    match opened {
        Ok(table) => Ok(Some(table)),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn set_rows_aside(redb: &Redb, rows: &[Bad]) -> Result<(), redb::Error> {
    let transaction = redb.begin_write()?;
    {
        let mut aside = transaction.open_table(SET_ASIDE)?;
        for Bad { table, key, value } in rows {
            let name = format!("{}/{key}", table.name());
            aside.insert(name.as_str(), value.as_slice())?;
            transaction.open_table(*table)?.remove(key.as_str())?;
        }
    }
    transaction.commit()?;
    Ok(())
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
    use std::sync::atomic::{AtomicBool, Ordering};

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
            assert!(contents.set_aside);
        }
    }

    #[test]
    fn a_second_process_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        let _first = Database::open(&path).unwrap();
        let error = Database::open(&path).err().unwrap();
        assert!(error.chain().contains("open"), "{}", error.chain());
        // Nor is the first one's file taken away.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    fn put(id: &str) -> Change {
        Change {
            put_images: vec![ImageRecord::new(id.into())],
            ..Change::default()
        }
    }

    fn ids(contents: &Contents) -> Vec<&str> {
        contents
            .images
            .iter()
            .map(|record| record.id.as_str())
            .collect()
    }

    #[test]
    fn a_row_that_was_set_aside_is_forgotten_when_its_image_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        {
            let (database, _) = Database::open(&path).unwrap();
            let newer = Change {
                put_images: vec![ImageRecord {
                    schema: SCHEMA + 1,
                    ..ImageRecord::new("sha256:2".into())
                }],
                put_layers: vec![(
                    "sha256:3".into(),
                    LayerRecord {
                        schema: SCHEMA + 1,
                        ..LayerRecord::new(1, 2)
                    },
                )],
                ..Change::default()
            };
            database.apply(&newer).unwrap();
        }
        {
            let (database, contents) = Database::open(&path).unwrap();
            assert!(contents.set_aside && contents.images.is_empty());
            database.apply(&put("sha256:2")).unwrap();
        }
        {
            let (database, contents) = Database::open(&path).unwrap();
            assert!(contents.set_aside, "the layer's row is still there");
            let layer = Change {
                put_layers: vec![("sha256:3".into(), LayerRecord::new(1, 2))],
                ..Change::default()
            };
            database.apply(&layer).unwrap();
        }
        let (_, contents) = Database::open(&path).unwrap();
        assert!(!contents.set_aside);
        assert_eq!(
            (ids(&contents), contents.layers.len()),
            (vec!["sha256:2"], 1)
        );
    }

    /// Whatever stands where the store should be: it is kept, said, and no reason not to start.
    #[test]
    fn a_file_that_is_no_store_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        let half = {
            // What redb's creation leaves when it is killed: a length, but no magic number yet.
            let good = dir.path().join("good");
            create(&good).unwrap();
            let mut bytes = fs::read(&good).unwrap();
            fs::remove_file(&good).unwrap();
            bytes[..9].fill(0);
            bytes
        };
        let torn = {
            let good = dir.path().join("good");
            create(&good).unwrap();
            let mut bytes = fs::read(&good).unwrap();
            fs::remove_file(&good).unwrap();
            bytes.truncate(5000);
            bytes
        };
        for (n, bytes) in [
            b"".to_vec(),
            b"no store".to_vec(),
            vec![b'x'; 1 << 20],
            half,
            torn,
        ]
        .into_iter()
        .enumerate()
        {
            fs::write(&path, &bytes).unwrap();
            let (database, contents) = Database::open(&path).unwrap();
            assert!(contents.set_aside, "{n}");
            database.apply(&put("sha256:1")).unwrap();
            drop(database);
            let aside = dir.path().join(format!("images.redb.unreadable-{}", n + 1));
            assert_eq!(fs::read(&aside).unwrap(), bytes, "{n}");
            // As long as it's kept, nothing is swept.
            let (_, contents) = Database::open(&path).unwrap();
            assert!(contents.set_aside && ids(&contents) == ["sha256:1"], "{n}");
        }
        for aside in files_aside(&path).unwrap() {
            fs::remove_file(aside).unwrap();
        }
        assert!(!Database::open(&path).unwrap().1.set_aside);
    }

    #[test]
    fn a_start_that_was_killed_while_it_made_the_store_is_made_good() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        fs::write(dir.path().join("images.redb.new"), [0; 5000]).unwrap();
        let (_, contents) = Database::open(&path).unwrap();
        assert!(!contents.set_aside);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    /// A disk whose writes fail while the switch is on.
    #[derive(Debug)]
    struct Ill {
        file: redb::backends::FileBackend,
        switch: Arc<AtomicBool>,
    }

    impl Ill {
        fn check(&self) -> Result<(), io::Error> {
            if self.switch.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }
    }

    impl redb::StorageBackend for Ill {
        fn len(&self) -> Result<u64, io::Error> {
            self.file.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
            self.file.read(offset, out)
        }
        fn set_len(&self, length: u64) -> Result<(), io::Error> {
            self.check()?;
            self.file.set_len(length)
        }
        fn sync_data(&self) -> Result<(), io::Error> {
            self.check()?;
            self.file.sync_data()
        }
        fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
            self.check()?;
            self.file.write(offset, data)
        }
        fn close(&self) -> Result<(), io::Error> {
            self.file.close()
        }
    }

    #[test]
    fn a_failed_write_is_not_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        drop(Database::open(&path).unwrap());
        let switch = Arc::new(AtomicBool::new(false));
        let own = Arc::clone(&switch);
        let open = move |path: &Path| -> Result<Redb, redb::Error> {
            let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
            let ill = Ill {
                file: redb::backends::FileBackend::new(file)?,
                switch: Arc::clone(&own),
            };
            Ok(builder().create_with_backend(ill)?)
        };
        let (database, _) = Database::open_with(&path, Box::new(open)).unwrap();
        database.apply(&put("sha256:1")).unwrap();
        switch.store(true, Ordering::Relaxed);
        for _ in 0..2 {
            let error = database.apply(&put("sha256:2")).unwrap_err();
            assert_eq!(
                error.kind(),
                crate::ErrorKind::ResourceExhausted,
                "{}",
                error.chain()
            );
        }
        // A change of nothing needs no disk.
        database.apply(&Change::default()).unwrap();
        let removal = Change {
            remove_images: vec!["sha256:1".into()],
            remove_layers: vec!["sha256:9".into()],
            ..Change::default()
        };
        assert!(database.apply(&removal).is_err());
        database.owe(&removal);
        assert!(database.owes_layer("sha256:9"));
        // The disk is well again: so is the store, and what is owed is paid.
        switch.store(false, Ordering::Relaxed);
        database.apply(&put("sha256:3")).unwrap();
        assert!(!database.owes_layer("sha256:9"));
        drop(database);
        let (_, contents) = Database::open(&path).unwrap();
        assert_eq!(ids(&contents), ["sha256:3"]);
    }

    #[test]
    fn space_is_reserved() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        let _store = Database::open(&path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert!(metadata.blocks() * 512 >= RESERVE, "{}", metadata.blocks());
    }
}
