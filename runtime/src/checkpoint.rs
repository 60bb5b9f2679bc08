//! A checkpoint of running containers, which go on running: all are frozen, then each is dumped by criu and
//! its writable layer saved, then all are thawed. Runs in a job of the keeper's.
//!
//! What a container has of the host's (bind mounts, the pod's namespaces, its output pipes, its view of its
//! cgroups) is external to criu: it is named in the images, and a restore has to bring it along.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use slipway_proto::keeper::{Criu, ErrorKind};

use crate::cgroup::Hierarchies;
use crate::criu::{self, CriuError, rpc};
use crate::freezer::{Freeze, FreezeError, Freezer};
use crate::mount_table::{self, Mounted};
use crate::writable_layer::{self, LayerError};

/// Directory of criu's images in a checkpoint.
pub const IMAGES: &str = "checkpoint";
/// What descriptors 0 to 2 were, in the directory of images; the peers' file, too.
pub const DESCRIPTORS: &str = "descriptors.json";
/// Archive of the writable layer.
pub const ROOTFS_DIFF: &str = "rootfs-diff.tar";
/// List of what was deleted of the image.
pub const DELETED_FILES: &str = "deleted.files";
/// criu's log of a dump.
pub const DUMP_LOG: &str = "dump.log";
/// The name of the pod's network namespace in the images; the peers' name, too.
pub const NETWORK: &str = "extRootNetNS";
/// The name of a shared PID namespace in the images.
pub const PID: &str = "extRootPidNS";

/// Files that are deleted, but still open, are part of the images up to this size.
const GHOST_LIMIT: u32 = 256 << 20;

/// Why there is no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Freezing.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// criu.
    #[error("container {id}")]
    Criu {
        /// Which.
        id: String,
        /// The cause.
        #[source]
        source: CriuError,
    },
    /// The writable layer.
    #[error("container {id}")]
    Layer {
        /// Which.
        id: String,
        /// The cause.
        #[source]
        source: LayerError,
    },
    /// A file of ours.
    #[error("can't {action} {}", path.display())]
    File {
        /// The verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The containers may be frozen still.
    #[error("can't thaw the containers")]
    Thaw(#[source] io::Error),
}

impl CheckpointError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Freeze(FreezeError::Late { .. })
            | Self::Layer {
                source: LayerError::Late,
                ..
            }
            | Self::Criu {
                source: CriuError::Late { .. },
                ..
            } => ErrorKind::TimedOut,
            Self::Freeze(FreezeError::NoFreezer)
            | Self::Criu {
                source: CriuError::Start { .. },
                ..
            } => ErrorKind::Unsupported,
            // Something in the container that criu does not know, mostly.
            Self::Criu { .. } => ErrorKind::WrongState,
            _ => ErrorKind::Internal,
        }
    }
}

/// A container to be dumped.
pub struct Target {
    /// Its id.
    pub id: String,
    /// Its init.
    pub pid: i32,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// An empty directory for what is saved.
    pub dir: PathBuf,
    /// Its writable layer; `None`: it has none.
    pub upper: Option<PathBuf>,
    /// The layers below, topmost first.
    pub lower: Vec<PathBuf>,
    /// What its descriptors 0 to 2 began as.
    pub descriptors: [String; 3],
    /// Its mounts by the OCI spec that are of the host: their places in the container.
    pub binds: Vec<PathBuf>,
}

/// Takes one consistent checkpoint of all.
///
/// # Errors
/// [`CheckpointError`]. The containers run then, too; what was saved until then is left in their directories.
pub fn take(
    cgroups: &Hierarchies,
    criu: &Criu,
    targets: &[Target],
    deadline: Instant,
) -> Result<(), CheckpointError> {
    let mut freezers = Vec::new();
    for target in targets {
        freezers.push(Freezer::of(cgroups, &target.cgroup)?);
    }
    let freeze = Freeze::new(freezers.clone(), deadline)?;
    for (target, freezer) in targets.iter().zip(&freezers) {
        dump(criu, target, freezer, &freeze, deadline)?;
        save_layer(target, deadline)?;
    }
    freeze.thaw().map_err(CheckpointError::Thaw)
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::File {
        action,
        path,
        source,
    }
}

fn dump(
    criu: &Criu,
    target: &Target,
    freezer: &Freezer,
    freeze: &Freeze,
    deadline: Instant,
) -> Result<(), CheckpointError> {
    let images = target.dir.join(IMAGES);
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&images)
        .map_err(file("create", &images))?;
    let descriptors = images.join(DESCRIPTORS);
    let text = serde_json::to_vec(&target.descriptors).map_err(|e| io::Error::other(e.to_string()));
    text.and_then(|text| {
        private(&descriptors).and_then(|mut f| io::Write::write_all(&mut f, &text))
    })
    .map_err(file("write", &descriptors))?;
    let open = |path: &Path| {
        File::open(path)
            .map(OwnedFd::from)
            .map_err(file("open", path))
    };
    let (images_dir, work_dir) = (open(&images)?, open(&target.dir)?);
    let left = deadline.saturating_duration_since(Instant::now());
    let options = rpc::Options {
        images_dir_fd: images_dir.as_raw_fd(),
        work_dir_fd: Some(work_dir.as_raw_fd()),
        pid: Some(target.pid),
        leave_running: Some(true),
        ext_unix_sk: Some(true),
        tcp_established: Some(criu.tcp_established),
        tcp_close: Some(!criu.tcp_established),
        tcp_skip_in_flight: Some(true),
        file_locks: Some(true),
        log_level: Some(4),
        log_file: Some(DUMP_LOG.to_owned()),
        manage_cgroups: Some(true),
        manage_cgroups_mode: Some(rpc::CgroupMode::Ignore as i32),
        ghost_limit: Some(GHOST_LIMIT),
        external: external(target).map_err(file("read the mounts of", Path::new(&target.id)))?,
        freeze_cgroup: Some(freezer.dir().to_string_lossy().into_owned()),
        timeout: Some(u32::try_from(left.as_secs()).unwrap_or(u32::MAX).max(1)),
        orphan_pts_master: Some(true),
        ..rpc::Options::default()
    };
    let call = criu::Call {
        criu: Path::new(&criu.path),
        kind: rpc::Kind::Dump,
        options: Some(options),
        inherit: &[],
        deadline,
        log: Some(target.dir.join(DUMP_LOG)),
    };
    criu::run(call, |pid| freeze.helped_by(pid))
        .map(drop)
        .map_err(|source| CheckpointError::Criu {
            id: target.id.clone(),
            source,
        })
}

/// What criu is not to look into.
fn external(target: &Target) -> io::Result<Vec<String>> {
    let proc = PathBuf::from(format!("/proc/{}", target.pid));
    let theirs = mount_table::read(&proc.join("mountinfo"))?;
    let host = mount_table::read(Path::new("/proc/self/mountinfo"))?;
    let mut named: Vec<String> = theirs
        .iter()
        .filter(|mount| is_external(mount, &target.binds, &host))
        .map(|mount| mount.place.to_string_lossy().into_owned())
        .map(|place| format!("mnt[{place}]:{place}"))
        .collect();
    for (namespace, name) in [("net", NETWORK), ("pid", PID)] {
        let inode = |of: &Path| fs::metadata(of.join("ns").join(namespace)).map(|m| m.ino());
        let (its, own) = (inode(&proc)?, inode(Path::new("/proc/self"))?);
        // A PID namespace of the container's own is part of the images.
        let shared = namespace == "net" || !is_init(&proc)?;
        if its != own && shared {
            named.push(format!("{namespace}[{its}]:{name}"));
        }
    }
    Ok(named)
}

/// Whether a process is the first of its PID namespace.
fn is_init(proc: &Path) -> io::Result<bool> {
    let status = fs::read_to_string(proc.join("status"))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    Ok(ids.and_then(|ids| ids.split_whitespace().last()) == Some("1"))
}

/// Whether a mount of a container shows something of the host's. `sysfs` and `mqueue` are shared by all who
/// share a namespace, and mounted anew in it.
fn is_external(mount: &Mounted, binds: &[PathBuf], host: &[Mounted]) -> bool {
    match mount.kind.as_str() {
        _ if mount.place == Path::new("/") => false,
        "cgroup" | "cgroup2" => true,
        _ if binds.contains(&mount.place) => true,
        "sysfs" | "mqueue" | "proc" => false,
        _ => host.iter().any(|h| h.device == mount.device),
    }
}

fn save_layer(target: &Target, deadline: Instant) -> Result<(), CheckpointError> {
    let Some(upper) = &target.upper else {
        return Ok(());
    };
    let path = target.dir.join(ROOTFS_DIFF);
    let archive = private(&path).map_err(file("create", &path))?;
    let deleted = writable_layer::save(upper, &target.lower, archive, deadline);
    let deleted = deleted.map_err(|source| CheckpointError::Layer {
        id: target.id.clone(),
        source,
    })?;
    if deleted.is_empty() {
        return Ok(());
    }
    let path = target.dir.join(DELETED_FILES);
    let text = serde_json::to_vec(&deleted).map_err(|e| io::Error::other(e.to_string()));
    text.and_then(|text| private(&path).and_then(|mut f| io::Write::write_all(&mut f, &text)))
        .map_err(file("write", &path))
}

fn private(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600).open(path)
}
