//! Mounts of a container: the standard ones, the pod's files, and those it asks for.

use crate::error::{Result, SpecError, quoted, quoted_path};
use crate::sources::{MountSource, Propagation};
use crate::{ContainerInput, paths};
use oci_spec::runtime::Mount;
use slipway_proto::cri::{self, MountPropagation};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A container's mounts, in the order in which they are made.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mounts {
    pub list: Vec<Mount>,
    /// Destinations of recursive read-only mounts.
    pub recursive_read_only: Vec<String>,
    /// Propagation of the root that the mounts need, in libcontainer's words.
    pub rootfs_propagation: Option<&'static str>,
}

/// What of the container's circumstances its mounts depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Circumstances {
    pub privileged: bool,
    pub readonly_rootfs: bool,
    pub host_ipc: bool,
}

/// Files below /proc that may be covered: lxcfs and its like give a container its own view there.
/// Covering anything else could fool what trusts /proc (CVE-2019-16884).
const COVERABLE: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// Made by libcontainer in every container's /dev, after the mounts: it would fail on one that is there,
/// or, worse, replace it where the host's own /dev is mounted.
const MADE_IN_DEV: [&str; 13] = [
    "/dev",
    "/dev/fd",
    "/dev/full",
    "/dev/kcore",
    "/dev/null",
    "/dev/ptmx",
    "/dev/random",
    "/dev/stderr",
    "/dev/stdin",
    "/dev/stdout",
    "/dev/tty",
    "/dev/urandom",
    "/dev/zero",
];

/// Refuses what a later version brings.
pub(crate) fn unsupported(field: &str, mount: &cri::Mount) -> Result<()> {
    let what = if mount.image.is_some() || !mount.image_sub_path.is_empty() {
        (
            "image",
            "volumes from images are not there yet in this version; use a host path",
        )
    } else if !mount.mount_options.is_empty() {
        (
            "mount_options",
            "mount options are not there yet in this version; drop them",
        )
    } else if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        (
            "uidMappings",
            "mapped mounts are not there yet in this version; drop the mappings",
        )
    } else {
        return Ok(());
    };
    Err(SpecError::unsupported(
        format!("{field}.{}", what.0),
        what.1,
    ))
}

/// A container's mounts. Its own cover the standard ones; of several, those nearer to the root come first,
/// so that none hides another.
pub(crate) fn of_container(input: &ContainerInput<'_>, at: Circumstances) -> Result<Mounts> {
    let mut out = Mounts::default();
    let mut own: Vec<(PathBuf, Mount)> = Vec::new();
    let mut taken = BTreeSet::new();
    for (i, request) in input.config.mounts.iter().enumerate() {
        let field = format!("mounts[{i}]");
        let Some(source) = input.sources.mounts.get(i) else {
            return Err(SpecError::invalid(field, "was not looked up on the host"));
        };
        let place = place(&field, request, source)?;
        if !taken.insert(place.clone()) {
            let what = format!("{} is mounted twice", quoted(&request.container_path));
            return Err(SpecError::invalid(format!("{field}.container_path"), what));
        }
        if input.host.selinux && request.selinux_relabel {
            let what = "relabelling is not there yet in this version; label the source beforehand";
            return Err(SpecError::unsupported(
                format!("{field}.selinux_relabel"),
                what,
            ));
        }
        let mut options = vec!["rbind", propagation(&field, request, source, &mut out)?];
        let read_only = read_only(&field, request, input.host.recursive_read_only)?;
        options.extend_from_slice(read_only);
        if read_only.contains(&"rro") {
            out.recursive_read_only
                .push(place.to_string_lossy().into_owned());
        }
        own.push((place.clone(), mount(&place, "bind", &source.path, &options)));
    }
    for (place, source, options) in pod_files(input, at) {
        let place = PathBuf::from(place);
        if taken.insert(place.clone()) {
            own.push((place.clone(), mount(&place, "bind", &source, &options)));
        }
    }
    for standard in standard(at) {
        // One that lies in a mount of the container's own would only be hidden by it.
        if !taken
            .iter()
            .any(|place| standard.destination().starts_with(place))
        {
            out.list.push(standard);
        }
    }
    own.sort_by_key(|(place, _)| place.components().count());
    out.list.extend(own.into_iter().map(|(_, mount)| mount));
    Ok(out)
}

/// Where a requested mount goes.
fn place(field: &str, request: &cri::Mount, source: &MountSource) -> Result<PathBuf> {
    unsupported(field, request)?;
    let field = format!("{field}.container_path");
    paths::absolute(&field, &request.container_path)?;
    let place = paths::clean(&request.container_path);
    let shown = quoted(&request.container_path);
    if place == Path::new("/") {
        let what = "can't be the root; mount below it";
        return Err(SpecError::invalid(field, what));
    }
    if place == Path::new("/proc") {
        if !source.procfs {
            let what = format!("{shown} may only be covered by a proc file system");
            return Err(SpecError::invalid(field, what));
        }
    } else if place.starts_with("/proc") && !COVERABLE.iter().any(|file| place == Path::new(file)) {
        let what = format!(
            "{shown} lies in /proc, where only {} may be covered",
            COVERABLE.join(", ")
        );
        return Err(SpecError::invalid(field, what));
    }
    if MADE_IN_DEV.iter().any(|file| place == Path::new(file)) {
        let what = format!(
            "a mount over {shown} is not there yet in this version; use another path, or devices"
        );
        return Err(SpecError::unsupported(field, what));
    }
    Ok(place)
}

fn propagation(
    field: &str,
    request: &cri::Mount,
    source: &MountSource,
    out: &mut Mounts,
) -> Result<&'static str> {
    let field = format!("{field}.propagation");
    let Ok(wanted) = MountPropagation::try_from(request.propagation) else {
        let what = format!("there is no propagation {}", request.propagation);
        return Err(SpecError::invalid(field, what));
    };
    let needs = |what: &str| {
        let what = format!(
            "{} lies on a mount that is not {what}; make it so with mount --make-shared",
            quoted_path(&source.path)
        );
        Err(SpecError::precondition(&field, what))
    };
    match (wanted, source.propagation) {
        (MountPropagation::PropagationPrivate, _) => Ok("rprivate"),
        (MountPropagation::PropagationHostToContainer, Propagation::Private) => {
            needs("shared or slave")
        }
        (MountPropagation::PropagationHostToContainer, _) => {
            out.rootfs_propagation = out.rootfs_propagation.or(Some("slave"));
            Ok("rslave")
        }
        (MountPropagation::PropagationBidirectional, Propagation::Shared) => {
            out.rootfs_propagation = Some("shared");
            Ok("rshared")
        }
        (MountPropagation::PropagationBidirectional, _) => needs("shared"),
    }
}

fn read_only(field: &str, request: &cri::Mount, possible: bool) -> Result<&'static [&'static str]> {
    if !request.recursive_read_only {
        return Ok(if request.readonly { &["ro"] } else { &["rw"] });
    }
    let field = format!("{field}.recursive_read_only");
    if !request.readonly {
        return Err(SpecError::invalid(field, "needs readonly"));
    }
    if request.propagation != i32::from(MountPropagation::PropagationPrivate) {
        return Err(SpecError::invalid(
            field,
            "needs propagation PROPAGATION_PRIVATE",
        ));
    }
    if !possible {
        let what = "needs Linux 5.12; this kernel is older";
        return Err(SpecError::precondition(field, what));
    }
    Ok(&["ro", "rro"])
}

/// The pod's files and shared memory: where, from where, how.
fn pod_files<'a>(
    input: &ContainerInput<'a>,
    at: Circumstances,
) -> Vec<(&'static str, PathBuf, Vec<&'a str>)> {
    let mode = if at.readonly_rootfs { "ro" } else { "rw" };
    let files = [
        ("/etc/hostname", &input.files.hostname),
        ("/etc/hosts", &input.files.hosts),
        ("/etc/resolv.conf", &input.files.resolv_conf),
    ];
    let mut all: Vec<_> = files
        .into_iter()
        .filter_map(|(place, source)| {
            let source = source.clone()?;
            Some((
                place,
                source,
                vec!["rbind", "rprivate", "nosuid", "nodev", "noexec", mode],
            ))
        })
        .collect();
    let shm = if at.host_ipc {
        Some(PathBuf::from("/dev/shm"))
    } else {
        input.files.shm.clone()
    };
    if let Some(shm) = shm {
        let options = vec!["rbind", "rprivate", "nosuid", "nodev", "noexec", "rw"];
        all.push(("/dev/shm", shm, options));
    }
    all
}

/// What every container has (runtime-spec, "Default Filesystems").
fn standard(at: Circumstances) -> Vec<Mount> {
    let mode = if at.privileged { "rw" } else { "ro" };
    let from = |place: &str, kind: &str, options: &[&str]| {
        mount(Path::new(place), kind, Path::new(kind), options)
    };
    let tight = ["nosuid", "noexec", "nodev"];
    vec![
        from("/proc", "proc", &tight),
        from(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        from(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        from("/dev/mqueue", "mqueue", &tight),
        from("/sys", "sysfs", &["nosuid", "noexec", "nodev", mode]),
        from(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", mode],
        ),
    ]
}

fn mount(place: &Path, kind: &str, source: &Path, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(place.to_owned())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.to_owned()))
        .set_options(Some(options.iter().map(|o| (*o).to_owned()).collect()));
    mount
}
