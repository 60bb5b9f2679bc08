//! Where a container in a user namespace finds what it is made of.
//!
//! Its root is nobody in particular on the host: it may not pass the directories that lead to its root file
//! system, to its volumes, to its devices. So the creator, which may, opens all of them, and mounts them side by
//! side on a small tmpfs in its own mount namespace, at a place that everybody can reach: over the host's cgroups, or,
//! where a runtime of others still needs those, over something else in sysfs that it does not.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use libcontainer::rootfs::utils::is_bind;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, Spec};

use crate::detach::is_mount_point;
use crate::mapped::{attach, tree};
use crate::mount_table;
use crate::propagation::make_place;

/// Made by libcontainer itself in every `/dev`.
const MADE_BY_LIBCONTAINER: [&str; 7] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/tty",
    "/dev/urandom",
    "/dev/random",
    "/dev/ptmx",
];

/// Options of a mount that say how it shares.
const PROPAGATION: [&str; 4] = ["rprivate", "rslave", "private", "slave"];

/// Mount points of sysfs that no runtime needs, the rarest first. (The kernel keeps such a directory empty for good; what
/// covers any other one would keep a user namespace's root from mounting sysfs, see `mnt_already_visible()`.)
const PLACES: [&str; 6] = [
    "/sys/fs/pstore",
    "/sys/kernel/config",
    "/sys/fs/fuse/connections",
    "/sys/kernel/debug",
    "/sys/kernel/tracing",
    "/sys/fs/bpf",
];

/// Places for [`set`] where the host's cgroups have to stay to be seen: one for the root file system, which is then at a
/// path that is there for everybody (runc's `exec` goes to it), and one for the rest.
///
/// # Errors
/// When there are none, with what to do about it.
pub fn places() -> io::Result<[PathBuf; 2]> {
    let mut found = PLACES
        .iter()
        .map(PathBuf::from)
        .filter(|place| place.is_dir());
    match (found.next(), found.next()) {
        (Some(root), Some(rest)) => Ok([root, rest]),
        _ => {
            let why = format!(
                "two of the kernel's own mount points are needed, and there are not ({}); mount sysfs on /sys, and \
                 use a kernel with debugfs or pstore",
                PLACES.join(", ")
            );
            Err(io::Error::new(io::ErrorKind::NotFound, why))
        }
    }
}

/// Mounts the root file system and the sources of the spec's bind mounts where the pod's root can reach them, below `top`
/// (the root file system on `place`, if there is one), and points the spec at that.
///
/// Devices become bind mounts of nodes that are made here: in a user namespace nobody may make nodes. Their owners
/// stay the host's, so that their modes mean what they mean there.
///
/// # Errors
/// What opening and mounting say, with the path.
pub fn set(spec: &mut Spec, rootfs: &Path, top: &Path, place: Option<&Path>) -> io::Result<()> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    // All of it is opened before anything is covered.
    let mut opened = Vec::new();
    for entry in mounts.iter_mut().filter(|m| is_bind(m)) {
        let source = entry.source().clone().unwrap_or_default();
        let recursive = entry.options().iter().flatten().any(|o| o == "rbind");
        let found = tree(&source, recursive).map_err(named(&source))?;
        opened.push((entry, source, found));
    }
    let root = tree(rootfs, true).map_err(named(rootfs))?;

    let options = Some("mode=755,size=1m,nr_inodes=20k");
    let none: Option<&str> = None;
    mount(
        Some("slipway"),
        top,
        Some("tmpfs"),
        MsFlags::empty(),
        options,
    )?;
    mount(none, top, none, MsFlags::MS_PRIVATE, none)?;
    let place = match place {
        Some(place) => place.to_owned(),
        None => {
            let place = top.join("rootfs");
            fs::create_dir(&place)?;
            place
        }
    };
    attach(&root, &place)?;
    for (n, (entry, source, found)) in opened.into_iter().enumerate() {
        let at = top.join(n.to_string());
        // Of what is covered by now there is only the descriptor left.
        make_place(
            Path::new(&format!("/proc/self/fd/{}", found.as_raw_fd())),
            &at,
        )
        .and_then(|()| attach(&found, &at))
        .map_err(named(&source))?;
        entry.set_source(Some(at));
    }
    let devices = spec
        .linux_mut()
        .as_mut()
        .and_then(|linux| linux.devices_mut().take())
        .unwrap_or_default();
    let own = |device: &&LinuxDevice| {
        let path = device.path().as_path();
        !MADE_BY_LIBCONTAINER
            .iter()
            .any(|made| path == Path::new(made))
    };
    for (n, device) in devices.iter().filter(own).enumerate() {
        let node = top.join(format!("device-{n}"));
        make_node(&node, device).map_err(named(device.path()))?;
        let options = ["bind", "nosuid", "noexec"].map(str::to_owned).to_vec();
        let mut entry = Mount::default();
        entry
            .set_destination(device.path().clone())
            .set_typ(Some("bind".to_owned()))
            .set_source(Some(node))
            .set_options(Some(options));
        mounts.push(entry);
    }
    spec.set_mounts(Some(mounts));
    if let Some(root) = spec.root_mut() {
        root.set_path(place);
    }
    Ok(())
}

/// Makes mounts of their own of what is mounted below the sources of the spec's recursive bind mounts, and leaves those
/// sources bare. `top` is where [`set`] has put them.
///
/// A runtime is asked for nothing that it could leave out then: crun before 1.9 binds without what is below when there is a
/// user namespace.
///
/// # Errors
/// What opening and mounting say, with the path.
pub fn single_out(spec: &mut Spec, top: &Path) -> io::Result<()> {
    let table = mount_table::read(Path::new("/proc/self/mountinfo"))?;
    let mut mounts = Vec::new();
    for (n, entry) in spec.mounts().iter().flatten().enumerate() {
        mounts.push(entry.clone());
        let source = entry.source().clone().unwrap_or_default();
        let options = entry.options().clone().unwrap_or_default();
        if !is_bind(entry) || !options.iter().any(|o| o == "rbind") || !source.starts_with(top) {
            continue;
        }
        let mut below = Vec::new();
        for place in table.iter().map(|mounted| &mounted.place) {
            let Ok(inner) = place.strip_prefix(&source) else {
                continue;
            };
            let known = below.iter().any(|(other, _)| other == inner);
            // What another one covers is not there for anybody.
            if inner.as_os_str().is_empty() || known || !is_mount_point(place).unwrap_or(false) {
                continue;
            }
            let found = tree(place, false).map_err(named(place))?;
            below.push((inner.to_owned(), found));
        }
        if below.is_empty() {
            continue;
        }
        let bare = tree(&source, false).map_err(named(&source))?;
        umount2(&source, MntFlags::MNT_DETACH)
            .map_err(io::Error::from)
            .and_then(|()| attach(&bare, &source))
            .map_err(named(&source))?;
        // Of the rest of the options, what holds for all of the tree is set already.
        let own: Vec<String> = options
            .into_iter()
            .filter(|option| option == "rbind" || PROPAGATION.contains(&option.as_str()))
            .collect();
        for (k, (inner, found)) in below.into_iter().enumerate() {
            let at = top.join(format!("{n}.{k}"));
            make_place(
                Path::new(&format!("/proc/self/fd/{}", found.as_raw_fd())),
                &at,
            )
            .and_then(|()| attach(&found, &at))
            .map_err(named(&inner))?;
            let mut more = entry.clone();
            more.set_destination(entry.destination().join(&inner))
                .set_source(Some(at))
                .set_options(Some(own.clone()));
            mounts.push(more);
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn make_node(at: &Path, device: &LinuxDevice) -> io::Result<()> {
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        _ => SFlag::S_IFCHR,
    };
    let number = |n: i64| u64::try_from(n).map_err(io::Error::other);
    let numbers = makedev(number(device.major())?, number(device.minor())?);
    mknod(at, kind, Mode::empty(), numbers)?;
    chown(at, device.uid(), device.gid())?;
    // After the owner, and whatever the umask is.
    let mode = device.file_mode().unwrap_or(0o666) & 0o777;
    fs::set_permissions(at, fs::Permissions::from_mode(mode))
}

fn named(path: &Path) -> impl Fn(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}
