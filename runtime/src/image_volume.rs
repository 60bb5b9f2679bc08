//! Images as volumes (KEP-4639): an overlay of an image's layers, read-only, that a container's mount is bound
//! from.
//!
//! The overlay is mounted in the creator's mount namespace only. The container's init binds it and takes it
//! along, so it ends with the last process that sees it, whatever is killed when. Containers that have the same
//! image share its layers, and so the page cache.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::mount_bind;
use slipway_proto::keeper::{CreateContainer, Overlay};

use crate::mapped;
use crate::rootfs::{self, RootfsError};

/// Why an image can't be mounted as a volume.
#[derive(Debug, thiserror::Error)]
pub enum ImageVolumeError {
    /// The layers.
    #[error("can't mount image {image:?} on {container_path:?}")]
    Image {
        /// As it was asked for.
        image: String,
        /// Where it should go.
        container_path: String,
        /// The cause.
        #[source]
        source: Box<RootfsError>,
    },
    /// The directory in the image.
    #[error(
        "image_sub_path {sub_path:?} of the mount on {container_path:?} {}",
        what_is_wrong(source, image)
    )]
    SubPath {
        /// As it was asked for.
        sub_path: String,
        /// As it was asked for.
        image: String,
        /// Where it should go.
        container_path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A directory of ours to mount on.
    #[error("can't prepare {}", path.display())]
    Place {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn what_is_wrong(error: &io::Error, image: &str) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => format!("does not exist in image {image:?}"),
        Some(libc::ENOTDIR) => format!("is not a directory in image {image:?}"),
        _ => format!("can't be opened in image {image:?}"),
    }
}

/// Mounts a container's image volumes, each at its own place, in the calling process's mount namespace, after
/// its root file system. `dir` is the container's run directory. With a user namespace, the owners of files are
/// mapped by that, as those of the root file system are.
///
/// # Errors
/// [`ImageVolumeError`].
pub fn mount_all(
    create: &CreateContainer,
    dir: &Path,
    users: Option<BorrowedFd<'_>>,
) -> Result<(), ImageVolumeError> {
    let volumes = &create.image_volumes;
    if volumes.is_empty() {
        return Ok(());
    }
    let rootfs = create.overlay.as_ref();
    // A layer can be covered once only; those of the root file system are.
    let mut covered: HashSet<&str> = rootfs
        .iter()
        .flat_map(|overlay| overlay.lower.iter().map(String::as_str))
        .collect();
    let make = |path: &Path| {
        fs::create_dir_all(path).map_err(|source| ImageVolumeError::Place {
            path: path.to_owned(),
            source,
        })
    };
    // At the bottom of every stack: alone, a layer would be bound as it is, with its whiteouts to be seen.
    let empty = dir.join("no-layer");
    make(&empty)?;
    for volume in volumes {
        let at = Path::new(&volume.at);
        make(at)?;
        let mut lower = volume.lower.clone();
        lower.push(empty.to_string_lossy().into_owned());
        let overlay = Overlay {
            lower,
            selinux_label: rootfs.map_or(String::new(), |o| o.selinux_label.clone()),
            ..Overlay::default()
        };
        let mut mount = || {
            for layer in volume.lower.iter().filter(|_| users.is_some()) {
                if covered.insert(layer)
                    && let Some(users) = users
                {
                    mapped::cover(Path::new(layer), users)?;
                }
            }
            rootfs::mount_overlay(&overlay, at, None)?;
            rootfs::open_root(at)
        };
        let root = mount();
        let root = root.map_err(|source| ImageVolumeError::Image {
            image: volume.image.clone(),
            container_path: volume.container_path.clone(),
            source: Box::new(source),
        })?;
        if volume.sub_path.is_empty() {
            continue;
        }
        let inner = open_below(&root, Path::new(&volume.sub_path));
        // On top of the whole image, which is what is bound otherwise.
        let shown = inner.and_then(|inner| {
            let inner = format!("/proc/self/fd/{}", inner.as_raw_fd());
            mount_bind(inner, at).map_err(io::Error::from)
        });
        shown.map_err(|source| ImageVolumeError::SubPath {
            sub_path: volume.sub_path.clone(),
            image: volume.image.clone(),
            container_path: volume.container_path.clone(),
            source,
        })?;
    }
    Ok(())
}

/// Opens a directory as a process whose root the image is would find it: links lead nowhere else.
fn open_below(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(
        root,
        path,
        flags,
        Mode::empty(),
        resolve,
    )?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_stay_in_the_image() {
        let outside = tempfile::tempdir().unwrap();
        fs::create_dir(outside.path().join("secret")).unwrap();
        let image = tempfile::tempdir().unwrap();
        fs::create_dir_all(image.path().join("a/b")).unwrap();
        fs::write(image.path().join("file"), "").unwrap();
        symlink(outside.path(), image.path().join("escape")).unwrap();
        symlink("../../../../a", image.path().join("up")).unwrap();
        symlink("/a/b", image.path().join("absolute")).unwrap();
        symlink("/proc/self/root", image.path().join("magic")).unwrap();
        let root = rootfs::open_root(image.path()).unwrap();
        for inside in ["a", "a/b", "up/b", "absolute", "./a//b/"] {
            let found = open_below(&root, Path::new(inside)).expect(inside);
            let at = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).unwrap();
            assert!(
                at.starts_with(image.path().canonicalize().unwrap()),
                "{at:?}"
            );
        }
        for (outward, error) in [
            ("escape/secret", libc::ENOENT),
            ("escape", libc::ENOENT),
            ("magic", libc::ENOENT),
            ("file", libc::ENOTDIR),
            ("missing", libc::ENOENT),
        ] {
            let found = open_below(&root, Path::new(outward)).expect_err(outward);
            assert_eq!(found.raw_os_error(), Some(error), "{outward}");
        }
    }
}
