//! What a container's configuration refers to on the host: the only part that touches the file system.
//!
//! A `stat` on a dead network mount can hang for hours, so the daemon calls [`survey`] on a thread of its
//! own, with a deadline, before it holds any lock.

use crate::error::{Result, SpecError, quoted, quoted_path};
use crate::paths;
use crate::{AppArmor, SeccompChoice, SpecOptions, seccomp};
use oci_spec::runtime::LinuxDeviceType;
use slipway_proto::cri;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a container's configuration refers to on the host.
#[derive(Debug, Clone)]
pub struct Sources {
    /// For each entry of `mounts`, in its order.
    pub mounts: Vec<MountSource>,
    /// For each entry of `devices`, in its order: the device, or those of a directory.
    pub devices: Vec<Vec<HostDevice>>,
    /// Every device of the host, for a privileged container; else empty.
    pub all_devices: Vec<HostDevice>,
    /// AppArmor, and its profiles.
    pub apparmor: AppArmor,
    /// The seccomp profile, read.
    pub seccomp: SeccompChoice,
}

/// The source of a bind mount; that of an image's says nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MountSource {
    /// The path without symbolic links.
    pub path: PathBuf,
    /// It lies on a proc file system.
    pub procfs: bool,
    /// Propagation of the mount it lies on.
    pub propagation: Propagation,
}

/// Propagation of a mount (mount_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Propagation {
    /// Neither gives nor takes.
    #[default]
    Private,
    /// Takes.
    Slave,
    /// Gives and takes.
    Shared,
}

/// A device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    /// Its file on the host.
    pub path: PathBuf,
    /// Its path below the directory that was asked for; empty when it was asked for itself.
    pub below: PathBuf,
    /// Character or block device.
    pub kind: LinuxDeviceType,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits of the file.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// Looks up on the host what the configuration refers to. Makes directories for missing sources of
/// mounts where [`SpecOptions::create_missing_sources`] says so. Blocks on the file system.
///
/// # Errors
/// [`SpecError`] for a source, device or profile that isn't there or isn't what it should be.
pub fn survey(config: &cri::ContainerConfig, options: &SpecOptions) -> Result<Sources> {
    let all =
        security(config).is_some_and(|s| s.privileged) && !options.privileged_without_host_devices;
    let mountinfo = if config.mounts.iter().any(|m| m.propagation != 0) {
        // Mount points need not be UTF-8.
        let text = fs::read("/proc/self/mountinfo").map_err(|e| {
            SpecError::precondition("mounts", format!("can't read /proc/self/mountinfo: {e}"))
        })?;
        String::from_utf8_lossy(&text).into_owned()
    } else {
        String::new()
    };
    let mut mounts = Vec::with_capacity(config.mounts.len());
    for (i, mount) in config.mounts.iter().enumerate() {
        mounts.push(mount_source(
            &format!("mounts[{i}]"),
            mount,
            options,
            &mountinfo,
        )?);
    }
    let mut devices = Vec::with_capacity(config.devices.len());
    for (i, device) in config.devices.iter().enumerate() {
        devices.push(requested_devices(
            &format!("devices[{i}].host_path"),
            &device.host_path,
        )?);
    }
    let mut all_devices = Vec::new();
    if all {
        walk(Path::new("/dev"), Path::new(""), 0, &mut all_devices)
            .map_err(|e| SpecError::precondition("privileged", format!("can't list /dev: {e}")))?;
    }
    let seccomp = seccomp::resolve(security(config), options)?;
    Ok(Sources {
        mounts,
        devices,
        all_devices,
        apparmor: AppArmor::detect(),
        seccomp,
    })
}

/// The container's security context.
pub(crate) fn security(
    config: &cri::ContainerConfig,
) -> Option<&cri::LinuxContainerSecurityContext> {
    config.linux.as_ref()?.security_context.as_ref()
}

fn mount_source(
    field: &str,
    mount: &cri::Mount,
    options: &SpecOptions,
    mountinfo: &str,
) -> Result<MountSource> {
    crate::mounts::image_volume(field, mount)?;
    if mount.image.is_some() {
        return Ok(MountSource::default());
    }
    let field = format!("{field}.host_path");
    paths::absolute(&field, &mount.host_path)?;
    let asked = Path::new(&mount.host_path);
    let path = match asked.canonicalize() {
        Ok(path) => path,
        Err(e) if e.kind() == io::ErrorKind::NotFound && options.create_missing_sources => {
            fs::create_dir_all(asked)
                .and_then(|()| asked.canonicalize())
                .map_err(|e| {
                    let what = format!("can't make the missing directory {}: {e}", asked.display());
                    SpecError::precondition(&field, what)
                })?
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let what = format!(
                "{} does not exist on this host; make it before the container, or set \
                 pod.missing_mount_source = \"create\" in the configuration",
                quoted(&mount.host_path)
            );
            return Err(SpecError::precondition(field, what));
        }
        Err(e) => {
            let what = format!("can't look up {}: {e}", quoted(&mount.host_path));
            return Err(SpecError::precondition(field, what));
        }
    };
    let procfs =
        rustix::fs::statfs(&path).is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(PROC_SUPER_MAGIC));
    let propagation = propagation_of(&path, mountinfo);
    Ok(MountSource {
        path,
        procfs,
        propagation,
    })
}

/// Propagation of the mount that `path`, which has no symbolic links, lies on (proc_pid_mountinfo(5)).
fn propagation_of(path: &Path, mountinfo: &str) -> Propagation {
    let mut best: Option<(usize, Propagation)> = None;
    for line in mountinfo.lines() {
        let mut fields = line.split(' ').skip(4);
        let Some(point) = fields.next().map(unescape) else {
            continue;
        };
        if !path.starts_with(&point) {
            continue;
        }
        let mut propagation = Propagation::Private;
        for tag in fields.skip(1).take_while(|field| *field != "-") {
            if tag.starts_with("shared:") {
                propagation = Propagation::Shared;
            } else if tag.starts_with("master:") && propagation == Propagation::Private {
                propagation = Propagation::Slave;
            }
        }
        let depth = Path::new(&point).components().count();
        // Of mounts on one point the last covers the others.
        if best.is_none_or(|(deepest, _)| depth >= deepest) {
            best = Some((depth, propagation));
        }
    }
    best.map_or(Propagation::Private, |(_, propagation)| propagation)
}

/// Undoes the octal escapes of mountinfo.
fn unescape(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(byte) => {
                out.push(char::from(byte));
                out.push_str(&part[3..]);
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

fn requested_devices(field: &str, host_path: &str) -> Result<Vec<HostDevice>> {
    paths::absolute(field, host_path)?;
    let failed = |e: io::Error| {
        let what = match e.kind() {
            io::ErrorKind::NotFound => {
                format!("there is no device {} on this host", quoted(host_path))
            }
            _ => format!("can't look at {}: {e}", quoted(host_path)),
        };
        SpecError::precondition(field, what)
    };
    let path = Path::new(host_path).canonicalize().map_err(failed)?;
    let found = fs::symlink_metadata(&path).map_err(failed)?;
    if found.is_dir() {
        let mut devices = Vec::new();
        walk(&path, Path::new(""), 0, &mut devices).map_err(failed)?;
        if devices.is_empty() {
            let what = format!("there are no devices in {}", quoted_path(&path));
            return Err(SpecError::precondition(field, what));
        }
        return Ok(devices);
    }
    match device(&path, Path::new(""), &found) {
        Some(device) => Ok(vec![device]),
        None => {
            let what = format!(
                "{} is not a device; use a mount for files",
                quoted(host_path)
            );
            Err(SpecError::invalid(field, what))
        }
    }
}

fn device(path: &Path, below: &Path, found: &fs::Metadata) -> Option<HostDevice> {
    let kind = match found.file_type() {
        t if t.is_char_device() => LinuxDeviceType::C,
        t if t.is_block_device() => LinuxDeviceType::B,
        _ => return None,
    };
    Some(HostDevice {
        path: path.to_owned(),
        below: below.to_owned(),
        kind,
        major: rustix::fs::major(found.rdev()),
        minor: rustix::fs::minor(found.rdev()),
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
    })
}

/// Deeper than any real /dev.
const DEEPEST: usize = 16;

/// Collects the devices of a directory, without those that a container has of its own.
fn walk(top: &Path, below: &Path, depth: usize, out: &mut Vec<HostDevice>) -> io::Result<()> {
    let not_the_hosts = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
    let mut entries = fs::read_dir(top.join(below))?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let found = match entry.metadata() {
            Ok(found) => found,
            // Devices come and go.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let inner = below.join(&name);
        if found.is_dir() {
            if depth < DEEPEST && !not_the_hosts.iter().any(|other| name == *other) {
                walk(top, &inner, depth + 1, out)?;
            }
        } else if name != "console" && name != "ptmx" {
            out.extend(device(&entry.path(), &inner, &found));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecErrorKind;
    use std::os::unix::fs::symlink;

    fn mount(host_path: &str) -> cri::ContainerConfig {
        let mount = cri::Mount {
            container_path: "/x".into(),
            host_path: host_path.into(),
            ..Default::default()
        };
        cri::ContainerConfig {
            mounts: vec![mount],
            ..Default::default()
        }
    }

    fn with_device(host_path: &str) -> cri::ContainerConfig {
        let device = cri::Device {
            container_path: "/dev/x".into(),
            host_path: host_path.into(),
            permissions: "rwm".into(),
        };
        cri::ContainerConfig {
            devices: vec![device],
            ..Default::default()
        }
    }

    #[test]
    fn sources_are_resolved() {
        let dir = tempfile::tempdir().expect("directory");
        let real = dir.path().join("real");
        fs::create_dir(&real).expect("directory");
        symlink("real", dir.path().join("link")).expect("link");
        let link = dir.path().join("link");
        let found = survey(&mount(&link.to_string_lossy()), &SpecOptions::default());
        let real = real.canonicalize().expect("path");
        assert_eq!(found.expect("found").mounts[0].path, real);
        let proc = survey(&mount("/proc"), &SpecOptions::default()).expect("found");
        assert!(proc.mounts[0].procfs);
    }

    #[test]
    fn missing_sources_are_refused_or_made() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("a/b");
        let config = mount(&path.to_string_lossy());
        let error = survey(&config, &SpecOptions::default()).expect_err("missing");
        assert_eq!(error.kind(), SpecErrorKind::FailedPrecondition);
        assert_eq!(error.field(), "mounts[0].host_path");
        assert!(error.to_string().contains("a/b"), "{error}");
        assert!(!path.exists());
        let options = SpecOptions {
            create_missing_sources: true,
            ..SpecOptions::default()
        };
        survey(&config, &options).expect("made");
        assert!(path.is_dir());
        symlink("/nowhere/at/all", dir.path().join("dangling")).expect("link");
        let dangling = mount(&dir.path().join("dangling").to_string_lossy());
        survey(&dangling, &options).expect_err("a link to nothing can't be made");
        for bad in ["", "relative", "/a\0b"] {
            let error = survey(&mount(bad), &options).expect_err(bad);
            assert_eq!(error.kind(), SpecErrorKind::Invalid, "{bad:?}");
        }
    }

    #[test]
    fn devices_are_found() {
        let found = survey(&with_device("/dev/null"), &SpecOptions::default()).expect("found");
        let null = &found.devices[0][0];
        assert_eq!(
            (null.kind, null.major, null.minor),
            (LinuxDeviceType::C, 1, 3)
        );
        assert_eq!(null.below, Path::new(""));
        let error = survey(&with_device("/dev/no-such-device"), &SpecOptions::default());
        let error = error.expect_err("missing");
        assert_eq!(error.kind(), SpecErrorKind::FailedPrecondition);
        assert!(error.to_string().contains("no-such-device"));
        let error = survey(&with_device("/etc/passwd"), &SpecOptions::default());
        assert_eq!(error.expect_err("a file").kind(), SpecErrorKind::Invalid);
        let all = survey(&with_device("/dev"), &SpecOptions::default()).expect("found");
        let names: Vec<_> = all.devices[0].iter().map(|d| d.below.clone()).collect();
        assert!(names.contains(&"null".into()) && !names.iter().any(|n| n.starts_with("pts")));
    }

    #[test]
    fn privileged_containers_see_all_devices() {
        let mut config = cri::ContainerConfig::default();
        let found = survey(&config, &SpecOptions::default()).expect("found");
        assert!(found.all_devices.is_empty());
        let security = cri::LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        };
        config.linux = Some(cri::LinuxContainerConfig {
            security_context: Some(security),
            ..Default::default()
        });
        let found = survey(&config, &SpecOptions::default()).expect("found");
        assert!(
            found
                .all_devices
                .iter()
                .any(|d| d.path == Path::new("/dev/zero"))
        );
    }

    #[test]
    fn propagation_is_that_of_the_innermost_mount() {
        let info = "\
20 1 0:1 / / rw,relatime shared:1 - ext4 /dev/a rw
21 20 0:2 / /mnt rw master:3 - tmpfs tmpfs rw
22 21 0:3 / /mnt/with\\040space rw - tmpfs tmpfs rw
23 20 0:4 / /both rw shared:5 master:6 - tmpfs tmpfs rw
24 20 0:4 / /twice rw shared:7 - tmpfs tmpfs rw
25 24 0:4 / /twice rw - tmpfs tmpfs rw
garbage
";
        let of = |path| propagation_of(Path::new(path), info);
        assert_eq!(of("/etc"), Propagation::Shared);
        assert_eq!(of("/mnt"), Propagation::Slave);
        assert_eq!(of("/mntx"), Propagation::Shared);
        assert_eq!(of("/mnt/with space/x"), Propagation::Private);
        assert_eq!(of("/both/x"), Propagation::Shared);
        assert_eq!(of("/twice"), Propagation::Private);
        assert_eq!(propagation_of(Path::new("/"), ""), Propagation::Private);
    }

    proptest::proptest! {
        #[test]
        fn mountinfo_never_panics(text in "\\PC*", field in "[\\\\0-9é]*") {
            let _ = propagation_of(Path::new("/x"), &text);
            let _ = unescape(&field);
        }
    }
}
