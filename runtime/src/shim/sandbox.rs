//! Starting a pod's shim: its mount namespace, its bundle, and what the shim is to take for the pod.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use serde_json::{Value, json};
use slipway_proto::keeper::{ErrorKind, SetupSandboxResult, StartSandbox, StartSandboxResult};
use slipway_shim::{
    Create, CreateSandbox, Options, OptionsError, Process, Sandbox, ShimError, Task,
};

use super::{BUNDLE, CONNECT, RECORD, Running, Shim, kind, pause, remove, text};
use crate::cgroup::Hierarchies;
use crate::mount_table;

/// Why a shim could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The shim.
    #[error("runtime handler {handler:?}: can't {step}")]
    Shim {
        /// The handler.
        handler: String,
        /// What was attempted.
        step: &'static str,
        /// The cause.
        #[source]
        source: Box<ShimError>,
    },
    /// Its options.
    #[error("runtime handler {handler:?}")]
    Options {
        /// The handler.
        handler: String,
        /// The cause.
        #[source]
        source: OptionsError,
    },
    /// What it needs.
    #[error("can't {step} for the shim of runtime handler {handler:?}")]
    Around {
        /// The handler.
        handler: String,
        /// What was attempted.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// This machine has no program for a sandbox container.
    #[error(
        "the shim of runtime handler {0:?} has no sandbox API, and there is no sandbox container for this kind of \
         machine"
    )]
    NoPause(String),
}

impl SandboxError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Shim { source, .. } => kind(source),
            Self::Options { .. } => ErrorKind::Invalid,
            _ => ErrorKind::Internal,
        }
    }
}

/// What the job is given.
pub struct Start<'a> {
    /// The call.
    pub call: &'a StartSandbox,
    /// The pod's namespaces.
    pub namespaces: &'a SetupSandboxResult,
    /// The pod's cgroup.
    pub cgroup: &'a Path,
    /// The host's cgroups.
    pub cgroups: &'a Hierarchies,
    /// The pod's run directory.
    pub pod_dir: &'a Path,
    /// The directory below which all pods' run directories are.
    pub run_root: &'a Path,
}

/// Starts the shim, and in it what the pod is. Runs in a job that was born in a mount namespace of its own: the shim's.
///
/// # Errors
/// [`SandboxError`]; nothing is left then.
pub fn start(shim: &Shim, start: &Start<'_>) -> Result<StartSandboxResult, SandboxError> {
    let started = begin(shim, start);
    if started.is_err() {
        // A machine that did not come up, for one, is in there.
        remove::remove_sandbox_cgroup(shim, Some(start.cgroup), start.cgroups);
        let _ = fs::remove_dir_all(&shim.root);
    }
    started
}

fn begin(shim: &Shim, start: &Start<'_>) -> Result<StartSandboxResult, SandboxError> {
    let around = |step: &'static str| {
        move |source: io::Error| SandboxError::Around {
            handler: shim.handler.clone(),
            step,
            source,
        }
    };
    let failed = |step: &'static str| {
        move |source: ShimError| SandboxError::Shim {
            handler: shim.handler.clone(),
            step,
            source: source.into(),
        }
    };
    let until = Instant::now() + shim.create_timeout;
    let left = || until.saturating_duration_since(Instant::now());
    let options =
        shim.options(start.call.systemd, (0, 0))
            .map_err(|source| SandboxError::Options {
                handler: shim.handler.clone(),
                source,
            })?;
    leave_others(start.run_root, start.pod_dir)
        .map_err(around("leave the other pods' mounts behind"))?;
    let bundle = start.pod_dir.join(BUNDLE);
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs).map_err(around("make the bundle"))?;
    fs::create_dir_all(&shim.root).map_err(around("make the runtime's directory"))?;
    let spec = specification(start, &shim.pod, &rootfs).to_string();
    crate::creator::write_private(&bundle.join("config.json"), spec.as_bytes())
        .map_err(|e| around("write the specification")(io::Error::other(e)))?;

    let address = shim
        .program
        .start(&shim.pod, &bundle, options.as_ref(), left())
        .map_err(failed("start its shim"))?;
    let mut running = Running {
        address,
        pid: written_pid(&bundle).unwrap_or(0),
        sandbox_api: false,
    };
    let made = make(shim, start, &mut running, options.as_ref(), &bundle, until);
    let made = made.and_then(|()| {
        let own = start
            .cgroup
            .join(sandbox_cgroup(&shim.pod, start.call.systemd));
        let record = running.record(shim, &own).to_string();
        fs::write(start.pod_dir.join(RECORD), record).map_err(around("write down where it is"))
    });
    if let Err(error) = made {
        // Shims end with their last container, and this one may have had none yet.
        let asked = match running.sandbox_api {
            true => Sandbox::connect(&running.address, CONNECT)
                .and_then(|mut sandbox| sandbox.shutdown(&shim.pod, CONNECT)),
            false => running
                .connect()
                .and_then(|mut task| task.shutdown(&shim.pod, true, CONNECT)),
        };
        if asked.is_ok() {
            remove::leave(running.pid);
        }
        remove::kill_shim(running.pid);
        let _ = shim.program.delete(&shim.pod, &bundle, CONNECT);
        return Err(error);
    }
    Ok(StartSandboxResult {
        address: running.address.socket.clone(),
        version: running.address.version.number(),
        pid: running.pid,
        sandbox_api: running.sandbox_api,
    })
}

/// Has the shim make the pod: by its sandbox API, or as a container that does nothing.
fn make(
    shim: &Shim,
    start: &Start<'_>,
    running: &mut Running,
    options: Option<&Options>,
    bundle: &Path,
    until: Instant,
) -> Result<(), SandboxError> {
    let failed = |step: &'static str| {
        move |source: ShimError| SandboxError::Shim {
            handler: shim.handler.clone(),
            step,
            source: source.into(),
        }
    };
    let left = || until.saturating_duration_since(Instant::now());
    let path = text(bundle);
    let mut sandbox =
        Sandbox::connect(&running.address, CONNECT).map_err(failed("call its shim"))?;
    let wanted = CreateSandbox {
        id: &shim.pod,
        bundle: &path,
        network: &start.namespaces.network,
        annotations: annotations(start),
    };
    match sandbox.create(&wanted, options, left()) {
        Ok(()) => {
            running.sandbox_api = true;
            let pid = sandbox
                .start(&shim.pod, left())
                .map_err(failed("start the pod's sandbox"))?;
            if running.pid == 0 {
                running.pid = i32::try_from(pid).unwrap_or(0);
            }
            return Ok(());
        }
        Err(e) if e.is_unimplemented() => {}
        Err(e) => return Err(failed("create the pod's sandbox")(e)),
    }
    let program = pause::program().ok_or_else(|| SandboxError::NoPause(shim.handler.clone()))?;
    root(&bundle.join("rootfs"), &program).map_err(|source| SandboxError::Around {
        handler: shim.handler.clone(),
        step: "make the sandbox container's root file system",
        source,
    })?;
    let mut task = Task::connect(&running.address, CONNECT).map_err(failed("call its shim"))?;
    let create = Create {
        id: &shim.pod,
        bundle: &path,
        ..Create::default()
    };
    task.create(&create, options, left())
        .map_err(failed("create the pod's sandbox container"))?;
    if let Ok((pid, _)) = task.pids_of(&shim.pod, left())
        && let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 1)
    {
        running.pid = pid;
    }
    task.start(Process::init(&shim.pod), left())
        .map(drop)
        .map_err(failed("start the pod's sandbox container"))
}

/// Where Go's shims leave their process id.
fn written_pid(bundle: &Path) -> Option<i32> {
    let text = fs::read_to_string(bundle.join("shim.pid")).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 1)
}

/// A root file system with one program in it, on a file system from which programs may be executed: the run directory
/// often is not.
///
/// # Errors
/// What mounting or writing says.
pub fn root(at: &Path, program: &[u8]) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("pause"),
        at,
        Some("tmpfs"),
        flags,
        Some("mode=755,size=1m"),
    )?;
    for name in ["proc", "dev", "sys", "etc"] {
        fs::create_dir(at.join(name))?;
    }
    let mut options = fs::File::options();
    options.write(true).create_new(true).mode(0o555);
    options.open(at.join("pause"))?.write_all(program)?;
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    Ok(mount(None::<&str>, at, None::<&str>, flags, None::<&str>)?)
}

/// Takes the mounts of other pods out of this namespace: as long as they are seen from here, their networks stay.
///
/// # Errors
/// What mounting says.
pub fn leave_others(run_root: &Path, pod_dir: &Path) -> io::Result<()> {
    let table = mount_table::read(Path::new("/proc/self/mountinfo"))?;
    if !table.iter().any(|m| m.place == run_root) {
        return Ok(());
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let bare = open_tree(CWD, run_root, flags)?;
    let mut own = Vec::new();
    for place in table.iter().map(|m| &m.place) {
        if place.starts_with(pod_dir) && place != pod_dir {
            own.push((open_tree(CWD, place, flags)?, place.clone()));
        }
    }
    // What is mounted and unmounted from here on must not be so for everybody else. Other mounts stay shared: what a container
    // mounts in a volume of the host may have to be seen there.
    let parents = table.iter().map(|m| &m.place);
    let parents = parents.filter(|place| run_root.starts_with(place) && *place != run_root);
    if let Some(parent) = parents.max_by_key(|place| place.components().count()) {
        mount(
            None::<&str>,
            parent,
            None::<&str>,
            MsFlags::MS_SLAVE,
            None::<&str>,
        )?;
    }
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, run_root, None::<&str>, private, None::<&str>)?;
    umount2(run_root, MntFlags::MNT_DETACH)?;
    move_mount(
        &bare,
        "",
        CWD,
        run_root,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    for (tree, place) in own {
        move_mount(
            &tree,
            "",
            CWD,
            &place,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )?;
    }
    Ok(())
}

/// What the pod is and how large, as the daemon knows it, for the sandbox itself.
fn annotations(start: &Start<'_>) -> BTreeMap<String, String> {
    let given = start.call.annotations.iter();
    let mut all: BTreeMap<_, _> = given.map(|(k, v)| (k.clone(), v.clone())).collect();
    all.insert("io.kubernetes.cri.container-type".into(), "sandbox".into());
    all.insert("io.kubernetes.cri-o.ContainerType".into(), "sandbox".into());
    all
}

/// The specification of the sandbox container, which also tells a shim that has the sandbox API what the pod is.
pub fn specification(start: &Start<'_>, id: &str, rootfs: &Path) -> Value {
    let paths = start.namespaces;
    let mut namespaces = vec![json!({"type": "mount"})];
    for (kind, path) in [
        ("network", &paths.network),
        ("ipc", &paths.ipc),
        ("uts", &paths.uts),
    ] {
        if !path.is_empty() {
            namespaces.push(json!({"type": kind, "path": path}));
        }
    }
    // Its own; what the containers share, if they do, is the pod's, and has an init of its own.
    namespaces.push(json!({"type": "pid"}));
    let cgroup = match start.call.systemd {
        true => {
            let slice = start
                .cgroup
                .file_name()
                .unwrap_or_default()
                .to_string_lossy();
            format!("{slice}:slipway-sandbox:{id}")
        }
        false => text(&start.cgroup.join(sandbox_cgroup(id, false))),
    };
    let own_name = !paths.uts.is_empty() && !start.call.hostname.is_empty();
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/pause"], "cwd": "/", "noNewPrivileges": true,
            "user": {"uid": 65535, "gid": 65535}, "env": ["PATH=/"],
            "capabilities": {"bounding": [], "effective": [], "permitted": [], "inheritable": [], "ambient": []},
        },
        "root": {"path": rootfs, "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=64k"]},
        ],
        "annotations": annotations(start),
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": namespaces,
            "resources": {"cpu": {"shares": 2}, "devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    if own_name {
        spec["hostname"] = json!(start.call.hostname);
    }
    spec
}

/// Name of the sandbox container's cgroup in the pod's.
pub fn sandbox_cgroup(id: &str, systemd: bool) -> String {
    match systemd {
        true => format!("slipway-sandbox-{id}.scope"),
        false => format!("slipway-sandbox-{id}"),
    }
}
