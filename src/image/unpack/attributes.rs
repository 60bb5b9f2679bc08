//! Owners, modes, times and extended attributes of a layer's entries.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::tarball::Entry;
use crate::unpack::{Failure, refuse};

/// Overlayfs then hides what lower layers have in this directory.
pub(super) fn set_opaque(dir: &OwnedFd) -> Result<(), Failure> {
    Ok(rustix::fs::fsetxattr(
        dir,
        "trusted.overlay.opaque",
        b"y",
        XattrFlags::empty(),
    )?)
}

pub(super) fn owner(entry: &Entry) -> Result<(Uid, Gid), Failure> {
    let id = |id: u64| {
        u32::try_from(id)
            .ok()
            // The highest id means "no change" to the kernel.
            .filter(|id| *id != u32::MAX)
            .ok_or_else(|| refuse(format!("its owner {id} is no valid id")))
    };
    Ok((Uid::from_raw(id(entry.uid)?), Gid::from_raw(id(entry.gid)?)))
}

pub(super) fn times((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanos.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// Owner, mode and extended attributes of a file or directory, in this order: a change of owner
/// clears setuid bits and capabilities.
pub(super) fn set_attributes(fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), Failure> {
    let (uid, gid) = owner(entry)?;
    rustix::fs::fchown(fd, Some(uid), Some(gid))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode))?;
    for (name, value) in &entry.xattrs {
        if !is_wanted(name) {
            continue;
        }
        match rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty()) {
            Ok(()) => {}
            // The store's file system has no such attributes. Only for capabilities this matters.
            Err(Errno::OPNOTSUPP) if !name.starts_with(b"security.") => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whether an attribute of the archive is taken over: capabilities, ACLs and users' attributes.
/// Those that steer overlayfs or a security module of the host are not the image's to set.
fn is_wanted(name: &[u8]) -> bool {
    name == b"security.capability"
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
        || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}
