//! Where keepers live: in a cgroup of their own, where the daemon is, or with their pod.
//!
//! In the daemon's cgroup a keeper is at the mercy of everything that is done to the service: `systemctl
//! kill` signals every process of it, and its limits count keepers in. So the zygote goes into a cgroup
//! for keepers once, at the daemon's start, and keepers are born there: no pod start waits for a migration.
//! All of this is for pure cgroup v2; on other hosts keepers are where the daemon is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use slipway_proto::keeper::Place;
use slipway_systemd::{Scope, Systemd, Value, expand_slice};

use crate::cgroup::Hierarchies;
use crate::scope;

/// The unit in which keepers are, where systemd is asked.
const SCOPE: &str = "slipway-keepers.scope";
/// The cgroup of a keeper in its pod's.
pub(crate) const LEAF: &str = "slipway-keeper";
/// How long systemd may take; the daemon waits for it with its start.
const PATIENCE: Duration = Duration::from_secs(15);

/// Where keepers are to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Placement {
    /// Where the daemon is.
    #[default]
    Daemon,
    /// In this cgroup, which is made if it is not there.
    Cgroup(PathBuf),
    /// In a scope in this slice.
    Slice(String),
}

impl Placement {
    /// As the zygote is told; `None`: nothing to be done.
    pub(crate) fn call(&self) -> Option<Place> {
        match self {
            Self::Daemon => None,
            Self::Cgroup(path) => Some(Place {
                cgroup: path.to_string_lossy().into_owned(),
                slice: String::new(),
            }),
            Self::Slice(slice) => Some(Place {
                cgroup: String::new(),
                slice: slice.clone(),
            }),
        }
    }
}

/// Moves the calling process, the zygote, to where keepers are to be born.
///
/// # Errors
/// What was attempted and the cause, in words.
pub(crate) fn place(call: &Place) -> Result<(), String> {
    let cgroups = Hierarchies::detect().map_err(|e| e.to_string())?;
    if !cgroups.unified() {
        return Ok(());
    }
    if call.slice.is_empty() {
        let cgroup = Path::new(&call.cgroup);
        return cgroups
            .ensure(cgroup)
            .and_then(|_| join(&cgroups, cgroup))
            .map_err(|e| format!("can't go into cgroup {}: {e}", cgroup.display()));
    }
    let parent = expand_slice(&call.slice).map_err(|what| format!("{:?} {what}", call.slice))?;
    let cgroup = Path::new(&parent).join(SCOPE);
    // Keepers of an earlier daemon are there: it is ours, and delegated.
    if join(&cgroups, &cgroup).is_ok() {
        return Ok(());
    }
    let properties = [("TasksMax", Value::U64(u64::MAX))];
    let scope = Scope {
        unit: SCOPE,
        slice: &call.slice,
        process: 0,
        description: "slipway keepers, one for each pod",
        properties: &properties,
    };
    let joined = || scope::own_cgroup().is_ok_and(|own| own == cgroup);
    let started = Systemd::here().and_then(|s| s.start_scope(&scope, PATIENCE, &joined));
    match started {
        Ok(()) => Ok(()),
        // Another daemon's zygote was faster.
        Err(e) => join(&cgroups, &cgroup).map_err(|_| crate::confine::chain(&e)),
    }
}

/// Moves the calling process into a v2 cgroup that exists.
fn join(cgroups: &Hierarchies, cgroup: &Path) -> io::Result<()> {
    let dir = cgroups.v2_dir(cgroup).ok_or(io::ErrorKind::NotFound)?;
    fs::write(dir.join("cgroup.procs"), "0")
}

/// Takes the calling process, a keeper, out of its pod's cgroup, so that this can be removed: back to where
/// it was forked from, or, if that is gone, to the root.
pub(crate) fn leave(cgroups: &Hierarchies, home: &Path) {
    if join(cgroups, home).is_err() {
        let _ = join(cgroups, Path::new("/"));
    }
}

/// Puts the calling process, a keeper, into a scope in its pod's slice.
///
/// # Errors
/// What systemd says.
pub(crate) fn enter_slice(pod_cgroup: &Path, pod_id: &str) -> Result<(), scope::ScopeError> {
    let unit = format!("{LEAF}-{pod_id}.scope");
    let cgroup = pod_cgroup.join(&unit);
    scope::enter_as(
        &cgroup,
        "slipway keeper of a pod",
        &[("TasksMax", Value::U64(u64::MAX))],
    )
}
