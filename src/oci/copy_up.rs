//! `tmpcopyup`, an option of tmpfs mounts that runc and crun know and podman uses for read-only containers: the tmpfs
//! begins with what the root file system has in its place.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fstat, mkdirat, open,
    openat, openat2, readlinkat, statat, symlinkat,
};

use crate::{OciError, Result};

/// Deeper than any directory that is meant to be copied.
const DEEPEST: usize = 64;

/// Directories of the root file system, opened before tmpfs mounts cover them.
#[derive(Debug, Default)]
pub struct CopyUp(Vec<(OwnedFd, PathBuf)>);

impl CopyUp {
    /// Takes the option out of the specification's mounts, and opens what it is about.
    ///
    /// # Errors
    /// When a directory can't be opened; one that is not there has nothing to copy.
    pub fn take(spec: &mut Spec, rootfs: &Path) -> Result<Self> {
        let mut found = Self::default();
        let root: OwnedFd = File::open(rootfs)
            .map_err(OciError::file("open", rootfs))?
            .into();
        for mount in spec.mounts_mut().iter_mut().flatten() {
            let Some(options) = mount.options().clone() else {
                continue;
            };
            let known = |option: &String| option == "tmpcopyup" || option == "notmpcopyup";
            let wanted = options.iter().any(|o| o == "tmpcopyup");
            mount.set_options(Some(options.into_iter().filter(|o| !known(o)).collect()));
            if !wanted || mount.typ().as_deref() != Some("tmpfs") {
                continue;
            }
            let place = mount.destination().clone();
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            match openat2(&root, &place, flags, Mode::empty(), resolve) {
                Ok(dir) => found.0.push((dir, place)),
                Err(rustix::io::Errno::NOENT) => {}
                Err(e) => return Err(OciError::file("open", rootfs.join(&place))(e.into())),
            }
        }
        Ok(found)
    }

    /// What must stay open until the copies are made.
    pub fn descriptors(&self) -> Vec<i32> {
        self.0.iter().map(|(dir, _)| dir.as_raw_fd()).collect()
    }

    /// Makes the copies. For the container's init, in its root.
    ///
    /// # Errors
    /// What reading and writing say, with the place.
    pub fn copy(&self) -> io::Result<()> {
        for (from, place) in &self.0 {
            let named = |e: io::Error| {
                let text = format!("can't copy what was in {}: {e}", place.display());
                io::Error::new(e.kind(), text)
            };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let to = open(place, flags, Mode::empty()).map_err(|e| named(e.into()))?;
            directory(from, &to, DEEPEST).map_err(named)?;
        }
        Ok(())
    }
}

fn directory(from: &OwnedFd, to: &OwnedFd, deepest: usize) -> io::Result<()> {
    if deepest == 0 {
        return Err(io::Error::other("it is nested too deeply"));
    }
    let found = fstat(from)?;
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let found = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(found.st_mode & 0o7777);
        let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => {
                mkdirat(to, name, Mode::from_raw_mode(0o700))?;
                let flags = read | OFlags::DIRECTORY;
                let inner = openat(from, name, flags, Mode::empty())?;
                let copy = openat(to, name, flags, Mode::empty())?;
                directory(&inner, &copy, deepest - 1)?;
                continue;
            }
            FileType::RegularFile => {
                let mut source = File::from(openat(from, name, read, Mode::empty())?);
                let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mut copy = File::from(openat(to, name, write, Mode::from_raw_mode(0o600))?);
                io::copy(&mut source, &mut copy)?;
                own(to, name, &found)?;
                rustix::fs::fchmod(&copy, mode)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(from, name, Vec::new())?, to, name)?;
                own(to, name, &found)?;
            }
            // Devices, sockets and pipes mean nothing as copies.
            _ => {}
        }
    }
    // After what is in it: its mode may forbid that.
    rustix::fs::fchown(
        to,
        Some(Uid::from_raw(found.st_uid)),
        Some(Gid::from_raw(found.st_gid)),
    )?;
    Ok(rustix::fs::fchmod(
        to,
        Mode::from_raw_mode(found.st_mode & 0o7777),
    )?)
}

fn own(dir: &OwnedFd, name: &std::ffi::CStr, found: &rustix::fs::Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(found.st_uid), Gid::from_raw(found.st_gid));
    Ok(chownat(
        dir,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_tree_is_copied_with_its_modes_and_links() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(from.path().join("a/b")).unwrap();
        fs::write(from.path().join("a/b/file"), "text").unwrap();
        fs::set_permissions(
            from.path().join("a/b/file"),
            fs::Permissions::from_mode(0o4751),
        )
        .unwrap();
        symlink("/nowhere", from.path().join("link")).unwrap();
        let open = |dir: &Path| -> OwnedFd { File::open(dir).unwrap().into() };
        directory(&open(from.path()), &open(to.path()), DEEPEST).unwrap();
        assert_eq!(
            fs::read_to_string(to.path().join("a/b/file")).unwrap(),
            "text"
        );
        let mode = fs::metadata(to.path().join("a/b/file"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o4751);
        assert_eq!(
            fs::read_link(to.path().join("link")).unwrap(),
            Path::new("/nowhere")
        );
        assert!(directory(&open(from.path()), &open(to.path()), 0).is_err());
    }
}
