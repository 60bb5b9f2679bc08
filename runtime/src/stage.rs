//! Where a container in a user namespace finds what it is made of.
//!
//! Its root is nobody in particular on the host: it may not pass the directories that lead to its root file
//! system, to its volumes, to its devices. So the creator, which may, opens all of them, and mounts them side by
//! side on a small tmpfs in its own mount namespace, at a place that everybody can reach: over the host's cgroups.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use libcontainer::rootfs::utils::is_bind;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, Spec};

use crate::cgroup_view::CGROUP_ROOT;
use crate::mapped::{attach, tree};
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

/// Mounts the root file system and the sources of the spec's bind mounts where the pod's root can reach them, and
/// points the spec at that.
///
/// Devices become bind mounts of nodes that are made here: in a user namespace nobody may make nodes. Their owners
/// stay the host's, so that their modes mean what they mean there.
///
/// # Errors
/// What opening and mounting say, with the path.
pub fn set(spec: &mut Spec, rootfs: &Path) -> io::Result<()> {
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

    let top = Path::new(CGROUP_ROOT);
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
    let place = top.join("rootfs");
    fs::create_dir(&place)?;
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
