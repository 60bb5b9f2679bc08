//! Containers that a shim of containerd's protocol makes (`runtime/shim` is the client): one shim for a pod, which is the
//! keeper's descendant and talks to it alone.
//!
//! ```text
//! keeper --fork--> job --exec--> SHIM start --fork--> shim (becomes the keeper's child)
//!    |              \-- mounts, writes bundles, calls        \-- runtime, or a virtual machine
//!    |-- link: waits for the ends of containers ----------->
//!    |<- events.sock: OOM kills ----------------------------
//! ```
//!
//! The shim lives in a mount namespace of its own, which the keeper holds, too: jobs go in to mount a container's root file
//! system, and all of it goes with the shim and the keeper. What calls the shim is a job with a deadline; a shim that is gone
//! or does not answer is found out by its connection, and its containers are ended through their cgroups.

mod create;
mod exec;
mod input;
pub mod pause;
mod relay;
mod remove;
mod sandbox;
mod silence;
mod turn;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use slipway_proto::keeper::{ErrorKind, Runtime as Settings};
use slipway_shim::{
    Address, Defaults, Options, OptionsError, Process, Program, ShimError, Task, Version,
};

pub use create::{Fifos, Inherited, create};
pub use exec::{Session, exec};
pub use relay::both_ends;
pub use remove::{Pod, clear, remove, tear_down};
pub use sandbox::{Start, leave_others, root as pause_root, sandbox_cgroup, specification, start};
pub use silence::{SILENT, Silence, UNKNOWN};
pub use turn::Turn;

/// How long connecting may take; a shim that runs answers at once, or its queue is full.
const CONNECT: Duration = Duration::from_secs(3);
/// How long `Kill` may take before a signal is sent without it.
pub const KILL: Duration = Duration::from_secs(4);
/// How long `Start` may take: less than limits.start_timeout.
pub const START: Duration = Duration::from_secs(25);
/// How long `Update` may take.
pub const UPDATE: Duration = Duration::from_secs(20);
/// How long `Exec` and `Start` of a command may take.
pub const EXEC: Duration = Duration::from_secs(60);
/// How long a shim may take to hand on the last output of a process that has ended.
pub const DELETE: Duration = Duration::from_secs(10);
/// The namespace that shims are told, in containerd's sense.
const NAMESPACE: &str = "slipway";
/// Directory of the pod's bundle, in its run directory.
pub const BUNDLE: &str = "sandbox";
/// Socket for a shim's events, in the pod's run directory.
pub const EVENTS: &str = "events.sock";
/// FIFO that a shim logs to, in its bundle.
pub const LOG: &str = "log";
/// File in the pod's run directory that says where its shim is.
pub const RECORD: &str = "shim.json";

/// A handler's shim, for one pod.
#[derive(Debug, Clone)]
pub struct Shim {
    /// The handler's name, for messages.
    pub handler: String,
    /// The pod's id, which is the sandbox's.
    pub pod: String,
    program: Program,
    options: String,
    /// Directory of the runtime's state, for this pod alone.
    root: String,
    /// How long a create may take.
    pub create_timeout: Duration,
}

impl Shim {
    /// As the daemon describes it; `events` is the path of the socket for events, as others reach it.
    pub fn new(settings: &Settings, pod: &str, events: PathBuf) -> Self {
        Self {
            handler: settings.handler.clone(),
            pod: pod.to_owned(),
            program: Program {
                path: PathBuf::from(&settings.path),
                namespace: NAMESPACE.to_owned(),
                events,
                // Of a protocol that is older than the one with a socket.
                publisher: PathBuf::from("/bin/true"),
                debug: false,
            },
            options: settings.options.clone(),
            root: format!("{}/{pod}", settings.root),
            create_timeout: Duration::from_millis(settings.create_timeout_ms.max(1)),
        }
    }

    /// What the shim is told; the pipes that it makes for a container's streams are `owner`'s.
    fn options(&self, systemd: bool, owner: (u32, u32)) -> Result<Option<Options>, OptionsError> {
        let defaults = Defaults {
            root: &self.root,
            systemd,
            owner,
        };
        Options::new(&self.program.path, &self.options, defaults)
    }
}

/// A shim that runs.
#[derive(Debug, Clone)]
pub struct Running {
    /// Where it listens.
    pub address: Address,
    /// Its process id; 0 if it did not say.
    pub pid: i32,
    /// It has the sandbox API.
    pub sandbox_api: bool,
}

impl Running {
    /// A connection to it.
    ///
    /// # Errors
    /// [`ShimError::Connect`].
    pub fn connect(&self) -> Result<Task, ShimError> {
        Task::connect(&self.address, CONNECT)
    }

    /// As it is written down.
    fn record(&self, shim: &Shim, cgroup: &Path) -> serde_json::Value {
        serde_json::json!({
            "handler": shim.handler,
            "program": shim.program.path,
            "root": shim.root,
            "address": self.address.socket,
            "version": self.address.version.number(),
            "pid": self.pid,
            "cgroup": cgroup,
        })
    }

    /// By what a job has told the keeper.
    pub fn of(address: &str, version: u32, pid: i32, sandbox_api: bool) -> Option<Self> {
        Some(Self {
            address: Address {
                socket: address.to_owned(),
                version: Version::of(version)?,
            },
            pid,
            sandbox_api,
        })
    }
}

/// Goes into the shim's mount namespace.
///
/// # Errors
/// What the kernel says.
pub fn enter(mounts: &OwnedFd) -> io::Result<()> {
    Ok(setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS)?)
}

/// Starts a container when it is its turn, which takes no longer than [`START`] with the wait for it. Runs in a job.
///
/// # Errors
/// [`ShimError`].
pub fn start_container(running: &Running, id: &str, turn: Turn) -> Result<(), ShimError> {
    let until = Instant::now() + START;
    turn_of(&turn, "Start", until, START)?;
    let left = until.saturating_duration_since(Instant::now());
    let started = running.connect()?.start(Process::init(id), left).map(drop);
    drop(turn);
    match started {
        // Of the whole time, not of what the queue has left of it.
        Err(ShimError::TimedOut { method, .. }) => Err(ShimError::TimedOut {
            method,
            timeout: START,
        }),
        other => other,
    }
}

/// Waits for a turn, as for an answer to a call.
fn turn_of(turn: &Turn, method: &str, until: Instant, timeout: Duration) -> Result<(), ShimError> {
    let method = method.to_owned();
    match turn.wait(until, None) {
        Ok(true) => Ok(()),
        Ok(false) => Err(ShimError::TimedOut { method, timeout }),
        Err(source) => Err(ShimError::Connection { method, source }),
    }
}

/// Sends a signal. Runs in a job.
///
/// # Errors
/// [`ShimError`].
pub fn kill(running: &Running, id: &str, signal: i32, all: bool) -> Result<(), ShimError> {
    running
        .connect()?
        .kill(Process::init(id), signal.cast_unsigned(), all, KILL)
}

/// Closes a container's standard input. Runs in a job.
///
/// # Errors
/// [`ShimError`].
pub fn close_stdin(running: &Running, id: &str) -> Result<(), ShimError> {
    running.connect()?.close_stdin(Process::init(id), KILL)
}

/// Changes limits. Runs in a job.
///
/// # Errors
/// [`ShimError`].
pub fn update(running: &Running, id: &str, resources: &[u8]) -> Result<(), ShimError> {
    running.connect()?.update(id, resources, UPDATE)
}

/// Has the shim forget a container that has ended, which it does when all output has been handed on. Runs in a job.
///
/// # Errors
/// [`ShimError`].
pub fn reap(running: &Running, id: &str) -> Result<(), ShimError> {
    running
        .connect()?
        .delete(Process::init(id), DELETE)
        .map(drop)
}

/// The class of a failure.
pub fn kind(error: &ShimError) -> ErrorKind {
    match error.is_timeout() {
        true => ErrorKind::TimedOut,
        false => ErrorKind::Internal,
    }
}

/// A path by a descriptor of this process, as others reach it.
fn path_of(fd: &impl std::os::fd::AsRawFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd())
}

/// A path as text.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
