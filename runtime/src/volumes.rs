//! The volumes that an image declares (image specification, `config.Volumes`).
//!
//! The writable layer of a container holds what containerd copies into a directory of its own: both end with the
//! container. So a volume only has to exist and, in a read-only root, to be writable: there the directory of the root is
//! bound over itself, which the root's own read-only mount does not reach.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::rootfs::{self, RootfsError};

/// Makes those of `volumes` that are missing in the root file system, which is mounted on `target`, and adds mounts for
/// them when the root is to be read-only. What a mount of the container covers is left alone: those are somebody else's
/// files. What is made belongs to `owner`, if one is given.
///
/// # Errors
/// [`RootfsError`], also when something on the way is no directory.
pub fn arrange(
    root: &OwnedFd,
    target: &Path,
    volumes: &[String],
    spec: &mut Spec,
    owner: Option<(u32, u32)>,
) -> Result<(), RootfsError> {
    if volumes.is_empty() {
        return Ok(());
    }
    let read_only = spec.root().as_ref().and_then(|r| r.readonly()) == Some(true);
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let covered: Vec<PathBuf> = mounts.iter().map(|m| m.destination().clone()).collect();
    for volume in volumes.iter().map(Path::new) {
        if covered.iter().any(|place| volume.starts_with(place)) {
            continue;
        }
        if matches!(open(root, volume), Err(Errno::NOENT | Errno::NOTDIR)) {
            rootfs::make_dir(root, volume, owner)?;
        }
        if !read_only {
            continue;
        }
        // Behind a link that leads nowhere nothing was made.
        let Ok(there) = open(root, volume) else {
            continue;
        };
        let Some(source) = below(&there, root).map(|inner| target.join(inner)) else {
            continue;
        };
        let options = ["bind", "rprivate", "rw"].map(str::to_owned).to_vec();
        let mut mount = Mount::default();
        mount
            .set_destination(volume.to_owned())
            .set_typ(Some("bind".to_owned()))
            .set_source(Some(source))
            .set_options(Some(options));
        // Before what goes into it.
        let inner = mounts
            .iter()
            .position(|m| m.destination().starts_with(volume));
        mounts.insert(inner.unwrap_or(mounts.len()), mount);
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn open(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(
        root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Where a descriptor leads, without links, as seen from the root.
fn below(fd: &OwnedFd, root: &OwnedFd) -> Option<PathBuf> {
    let path = |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let (path, root) = (path(fd).ok()?, path(root).ok()?);
    let inner = path.strip_prefix(root).ok()?;
    (!inner.as_os_str().is_empty()).then(|| inner.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn spec(read_only: bool, places: &[&str]) -> Spec {
        let mut spec = Spec::default();
        let mut root = oci_spec::runtime::Root::default();
        root.set_readonly(Some(read_only));
        let mounts = places.iter().map(|place| {
            let mut mount = Mount::default();
            mount.set_destination(PathBuf::from(place));
            mount
        });
        spec.set_root(Some(root)).set_mounts(Some(mounts.collect()));
        spec
    }

    fn places(spec: &Spec) -> Vec<String> {
        let mounts = spec.mounts().iter().flatten();
        mounts
            .map(|m| m.destination().display().to_string())
            .collect()
    }

    #[test]
    fn volumes_are_made_inside_the_root_and_bound_when_it_is_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().canonicalize().unwrap();
        std::fs::create_dir(target.join("there")).unwrap();
        std::fs::write(target.join("file"), "").unwrap();
        symlink("/there", target.join("link")).unwrap();
        symlink("../../../../no/where", target.join("lost")).unwrap();
        symlink("/", target.join("top")).unwrap();
        let volumes = [
            "/proc/x",
            "/new/a",
            "/link",
            "/file",
            "/lost",
            "/top",
            "/mine/sub",
        ];
        let volumes = volumes.map(str::to_owned);
        let root = rootfs::open_root(&target).unwrap();
        let base = ["/proc", "/mine", "/new/a/b"];

        let mut writable = spec(false, &base);
        arrange(&root, &target, &volumes, &mut writable, None).unwrap();
        assert_eq!(places(&writable), base);
        assert!(target.join("new/a").is_dir());
        assert!(!target.join("mine").exists() && !target.join("proc").exists());

        let mut sealed = spec(true, &base);
        arrange(&root, &target, &volumes, &mut sealed, None).unwrap();
        let wanted = ["/proc", "/mine", "/new/a", "/new/a/b", "/link", "/file"];
        assert_eq!(places(&sealed), wanted);
        let mounts = sealed.mounts().clone().unwrap();
        assert_eq!(mounts[4].source().as_deref(), Some(&*target.join("there")));
    }

    #[test]
    fn what_is_made_has_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().canonicalize().unwrap();
        let root = rootfs::open_root(&target).unwrap();
        let me = std::fs::metadata(&target).unwrap();
        let owner = Some((me.uid(), me.gid()));
        let volumes = ["/a/b".to_owned()];
        arrange(&root, &target, &volumes, &mut spec(true, &[]), owner).unwrap();
        assert_eq!(
            std::fs::metadata(target.join("a/b")).unwrap().uid(),
            me.uid()
        );
        std::fs::write(target.join("f"), "").unwrap();
        let volumes = ["/f/x".to_owned()];
        assert!(arrange(&root, &target, &volumes, &mut spec(true, &[]), owner).is_err());
    }
}
