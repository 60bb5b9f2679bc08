//! Directory trees: removing them whatever they hold, and staging directories that vanish.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// Trees are walked with one file descriptor per level; what is deeper than this is first moved up.
/// A hostile layer can be thousands of levels deep, more than a process may hold descriptors.
const MAX_DEPTH: u32 = 32;

/// Opens a directory for use as a base of `*at` calls.
pub(crate) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

/// Removes `name` in `dir` with everything below it; nothing is followed, absence is fine. Deep
/// subtrees are moved to `top`, a directory of the same file system, on the way.
///
/// Returns the number of entries that were removed.
pub(crate) fn remove_tree(
    dir: BorrowedFd<'_>,
    name: &CStr,
    top: BorrowedFd<'_>,
) -> io::Result<u64> {
    let mut removal = Removal {
        top,
        deep: Vec::new(),
        count: 0,
    };
    removal.remove(dir, name, 0)?;
    while let Some(name) = removal.deep.pop() {
        removal.remove(top, &name, 0)?;
    }
    Ok(removal.count)
}

/// Removes a tree by its path.
pub(crate) fn remove_path(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let name = CString::new(name.as_bytes())?;
    match open_dir(parent) {
        Ok(parent) => remove_tree(parent.as_fd(), &name, parent.as_fd()).map(|_| ()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

struct Removal<'a> {
    top: BorrowedFd<'a>,
    deep: Vec<CString>,
    count: u64,
}

impl Removal<'_> {
    fn remove(&mut self, dir: BorrowedFd<'_>, name: &CStr, depth: u32) -> io::Result<()> {
        match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) => {
                self.count += 1;
                return Ok(());
            }
            Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        if depth >= MAX_DEPTH {
            return self.move_up(dir, name);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                self.remove(fd.as_fd(), name, depth + 1)?;
            }
        }
        rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?;
        self.count += 1;
        Ok(())
    }

    fn move_up(&mut self, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        loop {
            let fresh = CString::new(format!(".slipway-deep-{}", unique()))?;
            match rustix::fs::renameat_with(dir, name, self.top, &fresh, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    self.deep.push(fresh);
                    return Ok(());
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A number that no other caller in this process gets.
fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A directory for work in progress; removed when dropped. What is worth keeping is moved out before.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
}

impl Staging {
    /// Makes a directory of a new name under `parent`, for our eyes only.
    pub(crate) fn new(parent: &Path, purpose: &str) -> io::Result<Self> {
        loop {
            let name = format!("{purpose}-{}-{}", std::process::id(), unique());
            let path = parent.join(name);
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = remove_path(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "can't remove a staging directory; the next start will");
        }
    }
}

/// Moves `path` into `trash` under a name that nothing else has there.
pub(crate) fn discard(path: &Path, trash: &Path) -> io::Result<()> {
    loop {
        let target = trash.join(format!("{}-{}", std::process::id(), unique()));
        match rustix::fs::renameat_with(CWD, path, CWD, &target, RenameFlags::NOREPLACE) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes everything in `dir`. One entry that resists doesn't stop the others.
pub(crate) fn empty(dir: &Path) {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!(path = %dir.display(), %error, "can't list a directory to empty it");
            return;
        }
    };
    for entry in entries.flatten() {
        if let Err(error) = remove_path(&entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "can't remove garbage; the next start tries again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_the_descriptor_limit_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let top = open_dir(dir.path()).unwrap();
        rustix::fs::mkdirat(&top, "t", Mode::RWXU).unwrap();
        let open = |parent: &OwnedFd, name: &str| {
            rustix::fs::openat(parent, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
        };
        let mut at = open(&top, "t");
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            rustix::fs::symlinkat("/", &at, "link").unwrap();
            at = open(&at, "d");
        }
        remove_path(&dir.path().join("t")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        remove_path(&dir.path().join("t")).unwrap();
    }

    #[test]
    fn staging_vanishes() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::new(dir.path(), "x").unwrap();
        fs::write(staging.path().join("f"), b"").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(staging);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
