//! The sandbox of a pod in a runtime that has one for all of a pod's containers: gVisor's kernel (`runsc`), which the
//! first container is and the others join.
//!
//! That first one is of Slipway's making, as with shims: a program that does nothing. Nothing that the runtime starts for the
//! pod is told apart by container, so all of it is in one cgroup, which is ours, and not the runtime's to make.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use serde_json::json;
use slipway_proto::keeper::{ErrorKind, StartSandboxResult};

use super::command::{self, Call};
use super::{CommandError, PodSandbox, Runtime};
use crate::cgroup::Hierarchies;
use crate::removal;
use crate::scope::{self, ScopeError};
use crate::shim::{self, BUNDLE, RECORD, Start};

/// How long the runtime may take to undo what it has begun.
const UNDO: Duration = Duration::from_secs(5);
/// A directory of sysctls that every network namespace has its own of.
const SYSCTLS: &str = "/proc/sys/net/core";

/// Why a pod's sandbox could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The runtime.
    #[error("can't make the pod's sandbox")]
    Command(#[from] CommandError),
    /// systemd.
    #[error("can't make a scope for the pod's sandbox")]
    Scope(#[from] ScopeError),
    /// What precedes its part.
    #[error("can't {step} for the pod's sandbox")]
    Around {
        /// What was attempted.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// This machine has no program for a sandbox container.
    #[error(
        "there is no sandbox container for this kind of machine, and runtime handler {0:?} needs one"
    )]
    NoPause(String),
}

impl SandboxError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Command(error) => error.kind(),
            _ => ErrorKind::Internal,
        }
    }
}

fn around(step: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    move |source| SandboxError::Around { step, source }
}

/// Starts the sandbox. Runs in a job that was born in a mount namespace of its own and, unless systemd makes it, in the
/// sandbox's cgroup (v2).
///
/// # Errors
/// [`SandboxError`]; nothing is left then.
pub fn start(
    runtime: &Runtime,
    sandbox: &PodSandbox,
    cgroups: &Hierarchies,
    start: &Start<'_>,
) -> Result<StartSandboxResult, SandboxError> {
    let bundle = start.pod_dir.join(BUNDLE);
    let made = begin(runtime, sandbox, cgroups, start, &bundle);
    if made.is_err() {
        let _ = super::simple(
            runtime,
            cgroups,
            &["delete", "--force", &sandbox.id],
            &bundle,
            UNDO,
        );
        let _ = fs::remove_dir_all(&runtime.root);
    }
    made
}

fn begin(
    runtime: &Runtime,
    sandbox: &PodSandbox,
    cgroups: &Hierarchies,
    start: &Start<'_>,
    bundle: &Path,
) -> Result<StartSandboxResult, SandboxError> {
    let until = Instant::now() + runtime.create_timeout;
    match start.call.systemd {
        true => scope::enter(cgroups, &sandbox.cgroup, &sandbox.id, None)?,
        false => cgroups
            .join_v1(&sandbox.cgroup)
            .map_err(around("join the cgroup"))?,
    }
    shim::leave_others(start.run_root, start.pod_dir)
        .map_err(around("leave the other pods' mounts behind"))?;
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs).map_err(around("make the bundle"))?;
    fs::create_dir_all(&runtime.root).map_err(around("make the runtime's directory"))?;
    let program = shim::pause::program();
    let program = program.ok_or_else(|| SandboxError::NoPause(runtime.handler.clone()))?;
    shim::pause_root(&rootfs, &program).map_err(around("make a root file system"))?;
    let spec = specification(start, &sandbox.id, &rootfs).to_string();
    crate::creator::write_private(&bundle.join("config.json"), spec.as_bytes())
        .map_err(|e| around("write the specification")(io::Error::other(e)))?;

    let pid_file = bundle.join("sandbox.pid");
    let _ = fs::remove_file(&pid_file);
    let texts = (bundle.to_string_lossy(), pid_file.to_string_lossy());
    let network = network(start);
    let run = |args: &[&str]| {
        let call = Call::new(args, bundle, until).of(runtime.create_timeout);
        command::run(runtime, cgroups, call.prepared().global(network))
    };
    run(&[
        "create",
        "--bundle",
        &texts.0,
        "--pid-file",
        &texts.1,
        &sandbox.id,
    ])?;
    let pid = fs::read_to_string(&pid_file).unwrap_or_default();
    let pid: i32 = pid.trim().parse().map_err(|_| {
        let missing = io::Error::other(format!("there is none in {}", pid_file.display()));
        around("learn the process id")(missing)
    })?;
    // Before it has a program of its own, so that whoever finds the pod finds it, too.
    record(runtime, sandbox, start.pod_dir, pid).map_err(around("write down where it is"))?;
    if !start.namespaces.network.is_empty() {
        hide_sysctls(Path::new(&start.namespaces.network))
            .map_err(around("prepare the network namespace"))?;
    }
    run(&["start", &sandbox.id])?;
    Ok(StartSandboxResult {
        pid,
        ..Default::default()
    })
}

/// A pod without a network namespace has the host's network, which gVisor's own network stack can't take over: its sockets
/// are the host's then.
fn network(start: &Start<'_>) -> &'static [&'static str] {
    match start.namespaces.network.is_empty() {
        true => &["--network=host"],
        false => &[],
    }
}

fn specification(start: &Start<'_>, id: &str, rootfs: &Path) -> serde_json::Value {
    let mut spec = shim::specification(start, id, rootfs);
    // Of the namespaces the sandbox makes its own, whatever the host's are; only that containers share one is told by
    // the path, which it never opens.
    if let Some(list) = spec["linux"]["namespaces"].as_array_mut() {
        for namespace in list {
            if namespace["type"] == "pid" && !start.namespaces.pid.is_empty() {
                namespace["path"] = json!(start.namespaces.pid);
            }
        }
    }
    let hostname = match start.call.hostname.as_str() {
        "" => rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        name => name.to_owned(),
    };
    spec["hostname"] = json!(hostname);
    spec
}

/// Takes away, for this mount namespace, what runsc of before August 2024 takes for the mark of the host's network namespace
/// (net.core.rmem_default), and newer kernels show in all. It refuses to work there; this is the pod's.
fn hide_sysctls(network: &Path) -> io::Result<()> {
    let own = fs::File::open("/proc/self/ns/net")?;
    // What is seen there depends on the network namespace of who looks, and so does what is mounted there.
    setns(fs::File::open(network)?, CloneFlags::CLONE_NEWNET)?;
    let hidden = hide_in(Path::new(SYSCTLS));
    setns(&own, CloneFlags::CLONE_NEWNET)?;
    hidden
}

fn hide_in(directory: &Path) -> io::Result<()> {
    if !directory.join("rmem_default").exists() {
        return Ok(());
    }
    let none = None::<&str>;
    // Not to be seen by everybody else.
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(
        Some("none"),
        directory,
        Some("tmpfs"),
        flags,
        Some("size=4k"),
    )?)
}

/// For a daemon that has to end what a dead keeper has left.
fn record(runtime: &Runtime, sandbox: &PodSandbox, pod_dir: &Path, pid: i32) -> io::Result<()> {
    let record = json!({
        "pid": pid,
        "address": "",
        "root": runtime.root,
        "cgroup": sandbox.cgroup,
    });
    fs::write(pod_dir.join(RECORD), record.to_string())
}

/// Ends a sandbox with everything in it: first that, so that nothing in there can hold up what follows.
///
/// # Errors
/// What could not be ended or removed.
pub fn end(
    runtime: &Runtime,
    sandbox: &PodSandbox,
    cgroups: &Hierarchies,
    process: &[OwnedFd],
) -> Result<(), removal::RemovalError> {
    removal::kill_cgroup(cgroups, &sandbox.cgroup, process)?;
    removal::remove_cgroup(cgroups, &sandbox.cgroup)?;
    match fs::remove_dir_all(&runtime.root) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(removal::RemovalError::Directory {
                path: PathBuf::from(&runtime.root),
                source,
            })
        }
        _ => Ok(()),
    }
}
