//! Keeping libcontainer away from cgroups, and giving the container its view of them.
//!
//! libcontainer would write its init's process id to `cgroup.procs`, and every such write waits for an RCU
//! grace period (6 to 15 ms). A process that is born in its cgroup (v2, `CLONE_INTO_CGROUP`), or that
//! moves itself through `tasks` (v1), waits for nothing. So the creator is in the container's cgroup
//! already when libcontainer runs, and libcontainer finds an empty `/sys/fs/cgroup` in the creator's private
//! mount namespace. What the container is to see there is mounted from a copy aside.

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{LinuxNamespaceType, Mount, MountBuilder, Spec};

use crate::cgroup::{Hierarchies, inside};

const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Hides the host's cgroups from this mount namespace, which must be this process's own, and rewrites the
/// spec's `cgroup` mounts to show the container's. `aside` is a directory for the copy.
///
/// # Errors
/// What mounting says.
pub fn hide(spec: &mut Spec, cgroups: &Hierarchies, cgroup: &Path, aside: &Path) -> io::Result<()> {
    let wanted = spec
        .mounts()
        .iter()
        .flatten()
        .any(|m| m.typ().as_deref() == Some("cgroup"));
    let own_namespace = spec
        .linux()
        .as_ref()
        .and_then(|l| l.namespaces().as_ref())
        .into_iter()
        .flatten()
        .any(|n| n.typ() == LinuxNamespaceType::Cgroup);
    // In a cgroup namespace, v2 is simply mounted; everything else is bound from a copy.
    let fresh_v2 = cgroups.unified() && own_namespace;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    if wanted && !fresh_v2 {
        for (n, mount_point) in cgroups.mount_points().enumerate() {
            let (from, to) = (inside(mount_point, cgroup), copy(aside, n));
            std::fs::create_dir_all(&to)?;
            mount(
                Some(&from),
                &to,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )?;
        }
    }
    // Private first: an unmount of a shared mount would reach the host's. libcontainer reads the mount
    // table, so covering the hierarchies would not do.
    mount(
        None::<&str>,
        CGROUP_ROOT,
        None::<&str>,
        private,
        None::<&str>,
    )?;
    umount2(CGROUP_ROOT, MntFlags::MNT_DETACH)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(
        Some("none"),
        CGROUP_ROOT,
        Some("tmpfs"),
        flags,
        Some("size=0"),
    )?;
    if wanted {
        rewrite(spec, cgroups, aside, fresh_v2).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Where a hierarchy's copy is bound. A number, because libcontainer knows controllers by the name of their
/// mount point.
fn copy(aside: &Path, n: usize) -> PathBuf {
    aside.join(n.to_string())
}

fn rewrite(
    spec: &mut Spec,
    cgroups: &Hierarchies,
    aside: &Path,
    fresh_v2: bool,
) -> Result<(), oci_spec::OciSpecError> {
    let mut mounts: Vec<Mount> = Vec::new();
    let mut read_only = Vec::new();
    for entry in spec.mounts().clone().unwrap_or_default() {
        if entry.typ().as_deref() != Some("cgroup") {
            mounts.push(entry);
            continue;
        }
        let options = entry.options().clone().unwrap_or_default();
        let bound = |destination: PathBuf, source: PathBuf| {
            let mut options: Vec<String> = options
                .iter()
                .filter(|o| *o != "relatime")
                .cloned()
                .collect();
            options.push("rbind".into());
            MountBuilder::default()
                .destination(destination)
                .typ("bind")
                .source(source)
                .options(options)
                .build()
        };
        let top = entry.destination().clone();
        if fresh_v2 {
            let mut fresh = entry;
            fresh
                .set_typ(Some("cgroup2".into()))
                .set_source(Some("cgroup2".into()));
            mounts.push(fresh);
            continue;
        }
        if cgroups.unified() {
            mounts.push(bound(top, copy(aside, 0))?);
            continue;
        }
        let tmpfs = ["nosuid", "noexec", "nodev", "mode=755", "size=64k"].map(str::to_owned);
        mounts.push(
            MountBuilder::default()
                .destination(top.clone())
                .typ("tmpfs")
                .source("tmpfs")
                .options(tmpfs.to_vec())
                .build()?,
        );
        for (n, mount_point) in cgroups.mount_points().enumerate() {
            let Ok(name) = mount_point.strip_prefix(CGROUP_ROOT) else {
                continue;
            };
            mounts.push(bound(top.join(name), copy(aside, n))?);
        }
        if options.iter().any(|o| o == "ro") {
            // Only once its mount points are made.
            read_only.push(top.to_string_lossy().into_owned());
        }
    }
    spec.set_mounts(Some(mounts));
    if let (Some(linux), false) = (spec.linux_mut().as_mut(), read_only.is_empty()) {
        let mut paths = linux.readonly_paths().clone().unwrap_or_default();
        paths.extend(read_only);
        linux.set_readonly_paths(Some(paths));
    }
    Ok(())
}
