//! Where a container's mounts go, in an image that may have been made to lead them astray.
//!
//! libcontainer resolves the places of mounts inside the root, but writes to `dev` by joining paths: with a
//! symbolic link there, it would work on the host's files. And it fails at a link that leads nowhere, where
//! runc makes what the link names.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::rootfs;

/// As many links as the kernel follows (path_resolution(7)).
const MOST_LINKS: usize = 40;
/// What libcontainer takes for directories of the root.
const DIRECTORIES: [&str; 3] = ["dev", "proc", "sys"];

/// A place that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the image's /{} can't be used: {reason}", path.display())]
pub struct PlaceError {
    path: PathBuf,
    reason: String,
}

/// Makes sure that `/dev`, `/proc` and `/sys` are directories of the root, and points mounts whose place is a
/// link that leads nowhere to where it would lead. What is made belongs to `owner`, if one is given.
///
/// # Errors
/// [`PlaceError`], for an image that has something else in one of these places.
pub fn secure(
    root: &OwnedFd,
    spec: &mut Spec,
    owner: Option<(u32, u32)>,
) -> Result<(), PlaceError> {
    for name in DIRECTORIES {
        let error = |reason: String| PlaceError {
            path: PathBuf::from(name),
            reason,
        };
        match open(root, Path::new(name), OFlags::DIRECTORY) {
            Ok(_) => {}
            Err(Errno::NOENT) => rustix::fs::mkdirat(root, name, Mode::from_raw_mode(0o755))
                .map_err(io::Error::from)
                .and_then(|()| rootfs::give(root, name, owner))
                .map_err(|e| error(format!("it is missing and can't be made: {e}")))?,
            Err(Errno::LOOP) => {
                return Err(error(
                    "it is a symbolic link; it must be a directory".into(),
                ));
            }
            Err(e) => return Err(error(format!("{e}; it must be a directory"))),
        }
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let taken: Vec<PathBuf> = mounts.iter().map(|m| m.destination().clone()).collect();
    for mount in &mut mounts {
        let place = mount.destination().clone();
        // In another mount it is that one's files that count.
        let inner = taken
            .iter()
            .any(|other| *other != place && place.starts_with(other));
        if inner {
            continue;
        }
        // The usual case in one call: there is no link on the way.
        if let Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) = open(root, &place, OFlags::empty()) {
            continue;
        }
        let resolved = resolve(root, &place).unwrap_or_else(|_| place.clone());
        // What may be covered in /proc is decided by the name that was asked for (CVE-2019-16884).
        if resolved.starts_with("/proc") && !place.starts_with("/proc") {
            return Err(PlaceError {
                path: place.strip_prefix("/").unwrap_or(&place).to_owned(),
                reason: "it is a symbolic link into /proc; nothing may be mounted there".into(),
            });
        }
        if leads_nowhere(root, &place) {
            mount.set_destination(resolved);
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(
        root,
        path,
        flags | OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS,
    )
}

/// Whether a place does not exist, which it also does not when a symbolic link to nothing is on the way.
fn leads_nowhere(root: &OwnedFd, place: &Path) -> bool {
    let there = rustix::fs::openat2(
        root,
        place,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    );
    there.is_err_and(|e| e == Errno::NOENT)
}

/// The place without symbolic links, clamped to the root; what does not exist is taken at its word.
///
/// # Errors
/// Too many links.
pub fn resolve(root: &OwnedFd, place: &Path) -> io::Result<PathBuf> {
    let names = |path: &Path| -> Vec<OsString> {
        let parts = path.components().filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            _ => None,
        });
        parts.collect()
    };
    let mut rest: VecDeque<OsString> = names(place).into();
    let mut resolved = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            resolved.pop();
            continue;
        }
        let next = resolved.join(&name);
        // Through a descriptor: no component of it is followed.
        let link = open(root, &next, OFlags::NOFOLLOW)
            .and_then(|fd| rustix::fs::readlinkat(&fd, "", Vec::new()));
        match link {
            Ok(link) => {
                links += 1;
                if links > MOST_LINKS {
                    return Err(Errno::LOOP.into());
                }
                let link = PathBuf::from(OsString::from_vec(link.into_bytes()));
                if link.is_absolute() {
                    resolved = PathBuf::from("/");
                }
                for name in names(&link).into_iter().rev() {
                    rest.push_front(name);
                }
            }
            Err(_) => resolved = next,
        }
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn spec(places: &[&str]) -> Spec {
        let mounts: Vec<_> = places
            .iter()
            .map(|p| serde_json::json!({"destination": p, "type": "bind", "source": "/"}))
            .collect();
        serde_json::from_value(serde_json::json!({"ociVersion": "1.0.2", "mounts": mounts}))
            .unwrap()
    }

    fn opened(dir: &Path) -> OwnedFd {
        std::fs::File::open(dir).unwrap().into()
    }

    #[test]
    fn links_to_nothing_lead_where_they_say() {
        let dir = tempfile::tempdir().unwrap();
        let root = opened(dir.path());
        std::fs::create_dir_all(dir.path().join("etc")).unwrap();
        std::fs::create_dir_all(dir.path().join("real")).unwrap();
        let links = [
            ("../run/systemd/resolve/stub.conf", "etc/resolv.conf"),
            ("/missing", "data"),
            ("real", "there"),
            ("../../../../../../out", "etc/climbs"),
            ("loop", "loop"),
            ("/etc/resolv.conf", "chain"),
        ];
        for (target, name) in links {
            symlink(target, dir.path().join(name)).unwrap();
        }
        let places = [
            "/etc/resolv.conf",
            "/data",
            "/data/below",
            "/there",
            "/etc/climbs",
            "/new/dir",
            "/chain",
        ];
        let mut spec = spec(&places);
        secure(&root, &mut spec, None).unwrap();
        let mounts = spec.mounts().clone().unwrap();
        let found: Vec<_> = mounts
            .iter()
            .map(|m| m.destination().to_str().unwrap())
            .collect();
        let expected = [
            "/run/systemd/resolve/stub.conf",
            "/missing",
            "/data/below",
            "/there",
            "/out",
            "/new/dir",
            "/run/systemd/resolve/stub.conf",
        ];
        assert_eq!(found, expected);
        assert!(dir.path().join("dev").is_dir() && dir.path().join("sys").is_dir());
    }

    #[test]
    fn links_into_proc_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = opened(dir.path());
        symlink("proc/self/attr", dir.path().join("innocent")).unwrap();
        symlink("innocent", dir.path().join("chain")).unwrap();
        for place in ["/innocent", "/chain/exec"] {
            let error = secure(&root, &mut spec(&[place]), None).unwrap_err();
            assert!(error.to_string().contains("/proc"), "{error}");
        }
        secure(&root, &mut spec(&["/proc", "/proc/cpuinfo"]), None).unwrap();
    }

    #[test]
    fn directories_must_not_be_links() {
        for name in DIRECTORIES {
            let dir = tempfile::tempdir().unwrap();
            symlink("/tmp", dir.path().join(name)).unwrap();
            let error = secure(&opened(dir.path()), &mut spec(&[]), None).unwrap_err();
            assert!(error.to_string().contains(&format!("/{name}")), "{error}");
            std::fs::remove_file(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name), "").unwrap();
            assert!(secure(&opened(dir.path()), &mut spec(&[]), None).is_err());
        }
    }
}
