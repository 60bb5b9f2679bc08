//! A container in a mount namespace that others are in, too: its caller's, or one that it joins (config-linux.md,
//! "Namespaces").
//!
//! Its root is put together in a mount namespace of its own, as any container's. When all is there, the whole tree is
//! copied, attached over the bundle's root file system where the others are, and entered with `chroot(2)`. So the
//! propagation of nobody's mounts is changed, only one mount is made that others see, and one `umount(2)` takes it away: in
//! `delete`, since the process may have ended long before.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, Spec};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, statx};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use serde::{Deserialize, Serialize};
use slipway_runtime::{descriptor, sys};

use crate::{OciError, Result, namespaces};

/// Where this process's own is found.
const OWN: &str = "/proc/self/ns/mnt";

/// What is kept of a container in such a namespace, to take its root away again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SharedMounts {
    /// The namespace that is joined; none for that of the caller.
    namespace: Option<PathBuf>,
    /// The number of the mount that is seen at the bundle's root file system without the container.
    below: u64,
}

impl SharedMounts {
    /// What has to be kept for a specification; none when the container has a mount namespace of its own.
    ///
    /// # Errors
    /// When the root file system is not found in the namespace.
    pub fn of(spec: &Spec, rootfs: &Path) -> Result<Option<Self>> {
        if namespaces::has_new(spec, LinuxNamespaceType::Mount) {
            return Ok(None);
        }
        let mut all = namespaces::list(spec).iter();
        let namespace = all.find(|n| n.typ() == LinuxNamespaceType::Mount);
        let namespace = namespace.and_then(|n| n.path().clone());
        let failed = OciError::file("find, in the mount namespace of the container,", rootfs);
        let below = within(namespace.as_deref(), || mount_at(rootfs)).map_err(failed)?;
        Ok(Some(Self { namespace, below }))
    }

    /// Gives the container a namespace of its own to begin in, and opens that in which it is to end.
    ///
    /// # Errors
    /// When the namespace is not there any more.
    pub fn open(&self, spec: &mut Spec) -> Result<OwnedFd> {
        let path = self.namespace.as_deref().unwrap_or(Path::new(OWN));
        let opened = File::open(path).map_err(OciError::file("open the mount namespace", path))?;
        let own = LinuxNamespaceBuilder::default()
            .typ(LinuxNamespaceType::Mount)
            .build();
        let own = own.map_err(|e| OciError::spec("linux.namespaces", e.to_string()))?;
        let mut all = namespaces::list(spec).to_vec();
        all.retain(|n| n.typ() != LinuxNamespaceType::Mount);
        all.push(own);
        spec.linux_mut()
            .get_or_insert_default()
            .set_namespaces(Some(all));
        Ok(opened.into())
    }

    /// Takes the container's root away from those who still see it.
    ///
    /// # Errors
    /// When it can't be unmounted.
    pub fn clear(&self, rootfs: &Path) -> io::Result<()> {
        let cleared = within(self.namespace.as_deref(), || {
            if mount_at(rootfs)? != self.below {
                unmount(rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
            }
            Ok(0)
        });
        match cleared {
            // Its root, or its last process and so the namespace have gone: nobody sees anything.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map(drop),
        }
    }
}

/// For the container's init, in its complete root: goes to the namespace, and takes the root along.
///
/// # Errors
/// The step, and what the kernel says.
pub fn enter(namespace: &OwnedFd, rootfs: &Path) -> io::Result<()> {
    let failed = |step: &'static str| {
        move |e: io::Error| io::Error::new(e.kind(), format!("can't {step}: {e}"))
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, "/", flags).map_err(|e| failed("copy its root")(e.into()))?;
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS)
        .map_err(|e| failed("join the mount namespace")(e.into()))?;
    move_mount(
        &tree,
        "",
        CWD,
        rootfs,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(|e| failed("mount its root in the mount namespace")(e.into()))?;
    let root = open_root(rootfs).map_err(failed("open its root"))?;
    take_root(&root).map_err(failed("enter its root"))
}

/// The root directory of a process, or a directory that is to be one.
///
/// # Errors
/// What opening says.
pub fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Makes a directory this process's root.
///
/// # Errors
/// What the kernel says.
pub fn take_root(root: &OwnedFd) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    rustix::process::chroot(".")?;
    Ok(rustix::process::chdir("/")?)
}

/// The number of the mount that a path leads to.
fn mount_at(path: &Path) -> io::Result<u64> {
    let found = statx(CWD, path, AtFlags::NO_AUTOMOUNT, StatxFlags::MNT_ID)?;
    Ok(found.stx_mnt_id)
}

/// Does something in another mount namespace: in a child, as there is no way back for who has other threads' root.
fn within(namespace: Option<&Path>, act: impl FnOnce() -> io::Result<u64>) -> io::Result<u64> {
    let Some(path) = namespace else {
        return act();
    };
    let namespace = File::open(path)?;
    let (read, write) = descriptor::pipe()?;
    match sys::clone_process(&sys::CloneOptions::default())? {
        sys::Forked::Child => {
            let done = setns(&namespace, CloneFlags::CLONE_NEWNS)
                .map_err(io::Error::from)
                .and_then(|()| act());
            let words = match done {
                Ok(number) => format!("0 {number}"),
                Err(e) => format!("{} 0", e.raw_os_error().unwrap_or(input_output())),
            };
            sys::exit_now(i32::from(
                File::from(write).write_all(words.as_bytes()).is_err(),
            ))
        }
        sys::Forked::Parent(pid) => {
            drop(write);
            let mut words = String::new();
            let heard = File::from(read).read_to_string(&mut words);
            sys::wait_child(pid);
            heard?;
            let mut numbers = words.split(' ').map(str::parse::<u64>);
            match (numbers.next(), numbers.next()) {
                (Some(Ok(0)), Some(Ok(number))) => Ok(number),
                (Some(Ok(error)), _) => Err(io::Error::from_raw_os_error(error as i32)),
                _ => Err(io::Error::other(
                    "the process in there ended without a word",
                )),
            }
        }
    }
}

/// For an error that is not the kernel's.
fn input_output() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

/// Whether there is a container's root to be taken along by who enters its namespaces.
pub fn shared(spec: &Spec) -> bool {
    !namespaces::has_new(spec, LinuxNamespaceType::Mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_has_no_namespace_of_its_own_shares_one() {
        let spec = |namespaces: serde_json::Value| -> Spec {
            let spec =
                serde_json::json!({"ociVersion": "1.0.2", "linux": {"namespaces": namespaces}});
            serde_json::from_value(spec).unwrap()
        };
        let root = tempfile::tempdir().unwrap();
        let own = spec(serde_json::json!([{"type": "mount"}]));
        assert!(SharedMounts::of(&own, root.path()).unwrap().is_none());
        let mut callers = spec(serde_json::json!([{"type": "pid"}]));
        let kept = SharedMounts::of(&callers, root.path()).unwrap().unwrap();
        assert_eq!(kept.below, mount_at(root.path()).unwrap());
        // Nothing is mounted there, so nothing is unmounted.
        kept.clear(root.path()).unwrap();
        kept.open(&mut callers).unwrap();
        assert!(namespaces::has_new(&callers, LinuxNamespaceType::Mount));
        assert!(namespaces::has_new(&callers, LinuxNamespaceType::Pid));
        assert!(SharedMounts::of(&spec(serde_json::json!([])), Path::new("/no/where")).is_err());
    }
}
