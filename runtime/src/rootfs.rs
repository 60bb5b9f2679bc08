//! The container's root file system: an overlay over unpacked layers, mounted where only the container's
//! own mount namespace sees it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};
use slipway_proto::keeper::Overlay;

use crate::mapped::{self, MappedError};

/// Why the root file system could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A layer or the writable directory can't be opened.
    #[error("can't open {}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The mount was refused.
    #[error("can't mount the container's root file system ({layers} layers) on {}: {hint}", target.display())]
    Mount {
        /// Where.
        target: PathBuf,
        /// How many layers.
        layers: usize,
        /// What to look at.
        hint: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The owners of a layer can't be mapped.
    #[error(transparent)]
    Mapped(#[from] MappedError),
    /// The writable layer can't be given to the root of the pod's user namespace.
    #[error("can't give {} to the pod's root", path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A directory inside the root can't be made.
    #[error("can't make the working directory {} in the container", path.display())]
    WorkingDir {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn open_dir(path: &Path) -> Result<OwnedFd, RootfsError> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| RootfsError::Open {
        path: path.to_owned(),
        source: e.into(),
    })
}

/// Mounts the overlay on `target`, in the calling process's mount namespace.
///
/// `volatile`: a container's writable layer dies with the container, and without it an unmount would wait
/// for the disk.
///
/// With `users`, a user namespace and the host's ids of its root, the layers' owners are mapped by that namespace and
/// the writable directory belongs to that root; the layers themselves, which other containers share, stay as they are.
/// The mount namespace must then be one that nothing propagates out of.
///
/// # Errors
/// [`RootfsError`].
pub fn mount_overlay(
    overlay: &Overlay,
    target: &Path,
    users: Option<(BorrowedFd<'_>, (u32, u32))>,
) -> Result<(), RootfsError> {
    if let Some((namespace, (uid, gid))) = users {
        for layer in &overlay.lower {
            mapped::cover(Path::new(layer), namespace)?;
        }
        if !overlay.upper.is_empty() {
            // What is at the top of the overlay is the container's "/".
            let given = std::os::unix::fs::chown(&overlay.upper, Some(uid), Some(gid));
            given.map_err(|source| RootfsError::Owner {
                path: PathBuf::from(&overlay.upper),
                source,
            })?;
        }
    }
    let open_all = |paths: &[String]| -> Result<Vec<OwnedFd>, RootfsError> {
        paths.iter().map(|p| open_dir(Path::new(p))).collect()
    };
    let lower = open_all(&overlay.lower)?;
    let writable = if overlay.upper.is_empty() {
        Vec::new()
    } else {
        open_all(&[overlay.upper.clone(), overlay.work.clone()])?
    };
    let failed = |source: io::Error| RootfsError::Mount {
        target: target.to_owned(),
        layers: lower.len(),
        hint: match source.raw_os_error() {
            Some(libc::ENODEV) => "the kernel has no overlay file system; load the module overlay",
            Some(libc::EINVAL) => {
                "the state directory may be on a file system that can't be an overlay's upper"
            }
            _ => "see the cause",
        },
        source,
    };
    if lower.is_empty() {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the image has no layers",
        )));
    }
    if lower.len() == 1 && writable.is_empty() {
        // An overlay needs two layers or an upper.
        return bind_read_only(&lower[0], target).map_err(failed);
    }
    match overlay_by_fd(&lower, &writable, &overlay.selinux_label, target) {
        // Before Linux 6.5 the new mount API does not take layers one by one.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            overlay_by_options(&lower, &writable, &overlay.selinux_label, target).map_err(failed)
        }
        other => other.map_err(failed),
    }
}

/// Descriptors as paths: short, and free of the characters that overlay's options give a meaning.
fn fd_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn overlay_by_fd(
    lower: &[OwnedFd],
    writable: &[OwnedFd],
    label: &str,
    target: &Path,
) -> io::Result<()> {
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", "overlay")?;
    for layer in lower {
        fsconfig_set_string(&fs, "lowerdir+", fd_path(layer))?;
    }
    if let [upper, work] = writable {
        fsconfig_set_string(&fs, "upperdir", fd_path(upper))?;
        fsconfig_set_string(&fs, "workdir", fd_path(work))?;
        fsconfig_set_flag(&fs, "volatile")?;
    }
    if !label.is_empty() {
        fsconfig_set_string(&fs, "context", label)?;
    }
    fsconfig_create(&fs)?;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    move_mount(
        &mount,
        "",
        rustix::fs::CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    Ok(())
}

fn overlay_by_options(
    lower: &[OwnedFd],
    writable: &[OwnedFd],
    label: &str,
    target: &Path,
) -> io::Result<()> {
    let layers: Vec<_> = lower.iter().map(fd_path).collect();
    let mut options = format!("lowerdir={}", layers.join(":"));
    if let [upper, work] = writable {
        options.push_str(&format!(
            ",upperdir={},workdir={},volatile",
            fd_path(upper),
            fd_path(work)
        ));
    }
    if !label.is_empty() {
        // Levels have commas.
        options.push_str(&format!(",context=\"{label}\""));
    }
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount(
        "overlay",
        target,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )?;
    Ok(())
}

fn bind_read_only(layer: &OwnedFd, target: &Path) -> io::Result<()> {
    rustix::mount::mount_bind(fd_path(layer), target)?;
    rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, c"")?;
    Ok(())
}

/// Makes a directory and its parents inside `root`, whatever symbolic links the image holds. Behind a link that
/// leads nowhere nothing is made. What is made belongs to `owner`, if one is given, else to whom this process is.
///
/// # Errors
/// [`RootfsError::WorkingDir`], also when something on the way is no directory.
pub fn make_dir(root: &OwnedFd, path: &Path, owner: Option<(u32, u32)>) -> Result<(), RootfsError> {
    let failed = |source: io::Error| RootfsError::WorkingDir {
        path: path.to_owned(),
        source,
    };
    let open = |dir: &OwnedFd, name: &Path| {
        rustix::fs::openat2(
            dir,
            name,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    };
    // Each prefix is resolved from the root anew, so that a link in the middle leads where it would lead
    // inside the container.
    let mut prefix = PathBuf::from("/");
    let mut parent = open(root, Path::new("/")).map_err(|e| failed(e.into()))?;
    for part in path.components() {
        let std::path::Component::Normal(name) = part else {
            continue;
        };
        prefix.push(name);
        parent = match open(root, &prefix) {
            Ok(dir) => dir,
            Err(rustix::io::Errno::NOENT) => {
                match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    // A link that leads nowhere, yet: a mount may put something there.
                    Err(rustix::io::Errno::EXIST) => return Ok(()),
                    made => made.map_err(|e| failed(e.into()))?,
                }
                give(&parent, name, owner).map_err(failed)?;
                open(root, &prefix).map_err(|e| failed(e.into()))?
            }
            Err(e) => return Err(failed(e.into())),
        };
    }
    Ok(())
}

/// Gives a new entry of a directory to an owner, if there is one.
///
/// # Errors
/// What the kernel says.
pub fn give(
    dir: &OwnedFd,
    name: impl rustix::path::Arg,
    owner: Option<(u32, u32)>,
) -> io::Result<()> {
    use rustix::fs::{AtFlags, Gid, Uid, chownat};
    let Some((uid, gid)) = owner else {
        return Ok(());
    };
    let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    Ok(chownat(
        dir,
        name,
        owner.0,
        owner.1,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Opens a root file system for [`make_dir`] and for reading users.
///
/// # Errors
/// [`RootfsError::Open`].
pub fn open_root(path: &Path) -> Result<OwnedFd, RootfsError> {
    let file = File::open(path).map_err(|source| RootfsError::Open {
        path: path.to_owned(),
        source,
    })?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn directories_are_made_inside_the_root_only() {
        let outside = tempfile::tempdir().unwrap();
        let inside = tempfile::tempdir().unwrap();
        symlink(outside.path(), inside.path().join("escape")).unwrap();
        symlink("../../../../../..", inside.path().join("up")).unwrap();
        let root = open_root(inside.path()).unwrap();
        make_dir(&root, Path::new("/a/b/c"), None).unwrap();
        assert!(inside.path().join("a/b/c").is_dir());
        make_dir(&root, Path::new("/up/made"), None).unwrap();
        assert!(inside.path().join("made").is_dir());
        // The link's target does not exist inside the root, and is not touched outside.
        make_dir(&root, Path::new("/escape/x"), None).unwrap();
        assert!(std::fs::read_dir(outside.path()).unwrap().next().is_none());
        std::fs::write(inside.path().join("file"), "").unwrap();
        assert!(make_dir(&root, Path::new("/file/x"), None).is_err());
    }
}
