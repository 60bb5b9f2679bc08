//! What a container has changed of its root file system, as the peers put it into a checkpoint: an archive of
//! what is new or different (`rootfs-diff.tar`), and the list of what is gone (`deleted.files`).

use std::collections::{BTreeSet, HashMap};
use std::ffi::{CString, OsStr};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

pub mod apply;

/// overlayfs' own attributes.
const OVERLAY: &[u8] = b"trusted.overlay.";
const OPAQUE: &std::ffi::CStr = c"trusted.overlay.opaque";
/// How POSIX archives carry extended attributes.
const XATTR: &str = "SCHILY.xattr.";

/// Why the changes can't be read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A file can't be read, or the archive not written.
    #[error("can't save {} of the writable layer", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// There is too much of it.
    #[error("the writable layer was not saved in time")]
    Late,
}

/// Writes the archive of an overlay's upper directory to `archive`; returns the absolute paths of what is
/// deleted of the lower ones. Nothing may change in there meanwhile. Sockets are left out: nobody could
/// listen on them again.
///
/// # Errors
/// [`LayerError`].
pub fn save(
    upper: &Path,
    lower: &[PathBuf],
    archive: File,
    deadline: Instant,
) -> Result<Vec<String>, LayerError> {
    let mut builder = Builder::new(io::BufWriter::with_capacity(256 << 10, archive));
    builder.follow_symlinks(false);
    let mut saver = Saver {
        builder,
        upper,
        lower,
        deadline,
        linked: HashMap::new(),
        deleted: Vec::new(),
    };
    saver.directory(Path::new(""))?;
    let Saver {
        builder, deleted, ..
    } = saver;
    let written = builder
        .into_inner()
        .and_then(|mut out| io::Write::flush(&mut out));
    written.map_err(at(upper))?;
    Ok(deleted)
}

fn at(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> LayerError {
    let path = path.into();
    move |source| LayerError::File { path, source }
}

struct Saver<'a> {
    builder: Builder<io::BufWriter<File>>,
    upper: &'a Path,
    lower: &'a [PathBuf],
    deadline: Instant,
    /// Where a file with several names is in the archive, by its inode.
    linked: HashMap<u64, PathBuf>,
    deleted: Vec<String>,
}

impl Saver<'_> {
    /// A directory's children; `inside` is its path in the layer.
    fn directory(&mut self, inside: &Path) -> Result<(), LayerError> {
        let here = self.upper.join(inside);
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&here).map_err(at(&here))? {
            names.insert(entry.map_err(at(&here))?.file_name());
        }
        if !inside.as_os_str().is_empty() && is_opaque(&here) {
            self.hidden_below(inside, &names)?;
        }
        for name in &names {
            if Instant::now() >= self.deadline {
                return Err(LayerError::Late);
            }
            let (path, full) = (inside.join(name), here.join(name));
            let metadata = fs::symlink_metadata(&full).map_err(at(&full))?;
            if is_whiteout(&metadata) {
                self.deleted.push(shown(&path));
                continue;
            }
            self.entry(&path, &full, &metadata).map_err(at(&full))?;
            if metadata.is_dir() {
                self.directory(&path)?;
            }
        }
        Ok(())
    }

    /// What an opaque directory hides of the layers below.
    fn hidden_below(
        &mut self,
        inside: &Path,
        present: &BTreeSet<std::ffi::OsString>,
    ) -> Result<(), LayerError> {
        let mut hidden = BTreeSet::new();
        for layer in self.lower {
            let dir = layer.join(inside);
            let entries = match fs::symlink_metadata(&dir) {
                Ok(metadata) if metadata.is_dir() => fs::read_dir(&dir).map_err(at(&dir))?,
                _ => continue,
            };
            for entry in entries {
                let entry = entry.map_err(at(&dir))?;
                let metadata = entry.metadata().map_err(at(entry.path()))?;
                if !is_whiteout(&metadata) && !present.contains(&entry.file_name()) {
                    hidden.insert(entry.file_name());
                }
            }
        }
        let paths = hidden.iter().map(|name| shown(&inside.join(name)));
        self.deleted.extend(paths);
        Ok(())
    }

    fn entry(&mut self, path: &Path, full: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        if kind.is_socket() {
            return Ok(());
        }
        if !metadata.is_dir() && metadata.nlink() > 1 {
            if let Some(first) = self.linked.get(&metadata.ino()) {
                let mut header = Header::new_gnu();
                header.set_metadata(metadata);
                header.set_entry_type(EntryType::Link);
                header.set_size(0);
                return self.builder.append_link(&mut header, path, first);
            }
            self.linked.insert(metadata.ino(), path.to_owned());
        }
        self.attributes(full)?;
        let mut header = Header::new_gnu();
        header.set_metadata(metadata);
        header.set_size(0);
        if kind.is_symlink() {
            let target = fs::read_link(full)?;
            header.set_entry_type(EntryType::Symlink);
            return self.builder.append_link(&mut header, path, target);
        }
        if kind.is_file() {
            header.set_size(metadata.len());
            return self
                .builder
                .append_data(&mut header, path, File::open(full)?);
        }
        if kind.is_char_device() || kind.is_block_device() {
            let device = metadata.rdev();
            header.set_device_major(rustix::fs::major(device))?;
            header.set_device_minor(rustix::fs::minor(device))?;
        }
        self.builder.append_data(&mut header, path, io::empty())
    }

    /// The extended attributes of the entry that comes next.
    fn attributes(&mut self, full: &Path) -> io::Result<()> {
        let mut names = vec![0u8; 64 << 10];
        let length = match rustix::fs::llistxattr(full, &mut names) {
            Ok(length) => length,
            Err(Errno::NOTSUP) => 0,
            Err(e) => return Err(e.into()),
        };
        let mut found = Vec::new();
        for name in names[..length].split(|byte| *byte == 0) {
            if name.is_empty() || name.starts_with(OVERLAY) {
                continue;
            }
            let mut value = vec![0u8; 64 << 10];
            let length = match rustix::fs::lgetxattr(full, CString::new(name)?, &mut value) {
                Ok(length) => length,
                Err(Errno::NODATA) => continue,
                Err(e) => return Err(e.into()),
            };
            value.truncate(length);
            found.push((format!("{XATTR}{}", String::from_utf8_lossy(name)), value));
        }
        let records = found.iter().map(|(n, v)| (n.as_str(), v.as_slice()));
        if found.is_empty() {
            return Ok(());
        }
        self.builder.append_pax_extensions(records)
    }
}

fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

fn is_opaque(dir: &Path) -> bool {
    let mut value = [0u8; 1];
    rustix::fs::lgetxattr(dir, OPAQUE, &mut value).is_ok_and(|n| value[..n] == *b"y")
}

/// A path as the list of deleted files has it. Names that are no text can't be told there.
fn shown(path: &Path) -> String {
    let path = OsStr::from_bytes(path.as_os_str().as_bytes());
    format!("/{}", path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    #[test]
    fn what_changed_is_archived_and_what_is_gone_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, lower) = (dir.path().join("u"), dir.path().join("l"));
        fs::create_dir_all(upper.join("a/opaque")).unwrap();
        fs::create_dir_all(lower.join("a/opaque")).unwrap();
        fs::write(upper.join("a/file"), "text").unwrap();
        fs::hard_link(upper.join("a/file"), upper.join("a/second")).unwrap();
        symlink("/nowhere", upper.join("link")).unwrap();
        fs::write(upper.join("a/opaque/kept"), "new").unwrap();
        for name in ["kept", "hidden"] {
            fs::write(lower.join("a/opaque").join(name), "old").unwrap();
        }
        let mknod = |name: &str| {
            rustix::fs::mknodat(
                rustix::fs::CWD,
                upper.join(name),
                rustix::fs::FileType::CharacterDevice,
                rustix::fs::Mode::empty(),
                0,
            )
        };
        if mknod("gone").is_err() {
            return; // Not root.
        }
        let flags = rustix::fs::XattrFlags::empty();
        let marked = rustix::fs::setxattr(upper.join("a/opaque"), OPAQUE, b"y", flags).is_ok();
        let out = dir.path().join("diff.tar");
        let deadline = Instant::now() + Duration::from_secs(60);
        let file = File::create(&out).unwrap();
        let deleted = save(&upper, std::slice::from_ref(&lower), file, deadline).unwrap();
        assert!(deleted.contains(&"/gone".to_owned()));
        assert_eq!(deleted.contains(&"/a/opaque/hidden".to_owned()), marked);
        assert!(!deleted.contains(&"/a/opaque/kept".to_owned()));
        let mut archive = tar::Archive::new(File::open(&out).unwrap());
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|e| {
                let e = e.unwrap();
                (
                    e.path().unwrap().display().to_string(),
                    e.header().entry_type(),
                )
            })
            .collect();
        let has = |name: &str, kind| names.contains(&(name.to_owned(), kind));
        assert!(has("a/file", EntryType::Regular), "{names:?}");
        assert!(has("a/second", EntryType::Link), "{names:?}");
        assert!(has("link", EntryType::Symlink), "{names:?}");
        assert!(!names.iter().any(|(name, _)| name == "gone"));
        let late = save(&upper, &[], File::create(&out).unwrap(), Instant::now());
        assert!(matches!(late, Err(LayerError::Late)));
    }
}
