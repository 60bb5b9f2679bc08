//! Unpacks one layer's archive into a directory, in the form that overlayfs stacks (image
//! specification, "Image Layer Filesystem Changeset").
//!
//! A layer is hostile input. No path is ever put together as a string and handed to the kernel from
//! the outside: every entry is created relative to a descriptor of its parent directory, and that
//! descriptor comes from `openat2` with `RESOLVE_BENEATH`, which fails when a name or a symbolic link
//! leads out of the layer. Names with `..` are refused outright.
//!
//! Whiteouts become overlayfs' (a 0:0 character device), opaque directories get
//! `trusted.overlay.opaque=y`. Both speak of lower layers only, wherever in the archive they stand:
//! an entry of the same layer stays, and a directory that the layer both whites out and fills is
//! opaque. The root of a layer can't be marked: overlayfs heeds no mark on the root of a lower layer. That it
//! is opaque is reported in [`Unpacked::opaque`], and what is below such a layer is then left out of the
//! stack.
//!
//! A directory that an archive needs but doesn't name is made with mode 0755, owned by root, and
//! reported in [`Unpacked::implied`], so that it can take over the attributes it has in a lower layer
//! of the same image.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::tarball::{Entry, Kind, TarError, TarReader};
use crate::trees;
use crate::unpack::attributes::{owner, set_attributes, set_opaque, times};
use crate::unpack::beneath::{
    c_name, clean, escape, is_dir, is_whiteout, open_child, reopen, stat,
};

mod attributes;
mod beneath;

pub(crate) use beneath::open_beneath;

/// The prefix of whiteout names.
const WHITEOUT: &[u8] = b".wh.";
/// The prefix of AUFS' own files, which mean nothing here.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Disk space is counted in blocks of this size.
pub(crate) const BLOCK: u64 = 4096;

/// How much memory the names of a layer's directories may take, which are kept to its end: some
/// hundreds of thousands of directories. Archives compress a thousandfold, so that a small one could
/// name more than any machine can remember.
const MAX_NAMES: usize = 64 << 20;
/// What is kept with each name, roughly.
const NAME_OVERHEAD: usize = 64;

/// What was unpacked.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Bytes of disk space, in whole blocks.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Directories that the archive didn't name; the layer's root is the empty name.
    pub(crate) implied: Vec<Vec<u8>>,
    /// Whether nothing of the layers below is to be seen.
    pub(crate) opaque: bool,
}

/// Why a layer can't be unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    /// An entry that may not be unpacked.
    #[error("entry {entry:?}: {reason}")]
    Refused { entry: String, reason: String },
    /// The archive is broken, or its stream is.
    #[error(transparent)]
    Archive(#[from] TarError),
    /// A system call failed.
    #[error("entry {entry:?}")]
    Io {
        entry: String,
        #[source]
        source: io::Error,
    },
}

/// Why one entry fails; the entry's name is added later.
enum Failure {
    Refused(String),
    Io(io::Error),
    Read(io::Error),
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        match error {
            Errno::NAMETOOLONG => refuse("its name is longer than the file system allows"),
            other => Self::Io(other.into()),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn refuse(reason: impl Into<String>) -> Failure {
    Failure::Refused(reason.into())
}

/// Unpacks `archive` into `root`, an empty directory. `spare` is a directory of the same file system
/// that may be used for intermediate steps. `written` counts the bytes of files while they appear.
///
/// Returns the archive's stream, too: what follows the end of the archive is still to be read.
pub(crate) fn unpack<R: Read>(
    archive: R,
    root: &Path,
    spare: &Path,
    written: &AtomicU64,
) -> Result<(R, Unpacked), UnpackError> {
    let mut layer = Layer::new(root, spare, written)?;
    let mut archive = TarReader::new(archive);
    while let Some(entry) = archive.next()? {
        let shown = || String::from_utf8_lossy(&entry.name).into_owned();
        layer
            .apply(&entry, &mut archive)
            .map_err(|failure| match failure {
                Failure::Refused(reason) => UnpackError::Refused {
                    entry: shown(),
                    reason,
                },
                Failure::Io(source) => UnpackError::Io {
                    entry: shown(),
                    source,
                },
                Failure::Read(source) => UnpackError::Archive(TarError::Read(source)),
            })?;
    }
    let unpacked = layer.finish()?;
    Ok((archive.into_inner(), unpacked))
}

struct Layer<'a> {
    root: Rc<OwnedFd>,
    spare: OwnedFd,
    /// The directory of the last entry, by its name in the archive: most entries follow a sibling.
    parent: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// Directories' times, set at the end, because every new child changes them.
    times: BTreeMap<Vec<u8>, (i64, u32)>,
    /// What the names in `times` and `implied` take.
    names: usize,
    implied: BTreeSet<Vec<u8>>,
    opaque: bool,
    bytes: u64,
    inodes: u64,
    buffer: Vec<u8>,
    written: &'a AtomicU64,
}

impl<'a> Layer<'a> {
    fn new(root: &Path, spare: &Path, written: &'a AtomicU64) -> Result<Self, UnpackError> {
        let open = |path: &Path| {
            trees::open_dir(path).map_err(|source| UnpackError::Io {
                entry: path.display().to_string(),
                source,
            })
        };
        Ok(Self {
            root: Rc::new(open(root)?),
            spare: open(spare)?,
            parent: None,
            times: BTreeMap::new(),
            names: 0,
            implied: BTreeSet::from([Vec::new()]),
            opaque: false,
            bytes: BLOCK,
            inodes: 1,
            buffer: vec![0; 256 * 1024],
            written,
        })
    }

    fn apply<R: Read>(&mut self, entry: &Entry, archive: &mut TarReader<R>) -> Result<(), Failure> {
        let path = clean(&entry.name)?;
        let Some(name) = path
            .rsplit(|byte| *byte == b'/')
            .next()
            .filter(|name| !name.is_empty())
        else {
            return match entry.kind {
                Kind::Directory => self.root_entry(entry),
                _ => Err(refuse("the layer's root must be a directory")),
            };
        };
        let parent_path = &path[..path.len() - name.len()];
        let parent_path = parent_path.strip_suffix(b"/").unwrap_or(parent_path);
        for part in parent_path.split(|byte| *byte == b'/') {
            if part.starts_with(WHITEOUT_META) {
                return Ok(());
            }
            if part.starts_with(WHITEOUT) {
                return Err(refuse("it is below a whiteout, which is no directory"));
            }
        }
        if name == OPAQUE && parent_path.is_empty() {
            self.opaque = true;
            return Ok(());
        }
        if name == OPAQUE {
            let parent = self.parent(parent_path)?;
            return set_opaque(&reopen(&parent)?);
        }
        if name.starts_with(WHITEOUT_META) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(refuse("it is a whiteout of nothing that could be hidden"));
            }
            let parent = self.parent(parent_path)?;
            return self.whiteout(&parent, hidden);
        }
        let parent = self.parent(parent_path)?;
        self.create(&parent, &path, name, entry, archive)
    }

    /// The archive's entry for the layer's root itself.
    fn root_entry(&mut self, entry: &Entry) -> Result<(), Failure> {
        let root = Rc::clone(&self.root);
        set_attributes(root.as_fd(), entry)?;
        self.implied.remove(&b""[..]);
        self.set_time(b"", entry)
    }

    /// Hides `hidden` of the lower layers.
    fn whiteout(&mut self, parent: &OwnedFd, hidden: &[u8]) -> Result<(), Failure> {
        let name = c_name(hidden)?;
        match stat(parent, &name)? {
            Some(found) if is_dir(&found) => set_opaque(&open_child(parent, &name)?),
            // An entry of this layer hides the lower one by itself.
            Some(_) => Ok(()),
            None => {
                rustix::fs::mknodat(parent, &name, FileType::CharacterDevice, Mode::empty(), 0)?;
                self.inodes += 1;
                Ok(())
            }
        }
    }

    fn create<R: Read>(
        &mut self,
        parent: &OwnedFd,
        path: &[u8],
        name: &[u8],
        entry: &Entry,
        archive: &mut TarReader<R>,
    ) -> Result<(), Failure> {
        let c_name = c_name(name)?;
        if let Kind::HardLink(target) = &entry.kind {
            return self.hard_link(parent, path, &c_name, target);
        }
        let found = stat(parent, &c_name)?;
        if entry.kind == Kind::Directory {
            return self.directory(parent, path, &c_name, entry, found);
        }
        if let Some(found) = found {
            self.make_way(parent, &c_name, path, &found)?;
        }
        self.inodes += 1;
        match &entry.kind {
            Kind::Regular => return self.regular(parent, &c_name, entry, archive),
            Kind::Symlink(target) => {
                if target.is_empty() {
                    return Err(refuse("it is a symbolic link to nothing"));
                }
                let target = CString::new(target.as_slice())
                    .map_err(|_| refuse("its target holds a NUL"))?;
                rustix::fs::symlinkat(&target, parent, &c_name)?;
            }
            Kind::Fifo => self.node(parent, &c_name, FileType::Fifo, 0)?,
            Kind::CharDevice { major, minor } => {
                self.node(
                    parent,
                    &c_name,
                    FileType::CharacterDevice,
                    rustix::fs::makedev(*major, *minor),
                )?;
            }
            Kind::BlockDevice { major, minor } => {
                self.node(
                    parent,
                    &c_name,
                    FileType::BlockDevice,
                    rustix::fs::makedev(*major, *minor),
                )?;
            }
            Kind::Directory | Kind::HardLink(_) => {}
        }
        let (uid, gid) = owner(entry)?;
        rustix::fs::chownat(
            parent,
            &c_name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        if !matches!(entry.kind, Kind::Symlink(_)) {
            // The node was just made by us and is no symbolic link.
            rustix::fs::chmodat(
                parent,
                &c_name,
                Mode::from_raw_mode(entry.mode),
                AtFlags::empty(),
            )?;
        }
        rustix::fs::utimensat(
            parent,
            &c_name,
            &times(entry.mtime),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        Ok(())
    }

    fn node(
        &self,
        parent: &OwnedFd,
        name: &CString,
        kind: FileType,
        device: u64,
    ) -> Result<(), Failure> {
        Ok(rustix::fs::mknodat(
            parent,
            name,
            kind,
            Mode::RUSR | Mode::WUSR,
            device,
        )?)
    }

    fn directory(
        &mut self,
        parent: &OwnedFd,
        path: &[u8],
        name: &CString,
        entry: &Entry,
        found: Option<Stat>,
    ) -> Result<(), Failure> {
        let mut opaque = false;
        let exists = match found {
            Some(found) if is_dir(&found) => true,
            Some(found) => {
                opaque = is_whiteout(&found);
                self.make_way(parent, name, path, &found)?;
                false
            }
            None => false,
        };
        if !exists {
            rustix::fs::mkdirat(parent, name, Mode::RWXU)?;
            self.count_directory();
        }
        let fd = open_child(parent, name)?;
        set_attributes(fd.as_fd(), entry)?;
        if opaque {
            set_opaque(&fd)?;
        }
        if self.implied.remove(path) {
            self.names = self.names.saturating_sub(path.len() + NAME_OVERHEAD);
        }
        self.set_time(path, entry)
    }

    fn regular<R: Read>(
        &mut self,
        parent: &OwnedFd,
        name: &CString,
        entry: &Entry,
        archive: &mut TarReader<R>,
    ) -> Result<(), Failure> {
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(
            parent,
            name,
            flags,
            Mode::RUSR | Mode::WUSR,
        )?);
        match &entry.segments {
            None => self.copy(&mut file, archive, entry.size)?,
            Some(segments) => {
                for segment in segments {
                    file.seek(SeekFrom::Start(segment.offset))?;
                    self.copy(&mut file, archive, segment.length)?;
                }
                file.set_len(entry.size)?;
            }
        }
        set_attributes(file.as_fd(), entry)?;
        rustix::fs::futimens(&file, &times(entry.mtime))?;
        Ok(())
    }

    /// Copies the next `length` bytes of the entry's data.
    fn copy<R: Read>(
        &mut self,
        file: &mut File,
        archive: &mut TarReader<R>,
        length: u64,
    ) -> Result<(), Failure> {
        let mut left = length;
        while left > 0 {
            let want = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(self.buffer.len());
            let got = archive
                .read(&mut self.buffer[..want])
                .map_err(Failure::Read)?;
            if got == 0 {
                return Err(Failure::Read(io::ErrorKind::UnexpectedEof.into()));
            }
            file.write_all(&self.buffer[..got])?;
            self.written.fetch_add(got as u64, Ordering::Relaxed);
            left -= got as u64;
        }
        self.bytes = self.bytes.saturating_add(length.div_ceil(BLOCK) * BLOCK);
        Ok(())
    }

    fn hard_link(
        &mut self,
        parent: &OwnedFd,
        path: &[u8],
        name: &CString,
        target: &[u8],
    ) -> Result<(), Failure> {
        let shown = String::from_utf8_lossy(target);
        let target = clean(target)
            .map_err(|_| refuse(format!("its target {shown:?} leads out of the layer")))?;
        if target == path {
            return Ok(());
        }
        let target_name = target
            .rsplit(|byte| *byte == b'/')
            .next()
            .unwrap_or(&target);
        let target_dir = &target[..target.len() - target_name.len()];
        let absent = || {
            refuse(format!(
                "it is a hard link to {shown:?}, which is no file of this layer"
            ))
        };
        let dir = match self.beneath(target_dir) {
            Ok(dir) => dir,
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(absent()),
            Err(error) => return Err(escape(error, target_dir)),
        };
        let target_name = c_name(target_name).map_err(|_| absent())?;
        let found = stat(&dir, &target_name)?.ok_or_else(absent)?;
        if is_dir(&found) || is_whiteout(&found) {
            return Err(absent());
        }
        if let Some(existing) = stat(parent, name)? {
            if (existing.st_dev, existing.st_ino) == (found.st_dev, found.st_ino) {
                return Ok(());
            }
            self.make_way(parent, name, path, &existing)?;
        }
        match rustix::fs::linkat(&dir, &target_name, parent, name, AtFlags::empty()) {
            Ok(()) => Ok(()),
            // The target was below what had to make way.
            Err(Errno::NOENT) => Err(absent()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what stands where another entry of the same name goes.
    fn make_way(
        &mut self,
        parent: &OwnedFd,
        name: &CString,
        path: &[u8],
        found: &Stat,
    ) -> Result<(), Failure> {
        // Any descriptor that was resolved through what goes away is stale.
        self.parent = None;
        let removed = trees::remove_tree(parent.as_fd(), name, self.spare.as_fd())?;
        self.inodes = self.inodes.saturating_sub(removed);
        if is_dir(found) {
            self.forget_names(path);
        }
        Ok(())
    }

    /// Keeps the time of a directory; the last entry of a name counts.
    fn set_time(&mut self, path: &[u8], entry: &Entry) -> Result<(), Failure> {
        if self.times.insert(path.to_vec(), entry.mtime).is_none() {
            self.count_name(path)?;
        }
        Ok(())
    }

    fn count_name(&mut self, path: &[u8]) -> Result<(), Failure> {
        self.names += path.len() + NAME_OVERHEAD;
        if self.names > MAX_NAMES {
            return Err(refuse(format!(
                "the names of the layer's directories are longer than {MAX_NAMES} bytes in all"
            )));
        }
        Ok(())
    }

    /// The directory `path` is gone with everything below it.
    fn forget_names(&mut self, path: &[u8]) {
        // What is below stands between `path/` and the byte that follows the slash.
        let (first, end) = ([path, b"/"].concat(), [path, b"0"].concat());
        let mut gone: Vec<Vec<u8>> = self
            .times
            .range(first.clone()..end.clone())
            .map(|(name, _)| name.clone())
            .collect();
        gone.push(path.to_vec());
        for name in &gone {
            if self.times.remove(name).is_some() {
                self.names = self.names.saturating_sub(name.len() + NAME_OVERHEAD);
            }
        }
        gone = self.implied.range(first..end).cloned().collect();
        gone.push(path.to_vec());
        for name in &gone {
            if self.implied.remove(name) {
                self.names = self.names.saturating_sub(name.len() + NAME_OVERHEAD);
            }
        }
    }

    /// The directory `path`, made if absent.
    fn parent(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, Failure> {
        if path.is_empty() {
            return Ok(Rc::clone(&self.root));
        }
        if let Some((known, fd)) = &self.parent
            && known == path
        {
            return Ok(Rc::clone(fd));
        }
        let fd = match self.beneath(path) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => self.imply(path)?,
            Err(error) => return Err(escape(error, path)),
        };
        let fd = Rc::new(fd);
        self.parent = Some((path.to_vec(), Rc::clone(&fd)));
        Ok(fd)
    }

    /// Makes the directory `path` and whatever it needs, level by level.
    fn imply(&mut self, path: &[u8]) -> Result<OwnedFd, Failure> {
        let mut at: Option<OwnedFd> = None;
        let mut end = 0;
        loop {
            let start = end;
            end = path[start..]
                .iter()
                .position(|byte| *byte == b'/')
                .map_or(path.len(), |offset| start + offset);
            let so_far = &path[..end];
            let next = match self.beneath(so_far) {
                Ok(fd) => fd,
                Err(Errno::NOENT | Errno::NOTDIR) => {
                    let parent = at.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
                    self.imply_one(parent.try_clone_to_owned()?, so_far, &path[start..end])?
                }
                Err(error) => return Err(escape(error, so_far)),
            };
            if end == path.len() {
                return Ok(next);
            }
            at = Some(next);
            end += 1;
        }
    }

    fn imply_one(&mut self, parent: OwnedFd, path: &[u8], name: &[u8]) -> Result<OwnedFd, Failure> {
        let name = c_name(name)?;
        let mut opaque = false;
        match stat(&parent, &name)? {
            None => {}
            // The layer hides the lower directory and puts a new one there.
            Some(found) if is_whiteout(&found) => {
                self.make_way(&parent, &name, path, &found)?;
                opaque = true;
            }
            Some(_) => {
                return Err(refuse(format!(
                    "its parent {:?} is a file or a broken symbolic link",
                    String::from_utf8_lossy(path)
                )));
            }
        }
        rustix::fs::mkdirat(&parent, &name, Mode::RWXU)?;
        self.count_directory();
        let fd = open_child(&parent, &name)?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755))?;
        if opaque {
            set_opaque(&fd)?;
        } else {
            self.implied.insert(path.to_vec());
            self.count_name(path)?;
        }
        Ok(fd)
    }

    /// Opens a directory of the layer; fails when anything on the way leads out of it.
    fn beneath(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        open_beneath(self.root.as_fd(), path, OFlags::PATH)
    }

    fn count_directory(&mut self) {
        self.inodes += 1;
        self.bytes = self.bytes.saturating_add(BLOCK);
    }

    fn finish(mut self) -> Result<Unpacked, UnpackError> {
        // The last entry of a name counts; children before parents would not matter, since setting
        // a time changes no other directory's.
        for (path, time) in std::mem::take(&mut self.times) {
            let set = || -> Result<(), Errno> {
                let fd =
                    match open_beneath(self.root.as_fd(), &path, OFlags::RDONLY | OFlags::NOFOLLOW)
                    {
                        // Replaced by something else since: itself, or a parent by a link, which
                        // may lead out of the layer.
                        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {
                            return Ok(());
                        }
                        result => result?,
                    };
                rustix::fs::futimens(&fd, &times(time))
            };
            set().map_err(|error| UnpackError::Io {
                entry: String::from_utf8_lossy(&path).into_owned(),
                source: error.into(),
            })?;
        }
        Ok(Unpacked {
            bytes: self.bytes,
            inodes: self.inodes,
            implied: self.implied.into_iter().collect(),
            opaque: self.opaque,
        })
    }
}

#[cfg(test)]
mod tests;
