//! The mounts of what is restored. criu mounts what its images say; so they have to say what the container's
//! configuration says: nothing more, nothing less, nothing more permissive.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nix::mount::MsFlags;
use oci_spec::runtime::Spec;

use crate::cgroup::{Hierarchies, inside};
use crate::criu::image::{self, Mount, Process};
use crate::places;

use super::{ImagesError, refused};

/// `fstype` of criu's, by the names that specifications have.
const KINDS: [(&str, u32); 5] = [
    ("proc", 1),
    ("sysfs", 2),
    ("tmpfs", 5),
    ("devpts", 6),
    ("mqueue", 14),
];
const TMPFS: u32 = 5;
/// Where cgroups are seen.
const CGROUPS: &str = "/sys/fs/cgroup";
const CAP_SYS_ADMIN: u64 = 1 << 21;
/// What masks a file.
const NOTHING: &str = "/dev/null";

/// Flags of a mount that a configuration can ask for.
const RESTRICTIONS: [(&str, MsFlags); 4] = [
    ("ro", MsFlags::MS_RDONLY),
    ("nosuid", MsFlags::MS_NOSUID),
    ("nodev", MsFlags::MS_NODEV),
    ("noexec", MsFlags::MS_NOEXEC),
];

/// What criu has to be given.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What external mounts are called in the images, and what they are now: a path of the host's, or none for an empty
    /// directory.
    pub external: Vec<(String, PathBuf)>,
    /// What has to be there in the root file system to be mounted on, and what is mounted there, if that is of the
    /// host's (or else a directory).
    pub places: Vec<(PathBuf, Option<PathBuf>)>,
}

/// A mount of the configuration.
struct Wanted {
    /// `None`: it shows something of the host's.
    kind: Option<u32>,
    source: PathBuf,
    flags: MsFlags,
}

/// Compares the images' mounts with the configuration's. `root` is the root file system, as the processes see it;
/// `bounding` the container's capabilities.
///
/// # Errors
/// [`ImagesError`], which names the mount.
pub fn plan(
    images: &Path,
    processes: &[Process],
    spec: &Spec,
    root: &OwnedFd,
    cgroups: (&Hierarchies, &Path),
    bounding: u64,
) -> Result<Plan, ImagesError> {
    let mounts = read(images, processes)?;
    let mut wanted = of_spec(spec, root)?;
    of_cgroups(spec, cgroups, &mounts, &mut wanted);
    let linux = spec.linux().as_ref();
    let masked: HashSet<_> = paths(linux.and_then(|l| l.masked_paths().as_ref()));
    let read_only: HashSet<_> = paths(linux.and_then(|l| l.readonly_paths().as_ref()));
    let mut plan = Plan::default();
    let mut seen = HashSet::new();
    let own_mounts = bounding & CAP_SYS_ADMIN != 0;
    let roots: HashSet<u32> = (mounts.iter().filter(|m| m.place == "/"))
        .map(|m| m.id)
        .collect();
    if roots.len() != 1 {
        return Err(refused(
            "the checkpoint does not have exactly one root file system",
        ));
    }
    for mount in &mounts {
        let place = PathBuf::from(&mount.place);
        let no = |what: &str| {
            Err(refused(format!(
                "the checkpoint's mount on {} {what}",
                mount.place
            )))
        };
        if !is_plain(&place) || !is_plain(Path::new(&mount.root)) {
            return no("has a path that is none");
        }
        if mount.with_plugin == Some(true) {
            return no("needs a plugin of criu's");
        }
        let flags = MsFlags::from_bits_truncate(u64::from(mount.flags) as _);
        let lacks = |needed: MsFlags| {
            let lacking = RESTRICTIONS
                .iter()
                .find(|(_, flag)| needed.contains(*flag) && !flags.contains(*flag));
            lacking
                .map(|(name, _)| format!("is not {name}, as the container's configuration has it"))
        };
        let external = match (&mount.ext_key, mount.ext_mount) {
            (Some(key), _) => Some(key.clone()),
            (None, Some(true)) => Some(mount.root.clone()),
            _ => None,
        };
        if place == Path::new("/") {
            let read_only = spec
                .root()
                .as_ref()
                .is_some_and(|r| r.readonly() == Some(true));
            if external.is_some() || (read_only && !flags.contains(MsFlags::MS_RDONLY)) {
                return no("is not read-only, as the container's configuration has it");
            }
            continue;
        }
        let on_root = roots.contains(&mount.parent);
        // Of several mounts on one another, each has to be as it is to be.
        if let Some(wanted) = wanted.get(&place) {
            if let Some(lacks) = lacks(wanted.flags) {
                return no(&lacks);
            }
            match (wanted.kind, &external) {
                (None, Some(key)) => add(&mut plan, key, wanted.source.clone())?,
                (Some(kind), None) if kind == mount.kind => {}
                (None, None) => {
                    return no("is not one of the host's, as the container's configuration has it");
                }
                _ => return no("is of another kind than in the container's configuration"),
            }
            seen.insert(place.clone());
            if on_root {
                let source = wanted.kind.is_none().then(|| wanted.source.clone());
                plan.places.push((place, source));
            }
            continue;
        }
        if let Some(key) = external.as_ref().filter(|_| masked.contains(&place)) {
            // Other runtimes mask with what is of the host's; here it is what masks that is ours.
            let is_dir = place.symlink_metadata().is_ok_and(|found| found.is_dir());
            if is_dir && !flags.contains(MsFlags::MS_RDONLY) {
                return no(
                    "can be written to, and the container's configuration masks what is there",
                );
            }
            let source = PathBuf::from(if is_dir { "" } else { NOTHING });
            add(&mut plan, key, source.clone())?;
            seen.insert(place.clone());
            if on_root {
                plan.places.push((place, (!is_dir).then_some(source)));
            }
            continue;
        }
        if external.is_some() {
            return no(
                "shows something of the host's, and the container's configuration has no mount there; add it",
            );
        }
        let known_kind = KINDS.iter().any(|(_, kind)| *kind == mount.kind);
        let covers = masked.contains(&place) || read_only.contains(&place);
        if !known_kind && !covers {
            return no("is of a kind that can't be restored");
        }
        let restricted = masked.contains(&place) || flags.contains(MsFlags::MS_RDONLY);
        let ours = (covers && restricted) || place == Path::new("/dev/console");
        if !ours && !own_mounts {
            return no(
                "is in no configuration of the container's, which may not mount anything either",
            );
        }
        if covers {
            seen.insert(place.clone());
        }
        if on_root {
            plan.places.push((place, None));
        }
    }
    for place in wanted.keys().chain(&masked).chain(&read_only) {
        // What is not there to be masked is not masked.
        let is_there = wanted.contains_key(place) || place.symlink_metadata().is_ok();
        if !seen.contains(place) && is_there {
            let message = format!(
                "the container's configuration has a mount on {} that the checkpoint does not have",
                place.display()
            );
            return Err(refused(message));
        }
    }
    Ok(plan)
}

/// Has criu told what an external mount is now.
fn add(plan: &mut Plan, key: &str, source: PathBuf) -> Result<(), ImagesError> {
    if key.contains(']') || plan.external.iter().any(|(known, _)| known == key) {
        return Err(refused(format!(
            "the checkpoint's mount that is called {key:?} is called as another one"
        )));
    }
    plan.external.push((key.to_owned(), source));
    Ok(())
}

fn read(images: &Path, processes: &[Process]) -> Result<Vec<Mount>, ImagesError> {
    let init = processes.first().map_or(1, |first| first.pid);
    let ids: image::Ids = image::read_one(&images.join(format!("ids-{init}.img")))?;
    let own = format!("mountpoints-{}.img", ids.mnt_ns.unwrap_or_default());
    for entry in
        fs::read_dir(images).map_err(|e| refused(format!("can't list criu's images: {e}")))?
    {
        let name = entry
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .unwrap_or_default();
        if name.starts_with("mountpoints-") && name != own {
            return Err(refused(
                "a process has a mount namespace of its own, which can't be restored",
            ));
        }
    }
    Ok(image::read(&images.join(own))?)
}

fn of_spec(spec: &Spec, root: &OwnedFd) -> Result<HashMap<PathBuf, Wanted>, ImagesError> {
    let mut wanted = HashMap::new();
    for mount in spec.mounts().iter().flatten() {
        let kind = mount.typ().as_deref().unwrap_or_default();
        if kind == "cgroup" || kind == "cgroup2" {
            continue;
        }
        let options = || mount.options().iter().flatten().map(String::as_str);
        let mut flags = MsFlags::empty();
        for (name, flag) in RESTRICTIONS {
            flags.set(flag, options().any(|o| o == name));
        }
        let bind = libcontainer::rootfs::utils::is_bind(mount);
        let kind = match bind {
            true => None,
            false => {
                let known = KINDS.iter().find(|(name, _)| *name == kind);
                Some(known.map(|(_, kind)| *kind).ok_or_else(|| {
                    refused(format!(
                        "a mount of type {kind:?} on {} can't be restored",
                        mount.destination().display()
                    ))
                })?)
            }
        };
        let place = mount.destination();
        let place = places::resolve(root, place).unwrap_or_else(|_| place.clone());
        let source = mount.source().clone().unwrap_or_default();
        wanted.insert(
            place,
            Wanted {
                kind,
                source,
                flags,
            },
        );
    }
    Ok(wanted)
}

/// What a container sees of its cgroups, as [`crate::cgroup_view`] mounts it.
fn of_cgroups(
    spec: &Spec,
    (cgroups, cgroup): (&Hierarchies, &Path),
    mounts: &[Mount],
    wanted: &mut HashMap<PathBuf, Wanted>,
) {
    let is_cgroup =
        |m: &&oci_spec::runtime::Mount| matches!(m.typ().as_deref(), Some("cgroup" | "cgroup2"));
    let Some(entry) = spec.mounts().iter().flatten().find(is_cgroup) else {
        return;
    };
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    flags.set(
        MsFlags::MS_RDONLY,
        entry.options().iter().flatten().any(|o| o == "ro"),
    );
    let top = entry.destination();
    let mut put = |place: PathBuf, kind, source| {
        wanted.insert(
            place,
            Wanted {
                kind,
                source,
                flags,
            },
        )
    };
    for mount_point in cgroups.mount_points() {
        let Ok(name) = mount_point.strip_prefix(CGROUPS) else {
            continue;
        };
        let place = match name.as_os_str().is_empty() {
            true => top.clone(),
            false => top.join(name),
        };
        put(place, None, inside(mount_point, cgroup));
    }
    let top_is_tmpfs = mounts
        .iter()
        .any(|m| Path::new(&m.place) == top && m.kind == TMPFS);
    if !cgroups.unified() && top_is_tmpfs {
        put(top.clone(), Some(TMPFS), PathBuf::new());
    }
}

fn paths(list: Option<&Vec<String>>) -> HashSet<PathBuf> {
    list.into_iter().flatten().map(PathBuf::from).collect()
}

/// Whether a path is absolute and leads only downwards.
fn is_plain(path: &Path) -> bool {
    path.is_absolute()
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}
