//! Leaving the other pods' mounts behind.
//!
//! Every pod pins namespaces and shared memory by mounts below the run root. A creator's copy of the mount
//! table has them all, the init's copy of that would, too, and libcontainer reads it: with many pods, a create
//! would take longer. So the creator takes what its container needs of the run root in
//! descriptors, and replaces the rest by the bare directory tree, in its own namespace.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{LinuxNamespace, Spec};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// What the spec still refers to; must live until libcontainer is done.
#[derive(Debug, Default)]
pub struct Kept {
    namespaces: Vec<OwnedFd>,
}

impl Kept {
    /// Opens a namespace of the spec that has a path, and points it at what was opened.
    ///
    /// # Errors
    /// What opening says, with the path.
    pub fn open(&mut self, namespace: &mut LinuxNamespace) -> io::Result<BorrowedFd<'_>> {
        let path = namespace.path().clone().unwrap_or_default();
        let fd = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| io::Error::other(format!("{}: {e}", path.display())))?;
        let at = self.namespaces.len();
        namespace.set_path(Some(format!("/proc/self/fd/{}", fd.as_raw_fd()).into()));
        self.namespaces.push(fd);
        Ok(self.namespaces[at].as_fd())
    }
}

/// Unmounts the run root in this mount namespace, which must be this process's own, and points the spec's
/// namespaces and mounts at what was kept of it. Does nothing where the run root is no mount, or where a
/// mount of the container is shared with the host: for that the tree has to stay shared.
///
/// # Errors
/// What opening or mounting says.
pub fn run_root(spec: &mut Spec, run_root: &Path, aside: &Path) -> io::Result<Kept> {
    if shares_mounts(spec) || !is_mount_point(run_root)? {
        return Ok(Kept::default());
    }
    let mut kept = Kept::default();
    if let Some(list) = spec
        .linux_mut()
        .as_mut()
        .and_then(|l| l.namespaces_mut().as_mut())
    {
        for namespace in list {
            if namespace
                .path()
                .as_ref()
                .is_some_and(|p| p.starts_with(run_root))
            {
                kept.open(namespace)?;
            }
        }
    }
    let mut trees = Vec::new();
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (n, entry) in mounts.iter_mut().enumerate() {
        let source = entry
            .source()
            .clone()
            .filter(|s| s.starts_with(run_root) && s.is_dir());
        let Some(source) = source else { continue };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let at = aside.join(n.to_string());
        trees.push((open_tree(CWD, &source, flags)?, at.clone()));
        entry.set_source(Some(at));
    }
    spec.set_mounts(Some(mounts));
    // The run root alone, without what is mounted below it; it may be a file system of its own.
    let bare = open_tree(
        CWD,
        run_root,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    // What is mounted or unmounted from here on must not reach the host's tree.
    let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>)?;
    umount2(run_root, MntFlags::MNT_DETACH)?;
    move_mount(
        &bare,
        "",
        CWD,
        run_root,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    for (tree, at) in trees {
        std::fs::create_dir_all(&at)?;
        move_mount(&tree, "", CWD, &at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    Ok(kept)
}

fn shares_mounts(spec: &Spec) -> bool {
    let mut options = spec
        .mounts()
        .iter()
        .flatten()
        .flat_map(|m| m.options().iter().flatten());
    options.any(|o| o == "shared" || o == "rshared")
}

/// Whether a directory or file is the root of a mount.
///
/// # Errors
/// What looking at it says.
pub fn is_mount_point(dir: &Path) -> io::Result<bool> {
    use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, statx};
    let status = statx(CWD, dir, AtFlags::empty(), StatxFlags::BASIC_STATS)?;
    Ok(status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_known() {
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(!is_mount_point(Path::new("/proc/self")).unwrap());
    }
}
