//! Mounting: the new mount API, recursive read-only, idmapped mounts.

use crate::attempt::{existing, in_private_mounts};
use crate::finding::Finding;
use crate::sys::{MountChange, Sleeper, mount_setattr};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
/// What it costs when there are no user namespaces, or no mounts for them.
pub(crate) const COST: &str = "pods with hostUsers: false are refused";
/// Where user 0 of the probe's user namespace is outside of it.
const MAPPED: u32 = 100_000;

/// What is mounted how.
pub(crate) fn check(privileged: bool, state_root: &Path) -> Vec<Finding> {
    vec![
        mount_api(privileged),
        recursive_read_only(privileged),
        idmapped(privileged, state_root),
    ]
}

fn mount_api(privileged: bool) -> Finding {
    let (id, what) = ("mount-api", "new mount API");
    if !privileged {
        return Finding::not_probed(id, what);
    }
    match in_private_mounts(new_api) {
        Ok(()) => Finding::ok(id, what, "fsopen, fsconfig, fsmount, move_mount"),
        Err(e) => Finding::fail(id, what, format!("does not work: {e}"))
            .cost("no container's root file system can be mounted")
            .fix("use Linux 5.2 or later; look for a seccomp filter around this process"),
    }
}

fn new_api() -> io::Result<()> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "size", "65536")?;
    fsconfig_create(&fs)?;
    let tree = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    move_mount(
        &tree,
        "",
        CWD,
        "/proc",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    fs::write("/proc/file", "x")
}

fn recursive_read_only(privileged: bool) -> Finding {
    let (id, what) = ("recursive-read-only", "recursive read-only");
    if !privileged {
        return Finding::not_probed(id, what);
    }
    match in_private_mounts(nothing_below_is_writable) {
        Ok(true) => Finding::ok(id, what, "mount_setattr makes whole trees read-only"),
        Ok(false) => Finding::warn(id, what, "mount_setattr leaves mounts below writable")
            .cost("pods that ask for recursiveReadOnly are refused")
            .fix("use Linux 5.12 or later"),
        Err(e) => Finding::warn(id, what, format!("does not work: {e}"))
            .cost("pods that ask for recursiveReadOnly are refused")
            .fix("use Linux 5.12 or later"),
    }
}

fn nothing_below_is_writable() -> io::Result<bool> {
    let none: Option<&str> = None;
    // A tmpfs on a tmpfs, over a directory that is everywhere.
    mount(Some("none"), "/proc", Some("tmpfs"), MsFlags::empty(), none)?;
    fs::create_dir("/proc/below")?;
    mount(
        Some("none"),
        "/proc/below",
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )?;
    let change = MountChange {
        at: libc::AT_RECURSIVE,
        set: MOUNT_ATTR_RDONLY,
        ..MountChange::default()
    };
    mount_setattr(CWD, c"/proc", change)?;
    let refused = |path: &str| {
        fs::write(path, "x").is_err_and(|e| e.kind() == io::ErrorKind::ReadOnlyFilesystem)
    };
    Ok(refused("/proc/file") && refused("/proc/below/file"))
}

fn idmapped(privileged: bool, state_root: &Path) -> Finding {
    let (id, what) = ("idmapped-mounts", "idmapped mounts");
    if !privileged {
        return Finding::not_probed(id, what);
    }
    let base = existing(state_root);
    let shown = base.display().to_string();
    match in_private_mounts(move || map_owner(&base)) {
        Ok(()) => Finding::ok(
            id,
            what,
            format!("on the file system of {shown}, also as layers of an overlay"),
        ),
        Err(e) => Finding::info(id, what, format!("not on the file system of {shown}: {e}"))
            .cost(COST)
            .fix("Linux 5.19 has them for layers on ext4, xfs and btrfs; move state_root to one of these"),
    }
}

/// Whether pods can have user namespaces, with root file systems from layers in `state_root`: what
/// `RuntimeHandlerFeatures.user_namespaces` promises, tried out. Takes a few milliseconds.
///
/// # Errors
/// What does not work, and why.
pub fn user_namespaces(state_root: &Path) -> io::Result<()> {
    let base = existing(state_root);
    in_private_mounts(move || map_owner(&base))
}

/// Tries whether a file of root is seen as that of [`MAPPED`] through an idmapped mount, and through an overlay with
/// such a layer.
fn map_owner(base: &Path) -> io::Result<()> {
    let dir = tempfile::Builder::new()
        .prefix(".slipway-check-")
        .tempdir_in(base)?;
    let place = |name: &str| dir.path().join(name);
    for name in ["from", "to", "upper", "work", "merged"] {
        fs::create_dir(place(name))?;
    }
    fs::write(place("from/file"), "")?;
    let step = |what: &'static str| move |e: io::Error| io::Error::other(format!("{what}: {e}"));
    let owner = Sleeper::start(libc::CLONE_NEWUSER, None).map_err(step("a user namespace"))?;
    let of_owner = |name: &str| format!("/proc/{}/{name}", owner.pid());
    fs::write(of_owner("uid_map"), format!("0 {MAPPED} 65536"))?;
    fs::write(of_owner("gid_map"), format!("0 {MAPPED} 65536"))?;
    let namespace = File::open(of_owner("ns/user"))?;
    let tree = open_tree(
        CWD,
        place("from"),
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    let change = MountChange {
        at: libc::AT_EMPTY_PATH,
        set: MOUNT_ATTR_IDMAP,
        user_namespace: Some(namespace.as_fd()),
    };
    mount_setattr(tree.as_fd(), c"", change).map_err(step("an idmapped mount"))?;
    move_mount(
        &tree,
        "",
        CWD,
        place("to"),
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    let seen = |name: &str| {
        let seen = fs::metadata(place(name))?;
        match (seen.uid(), seen.gid()) == (MAPPED, MAPPED) {
            true => Ok(()),
            false => Err(io::Error::other("owners are not mapped")),
        }
    };
    let result = seen("to/file").and_then(|()| {
        overlay(&place).map_err(step("an overlay with an idmapped layer"))?;
        let result = seen("merged/file").map_err(step("an overlay with an idmapped layer"));
        unmount(&place("merged"))?;
        result
    });
    unmount(&place("to"))?;
    result
}

fn overlay(place: &dyn Fn(&str) -> PathBuf) -> io::Result<()> {
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (option, dir) in [
        ("lowerdir", "to"),
        ("upperdir", "upper"),
        ("workdir", "work"),
    ] {
        fsconfig_set_string(&fs, option, place(dir).as_os_str())?;
    }
    fsconfig_create(&fs)?;
    let tree = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(&tree, "", CWD, place("merged"), flags)?)
}

fn unmount(place: &Path) -> io::Result<()> {
    let place = CString::new(place.as_os_str().as_bytes())?;
    Ok(umount2(place.as_c_str(), MntFlags::MNT_DETACH)?)
}
