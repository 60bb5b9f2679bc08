//! Mounts of a container: the standard ones, the pod's files, and those it asks for.

use crate::error::{Result, SpecError, quoted, quoted_path};
use crate::sources::{MountSource, Propagation};
use crate::userns::{self, IdMaps};
use crate::{ContainerInput, paths};
use oci_spec::runtime::Mount;
use slipway_proto::cri::{self, MountPropagation};
use slipway_proto::keeper;
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
    /// Sources that are to have the container's SELinux label.
    pub relabel: Vec<PathBuf>,
    /// Images to be mounted, in the order of the request; their layers are left to the caller.
    pub image_volumes: Vec<keeper::ImageVolume>,
}

/// Directory in a container's run directory below which its creator mounts images.
const IMAGE_VOLUMES: &str = "images";

/// What of the container's circumstances its mounts depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Circumstances {
    pub privileged: bool,
    pub readonly_rootfs: bool,
    pub host_ipc: bool,
    pub host_network: bool,
    /// Ids of the pod's user namespace, if it has one.
    pub users: Option<IdMaps>,
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

/// The group of terminals, everywhere.
const TTY: u32 = 5;

/// Made by libcontainer in every container's /dev, after the mounts: it would fail on one that is there.
const MADE_IN_DEV: [&str; 12] = [
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

/// Bind mount options that a request may name (KEP-5855), and what takes them down to the mounts below: what is
/// forbidden in a volume is not to be allowed in a part of it.
const OPTIONS: [(&str, &str); 3] = [
    ("nodev", "rnodev"),
    ("noexec", "rnoexec"),
    ("nosuid", "rnosuid"),
];

/// The request's own options.
fn own_options(field: &str, request: &cri::Mount, possible: bool) -> Result<Vec<&'static str>> {
    let mut options = BTreeSet::new();
    for (i, asked) in request.mount_options.iter().enumerate() {
        let field = format!("{field}.mount_options[{i}]");
        let Some((_, option)) = OPTIONS.iter().find(|(name, _)| name == asked) else {
            let what = format!(
                "{} is no option of a bind mount; there are nodev, noexec and nosuid",
                quoted(asked)
            );
            return Err(SpecError::invalid(field, what));
        };
        if !possible {
            let what = "needs Linux 5.12; this kernel is older";
            return Err(SpecError::precondition(field, what));
        }
        options.insert(*option);
    }
    Ok(options.into_iter().collect())
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
        if let Some(image) = &request.image {
            image_volume(&field, request)?;
            // In a user namespace its layers' owners are mapped as those of the root file system are, whatever
            // is asked for.
            userns::of_mount(&field, request)?;
            // Where the creator mounts it, in a mount namespace that ends with the container.
            let at = (input.container_dir.join(IMAGE_VOLUMES)).join(i.to_string());
            let mut options = vec!["rbind", "rprivate", "ro", "nodev"];
            let possible = input.host.recursive_read_only;
            options.extend(own_options(&field, request, possible)?);
            own.push((place.clone(), mount(&place, "bind", &at, &options)));
            out.image_volumes.push(keeper::ImageVolume {
                at: at.to_string_lossy().into_owned(),
                lower: Vec::new(),
                sub_path: request.image_sub_path.clone(),
                image: image.image.clone(),
                container_path: request.container_path.clone(),
            });
            continue;
        }
        if input.host.selinux.is_some() && request.selinux_relabel {
            if !relabelable(&source.path) {
                let what = format!(
                    "{} belongs to the host, and other programs would lose it; mount a directory of its own, \
                     or don't ask for relabelling",
                    source.path.display()
                );
                return Err(SpecError::invalid(format!("{field}.selinux_relabel"), what));
            }
            out.relabel.push(source.path.clone());
        }
        let propagation = propagation(&field, request, source, &mut out)?;
        if at.users.is_some() && propagation == "rshared" {
            let what = "PROPAGATION_BIDIRECTIONAL does not go with a user namespace: the kernel lets no mount out \
                        of one";
            return Err(SpecError::invalid(format!("{field}.propagation"), what));
        }
        let mut options = vec!["rbind", propagation];
        let read_only = read_only(&field, request, input.host.recursive_read_only)?;
        options.extend_from_slice(read_only);
        if read_only.contains(&"rro") {
            out.recursive_read_only
                .push(place.to_string_lossy().into_owned());
        }
        options.extend(own_options(
            &field,
            request,
            input.host.recursive_read_only,
        )?);
        let mut bind = mount(&place, "bind", &source.path, &options);
        if let Some(maps) = userns::of_mount(&field, request)? {
            bind.set_uid_mappings(Some(vec![maps.uids]))
                .set_gid_mappings(Some(vec![maps.gids]));
        }
        own.push((place.clone(), bind));
    }
    for (place, source, options) in pod_files(input, at) {
        let place = PathBuf::from(place);
        if taken.insert(place.clone()) {
            own.push((place.clone(), mount(&place, "bind", &source, &options)));
        }
    }
    for standard in standard(at) {
        // One that lies in a mount of the container's own would only be hidden by it. Not so in /dev: a mount
        // over that is made last, below the others.
        let hides = |place: &&PathBuf| {
            place.as_path() != Path::new("/dev") && standard.destination().starts_with(place)
        };
        if !taken.iter().any(|place| hides(&place)) {
            out.list.push(standard);
        }
    }
    let shm = Path::new("/dev/shm");
    if !taken.contains(shm) {
        // A pod without shared memory of its own: each container for itself.
        let size = format!("size={}", input.options.shm_bytes);
        let options = ["nosuid", "noexec", "nodev", "mode=1777", &size];
        out.list
            .push(mount(shm, "tmpfs", Path::new("shm"), &options));
    }
    own.sort_by_key(|(place, _)| place.components().count());
    out.list.extend(own.into_iter().map(|(_, mount)| mount));
    Ok(out)
}

/// Checks a mount of an image (KEP-4639): always read-only, and from nowhere on the host.
pub(crate) fn image_volume(field: &str, mount: &cri::Mount) -> Result<()> {
    let refuse = |name: &str, what: &str| Err(SpecError::invalid(format!("{field}.{name}"), what));
    let Some(image) = &mount.image else {
        if mount.image_sub_path.is_empty() {
            return Ok(());
        }
        return refuse("image_sub_path", "is a path in an image; name the image");
    };
    if image.image.is_empty() {
        return refuse("image.image", "must name an image that was pulled");
    }
    if !mount.host_path.is_empty() {
        return refuse("host_path", "must be empty, as the mount is of an image");
    }
    if !mount.readonly {
        return refuse("readonly", "must be set: an image can't be written to");
    }
    if mount.propagation != i32::from(MountPropagation::PropagationPrivate) {
        let what = "must be PROPAGATION_PRIVATE: nothing is mounted in an image";
        return refuse("propagation", what);
    }
    let sub_path = Path::new(&mount.image_sub_path);
    if mount.image_sub_path.contains('\0') {
        return refuse("image_sub_path", "holds a NUL byte");
    }
    // Inside the image's root a step up leads nowhere harmful, but means a mistake.
    let outward = |part| matches!(part, std::path::Component::ParentDir);
    if sub_path.is_absolute() || sub_path.components().any(outward) {
        let what = format!(
            "{} must be a relative path without \"..\"",
            quoted(&mount.image_sub_path)
        );
        return refuse("image_sub_path", &what);
    }
    Ok(())
}

/// Where a requested mount goes.
fn place(field: &str, request: &cri::Mount, source: &MountSource) -> Result<PathBuf> {
    let field = format!("{field}.container_path");
    paths::absolute(&field, &request.container_path)?;
    let place = paths::clean(&request.container_path);
    coverable(&field, &place, source.procfs)?;
    Ok(place)
}

/// Refuses places that no mount may be at; `procfs`: what is mounted is a proc file system.
pub(crate) fn coverable(field: &str, place: &Path, procfs: bool) -> Result<()> {
    let shown = quoted_path(place);
    if place == Path::new("/") {
        let what = "can't be the root; mount below it";
        return Err(SpecError::invalid(field, what));
    }
    if place == Path::new("/proc") {
        if !procfs {
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
    free_in_dev(field, place)
}

/// Refuses what the runtime makes in `/dev` itself.
pub(crate) fn free_in_dev(field: &str, place: &Path) -> Result<()> {
    if MADE_IN_DEV.iter().any(|file| place == Path::new(file)) {
        let what = format!(
            "a mount over {} is not there yet in this version; use another path, or devices",
            quoted_path(place)
        );
        return Err(SpecError::unsupported(field, what));
    }
    Ok(())
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
    let mut pts = vec![
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
    ];
    // The group tty: devpts takes no group that its user namespace has not.
    if at.users.is_none_or(|users| users.gids.size() > TTY) {
        pts.push("gid=5");
    }
    // sysfs shows a network, so who has that may mount it; the host's is not the pod's. Without what is mounted
    // below it, of which nothing is the container's to see.
    let sys = if at.users.is_some() && at.host_network {
        let options = ["bind", "rprivate", "nosuid", "noexec", "nodev", "ro"];
        mount(Path::new("/sys"), "bind", Path::new("/sys"), &options)
    } else {
        from("/sys", "sysfs", &["nosuid", "noexec", "nodev", mode])
    };
    vec![
        from("/proc", "proc", &tight),
        from(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        from("/dev/pts", "devpts", &pts),
        from("/dev/mqueue", "mqueue", &tight),
        sys,
        from(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", mode],
        ),
    ]
}

/// Whether a directory may be given to a container for good. Those of the host's own, which its programs need as
/// they are, may not; the peers refuse the same.
fn relabelable(source: &Path) -> bool {
    const OWN: [&str; 23] = [
        "/",
        "/bin",
        "/boot",
        "/dev",
        "/etc",
        "/etc/passwd",
        "/etc/pki",
        "/etc/shadow",
        "/home",
        "/lib",
        "/lib64",
        "/media",
        "/opt",
        "/proc",
        "/root",
        "/run",
        "/sbin",
        "/srv",
        "/sys",
        "/tmp",
        "/usr",
        "/var",
        "/var/lib",
    ];
    !OWN.iter().any(|own| Path::new(own) == source)
        && !["/proc", "/sys", "/dev"]
            .iter()
            .any(|fs| source.starts_with(fs))
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

#[cfg(test)]
mod tests {
    use crate::tests::{Case, find, has, mounts, options};
    use crate::{Propagation, SpecErrorKind};
    use slipway_proto::cri::{self, MountPropagation, NamespaceMode};
    use std::path::Path;

    #[test]
    fn mounts_nearer_to_the_root_come_first() {
        let mut case = Case::new();
        case.mount("/data/a/b", "/1");
        case.mount("/data", "/2");
        case.mount("/data/./a/", "/3");
        case.mount("/etc/hosts", "/4").readonly = true;
        let plan = case.good();
        let found = mounts(&plan.spec);
        let own: Vec<_> = found.iter().filter(|m| m.starts_with("/data")).collect();
        assert_eq!(own, ["/data", "/data/a", "/data/a/b"]);
        assert_eq!(found.iter().filter(|m| *m == "/etc/hosts").count(), 1);
        assert_eq!(
            find(&plan.spec, "/etc/hosts").source().as_deref(),
            Some(Path::new("/4"))
        );
        assert_eq!(
            options(&plan.spec, "/etc/hosts"),
            ["rbind", "rprivate", "ro"]
        );
        assert_eq!(options(&plan.spec, "/data"), ["rbind", "rprivate", "rw"]);
        assert_eq!(
            plan.mounts, case.config.mounts,
            "the status says what was asked for"
        );
    }

    #[test]
    fn own_mounts_cover_the_standard_ones() {
        let mut case = Case::new();
        case.mount("/sys", "/host/sys");
        case.mount("/dev/shm", "/host/shm");
        case.mount("/dev/termination-log", "/host/log");
        let plan = case.good();
        let found = mounts(&plan.spec);
        assert!(!found.contains(&"/sys/fs/cgroup".to_owned()));
        assert_eq!(
            found
                .iter()
                .filter(|m| *m == "/sys" || *m == "/dev/shm")
                .count(),
            2
        );
        assert_eq!(
            find(&plan.spec, "/dev/shm").source().as_deref(),
            Some(Path::new("/host/shm"))
        );
        assert_eq!(
            find(&plan.spec, "/sys").source().as_deref(),
            Some(Path::new("/host/sys"))
        );
    }

    #[test]
    fn shared_memory_follows_the_ipc_namespace() {
        let source = |case: &Case| find(&case.good().spec, "/dev/shm").source().clone();
        let mut case = Case::new();
        assert_eq!(
            source(&case).as_deref(),
            Some(Path::new("/run/slipway/pods/p/shm"))
        );
        let ipc = NamespaceMode::Node.into();
        case.pod_security().namespace_options = Some(cri::NamespaceOption {
            ipc,
            ..Default::default()
        });
        assert_eq!(source(&case).as_deref(), Some(Path::new("/dev/shm")));
    }

    #[test]
    fn without_the_pods_shared_memory_there_is_some() {
        let mut case = Case::new();
        case.files.shm = None;
        let plan = case.good();
        let shm = find(&plan.spec, "/dev/shm");
        assert_eq!(shm.typ().as_deref(), Some("tmpfs"));
        assert!(has(&plan.spec, "/dev/shm", "size=67108864"));
        case.mount("/dev/shm", "/y");
        assert_eq!(
            options(&case.good().spec, "/dev/shm"),
            ["rbind", "rprivate", "rw"]
        );
    }

    #[test]
    fn propagation() {
        use MountPropagation::{
            PropagationBidirectional as Both, PropagationHostToContainer as In,
            PropagationPrivate as No,
        };
        use Propagation::{Private, Shared, Slave};
        // wanted, the source's, the mount's option and the root's propagation
        let cases = [
            (No, Private, Some(("rprivate", None))),
            (No, Shared, Some(("rprivate", None))),
            (In, Private, None),
            (In, Slave, Some(("rslave", Some("slave")))),
            (In, Shared, Some(("rslave", Some("slave")))),
            (Both, Private, None),
            (Both, Slave, None),
            (Both, Shared, Some(("rshared", Some("shared")))),
        ];
        for (wanted, source, expected) in cases {
            let mut case = Case::new();
            case.mount("/x", "/y").propagation = wanted.into();
            case.sources.mounts[0].propagation = source;
            let Some((option, root)) = expected else {
                let field = "mounts[0].propagation".to_owned();
                assert_eq!(case.bad(), (SpecErrorKind::FailedPrecondition, field));
                continue;
            };
            let plan = case.good();
            assert!(has(&plan.spec, "/x", option), "{wanted:?} from {source:?}");
            let linux = plan.spec.linux().clone().expect("linux");
            assert_eq!(linux.rootfs_propagation().as_deref(), root);
        }
        let mut case = Case::new();
        case.mount("/a", "/a").propagation = Both.into();
        case.mount("/b", "/b").propagation = In.into();
        let linux = case.good().spec.linux().clone().expect("linux");
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("shared"));
        case.config.mounts[0].propagation = 9;
        assert_eq!(case.bad().0, SpecErrorKind::Invalid);
    }

    #[test]
    fn recursive_read_only() {
        let mut case = Case::new();
        let mount = case.mount("/x", "/y");
        mount.readonly = true;
        mount.recursive_read_only = true;
        let plan = case.good();
        assert!(has(&plan.spec, "/x", "ro") && has(&plan.spec, "/x", "rro"));
        assert_eq!(plan.create.recursive_read_only, ["/x"]);
        let field = "mounts[0].recursive_read_only".to_owned();
        for propagation in [1, 2] {
            case.config.mounts[0].propagation = propagation;
            assert_eq!(case.bad().0, SpecErrorKind::Invalid);
        }
        case.config.mounts[0].propagation = 0;
        case.config.mounts[0].readonly = false;
        assert_eq!(case.bad(), (SpecErrorKind::Invalid, field.clone()));
        case.config.mounts[0].readonly = true;
        case.host.recursive_read_only = false;
        assert_eq!(case.bad(), (SpecErrorKind::FailedPrecondition, field));
    }

    fn image(case: &mut Case) -> &mut cri::Mount {
        let mount = case.mount("/tools", "");
        mount.readonly = true;
        mount.image = Some(cri::ImageSpec {
            image: "registry.test/tools:1".into(),
            ..Default::default()
        });
        mount
    }

    #[test]
    fn an_image_is_bound_from_where_the_creator_mounts_it() {
        let mut case = Case::new();
        case.mount("/data", "/1");
        image(&mut case).image_sub_path = "bin/x".into();
        let plan = case.good();
        let at = "/run/slipway/pods/p1/containers/c1/images/1";
        let found = find(&plan.spec, "/tools");
        assert_eq!(found.source().as_deref(), Some(Path::new(at)));
        assert!(has(&plan.spec, "/tools", "ro") && !has(&plan.spec, "/tools", "noexec"));
        let volume = &plan.create.image_volumes[0];
        assert_eq!(
            (volume.at.as_str(), volume.sub_path.as_str()),
            (at, "bin/x")
        );
    }

    #[test]
    fn bad_mounts_of_images() {
        type Bend = fn(&mut cri::Mount);
        let cases: [(&str, Bend); 9] = [
            ("readonly", |m| m.readonly = false),
            ("host_path", |m| m.host_path = "/y".into()),
            ("propagation", |m| m.propagation = 2),
            ("image_sub_path", |m| m.image_sub_path = "/bin".into()),
            ("image_sub_path", |m| m.image_sub_path = "../x".into()),
            ("image_sub_path", |m| m.image_sub_path = "a/../../x".into()),
            ("image_sub_path", |m| m.image_sub_path = "a\0".into()),
            ("image.image", |m| m.image = Some(Default::default())),
            ("image_sub_path", |m| {
                m.image = None;
                m.image_sub_path = "a".into();
            }),
        ];
        for (field, bend) in cases {
            let mut case = Case::new();
            bend(image(&mut case));
            let found = case.plan();
            let field = format!("mounts[0].{field}");
            // Without an image the host's path is looked at first, by the survey.
            let mount = &case.config.mounts[0];
            let error = found
                .err()
                .or_else(|| super::image_volume("mounts[0]", mount).err());
            let error = error.expect(&field);
            assert_eq!(
                (error.kind(), error.field()),
                (SpecErrorKind::Invalid, &*field)
            );
        }
    }

    #[test]
    fn places_that_can_not_be_mounted_on() {
        let invalid = [
            "",
            "relative",
            "/",
            "/.",
            "/a/../b",
            "/a\nb",
            "/a\0",
            "/proc",
            "/proc/",
            "/proc/1/mem",
            "/proc/sys",
            "/proc/self/attr/exec",
        ];
        for place in invalid {
            let mut case = Case::new();
            case.mount(place, "/y");
            let field = "mounts[0].container_path".to_owned();
            assert_eq!(case.bad(), (SpecErrorKind::Invalid, field), "{place:?}");
        }
        for place in ["/dev/null", "/dev/./ptmx", "/dev/fd"] {
            let mut case = Case::new();
            case.mount(place, "/y");
            assert_eq!(case.bad().0, SpecErrorKind::Unsupported, "{place:?}");
        }
        for place in [
            "/proc/cpuinfo",
            "/proc/uptime",
            "/process",
            "/dev/x",
            "/dev/shm",
        ] {
            let mut case = Case::new();
            case.mount(place, "/y");
            assert!(case.plan().is_ok(), "{place:?}");
        }
        let mut case = Case::new();
        case.mount("/proc", "/proc");
        case.sources.mounts[0].procfs = true;
        assert!(
            !case
                .good()
                .spec
                .mounts()
                .iter()
                .flatten()
                .any(|m| m.typ().as_deref() == Some("proc"))
        );
        let mut case = Case::new();
        case.mount("/x", "/y");
        case.mount("//x/", "/z");
        assert_eq!(
            case.bad(),
            (
                SpecErrorKind::Invalid,
                "mounts[1].container_path".to_owned()
            )
        );
        case.sources.mounts.clear();
        assert_eq!(
            case.bad().0,
            SpecErrorKind::Invalid,
            "sources of something else"
        );
    }

    #[test]
    fn sources_to_relabel_are_told_and_never_the_hosts_own() {
        let mut case = Case::new();
        case.mount("/y", "/srv/x").selinux_relabel = true;
        case.mount("/z", "/srv/z");
        assert!(case.good().relabel.is_empty(), "without SELinux");
        case.host.selinux = Some(crate::Selinux {
            process: ["u", "r", "t"].map(str::to_owned),
            file: ["u", "r", "f"].map(str::to_owned),
        });
        assert_eq!(case.good().relabel, [std::path::PathBuf::from("/srv/x")]);
        for host in ["/", "/etc", "/usr", "/var/lib", "/home", "/etc/passwd"] {
            let mut case = Case::new();
            case.host.selinux = Some(crate::Selinux {
                process: ["u", "r", "t"].map(str::to_owned),
                file: ["u", "r", "f"].map(str::to_owned),
            });
            case.mount("/y", host).selinux_relabel = true;
            let field = "mounts[0].selinux_relabel".to_owned();
            assert_eq!(case.bad(), (SpecErrorKind::Invalid, field), "{host}");
        }
    }

    #[test]
    fn the_requests_own_options() {
        let mut case = Case::new();
        case.mount("/x", "/y").mount_options =
            vec!["noexec".into(), "nodev".into(), "noexec".into()];
        let spec = case.good().spec;
        let found = options(&spec, "/x");
        assert_eq!(
            found,
            ["rbind", "rprivate", "rw", "rnodev", "rnoexec"].map(str::to_owned)
        );
        for bad in ["exec", "rnoexec", "NOEXEC", "", "uid=0", "bind", "rw"] {
            let mut case = Case::new();
            case.mount("/x", "/y").mount_options = vec!["nosuid".into(), bad.into()];
            let field = "mounts[0].mount_options[1]".to_owned();
            assert_eq!(case.bad(), (SpecErrorKind::Invalid, field), "{bad:?}");
        }
        case.host.recursive_read_only = false;
        assert_eq!(case.bad().0, SpecErrorKind::FailedPrecondition);
    }

    #[test]
    fn owners_are_mapped() {
        let ids = cri::IdMapping {
            host_id: 65536,
            container_id: 0,
            length: 65536,
        };
        let mut case = Case::new();
        let mount = case.mount("/x", "/y");
        (mount.uid_mappings, mount.gid_mappings) = (vec![ids], vec![ids]);
        let spec = case.good().spec;
        let mount = find(&spec, "/x");
        let host = |ids: &Option<Vec<oci_spec::runtime::LinuxIdMapping>>| {
            ids.iter()
                .flatten()
                .map(|m| m.host_id())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            (host(mount.uid_mappings()), host(mount.gid_mappings())),
            (vec![65536], vec![65536])
        );
        case.config.mounts[0].gid_mappings.clear();
        let field = "mounts[0].gidMappings".to_owned();
        assert_eq!(case.bad(), (SpecErrorKind::Invalid, field));
    }

    #[test]
    fn in_a_user_namespace() {
        let mut case = Case::new();
        case.user_namespace(65536);
        let spec = case.good().spec;
        assert!(has(&spec, "/dev/pts", "gid=5"));
        assert_eq!(find(&spec, "/sys").typ().as_deref(), Some("sysfs"));
        let linux = spec.linux().clone().expect("linux");
        assert_eq!(linux.uid_mappings().iter().flatten().count(), 1);
        // devpts would refuse a group that is not there.
        case.user_namespace(5);
        assert!(!has(&case.good().spec, "/dev/pts", "gid=5"));
        case.user_namespace(65536).network = NamespaceMode::Node.into();
        case.made.network.clear();
        let spec = case.good().spec;
        assert_eq!(find(&spec, "/sys").typ().as_deref(), Some("bind"));
        assert!(has(&spec, "/sys", "ro"));
        case.mount("/x", "/y").propagation = MountPropagation::PropagationBidirectional.into();
        let field = "mounts[0].propagation".to_owned();
        assert_eq!(case.bad(), (SpecErrorKind::Invalid, field));
    }
}
