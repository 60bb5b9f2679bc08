//! What a container's spec mounts, in few system calls.
//!
//! libcontainer 0.7 spends about eighty calls on each mount, most of them on making sure that `/proc` is what it seems
//! before it makes a directory. Here a place is found, or made, below a descriptor of the root, by `openat2(2)` with
//! `RESOLVE_IN_ROOT`: the kernel keeps whatever the image holds inside.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use libcontainer::rootfs::utils::{is_bind, parse_mount};
use libcontainer::syscall::linux::MountAttr;
use nix::mount::MsFlags;
use oci_spec::runtime::Mount;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use crate::cgroup_view::attach;
use crate::confine::chain;
use crate::mapped::tree;
use crate::rootfs::{self, RootfsError};
use crate::sys;

/// A mount that can't be made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The root file system can't be entered.
    #[error("can't open the root file system {}", path.display())]
    Root {
        /// Where it is mounted.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Its options.
    #[error("the options of the mount on {} can't be read: {reason}", place.display())]
    Options {
        /// Where, in the container.
        place: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Its place can't be made.
    #[error(transparent)]
    Parent(#[from] RootfsError),
    /// Its place is not to be had.
    #[error("{} can't be mounted on: {reason}", place.display())]
    Place {
        /// Where, in the container.
        place: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Mounting.
    #[error("can't {step} {what} on {}", place.display())]
    Step {
        /// What was attempted.
        step: &'static str,
        /// The source, or the type of the file system.
        what: String,
        /// Where, in the container.
        place: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Mounts all of `mounts`, in their order, below the root file system `rootfs`. For the container's init, in its
/// namespaces and before it is in its root.
///
/// # Errors
/// [`MountError`], naming the mount.
pub fn mount_all(rootfs: &Path, mounts: &[Mount]) -> Result<(), MountError> {
    let failed = |source: Errno| MountError::Root {
        path: rootfs.to_owned(),
        source: source.into(),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(rootfs, flags, Mode::empty()).map_err(failed)?;
    mounts.iter().try_for_each(|entry| one(&root, entry))
}

fn one(root: &OwnedFd, entry: &Mount) -> Result<(), MountError> {
    let place = entry.destination().as_path();
    let mut options = Options::of(entry)?;
    // Devices are made in it afterwards.
    if place == Path::new("/dev") {
        options.flags.remove(MsFlags::MS_RDONLY);
    }
    let failed = |step, what: &str| {
        let (what, place) = (what.to_owned(), place.to_owned());
        move |source: io::Error| MountError::Step {
            step,
            what,
            place,
            source,
        }
    };
    let source = entry
        .source()
        .as_deref()
        .ok_or_else(|| MountError::Options {
            place: place.to_owned(),
            reason: "it has no source".to_owned(),
        })?;
    let name = source.to_string_lossy();
    if is_bind(entry) {
        let recursive = entry.options().iter().flatten().any(|o| o == "rbind");
        let tree = tree(source, recursive).map_err(failed("open", &name))?;
        let kind = rustix::fs::fstat(&tree).map_err(|e| failed("look at", &name)(e.into()))?;
        let directory = FileType::from_raw_mode(kind.st_mode) == FileType::Directory;
        let at = find(root, place, directory, ResolveFlags::NO_MAGICLINKS)?;
        let set = attributes(options.flags);
        let clear = cleared(options.flags);
        if (set, clear) != (0, 0) {
            sys::mount_setattr(tree.as_fd(), &sys::mount_attr(set, clear), false)
                .map_err(failed("set the options of", &name))?;
        }
        set_recursively(tree.as_fd(), &options).map_err(failed("set the options of", &name))?;
        return attach(tree.as_fd(), &at).map_err(failed("mount", &name));
    }
    let kind = entry.typ().as_deref().unwrap_or("none");
    // What these show is trusted by whoever finds them in their place: no link leads them elsewhere.
    let resolve = match kind {
        "proc" | "sysfs" => ResolveFlags::NO_SYMLINKS,
        _ => ResolveFlags::NO_MAGICLINKS,
    };
    let at = find(root, place, true, resolve)?;
    let mounted =
        file_system(kind, &name, &options).map_err(failed("mount a file system of type", kind))?;
    attach(mounted.as_fd(), &at).map_err(failed("mount a file system of type", kind))
}

/// The place of a mount, which is made if it is missing.
fn find(
    root: &OwnedFd,
    place: &Path,
    directory: bool,
    resolve: ResolveFlags,
) -> Result<OwnedFd, MountError> {
    let open = |path: &Path, flags| {
        rustix::fs::openat2(
            root,
            path,
            OFlags::PATH | OFlags::CLOEXEC | flags,
            Mode::empty(),
            ResolveFlags::IN_ROOT | resolve,
        )
    };
    let failed = |source: Errno| MountError::Place {
        place: place.to_owned(),
        reason: match source {
            Errno::LOOP => "there is a symbolic link on the way".to_owned(),
            Errno::NOTDIR => "something on the way is no directory".to_owned(),
            Errno::ROFS => {
                "it does not exist, and the root file system is read-only; the image must have it"
                    .to_owned()
            }
            other => io::Error::from(other).to_string(),
        },
    };
    match open(place, OFlags::empty()) {
        Err(Errno::NOENT) => {}
        found => return found.map_err(failed),
    }
    if directory {
        rootfs::make_dir(root, place, None)?;
    } else {
        let top = Path::new("/");
        let (parent, name) = match (place.parent(), place.file_name()) {
            (Some(parent), Some(name)) => (parent, name),
            _ => return Err(failed(Errno::INVAL)),
        };
        let parent = if parent.as_os_str().is_empty() {
            top
        } else {
            parent
        };
        rootfs::make_dir(root, parent, None)?;
        let parent = open(parent, OFlags::DIRECTORY).map_err(failed)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        rustix::fs::openat(&parent, name, flags | OFlags::WRONLY, mode).map_err(failed)?;
    }
    open(place, OFlags::empty()).map_err(failed)
}

/// What a mount's options ask for.
struct Options {
    /// As for mount(2).
    flags: MsFlags,
    /// For the file system.
    data: Vec<String>,
    /// For the whole tree.
    recursive: Option<MountAttr>,
}

impl Options {
    fn of(entry: &Mount) -> Result<Self, MountError> {
        let parsed = parse_mount(entry).map_err(|e| MountError::Options {
            place: entry.destination().clone(),
            reason: chain(&e),
        })?;
        Ok(Self {
            // libcontainer's `nix` is another version of ours.
            flags: MsFlags::from_bits_retain(parsed.flags.bits()),
            data: parsed.data,
            recursive: parsed.rec_attr,
        })
    }
}

/// A file system of this type, mounted nowhere yet.
fn file_system(kind: &str, source: &str, options: &Options) -> io::Result<OwnedFd> {
    let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let set = || -> io::Result<()> {
        fsconfig_set_string(&fs, "source", source)?;
        for option in options.data.iter().filter(|o| !o.is_empty()) {
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(&fs, key, value),
                None => fsconfig_set_flag(&fs, option.as_str()),
            }
            .map_err(|e| io::Error::other(format!("option {option:?}: {e}")))?;
        }
        Ok(fsconfig_create(&fs)?)
    };
    set().map_err(|e| explained(&fs, e))?;
    let set = u32::try_from(attributes(options.flags)).unwrap_or_default();
    let mounted = fsmount(
        &fs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(set),
    )?;
    set_recursively(mounted.as_fd(), options)?;
    Ok(mounted)
}

/// An error with the kernel's own words, which can be read from the context (fsopen(2)).
fn explained(fs: &OwnedFd, error: io::Error) -> io::Error {
    let mut buffer = [0; 512];
    match rustix::io::read(fs, &mut buffer) {
        Ok(length) if length > 0 => {
            let words = String::from_utf8_lossy(&buffer[..length]);
            io::Error::new(error.kind(), format!("{error} ({})", words.trim()))
        }
        _ => error,
    }
}

fn set_recursively(tree: BorrowedFd<'_>, options: &Options) -> io::Result<()> {
    let Some(wanted) = &options.recursive else {
        return Ok(());
    };
    sys::mount_setattr(
        tree,
        &sys::mount_attr(wanted.attr_set, wanted.attr_clr),
        true,
    )
}

/// The attributes of a mount (mount_setattr(2)) that flags of mount(2) stand for.
fn attributes(flags: MsFlags) -> u64 {
    const PLAIN: [(MsFlags, u64); 5] = [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
    ];
    let plain = PLAIN.iter().filter(|(flag, _)| flags.contains(*flag));
    let set = plain.fold(0, |all, (_, attribute)| all | attribute);
    // Only one of them can be.
    if flags.contains(MsFlags::MS_STRICTATIME) {
        set | libc::MOUNT_ATTR_STRICTATIME
    } else if flags.contains(MsFlags::MS_NOATIME) {
        set | libc::MOUNT_ATTR_NOATIME
    } else {
        set
    }
}

/// The attributes that have to be cleared when such are set: the time of access is a field, not flags.
fn cleared(flags: MsFlags) -> u64 {
    let times = MsFlags::MS_STRICTATIME | MsFlags::MS_NOATIME | MsFlags::MS_RELATIME;
    match flags.intersects(times) {
        true => libc::MOUNT_ATTR__ATIME,
        false => 0,
    }
}

/// Sets the propagation of mounts of this process's root, for the time after something else has set that of all.
///
/// # Errors
/// What the kernel says, with the place.
pub fn set_propagation(wanted: &[(PathBuf, MsFlags)]) -> io::Result<()> {
    for (place, flags) in wanted {
        let found = rustix::fs::openat2(
            CWD,
            place,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::NO_MAGICLINKS,
        );
        let set = found.map_err(io::Error::from).and_then(|at| {
            let attr = libc::mount_attr {
                propagation: flags.bits(),
                ..sys::mount_attr(0, 0)
            };
            sys::mount_setattr(at.as_fd(), &attr, true)
        });
        set.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", place.display())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn entry(place: &str, options: &[&str]) -> Mount {
        let json = serde_json::json!({
            "destination": place, "type": "tmpfs", "source": "tmpfs", "options": options,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn options_become_attributes() {
        for (options, set, clear) in [
            (&["rw", "bind"][..], 0, 0),
            (&["ro", "nosuid", "nodev", "noexec"], 0xf, 0),
            (
                &["strictatime"],
                libc::MOUNT_ATTR_STRICTATIME,
                libc::MOUNT_ATTR__ATIME,
            ),
            (
                &["noatime"],
                libc::MOUNT_ATTR_NOATIME,
                libc::MOUNT_ATTR__ATIME,
            ),
            (
                &["relatime", "nodiratime"],
                libc::MOUNT_ATTR_NODIRATIME,
                libc::MOUNT_ATTR__ATIME,
            ),
        ] {
            let found = Options::of(&entry("/x", options)).unwrap();
            assert_eq!(attributes(found.flags), set, "{options:?}");
            assert_eq!(cleared(found.flags), clear, "{options:?}");
            assert!(found.recursive.is_none() && found.data.is_empty());
        }
        let found = Options::of(&entry("/x", &["rro", "mode=755"])).unwrap();
        let recursive = found.recursive.unwrap();
        assert_eq!((recursive.attr_set, recursive.attr_clr), (1, 0));
        assert_eq!(found.data, ["mode=755"]);
    }

    #[test]
    fn places_are_made_inside_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let root = rootfs::open_root(dir.path()).unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        symlink("../../..", dir.path().join("up")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let make = |place: &str, directory| {
            find(
                &root,
                Path::new(place),
                directory,
                ResolveFlags::NO_MAGICLINKS,
            )
        };
        make("/a/b", true).unwrap();
        make("c/d/e", false).unwrap();
        make("/up/f", false).unwrap();
        assert!(dir.path().join("a/b").is_dir() && dir.path().join("c/d/e").is_file());
        assert!(dir.path().join("f").is_file());
        // What is there is taken as it is.
        make("/file", false).unwrap();
        for place in ["/out/x", "/file/x"] {
            for directory in [true, false] {
                assert!(make(place, directory).is_err(), "{place}");
            }
        }
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        // A link in the place of /proc leads nowhere.
        symlink("a", dir.path().join("proc")).unwrap();
        let error = find(&root, Path::new("/proc"), true, ResolveFlags::NO_SYMLINKS).unwrap_err();
        assert!(error.to_string().contains("symbolic link"), "{error}");
    }
}
