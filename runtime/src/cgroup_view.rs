//! The container's view of its cgroups.
//!
//! The creator is in the container's cgroup, and the init is born there: whoever wrote a process id to `cgroup.procs`
//! would wait for an RCU grace period (6 to 15 ms). What the container is to see of it at `/sys/fs/cgroup` is kept in
//! descriptors, and mounted by its init once that is in its root ([`View::show`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::cgroup::{Hierarchies, inside};

/// Where cgroup hierarchies are mounted.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// What a container sees of its cgroups.
#[derive(Debug, Clone)]
pub struct View {
    /// Where, in the container.
    top: PathBuf,
    /// The container's directory in each hierarchy, by the hierarchy's name; the empty name is `top` itself.
    trees: Vec<(String, Rc<OwnedFd>)>,
    read_only: bool,
}

/// Takes the spec's `cgroup` mount out of it, and answers with what the container is to see instead. In a cgroup namespace
/// of its own on a pure v2 host it is an ordinary mount, and stays in the spec.
///
/// # Errors
/// What opening the host's cgroups says.
pub fn take(spec: &mut Spec, cgroups: &Hierarchies, cgroup: &Path) -> io::Result<Option<View>> {
    let own_namespace = spec
        .linux()
        .as_ref()
        .and_then(|l| l.namespaces().as_ref())
        .into_iter()
        .flatten()
        .any(|n| n.typ() == LinuxNamespaceType::Cgroup);
    let mut view = None;
    let mut mounts = Vec::new();
    for mut entry in spec.mounts().clone().unwrap_or_default() {
        if entry.typ().as_deref() != Some("cgroup") {
            mounts.push(entry);
        } else if cgroups.unified() && own_namespace {
            entry
                .set_typ(Some("cgroup2".into()))
                .set_source(Some("cgroup2".into()));
            mounts.push(entry);
        } else {
            let read_only = entry.options().iter().flatten().any(|o| o == "ro");
            view = Some(View::new(cgroups, cgroup, entry.destination(), read_only)?);
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(view)
}

impl View {
    fn new(cgroups: &Hierarchies, cgroup: &Path, top: &Path, read_only: bool) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mut trees = Vec::new();
        for mount_point in cgroups.mount_points() {
            let Ok(name) = mount_point.strip_prefix(CGROUP_ROOT) else {
                continue;
            };
            // Without a cgroup namespace, which only a privileged container lacks on pure v2, its processes see
            // their place in the whole.
            let seen = match cgroups.unified() {
                true => mount_point.to_owned(),
                false => inside(mount_point, cgroup),
            };
            let tree = open_tree(CWD, seen, flags)?;
            trees.push((name.to_string_lossy().into_owned(), Rc::new(tree)));
        }
        Ok(Self {
            top: top.to_owned(),
            trees,
            read_only,
        })
    }

    /// Mounts the view. For the container's init, in its root and before it gives up its privileges.
    ///
    /// # Errors
    /// What mounting says; a symbolic link on the way is refused.
    pub fn show(&self) -> io::Result<()> {
        let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        flags.set(MsFlags::MS_RDONLY, self.read_only);
        if let [(name, tree)] = self.trees.as_slice()
            && name.is_empty()
        {
            attach(tree.as_fd(), &open_place(&self.top)?)?;
            return remount(&self.top, flags);
        }
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&fs, "mode", "755")?;
        fsconfig_set_string(&fs, "size", "64k")?;
        fsconfig_create(&fs)?;
        let tmpfs = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        attach(tmpfs.as_fd(), &open_place(&self.top)?)?;
        for (name, tree) in &self.trees {
            let at = self.top.join(name);
            rustix::fs::mkdir(&at, Mode::from_raw_mode(0o755))?;
            attach(tree.as_fd(), &open_place(&at)?)?;
            remount(&at, flags)?;
            // Controllers that share a hierarchy ("cpu,cpuacct") are looked for under each name.
            for alias in name.split(',').filter(|alias| alias != name) {
                rustix::fs::symlink(name, self.top.join(alias))?;
            }
        }
        remount(&self.top, flags)
    }
}

/// A place of this process's root, without following a link on the way.
pub fn open_place(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat2(
        CWD,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )?)
}

/// Mounts a tree on a place.
pub fn attach(tree: BorrowedFd<'_>, at: &OwnedFd) -> io::Result<()> {
    let by_descriptors =
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", at, "", by_descriptors)?)
}

fn remount(path: &Path, flags: MsFlags) -> io::Result<()> {
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    Ok(mount(
        None::<&str>,
        path,
        None::<&str>,
        flags,
        None::<&str>,
    )?)
}
