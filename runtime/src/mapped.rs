//! Idmapped mounts: bind mounts and layers that show their files' owners as the ids of a user namespace, so that
//! nothing is chowned (`mount_setattr(2)`, `MOUNT_ATTR_IDMAP`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::ids::{self, IdMaps};
use crate::propagation::make_place;
use crate::sys;

/// A mount's owners can't be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappedError {
    /// The file system, or the kernel, has no idmapped mounts.
    #[error(
        "{} can't be mounted with mapped owners{}: its file system ({kind}) or this kernel has no idmapped mounts; \
         put it on ext4, xfs, btrfs or tmpfs, or run the pod without a user namespace (hostUsers: true)",
        source_path.display(),
        place.as_ref().map_or(String::new(), |p| format!(" on {}", p.display()))
    )]
    NotPossible {
        /// What was to be mounted.
        source_path: PathBuf,
        /// Where, in the container; `None` for a layer of its root file system.
        place: Option<PathBuf>,
        /// Type of the file system, as far as it is known.
        kind: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something else went wrong.
    #[error("can't map the owners of {}", path.display())]
    Failed {
        /// What was to be mounted.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl MappedError {
    fn new(source: io::Error, path: &Path, place: Option<&Path>) -> Self {
        match source.raw_os_error() {
            // EPERM: mapped already, or a file system of another user namespace.
            Some(libc::EINVAL | libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS) => {
                Self::NotPossible {
                    source_path: path.to_owned(),
                    place: place.map(Path::to_owned),
                    kind: kind_of(path),
                    source,
                }
            }
            _ => Self::Failed {
                path: path.to_owned(),
                source,
            },
        }
    }
}

/// The type of the file system that a path is on, for people.
fn kind_of(path: &Path) -> String {
    let number = |path: &Path| rustix::fs::statfs(path).ok().map(|fs| fs.f_type);
    let kind = number(path).map(|kind| match kind {
        0x6969 => "nfs".to_owned(),
        0x6573_5546 => "fuse".to_owned(),
        0xff53_4d42 => "cifs".to_owned(),
        0xfe53_4d42 => "smb3".to_owned(),
        0x794c_7630 => "overlay".to_owned(),
        0x9fa0 => "proc".to_owned(),
        0x6265_6572 => "sysfs".to_owned(),
        0xef53 => "ext4".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        0x0102_1994 => "tmpfs".to_owned(),
        other => format!("type {other:#x}"),
    });
    kind.unwrap_or_else(|| "unknown".into())
}

/// Maps the owners of the spec's mounts that ask for it, and points them at what was mounted for that below
/// `aside`. `pod` are the ids of the container's own user namespace, and that.
///
/// What is mounted below such a mount is mapped, too, where all of it can be; else only the mount itself.
///
/// # Errors
/// [`MappedError`], naming the mount.
pub fn arrange(
    spec: &mut Spec,
    aside: &Path,
    pod: Option<(&IdMaps, BorrowedFd<'_>)>,
) -> Result<(), MappedError> {
    let asks =
        |spec: &Spec| (spec.mounts().iter().flatten()).any(|m| IdMaps::of_mount(m).is_some());
    if !asks(spec) {
        return Ok(());
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let mut made: Vec<(IdMaps, OwnedFd)> = Vec::new();
    for (n, entry) in mounts.iter_mut().enumerate() {
        let Some(ids) = IdMaps::of_mount(entry) else {
            continue;
        };
        let source = entry.source().clone().unwrap_or_default();
        let failed = |e: io::Error| MappedError::Failed {
            path: source.clone(),
            source: e,
        };
        // Most mappings are the pod's own, whose namespace is there.
        let known = made.iter().position(|(other, _)| *other == ids);
        let namespace = match (pod, known) {
            (Some((own, namespace)), _) if *own == ids => namespace,
            (_, Some(at)) => made[at].1.as_fd(),
            _ => {
                let namespace = ids::namespace(&ids).map_err(failed)?;
                made.push((ids, namespace));
                made[made.len() - 1].1.as_fd()
            }
        };
        let tree = tree(&source, true).map_err(failed)?;
        let place = entry.destination().clone();
        map(tree.as_fd(), namespace, true)
            .or_else(|_| map(tree.as_fd(), namespace, false))
            .map_err(|e| MappedError::new(e, &source, Some(&place)))?;
        let at = aside.join(n.to_string());
        make_place(&source, &at)
            .and_then(|()| attach(&tree, &at))
            .map_err(failed)?;
        entry
            .set_source(Some(at))
            .set_uid_mappings(None)
            .set_gid_mappings(None);
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

/// Covers a directory with itself, its owners mapped, in this mount namespace, which nothing may propagate out of.
///
/// # Errors
/// [`MappedError`].
pub fn cover(dir: &Path, namespace: BorrowedFd<'_>) -> Result<(), MappedError> {
    let failed = |source: io::Error| MappedError::Failed {
        path: dir.to_owned(),
        source,
    };
    let tree = tree(dir, false).map_err(failed)?;
    map(tree.as_fd(), namespace, false).map_err(|e| MappedError::new(e, dir, None))?;
    attach(&tree, dir).map_err(failed)
}

/// A copy of what is mounted at a path, mounted nowhere yet.
pub fn tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    Ok(open_tree(CWD, path, flags)?)
}

/// Mounts a tree on a path.
pub fn attach(tree: &OwnedFd, at: &Path) -> io::Result<()> {
    Ok(move_mount(
        tree,
        "",
        CWD,
        at,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

fn map(tree: BorrowedFd<'_>, namespace: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
    let attr = libc::mount_attr {
        userns_fd: u64::from(namespace.as_raw_fd().cast_unsigned()),
        ..sys::mount_attr(MOUNT_ATTR_IDMAP, 0)
    };
    sys::mount_setattr(tree, &attr, recursive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_mapped_is_named() {
        let cause = io::Error::from_raw_os_error(libc::EINVAL);
        let error = MappedError::new(cause, Path::new("/proc"), Some(Path::new("/data")));
        let text = error.to_string();
        for part in ["/proc", "/data", "(proc)", "hostUsers"] {
            assert!(text.contains(part), "{text}");
        }
        let cause = io::Error::from_raw_os_error(libc::ENOENT);
        let error = MappedError::new(cause, Path::new("/x"), None);
        assert!(matches!(error, MappedError::Failed { .. }));
    }
}
