//! Names of a layer's entries, and the directories they stand in: resolved below the layer's root or
//! not at all.

use std::ffi::CString;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::unpack::{Failure, refuse};

/// Opens the directory `path` below `root`; the empty path is the root itself.
pub(crate) fn open_beneath(
    root: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut attempts = 0;
    loop {
        match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
            // A rename elsewhere on the system made the kernel unsure; it asks to try again.
            Err(Errno::AGAIN) if attempts < 100 => attempts += 1,
            result => return result,
        }
    }
}

/// The error for a directory that can't be resolved within the layer.
pub(super) fn escape(error: Errno, path: &[u8]) -> Failure {
    let path = String::from_utf8_lossy(path);
    match error {
        Errno::XDEV => refuse(format!(
            "its directory {path:?} leads out of the layer through a symbolic link"
        )),
        Errno::LOOP => refuse(format!(
            "its directory {path:?} is a loop of symbolic links"
        )),
        other => other.into(),
    }
}

/// The name relative to the layer's root, without empty and `.` components. A leading slash means
/// the layer's root; `..` is refused, wherever it would lead.
pub(super) fn clean(name: &[u8]) -> Result<Vec<u8>, Failure> {
    let mut path = Vec::with_capacity(name.len());
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return Err(refuse("its name climbs with `..`")),
            _ if part.contains(&0) => return Err(refuse("its name holds a NUL")),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(part);
    }
    Ok(path)
}

pub(super) fn c_name(name: &[u8]) -> Result<CString, Failure> {
    if name.is_empty() {
        return Err(refuse("its name is empty"));
    }
    CString::new(name).map_err(|_| refuse("its name holds a NUL"))
}

pub(super) fn stat(dir: &OwnedFd, name: &CString) -> Result<Option<Stat>, Failure> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn is_dir(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// Whether this is overlayfs' mark for a hidden name.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

pub(super) fn open_child(dir: &OwnedFd, name: &CString) -> Result<OwnedFd, Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

/// A descriptor for attributes, from one that is only a path.
pub(super) fn reopen(dir: &OwnedFd) -> Result<OwnedFd, Failure> {
    open_child(dir, &c_name(b".")?)
}
