//! Mount propagation of a container's bind mounts, each its own (CRI `MountPropagation`).
//!
//! libcontainer binds a source as it finds it, so all mounts get the propagation of the whole tree. The
//! tree is given the most open one that any mount asks for; sources that are to be more closed than that
//! are bound aside, in the creator's mount namespace, with the propagation they need.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use libcontainer::rootfs::utils::is_bind;
use nix::mount::{MsFlags, mount};
use oci_spec::runtime::{Mount, Spec};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Propagation {
    Private,
    Slave,
    Shared,
}

impl Propagation {
    /// What a mount's options ask for; the OCI's default is private.
    fn of(entry: &Mount) -> Self {
        let mut wanted = Self::Private;
        for option in entry.options().iter().flatten() {
            wanted = match option.as_str() {
                "shared" | "rshared" => Self::Shared,
                "slave" | "rslave" => Self::Slave,
                "private" | "rprivate" => Self::Private,
                _ => wanted,
            };
        }
        wanted
    }

    /// Of the whole tree, as `linux.rootfsPropagation` names it.
    fn named(name: &str) -> Option<Self> {
        match name.strip_prefix('r').unwrap_or(name) {
            "shared" => Some(Self::Shared),
            "slave" | "unbindable" => Some(Self::Slave),
            "private" => Some(Self::Private),
            _ => None,
        }
    }

    /// The name that libcontainer knows for the whole tree.
    fn name(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::Slave => "slave",
            Self::Shared => "shared",
        }
    }

    fn flag(self) -> MsFlags {
        match self {
            Self::Private => MsFlags::MS_PRIVATE,
            Self::Slave => MsFlags::MS_SLAVE,
            Self::Shared => MsFlags::MS_SHARED,
        }
    }
}

/// Sets the propagation of the spec's tree, and binds aside the sources that need less. Answers with the mounts that have
/// to be closed again once the whole tree has been made shared.
///
/// # Errors
/// What mounting says, with the source's name.
pub fn arrange(spec: &mut Spec, aside: &Path) -> io::Result<Vec<(PathBuf, MsFlags)>> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let whole = spec.linux().as_ref();
    let whole = whole.and_then(|l| l.rootfs_propagation().clone());
    let binds = mounts.iter().filter(|m| is_bind(m));
    // What the specification says of the whole counts as one more mount's wish: only a bundle says anything.
    let top = binds
        .map(Propagation::of)
        .chain(whole.as_deref().and_then(Propagation::named))
        .max()
        .unwrap_or(Propagation::Private);
    for (n, entry) in mounts.iter_mut().enumerate() {
        let wanted = Propagation::of(entry);
        // Only what comes from the host's own mounts can be seen there.
        let Some(source) = entry
            .source()
            .clone()
            .filter(|_| is_bind(entry) && wanted < top)
        else {
            continue;
        };
        let at = aside.join(n.to_string());
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", source.display()));
        stage(&source, &at, wanted).map_err(named)?;
        entry.set_source(Some(at));
    }
    let closed = mounts
        .iter()
        .filter(|m| top == Propagation::Shared && Propagation::of(m) < top)
        .map(|m| (m.destination().clone(), Propagation::of(m).flag()))
        .collect();
    spec.set_mounts(Some(mounts));
    // "unbindable" is a slave here, too, and libcontainer makes it unbindable in the end.
    let unbindable = whole.filter(|w| w == "unbindable" && top == Propagation::Slave);
    if let Some(linux) = spec.linux_mut().as_mut() {
        linux.set_rootfs_propagation(unbindable.or_else(|| Some(top.name().to_owned())));
    }
    Ok(closed)
}

/// Makes what `source` can be mounted on: a directory or a file.
pub fn make_place(source: &Path, at: &Path) -> io::Result<()> {
    if fs::metadata(source)?.is_dir() {
        return fs::create_dir_all(at);
    }
    if let Some(parent) = at.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::File::create(at).map(drop)
}

fn stage(source: &Path, at: &PathBuf, propagation: Propagation) -> io::Result<()> {
    make_place(source, at)?;
    let recursive = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), at, None::<&str>, recursive, None::<&str>)?;
    mount(
        None::<&str>,
        at,
        None::<&str>,
        propagation.flag() | MsFlags::MS_REC,
        None::<&str>,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(options: &[&[&str]]) -> Spec {
        let mounts: Vec<_> = options
            .iter()
            .map(|o| serde_json::json!({"destination": "/x", "type": "bind", "source": "/etc", "options": o}))
            .collect();
        let spec = serde_json::json!({"ociVersion": "1.0.2", "mounts": mounts, "linux": {}});
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn the_tree_gets_what_its_mounts_need() {
        for (options, name) in [
            (&[][..], "private"),
            (&[&["rbind", "rprivate"][..], &["rbind"]], "private"),
            (&[&["rbind", "rslave"]], "slave"),
            (&[&["rbind", "rshared"]], "shared"),
        ] {
            let mut spec = spec(options);
            arrange(&mut spec, Path::new("/nowhere")).unwrap();
            let linux = spec.linux().clone().unwrap();
            assert_eq!(linux.rootfs_propagation().as_deref(), Some(name));
        }
        // A closed mount beside an open one has to be bound aside.
        let error = arrange(
            &mut spec(&[&["rbind", "rshared"], &["rbind"]]),
            Path::new("/proc/no"),
        );
        assert!(error.is_err());
    }
}
