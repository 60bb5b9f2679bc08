//! A mount of the container's own over `/dev`, such as the host's.
//!
//! libcontainer makes nodes and links in every container's `/dev`, which must not happen to the files of
//! somebody else. So it gets the usual one to work on, and the container's init covers that, in its root, by
//! the one that was asked for, with the other mounts below `/dev` on top again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::Spec;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::cgroup_view::{attach, open_place};

const DEV: &str = "/dev";

/// What `/dev` is to be.
#[derive(Debug, Clone)]
pub struct OwnDev {
    tree: Rc<OwnedFd>,
    read_only: bool,
    private: bool,
    /// Places of the other mounts below it, in the order in which they are made.
    below: Vec<PathBuf>,
}

/// Takes a bind mount over `/dev` out of the spec.
///
/// # Errors
/// What opening its source says.
pub fn take(spec: &mut Spec) -> io::Result<Option<OwnDev>> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let own = |m: &oci_spec::runtime::Mount| {
        m.destination() == Path::new(DEV) && m.typ().as_deref() == Some("bind")
    };
    let Some(at) = mounts.iter().position(own) else {
        return Ok(None);
    };
    let entry = mounts.remove(at);
    let source = entry.source().clone().unwrap_or_default();
    let options = entry.options().clone().unwrap_or_default();
    let has = |name: &str| options.iter().any(|o| o == name);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, &source, flags)
        .map_err(|e| io::Error::other(format!("{}: {e}", source.display())))?;
    let below = mounts.iter().map(|m| m.destination().clone());
    let own = OwnDev {
        tree: Rc::new(tree),
        read_only: has("ro"),
        private: !has("rslave") && !has("rshared"),
        below: below
            .filter(|place| place.starts_with(DEV) && place != Path::new(DEV))
            .collect(),
    };
    spec.set_mounts(Some(mounts));
    Ok(Some(own))
}

impl OwnDev {
    /// Mounts it. For the container's init, in its root and before it gives up its privileges.
    ///
    /// # Errors
    /// What mounting says, with the place.
    pub fn cover(&self) -> io::Result<()> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let mut others = Vec::new();
        for place in &self.below {
            // One below another came with that.
            if !others.iter().any(|(other, _)| place.starts_with(other)) {
                others.push((place, open_tree(CWD, place, flags)?));
            }
        }
        attach(self.tree.as_fd(), &open_place(Path::new(DEV))?)?;
        if self.private {
            let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            mount(None::<&str>, DEV, None::<&str>, private, None::<&str>)?;
        }
        for (place, tree) in others {
            let named =
                |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", place.display()));
            let found = match open_place(place) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    make(place, &tree).and_then(|()| open_place(place))
                }
                found => found,
            };
            attach(tree.as_fd(), &found.map_err(named)?).map_err(named)?;
        }
        if self.read_only {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
            mount(None::<&str>, DEV, None::<&str>, flags, None::<&str>)?;
        }
        Ok(())
    }
}

/// Makes what `tree` can be mounted on.
fn make(place: &Path, tree: &OwnedFd) -> io::Result<()> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(tree)?.st_mode);
    if kind == FileType::Directory {
        rustix::fs::mkdir(place, Mode::from_raw_mode(0o755))?;
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(place, flags | OFlags::WRONLY, Mode::from_raw_mode(0o644))?;
    }
    Ok(())
}
